//! The only place that reaps.
//!
//! A shim is the parent of every `runc` and `criu` it runs and, as a subreaper, of every container's init. Whoever
//! calls `wait` for "any child" takes the exits of all others, so nothing else in this process waits for a child.
//!
//! Children that the shim spawns are watched from before they can be reaped. A container's init is not spawned by
//! the shim: it is adopted when `runc` exits, and may have ended before its pid is known. So the caller takes a
//! [`Mark`] before it runs `runc`, and [`Reaper::claim`]s the pid afterwards; exits that nobody watches are kept
//! while a mark is held, and only those.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    io,
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    pin::Pin,
    process::{Command, ExitStatus},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use criu_hooks::spawn::{Child, Exit};
use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitOptions},
};
use tokio::{
    net::unix::pipe,
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};
use tracing::warn;

use crate::files;

/// Unwatched exits kept while marks are held; a bound against a container that floods the shim with orphans.
const MAX_UNCLAIMED: usize = 4096;

/// Bytes of a command's output that are kept; the rest is read and dropped.
const MAX_OUTPUT: usize = 1 << 20;

/// How long the OCI runtime may take for one command. A hanging one would keep its container from ever being ended.
const RUNTIME_LIMIT: Duration = Duration::from_mins(2);

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessExit {
    /// How it ended.
    pub status: Exit,
    /// When it was reaped.
    pub at: SystemTime,
}

impl ProcessExit {
    /// The exit code as containerd reports it: 128 + the signal's number for a signal.
    pub fn code(&self) -> u32 {
        match self.status {
            // The kernel keeps eight bits of an exit code.
            Exit::Code(code) => u32::try_from(code & 0xff).unwrap_or(255),
            Exit::Signal(signal) => 128 + u32::try_from(signal).unwrap_or(127),
        }
    }
}

#[derive(Default)]
struct State {
    /// Number of exits reaped so far: what orders marks and exits.
    reaped: u64,
    marks: usize,
    watches: HashMap<Pid, Vec<oneshot::Sender<ProcessExit>>>,
    unclaimed: VecDeque<(u64, Pid, ProcessExit)>,
}

impl State {
    fn watch(&mut self, pid: Pid) -> oneshot::Receiver<ProcessExit> {
        let (sender, receiver) = oneshot::channel();
        let watches = self.watches.entry(pid).or_default();
        watches.retain(|watch| !watch.is_closed());
        watches.push(sender);
        receiver
    }

    fn reaped(&mut self, pid: Pid, exit: ProcessExit) {
        self.reaped += 1;
        let mut told = false;
        for watch in self.watches.remove(&pid).unwrap_or_default() {
            told |= watch.send(exit).is_ok();
        }
        if !told && self.marks > 0 {
            if self.unclaimed.len() == MAX_UNCLAIMED {
                self.unclaimed.pop_front();
            }
            self.unclaimed.push_back((self.reaped, pid, exit));
        }
    }

    /// Takes the last unwatched exit of `pid` after `mark`.
    fn take_unclaimed(&mut self, pid: Pid, mark: u64) -> Option<ProcessExit> {
        let index = self.unclaimed.iter().rposition(|(number, of, _)| *of == pid && *number > mark)?;
        self.unclaimed.remove(index).map(|(_, _, exit)| exit)
    }
}

/// Reaps every child of this process, and tells those who asked.
#[derive(Clone)]
pub struct Reaper {
    state: Arc<Mutex<State>>,
}

impl std::fmt::Debug for Reaper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reaper").finish_non_exhaustive()
    }
}

/// A moment in the order of exits. While it is held, exits that nobody watches are kept for [`Reaper::claim`].
#[must_use = "exits are kept only while the mark is held"]
pub struct Mark {
    at: u64,
    state: Arc<Mutex<State>>,
}

impl Drop for Mark {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        state.marks -= 1;
        if state.marks == 0 {
            state.unclaimed = VecDeque::new();
        }
    }
}

/// The future of a process's end. It may be dropped.
pub struct ExitWatch {
    exit: oneshot::Receiver<ProcessExit>,
    /// Keeps the senders alive: a watch never ends without an exit.
    _state: Arc<Mutex<State>>,
}

