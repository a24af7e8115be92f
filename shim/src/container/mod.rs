//! One container: an actor that owns it, and handles to that actor.
//!
//! Requests that change something go through the actor's mailbox, in order. Questions ([`Handle::snapshot`],
//! [`Handle::wait`], [`Handle::runtime`]) never do: they are answered at once, whatever the actor is doing.

mod actor;
mod journal;
mod snapshot;

use std::{path::PathBuf, sync::Arc};

use oci_spec::runtime::LinuxResources;
use tokio::sync::{mpsc, oneshot, watch};

pub use self::{
    journal::{Journal, JournalError, Phase, Record},
    snapshot::{ProcessView, Snapshot, Transition},
};
use crate::{
    bundle::Identity,
    error::TaskError,
    events::EventSink,
    lifecycle::Depth,
    probe_commands::{Commands, ProbeResult},
    runtime::{
        CheckpointConfig, ExecConfig, Process, ProcessExit, ReclaimReport, Runtime, RuntimeError, Stdio, Veto,
    },
    wake::WakeCause,
};

/// Where an actor answers a request.
type Reply<T> = oneshot::Sender<Result<T, TaskError>>;

/// What an actor is asked, or told by the work that it has begun.
enum Message {
    Start {
        exec_id: Option<String>,
        reply: Reply<u32>,
    },
    AddExec {
        config: ExecConfig,
        reply: Reply<()>,
    },
    Kill {
        exec_id: Option<String>,
        signal: u32,
        all: bool,
        reply: Reply<()>,
    },
    Delete {
        exec_id: Option<String>,
        reply: Reply<ProcessView>,
    },
    Pause {
        reply: Reply<()>,
    },
    Resume {
        reply: Reply<()>,
    },
    Resize {
        exec_id: Option<String>,
        width: u16,
        height: u16,
        reply: Reply<()>,
    },
    CloseStdin {
        exec_id: Option<String>,
        reply: Reply<()>,
    },
    Update {
        resources: Box<LinuxResources>,
        reply: Reply<()>,
    },
    Checkpoint {
        config: CheckpointConfig,
        reply: Reply<()>,
    },
    Probes {
        commands: Option<Commands>,
        reply: Reply<Vec<ProbeResult>>,
    },
    Sleep {
        depth: Depth,
        reply: Reply<Transition>,
    },
    Wake {
        reply: Reply<Option<Transition>>,
    },
    Demand {
        cause: WakeCause,
        reply: Reply<()>,
    },
    Started(Result<Option<Process>, RuntimeError>),
    ExecStarted {
        exec_id: String,
        result: Result<Process, RuntimeError>,
    },
    InitExited {
        incarnation: u64,
        exit: ProcessExit,
    },
    ExecDeleted {
        exec_id: String,
        result: Result<(), RuntimeError>,
        reply: Reply<ProcessView>,
    },
    ExecExited {
        exec_id: String,
        exit: ProcessExit,
    },
    ProbeOver {
        number: u64,
        alone: bool,
    },
    Reclaimed {
        veto: Veto,
        result: Result<ReclaimReport, RuntimeError>,
    },
    Dumped(Result<crate::runtime::DumpReport, RuntimeError>),
    Restored(Result<crate::runtime::Restored, RuntimeError>),
    /// The memory of a wake could not be brought back, and the container was killed.
    MemoryLost(String),
    Checkpointed {
        path: PathBuf,
        result: Result<(), RuntimeError>,
        reply: Reply<()>,
    },
}

/// What a container is born with.
pub struct Birth {
    /// containerd's id of it.
    pub id: String,
    /// Directory with `config.json`; the journal is kept there.
    pub bundle: PathBuf,
    /// Who it is in Kubernetes.
    pub identity: Identity,
    /// Its init process's streams.
    pub stdio: Stdio,
    /// What works for it.
    pub runtime: Arc<dyn Runtime>,
    /// Its init process, created but not started.
    pub init: Process,
}

/// A handle to a container. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    id: Arc<str>,
    bundle: Arc<PathBuf>,
    identity: Arc<Identity>,
    mailbox: mpsc::UnboundedSender<Message>,
    snapshot: watch::Receiver<Snapshot>,
    runtime: Arc<dyn Runtime>,
}

impl Handle {
    /// Starts the actor of a container that the runtime has created.
    pub fn spawn(birth: Birth, events: EventSink) -> Self {
        let (mailbox, messages) = mpsc::unbounded_channel();
        let view = ProcessView { pid: birth.init.pid, stdio: birth.stdio.clone(), exit: None };
        let (publish, snapshot) = watch::channel(Snapshot::new(view));
        let handle = Self {
            id: birth.id.as_str().into(),
            bundle: Arc::new(birth.bundle.clone()),
            identity: Arc::new(birth.identity.clone()),
            mailbox: mailbox.clone(),
            snapshot,
            runtime: birth.runtime.clone(),
        };
        tokio::spawn(actor::Actor::new(birth, mailbox, publish, events).run(messages));
        handle
    }

    /// containerd's id of the container.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its bundle.
    pub fn bundle(&self) -> &std::path::Path {
        &self.bundle
    }

    /// Who it is in Kubernetes.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Whether both are handles to the same container.
    pub fn same_as(&self, other: &Self) -> bool {
        self.mailbox.same_channel(&other.mailbox)
    }

    /// Completes when the container has been deleted.
    pub async fn closed(&self) {
        self.mailbox.closed().await;
    }

    /// How it is now.
    pub fn snapshot(&self) -> Snapshot {
        self.snapshot.borrow().clone()
    }

    /// What follows how it is.
    pub fn changes(&self) -> watch::Receiver<Snapshot> {
        self.snapshot.clone()
    }

