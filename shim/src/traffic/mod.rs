//! Traffic for an agent whose processes are on the disk.
//!
//! Before a dump the shim duplicates the agent's listening sockets. The duplicates outlive the agent: clients connect,
//! the kernel answers them, and they wait in the queue with the bytes that they send. That wakes the agent. After the
//! restore the duplicates are closed, and the kernel moves the waiting connections to the agent's new listeners. UDP
//! sockets are held like that too, and what they have received is sent on. A listener with an abstract unix address goes
//! back to the agent as it is.
//!
//! By option, probes of the kubelet are answered for the agent and do not wake it.

mod datagrams;
mod held;
mod listeners;
mod options;
mod ports;
mod probes;

use std::io;

use rustix::process::Pid;

pub use self::{
    listeners::Listeners,
    probes::{NoPrefix, Prefix, Progress, Sources, Visit},
};

/// Why an agent's sockets cannot be held while it sleeps.
#[derive(Debug, thiserror::Error)]
pub enum TrafficError {
    /// A process or its descriptors cannot be looked at.
    #[error("cannot look at the sockets of process {pid}: {source}")]
    Process {
        /// The process.
        pid: Pid,
        /// Why.
        source: io::Error,
    },
    /// The shim takes care of one network namespace.
    #[error("process {0} listens in a network namespace of its own, where nobody could be kept waiting")]
    Elsewhere(Pid),
    /// A socket cannot be duplicated or watched.
    #[error("cannot {action} the agent's socket {address}: {source}")]
    Socket {
        /// What could not be done.
        action: &'static str,
        /// Where it listens.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// Connections that wait would be lost at the wake.
    #[error(
        "cannot set net.ipv4.tcp_migrate_req in the container's network namespace (it needs Linux 5.14), \
         so connections made in its sleep would be reset: {0}"
    )]
    Migration(io::Error),
    /// The sockets cannot be watched together.
    #[error("cannot watch the agent's sockets: {0}")]
    Watch(io::Error),
}
