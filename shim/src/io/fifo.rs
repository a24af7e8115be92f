//! containerd's FIFO for standard input.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
};

use super::{IoError, terminal::Master};

/// Bytes that are copied at once.
const CHUNK: usize = 8 * 1024;

/// Opens a FIFO so that it neither blocks nor breaks, whoever comes and goes at its other end.
pub(super) fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// How often a FIFO that holds unread bytes is asked whether a reader has come, and for how long at most.
const READER_POLL: Duration = Duration::from_millis(50);
const READER_LIMIT: Duration = Duration::from_mins(2);

/// How long a client may take to read the last of a process's output before its delete is answered, and how often it is
/// looked whether it has.
const LAST_READ: Duration = Duration::from_millis(500);
const LAST_READ_POLL: Duration = Duration::from_millis(2);

/// Waits a moment until a FIFO that was written to is empty. containerd's client opens its end beside everything else and
/// gives up opening it when the delete is answered: on a busy machine it would lose what it has not begun to read.
pub(super) async fn wait_until_read(fifo: &AsyncFd<OwnedFd>) {
    let is_read = async {
        while rustix::io::ioctl_fionread(fifo.get_ref()).is_ok_and(|bytes| bytes > 0) {
            tokio::time::sleep(LAST_READ_POLL).await;
        }
    };
    let _ = tokio::time::timeout(LAST_READ, is_read).await;
}

/// Closes a FIFO that was written to, so that its reader sees the end once it has read everything. A FIFO that nobody
/// holds forgets what is in it: while there are bytes and no reader, as when containerd is being restarted, its write
/// end is held on to.
pub(super) fn close_written(fifo: OwnedFd) {
    let path = format!("/proc/self/fd/{}", fifo.as_raw_fd());
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(write_end) = rustix::fs::open(path, flags, Mode::empty()) else { return };
    drop(fifo);
    if !holds_unread(&write_end) {
        return;
    }
    tokio::spawn(tokio::time::timeout(READER_LIMIT, async move {
        while holds_unread(&write_end) {
            tokio::time::sleep(READER_POLL).await;
        }
    }));
}

/// Whether there are bytes in this pipe and nobody to read them.
fn holds_unread(write_end: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(write_end, PollFlags::OUT)];
    let no_wait = Timespec { tv_sec: 0, tv_nsec: 0 };
    // A pipe without a reader is in error for its writers.
    let no_reader = poll(&mut fds, Some(&no_wait)).is_ok() && fds[0].revents().contains(PollFlags::ERR);
    no_reader && rustix::io::ioctl_fionread(write_end).is_ok_and(|bytes| bytes > 0)
}

/// Registers an owned descriptor with the runtime.
pub(super) fn watched(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor stays open, and the same, until the registration that owns it is dropped.
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    Ok(registered?)
}

/// Reads once, when there is something.
pub(super) async fn read(fd: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut ready = fd.readable().await?;
        match ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut *buffer)?)) {
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

/// Writes everything.
pub(super) async fn write_all(fd: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = fd.writable().await?;
        match ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?)) {
            Ok(Ok(written)) => bytes = &bytes[written..],
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
    Ok(())
}

/// Standard input: the FIFO, held at both ends until it is closed.
pub(super) struct Input {
    fifo: Arc<AsyncFd<OwnedFd>>,
    stage: watch::Sender<Stage>,
}

/// How far the input has come to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// More may come.
    Open,
    /// A client has closed it.
    Closed,
    /// Nothing more is passed on.
    Ended,
}

/// Notes the end of the copying, whatever it ends by.
struct EndsWith(watch::Sender<Stage>);

impl Drop for EndsWith {
    fn drop(&mut self) {
        self.0.send_replace(Stage::Ended);
    }
}

impl Input {
    /// Opens `path`; none for an empty one.
    pub(super) fn open(path: &str) -> Result<Option<Self>, IoError> {
        if path.is_empty() {
            return Ok(None);
        }
        let failed = |source| IoError::Open { stream: "stdin", uri: path.to_owned(), source };
        let fifo = open(Path::new(path)).and_then(|fd| watched(fd, Interest::READABLE)).map_err(failed)?;
        Ok(Some(Self { fifo: Arc::new(fifo), stage: watch::Sender::new(Stage::Open) }))
    }

