//! A terminal: its master, the copying of its output, and what a sleep means to both.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use rustix::{io::Errno, termios::Winsize};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{Notify, mpsc, oneshot, watch},
    task::JoinHandle,
};
use tracing::warn;

use super::{Commands, Drained, IoError, Sink, fifo::watched, typed};

/// Bytes that are read at once.
const CHUNK: usize = 8 * 1024;
/// Output that is held back for a reader that is slow; then the terminal waits.
const MAX_BACKLOG: usize = 256 * 1024;

/// The master of a terminal.
#[derive(Clone)]
pub(super) struct Master(Arc<AsyncFd<OwnedFd>>);

impl Master {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self(Arc::new(watched(fd, Interest::READABLE | Interest::WRITABLE)?)))
    }

    /// Writes what the terminal takes.
    pub(super) async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.writable().await?;
            match ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }

    fn read_now(&self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        rustix::io::read(self.0.get_ref(), buffer)
    }
}

/// What the copying task is told.
pub(super) enum Command {
    /// Take out all that the process has written, and answer.
    Drain(oneshot::Sender<()>),
    /// The process has ended: pass on what there is, and end.
    End,
}

/// A process's terminal.
pub(super) struct Terminal {
    master: watch::Sender<Option<Master>>,
    commands: Commands,
    size: Option<Winsize>,
    /// Input that the process had not read when it was frozen.
    typed: Vec<u8>,
}

impl Terminal {
    /// A terminal whose master is yet to come, and the task that copies its output.
    pub(super) fn new(sink: Option<Sink>, asleep: watch::Receiver<bool>) -> (Self, JoinHandle<()>) {
        let master = watch::Sender::new(None);
        let (commands, orders) = mpsc::unbounded_channel();
        let (output, chunks) = mpsc::unbounded_channel();
        let backlog = Arc::<Backlog>::default();
        let reading =
            Reading { master: master.subscribe(), asleep, output, backlog: backlog.clone(), hung_up: false };
        tokio::spawn(reading.run(orders));
        (Self { master, commands, size: None, typed: Vec::new() }, tokio::spawn(write(sink, chunks, backlog)))
    }

    /// The master, as it changes.
    pub(super) fn master(&self) -> watch::Receiver<Option<Master>> {
        self.master.subscribe()
    }

    /// Takes a new master, with the size that the terminal had or should have got.
    pub(super) fn attach(&mut self, fd: OwnedFd) -> Result<(), IoError> {
        let master = Master::new(fd).map_err(IoError::Terminal)?;
        let sized = self.size.map_or(Ok(()), |size| set_size(&master, size));
        self.master.send_replace(Some(master));
        self.put_back();
        sized
    }

    /// Gives the process the input that was taken from it, in the terminal that it has now.
    pub(super) fn put_back(&mut self) {
        let typed = std::mem::take(&mut self.typed);
        let Some(master) = self.master.borrow().clone().filter(|_| !typed.is_empty()) else { return };
        match typed::put_back(master.0.get_ref(), &typed) {
            Ok(written) if written == typed.len() => {}
            Ok(written) => warn!(bytes = typed.len() - written, "input typed ahead is lost: it does not fit"),
            Err(error) => warn!(bytes = typed.len(), %error, "input typed ahead is lost"),
        }
    }

    /// Sets the size; a sleeping process gets it with its next terminal.
    pub(super) fn resize(&mut self, width: u16, height: u16, asleep: bool) -> Result<(), IoError> {
        let size = Winsize { ws_col: width, ws_row: height, ws_xpixel: 0, ws_ypixel: 0 };
        self.size = Some(size);
        match &*self.master.borrow() {
            Some(master) => match set_size(master, size) {
                // The terminal of a checkpointed process is a dead one.
                Err(_) if asleep => Ok(()),
                other => other,
            },
            None => Ok(()),
        }
    }

    /// Takes out the input that the process has not read, and has everything taken out that it has written.
    pub(super) fn drain(&mut self) -> Drained {
        if let Some(master) = &*self.master.borrow() {
            match typed::take(master.0.get_ref()) {
                Ok(typed) => self.typed.extend(typed),
                Err(error) => warn!(%error, "input typed ahead cannot be kept"),
            }
        }
        if self.size.is_none()
            && let Some(master) = &*self.master.borrow()
        {
            self.size = rustix::termios::tcgetwinsize(master.0.get_ref()).ok();
        }
        let (done, drained) = oneshot::channel();
        let _ = self.commands.send(Command::Drain(done));
        drained
    }

