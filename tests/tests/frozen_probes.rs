//! A frozen agent answers probes itself without being woken, and whatever else comes wakes it.

#![allow(clippy::unwrap_used)]

mod cycle;
mod pod;
mod probed;

use std::fs;
use std::io::Read as _;
use std::thread;
use std::time::{Duration, Instant};

use agentcube_tests::images::Image;
use agentcube_tests::kubelet::{ContainerSpec, Kubelet, PodSpec, Probe};
use agentcube_tests::node::{Agent, Net, Node, Runtime};
use cycle::{SOON, agent, agentcube, cgroup, inspect, sleep_at, sleep_in_place, start, wakes};
use probed::{
    ELSEWHERE, ELSEWHERE6, GATEWAY, GATEWAY6, POD, POD6, PORT, answering, ask, dial, probe, python, run,
    wakes_it,
};

/// The depths of this machine that leave the processes where they are.
fn depths(node: &Node) -> &'static [&'static str] {
    let swap = node.read_file("/proc/swaps").unwrap().lines().count() > 1;
    if swap { &["frozen", "reclaimed"] } else { &["frozen"] }
}

fn is_frozen(node: &Node, agent: &Agent) -> bool {
    let events = fs::read_to_string(cgroup(node, agent).join("cgroup.events")).unwrap();
    events.contains("frozen 1")
}

fn is_awake(node: &Node, agent: &Agent) -> bool {
    inspect(node, agent)["state"] == "running"
}

/// Sees to it that an agent sleeps as it did `before`, and stands still.
fn assert_undisturbed(node: &Node, agent: &Agent, before: &serde_json::Value) {
    node.wait_until("the agent to stand still", SOON, || Ok(is_frozen(node, agent))).unwrap();
    let now = inspect(node, agent);
    for field in
        ["state", "depth", "since_unix_ms", "sleeps", "wakes", "last_wake", "last_sleep", "last_error"]
    {
        assert_eq!(now[field], before[field], "{field}: {}", node.containerd_log());
    }
}

/// Puts an agent to sleep, lets `probes` come, and sees to it that it sleeps on. On a machine that is busy a probe may take
/// longer than the shim gives it, and is a wake then: it is tried again.
fn sleeps_through(node: &Node, agent: &Agent, depth: &str, probes: impl Fn() + Send + Sync) {
    let sleeps_on = || {
        sleep_in_place(node, agent, depth);
        let before = inspect(node, agent);
        node.inside(&probes).unwrap();
        let settled = || Ok(is_frozen(node, agent) || is_awake(node, agent));
        node.wait_until("the agent to stand still, or to be awake", SOON, settled).unwrap();
        if is_awake(node, agent) {
            return false;
        }
        assert_undisturbed(node, agent, &before);
        true
    };
    assert!((0..3).any(|_| sleeps_on()), "{}", node.containerd_log());
}

#[test]
fn a_hundred_probes_of_a_frozen_agent_are_answered_by_it_and_are_no_wake() {
    let node = start();
    for (spec, from, elsewhere, to) in [
        (python("python").env("BIND", "0.0.0.0"), GATEWAY, ELSEWHERE, POD),
        (python("python6").env("BIND", "::"), GATEWAY6, ELSEWHERE6, POD6),
    ] {
        let agent = run(&node, &spec);
        for (turn, depth) in (1..).zip(depths(&node)) {
            sleeps_through(&node, &agent, depth, || {
                let ask = |_| {
                    let begun = Instant::now();
                    assert_eq!(probe(from, to), "ok");
                    let took = begun.elapsed();
                    // A TCP probe.
                    drop(dial(from, to).unwrap());
                    thread::sleep(Duration::from_millis(100));
                    took
                };
                let mut took: Vec<Duration> = (0..50).map(ask).collect();
                took.sort_unstable();
                println!("{depth}: answered after {:?}, at most {:?}", took[25], took[49]);
            });
            wakes_it(&node, &agent, || assert_eq!(ask(elsewhere, to, "good morning"), turn));
        }
        agent.delete().unwrap();
        node.sh("ip link del pod0").unwrap();
    }
}

#[test]
fn a_kubelet_that_probes_a_frozen_pod_in_every_way_neither_wakes_nor_restarts_it() {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let often = |probe: Probe| probe.every(Duration::from_millis(1300));
    let health = ContainerSpec::new("grpc", Image::Python)
        .command(&["/usr/bin/python3", "/grpc_health.py"])
        .startup(Probe::grpc(9090).every(Duration::from_secs(1)).failures(30))
        .liveness(often(Probe::grpc(9090)));
    let http =
        pod::agent("agent").liveness(often(Probe::http(8080, "/health"))).readiness(often(Probe::tcp(8080)));
    let spec = PodSpec::new("probed", Runtime::Agentcube).annotation("agentcube.volcano.sh/probes", "answer");
    let pod = kubelet.run(spec.container(http).container(health)).unwrap();
    pod.wait_healthy(8080).unwrap();
    let count = |name: &str| {
        let told = pod::agentcube(&node, &pod.id(name).unwrap(), &["inspect"]).unwrap();
        told["container"]["wakes"].as_u64().unwrap()
    };
    let ((), report) = kubelet.attend(&[&pod], || {
        thread::sleep(Duration::from_secs(3));
        let sleeps_through_probes = || {
            // A probe may be under way at this moment: then the pod is not idle.
            let slept = || Ok(pod::agentcube(&node, pod.sandbox(), &["sleep", "--depth", "frozen"]).is_ok());
            node.wait_until("the pod to sleep", SOON, slept).unwrap();
            let before = ["agent", "grpc"].map(count);
            thread::sleep(Duration::from_secs(6));
            before == ["agent", "grpc"].map(count)
        };
        // On a machine that is busy a probe may take longer than the shim gives it, and is a wake then.
        assert!((0..3).any(|_| sleeps_through_probes()), "{}", node.containerd_log());
        pod::assert_asleep(&node, &pod, &["agent", "grpc"], "frozen");
    });
    let failed = report.failed_probes.iter().filter(|probe| !probe.contains("Startup"));
    assert!(report.probes > 20 && failed.count() == 0, "{report:#?}");
    assert!(report.restarts == 0 && report.errors.is_empty() && report.not_ready.is_empty(), "{report:#?}");
}

