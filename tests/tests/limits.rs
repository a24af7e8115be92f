//! Limits of memory across sleeps. They need the memory controller of cgroup v2, which a virtual node has:
//! `make test-vm` runs them there.

#![allow(clippy::unwrap_used)]

mod cycle;

use std::fs;
use std::sync::LazyLock;

use agentcube_tests::images::Image;
use agentcube_tests::node::{Agent, Node, cgroup_root};
use agentcube_tests::skipped;
use cycle::{SOON, agent, agentcube, assert_asleep, cgroup, inspect, running, start, wake};

/// The random bytes that the agent holds, in MiB.
const BALLAST: u64 = 48;

/// The node of all tests here, whose agents' memory can be limited: on an emulated machine its start and the image take
/// longer than a test. None on a host whose controllers belong to cgroup v1.
fn node() -> Option<&'static Node> {
    static NODE: LazyLock<Node> = LazyLock::new(start);
    let controllers = agentcube_tests::cgroup::controllers(&cgroup_root().unwrap());
    if controllers.iter().any(|name| name == "memory") {
        return Some(&NODE);
    }
    skipped("this machine's cgroup v2 has no memory controller; make test-vm runs it in a virtual machine");
    None
}

/// An agent with its ballast and a port of its own, and the digest of that ballast.
fn agent_with_ballast<'a>(node: &'a Node, id: &str, port: u16) -> (Agent<'a>, String) {
    let agent = node.run_agent(&agent(Image::Python, id).port(port).env("BALLAST_MIB", &BALLAST)).unwrap();
    agent.wait_healthy().unwrap();
    let digest = agent.digest().unwrap();
    (agent, digest)
}

/// Puts an agent to sleep once it has done with the connection of the last request.
fn sleep_soon(node: &Node, agent: &Agent) {
    let asleep = || match agentcube(node, agent, &["sleep"]) {
        Err(error) if error.contains("TCP connection") => Ok(false),
        other => Ok(other.map(|_| true).unwrap()),
    };
    node.wait_until("the agent to fall asleep", SOON, asleep).unwrap();
    assert_asleep(node, agent);
}

fn limit(node: &Node, agent: &Agent, file: &str, value: &str) {
    fs::write(cgroup(node, agent).join(file), value).unwrap();
}

/// A number in a file of the agent's cgroup; `name` chooses the line where there are several.
fn value(node: &Node, agent: &Agent, file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(cgroup(node, agent).join(file)).unwrap();
    let line =
        text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name}: {text}"));
    line.trim().parse().unwrap()
}

fn oom_kills(node: &Node, agent: &Agent) -> u64 {
    value(node, agent, "memory.events", "oom_kill ")
}

#[test]
fn a_wake_that_needs_more_memory_than_its_limit_fails_and_the_image_is_kept() {
    let Some(node) = node() else { return };
    let (agent, digest) = agent_with_ballast(node, "short", 8101);
    sleep_soon(node, &agent);
    let pid = running(&agent);
    limit(node, &agent, "memory.swap.max", "0");
    limit(node, &agent, "memory.max", &(BALLAST << 19).to_string());
    for _ in 0..2 {
        let kills = oom_kills(node, &agent);
        let error = agentcube(node, &agent, &["wake"]).unwrap_err();
        println!("{error}");
        assert!(oom_kills(node, &agent) > kills);
        assert!(error.contains("memory"), "{error}");
        assert_asleep(node, &agent);
        let told = inspect(node, &agent);
        assert!(told["last_error"].to_string().contains("memory"), "{told}");
        // To containerd it runs on: the OOM kill was that of a restore, not of the agent.
        assert_eq!(running(&agent), pid);
    }
    limit(node, &agent, "memory.max", "max");
    wake(node, &agent);
    assert_eq!(agent.digest().unwrap(), digest);
}

#[test]
fn a_wake_beyond_the_memory_limit_uses_the_swap_that_is_allowed() {
    let Some(node) = node() else { return };
    if fs::read_to_string("/proc/swaps").unwrap().lines().count() < 2 {
        return skipped("this machine has no swap");
    }
    let (agent, digest) = agent_with_ballast(node, "swapping", 8102);
    sleep_soon(node, &agent);
    // About a third does not fit.
    limit(node, &agent, "memory.max", &((BALLAST - 8) << 20).to_string());
    wake(node, &agent);
    assert_eq!(agent.digest().unwrap(), digest);
    assert!(value(node, &agent, "memory.swap.current", "") > 0);
    assert_eq!(oom_kills(node, &agent), 0);
}

#[test]
fn an_agent_limited_to_little_more_than_it_uses_sleeps_and_wakes_unharmed() {
    const MARGIN: u64 = 8 << 20;
    let Some(node) = node() else { return };
    let (agent, digest) = agent_with_ballast(node, "tight", 8103);
    limit(node, &agent, "memory.swap.max", "0");
    let used = value(node, &agent, "memory.current", "");
    let most = (used + MARGIN).to_string();
    limit(node, &agent, "memory.max", &most);
    for _ in 0..3 {
        sleep_soon(node, &agent);
        wake(node, &agent);
        assert_eq!(agent.digest().unwrap(), digest);
        println!("{used} bytes used, the most is {}", value(node, &agent, "memory.peak", ""));
    }
    assert_eq!(oom_kills(node, &agent), 0);
}
