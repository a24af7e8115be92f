//! Probes of a sleeping agent, answered without waking it.
//!
//! A frozen agent answers them itself, in a moment that nobody takes for a wake ([`Visit`]). For a checkpointed one the
//! shim does:
//!
//! The kubelet connects from an address of the node. When everybody who waits at a listener comes from there, the shim
//! accepts them and listens: a probe is answered; whoever wants something else is connected to the agent by the shim,
//! which passes on what was said already. When anybody else waits, nobody is accepted: the agent wakes, and the kernel
//! gives it all of them.

mod attend;
mod hpack;
mod http2;
mod sources;
mod verdict;
mod visit;

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use criu_hooks::{
    inspect::{Queue, Waiting},
    netns,
};
use rustix::{
    io::Errno,
    net::{self, SocketFlags},
};
use tokio::{net::TcpStream, sync::Semaphore};
use tracing::warn;

use self::sources::may_probe;
pub use self::{
    sources::{NoPrefix, Prefix, Sources},
    visit::{Progress, Visit},
};

/// How many clients are listened to at the same time. More are no probes.
const AT_ONCE: usize = 64;

/// Answers probes.
#[derive(Debug)]
pub(super) struct Answering {
    sources: Sources,
    room: Arc<Semaphore>,
}

impl Answering {
    pub(super) fn new(sources: Sources) -> Self {
        Self { sources, room: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// Accepts those who wait at `listener` if all of them may be probes, and attends to them. Otherwise, or when that
    /// cannot be told, nobody is accepted, and the answer is no: the agent is needed.
    ///
    /// To be called on a runtime, for a listener that nobody else accepts from.
    pub(super) fn take(&self, listener: &OwnedFd, inode: u64, namespace: &Arc<OwnedFd>) -> bool {
        self.try_take(listener, inode, namespace).unwrap_or_else(|error| {
            warn!(%error, "cannot tell who waits for the agent: it wakes");
            false
        })
    }

    fn try_take(&self, listener: &OwnedFd, inode: u64, namespace: &Arc<OwnedFd>) -> io::Result<bool> {
        let address = SocketAddr::try_from(net::getsockname(listener)?)?;
        let (queue, sources) = netns::within(namespace.as_fd(), || {
            Ok((Queue::of(inode, address.port())?, self.sources.addresses()?))
        })?;
        let Some(count) = probing(&queue, &sources) else { return Ok(false) };
        let Ok(mut room) = self.room.clone().try_acquire_many_owned(count) else { return Ok(false) };
        // The queue is first in, first out, so these are those that have been looked at.
        while let Some(permit) = room.split(1) {
            let accepted = net::acceptfrom_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
            let (client, peer) = match accepted {
                Ok((client, peer)) => (client, peer.ok_or(io::ErrorKind::NotConnected)?.try_into()?),
                Err(Errno::AGAIN) => break,
                Err(Errno::CONNABORTED | Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let local = SocketAddr::try_from(net::getsockname(&client)?)?;
            let client = TcpStream::from_std(client.into())?;
            let namespace = namespace.clone();
            let probes = may_probe(&sources, Waiting::new(local, peer));
            tokio::spawn(async move {
                if probes {
                    attend::attend(client, peer, namespace).await;
                } else {
                    // It has reset its connection between the two looks. What it said before is the agent's.
                    attend::pass_on(client, peer, &attend::Said::default(), namespace).await;
                }
                drop(permit);
            });
        }
        Ok(true)
    }
}

/// How many to accept; nothing when the agent is needed.
fn probing(queue: &Queue, sources: &[Prefix]) -> Option<u32> {
    // One that cannot be seen any more has reset its connection. It may have been anybody.
    let all_seen = queue.length <= queue.waiting.len();
    let all_probes = queue.waiting.iter().all(|client| may_probe(sources, *client));
    // Whoever turned out to be no probe could not be connected to the agent.
    let reachable = !queue.on_device;
    (queue.length > 0 && all_seen && all_probes && reachable)
        .then(|| u32::try_from(queue.length).ok())
        .flatten()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const NODE: &str = "10.88.0.1";

    fn queue(length: usize, peers: &[&str]) -> Queue {
        let waits = |peer: &&str| {
            Waiting::new("10.88.0.5:80".parse().unwrap(), format!("{peer}:999").parse().unwrap())
        };
        Queue { length, waiting: peers.iter().map(waits).collect(), on_device: false }
    }

    #[test]
    fn only_a_queue_of_probes_alone_is_taken() {
        let node = [NODE.parse().unwrap()];
        assert_eq!(probing(&queue(1, &[NODE]), &node), Some(1));
        assert_eq!(probing(&queue(2, &[NODE, NODE, NODE]), &node), Some(2), "one came between the two looks");
        assert_eq!(probing(&queue(1, &[NODE, "10.88.0.9"]), &node), None, "a client");
        assert_eq!(probing(&queue(1, &["10.88.0.5"]), &node), None, "from within the pod");
        assert_eq!(probing(&queue(2, &[NODE]), &node), None, "one has reset its connection");
        assert_eq!(probing(&queue(0, &[]), &node), None, "not the listener that was asked about");
        assert_eq!(probing(&queue(1, &[NODE]), &[]), None, "probes come from nowhere");
        let on_device = Queue { on_device: true, ..queue(1, &[NODE]) };
        assert_eq!(probing(&on_device, &node), None);
    }
}
