//! Probes of a frozen agent, which answers them itself.
//!
//! Nobody else accepts its clients, so they are not heard: whoever comes from an address of probes, alone, and is gone
//! soon, is taken for a probe. The kernel's tables tell whether anything else has come, and its counters whether the
//! tables have told all.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, OwnedFd},
};

use criu_hooks::{
    descriptors::{self, Descriptor},
    inspect::{Connection, Ended, Network, Queue, Waiting},
    netns,
};
use rustix::{net, process::Pid};

use super::{
    probing,
    sources::{Prefix, Sources, may_probe},
};

/// Probes that wait for an agent, or are answered by it.
#[derive(Debug)]
pub struct Visit {
    namespace: OwnedFd,
    ended: Ended,
    seen: Seen,
}

/// How far a visit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The agent still has connections of probes.
    Under,
    /// It has none, and nothing else has come.
    Over,
    /// Something else has come.
    Disturbed,
}

impl Visit {
    /// Looks at who waits at the `listeners` of a frozen agent, whose processes are `pids`; nothing when it is not probes
    /// alone. Blocks for a moment.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn begin(pids: &[Pid], listeners: &[OwnedFd], sources: &Sources) -> io::Result<Option<Self>> {
        let Some(first) = pids.first() else { return Ok(None) };
        let namespace = OwnedFd::from(File::open(format!("/proc/{first}/ns/net"))?);
        let mut own = HashSet::new();
        for &pid in pids {
            own.extend(descriptors::of(pid)?.iter().filter_map(Descriptor::socket));
        }
        let mut places = Vec::new();
        for listener in listeners {
            let port = SocketAddr::try_from(net::getsockname(listener)?)?.port();
            places.push((rustix::fs::fstat(listener)?.st_ino, port));
        }
        let begun = netns::within(namespace.as_fd(), || {
            let sources = sources.addresses()?;
            // Both before the queues: a client that comes later is one that has come meanwhile.
            let ended = Ended::listen()?;
            let network = Network::now()?;
            let mut probes = Vec::new();
            for (inode, port) in places {
                let queue = Queue { on_device: false, ..Queue::of(inode, port)? };
                if probing(&queue, &sources).is_none() {
                    return Ok(None);
                }
                probes.extend(queue.waiting);
            }
            Ok(Some((ended, Seen::new(sources, &probes, &own, &network))))
        })?;
        Ok(begun.map(|(ended, seen)| Self { namespace, ended, seen }))
    }

    /// Looks how far it is. Blocks for a moment.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn look(&mut self) -> io::Result<Progress> {
        let network = netns::within(self.namespace.as_fd(), Network::now)?;
        Ok(self.seen.compare(&network, &self.ended.take()?))
    }
}

/// How often in a row the tables may have told less than the counters. They do so a moment later.
const PATIENCE: u32 = 20;

/// What was seen of a network so far.
#[derive(Debug)]
struct Seen {
    sources: Vec<Prefix>,
    /// The agent's connections at the beginning, which are none of probes.
    others: HashMap<Waiting, Connection>,
    /// Those of other containers of the pod at the beginning. They are none of the agent's business.
    foreign: HashSet<Waiting>,
    /// Those of probes that were there at the beginning.
    first: HashSet<Waiting>,
    /// Those of probes that have come since.
    later: HashSet<Waiting>,
    /// What the kernel had counted at the beginning.
    events: u64,
    /// How often in a row the tables have told less than the counters.
    unexplained: u32,
}

impl Seen {
    /// The `network` just before `probes` were found to wait, and nobody else, for an agent that has the sockets with the
    /// inodes `own`.
    fn new(sources: Vec<Prefix>, probes: &[Waiting], own: &HashSet<u64>, network: &Network) -> Self {
        let mut seen = Self {
            sources,
            others: HashMap::new(),
            foreign: HashSet::new(),
            first: HashSet::new(),
            later: HashSet::new(),
            events: network.events,
            unexplained: 0,
        };
        for connection in &network.connections {
            if probes.contains(&connection.ends) {
                seen.first.insert(connection.ends);
            } else if own.contains(&connection.inode) {
                seen.others.insert(connection.ends, *connection);
            } else {
                seen.foreign.insert(connection.ends);
            }
        }
        seen.later = probes.iter().copied().filter(|ends| !seen.first.contains(ends)).collect();
        seen
    }

    /// Takes note of a connection that was not there at the beginning; whether it may be a probe's.
    fn note(&mut self, ends: Waiting) -> bool {
        let probes = may_probe(&self.sources, ends);
        if probes && !self.first.contains(&ends) {
            self.later.insert(ends);
        }
        probes
    }

