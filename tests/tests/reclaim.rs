//! Agents whose memory is pushed out to swap while they sleep. That needs swap, and the memory controller of cgroup v2 to
//! count what is left; a virtual node has both: `make test-vm` runs the tests there.

#![allow(clippy::unwrap_used)]

mod ballast;
mod cycle;
mod pod;

use std::fs;
use std::thread;
use std::time::Duration;

use agentcube_tests::images::Image;
use agentcube_tests::kubelet::{Kubelet, PodSpec};
use agentcube_tests::memory;
use agentcube_tests::node::{Agent, AgentSpec, Node, Runtime, ask};
use ballast::{BALLAST, agent_with_ballast, has_swap, limit, sleep_soon, value};
use cycle::{SOON, agent, agentcube, cgroup, inspect, running, sleep_in_place, wake, wakes};

const MIB: u64 = 1 << 20;
/// Long enough for an agent to wake that wakes for nothing.
const QUIET: Duration = Duration::from_secs(1);

/// The node of the tests, where it can reclaim.
fn node() -> Option<&'static Node> {
    ballast::node().filter(|_| has_swap())
}

/// Memory of the agent that is there, as its cgroup counts it.
fn held(node: &Node, agent: &Agent) -> u64 {
    value(node, agent, "memory.current", "")
}

/// Reclaims an agent, and sees to it that most of its ballast is out of memory and that it sleeps on.
fn reclaim(node: &Node, agent: &Agent) {
    let before = held(node, agent);
    sleep_in_place(node, agent, "reclaimed");
    thread::sleep(QUIET);
    assert_reclaimed(node, agent);
    let after = held(node, agent);
    let swapped = value(node, agent, "memory.swap.current", "");
    println!(
        "{}: {} MiB held before, {} after, {} in swap",
        agent.id(),
        before / MIB,
        after / MIB,
        swapped / MIB
    );
    assert!(after + BALLAST * MIB * 3 / 4 < before, "{before} bytes before, {after} after");
    assert!(swapped > BALLAST * MIB * 3 / 4, "{swapped} bytes in swap");
}

fn assert_reclaimed(node: &Node, agent: &Agent) {
    let told = inspect(node, agent);
    assert_eq!(
        (told["state"].as_str(), told["depth"].as_str()),
        (Some("asleep"), Some("reclaimed")),
        "{told}"
    );
}

#[test]
fn a_reclaimed_agent_gives_its_memory_back_and_traffic_wakes_it_with_every_byte() {
    let Some(node) = node() else { return };
    let (agent, digest) = agent_with_ballast(node, "reclaimed", 8201);
    let pid = running(&agent);
    for turn in 1..=2 {
        reclaim(node, &agent);
        assert_eq!(running(&agent), pid, "to containerd it runs");
        assert_eq!(agent.digest().unwrap(), digest);
        let told = inspect(node, &agent);
        assert_eq!(told["wakes"], turn);
        assert_eq!(told["last_wake"]["cause"], "traffic", "{told}");
        assert_eq!(told["last_wake"]["depth"], "reclaimed", "{told}");
    }
    agent.delete().unwrap();
}

#[test]
fn a_connection_that_stays_open_serves_requests_before_and_after_its_agent_is_reclaimed() {
    let Some(node) = node() else { return };
    let (agent, digest) = agent_with_ballast(node, "open", 8208);
    let mut open = agent.connect().unwrap();
    assert_eq!(ask(&mut open, "GET", "/digest", "").unwrap().body, digest);
    for turn in 1..=2 {
        reclaim(node, &agent);
        assert_eq!(ask(&mut open, "GET", "/digest", "").unwrap().body, digest);
        assert_eq!(ask(&mut open, "GET", "/health", "").unwrap().body, "ok");
        let told = inspect(node, &agent);
        assert_eq!(
            (&told["wakes"], &told["last_wake"]["cause"]),
            (&turn.into(), &"traffic".into()),
            "{told}"
        );
    }
    assert!(ask(&mut open, "POST", "/chat", "hello").unwrap().body.contains("hello"));
    agent.delete().unwrap();
}

