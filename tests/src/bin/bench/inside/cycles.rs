//! Sleeps and wakes one at a time, each subject in turn.

use std::thread;
use std::time::{Duration, Instant};

use agentcube_tests::node::Runtime;
use anyhow::{Context as _, Result, ensure};

use super::agent::{self, Place};
use super::probe::{self, Probe};
use super::resident::{self, Watch};
use super::sleeper::{Awake, wake_and_ask};
use super::{Run, cache, cpu, criu_stats, micros};
use crate::plan::{self, Cache, Cycles, Subject};
use crate::record::{Cycle, Record, Sleep};

/// How long after an attempt that failed the next one is made.
pub const PAUSE: Duration = Duration::from_micros(200);

/// How long an agent is left alone before it is put to sleep, so that the connections of before have ended.
const SETTLE: Duration = Duration::from_millis(30);

/// The most of an image that may still be cached when it counts as cold.
const COLD: f64 = 0.02;

/// Runs the cycles of one workload.
pub fn run(run: &mut Run, plan: &Cycles) -> Result<()> {
    let section = plan::Section::Cycles(plan.clone()).to_string();
    let mut sleepers = Vec::new();
    for &subject in plan.subjects.iter().filter(|subject| **subject != Subject::ColdStart) {
        // The first cycle is not counted: it brings programs into the page cache and CRIU's facts about the kernel.
        let started = Awake::start(run, subject, plan.workload).and_then(|mut awake| {
            cycle(&mut awake, Cache::Warm)?;
            Ok(awake)
        });
        match started {
            Ok(awake) => sleepers.push(awake),
            Err(error) => run.fail(subject, &section, &error)?,
        }
    }
    let begun = Instant::now();
    let mut failed = Vec::new();
    for turn in 0..plan.count {
        if begun.elapsed().as_secs() >= plan.seconds || run.check_time().is_err() {
            run.say(&format!("  time is up after {turn} cycles"));
            break;
        }
        for subject in plan::rotated(&plan.subjects, turn as usize) {
            let measured = if subject == Subject::ColdStart {
                if turn >= plan.cold_starts || failed.contains(&subject) {
                    continue;
                }
                cold_start(run, plan)
            } else {
                let Some(awake) = sleepers.iter_mut().find(|awake| awake.subject == subject) else {
                    continue;
                };
                cycle(awake, plan.cache)
            };
            match measured {
                Ok(cycle) => run.record(&Record::Cycle(cycle))?,
                Err(error) => {
                    run.fail(subject, &section, &error)?;
                    let broken = sleepers.extract_if(.., |awake| awake.subject == subject);
                    // Why it failed is told already; this only gives its memory back to those that go on.
                    broken.for_each(|mut awake| drop(awake.sleeper.delete()));
                    failed.push(subject);
                }
            }
        }
    }
    for mut awake in sleepers {
        if let Err(error) = awake.sleeper.delete() {
            run.fail(awake.subject, &section, &error.context("deleting the agent"))?;
        }
    }
    Ok(())
}

/// Puts an agent to sleep and wakes it.
fn cycle(awake: &mut Awake, cached: Cache) -> Result<Cycle> {
    thread::sleep(SETTLE);
    let before = resident::anonymous(&awake.sleeper.place().cgroup);
    let cpu_before = cpu::used()?;
    let slept = awake.sleeper.sleep().context("falling asleep")?;
    let cpu_asleep = cpu::used()?;
    let image = awake.sleeper.image()?;
    let image_bytes = cache::bytes_on_disk(&image)?;
    let dump = criu_stats::of_dump(&awake.sleeper.traces()?);
    let left = match cached {
        Cache::Warm => None,
        Cache::Cold => Some(cache::drop_cached(&image)?),
    };
    ensure!(left.is_none_or(|left| left <= COLD), "{left:?} of a cold image is in the page cache");

    let cpu_before_wake = cpu::used()?;
    let wake = wake(awake, before)?;
    let cpu_awake = cpu::used()?;

    awake.memory.check(awake.sleeper.place(), &wake.body)?;
    awake.sleeper.tidy()?;
    Ok(Cycle {
        workload: awake.sleeper.place().workload,
        cache: cached,
        subject: awake.subject,
        sleep: Some(Sleep {
            total_us: slept.total_us,
            stopped_us: slept.stopped_us,
            cpu_us: cpu_asleep.saturating_sub(cpu_before),
            image_bytes,
            cached: left,
            dump,
        }),
        wake_us: wake.call_us,
        first_byte_us: wake.first_byte_us,
        resident_us: wake.resident_us,
        wake_cpu_us: cpu_awake.saturating_sub(cpu_before_wake),
    })
}

struct Woke {
    call_us: u64,
    first_byte_us: u64,
    resident_us: Option<u64>,
    body: String,
}

/// Wakes an agent while two threads wait for its answer and for its memory, of which it held `before` pages.
fn wake(awake: &mut Awake, before: u64) -> Result<Woke> {
    // The place is lent to the threads while the sleeper is at work.
    let place = awake.sleeper.place();
    let (cgroup, lent) = (place.cgroup.clone(), lend(place)?);
    thread::scope(|scope| {
        let probe = Probe::arm(scope, &lent, PAUSE);
        let watch = Watch::arm(scope, &cgroup, before);
        let start = Instant::now();
        watch.go(start);
        let call_us = wake_and_ask(awake.sleeper.as_mut(), &probe, start)?;
        let answer = probe.answer()?;
        let back = watch.back()?;
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Ok(Woke {
            call_us,
            first_byte_us: micros(answer.first_byte),
            // Memory may be back before the agent runs, and it is of no use before that.
            resident_us: back.map(|back| micros(back.max(answer.first_byte))),
            body: answer.body,
        })
    })
}

/// The same place once more, for threads that ask while the sleeper is borrowed.
pub fn lend(place: &Place) -> Result<Place> {
    Ok(Place {
        id: place.id.clone(),
        workload: place.workload,
        network: place.network.try_clone().context("copying a descriptor")?,
        cgroup: place.cgroup.clone(),
    })
}

/// Starts a new container of the same image and deletes it.
fn cold_start(run: &mut Run, plan: &Cycles) -> Result<Cycle> {
    let id = run.name(Subject::ColdStart);
    let place = Place::for_ctr(&id, plan.workload)?;
    let cpu_before = cpu::used()?;
    let (wake_us, answer) = thread::scope(|scope| {
        let probe = Probe::arm(scope, &place, PAUSE);
        let start = Instant::now();
        probe.go(start);
        agent::start(&place, Runtime::Runc, run.cpu_controller)?;
        Ok::<_, anyhow::Error>((micros(start), probe.answer()?))
    })?;
    let wake_cpu_us = cpu::used()?.saturating_sub(cpu_before);
    ensure!(probe::is_new(&answer.body), "a new agent answers {:?}", answer.body);
    agent::delete(&place)?;
    let first_byte_us = u64::try_from(answer.first_byte.as_micros()).unwrap_or(u64::MAX);
    Ok(Cycle {
        workload: plan.workload,
        cache: plan.cache,
        subject: Subject::ColdStart,
        sleep: None,
        wake_us,
        first_byte_us,
        // An agent fills its memory before it listens.
        resident_us: Some(first_byte_us),
        wake_cpu_us,
    })
}
