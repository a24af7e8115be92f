//! An agent's memory is the same to the last byte after each sleep, whatever kind of memory it is and whatever the
//! agent does to it next.

#![allow(clippy::unwrap_used)]

mod sleeper;

use agentcube_tests::images::Image;
use agentcube_tests::node::{Agent, AgentSpec, Node};
use sleeper::{SOON, agentcube, spec, start};

/// An agent with so many MiB of known memory.
fn memory(id: &str, mib: u64) -> AgentSpec {
    spec(Image::Memory, id).env("MEMORY_MIB", &mib).env("SEED", &mib)
}

fn fill<'node>(node: &'node Node, spec: &AgentSpec) -> Agent<'node> {
    let agent = node.run_agent(spec).unwrap();
    agent.wait_healthy().unwrap();
    verify(&agent);
    agent
}

fn verify(agent: &Agent<'_>) {
    ask(agent, "GET", "/verify", "");
}

/// A request that is answered with an error when a byte of the memory is wrong.
fn ask(agent: &Agent<'_>, method: &str, path: &str, body: &str) {
    let reply = agent.http(method, path, body).unwrap();
    assert_eq!(reply.status, 200, "{method} {path}: {}", reply.body);
}

fn sleep_and_wake(node: &Node, agent: &Agent<'_>) {
    agentcube(node, &["sleep", agent.id()]).check().unwrap();
    agentcube(node, &["wake", agent.id()]).check().unwrap();
}

/// Several sleeps, with other contents each time.
fn outlives_cycles(mib: u64, cycles: usize) {
    let node = start();
    let agent = fill(&node, &memory("m", mib));
    for _ in 0..cycles {
        sleep_and_wake(&node, &agent);
        verify(&agent);
        ask(&agent, "POST", "/write", "2000");
        verify(&agent);
    }
    sleep_and_wake(&node, &agent);
    // Asleep again before all of it has been looked at.
    sleep_and_wake(&node, &agent);
    verify(&agent);
}

#[test]
fn sixteen_mib_of_every_kind_outlive_many_cycles() {
    outlives_cycles(16, 8);
}

#[test]
fn a_quarter_of_a_gib_outlives_several_cycles() {
    outlives_cycles(256, 3);
}

#[test]
fn memory_that_is_written_all_the_time_outlives_sleeps() {
    let node = start();
    let agent = fill(&node, &memory("m", 64));
    ask(&agent, "POST", "/writer", "20000");
    for _ in 0..4 {
        sleep_and_wake(&node, &agent);
        std::thread::sleep(std::time::Duration::from_millis(150));
        verify(&agent);
    }
}

/// What changes the map of the memory, first thing after a wake.
#[test]
fn memory_can_be_moved_unmapped_dropped_and_shared_with_a_child_right_after_a_wake() {
    let node = start();
    let agent = fill(&node, &memory("m", 64));
    for path in ["/move", "/fork", "/drop", "/unmap", "/move", "/fork"] {
        sleep_and_wake(&node, &agent);
        ask(&agent, "POST", path, "");
        verify(&agent);
    }
}

/// Freezes the agent as soon as none of its threads runs: one that waits for its memory may have been given it just then.
fn freeze(node: &Node, more: &[&str]) {
    let command: Vec<&str> = ["sleep"].iter().chain(more).copied().chain(["m"]).collect();
    let freezes = || match agentcube(node, &command) {
        slept if slept.status == 0 => Ok(true),
        refused if refused.stderr.contains("it is at work") => Ok(false),
        failed => failed.check().map(|_| true),
    };
    node.wait_until("a moment in which it does nothing", SOON, freezes).unwrap();
}

/// What stops it while its memory is still coming: another sleep, or a client that pauses it.
#[test]
fn memory_goes_on_coming_while_an_agent_is_frozen_again_right_after_a_wake() {
    let node = start();
    let agent = fill(&node, &memory("m", 256));
    for depth in ["frozen", "reclaimed", "frozen"] {
        sleep_and_wake(&node, &agent);
        freeze(&node, &["--or-shallower", "--depth", depth]);
        agentcube(&node, &["wake", "m"]).check().unwrap();
        verify(&agent);
        sleep_and_wake(&node, &agent);
        agent.ctr(&["task", "pause", "m"]).unwrap().check().unwrap();
        agent.ctr(&["task", "resume", "m"]).unwrap().check().unwrap();
        verify(&agent);
    }
    // From frozen on, before all has come.
    sleep_and_wake(&node, &agent);
    freeze(&node, &["--depth", "frozen"]);
    sleep_and_wake(&node, &agent);
    verify(&agent);
}

#[test]
fn a_fault_in_the_memory_is_found() {
    let node = start();
    let agent = fill(&node, &memory("m", 16));
    let regions = agent.http("GET", "/regions", "").unwrap().body;
    let (pid, _) = agent.task().unwrap().unwrap();
    for name in ["private ", "sparse ", "shared ", "shm ", "brk ", "stack ", "heap-7 ", "zero ", "untouched "]
    {
        let line = regions.lines().find(|line| line.starts_with(name)).unwrap();
        let address = line.split(' ').nth(1).unwrap().trim_start_matches("0x");
        let address = u64::from_str_radix(address, 16).unwrap() + 4096 + 77;
        let flip = format!(
            "import os
memory = os.open('/proc/{pid}/mem', os.O_RDWR)
old = os.pread(memory, 1, {address})
os.pwrite(memory, bytes([old[0] ^ 1]), {address})"
        );
        let flip = ["python3", "-c", &flip];
        node.exec(&flip).unwrap().check().unwrap();
        let reply = agent.http("GET", "/verify", "").unwrap();
        assert_eq!(reply.status, 500, "{name}: {}", reply.body);
        let words = "WRONG 1 of";
        assert!(reply.body.starts_with(words) && reply.body.contains("byte 77"), "{}", reply.body);
        node.exec(&flip).unwrap().check().unwrap();
        verify(&agent);
    }
    // Without a network, by a signal.
    agent.kill("SIGUSR1").unwrap();
    node.wait_until("the verdict", SOON, || Ok(agent.log()?.contains("\nverified "))).unwrap();
}
