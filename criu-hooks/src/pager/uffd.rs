//! A userfaultfd as its holder sees it: events come, pages go.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use linux_raw_sys::{
    general::{
        UFFD_API, UFFD_EVENT_FORK, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE,
        UFFD_EVENT_UNMAP, UFFD_FEATURE_EVENT_FORK, UFFD_FEATURE_EVENT_REMAP, UFFD_FEATURE_EVENT_REMOVE,
        UFFD_FEATURE_EVENT_UNMAP, uffdio_api, uffdio_continue, uffdio_copy, uffdio_range, uffdio_zeropage,
    },
    ioctl::{UFFDIO_API, UFFDIO_CONTINUE, UFFDIO_COPY, UFFDIO_WAKE, UFFDIO_ZEROPAGE},
};
use rustix::{
    io::Errno,
    ioctl::{Opcode, Updater},
    mm::UserfaultfdFlags,
};

use crate::image::pagemap::PAGE;

/// The size of a message of the kernel.
pub(super) const MESSAGE: usize = 32;

/// What CRIU asks of the kernel for a lazy restore.
const FEATURES: u32 =
    UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP;

/// The addresses that a whole address space spans, for wakes: the kernel refuses those outside it.
const FIRST: u64 = 0x1_0000;
const LAST: u64 = 0x7fff_ffff_f000;

/// What the kernel tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// Somebody waits for the page at this address.
    Fault(u64),
    /// The process has forked, and the child's userfaultfd has this number in the process that read the event.
    Fork(i32),
    /// Pages have moved.
    Remap { from: u64, to: u64, bytes: u64 },
    /// Pages are empty from now on (`MADV_DONTNEED`).
    Remove { start: u64, end: u64 },
    /// Memory is gone (`munmap`, or what `mremap` has left or replaced).
    Unmap { start: u64, end: u64 },
}

impl Event {
    /// Whether it changes what is where, and so must not be forgotten.
    pub fn is_lasting(self) -> bool {
        !matches!(self, Event::Fault(_))
    }

    /// Reads a message; none when it is none.
    pub fn decode(message: &[u8; MESSAGE]) -> Option<Event> {
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&message[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        match u32::from(message[0]) {
            UFFD_EVENT_PAGEFAULT => Some(Event::Fault(word(16) / PAGE * PAGE)),
            UFFD_EVENT_FORK => i32::try_from(word(8) & 0xffff_ffff).ok().map(Event::Fork),
            UFFD_EVENT_REMAP => Some(Event::Remap { from: word(8), to: word(16), bytes: word(24) }),
            UFFD_EVENT_REMOVE => Some(Event::Remove { start: word(8), end: word(16) }),
            UFFD_EVENT_UNMAP => Some(Event::Unmap { start: word(8), end: word(16) }),
            _ => None,
        }
    }
}

/// How an attempt to put pages in place went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// So many pages are in place, at least one.
    Placed(u64),
    /// The first page was there already.
    Present,
    /// An event waits to be read, or was only just read: the addresses may be others than thought.
    Changing,
    /// There is no memory at the first address, or the range reaches over the end of an area.
    NoMemory,
    /// The container's memory limit does not allow it now.
    NoRoom,
    /// The process has ended, or runs another program.
    Gone,
}

/// Copies `pages`, whole pages, to `address`.
pub(super) fn copy(uffd: BorrowedFd<'_>, address: u64, pages: &[u8]) -> io::Result<Outcome> {
    let mut request =
        uffdio_copy { dst: address, src: pages.as_ptr() as u64, len: pages.len() as u64, mode: 0, copy: 0 };
    let result = update::<UFFDIO_COPY, _>(uffd, &mut request);
    outcome(result, request.len, request.copy)
}

/// Puts pages of zeros to `address`.
pub(super) fn zero(uffd: BorrowedFd<'_>, address: u64, pages: u64) -> io::Result<Outcome> {
    let range = uffdio_range { start: address, len: pages * PAGE };
    let mut request = uffdio_zeropage { range, mode: 0, zeropage: 0 };
    let result = update::<UFFDIO_ZEROPAGE, _>(uffd, &mut request);
    outcome(result, request.range.len, request.zeropage)
}

/// Whether the process has ended, or runs another program. Changes nothing: private memory has no pages for which it
/// could go on.
pub(super) fn is_gone(uffd: BorrowedFd<'_>, address: u64) -> bool {
    let range = uffdio_range { start: address, len: PAGE };
    let mut request = uffdio_continue { range, mode: 0, mapped: 0 };
    update::<UFFDIO_CONTINUE, _>(uffd, &mut request) == Err(Errno::SRCH)
}

