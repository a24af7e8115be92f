//! What can be told of a container at once, whatever its actor is doing.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use containerd_shim::protos::api::Status;

use crate::{
    lifecycle::{Asleep, Depth, FrozenBy, State},
    runtime::{ProcessExit, Stdio},
    wake::WakeCause,
};

/// One process as clients see it.
#[derive(Debug, Clone, Default)]
pub struct ProcessView {
    /// Its id; the last known while the container sleeps; 0 before it was started.
    pub pid: u32,
    /// Its streams.
    pub stdio: Stdio,
    /// How it ended, once it has.
    pub exit: Option<ProcessExit>,
}

/// A sleep or a wake that has happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transition {
    /// The depth that was reached, or left.
    pub depth: Depth,
    /// From the request until it was done.
    pub total: Duration,
    /// Of a sleep: from the freeze until the processes were gone.
    pub stopped: Duration,
    /// Size of the image on disk, in bytes.
    pub image_bytes: u64,
    /// Which engine did it.
    pub engine: &'static str,
    /// Where CRIU worked: "pod-namespaces" or "classic"; empty without it.
    pub mode: &'static str,
    /// Of a sleep: why CRIU did not work inside the pod's namespaces.
    pub classic_because: Option<String>,
    /// Of a sleep: why no memory was written in advance, though that was asked for.
    pub whole_because: Option<String>,
    /// Of a sleep: what memory file systems hold on, in bytes.
    pub memory_bytes: u64,
    /// Of a reclaim: memory held before and after, in bytes.
    pub memory: Option<(u64, u64)>,
    /// Of a reclaim: why no more could be pushed out.
    pub rest_because: Option<String>,
    /// Of a wake: what for.
    pub cause: Option<WakeCause>,
    /// When it was done.
    pub at: SystemTime,
}

impl Transition {
    /// One that was done at this moment, of which only the depth is known.
    pub fn now(depth: Depth) -> Self {
        Self {
            depth,
            total: Duration::ZERO,
            stopped: Duration::ZERO,
            image_bytes: 0,
            engine: "",
            mode: "",
            classic_because: None,
            whole_because: None,
            memory_bytes: 0,
            memory: None,
            rest_because: None,
            cause: None,
            at: SystemTime::now(),
        }
    }
}

/// A container as clients see it. The actor publishes a new one after each change.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Where it is in its life.
    pub state: State,
    /// The container's own process.
    pub init: ProcessView,
    /// Its execs.
    pub execs: BTreeMap<String, ProcessView>,
    /// When it came into this state.
    pub since: SystemTime,
    /// How often it fell asleep.
    pub sleeps: u64,
    /// How often it woke.
    pub wakes: u64,
    /// The last sleep.
    pub last_sleep: Option<Transition>,
    /// The last wake.
    pub last_wake: Option<Transition>,
    /// Why the last sleep or wake failed, or why the agent was killed after it; none after a success.
    pub last_error: Option<String>,
    /// The image that it sleeps in.
    pub image: Option<(PathBuf, u64)>,
}

impl Snapshot {
    /// A container that has just been created.
    pub fn new(init: ProcessView) -> Self {
        Self {
            state: State::Created,
            init,
            execs: BTreeMap::new(),
            since: SystemTime::now(),
            sleeps: 0,
            wakes: 0,
            last_sleep: None,
            last_wake: None,
            last_error: None,
            image: None,
        }
    }

    /// The process `exec_id`; the container's own for none.
    pub fn process(&self, exec_id: Option<&str>) -> Option<&ProcessView> {
        match exec_id {
            None => Some(&self.init),
            Some(id) => self.execs.get(id),
        }
    }

    /// The status that containerd is told. An agent that sleeps is RUNNING: anything else would have the kubelet
    /// kill it. A process has stopped when its exit was reported, not before.
    pub fn status(&self, exec_id: Option<&str>) -> Option<Status> {
        let process = self.process(exec_id)?;
        Some(match (exec_id, self.state) {
            _ if process.exit.is_some() => Status::STOPPED,
            (Some(_), _) if process.pid == 0 => Status::CREATED,
            (None, State::Created | State::Starting { .. }) => Status::CREATED,
            (_, State::Frozen { by: FrozenBy::Client }) => Status::PAUSED,
            _ => Status::RUNNING,
        })
    }

    /// How deep it sleeps, if it does.
    pub fn depth(&self) -> Option<Depth> {
        match self.state {
            State::Frozen { by: FrozenBy::Sleep }
            | State::Reclaiming
            | State::Probed { asleep: Asleep::Frozen | Asleep::Reclaiming } => Some(Depth::Frozen),
            State::Reclaimed | State::Probed { asleep: Asleep::Reclaimed } => Some(Depth::Reclaimed),
            State::Checkpointed => Some(Depth::Checkpointed),
            _ => None,
        }
    }
}
