//! How child processes are started.
//!
//! A shim reaps every child of its own in one place (a stolen exit status is a lost one), so the engine never
//! waits for a child itself: it is handed a [`Spawner`].

use std::{future::Future, io, os::fd::OwnedFd, pin::Pin, process::Command};

use rustix::process::Pid;

/// How a child process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It returned this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

impl Exit {
    /// Whether it returned 0.
    pub fn success(self) -> bool {
        self == Exit::Code(0)
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "exit code {code}"),
            Exit::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// The future of a child's end.
pub type ExitFuture = Pin<Box<dyn Future<Output = io::Result<Exit>> + Send>>;

/// A child that runs.
pub struct Child {
    /// Its process id, valid until `exit` has completed.
    pub pid: Pid,
    /// A descriptor of the process, for signals that cannot miss it.
    pub pidfd: OwnedFd,
    /// Completes when the child has ended and was reaped.
    pub exit: ExitFuture,
}

/// Starts child processes and reaps them.
pub trait Spawner: Send + Sync {
    /// Starts `command`. Its standard streams are as the caller set them; the caller keeps no end of theirs.
    ///
    /// # Errors
    /// As [`Command::spawn`].
    fn spawn(&self, command: Command) -> io::Result<Child>;
}
