//! Why CRIU failed, picked out of its log.
//!
//! An error line reads `(00.012345)   7: Error (criu/file.c:12): text`, with the time and the process in front, each
//! optional. The first error is usually the reason and later ones its consequences, but some are always there.

use std::{
    fmt,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::fd::AsFd,
};

use rustix::fs::{Mode, OFlags};

/// How much of a log is read, from its end: the reason stands near it.
pub const MAX_READ: u64 = 1024 * 1024;

/// How many lines of a reason are kept.
const MAX_LINES: usize = 3;

/// How many characters of a line are kept.
const MAX_LINE: usize = 300;

/// What a failure comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// A process uses io_uring.
    IoUring,
    /// A process watches files (inotify, fanotify) on a file system that has no stable handles.
    FileWatch,
    /// A TCP connection is established.
    EstablishedTcp,
    /// A connection waits in the queue of a listener.
    QueuedConnection,
    /// A unix socket leads out of the container.
    ExternalUnixSocket,
    /// A process holds a file lock.
    FileLock,
    /// The host lacks CAP_SYS_RESOURCE.
    MissingCapability,
    /// A deleted file that is still open is larger than the limit.
    GhostTooLarge,
    /// An open file is missing, or is not what it was at the dump.
    FileChanged,
    /// A descriptor leads to a file of another mount namespace.
    ForeignFile,
    /// A mount is neither known to CRIU nor named by the OCI spec.
    ForeignMount,
    /// A descriptor or a mapping is of a kind that CRIU does not dump (devices, perf events).
    UnsupportedFile,
    /// A namespace inside the container is of a kind that CRIU does not dump.
    UnsupportedNamespace,
    /// A program has the foreground of a terminal whose shell is not at its prompt.
    ForegroundJob,
    /// The process ids of the image are in use.
    PidTaken,
    /// The disk is full.
    DiskFull,
    /// Memory ran out.
    OutOfMemory,
    /// A file of the image is damaged.
    BadImage,
    /// A process could not be stopped in time: a debugger, or a wait for a device.
    Timeout,
    /// The kernel refuses lazy restores.
    Userfaultfd,
    /// None of these.
    Other,
}

/// The texts by which a cause is known (all of one entry must be in the line), in order of precedence.
const KNOWN: &[(&[&str], Cause)] = &[
    (&["io_uring"], Cause::IoUring),
    // EINVAL: the kernel passes every descriptor to CRIU but those of io_uring.
    (&["send_fds failed (-22)"], Cause::IoUring),
    (&["Can't dump that handle"], Cause::FileWatch),
    (&["fanotify"], Cause::FileWatch),
    (&["Connected TCP socket"], Cause::EstablishedTcp),
    (&["n-flight connection"], Cause::QueuedConnection),
    (&["External socket"], Cause::ExternalUnixSocket),
    (&["Can't dump half of stream unix connection"], Cause::ExternalUnixSocket),
    (&["file locks are hold"], Cause::FileLock),
    (&["rlimit", "Operation not permitted"], Cause::MissingCapability),
    (&["Can't dump ghost file"], Cause::GhostTooLarge),
    (&["has bad size"], Cause::FileChanged),
    (&["has bad mode"], Cause::FileChanged),
    (&["Can't open file", "No such file"], Cause::FileChanged),
    (&["Can't lookup mount"], Cause::ForeignFile),
    (&["doesn't have a proper root mount"], Cause::ForeignMount),
    (&["FS mnt", "unsupported"], Cause::ForeignMount),
    (&["unreachable sharing"], Cause::ForeignMount),
    (&["No mapping for", "mountpoint"], Cause::ForeignMount),
    (&["ctty inheritance detected"], Cause::ForegroundJob),
    (&["Can't handle non-regular mapping"], Cause::UnsupportedFile),
    (&["Can't dump file", "of that type"], Cause::UnsupportedFile),
    (&["anon_inode:"], Cause::UnsupportedFile),
    (&["Can't dump nested"], Cause::UnsupportedNamespace),
    (&["pid namespace", "nested"], Cause::UnsupportedNamespace),
    (&["Can't fork for", "File exists"], Cause::PidTaken),
    (&["do not match expected"], Cause::PidTaken),
    (&["userfaultfd"], Cause::Userfaultfd),
    (&["lazy-pages:"], Cause::Userfaultfd),
    (&["No space left on device"], Cause::DiskFull),
    (&["Cannot allocate memory"], Cause::OutOfMemory),
    (&["agic doesn't match"], Cause::BadImage),
    (&["Unexpected EOF"], Cause::BadImage),
    (&["Failed unpacking"], Cause::BadImage),
    (&["Timeout reached"], Cause::Timeout),
    (&["Unable to freeze cgroup"], Cause::Timeout),
];

/// Errors that say nothing of the reason: always there, or a consequence.
const NOISE: &[&str] = &[
    "Can't setup RLIMIT_NOFILE",
    "Dumping FAILED",
    "Restoring FAILED",
    "RPC client reported script error",
    "Can't unlink",
    "Unable to kill",
    "Unable to wait",
    "Unable to detach from",
    "Can't wait or bad status",
];

