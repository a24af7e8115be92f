//! Processes: their pids, the descriptors that stand for them, signals, and what runc says when it fails.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal},
};
use serde::Deserialize;

use crate::{
    reaper::ExitWatch,
    runtime::{Process, ProcessExit, RuntimeError},
};

/// The highest signal, SIGRTMAX.
const MAX_SIGNAL: u32 = 64;
/// How much of runc's log is read.
const MAX_LOG: u64 = 1 << 20;
/// How long a container's init may take to become the container's program.
const BEGIN: Duration = Duration::from_secs(5);

/// The file that a process runs: its device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Program(u64, u64);

/// What a process runs; nothing when it has ended.
pub(super) fn program(pid: Pid) -> Option<Program> {
    let exe = fs::metadata(format!("/proc/{}/exe", pid.as_raw_nonzero())).ok()?;
    Some(Program(exe.dev(), exe.ino()))
}

/// Waits until a process runs another program than `before`, or has ended, or takes too long.
///
/// `runc start` returns just before that, and what is not yet the container's program cannot be put to sleep: it maps
/// files from outside the container.
pub(super) async fn begun(pid: Pid, before: Program) {
    let begun = Instant::now();
    while program(pid) == Some(before) && begun.elapsed() < BEGIN {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A process by its pid and by a descriptor that can mean no other.
pub(super) struct ProcessHandle {
    pid: Option<Pid>,
    pidfd: Option<OwnedFd>,
}

impl ProcessHandle {
    /// No process yet.
    pub(super) fn none() -> Self {
        Self { pid: None, pidfd: None }
    }

    /// The process `pid`, a child of this one, so that its pid is its own until it is reaped.
    pub(super) fn open(pid: Pid) -> Self {
        Self { pid: Some(pid), pidfd: rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok() }
    }

    /// Its pid, 0 for none.
    pub(super) fn pid(&self) -> u32 {
        self.pid.map_or(0, number)
    }

    /// The process, if there is one.
    pub(super) fn raw(&self) -> Option<Pid> {
        self.pid
    }

    /// Sends a signal; none (0) only asks whether it lives.
    pub(super) fn signal(&self, signal: Option<Signal>) -> Result<(), RuntimeError> {
        let gone = || RuntimeError::NotFound("the process has ended".to_owned());
        let pidfd = self.pidfd.as_ref().ok_or_else(gone)?;
        let sent = match signal {
            Some(signal) => rustix::process::pidfd_send_signal(pidfd, signal),
            None => rustix::process::test_kill_process(self.pid.ok_or_else(gone)?),
        };
        match sent {
            Ok(()) => Ok(()),
            Err(Errno::SRCH) => Err(gone()),
            Err(errno) => Err(RuntimeError::Failed(format!("process {}: {errno}", self.pid()))),
        }
    }
}

/// Sends a signal to a process of the cgroup. One that has ended meanwhile needs none.
pub(super) fn signal_pid(pid: Pid, signal: Option<Signal>) -> Result<(), RuntimeError> {
    let sent = match signal {
        Some(signal) => rustix::process::kill_process(pid, signal),
        None => rustix::process::test_kill_process(pid),
    };
    match sent {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(errno) => Err(RuntimeError::Failed(format!("process {}: {errno}", number(pid)))),
    }
}

/// The signal with a number; none for 0.
pub(super) fn signal_number(signal: u32) -> Result<Option<Signal>, RuntimeError> {
    match signal {
        0 => Ok(None),
        1..=MAX_SIGNAL => {
            let raw = i32::try_from(signal).unwrap_or(0);
            // SAFETY: the number is a signal's; it is only sent, to another process, and never handled here.
            Ok(Signal::from_named_raw(raw).or_else(|| Some(unsafe { Signal::from_raw_unchecked(raw) })))
        }
        _ => Err(RuntimeError::InvalidArgument(format!(
            "there is no signal {signal}: the highest is {MAX_SIGNAL}"
        ))),
    }
}

/// A pid as the wire has it.
pub(super) fn number(pid: Pid) -> u32 {
    pid.as_raw_nonzero().get().unsigned_abs()
}

/// A process of the runtime's from its pid and its exit.
pub(super) fn of(pid: Pid, exit: ExitWatch) -> Process {
    Process {
        pid: number(pid),
        exit: Box::pin(async move {
            let exit = exit.await;
            ProcessExit { code: exit.code(), at: exit.at }
        }),
    }
}

/// The longest pid file that is read: what is longer is no number.
const MAX_PID: u64 = 32;

/// Reads the pid that runc wrote.
pub(super) fn read_pid(path: &Path) -> Result<Pid, RuntimeError> {
    let failed = |why: String| RuntimeError::Failed(format!("runc's pid file {}: {why}", path.display()));
    let mut text = String::new();
    let read = fs::File::open(path).and_then(|file| file.take(MAX_PID).read_to_string(&mut text));
    read.map_err(|error| failed(error.to_string()))?;
    text.trim().parse().ok().and_then(Pid::from_raw).ok_or_else(|| failed(format!("{text:?} is no pid")))
}

#[derive(Deserialize)]
struct LogLine {
    level: String,
    msg: String,
}

/// What runc's log says of a failure; runc's own output where it says nothing.
pub(super) fn runc_error(what: &str, error: runc::error::Error, log: &Path) -> RuntimeError {
    let said = last_error(log);
    let why = match (said, error) {
        (Some(said), runc::error::Error::CommandFailed { .. }) => said,
        (None, runc::error::Error::CommandFailed { status, stderr, .. }) => {
            format!("{status}: {}", stderr.trim())
        }
        (_, error) => error.to_string(),
    };
    // The log is read once: the next failure has its own.
    let _ = fs::remove_file(log);
    RuntimeError::Failed(format!("OCI runtime {what} failed: {why}"))
}

/// The last error of runc's log.
pub(super) fn last_error(log: &Path) -> Option<String> {
    let file = fs::File::open(log).ok()?;
    BufReader::new(file.take(MAX_LOG))
        .lines()
        .map_while(Result::ok)
        .filter_map(|line| serde_json::from_str::<LogLine>(&line).ok())
        .filter(|line| line.level == "error" || line.level == "fatal")
        .map(|line| line.msg)
        .last()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn command_failed(stderr: &str) -> runc::error::Error {
        runc::error::Error::CommandFailed {
            status: std::process::ExitStatus::from_raw(1 << 8),
            stdout: String::new(),
            stderr: stderr.to_owned(),
        }
    }

    #[test]
    fn the_last_error_of_runcs_log_is_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log.json");
        let lines = "{\"level\":\"error\",\"msg\":\"first\"}\nnoise\n{\"level\":\"error\",\"msg\":\"no such file\"}\n\
                     {\"level\":\"warning\",\"msg\":\"later\"}\n";
        fs::write(&log, lines).unwrap();
        let error = runc_error("create", command_failed("exit"), &log).to_string();
        assert_eq!(error, "OCI runtime create failed: no such file");
        let next = runc_error("start", command_failed("container not found\n"), &log).to_string();
        assert!(next.contains("container not found"), "an old log is not read again: {next}");
    }

    #[tokio::test]
    async fn a_process_has_begun_when_it_runs_another_program_or_has_ended() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "read line; exec sleep 0.1"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = Pid::from_child(&child);
        let shell = program(pid).unwrap();
        child.stdin.take().unwrap();
        begun(pid, shell).await;
        let sleeping = program(pid);
        assert_ne!(sleeping, Some(shell));
        if let Some(sleeping) = sleeping {
            begun(pid, sleeping).await;
        }
        assert_eq!(program(pid), None);
        // The reaper of other tests may have been there first.
        let _ = child.wait();
    }

    #[test]
    fn signals_have_numbers_up_to_the_last_real_time_one() {
        assert!(signal_number(0).unwrap().is_none());
        assert_eq!(signal_number(15).unwrap(), Some(Signal::TERM));
        assert_eq!(signal_number(37).unwrap().unwrap().as_raw(), 37);
        assert!(matches!(signal_number(65), Err(RuntimeError::InvalidArgument(_))));
    }

    #[test]
    fn a_pid_file_without_a_pid_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("init.pid");
        fs::write(&path, "zero").unwrap();
        assert!(read_pid(&path).unwrap_err().to_string().contains("init.pid"));
        fs::write(&path, "42\n").unwrap();
        assert_eq!(number(read_pid(&path).unwrap()), 42);
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_files_are_no_pid_and_no_trouble(bytes: Vec<u8>) {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), &bytes).unwrap();
            let number = std::str::from_utf8(&bytes).ok().and_then(|text| text.trim().parse::<i32>().ok());
            proptest::prop_assert_eq!(read_pid(file.path()).is_ok(), number.is_some_and(|pid| pid > 0));
            let _ = last_error(file.path());
        }

        #[test]
        fn the_last_error_of_a_log_is_found(message in "\\PC{1,40}", noise in "\\PC{0,40}") {
            let file = tempfile::NamedTempFile::new().unwrap();
            let line = serde_json::json!({ "level": "error", "msg": message });
            fs::write(file.path(), format!("{line}\n{noise}\n")).unwrap();
            proptest::prop_assert_eq!(last_error(file.path()), Some(message));
        }

        #[test]
        fn a_pid_is_read(pid in 1_i32..) {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), format!("{pid}\n")).unwrap();
            proptest::prop_assert_eq!(read_pid(file.path()).unwrap().as_raw_nonzero().get(), pid);
        }
    }
}
