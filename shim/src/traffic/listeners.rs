//! Duplicates of the sockets by which a sleeping agent is reached.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd, RawFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use criu_hooks::{
    descriptors::{self, Process},
    procfs, readiness,
};
use rustix::{
    event::{
        Timespec,
        epoll::{self, CreateFlags, EventData, EventFlags},
    },
    fs::{Gid, Uid},
    net::{self, AddressFamily, Shutdown, SocketType},
    process::Pid,
};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::{debug, warn};

use super::{TrafficError, namespace};

/// How many connections may wait for an agent while it sleeps and wakes, whatever queue it asked for: it cannot take
/// any out until then. The kernel has a limit of its own below this (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// A descriptor of the agent, in a form that a restore does not change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Place {
    /// The process, by its number in the container.
    inner_pid: i32,
    /// The descriptor's number in that process.
    number: RawFd,
}

/// A socket of the agent, held open by this process.
#[derive(Debug)]
struct Held {
    socket: OwnedFd,
    /// Where it listens.
    address: String,
    /// One of the agent's own descriptors of it.
    place: Place,
    /// Who made it. CRIU makes sockets as root.
    owner: (Uid, Gid),
}

/// The sockets by which an agent is reached, held while its processes are gone.
#[derive(Debug)]
pub struct Listeners {
    /// An epoll descriptor with all of them.
    readable: AsyncFd<OwnedFd>,
    held: Mutex<Vec<Held>>,
}

impl Listeners {
    /// Duplicates the listening sockets of the processes `pids`, which stand still. Changes nothing about the sockets.
    ///
    /// # Errors
    /// See [`TrafficError`]; nothing is held then.
    pub fn duplicate(pids: &[Pid]) -> Result<Self, TrafficError> {
        let mut held: HashMap<u64, Held> = HashMap::new();
        for &pid in pids {
            let look = |source| TrafficError::Process { pid, source };
            // A process that has ended and was not waited for has no descriptors.
            if !procfs::alive(pid) {
                continue;
            }
            let process = Process::open(pid).map_err(look)?;
            let inner_pid = procfs::inner_pid(pid).map_err(look)?;
            for descriptor in descriptors::of(pid).map_err(look)? {
                let Some(inode) = descriptor.socket() else { continue };
                if held.contains_key(&inode) {
                    continue;
                }
                let socket = process.duplicate(descriptor.number).map_err(look)?;
                if !is_listener(&socket).map_err(|error| look(error.into()))? {
                    continue;
                }
                let place = Place { inner_pid, number: descriptor.number };
                held.insert(inode, Held::new(socket, place).map_err(look)?);
            }
        }
        let held: Vec<Held> = held.into_values().collect();
        if let (Some(first), false) = (pids.first(), held.is_empty()) {
            let namespace = File::open(format!("/proc/{first}/ns/net")).map_err(TrafficError::Migration)?;
            namespace::migrate_requests(namespace.as_fd()).map_err(TrafficError::Migration)?;
        }
        Self::watch(held)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(held: Vec<Held>) -> Result<Self, TrafficError> {
        let watch = |error: rustix::io::Errno| TrafficError::Watch(error.into());
        let all = epoll::create(CreateFlags::CLOEXEC).map_err(watch)?;
        for (index, one) in (0..).zip(&held) {
            epoll::add(&all, &one.socket, EventData::new_u64(index), EventFlags::IN).map_err(|error| {
                TrafficError::Socket { action: "watch", address: one.address.clone(), source: error.into() }
            })?;
        }
        let readable = readiness::watch(all, Interest::READABLE).map_err(TrafficError::Watch)?;
        Ok(Self { readable, held: Mutex::new(held) })
    }

    /// Where somebody waits for the agent at this moment, if anybody does.
    pub fn demand(&self) -> Option<String> {
        let held = self.lock();
        let mut events = Vec::with_capacity(held.len().max(1));
        let (all, at_once) = (self.readable.get_ref(), Timespec::default());
        epoll::wait(all, rustix::buffer::spare_capacity(&mut events), Some(&at_once)).ok()?;
        let first = events.iter().find(|event| {
            let flags = event.flags;
            flags.contains(EventFlags::IN)
        })?;
        held.get(usize::try_from(first.data.u64()).ok()?).map(|held| held.address.clone())
    }

    /// Completes when somebody waits for the agent; tells where.
    pub async fn waiting(&self) -> String {
        loop {
            let Ok(mut readable) = self.readable.readable().await else {
                return std::future::pending().await;
            };
            if let Some(address) = self.demand() {
                return address;
            }
            readable.clear_ready();
        }
    }

    /// Makes the sockets ready to wait for the agent: to be called when its processes are gone, and its image holds
    /// the sockets as they were.
    pub fn hold(&self) {
        for held in &*self.lock() {
            if let Err(error) = held.hold() {
                warn!(address = held.address, %error, "connections made in its sleep may be reset at its wake");
            }
        }
    }

    /// Gives what waits to the restored agent, whose processes are `pids`.
    pub fn hand_over(&self, pids: &[Pid]) {
        let held = std::mem::take(&mut *self.lock());
        let places: Vec<_> = held.iter().map(|held| (held.place, held.owner, held.address.clone())).collect();
        // The kernel moves what waits for a listener when it is closed.
        drop(held);
        let mut processes = HashMap::new();
        for &pid in pids {
            if let Ok(inner_pid) = procfs::inner_pid(pid) {
                processes.insert(inner_pid, pid);
            }
        }
        for (place, owner, address) in places {
            let restored = processes
                .get(&place.inner_pid)
                .and_then(|pid| Process::open(*pid).ok()?.duplicate(place.number).ok());
            let Some(restored) = restored else {
                debug!(address, "the agent has closed the socket already");
                continue;
            };
            if let Err(error) = introduce(&restored, owner) {
                warn!(address, %error, "the agent may learn late of connections made in its sleep");
            }
        }
    }
}

impl Held {
    fn new(socket: OwnedFd, place: Place) -> io::Result<Self> {
        let address = net::getsockname(&socket)?;
        let address = std::net::SocketAddr::try_from(address).map_err(io::Error::from)?.to_string();
        let stat = rustix::fs::fstat(&socket)?;
        let owner = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        Ok(Self { socket, address, place, owner })
    }

