//! Wakes of several sleeping agents at the same moment.

use std::sync::{Barrier, OnceLock};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use super::Run;
use super::cycles::lend;
use super::probe::{Answer, Probe};
use super::sleeper::{Awake, wake_and_ask};
use crate::plan::{AtOnce, Section, Subject, rotated};
use crate::record::{self, Record};

/// How long one of N asking threads waits after an attempt that failed: N times this, so that all of them together ask as
/// often as one alone does, and take as little of the CPU.
const PAUSE: Duration = Duration::from_micros(200);

/// How long agents are left alone before they are put to sleep.
const SETTLE: Duration = Duration::from_millis(50);

/// Runs all rounds.
pub fn run(run: &mut Run, plan: &AtOnce) -> Result<()> {
    let section = Section::AtOnce(plan.clone()).to_string();
    let most = plan.rounds.iter().map(|(agents, _)| *agents).max().unwrap_or(0);
    let mut groups: Vec<(Subject, Vec<Awake>)> = Vec::new();
    for &subject in &plan.subjects {
        let started =
            (0..most).map(|_| Awake::start(run, subject, plan.workload)).collect::<Result<Vec<_>>>();
        match started {
            Ok(agents) => groups.push((subject, agents)),
            Err(error) => run.fail(subject, &section, &error)?,
        }
    }
    let begun = Instant::now();
    for &(agents, rounds) in &plan.rounds {
        for turn in 0..rounds {
            if begun.elapsed().as_secs() >= plan.seconds || run.check_time().is_err() {
                run.say(&format!("  time is up before round {turn} of {agents} at once"));
                break;
            }
            let order: Vec<Subject> = groups.iter().map(|(subject, _)| *subject).collect();
            for subject in rotated(&order, turn as usize) {
                let Some((_, group)) = groups.iter_mut().find(|(other, _)| *other == subject) else {
                    continue;
                };
                match round(&mut group[..agents as usize]) {
                    Ok((first_byte_us, wall_us)) => {
                        let workload = plan.workload;
                        let record = record::AtOnce { workload, subject, first_byte_us, wall_us };
                        run.record(&Record::AtOnce(record))?;
                    }
                    Err(error) => {
                        run.fail(subject, &section, &error)?;
                        groups.retain(|(other, _)| *other != subject);
                    }
                }
            }
        }
    }
    for (subject, mut group) in groups {
        let deleted = group.iter_mut().try_for_each(|awake| awake.sleeper.delete());
        if let Err(error) = deleted {
            run.fail(subject, &section, &error.context("deleting the agents"))?;
        }
    }
    Ok(())
}

/// Puts agents to sleep one by one and wakes all of them at the same moment.
fn round(group: &mut [Awake]) -> Result<(Vec<u64>, u64)> {
    thread::sleep(SETTLE);
    for awake in &mut *group {
        awake.sleeper.sleep().with_context(|| format!("{} falling asleep", awake.sleeper.place().id))?;
    }
    let pause = PAUSE * u32::try_from(group.len()).unwrap_or(u32::MAX);
    let places = group.iter().map(|awake| lend(awake.sleeper.place())).collect::<Result<Vec<_>>>()?;
    let everybody = Barrier::new(group.len() + 1);
    let start = OnceLock::new();
    let answers = thread::scope(|scope| {
        let (everybody, start) = (&everybody, &start);
        let agents: Vec<_> = group
            .iter_mut()
            .zip(&places)
            .map(|(awake, place)| {
                let probe = Probe::arm(scope, place, pause);
                scope.spawn(move || {
                    everybody.wait();
                    let start = *start.get_or_init(Instant::now);
                    wake_and_ask(awake.sleeper.as_mut(), &probe, start)?;
                    probe.answer()
                })
            })
            .collect();
        everybody.wait();
        let answer = |agent: ScopedJoinHandle<'_, Result<Answer>>| {
            agent.join().map_err(|_| anyhow!("a waking thread panicked"))?
        };
        agents.into_iter().map(answer).collect::<Result<Vec<_>>>()
    })?;
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let first_bytes: Vec<u64> = answers.iter().map(|answer| micros(answer.first_byte)).collect();
    for (awake, answer) in group.iter_mut().zip(answers) {
        awake.memory.check(awake.sleeper.place(), &answer.body)?;
        awake.sleeper.tidy()?;
    }
    let wall = first_bytes.iter().copied().max().unwrap_or(0);
    Ok((first_bytes, wall))
}
