//! The actor: the one task that changes a container.
//!
//! It takes one message after the other, asks [`crate::lifecycle`] what to do and does it. Work that takes time
//! (start, exec, dump, restore, update, checkpoint) runs beside it and reports back by message, so that a kill or a
//! wake is never kept waiting.

mod execs;
mod probed;
mod requests;
mod sleeps;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use containerd_shim::protos::events::task::{TaskExit, TaskPaused};
use tokio::sync::{mpsc, watch};
use tracing::{error, warn};

use self::probed::Probe;
use super::{Birth, Journal, Message, Phase, Record, Reply, Snapshot, Transition};
use crate::{
    error::TaskError,
    events::{EventSink, timestamp},
    lifecycle::{self, Asleep, Depth, Effect, Event, Facts, FrozenBy, Refusal, State},
    probe_commands::{Memory, Recording},
    runtime::{CheckpointConfig, ExecConfig, ExitFuture, Process, ProcessExit, Runtime, RuntimeError, Veto},
    wake::{Demand, WakeCause},
};

/// How long input waits after a failed wake before it tries again.
const RETRY: Duration = Duration::from_secs(10);
const SIGKILL: u32 = 9;
/// What the shell and containerd make of a death by SIGKILL.
const KILLED: u32 = 128 + SIGKILL;

/// The engine of sleeps that leave the processes where they are.
const FREEZER: &str = "freezer";

/// A request that only an awake agent can serve.
enum Deferred {
    StartExec { exec_id: String, reply: Reply<u32> },
    Signal { signal: u32, all: bool, reply: Reply<()> },
    Resume { reply: Reply<()> },
    Wake { reply: Reply<Option<Transition>> },
    Checkpoint { config: CheckpointConfig, reply: Reply<()> },
    Demand { reply: Reply<()> },
}

/// A request that a checkpoint for a client keeps waiting.
enum Postponed {
    Pause { reply: Reply<()> },
    Checkpoint { config: CheckpointConfig, reply: Reply<()> },
}

/// An exec that has not been started yet, is being started, or runs; [`ProcessView`] has the rest.
enum Exec {
    Added(ExecConfig),
    Starting(Option<Reply<u32>>),
    Running,
    Ended,
}

/// What is asked of an exec before its start.
#[derive(Default)]
struct Early {
    size: Option<(u16, u16)>,
    close_stdin: bool,
}

/// A sleep under way.
struct Falling {
    since: Instant,
    veto: Veto,
    reply: Option<Reply<Transition>>,
}

/// A wake under way.
struct Waking {
    since: Instant,
    depth: Depth,
    image_bytes: u64,
    engine: &'static str,
    mode: &'static str,
    cause: WakeCause,
}

pub(super) struct Actor {
    id: String,
    runtime: Arc<dyn Runtime>,
    journal: Journal,
    mailbox: mpsc::UnboundedSender<Message>,
    snapshot: watch::Sender<Snapshot>,
    events: EventSink,
    execs: HashMap<String, Exec>,
    /// What was asked of execs that have no streams yet.
    early: HashMap<String, Early>,
    /// What its exec probes said; nothing when they wake it.
    probes: Option<Memory>,
    /// Execs that are probes, by their ids.
    recordings: HashMap<String, Recording>,
    waiting: Vec<Deferred>,
    postponed: Vec<Postponed>,
    start_reply: Option<Reply<u32>>,
    falling: Option<Falling>,
    waking: Option<Waking>,
    /// The probe that a frozen agent answers.
    probe: Option<Probe>,
    /// Counts these probes.
    probed: u64,
    /// What the next wake is for: the first that needed it.
    cause: Option<WakeCause>,
    /// Counts the init processes: an exit of an earlier one is not the container's.
    incarnation: u64,
    init_exit: Option<ProcessExit>,
    /// The init process has ended, and its exit is reported as soon as those of the execs have been.
    exit_due: bool,
    checkpoints: usize,
    kill_all: bool,
    /// A client has paused it in its sleep, and not resumed it since.
    paused_asleep: bool,
    /// Input does not wake it before this moment: a wake has failed, and would fail again at once.
    deaf_until: Option<tokio::time::Instant>,
}

impl Actor {
    pub(super) fn new(
        birth: Birth,
        mailbox: mpsc::UnboundedSender<Message>,
        snapshot: watch::Sender<Snapshot>,
        events: EventSink,
    ) -> Self {
        let probes = birth.runtime.probe_commands().map(Memory::of);
        let mut actor = Self {
            journal: Journal::in_bundle(&birth.bundle),
            id: birth.id,
            runtime: birth.runtime,
            mailbox,
            snapshot,
            events,
            execs: HashMap::new(),
            early: HashMap::new(),
            probes,
            recordings: HashMap::new(),
            waiting: Vec::new(),
            postponed: Vec::new(),
            start_reply: None,
            falling: None,
            waking: None,
            probe: None,
            probed: 0,
            cause: None,
            incarnation: 0,
            init_exit: None,
            exit_due: false,
            checkpoints: 0,
            kill_all: false,
            paused_asleep: false,
            deaf_until: None,
        };
        actor.record(Phase::Running);
        actor.adopt(birth.init);
        actor
    }

