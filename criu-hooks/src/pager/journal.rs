//! What a successor must know of a userfaultfd: each event that was taken from it, and each page that was put in place.
//!
//! It lies in memory that the pager shares with the shim. The kernel itself writes an event there (`read` goes to the
//! journal), so an event is in the journal from the moment that it is no longer in the kernel: even a pager that is
//! killed between two instructions leaves no doubt about what it had taken.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{MemfdFlags, SealFlags},
    io::Errno,
    mm::{MapFlags, ProtFlags},
};

use super::uffd::{Event, MESSAGE};

const MAGIC: u64 = 0x6c61_6e72_756f_6a31;
/// A page of a userfaultfd's events, in words: the header.
const HEADER: usize = 512;
/// Words of an event.
const SLOT: usize = MESSAGE / 8;
/// How many events are kept. More than that, and there is no successor: the container ends with its pager.
const SLOTS: usize = 16 * 1024;
/// The most pages of one process: 4 TiB.
const MAX_PAGES: u64 = 1 << 30;

/// Words of the header.
mod header {
    pub const MAGIC: usize = 0;
    pub const PAGES: usize = 1;
    /// How many of the events are the parent's, from before the fork.
    pub const INHERITED: usize = 2;
    /// More events came than are kept.
    pub const OVERFLOWED: usize = 3;
}

/// The journal of one userfaultfd.
#[derive(Debug)]
pub(super) struct Journal {
    memory: Memory,
    memfd: OwnedFd,
    /// Events that are kept.
    events: usize,
}

