//! One process whose memory is not all there.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
    rc::Rc,
    time::{Duration, Instant},
};

use super::{
    journal::Journal,
    source::{Source, SourceError},
    space::{Run, Space},
    uffd::{self, Event, Outcome},
};
use crate::image::pagemap::PAGE;

/// Why a process cannot get its pages.
#[derive(Debug, thiserror::Error)]
pub(super) enum TaskError {
    /// They cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The kernel refuses.
    #[error("the kernel does not {action} for process {pid}: {source}")]
    Kernel {
        /// "tell of faults", "take pages" and the like.
        action: &'static str,
        /// Its id in the image.
        pid: u32,
        /// Why.
        source: io::Error,
    },
    /// What another pager has left is not enough.
    #[error("what happened to the memory of process {pid} is not known for sure: {why}")]
    Doubt {
        /// Its id in the image.
        pid: u32,
        /// What is not known.
        why: String,
    },
}

/// What came of serving a fault or a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// Something is in place that was not; or nothing was to be done.
    Made,
    /// It must be tried again: something has to be read or to happen first.
    Later,
    /// There is no memory where the pages belong yet.
    Absent,
    /// The container's memory limit is in the way.
    NoRoom,
    /// The process has ended or runs another program.
    Gone,
}

/// How long nothing has worked.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    /// The first attempt that failed, and the last.
    failed: Option<(Instant, Instant)>,
}

impl Trouble {
    /// Attempts that are so far apart have nothing to do with each other: nothing was due in between.
    const GAP: Duration = Duration::from_secs(2);

    /// Something has worked.
    pub fn end(&mut self) {
        self.failed = None;
    }

    /// An attempt has failed; whether attempts have failed for longer than `patience`.
    pub fn lasts(&mut self, now: Instant, patience: Duration) -> bool {
        let before = self.failed.filter(|(_, last)| now.duration_since(*last) < Self::GAP);
        let first = before.map_or(now, |(first, _)| first);
        self.failed = Some((first, now));
        now.duration_since(first) > patience
    }
}

/// A process and its userfaultfd.
pub(super) struct Task {
    pub id: u32,
    pub pid: u32,
    /// Forked after the restore.
    pub forked: bool,
    uffd: OwnedFd,
    journal: Journal,
    source: Rc<Source>,
    space: Space,
    /// Where the next piece begins.
    cursor: u64,
    /// Faults that could not be served yet.
    pub waiting: VecDeque<u64>,
    /// The shim was told that nothing is left to do.
    pub told: bool,
    /// Pages could not be put in place.
    pub trouble: Trouble,
    /// Its memory is known to be registered: the kernel has told of it, or has taken a page.
    registered: bool,
    runs: Vec<Run>,
}

/// What counts.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub pages: u64,
    pub zero_pages: u64,
    /// Pages that nobody can miss, for there is no memory any more where they belonged.
    pub absent_pages: u64,
}

impl Task {
    /// A process that the restore has just made.
    pub fn new(id: u32, pid: u32, uffd: OwnedFd, source: Rc<Source>) -> Result<Task, TaskError> {
        let journal = Journal::create(source.pages()).map_err(|source| TaskError::Kernel {
            action: "give a journal",
            pid,
            source,
        })?;
        Ok(Task::with(id, pid, false, uffd, journal, source))
    }

    /// A process that another pager had before; `forks` of its children are known.
    pub fn resume(
        (id, pid, forked, forks): (u32, u32, bool, usize),
        uffd: OwnedFd,
        journal: OwnedFd,
        source: Rc<Source>,
    ) -> Result<Task, TaskError> {
        let doubt = |why: String| TaskError::Doubt { pid, why };
        let journal = Journal::open(journal).map_err(|error| doubt(error.to_string()))?;
        if journal.pages() != source.pages() {
            return Err(doubt("the journal is another's".to_owned()));
        }
        if journal.forks() != forks {
            return Err(doubt("a child that it forked was lost".to_owned()));
        }
        let mut task = Task::with(id, pid, forked, uffd, journal, source);
        let inherited = task.journal.inherited();
        for (number, event) in task.journal.events().enumerate() {
            if forked && number == inherited {
                task.space = task.space.forked();
            }
            task.space.apply(event);
        }
        if forked && task.journal.events().count() == inherited {
            task.space = task.space.forked();
        }
        let journal = &task.journal;
        task.space.discard(|source| journal.is_placed(source));
        // Whoever waited for the other pager asks again.
        uffd::wake_all(task.uffd.as_fd());
        Ok(task)
    }

