//! Commands on a node: run to their end with a time limit, or kept running with piped or terminal stdio.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, ioctl_tiocsctty, pidfd_send_signal, setsid};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::enter::{Entrance, code};
use super::error::{Doing as _, NodeError, Result};
use super::supervisor::open_pidfd;
use crate::cgroup;
use crate::patience::scaled;

/// How long a command may run when nothing else is said.
pub const TIMEOUT: Duration = Duration::from_mins(1);

/// How long output may still trickle in once a command has ended: its orphans may hold the pipes for ever.
const TRICKLE: Duration = Duration::from_millis(500);

/// How long what was written by then is waited for: the thread that collects it may not get its turn.
const COLLECTED: Duration = Duration::from_secs(10);

/// How a command ended, and what it printed.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command line, for messages.
    pub command: String,
    /// Exit status; 128 and the number of the signal when one ended it.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// How long it ran, entering the node included.
    pub took: Duration,
}

impl Output {
    /// Standard output of a command that succeeded.
    ///
    /// # Errors
    /// When the status is not 0; the error holds all that was printed.
    pub fn check(self) -> Result<String> {
        if self.status == 0 {
            return Ok(self.stdout);
        }
        Err(NodeError::Command {
            command: self.command,
            status: self.status,
            stdout: self.stdout,
            stderr: self.stderr,
        })
    }
}

/// A command to be run on a node.
#[derive(Debug)]
pub struct NodeCommand {
    entrance: Entrance,
    argv: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    stdin: Option<File>,
    log: Option<File>,
    terminal: Option<Winsize>,
    in_init_cgroup: bool,
    timeout: Duration,
}

impl NodeCommand {
    /// A command for the node with this entrance.
    pub fn new(entrance: Entrance, argv: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        Self {
            entrance,
            argv: argv.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            stdin: None,
            log: None,
            terminal: None,
            in_init_cgroup: false,
            timeout: TIMEOUT,
        }
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Gives the command a file of the host as its standard input.
    #[must_use]
    pub fn stdin(mut self, file: File) -> Self {
        self.stdin = Some(file);
        self
    }

    /// Runs the command on a terminal of this size, which is its controlling one.
    #[must_use]
    pub fn terminal(mut self, rows: u16, columns: u16) -> Self {
        self.terminal = Some(window(rows, columns));
        self
    }

    /// How long [`Self::run`] waits; 60 s when nothing is said.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sends all output to a file of the host, and counts the command among the node's own services: it is not in a
    /// cgroup of its own, so that what it starts may outlive it.
    pub(super) fn service(mut self, log: File) -> Self {
        self.log = Some(log);
        self.in_init_cgroup = true;
        self
    }

    /// Runs the command to its end.
    ///
    /// # Errors
    /// When it can't be started or does not end in time; then it is killed with all that it started. A status other
    /// than 0 is no error here: see [`Output::check`].
    pub fn run(mut self) -> Result<Output> {
        if self.stdin.is_none() && self.terminal.is_none() {
            self.stdin = Some(File::open("/dev/null").doing(|| "opening /dev/null".into())?);
        }
        let timeout = self.timeout;
        self.spawn()?.wait(timeout)
    }

    /// Runs the command to its end with the stdio of this process, however long that takes; gives back its status.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn run_here(self) -> Result<i32> {
        let (name, _cgroup) = self.place()?;
        let mut command = self.entrance.command(&name, &self.argv)?;
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        Ok(code(command.status().doing(|| self.doing())?))
    }

    fn doing(&self) -> String {
        format!("starting {} on {}", self.shown(), self.entrance.name)
    }

    fn shown(&self) -> String {
        let words: Vec<_> = self.argv.iter().map(|word| word.to_string_lossy()).collect();
        words.join(" ")
    }