    /// Ends the input when what is in the FIFO has been passed on.
    pub(super) fn close(&self) {
        self.stage.send_if_modified(|stage| {
            let open = *stage == Stage::Open;
            if open {
                *stage = Stage::Closed;
            }
            open
        });
    }

    /// Completes when there are bytes, or a close, that nobody has taken yet.
    pub(super) async fn waiting(&self) {
        let mut stage = self.stage.subscribe();
        tokio::select! {
            () = self.bytes() => {}
            Ok(_) = stage.wait_for(|stage| *stage == Stage::Closed) => {}
        }
    }

    /// Completes when there are bytes.
    async fn bytes(&self) {
        loop {
            // Holding both ends, we see no hang-up: readable means bytes.
            let Ok(mut ready) = self.fifo.readable().await else { return std::future::pending().await };
            if rustix::io::ioctl_fionread(self.fifo.get_ref()).is_ok_and(|bytes| bytes > 0) {
                return;
            }
            ready.clear_ready();
        }
    }

    /// Takes the next bytes; none at the end. Waits while the process sleeps.
    async fn next(
        fifo: &AsyncFd<OwnedFd>,
        stage: &mut watch::Receiver<Stage>,
        asleep: &mut watch::Receiver<bool>,
        buffer: &mut [u8],
    ) -> Option<usize> {
        loop {
            asleep.wait_for(|asleep| !asleep).await.ok()?;
            if *stage.borrow() != Stage::Open {
                // What a client wrote before it closed is still in the FIFO.
                return match rustix::io::read(fifo.get_ref(), &mut *buffer) {
                    Ok(read) if read > 0 => Some(read),
                    _ => None,
                };
            }
            tokio::select! {
                biased;
                Ok(_) = stage.wait_for(|stage| *stage != Stage::Open) => {}
                // To fall asleep takes the input away from the copying, not from the FIFO.
                Ok(_) = asleep.wait_for(|asleep| *asleep) => {}
                read = read(fifo, buffer) => return read.ok().filter(|read| *read > 0),
            }
        }
    }

    /// Copies to the process's pipe.
    pub(super) fn copy_to_pipe(
        &self,
        pipe: OwnedFd,
        mut asleep: watch::Receiver<bool>,
    ) -> impl Future<Output = ()> + Send + use<> {
        let (fifo, ends) = (self.fifo.clone(), EndsWith(self.stage.clone()));
        async move {
            let mut stage = ends.0.subscribe();
            let Ok(pipe) = watched(pipe, Interest::WRITABLE) else { return };
            let mut buffer = vec![0; CHUNK];
            while let Some(read) = Self::next(&fifo, &mut stage, &mut asleep, &mut buffer).await {
                if write_all(&pipe, &buffer[..read]).await.is_err() {
                    return;
                }
            }
        }
    }

    /// Copies to the process's terminal, whichever it has at the time.
    pub(super) fn copy_to_terminal(
        &self,
        mut master: watch::Receiver<Option<Master>>,
        mut asleep: watch::Receiver<bool>,
    ) -> impl Future<Output = ()> + Send + use<> {
        let (fifo, ends) = (self.fifo.clone(), EndsWith(self.stage.clone()));
        async move {
            let mut stage = ends.0.subscribe();
            let mut buffer = vec![0; CHUNK];
            while let Some(read) = Self::next(&fifo, &mut stage, &mut asleep, &mut buffer).await {
                let mut rest = &buffer[..read];
                while !rest.is_empty() {
                    // What is written to the terminal of a sleeping process goes with that terminal.
                    if asleep.wait_for(|asleep| !asleep).await.is_err() {
                        return;
                    }
                    let Ok(current) = master.wait_for(Option::is_some).await.map(|master| master.clone())
                    else {
                        return;
                    };
                    let Some(current) = current else { continue };
                    let written = tokio::select! {
                        biased;
                        Ok(_) = asleep.wait_for(|asleep| *asleep) => continue,
                        written = current.write(rest) => written,
                        changed = master.changed() => if changed.is_err() { return } else { continue },
                    };
                    match written {
                        Ok(written) => rest = &rest[written..],
                        // The terminal is gone; the next one gets the rest.
                        Err(_) => {
                            if master.changed().await.is_err() {
                                return;
                            }
                        }
                    }
                }
            }
        }
    }
}
