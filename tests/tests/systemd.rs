//! Agents whose cgroups are scopes of systemd. They need systemd as the first process, and a containerd beside it: a
//! virtual node of `make test-vm` that is made for this.

#![allow(clippy::unwrap_used)]

mod cycle;
mod placed;

use std::fs;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, MutexGuard};

use agentcube_tests::images::Image;
use agentcube_tests::node::{Agent, AgentSpec, Node, NodeOptions, Runtime, has_systemd};
use agentcube_tests::skipped;
use containerd_shim::protos::api::UpdateTaskRequest;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use cycle::{SOON, agentcube, inspect, patience, running, shim, wake};
use placed::sleep;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const LIMIT: u64 = 256 * MIB;

/// What systemd tells of a scope that must be the same, too.
const PROPERTIES: &str = "-pActiveState -pSubState -pControlGroup -pDelegate -pSlice -pMemoryMax -pMemorySwapMax \
     -pCPUQuotaPerSecUSec -pCPUWeight -pTasksMax -pInvocationID";

/// The machine as a node. One test at a time has it: systemd and containerd are there once.
fn node() -> Option<(&'static Node, MutexGuard<'static, ()>)> {
    static NODE: LazyLock<Node> = LazyLock::new(|| {
        let mut options = NodeOptions::default();
        options.shim_toml.push_str("systemd_cgroup = true\n");
        Node::of_machine(options).unwrap()
    });
    static TURN: Mutex<()> = Mutex::new(());
    if !has_systemd() {
        skipped("systemd is not the first process; make test-vm runs it in a virtual machine where it is");
        return None;
    }
    let turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    Some((&NODE, turn))
}

fn unit(agent: &Agent) -> String {
    format!("agentcube-{}.scope", agent.id())
}

fn scope(agent: &Agent) -> PathBuf {
    PathBuf::from("/sys/fs/cgroup/machine.slice").join(unit(agent))
}

fn file(agent: &Agent, name: &str) -> String {
    let path = scope(agent).join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).trim().to_owned()
}

/// A container in a scope, as the CRI names one for the systemd driver.
fn spec(id: &str, port: u16, runtime: Runtime) -> AgentSpec {
    let spec = AgentSpec::new(Image::Python, id, runtime).port(port).env("BALLAST_MIB", &16);
    let spec = if runtime == Runtime::Runc { spec.flag("--runc-systemd-cgroup") } else { spec };
    [
        "--cgroup",
        &format!("machine.slice:agentcube:{id}"),
        "--memory-limit",
        &LIMIT.to_string(),
        "--cpus",
        "1.5",
    ]
    .iter()
    .fold(spec, |spec, flag| spec.flag(*flag))
}

fn start<'node>(node: &'node Node, id: &str, port: u16) -> (Agent<'node>, String) {
    let agent = node.run_agent(&spec(id, port, Runtime::Agentcube)).unwrap();
    agent.wait_healthy().unwrap();
    let digest = agent.digest().unwrap();
    (agent, digest)
}

/// All that limits the agent, in the kernel's words and in systemd's.
fn limits(node: &Node, agent: &Agent) -> String {
    let shown = node.sh(&format!("systemctl show {PROPERTIES} {}", unit(agent))).unwrap();
    assert!(shown.contains("ActiveState=active\n"), "{shown}");
    format!("{}\n{shown}", placed::limits(&scope(agent)))
}

fn reload(node: &Node) {
    node.sh("systemctl daemon-reload && systemctl daemon-reexec").unwrap();
}

fn update(node: &Node, agent: &Agent, resources: &Value) {
    let resources = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
        value: resources.to_string().into_bytes(),
        ..Any::default()
    };
    let request =
        UpdateTaskRequest { id: agent.id().into(), resources: Some(resources).into(), ..Default::default() };
    shim(node, agent, async |task| task.update(patience(), &request).await).unwrap();
}

fn assert_gone(node: &Node, agent: &Agent) {
    let gone = || {
        let listed = node.sh(&format!("systemctl list-units --all --no-legend --plain {}", unit(agent)))?;
        Ok(listed.is_empty() && !scope(agent).exists())
    };
    node.wait_until("the scope to go", SOON, gone).unwrap();
}