    /// For questions that need no order: pids, stats, memory.
    pub fn runtime(&self) -> &Arc<dyn Runtime> {
        &self.runtime
    }

    /// Waits for a process to end.
    ///
    /// # Errors
    /// [`TaskError::NoExec`], and [`TaskError::Gone`] when it is deleted meanwhile.
    pub async fn wait(&self, exec_id: Option<&str>) -> Result<ProcessExit, TaskError> {
        let mut snapshot = self.snapshot.clone();
        if snapshot.borrow().process(exec_id).is_none() {
            return Err(self.no_exec(exec_id));
        }
        let seen = snapshot
            .wait_for(|now| now.process(exec_id).is_none_or(|process| process.exit.is_some()))
            .await
            .map_err(|_| TaskError::Gone(self.id.to_string()))?;
        seen.process(exec_id).and_then(|process| process.exit).ok_or_else(|| self.no_exec(exec_id))
    }

    fn no_exec(&self, exec_id: Option<&str>) -> TaskError {
        TaskError::NoExec { id: self.id.to_string(), exec_id: exec_id.unwrap_or_default().to_owned() }
    }

    async fn ask<T>(&self, message: impl FnOnce(Reply<T>) -> Message) -> Result<T, TaskError> {
        let gone = || TaskError::Gone(self.id.to_string());
        let (reply, answer) = oneshot::channel();
        self.mailbox.send(message(reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Starts the container, or one of its execs; returns the pid.
    ///
    /// # Errors
    /// When the life-cycle or the runtime refuses.
    pub async fn start(&self, exec_id: Option<String>) -> Result<u32, TaskError> {
        self.ask(|reply| Message::Start { exec_id, reply }).await
    }

    /// Adds an exec, to be started later.
    ///
    /// # Errors
    /// When its id is taken, or the container has ended.
    pub async fn add_exec(&self, config: ExecConfig) -> Result<(), TaskError> {
        self.ask(|reply| Message::AddExec { config, reply }).await
    }

    /// Sends a signal. Any but SIGKILL wakes a sleeping agent first.
    ///
    /// # Errors
    /// [`TaskError::Finished`] when the process has ended, and when a wake fails.
    pub async fn kill(&self, exec_id: Option<String>, signal: u32, all: bool) -> Result<(), TaskError> {
        self.ask(|reply| Message::Kill { exec_id, signal, all, reply }).await
    }

    /// Removes a process that has ended; without `exec_id` the container.
    ///
    /// # Errors
    /// When it still runs, or the runtime fails: it can be tried again then.
    pub async fn delete(&self, exec_id: Option<String>) -> Result<ProcessView, TaskError> {
        self.ask(|reply| Message::Delete { exec_id, reply }).await
    }

    /// Freezes the container for a client.
    ///
    /// # Errors
    /// When it does not run or sleep.
    pub async fn pause(&self) -> Result<(), TaskError> {
        self.ask(|reply| Message::Pause { reply }).await
    }

    /// Ends a pause, or a sleep. Returns when the container runs.
    ///
    /// # Errors
    /// When it is not paused, or the wake fails.
    pub async fn resume(&self) -> Result<(), TaskError> {
        self.ask(|reply| Message::Resume { reply }).await
    }

    /// Sets the size of a terminal.
    ///
    /// # Errors
    /// When the process has none.
    pub async fn resize(&self, exec_id: Option<String>, width: u16, height: u16) -> Result<(), TaskError> {
        self.ask(|reply| Message::Resize { exec_id, width, height, reply }).await
    }

    /// Ends a process's standard input.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn close_stdin(&self, exec_id: Option<String>) -> Result<(), TaskError> {
        self.ask(|reply| Message::CloseStdin { exec_id, reply }).await
    }

    /// Changes limits, awake or asleep.
    ///
    /// # Errors
    /// When the runtime or the kernel refuses them.
    pub async fn update(&self, resources: LinuxResources) -> Result<(), TaskError> {
        self.ask(|reply| Message::Update { resources: Box::new(resources), reply }).await
    }

    /// Makes an image for a client. The agent goes on, or goes on sleeping.
    ///
    /// # Errors
    /// When that fails; the agent goes on.
    pub async fn checkpoint(&self, config: CheckpointConfig) -> Result<(), TaskError> {
        self.ask(|reply| Message::Checkpoint { config, reply }).await
    }

    /// The commands of its exec probes and what each last came to; these `commands` from now on, if there are any.
    ///
    /// # Errors
    /// When its probes are not to be answered for it.
    pub async fn probes(&self, commands: Option<Commands>) -> Result<Vec<ProbeResult>, TaskError> {
        self.ask(|reply| Message::Probes { commands, reply }).await
    }

    /// Puts the container to sleep. Returns when it sleeps.
    ///
    /// # Errors
    /// When it sleeps already, cannot sleep now, or was woken meanwhile; it runs on then.
    pub async fn sleep(&self, depth: Depth) -> Result<Transition, TaskError> {
        self.ask(|reply| Message::Sleep { depth, reply }).await
    }

    /// Wakes the container. Returns when it runs; nothing when it was awake.
    ///
    /// # Errors
    /// When it is waking already, paused by a client, or the restore fails: its image is kept then.
    pub async fn wake(&self) -> Result<Option<Transition>, TaskError> {
        self.ask(|reply| Message::Wake { reply }).await
    }

    /// Something needs the container awake. Returns when it runs, at once when it does, and joins a wake under way.
    ///
    /// # Errors
    /// When it has ended, was paused by a client, or the restore fails: its image is kept then.
    pub async fn demand(&self, cause: WakeCause) -> Result<(), TaskError> {
        self.ask(|reply| Message::Demand { cause, reply }).await
    }
}
