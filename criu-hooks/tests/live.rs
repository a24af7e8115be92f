//! Dumps and restores of real containers. They need root and a root file system with runc and CRIU, named by
//! `AGENTCUBE_TEST_ROOTFS`; each runs on a node of its own, made of namespaces.
#![allow(clippy::unwrap_used)]

#[path = "live/agent.rs"]
mod agent;
#[path = "live/node.rs"]
mod node;
// The shim's handling of runc's private files, proven here against real containers.
#[allow(dead_code, missing_docs)]
#[path = "../../shim/src/runc/state_file.rs"]
mod state_file;

use std::{
    fs,
    os::fd::OwnedFd,
    process::{Command, Stdio},
    time::Duration,
};

use agent::{Agent, Census, NAMESPACE, Setup, reap, start_with_terminal};
use criu_hooks::{
    cgroup::Cgroup,
    container::{self, Blocker},
    criu::{HookError, NoHooks, log::Cause},
    engine::{DumpError, DumpHooks, DumpOptions, Engine, Failure, RestoreError, RestoreHooks},
    image, procfs,
    spawn::{Child, LocalSpawner, Spawner},
};
use node::in_node;
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

/// Names a test once.
macro_rules! on_a_node {
    ($name:ident, $body:expr) => {
        #[test]
        fn $name() {
            in_node(stringify!($name), $body);
        }
    };
}

on_a_node!(a_counter_goes_on_over_five_cycles, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let mut last = agent.count_on(0, 5).await;
    for cycle in 0..5 {
        let dumped = agent.dump().await.unwrap();
        assert!(!agent.container.cgroup.populated().unwrap());
        assert!(!agent.container.cgroup.is_frozen().unwrap());
        let restored = agent.restore().await.unwrap();
        println!(
            "cycle {cycle}: dump {:?} (stopped {:?}, {} bytes), restore {:?}",
            dumped.total, dumped.stopped, dumped.image_bytes, restored.total
        );
        agent.assert_running();
        last = agent.count_on(last, 10).await;
    }
    agent.delete();
});

on_a_node!(runc_works_on_a_restored_container, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let before = agent.exec(&["ls", "/sys/fs/cgroup"]);
    let own_cgroup = agent.exec(&["cat", "/proc/self/cgroup"]);
    for _ in 0..2 {
        agent.dump().await.unwrap();
        agent.restore().await.unwrap();
        assert_eq!(Cgroup::of_pid(agent.pid).unwrap(), agent.container.cgroup);
        state_file::update(&agent.state_file(), agent.pid).unwrap();
        assert_eq!(agent.exec(&["echo", "here"]), "here\n");
        // The container sees no more of the host's cgroups than before.
        assert_eq!(agent.exec(&["ls", "/sys/fs/cgroup"]), before);
        assert_eq!(agent.exec(&["cat", "/proc/1/cgroup"]), own_cgroup);
        assert!(agent.exec(&["ps"]).contains("i=$((i+1))"));
        let runc = |args: &[&str]| {
            let output = Command::new("/usr/sbin/runc")
                .args(args)
                .arg("counter")
                .output()
                .unwrap();
            assert!(
                output.status.success(),
                "{args:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8(output.stdout).unwrap()
        };
        let state: Value = serde_json::from_str(&runc(&["state"])).unwrap();
        assert_eq!(state["status"], "running");
        assert_eq!(state["pid"], agent.pid.as_raw_nonzero().get());
        runc(&["pause"]);
        assert!(agent.container.cgroup.is_frozen().unwrap());
        runc(&["resume"]);
        agent.line().await;
    }
    let killed = Command::new("/usr/sbin/runc")
        .args(["kill", "counter", "KILL"])
        .status()
        .unwrap();
    assert!(killed.success());
    reap(agent.pid);
    assert!(
        Command::new("/usr/sbin/runc")
            .args(["delete", "counter"])
            .status()
            .unwrap()
            .success()
    );
    assert!(!agent.container.cgroup.path().exists());
});
