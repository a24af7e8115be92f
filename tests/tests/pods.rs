//! Pods: containers that share a sandbox share a shim, and sleep and wake as one.

#![allow(clippy::unwrap_used)]

mod sleeper;

use std::fs;
use std::time::Duration;

use agentcube_tests::images::Image;
use agentcube_tests::node::{AgentSpec, Node, Runtime};
use serde_json::Value;
use sleeper::{
    Remembering, SOON, agentcube, assert_refused, assert_says, inspect, on_node, python, run, spec, start,
};

/// The sandbox, and the id of its pause container.
const POD: &str = "pod1";

/// The same container as a part of the pod.
fn in_pod(spec: AgentSpec, kind: &str) -> AgentSpec {
    spec.annotation("io.kubernetes.cri.sandbox-id", POD)
        .annotation("io.kubernetes.cri.container-type", kind)
        .annotation("io.kubernetes.cri.sandbox-name", "assistant")
}

/// The pids on the node of all shims.
fn shims(node: &Node) -> Vec<u64> {
    let mut pids: Vec<u64> = fs::read_dir(on_node(node, "/proc"))
        .unwrap()
        .flatten()
        .filter(|entry| {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            command
                .split(|byte| *byte == 0)
                .next()
                .unwrap_or_default()
                .ends_with(b"/containerd-shim-agentcube-v1")
        })
        .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
        .collect();
    pids.sort_unstable();
    pids
}

fn listed(node: &Node) -> Vec<(String, String)> {
    let text = agentcube(node, &["ps", "--json"]).check().unwrap();
    let listing: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(listing["unreachable"], Value::Array(Vec::new()));
    let of = |container: &Value, field: &str| container[field].as_str().unwrap().to_owned();
    listing["containers"].as_array().unwrap().iter().map(|one| (of(one, "id"), of(one, "state"))).collect()
}

fn states(of: &[(&str, &str)]) -> Vec<(String, String)> {
    of.iter().map(|(id, state)| ((*id).to_owned(), (*state).to_owned())).collect()
}

#[test]
fn containers_of_a_pod_share_a_shim_and_sleep_and_wake_as_one() {
    let node = start();
    node.import(Image::Python, "default").unwrap();
    node.import(Image::Pause, "default").unwrap();
    node.sh("mkdir -p -m 700 /var/lib/agentcube/images").unwrap();
    let before = node.snapshot();
    let pause = node.run_agent(&in_pod(spec(Image::Pause, POD), "sandbox")).unwrap();
    let mut one = run(&node, &in_pod(python("one"), "container"));
    let mut two = run(&node, &in_pod(python("two"), "container"));

    let shim = shims(&node);
    assert_eq!(shim.len(), 1, "{shim:?}");
    assert_eq!(listed(&node), states(&[(POD, "running"), ("one", "running"), ("two", "running")]));
    for id in ["one", "two", POD] {
        let container = inspect(&node, id);
        assert_eq!(container["shim_pid"], shim[0], "{container:#}");
        assert_eq!(container["sandbox_id"], POD, "{container:#}");
        assert_eq!(container["is_sandbox"], id == POD, "{container:#}");
    }
    let text = agentcube(&node, &["ps"]).check().unwrap();
    assert_says(&text, &["one", "two", POD, "assistant"]);
    assert!(on_node(&node, "/run/agentcube/default/pod1.sock").exists());

    let pause_task = pause.task().unwrap();
    let both = |verb| {
        let said = agentcube(&node, &[verb, POD]).check().unwrap();
        assert!(said.contains("one: ") && said.contains("two: ") && !said.contains("pod1: "), "{said}");
    };
    for _ in 0..2 {
        both("sleep");
        assert_eq!(listed(&node), states(&[(POD, "running"), ("one", "asleep"), ("two", "asleep")]));
        one.assert_running_for_containerd();
        two.assert_running_for_containerd();
        both("wake");
        assert_eq!(listed(&node), states(&[(POD, "running"), ("one", "running"), ("two", "running")]));
        one.assert_whole();
        two.assert_whole();
    }
    assert_eq!(pause.task().unwrap(), pause_task, "the pause container is left alone");
    // One of them alone.
    one.sleeps();
    two.assert_state("running");
    two.assert_whole();

    one_after_the_other_ends(&node, &one, &mut two, shim[0]);
    assert_eq!(listed(&node), states(&[(POD, "running")]));
    assert_refused(&agentcube(&node, &["sleep", POD]), &["pause container", "never sleeps"]);
    assert_eq!(shims(&node), shim);
    pause.delete().unwrap();
    // At once: what it waits for when it ends takes ten seconds to be given up.
    node.wait_until("the shim to end", Duration::from_secs(5), || Ok(shims(&node).is_empty())).unwrap();
    node.wait_until_clean(&before, SOON).unwrap();
}

