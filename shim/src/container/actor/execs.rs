//! The execs of a container, from their announcement to their end.

use containerd_shim::protos::events::task::{TaskExecAdded, TaskExecStarted};
use tracing::{debug, warn};

use super::{
    super::{Message, ProcessView, Reply},
    Actor, Deferred, Exec, answer, task_exit,
};
use crate::{
    error::TaskError,
    lifecycle::{Refusal, State},
    probe_commands::{Commands, ProbeResult, Said},
    runtime::{ExecConfig, Process, ProcessExit, RuntimeError},
    wake::WakeCause,
};

impl Actor {
    pub(super) fn add_exec(&mut self, config: ExecConfig) -> Result<(), TaskError> {
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

    pub(super) async fn start_exec(&mut self, exec_id: String, reply: Reply<u32>) {
        match self.execs.get(&exec_id) {
            None => answer(reply, Err(self.no_exec(&exec_id))),
            Some(Exec::Added(config)) => {
                let asleep = self.state().sleeps_on().then_some(self.probes.as_ref()).flatten();
                match asleep.and_then(|probes| probes.recall(config)) {
                    Some(said) => self.answer_exec(exec_id, said, reply),
                    None => self.need(WakeCause::Exec, Deferred::StartExec { exec_id, reply }).await,
                }
            }
            Some(_) => answer(reply, Err(self.refused(Refusal::AlreadyStarted))),
        }
    }

    /// Lets what an exec said before stand in for it, so that it needs no wake.
    fn answer_exec(&mut self, exec_id: String, said: Said, reply: Reply<u32>) {
        let Some(config) = self.take_added(&exec_id, reply) else { return };
        debug!(id = %self.id, exec = exec_id, "a probe is answered with what it said before");
        let runtime = self.runtime.clone();
        self.beside(async move {
            let result = runtime.answer_exec(&config, said).await;
            Message::ExecStarted { exec_id, result }
        });
    }

    /// Takes an exec that was added out of there, to be started.
    fn take_added(&mut self, exec_id: &str, reply: Reply<u32>) -> Option<ExecConfig> {
        let Some(exec @ Exec::Added(_)) = self.execs.get_mut(exec_id) else {
            answer(reply, Err(self.no_exec(exec_id)));
            return None;
        };
        match std::mem::replace(exec, Exec::Starting(Some(reply))) {
            Exec::Added(config) => Some(config),
            _ => None,
        }
    }

    pub(super) fn begin_exec(&mut self, exec_id: String, reply: Reply<u32>) {
        let Some(mut config) = self.take_added(&exec_id, reply) else { return };
        if let Some(recording) = self.probes.as_ref().and_then(|probes| probes.record(&config)) {
            config.taps = Some(recording.taps());
            self.recordings.insert(exec_id.clone(), recording);
        }
        let runtime = self.runtime.clone();
        self.beside(async move {
            let result = runtime.exec(&config).await;
            Message::ExecStarted { exec_id, result }
        });
    }

    pub(super) fn exec_started(&mut self, exec_id: &str, result: Result<Process, RuntimeError>) {
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
                let runtime = self.runtime.clone();
                self.beside(async move {
                    let exit = exit.await;
                    runtime.ended().await;
                    Message::ExecExited { exec_id, exit }
                });
                Ok(pid)
            }
            Err(error) => {
                self.learn(exec_id, None);
                Err(self.failed("an exec cannot be started", error))
            }
        };
        let after = if outcome.is_ok() { Exec::Running } else { Exec::Ended };
        if let Some(Exec::Starting(Some(reply))) = self.execs.insert(exec_id.to_owned(), after) {
            answer(reply, outcome);
        }
        self.settle_exit();
    }

    pub(super) fn exec_exited(&mut self, exec_id: &str, exit: ProcessExit) {
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

    pub(super) fn kill_exec(&mut self, exec_id: &str, signal: u32, all: bool) -> Result<(), TaskError> {
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

    pub(super) fn delete_exec(&mut self, exec_id: String, reply: Reply<ProcessView>) {
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

    pub(super) fn exec_deleted(
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
        // Only now all of its output has been passed on.
        self.learn(exec_id, view.exit);
        Ok(view)
    }

    /// Remembers how an exec has ended, if it is a probe.
    fn learn(&mut self, exec_id: &str, exit: Option<ProcessExit>) {
        if let (Some(recording), Some(probes)) = (self.recordings.remove(exec_id), &mut self.probes) {
            probes.learn(recording, exit);
        }
    }

    pub(super) fn probes(&mut self, commands: Option<Commands>) -> Result<Vec<ProbeResult>, TaskError> {
        let Some(probes) = &mut self.probes else {
            let why = "its probes are not answered for it: set probes = \"answer\"".to_owned();
            return Err(self.failed("the commands of its probes", RuntimeError::FailedPrecondition(why)));
        };
        if let Some(commands) = commands {
            probes.set(commands);
        }
        Ok(probes.results())
    }

    pub(super) fn no_exec(&self, exec_id: &str) -> TaskError {
        TaskError::NoExec { id: self.id.clone(), exec_id: exec_id.to_owned() }
    }

    /// Sets a terminal's size, or remembers it for an exec whose terminal is yet to come.
    pub(super) fn resize(
        &mut self,
        exec_id: Option<String>,
        width: u16,
        height: u16,
    ) -> Result<(), TaskError> {
        match (self.runtime.resize(exec_id.as_deref(), width, height), exec_id) {
            (Err(RuntimeError::NotFound(_)), Some(exec_id)) if self.awaits_start(&exec_id) => {
                self.early.entry(exec_id).or_default().size = Some((width, height));
                Ok(())
            }
            (done, _) => done.map_err(|error| self.failed("its terminal cannot be resized", error)),
        }
    }

    /// Ends a process's input, now or when it has been started: clients do not wait with that for a wake.
    pub(super) fn close_stdin(&mut self, exec_id: Option<String>) -> Result<(), TaskError> {
        match (self.runtime.close_stdin(exec_id.as_deref()), exec_id) {
            (Err(RuntimeError::NotFound(_)), Some(exec_id)) if self.awaits_start(&exec_id) => {
                self.early.entry(exec_id).or_default().close_stdin = true;
                Ok(())
            }
            (done, _) => done.map_err(|error| self.failed("its input cannot be closed", error)),
        }
    }

    pub(super) fn awaits_start(&self, exec_id: &str) -> bool {
        matches!(self.execs.get(exec_id), Some(Exec::Added(_) | Exec::Starting(_)))
    }

    /// Does what was asked of an exec before it had its streams.
    pub(super) fn catch_up_with(&mut self, exec_id: &str) {
        let Some(early) = self.early.remove(exec_id) else { return };
        let sized = early.size.map(|(width, height)| self.runtime.resize(Some(exec_id), width, height));
        let closed = early.close_stdin.then(|| self.runtime.close_stdin(Some(exec_id)));
        for error in [sized, closed].into_iter().flatten().filter_map(Result::err) {
            warn!(id = %self.id, exec = exec_id, %error, "what was asked before its start cannot be done");
        }
    }
}
