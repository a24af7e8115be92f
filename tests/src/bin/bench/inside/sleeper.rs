//! What every subject that sleeps and wakes can do.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::agent::{Memory, Place};
use super::engine::Engine;
use super::oci::Oci;
use super::probe::{self, Probe};
use super::{Run, micros};
use crate::plan::{Subject, Workload};

/// A sleep, in microseconds.
#[derive(Debug, Clone, Copy)]
pub struct Slept {
    /// From asking until it slept.
    pub total_us: u64,
    /// How long the agent stood still before it was gone, where that is told.
    pub stopped_us: Option<u64>,
}

impl Slept {
    /// A sleep by a command that has just come back.
    pub fn by_command(start: Instant) -> Self {
        Self { total_us: micros(start), stopped_us: None }
    }
}

/// An agent that can be put to sleep and woken.
pub trait Sleeper: Send {
    /// Where the agent is.
    fn place(&self) -> &Place;
    /// Puts it to sleep.
    fn sleep(&mut self) -> Result<Slept>;
    /// Where its image is while it sleeps.
    fn image(&mut self) -> Result<PathBuf>;
    /// The folder below which CRIU has left its logs and statistics of the sleep.
    fn traces(&mut self) -> Result<PathBuf>;
    /// Whether a client wakes the sleeping agent by itself.
    fn wakes_for_clients(&self) -> bool {
        false
    }
    /// Wakes it; comes back when the call or command does.
    fn wake(&mut self) -> Result<()>;
    /// Removes what a wake has left, off the clock.
    fn tidy(&mut self) -> Result<()>;
    /// Deletes the agent.
    fn delete(&mut self) -> Result<()>;
}

/// Wakes an agent, which was asked for at `start`, and has a client ask it meanwhile; where that would be what wakes it, as
/// soon as the call has come back. Gives the time until then, in microseconds.
pub fn wake_and_ask(sleeper: &mut dyn Sleeper, client: &Probe<'_>, start: Instant) -> Result<u64> {
    let waits = sleeper.wakes_for_clients();
    if !waits {
        client.go(start);
    }
    sleeper.wake().with_context(|| format!("{} waking", sleeper.place().id))?;
    let call_us = micros(start);
    if waits {
        client.go(start);
    }
    Ok(call_us)
}

/// A sleeper and what its agent knows.
pub struct Awake {
    /// The subject.
    pub subject: Subject,
    /// The sleeper.
    pub sleeper: Box<dyn Sleeper>,
    /// What its agent knows.
    pub memory: Memory,
}

impl Awake {
    /// Starts an agent and waits until it answers.
    pub fn start(run: &mut Run, subject: Subject, workload: Workload) -> Result<Self> {
        run.check_time()?;
        let id = run.name(subject);
        let sleeper: Box<dyn Sleeper> = match subject {
            Subject::Agentcube => Box::new(Engine::start(&id, workload, run.cpu_controller)?),
            Subject::Runc => Box::new(Oci::start("runc", &id, workload)?),
            Subject::Crun => Box::new(Oci::start("crun", &id, workload)?),
            Subject::ColdStart => anyhow::bail!("a cold start does not sleep"),
        };
        let memory = Memory::of_new(sleeper.place())?;
        Ok(Self { subject, sleeper, memory })
    }

    /// Wakes the agent without measuring it and checks what it knows.
    pub fn wake_and_check(&mut self) -> Result<()> {
        self.sleeper.wake()?;
        let answer = probe::first_answer(self.sleeper.place(), Duration::from_millis(1), Instant::now())?;
        self.memory.check(self.sleeper.place(), &answer.body)?;
        self.sleeper.tidy()
    }
}
