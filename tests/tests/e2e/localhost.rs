//! The loopback of a pod's network namespace, where CRI's port-forward connects to; and the files that tell a pod of its
//! network.

use std::path::PathBuf;
use std::process::Command;

use tests::Case;
use tests::command::{Finished, eventually, run};

/// A network namespace with its loopback up, gone when the test ends.
struct Netns<'a> {
    case: &'a Case,
    name: String,
}

impl<'a> Netns<'a> {
    fn new(case: &'a Case, id: &str) -> Self {
        let netns = Self {
            case,
            name: id.to_owned(),
        };
        for command in [
            vec!["netns", "add", id],
            vec!["-n", id, "link", "set", "lo", "up"],
        ] {
            let mut ip = Command::new("ip");
            run(ip.args(command), case.limit()).unwrap().expect_code(0);
        }
        netns
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// What `http://AUTHORITY/page` is, for somebody in the namespace.
    fn get(&self, authority: &str) -> Finished {
        let candidates = &self.case.daemon().settings.busybox;
        let busybox = candidates.iter().find(|path| path.exists()).unwrap();
        let mut wget = Command::new("nsenter");
        wget.arg(format!("--net={}", self.path().display()))
            .arg(busybox)
            .args(["wget", "-q", "-O", "-", &format!("http://{authority}/page")]);
        run(&mut wget, self.case.limit()).unwrap()
    }
}

impl Drop for Netns<'_> {
    fn drop(&mut self) {
        let mut ip = Command::new("ip");
        let _ = run(ip.args(["netns", "delete", &self.name]), self.case.limit());
    }
}

#[test]
fn port_when_a_container_listens_on_its_loopback_is_reached_from_the_pods_namespace() {
    let seen = Case::like_runc("localhost", |case| {
        let container = case.container();
        let netns = Netns::new(case, container.id());
        let script = "echo hello >/page; httpd -p '[::1]:8080' -h /; exec httpd -f -p 127.0.0.1:8080 -h /";
        container
            .run(&["sh", "-c", script])
            .flag("-d")
            .flag("--null-io")
            .option("--with-ns", &format!("network:{}", netns.path().display()))
            .output()
            .expect_code(0);

        let answers = ["127.0.0.1:8080", "localhost:8080", "[::1]:8080"].map(|authority| {
            let mut answer = String::new();
            let reached = eventually(case.limit(), || {
                answer = netns.get(authority).out();
                !answer.is_empty()
            });
            assert!(reached, "{authority}");
            answer
        });
        let nobody = netns.get("127.0.0.1:8081").code;

        container.kill("KILL").expect_code(0);
        container.wait_state(Some("STOPPED"));
        case.ctr(["tasks", "delete", container.id()]);
        let mut ip = Command::new("ip");
        let sockets = run(
            ip.args([
                "netns",
                "exec",
                &netns.name,
                "cat",
                "/proc/net/tcp",
                "/proc/net/tcp6",
            ]),
            case.limit(),
        );
        // Sockets that listen: none is left.
        let listening = sockets
            .unwrap()
            .out()
            .lines()
            .filter(|line| line.contains(" 0A "))
            .count();
        (answers, nobody, netns.get("127.0.0.1:8080").code, listening)
    });
    assert_eq!(seen, (["hello\n"; 3].map(str::to_owned), 1, 1, 0));
}

#[test]
fn network_files_when_mounted_by_containerd_are_the_containers() {
    let seen = Case::like_runc("network-files", |case| {
        let container = case.container();
        let folder = case.folder("files");
        let run = container.run(&[
            "sh",
            "-c",
            "cd /etc; cat resolv.conf hosts hostname; echo x >>hosts; cat hosts",
        ]);
        let run = ["resolv.conf", "hosts", "hostname"]
            .iter()
            .fold(run.flag("--rm"), |run, name| {
                let source = folder.join(name);
                std::fs::write(&source, format!("{name} of the pod\n")).unwrap();
                let mount = format!(
                    "type=bind,src={},dst=/etc/{name},options=rbind:rw",
                    source.display()
                );
                run.option("--mount", &mount)
            });
        (
            run.output().out(),
            std::fs::read_to_string(folder.join("hosts")).unwrap(),
        )
    });
    let pods = "resolv.conf of the pod\nhosts of the pod\nhostname of the pod\n";
    assert_eq!(seen.0, format!("{pods}hosts of the pod\nx\n"));
    assert_eq!(seen.1, "hosts of the pod\nx\n");
}
