//! The report for people: tables in Markdown.

mod depths;
mod neighbours;
mod prose;

use std::fmt::Write as _;

use crate::goals::Goal;
use crate::plan::{Cache, Subject, Workload};
use crate::record::{Cycle, Dump, Sleep};
use crate::results::Results;
use crate::statistics::Summary;

const SUBJECTS: [Subject; 4] = [Subject::Agentcube, Subject::Runc, Subject::Crun, Subject::ColdStart];

/// The agent whose depths README shows.
const DEPTHS_OF: Workload = Workload::Python(64);

/// The whole report.
pub fn markdown(results: &Results, goals: &[Goal]) -> String {
    let mut text = prose::head(results);
    section(&mut text, "An agent in company", prose::COMPANY, &neighbours::company(results));
    section(&mut text, "What busy agents get", prose::BUSY, &neighbours::shares(results));
    section(&mut text, "Goals", "", &goals_table(goals));
    section(&mut text, "Waking", prose::WAKING, &wakes(results, Cache::Warm));
    section(&mut text, "Falling asleep", prose::SLEEPING, &sleeps(results));
    section(&mut text, "Where the time of a sleep goes", prose::PARTS, &parts(results));
    section(&mut text, "Waking from a cold disk", prose::COLD, &wakes(results, Cache::Cold));
    section(&mut text, "Depths of sleep", prose::DEPTHS, &depths::tables(results));
    section(&mut text, "Waking at the same moment", prose::AT_ONCE, &at_once(results));
    section(&mut text, "Shims", prose::SHIMS, &shims(results));
    section(&mut text, "Not measured", "", &failures(results));
    let tail = if results.plan.is_of_neighbours() { prose::NEIGHBOURS_TAIL } else { prose::TAIL };
    text.push_str(tail);
    text
}

/// The main figures, for README.
pub fn summary(results: &Results, goals: &[Goal]) -> String {
    let mut rows = Vec::new();
    for workload in results.workloads(Cache::Warm) {
        let figure = |subject, figure: fn(&Cycle) -> Option<u64>| {
            cell(results.summary(workload, Cache::Warm, subject, figure).map(|summary| time(summary.p50)))
        };
        let first: fn(&Cycle) -> Option<u64> = |cycle| Some(cycle.first_byte_us);
        let slept: fn(&Cycle) -> Option<u64> = |cycle| cycle.sleep.as_ref().map(|sleep| sleep.total_us);
        rows.push(vec![
            workload.to_string(),
            figure(Subject::Agentcube, slept),
            figure(Subject::Runc, slept),
            figure(Subject::Agentcube, first),
            figure(Subject::Runc, first),
            figure(Subject::ColdStart, first),
        ]);
    }
    let head = ["agent", "sleep", "`runc checkpoint`", "wake to first byte", "`runc restore`", "cold start"];
    let held = goals.iter().filter(|goal| goal.held()).count();
    let by_depth = depths::summary(results, DEPTHS_OF);
    let by_depth = if by_depth.is_empty() {
        by_depth
    } else {
        format!("\nThe agent of 64 MiB at each [depth of sleep](docs/depths.md):\n\n{by_depth}")
    };
    format!(
        "![From asking for a wake to the first byte of the answer, by memory of the agent](docs/benchmarks/wake.svg)\n\n\
         Medians of one run, `make bench` on {} cores, {}; {held} of {} goals held. \
         [All figures, and what each one covers](docs/benchmarks/results.md).\n\n{}{by_depth}",
        results.machine().cores,
        results.date,
        goals.len(),
        table(&head, &rows)
    )
}

fn section(text: &mut String, title: &str, prose: &str, table: &str) {
    if table.is_empty() {
        return;
    }
    // Writing to a string can't fail.
    let _ = write!(text, "## {title}\n\n");
    if !prose.is_empty() {
        let _ = write!(text, "{}\n\n", prose.trim());
    }
    let _ = writeln!(text, "{table}");
}

fn goals_table(goals: &[Goal]) -> String {
    let row = |goal: &Goal| {
        vec![
            goal.what.to_owned(),
            cell(goal.shown()),
            cell(goal.other_shown()),
            cell(goal.ratio().map(parts_of_one)),
            goal.at_most(),
            goal.verdict().to_owned(),
        ]
    };
    let rows: Vec<_> = goals.iter().map(row).collect();
    table(&["goal", "figure", "against", "ratio", "at most", ""], &rows)
}

