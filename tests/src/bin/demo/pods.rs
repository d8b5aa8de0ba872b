//! Two pods on a bridge that CNI's plugins make: a web server in one, reached from the host, through port-forward, and from the other.

use std::error::Error;
use std::time::Instant;

use tests::Settings;
use tests::cri::config::Series;
use tests::cri::pods::Pods;
use tests::cri::traffic::{body, fetch_soon, request};

const PORT: u16 = 8080;

pub fn demo() -> Result<(), Box<dyn Error>> {
    let mut settings = Settings::from_env();
    let notes = super::notes(&mut settings);
    let runtime = settings.runtime.clone();
    let pods = Pods::on_its_own("demo", settings, Series::V1_6);
    let limit = pods.limit();

    println!("\nPods, as kubelet runs them: containerd's CRI, CNI's bridge, runtime {runtime}\n");
    let started = Instant::now();
    let web = pods.pod("bridge").run();
    let ran = started.elapsed();
    let _server = web.web("Hello from a pod in a microVM");
    let address = web.address();
    println!("RunPodSandbox web        {address}, after {} ms", ran.as_millis());
    println!("web: httpd -f -p {PORT}");

    let answer = fetch_soon((address, PORT), "/", limit);
    println!("\nhost        http://{address}:{PORT}/   {}", answer.trim_end());

    let mut forward = pods.client().port_forward(web.id(), PORT)?;
    forward.write("data", request("/").as_bytes())?;
    let forwarded = String::from_utf8(body(&forward.finish("data", limit)?)?)?;
    println!("forwarded   localhost:{PORT} in web   {}", forwarded.trim_end());

    let timeline = super::take(&notes);
    let other = pods.pod("bridge").run();
    let client = other.sleeping();
    let asked = client.sh(&format!("wget -q -O - http://{address}:{PORT}/"));
    println!("other pod   http://{address}:{PORT}/   {}", asked.trim_end());
    if forwarded != answer || asked != answer {
        return Err(format!("three ways, three answers: {answer:?} {forwarded:?} {asked:?}").into());
    }
    println!("\n{}", client.sh("ip addr show eth0; ip route").trim_end());

    println!("\n{}", timeline.table().trim_end());
    let started = Instant::now();
    for pod in [&web, &other] {
        pod.stop();
        pod.remove();
    }
    println!(
        "{:<20}{:>12}",
        "both removed in",
        format!("{}.0", started.elapsed().as_millis())
    );
    Ok(())
}