    /// What has become of it: what is there `now`, and which connections have `ended` since it was last asked.
    fn compare(&mut self, now: &Network, ended: &[Waiting]) -> Progress {
        let mut under = false;
        let mut unchanged = 0;
        for connection in &now.connections {
            if self.foreign.contains(&connection.ends) {
                continue;
            }
            match self.others.get(&connection.ends).copied() {
                Some(before) if !before.open || before == *connection => {
                    unchanged += usize::from(before.open);
                }
                Some(_) => return Progress::Disturbed,
                None if self.note(connection.ends) => under |= connection.open,
                None => return Progress::Disturbed,
            }
        }
        let open = self.others.values().filter(|connection| connection.open).count();
        let strange = |ends: &&Waiting| !self.others.contains_key(ends) && !self.foreign.contains(ends);
        let new: Vec<Waiting> = ended.iter().filter(strange).copied().collect();
        if unchanged < open || !new.into_iter().all(|ends| self.note(ends)) {
            return Progress::Disturbed;
        }
        let explained = usize::try_from(now.events.wrapping_sub(self.events)) == Ok(self.later.len());
        self.unexplained = if explained || under { 0 } else { self.unexplained + 1 };
        match (under, explained) {
            (false, true) => Progress::Over,
            // A datagram, or a connection that the tables have not told of.
            (false, false) if self.unexplained > PATIENCE => Progress::Disturbed,
            _ => Progress::Under,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const NODE: &str = "10.88.0.1";
    /// The inode of all of the agent's connections.
    const OWN: u64 = 5;

    fn connection(peer: &str, port: u16, open: bool, bytes: u64) -> Connection {
        let peer = format!("{peer}:{port}").parse().unwrap();
        Connection { ends: Waiting::new("10.88.0.5:80".parse().unwrap(), peer), inode: OWN, open, bytes }
    }

    fn network(events: u64, connections: &[Connection]) -> Network {
        Network { events, connections: connections.to_vec() }
    }

    fn client() -> Connection {
        connection("10.88.0.9", 7, true, 100)
    }

    fn probe(open: bool) -> Connection {
        connection(NODE, 1, open, 0)
    }

    fn node() -> Vec<Prefix> {
        vec![NODE.parse().unwrap()]
    }

    fn seen_of(waiting: &[Waiting], connections: &[Connection]) -> Seen {
        Seen::new(node(), waiting, &[OWN].into(), &network(10, connections))
    }

    fn seen() -> Seen {
        seen_of(&[probe(true).ends], &[probe(true), client()])
    }

    #[test]
    fn what_other_containers_do_is_their_business() {
        let foreign = Connection { inode: 6, ..connection("10.88.0.9", 9, true, 1) };
        let probed = Connection { inode: 0, ..connection(NODE, 9, true, 1) };
        let mut seen = seen_of(&[probe(true).ends], &[probe(true), foreign, probed]);
        let changed = Connection { bytes: 2, ..foreign };
        assert_eq!(seen.compare(&network(10, &[changed, probed]), &[]), Progress::Over);
        assert_eq!(seen.compare(&network(10, &[]), &[foreign.ends, probed.ends]), Progress::Over);
    }

    #[test]
    fn a_visit_is_over_when_the_agent_has_closed_the_probes_connections() {
        let mut seen = seen();
        assert_eq!(seen.compare(&network(10, &[probe(true), client()]), &[]), Progress::Under);
        assert_eq!(seen.compare(&network(10, &[probe(false), client()]), &[]), Progress::Over);
        assert_eq!(seen.compare(&network(10, &[client()]), &[probe(false).ends]), Progress::Over);
    }

    #[test]
    fn other_probes_that_come_meanwhile_belong_to_the_visit() {
        let mut seen = seen();
        let second = connection(NODE, 2, true, 0);
        assert_eq!(seen.compare(&network(11, &[second, client()]), &[]), Progress::Under);
        assert_eq!(seen.compare(&network(11, &[client()]), &[second.ends]), Progress::Over);
        // One that came and went between two looks, of which the kernel tells late.
        assert_eq!(seen.compare(&network(12, &[client()]), &[]), Progress::Under);
        let third = connection(NODE, 3, true, 0).ends;
        assert_eq!(seen.compare(&network(12, &[client()]), &[third]), Progress::Over);
    }

    #[test]
    fn whatever_else_comes_is_noticed() {
        let changed = connection("10.88.0.9", 7, true, 101);
        let ended = connection("10.88.0.9", 7, false, 100);
        let other = connection("10.88.0.9", 8, true, 0);
        for (connections, told) in [
            (vec![changed], vec![]),
            (vec![ended], vec![]),
            (vec![], vec![client().ends]),
            (vec![client(), other], vec![]),
            // It came and went between two looks.
            (vec![client()], vec![other.ends]),
        ] {
            let found = seen().compare(&network(10, &connections), &told);
            assert_eq!(found, Progress::Disturbed, "{connections:?} {told:?}");
        }
        let mut ended = seen_of(&[], &[ended]);
        assert_eq!(ended.compare(&network(10, &[]), &[]), Progress::Over, "the end of one that had ended");
    }

    #[test]
    fn what_is_counted_and_never_told_is_something_else() {
        let mut seen = seen();
        for _ in 0..PATIENCE {
            assert_eq!(seen.compare(&network(11, &[client()]), &[]), Progress::Under);
        }
        assert_eq!(seen.compare(&network(11, &[client()]), &[]), Progress::Disturbed);
    }

    #[test]
    fn a_client_that_was_served_before_is_no_probe_wherever_it_comes_from() {
        let old = connection(NODE, 3, true, 50);
        let mut seen = seen_of(&[probe(true).ends], &[probe(true), old]);
        assert_eq!(seen.compare(&network(10, &[old]), &[]), Progress::Over);
        assert_eq!(seen.compare(&network(10, &[Connection { bytes: 51, ..old }]), &[]), Progress::Disturbed);
    }

    #[test]
    fn a_probe_that_came_between_the_first_two_looks_is_counted() {
        let mut seen = seen_of(&[probe(true).ends], &[]);
        assert_eq!(seen.compare(&network(11, &[probe(true)]), &[]), Progress::Under);
        assert_eq!(seen.compare(&network(11, &[]), &[]), Progress::Over);
    }
}