    /// The cgroup where the command runs, by its name; one of its own is removed with the handle.
    fn place(&self) -> Result<(String, Option<ExecCgroup>)> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if self.in_init_cgroup {
            return Ok((cgroup::INIT.to_owned(), None));
        }
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}{}-{number}", cgroup::EXEC_PREFIX, std::process::id());
        let path = self.entrance.cgroup.join(&name);
        fs::create_dir(&path).doing(|| self.doing())?;
        Ok((name, Some(ExecCgroup(path))))
    }

    /// Starts the command and leaves it running. It is killed, with all that it started, when the handle is dropped.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn spawn(self) -> Result<Spawned> {
        let shown = self.shown();
        let message = self.doing();
        let doing = || message.clone();
        let (name, own_cgroup) = self.place()?;
        let mut command = self.entrance.command(&name, &self.argv)?;
        command.envs(self.env.iter().map(|(name, value)| (name, value)));

        let mut terminal = None;
        if let Some(size) = self.terminal {
            let master =
                openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).doing(doing)?;
            grantpt(&master).and_then(|()| unlockpt(&master)).doing(doing)?;
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
            let slave = ioctl_tiocgptpeer(&master, flags).doing(doing)?;
            tcsetwinsize(&slave, size).doing(doing)?;
            let copy = || slave.try_clone().doing(doing);
            command.stdin(copy()?).stdout(copy()?).stderr(copy()?);
            // SAFETY: the closure only makes system calls; standard input is the terminal by then.
            unsafe {
                command.pre_exec(|| {
                    setsid()?;
                    Ok(ioctl_tiocsctty(std::io::stdin())?)
                });
            }
            terminal = Some(master);
        } else {
            command.stdin(self.stdin.map_or_else(Stdio::piped, Stdio::from));
            if let Some(log) = &self.log {
                command.stdout(log.try_clone().doing(doing)?).stderr(log.try_clone().doing(doing)?);
            } else {
                command.stdout(Stdio::piped()).stderr(Stdio::piped());
            }
        }
        let started = Instant::now();
        let mut child = command.spawn().doing(doing)?;
        // The command still holds the terminal's other end, and the last close of it is what tells its end.
        drop(command);

        let stdout = Capture::default();
        let stderr = Capture::default();
        let input = if let Some(master) = terminal {
            stdout.fill_from(master.try_clone().doing(doing)?);
            stderr.close();
            Input::Terminal(master)
        } else {
            child.stdout.take().map_or_else(|| stdout.close(), |pipe| stdout.fill_from(pipe));
            child.stderr.take().map_or_else(|| stderr.close(), |pipe| stderr.fill_from(pipe));
            child.stdin.take().map_or(Input::None, |pipe| Input::Pipe(OwnedFd::from(pipe)))
        };
        Ok(Spawned { command: shown, child, cgroup: own_cgroup, input, stdout, stderr, started })
    }
}

fn window(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// The cgroup of one command, in which everything that it starts can be found and killed.
#[derive(Debug)]
struct ExecCgroup(PathBuf);

impl ExecCgroup {
    fn kill(&self) {
        // What can't be removed here goes with the node.
        let _ = cgroup::kill_and_remove(&self.0, scaled(Duration::from_secs(2)));
    }
}

impl Drop for ExecCgroup {
    fn drop(&mut self) {
        // What a command leaves in the background stays there, and its cgroup with it until the node ends.
        let _ = fs::remove_dir(&self.0);
    }
}

#[derive(Debug)]
enum Input {
    None,
    Pipe(OwnedFd),
    Terminal(OwnedFd),
}

/// A command that runs on a node; dropping it kills it.
#[derive(Debug)]
pub struct Spawned {
    command: String,
    child: Child,
    cgroup: Option<ExecCgroup>,
    input: Input,
    stdout: Capture,
    stderr: Capture,
    started: Instant,
}

impl Spawned {
    /// Writes to the command's standard input or terminal.
    ///
    /// # Errors
    /// When it reads no more.
    pub fn write(&self, bytes: impl AsRef<[u8]>) -> Result<()> {
        let doing = || format!("writing to {}", self.command);
        let (Input::Pipe(input) | Input::Terminal(input)) = &self.input else {
            return Err(std::io::Error::from(std::io::ErrorKind::BrokenPipe)).doing(doing);
        };
        File::from(input.try_clone().doing(doing)?).write_all(bytes.as_ref()).doing(doing)
    }

    /// Ends the command's standard input.
    pub fn close_stdin(&mut self) {
        if matches!(self.input, Input::Pipe(_)) {
            self.input = Input::None;
        }
    }

    /// Changes the size of the command's terminal.
    ///
    /// # Errors
    /// When it has none.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let doing = || format!("resizing the terminal of {}", self.command);
        let Input::Terminal(terminal) = &self.input else {
            return Err(rustix::io::Errno::NOTTY).doing(doing);
        };
        tcsetwinsize(terminal, window(rows, columns)).doing(doing)
    }

    /// What it has printed so far; with a terminal, errors included.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout.lock().bytes).into_owned()
    }

    /// What it has complained about so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr.lock().bytes).into_owned()
    }

    /// Waits until what it has printed satisfies `good`, and gives that back.
    ///
    /// # Errors
    /// When that does not happen in time, or can't happen any more because the output has ended.
    pub fn wait_for_output(
        &self,
        what: &str,
        timeout: Duration,
        good: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let deadline = Instant::now() + scaled(timeout);
        let mut state = self.stdout.lock();
        loop {
            let text = String::from_utf8_lossy(&state.bytes).into_owned();
            if good(&text) {
                return Ok(text);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.closed {
                drop(state);
                let stderr = self.stderr();
                let what = format!("{what} in the output of {}: {text:?}, errors: {stderr:?}", self.command);
                return Err(NodeError::Timeout { what, after: self.started.elapsed() });
            }
            state = self.stdout.changed(state, left);
        }
    }

    /// The pid of the command itself, as the host sees it.
    ///
    /// # Errors
    /// When it has ended, or does not start within two seconds.
    pub fn pid(&self) -> Result<u32> {
        let entering = self.child.id();
        let deadline = Instant::now() + scaled(Duration::from_secs(2));
        loop {
            let children = fs::read_to_string(format!("/proc/{entering}/task/{entering}/children"))
                .doing(|| format!("looking for the process of {}", self.command))?;
            if let Some(pid) = children.split_whitespace().next().and_then(|pid| pid.parse().ok()) {
                return Ok(pid);
            }
            if Instant::now() > deadline {
                let what = format!("the process of {}", self.command);
                return Err(NodeError::Timeout { what, after: self.started.elapsed() });
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sends a signal to the command itself.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pidfd = open_pidfd(self.pid()?)?;
        pidfd_send_signal(&pidfd, signal).doing(|| format!("sending a signal to {}", self.command))
    }

    /// Whether it has not ended yet.
    pub fn running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the command's end. Its standard input ends now, unless it is a terminal.
    ///
    /// # Errors
    /// When it does not end in time; then it is killed with all that it started.
    pub fn wait(mut self, timeout: Duration) -> Result<Output> {
        self.close_stdin();
        let timeout = scaled(timeout);
        let doing = || format!("waiting for {}", self.command);
        let pidfd = open_pidfd(self.child.id())?;
        let left = Timespec::try_from(timeout).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
        let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)).doing(doing)?;
        if ended == 0 {
            let (stdout, stderr) = (self.stdout(), self.stderr());
            let what = format!("the end of {}; so far it printed {stdout:?} and {stderr:?}", self.command);
            return Err(NodeError::Timeout { what, after: timeout });
        }
        let status = self.child.wait().doing(doing)?;
        let took = self.started.elapsed();
        self.stdout.wait_closed(TRICKLE);
        self.stderr.wait_closed(TRICKLE);
        Ok(Output {
            command: self.command.clone(),
            status: code(status),
            stdout: self.stdout(),
            stderr: self.stderr(),
            took,
        })
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        if self.running() {
            if let Some(cgroup) = &self.cgroup {
                cgroup.kill();
            } else {
                // A service: the process that entered the node takes it along.
                let _ = self.child.kill();
            }
            let _ = self.child.wait();
        }
    }
}