    /// The process has ended.
    pub(super) fn end(&mut self) {
        let _ = self.commands.send(Command::End);
    }
}

fn set_size(master: &Master, size: Winsize) -> Result<(), IoError> {
    rustix::termios::tcsetwinsize(master.0.get_ref(), size).map_err(|errno| IoError::Terminal(errno.into()))
}

/// Reads a terminal's output and hands it to the task that writes it, so that neither is broken off half-way.
struct Reading {
    master: watch::Receiver<Option<Master>>,
    asleep: watch::Receiver<bool>,
    output: mpsc::UnboundedSender<Vec<u8>>,
    backlog: Arc<Backlog>,
    /// Nobody has the other end of the current master any more.
    hung_up: bool,
}

/// How much has been read and not yet written.
#[derive(Default)]
struct Backlog {
    bytes: AtomicUsize,
    shrunk: Notify,
}

impl Reading {
    async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Command>) {
        loop {
            let current = self.master.borrow_and_update().clone();
            let has_room = self.backlog.bytes.load(Ordering::SeqCst) < MAX_BACKLOG;
            let reads = has_room && !self.hung_up;
            tokio::select! {
                biased;
                order = orders.recv() => {
                    // An order may overtake the news of a new master, whose output it means.
                    if self.master.has_changed().unwrap_or(false) {
                        self.hung_up = false;
                    }
                    let current = self.master.borrow_and_update().clone();
                    self.read_all(current.as_ref());
                    match order {
                        Some(Command::Drain(done)) => drop(done.send(())),
                        Some(Command::End) | None => return,
                    }
                }
                changed = self.master.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.hung_up = false;
                }
                () = readable(current.as_ref()), if reads => {
                    self.read_once(current.as_ref());
                    // The terminal of a sleeping process is dead; another will come.
                    if self.hung_up && !*self.asleep.borrow() {
                        return;
                    }
                }
                () = self.backlog.shrunk.notified(), if !has_room => {}
            }
        }
    }

    /// Reads once; false when there is nothing more.
    fn read_once(&mut self, master: Option<&Master>) -> bool {
        let Some(master) = master else { return false };
        let mut buffer = vec![0; CHUNK];
        match master.read_now(&mut buffer) {
            Ok(read) if read > 0 => {
                buffer.truncate(read);
                self.backlog.bytes.fetch_add(read, Ordering::SeqCst);
                // The writing task lives for as long as this one does.
                let _ = self.output.send(buffer);
                true
            }
            Err(Errno::AGAIN | Errno::INTR) => false,
            Ok(_) | Err(_) => {
                self.hung_up = true;
                false
            }
        }
    }

    /// Reads all that is there. A terminal holds some tens of KiB; the bound is against one that is filled again.
    fn read_all(&mut self, master: Option<&Master>) {
        for _ in 0..MAX_BACKLOG / CHUNK {
            if !self.read_once(master) {
                return;
            }
        }
    }
}

/// Completes when the terminal may have output.
async fn readable(master: Option<&Master>) {
    match master {
        None => std::future::pending().await,
        Some(master) => {
            if let Ok(mut ready) = master.0.readable().await {
                // Cleared only when there was nothing, or the next bytes would go unnoticed.
                if rustix::io::ioctl_fionread(master.0.get_ref()).is_ok_and(|bytes| bytes == 0)
                    && !ready.ready().is_read_closed()
                {
                    ready.clear_ready();
                }
            }
        }
    }
}

/// Writes what was read. A sink that fails loses output, and says so; the process goes on.
async fn write(sink: Option<Sink>, mut output: mpsc::UnboundedReceiver<Vec<u8>>, backlog: Arc<Backlog>) {
    let mut broken = false;
    while let Some(chunk) = output.recv().await {
        if let Some(sink) = sink.as_ref().filter(|_| !broken)
            && let Err(error) = sink.write_all(&chunk).await
        {
            warn!(%error, "terminal output is lost: it cannot be written");
            broken = true;
        }
        backlog.bytes.fetch_sub(chunk.len(), Ordering::SeqCst);
        backlog.shrunk.notify_one();
    }
    if let Some(sink) = sink {
        sink.finish().await;
    }
}