impl Future for ExitWatch {
    type Output = ProcessExit;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<ProcessExit> {
        match Pin::new(&mut self.exit).poll(context) {
            Poll::Ready(Ok(exit)) => Poll::Ready(exit),
            // A sender is dropped only after it has sent.
            Poll::Ready(Err(_)) | Poll::Pending => Poll::Pending,
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reaper {
    /// Starts to reap, on the current tokio runtime and for its whole life. At most once a process.
    ///
    /// # Errors
    /// When the handler of SIGCHLD cannot be installed.
    pub fn start() -> io::Result<Self> {
        let mut children = signal(SignalKind::child())?;
        let reaper = Self { state: Arc::default() };
        // Children that ended before the handler was there send no further signal.
        reaper.reap();
        let of_loop = reaper.clone();
        tokio::spawn(async move {
            while children.recv().await.is_some() {
                of_loop.reap();
            }
        });
        Ok(reaper)
    }

    /// Reaps all children that have ended. One SIGCHLD can stand for many of them.
    fn reap(&self) {
        let mut state = lock(&self.state);
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let status = match (status.exit_status(), status.terminating_signal()) {
                        (Some(code), _) => Exit::Code(code),
                        (None, Some(signal)) => Exit::Signal(signal),
                        (None, None) => continue,
                    };
                    let exit = ProcessExit { status, at: SystemTime::now() };
                    state.reaped(pid, exit);
                }
                Err(Errno::INTR) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// Starts to keep the exits that nobody watches. Take the mark before the command that makes the process.
    pub fn mark(&self) -> Mark {
        let mut state = lock(&self.state);
        state.marks += 1;
        Mark { at: state.reaped, state: Arc::clone(&self.state) }
    }

    /// Watches a process that the shim did not spawn itself, and that was made after `mark`. An exit since the mark
    /// is found; an earlier one, of another process with the same pid, is not.
    pub fn claim(&self, pid: Pid, mark: Mark) -> ExitWatch {
        let mut state = lock(&self.state);
        // While this lock is held nothing is reaped: if there is such a child now, dead or alive, it is the one that
        // is meant, and an exit kept under its pid is another's.
        let is_child = rustix::process::waitid(
            WaitId::Pid(pid),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT,
        )
        .is_ok();
        let kept = state.take_unclaimed(pid, mark.at);
        let exit = match kept {
            Some(exit) if !is_child => {
                let (sender, receiver) = oneshot::channel();
                // The receiver is right here.
                let _ = sender.send(exit);
                receiver
            }
            _ => state.watch(pid),
        };
        drop(state);
        drop(mark);
        ExitWatch { exit, _state: Arc::clone(&self.state) }
    }

    /// Spawns `command`; the lock keeps the child from being reaped before it is watched.
    fn spawn_watched(
        &self,
        command: &mut Command,
    ) -> io::Result<(std::process::Child, Pid, OwnedFd, ExitWatch)> {
        files::with_original_limit(command);
        let mut state = lock(&self.state);
        let child = command.spawn()?;
        let pid = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| io::Error::other("the new child has no valid pid"))?;
        let exit = ExitWatch { exit: state.watch(pid), _state: Arc::clone(&self.state) };
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        Ok((child, pid, pidfd, exit))
    }
}

impl criu_hooks::spawn::Spawner for Reaper {
    fn spawn(&self, mut command: Command) -> io::Result<Child> {
        // The handle is dropped: it would offer to wait.
        let (_, pid, pidfd, exit) = self.spawn_watched(&mut command)?;
        Ok(Child { pid, pidfd, exit: Box::pin(async move { Ok(exit.await.status) }) })
    }
}

#[async_trait]
impl runc::Spawner for Reaper {
    async fn execute(&self, command: runc::Command) -> runc::Result<(ExitStatus, u32, String, String)> {
        let mut command = command.into_std();
        let (mut child, _, pidfd, mut exit) =
            self.spawn_watched(&mut command).map_err(runc::error::Error::ProcessSpawnFailed)?;
        // The command holds the child's ends of the pipes.
        drop(command);
        let invalid = runc::error::Error::InvalidCommand;
        let mut stdout = Output::new(child.stdout.take().map(OwnedFd::from)).map_err(invalid)?;
        let mut stderr = Output::new(child.stderr.take().map(OwnedFd::from)).map_err(invalid)?;

        let mut overdue = false;
        let deadline = tokio::time::sleep(RUNTIME_LIMIT);
        tokio::pin!(deadline);
        let ended = loop {
            tokio::select! {
                ended = &mut exit => break ended,
                () = stdout.read(), if stdout.is_open() => {}
                () = stderr.read(), if stderr.is_open() => {}
                () = &mut deadline, if !overdue => {
                    overdue = true;
                    warn!(pid = child.id(), "the OCI runtime hangs: it is killed");
                    let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
                }
            }
        };
        // All that the command itself wrote is in the pipes by now. A process that it left behind may hold them
        // open for ever, so their end is not waited for.
        stdout.drain();
        stderr.drain();
        let raw = match ended.status {
            Exit::Code(code) => (code & 0xff) << 8,
            Exit::Signal(signal) => signal,
        };
        Ok((ExitStatus::from_raw(raw), child.id(), stdout.into_text(), stderr.into_text()))
    }
}

/// What a command writes to one of its streams.
struct Output {
    pipe: Option<pipe::Receiver>,
    bytes: Vec<u8>,
}

impl Output {
    fn new(fd: Option<OwnedFd>) -> io::Result<Self> {
        Ok(Self { pipe: fd.map(pipe::Receiver::from_owned_fd).transpose()?, bytes: Vec::new() })
    }

    fn is_open(&self) -> bool {
        self.pipe.is_some()
    }

    /// Waits for something to read, and reads it.
    async fn read(&mut self) {
        let Some(pipe) = &self.pipe else { return };
        let mut piece = [0; 4096];
        let read = match pipe.readable().await {
            Ok(()) => pipe.try_read(&mut piece),
            Err(err) => Err(err),
        };
        self.keep(read, &piece);
    }

    /// Takes note of what a read returned; false when there is nothing more for now.
    fn keep(&mut self, read: io::Result<usize>, piece: &[u8]) -> bool {
        match read {
            Ok(read) if read > 0 => {
                let room = MAX_OUTPUT - self.bytes.len();
                self.bytes.extend_from_slice(&piece[..read.min(room)]);
                true
            }
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => false,
            Ok(_) | Err(_) => {
                self.pipe = None;
                false
            }
        }
    }

    /// Reads what is left in the pipe. Bounded: a pipe holds no more than a megabyte unless someone refills it.
    fn drain(&mut self) {
        let mut piece = [0; 4096];
        for _ in 0..MAX_OUTPUT / piece.len() {
            // Straight from the descriptor: the runtime may not know yet that there is something to read.
            let Some(pipe) = &self.pipe else { return };
            let read = rustix::io::read(pipe, &mut piece).map_err(io::Error::from);
            if !self.keep(read, &piece) {
                return;
            }
        }
    }

    fn into_text(self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

#[cfg(test)]
pub(crate) mod tests;
