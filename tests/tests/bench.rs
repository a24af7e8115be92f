//! The benchmark measures what it says, in one short cycle: its figures are made by hand, on a quiet machine.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::Command;

use serde_json::Value;

/// The cycles of one subject in raw results.
fn cycles<'a>(results: &'a Value, subject: &str) -> Vec<&'a Value> {
    let records = results["records"].as_array().unwrap();
    records.iter().map(|record| &record["cycle"]).filter(|cycle| cycle["subject"] == subject).collect()
}

#[test]
fn a_short_run_measures_each_subject_and_writes_a_report() {
    let folder = tempfile::tempdir().unwrap();
    let run = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(["--plan", "tiny", "--only", "busybox", "--out"])
        .arg(folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{said}");

    let text = fs::read_to_string(folder.path().join("results.json")).unwrap();
    let results: Value = serde_json::from_str(&text).unwrap();
    for subject in ["agentcube", "runc", "cold-start"] {
        let cycles = cycles(&results, subject);
        assert_eq!(cycles.len(), 1, "{subject}: {said}");
        assert!(cycles[0]["first_byte_us"].as_u64().unwrap() > 0, "{subject}: {cycles:?}");
        let asleep = subject != "cold-start";
        assert_eq!(
            cycles[0]["sleep"]["image_bytes"].as_u64().is_some_and(|bytes| bytes > 0),
            asleep,
            "{subject}"
        );
    }
    let report = fs::read_to_string(folder.path().join("results.md")).unwrap();
    assert!(report.contains("| busybox | runc"), "{report}");
}
