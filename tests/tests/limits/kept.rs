//! Limits are what they were, whatever the agent does.

use serde_json::json;

use crate::ballast::{has_swap, node};
use crate::cycle::{update, wake};
use crate::{DEPTHS, Limits, asleep_at, depth, disk, run, waiting};

/// Opens a device that containers may not have and one that they may. `/dev/kmsg` is 1:11.
const DEVICES: &str = "[ -e /tmp/kmsg ] || busybox mknod /tmp/kmsg c 1 11
dd if=/dev/zero of=/dev/null bs=1 count=1 2>/dev/null && echo zero opened
dd if=/tmp/kmsg of=/dev/null bs=1 count=0 2>/dev/null || echo kmsg denied";

#[test]
fn every_limit_is_the_same_before_a_sleep_asleep_and_after_a_wake_at_each_depth() {
    let Some(node) = node().filter(|_| has_swap()) else { return };
    let agent = run(node, &waiting("kept"));
    let devices = || agent.exec(&["sh", "-c", DEVICES]).unwrap().check().unwrap();
    let disk = disk();
    update(
        node,
        &agent,
        &json!({
            "cpu": {"shares": 512, "quota": 70000, "period": 90000, "burst": 5000, "cpus": "0", "mems": "0"},
            "memory": {"limit": 200 << 20, "swap": 300 << 20, "reservation": 12 << 20},
            "pids": {"limit": 77},
            "unified": {
                "memory.high": (150 << 20).to_string(),
                "memory.min": (4 << 20).to_string(),
                "io.max": format!("{disk} rbps=50000000 wiops=4000"),
                "hugetlb.2MB.max": (6 << 20).to_string(),
            },
        }),
    )
    .unwrap();
    let limits = Limits::of(node, &agent);
    for (file, value) in [
        ("cpu.weight", "59"),
        ("cpu.max", "70000 90000"),
        ("cpu.max.burst", "5000"),
        ("cpuset.cpus", "0"),
        ("cpuset.mems", "0"),
        ("memory.max", &(200 << 20).to_string()),
        ("memory.swap.max", &(100 << 20).to_string()),
        ("memory.low", &(12 << 20).to_string()),
        ("memory.high", &(150 << 20).to_string()),
        ("memory.min", &(4 << 20).to_string()),
        ("pids.max", "77"),
        ("io.max", &format!("{disk} rbps=50000000 wbps=max riops=max wiops=4000")),
        ("hugetlb.2MB.max", &(6 << 20).to_string()),
    ] {
        assert_eq!(limits.get(file), value, "{file}");
    }
    assert_eq!(devices(), "zero opened\nkmsg denied\n");
    for at in DEPTHS {
        asleep_at(node, &agent, at);
        assert_eq!(Limits::of(node, &agent), limits, "{at}");
        // To look is not to wake.
        assert_eq!(depth(node, &agent).as_deref(), Some(at));
        wake(node, &agent);
        assert_eq!(Limits::of(node, &agent), limits, "awake after {at}");
        assert_eq!(devices(), "zero opened\nkmsg denied\n");
    }
    agent.delete().unwrap();
}
