//! What clients ask of the container as a whole: start, kill, delete, limits, checkpoints.

use std::{path::Path, time::SystemTime};

use containerd_shim::protos::events::task::{TaskCheckpointed, TaskDelete, TaskStart};
use oci_spec::runtime::LinuxResources;
use tracing::{info, warn};

use super::{
    super::{Message, Phase, ProcessView, Reply},
    Actor, Deferred, KILLED, Postponed, SIGKILL, answer, task_exit,
};
use crate::{
    error::TaskError,
    events::timestamp,
    lifecycle::{Event, FrozenBy, Refusal, State},
    runtime::{CheckpointConfig, Process, ProcessExit, RuntimeError},
    wake::WakeCause,
};

const PAUSED: State = State::Frozen { by: FrozenBy::Client };

impl Actor {
    pub(super) async fn start(&mut self, reply: Reply<u32>) {
        match self.apply(Event::Start).await {
            Ok(()) => self.start_reply = Some(reply),
            Err(error) => answer(reply, Err(error)),
        }
    }

    pub(super) async fn started(&mut self, result: Result<Option<Process>, RuntimeError>) {
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
    pub(super) fn settle_exit(&mut self) {
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

    pub(super) async fn kill(&mut self, signal: u32, all: bool, reply: Reply<()>) {
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
            | State::Reclaiming
            | State::Reclaimed
            | State::Probed { .. }
            | State::Dumping { .. }
            | State::Checkpointed
            | State::Restoring { .. } => {
                if signal == 0 {
                    return answer(reply, Ok(()));
                }
                self.need(WakeCause::Signal, Deferred::Signal { signal, all, reply }).await;
            }
            _ => {
                let sent = self.signal(signal, all);
                answer(reply, sent);
            }
        }
    }

    pub(super) fn signal(&self, signal: u32, all: bool) -> Result<(), TaskError> {
        match self.runtime.signal(None, signal, all) {
            Err(RuntimeError::NotFound(_)) => Err(TaskError::Finished),
            other => other.map_err(|error| self.failed("cannot be signalled", error)),
        }
    }

    pub(super) async fn delete(&mut self) -> Result<ProcessView, TaskError> {
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

    pub(super) fn update(&mut self, resources: LinuxResources, reply: Reply<()>) {
        let state = self.state();
        if state == State::Stopped {
            return answer(reply, Err(self.refused(Refusal::Ended)));
        }
        let asleep = matches!(
            state,
            State::Frozen { .. }
                | State::Reclaiming
                | State::Reclaimed
                | State::Probed { .. }
                | State::Dumping { .. }
                | State::Checkpointed
                | State::Restoring { .. }
        );
        let (runtime, id) = (self.runtime.clone(), self.id.clone());
        tokio::spawn(async move {
            let updated = runtime.update(&resources, asleep).await;
            let what = "its limits cannot be changed";
            answer(reply, updated.map_err(|source| TaskError::Runtime { id, what, source }));
        });
    }

    /// Pauses it, once no checkpoint is being taken: CRIU would undo the pause, or the pause keep CRIU from its end.
    pub(super) async fn pause(&mut self, reply: Reply<()>) {
        if self.checkpoints > 0 && self.state() == State::Running {
            return self.postponed.push(Postponed::Pause { reply });
        }
        let paused = self.apply(Event::Pause).await;
        self.paused_asleep = paused.is_ok() && self.state() == State::Checkpointed;
        answer(reply, paused);
    }

    /// Refuses the pauses that wait for a checkpoint's end; whether there were any.
    pub(super) fn call_off_pauses(&mut self) -> bool {
        let (pauses, others): (Vec<_>, Vec<_>) = std::mem::take(&mut self.postponed)
            .into_iter()
            .partition(|postponed| matches!(postponed, Postponed::Pause { .. }));
        self.postponed = others;
        let any = !pauses.is_empty();
        for pause in pauses {
            pause.fail(self.refused(Refusal::Resumed));
        }
        any
    }

    /// Takes a checkpoint for a client. It must be whole without this node, which the image that an agent sleeps in is
    /// not; so a sleeping one is woken for it. Also one that sleeps frozen: CRIU freezes the cgroup again at its end if it
    /// found it frozen, behind the back of whoever wakes the agent meanwhile.
    pub(super) async fn checkpoint(&mut self, config: CheckpointConfig, reply: Reply<()>) {
        match self.state() {
            // Two at once would each take what the other does to the cgroup for how it was.
            State::Running | PAUSED if self.checkpoints > 0 => {
                return self.postponed.push(Postponed::Checkpoint { config, reply });
            }
            State::Running | PAUSED => {}
            State::Frozen { by: FrozenBy::Sleep }
            | State::Reclaiming
            | State::Reclaimed
            | State::Probed { .. }
            | State::Checkpointed
            | State::Restoring { .. } => {
                return self.need(WakeCause::Checkpoint, Deferred::Checkpoint { config, reply }).await;
            }
            State::Created | State::Starting { .. } => {
                return answer(reply, Err(self.refused(Refusal::NotStarted)));
            }
            State::Dumping { .. } => {
                return answer(reply, Err(self.refused(Refusal::FallingAsleep)));
            }
            State::Stopped => return answer(reply, Err(self.refused(Refusal::Ended))),
        }
        self.checkpoints += 1;
        let runtime = self.runtime.clone();
        self.beside(async move {
            let result = runtime.checkpoint(&config).await;
            Message::Checkpointed { path: config.image_path, result, reply }
        });
    }

    pub(super) async fn checkpointed(
        &mut self,
        path: &Path,
        result: Result<(), RuntimeError>,
        reply: Reply<()>,
    ) {
        self.checkpoints -= 1;
        self.put_freezer_right().await;
        if result.is_ok() {
            self.events.publish(TaskCheckpointed {
                container_id: self.id.clone(),
                checkpoint: path.to_string_lossy().into_owned(),
                ..Default::default()
            });
        }
        answer(reply, result.map_err(|error| self.failed("cannot be checkpointed", error)));
        for postponed in std::mem::take(&mut self.postponed) {
            match postponed {
                Postponed::Pause { reply } => self.pause(reply).await,
                Postponed::Checkpoint { config, reply } => self.checkpoint(config, reply).await,
            }
        }
    }

    /// Makes the cgroup after a checkpoint what clients take it for. CRIU leaves it as it found it, so frozen if the agent
    /// has been resumed since; and a CRIU that is killed leaves it thawed, also where the agent is paused.
    async fn put_freezer_right(&mut self) {
        match self.state() {
            State::Running => {
                if let Err(error) = self.runtime.thaw().await {
                    warn!(id = %self.id, %error, "cannot see to it that it runs after a checkpoint");
                }
            }
            PAUSED => {
                if let Err(error) = self.runtime.freeze().await {
                    warn!(id = %self.id, %error, "it is paused no longer: it could not be frozen after a checkpoint");
                    self.note(Event::FreezeFailed).await;
                }
            }
            _ => {}
        }
    }
}
