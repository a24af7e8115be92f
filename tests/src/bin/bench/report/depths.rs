//! What each depth of sleep costs and holds.

use super::{cell, size, spread, table, time};
use crate::plan::{Depth, Waker, Workload};
use crate::results::Results;

/// What stands where the shim does not offer a depth.
const NOT_MEASURED: &str = "not measured";

/// Both tables, and why depths are missing in them.
pub fn tables(results: &Results) -> String {
    let mut parts = vec![sleeps(results), wakes(results)];
    parts.extend(refusals(results));
    parts.retain(|part| !part.is_empty());
    parts.join("\n")
}

/// The rows for README: agents of one size.
pub fn summary(results: &Results, workload: Workload) -> String {
    let row = |depth| {
        let p50 = |waker, figure: fn(&crate::record::DepthCycle) -> u64| {
            results.depth_summary(workload, depth, waker, figure).map(|summary| summary.p50)
        };
        let connected =
            results.depth_summary(workload, depth, Some(Waker::Client), |cycle| cycle.reached_us)?;
        Some(vec![
            depth.to_string(),
            cell(p50(None, |cycle| cycle.held_bytes).map(size)),
            cell(p50(None, |cycle| cycle.sleep_us).map(time)),
            cell(p50(Some(Waker::Request), |cycle| cycle.first_byte_us).map(time)),
            time(connected.p99),
            cell(p50(Some(Waker::Client), |cycle| cycle.first_byte_us).map(time)),
        ])
    };
    let rows: Vec<_> = Depth::ALL.into_iter().filter_map(row).collect();
    let head = [
        "depth",
        "processes hold",
        "sleep",
        "wake to first byte",
        "client connects (p99)",
        "client's first byte",
    ];
    table(&head, &rows)
}

fn sleeps(results: &Results) -> String {
    let mut rows = Vec::new();
    for workload in results.workloads_at_depths() {
        for depth in Depth::ALL {
            let mut row = vec![workload.to_string(), depth.to_string()];
            let held = results.depth_summary(workload, depth, None, |cycle| cycle.held_bytes);
            match results.depth_summary(workload, depth, None, |cycle| cycle.sleep_us) {
                Some(total) => {
                    row.push(total.count.to_string());
                    row.extend(spread(Some(total)));
                    row.push(cell(held.map(|held| size(held.p50))));
                }
                None => row.extend(unmeasured(6)),
            }
            rows.push(row);
        }
    }
    table(&["agent", "depth", "n", "falling asleep: min", "p50", "p95", "p99", "holds: p50"], &rows)
}

fn wakes(results: &Results) -> String {
    let mut rows = Vec::new();
    for workload in results.workloads_at_depths() {
        for (depth, waker) in Depth::ALL.into_iter().flat_map(|depth| Waker::ALL.map(|waker| (depth, waker)))
        {
            let of = |figure: fn(&crate::record::DepthCycle) -> u64| {
                results.depth_summary(workload, depth, Some(waker), figure)
            };
            let mut row = vec![workload.to_string(), depth.to_string(), waker.to_string()];
            match of(|cycle| cycle.first_byte_us) {
                Some(first) => {
                    row.push(first.count.to_string());
                    row.extend(spread(Some(first)));
                    row.extend(spread(of(|cycle| cycle.reached_us)));
                }
                None => row.extend(unmeasured(9)),
            }
            rows.push(row);
        }
    }
    let head = [
        "agent",
        "depth",
        "woken by",
        "n",
        "first byte: min",
        "p50",
        "p95",
        "p99",
        "call, connect: min",
        "p50",
        "p95",
        "p99",
    ];
    table(&head, &rows)
}

/// The cells after a depth that was not measured.
fn unmeasured(count: usize) -> impl Iterator<Item = String> {
    let rest = std::iter::repeat_n(cell(None), count - 1);
    std::iter::once(NOT_MEASURED.to_owned()).chain(rest)
}

fn refusals(results: &Results) -> Option<String> {
    let lines = results.refused().map(|refused| {
        format!("- {}, {}: {NOT_MEASURED}: {}\n", refused.workload, refused.depth, refused.why)
    });
    Some(lines.collect::<String>()).filter(|lines| !lines.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::results;

    #[test]
    fn each_depth_has_its_rows_and_one_that_is_not_offered_says_why() {
        let text = tables(&results());
        let rows = |depth: &str| {
            let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
            let rows: Vec<_> = text.lines().filter(|line| line.starts_with('|')).map(cells).collect();
            rows.into_iter().filter(|row| row[2] == depth).collect::<Vec<_>>()
        };
        let frozen = rows("frozen");
        assert_eq!(frozen.len(), 3, "{text}");
        assert_eq!(frozen[0][3..9], ["2", "4.00 ms", "4.00 ms", "4.00 ms", "4.00 ms", "70.0 MiB"], "{text}");
        assert_eq!(frozen[2][3..6], ["client", "1", "2.00 ms"], "{text}");
        assert_eq!(frozen[2][9], "0.09 ms", "{text}");
        assert!(rows("reclaimed").iter().all(|row| row.iter().any(|cell| cell == NOT_MEASURED)), "{text}");
        assert!(text.contains("- python 64 MiB, reclaimed: not measured: no swap\n"), "{text}");
    }

    #[test]
    fn the_summary_shows_what_was_measured_alone() {
        let text = summary(&results(), Workload::Python(64));
        assert!(text.contains("| frozen ") && text.contains("| checkpointed "), "{text}");
        assert!(!text.contains("reclaimed"), "{text}");
        assert_eq!(summary(&results(), Workload::Python(256)), "");
    }

    #[test]
    fn a_run_without_depths_has_no_tables() {
        let mut other = results();
        other.plan = crate::plan::Plan::quick().with_only("1024");
        other.records.clear();
        assert_eq!(tables(&other), "");
    }
}
