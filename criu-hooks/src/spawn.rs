//! How child processes are started.
//!
//! A shim reaps every child of its own in one place (a stolen exit status is a lost one), so the engine never
//! waits for a child itself: it is handed a [`Spawner`].

use std::{
    future::Future,
    io,
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    process::Command,
};

use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};
use tokio::io::Interest;

use crate::readiness;

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

    /// Takes charge of a child of this process that somebody else made and that is about to end: the first process
    /// of a restore that failed. Does nothing unless overridden, which suits whoever reaps every child anyway.
    fn adopt(&self, pid: Pid) {
        let _ = pid;
    }
}

/// A [`Spawner`] for programs that reap their children one by one, by descriptor, and never any other's.
#[derive(Debug, Default, Clone, Copy)]
pub struct LocalSpawner;

impl Spawner for LocalSpawner {
    fn spawn(&self, mut command: Command) -> io::Result<Child> {
        let mut child = command.spawn()?;
        let pid = Pid::from_child(&child);
        let opened = pidfd_open(pid, PidfdFlags::empty())
            .map_err(io::Error::from)
            .and_then(|pidfd| Ok((pidfd.try_clone()?, pidfd)));
        match opened {
            Ok((watched, pidfd)) => Ok(Child { pid, pidfd, exit: Box::pin(reap(watched)) }),
            Err(error) => {
                // Without a descriptor nobody could end or reap it later.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    fn adopt(&self, pid: Pid) {
        if let (Ok(pidfd), Ok(runtime)) =
            (pidfd_open(pid, PidfdFlags::empty()), tokio::runtime::Handle::try_current())
        {
            runtime.spawn(reap(pidfd));
        }
    }
}

/// Waits until the child behind `pidfd` has ended and reaps it.
async fn reap(pidfd: OwnedFd) -> io::Result<Exit> {
    let pidfd = readiness::watch(pidfd, Interest::READABLE)?;
    loop {
        let mut ready = pidfd.readable().await?;
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        if let Some(status) = waitid(WaitId::PidFd(pidfd.get_ref().as_fd()), options)? {
            return match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Ok(Exit::Code(code)),
                (None, Some(signal)) => Ok(Exit::Signal(signal)),
                (None, None) => Err(io::Error::other("a child ended with neither a code nor a signal")),
            };
        }
        ready.clear_ready();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[tokio::test]
    async fn the_exit_of_a_child_is_its_own() {
        let first = LocalSpawner.spawn(shell("exit 42")).unwrap();
        let second = LocalSpawner.spawn(shell("kill -KILL $$")).unwrap();
        assert_eq!(second.exit.await.unwrap(), Exit::Signal(9));
        assert_eq!(first.exit.await.unwrap(), Exit::Code(42));
    }

    #[tokio::test]
    async fn an_adopted_child_is_reaped() {
        #[allow(clippy::zombie_processes)]
        let child = shell("exit 1").spawn().unwrap();
        let pid = Pid::from_child(&child);
        LocalSpawner.adopt(pid);
        for _ in 0..500 {
            if crate::procfs::stat(pid).is_err() {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("{pid} is still there");
    }

    #[tokio::test]
    async fn a_missing_program_is_an_error_of_spawn() {
        let error = LocalSpawner.spawn(Command::new("/nonexistent/program")).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
