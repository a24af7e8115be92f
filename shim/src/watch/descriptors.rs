//! Duplicates of other processes' descriptors, polled by one epoll.

use std::{collections::HashMap, fs, os::fd::OwnedFd};

use rustix::{
    event::{PollFlags, Timespec, epoll},
    io::Errno,
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

use super::{
    Error,
    ready::{is_ready, is_stream},
};

/// Which descriptors are to be watched, and for what.
pub type Wanted = HashMap<(Pid, i32), epoll::EventFlags>;

/// How many of the shim's own descriptors are kept free of duplicates.
const SPARE: u64 = 128;

/// Duplicates and the epoll that polls them. Closing gives all of them back.
#[derive(Debug)]
pub struct Duplicates {
    /// Readable as soon as one of the duplicates is ready.
    pub epoll: OwnedFd,
    /// All of them.
    pub held: Vec<Held>,
}

/// A duplicate of a descriptor.
#[derive(Debug)]
pub struct Held {
    /// Whose it is.
    pub process: Pid,
    /// Its number there.
    pub number: i32,
    /// The duplicate.
    pub duplicate: OwnedFd,
    /// What it is watched for.
    pub readiness: epoll::EventFlags,
}

/// The processes whose descriptors are looked at, by handles that a reuse of their ids does not mislead.
#[derive(Default)]
pub struct Owners(HashMap<Pid, OwnedFd>);

impl Owners {
    /// A duplicate of a descriptor; none when the process has no such descriptor.
    pub fn duplicate(&mut self, process: Pid, number: i32) -> Result<Option<OwnedFd>, Error> {
        let owner = match self.0.entry(process) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => {
                let opened = pidfd_open(process, PidfdFlags::empty());
                new.insert(opened.map_err(|error| Error::descriptor(process, number, error))?)
            }
        };
        match pidfd_getfd(owner, number, PidfdGetfdFlags::empty()) {
            Ok(duplicate) => Ok(Some(duplicate)),
            Err(Errno::BADF) => Ok(None),
            Err(error) => Err(Error::descriptor(process, number, error)),
        }
    }
}

impl Duplicates {
    /// Takes duplicates of all that is wanted.
    ///
    /// # Errors
    /// [`Error::Busy`] when one of them is ready already: whoever waits for it is about to run. [`Error::Descriptor`].
    pub fn take(owners: &mut Owners, wanted: &Wanted) -> Result<Duplicates, Error> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        if limit.is_some_and(|limit| wanted.len() as u64 + SPARE > limit) {
            return Err(Error::TooMany { wanted: wanted.len(), limit: limit.unwrap_or_default() });
        }
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(Error::Epoll)?;
        let mut held = Vec::with_capacity(wanted.len());
        for (&(process, number), &readiness) in wanted {
            // Whoever waits for a closed descriptor waits in vain.
            let Some(duplicate) = owners.duplicate(process, number)? else { continue };
            match epoll::add(&epoll, &duplicate, epoll::EventData::new_u64(0), readiness) {
                Ok(()) => held.push(Held { process, number, duplicate, readiness }),
                // A regular file or a directory: always ready.
                Err(Errno::PERM) => {
                    return Err(Error::Busy(format!("descriptor {number} of process {process}")));
                }
                Err(error) => return Err(Error::descriptor(process, number, error)),
            }
        }
        let duplicates = Duplicates { epoll, held };
        if duplicates.are_ready() {
            return Err(Error::Busy("something that it waits for is ready".to_owned()));
        }
        Ok(duplicates)
    }

    /// Whether one of them is ready now.
    pub fn are_ready(&self) -> bool {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(1);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&now))
            .is_ok_and(|count| count > 0)
    }

    /// How many are held.
    pub fn len(&self) -> usize {
        self.held.len()
    }
}

/// What an epoll was told to report once only: edge-triggered (1 << 31) or one-shot (1 << 30) registrations.
pub const ONCE: u32 = 1 << 31 | 1 << 30;
/// Readable, in an epoll's registration.
const IN: u32 = 1;

/// The descriptors in an epoll that it reports once only, from `/proc/PID/fdinfo/EPOLL`.
fn reported_once(fdinfo: &str) -> impl Iterator<Item = i32> + '_ {
    fdinfo.lines().filter_map(|line| {
        let mut fields = line.strip_prefix("tfd:")?.split_whitespace();
        let number = fields.next()?.parse().ok()?;
        let events = u32::from_str_radix(fields.nth(1)?, 16).ok()?;
        // A one-shot registration that has fired asks for nothing until it is armed anew.
        let fired = events & !ONCE & !0x2000_0018 == 0;
        (events & ONCE != 0 && (events & IN != 0 || fired)).then_some(number)
    })
}

/// An epoll, as far as it reports once only.
pub struct Epoll {
    once: Vec<i32>,
}

/// The epoll that descriptor `number` of a process is, if it is one.
pub fn epoll(process: Pid, number: i32) -> Option<Epoll> {
    let fdinfo = fs::read_to_string(format!("/proc/{process}/fdinfo/{number}")).ok()?;
    fdinfo.contains("tfd:").then(|| Epoll { once: reported_once(&fdinfo).collect() })
}

