//! Agents at all kinds of places in the cgroup tree, by the cgroupfs driver: deep below pods' cgroups, with a cgroup
//! namespace of their own and without one, and in a subtree that systemd has delegated. They need the controllers of
//! cgroup v2: `make test-vm` runs them in virtual machines.

#![allow(clippy::unwrap_used)]

mod ballast;
mod cycle;
mod placed;

use std::fs;
use std::path::Path;

use agentcube_tests::images::Image;
use agentcube_tests::node::{Agent, Node, NodeOptions, has_systemd};
use agentcube_tests::skipped;
use cycle::{agent, running, wake};
use placed::{limits, sleep};

/// Starts an agent at `path` with limits of its own.
fn start<'node>(
    node: &'node Node,
    id: &str,
    port: u16,
    path: &str,
    flags: &[&str],
) -> (Agent<'node>, String) {
    let place = ["--cgroup", path, "--memory-limit", "268435456", "--cpu-quota", "70000"];
    let spec = agent(Image::Python, id).port(port).env("BALLAST_MIB", &16);
    let flags = place.iter().chain(flags);
    let agent = node.run_agent(&flags.fold(spec, |spec, flag| spec.flag(*flag))).unwrap();
    agent.wait_healthy().unwrap();
    let digest = agent.digest().unwrap();
    (agent, digest)
}

/// The agent's cgroup as it sees it itself.
fn seen_inside(agent: &Agent) -> String {
    agent.exec(&["cat", "/proc/1/cgroup"]).unwrap().check().unwrap()
}

/// The agent's cgroup as the node's processes see it.
fn seen_outside(node: &Node, agent: &Agent) -> String {
    node.sh(&format!("cat /proc/{}/cgroup", running(agent))).unwrap()
}

/// Lets an agent sleep and wake at each depth, and sees to it that its place and its limits stay as they are.
fn stays(node: &Node, agent: &Agent, digest: &str, cgroup: &Path) {
    let place = || (seen_inside(agent), seen_outside(node, agent));
    let (before, limited) = (place(), limits(cgroup));
    assert!(limited.contains("memory.max=268435456") && limited.contains("cpu.max=70000 "), "{limited}");
    for depth in ["frozen", "reclaimed", "checkpointed"] {
        sleep(node, agent, cgroup, depth);
        assert_eq!(limits(cgroup), limited, "asleep ({depth})");
        wake(node, agent);
        assert_eq!(limits(cgroup), limited, "awake after {depth}");
        assert_eq!(place(), before, "after {depth}");
        assert_eq!(agent.digest().unwrap(), digest);
    }
}

#[test]
fn an_agent_deep_below_pods_keeps_its_place_and_its_limits_at_each_depth() {
    let Some(node) = ballast::node() else { return };
    let path = "/kubepods/burstable/pod0f1e2d3c/deep";
    let (agent, digest) = start(node, "deep", 8401, path, &["--with-ns", "cgroup:"]);
    assert_eq!(seen_inside(&agent).trim(), "0::/");
    assert_eq!(seen_outside(node, &agent).trim(), format!("0::{path}"));
    stays(node, &agent, &digest, &node.cgroup(path));
    agent.delete().unwrap();
    assert!(!node.cgroup(path).exists());
}

#[test]
fn an_agent_without_a_cgroup_namespace_of_its_own_keeps_its_place_and_its_limits() {
    let Some(node) = ballast::node() else { return };
    let path = "/kubepods/besteffort/pod4b5a6978/open";
    let (agent, digest) = start(node, "open", 8402, path, &[]);
    assert_eq!(seen_inside(&agent).trim(), format!("0::{path}"));
    stays(node, &agent, &digest, &node.cgroup(path));
    agent.delete().unwrap();
}

#[test]
fn an_agent_in_a_subtree_that_systemd_has_delegated_keeps_its_place_and_its_limits() {
    if !has_systemd() {
        return skipped(
            "systemd is not the first process; make test-vm runs it in a virtual machine where it is",
        );
    }
    let node = Node::of_machine(NodeOptions::default()).unwrap();
    let unit = "agentcube-delegated.service";
    node.sh(&format!("systemd-run --unit={unit} -pDelegate=yes -pDelegateSubgroup=own sleep infinity"))
        .unwrap();
    let path = format!("/system.slice/{unit}/pods/pod3c2d1e0f/agent");
    let (agent, digest) = start(&node, "delegated", 8403, &path, &[]);
    let cgroup = Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/'));
    stays(&node, &agent, &digest, &cgroup);
    node.sh("systemctl daemon-reload").unwrap();
    stays(&node, &agent, &digest, &cgroup);
    agent.delete().unwrap();
    node.sh(&format!("systemctl stop {unit}")).unwrap();
    assert!(!fs::exists(cgroup).unwrap());
}
