//! What the actor of a container needs from below: an OCI runtime, a checkpoint engine, a cgroup and stdio.
//!
//! The one real implementation is [`crate::runc`]; unit tests drive the Task API through one that records its calls.

use std::{
    collections::HashMap,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use containerd_shim::protos::{api::Mount, protobuf::well_known_types::any::Any};
use oci_spec::runtime::LinuxResources;
use tokio::sync::watch;

use crate::{
    lifecycle::Depth,
    probe_commands::{Commands, Said, Taps},
    wake::Demand,
};

/// Where containerd wants a process's standard streams: paths of FIFOs, URIs of loggers, or empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Standard input.
    pub stdin: String,
    /// Standard output; everything, with a terminal.
    pub stdout: String,
    /// Standard error; unused with a terminal.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// A container to be made.
#[derive(Debug, Clone, Default)]
pub struct CreateConfig {
    /// containerd's id of it.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// Directory with `config.json`.
    pub bundle: PathBuf,
    /// What to mount on the bundle's `rootfs`.
    pub rootfs: Vec<Mount>,
    /// The init process's streams.
    pub stdio: Stdio,
    /// Start from this image of `runc checkpoint` rather than from the beginning.
    pub checkpoint: Option<PathBuf>,
    /// The runtime's options as containerd passed them.
    pub options: Option<Any>,
}

/// A process to be executed in a container.
#[derive(Debug, Clone)]
pub struct ExecConfig {
    /// Its id, unique within the container.
    pub exec_id: String,
    /// The OCI process specification, JSON.
    pub spec: Vec<u8>,
    /// Its streams.
    pub stdio: Stdio,
    /// Where what it writes is to be noted, if it is.
    pub taps: Option<Taps>,
}

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessExit {
    /// The exit code; 128 + the signal's number after a signal.
    pub code: u32,
    /// When.
    pub at: SystemTime,
}

/// Completes when a process has ended.
pub type ExitFuture = Pin<Box<dyn Future<Output = ProcessExit> + Send>>;

/// A process that has been made.
pub struct Process {
    /// Its id in the shim's PID namespace.
    pub pid: u32,
    /// Its end.
    pub exit: ExitFuture,
}

/// Tells a dump under way that something needs the agent awake.
#[derive(Debug, Clone, Default)]
pub struct Veto(Arc<watch::Sender<bool>>);

impl Veto {
    /// Asks for the dump to be given up.
    pub fn raise(&self) {
        self.0.send_replace(true);
    }

    /// Whether that was asked for.
    pub fn is_raised(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until that is asked for.
    pub async fn raised(&self) {
        // It cannot be closed: the sender is here.
        let _ = self.0.subscribe().wait_for(|raised| *raised).await;
    }

    /// Does `work` unless that is asked for meanwhile, or was before.
    ///
    /// # Errors
    /// [`RuntimeError::Vetoed`].
    pub async fn unless_raised<T>(&self, work: impl Future<Output = T>) -> Result<T, RuntimeError> {
        tokio::select! {
            biased;
            () = self.raised() => Err(RuntimeError::Vetoed),
            done = work => Ok(done),
        }
    }
}

/// A dump that has succeeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DumpReport {
    /// From the freeze until the processes were gone.
    pub stopped: Duration,
    /// Size of the image on disk, in bytes.
    pub image_bytes: u64,
    /// The image's directory.
    pub image_dir: PathBuf,
    /// "direct", or "runc" for the fallback.
    pub engine: &'static str,
    /// Where CRIU worked: "pod-namespaces" or "classic".
    pub mode: &'static str,
    /// Why it was not inside the pod's namespaces.
    pub classic_because: Option<String>,
    /// Why no memory was written in advance, though that was asked for.
    pub whole_because: Option<String>,
    /// What memory file systems hold while it sleeps, in bytes.
    pub memory_bytes: u64,
}

/// A reclaim that has succeeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReclaimReport {
    /// Memory held before, in bytes.
    pub before: u64,
    /// Memory held after, in bytes.
    pub after: u64,
    /// By which means: "memory.reclaim" or "process_madvise".
    pub engine: &'static str,
    /// Why no more could be pushed out, when something stood in its way.
    pub rest_because: Option<String>,
}