    /// Works until the container is deleted.
    pub(super) async fn run(mut self, mut messages: mpsc::UnboundedReceiver<Message>) {
        loop {
            let runtime = self.runtime.clone();
            // A client that has paused it in its sleep decides when it runs again.
            let asleep = self.snapshot.borrow().depth().is_some() && !self.paused_asleep;
            let deaf_until = self.deaf_until;
            tokio::select! {
                biased;
                message = messages.recv() => match message {
                    Some(message) => {
                        if self.handle(message).await.is_break() {
                            return;
                        }
                    }
                    None => return,
                },
                () = until(deaf_until), if asleep && deaf_until.is_some() => self.deaf_until = None,
                demand = runtime.demand(), if asleep && deaf_until.is_none() => match demand {
                    Demand::Wake(cause) => self.wake_for(cause).await,
                    Demand::Probe => self.probe().await,
                },
            }
        }
    }

    async fn handle(&mut self, message: Message) -> std::ops::ControlFlow<()> {
        match message {
            Message::Start { exec_id: None, reply } => self.start(reply).await,
            Message::Start { exec_id: Some(exec_id), reply } => self.start_exec(exec_id, reply).await,
            Message::AddExec { config, reply } => answer(reply, self.add_exec(config)),
            Message::Kill { exec_id: Some(exec_id), signal, all, reply } => {
                let killed = self.kill_exec(&exec_id, signal, all);
                answer(reply, killed);
            }
            Message::Kill { exec_id: None, signal, all, reply } => self.kill(signal, all, reply).await,
            Message::Delete { exec_id: Some(exec_id), reply } => self.delete_exec(exec_id, reply),
            Message::ExecDeleted { exec_id, result, reply } => {
                let deleted = self.exec_deleted(&exec_id, result);
                answer(reply, deleted);
            }
            Message::Delete { exec_id: None, reply } => {
                let deleted = self.delete().await;
                let over = deleted.is_ok();
                answer(reply, deleted);
                if over {
                    return std::ops::ControlFlow::Break(());
                }
            }
            Message::Pause { reply } => self.pause(reply).await,
            Message::Resume { reply } => self.resume(reply).await,
            Message::Resize { exec_id, width, height, reply } => {
                let resized = self.resize(exec_id, width, height);
                answer(reply, resized);
            }
            Message::CloseStdin { exec_id, reply } => {
                let closed = self.close_stdin(exec_id);
                answer(reply, closed);
            }
            Message::Update { resources, reply } => self.update(*resources, reply),
            Message::Checkpoint { config, reply } => self.checkpoint(config, reply).await,
            Message::Probes { commands, reply } => {
                let probes = self.probes(commands);
                answer(reply, probes);
            }
            Message::Sleep { depth, reply } => self.sleep(depth, reply).await,
            Message::Wake { reply } => self.wake(reply).await,
            Message::Demand { cause, reply } => self.need(cause, Deferred::Demand { reply }).await,
            Message::Started(result) => self.started(result).await,
            Message::ExecStarted { exec_id, result } => self.exec_started(&exec_id, result),
            Message::InitExited { incarnation, exit } => {
                if incarnation == self.incarnation {
                    self.init_exit = Some(exit);
                    self.note(Event::Exited).await;
                }
            }
            Message::ExecExited { exec_id, exit } => self.exec_exited(&exec_id, exit),
            Message::ProbeOver { number, alone } => self.probe_over(number, alone).await,
            Message::Reclaimed { veto, result } => self.reclaimed(&veto, result).await,
            Message::Dumped(result) => self.dumped(result).await,
            Message::Restored(result) => self.restored(result).await,
            Message::MemoryLost(reason) => self.memory_lost(reason),
            Message::Checkpointed { path, result, reply } => self.checkpointed(&path, result, reply).await,
        }
        std::ops::ControlFlow::Continue(())
    }

    fn state(&self) -> State {
        self.snapshot.borrow().state
    }

    fn facts(&self) -> Facts {
        let live = |exec: &&Exec| matches!(exec, Exec::Starting(_) | Exec::Running);
        Facts { live_execs: self.execs.values().filter(live).count(), checkpoints: self.checkpoints }
    }

