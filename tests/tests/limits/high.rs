//! `memory.high` does not hold a restore up, and holds again after it, however it ends.

use std::fs;
use std::thread;

use agentcube_tests::node::{Agent, Node, SHIM_TOML};
use serde_json::{Value, json};

use crate::ballast::{BALLAST, agent_with_ballast, limit, node, sleep_soon};
use crate::cycle::{SOON, agentcube, assert_asleep, cgroup, inspect, running, sleep, update, wake};
use crate::{run, waiting};

/// CRIU, but as long as the file AGENT/hold is there it waits and says so, and then it fails if AGENT/fail is there.
const CRIU: &str = "#!/bin/sh
cd AGENT
[ -e hold ] || exec criu \"$@\"
touch held
while [ -e hold ]; do sleep 0.1; done
[ ! -e fail ] || exit 1
exec criu \"$@\"
";

/// An agent with that CRIU.
struct Held<'node> {
    node: &'node Node,
    agent: Agent<'node>,
    folder: String,
}

impl<'node> Held<'node> {
    fn start(node: &'node Node, id: &str) -> Self {
        let folder = format!("/run/held-{id}");
        let (criu, options) = (format!("{folder}/criu"), format!("{folder}/shim.toml"));
        node.sh(&format!("mkdir {folder}; (cat {SHIM_TOML}; echo 'criu_binary = \"{criu}\"') >{options}"))
            .unwrap();
        node.write_file(&criu, &CRIU.replace("AGENT", &folder)).unwrap();
        node.sh(&format!("chmod 755 {criu}")).unwrap();
        let spec = waiting(id).flag("--runtime-config-path").flag(options);
        Self { node, agent: run(node, &spec), folder }
    }

    fn set(&self, high: u64) {
        update(self.node, &self.agent, &json!({"unified": {"memory.high": high.to_string()}})).unwrap();
    }

    fn high(&self) -> String {
        fs::read_to_string(cgroup(self.node, &self.agent).join("memory.high")).unwrap().trim().to_owned()
    }

    /// Wakes it, and does `meanwhile` while CRIU waits.
    fn wake_and(&self, meanwhile: impl FnOnce()) -> Result<Value, String> {
        self.sh("rm -f held; touch hold");
        thread::scope(|scope| {
            let waking = scope.spawn(|| agentcube(self.node, &self.agent, &["wake"]));
            let held = || Ok(self.node.exec(&["test", "-e", &format!("{}/held", self.folder)])?.status == 0);
            self.node.wait_until("CRIU to be started", SOON, held).unwrap();
            assert_eq!(self.high(), "max");
            meanwhile();
            waking.join().unwrap()
        })
    }

    fn release(&self) {
        self.sh("rm -f hold");
    }

    fn sh(&self, text: &str) {
        self.node.sh(&format!("cd {}; {text}", self.folder)).unwrap();
    }
}

#[test]
fn memory_high_is_lifted_for_a_restore_and_put_back_however_that_ends() {
    let Some(node) = node() else { return };
    let held = Held::start(node, "lifted");
    let (agent, pid) = (&held.agent, running(&held.agent));
    let set = 64 << 20;
    held.set(set);
    sleep(node, agent);
    assert_eq!(held.high(), set.to_string());

    held.sh("touch fail");
    let error = held.wake_and(|| held.release()).unwrap_err();
    held.sh("rm fail");
    println!("{error}");
    assert_eq!(held.high(), set.to_string(), "after a restore that failed");
    assert_asleep(node, agent);

    let killed = held.wake_and(|| fs::write(cgroup(node, agent).join("cgroup.kill"), "1").unwrap());
    held.release();
    println!("{}", killed.unwrap_err());
    assert_eq!(held.high(), set.to_string(), "after CRIU was killed");
    assert_asleep(node, agent);
    assert_eq!(running(agent), pid);

    held.wake_and(|| held.release()).unwrap();
    assert_eq!(held.high(), set.to_string(), "after a wake");
    sleep(node, agent);

    // One that is set meanwhile comes after it, and stays.
    let newer = set + (4 << 20);
    thread::scope(|scope| {
        let mut updating = None;
        let woke = held.wake_and(|| {
            updating = Some(scope.spawn(|| held.set(newer)));
            held.release();
        });
        woke.unwrap();
        updating.unwrap().join().unwrap();
    });
    assert_eq!(held.high(), newer.to_string(), "after an update during a restore");
    agent.delete().unwrap();
}

#[test]
fn a_shim_that_is_killed_in_a_restore_leaves_no_cgroup_without_its_memory_high() {
    let Some(node) = node() else { return };
    let held = Held::start(node, "orphaned");
    held.set(64 << 20);
    sleep(node, &held.agent);
    let kill = format!("kill -KILL {}", inspect(node, &held.agent)["shim_pid"]);
    let folder = cgroup(node, &held.agent);
    let woken = held.wake_and(|| drop(node.sh(&kill).unwrap()));
    held.release();
    woken.unwrap_err();
    node.wait_until("its cgroup to be removed", SOON, || Ok(!folder.exists())).unwrap();
    held.agent.delete().unwrap();
}

#[test]
fn an_agent_with_more_memory_than_its_memory_high_wakes_all_the_same() {
    let Some(node) = node() else { return };
    let (agent, digest) = agent_with_ballast(node, "throttled", 8110);
    sleep_soon(node, &agent);
    limit(node, &agent, "memory.swap.max", "0");
    let high = ((BALLAST << 20) / 3).to_string();
    update(node, &agent, &json!({"unified": {"memory.high": high}})).unwrap();
    // Under it the kernel would take minutes for the rest.
    wake(node, &agent);
    let path = cgroup(node, &agent).join("memory.high");
    assert_eq!(fs::read_to_string(path).unwrap().trim(), high);
    limit(node, &agent, "memory.high", "max");
    assert_eq!(agent.digest().unwrap(), digest);
    agent.delete().unwrap();
}
