//! One socket of the agent, held by the shim.

use std::{
    io,
    net::SocketAddr,
    os::fd::{OwnedFd, RawFd},
};

use rustix::{
    fs::{Gid, Uid},
    net::{self, AddressFamily, Shutdown, SocketAddrUnix, SocketType, ipproto},
};

use super::options;

/// How many connections may wait for an agent while it sleeps and wakes, whatever queue it asked for: it cannot take
/// any out until then. The kernel has a limit of its own below this (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// A descriptor of the agent, in a form that a restore does not change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Place {
    /// The process, by its number in the container.
    pub(super) inner_pid: i32,
    /// The descriptor's number in that process.
    pub(super) number: RawFd,
}

/// What comes to a socket, and how the agent gets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// TCP connections, which the kernel moves to the new listener.
    Stream,
    /// UDP datagrams, which are sent again.
    Datagram,
    /// Connections to an abstract unix address: the restored agent gets this very socket.
    Abstract,
    /// Connections to a unix address with a path, which CRIU makes anew. They are seen until the agent's processes end, and
    /// refused from there on.
    Path,
}

/// A socket of the agent, held open by this process.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) socket: OwnedFd,
    pub(super) kind: Kind,
    pub(super) inode: u64,
    /// Where it listens.
    pub(super) address: String,
    /// One of the agent's own descriptors of it.
    pub(super) place: Place,
    pub(super) unrestored: Unrestored,
}

/// What CRIU does not give to the new socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unrestored {
    /// Who made it. CRIU makes sockets as root.
    owner: (Uid, Gid),
    /// The kernel puts datagrams for it together (UDP_GRO).
    puts_together: bool,
}

impl Held {
    pub(super) fn new(socket: OwnedFd, kind: Kind, inode: u64, place: Place) -> io::Result<Self> {
        let address = net::getsockname(&socket)?;
        let address = match SocketAddrUnix::try_from(address.clone()) {
            Ok(unix) => match unix.path_bytes() {
                Some(path) => String::from_utf8_lossy(path).into_owned(),
                None => format!("@{}", String::from_utf8_lossy(unix.abstract_name().unwrap_or_default())),
            },
            Err(_) => SocketAddr::try_from(address)?.to_string(),
        };
        let stat = rustix::fs::fstat(&socket)?;
        let owner = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        let puts_together = kind == Kind::Datagram && options::puts_together(&socket)?;
        let unrestored = Unrestored { owner, puts_together };
        Ok(Self { socket, kind, inode, address, place, unrestored })
    }

    /// The TCP port at which it listens.
    pub(super) fn tcp_port(&self) -> Option<u16> {
        let listens = self.kind == Kind::Stream;
        let address = listens.then(|| net::getsockname(&self.socket).ok()).flatten()?;
        Some(SocketAddr::try_from(address).ok()?.port())
    }

    /// Makes it ready to wait for the agent.
    pub(super) fn hold(&self) -> io::Result<()> {
        if matches!(self.kind, Kind::Abstract | Kind::Path) {
            return Ok(());
        }
        // Sockets of one group have one owner and all say SO_REUSEPORT. The agent's new socket is made as root, and says
        // so until CRIU has put the agent's own choice back.
        rustix::fs::fchown(&self.socket, Some(Uid::ROOT), Some(Gid::ROOT))?;
        net::sockopt::set_socket_reuseport(&self.socket, true)?;
        if self.unrestored.puts_together {
            // They are sent on one by one, as they came.
            options::put_together(&self.socket, false)?;
        }
        if self.kind == Kind::Stream {
            net::listen(&self.socket, BACKLOG)?;
            // To accept from it never blocks. The agent gets a new socket, with flags of its own.
            rustix::io::ioctl_fionbio(&self.socket, true)?;
        }
        Ok(())
    }
}

impl Kind {
    /// What reaches the agent by this socket from outside of its container; nothing when it is no such socket.
    pub(super) fn of(socket: &OwnedFd) -> io::Result<Option<Self>> {
        let domain = net::sockopt::socket_domain(socket)?;
        let is_inet = matches!(domain, AddressFamily::INET | AddressFamily::INET6);
        if !is_inet && domain != AddressFamily::UNIX {
            return Ok(None);
        }
        let listens = net::sockopt::socket_acceptconn(socket)?;
        let kind = net::sockopt::socket_type(socket)?;
        let is_abstract = || -> io::Result<bool> {
            let unix = SocketAddrUnix::try_from(net::getsockname(socket)?);
            Ok(unix.is_ok_and(|unix| unix.abstract_name().is_some_and(|name| !name.is_empty())))
        };
        let is_bound_udp = || -> io::Result<bool> {
            Ok(net::sockopt::socket_protocol(socket)? == Some(ipproto::UDP)
                && SocketAddr::try_from(net::getsockname(socket)?)?.port() != 0)
        };
        Ok(match kind {
            SocketType::STREAM if is_inet && listens => Some(Self::Stream),
            SocketType::DGRAM if is_inet && is_bound_udp()? => Some(Self::Datagram),
            SocketType::STREAM | SocketType::SEQPACKET if !is_inet && listens => {
                Some(if is_abstract()? { Self::Abstract } else { Self::Path })
            }
            _ => None,
        })
    }
}

/// Gives a restored socket back what the restore did not, and wakes whoever waits at a listener: the kernel moves connections
/// to it without a word to those who wait already.
pub(super) fn introduce(restored: &OwnedFd, kind: Kind, unrestored: Unrestored) -> io::Result<()> {
    // The agent runs, and may have something else under that number by now.
    if Kind::of(restored)? != Some(kind) {
        return Ok(());
    }
    let Unrestored { owner, puts_together } = unrestored;
    if puts_together {
        options::put_together(restored, true)?;
    }
    if owner.0 != Uid::ROOT {
        rustix::fs::fchown(restored, Some(owner.0), Some(owner.1))?;
    }
    if kind == Kind::Stream {
        // A listener sends nothing, so this ends nothing, and the kernel wakes everybody at the socket on the way.
        net::shutdown(restored, Shutdown::Write)?;
    }
    Ok(())
}
