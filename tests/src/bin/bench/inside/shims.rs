//! The memory of shims: this project's, awake and asleep, and containerd's for runc.

use std::fs;
use std::path::{Path, PathBuf};

use agentcube_tests::memory::Memory as Held;
use agentcube_tests::node::Runtime;
use anyhow::{Context as _, Result};

use super::Run;
use super::agent::{self, Memory, Place};
use super::engine::Engine;
use super::sleeper::{Awake, Sleeper as _};
use crate::plan::{Section, Shims, Subject, Workload};
use crate::record::{self, Record};

/// Small, because it is the shims that count.
const WORKLOAD: Workload = Workload::Busybox;

/// Starts more and more agents under both shims.
pub fn run(run: &mut Run, plan: &Shims) -> Result<()> {
    let section = Section::Shims(plan.clone()).to_string();
    if let Err(error) = ours(run, plan) {
        run.fail(Subject::Agentcube, &section, &error)?;
    }
    if let Err(error) = containerds(run, plan) {
        run.fail(Subject::Runc, &section, &error)?;
    }
    Ok(())
}

fn ours(run: &mut Run, plan: &Shims) -> Result<()> {
    let mut agents: Vec<Awake> = Vec::new();
    let mut shims: Vec<u32> = Vec::new();
    for &count in &plan.agents {
        while agents.len() < count as usize {
            run.check_time()?;
            let id = run.name(Subject::Agentcube);
            let engine = Engine::start(&id, WORKLOAD, run.cpu_controller)?;
            shims.push(engine.status()?.shim_pid);
            let memory = Memory::of_new(engine.place())?;
            agents.push(Awake { subject: Subject::Agentcube, sleeper: Box::new(engine), memory });
        }
        // A shim that has been through a sleep holds what it will hold.
        for awake in &mut agents {
            run.check_time()?;
            awake.sleeper.sleep()?;
            awake.wake_and_check()?;
        }
        record(run, Subject::Agentcube, false, &shims)?;
        for awake in &mut agents {
            run.check_time()?;
            awake.sleeper.sleep()?;
        }
        record(run, Subject::Agentcube, true, &shims)?;
        for awake in &mut agents {
            run.check_time()?;
            awake.wake_and_check()?;
        }
    }
    agents.iter_mut().try_for_each(|awake| awake.sleeper.delete())
}

fn containerds(run: &mut Run, plan: &Shims) -> Result<()> {
    let mut places: Vec<Place> = Vec::new();
    for &count in &plan.agents {
        while places.len() < count as usize {
            run.check_time()?;
            let place = Place::for_ctr(&run.name(Subject::Runc), WORKLOAD)?;
            agent::start(&place, Runtime::Runc, run.cpu_controller)?;
            Memory::of_new(&place)?;
            places.push(place);
        }
        let shims = places.iter().map(|place| shim_of(&place.id)).collect::<Result<Vec<u32>>>()?;
        record(run, Subject::Runc, false, &shims)?;
    }
    places.iter().try_for_each(agent::delete)
}

fn record(run: &mut Run, subject: Subject, asleep: bool, pids: &[u32]) -> Result<()> {
    let memory = pids.iter().map(|pid| {
        let path = format!("/proc/{pid}/smaps_rollup");
        Held::parse(&fs::read_to_string(&path).with_context(|| format!("reading {path}"))?)
    });
    let memory = memory.collect::<Result<Vec<Held>>>()?;
    run.record(&Record::Shims(record::Shims { subject, asleep, memory }))
}

/// The process of containerd's shim for runc whose container this is.
fn shim_of(id: &str) -> Result<u32> {
    let entries = fs::read_dir("/proc").context("listing /proc")?;
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_its = |pid: &u32| {
        let path: PathBuf = Path::new("/proc").join(pid.to_string()).join("cmdline");
        fs::read(path).is_ok_and(|line| is_shim_of(&line, id))
    };
    pids.into_iter().find(is_its).with_context(|| format!("no shim of containerd's has {id}"))
}

/// Whether a command line is that of containerd's shim for this container.
fn is_shim_of(command_line: &[u8], id: &str) -> bool {
    let words: Vec<&[u8]> = command_line.split(|byte| *byte == 0).collect();
    words[0].ends_with(b"containerd-shim-runc-v2")
        && words.windows(2).any(|pair| pair[0] == b"-id" && pair[1] == id.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shims_are_known_by_their_command_lines() {
        let line = b"/usr/bin/containerd-shim-runc-v2\0-namespace\0default\0-id\0runc-1\0-address\0x\0";
        assert!(is_shim_of(line, "runc-1"));
        assert!(!is_shim_of(line, "runc"));
        assert!(!is_shim_of(line, "default"));
        assert!(!is_shim_of(b"", "runc-1"));
    }
}