/// The sleeper `one` is deleted, which is none of `two`'s business, and then `two`.
fn one_after_the_other_ends(node: &Node, one: &Remembering<'_>, two: &mut Remembering<'_>, shim: u64) {
    one.agent.delete().unwrap();
    assert_eq!(listed(node), states(&[(POD, "running"), ("two", "running")]));
    two.assert_whole();
    two.sleeps();
    assert_eq!(two.shim_pid(), shim);
    two.wakes();
    two.agent.delete().unwrap();
}

#[test]
fn a_pod_of_which_one_container_cannot_sleep_stays_awake_as_a_whole() {
    let node = start();
    let _pause = node.run_agent(&in_pod(spec(Image::Pause, POD), "sandbox")).unwrap();
    let mut one = run(&node, &in_pod(python("one"), "container"));
    let mut two = run(&node, &in_pod(python("two"), "container"));
    let lasting = two.agent.exec_command(&["sleep", "1000"]).spawn().unwrap();
    node.wait_until("the exec to begin", SOON, || {
        Ok(two.agent.ctr(&["task", "ps", "two"])?.check()?.lines().count() > 2)
    })
    .unwrap();
    assert_refused(&agentcube(&node, &["sleep", POD]), &["cannot put pod1 to sleep", "two", "exec"]);
    one.assert_state("running");
    two.assert_state("running");
    one.assert_whole();
    two.assert_whole();
    drop(lasting);
    two.agent.exec(&["busybox", "killall", "sleep"]).unwrap();
    node.wait_until("the exec to end", SOON, || Ok(agentcube(&node, &["sleep", POD]).status == 0)).unwrap();
    agentcube(&node, &["wake", POD]).check().unwrap();
    one.assert_whole();
    two.assert_whole();
}

#[test]
fn pods_and_single_containers_have_shims_of_their_own() {
    let node = start();
    let _pause = node.run_agent(&in_pod(spec(Image::Pause, POD), "sandbox")).unwrap();
    let mut one = run(&node, &in_pod(python("one"), "container"));
    let mut alone = run(&node, &python("alone"));
    assert_eq!(shims(&node).len(), 2);
    assert_ne!(one.shim_pid(), alone.shim_pid());
    agentcube(&node, &["sleep", POD]).check().unwrap();
    alone.assert_state("running");
    alone.sleeps();
    agentcube(&node, &["wake", "alone", "one"]).check().unwrap();
    one.assert_whole();
    alone.assert_whole();
}

#[test]
fn containerd_learns_the_features_of_the_runtime() {
    let node = start();
    let runtime = Runtime::Agentcube.name();
    let told = node.ctr(&["plugins", "inspect-runtime", "--runtime", runtime]).unwrap();
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told["Name"], runtime, "{told:#}");
    assert!(!told["Version"]["Version"].as_str().unwrap_or_default().is_empty(), "{told:#}");
    assert_says(
        told["Annotations"]["agentcube.volcano.sh/criu-version"].as_str().unwrap_or_default(),
        &["4."],
    );
    let features = &told["Features"];
    assert!(features["ociVersionMax"].is_string(), "{told:#}");
    assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], false, "{told:#}");
    let namespaces = features["linux"]["namespaces"].as_array().unwrap();
    assert!(namespaces.contains(&Value::from("pid")), "{told:#}");
}