    fn hold(&self) -> rustix::io::Result<()> {
        // Sockets of one group have one owner and all say SO_REUSEPORT. The agent's new listener is made as root, and
        // says so until CRIU has put the agent's own choice back.
        rustix::fs::fchown(&self.socket, Some(Uid::ROOT), Some(Gid::ROOT))?;
        net::sockopt::set_socket_reuseport(&self.socket, true)?;
        net::listen(&self.socket, BACKLOG)
    }
}

/// Whether a socket is one by which clients reach the agent.
fn is_listener(socket: &OwnedFd) -> rustix::io::Result<bool> {
    let is_inet = matches!(net::sockopt::socket_domain(socket)?, AddressFamily::INET | AddressFamily::INET6);
    Ok(is_inet
        && net::sockopt::socket_type(socket)? == SocketType::STREAM
        && net::sockopt::socket_acceptconn(socket)?)
}

/// Gives a restored listener its owner back, and wakes whoever waits for it: the kernel moves connections to it
/// without a word to those who wait already.
fn introduce(listener: &OwnedFd, owner: (Uid, Gid)) -> rustix::io::Result<()> {
    if !is_listener(listener)? {
        return Ok(());
    }
    if owner.0 != Uid::ROOT {
        rustix::fs::fchown(listener, Some(owner.0), Some(owner.1))?;
    }
    // A listener sends nothing, so this ends nothing, and the kernel wakes everybody at the socket on the way.
    net::shutdown(listener, Shutdown::Write)
}
