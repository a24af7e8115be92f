//! gRPC probes of a checkpointed agent are answered without waking it, and every other call reaches the agent whole.

#![allow(clippy::unwrap_used)]

mod calls;
mod cycle;
mod pod;
mod probed;

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use agentcube_tests::images::Image;
use agentcube_tests::kubelet::{ContainerSpec, Kubelet, PodSpec, Probe};
use agentcube_tests::node::{AgentSpec, Net, Runtime};
use calls::{channel, check};
use cycle::{SOON, agent, assert_asleep, sleep, start, wakes};
use probed::{ELSEWHERE, GATEWAY, POD, PORT, answering, dial, run, wakes_it};

/// By which a server knows a kubelet.
const KUBELET: &str = "kube-probe/1.36 grpc-go/1.72";
const CLIENT: &str = "grpc-go/1.72";

fn health(id: &str) -> AgentSpec {
    let spec = answering(agent(Image::Python, id).net(Net::Pod).port(PORT));
    spec.args(&["python3", "/grpc_health.py"])
}

/// Checks the agent's health, as often as there are user agents, over one connection.
fn checks(from: &str, user_agents: &[&str]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut client = channel(dial(from, POD).unwrap()).await;
        for user_agent in user_agents {
            check(&mut client, user_agent).await;
        }
    });
}

#[test]
fn a_hundred_grpc_probes_do_not_wake_an_agent_and_the_first_call_does() {
    let node = start();
    let agent = run(&node, &health("a"));
    node.inside(|| checks(GATEWAY, &[KUBELET])).unwrap();
    for turn in 1..=2 {
        sleep(&node, &agent);
        let mut took: Vec<Duration> = node
            .inside(|| {
                let ask = |_| {
                    let begun = Instant::now();
                    checks(GATEWAY, &[KUBELET]);
                    begun.elapsed()
                };
                (0..100).map(ask).collect()
            })
            .unwrap();
        took.sort_unstable();
        println!("answered: median {:?}, most {:?}", took[50], took[99]);
        assert_eq!(wakes(&node, &agent), turn - 1);
        assert_asleep(&node, &agent);
        wakes_it(&node, &agent, || checks(ELSEWHERE, &[KUBELET, CLIENT]));
    }
    assert!(!node.containerd_log().contains("it is connected to the agent"), "{}", node.containerd_log());
}

#[test]
fn a_call_that_is_no_probe_is_answered_by_the_agent_over_the_same_connection() {
    let node = start();
    let agent = run(&node, &health("a"));
    for _ in 0..2 {
        sleep(&node, &agent);
        // Over this connection probes are calls like others.
        wakes_it(&node, &agent, || checks(GATEWAY, &[CLIENT, KUBELET, CLIENT]));
    }
    assert_eq!(node.containerd_log().matches("it is connected to the agent").count(), 2);
}

/// Says back what it hears.
const ECHO: &str = "
import os, socket
listener = socket.create_server(('0.0.0.0', int(os.environ['PORT'])))
print('ready', flush=True)
while True:
    connection, _ = listener.accept()
    while heard := connection.recv(65536):
        connection.sendall(heard)
    connection.close()
";

#[test]
fn every_byte_of_a_client_of_http_2_reaches_the_agent_but_what_was_meant_for_the_shim() {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
    /// Settings that allow one stream.
    const GREETING: [u8; 15] = [0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1];
    const ACKNOWLEDGEMENT: &[u8] = &[0, 0, 0, 4, 1, 0, 0, 0, 0];
    let node = start();
    let spec = answering(agent(Image::Python, "echo").net(Net::Pod).port(PORT));
    let agent = run(&node, &spec.args(&["python3", "-c", ECHO]));
    // A header block that cannot be read, and 16 KiB of data many times over.
    let mut call = vec![0, 0, 1, 1, 4, 0, 0, 0, 1, 0x80];
    for number in 0..40 {
        call.extend([0, 0x40, 0, 0, 0, 0, 0, 0, 1]);
        call.extend((0..0x4000).map(|at: u32| (at % 251 + number).to_le_bytes()[0]));
    }
    for acknowledges_late in [false, true] {
        sleep(&node, &agent);
        wakes_it(&node, &agent, || {
            let mut stream = dial(GATEWAY, POD).unwrap();
            stream.write_all(&[PREFACE, SETTINGS].concat()).unwrap();
            let mut greeting = [0; GREETING.len()];
            stream.read_exact(&mut greeting).unwrap();
            assert_eq!(greeting, GREETING);
            let mut reading = stream.try_clone().unwrap();
            let echo = thread::spawn(move || {
                let mut echo = Vec::new();
                reading.read_to_end(&mut echo).unwrap();
                echo
            });
            let (first, second): (&[u8], &[u8]) =
                if acknowledges_late { (&call, ACKNOWLEDGEMENT) } else { (ACKNOWLEDGEMENT, &call) };
            for words in [first, second, ACKNOWLEDGEMENT] {
                stream.write_all(words).unwrap();
            }
            stream.shutdown(Shutdown::Write).unwrap();
            let wanted = [PREFACE, SETTINGS, &call, ACKNOWLEDGEMENT].concat();
            let echo = echo.join().unwrap();
            assert!(echo == wanted, "{} bytes came back of {}", echo.len(), wanted.len());
        });
    }
}

#[test]
fn a_kubelet_that_probes_a_checkpointed_pod_by_grpc_neither_wakes_nor_restarts_it() {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let second = Duration::from_secs(1);
    let health = ContainerSpec::new("grpc", Image::Python)
        .command(&["/usr/bin/python3", "/grpc_health.py"])
        .startup(Probe::grpc(9090).every(second).failures(30))
        .readiness(Probe::grpc(9090).every(second).timeout(SOON))
        .liveness(Probe::grpc(9090).every(second).timeout(SOON));
    let spec = PodSpec::new("probed", Runtime::Agentcube).annotation("agentcube.volcano.sh/probes", "answer");
    let pod = kubelet.run(spec.container(pod::agent("agent")).container(health)).unwrap();
    pod.wait_healthy(8080).unwrap();
    let wakes = || {
        let told = pod::agentcube(&node, &pod.id("grpc").unwrap(), &["inspect"]).unwrap();
        told["container"]["wakes"].as_u64().unwrap()
    };
    let ((), report) = kubelet.attend(&[&pod], || {
        let sleeps_through_probes = || {
            // A probe may be under way at this moment: then the pod is not idle.
            let slept = || {
                let asked = pod::agentcube(&node, pod.sandbox(), &["sleep", "--depth", "checkpointed"]);
                Ok(asked.is_ok())
            };
            node.wait_until("the pod to sleep", SOON, slept).unwrap();
            let before = wakes();
            thread::sleep(Duration::from_secs(8));
            wakes() == before
        };
        // On a machine that is busy a client may say nothing for longer than the shim listens, and is no probe then.
        assert!((0..3).any(|_| sleeps_through_probes()), "{}", node.containerd_log());
        pod::assert_asleep(&node, &pod, &["agent", "grpc"], "checkpointed");
    });
    let failed = report.failed_probes.iter().filter(|probe| !probe.contains("Startup"));
    assert!(report.probes > 5 && failed.count() == 0, "{report:#?}");
    assert!(report.restarts == 0 && report.errors.is_empty() && report.not_ready.is_empty(), "{report:#?}");
}
