//! The part of the benchmark that runs on the node itself, so that no clock covers the way into it.

mod agent;
mod at_once;
mod cache;
mod command;
mod cpu;
mod criu_stats;
mod cycles;
mod depths;
mod engine;
mod machine;
mod neighbours;
mod oci;
mod probe;
mod resident;
mod shims;
mod sleeper;

use std::fs::{self, File};
use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::plan::{Plan, Section, Subject};
use crate::record::{Failure, Record};

/// Where the records go, on the node: one a line, as they come.
pub const RECORDS: &str = "/run/bench/records.jsonl";

/// Where on the node the other files of a run are: bundles and logs in memory.
const SCRATCH: &str = "/run/bench";

/// Runs a plan, given as JSON.
///
/// # Errors
/// When the records can't be written. What can't be measured is a record.
pub fn run(plan: &str) -> Result<()> {
    let plan: Plan = serde_json::from_str(plan).context("the plan is not readable")?;
    fs::create_dir_all(SCRATCH).with_context(|| format!("making {SCRATCH}"))?;
    let records = File::create(RECORDS).with_context(|| format!("making {RECORDS}"))?;
    let mut run = Run {
        cpu_controller: plan.cpu_controller,
        limit: Duration::from_secs(plan.seconds),
        records,
        started: Instant::now(),
        agents: 0,
    };
    run.record(&Record::Machine(machine::describe()))?;
    for section in &plan.sections {
        run.say(&section.to_string());
        if let Err(error) = run.check_time() {
            run.fail(Subject::Agentcube, &section.to_string(), &error)?;
            continue;
        }
        match section {
            Section::Cycles(plan) => cycles::run(&mut run, plan)?,
            Section::Depths(plan) => depths::run(&mut run, plan)?,
            Section::AtOnce(plan) => at_once::run(&mut run, plan)?,
            Section::Shims(plan) => shims::run(&mut run, plan)?,
            Section::Neighbours(plan) => neighbours::run(&mut run, plan)?,
        }
    }
    run.record(&Record::Done)
}

/// A run under way.
struct Run {
    cpu_controller: bool,
    limit: Duration,
    records: File,
    started: Instant,
    /// How many agents there have been.
    agents: u32,
}

impl Run {
    fn record(&mut self, record: &Record) -> Result<()> {
        let mut line = serde_json::to_string(record).context("a record")?;
        line.push('\n');
        self.records.write_all(line.as_bytes()).with_context(|| format!("writing {RECORDS}"))
    }

    /// Takes note of something that could not be measured; the run goes on without it.
    fn fail(&mut self, subject: Subject, section: &str, error: &anyhow::Error) -> Result<()> {
        self.say(&format!("  {subject} failed: {error:#}"));
        let failure = Failure { subject, section: section.to_owned(), why: format!("{error:#}") };
        self.record(&Record::Failure(failure))
    }

    /// Tells whoever waits how far it is.
    fn say(&self, text: &str) {
        eprintln!("[{:4} s] {text}", self.started.elapsed().as_secs());
    }

    /// Whether something more may begin.
    fn check_time(&self) -> Result<()> {
        ensure!(self.started.elapsed() < self.limit, "the time for the whole run is up");
        Ok(())
    }

    /// A name for the next agent.
    fn name(&mut self, subject: Subject) -> String {
        self.agents += 1;
        let kind = match subject {
            Subject::Agentcube => "agentcube",
            Subject::Runc => "runc",
            Subject::Crun => "crun",
            Subject::ColdStart => "cold",
        };
        format!("{kind}-{}", self.agents)
    }
}

/// Microseconds that have passed.
fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
