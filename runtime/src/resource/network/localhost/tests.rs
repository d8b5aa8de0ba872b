//! The kernel's part is the real one, in a network namespace of the test's own (root); the guest is the test.

use std::io::ErrorKind;
use std::process::Command;

use tokio::sync::mpsc::UnboundedReceiver;

use super::*;
use crate::host::netns::tests::TestNetns;
use crate::hypervisor::fake::{Boot, FakeHypervisor};

/// A namespace with its loopback up and an interface with the address 10.9.9.1.
struct Pod(TestNetns);

impl Pod {
    fn new() -> Self {
        let test = TestNetns::new();
        let set_up = || {
            for command in [
                "link set lo up",
                "link add pod0 type veth peer name pod1",
                "link set pod0 up",
                "address add 10.9.9.1/24 dev pod0",
            ] {
                let ip = Command::new("ip").args(command.split(' ')).status().unwrap();
                assert!(ip.success(), "ip {command}");
            }
        };
        test.netns.run(set_up).unwrap();
        Self(test)
    }

    fn path(&self) -> &Path {
        self.0.netns.path()
    }

    /// Runs `work` in the namespace.
    async fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let netns = self.0.netns.clone();
        let done = tokio::task::spawn_blocking(move || netns.run(work));
        done.await.unwrap().unwrap()
    }

    async fn connect(&self, address: &'static str) -> io::Result<TcpStream> {
        let stream = self.inside(move || std::net::TcpStream::connect(address)).await?;
        stream.set_nonblocking(true)?;
        TcpStream::from_std(stream)
    }
}

/// The guest's ends of connections.
struct Guest(UnboundedReceiver<std::os::unix::net::UnixStream>);

impl Guest {
    /// The next connection and the line it begins with.
    async fn accept(&mut self) -> (UnixStream, String) {
        let stream = self.0.recv().await.unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut stream = UnixStream::from_std(stream).unwrap();
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            line.push(stream.read_u8().await.unwrap());
        }
        (stream, String::from_utf8(line).unwrap())
    }
}

async fn start(netns: &Pod) -> (LocalhostForward, Guest) {
    start_bounded(netns, MAX_CONNECTIONS).await
}

async fn start_bounded(netns: &Pod, limit: usize) -> (LocalhostForward, Guest) {
    let hypervisor = Arc::new(FakeHypervisor::new(Boot::Announced));
    let guest = Guest(hypervisor.serve_port(CONNECT_PORT));
    let forward = LocalhostForward::start_bounded(netns.path(), hypervisor, limit).await;
    (forward.unwrap(), guest)
}

#[tokio::test]
async fn connection_when_to_the_loopback_is_made_in_the_guest_with_its_port() {
    let netns = Pod::new();
    let (_forward, mut guest) = start(&netns).await;
    for (address, expected) in [
        ("127.0.0.1:80", "CONNECT tcp4 80\n"),
        ("127.1.2.3:65535", "CONNECT tcp4 65535\n"),
        ("[::1]:8080", "CONNECT tcp6 8080\n"),
    ] {
        let mut client = netns.connect(address).await.unwrap();
        let (mut pod, line) = guest.accept().await;
        assert_eq!(line, expected);
        // The pod speaks first, in the same breath.
        pod.write_all(b"OK\nhello").await.unwrap();
        let mut hello = [0; 5];
        client.read_exact(&mut hello).await.unwrap();
        assert_eq!(&hello, b"hello");

        // Each half ends by itself.
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = String::new();
        pod.read_to_string(&mut question).await.unwrap();
        pod.write_all(b"answer").await.unwrap();
        drop(pod);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!((question.as_str(), answer.as_str()), ("question", "answer"));
    }
}

#[tokio::test]
async fn connection_when_the_guest_refuses_or_talks_nonsense_is_reset() {
    let netns = Pod::new();
    let (_forward, mut guest) = start(&netns).await;
    let long = [b'x'; 4096];
    let answers: [&[u8]; 6] = [
        b"ERROR 111 Connection refused\n",
        b"",
        b"OK",
        b"OK \n",
        b"\xff\xfe\n",
        &long,
    ];
    for answer in answers {
        let mut client = netns.connect("127.0.0.1:80").await.unwrap();
        let (mut pod, _) = guest.accept().await;
        // The host need not read all of it.
        let _ = pod.write_all(answer).await;
        let _ = pod.shutdown().await;

        let error = client.read(&mut [0; 16]).await.unwrap_err();

        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{answer:?}");
    }
}