#[test]
fn a_client_that_comes_in_the_middle_of_probes_wakes_a_frozen_agent_and_is_served() {
    let node = start();
    let agent = run(&node, &python("a"));
    for cycle in 0..20 {
        let slept = || Ok(agentcube(&node, &agent, &["sleep", "--depth", "frozen"]).is_ok());
        node.wait_until("the agent to sleep", SOON, slept).unwrap();
        let begun = wakes(&node, &agent);
        node.inside(|| {
            thread::scope(|scope| {
                scope.spawn(|| (0..10).for_each(|_| assert_eq!(probe(GATEWAY, POD), "ok")));
                thread::sleep(Duration::from_millis(cycle * 2));
                assert_eq!(ask(ELSEWHERE, POD, "hello"), cycle + 1);
            });
        })
        .unwrap();
        let awake = || Ok(is_awake(&node, &agent));
        node.wait_until("the agent to be awake", SOON, awake).unwrap();
        assert_eq!(wakes(&node, &agent), begun + 1, "{}", node.containerd_log());
        assert_eq!(inspect(&node, &agent)["last_wake"]["cause"], "traffic");
    }
}

/// Serves each client at once, and goes on working for as many milliseconds as its argument says.
const WORKER: &str = "
import os, socket, sys, time
listener = socket.create_server(('0.0.0.0', int(os.environ['PORT'])))
print('ready', flush=True)
while True:
    connection, _ = listener.accept()
    connection.recv(4096)
    connection.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\nok')
    connection.close()
    end = time.monotonic() + int(sys.argv[1]) / 1000
    while time.monotonic() < end:
        pass
";

#[test]
fn work_that_a_probe_sets_off_is_let_go_on_and_is_a_wake_when_it_lasts() {
    let node = start();
    for (milliseconds, is_wake) in [("30", false), ("900", true)] {
        let spec = answering(agent(Image::Python, &format!("w{milliseconds}")).net(Net::Pod).port(PORT));
        let agent = run(&node, &spec.args(&["python3", "-c", WORKER, milliseconds]));
        if is_wake {
            sleep_at(&node, &agent, "frozen");
            node.inside(|| assert_eq!(probe(GATEWAY, POD), "ok")).unwrap();
            let awake = || Ok(is_awake(&node, &agent));
            node.wait_until("the agent to be awake", SOON, awake).unwrap();
            assert_eq!(inspect(&node, &agent)["last_wake"]["cause"], "traffic");
        } else {
            sleeps_through(&node, &agent, "frozen", || assert_eq!(probe(GATEWAY, POD), "ok"));
        }
        agent.delete().unwrap();
        node.sh("ip link del pod0").unwrap();
    }
}

#[test]
fn who_comes_from_the_address_of_probes_and_stays_wakes_a_frozen_agent() {
    let node = start();
    let agent = run(&node, &python("a"));
    sleep_at(&node, &agent, "frozen");
    let mut stream = node.inside(|| dial(GATEWAY, POD).unwrap()).unwrap();
    let awake = || Ok(is_awake(&node, &agent));
    node.wait_until("the agent to be awake", SOON, awake).unwrap();
    assert_eq!(inspect(&node, &agent)["last_wake"]["cause"], "traffic");
    // What was open before is no probe, wherever it comes from.
    sleeps_through(&node, &agent, "frozen", || assert_eq!(probe(GATEWAY, POD), "ok"));
    wakes_it(&node, &agent, || {
        std::io::Write::write_all(&mut stream, b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.ends_with("ok"), "{answer:?}");
    });
}

#[test]
fn without_the_option_a_probe_wakes_a_frozen_agent() {
    let node = start();
    let agent = run(&node, &agent(Image::Python, "a").net(Net::Pod).port(PORT));
    sleep_at(&node, &agent, "frozen");
    wakes_it(&node, &agent, || assert_eq!(probe(GATEWAY, POD), "ok"));
}

#[test]
fn an_agent_that_has_answered_probes_sleeps_deeper_without_a_wake() {
    let node = start();
    let agent = run(&node, &python("a"));
    for turn in 1..=5 {
        sleeps_through(&node, &agent, "frozen", || assert_eq!(probe(GATEWAY, POD), "ok"));
        let before = inspect(&node, &agent);
        let slept = || Ok(agentcube(&node, &agent, &["sleep", "--depth", "checkpointed"]).is_ok());
        node.wait_until("the agent to sleep deeper", SOON, slept).unwrap();
        node.inside(|| assert_eq!(probe(GATEWAY, POD), "asleep\n")).unwrap();
        let now = inspect(&node, &agent);
        assert_eq!((&now["wakes"], &now["sleeps"]), (&before["wakes"], &before["sleeps"]));
        wakes_it(&node, &agent, || assert_eq!(ask(ELSEWHERE, POD, "hello"), turn));
    }
}
