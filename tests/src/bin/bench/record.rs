//! What a run brings: one record for each measurement, and a description of the machine. Times are microseconds, sizes
//! bytes.

use agentcube_tests::memory::Memory;
use serde::{Deserialize, Serialize};

use crate::plan::{Cache, Company, Depth, Subject, Waker, Workload};

/// One sleep and the wake after it, or a cold start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cycle {
    /// The agent.
    pub workload: Workload,
    /// Where the image was.
    pub cache: Cache,
    /// Who did it.
    pub subject: Subject,
    /// The sleep; a cold start has none.
    pub sleep: Option<Sleep>,
    /// From asking until the call or command came back.
    pub wake_us: u64,
    /// From asking until the first byte of the answer over HTTP.
    pub first_byte_us: u64,
    /// From asking until the agent had answered and all of its memory was back; nothing when that took too long.
    pub resident_us: Option<u64>,
    /// CPU time of the whole node from asking until all of that.
    pub wake_cpu_us: u64,
}

impl Cycle {
    /// The time until all memory was back; the time for which it was waited when it did not come.
    pub fn resident_us(&self) -> u64 {
        self.resident_us.unwrap_or(RESIDENT_PATIENCE_US)
    }
}

/// How long the memory of a woken agent may take to be back.
pub const RESIDENT_PATIENCE_US: u64 = 10_000_000;

/// A sleep.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sleep {
    /// From asking until it slept.
    pub total_us: u64,
    /// How long the agent stood still before it was gone, where that is told.
    pub stopped_us: Option<u64>,
    /// CPU time of the whole node meanwhile.
    pub cpu_us: u64,
    /// Bytes on disk.
    pub image_bytes: u64,
    /// The share of the image that was in the page cache just before the wake, by samples.
    pub cached: Option<f64>,
    /// What CRIU tells of its part.
    pub dump: Option<Dump>,
}

/// CRIU's own times of a dump, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dump {
    /// From when it had stopped all processes until it was done.
    pub frozen: u64,
    /// Of this, for finding the pages of memory and taking them out of the processes.
    pub memory: u64,
    /// Of this, for writing them.
    pub writing: u64,
}

/// A sleep of this project's at one depth, and the wake after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DepthCycle {
    /// The agent.
    pub workload: Workload,
    /// How deep it slept.
    pub depth: Depth,
    /// What woke it.
    pub waker: Waker,
    /// From asking for the sleep until the call came back.
    pub sleep_us: u64,
    /// Memory that its processes held asleep (PSS).
    pub held_bytes: u64,
    /// From asking until the call came back, or from the client's call of `connect` until it was connected.
    pub reached_us: u64,
    /// From the same moment until the first byte of the answer over HTTP.
    pub first_byte_us: u64,
}

/// A depth that the shim does not offer on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// The agent.
    pub workload: Workload,
    /// The depth.
    pub depth: Depth,
    /// Why, in the shim's own words.
    pub why: String,
}

/// Wakes at the same moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtOnce {
    /// The agents.
    pub workload: Workload,
    /// Who did it.
    pub subject: Subject,
    /// For each agent, from asking until the first byte of its answer.
    pub first_byte_us: Vec<u64>,
    /// From asking until the last one had answered.
    pub wall_us: u64,
}

/// The memory of shims.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shims {
    /// Whose: this project's, or containerd's for runc.
    pub subject: Subject,
    /// Whether their agents slept.
    pub asleep: bool,
    /// Each shim.
    pub memory: Vec<Memory>,
}

/// Requests to an agent in some company.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Whom it had beside it.
    pub company: Company,
    /// For each request, from connecting until the first byte of the answer.
    pub answer_us: Vec<u64>,
    /// Wakes of the company meanwhile.
    pub wakes: u32,
}

/// What two busy agents got of the processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Their weights, as their cgroups have them.
    pub weights: [u32; 2],
    /// Whether both had slept, as images, after the weights were set.
    pub slept: bool,
    /// The CPU time that each used.
    pub used_us: [u64; 2],
}

/// Something that was to be measured and could not be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Who failed.
    pub subject: Subject,
    /// In which part of the run.
    pub section: String,
    /// Why.
    pub why: String,
}

/// The machine and the programs on the node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// How many the node has.
    pub cores: usize,
    /// Memory in bytes.
    pub memory: u64,
    /// The kernel's release.
    pub kernel: String,
    /// The file system of the images and the device below it.
    pub disk: String,
    /// How many processes wanted a CPU in the minute before the run, in hundredths: other work makes figures worse.
    #[serde(default)]
    pub load_percent: u64,
    /// Names and versions of programs.
    pub programs: Vec<(String, String)>,
}

/// A line of the results.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Record {
    /// See [`Machine`].
    Machine(Machine),
    /// See [`Cycle`].
    Cycle(Cycle),
    /// See [`DepthCycle`].
    Depth(DepthCycle),
    /// See [`Refused`].
    Refused(Refused),
    /// See [`AtOnce`].
    AtOnce(AtOnce),
    /// See [`Shims`].
    Shims(Shims),
    /// See [`Asked`].
    Asked(Asked),
    /// See [`Share`].
    Share(Share),
    /// See [`Failure`].
    Failure(Failure),
    /// The run has come to its end.
    Done,
}
