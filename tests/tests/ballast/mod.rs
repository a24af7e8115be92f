//! Agents whose memory a cgroup counts and limits: on a machine with the memory controller of cgroup v2, as a virtual
//! node is (`make test-vm`).

#![allow(dead_code, reason = "each test file uses what it needs")]

use std::fs;
use std::sync::LazyLock;

use agentcube_tests::images::Image;
use agentcube_tests::node::{Agent, Node, cgroup_root};
use agentcube_tests::skipped;

use crate::cycle::{SOON, agent, agentcube, assert_asleep, cgroup, start};

/// The random bytes that an agent holds, in MiB.
pub const BALLAST: u64 = 48;

/// The node of all tests of a file, whose agents' memory can be limited: on an emulated machine its start and the image
/// take longer than a test. None on a host whose controllers belong to cgroup v1.
pub fn node() -> Option<&'static Node> {
    static NODE: LazyLock<Node> = LazyLock::new(start);
    let controllers = agentcube_tests::cgroup::controllers(&cgroup_root().unwrap());
    if controllers.iter().any(|name| name == "memory") {
        return Some(&NODE);
    }
    skipped("this machine's cgroup v2 has no memory controller; make test-vm runs it in a virtual machine");
    None
}

/// Whether this machine has swap; says so when it has not.
pub fn has_swap() -> bool {
    let has = fs::read_to_string("/proc/swaps").unwrap().lines().count() > 1;
    if !has {
        skipped("this machine has no swap; make test-vm runs it in a virtual machine");
    }
    has
}

/// An agent with its ballast and a port of its own, and the digest of that ballast.
pub fn agent_with_ballast<'a>(node: &'a Node, id: &str, port: u16) -> (Agent<'a>, String) {
    let agent = node.run_agent(&agent(Image::Python, id).port(port).env("BALLAST_MIB", &BALLAST)).unwrap();
    agent.wait_healthy().unwrap();
    let digest = agent.digest().unwrap();
    (agent, digest)
}

/// Checkpoints an agent once it has done with the connection of the last request.
pub fn sleep_soon(node: &Node, agent: &Agent) {
    let asleep = || match agentcube(node, agent, &["sleep"]) {
        Err(error) if error.contains("TCP connection") => Ok(false),
        other => Ok(other.map(|_| true).unwrap()),
    };
    node.wait_until("the agent to fall asleep", SOON, asleep).unwrap();
    assert_asleep(node, agent);
}

/// Writes a file of the agent's cgroup.
pub fn limit(node: &Node, agent: &Agent, file: &str, value: &str) {
    fs::write(cgroup(node, agent).join(file), value).unwrap();
}

/// A number in a file of the agent's cgroup; `name` chooses the line where there are several.
pub fn value(node: &Node, agent: &Agent, file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(cgroup(node, agent).join(file)).unwrap();
    let line =
        text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name}: {text}"));
    line.trim().parse().unwrap()
}
