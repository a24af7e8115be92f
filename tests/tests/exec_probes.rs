//! Exec probes of a sleeping agent are answered with what their commands said last, as a kubelet and as containerd see it.

#![allow(clippy::unwrap_used)]

mod pod;

use std::time::{Duration, Instant};

use agentcube_tests::kubelet::{Kubelet, Pod, PodSpec, Probe};
use agentcube_tests::node::{Node, Runtime};
use pod::{SOON, agent, agentcube, assert_asleep, sleep_at, start, wake};
use serde_json::Value;

const DEPTHS: [&str; 2] = ["frozen", "checkpointed"];
const PROBE: [&str; 2] = ["cat", "/tmp/healthy"];

fn spec(name: &str) -> PodSpec {
    PodSpec::new(name, Runtime::Agentcube).annotation("agentcube.volcano.sh/probes", "answer")
}

fn inspect(node: &Node, pod: &Pod) -> Value {
    agentcube(node, &pod.id("agent").unwrap(), &["inspect"]).unwrap()["container"].take()
}

fn wakes(node: &Node, pod: &Pod) -> u64 {
    inspect(node, pod)["wakes"].as_u64().unwrap()
}

/// Executes a command in the agent as a kubelet does; gives back its status, its output and its errors.
fn exec(pod: &Pod, command: &[&str]) -> (i32, String, String) {
    let done = pod.exec("agent", command, SOON).unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (done.exit_code, text(&done.stdout), text(&done.stderr))
}

/// Tells the shim the agent's probe commands.
fn tell(node: &Node, pod: &Pod, command: &str) -> Value {
    agentcube(node, &pod.id("agent").unwrap(), &["probes", "--command", command]).unwrap()
}

#[test]
fn an_exec_probe_of_a_sleeping_agent_is_answered_with_what_it_said_last() {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let pod = kubelet.run(spec("told").container(agent("agent"))).unwrap();
    pod.wait_healthy(8080).unwrap();
    exec(&pod, &["sh", "-c", "echo fine > /tmp/healthy"]);
    let told = tell(&node, &pod, r#"["cat", "/tmp/healthy"]"#);
    assert_eq!(told["probes"][0]["exit_status"], Value::Null, "{told}");

    sleep_at(&node, &pod, "checkpointed");
    let fine = (0, "fine\n".to_owned(), String::new());
    assert_eq!(exec(&pod, &PROBE), fine);
    assert_eq!(wakes(&node, &pod), 1, "it had not run before");

    for (turn, depth) in (1..).zip(DEPTHS) {
        sleep_at(&node, &pod, depth);
        let before = inspect(&node, &pod);
        let mut took: Vec<Duration> = (0..50)
            .map(|_| {
                let begun = Instant::now();
                assert_eq!(exec(&pod, &PROBE), fine);
                begun.elapsed()
            })
            .collect();
        took.sort_unstable();
        println!("{depth}: answered after {:?}, at most {:?}", took[25], took[49]);
        assert_asleep(&node, &pod, &["agent"], depth);
        for field in ["wakes", "sleeps", "since_unix_ms", "last_wake"] {
            assert_eq!(inspect(&node, &pod)[field], before[field], "{field}");
        }
        // Another command needs the agent, even one that looks like it.
        assert_eq!(exec(&pod, &["cat", "/tmp/healthy", "/dev/null"]), fine);
        assert_eq!(wakes(&node, &pod), turn + 1);
        assert_eq!(inspect(&node, &pod)["last_wake"]["cause"], "exec");
    }
}

#[test]
fn an_exec_probe_that_failed_last_wakes_the_agent() {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let commands = r#"[["cat", "/tmp/healthy"]]"#;
    let annotated = spec("failing").annotation("agentcube.volcano.sh/probe-commands", commands);
    let pod = kubelet.run(annotated.container(agent("agent"))).unwrap();
    pod.wait_healthy(8080).unwrap();
    let failed = exec(&pod, &PROBE);
    assert!(failed.0 == 1 && failed.2.contains("/tmp/healthy"), "{failed:?}");
    for depth in DEPTHS {
        sleep_at(&node, &pod, depth);
        let before = wakes(&node, &pod);
        assert_eq!(exec(&pod, &PROBE), failed);
        assert_eq!(wakes(&node, &pod), before + 1);
    }
    // Once it succeeds it is answered.
    exec(&pod, &["sh", "-c", "echo well >&2; echo fine > /tmp/healthy"]);
    assert_eq!(exec(&pod, &PROBE).0, 0);
    sleep_at(&node, &pod, "checkpointed");
    let before = wakes(&node, &pod);
    assert_eq!(exec(&pod, &PROBE), (0, "fine\n".to_owned(), String::new()));
    assert_eq!(wakes(&node, &pod), before);
    let id = pod.id("agent").unwrap();
    let told = agentcube(&node, &id, &["probes"]).unwrap();
    assert_eq!(
        (&told["probes"][0]["exit_status"], &told["probes"][0]["command"][0]),
        (&0.into(), &"cat".into())
    );
    assert_eq!(agentcube(&node, &id, &["probes", "--none"]).unwrap()["probes"], Value::Array(Vec::new()));
    assert_eq!(exec(&pod, &PROBE).0, 0);
    assert_eq!(wakes(&node, &pod), before + 1, "it is no probe any more");
}

#[test]
fn a_kubelet_that_probes_a_sleeping_pod_by_a_command_neither_wakes_nor_restarts_it() {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let often = |probe: Probe| probe.every(Duration::from_millis(500));
    let probed = agent("agent").liveness(often(Probe::exec(&PROBE))).readiness(often(Probe::exec(&PROBE)));
    let pod = kubelet.run(spec("probed").container(probed)).unwrap();
    pod.wait_healthy(8080).unwrap();
    exec(&pod, &["sh", "-c", "echo fine > /tmp/healthy"]);
    tell(&node, &pod, r#"["cat", "/tmp/healthy"]"#);
    let ((), report) = kubelet.attend(&[&pod], || {
        let ready = || Ok(pod.is_ready().unwrap() && exec(&pod, &PROBE).0 == 0);
        node.wait_until("the pod to be ready", SOON, ready).unwrap();
        for depth in DEPTHS {
            // A probe may run at this moment: then the pod is not idle.
            let slept = || Ok(agentcube(&node, pod.sandbox(), &["sleep", "--depth", depth]).is_ok());
            node.wait_until("the pod to sleep", SOON, slept).unwrap();
            let before = wakes(&node, &pod);
            std::thread::sleep(Duration::from_secs(6));
            assert_eq!(wakes(&node, &pod), before, "{depth}");
            assert_asleep(&node, &pod, &["agent"], depth);
            wake(&node, &pod);
        }
    });
    assert!(report.probes > 20 && report.failed_probes.is_empty(), "{report:#?}");
    assert!(report.restarts == 0 && report.errors.is_empty() && report.not_ready.is_empty(), "{report:#?}");
}
