//! The standard streams of one process for its whole life, across sleeps.
//!
//! Between containerd and a process stand this shim's own pipes (or its terminal), and tasks that copy. Both ends of
//! containerd's FIFOs are held open until the process's last word has been passed on, so that a restart of containerd
//! breaks nothing: while nobody reads, writers wait. While the process sleeps its ends of the pipes are held, too, so
//! that what is in them stays; a terminal is drained before and replaced after.

mod console;
mod fifo;
mod pipes;
mod sink;
mod terminal;
mod typed;

use std::{
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

pub use self::{console::ConsoleSocket, pipes::ChildEnds, sink::LoggerContext};
use self::{
    fifo::Input,
    pipes::Pipes,
    sink::Sink,
    terminal::{Command, Terminal},
};
use crate::{probe_commands::Taps, reaper::Reaper, runtime::Stdio};

/// Why a process's streams cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// A stream of containerd's cannot be opened.
    #[error("cannot open {stream} {uri}: {source}")]
    Open {
        /// "stdin", "stdout" or "stderr".
        stream: &'static str,
        /// What containerd named.
        uri: String,
        /// Why.
        source: io::Error,
    },
    /// A stream is named in a way that is not known.
    #[error("{stream} {uri:?} is neither a path nor a file:// or binary:// URI")]
    UnknownUri {
        /// "stdout" or "stderr".
        stream: &'static str,
        /// What containerd named.
        uri: String,
    },
    /// A pipe could not be made.
    #[error("cannot make a pipe for {stream}: {source}")]
    Pipe {
        /// "stdin", "stdout" or "stderr".
        stream: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The logger did not start.
    #[error("the logger {binary} did not become ready: {reason}")]
    Logger {
        /// The program.
        binary: PathBuf,
        /// Why.
        reason: String,
    },
    /// The console of a new terminal did not come.
    #[error("the OCI runtime sent no console on {path}: {reason}")]
    Console {
        /// The socket.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A terminal refuses.
    #[error("the terminal: {0}")]
    Terminal(io::Error),
    /// The process has no terminal.
    #[error("the process has no terminal")]
    NoTerminal,
}

/// A descriptor that stands in for one that the sleeping process had.
#[derive(Debug)]
pub struct Inherit {
    /// CRIU's name of it, `pipe:[INODE]`.
    pub key: String,
    /// The descriptor.
    pub fd: OwnedFd,
}

/// What does not change with sleeps.
enum Kind {
    Pipes(Pipes),
    Terminal(Terminal),
}

/// The streams of one process.
pub struct ProcessIo {
    kind: Mutex<Kind>,
    input: Option<Input>,
    asleep: watch::Sender<bool>,
    tasks: Mutex<Tasks>,
}

/// The copying tasks.
#[derive(Default)]
struct Tasks {
    output: Vec<JoinHandle<()>>,
    input: Option<JoinHandle<()>>,
}

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in self.output.iter().chain(&self.input) {
            task.abort();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ProcessIo {
    /// Opens containerd's ends and makes the process's own. Nothing blocks: a FIFO may get its reader later.
    ///
    /// # Errors
    /// [`IoError`], naming the stream.
    pub async fn open(
        stdio: &Stdio,
        logger: &LoggerContext<'_>,
        reaper: &Reaper,
    ) -> Result<Arc<Self>, IoError> {
        Self::open_taped(stdio, logger, reaper, None).await
    }

    /// As [`Self::open`]; `taps` take note of what a process without a terminal writes.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_taped(
        stdio: &Stdio,
        logger: &LoggerContext<'_>,
        reaper: &Reaper,
        taps: Option<&Taps>,
    ) -> Result<Arc<Self>, IoError> {
        let input = Input::open(&stdio.stdin)?;
        let asleep = watch::Sender::new(false);
        let mut tasks = Tasks::default();
        let kind = if stdio.terminal {
            let sink = Sink::open("stdout", &stdio.stdout, logger, reaper).await?;
            let (terminal, task) = Terminal::new(sink, asleep.subscribe());
            tasks.output.push(task);
            Kind::Terminal(terminal)
        } else {
            let (pipes, output) = Pipes::open(stdio, logger, reaper, taps).await?;
            tasks.output = output;
            Kind::Pipes(pipes)
        };
        tasks.input = match (&input, &kind) {
            (Some(input), Kind::Pipes(pipes)) => pipes
                .stdin_writer()
                .map(|writer| tokio::spawn(input.copy_to_pipe(writer, asleep.subscribe()))),
            (Some(input), Kind::Terminal(terminal)) => {
                Some(tokio::spawn(input.copy_to_terminal(terminal.master(), asleep.subscribe())))
            }
            (None, _) => None,
        };
        Ok(Arc::new(Self { kind: Mutex::new(kind), input, asleep, tasks: Mutex::new(tasks) }))
    }

    /// The process's ends, for the OCI runtime; none for a terminal. [`Self::started`] closes the shim's copies.
    pub fn child_ends(&self) -> Option<Arc<ChildEnds>> {
        match &*lock(&self.kind) {
            Kind::Pipes(pipes) => pipes.child_ends(),
            Kind::Terminal(_) => None,
        }
    }

    /// Writes output in the place of a process that is not made. Its streams end with that.
    ///
    /// # Errors
    /// When the pipes refuse.
    pub async fn play(&self, stdout: Vec<u8>, stderr: Vec<u8>) -> io::Result<()> {
        let Some(ends) = self.child_ends() else { return Ok(()) };
        // A pipe may be shorter than what is written.
        let written = tokio::task::spawn_blocking(move || ends.write(&stdout, &stderr)).await;
        self.started();
        written.map_err(io::Error::other)?
    }

    /// The process has its ends: the shim lets go of them, so that it sees their end.
    pub fn started(&self) {
        if let Kind::Pipes(pipes) = &mut *lock(&self.kind) {
            pipes.release_child_ends();
        }
    }

    /// The master of the process's new terminal: after its start, and after each restore.
    ///
    /// # Errors
    /// When its size cannot be set.
    pub fn attach_console(&self, master: OwnedFd) -> Result<(), IoError> {
        match &mut *lock(&self.kind) {
            Kind::Terminal(terminal) => terminal.attach(master),
            Kind::Pipes(_) => Err(IoError::NoTerminal),
        }
    }

    /// Sets the terminal's size, or remembers it for the next terminal.
    ///
    /// # Errors
    /// [`IoError::NoTerminal`].
    pub fn resize(&self, width: u16, height: u16) -> Result<(), IoError> {
        match &mut *lock(&self.kind) {
            Kind::Terminal(terminal) => terminal.resize(width, height, *self.asleep.borrow()),
            Kind::Pipes(_) => Err(IoError::NoTerminal),
        }
    }

    /// Ends the process's standard input, when all that came before has been passed on.
    pub fn close_stdin(&self) {
        if let Some(input) = &self.input {
            input.close();
        }
    }

    /// Makes the streams ready for a dump of the frozen process: holds its ends of the pipes, and takes out of the
    /// terminal what it has written.
    ///
    /// # Errors
    /// When the process's ends cannot be held; everything is as before then.
    pub async fn prepare_dump(&self) -> Result<(), IoError> {
        self.asleep.send_replace(true);
        let drain = match &mut *lock(&self.kind) {
            Kind::Pipes(pipes) => pipes.hold().map(|()| None),
            Kind::Terminal(terminal) => Ok(Some(terminal.drain())),
        };
        match drain {
            Ok(None) => Ok(()),
            Ok(Some(drained)) => {
                // The copying task answers when the terminal is empty; it may have ended with the terminal.
                let _ = drained.await;
                Ok(())
            }
            Err(error) => {
                self.abort_dump();
                Err(error)
            }
        }
    }

    /// The dump has failed: the process has its streams as before.
    pub fn abort_dump(&self) {
        match &mut *lock(&self.kind) {
            Kind::Pipes(pipes) => pipes.release_child_ends(),
            Kind::Terminal(terminal) => terminal.put_back(),
        }
        self.asleep.send_replace(false);
    }

    /// What stands in for the process's ends in a restore.
    ///
    /// # Errors
    /// When there are not enough descriptors.
    pub fn inherit(&self) -> Result<Vec<Inherit>, IoError> {
        match &*lock(&self.kind) {
            Kind::Pipes(pipes) => pipes.inherit(),
            Kind::Terminal(_) => Ok(Vec::new()),
        }
    }

    /// The process runs again, with `master` as its new terminal if it has one.
    ///
    /// # Errors
    /// When the terminal's size cannot be set.
    pub fn finish_restore(&self, master: Option<OwnedFd>) -> Result<(), IoError> {
        let attached = match &mut *lock(&self.kind) {
            Kind::Pipes(pipes) => {
                pipes.release_child_ends();
                Ok(())
            }
            Kind::Terminal(terminal) => master.map_or(Ok(()), |master| terminal.attach(master)),
        };
        // It is awake whatever becomes of its terminal's size.
        self.asleep.send_replace(false);
        attached
    }

    /// Marks the process as frozen, or no longer so: its input waits meanwhile.
    pub fn set_asleep(&self, asleep: bool) {
        self.asleep.send_replace(asleep);
    }

    /// A process that sleeps will not come back: its output ends here. CRI deletes a container only after that end. Of
    /// one that is awake, nothing changes.
    pub fn end_asleep(&self) {
        if !self.asleep.send_replace(false) {
            return;
        }
        match &mut *lock(&self.kind) {
            Kind::Pipes(pipes) => pipes.release_child_ends(),
            Kind::Terminal(terminal) => terminal.end(),
        }
    }

    /// Completes when input has come that waits for the process to wake.
    pub async fn input_waiting(&self) {
        match &self.input {
            Some(input) => input.waiting().await,
            None => std::future::pending().await,
        }
    }

    /// Waits until all that the process has written has been passed on, for `limit` at most (another process may hold
    /// its ends open for ever), and then closes everything.
    pub async fn drained(&self, limit: Duration) {
        if let Kind::Pipes(pipes) = &mut *lock(&self.kind) {
            pipes.release_child_ends();
        }
        // A process that was killed in its sleep writes no more.
        self.asleep.send_replace(false);
        let mut tasks = std::mem::take(&mut *lock(&self.tasks));
        if let Kind::Terminal(terminal) = &mut *lock(&self.kind) {
            terminal.end();
        }
        let all = async {
            for task in &mut tasks.output {
                let _ = task.await;
            }
        };
        if tokio::time::timeout(limit, all).await.is_err() {
            tracing::warn!(ms = limit.as_millis(), "output is still open: what comes now is lost");
        }
        if let Some(input) = &self.input {
            input.close();
        }
    }
}

type Drained = oneshot::Receiver<()>;
type Commands = mpsc::UnboundedSender<Command>;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
