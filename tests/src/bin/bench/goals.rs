//! What the project wants to reach, against figures of the same run.

use std::fmt;

use crate::plan::{Cache, Depth, Subject, Waker, Workload};
use crate::record::{Cycle, DepthCycle};
use crate::report;
use crate::results::Results;
use crate::statistics::ratio;

/// How far a figure may go.
#[derive(Debug, Clone, Copy)]
enum Limit {
    /// So many times another one, where that was measured.
    Times(f64, Option<u64>),
    /// So much.
    Most(u64),
}

/// A goal: a figure is to stay below a limit.
#[derive(Debug, Clone)]
pub struct Goal {
    /// What is compared with what.
    pub what: &'static str,
    figure: Option<u64>,
    limit: Limit,
    unit: fn(u64) -> String,
}

impl Goal {
    /// The figure, where it was measured.
    pub fn shown(&self) -> Option<String> {
        self.figure.map(self.unit)
    }

    /// What it is compared with, where it is and that was measured.
    pub fn other_shown(&self) -> Option<String> {
        match self.limit {
            Limit::Times(_, other) => other.map(self.unit),
            Limit::Most(_) => None,
        }
    }

    /// What the figure is of the other one.
    pub fn ratio(&self) -> Option<f64> {
        match self.limit {
            Limit::Times(_, other) => ratio(self.figure?, other?),
            Limit::Most(_) => None,
        }
    }

    /// The limit.
    pub fn at_most(&self) -> String {
        match self.limit {
            Limit::Times(most, _) => report::parts_of_one(most),
            Limit::Most(most) => (self.unit)(most),
        }
    }

    /// Whether it was reached: what was not measured was not.
    pub fn held(&self) -> bool {
        self.outcome() == Some(true)
    }

    /// The word for that.
    pub fn verdict(&self) -> &'static str {
        match self.outcome() {
            Some(true) => "held",
            Some(false) => "missed",
            None => "not measured",
        }
    }

    fn outcome(&self) -> Option<bool> {
        match self.limit {
            Limit::Times(most, _) => self.ratio().map(|ratio| ratio <= most),
            Limit::Most(most) => self.figure.map(|figure| figure <= most),
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:12} {}", self.verdict(), self.what)?;
        let Some(figure) = self.shown().filter(|_| self.outcome().is_some()) else { return Ok(()) };
        write!(f, ": {figure}")?;
        if let Some((other, ratio)) = self.other_shown().zip(self.ratio()) {
            write!(f, " against {other}, {}", report::parts_of_one(ratio))?;
        }
        write!(f, " where {} is the most", self.at_most())
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
    let times = |what, most, figure, other| goal(what, figure, Limit::Times(most, other), report::time);
    // The largest number of agents for which both shims were measured is the one that a node is about.
    let agents = results.shims().map(|shims| shims.memory.len()).max().unwrap_or(0);
    let depth = |depth, waker, figure: fn(&DepthCycle) -> u64| {
        results.depth_summary(Workload::Python(64), depth, Some(waker), figure)
    };
    let pss = |subject, asleep| results.mean_of_shims(subject, asleep, agents, |shim| shim.pss);
    vec![
        times(
            "wake to first byte, 64 MiB: at most 1/5 of runc restore",
            0.2,
            p50(64, ours, first_byte),
            p50(64, runc, first_byte),
        ),
        times(
            "wake to first byte: 1024 MiB at most 1.5 times 64 MiB",
            1.5,
            p50(1024, ours, first_byte),
            p50(64, ours, first_byte),
        ),
        times(
            "wake to fully resident, 256 MiB: at most runc restore",
            1.0,
            p50(256, ours, resident),
            p50(256, runc, resident),
        ),
        times(
            "sleep, 64 MiB: at most 1/3 of runc checkpoint",
            1.0 / 3.0,
            p50(64, ours, slept),
            p50(64, runc, slept),
        ),
        goal(
            "shim asleep (PSS): at most 1/2 of containerd's shim for runc",
            pss(ours, true),
            Limit::Times(0.5, pss(runc, false)),
            report::size,
        ),
        times(
            "wake from frozen to first byte, 64 MiB: at most 1/30 of runc restore",
            1.0 / 30.0,
            depth(Depth::Frozen, Waker::Request, |cycle| cycle.first_byte_us).map(|summary| summary.p50),
            p50(64, runc, first_byte),
        ),
        goal(
            "connecting to a checkpointed agent, 64 MiB (p99)",
            depth(Depth::Checkpointed, Waker::Client, |cycle| cycle.reached_us).map(|summary| summary.p99),
            Limit::Most(5_000),
            report::time,
        ),
    ]
}

fn goal(what: &'static str, figure: Option<u64>, limit: Limit, unit: fn(u64) -> String) -> Goal {
    Goal { what, figure, limit, unit }
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
        // Sleeps take 22 ms and 202 ms, memory is back after 33 and 303 ms, shims hold 4 and 16 MiB, a wake from frozen
        // takes 2 ms and a handshake 0.09 ms.
        assert_eq!(verdicts, ["held"; 7], "{goals:?}");
        assert!(goals[0].to_string().contains("11.0 ms against 101.0 ms, 0.11 where 0.20"), "{}", goals[0]);
        assert!(goals[6].to_string().ends_with(": 0.09 ms where 5.00 ms is the most"), "{}", goals[6]);
    }

    #[test]
    fn a_goal_is_missed_above_its_limit_and_when_nothing_was_measured() {
        let of = |figure, limit| goal("x", figure, limit, |value| value.to_string());
        let missed = of(Some(51), Limit::Times(0.5, Some(100)));
        assert_eq!((missed.verdict(), missed.held()), ("missed", false));
        assert!(of(Some(50), Limit::Times(0.5, Some(100))).held());
        assert_eq!(of(Some(50), Limit::Times(0.5, None)).verdict(), "not measured");
        assert_eq!(of(Some(51), Limit::Most(50)).to_string(), "missed       x: 51 where 50 is the most");
        assert!(of(Some(50), Limit::Most(50)).held());
        let mut empty = results();
        empty.records.clear();
        empty.plan = Plan::quick();
        assert!(super::of(&empty).iter().all(|goal| !goal.held() && goal.verdict() == "not measured"));
    }
}
