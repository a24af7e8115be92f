//! Where output goes: containerd's FIFO, a file, or a logger of the user's.

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use criu_hooks::spawn::Spawner;
use rustix::pipe::PipeFlags;
use tokio::{
    io::{AsyncWriteExt, Interest, unix::AsyncFd},
    sync::Mutex,
};

use super::{
    IoError,
    fifo::{self, watched, write_all},
};
use crate::reaper::Reaper;

/// How long a logger may take to say that it is ready; as in containerd's own shim.
const LOGGER_READY: Duration = Duration::from_secs(10);

/// What a logger is told of the container.
#[derive(Debug, Clone, Copy)]
pub struct LoggerContext<'a> {
    /// The container's id.
    pub id: &'a str,
    /// containerd's namespace.
    pub namespace: &'a str,
}

/// Takes output.
pub(super) enum Sink {
    /// A FIFO, or the pipe of a logger.
    Pipe(AsyncFd<OwnedFd>),
    /// A regular file.
    File(Mutex<tokio::fs::File>),
}

impl Sink {
    /// Opens what containerd named; none for an empty name.
    pub(super) async fn open(
        stream: &'static str,
        uri: &str,
        logger: &LoggerContext<'_>,
        reaper: &Reaper,
    ) -> Result<Option<Self>, IoError> {
        if uri.is_empty() {
            return Ok(None);
        }
        let failed = |source| IoError::Open { stream, uri: uri.to_owned(), source };
        let sink = match uri.split_once("://") {
            None if uri.starts_with('/') => {
                pipe(fifo::open(Path::new(uri)).map_err(failed)?).map_err(failed)?
            }
            Some(("fifo", path)) => pipe(fifo::open(Path::new(path)).map_err(failed)?).map_err(failed)?,
            Some(("file", path)) => file(Path::new(path)).await.map_err(failed)?,
            Some(("binary", rest)) => {
                let (stdout, stderr) = start_logger(rest, logger, reaper).await?;
                if stream == "stderr" { stderr } else { stdout }
            }
            _ => return Err(IoError::UnknownUri { stream, uri: uri.to_owned() }),
        };
        Ok(Some(sink))
    }

    /// Opens where both streams go. A logger that both name is started once, and gets both.
    pub(super) async fn open_both(
        stdout: &str,
        stderr: &str,
        logger: &LoggerContext<'_>,
        reaper: &Reaper,
    ) -> Result<[Option<Self>; 2], IoError> {
        if let Some(rest) = stdout.strip_prefix("binary://").filter(|_| stderr == stdout) {
            let (stdout, stderr) = start_logger(rest, logger, reaper).await?;
            return Ok([Some(stdout), Some(stderr)]);
        }
        let stdout = Self::open("stdout", stdout, logger, reaper).await?;
        Ok([stdout, Self::open("stderr", stderr, logger, reaper).await?])
    }

    /// Closes it after the last word.
    pub(super) async fn finish(self) {
        if let Self::Pipe(pipe) = self {
            fifo::wait_until_read(&pipe).await;
            fifo::close_written(pipe.into_inner());
        }
    }

    /// Writes everything, however long that takes.
    pub(super) async fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => write_all(pipe, bytes).await,
            Self::File(file) => {
                let mut file = file.lock().await;
                file.write_all(bytes).await?;
                file.flush().await
            }
        }
    }
}

fn pipe(fd: OwnedFd) -> io::Result<Sink> {
    Ok(Sink::Pipe(watched(fd, Interest::WRITABLE)?))
}

async fn file(path: &Path) -> io::Result<Sink> {
    if let Some(parent) = path.parent() {
        tokio::fs::create_dir_all(parent).await?;
    }
    let file = tokio::fs::OpenOptions::new().create(true).append(true).open(path).await?;
    Ok(Sink::File(Mutex::new(file)))
}

/// The program and arguments of `binary://PATH?KEY=VALUE&…`: each key, and its value if it has one, is an argument.
fn logger_command(rest: &str) -> (PathBuf, Vec<String>) {
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        arguments.push(unescape(key));
        if !value.is_empty() {
            arguments.push(unescape(value));
        }
    }
    (PathBuf::from(unescape(path)), arguments)
}

