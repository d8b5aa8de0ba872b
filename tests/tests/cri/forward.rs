//! The pod's localhost: port-forward and probes from its network namespace.

use tests::command::eventually;
use tests::cri::config::Series;
use tests::cri::pods::{Pod, Pods};
use tests::cri::traffic::{body, request, sha256};

/// The body of a web page through port-forward.
#[track_caller]
fn forwarded(pods: &Pods, pod: &Pod<'_>, port: u16, path: &str) -> Vec<u8> {
    let ask = || -> Result<Vec<u8>, Box<dyn std::error::Error>> {
        let mut connection = pods.client().port_forward(pod.id(), port)?;
        connection.write("data", request(path).as_bytes())?;
        Ok(body(&connection.finish("data", pods.limit())?)?)
    };
    let mut page = Err("never asked".into());
    // The server may still be starting: then the connection is hung up, before or behind the request.
    eventually(pods.limit(), || {
        page = ask();
        page.is_ok()
    });
    page.unwrap_or_else(|e| panic!("port {port} of {}: {e}", pod.id()))
}

#[test]
fn port_when_forwarded_reaches_localhost_in_the_pod() {
    for (name, series) in [("forward17", Series::V1_7), ("forward21", Series::V2_1)] {
        Pods::like_runc(name, series, |pods| {
            let pod = pods.pod("bridge").run();
            let script = "mkdir /www; echo home >/www/index.html; head -c 2000000 /dev/urandom >/www/big
                httpd -p 127.0.0.1:8081 -h /www; httpd -p [::1]:8082 -h /www; exec httpd -f -p 8080 -h /www";
            let server = pod.container(&["sh", "-c", script]).start();
            // Everywhere, on IPv4's localhost only, on IPv6's only.
            for port in [8080, 8081, 8082] {
                assert_eq!(forwarded(pods, &pod, port, "/"), b"home\n", "port {port}");
            }
            let big = forwarded(pods, &pod, 8080, "/big");
            let expected = server.sh("sha256sum </www/big");
            assert_eq!(format!("{}  -\n", sha256(&big)), expected, "{} bytes", big.len());
        });
    }
}

#[test]
fn port_when_several_are_forwarded_at_once_are_told_apart() {
    Pods::like_runc("forward-many", Series::V2_1, |pods| {
        let pod = pods.pod("bridge").run();
        let server = pod.web("up");
        forwarded(pods, &pod, 8080, "/");
        server.sh("for i in 1 2 3 4 5 6 7 8; do echo page $i >/www/$i; done");
        let open = |_| pods.client().port_forward(pod.id(), 8080).unwrap();
        let mut connections = (1..=8).map(open).collect::<Vec<_>>();
        for (number, connection) in (1..).zip(&mut connections) {
            connection
                .write("data", request(&format!("/{number}")).as_bytes())
                .unwrap();
        }
        for (number, connection) in (1..).zip(&connections) {
            let page = body(&connection.finish("data", pods.limit()).unwrap()).unwrap();
            assert_eq!(page, format!("page {number}\n").as_bytes());
        }
    });
}

#[test]
fn port_when_nothing_listens_brings_nothing() {
    Pods::like_runc("forward-closed", Series::V2_1, |pods| {
        let pod = pods.pod("bridge").run();
        let _member = pod.sleeping();
        let connection = pods.client().port_forward(pod.id(), 8099).unwrap();
        let said = connection.finish("data", pods.limit()).unwrap();
        assert_eq!(String::from_utf8_lossy(&said), "");
    });
}

#[test]
fn localhost_when_asked_from_the_namespace_is_the_pods() {
    Pods::like_runc("localhost", Series::V1_7, |pods| {
        let pod = pods.pod("bridge").run();
        let _server = pod.web("home");
        forwarded(pods, &pod, 8080, "/");
        for host in ["127.0.0.1", "[::1]"] {
            let url = format!("http://{host}:8080/");
            assert_eq!(
                pod.in_netns(&[pod.busybox(), "wget", "-q", "-O", "-", &url]),
                "home\n",
                "{url}"
            );
        }
    });
}
