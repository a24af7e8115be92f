//! The shim's side of a lazy restore: the second holder of every userfaultfd.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Command as Program, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    fs::{Mode, OFlags, SeekFrom},
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType},
    process::{Signal, pidfd_send_signal},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{mpsc, watch},
};

use super::{
    Command, Fill, FillError, FillReport, LazyOptions,
    criu_socket::{CriuSocket, News},
    wire::{self, FromPager, Start, Tally, ToPager},
};
use crate::{
    cgroup::Cgroup,
    image::{Claim, pagemap::PAGE},
    readiness,
    spawn::{ExitFuture, Spawner},
};

/// How many pagers may die before the container does.
const DEATHS: u32 = 3;
/// The ids of processes that are forked after the restore begin here: pagers give them, and the holder all others.
const FORKED: u32 = 1 << 31;
/// How long a pager may take to end when it has nothing left to do.
const END: Duration = Duration::from_secs(2);
/// How long the container's processes may take to be gone once they are killed.
const KILL: Duration = Duration::from_secs(10);

/// Where a restore takes place.
pub(crate) struct Place<'a> {
    /// CRIU's files.
    pub images: BorrowedFd<'a>,
    /// CRIU's work directory.
    pub work: BorrowedFd<'a>,
    /// The directory of the container's images.
    pub store: BorrowedFd<'a>,
    /// The generation of the image.
    pub generation: u64,
    /// The checksums of its pages, when it has any.
    pub sums: Option<(File, Claim)>,
    /// The container's.
    pub cgroup: &'a Cgroup,
}

/// Starts a pager and listens for CRIU.
pub(crate) fn start(place: Place<'_>, options: &LazyOptions, spawner: &Arc<dyn Spawner>) -> io::Result<Fill> {
    let kill = place.cgroup.path().join("cgroup.kill");
    let kill = rustix::fs::open(kill, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    let criu = CriuSocket::listen(place.work)?;
    let (file, sums) = place.sums.map_or((None, None), |(file, claim)| (Some(file), Some(claim)));
    let base = Base {
        options: options.clone(),
        spawner: Arc::clone(spawner),
        cgroup: place.cgroup.clone(),
        descriptors: [place.images.try_clone_to_owned()?, place.store.try_clone_to_owned()?, kill]
            .into_iter()
            .chain(file.map(OwnedFd::from))
            .collect(),
        sums,
        generation: place.generation,
    };
    let pager = base.pager(FORKED)?;
    let (outcome, watched) = watch::channel(None);
    let (commands, received) = mpsc::unbounded_channel();
    let holder = Holder {
        base,
        pager,
        criu,
        commands: received,
        tasks: BTreeMap::new(),
        next_id: 0,
        next_fork: FORKED,
        running: None,
        hurry: false,
        deaths: 0,
        tally: Tally::default(),
    };
    tokio::spawn(async move {
        let result = holder.run().await;
        let _ = outcome.send(Some(result));
    });
    Ok(Fill { outcome: watched, commands })
}

/// What each pager begins with.
struct Base {
    options: LazyOptions,
    spawner: Arc<dyn Spawner>,
    cgroup: Cgroup,
    /// The images, the store, `cgroup.kill`, and the checksums.
    descriptors: Vec<OwnedFd>,
    sums: Option<Claim>,
    generation: u64,
}

impl Base {
    fn pager(&self, next_id: u32) -> io::Result<Pager> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        let mut program = Program::new(&self.options.program);
        program
            .arg0("agentcube-pager")
            .args(&self.options.args)
            .env_clear()
            .current_dir("/")
            // It outlives what ends this program's own group.
            .process_group(0)
            .stdin(theirs)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let socket = readiness::watch(ours, Interest::READABLE | Interest::WRITABLE)?;
        let child = self.spawner.spawn(program)?;
        let pager = Pager { socket, pidfd: child.pidfd, exit: Some(child.exit), closed: false };
        let start = Start {
            next_id,
            generation: self.generation,
            window: u64::try_from(self.options.window.as_millis()).unwrap_or(u64::MAX),
            cap: self.options.working_set_bytes,
            sums: self.sums.clone(),
        };
        if let Some(file) = self.descriptors.get(3) {
            // Where the one before has read it, it is at its end.
            rustix::fs::seek(file, SeekFrom::Start(0))?;
        }
        let descriptors: Vec<_> = self.descriptors.iter().map(AsFd::as_fd).collect();
        // The queue is empty, so there is room.
        wire::send(pager.socket.get_ref().as_fd(), &start, &descriptors, SendFlags::empty())?;
        Ok(pager)
    }
}

