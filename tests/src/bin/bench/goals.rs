//! What the project wants to reach, as ratios of figures of the same run.

use std::fmt;

use crate::plan::{Cache, Subject, Workload};
use crate::record::Cycle;
use crate::results::Results;
use crate::statistics::ratio;

/// A goal: one figure is to be at most a multiple of another.
#[derive(Debug, Clone, PartialEq)]
pub struct Goal {
    /// What is compared with what.
    pub what: &'static str,
    /// The most that the first figure may be of the second.
    pub limit: f64,
    /// Both figures, with units.
    pub figures: Option<(String, String)>,
    /// What the first one is of the second; nothing when one of them was not measured.
    pub ratio: Option<f64>,
}

impl Goal {
    /// Whether it was reached: what was not measured was not.
    pub fn held(&self) -> bool {
        self.ratio.is_some_and(|ratio| ratio <= self.limit)
    }

    /// The word for that.
    pub fn verdict(&self) -> &'static str {
        match self.ratio {
            Some(_) if self.held() => "held",
            Some(_) => "missed",
            None => "not measured",
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:12} {}", self.verdict(), self.what)?;
        if let (Some((first, second)), Some(ratio)) = (&self.figures, self.ratio) {
            write!(f, ": {first} against {second}, {ratio:.2} where {:.2} is the most", self.limit)?;
        }
        Ok(())
    }
}

/// The goals and how far a run has reached them.
pub fn of(results: &Results) -> Vec<Goal> {
    let p50 = |mib, subject, figure: fn(&Cycle) -> Option<u64>| {
        results.summary(Workload::Python(mib), Cache::Warm, subject, figure).map(|summary| summary.p50)
    };
    let first_byte: fn(&Cycle) -> Option<u64> = |cycle| Some(cycle.first_byte_us);
    let resident: fn(&Cycle) -> Option<u64> = |cycle| Some(cycle.resident_us());
    let slept: fn(&Cycle) -> Option<u64> = |cycle| cycle.sleep.as_ref().map(|sleep| sleep.total_us);
    let (ours, runc) = (Subject::Agentcube, Subject::Runc);
    let of_times = |what, limit, first, second| goal(what, limit, first, second, crate::report::time);
    // The largest number of agents for which both shims were measured is the one that a node is about.
    let agents = results.shims().map(|shims| shims.memory.len()).max().unwrap_or(0);
    let pss = |subject, asleep| results.mean_of_shims(subject, asleep, agents, |shim| shim.pss);
    vec![
        of_times(
            "wake to first byte, 64 MiB: at most 1/5 of runc restore",
            0.2,
            p50(64, ours, first_byte),
            p50(64, runc, first_byte),
        ),
        of_times(
            "wake to first byte: 1024 MiB at most 1.5 times 64 MiB",
            1.5,
            p50(1024, ours, first_byte),
            p50(64, ours, first_byte),
        ),
        of_times(
            "wake to fully resident, 256 MiB: at most runc restore",
            1.0,
            p50(256, ours, resident),
            p50(256, runc, resident),
        ),
        of_times(
            "sleep, 64 MiB: at most 1/3 of runc checkpoint",
            1.0 / 3.0,
            p50(64, ours, slept),
            p50(64, runc, slept),
        ),
        goal(
            "shim asleep (PSS): at most 1/2 of containerd's shim for runc",
            0.5,
            pss(ours, true),
            pss(runc, false),
            crate::report::size,
        ),
    ]
}

fn goal(
    what: &'static str,
    limit: f64,
    first: Option<u64>,
    second: Option<u64>,
    shown: fn(u64) -> String,
) -> Goal {
    let both = first.zip(second);
    Goal {
        what,
        limit,
        figures: both.map(|(first, second)| (shown(first), shown(second))),
        ratio: both.and_then(|(first, second)| ratio(first, second)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Plan;
    use crate::results::tests::results;

    #[test]
    fn goals_are_held_or_missed_by_the_figures_of_one_run() {
        let goals = of(&results());
        let verdicts: Vec<_> = goals.iter().map(Goal::verdict).collect();
        // Sleeps take 22 ms and 202 ms, memory is back after 33 and 303 ms, shims hold 4 and 16 MiB.
        assert_eq!(verdicts, ["held"; 5], "{goals:?}");
        assert!(goals[0].to_string().contains("11.0 ms against 101.0 ms, 0.11"), "{}", goals[0]);
    }

    #[test]
    fn a_goal_is_missed_above_its_limit_and_when_nothing_was_measured() {
        let missed = goal("x", 0.5, Some(51), Some(100), |value| value.to_string());
        assert_eq!((missed.verdict(), missed.held()), ("missed", false));
        assert!(goal("x", 0.5, Some(50), Some(100), |value| value.to_string()).held());
        let mut empty = results();
        empty.records.clear();
        empty.plan = Plan::quick();
        assert!(of(&empty).iter().all(|goal| !goal.held() && goal.verdict() == "not measured"));
    }
}
