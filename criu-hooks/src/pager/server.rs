//! The pager itself: a process that serves faults, and fills the memory of a woken container meanwhile.
//!
//! One thread, no runtime. Faults go first; in between the working set of earlier wakes is put in place, then all the
//! rest, in small pieces while faults come and in large ones when they do not.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    process::ExitCode,
    rc::Rc,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{RecvFlags, SendFlags},
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{CapabilitySet, CapabilitySets},
};

use super::{
    source::Source,
    task::{Counts, Progress, Task, TaskError},
    uffd::Event,
    wire::{self, FromPager, Start, Tally, ToPager},
    working_set::{BLOCK, Recorder, WorkingSet},
};
use crate::image::{self, PageSums, pagemap::PAGE};

/// The largest piece that is filled at once.
const LARGE: usize = 1 << 20;
/// The piece while faults come: what a fault may have to wait for.
const SMALL: usize = 64 << 10;
/// Faults have stopped for now when none came for so long.
const CALM: Duration = Duration::from_millis(2);
/// How long to wait before the next try where something has to happen first.
const RETRY: Duration = Duration::from_micros(100);
/// How long a process may be without memory for its pages, or its container without room for them.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the disk may fail to read a page.
const DISK_PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait before it is asked again.
const DISK_RETRY: Duration = Duration::from_millis(20);
/// How long the end of a restore may stay unknown when the shim has died: CRIU, its child, has then ended too.
const ORPHANED: Duration = Duration::from_secs(1);
/// How often to look whether forked processes have ended: each costs two descriptors here and two in the shim.
const ROLL_CALL: Duration = Duration::from_millis(20);
/// Events of one process before those of another are looked at.
const TURN: usize = 64;

/// Why a pager goes no further.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Task(#[from] TaskError),
    #[error(transparent)]
    Sums(image::Error),
    #[error("the pager cannot go on: {0}")]
    Io(#[from] io::Error),
    #[error("the shim speaks another language: {0}")]
    Protocol(&'static str),
    #[error("process {pid} has had no memory for {pages} of its pages for {} s", PATIENCE.as_secs())]
    Absent { pid: u32, pages: u64 },
    #[error("the container's memory limit has left no room for {pages} pages for {} s", PATIENCE.as_secs())]
    NoRoom { pages: u64 },
}

/// Runs a pager whose shim is at the other end of `socket`. Returns when nothing is left to do.
pub fn run(socket: OwnedFd) -> ExitCode {
    let _ = rustix::thread::set_name(c"agentcube-pager");
    // Two descriptors for each process that is forked while memory comes.
    let files = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files });
    match Server::start(socket) {
        Ok(mut server) => match server.serve() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                server.give_up(&error);
                ExitCode::FAILURE
            }
        },
        // The shim sees the end of the socket and has every descriptor itself.
        Err(_) => ExitCode::FAILURE,
    }
}

struct Server {
    /// None once the shim is gone.
    shim: Option<OwnedFd>,
    images: OwnedFd,
    /// Where the working set is kept.
    store: OwnedFd,
    kill: File,
    /// None when the agent was woken before they were there.
    sums: Option<Rc<PageSums>>,
    generation: u64,
    window: Duration,
    cap: u64,
    next_id: u32,
    tasks: Vec<Task>,
    /// The container runs since then.
    running: Option<Instant>,
    orphaned: Option<Instant>,
    hurry: bool,
    last_fault: Option<Instant>,
    piece: usize,
    buffer: Vec<u8>,
    /// Whose turn it is to be filled.
    turn: usize,
    /// A page could not be read just now.
    unreadable: bool,
    /// When it was last looked which forked processes have ended.
    called: Instant,
    wanted: VecDeque<(u32, u64)>,
    round: u64,
    recorder: Recorder,
    counts: Counts,
    tally: Tally,
}