fn wakes(results: &Results, cache: Cache) -> String {
    let mut rows = Vec::new();
    for workload in results.workloads(cache) {
        for subject in SUBJECTS {
            let of = |figure: fn(&Cycle) -> Option<u64>| results.summary(workload, cache, subject, figure);
            let Some(first) = of(|cycle| Some(cycle.first_byte_us)) else { continue };
            let resident = of(|cycle| Some(cycle.resident_us()));
            let mut row = vec![workload.to_string(), subject.to_string(), first.count.to_string()];
            row.extend(spread(Some(first)));
            row.push(cell(of(|cycle| Some(cycle.wake_us)).map(|call| time(call.p50))));
            row.push(cell(resident.map(|resident| time(resident.p50))));
            row.push(cell(resident.map(|resident| time(resident.p95))));
            row.push(cell(of(|cycle| Some(cycle.wake_cpu_us)).map(|cpu| time(cpu.p50))));
            rows.push(row);
        }
    }
    let head = [
        "agent",
        "subject",
        "n",
        "first byte: min",
        "p50",
        "p95",
        "p99",
        "call: p50",
        "resident: p50",
        "p95",
        "CPU: p50",
    ];
    table(&head, &rows)
}

fn sleeps(results: &Results) -> String {
    let mut rows = Vec::new();
    for workload in results.workloads(Cache::Warm) {
        for subject in SUBJECTS {
            let of =
                |figure: fn(&Cycle) -> Option<u64>| results.summary(workload, Cache::Warm, subject, figure);
            let Some(total) = of(|cycle| Some(cycle.sleep.as_ref()?.total_us)) else { continue };
            let stopped = of(|cycle| cycle.sleep.as_ref()?.stopped_us);
            let mut row = vec![workload.to_string(), subject.to_string(), total.count.to_string()];
            row.extend(spread(Some(total)));
            row.push(cell(stopped.map(|stopped| time(stopped.p50))));
            row.push(cell(stopped.map(|stopped| time(stopped.p95))));
            row.push(cell(of(|cycle| Some(cycle.sleep.as_ref()?.image_bytes)).map(|bytes| size(bytes.p50))));
            row.push(cell(of(|cycle| Some(cycle.sleep.as_ref()?.cpu_us)).map(|cpu| time(cpu.p50))));
            rows.push(row);
        }
    }
    let head = [
        "agent",
        "subject",
        "n",
        "total: min",
        "p50",
        "p95",
        "p99",
        "stands still: p50",
        "p95",
        "on disk",
        "CPU: p50",
    ];
    table(&head, &rows)
}

/// Medians of the parts of each sleep.
fn parts(results: &Results) -> String {
    let mut rows = Vec::new();
    for workload in results.workloads(Cache::Warm) {
        for subject in SUBJECTS {
            let of = |part: fn(&Sleep, &Dump) -> u64| {
                let part = |cycle: &Cycle| {
                    cycle.sleep.as_ref().and_then(|sleep| Some(part(sleep, sleep.dump.as_ref()?)))
                };
                results.summary(workload, Cache::Warm, subject, part).map(|summary| summary.p50)
            };
            let Some(total) = of(|sleep, _| sleep.total_us) else { continue };
            let parts: [fn(&Sleep, &Dump) -> u64; 4] = [
                |_, dump| dump.writing,
                |_, dump| dump.memory.saturating_sub(dump.writing),
                |_, dump| dump.frozen.saturating_sub(dump.memory),
                |sleep, dump| sleep.total_us.saturating_sub(dump.frozen),
            ];
            let mut row = vec![workload.to_string(), subject.to_string(), time(total)];
            row.extend(parts.map(|part| cell(of(part).map(time))));
            rows.push(row);
        }
    }
    table(
        &[
            "agent",
            "subject",
            "total",
            "writing pages",
            "finding pages",
            "CRIU's other work",
            "before and after CRIU",
        ],
        &rows,
    )
}

fn at_once(results: &Results) -> String {
    let mut keys: Vec<(Workload, usize, Subject)> =
        results.at_once().map(|round| (round.workload, round.first_byte_us.len(), round.subject)).collect();
    keys.sort_unstable();
    keys.dedup();
    let row = |(workload, agents, subject): (Workload, usize, Subject)| {
        let rounds: Vec<_> = results
            .at_once()
            .filter(|round| {
                (round.workload, round.first_byte_us.len(), round.subject) == (workload, agents, subject)
            })
            .collect();
        let first = Summary::of(rounds.iter().flat_map(|round| round.first_byte_us.iter().copied()));
        let wall = Summary::of(rounds.iter().map(|round| round.wall_us));
        let [p50, p99, max] = [first.map(|s| s.p50), first.map(|s| s.p99), first.map(|s| s.max)];
        let mut row =
            vec![workload.to_string(), agents.to_string(), subject.to_string(), rounds.len().to_string()];
        row.extend([p50, p99, max, wall.map(|wall| wall.p50)].map(|value| cell(value.map(time))));
        row
    };
    let rows: Vec<_> = keys.into_iter().map(row).collect();
    table(
        &["agents", "at once", "subject", "rounds", "first byte: p50", "p99", "max", "all of them: p50"],
        &rows,
    )
}