    fn with(id: u32, pid: u32, forked: bool, uffd: OwnedFd, journal: Journal, source: Rc<Source>) -> Task {
        let space = source.space();
        let waiting = VecDeque::new();
        Task {
            id,
            pid,
            forked,
            // What is forked has its memory from the beginning.
            registered: forked || journal.events().next().is_some(),
            uffd,
            journal,
            source,
            space,
            cursor: 0,
            waiting,
            told: false,
            trouble: Trouble::default(),
            runs: Vec::new(),
        }
    }

    /// The child that this process has just forked, with the number of its userfaultfd in this process.
    pub fn fork(&self, id: u32, number: i32) -> Result<Task, TaskError> {
        // SAFETY: the kernel has just made this descriptor for the reader of the event, and nobody else knows of it.
        let uffd = unsafe { OwnedFd::from_raw_fd(number) };
        let pid = self.pid;
        let failed = |source| TaskError::Kernel { action: "give a journal", pid, source };
        let journal = self.journal.fork().map_err(failed)?;
        let mut child = Task::with(id, pid, true, uffd, journal, Rc::clone(&self.source));
        child.space = self.space.forked();
        Ok(child)
    }

    pub fn uffd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    /// Its journal's memory.
    pub fn journal(&self) -> BorrowedFd<'_> {
        self.journal.memfd()
    }

    /// How many pages are still missing.
    pub fn missing(&self) -> u64 {
        self.space.pages()
    }

    /// Whether the page at `address` is missing.
    pub fn is_missing(&self, address: u64) -> bool {
        self.space.at(address).is_some()
    }

    /// Whether it has ended before its pages came.
    pub fn is_gone(&self) -> bool {
        self.space.first().is_some_and(|address| uffd::is_gone(self.uffd.as_fd(), address))
    }

    /// Nothing is missing any more, or nobody misses it.
    pub fn abandon(&mut self) {
        self.space = Space::default();
        self.waiting.clear();
    }

    /// Takes the next event, and heeds it.
    pub fn event(&mut self) -> Result<Option<Event>, TaskError> {
        let event =
            self.journal.take(self.uffd.as_fd()).map_err(|source| self.kernel("tell of faults", source))?;
        if let Some(event) = event {
            self.registered = true;
            self.space.apply(event);
        }
        Ok(event)
    }

    /// Gives the page at `address` to whoever waits for it.
    pub fn serve(
        &mut self,
        address: u64,
        buffer: &mut [u8],
        counts: &mut Counts,
    ) -> Result<Progress, TaskError> {
        let outcome = if let Some(source) = self.space.at(address) {
            let page = &mut buffer[..usize::try_from(PAGE).unwrap_or_default()];
            self.source.read(source, page, false)?;
            self.cursor = address + PAGE;
            self.put(Run { address, source, pages: 1 }, page, counts)?
        } else {
            uffd::zero(self.uffd.as_fd(), address, 1).map_err(|source| self.kernel("take pages", source))?
        };
        Ok(match outcome {
            Outcome::Placed(_) => Progress::Made,
            // It is there, or there is nothing to be had: then the process shall see for itself.
            Outcome::Present | Outcome::NoMemory => {
                uffd::wake(self.uffd.as_fd(), address, 1);
                Progress::Made
            }
            Outcome::Changing => Progress::Later,
            Outcome::NoRoom => Progress::NoRoom,
            Outcome::Gone => Progress::Gone,
        })
    }

    /// Puts the next missing pages in place, as many as `buffer` holds; where it stopped it goes on the next time.
    pub fn fill(&mut self, buffer: &mut [u8], counts: &mut Counts) -> Result<Progress, TaskError> {
        if self.space.at(self.cursor).is_none() && self.next_above(self.cursor).is_none() {
            self.cursor = 0;
        }
        let (cursor, mut runs) = (self.cursor, std::mem::take(&mut self.runs));
        self.space.gather(cursor, buffer.len() as u64 / PAGE, &mut runs);
        let progress = self.fill_runs(&runs, buffer, counts);
        self.runs = runs;
        progress
    }

    /// Puts the missing pages of `pages` pages from `address` on in place.
    pub fn prefetch(
        &mut self,
        (address, pages): (u64, u64),
        buffer: &mut [u8],
        counts: &mut Counts,
    ) -> Result<Progress, TaskError> {
        let end = address + pages * PAGE;
        let mut at = address;
        while at < end {
            let mut runs = Vec::new();
            self.space.gather(at, (end - at) / PAGE, &mut runs);
            runs.retain_mut(|run| {
                run.pages = run.pages.min(end.saturating_sub(run.address) / PAGE);
                run.pages > 0
            });
            let Some(last) = runs.last() else { break };
            at = last.address + last.pages * PAGE;
            let progress = self.fill_runs(&runs, buffer, counts)?;
            if progress != Progress::Made {
                return Ok(progress);
            }
        }
        Ok(Progress::Made)
    }

    fn next_above(&self, address: u64) -> Option<Run> {
        let mut found = Vec::new();
        self.space.gather(address, 1, &mut found);
        found.first().copied()
    }

    fn fill_runs(
        &mut self,
        runs: &[Run],
        buffer: &mut [u8],
        counts: &mut Counts,
    ) -> Result<Progress, TaskError> {
        let Some(first) = runs.first() else { return Ok(Progress::Made) };
        let pages: u64 = runs.iter().map(|run| run.pages).sum();
        let bytes = &mut buffer[..usize::try_from(pages * PAGE).unwrap_or_default()];
        if !self.source.read(first.source, bytes, true)? {
            // From the disk in small pieces only: faults wait for it.
            let least = usize::try_from(super::working_set::BLOCK).unwrap_or_default().min(bytes.len());
            self.source.read(first.source, &mut bytes[..least], false)?;
            let mut room = least as u64 / PAGE;
            let mut some: Vec<Run> = runs.to_vec();
            some.retain_mut(|run| {
                run.pages = run.pages.min(room);
                room -= run.pages;
                run.pages > 0
            });
            return self.put_runs(&some, &bytes[..least], counts);
        }
        self.put_runs(runs, bytes, counts)
    }

    fn put_runs(
        &mut self,
        runs: &[Run],
        mut bytes: &[u8],
        counts: &mut Counts,
    ) -> Result<Progress, TaskError> {
        let mut result = Progress::Absent;
        for run in runs {
            let (of_run, rest) = bytes.split_at(usize::try_from(run.pages * PAGE).unwrap_or_default());
            bytes = rest;
            match self.put_run(*run, of_run, counts)? {
                Progress::Made => result = Progress::Made,
                Progress::Later if result == Progress::Absent => result = Progress::Later,
                Progress::Later | Progress::Absent => {}
                stop => return Ok(stop),
            }
        }
        Ok(result)
    }

    /// Puts one run in place as far as that goes.
    fn put_run(
        &mut self,
        mut run: Run,
        mut bytes: &[u8],
        counts: &mut Counts,
    ) -> Result<Progress, TaskError> {
        let mut result = Progress::Absent;
        while run.pages > 0 {
            let mut part = run;
            let placed = loop {
                let bytes = &bytes[..usize::try_from(part.pages * PAGE).unwrap_or_default()];
                match self.put(part, bytes, counts)? {
                    Outcome::Placed(pages) => break pages,
                    Outcome::Present => break 1,
                    // Areas may have been split: try less, and pass over what is not there.
                    Outcome::NoMemory if part.pages > 1 => part.pages /= 2,
                    Outcome::NoMemory if !self.registered => break 0,
                    Outcome::NoMemory => match self.put(part, bytes, counts)? {
                        Outcome::NoMemory => {
                            self.drop_page(part, counts);
                            break 1;
                        }
                        // An event tells where it is.
                        _ => return Ok(Progress::Later),
                    },
                    Outcome::Changing if result == Progress::Made => return Ok(result),
                    Outcome::Changing => return Ok(Progress::Later),
                    Outcome::NoRoom => return Ok(Progress::NoRoom),
                    Outcome::Gone => return Ok(Progress::Gone),
                }
            };
            if placed > 0 {
                result = Progress::Made;
            }
            let passed = placed.max(1);
            run = Run {
                address: run.address + passed * PAGE,
                source: run.source + passed,
                pages: run.pages - passed,
            };
            bytes = &bytes[usize::try_from(passed * PAGE).unwrap_or_default()..];
            self.cursor = run.address;
        }
        Ok(result)
    }

    /// Puts pages in place, and takes note of it. Pages of zeros are left to the kernel, which shares one among all.
    fn put(&mut self, run: Run, bytes: &[u8], counts: &mut Counts) -> Result<Outcome, TaskError> {
        let zeros = leading(bytes, true);
        let outcome = if zeros > 0 {
            uffd::zero(self.uffd.as_fd(), run.address, zeros)
        } else {
            let length = usize::try_from(leading(bytes, false) * PAGE).unwrap_or_default();
            uffd::copy(self.uffd.as_fd(), run.address, &bytes[..length])
        };
        let outcome = outcome.map_err(|source| self.kernel("take pages", source))?;
        let placed = match outcome {
            Outcome::Placed(pages) => pages,
            Outcome::Present => 1,
            _ => return Ok(outcome),
        };
        self.registered = true;
        self.journal.place(run.source, placed);
        self.space.cut(run.address, run.address + placed * PAGE);
        if outcome != Outcome::Present {
            counts.pages += placed;
            counts.zero_pages += if zeros > 0 { placed } else { 0 };
        }
        Ok(outcome)
    }

    /// Forgets a page, since the kernel has said twice, and no event was read in between, that there is no registered
    /// memory at its address. A child has none where its parent had asked for that by `MADV_DONTFORK`.
    ///
    /// Once would not do. A thread that moves or unmaps memory counts itself in before it changes anything, and out when
    /// its event was read; while the count is not zero the kernel answers each request with `EAGAIN`. But it looks at the
    /// count first and for the memory then, so the first answer may be due to a change that came in between. Such a
    /// change is still counted at the second request, which then gets `EAGAIN`.
    fn drop_page(&mut self, page: Run, counts: &mut Counts) {
        self.journal.place(page.source, page.pages);
        self.space.cut(page.address, page.address + page.pages * PAGE);
        counts.absent_pages += page.pages;
    }

    fn kernel(&self, action: &'static str, source: io::Error) -> TaskError {
        TaskError::Kernel { action, pid: self.pid, source }
    }
}