impl Cause {
    /// What it means and what can be done, in one sentence.
    pub fn advice(self) -> &'static str {
        match self {
            Cause::IoUring => {
                "a process uses io_uring, which cannot be checkpointed; use a shallower depth, or keep the \
                 process from it with a seccomp profile such as RuntimeDefault"
            }
            Cause::FileWatch => {
                "a process watches files of the container's root file system, which cannot be checkpointed on \
                 overlay without index=on,nfs_export=on; use a shallower depth"
            }
            Cause::EstablishedTcp => {
                "a TCP connection is established; close it, or allow connections to be closed by the checkpoint"
            }
            Cause::QueuedConnection => {
                "a client has just connected: the agent is wanted, try again when it is idle"
            }
            Cause::ExternalUnixSocket => {
                "a unix socket leads out of the container, which cannot be checkpointed; use a shallower depth"
            }
            Cause::FileLock => "a process holds a file lock; allow file locks to be checkpointed",
            Cause::MissingCapability => {
                "this host lacks CAP_SYS_RESOURCE, without which CRIU cannot handle processes that are not root's"
            }
            Cause::GhostTooLarge => {
                "a deleted file that is still open is larger than the limit; raise ghost_limit"
            }
            Cause::FileChanged => {
                "a file that the agent had open was removed or changed while it was asleep; put it back and try again"
            }
            Cause::ForeignFile => {
                "a descriptor leads to a file outside the container; give the container pipes"
            }
            Cause::ForeignMount => {
                "the container has a mount that its specification does not name; unmount it or use a shallower depth"
            }
            Cause::UnsupportedFile => {
                "a process uses a device or a kernel object that cannot be checkpointed; use a shallower depth"
            }
            Cause::UnsupportedNamespace => {
                "a process made a namespace that cannot be checkpointed; use a shallower depth"
            }
            Cause::ForegroundJob => {
                "a program runs in the foreground of a shell's terminal; try again when the shell is at its prompt, or \
                 use a shallower depth"
            }
            Cause::PidTaken => "a process id of the agent is in use; try again",
            Cause::DiskFull => "the disk with the images is full; free space on it",
            Cause::OutOfMemory => "memory ran out; free some, or raise the container's limit",
            Cause::BadImage => "the image is damaged",
            Cause::Timeout => {
                "a process could not be stopped in time: a debugger, or a device that does not answer"
            }
            Cause::Userfaultfd => "allow userfaultfd to root, or turn lazy restores off",
            Cause::Other => "see CRIU's log",
        }
    }
}

/// The reason of a failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// What it comes from.
    pub cause: Cause,
    /// CRIU's own words, the most telling line first.
    pub lines: Vec<String>,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (CRIU: {})", self.cause.advice(), self.lines.join("; "))
    }
}

/// Picks the reason out of a log: the first error whose cause is known, else the first that is not mere noise.
pub fn reason(log: &[u8]) -> Option<Reason> {
    let errors: Vec<String> = log
        .split(|&byte| byte == b'\n')
        .filter_map(|line| error_text(&String::from_utf8_lossy(line)))
        .filter(|text| !NOISE.iter().any(|noise| text.contains(noise)))
        .collect();
    let known = errors.iter().enumerate().find_map(|(at, text)| Some((at, cause_of(text)?)));
    let (at, cause) = known.unwrap_or((0, Cause::Other));
    let mut lines = vec![errors.get(at)?.clone()];
    for (other, text) in errors.iter().enumerate() {
        if other != at && lines.len() < MAX_LINES && !lines.contains(text) {
            lines.push(text.clone());
        }
    }
    Some(Reason { cause, lines })
}

/// Reads the end of the log `name` in `directory` and picks the reason out of it.
///
/// # Errors
/// When the log cannot be read; a link in its place is not followed.
pub fn read_reason(directory: impl AsFd, name: &str) -> io::Result<Option<Reason>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let mut file = File::from(rustix::fs::openat(directory, name, flags, Mode::empty())?);
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(MAX_READ)))?;
    let mut log = Vec::new();
    file.take(MAX_READ).read_to_end(&mut log)?;
    Ok(reason(&log))
}

fn cause_of(text: &str) -> Option<Cause> {
    let known = KNOWN.iter().find(|(parts, _)| parts.iter().all(|part| text.contains(part)));
    known.map(|&(_, cause)| cause)
}