#[test]
fn a_scope_and_its_limits_are_the_same_at_each_depth_and_over_reloads_of_systemd() {
    let Some((node, _turn)) = node() else { return };
    let (agent, digest) = start(node, "depths", 8301);
    let before = limits(node, &agent);
    println!("{before}");
    assert!(
        before.contains(&format!("memory.max={LIMIT}")) && before.contains("cpu.max=150000 100000"),
        "{before}"
    );
    for depth in ["frozen", "reclaimed", "checkpointed"] {
        sleep(node, &agent, &scope(&agent), depth);
        assert_eq!(limits(node, &agent), before, "asleep ({depth})");
        reload(node);
        assert_eq!(limits(node, &agent), before, "asleep ({depth}), reloaded");
        assert_eq!(inspect(node, &agent)["depth"], depth);
        wake(node, &agent);
        assert_eq!(limits(node, &agent), before, "awake after {depth}");
        assert_eq!(agent.digest().unwrap(), digest);
        let pid = running(&agent);
        let member = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert_eq!(member.trim(), format!("0::/machine.slice/{}", unit(&agent)));
    }
    reload(node);
    assert_eq!(limits(node, &agent), before);
    agent.exec(&["true"]).unwrap().check().unwrap();
    agent.delete().unwrap();
    assert_gone(node, &agent);
}

#[test]
fn nothing_of_what_keeps_a_scope_is_counted_among_the_agents_processes() {
    let Some((node, _turn)) = node() else { return };
    let (agent, _) = start(node, "counted", 8302);
    let pid = running(&agent);
    let before: u64 = file(&agent, "memory.current").parse().unwrap();
    sleep(node, &agent, &scope(&agent), "checkpointed");
    assert_eq!(file(&agent, "pids.current"), "1");
    let asleep: u64 = file(&agent, "memory.current").parse().unwrap();
    println!("{before} bytes charged awake, {asleep} asleep");
    assert_eq!(running(&agent), pid);
    let listed = agent.ctr(&["task", "ps", agent.id()]).unwrap().check().unwrap();
    assert_eq!(listed.lines().skip(1).count(), 1, "{listed}");
    wake(node, &agent);
    let left = || Ok(!scope(&agent).join("agentcube.aside").exists());
    node.wait_until("the scope to be the agent's alone", SOON, left).unwrap();
    agent.delete().unwrap();
}

#[test]
fn limits_changed_in_a_sleep_hold_over_a_reload_and_after_the_wake() {
    let Some((node, _turn)) = node() else { return };
    let (agent, digest) = start(node, "updated", 8303);
    sleep(node, &agent, &scope(&agent), "checkpointed");
    update(
        node,
        &agent,
        &json!({ "memory": { "limit": 128 * MIB }, "cpu": { "quota": 50_000, "period": 100_000 } }),
    );
    let expected = [(128 * MIB).to_string(), "50000 100000".to_owned()];
    let now = || ["memory.max", "cpu.max"].map(|name| file(&agent, name));
    assert_eq!(now(), expected);
    reload(node);
    assert_eq!(now(), expected, "reloaded");
    wake(node, &agent);
    assert_eq!(agent.digest().unwrap(), digest);
    reload(node);
    assert_eq!(now(), expected, "awake");
    assert!(limits(node, &agent).contains("MemoryMax=134217728"));
    agent.delete().unwrap();
}

#[test]
fn a_wake_that_fails_leaves_the_scope_for_the_next_one() {
    let Some((node, _turn)) = node() else { return };
    let (agent, digest) = start(node, "failing", 8304);
    sleep(node, &agent, &scope(&agent), "checkpointed");
    let limit = |name: &str, value: &str| fs::write(scope(&agent).join(name), value).unwrap();
    limit("memory.swap.max", "0");
    limit("memory.max", &(4 * MIB).to_string());
    let error = agentcube(node, &agent, &["wake"]).unwrap_err();
    println!("{error}");
    assert!(error.contains("memory"), "{error}");
    limit("memory.max", &LIMIT.to_string());
    assert!(limits(node, &agent).contains("SubState=running"));
    wake(node, &agent);
    assert_eq!(agent.digest().unwrap(), digest);
    agent.delete().unwrap();
    assert_gone(node, &agent);
}

#[test]
fn an_agent_that_is_killed_or_deleted_in_its_sleep_leaves_no_scope() {
    let Some((node, _turn)) = node() else { return };
    let (agent, _) = start(node, "killed", 8305);
    sleep(node, &agent, &scope(&agent), "checkpointed");
    agent.kill("SIGKILL").unwrap();
    assert_eq!(agent.wait_and_delete(SOON).unwrap(), 137);
    assert_gone(node, &agent);
    let (agent, _) = start(node, "deleted", 8306);
    sleep(node, &agent, &scope(&agent), "checkpointed");
    agent.delete().unwrap();
    assert_gone(node, &agent);
}

#[test]
fn a_scope_is_as_runcs_own_shim_makes_it() {
    let Some((node, _turn)) = node() else { return };
    let told = |runtime| {
        let agent = node.run_agent(&spec("twin", 8307, runtime)).unwrap();
        agent.wait_healthy().unwrap();
        let told = limits(node, &agent);
        agent.delete().unwrap();
        assert_gone(node, &agent);
        told.lines().filter(|line| !line.starts_with("InvocationID=")).collect::<Vec<_>>().join("\n")
    };
    assert_eq!(told(Runtime::Agentcube), told(Runtime::Runc));
}
