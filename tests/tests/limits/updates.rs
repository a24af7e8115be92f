//! Limits that are changed while the agent sleeps.

use serde_json::{Value, json};

use crate::ballast::{has_swap, node};
use crate::cycle::{update, wake};
use crate::{DEPTHS, Limits, asleep_at, depth, disk, run, waiting};

/// Everything that `runc update` can change, in amounts of its own for each `round`, and what it becomes.
fn all(round: u64) -> (Value, Vec<(&'static str, String)>) {
    let mib = |count: u64| (count + round) << 20;
    let disk = disk();
    let (major, minor) = disk.split_once(':').unwrap();
    let (major, minor): (u32, u32) = (major.parse().unwrap(), minor.parse().unwrap());
    let resources = json!({
        "cpu": {"shares": 1024, "quota": 50000 + round, "period": 80000, "burst": 1000 + round, "cpus": "0", "mems": "0"},
        "memory": {"limit": mib(100), "swap": mib(110) + mib(0), "reservation": mib(10)},
        "pids": {"limit": 40 + round},
        "blockIO": {"throttleReadBpsDevice": [{"major": major, "minor": minor, "rate": 10_000_000 + round}]},
        "unified": {
            "memory.high": mib(90).to_string(),
            "memory.min": mib(2).to_string(),
            "hugetlb.2MB.max": (2 * mib(1)).to_string(),
        },
    });
    let wanted = vec![
        ("cpu.weight", "100".to_owned()),
        ("cpu.max", format!("{} 80000", 50000 + round)),
        ("cpu.max.burst", (1000 + round).to_string()),
        ("cpuset.cpus", "0".to_owned()),
        ("cpuset.mems", "0".to_owned()),
        ("memory.max", mib(100).to_string()),
        ("memory.swap.max", mib(10).to_string()),
        ("memory.low", mib(10).to_string()),
        ("memory.high", mib(90).to_string()),
        ("memory.min", mib(2).to_string()),
        ("pids.max", (40 + round).to_string()),
        ("io.max", format!("{disk} rbps={} wbps=max riops=max wiops=max", 10_000_000 + round)),
        ("hugetlb.2MB.max", (2 * mib(1)).to_string()),
    ];
    (resources, wanted)
}

#[test]
fn every_limit_that_is_changed_at_each_depth_holds_at_once_after_the_wake_and_in_runcs_record() {
    let Some(node) = node().filter(|_| has_swap()) else { return };
    let agent = run(node, &waiting("changed"));
    let inode = Limits::of(node, &agent).inode;
    for (round, at) in (1..).zip(DEPTHS) {
        asleep_at(node, &agent, at);
        let (resources, wanted) = all(round);
        update(node, &agent, &resources).unwrap();
        let limits = Limits::of(node, &agent);
        for (file, value) in wanted {
            assert_eq!(limits.get(file), value, "{file} at {at}");
        }
        assert_eq!(depth(node, &agent).as_deref(), Some(at));
        wake(node, &agent);
        assert_eq!(Limits::of(node, &agent), limits, "awake after {at}");
        assert_eq!(limits.inode, inode);
        // With it runc writes all that it has a record of.
        update(node, &agent, &json!({"unified": {"memory.oom.group": "0"}})).unwrap();
        assert_eq!(Limits::of(node, &agent), limits, "after another update, awake after {at}");
    }
    agent.delete().unwrap();
}

#[test]
fn an_update_that_is_refused_leaves_every_limit_as_it_was_at_each_depth_and_awake() {
    let Some(node) = node().filter(|_| has_swap()) else { return };
    let agent = run(node, &waiting("refused"));
    let now = || Limits::of(node, &agent).but_for_wide_sets(node, &agent);
    let limits = now();
    let refused = |at: &str| {
        // The last that is written is what the kernel refuses.
        let (mut resources, _) = all(7);
        resources["unified"] = json!({"memory.high": "91M", "memory.swap.high": "much"});
        let error = update(node, &agent, &resources).unwrap_err().to_string();
        assert!(error.contains("memory.swap.high"), "{at}: {error}");
        assert_eq!(now(), limits, "{at}");
    };
    refused("awake");
    for at in DEPTHS {
        asleep_at(node, &agent, at);
        refused(at);
        let frozen = json!({"unified": {"cgroup.freeze": "0"}});
        let error = update(node, &agent, &frozen).unwrap_err().to_string();
        assert!(error.contains("is no limit"), "{error}");
        assert_eq!(depth(node, &agent).as_deref(), Some(at));
        wake(node, &agent);
        assert_eq!(now(), limits, "awake after {at}");
    }
    agent.delete().unwrap();
}