fn shims(results: &Results) -> String {
    let rows: Vec<_> = results
        .shims()
        .map(|shims| {
            let agents = shims.memory.len();
            let whose =
                if shims.subject == Subject::Agentcube { "agentcube" } else { "containerd's for runc" };
            let state = if shims.asleep { "asleep" } else { "awake" };
            let mean = |figure: fn(&agentcube_tests::memory::Memory) -> u64| {
                cell(results.mean_of_shims(shims.subject, shims.asleep, agents, figure).map(size))
            };
            let figures = [mean(|shim| shim.rss), mean(|shim| shim.pss), mean(|shim| shim.private)];
            let total: u64 = shims.memory.iter().map(|shim| shim.pss).sum();
            let mut row = vec![agents.to_string(), whose.to_owned(), state.to_owned()];
            row.extend(figures);
            row.push(size(total));
            row
        })
        .collect();
    let mut rows = rows;
    rows.sort_by_key(|row| row[0].parse::<usize>().unwrap_or(0));
    table(&["agents", "shim", "agents are", "RSS", "PSS", "private", "PSS of all shims"], &rows)
}

fn failures(results: &Results) -> String {
    let rows: Vec<_> = results
        .failures()
        .map(|failure| {
            vec![failure.subject.to_string(), failure.section.clone(), failure.why.replace('\n', " ")]
        })
        .collect();
    table(&["subject", "part of the run", "why"], &rows)
}

/// Smallest, median and percentiles.
fn spread(summary: Option<Summary>) -> [String; 4] {
    let of = |figure: fn(Summary) -> u64| cell(summary.map(|summary| time(figure(summary))));
    [of(|s| s.min), of(|s| s.p50), of(|s| s.p95), of(|s| s.p99)]
}

fn cell(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".into())
}

/// A table in Markdown; nothing when it has no rows. Columns are padded, so that it can be read as text too.
fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let head: Vec<String> = head.iter().map(ToString::to_string).collect();
    let clean = |row: &Vec<String>| row.iter().map(|cell| cell.replace('|', "\\|")).collect::<Vec<_>>();
    let rows: Vec<Vec<String>> = std::iter::once(&head).chain(rows).map(clean).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(text, "| {} |", cells.join(" | "));
        if number == 0 {
            let rules: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
            let _ = writeln!(text, "|-{}-|", rules.join("-|-"));
        }
    }
    text
}

/// A ratio, with two digits that say something.
pub fn parts_of_one(ratio: f64) -> String {
    if ratio < 0.1 { format!("{ratio:.3}") } else { format!("{ratio:.2}") }
}

/// A time, given in microseconds.
#[allow(clippy::cast_precision_loss)] // Three digits are shown.
pub fn time(us: u64) -> String {
    let ms = us as f64 / 1000.0;
    match us {
        0..=9_994 => format!("{ms:.2} ms"),
        9_995..=999_949 => format!("{ms:.1} ms"),
        _ => format!("{:.2} s", ms / 1000.0),
    }
}

/// A size, given in bytes.
#[allow(clippy::cast_precision_loss)] // One decimal is shown.
pub fn size(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::goals;
    use crate::results::tests::results;

    #[test]
    fn the_report_has_every_table_and_says_what_was_not_measured() {
        let results = results();
        let text = markdown(&results, &goals::of(&results));
        for part in [
            "## Goals",
            "## Waking\n",
            "## Falling asleep",
            "## Depths of sleep",
            "same moment",
            "## Shims",
            "no \\| such program",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
        assert!(!text.contains("cold disk\n"), "no table without figures");
        assert!(!text.contains("The machine was busy"), "{text}");
        let row = text
            .lines()
            .find(|line| line.contains("python 64 MiB") && line.contains("runc"))
            .unwrap_or_default();
        assert!(row.contains("| 3 ") && row.contains("100.0 ms") && row.contains("101.0 ms"), "{row}");
    }

    #[test]
    fn the_summary_shows_the_plot_and_a_row_for_each_agent() {
        let results = results();
        let text = summary(&results, &goals::of(&results));
        assert!(text.starts_with("![") && text.contains("docs/benchmarks/wake.svg"), "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("| python")).count(), 3);
        assert!(text.contains("7 of 7 goals held"), "{text}");
        assert!(text.contains("depths.md") && text.contains("| frozen "), "{text}");
    }

    #[test]
    fn tables_are_padded_and_empty_ones_are_left_out() {
        let rows = [vec!["long".to_owned(), "b".to_owned()]];
        assert_eq!(table(&["a", "c"], &rows), "| a    | c |\n|------|---|\n| long | b |\n");
        assert_eq!(table(&["a"], &[]), "");
    }

    #[test]
    fn times_and_sizes_have_three_digits_and_units() {
        assert_eq!(time(7_123), "7.12 ms");
        assert_eq!(time(41_260), "41.3 ms");
        assert_eq!(time(1_250_000), "1.25 s");
        assert_eq!(size(5 << 19), "2.5 MiB");
        assert_eq!([0.0333, 0.2, 1.5].map(parts_of_one), ["0.033", "0.20", "1.50"]);
    }
}