#[tokio::test]
async fn connection_when_to_another_address_is_not_touched() {
    let netns = Pod::new();
    let (_forward, mut guest) = start(&netns).await;

    let refused = netns.connect("10.9.9.1:80").await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    let listener = netns
        .inside(|| std::net::TcpListener::bind("10.9.9.1:81").unwrap())
        .await;
    let _client = netns.connect("10.9.9.1:81").await.unwrap();
    listener.accept().unwrap();

    assert!(guest.0.try_recv().is_err());
}

#[tokio::test]
async fn datagram_when_to_the_loopback_is_not_touched() {
    let netns = Pod::new();
    let (_forward, _guest) = start(&netns).await;
    let echoed = netns.inside(|| {
        let receiver = std::net::UdpSocket::bind("127.0.0.1:53").unwrap();
        let sender = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.send_to(b"x", "127.0.0.1:53").unwrap();
        receiver.recv(&mut [0; 4]).unwrap()
    });
    assert_eq!(echoed.await, 1);
}

#[tokio::test]
async fn namespace_when_stopped_is_as_before() {
    let netns = Pod::new();
    let listener = netns
        .inside(|| std::net::TcpListener::bind("127.0.0.1:80").unwrap())
        .await;
    let (forward, mut guest) = start(&netns).await;
    // Somebody else's listener gets nothing meanwhile.
    let mut client = netns.connect("127.0.0.1:80").await.unwrap();
    let (mut pod, _) = guest.accept().await;
    pod.write_all(b"OK\nx").await.unwrap();
    client.read_u8().await.unwrap();

    forward.stop().await;

    // What was open is closed, what comes is the kernel's.
    let mut rest = Vec::new();
    let _ = client.read_to_end(&mut rest).await;
    assert_eq!(rest, b"");
    assert_eq!(pod.read(&mut [0; 4]).await.unwrap_or(0), 0);
    let _client = netns.connect("127.0.0.1:80").await.unwrap();
    listener.accept().unwrap();
    let refused = netns.connect("[::1]:80").await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    let sockets = netns
        .inside(|| std::fs::read_to_string("/proc/thread-self/net/tcp6").unwrap())
        .await;
    let listening = |line: &&str| line.split_whitespace().nth(3) == Some("0A");
    assert_eq!(sockets.lines().find(listening), None);
}

#[tokio::test]
async fn connections_when_too_many_are_reset_until_one_ends() {
    let netns = Pod::new();
    let limit = 3;
    let (_forward, mut guest) = start_bounded(&netns, limit).await;
    let mut open = Vec::new();
    for _ in 0..limit {
        let client = netns.connect("127.0.0.1:80").await.unwrap();
        let (mut pod, _) = guest.accept().await;
        pod.write_all(b"OK\n").await.unwrap();
        open.push((client, pod));
    }

    let mut one_more = netns.connect("127.0.0.1:80").await.unwrap();
    let error = one_more.read(&mut [0; 4]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);

    let (mut client, pod) = open.pop().unwrap();
    drop(pod);
    client.read_to_end(&mut Vec::new()).await.unwrap();
    drop(client);
    // The place is free when the connection's task has ended, which nobody can see from here.
    loop {
        let mut next = netns.connect("127.0.0.1:80").await.unwrap();
        tokio::select! {
            (mut pod, _) = guest.accept() => {
                pod.write_all(b"OK\n!").await.unwrap();
                assert_eq!(next.read_u8().await.unwrap(), b'!');
                break;
            }
            ended = next.read_u8() => assert!(ended.is_err()),
        }
    }
}

#[tokio::test]
async fn hosts_namespace_when_given_is_refused() {
    let hypervisor = Arc::new(FakeHypervisor::new(Boot::Announced));
    for (path, kind) in [
        ("/proc/self/ns/net", crate::error::ErrorKind::FailedPrecondition),
        ("/nowhere/netns", crate::error::ErrorKind::NotFound),
        ("/dev/null", crate::error::ErrorKind::InvalidArgument),
    ] {
        let error = LocalhostForward::start(Path::new(path), hypervisor.clone())
            .await
            .unwrap_err();
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.message.contains(path), "{error}");
    }
}
