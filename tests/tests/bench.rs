//! The benchmark measures what it says, in one short cycle: its figures are made by hand, on a quiet machine.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::Command;

use serde_json::Value;

/// The records of one kind in raw results.
fn records<'a>(results: &'a Value, kind: &str) -> Vec<&'a Value> {
    let records = results["records"].as_array().unwrap();
    records.iter().filter_map(|record| record.get(kind)).collect()
}

/// A tiny run of the sections whose names contain `only`: its raw results, its report, and what it has said.
fn run(only: &str) -> (Value, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let run = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(["--plan", "tiny", "--only", only, "--out"])
        .arg(folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(run.status.success(), "{said}");
    let read = |name| fs::read_to_string(folder.path().join(name)).unwrap();
    (serde_json::from_str(&read("results.json")).unwrap(), read("results.md"), said)
}

#[test]
fn a_short_run_measures_each_subject_and_writes_a_report() {
    let (results, report, said) = run("busybox");
    for subject in ["agentcube", "runc", "cold-start"] {
        let cycles: Vec<_> = records(&results, "cycle");
        let cycles: Vec<_> = cycles.into_iter().filter(|cycle| cycle["subject"] == subject).collect();
        assert_eq!(cycles.len(), 1, "{subject}: {said}");
        assert!(cycles[0]["first_byte_us"].as_u64().unwrap() > 0, "{subject}: {cycles:?}");
        let asleep = subject != "cold-start";
        assert_eq!(
            cycles[0]["sleep"]["image_bytes"].as_u64().is_some_and(|bytes| bytes > 0),
            asleep,
            "{subject}"
        );
    }
    assert!(report.contains("| busybox | runc"), "{report}");
}

#[test]
fn a_short_run_measures_each_depth_or_says_why_the_shim_does_not_offer_it() {
    let (results, report, said) = run("depths");
    let refused = records(&results, "refused");
    for depth in ["frozen", "reclaimed", "checkpointed"] {
        let cycles: Vec<_> = records(&results, "depth");
        let cycles: Vec<_> = cycles.into_iter().filter(|cycle| cycle["depth"] == depth).collect();
        if let Some(refused) = refused.iter().find(|refused| refused["depth"] == depth) {
            let why = refused["why"].as_str().unwrap();
            assert!(depth == "reclaimed" && why.contains("nothing to reclaim to"), "{why}");
            assert!(cycles.is_empty() && report.contains(why), "{report}");
            continue;
        }
        let wakers: Vec<_> = cycles.iter().map(|cycle| cycle["waker"].as_str().unwrap()).collect();
        assert_eq!(wakers, ["request", "client"], "{depth}: {said}");
        for cycle in cycles {
            let [reached, first] = ["reached_us", "first_byte_us"].map(|name| cycle[name].as_u64().unwrap());
            assert!(0 < reached && reached <= first, "{cycle}");
            assert_eq!(cycle["held_bytes"] == 0, depth == "checkpointed", "{cycle}");
        }
    }
    assert!(report.contains("| python 16 MiB | frozen "), "{report}");
}
