//! Sleeps at each depth, woken by a request and by a client, each in turn.

use std::thread;
use std::time::{Duration, Instant};

use agentcube_control::ClientError;
use agentcube_tests::memory as held;
use anyhow::{Context as _, Result, ensure};

use super::agent::Memory;
use super::cycles::{PAUSE, lend};
use super::engine::{Engine, is_at};
use super::probe::{self, Answer, Probe, Visit};
use super::sleeper::{Sleeper as _, wake_and_ask};
use super::{Run, micros};
use crate::plan::{Depth, Depths, Section, Subject, Waker, Workload, rotated};
use crate::record::{DepthCycle, Record, Refused};

/// How long an agent is left alone before it is put to sleep, so that the connections of before have ended.
const SETTLE: Duration = Duration::from_millis(30);

/// Runs the cycles of one agent.
pub fn run(run: &mut Run, plan: &Depths) -> Result<()> {
    let measured = start(run, plan.workload).and_then(|mut agent| {
        let measured = agent.measure(run, plan);
        // Why it failed is told already; this only gives its memory back to what comes next.
        let deleted = agent.engine.delete().context("deleting the agent");
        measured.and(deleted)
    });
    match measured {
        Ok(()) => Ok(()),
        Err(error) => run.fail(Subject::Agentcube, &Section::Depths(plan.clone()).to_string(), &error),
    }
}

/// An agent under this project's shim, and what it knows.
struct Agent {
    engine: Engine,
    memory: Memory,
    workload: Workload,
}

fn start(run: &mut Run, workload: Workload) -> Result<Agent> {
    run.check_time()?;
    let id = run.name(Subject::Agentcube);
    let engine = Engine::start(&id, workload, run.cpu_controller)?;
    let memory = Memory::of_new(engine.place())?;
    Ok(Agent { engine, memory, workload })
}

impl Agent {
    fn measure(&mut self, run: &mut Run, plan: &Depths) -> Result<()> {
        let mut ways = Vec::new();
        for depth in Depth::ALL {
            // The first cycles are not counted. They also tell whether the shim offers this depth here.
            let tried = Waker::ALL.into_iter().try_for_each(|waker| self.cycle(depth, waker).map(drop));
            match tried {
                Ok(()) => ways.extend(Waker::ALL.map(|waker| (depth, waker))),
                Err(error) => {
                    let why = refusal(depth, &error).ok_or(error)?;
                    run.say(&format!("  {depth} is not offered: {why}"));
                    run.record(&Record::Refused(Refused { workload: self.workload, depth, why }))?;
                }
            }
        }
        let begun = Instant::now();
        for turn in 0..plan.count {
            if begun.elapsed().as_secs() >= plan.seconds || run.check_time().is_err() {
                run.say(&format!("  time is up after {turn} cycles"));
                break;
            }
            for (depth, waker) in rotated(&ways, turn as usize) {
                let cycle = self.cycle(depth, waker);
                run.record(&Record::Depth(cycle.with_context(|| format!("{depth}, woken by {waker}"))?))?;
            }
        }
        Ok(())
    }

    /// Puts the agent to sleep at a depth and wakes it.
    fn cycle(&mut self, depth: Depth, waker: Waker) -> Result<DepthCycle> {
        thread::sleep(SETTLE);
        let asked = Instant::now();
        self.engine.sleep_at(depth).context("falling asleep")?;
        let sleep_us = micros(asked);
        let place = self.engine.place();
        let held_bytes = held::pss(&place.cgroup)?;
        let wakes = self.engine.status()?.wakes;
        let (reached_us, first_byte, body) = match waker {
            Waker::Client => {
                let Visit { connected, first_byte, body } = probe::visit(place)?;
                (whole(connected), first_byte, body)
            }
            Waker::Request => self.ask_for_wake()?,
        };
        self.memory.check(self.engine.place(), &body)?;
        let woke = self.engine.woke_after(wakes)?;
        let cause = if waker == Waker::Client { "traffic" } else { "request" };
        ensure!(woke.cause == cause, "it woke for {} where {cause} was due", woke.cause);
        ensure!(is_at(&woke, depth), "it woke from {:?} where {depth} was due", woke.depth);
        Ok(DepthCycle {
            workload: self.workload,
            depth,
            waker,
            sleep_us,
            held_bytes,
            reached_us,
            first_byte_us: whole(first_byte),
        })
    }

    /// Asks the shim for a wake: when the call came back, when the first byte of an answer came, and the answer.
    fn ask_for_wake(&mut self) -> Result<(u64, Duration, String)> {
        let place = lend(self.engine.place())?;
        thread::scope(|scope| {
            let client = Probe::arm(scope, &place, PAUSE);
            let start = Instant::now();
            let reached_us = wake_and_ask(&mut self.engine, &client, start)?;
            let Answer { first_byte, body } = client.answer()?;
            Ok((reached_us, first_byte, body))
        })
    }
}

fn whole(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The shim's words when it cannot offer a depth on this machine: memory has to be pushed out to somewhere. Any other depth
/// must work everywhere.
fn refusal(depth: Depth, error: &anyhow::Error) -> Option<String> {
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::FailedPrecondition { reason, .. }) if depth == Depth::Reclaimed => {
            Some(reason.clone())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_machine_without_swap_excuses_a_depth() {
        let refused = || ClientError::FailedPrecondition { id: "a".into(), reason: "no swap".into() };
        let error = anyhow::Error::new(refused()).context("falling asleep");
        assert_eq!(refusal(Depth::Reclaimed, &error).as_deref(), Some("no swap"));
        assert_eq!(refusal(Depth::Frozen, &error), None);
        assert_eq!(refusal(Depth::Reclaimed, &anyhow::anyhow!("lost")), None);
    }
}