#[test]
fn the_containers_of_a_pod_are_reclaimed_as_one_and_whatever_wakes_one_wakes_all() {
    let Some(node) = node() else { return };
    let kubelet = Kubelet::on(node).unwrap();
    let both = ["agent", "worker"];
    let spec = PodSpec::new("reclaimed", Runtime::Agentcube)
        .container(pod::agent("agent").env("BALLAST_MIB", &BALLAST))
        .container(pod::agent("worker").env("BALLAST_MIB", &BALLAST).env("PORT", &8081));
    let pod = kubelet.run(spec).unwrap();
    let ports = [8080, 8081];
    for port in ports {
        pod.wait_healthy(port).unwrap();
    }
    let digest = |port| pod.http(port, "GET", "/digest", "").unwrap().body;
    let digests = ports.map(digest);
    let held = |name| {
        let file = pod.cgroup().join(pod.id(name).unwrap()).join("memory.current");
        fs::read_to_string(file).unwrap().trim().parse::<u64>().unwrap()
    };
    for waker in ["request", "command"] {
        let before = both.map(held);
        let asleep = || match pod::agentcube(node, pod.sandbox(), &["sleep", "--depth", "reclaimed"]) {
            Err(reason) if reason.contains("at work") => Ok(false),
            other => Ok(other.map(|_| true).unwrap()),
        };
        node.wait_until("the pod to fall asleep", SOON, asleep).unwrap();
        thread::sleep(QUIET);
        pod::assert_asleep(node, &pod, &both, "reclaimed");
        let after = both.map(held);
        println!("{before:?} bytes held before, {after:?} after");
        assert!(before.iter().zip(after).all(|(before, after)| after + BALLAST * MIB * 3 / 4 < *before));
        match waker {
            "request" => assert_eq!(digest(8080), digests[0]),
            _ => assert_eq!(pod.exec("worker", &["true"], SOON).unwrap().exit_code, 0),
        }
        let awake = || Ok(both.iter().all(|name| pod::state(node, &pod, name).0 == "running"));
        node.wait_until("all to wake", SOON, awake).unwrap();
        assert_eq!(ports.map(digest), digests);
        pod::assert_awake(node, &pod, &both);
    }
    pod.remove().unwrap();
}

#[test]
fn a_sleep_deepens_from_frozen_to_reclaimed_to_checkpointed_without_a_wake_and_keeps_every_byte() {
    let Some(node) = node() else { return };
    let (agent, digest) = agent_with_ballast(node, "deepening", 8202);
    sleep_in_place(node, &agent, "frozen");
    reclaim(node, &agent);
    sleep_soon(node, &agent);
    let told = inspect(node, &agent);
    assert_eq!((&told["sleeps"], &told["wakes"]), (&1.into(), &0.into()), "{told}");
    wake(node, &agent);
    assert_eq!(agent.digest().unwrap(), digest);
    agent.delete().unwrap();
}

#[test]
fn what_needs_a_reclaimed_agent_wakes_it_and_a_kill_ends_it() {
    let Some(node) = node() else { return };
    let (agent, digest) = agent_with_ballast(node, "needed", 8203);
    reclaim(node, &agent);
    agent.exec(&["true"]).unwrap().check().unwrap();
    assert_eq!(inspect(node, &agent)["last_wake"]["cause"], "exec");
    assert_eq!(agent.digest().unwrap(), digest);
    reclaim(node, &agent);
    agent.kill("SIGKILL").unwrap();
    assert_eq!(agent.wait_and_delete(SOON).unwrap(), 137);
}

