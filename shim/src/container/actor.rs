//! The actor: the one task that changes a container.
//!
//! It takes one message after the other, asks [`crate::lifecycle`] what to do and does it. Work that takes time
//! (start, exec, dump, restore, update, checkpoint) runs beside it and reports back by message, so that a kill or a
//! wake is never kept waiting.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use containerd_shim::protos::events::task::{
    TaskCheckpointed, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskPaused, TaskResumed,
    TaskStart,
};
use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};

use super::{Birth, Journal, Message, Phase, ProcessView, Record, Reply, Snapshot, Transition};
use crate::{
    error::TaskError,
    events::{EventSink, timestamp},
    lifecycle::{self, Depth, DumpOutcome, Effect, Event, Facts, FrozenBy, Refusal, State},
    runtime::{
        CheckpointConfig, DumpReport, ExecConfig, ExitFuture, Process, ProcessExit, Restored, Runtime,
        RuntimeError, Veto,
    },
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
    waiting: Vec<Deferred>,
    start_reply: Option<Reply<u32>>,
    falling: Option<Falling>,
    waking: Option<Waking>,
    /// Counts the init processes: an exit of an earlier one is not the container's.
    incarnation: u64,
    init_exit: Option<ProcessExit>,
    /// The init process has ended, and its exit is reported as soon as those of the execs have been.
    exit_due: bool,
    checkpoints: usize,
    kill_all: bool,
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
        let mut actor = Self {
            journal: Journal::in_bundle(&birth.bundle),
            id: birth.id,
            runtime: birth.runtime,
            mailbox,
            snapshot,
            events,
            execs: HashMap::new(),
            early: HashMap::new(),
            waiting: Vec::new(),
            start_reply: None,
            falling: None,
            waking: None,
            incarnation: 0,
            init_exit: None,
            exit_due: false,
            checkpoints: 0,
            kill_all: false,
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
            let asleep = self.snapshot.borrow().depth().is_some();
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
                () = runtime.input(), if asleep && deaf_until.is_none() => {
                    info!(id = %self.id, "input for a sleeping agent: it wakes");
                    if let Err(error) = self.apply(Event::Need).await {
                        self.deafen();
                        warn!(id = %self.id, %error, "input cannot wake it");
                    }
                }
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
            Message::Pause { reply } => {
                let paused = self.apply(Event::Pause).await;
                answer(reply, paused);
            }
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
            Message::Checkpoint { config, reply } => self.checkpoint(config, reply),
            Message::Sleep { depth, reply } => self.sleep(depth, reply).await,
            Message::Wake { reply } => self.wake(reply).await,
            Message::Started(result) => self.started(result).await,
            Message::ExecStarted { exec_id, result } => self.exec_started(&exec_id, result),
            Message::InitExited { incarnation, exit } => {
                if incarnation == self.incarnation {
                    self.init_exit = Some(exit);
                    self.note(Event::Exited).await;
                }
            }
            Message::ExecExited { exec_id, exit } => self.exec_exited(&exec_id, exit),
            Message::Dumped(result) => self.dumped(result).await,
            Message::Restored(result) => self.restored(result).await,
            Message::Checkpointed { path, result, reply } => self.checkpointed(&path, result, reply),
        }
        std::ops::ControlFlow::Continue(())
    }

    // The life-cycle.

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
                    (Effect::Freeze, ..) => Some(Event::FreezeFailed),
                    (Effect::Thaw, State::Frozen { by }, State::Running) if event != Event::FreezeFailed => {
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
        let asleep = matches!(before, State::Frozen { by: FrozenBy::Sleep });
        match next {
            State::Restoring { .. } if self.waking.is_none() => {
                let image_bytes = self.snapshot.borrow().image.as_ref().map_or(0, |(_, bytes)| *bytes);
                self.waking = Some(Waking::now(Depth::Checkpointed, image_bytes));
            }
            State::Frozen { .. } => self.waking = None,
            State::Running if asleep && event != Event::FreezeFailed => {
                self.waking = Some(Waking::now(Depth::Frozen, 0));
            }
            _ => {}
        }
        self.snapshot.send_modify(|now| {
            now.state = next;
            now.since = SystemTime::now();
        });
    }

    async fn perform(&mut self, effect: Effect) -> Result<(), TaskError> {
        match effect {
            Effect::Start => {
                let runtime = self.runtime.clone();
                self.beside(async move { Message::Started(runtime.start().await) });
            }
            Effect::Freeze => {
                self.runtime.freeze().await.map_err(|error| self.failed("cannot be frozen", error))?;
            }
            Effect::Thaw => {
                self.runtime.thaw().await.map_err(|error| self.failed("cannot be thawed", error))?;
            }
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
        self.beside(async move { Message::InitExited { incarnation, exit: exit.await } });
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

    // Start and end.

    async fn start(&mut self, reply: Reply<u32>) {
        match self.apply(Event::Start).await {
            Ok(()) => self.start_reply = Some(reply),
            Err(error) => answer(reply, Err(error)),
        }
    }

    async fn started(&mut self, result: Result<Option<Process>, RuntimeError>) {
        let ok = result.is_ok();
        let outcome = match result {
            Ok(process) => {
                if let Some(process) = process {
                    self.adopt(process);
                }
                self.record(Phase::Running);
                let pid = self.snapshot.borrow().init.pid;
                self.events.publish(TaskStart { container_id: self.id.clone(), pid, ..Default::default() });
                Ok(pid)
            }
            Err(error) => Err(self.failed("cannot be started", error)),
        };
        if let Some(reply) = self.start_reply.take() {
            answer(reply, outcome);
        }
        self.note(Event::StartDone { ok }).await;
    }

    /// Reports the exit of the init process once every exec's has been reported.
    fn settle_exit(&mut self) {
        if !self.exit_due || self.facts().live_execs > 0 {
            return;
        }
        self.exit_due = false;
        self.record(Phase::Stopped);
        let exit = self.init_exit.unwrap_or(ProcessExit { code: KILLED, at: SystemTime::now() });
        let pid = self.snapshot.borrow().init.pid;
        info!(id = %self.id, pid, code = exit.code, "the container has ended");
        self.events.publish(task_exit(&self.id, &self.id, pid, exit));
        self.snapshot.send_modify(|now| now.init.exit = Some(exit));
    }

    async fn kill(&mut self, signal: u32, all: bool, reply: Reply<()>) {
        let state = self.state();
        if state == State::Stopped {
            return answer(reply, Err(TaskError::Finished));
        }
        match state {
            _ if signal == SIGKILL => {
                // No single process stands for a container in transition.
                self.kill_all = all || matches!(state, State::Dumping { .. } | State::Restoring { .. });
                let killed = self.apply(Event::Kill).await;
                answer(reply, killed);
            }
            State::Frozen { by: FrozenBy::Sleep }
            | State::Dumping { .. }
            | State::Checkpointed
            | State::Restoring { .. } => {
                if signal == 0 {
                    return answer(reply, Ok(()));
                }
                self.need(Deferred::Signal { signal, all, reply }).await;
            }
            _ => {
                let sent = self.signal(signal, all);
                answer(reply, sent);
            }
        }
    }

    fn signal(&self, signal: u32, all: bool) -> Result<(), TaskError> {
        match self.runtime.signal(None, signal, all) {
            Err(RuntimeError::NotFound(_)) => Err(TaskError::Finished),
            other => other.map_err(|error| self.failed("cannot be signalled", error)),
        }
    }

    async fn delete(&mut self) -> Result<ProcessView, TaskError> {
        let view = self.snapshot.borrow().init.clone();
        if view.exit.is_none() && self.state() != State::Created {
            return Err(TaskError::StillRuns(self.id.clone()));
        }
        self.runtime.delete().await.map_err(|error| self.failed("cannot be deleted", error))?;
        self.events.publish(TaskDelete {
            container_id: self.id.clone(),
            pid: view.pid,
            exit_status: view.exit.map_or(0, |exit| exit.code),
            exited_at: view.exit.map(|exit| timestamp(exit.at)).into(),
            ..Default::default()
        });
        Ok(view)
    }

    // Execs.

    fn add_exec(&mut self, config: ExecConfig) -> Result<(), TaskError> {
        let exec_id = config.exec_id.clone();
        if self.execs.contains_key(&exec_id) {
            return Err(TaskError::ExecExists { id: self.id.clone(), exec_id });
        }
        if self.state() == State::Stopped {
            return Err(self.refused(Refusal::Ended));
        }
        let view = ProcessView { pid: 0, stdio: config.stdio.clone(), exit: None };
        self.snapshot.send_modify(|now| {
            now.execs.insert(exec_id.clone(), view);
        });
        self.execs.insert(exec_id.clone(), Exec::Added(config));
        self.events.publish(TaskExecAdded { container_id: self.id.clone(), exec_id, ..Default::default() });
        Ok(())
    }

    async fn start_exec(&mut self, exec_id: String, reply: Reply<u32>) {
        match self.execs.get(&exec_id) {
            None => answer(reply, Err(self.no_exec(&exec_id))),
            Some(Exec::Added(_)) => self.need(Deferred::StartExec { exec_id, reply }).await,
            Some(_) => answer(reply, Err(self.refused(Refusal::AlreadyStarted))),
        }
    }

    fn begin_exec(&mut self, exec_id: String, reply: Reply<u32>) {
        let Some(exec @ Exec::Added(_)) = self.execs.get_mut(&exec_id) else {
            return answer(reply, Err(self.no_exec(&exec_id)));
        };
        let Exec::Added(config) = std::mem::replace(exec, Exec::Starting(Some(reply))) else {
            return;
        };
        let runtime = self.runtime.clone();
        self.beside(async move {
            let result = runtime.exec(&config).await;
            Message::ExecStarted { exec_id, result }
        });
    }

    fn exec_started(&mut self, exec_id: &str, result: Result<Process, RuntimeError>) {
        let outcome = match result {
            Ok(process) => {
                let pid = process.pid;
                self.snapshot.send_modify(|now| {
                    if let Some(view) = now.execs.get_mut(exec_id) {
                        view.pid = pid;
                    }
                });
                let event = TaskExecStarted {
                    container_id: self.id.clone(),
                    exec_id: exec_id.to_owned(),
                    pid,
                    ..Default::default()
                };
                self.events.publish(event);
                self.catch_up_with(exec_id);
                let (exit, exec_id) = (process.exit, exec_id.to_owned());
                self.beside(async move { Message::ExecExited { exec_id, exit: exit.await } });
                Ok(pid)
            }
            Err(error) => Err(self.failed("an exec cannot be started", error)),
        };
        let after = if outcome.is_ok() { Exec::Running } else { Exec::Ended };
        if let Some(Exec::Starting(Some(reply))) = self.execs.insert(exec_id.to_owned(), after) {
            answer(reply, outcome);
        }
        self.settle_exit();
    }

    fn exec_exited(&mut self, exec_id: &str, exit: ProcessExit) {
        self.execs.insert(exec_id.to_owned(), Exec::Ended);
        let pid = self.snapshot.borrow().execs.get(exec_id).map_or(0, |view| view.pid);
        self.events.publish(task_exit(&self.id, exec_id, pid, exit));
        self.snapshot.send_modify(|now| {
            if let Some(view) = now.execs.get_mut(exec_id) {
                view.exit = Some(exit);
            }
        });
        self.settle_exit();
    }

    fn kill_exec(&mut self, exec_id: &str, signal: u32, all: bool) -> Result<(), TaskError> {
        match self.execs.get(exec_id) {
            None => Err(self.no_exec(exec_id)),
            Some(Exec::Ended) => Err(TaskError::Finished),
            Some(Exec::Added(_) | Exec::Starting(_)) => Err(self.refused(Refusal::NotStarted)),
            Some(Exec::Running) => match self.runtime.signal(Some(exec_id), signal, all) {
                Err(RuntimeError::NotFound(_)) => Err(TaskError::Finished),
                other => other.map_err(|error| self.failed("an exec cannot be signalled", error)),
            },
        }
    }

    fn delete_exec(&mut self, exec_id: String, reply: Reply<ProcessView>) {
        match self.execs.get(&exec_id) {
            None => return answer(reply, Err(self.no_exec(&exec_id))),
            Some(Exec::Starting(_) | Exec::Running) => {
                return answer(reply, Err(TaskError::StillRuns(self.id.clone())));
            }
            Some(Exec::Added(_) | Exec::Ended) => {}
        }
        let runtime = self.runtime.clone();
        // Its last output may take a while to be passed on.
        self.beside(async move {
            let result = runtime.delete_exec(&exec_id).await;
            Message::ExecDeleted { exec_id, result, reply }
        });
    }

    fn exec_deleted(
        &mut self,
        exec_id: &str,
        result: Result<(), RuntimeError>,
    ) -> Result<ProcessView, TaskError> {
        result.map_err(|error| self.failed("an exec cannot be deleted", error))?;
        // Another client may have been faster.
        self.execs.remove(exec_id).ok_or_else(|| self.no_exec(exec_id))?;
        self.early.remove(exec_id);
        let mut view = ProcessView::default();
        self.snapshot.send_modify(|now| view = now.execs.remove(exec_id).unwrap_or_default());
        Ok(view)
    }

    fn no_exec(&self, exec_id: &str) -> TaskError {
        TaskError::NoExec { id: self.id.clone(), exec_id: exec_id.to_owned() }
    }

    /// Sets a terminal's size, or remembers it for an exec whose terminal is yet to come.
    fn resize(&mut self, exec_id: Option<String>, width: u16, height: u16) -> Result<(), TaskError> {
        match (self.runtime.resize(exec_id.as_deref(), width, height), exec_id) {
            (Err(RuntimeError::NotFound(_)), Some(exec_id)) if self.awaits_start(&exec_id) => {
                self.early.entry(exec_id).or_default().size = Some((width, height));
                Ok(())
            }
            (done, _) => done.map_err(|error| self.failed("its terminal cannot be resized", error)),
        }
    }

    /// Ends a process's input, now or when it has been started: clients do not wait with that for a wake.
    fn close_stdin(&mut self, exec_id: Option<String>) -> Result<(), TaskError> {
        match (self.runtime.close_stdin(exec_id.as_deref()), exec_id) {
            (Err(RuntimeError::NotFound(_)), Some(exec_id)) if self.awaits_start(&exec_id) => {
                self.early.entry(exec_id).or_default().close_stdin = true;
                Ok(())
            }
            (done, _) => done.map_err(|error| self.failed("its input cannot be closed", error)),
        }
    }

    fn awaits_start(&self, exec_id: &str) -> bool {
        matches!(self.execs.get(exec_id), Some(Exec::Added(_) | Exec::Starting(_)))
    }

    /// Does what was asked of an exec before it had its streams.
    fn catch_up_with(&mut self, exec_id: &str) {
        let Some(early) = self.early.remove(exec_id) else { return };
        let sized = early.size.map(|(width, height)| self.runtime.resize(Some(exec_id), width, height));
        let closed = early.close_stdin.then(|| self.runtime.close_stdin(Some(exec_id)));
        for error in [sized, closed].into_iter().flatten().filter_map(Result::err) {
            warn!(id = %self.id, exec = exec_id, %error, "what was asked before its start cannot be done");
        }
    }

    // Updates and checkpoints for clients.

    fn update(&mut self, resources: oci_spec::runtime::LinuxResources, reply: Reply<()>) {
        let state = self.state();
        if state == State::Stopped {
            return answer(reply, Err(self.refused(Refusal::Ended)));
        }
        let asleep = matches!(
            state,
            State::Dumping { .. } | State::Checkpointed | State::Restoring { .. } | State::Frozen { .. }
        );
        let (runtime, id) = (self.runtime.clone(), self.id.clone());
        tokio::spawn(async move {
            let updated = runtime.update(&resources, asleep).await;
            let what = "its limits cannot be changed";
            answer(reply, updated.map_err(|source| TaskError::Runtime { id, what, source }));
        });
    }

    fn checkpoint(&mut self, config: CheckpointConfig, reply: Reply<()>) {
        let asleep = match self.state() {
            State::Running | State::Frozen { .. } => false,
            State::Checkpointed => true,
            State::Created | State::Starting { .. } => {
                return answer(reply, Err(self.refused(Refusal::NotStarted)));
            }
            State::Dumping { .. } => return answer(reply, Err(self.refused(Refusal::FallingAsleep))),
            State::Restoring { .. } => return answer(reply, Err(self.refused(Refusal::Waking))),
            State::Stopped => return answer(reply, Err(self.refused(Refusal::Ended))),
        };
        self.checkpoints += 1;
        let runtime = self.runtime.clone();
        self.beside(async move {
            let result = runtime.checkpoint(&config, asleep).await;
            Message::Checkpointed { path: config.image_path, result, reply }
        });
    }

    fn checkpointed(&mut self, path: &std::path::Path, result: Result<(), RuntimeError>, reply: Reply<()>) {
        self.checkpoints -= 1;
        if result.is_ok() {
            self.events.publish(TaskCheckpointed {
                container_id: self.id.clone(),
                checkpoint: path.to_string_lossy().into_owned(),
                ..Default::default()
            });
        }
        answer(reply, result.map_err(|error| self.failed("cannot be checkpointed", error)));
    }

    // Sleep and wake.

    async fn sleep(&mut self, depth: Depth, reply: Reply<Transition>) {
        let since = Instant::now();
        // The dump's veto must exist before the dump begins; a refused sleep must not disturb one under way.
        let fresh = self.falling.is_none();
        if fresh {
            self.falling = Some(Falling { since, veto: Veto::default(), reply: None });
        }
        let outcome = self.apply(Event::Sleep(depth)).await;
        match (outcome, self.state()) {
            (Ok(()), State::Dumping { .. }) => {
                if let Some(falling) = &mut self.falling {
                    falling.reply = Some(reply);
                }
            }
            (Ok(()), _) => {
                self.falling = None;
                let slept = Transition {
                    depth,
                    total: since.elapsed(),
                    stopped: Duration::ZERO,
                    image_bytes: 0,
                    engine: FREEZER,
                    at: SystemTime::now(),
                };
                self.fell_asleep(slept.clone());
                answer(reply, Ok(slept));
            }
            (Err(error), _) => {
                if fresh {
                    self.falling = None;
                }
                answer(reply, Err(error));
            }
        }
    }

    fn fell_asleep(&mut self, slept: Transition) {
        info!(id = %self.id, depth = %slept.depth, ms = slept.total.as_millis(), "asleep");
        self.deaf_until = None;
        self.snapshot.send_modify(|now| {
            now.sleeps += 1;
            now.last_sleep = Some(slept);
            now.last_error = None;
        });
    }

    async fn begin_dump(&mut self) {
        let veto = self.falling.as_ref().map(|falling| falling.veto.clone()).unwrap_or_default();
        if let Err(error) = self.try_record(Phase::Dumping) {
            // Deepening starts from a frozen cgroup, and after a failure the agent runs on.
            if let Err(error) = self.runtime.thaw().await {
                error!(id = %self.id, %error, "cannot thaw it after a dump that could not begin");
            }
            let failed = Err(RuntimeError::FailedPrecondition(error.to_string()));
            return self.beside(async move { Message::Dumped(failed) });
        }
        let runtime = self.runtime.clone();
        self.beside(async move { Message::Dumped(runtime.dump(veto).await) });
    }

    async fn dumped(&mut self, result: Result<DumpReport, RuntimeError>) {
        let falling = self.falling.take();
        let since = falling.as_ref().map_or_else(Instant::now, |falling| falling.since);
        let (outcome, answered) = match result {
            Ok(report) => {
                let slept = Transition {
                    depth: Depth::Checkpointed,
                    total: since.elapsed(),
                    stopped: report.stopped,
                    image_bytes: report.image_bytes,
                    engine: report.engine,
                    at: SystemTime::now(),
                };
                self.snapshot
                    .send_modify(|now| now.image = Some((report.image_dir.clone(), report.image_bytes)));
                self.record(Phase::Checkpointed);
                self.fell_asleep(slept.clone());
                (DumpOutcome::Complete, Ok(slept))
            }
            Err(error) => {
                self.record(Phase::Running);
                warn!(id = %self.id, %error, "the agent could not be put to sleep and runs on");
                if !matches!(error, RuntimeError::Vetoed) {
                    self.snapshot.send_modify(|now| now.last_error = Some(error.to_string()));
                }
                (DumpOutcome::Abandoned, Err(self.failed("cannot be put to sleep and runs on", error)))
            }
        };
        self.note(Event::DumpDone(outcome)).await;
        if let Some(reply) = falling.and_then(|falling| falling.reply) {
            answer(reply, answered);
        }
    }

    async fn wake(&mut self, reply: Reply<Option<Transition>>) {
        // Asked for as such, a wake of a waking agent is refused; all else that needs it joins the wake.
        if matches!(self.state(), State::Restoring { .. }) {
            return answer(reply, Err(self.refused(Refusal::Waking)));
        }
        self.need(Deferred::Wake { reply }).await;
    }

    async fn resume(&mut self, reply: Reply<()>) {
        self.waiting.push(Deferred::Resume { reply });
        let resumed = self.apply(Event::Resume).await;
        self.unqueue_on(resumed);
    }

    /// Queues a request until the agent is awake, and sees to it that it wakes.
    async fn need(&mut self, deferred: Deferred) {
        self.waiting.push(deferred);
        let needed = self.apply(Event::Need).await;
        self.unqueue_on(needed);
    }

    /// Fails the request queued last when the life-cycle refused it.
    fn unqueue_on(&mut self, outcome: Result<(), TaskError>) {
        if let Err(error) = outcome
            && let Some(deferred) = self.waiting.pop()
        {
            deferred.fail(error);
        }
    }

    async fn restored(&mut self, result: Result<Restored, RuntimeError>) {
        let ok = result.is_ok();
        match result {
            Ok(restored) => {
                self.adopt(restored.process);
                if let Some(waking) = &mut self.waking {
                    waking.engine = restored.engine;
                }
                self.record(Phase::Running);
            }
            Err(error) => {
                self.waking = None;
                self.deafen();
                error!(id = %self.id, %error, "the agent could not be woken; its image is kept");
                self.snapshot.send_modify(|now| now.last_error = Some(error.to_string()));
                self.record(Phase::Checkpointed);
            }
        }
        self.note(Event::RestoreDone { ok }).await;
    }

    /// Serves the requests that waited; they learn of the wake that they waited for, if there was one.
    fn release(&mut self) {
        let woke = self.waking.take().map(|waking| self.woke(&waking));
        for deferred in std::mem::take(&mut self.waiting) {
            match deferred {
                Deferred::StartExec { exec_id, reply } => self.begin_exec(exec_id, reply),
                Deferred::Signal { signal, all, reply } => answer(reply, self.signal(signal, all)),
                Deferred::Resume { reply } => {
                    self.events.publish(TaskResumed { container_id: self.id.clone(), ..Default::default() });
                    answer(reply, Ok(()));
                }
                Deferred::Wake { reply } => answer(reply, Ok(woke.clone())),
            }
        }
    }

    fn deafen(&mut self) {
        self.deaf_until = Some(tokio::time::Instant::now() + RETRY);
    }

    fn woke(&self, waking: &Waking) -> Transition {
        let woke = Transition {
            depth: waking.depth,
            total: waking.since.elapsed(),
            stopped: Duration::ZERO,
            image_bytes: waking.image_bytes,
            engine: waking.engine,
            at: SystemTime::now(),
        };
        info!(id = %self.id, depth = %woke.depth, ms = woke.total.as_millis(), "awake");
        self.snapshot.send_modify(|now| {
            now.wakes += 1;
            now.last_error = None;
            now.last_wake = Some(woke.clone());
        });
        woke
    }

    fn refuse(&mut self) {
        let (ended, reason) = {
            let now = self.snapshot.borrow();
            (now.state == State::Stopped, now.last_error.clone().unwrap_or_default())
        };
        for deferred in std::mem::take(&mut self.waiting) {
            let error = match (&deferred, ended) {
                (Deferred::Signal { .. }, true) => TaskError::Finished,
                (_, true) => self.refused(Refusal::Ended),
                (_, false) => {
                    TaskError::Dependency(format!("container {}: cannot be woken: {reason}", self.id))
                }
            };
            deferred.fail(error);
        }
    }
}

impl Waking {
    fn now(depth: Depth, image_bytes: u64) -> Self {
        Self { since: Instant::now(), depth, image_bytes, engine: FREEZER }
    }
}

impl Deferred {
    fn fail(self, error: TaskError) {
        match self {
            Self::StartExec { reply, .. } => answer(reply, Err(error)),
            Self::Signal { reply, .. } | Self::Resume { reply } => answer(reply, Err(error)),
            Self::Wake { reply } => answer(reply, Err(error)),
        }
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