/// A restore that has succeeded.
pub struct Restored {
    /// The new init process.
    pub process: Process,
    /// "direct", or "runc" for the fallback.
    pub engine: &'static str,
    /// Where CRIU worked: "pod-namespaces" or "classic".
    pub mode: &'static str,
}

/// Something that keeps a container from sleeping deeper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// A stable name of its kind.
    pub kind: String,
    /// What it is, in words.
    pub text: String,
}

/// How deep a container could sleep at this moment, and why no deeper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reasons {
    /// The deepest depth that is worth a try.
    pub deepest: Depth,
    /// What keeps it from sleeping deeper.
    pub reasons: Vec<Reason>,
    /// What shows only when it is tried, in words.
    pub doubts: Vec<String>,
    /// How many idle connections a checkpoint would close.
    pub closing: usize,
    /// How long it is until the first of its timers is due, as far as that can be seen.
    pub next_timer: Option<Duration>,
}

/// What a client wants of a checkpoint (`ctr task checkpoint`).
#[derive(Debug, Clone, Default)]
pub struct CheckpointConfig {
    /// Directory for the image.
    pub image_path: PathBuf,
    /// Directory for CRIU's logs; the image's own when not set.
    pub work_path: Option<PathBuf>,
    /// End the container afterwards.
    pub exit: bool,
    /// Allow established TCP connections.
    pub open_tcp: bool,
    /// Allow unix sockets to outside.
    pub external_unix_sockets: bool,
    /// The container has a terminal.
    pub terminal: bool,
    /// Allow file locks.
    pub file_locks: bool,
}

/// Why a runtime could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The request itself is wrong.
    #[error("{0}")]
    InvalidArgument(String),
    /// The container or the node is not in a state for this.
    #[error("{0}")]
    FailedPrecondition(String),
    /// What the request names does not exist.
    #[error("{0}")]
    NotFound(String),
    /// Disk, memory or descriptors do not suffice.
    #[error("{0}")]
    ResourceExhausted(String),
    /// The dump was given up because something needs the agent awake. The agent runs.
    #[error("given up, because something needs the agent awake")]
    Vetoed,
    /// The agent has something to do now. It runs, and may sleep a moment later.
    #[error("{0}")]
    Busy(String),
    /// Anything else: what failed, on what, and why.
    #[error("{0}")]
    Failed(String),
}