impl Epoll {
    /// Whether it reports anything once only.
    pub fn reports_once(&self) -> bool {
        !self.once.is_empty()
    }

    /// Whether a thread that was just told of something by it may still have to act on that, which the epoll itself no
    /// longer shows: a socket or a pipe that is readable although it is reported once only.
    ///
    /// Other descriptors tell nothing: programs leave an eventfd that wakes their loop readable for good.
    ///
    /// # Errors
    /// [`Error::Descriptor`].
    pub fn owes_a_read(&self, owners: &mut Owners, process: Pid) -> Result<bool, Error> {
        for &registered in &self.once {
            let Some(duplicate) = owners.duplicate(process, registered)? else { continue };
            if is_stream(&duplicate) && is_ready(&duplicate, PollFlags::IN) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rustix::{event::epoll::EventFlags, process::getpid};
    use std::os::fd::{AsFd, AsRawFd};

    use super::*;

    fn wanted(fd: impl AsFd, readiness: EventFlags) -> Wanted {
        Wanted::from([((getpid(), fd.as_fd().as_raw_fd()), readiness)])
    }

    fn open() -> usize {
        fs::read_dir("/proc/self/fd").unwrap().count()
    }

    #[test]
    fn a_duplicate_becomes_ready_with_its_original_and_what_is_ready_already_is_refused() {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut owners = Owners::default();
        let taken = Duplicates::take(&mut owners, &wanted(&reader, EventFlags::IN)).unwrap();
        assert!(!taken.are_ready());
        rustix::io::write(&writer, b"x").unwrap();
        assert!(taken.are_ready() && taken.are_ready(), "readiness stays until it is used");
        drop(taken);
        let again = Duplicates::take(&mut owners, &wanted(&reader, EventFlags::IN));
        assert!(matches!(again, Err(Error::Busy(_))), "{again:?}");
    }

    #[test]
    fn an_epoll_in_an_epoll_tells_of_what_its_owner_waits_for() {
        let (reader, writer) = std::io::pipe().unwrap();
        let inner = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let data = epoll::EventData::new_u64(1);
        epoll::add(&inner, &reader, data, EventFlags::IN | EventFlags::ET).unwrap();
        let mut owners = Owners::default();
        let taken = Duplicates::take(&mut owners, &wanted(&inner, EventFlags::IN)).unwrap();
        rustix::io::write(&writer, b"x").unwrap();
        assert!(taken.are_ready());
        // Its owner is told; from now on the epoll itself is silent, though nothing has been read.
        let mut events: Vec<epoll::Event> = Vec::with_capacity(1);
        epoll::wait(&inner, rustix::buffer::spare_capacity(&mut events), None).unwrap();
        assert!(!taken.are_ready());
        let owes = |owners: &mut Owners| {
            epoll(getpid(), inner.as_raw_fd()).unwrap().owes_a_read(owners, getpid()).unwrap()
        };
        assert!(owes(&mut owners));
        rustix::io::read(&reader, &mut [0u8; 1]).unwrap();
        assert!(!owes(&mut owners));
    }

    #[test]
    fn a_closed_descriptor_and_a_regular_file_are_told_apart() {
        let mut owners = Owners::default();
        let nothing = Wanted::from([((getpid(), 1_000_000), EventFlags::IN)]);
        assert_eq!(Duplicates::take(&mut owners, &nothing).unwrap().len(), 0);
        let file = tempfile::tempfile().unwrap();
        let ready = Duplicates::take(&mut owners, &wanted(&file, EventFlags::IN));
        assert!(matches!(ready, Err(Error::Busy(_))), "{ready:?}");
    }

    #[test]
    fn registrations_that_report_once_are_found() {
        let text = "pos:\t0\nflags:\t02\ntfd:        8 events:       19 data:  8  pos:0 ino:61af sdev:7\n\
            tfd:        9 events: 80002005 data:  9  pos:0 ino:61af sdev:7\n\
            tfd:       10 events: 40000000 data:  9  pos:0 ino:61af sdev:7\n\
            tfd:       11 events: 80000004 data:  9  pos:0 ino:61af sdev:7\n";
        assert_eq!(reported_once(text).collect::<Vec<_>>(), [9, 10]);
    }

    #[test]
    fn a_hundred_watches_leave_no_descriptor_behind() {
        let pipes: Vec<_> = (0..50).map(|_| std::io::pipe().unwrap()).collect();
        let wanted: Wanted =
            pipes.iter().map(|(reader, _)| ((getpid(), reader.as_raw_fd()), EventFlags::IN)).collect();
        let cycle = || Duplicates::take(&mut Owners::default(), &wanted).unwrap().len();
        cycle();
        // Other tests of this process open and close descriptors too: the least of several looks counts.
        let least = || (0..5).map(|_| open()).min().unwrap();
        let before = least();
        for _ in 0..100 {
            assert_eq!(cycle(), 50);
        }
        assert!(least() < before + 50, "{before} descriptors before, {} after", least());
    }
}
