//! Agents by their places in the cgroup tree.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::fs;
use std::path::Path;

use agentcube_tests::node::{Agent, Node};

use crate::cycle::{SOON, agentcube, inspect, sleep_in_place};

/// Files of a cgroup whose contents must be the same whatever the agent does.
const LIMITS: &[&str] = &[
    "cpu.max",
    "cpu.weight",
    "cpuset.cpus",
    "memory.high",
    "memory.low",
    "memory.max",
    "memory.min",
    "memory.swap.max",
    "pids.max",
];

/// What limits the processes of a cgroup.
pub fn limits(cgroup: &Path) -> String {
    let line = |name: &&str| {
        let path = cgroup.join(name);
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        format!("{name}={}", text.trim())
    };
    LIMITS.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Puts an agent to sleep, as soon as it has done with the last request.
pub fn sleep(node: &Node, agent: &Agent, cgroup: &Path, depth: &str) {
    if depth == "checkpointed" {
        let asleep = || match agentcube(node, agent, &["sleep"]) {
            Err(error) if error.contains("TCP connection") => Ok(false),
            other => Ok(other.map(|_| true).unwrap()),
        };
        node.wait_until("the agent to fall asleep", SOON, asleep).unwrap();
        assert_eq!(fs::read_to_string(cgroup.join("cgroup.procs")).unwrap(), "");
    } else {
        sleep_in_place(node, agent, depth);
    }
    assert_eq!(inspect(node, agent)["depth"], depth);
}
