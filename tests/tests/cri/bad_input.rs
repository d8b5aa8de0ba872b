//! Networks and names at the edge of what is allowed, and beyond.

use tests::Settings;
use tests::cri::cni::{HUGE_MTU, ROUTES};
use tests::cri::config::Series;
use tests::cri::pods::Pods;
use tests::cri::view;
use tests::leftovers::{Host, added};

#[test]
fn network_when_it_has_a_hundred_routes_has_them_all_inside() {
    Pods::like_runc("routes", Series::V1_7, |pods| {
        let pod = pods.pod("routes").run();
        let view = view::assert_equal(&pod, &pod.sleeping());
        let routes = view.iter().filter(|line| line.contains(" 10.200.")).count();
        assert_eq!(routes, ROUTES, "{view:#?}");
    });
}

#[test]
fn network_when_it_has_no_gateway_has_its_address() {
    Pods::like_runc("silent", Series::V1_7, |pods| {
        let pod = pods.pod("silent").run();
        let view = view::assert_equal(&pod, &pod.sleeping());
        assert!(!view.iter().any(|line| line.contains("default")), "{view:#?}");
        let address = format!("eth0 inet {}/24", pod.address());
        assert!(view.iter().any(|line| line.starts_with(&address)), "{view:#?}");
    });
}

#[test]
fn network_when_two_interfaces_have_one_address_is_the_namespaces() {
    Pods::like_runc("twins", Series::V1_7, |pods| {
        let pod = pods.pod("twins").run();
        let view = view::assert_equal(&pod, &pod.sleeping());
        let same = view
            .iter()
            .filter(|line| line.contains(&format!(" inet {}/24", pod.address())));
        assert_eq!(same.count(), 2, "{view:#?}");
    });
}

/// A veth can have 14 bytes more than a TAP.
#[test]
fn mtu_when_beyond_a_taps_is_refused_by_name() {
    Pods::like_runc_alone("huge", Series::V1_7, |pods| {
        if !pods.vm() {
            let pod = pods.pod("huge").run();
            let view = view::assert_equal(&pod, &pod.sleeping());
            let up = format!("eth0 mtu {HUGE_MTU} up true");
            assert!(view.contains(&up), "{view:#?}");
            return;
        }
        let daemon = pods.case().daemon();
        let before = Host::look(daemon);
        let refused = pods.pod("huge").try_run().err().expect("no TAP has such an MTU");
        for word in ["eth0", &HUGE_MTU.to_string()] {
            assert!(refused.message().contains(word), "{refused}");
        }
        assert_eq!(added(daemon, &before), [""; 0]);
    });
}

#[test]
fn namespace_when_its_path_does_not_exist_is_named() {
    Pods::like_runc_alone("no-netns", Series::V1_7, |pods| {
        let daemon = pods.case().daemon();
        let before = Host::look(daemon);
        let runtime = if pods.vm() {
            daemon.settings.runtime.clone()
        } else {
            tests::settings::RUNC.to_owned()
        };
        let mut words = vec!["run", "--rm", "--runtime", &runtime];
        let config = daemon
            .settings
            .config
            .as_ref()
            .map(|path| path.display().to_string());
        if let Some(config) = config.as_ref().filter(|_| pods.vm()) {
            words.extend(["--runtime-config-path", config]);
        }
        words.extend([
            "--snapshotter",
            daemon.snapshotter(),
            "--with-ns",
            "network:/run/netns/none",
        ]);
        words.extend([tests::image::BUSYBOX, "no-netns", "true"]);
        let done = pods.case().ctr(words);
        assert_ne!(done.code, 0, "{}", done.describe());
        assert!(done.err().contains("/run/netns/none"), "{}", done.describe());
        assert_eq!(added(daemon, &before), [""; 0]);
    });
}

/// containerd's own limit for both is 76 characters; CRI's ids have 64.
#[test]
fn names_when_as_long_as_allowed_work() {
    Pods::like_runc("long-names", Series::V1_7, |pods| {
        let daemon = pods.case().daemon();
        let (namespace, id) = ("n".repeat(76), "i".repeat(64));
        let archive = daemon.dir().join("image.tar");
        let archive = archive.to_str().unwrap();
        let ctr = |words: &[&str]| {
            let words = [&["-n", &namespace], words].concat();
            pods.case().ctr(words)
        };
        ctr(&["images", "import", "--snapshotter", daemon.snapshotter(), archive]).expect_code(0);
        let runtime = if pods.vm() {
            daemon.settings.runtime.clone()
        } else {
            tests::settings::RUNC.to_owned()
        };
        let mut words = vec!["run", "--rm", "--runtime", &runtime];
        let config = Settings::from_env().config.map(|path| path.display().to_string());
        if let Some(config) = config.as_ref().filter(|_| pods.vm()) {
            words.extend(["--runtime-config-path", config]);
        }
        words.extend(["--snapshotter", daemon.snapshotter(), tests::image::BUSYBOX, &id]);
        words.extend(["sh", "-c", "echo long; exit 3"]);
        let done = ctr(&words).expect_code(3);
        assert_eq!(done.out(), "long\n", "{}", done.describe());
    });
}

#[test]
fn annotations_when_a_quarter_of_a_megabyte_are_carried() {
    Pods::like_runc("annotations", Series::V2_1, |pods| {
        let large = "a".repeat(256 << 10);
        let pod = pods
            .pod("bridge")
            .annotation("example.com/large", &large)
            .annotation("io.katacontainers.example", &large)
            .run();
        let member = pod
            .container(&["sleep", "10000"])
            .with(|config| {
                config
                    .annotations
                    .insert("example.com/large".to_owned(), large.clone());
            })
            .start();
        member.sh("true");
    });
}