/// Undoes the percent-encoding of a URI.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let mut ahead = rest.clone();
        let hex = |digit: Option<u8>| digit.and_then(|digit| char::from(digit).to_digit(16));
        match (byte, hex(ahead.next()), hex(ahead.next())) {
            (b'%', Some(high), Some(low)) => {
                bytes.push(u8::try_from(high * 16 + low).unwrap_or(b'?'));
                rest = ahead;
            }
            (b'+', ..) => bytes.push(b' '),
            _ => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Starts a logger as containerd's own shim does: descriptor 3 is the process's stdout, 4 its stderr, and 5 is closed
/// by the logger when it is ready.
async fn start_logger(
    rest: &str,
    context: &LoggerContext<'_>,
    reaper: &Reaper,
) -> Result<(Sink, Sink), IoError> {
    let (binary, arguments) = logger_command(rest);
    let failed = |reason: String| IoError::Logger { binary: binary.clone(), reason };
    let failed_io = |error: io::Error| failed(error.to_string());
    let make = || -> io::Result<_> { Ok(rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?) };
    let (stdout, to_stdout) = make().map_err(failed_io)?;
    let (stderr, to_stderr) = make().map_err(failed_io)?;
    let (ready, ready_end) = make().map_err(failed_io)?;
    let ends = [stdout.as_raw_fd(), stderr.as_raw_fd(), ready_end.as_raw_fd()];
    let mut command = Command::new(&binary);
    command
        .args(&arguments)
        .env("CONTAINER_ID", context.id)
        .env("CONTAINER_NAMESPACE", context.namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: between fork and exec only system calls are made, on descriptors that are open here.
    unsafe {
        command.pre_exec(move || hand_over(ends));
    }
    let child = reaper.spawn(command).map_err(failed_io)?;
    drop((stdout, stderr, ready_end));
    let watched_ready =
        nonblocking(&ready).and_then(|()| watched(ready, Interest::READABLE)).map_err(failed_io)?;
    let mut exit = child.exit;
    let mut byte = [0];
    tokio::select! {
        biased;
        exit = &mut exit => return Err(failed(ended(exit))),
        read = fifo::read(&watched_ready, &mut byte) => {
            read.map_err(failed_io)?;
            // The end of the pipe is also what a program leaves that ends, and then it has closed everything.
            let open = std::fs::read_dir(format!("/proc/{}/fd", child.pid.as_raw_nonzero()));
            if !open.is_ok_and(|mut open| open.next().is_some()) {
                return Err(failed(ended(exit.await)));
            }
        }
        () = tokio::time::sleep(LOGGER_READY) => {
            let _ = rustix::process::pidfd_send_signal(&child.pidfd, rustix::process::Signal::KILL);
            return Err(failed(format!("nothing after {} s", LOGGER_READY.as_secs())));
        }
    }
    let sink = |end: OwnedFd| nonblocking(&end).and_then(|()| pipe(end));
    Ok((sink(to_stdout).map_err(failed_io)?, sink(to_stderr).map_err(failed_io)?))
}

fn ended(exit: io::Result<criu_hooks::spawn::Exit>) -> String {
    exit.map_or_else(|error| error.to_string(), |exit| format!("it ended with {exit}"))
}

fn nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)?)
}

/// Puts the three descriptors at 3, 4 and 5, in the child.
fn hand_over(ends: [i32; 3]) -> io::Result<()> {
    use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd};
    let mut high = Vec::with_capacity(3);
    for end in ends {
        // SAFETY: the parent holds these descriptors open until the child has been spawned.
        let fd = unsafe { BorrowedFd::borrow_raw(end) };
        // Out of the way of 3, 4 and 5 first.
        high.push(rustix::io::fcntl_dupfd_cloexec(fd, 10)?);
    }
    for (number, fd) in (3..).zip(&high) {
        // SAFETY: numbers 3 to 5 are the child's own to overwrite; the value is given back, not closed.
        let mut target = unsafe { OwnedFd::from_raw_fd(number) };
        let copied = rustix::io::dup2(fd, &mut target);
        let _ = target.into_raw_fd();
        copied?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_logger_gets_its_arguments_in_order() {
        let (binary, arguments) = logger_command("/usr/bin/log%20it?--tag=a%2Fb&-v&id=3");
        assert_eq!(binary, Path::new("/usr/bin/log it"));
        assert_eq!(arguments, ["--tag", "a/b", "-v", "id", "3"]);
        assert_eq!(logger_command("/bin/true"), (PathBuf::from("/bin/true"), vec![]));
        assert_eq!(unescape("100%"), "100%");
    }
}
