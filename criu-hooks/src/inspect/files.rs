//! Open files that CRIU cannot dump.

use std::{fs, io, time::Duration};

use rustix::{
    fs::{AtFlags, CWD, FileType, StatxFlags, major, makedev, minor},
    process::Pid,
};

use super::blocker::Blocker;
use crate::descriptors::Descriptor;

/// Memory devices that CRIU knows: null, zero, full, random, urandom.
const KNOWN_MEMORY: &[u32] = &[3, 5, 7, 8, 9];

/// What keeps an open file from being dumped, if anything does.
pub(super) fn blocker(pid: Pid, descriptor: &Descriptor) -> Option<Blocker> {
    if let Some(kind) = descriptor.anonymous() {
        return of_kind(pid, kind);
    }
    let path = descriptor.target.strip_prefix("/dev/")?;
    let directories = ["shm/", "mqueue/", "pts/", "hugepages/"];
    if directories.iter().any(|directory| path.starts_with(directory)) {
        return None;
    }
    // A file system with a server may lie there, and the server stand still in the same freezer: it must not be asked.
    let link = format!("/proc/{pid}/fd/{}", descriptor.number);
    let stat = rustix::fs::statx(CWD, link, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    is_unknown_device(
        FileType::from_raw_mode(stat.stx_mode.into()),
        makedev(stat.stx_rdev_major, stat.stx_rdev_minor),
    )
    .then(|| Blocker::Device { pid, path: descriptor.target.clone() })
}

/// What keeps a file without a place in a file system from being dumped.
fn of_kind(pid: Pid, kind: &str) -> Option<Blocker> {
    match kind {
        "io_uring" => Some(Blocker::IoUring { pid }),
        "fanotify" => Some(Blocker::Fanotify { pid }),
        "userfaultfd" => Some(Blocker::UserFaults { pid }),
        "perf_event" => Some(Blocker::PerfEvent { pid }),
        // CRIU dumps these. Whether it can dump an inotify shows only when it tries.
        "eventpoll" | "eventfd" | "signalfd" | "timerfd" | "inotify" | "pidfd" => None,
        _ if kind.starts_with("bpf-map") => None,
        _ => Some(Blocker::Unknown { pid, kind: kind.to_owned() }),
    }
}

fn is_unknown_device(kind: FileType, device: u64) -> bool {
    match (kind, major(device), minor(device)) {
        (FileType::CharacterDevice, 1, minor) => !KNOWN_MEMORY.contains(&minor),
        // Terminals, and the slaves of pseudo-terminals.
        (FileType::CharacterDevice, 4 | 5 | 136..=143, _) => false,
        (FileType::CharacterDevice | FileType::BlockDevice, ..) => true,
        _ => false,
    }
}

/// How long it is until a timerfd goes off; nothing when it is not set, or no timerfd.
pub(super) fn timer(pid: Pid, descriptor: &Descriptor) -> io::Result<Option<Duration>> {
    if descriptor.anonymous() != Some("timerfd") {
        return Ok(None);
    }
    Ok(parse_timer(&fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", descriptor.number))?))
}

/// Finds what remains of a timer in the `fdinfo` of a timerfd.
fn parse_timer(text: &str) -> Option<Duration> {
    let remains = text.lines().find_map(|line| line.strip_prefix("it_value: "))?;
    let (seconds, nanoseconds) = remains.trim().strip_prefix('(')?.strip_suffix(')')?.split_once(", ")?;
    let remains = Duration::new(seconds.parse().ok()?, nanoseconds.parse().ok()?);
    (remains > Duration::ZERO).then_some(remains)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{fs::File, os::fd::AsRawFd as _};

    use super::*;

    fn me() -> Pid {
        rustix::process::getpid()
    }

    #[test]
    fn files_that_criu_knows_are_told_from_others() {
        let dumped = ["eventpoll", "inotify", "timerfd", "pidfd"];
        assert!(dumped.iter().all(|kind| of_kind(me(), kind).is_none()));
        assert_eq!(of_kind(me(), "io_uring"), Some(Blocker::IoUring { pid: me() }));
        let unknown = Blocker::Unknown { pid: me(), kind: "kvm-vm".to_owned() };
        assert_eq!(of_kind(me(), "kvm-vm"), Some(unknown));
    }

    #[test]
    fn devices_that_criu_knows_are_told_from_others() {
        let device = |major, minor| is_unknown_device(FileType::CharacterDevice, makedev(major, minor));
        assert!(!device(1, 3) && !device(5, 2) && !device(136, 4));
        assert!(device(195, 0) && device(10, 229) && device(1, 1));
        assert!(is_unknown_device(FileType::BlockDevice, makedev(8, 0)));
        assert!(!is_unknown_device(FileType::RegularFile, 0));
    }

    #[test]
    fn an_open_null_device_blocks_nothing() {
        let file = File::open("/dev/null").unwrap();
        let descriptor = Descriptor { number: file.as_raw_fd(), target: "/dev/null".to_owned() };
        assert_eq!(blocker(me(), &descriptor), None);
    }

    #[test]
    fn what_remains_of_a_timer_is_read() {
        let text =
            "pos:\t0\nclockid: 1\nticks: 0\nsettime flags: 00\nit_value: (4, 996999)\nit_interval: (5, 0)\n";
        assert_eq!(parse_timer(text), Some(Duration::new(4, 996_999)));
        assert_eq!(parse_timer("it_value: (0, 0)\n"), None);
        assert_eq!(parse_timer("it_value: (0,\n"), None);
    }
}