/// A container below the actor. Errors are [`RuntimeError`]s that name what failed. Methods take `&self`: the actor orders calls, queries come at any time.
#[allow(clippy::missing_errors_doc)]
#[async_trait]
pub trait Runtime: Send + Sync {
    /// Starts the container's program. With [`CreateConfig::checkpoint`] it is restored instead, and this is its
    /// new init process.
    async fn start(&self) -> Result<Option<Process>, RuntimeError>;
    /// Starts a process in the running container.
    async fn exec(&self, config: &ExecConfig) -> Result<Process, RuntimeError>;
    /// Passes what a command said before on to the streams of an exec that is not made.
    async fn answer_exec(&self, config: &ExecConfig, said: Said) -> Result<Process, RuntimeError>;
    /// The commands of exec probes that are answered for the sleeping container; none when probes wake it.
    fn probe_commands(&self) -> Option<Commands> {
        None
    }
    /// Sends `signal` to the init process, to the exec `exec_id`, or with `all` to every process of the container.
    fn signal(&self, exec_id: Option<&str>, signal: u32, all: bool) -> Result<(), RuntimeError>;
    /// Sets a terminal's size, now or when there is one again.
    fn resize(&self, exec_id: Option<&str>, width: u16, height: u16) -> Result<(), RuntimeError>;
    /// Ends a process's standard input.
    fn close_stdin(&self, exec_id: Option<&str>) -> Result<(), RuntimeError>;
    /// Changes limits; with `asleep` through the cgroup alone, and again by the OCI runtime after the wake.
    async fn update(&self, resources: &LinuxResources, asleep: bool) -> Result<(), RuntimeError>;
    /// Completes when all memory of the last wake is there, and has it come as fast as possible.
    async fn settle(&self) {}
    /// Freezes all processes; on error none is frozen.
    async fn freeze(&self) -> Result<(), RuntimeError>;
    /// From now until the next thaw, dump or [`Self::unwatch`], [`Self::demand`] also notices what would have made the
    /// frozen container run. [`RuntimeError::Busy`] when it has something to do now.
    async fn watch(&self) -> Result<(), RuntimeError>;
    /// Ends the watch.
    fn unwatch(&self);
    /// Thaws all processes; ends the watch.
    async fn thaw(&self) -> Result<(), RuntimeError>;
    /// Thaws the container for a probe that [`Self::demand`] told of; ends the watch.
    async fn thaw_for_probe(&self) -> Result<(), RuntimeError>;
    /// Completes when those probes are over, or something else has come: with whether nothing else has.
    async fn probe_over(&self) -> bool;
    /// Freezes and watches the container again after a probe. [`RuntimeError::Busy`] when it has something to do now; any
    /// other error when it must wake. On error the container may be frozen.
    async fn refreeze(&self) -> Result<(), RuntimeError>;
    /// Whether there is anything that the memory of the container could be pushed out to; the error says why not.
    fn can_reclaim(&self) -> Result<(), RuntimeError>;
    /// Pushes the memory of the frozen container out, step by step until the veto is raised: all that goes, or until
    /// the time limit. The container may be thawed meanwhile.
    async fn reclaim(&self, veto: Veto) -> Result<ReclaimReport, RuntimeError>;
    /// Dumps the container and ends its processes. On any error it runs on.
    async fn dump(&self, veto: Veto) -> Result<DumpReport, RuntimeError>;
    /// Restores it from its newest image. On any error the image is as before and no process is left.
    async fn restore(&self) -> Result<Restored, RuntimeError>;
    /// Completes when all memory of the last wake is there, with nothing, or when the container was killed because it
    /// could not be brought, with the reason.
    async fn memory_lost(&self) -> Option<String>;
    /// Makes an image for a client, which is whole without this node. The processes exist, frozen or not.
    async fn checkpoint(&self, config: &CheckpointConfig) -> Result<(), RuntimeError>;
    /// Removes the images that hold what now lives in processes, or has ended.
    fn drop_image(&self);
    /// One of its processes has ended: what is to be told before that, is told.
    async fn ended(&self) {}
    /// Kills what is left of the container's processes after its init ended (without a PID namespace of its own).
    fn kill_rest(&self);
    /// Removes an exec that has ended, when its output has been passed on.
    async fn delete_exec(&self, exec_id: &str) -> Result<(), RuntimeError>;
    /// Removes the container that has ended, when its output has been passed on: OCI runtime's state, mounts, images.
    async fn delete(&self) -> Result<(), RuntimeError>;
    /// Completes when something comes that the sleeping container is needed for, and says what. It is only waited for
    /// while the container sleeps, at whatever depth, and is dropped and called anew in between: what it waits for must
    /// not be lost with it.
    async fn demand(&self) -> Demand;
    /// How deep the live container could sleep, and why no deeper. Does not disturb it.
    async fn why(&self) -> Result<Reasons, RuntimeError>;
    /// The ids of all processes; the last known ones while asleep. Never empty.
    fn pids(&self) -> Vec<u32>;
    /// `io.containerd.cgroups.v2.Metrics`.
    fn stats(&self) -> Result<Any, RuntimeError>;
    /// Memory held now in bytes, and how it was measured.
    fn memory(&self) -> (u64, &'static str);
    /// What its cgroup is charged with, in bytes, by the kernel's names; empty without a memory controller.
    fn charged(&self) -> HashMap<String, u64> {
        HashMap::new()
    }
    /// The deepest depth that it can be asked for.
    fn deepest(&self) -> Depth {
        Depth::Checkpointed
    }
}

/// Makes containers.
#[async_trait]
pub trait RuntimeFactory: Send + Sync {
    /// Makes a container and its init process, which does not run yet. On error nothing is left behind.
    async fn create(&self, config: &CreateConfig) -> Result<(Arc<dyn Runtime>, Process), RuntimeError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_veto_ends_what_may_take_for_ever() {
        let veto = Veto::default();
        assert!(matches!(veto.unless_raised(async { 7 }).await, Ok(7)));
        let other = veto.clone();
        let waiting = tokio::spawn(async move { other.unless_raised(std::future::pending::<()>()).await });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished() && !veto.is_raised());
        veto.raise();
        assert!(matches!(waiting.await, Ok(Err(RuntimeError::Vetoed))));
        assert!(veto.is_raised());
        // Nor is anything begun after it.
        assert!(matches!(veto.unless_raised(async { 7 }).await, Err(RuntimeError::Vetoed)));
    }
}
