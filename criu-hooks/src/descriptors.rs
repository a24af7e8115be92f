//! The open descriptors of other processes: what they are, and duplicates of them.

use std::{fs, io};

use rustix::{
    fd::{OwnedFd, RawFd},
    process::{Pid, PidfdFlags, PidfdGetfdFlags},
};

use crate::procfs;

/// One open descriptor of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Its number there.
    pub number: RawFd,
    /// What it leads to, as `/proc/PID/fd` shows it: a path, `socket:[1234]`, `anon_inode:[eventpoll]`.
    pub target: String,
}

impl Descriptor {
    /// The inode of the socket that it is, if it is one.
    pub fn socket(&self) -> Option<u64> {
        self.target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    }

    /// The kind of the file without a place in a file system that it is (`eventpoll`, `io_uring`), if it is one.
    pub fn anonymous(&self) -> Option<&str> {
        let kind = self.target.strip_prefix("anon_inode:")?;
        Some(kind.strip_prefix('[').and_then(|kind| kind.strip_suffix(']')).unwrap_or(kind))
    }
}

/// The descriptors of a process. One that it closes meanwhile may be missing.
///
/// # Errors
/// When the process is gone.
pub fn of(pid: Pid) -> io::Result<Vec<Descriptor>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let (Some(number), Ok(target)) = (number, fs::read_link(entry.path())) else { continue };
        found.push(Descriptor { number, target: target.to_string_lossy().into_owned() });
    }
    Ok(found)
}

/// Processes, and what each has open.
pub type Listing = Vec<(Pid, Vec<Descriptor>)>;

/// The descriptors of these processes, but of those that have ended: one that was not waited for has none.
///
/// # Errors
/// When the descriptors of one that lives cannot be read.
pub fn of_all(pids: &[Pid]) -> io::Result<Listing> {
    let mut found = Vec::with_capacity(pids.len());
    for &pid in pids.iter().filter(|pid| procfs::alive(**pid)) {
        match of(pid) {
            Ok(descriptors) => found.push((pid, descriptors)),
            Err(_) if !procfs::alive(pid) => {}
            Err(error) => {
                let text = format!("cannot read the descriptors of process {pid}: {error}");
                return Err(io::Error::new(error.kind(), text));
            }
        }
    }
    Ok(found)
}

/// Another process, to take duplicates from.
#[derive(Debug)]
pub struct Process(OwnedFd);

impl Process {
    /// Holds on to `pid`.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn open(pid: Pid) -> io::Result<Self> {
        Ok(Self(rustix::process::pidfd_open(pid, PidfdFlags::empty())?))
    }

    /// A duplicate of its descriptor `number`, closed on exec. Both are one open file: what is set on the one holds for
    /// the other, and it lives until both are closed.
    ///
    /// # Errors
    /// When the process is gone or has no such descriptor, or this process may have no more.
    pub fn duplicate(&self, number: RawFd) -> io::Result<OwnedFd> {
        Ok(rustix::process::pidfd_getfd(&self.0, number, PidfdGetfdFlags::empty())?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        os::fd::AsRawFd,
    };

    use super::*;

    #[test]
    fn sockets_and_files_without_a_place_are_told_apart() {
        let kind = |target: &str| {
            let descriptor = Descriptor { number: 3, target: target.to_owned() };
            (descriptor.socket(), descriptor.anonymous().map(str::to_owned))
        };
        assert_eq!(kind("socket:[4026]"), (Some(4026), None));
        assert_eq!(kind("anon_inode:[eventpoll]"), (None, Some("eventpoll".to_owned())));
        assert_eq!(kind("anon_inode:inotify"), (None, Some("inotify".to_owned())));
        assert_eq!(kind("/tmp/socket:[7]"), (None, None));
        assert_eq!(kind("socket:[x]"), (None, None));
    }

    #[test]
    fn a_duplicate_is_the_same_listener() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let me = rustix::process::getpid();
        let mine = of(me).unwrap().into_iter().find(|found| found.number == listener.as_raw_fd()).unwrap();
        assert!(mine.socket().is_some(), "{mine:?}");
        let duplicate = Process::open(me).unwrap().duplicate(mine.number).unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let client = TcpStream::connect(address).unwrap();
        let (_, peer) = TcpListener::from(duplicate).accept().unwrap();
        assert_eq!(peer, client.local_addr().unwrap());
    }

    #[test]
    fn what_is_gone_is_an_error() {
        let nobody = Pid::from_raw(i32::MAX - 1).unwrap();
        assert!(of(nobody).is_err());
        let me = rustix::process::getpid();
        assert!(matches!(&of_all(&[nobody, me]).unwrap()[..], [(pid, _)] if *pid == me));
        assert!(Process::open(nobody).is_err());
        assert!(Process::open(rustix::process::getpid()).unwrap().duplicate(1 << 20).is_err());
    }
}