impl Server {
    fn start(socket: OwnedFd) -> Result<Server, ServeError> {
        let first = wire::receive::<Start>(&socket, RecvFlags::empty())?;
        let Some((Start { next_id, generation, window, cap, sums }, mut descriptors)) = first else {
            return Err(ServeError::Protocol("no beginning"));
        };
        let sums_file = (descriptors.len() == 4).then(|| descriptors.pop()).flatten();
        let [images, store, kill] = <[OwnedFd; 3]>::try_from(descriptors)
            .map_err(|_| ServeError::Protocol("a beginning without directories"))?;
        let mut kill = File::from(kill);
        let sums = match (sums, sums_file) {
            (Some(claim), Some(file)) => match claim.read(file.into()) {
                Ok(sums) => Some(Rc::new(sums)),
                Err(error) => {
                    end(&mut kill, Some(&socket), &error);
                    return Err(ServeError::Sums(error));
                }
            },
            _ => None,
        };
        drop_privileges();
        Ok(Server {
            shim: Some(socket),
            images,
            store,
            kill,
            sums,
            generation,
            window: Duration::from_millis(window),
            cap,
            next_id,
            tasks: Vec::new(),
            running: None,
            orphaned: None,
            hurry: false,
            last_fault: None,
            piece: SMALL,
            buffer: vec![0; LARGE],
            turn: 0,
            unreadable: false,
            called: Instant::now(),
            wanted: VecDeque::new(),
            round: 0,
            recorder: Recorder::default(),
            counts: Counts::default(),
            tally: Tally::default(),
        })
    }

    fn serve(&mut self) -> Result<(), ServeError> {
        let mut pause = None;
        loop {
            self.wait(pause)?;
            self.messages()?;
            let served = self.events()?;
            let waiting = self.retry()?;
            let filled = if served { Progress::Made } else { self.work()? };
            self.call_the_roll();
            self.release()?;
            if self.running.is_some() && self.tasks.is_empty() {
                return self.finish();
            }
            let disk = std::mem::take(&mut self.unreadable);
            let busy = served || (self.has_work() && filled == Progress::Made);
            pause = if busy {
                Some(Duration::ZERO)
            } else if waiting || self.has_work() {
                Some(if disk { DISK_RETRY } else { RETRY })
            } else {
                self.orphaned.filter(|_| self.running.is_none()).map(|_| ORPHANED)
            };
        }
    }