/// A pager that runs.
struct Pager {
    socket: AsyncFd<OwnedFd>,
    pidfd: OwnedFd,
    /// None once it has ended.
    exit: Option<ExitFuture>,
    /// Nothing more is to be read.
    closed: bool,
}

impl Pager {
    /// Its next message; none when it has ended and all that it said was heard. May be dropped and called again.
    async fn next(&mut self) -> Option<(FromPager, Vec<OwnedFd>)> {
        loop {
            if self.exit.is_none() {
                // What it still said lies in the queue.
                return wire::receive(self.socket.get_ref(), RecvFlags::DONTWAIT).ok().flatten();
            }
            tokio::select! {
                biased;
                ready = self.socket.readable(), if !self.closed => {
                    let Ok(mut ready) = ready else { self.closed = true; continue };
                    let received = ready.try_io(|socket| wire::receive(socket.get_ref(), RecvFlags::DONTWAIT));
                    match received {
                        Ok(Ok(Some(message))) => return Some(message),
                        // What cannot be understood comes from a pager that is not ours to trust.
                        Ok(Ok(None) | Err(_)) => { self.closed = true; self.kill(); }
                        Err(_would_block) => {}
                    }
                }
                () = ended(&mut self.exit) => self.exit = None,
            }
        }
    }

    /// Says something, unless it has ended.
    async fn tell(&mut self, message: &ToPager, descriptors: &[BorrowedFd<'_>]) {
        loop {
            let Ok(mut ready) = self.socket.writable().await else { return };
            let sent = ready.try_io(|socket| {
                wire::send(socket.get_ref().as_fd(), message, descriptors, SendFlags::DONTWAIT)
            });
            match sent {
                // Its end is noticed where its messages are.
                Ok(_) => return,
                Err(_would_block) => {}
            }
        }
    }

    fn kill(&self) {
        if self.exit.is_some() {
            let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        }
    }

    /// Waits for its end, and sees to it.
    async fn end(&mut self, patience: Duration) {
        if tokio::time::timeout(patience, ended(&mut self.exit)).await.is_err() {
            self.kill();
            ended(&mut self.exit).await;
        }
        self.exit = None;
    }
}

/// Completes when the process has ended; at once when that was known.
async fn ended(exit: &mut Option<ExitFuture>) {
    if let Some(exit) = exit {
        let _ = exit.await;
    }
}

/// A process, as far as the holder must know it.
struct Held {
    pid: u32,
    forked: bool,
    /// Children that it forked and that came here.
    forks: usize,
    uffd: OwnedFd,
    journal: Option<OwnedFd>,
}

struct Holder {
    base: Base,
    pager: Pager,
    criu: CriuSocket,
    commands: mpsc::UnboundedReceiver<Command>,
    tasks: BTreeMap<u32, Held>,
    next_id: u32,
    next_fork: u32,
    /// The container runs since then.
    running: Option<Instant>,
    hurry: bool,
    deaths: u32,
    tally: Tally,
}

/// What woke the holder.
enum Wake {
    Pager(Option<(FromPager, Vec<OwnedFd>)>),
    Criu(io::Result<News>),
    Command(Command),
}

impl Holder {
    async fn run(mut self) -> Result<FillReport, FillError> {
        let result = self.hold().await;
        if let Err(error) = &result
            && *error != FillError::Abandoned
        {
            tracing::error!(%error, cgroup = %self.base.cgroup.path().display(), "a fill failed");
            // Before a userfaultfd is closed: what is still missing must not read as zeros.
            let _ = self.base.cgroup.kill();
            let _ = self.base.cgroup.wait_unpopulated(KILL).await;
        }
        if result.is_err() {
            self.pager.kill();
        }
        self.pager.end(END).await;
        result
    }