/// How many pages at the beginning are, or are not, all zeros.
fn leading(bytes: &[u8], zeros: bool) -> u64 {
    let size = usize::try_from(PAGE).unwrap_or_default();
    bytes.chunks_exact(size).take_while(|page| is_zero(page) == zeros).count() as u64
}

fn is_zero(page: &[u8]) -> bool {
    // Most pages show it at once.
    page[..16] == [0; 16] && page.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_fails_all_the_time_is_given_up() {
        let (start, patience) = (Instant::now(), Duration::from_secs(10));
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut trouble = Trouble::default();
        assert!((0..=10).all(|second| !trouble.lasts(after(second), patience)));
        assert!(trouble.lasts(after(11), patience));
        trouble.end();
        assert!(!trouble.lasts(after(12), patience));
        // Nothing was tried meanwhile.
        assert!(!trouble.lasts(after(60), patience));
        assert!(!trouble.lasts(after(61), patience));
    }

    #[test]
    fn pages_of_zeros_are_told_from_others() {
        let mut bytes = vec![0; 4096 * 5];
        bytes[4096 * 2 + 4095] = 1;
        bytes[4096 * 3] = 1;
        assert_eq!((leading(&bytes, true), leading(&bytes, false)), (2, 0));
        let rest = &bytes[4096 * 2..];
        assert_eq!((leading(rest, true), leading(rest, false)), (0, 2));
    }
}
