//! Streams without a terminal: pipes between the shim and the process.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
};

use async_trait::async_trait;
use rustix::{
    fs::{Mode, OFlags},
    pipe::PipeFlags,
};
use tokio::{io::Interest, task::JoinHandle};
use tracing::warn;

use super::{
    Inherit, IoError, LoggerContext, Sink,
    fifo::{self, watched},
};
use crate::{
    probe_commands::{Tap, Taps},
    reaper::Reaper,
    runtime::Stdio,
};

/// Bytes that are copied at once; allocated only while there are some.
const CHUNK: usize = 16 * 1024;

/// The process's ends of its pipes, as the OCI runtime takes them.
#[derive(Debug, Default)]
pub struct ChildEnds {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

impl ChildEnds {
    /// Writes output in the place of the process. Blocks while the pipes are full.
    pub(super) fn write(&self, stdout: &[u8], stderr: &[u8]) -> io::Result<()> {
        for (end, mut bytes) in [(&self.stdout, stdout), (&self.stderr, stderr)] {
            let Some(end) = end else { continue };
            while !bytes.is_empty() {
                let written = rustix::io::retry_on_intr(|| rustix::io::write(end, bytes))?;
                bytes = &bytes[written..];
            }
        }
        Ok(())
    }
}

#[async_trait]
impl runc::io::Io for ChildEnds {
    async fn set(&self, command: &mut runc::Command) -> io::Result<()> {
        let stdio = |end: &Option<OwnedFd>| -> io::Result<std::process::Stdio> {
            end.as_ref().map_or(Ok(std::process::Stdio::null()), |end| Ok(end.try_clone()?.into()))
        };
        command.stdin(stdio(&self.stdin)?).stdout(stdio(&self.stdout)?).stderr(stdio(&self.stderr)?);
        Ok(())
    }

    // `ProcessIo::started` does it.
    async fn close_after_start(&self) {}
}

/// One pipe, by the end that the shim keeps for its whole life.
struct Kept {
    name: &'static str,
    /// The read end of all three: it names the pipe, opens its other end again, and keeps what is in it.
    read_end: OwnedFd,
}

impl Kept {
    fn key(&self) -> Result<String, IoError> {
        let stat = rustix::fs::fstat(&self.read_end).map_err(|errno| self.failed(errno.into()))?;
        Ok(format!("pipe:[{}]", stat.st_ino))
    }

    fn failed(&self, source: io::Error) -> IoError {
        IoError::Pipe { stream: self.name, source }
    }

    /// Opens an end of the pipe anew.
    fn open(&self, flags: OFlags) -> Result<OwnedFd, IoError> {
        let path = format!("/proc/self/fd/{}", self.read_end.as_raw_fd());
        let end = rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty());
        end.map_err(|errno| self.failed(errno.into()))
    }
}

/// The pipes of one process.
pub(super) struct Pipes {
    stdin: Option<Kept>,
    stdin_writer: Option<OwnedFd>,
    stdout: Option<Kept>,
    stderr: Option<Kept>,
    /// The process's ends, held before its start and during its sleep.
    ends: Option<Arc<ChildEnds>>,
}