impl Journal {
    /// An empty one for so many lazy pages.
    pub fn create(pages: u64) -> io::Result<Journal> {
        let words = words(pages)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memfd = rustix::fs::memfd_create("agentcube-pager", flags)?;
        rustix::fs::ftruncate(&memfd, words as u64 * 8)?;
        rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW)?;
        let journal = Journal { memory: Memory::map(&memfd, words)?, memfd, events: 0 };
        journal.word(header::PAGES).store(pages, Ordering::Relaxed);
        journal.word(header::MAGIC).store(MAGIC, Ordering::Release);
        Ok(journal)
    }

    /// What another pager has left.
    pub fn open(memfd: OwnedFd) -> io::Result<Journal> {
        let invalid = |why| io::Error::new(io::ErrorKind::InvalidData, why);
        let length = u64::try_from(rustix::fs::fstat(&memfd)?.st_size).unwrap_or_default() / 8;
        if length <= HEADER as u64 || length > words(MAX_PAGES)? as u64 {
            return Err(invalid("a journal of a size that none has"));
        }
        let memory = Memory::map(&memfd, usize::try_from(length).unwrap_or_default())?;
        let mut journal = Journal { memory, memfd, events: 0 };
        let pages = journal.pages();
        if journal.word(header::MAGIC).load(Ordering::Acquire) != MAGIC || words(pages)? as u64 != length {
            return Err(invalid("no journal"));
        }
        if journal.word(header::OVERFLOWED).load(Ordering::Relaxed) != 0 {
            return Err(invalid("more events came than a journal holds"));
        }
        // A fault in the last place may be overwritten: who waits for it asks again.
        journal.events =
            (0..SLOTS).take_while(|slot| journal.event(*slot).is_some_and(Event::is_lasting)).count();
        if journal.inherited() > journal.events {
            return Err(invalid("a journal with fewer events than it began with"));
        }
        Ok(journal)
    }

    /// That of a child that is forked now.
    pub fn fork(&self) -> io::Result<Journal> {
        let mut child = Journal::create(self.pages())?;
        let bitmap = HEADER + SLOTS * SLOT..self.memory.words().len();
        for index in (HEADER..HEADER + self.events * SLOT).chain(bitmap) {
            child.word(index).store(self.word(index).load(Ordering::Relaxed), Ordering::Relaxed);
        }
        child.events = self.events;
        child.word(header::INHERITED).store(self.events as u64, Ordering::Relaxed);
        child
            .word(header::OVERFLOWED)
            .store(self.word(header::OVERFLOWED).load(Ordering::Relaxed), Ordering::Relaxed);
        Ok(child)
    }

    /// Its memory, for whoever may have to hand it to a successor.
    pub fn memfd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }

    /// How many lazy pages the process had.
    pub fn pages(&self) -> u64 {
        self.word(header::PAGES).load(Ordering::Relaxed)
    }

    /// The events that were taken, from the beginning.
    pub fn events(&self) -> impl Iterator<Item = Event> {
        (0..self.events).filter_map(|slot| self.event(slot))
    }

    /// How many forks are in it, not counting those of before it was itself forked.
    pub fn forks(&self) -> usize {
        self.events().skip(self.inherited()).filter(|event| matches!(event, Event::Fork(_))).count()
    }

    /// Takes the next event from the kernel, when there is one.
    pub fn take(&mut self, uffd: BorrowedFd<'_>) -> io::Result<Option<Event>> {
        if self.events == SLOTS {
            self.word(header::OVERFLOWED).store(1, Ordering::Relaxed);
            let mut message = [0; MESSAGE];
            return match rustix::io::read(uffd, &mut message) {
                Ok(_) => event_of(&message),
                Err(Errno::AGAIN | Errno::INTR) => Ok(None),
                Err(error) => Err(error.into()),
            };
        }
        let at = HEADER + self.events * SLOT;
        // So that an event that was never taken is not read here; and so that the page is there.
        self.word(at).store(0, Ordering::Relaxed);
        match self.memory.read(uffd, at) {
            Ok(_) => {}
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let event = event_of(&self.message(self.events))?;
        if event.is_some_and(Event::is_lasting) {
            self.events += 1;
        }
        Ok(event)
    }

    /// Notes that pages of the image are in place, or that nobody can miss them.
    pub fn place(&self, source: u64, pages: u64) {
        for source in source..source + pages {
            if let Some((word, bit)) = self.bit(source) {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// Whether a page of the image is in place.
    pub fn is_placed(&self, source: u64) -> bool {
        self.bit(source).is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    /// How many of the events are the parent's, up to and with the fork.
    pub fn inherited(&self) -> usize {
        usize::try_from(self.word(header::INHERITED).load(Ordering::Relaxed)).unwrap_or(usize::MAX)
    }

    fn bit(&self, source: u64) -> Option<(&AtomicU64, u64)> {
        let index = HEADER + SLOTS * SLOT + usize::try_from(source / 64).ok()?;
        Some((self.memory.words().get(index)?, 1 << (source % 64)))
    }

    fn event(&self, slot: usize) -> Option<Event> {
        Event::decode(&self.message(slot))
    }

    fn message(&self, slot: usize) -> [u8; MESSAGE] {
        let mut message = [0; MESSAGE];
        for index in 0..SLOT {
            let word = self.word(HEADER + slot * SLOT + index).load(Ordering::Relaxed);
            message[index * 8..index * 8 + 8].copy_from_slice(&word.to_le_bytes());
        }
        message
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        &self.memory.words()[index]
    }
}

/// The length of a journal for so many pages, in words.
fn words(pages: u64) -> io::Result<usize> {
    if pages > MAX_PAGES {
        return Err(io::Error::other(format!(
            "{pages} pages of one process are more than can be restored lazily"
        )));
    }
    let bitmap = usize::try_from(pages.div_ceil(64)).map_err(io::Error::other)?;
    Ok(HEADER + SLOTS * SLOT + bitmap)
}

fn event_of(message: &[u8; MESSAGE]) -> io::Result<Option<Event>> {
    let event = Event::decode(message);
    event
        .map(Some)
        .ok_or_else(|| io::Error::other(format!("the kernel tells of an unknown event {}", message[0])))
}

/// Shared memory as words.
#[derive(Debug)]
struct Memory {
    start: *mut AtomicU64,
    words: usize,
}

// SAFETY: it is memory of its own that only the atomic operations on its words and system calls touch.
unsafe impl Send for Memory {}

impl Memory {
    fn map(memfd: &OwnedFd, words: usize) -> io::Result<Memory> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address; the file is sealed against shrinking, or was made by this program.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), words * 8, protection, MapFlags::SHARED, memfd, 0)?
        };
        Ok(Memory { start: start.cast(), words })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, has this many words and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start, self.words) }
    }

    /// Has the kernel write one message at the word `at`.
    fn read(&mut self, descriptor: BorrowedFd<'_>, at: usize) -> rustix::io::Result<usize> {
        assert!(at + SLOT <= self.words);
        // SAFETY: the bytes are inside the mapping, and `&mut self` keeps every view of its words away meanwhile.
        let message = unsafe { std::slice::from_raw_parts_mut(self.start.add(at).cast::<u8>(), MESSAGE) };
        rustix::io::read(descriptor, message)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and no view of it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.words * 8) };
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;

    use super::{super::uffd::tests::message, *};

    const FAULT: u32 = 0x12;
    const FORK: u32 = 0x13;
    const UNMAP: u32 = 0x16;

    /// What stands in for a userfaultfd: a pipe with messages.
    fn kernel(messages: &[(u32, [u64; 3])]) -> OwnedFd {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let mut write = std::fs::File::from(write);
        for (event, words) in messages {
            write.write_all(&message(*event, *words)).unwrap();
        }
        rustix::io::ioctl_fionbio(&read, true).unwrap();
        drop(write);
        read
    }

    fn reopen(journal: &Journal) -> io::Result<Journal> {
        Journal::open(journal.memfd().try_clone_to_owned().unwrap())
    }

    #[test]
    fn a_successor_finds_each_event_and_page() {
        let mut journal = Journal::create(1000).unwrap();
        let kernel = kernel(&[
            (UNMAP, [0x1000, 0x2000, 0]),
            (FAULT, [0, 0x5000, 0]),
            (FORK, [9, 0, 0]),
            (FAULT, [0, 0x6000, 0]),
        ]);
        for _ in 0..4 {
            journal.take(kernel.as_fd()).unwrap();
        }
        journal.place(63, 2);
        journal.place(999, 1);
        let next = reopen(&journal).unwrap();
        let events: Vec<_> = next.events().collect();
        assert_eq!(events, [Event::Unmap { start: 0x1000, end: 0x2000 }, Event::Fork(9)]);
        assert_eq!((next.forks(), next.pages()), (1, 1000));
        let placed: Vec<_> = (0..1000).filter(|source| next.is_placed(*source)).collect();
        assert_eq!(placed, [63, 64, 999]);
    }

    #[test]
    fn a_child_begins_with_what_its_parent_knew() {
        let mut journal = Journal::create(10).unwrap();
        let kernel = kernel(&[(UNMAP, [0x1000, 0x2000, 0]), (FORK, [9, 0, 0]), (FORK, [10, 0, 0])]);
        journal.take(kernel.as_fd()).unwrap();
        journal.take(kernel.as_fd()).unwrap();
        journal.place(3, 1);
        let mut child = journal.fork().unwrap();
        journal.place(4, 1);
        assert_eq!((child.events().count(), child.forks()), (2, 0));
        assert_eq!((child.is_placed(3), child.is_placed(4)), (true, false));
        child.take(kernel.as_fd()).unwrap();
        assert_eq!(reopen(&child).unwrap().forks(), 1);
        assert_eq!(journal.forks(), 1);
    }

    #[test]
    fn a_full_journal_has_no_successor() {
        let mut journal = Journal::create(10).unwrap();
        let (read, write) = rustix::pipe::pipe().unwrap();
        let unmap = message(UNMAP, [0x1000, 0x2000, 0]);
        for _ in 0..=SLOTS {
            rustix::io::write(&write, &unmap).unwrap();
            assert!(journal.take(read.as_fd()).unwrap().is_some());
        }
        assert!(reopen(&journal).unwrap_err().to_string().contains("more events"));
        assert!(reopen(&journal.fork().unwrap()).is_err());
    }

    #[test]
    fn what_is_no_journal_is_refused() {
        for length in [0, 8, 4096, 8 * words(10).unwrap() as u64] {
            let memfd = rustix::fs::memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
            rustix::fs::ftruncate(&memfd, length).unwrap();
            assert!(Journal::open(memfd).is_err(), "{length}");
        }
        assert!(Journal::create(u64::MAX).is_err());
    }
}