    async fn hold(&mut self) -> Result<FillReport, FillError> {
        loop {
            let criu_speaks = !self.criu.is_over();
            let wake = tokio::select! {
                biased;
                message = self.pager.next() => Wake::Pager(message),
                news = self.criu.next(), if criu_speaks => Wake::Criu(news),
                Some(command) = self.commands.recv() => Wake::Command(command),
            };
            match wake {
                Wake::Pager(Some((FromPager::Done(tally), _))) => {
                    self.tally = tally;
                    return Ok(self.report());
                }
                Wake::Pager(Some((message, descriptors))) => self.message(message, descriptors).await?,
                Wake::Pager(None) if self.running.is_some() && self.tasks.is_empty() => {
                    return Ok(self.report());
                }
                Wake::Pager(None) => self.succeed().await?,
                Wake::Criu(Ok(News::Task(pid, uffd))) => self.task(pid, uffd).await,
                Wake::Criu(Ok(News::Finished)) => {
                    self.running = Some(Instant::now());
                    self.pager.tell(&ToPager::Finished, &[]).await;
                }
                // The restore fails by itself, and says so to whoever asked for it.
                Wake::Criu(Ok(News::Closed)) => {}
                Wake::Criu(Err(error)) => {
                    return Err(FillError::Failed(format!("CRIU is not understood: {error}")));
                }
                Wake::Command(Command::Hurry) => {
                    self.hurry = true;
                    self.pager.tell(&ToPager::Hurry, &[]).await;
                }
                Wake::Command(Command::Abandon) => return Err(FillError::Abandoned),
            }
        }
    }

    /// A process that CRIU restores.
    async fn task(&mut self, pid: u32, uffd: OwnedFd) {
        let id = self.next_id;
        self.next_id += 1;
        let message = ToPager::Task { id, pid, forks: 0, forked: false };
        self.pager.tell(&message, &[uffd.as_fd()]).await;
        self.tasks.insert(id, Held { pid, forked: false, forks: 0, uffd, journal: None });
    }

    async fn message(&mut self, message: FromPager, descriptors: Vec<OwnedFd>) -> Result<(), FillError> {
        let mut descriptors = descriptors.into_iter();
        match message {
            FromPager::Journal { id } => {
                if let Some(task) = self.tasks.get_mut(&id) {
                    task.journal = descriptors.next();
                }
            }
            FromPager::Forked { id, parent, pid } => {
                let (Some(uffd), journal) = (descriptors.next(), descriptors.next()) else {
                    return Err(FillError::Failed("the pager lost a forked process".to_owned()));
                };
                if let Some(parent) = self.tasks.get_mut(&parent) {
                    parent.forks += 1;
                }
                self.next_fork = self.next_fork.max(id.saturating_add(1));
                self.tasks.insert(id, Held { pid, forked: true, forks: 0, uffd, journal });
            }
            FromPager::Filled { id } => {
                self.tasks.remove(&id);
                self.pager.tell(&ToPager::Released { id }, &[]).await;
            }
            FromPager::Failed { why } => return Err(FillError::Failed(why)),
            FromPager::Done(tally) => self.tally = tally,
        }
        Ok(())
    }

    /// Puts another pager in the place of one that has died.
    async fn succeed(&mut self) -> Result<(), FillError> {
        self.deaths += 1;
        let deaths = self.deaths;
        if deaths > DEATHS {
            return Err(FillError::Died { deaths });
        }
        tracing::warn!(deaths, "a pager died; another takes over");
        let failed = |error| FillError::Failed(format!("another pager cannot be started: {error}"));
        self.pager = self.base.pager(self.next_fork).map_err(failed)?;
        for (id, task) in &self.tasks {
            let Held { pid, forked, forks, .. } = *task;
            let message = ToPager::Task { id: *id, pid, forks, forked };
            let descriptors: Vec<_> =
                std::iter::once(task.uffd.as_fd()).chain(task.journal.as_ref().map(AsFd::as_fd)).collect();
            self.pager.tell(&message, &descriptors).await;
        }
        if self.running.is_some() {
            self.pager.tell(&ToPager::Finished, &[]).await;
        }
        if self.hurry {
            self.pager.tell(&ToPager::Hurry, &[]).await;
        }
        Ok(())
    }

    fn report(&self) -> FillReport {
        let tally = &self.tally;
        FillReport {
            bytes: tally.pages * PAGE,
            zero_bytes: tally.zero_pages * PAGE,
            absent_bytes: tally.absent_pages * PAGE,
            faults: tally.faults,
            first_fault: tally.first_fault.map(Duration::from_micros),
            prefetched_bytes: tally.prefetched * PAGE,
            working_set_bytes: tally.working_set * PAGE,
            resident: self.running.map_or(Duration::ZERO, |running| running.elapsed()),
            deaths: self.deaths,
        }
    }
}