    /// Carries out what the life-cycle makes of `event`. One effect that fails does not keep the others from being
    /// carried out; the first failure is returned.
    async fn apply(&mut self, event: Event) -> Result<(), TaskError> {
        let mut failure = None;
        let mut next = Some(event);
        while let Some(event) = next.take() {
            let before = self.state();
            let step = lifecycle::step(before, self.facts(), event)
                .map_err(|refusal| TaskError::Refused { id: self.id.clone(), refusal })?;
            self.enter(before, step.next, event);
            for effect in step.effects {
                let Err(error) = self.perform(effect).await else { continue };
                failure = failure.or(Some(error));
                next = match (effect, before, step.next) {
                    (Effect::Freeze | Effect::Watch, ..) => Some(Event::FreezeFailed),
                    (Effect::Refreeze, ..) => Some(Event::RefreezeFailed),
                    (Effect::ThawForProbe, ..) if event == Event::Probe => {
                        Some(Event::ThawFailed(FrozenBy::Sleep))
                    }
                    // One that answers a probe is thawed already.
                    (_, State::Probed { .. }, State::Running) => continue,
                    (Effect::Thaw, _, State::Running) if event != Event::FreezeFailed => {
                        let State::Frozen { by } = frozen(before) else { continue };
                        self.note_error(failure.as_ref());
                        Some(Event::ThawFailed(by))
                    }
                    _ => continue,
                };
                break;
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// As [`Self::apply`], for what wakes the agent if it sleeps.
    async fn apply_for(&mut self, cause: WakeCause, event: Event) -> Result<(), TaskError> {
        let before = self.cause;
        self.cause = before.or(Some(cause));
        let applied = self.apply(event).await;
        if applied.is_err() {
            self.cause = before;
        }
        applied
    }

    /// Keeps an error for those who ask why it sleeps on.
    fn note_error(&self, error: Option<&TaskError>) {
        let reason = error.map(ToString::to_string);
        self.snapshot.send_modify(|now| now.last_error = reason);
    }

    /// As [`Self::apply`], for what happened by itself: nobody is there to be told of a failure.
    async fn note(&mut self, event: Event) {
        if let Err(error) = self.apply(event).await {
            error!(id = %self.id, ?event, %error, "cannot follow the life-cycle");
        }
    }

    fn enter(&mut self, before: State, next: State, event: Event) {
        if before == next {
            return;
        }
        let depth = match before {
            State::Frozen { by: FrozenBy::Sleep }
            | State::Reclaiming
            | State::Probed { asleep: Asleep::Frozen | Asleep::Reclaiming }
            | State::Dumping { asleep: true, killed: false, .. } => Some(Depth::Frozen),
            State::Reclaimed | State::Probed { asleep: Asleep::Reclaimed } => Some(Depth::Reclaimed),
            _ => None,
        };
        match next {
            State::Restoring { .. } if self.waking.is_none() => {
                let image_bytes = self.snapshot.borrow().image.as_ref().map_or(0, |(_, bytes)| *bytes);
                self.waking = Some(self.waking_from(Depth::Checkpointed, image_bytes));
            }
            // After a dump that failed. If it cannot be frozen again it is awake.
            State::Frozen { .. } if matches!(before, State::Dumping { .. }) => {
                self.waking = depth.map(|depth| self.waking_from(depth, 0));
            }
            State::Frozen { .. } | State::Dumping { .. } => self.waking = None,
            State::Running if event != Event::FreezeFailed => {
                self.waking = depth.map(|depth| self.waking_from(depth, 0)).or(self.waking.take());
            }
            _ => {}
        }
        let for_a_probe = matches!(event, Event::Probe | Event::ProbeOver | Event::RefreezeFailed)
            || matches!((before, event), (State::Probed { .. }, Event::ThawFailed(_)));
        self.snapshot.send_modify(|now| {
            now.state = next;
            // A probe is no change to those who ask since when it sleeps.
            if !for_a_probe {
                now.since = SystemTime::now();
            }
        });
    }

    /// A wake that begins now.
    fn waking_from(&self, depth: Depth, image_bytes: u64) -> Waking {
        let cause = self.cause.unwrap_or(WakeCause::Request);
        Waking { since: Instant::now(), depth, image_bytes, engine: FREEZER, mode: "", cause }
    }

    async fn perform(&mut self, effect: Effect) -> Result<(), TaskError> {
        match effect {
            Effect::Start => {
                let runtime = self.runtime.clone();
                self.beside(async move { Message::Started(runtime.start().await) });
            }
            Effect::Freeze => {
                self.record(Phase::Frozen);
                self.runtime.freeze().await.map_err(|error| self.failed("cannot be frozen", error))?;
            }
            Effect::Watch => {
                self.runtime.watch().await.map_err(|error| self.failed("cannot sleep frozen", error))?;
            }
            Effect::Unwatch => self.runtime.unwatch(),
            Effect::Thaw => {
                self.runtime.thaw().await.map_err(|error| self.failed("cannot be thawed", error))?;
                self.record(Phase::Running);
            }
            Effect::ThawForProbe => {
                let thawed = self.runtime.thaw_for_probe().await;
                thawed.map_err(|error| self.failed("cannot be thawed for a probe", error))?;
            }
            Effect::Refreeze => {
                let frozen = self.runtime.refreeze().await;
                frozen.map_err(|error| self.failed("cannot sleep on after a probe", error))?;
            }
            Effect::Reclaim => self.begin_reclaim(),
            Effect::CancelReclaim => self.cancel_reclaim(),
            Effect::Dump => self.begin_dump().await,
            Effect::CancelDump => {
                if let Some(falling) = &self.falling {
                    falling.veto.raise();
                }
            }
            Effect::Restore => {
                self.record(Phase::Restoring);
                let runtime = self.runtime.clone();
                self.beside(async move { Message::Restored(runtime.restore().await) });
            }
            Effect::Kill => match self.runtime.signal(None, SIGKILL, self.kill_all) {
                Err(RuntimeError::NotFound(_)) => return Err(TaskError::Finished),
                other => other.map_err(|error| self.failed("cannot be killed", error))?,
            },
            Effect::DropImage => {
                self.runtime.drop_image();
                self.snapshot.send_modify(|now| now.image = None);
            }
            Effect::Release => self.release(),
            Effect::Refuse => self.refuse(),
            Effect::ReportExit => {
                self.exit_due = true;
                self.runtime.kill_rest();
                self.settle_exit();
            }
            Effect::ReportKilledAsleep => {
                self.init_exit = Some(ProcessExit { code: KILLED, at: SystemTime::now() });
                self.exit_due = true;
                self.settle_exit();
            }
            Effect::PublishPaused => {
                self.events.publish(TaskPaused { container_id: self.id.clone(), ..Default::default() });
            }
        }
        Ok(())
    }

    /// Runs work that takes time beside the actor; its message comes back to the mailbox.
    fn beside(&self, work: impl Future<Output = Message> + Send + 'static) {
        let mailbox = self.mailbox.clone();
        tokio::spawn(async move {
            // A closed mailbox means that the container was deleted.
            let _ = mailbox.send(work.await);
        });
    }

    /// Takes `process` for the container's init process from now on.
    fn adopt(&mut self, process: Process) {
        self.incarnation += 1;
        self.init_exit = None;
        let incarnation = self.incarnation;
        self.snapshot.send_modify(|now| now.init.pid = process.pid);
        let exit: ExitFuture = process.exit;
        let runtime = self.runtime.clone();
        self.beside(async move {
            let exit = exit.await;
            runtime.ended().await;
            Message::InitExited { incarnation, exit }
        });
    }

    fn record(&self, phase: Phase) {
        if let Err(error) = self.try_record(phase) {
            warn!(id = %self.id, %error, ?phase, "the journal is behind");
        }
    }

    fn try_record(&self, phase: Phase) -> Result<(), super::JournalError> {
        let (pid, image) = {
            let now = self.snapshot.borrow();
            (now.init.pid, now.image.as_ref().map(|(path, _)| path.clone()))
        };
        self.journal.write(&Record { phase, pid, image })
    }

    fn failed(&self, what: &'static str, source: RuntimeError) -> TaskError {
        TaskError::Runtime { id: self.id.clone(), what, source }
    }

    fn refused(&self, refusal: Refusal) -> TaskError {
        TaskError::Refused { id: self.id.clone(), refusal }
    }
}

impl Deferred {
    fn fail(self, error: TaskError) {
        match self {
            Self::StartExec { reply, .. } => answer(reply, Err(error)),
            Self::Signal { reply, .. }
            | Self::Resume { reply }
            | Self::Checkpoint { reply, .. }
            | Self::Demand { reply } => answer(reply, Err(error)),
            Self::Wake { reply } => answer(reply, Err(error)),
        }
    }
}

impl Postponed {
    fn fail(self, error: TaskError) {
        let (Self::Pause { reply } | Self::Checkpoint { reply, .. }) = self;
        answer(reply, Err(error));
    }
}

/// The state as far as the freezer knows it.
fn frozen(state: State) -> State {
    match state {
        State::Reclaiming | State::Reclaimed | State::Probed { .. } => State::Frozen { by: FrozenBy::Sleep },
        other => other,
    }
}

async fn until(moment: Option<tokio::time::Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

fn answer<T>(reply: Reply<T>, result: Result<T, TaskError>) {
    // A client that has gone away needs no answer.
    let _ = reply.send(result);
}

fn task_exit(container_id: &str, id: &str, pid: u32, exit: ProcessExit) -> TaskExit {
    TaskExit {
        container_id: container_id.to_owned(),
        id: id.to_owned(),
        pid,
        exit_status: exit.code,
        exited_at: Some(timestamp(exit.at)).into(),
        ..Default::default()
    }
}