/// Output that a thread collects while the command runs.
#[derive(Debug, Clone, Default)]
struct Capture(Arc<(Mutex<Captured>, Condvar)>);

#[derive(Debug, Default)]
struct Captured {
    bytes: Vec<u8>,
    closed: bool,
    source: Option<Arc<OwnedFd>>,
}

impl Captured {
    /// Whether more has been written than was collected.
    fn has_more(&self) -> bool {
        let Some(source) = &self.source else { return false };
        let mut polled = [PollFd::new(source, PollFlags::IN)];
        poll(&mut polled, Some(&Timespec::default())).is_ok() && polled[0].revents().contains(PollFlags::IN)
    }
}

impl Capture {
    fn lock(&self) -> MutexGuard<'_, Captured> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed<'a>(&self, state: MutexGuard<'a, Captured>, timeout: Duration) -> MutexGuard<'a, Captured> {
        self.0.1.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner).0
    }

    fn close(&self) {
        self.lock().closed = true;
        self.0.1.notify_all();
    }

    fn wait_closed(&self, timeout: Duration) {
        let begun = Instant::now();
        let mut state = self.lock();
        while !state.closed
            && (begun.elapsed() < timeout || (state.has_more() && begun.elapsed() < scaled(COLLECTED)))
        {
            state = self.changed(state, TRICKLE / 10);
        }
    }

    fn fill_from(&self, source: impl Into<OwnedFd>) {
        let capture = self.clone();
        let source = Arc::new(source.into());
        self.lock().source = Some(Arc::clone(&source));
        thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                // Read with the lock held: what is not in the pipe any more is among the bytes.
                let _ = poll(&mut [PollFd::new(&source, PollFlags::IN)], None);
                let mut state = capture.lock();
                // A terminal whose other end is closed gives an error, not an end.
                let Ok(count @ 1..) = rustix::io::read(&source, &mut buffer) else {
                    (state.closed, state.source) = (true, None);
                    break;
                };
                state.bytes.extend_from_slice(&buffer[..count]);
                drop(state);
                capture.0.1.notify_all();
            }
            capture.0.1.notify_all();
        });
    }
}
