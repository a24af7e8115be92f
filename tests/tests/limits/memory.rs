//! Limits of memory at a wake.

use agentcube_tests::node::{Agent, Node};

use crate::ballast::{BALLAST, agent_with_ballast, has_swap, limit, node, sleep_soon, value};
use crate::cycle::{agentcube, assert_asleep, inspect, running, wake};
use crate::events::Events;

fn oom_kills(node: &Node, agent: &Agent) -> u64 {
    value(node, agent, "memory.events", "oom_kill ")
}

#[test]
fn a_wake_that_needs_more_memory_than_its_limit_fails_and_the_image_is_kept() {
    let Some(node) = node() else { return };
    let events = Events::listen(node);
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
    let told: Vec<_> = events.of("short").into_iter().map(|event| event["topic"].clone()).collect();
    assert_eq!(told, ["/tasks/create", "/tasks/start"], "an OOM kill or an exit was told");
}

#[test]
fn a_wake_beyond_the_memory_limit_uses_the_swap_that_is_allowed() {
    let Some(node) = node() else { return };
    if !has_swap() {
        return;
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