/// Lets everybody try again who waits for one of the pages.
pub(super) fn wake(uffd: BorrowedFd<'_>, address: u64, pages: u64) {
    let mut range = uffdio_range { start: address, len: pages * PAGE };
    let _ = update::<UFFDIO_WAKE, _>(uffd, &mut range);
}

/// Lets everybody try again who waits for any page.
pub(super) fn wake_all(uffd: BorrowedFd<'_>) {
    wake(uffd, FIRST, (LAST - FIRST) / PAGE);
}

/// Asks the kernel for a userfaultfd as CRIU will.
pub(super) fn probe() -> io::Result<()> {
    // SAFETY: nothing is registered with it, and it is closed at the end.
    let uffd = unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK)? };
    let mut request = uffdio_api { api: u64::from(UFFD_API), features: u64::from(FEATURES), ioctls: 0 };
    update::<UFFDIO_API, _>(uffd.as_fd(), &mut request)?;
    Ok(())
}

fn update<const OPCODE: Opcode, T>(uffd: BorrowedFd<'_>, request: &mut T) -> rustix::io::Result<()> {
    // SAFETY: each caller pairs an opcode with the structure that the kernel's header gives it.
    unsafe { rustix::ioctl::ioctl(uffd, Updater::<OPCODE, T>::new(request)) }
}

/// What became of a request for `length` bytes, of which the kernel did `done` when that is not an error.
fn outcome(result: rustix::io::Result<()>, length: u64, done: i64) -> io::Result<Outcome> {
    match (result, u64::try_from(done)) {
        (Ok(()), _) => Ok(Outcome::Placed(length / PAGE)),
        // Stopped on its way; what stopped it shows when the rest is tried.
        (Err(_), Ok(done)) if done >= PAGE => Ok(Outcome::Placed(done / PAGE)),
        (Err(Errno::EXIST), _) => Ok(Outcome::Present),
        (Err(Errno::AGAIN | Errno::INTR), _) => Ok(Outcome::Changing),
        (Err(Errno::NOENT), _) => Ok(Outcome::NoMemory),
        (Err(Errno::NOMEM), _) => Ok(Outcome::NoRoom),
        (Err(Errno::SRCH), _) => Ok(Outcome::Gone),
        (Err(error), _) => Err(error.into()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A message as the kernel writes it.
    pub fn message(event: u32, words: [u64; 3]) -> [u8; MESSAGE] {
        let mut message = [0; MESSAGE];
        message[0] = u8::try_from(event).unwrap();
        for (index, word) in words.into_iter().enumerate() {
            message[8 + index * 8..16 + index * 8].copy_from_slice(&word.to_le_bytes());
        }
        message
    }

    #[test]
    fn events_are_told_apart() {
        let decode = |event, words| Event::decode(&message(event, words)).unwrap();
        assert_eq!(decode(UFFD_EVENT_PAGEFAULT, [1, 0x1234, 0]), Event::Fault(0x1000));
        assert_eq!(decode(UFFD_EVENT_FORK, [7, 0, 0]), Event::Fork(7));
        let moved = Event::Remap { from: 0x1000, to: 0x5000, bytes: 0x2000 };
        assert_eq!(decode(UFFD_EVENT_REMAP, [0x1000, 0x5000, 0x2000]), moved);
        let removed = Event::Remove { start: 0x1000, end: 0x3000 };
        assert_eq!(decode(UFFD_EVENT_REMOVE, [0x1000, 0x3000, 0]), removed);
        let unmapped = Event::Unmap { start: 0x1000, end: 0x3000 };
        assert_eq!(decode(UFFD_EVENT_UNMAP, [0x1000, 0x3000, 0]), unmapped);
        assert_eq!(Event::decode(&[0; MESSAGE]), None);
    }

    #[test]
    fn a_copy_that_was_stopped_counts_what_it_did() {
        let outcome = |error, done| outcome(Err(error), 4 * PAGE, done).unwrap();
        assert_eq!(outcome(Errno::AGAIN, 8192), Outcome::Placed(2));
        assert_eq!(outcome(Errno::AGAIN, -11), Outcome::Changing);
        assert_eq!(outcome(Errno::AGAIN, 0), Outcome::Changing);
        assert_eq!(outcome(Errno::EXIST, -17), Outcome::Present);
        assert_eq!(outcome(Errno::SRCH, 0), Outcome::Gone);
        assert!(super::outcome(Err(Errno::FAULT), PAGE, -14).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_messages_never_panic(message in any::<[u8; MESSAGE]>()) {
            let _ = Event::decode(&message);
        }
    }
}
