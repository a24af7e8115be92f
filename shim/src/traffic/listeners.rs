//! Duplicates of the sockets by which a sleeping agent is reached.

use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use criu_hooks::{
    descriptors::{Listing, Process},
    netns, procfs, readiness,
};
use rustix::{
    event::{
        Timespec,
        epoll::{self, CreateFlags, EventData, EventFlags},
    },
    io::Errno,
    process::Pid,
};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::{debug, warn};

use super::{
    TrafficError,
    datagrams::{self, Passed},
    held::{Held, Kind, Place, introduce},
    ports,
    probes::{Answering, Sources},
};

/// Whether the kernel moves the connections that wait for a listener to another of its group when it is closed. Holds
/// for IPv4 and IPv6; since Linux 5.14.
const MIGRATE: &str = "/proc/sys/net/ipv4/tcp_migrate_req";

/// The sockets by which an agent is reached, held while its processes are gone.
#[derive(Debug)]
pub struct Listeners {
    /// An epoll descriptor with all of them.
    readable: AsyncFd<OwnedFd>,
    held: Mutex<Vec<Held>>,
    /// The network namespace of the agent.
    namespace: Option<Arc<OwnedFd>>,
    /// Answers probes, which else wake the agent.
    answering: Option<Answering>,
}

/// What is at the sockets.
enum Look {
    /// Nobody, or nobody any more.
    Quiet,
    /// Somebody who needs the agent, at this address.
    Demand(String),
    /// Clients that were taken care of; there may be more.
    Taken,
}

