//! What stands in the way of a checkpoint, in words.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use rustix::process::Pid;

use super::connections::Busy;
use crate::container;

/// What keeps a container from being checkpointed. It can be frozen all the same.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Blocker {
    /// Found by the look at the container as a whole: a debugger, an exec, a foreign mount, a thread that went astray.
    #[error(transparent)]
    Container(container::Blocker),
    /// The kernel's state of an io_uring cannot be read.
    #[error(
        "process {pid} uses io_uring, which CRIU cannot dump; without it most programs fall back to epoll"
    )]
    IoUring {
        /// The process.
        pid: Pid,
    },
    /// It watches whole file systems.
    #[error("process {pid} uses fanotify, which CRIU cannot dump")]
    Fanotify {
        /// The process.
        pid: Pid,
    },
    /// It handles page faults itself.
    #[error("process {pid} handles page faults of its own (userfaultfd), which CRIU cannot dump")]
    UserFaults {
        /// The process.
        pid: Pid,
    },
    /// It counts events of the processor.
    #[error("process {pid} has a performance counter open, which CRIU cannot dump")]
    PerfEvent {
        /// The process.
        pid: Pid,
    },
    /// A device holds state of its own.
    #[error("process {pid} has the device {path} open, whose state CRIU cannot dump")]
    Device {
        /// The process.
        pid: Pid,
        /// The device.
        path: String,
    },
    /// Some other file of the kernel.
    #[error("process {pid} has a file of the kind {kind} open, which CRIU cannot dump")]
    Unknown {
        /// The process.
        pid: Pid,
        /// As the kernel names it.
        kind: String,
    },
    /// A task has a namespace of its own.
    #[error(
        "process {pid} has a {kind} namespace of its own, as a browser's sandbox has, which cannot be restored"
    )]
    Namespace {
        /// The process.
        pid: Pid,
        /// "user", "pid", "ipc", "uts" or "time".
        kind: &'static str,
    },
    /// A unix socket is connected to a process that stays.
    #[error("process {pid} is connected by a unix socket to a process outside of the container")]
    UnixPeer {
        /// The process.
        pid: Pid,
    },
    /// A unix listener can be found by others, who could not be kept waiting.
    #[error(
        "process {pid} listens at {}, which lies on a volume: clients from outside of the container would be refused",
        path.display()
    )]
    SharedListener {
        /// The process.
        pid: Pid,
        /// Where.
        path: PathBuf,
    },
    /// Somebody who is not of the container waits at a unix listener, and could not be kept waiting.
    #[error("a client from outside of the container waits at {address} for process {pid} to accept it")]
    UnixQueue {
        /// The process.
        pid: Pid,
        /// Where.
        address: String,
    },
    /// Datagrams to an abstract unix address cannot be kept waiting.
    #[error("process {pid} takes datagrams at the unix address {address}: who sends one would be refused")]
    Mailbox {
        /// The process.
        pid: Pid,
        /// The address, an @ before it.
        address: String,
    },
    /// A socket of a kind that CRIU does not know.
    #[error("process {pid} has a socket of {family}, which CRIU cannot dump{hint}")]
    Socket {
        /// The process.
        pid: Pid,
        /// Its family or protocol.
        family: String,
        /// What helps, from the comma on.
        hint: &'static str,
    },
    /// A connection must not be closed.
    #[error("a TCP connection is established with {peer}, {busy}")]
    Connection {
        /// The other end.
        peer: SocketAddr,
        /// Why it must not be closed.
        busy: Busy,
    },
    /// Somebody waits for it.
    #[error("somebody waits at {address} to be accepted: {waiting} in the queue")]
    Queue {
        /// Where.
        address: SocketAddr,
        /// How many.
        waiting: u32,
    },
    /// It would have to wake at once.
    #[error("a timer of it is due in {:.1} s, and each is to wake it", left.as_secs_f64())]
    Timer {
        /// How long until then.
        left: Duration,
    },
}

impl Blocker {
    /// A stable name of its kind, for tools.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Container(container::Blocker::Traced { .. }) => "debugger",
            Self::Container(container::Blocker::Exec { .. }) => "exec",
            Self::Container(container::Blocker::NestedCgroup { .. }) => "cgroup",
            Self::Container(container::Blocker::ForeignMount { .. }) => "mount",
            Self::IoUring { .. } => "io-uring",
            Self::Fanotify { .. } => "fanotify",
            Self::UserFaults { .. } => "userfaultfd",
            Self::PerfEvent { .. } => "perf-event",
            Self::Device { .. } => "device",
            Self::Unknown { .. } => "file",
            Self::Container(container::Blocker::StrayThread { .. }) | Self::Namespace { .. } => "namespace",
            Self::UnixPeer { .. } => "unix-peer",
            Self::SharedListener { .. } => "unix-listener",
            Self::Socket { .. } => "socket",
            Self::Connection { .. } => "connection",
            Self::Queue { .. } | Self::UnixQueue { .. } => "queue",
            Self::Mailbox { .. } => "unix-datagram",
            Self::Timer { .. } => "timer",
        }
    }
}
