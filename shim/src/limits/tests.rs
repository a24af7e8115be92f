//! Limits on directories that stand in for cgroups: no root needed.

#![allow(clippy::unwrap_used)]

use serde_json::json;

use super::*;

/// A directory with these files.
fn cgroup(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        fs::write(dir.path().join(name), contents).unwrap();
    }
    dir
}

/// What an update becomes where these limits are in force.
fn beside(files: &[(&str, &str)], resources: serde_json::Value) -> Vec<(String, String)> {
    let resources: LinuxResources = serde_json::from_value(resources).unwrap();
    let dir = cgroup(files);
    settings(&resources, dir.path()).unwrap().into_iter().map(|one| (one.file, one.value)).collect()
}

fn of(resources: serde_json::Value) -> Vec<(String, String)> {
    beside(&[], resources)
}

fn pair(file: &str, value: &str) -> (String, String) {
    (file.to_owned(), value.to_owned())
}

#[test]
fn limits_become_what_runc_writes() {
    assert_eq!(of(json!({"cpu": {"shares": 1024}})), [pair("cpu.weight", "100")]);
    assert_eq!(of(json!({"cpu": {"idle": 1}})), [pair("cpu.idle", "1")]);
    assert_eq!(of(json!({"cpu": {"quota": 50000, "period": 100_000}})), [pair("cpu.max", "50000 100000")]);
    assert_eq!(of(json!({"cpu": {"quota": -1, "period": 100_000}})), [pair("cpu.max", "max 100000")]);
    assert_eq!(
        of(json!({"cpu": {"cpus": "0-1", "mems": "0"}})),
        [pair("cpuset.cpus", "0-1"), pair("cpuset.mems", "0")]
    );
    assert_eq!(
        of(json!({"memory": {"limit": 100, "swap": 150, "reservation": 20}})),
        [pair("memory.swap.max", "50"), pair("memory.max", "100"), pair("memory.low", "20")]
    );
    assert_eq!(of(json!({"memory": {"limit": 100}})), [pair("memory.max", "100")]);
    assert_eq!(
        of(json!({"memory": {"limit": -1}})),
        [pair("memory.swap.max", "max"), pair("memory.max", "max")]
    );
    assert_eq!(of(json!({"pids": {"limit": -1}})), [pair("pids.max", "max")]);
    assert_eq!(of(json!({"pids": {"limit": 7}})), [pair("pids.max", "7")]);
    assert_eq!(of(json!({"blockIO": {"weight": 1000}})), [pair("io.weight", "10000")]);
    assert_eq!(
        of(json!({"blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 16, "rate": 5}],
                              "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 6}]}})),
        [pair("io.max", "8:16 rbps=5"), pair("io.max", "8:0 wiops=6")]
    );
    assert_eq!(of(json!({"unified": {"memory.high": "1G"}})), [pair("memory.high", "1G")]);
    assert_eq!(of(json!({})), []);
}

#[test]
fn what_is_zero_or_empty_is_not_set() {
    assert_eq!(
        of(json!({"cpu": {"shares": 0, "quota": 0, "period": 0, "cpus": "", "mems": ""},
                  "memory": {"limit": 0, "swap": 0, "reservation": 0},
                  "pids": {"limit": 0}, "blockIO": {"weight": 0}})),
        []
    );
}

#[test]
fn an_update_of_the_period_keeps_the_quota() {
    let files = [("cpu.max", "50000 100000")];
    assert_eq!(beside(&files, json!({"cpu": {"period": 200_000}})), [pair("cpu.max", "50000 200000")]);
    assert_eq!(beside(&files, json!({"cpu": {"quota": 7000}})), [pair("cpu.max", "7000")]);
}

#[test]
fn a_burst_never_comes_to_be_above_the_quota() {
    let files = [("cpu.max", "50000 100000"), ("cpu.max.burst", "40000")];
    let less = json!({"cpu": {"quota": 30000, "burst": 20000}});
    assert_eq!(beside(&files, less), [pair("cpu.max.burst", "20000"), pair("cpu.max", "30000")]);
    let more = json!({"cpu": {"quota": 90000, "burst": 80000}});
    assert_eq!(beside(&files, more), [pair("cpu.max", "90000"), pair("cpu.max.burst", "80000")]);
}

#[test]
fn swap_is_counted_from_the_memory_limit_that_will_hold() {
    let swap = json!({"memory": {"swap": 150}});
    assert_eq!(beside(&[("memory.max", "100\n")], swap.clone()), [pair("memory.swap.max", "50")]);
    assert_eq!(beside(&[("memory.max", "max\n")], swap), [pair("memory.swap.max", "150")]);
}

#[test]
fn swap_below_memory_is_refused() {
    let dir = cgroup(&[("memory.max", "200\n")]);
    for text in [r#"{"memory":{"limit":100,"swap":50}}"#, r#"{"memory":{"swap":150}}"#] {
        let resources: LinuxResources = serde_json::from_str(text).unwrap();
        assert!(
            matches!(settings(&resources, dir.path()), Err(LimitError::SwapBelowMemory { .. })),
            "{text}"
        );
    }
}

#[test]
fn the_weights_of_bfq_are_its_own() {
    let devices =
        json!({"blockIO": {"weight": 300, "weightDevice": [{"major": 8, "minor": 0, "weight": 70}]}});
    assert_eq!(
        beside(&[("io.bfq.weight", "default 100\n")], devices.clone()),
        [pair("io.bfq.weight", "300"), pair("io.bfq.weight", "8:0 70")]
    );
    assert_eq!(of(devices), [pair("io.weight", "2930")]);
}

#[test]
fn a_file_outside_the_cgroup_or_that_is_no_limit_is_refused() {
    let refused = |name: &str| {
        let resources = serde_json::from_value(json!({"unified": {name: "1"}})).unwrap();
        settings(&resources, Path::new("/nonexistent")).unwrap_err()
    };
    for name in ["../memory.max", "/etc/passwd", "cgroup", ".", "..", "memory.", "a.\0"] {
        assert!(matches!(refused(name), LimitError::NoFile(_)), "{name}");
    }
    for name in ["cgroup.freeze", "cgroup.kill", "cgroup.procs", "cgroup.threads", "cgroup.type"] {
        assert!(matches!(refused(name), LimitError::NoLimit(_)), "{name}");
    }
}

#[test]
fn of_an_update_that_is_refused_nothing_stays() {
    let dir = cgroup(&[("cpu.max", "max 100000\n"), ("pids.max", "max\n")]);
    let before = |file: &str| fs::read_to_string(dir.path().join(file)).unwrap().trim().to_owned();
    let update = json!({"cpu": {"quota": 7}, "pids": {"limit": 5}, "unified": {"memory.high": "1"}});
    let resources = serde_json::from_value(update).unwrap();
    let error = apply(dir.path(), &settings(&resources, dir.path()).unwrap()).unwrap_err();
    assert!(error.to_string().contains("lacks the controller memory"), "{error}");
    assert_eq!((before("cpu.max"), before("pids.max")), ("max 100000".to_owned(), "max".to_owned()));
    fs::write(dir.path().join("memory.high"), "max\n").unwrap();
    apply(dir.path(), &settings(&resources, dir.path()).unwrap()).unwrap();
    assert_eq!((before("cpu.max"), before("pids.max")), ("7".to_owned(), "5".to_owned()));
}

#[test]
fn several_lines_are_written_one_by_one_and_none_as_an_empty_one() {
    let dir = cgroup(&[("io.max", ""), ("cpuset.cpus", "0\n")]);
    let write = |file: &str, value: &str| write_lines(&dir.path().join(file), value).unwrap();
    write("io.max", "8:0 rbps=1\n8:16 rbps=2\n");
    // A plain file keeps the last of what was written.
    assert_eq!(fs::read_to_string(dir.path().join("io.max")).unwrap(), "8:16 rbps=2");
    write("cpuset.cpus", "");
    assert_eq!(fs::read_to_string(dir.path().join("cpuset.cpus")).unwrap(), "\n");
}

proptest::proptest! {
    /// Whatever a request calls a file, it is one of the cgroup's own.
    #[test]
    fn no_name_leads_out_of_the_cgroup(name in "\\PC{0,20}|[a-z./]{1,12}", value in "\\PC{0,20}") {
        let resources = serde_json::from_value(json!({"unified": {name: value}})).unwrap();
        if let Ok(all) = settings(&resources, Path::new("/nonexistent")) {
            for setting in all {
                let path = Path::new(&setting.file);
                proptest::prop_assert_eq!(path.components().count(), 1);
                proptest::prop_assert_eq!(path.file_name(), Some(path.as_os_str()));
            }
        }
    }

    #[test]
    fn no_content_of_cpu_max_is_more_than_one_word(text in "\\PC{0,40}") {
        let resources = json!({"cpu": {"period": 5}});
        let value = beside(&[("cpu.max", &text)], resources).remove(0).1;
        proptest::prop_assert_eq!(value.split_whitespace().count(), 2);
    }
}
