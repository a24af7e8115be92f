//! Limits across sleeps. They need the controllers of cgroup v2, which a virtual node has: `make test-vm` runs these
//! tests there.

#![allow(clippy::unwrap_used)]

#[path = "../ballast/mod.rs"]
mod ballast;
#[path = "../cycle/mod.rs"]
mod cycle;
#[path = "../events/mod.rs"]
mod events;

mod high;
mod kept;
mod memory;
mod oom;
mod updates;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;

use agentcube_tests::node::{Agent, AgentSpec, Node, Runtime};

use cycle::{SOON, agentcube, cgroup, script, sleep_at};

/// How deep an agent can sleep where there is swap.
const DEPTHS: [&str; 3] = ["frozen", "reclaimed", "checkpointed"];

/// A program that does nothing but wait.
fn waiting(id: &str) -> AgentSpec {
    script(id, Runtime::Agentcube, "echo ready; exec sleep 100000")
}

/// Starts a program, and waits until it says that it is ready.
fn run<'node>(node: &'node Node, spec: &AgentSpec) -> Agent<'node> {
    let agent = node.run_agent(spec).unwrap();
    node.wait_until("it to be ready", SOON, || Ok(agent.log()?.contains("ready"))).unwrap();
    agent
}

/// Puts an agent to sleep as soon as it can; nothing that it is asked here wakes it.
fn asleep_at(node: &Node, agent: &Agent, depth: &str) {
    if depth == "checkpointed" { cycle::sleep(node, agent) } else { sleep_at(node, agent, depth) }
}

/// Its state and depth, as the shim tells it.
fn depth(node: &Node, agent: &Agent) -> Option<String> {
    let told = agentcube(node, agent, &["inspect"]).unwrap()["container"].take();
    (told["state"] == "asleep").then(|| told["depth"].as_str().unwrap().to_owned())
}

/// Every limit of a cgroup: its files that can be read and written, and the directory itself.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Limits {
    inode: u64,
    files: BTreeMap<String, String>,
}

impl Limits {
    fn of(node: &Node, agent: &Agent) -> Self {
        let directory = cgroup(node, agent);
        let is_limit = |name: &str| {
            // What the shim uses to make it sleep, and what is told rather than limited.
            !name.starts_with("cgroup.") || name.starts_with("cgroup.max.")
        };
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(&directory).unwrap().map(Result::unwrap) {
            let name = entry.file_name().into_string().unwrap();
            let mode = entry.metadata().unwrap().mode();
            if mode & 0o600 == 0o600
                && is_limit(&name)
                && !["pressure", "peak"].iter().any(|end| name.rsplit('.').next() == Some(end))
            {
                files.insert(name, fs::read_to_string(entry.path()).unwrap().trim().to_owned());
            }
        }
        Self { inode: fs::metadata(&directory).unwrap().ino(), files }
    }

    /// The same, where sets of processors and memory nodes that are as wide as the parent's count as none: Linux 6.12
    /// does not let them be taken away from processes.
    fn but_for_wide_sets(mut self, node: &Node, agent: &Agent) -> Self {
        let parent = cgroup(node, agent).parent().unwrap().to_owned();
        for (file, value) in self.files.iter_mut().filter(|(file, _)| file.starts_with("cpuset.")) {
            let all = fs::read_to_string(parent.join(format!("{file}.effective")));
            if all.is_ok_and(|all| all.trim() == value) {
                value.clear();
            }
        }
        self
    }

    fn get(&self, file: &str) -> &str {
        self.files.get(file).unwrap_or_else(|| panic!("no {file} in {:?}", self.files.keys()))
    }
}

/// The numbers of a disk of this machine, as `io.max` takes them: zram has no queue that could be slowed down.
fn disk() -> String {
    let disks = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
    let disk = disks.filter(|path| path.join("device").exists()).min();
    let disk = disk.expect("this machine has no disk");
    fs::read_to_string(disk.join("dev")).unwrap().trim().to_owned()
}
