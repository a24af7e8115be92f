//! Processes that are executed in the container, and those that are only answered for.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use runc::options::ExecOpts;

use super::{
    DRAIN, RuncContainer, create, failed,
    process::{self, ProcessHandle, runc_error},
};
use crate::{
    io::{ConsoleSocket, ProcessIo},
    probe_commands::Said,
    runtime::{ExecConfig, Process, ProcessExit, RuntimeError},
};

/// A process that was executed in the container.
pub(super) struct Exec {
    pub(super) process: ProcessHandle,
    pub(super) io: Arc<ProcessIo>,
}

impl RuncContainer {
    pub(super) async fn execute(&self, config: &ExecConfig) -> Result<Process, RuntimeError> {
        // Known before it runs, so that a resize finds its terminal.
        let io = self.open_exec(config).await?;
        match self.exec_process(config, &io).await {
            Ok((handle, process)) => {
                if let Some(exec) = self.lock().execs.get_mut(&config.exec_id) {
                    exec.process = handle;
                }
                Ok(process)
            }
            Err(error) => {
                self.abandon_exec(&config.exec_id, &io).await;
                Err(error)
            }
        }
    }

    /// Says what an exec said before in its place. It has no process of its own, so it gets the id of the one that speaks.
    pub(super) async fn play_exec(&self, config: &ExecConfig, said: Said) -> Result<Process, RuntimeError> {
        let io = self.open_exec(config).await?;
        if let Err(error) = io.play(said.stdout, said.stderr).await {
            self.abandon_exec(&config.exec_id, &io).await;
            return Err(failed(error));
        }
        let exit = ProcessExit { code: said.exit.code, at: SystemTime::now() };
        Ok(Process { pid: std::process::id(), exit: Box::pin(std::future::ready(exit)) })
    }

    /// Opens the streams of an exec, and knows it from then on.
    async fn open_exec(&self, config: &ExecConfig) -> Result<Arc<ProcessIo>, RuntimeError> {
        if config.exec_id.contains(['/', '\0']) {
            return Err(RuntimeError::InvalidArgument(format!("{:?} is no id of an exec", config.exec_id)));
        }
        let logger = create::logger(&self.id, &self.namespace);
        let taps = config.taps.as_ref();
        let opened = ProcessIo::open_taped(&config.stdio, &logger, &self.reaper, taps).await;
        let io = opened.map_err(failed)?;
        let pending = Exec { process: ProcessHandle::none(), io: io.clone() };
        self.lock().execs.insert(config.exec_id.clone(), pending);
        Ok(io)
    }

    /// Forgets an exec that could not be started.
    async fn abandon_exec(&self, exec_id: &str, io: &ProcessIo) {
        io.drained(Duration::ZERO).await;
        self.lock().execs.remove(exec_id);
    }

    /// Forgets an exec that has ended, when its output has been passed on.
    pub(super) async fn forget_exec(&self, exec_id: &str) {
        let exec = self.lock().execs.remove(exec_id);
        if let Some(exec) = exec {
            exec.io.drained(DRAIN).await;
        }
        let _ = std::fs::remove_file(self.bundle.join(format!("{exec_id}.pid")));
    }

    async fn exec_process(
        &self,
        config: &ExecConfig,
        io: &Arc<ProcessIo>,
    ) -> Result<(ProcessHandle, Process), RuntimeError> {
        let spec: oci_spec::runtime::Process = serde_json::from_slice(&config.spec).map_err(|error| {
            RuntimeError::InvalidArgument(format!("exec {}: its specification: {error}", config.exec_id))
        })?;
        let pid_file = self.bundle.join(format!("{}.pid", config.exec_id));
        let console = if config.stdio.terminal { Some(ConsoleSocket::new().map_err(failed)?) } else { None };
        let options = ExecOpts {
            io: io.child_ends().map(|ends| ends as Arc<dyn runc::io::Io>),
            pid_file: Some(pid_file.clone()),
            console_socket: console.as_ref().map(|socket| socket.path().to_owned()),
            detach: true,
        };
        self.introduce_init()?;
        let mark = self.reaper.mark();
        let outcome = self.runc.exec(&self.id, &spec, Some(&options)).await;
        io.started();
        outcome.map_err(|error| runc_error("exec", error, &self.runc_log()))?;
        let pid = process::read_pid(&pid_file)?;
        let exit = self.reaper.claim(pid, mark);
        // At once: nothing is reaped in between, so the pid is still its own. It may be gone already.
        let handle = ProcessHandle::open(pid);
        if let Some(console) = console {
            io.attach_console(console.receive().await.map_err(failed)?).map_err(failed)?;
        }
        Ok((handle, process::of(pid, exit)))
    }
}