impl Listeners {
    /// Duplicates the listening sockets of processes that stand still and have `open` open; `init` is the first of them. Changes
    /// nothing about the sockets. Probes from `probes` will be answered for the sleeping agent; without it they wake it.
    ///
    /// # Errors
    /// See [`TrafficError`]; nothing is held then.
    pub fn duplicate(init: Pid, open: &Listing, probes: Option<Sources>) -> Result<Self, TrafficError> {
        let mut held: HashMap<u64, Held> = HashMap::new();
        let network =
            |pid| procfs::namespace(pid, "net").map_err(|source| TrafficError::Process { pid, source });
        let own = network(init)?;
        let processes = open.iter().map(|(pid, descriptors)| Ok((network(*pid)? != own, *pid, descriptors)));
        let mut processes = processes.collect::<Result<Vec<_>, TrafficError>>()?;
        // Those of another namespace come last: what they have inherited is known by then.
        processes.sort_by_key(|(elsewhere, ..)| *elsewhere);
        for (elsewhere, pid, descriptors) in processes {
            let look = |source| TrafficError::Process { pid, source };
            let process = Process::open(pid).map_err(look)?;
            let inner_pid = procfs::inner_pid(pid).map_err(look)?;
            for descriptor in descriptors {
                let Some(inode) = descriptor.socket() else { continue };
                if held.contains_key(&inode) {
                    continue;
                }
                let socket = match process.duplicate(descriptor.number) {
                    Ok(socket) => socket,
                    // One that was closed by a thread that is not in the container's cgroup.
                    Err(error) if error.raw_os_error() == Some(Errno::BADF.raw_os_error()) => continue,
                    Err(error) => return Err(look(error)),
                };
                let Some(kind) = Kind::of(&socket).map_err(look)? else { continue };
                if elsewhere && kind != Kind::Path {
                    return Err(TrafficError::Elsewhere(pid));
                }
                let place = Place { inner_pid, number: descriptor.number };
                held.insert(inode, Held::new(socket, kind, inode, place).map_err(look)?);
            }
        }
        let mut held: Vec<Held> = held.into_values().collect();
        // Those that are given up first come last: the watch knows the others by their places.
        held.sort_by_key(|held| held.kind == Kind::Path);
        let mut namespace = None;
        if !held.is_empty() {
            let opened = File::open(format!("/proc/{init}/ns/net")).map_err(TrafficError::Migration)?;
            if held.iter().any(|held| held.kind == Kind::Stream) {
                migrate_requests(opened.as_fd()).map_err(TrafficError::Migration)?;
            }
            namespace = Some(Arc::new(opened.into()));
        }
        Self::watch(held, namespace, probes.map(Answering::new))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(
        held: Vec<Held>,
        namespace: Option<Arc<OwnedFd>>,
        answering: Option<Answering>,
    ) -> Result<Self, TrafficError> {
        let watch = |error: rustix::io::Errno| TrafficError::Watch(error.into());
        let all = epoll::create(CreateFlags::CLOEXEC).map_err(watch)?;
        for (index, one) in (0..).zip(&held) {
            epoll::add(&all, &one.socket, EventData::new_u64(index), EventFlags::IN).map_err(|error| {
                TrafficError::Socket { action: "watch", address: one.address.clone(), source: error.into() }
            })?;
        }
        let readable = readiness::watch(all, Interest::READABLE).map_err(TrafficError::Watch)?;
        Ok(Self { readable, held: Mutex::new(held), namespace, answering })
    }

    /// Where somebody waits for the agent at this moment, if anybody does. Probes wait like everybody else.
    pub fn demand(&self) -> Option<String> {
        let held = self.lock();
        self.ready(&held).first().map(|first| first.address.clone())
    }

    /// Those of `held` at which somebody waits, or some of them.
    fn ready<'held>(&self, held: &'held [Held]) -> Vec<&'held Held> {
        let mut events = Vec::with_capacity(held.len().max(1));
        let (all, at_once) = (self.readable.get_ref(), Timespec::default());
        if epoll::wait(all, rustix::buffer::spare_capacity(&mut events), Some(&at_once)).is_err() {
            return Vec::new();
        }
        let ready = events.iter().filter(|event| {
            let flags = event.flags;
            flags.contains(EventFlags::IN)
        });
        ready.filter_map(|event| held.get(usize::try_from(event.data.u64()).ok()?)).collect()
    }

    /// Looks at the sockets, and takes care of probes. Only while the agent's processes are gone: they would accept, too.
    fn attend(&self) -> Look {
        let held = self.lock();
        let ready = self.ready(&held);
        let needed = |one: &&&Held| match (&self.answering, &self.namespace) {
            (Some(answering), Some(namespace)) if one.kind == Kind::Stream => {
                !answering.take(&one.socket, one.inode, namespace)
            }
            _ => true,
        };
        match ready.iter().find(needed) {
            Some(needed) => Look::Demand(needed.address.clone()),
            None if ready.is_empty() => Look::Quiet,
            None => Look::Taken,
        }
    }

    /// Completes when somebody needs the agent, whose processes are gone; tells where.
    pub async fn waiting(&self) -> String {
        loop {
            let Ok(mut readable) = self.readable.readable().await else {
                return std::future::pending().await;
            };
            match self.attend() {
                Look::Demand(address) => return address,
                Look::Quiet => readable.clear_ready(),
                Look::Taken => {}
            }
        }
    }

    /// Makes the sockets ready to wait for the agent: to be called when its processes are gone, and its image holds
    /// the sockets as they were.
    pub fn hold(&self) {
        let mut used = BTreeSet::new();
        let mut all = self.lock();
        all.retain(|held| held.kind != Kind::Path);
        for held in &*all {
            if let Err(error) = held.hold() {
                warn!(address = held.address, %error, "connections made in its sleep may be reset at its wake");
            }
            used.extend(held.tcp_port());
        }
        let Some(namespace) = self.namespace.as_ref().filter(|_| !used.is_empty()) else { return };
        let opened = netns::within(namespace.as_fd(), || used.iter().copied().try_for_each(ports::open));
        if let Err(error) = opened {
            warn!(?used, %error, "what lingers of closed connections may keep the agent from waking for minutes");
        }
    }

    /// The sockets that the restored agent is to get as they are: their inodes and duplicates.
    ///
    /// # Errors
    /// When this process may have no more descriptors.
    pub fn to_inherit(&self) -> io::Result<Vec<(u64, OwnedFd)>> {
        let held = self.lock();
        let whole = held.iter().filter(|held| held.kind == Kind::Abstract);
        whole.map(|held| Ok((held.inode, held.socket.try_clone()?))).collect()
    }

    /// Gives what waits to the restored agent, whose processes are `pids`.
    pub fn hand_over(&self, pids: &[Pid]) {
        let held = std::mem::take(&mut *self.lock());
        let mut places = Vec::new();
        for Held { socket, kind, address, place, unrestored, .. } in held {
            match (kind, &self.namespace) {
                (Kind::Datagram, Some(namespace)) => match datagrams::pass_on(namespace.as_fd(), socket) {
                    Ok(Passed { sent, error: None, .. }) => debug!(address, sent, "datagrams sent on"),
                    Ok(Passed { sent, lost, error: Some(error) }) => {
                        warn!(address, sent, lost, %error, "some datagrams that came in its sleep are lost");
                    }
                    Err(error) => warn!(address, %error, "datagrams that came in its sleep are lost"),
                },
                // The kernel moves what waits for a listener when it is closed.
                _ => drop(socket),
            }
            // An abstract one is the agent's as it was.
            if kind != Kind::Abstract {
                places.push((place, kind, unrestored, address));
            }
        }
        let mut processes = HashMap::new();
        for &pid in pids {
            if let Ok(inner_pid) = procfs::inner_pid(pid) {
                processes.insert(inner_pid, pid);
            }
        }
        for (place, kind, unrestored, address) in places {
            let restored = processes
                .get(&place.inner_pid)
                .and_then(|pid| Process::open(*pid).ok()?.duplicate(place.number).ok());
            let Some(restored) = restored else {
                debug!(address, "the agent has closed the socket already");
                continue;
            };
            if let Err(error) = introduce(&restored, kind, unrestored) {
                warn!(address, %error, "the agent may learn late of connections made in its sleep, and its socket lacks what it had");
            }
        }
    }
}

