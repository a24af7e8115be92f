//! What the tests of pods share: a node with a kubelet's runtime, and the project's command line for its containers.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]
#![allow(dead_code, reason = "each test file uses what it needs")]

use std::time::Duration;

use agentcube_tests::images::Image;
use agentcube_tests::kubelet::{ContainerSpec, NAMESPACE, Pod, Seen};
use agentcube_tests::node::{Node, NodeOptions};
use serde_json::Value;

/// For what takes a moment, on a machine that is busy with other things.
pub const SOON: Duration = Duration::from_secs(30);

pub fn start() -> Node {
    Node::start(NodeOptions::default()).unwrap()
}

/// The agent in Python, which listens on port 8080.
pub fn agent(name: &str) -> ContainerSpec {
    ContainerSpec::new(name, Image::Python)
}

/// Writes the numbers from 1 on, ten a second.
pub fn counter(name: &str) -> ContainerSpec {
    ContainerSpec::new(name, Image::Counter)
}

/// What `agentcube` says of a container, or of all containers of a sandbox: the `ok` of its answer, or its error.
pub fn agentcube(node: &Node, id: &str, words: &[&str]) -> Result<Value, String> {
    let mut line = vec!["agentcube", "--json", "--namespace", NAMESPACE];
    line.extend(words);
    line.push(id);
    let output = node.exec(&line).unwrap();
    let Ok(mut answer) = serde_json::from_str::<Value>(&output.stdout) else { panic!("{output:?}") };
    match answer["results"][0].take() {
        Value::Object(result) if result.contains_key("ok") => Ok(result["ok"].clone()),
        result => Err(result["error"]["message"].as_str().unwrap_or_else(|| panic!("{result}")).to_owned()),
    }
}

/// Puts a pod to sleep that must be able to.
pub fn sleep_at(node: &Node, pod: &Pod, depth: &str) {
    agentcube(node, pod.sandbox(), &["sleep", "--depth", depth]).unwrap();
}

/// Wakes a pod.
pub fn wake(node: &Node, pod: &Pod) {
    agentcube(node, pod.sandbox(), &["wake"]).unwrap();
}

/// The state and the depth of a container as the shim has them.
pub fn state(node: &Node, pod: &Pod, name: &str) -> (String, String) {
    let told = agentcube(node, &pod.id(name).unwrap(), &["inspect"]).unwrap();
    let text = |field: &str| told["container"][field].as_str().unwrap_or_default().to_owned();
    (text("state"), text("depth"))
}

/// Sees to it that these containers of a pod sleep at a depth, and that a kubelet finds nothing about it.
pub fn assert_asleep(node: &Node, pod: &Pod, names: &[&str], depth: &str) {
    for name in names {
        assert_eq!(state(node, pod, name), ("asleep".to_owned(), depth.to_owned()), "{name}");
    }
    assert_running(pod, names);
}

/// Sees to it that these containers of a pod are awake.
pub fn assert_awake(node: &Node, pod: &Pod, names: &[&str]) {
    for name in names {
        assert_eq!(state(node, pod, name).0, "running", "{name}");
    }
    assert_running(pod, names);
}

/// A pod is ready for a kubelet and these containers run, the first ones that were started.
pub fn assert_running(pod: &Pod, names: &[&str]) {
    assert!(pod.is_ready().unwrap());
    for name in names {
        assert_eq!(pod.seen(name).unwrap(), Seen::Running, "{name}");
        assert_eq!(pod.restarts(name), 0, "{name}");
    }
}

/// The lines of a counter, by its log: each number once, in order, and nothing left out.
pub fn assert_counts(lines: &[String]) -> usize {
    for (wanted, line) in (1..).zip(lines) {
        assert_eq!(line, &wanted.to_string(), "after {wanted} lines");
    }
    lines.len()
}