impl Pipes {
    /// Makes the pipes and starts to copy the process's output, which `taps` take note of.
    pub(super) async fn open(
        stdio: &Stdio,
        logger: &LoggerContext<'_>,
        reaper: &Reaper,
        taps: Option<&Taps>,
    ) -> Result<(Self, Vec<JoinHandle<()>>), IoError> {
        let mut tasks = Vec::new();
        let mut ends = ChildEnds::default();
        let mut kept = Vec::new();
        let sinks = Sink::open_both(&stdio.stdout, &stdio.stderr, logger, reaper).await?;
        for (name, sink) in ["stdout", "stderr"].into_iter().zip(sinks) {
            let Some(sink) = sink else {
                kept.push(None);
                continue;
            };
            let (pipe, write_end) = make(name)?;
            let reader = pipe.open(OFlags::RDONLY | OFlags::NONBLOCK)?;
            let (end, tap) = if name == "stdout" {
                (&mut ends.stdout, taps.map(|taps| &taps.stdout))
            } else {
                (&mut ends.stderr, taps.map(|taps| &taps.stderr))
            };
            *end = Some(write_end);
            tasks.push(tokio::spawn(copy(name, reader, sink, tap.cloned())));
            kept.push(Some(pipe));
        }
        let (mut stdin, mut stdin_writer) = (None, None);
        if !stdio.stdin.is_empty() {
            let (pipe, write_end) = make("stdin")?;
            ends.stdin = Some(pipe.open(OFlags::RDONLY)?);
            let flags = rustix::fs::fcntl_getfl(&write_end).unwrap_or(OFlags::empty());
            rustix::fs::fcntl_setfl(&write_end, flags | OFlags::NONBLOCK)
                .map_err(|errno| pipe.failed(errno.into()))?;
            (stdin, stdin_writer) = (Some(pipe), Some(write_end));
        }
        let stderr = kept.pop().flatten();
        let stdout = kept.pop().flatten();
        Ok((Self { stdin, stdin_writer, stdout, stderr, ends: Some(Arc::new(ends)) }, tasks))
    }

    /// Where input is written. The caller gets a duplicate; the original is dropped with the first
    /// [`Self::release_child_ends`], so that closing the duplicate is the end of the input.
    pub(super) fn stdin_writer(&self) -> Option<OwnedFd> {
        self.stdin_writer.as_ref().and_then(|writer| writer.try_clone().ok())
    }

    pub(super) fn child_ends(&self) -> Option<Arc<ChildEnds>> {
        self.ends.clone()
    }

    /// Lets the process's ends go: only the process has them then.
    pub(super) fn release_child_ends(&mut self) {
        self.ends = None;
        self.stdin_writer = None;
    }

    /// Holds the process's ends, so that the pipes and what is in them outlive it.
    pub(super) fn hold(&mut self) -> Result<(), IoError> {
        let open = |kept: &Option<Kept>, flags| kept.as_ref().map(|kept| kept.open(flags)).transpose();
        self.ends = Some(Arc::new(ChildEnds {
            stdin: open(&self.stdin, OFlags::RDONLY)?,
            stdout: open(&self.stdout, OFlags::WRONLY)?,
            stderr: open(&self.stderr, OFlags::WRONLY)?,
        }));
        Ok(())
    }

    /// The ends that stand in for the process's own.
    pub(super) fn inherit(&self) -> Result<Vec<Inherit>, IoError> {
        let mut all = Vec::new();
        for (kept, flags) in
            [(&self.stdin, OFlags::RDONLY), (&self.stdout, OFlags::WRONLY), (&self.stderr, OFlags::WRONLY)]
        {
            if let Some(kept) = kept {
                all.push(Inherit { key: kept.key()?, fd: kept.open(flags)? });
            }
        }
        Ok(all)
    }
}

fn make(name: &'static str) -> Result<(Kept, OwnedFd), IoError> {
    let (read_end, write_end) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
        .map_err(|errno| IoError::Pipe { stream: name, source: errno.into() })?;
    Ok((Kept { name, read_end }, write_end))
}

/// Copies output until its end. When the sink fails the process still goes on: what it writes is lost, and said so.
async fn copy(name: &'static str, reader: OwnedFd, sink: Sink, tap: Option<Tap>) {
    let Ok(reader) = watched(reader, Interest::READABLE) else { return };
    let mut broken = false;
    loop {
        let Ok(ready) = reader.readable().await else { break };
        drop(ready);
        let mut buffer = vec![0; CHUNK];
        let read = match fifo::read(&reader, &mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(read) => &buffer[..read],
        };
        if let Some(tap) = &tap {
            tap.note(read);
        }
        if !broken && let Err(error) = sink.write_all(read).await {
            warn!(stream = name, %error, "output is lost: it cannot be written");
            broken = true;
        }
    }
    sink.finish().await;
}