/// Has the kernel move waiting connections, in the network namespace `namespace`.
fn migrate_requests(namespace: BorrowedFd<'_>) -> io::Result<()> {
    netns::within(namespace, || {
        if fs::read_to_string(MIGRATE)?.trim() == "1" {
            return Ok(());
        }
        fs::write(MIGRATE, "1")
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        os::{linux::net::SocketAddrExt as _, unix::net},
        process::{Child, Command},
        time::Duration,
    };

    use criu_hooks::descriptors;
    use rustix::io::FdFlags;

    use super::*;

    /// A process that has inherited whatever is not closed on exec.
    fn heir(words: &[&str]) -> (Child, Pid) {
        let child = Command::new(words[0]).args(&words[1..]).spawn().unwrap();
        let pid = Pid::from_child(&child);
        (child, pid)
    }

    #[tokio::test]
    async fn what_is_known_in_another_network_namespace_alone_is_not_held() {
        let name = format!("agentcube-test-{}", std::process::id());
        let address = net::SocketAddr::from_abstract_name(&name).unwrap();
        let listener = net::UnixListener::bind_addr(&address).unwrap();
        rustix::io::fcntl_setfd(&listener, FdFlags::empty()).unwrap();
        let (mut inside, init) = heir(&["sleep", "60"]);
        let (mut outside, pid) = heir(&["unshare", "--net", "sleep", "60"]);
        rustix::io::fcntl_setfd(&listener, FdFlags::CLOEXEC).unwrap();
        let own = procfs::namespace(init, "net").unwrap();
        let moved = (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            procfs::namespace(pid, "net").is_ok_and(|found| found != own)
        });
        let open = |pids: &[Pid]| descriptors::of_all(pids).unwrap();
        let alone = Listeners::duplicate(init, &open(&[pid]), None);
        let inherited = Listeners::duplicate(init, &open(&[pid, init]), None);
        for child in [&mut inside, &mut outside] {
            child.kill().unwrap();
            // The reaper of other tests may have been there first.
            let _ = child.wait();
        }
        if !moved {
            eprintln!("network namespaces cannot be made here");
            return;
        }
        assert!(matches!(alone, Err(TrafficError::Elsewhere(elsewhere)) if elsewhere == pid), "{alone:?}");
        let inherited = inherited.unwrap();
        assert_eq!(inherited.lock()[0].address, format!("@{name}"));
    }
}