    /// Waits until there is something to do, and takes note of what.
    fn wait(&self, pause: Option<Duration>) -> Result<(), ServeError> {
        let mut watched: Vec<PollFd<'_>> = Vec::with_capacity(self.tasks.len() + 1);
        watched.extend(self.tasks.iter().map(|task| PollFd::from_borrowed_fd(task.uffd(), PollFlags::IN)));
        watched.extend(self.shim.iter().map(|shim| PollFd::new(shim, PollFlags::IN)));
        let pause = pause.map(|pause| Timespec {
            tv_sec: i64::try_from(pause.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(pause.subsec_nanos()),
        });
        match poll(&mut watched, pause.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    fn messages(&mut self) -> Result<(), ServeError> {
        while let Some(shim) = &self.shim {
            match wire::receive::<ToPager>(shim, RecvFlags::DONTWAIT) {
                Ok(Some((message, descriptors))) => self.message(message, descriptors)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Ok(None) => self.orphan(),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => self.orphan(),
                Err(error) => return Err(error.into()),
            }
        }
        if self.running.is_none() && self.orphaned.is_some_and(|since| since.elapsed() >= ORPHANED) {
            self.begin();
        }
        Ok(())
    }

    fn message(&mut self, message: ToPager, descriptors: Vec<OwnedFd>) -> Result<(), ServeError> {
        match message {
            ToPager::Task { id, pid, forks, forked } => {
                let mut descriptors = descriptors.into_iter();
                let uffd =
                    descriptors.next().ok_or(ServeError::Protocol("a process without its userfaultfd"))?;
                let source = Rc::new(
                    Source::open(self.images.as_fd(), pid, self.sums.clone()).map_err(TaskError::from)?,
                );
                let task = match descriptors.next() {
                    Some(journal) => Task::resume((id, pid, forked, forks), uffd, journal, source)?,
                    None if forked || forks > 0 => {
                        let why = "its journal was lost".to_owned();
                        return Err(TaskError::Doubt { pid, why }.into());
                    }
                    None => {
                        let task = Task::new(id, pid, uffd, source)?;
                        self.tell(&FromPager::Journal { id }, &[task.journal()])?;
                        task
                    }
                };
                self.tasks.push(task);
            }
            ToPager::Finished => self.begin(),
            ToPager::Hurry => self.hurry = true,
            ToPager::Released { id } => self.tasks.retain(|task| task.id != id),
        }
        Ok(())
    }

    /// The shim has died. What is here is finished without it.
    fn orphan(&mut self) {
        self.shim = None;
        self.orphaned.get_or_insert_with(Instant::now);
    }

    /// The container runs.
    fn begin(&mut self) {
        self.running.get_or_insert_with(Instant::now);
        if let Some(set) = WorkingSet::load(self.store.as_fd()) {
            self.round = set.round.wrapping_add(1);
            let round = self.round;
            self.wanted =
                set.blocks().filter(|(_, block)| WorkingSet::is_prefetched(*block, round)).collect();
        }
    }

    /// Tells the shim, when there is one.
    fn tell(&mut self, message: &FromPager, descriptors: &[BorrowedFd<'_>]) -> Result<(), ServeError> {
        let Some(shim) = &self.shim else { return Ok(()) };
        match wire::send(shim.as_fd(), message, descriptors, SendFlags::empty()) {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) =>
            {
                self.orphan();
                Ok(())
            }
            sent => Ok(sent?),
        }
    }

    /// Takes what the kernel tells and serves faults; says whether there was any.
    fn events(&mut self) -> Result<bool, ServeError> {
        let mut any = false;
        for index in 0..self.tasks.len() {
            for _ in 0..TURN {
                match self.tasks[index].event()? {
                    None => break,
                    Some(Event::Fault(address)) => {
                        any = true;
                        self.fault(index, address)?;
                    }
                    Some(Event::Fork(number)) => self.fork(index, number)?,
                    Some(Event::Remap { .. } | Event::Remove { .. } | Event::Unmap { .. }) => {}
                }
            }
        }
        Ok(any)
    }

    fn fork(&mut self, parent: usize, number: i32) -> Result<(), ServeError> {
        let id = self.next_id;
        self.next_id += 1;
        let child = self.tasks[parent].fork(id, number)?;
        let message = FromPager::Forked { id, parent: self.tasks[parent].id, pid: child.pid };
        self.tell(&message, &[child.uffd(), child.journal()])?;
        self.tasks.push(child);
        Ok(())
    }

    fn fault(&mut self, index: usize, address: u64) -> Result<(), ServeError> {
        let now = Instant::now();
        self.tally.faults += 1;
        self.last_fault = Some(now);
        self.piece = SMALL;
        if let Some(running) = self.running {
            let micros = u64::try_from(now.duration_since(running).as_micros()).unwrap_or(u64::MAX);
            self.tally.first_fault.get_or_insert(micros);
        }
        let task = &self.tasks[index];
        let early = self.running.is_none_or(|running| now.duration_since(running) < self.window);
        if early && !task.forked && task.is_missing(address) {
            self.recorder.missed(task.pid, address);
        }
        self.serve_fault(index, address)?;
        Ok(())
    }

    fn serve_fault(&mut self, index: usize, address: u64) -> Result<Progress, ServeError> {
        let served = self.tasks[index].serve(address, &mut self.buffer, &mut self.counts);
        let progress = self.bear(index, served)?;
        if matches!(progress, Progress::Later | Progress::Absent | Progress::NoRoom) {
            self.tasks[index].waiting.push_back(address);
        }
        Ok(progress)
    }

    /// Tries the faults again that could not be served; says whether some still cannot.
    fn retry(&mut self) -> Result<bool, ServeError> {
        let mut waiting = false;
        for index in 0..self.tasks.len() {
            for _ in 0..self.tasks[index].waiting.len() {
                let Some(address) = self.tasks[index].waiting.pop_front() else { break };
                self.serve_fault(index, address)?;
            }
            waiting |= !self.tasks[index].waiting.is_empty();
        }
        Ok(waiting)
    }

    fn has_work(&self) -> bool {
        self.running.is_some() && self.tasks.iter().any(|task| task.missing() > 0)
    }

    /// Puts one piece in place.
    fn work(&mut self) -> Result<Progress, ServeError> {
        if !self.has_work() {
            self.wanted.clear();
            return Ok(Progress::Later);
        }
        if let Some((pid, block)) = self.wanted.pop_front() {
            let index = self.tasks.iter().position(|task| task.pid == pid && !task.forked);
            let Some(index) = index else { return Ok(Progress::Made) };
            let pages = (block * BLOCK, BLOCK / PAGE);
            let before = self.counts.pages;
            let put = self.tasks[index].prefetch(pages, &mut self.buffer, &mut self.counts);
            let placed = self.counts.pages - before;
            if placed > 0 {
                self.recorder.prefetched(pid, block);
                self.tally.prefetched += placed;
            }
            return self.bear(index, put);
        }
        let calm = self.hurry || self.last_fault.is_none_or(|last| last.elapsed() > CALM);
        self.piece = if calm { (self.piece * 2).min(LARGE) } else { SMALL };
        // Those that were restored first: what is forked often ends soon.
        let forked = self.tasks.iter().all(|task| task.forked || task.missing() == 0);
        for step in 1..=self.tasks.len() {
            let index = (self.turn + step) % self.tasks.len();
            let task = &mut self.tasks[index];
            if task.missing() == 0 || task.forked != forked {
                continue;
            }
            self.turn = index;
            let filled = task.fill(&mut self.buffer[..self.piece], &mut self.counts);
            return self.bear(index, filled);
        }
        Ok(Progress::Later)
    }

    /// Lets go of forked processes that have ended: their turn to be filled may be far away.
    fn call_the_roll(&mut self) {
        if self.called.elapsed() < ROLL_CALL {
            return;
        }
        self.called = Instant::now();
        for task in self.tasks.iter_mut().filter(|task| task.forked) {
            if task.is_gone() {
                task.abandon();
            }
        }
    }

    /// Gives up on what does not come about in a reasonable time.
    fn bear(&mut self, index: usize, result: Result<Progress, TaskError>) -> Result<Progress, ServeError> {
        let (task, now) = (&mut self.tasks[index], Instant::now());
        let progress = match result {
            Err(TaskError::Source(error)) if error.may_pass() => {
                if task.trouble.lasts(now, DISK_PATIENCE) {
                    return Err(TaskError::Source(error).into());
                }
                self.unreadable = true;
                return Ok(Progress::Later);
            }
            result => result?,
        };
        match progress {
            Progress::Made => task.trouble.end(),
            Progress::Later => {}
            Progress::Gone => task.abandon(),
            Progress::Absent | Progress::NoRoom if !task.trouble.lasts(now, PATIENCE) => {}
            Progress::Absent => {
                return Err(ServeError::Absent { pid: task.pid, pages: task.missing() });
            }
            Progress::NoRoom => return Err(ServeError::NoRoom { pages: task.missing() }),
        }
        Ok(progress)
    }

    /// Lets go of processes that miss nothing any more. The shim first: until it has, faults come here.
    fn release(&mut self) -> Result<(), ServeError> {
        if self.running.is_none() {
            return Ok(());
        }
        for index in 0..self.tasks.len() {
            let task = &mut self.tasks[index];
            if task.missing() == 0 && task.waiting.is_empty() && !task.told {
                task.told = true;
                let id = task.id;
                self.tell(&FromPager::Filled { id }, &[])?;
            }
        }
        if self.shim.is_none() {
            self.tasks.retain(|task| !task.told);
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), ServeError> {
        let set = std::mem::take(&mut self.recorder).finish(self.generation, self.round, self.cap);
        self.tally.working_set = set.blocks().count() as u64 * (BLOCK / PAGE);
        // It costs the next wake some time, no more.
        let _ = set.save(self.store.as_fd());
        let Counts { pages, zero_pages, absent_pages } = self.counts;
        let tally = Tally { pages, zero_pages, absent_pages, ..self.tally.clone() };
        self.tell(&FromPager::Done(tally), &[])
    }

    /// Ends the container before its memory becomes wrong, which is when the last userfaultfd is closed.
    fn give_up(&mut self, error: &ServeError) {
        end(&mut self.kill, self.shim.as_ref(), error);
    }
}

/// Kills the container, and tells the shim why.
fn end(kill: &mut File, shim: Option<&OwnedFd>, error: &impl std::fmt::Display) {
    let _ = kill.write_all(b"1");
    if let Some(shim) = shim {
        let _ =
            wire::send(shim.as_fd(), &FromPager::Failed { why: error.to_string() }, &[], SendFlags::empty());
    }
}

/// It needs none: its rights are in its descriptors.
fn drop_privileges() {
    let none = CapabilitySet::empty();
    let _ = rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    );
    let _ = rustix::thread::set_no_new_privs(true);
}