#[test]
fn where_a_cgroup_may_use_no_swap_nothing_is_reclaimed_and_the_reason_is_told() {
    let Some(node) = node() else { return };
    let (agent, digest) = agent_with_ballast(node, "forbidden", 8204);
    limit(node, &agent, "memory.swap.max", "0");
    let refused = agentcube(node, &agent, &["sleep", "--depth", "reclaimed"]).unwrap_err();
    assert!(refused.contains("nothing to reclaim to") && refused.contains("memory.swap.max"), "{refused}");
    assert_eq!(inspect(node, &agent)["state"], "running");
    let shallower =
        || Ok(agentcube(node, &agent, &["sleep", "--depth", "reclaimed", "--or-shallower"]).is_ok());
    node.wait_until("the agent to sleep", SOON, shallower).unwrap();
    assert_eq!(inspect(node, &agent)["depth"], "frozen");
    assert!(held(node, &agent) > BALLAST * MIB);
    // Once it may, the sleep is deepened.
    limit(node, &agent, "memory.swap.max", "max");
    reclaim(node, &agent);
    assert_eq!(wakes(node, &agent), 0);
    assert_eq!(agent.digest().unwrap(), digest);
    agent.delete().unwrap();
}

/// The agent's proportional share of memory by its processes, where its cgroup tells nothing.
fn pss(node: &Node, agent: &Agent) -> u64 {
    memory::pss(&cgroup(node, agent)).unwrap()
}

#[test]
fn without_a_memory_controller_memory_is_pushed_out_process_by_process() {
    let Some(node) = node() else { return };
    let mut spec = agent(Image::Python, "uncounted").port(8205).env("BALLAST_MIB", &BALLAST);
    spec.namespace = "uncounted".into();
    let agent = node.run_agent(&spec).unwrap();
    agent.wait_healthy().unwrap();
    let digest = agent.digest().unwrap();
    fs::write(node.cgroup("/uncounted/cgroup.subtree_control"), "-memory").unwrap();
    assert!(!cgroup(node, &agent).join("memory.reclaim").exists());
    let before = pss(node, &agent);
    sleep_in_place(node, &agent, "reclaimed");
    assert_reclaimed(node, &agent);
    assert_eq!(inspect(node, &agent)["last_sleep"]["engine"], "process_madvise");
    let after = pss(node, &agent);
    println!("{} MiB held before, {} after", before / MIB, after / MIB);
    assert!(after + BALLAST * MIB * 3 / 4 < before, "{before} bytes before, {after} after");
    assert_eq!(agent.digest().unwrap(), digest);
    agent.delete().unwrap();
}

/// An agent that has been reclaimed and woken, and did nothing since; how much of its memory is there then, and in the
/// end.
fn comes_back(node: &Node, spec: &AgentSpec) -> (u64, u64) {
    let agent = node.run_agent(spec).unwrap();
    agent.wait_healthy().unwrap();
    let digest = agent.digest().unwrap();
    reclaim(node, &agent);
    let least = held(node, &agent);
    wake(node, &agent);
    let back = || Ok(held(node, &agent) > least + BALLAST * MIB * 3 / 4);
    let _ = node.wait_until("the memory to come back", Duration::from_millis(250), back);
    let most = held(node, &agent);
    assert_eq!(agent.digest().unwrap(), digest);
    agent.delete().unwrap();
    (least, most)
}

#[test]
fn memory_is_read_back_at_once_on_a_wake_where_that_is_asked_for() {
    let Some(node) = node() else { return };
    let spec = |id: &str, port| agent(Image::Python, id).port(port).env("BALLAST_MIB", &BALLAST);
    node.sh("(cat /etc/agentcube/shim.toml; echo prefetch_on_wake = true) >/etc/agentcube/prefetch.toml")
        .unwrap();
    let asked = spec("prefetched", 8206).flag("--runtime-config-path").flag("/etc/agentcube/prefetch.toml");
    let (least, most) = comes_back(node, &asked);
    assert!(most > least + BALLAST * MIB * 3 / 4, "{least} bytes asleep, {most} awake");
    let (least, most) = comes_back(node, &spec("touched", 8207));
    assert!(most < least + BALLAST * MIB / 2, "{least} bytes asleep, {most} awake");
}