/// The text of an error line, without its place in CRIU's source.
fn error_text(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("Error (")?;
    let (_, text) = rest.split_once("): ")?;
    let text: String = text.trim().chars().filter(|c| !c.is_control()).take(MAX_LINE).collect();
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn cause(line: &str) -> Cause {
        reason(line.as_bytes()).unwrap().cause
    }

    #[test]
    fn well_known_errors_have_a_cause() {
        let cases = [
            (
                "Error (criu/files-ext.c:99): Can't dump file 12 of that type [600] (unknown anon_inode:[io_uring])",
                Cause::IoUring,
            ),
            ("Error (compel/src/lib/infect-rpc.c:1): send_fds failed (-22)", Cause::IoUring),
            ("Error (criu/fsnotify.c:284): \tCan't dump that handle", Cause::FileWatch),
            (
                "Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using --tcp-established option.",
                Cause::EstablishedTcp,
            ),
            ("Error (criu/sk-inet.c:185): inet: In-flight connection (l) for 1a2b", Cause::QueuedConnection),
            ("Error (criu/sk-unix.c:494): unix: In-flight connection on 7", Cause::QueuedConnection),
            (
                "Error (criu/sk-unix.c:874): unix: External socket is used. Consider using --ext-unix-sk option.",
                Cause::ExternalUnixSocket,
            ),
            (
                "Error (criu/file-lock.c:110): Some file locks are hold by dumping tasks! You can try --file-locks to dump them.",
                Cause::FileLock,
            ),
            (
                "Error (criu/cr-dump.c:388): Can't get rlimit 0: Operation not permitted",
                Cause::MissingCapability,
            ),
            (
                "Error (criu/files-reg.c:1031): Can't dump ghost file /tmp/x of 2097152 size, increase limit",
                Cause::GhostTooLarge,
            ),
            ("Error (criu/files-reg.c:2175): File data/log has bad size 5 (expect 9)", Cause::FileChanged),
            (
                "Error (criu/files-reg.c:2294): File data/log has bad mode 0100600 (expect 0100644)",
                Cause::FileChanged,
            ),
            (
                "Error (criu/files-reg.c:2240): Can't open file data/log on restore: No such file or directory",
                Cause::FileChanged,
            ),
            ("Error (criu/files-reg.c:1790): Can't lookup mount=29 for fd=1 path=/x", Cause::ForeignFile),
            (
                "Error (criu/tty.c:2281): tty: ctty inheritance detected sid/pgrp 1, no PTY peer with sid/pgrp needed",
                Cause::ForegroundJob,
            ),
            ("Error (criu/image.c:563): Magic doesn't match for pstree.img", Cause::BadImage),
            ("Error (criu/bfd.c:136): bfd: Error writing: No space left on device", Cause::DiskFull),
            ("Error (criu/cr-dump.c:1808): Timeout reached. Try to interrupt: 1", Cause::Timeout),
        ];
        for (line, expected) in cases {
            assert_eq!(cause(line), expected, "{line}");
        }
    }

    #[test]
    fn the_known_error_wins_over_an_earlier_unknown_one_and_over_noise() {
        let log = b"(00.001) Error (criu/rlimit.c:20): Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
            (00.002) Warn  (criu/kerndat.c:1): Error (x): not an error of its own\n\
            (00.003)      7: Error (criu/a.c:1): Something odd\n\
            (00.004) Error (criu/fsnotify.c:284): fsnotify: \tCan't dump that handle\n\
            (00.005) Error (criu/cr-dump.c:2111): Dumping FAILED.\n";
        let reason = reason(log).unwrap();
        assert_eq!(reason.cause, Cause::FileWatch);
        assert_eq!(reason.lines[0], "fsnotify: Can't dump that handle");
        assert!(reason.lines.contains(&"Something odd".to_owned()));
        assert!(!reason.to_string().contains("RLIMIT"));
    }

    #[test]
    fn an_unknown_error_is_given_in_criu_s_words() {
        let reason = reason(b"Error (criu/new.c:1): a new kind of trouble\n").unwrap();
        assert_eq!((reason.cause, reason.lines), (Cause::Other, vec!["a new kind of trouble".to_owned()]));
    }

    #[test]
    fn a_log_without_errors_has_no_reason() {
        assert_eq!(reason(b"(00.1) Warn  (criu/x.c:1): harmless\n"), None);
        assert_eq!(reason(b""), None);
    }

    #[test]
    fn a_long_log_is_read_from_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = vec![b'\n'; 3 * usize::try_from(MAX_READ).unwrap()];
        log.extend_from_slice(b"Error (criu/image.c:563): Magic doesn't match for core-1.img\n");
        std::fs::write(directory.path().join("restore.log"), log).unwrap();
        let opened = File::open(directory.path()).unwrap();
        assert_eq!(read_reason(&opened, "restore.log").unwrap().unwrap().cause, Cause::BadImage);
    }

    #[test]
    fn a_link_in_place_of_a_log_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", directory.path().join("dump.log")).unwrap();
        let opened = File::open(directory.path()).unwrap();
        assert!(read_reason(&opened, "dump.log").is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_and_kept_short(log: Vec<u8>, tail in "\\PC{0,2000}") {
            let _ = reason(&log);
            let line = format!("Error (criu/x.c:1): {tail}");
            if let Some(reason) = reason(line.as_bytes()) {
                proptest::prop_assert!(reason.lines.len() <= MAX_LINES);
                proptest::prop_assert!(reason.lines.iter().all(|line| line.chars().count() <= MAX_LINE));
            }
        }
    }
}
