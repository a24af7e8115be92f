//! Sockets that keep a container from being checkpointed.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    fs::File,
    io,
    net::SocketAddr,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use rustix::{
    net::{self, AddressFamily, SocketType, sockopt},
    process::Pid,
};

use super::{
    blocker::Blocker,
    connections::{self, Busy, Policy},
    diag::{self, Tcp, Unix},
};
use crate::{descriptors::Process, netns};

/// The protocol number of Multipath TCP.
const MPTCP: u32 = 262;

/// One of the descriptors of a socket.
#[derive(Debug, Clone, Copy)]
pub(super) struct Owner {
    pub(super) pid: Pid,
    pub(super) number: i32,
}

/// The sockets of a container by their inodes.
pub(super) type Sockets = HashMap<u64, Owner>;

/// What was found out about a container's sockets.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) blockers: Vec<Blocker>,
    /// The inodes of connections that would be closed.
    pub(super) closing: Vec<u64>,
}

/// The tables of the network namespace of `init`.
struct Tables {
    tcp: Vec<Tcp>,
    udp: HashSet<u64>,
    unix: Vec<Unix>,
}

impl Tables {
    fn of(init: Pid) -> io::Result<Self> {
        let namespace = File::open(format!("/proc/{init}/ns/net"))?;
        netns::within(namespace.as_fd(), || {
            Ok(Self { tcp: diag::tcp()?, udp: diag::udp()?.into_iter().collect(), unix: diag::unix()? })
        })
    }
}

/// Looks at `sockets`, those of the container whose first process is `init`. `volumes` are the mount points at which
/// others can find what the container makes.
pub(super) fn inspect(
    init: Pid,
    sockets: &Sockets,
    policy: Policy,
    volumes: &[PathBuf],
) -> io::Result<Findings> {
    if sockets.is_empty() {
        return Ok(Findings::default());
    }
    let tables = Tables::of(init)?;
    let mut blockers = Vec::new();

    let own = tables.tcp.iter().filter(|socket| sockets.contains_key(&socket.inode));
    let verdict = connections::judge(own, policy);
    let busy = verdict.busy.into_iter().map(|(peer, busy)| Blocker::Connection { peer, busy });
    blockers.extend(busy);
    let queued = verdict.queued.into_iter();
    blockers.extend(queued.map(|(address, waiting)| Blocker::Queue { address, waiting }));

    let own = tables.unix.iter().filter_map(|socket| Some((socket, sockets.get(&socket.inode)?)));
    blockers.extend(own.filter_map(|(socket, owner)| of_unix(owner.pid, socket, sockets, volumes)));

    let mut known = tables.udp;
    known.extend(tables.tcp.iter().map(|socket| socket.inode));
    known.extend(tables.unix.iter().map(|socket| socket.inode));
    for (inode, owner) in sockets.iter().filter(|(inode, _)| !known.contains(inode)) {
        // The container may run, so it may have closed it by now.
        let Ok(socket) = Process::open(owner.pid).and_then(|process| process.duplicate(owner.number)) else {
            continue;
        };
        blockers.extend(unknown(owner.pid, *inode, &socket)?);
    }
    Ok(Findings { blockers, closing: verdict.closing })
}

/// The first of the connections `closing` that must not be closed any more, in the network namespace of `init`.
pub(super) fn come_to_life(
    init: Pid,
    closing: &[u64],
    policy: Policy,
) -> io::Result<Option<(SocketAddr, Busy)>> {
    let namespace = File::open(format!("/proc/{init}/ns/net"))?;
    let sockets = netns::within(namespace.as_fd(), diag::tcp)?;
    let verdict = connections::judge(sockets.iter().filter(|socket| closing.contains(&socket.inode)), policy);
    Ok(verdict.busy.into_iter().next())
}

/// What keeps a unix socket of the process `pid` from being dumped: its other end is not among the container's `sockets`, or
/// others can connect or send to it.
fn of_unix(pid: Pid, socket: &Unix, sockets: &Sockets, volumes: &[PathBuf]) -> Option<Blocker> {
    let is_outside = |inode: &u64| !sockets.contains_key(inode);
    // One that nobody has accepted yet has no inode.
    if socket.peer.is_some_and(|peer| peer != 0 && is_outside(&peer)) {
        return Some(Blocker::UnixPeer { pid });
    }
    let (is_abstract, name) = match socket.name.split_first()? {
        (0, name) => (true, name),
        _ => (false, socket.name.split(|&byte| byte == 0).next()?),
    };
    let path = Path::new(OsStr::from_bytes(name));
    if !is_abstract && (socket.listens || socket.is_datagram) && lies_on(path, volumes) {
        return Some(Blocker::SharedListener { pid, path: path.to_owned() });
    }
    let prefix = if is_abstract { "@" } else { "" };
    let address = || format!("{prefix}{}", String::from_utf8_lossy(name));
    if socket.listens && socket.waiting.iter().any(is_outside) {
        return Some(Blocker::UnixQueue { pid, address: address() });
    }
    // One that is connected hears its peer alone.
    (is_abstract && socket.is_datagram && socket.peer.is_none())
        .then(|| Blocker::Mailbox { pid, address: address() })
}

/// What keeps a socket that is in none of the tables from being dumped.
fn unknown(pid: Pid, inode: u64, socket: &OwnedFd) -> io::Result<Option<Blocker>> {
    let family = sockopt::socket_domain(socket)?;
    let blocker = |family: String, hint| Some(Blocker::Socket { pid, family, hint });
    Ok(match family {
        AddressFamily::INET | AddressFamily::INET6 => {
            let protocol = sockopt::socket_protocol(socket)?.map_or(0, |protocol| protocol.as_raw().get());
            let known = [0, net::ipproto::TCP.as_raw().get(), net::ipproto::UDP.as_raw().get()];
            let pings = [1, net::ipproto::ICMPV6.as_raw().get()];
            if protocol == MPTCP {
                blocker(
                    "Multipath TCP".to_owned(),
                    "; a Go program does without it when GODEBUG=multipathtcp=0 is set",
                )
            } else if sockopt::socket_type(socket)? == SocketType::RAW
                || known.contains(&protocol)
                || pings.contains(&protocol)
                || protocol == net::ipproto::UDPLITE.as_raw().get()
            {
                None
            } else {
                blocker(format!("IP protocol {protocol}"), "")
            }
        }
        AddressFamily::UNIX if !is_unix_at(pid, inode)? => Some(Blocker::UnixPeer { pid }),
        AddressFamily::UNIX | AddressFamily::NETLINK | AddressFamily::PACKET => None,
        AddressFamily::VSOCK => blocker("the family vsock".to_owned(), ""),
        other => blocker(format!("family {}", other.as_raw()), ""),
    })
}

/// Whether a unix socket of the process `pid` belongs to that process's network namespace. A connection that came from
/// another one, by way of a path, belongs to that of the client.
fn is_unix_at(pid: Pid, inode: u64) -> io::Result<bool> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    let found = netns::within(namespace.as_fd(), diag::unix)?;
    Ok(found.iter().any(|socket| socket.inode == inode))
}

/// Whether an absolute path lies below one of these. A relative one, or one over links, may: it is not looked up, for
/// what lies there is the container's choice.
fn lies_on(path: &Path, volumes: &[PathBuf]) -> bool {
    !path.is_absolute() || volumes.iter().any(|volume| path.starts_with(volume))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        io::Write as _,
        net::{TcpListener, TcpStream},
        os::{
            fd::AsRawFd,
            linux::net::SocketAddrExt as _,
            unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
        },
        time::Duration,
    };

    use rustix::thread::{UnshareFlags, unshare_unsafe};

    use super::*;

    fn owned(sockets: &[&dyn AsRawFd]) -> Sockets {
        let pid = rustix::process::getpid();
        let entry = |socket: &&dyn AsRawFd| {
            let number = socket.as_raw_fd();
            let target = std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap();
            let descriptor =
                crate::descriptors::Descriptor { number, target: target.to_string_lossy().into_owned() };
            (descriptor.socket().unwrap(), Owner { pid, number })
        };
        sockets.iter().map(entry).collect()
    }

    fn kinds(sockets: &Sockets, policy: Policy, volumes: &[PathBuf]) -> Vec<&'static str> {
        let found = inspect(rustix::process::getpid(), sockets, policy, volumes).unwrap();
        found.blockers.iter().map(Blocker::kind).collect()
    }

    #[test]
    fn a_fresh_connection_and_a_waiting_one_are_reasons() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(kinds(&owned(&[&listener]), Policy::Close, &[]), ["queue"]);
        let (server, _) = listener.accept().unwrap();
        assert_eq!(kinds(&owned(&[&listener, &server]), Policy::default(), &[]), ["connection"]);
        assert!(kinds(&owned(&[&listener, &server]), Policy::Close, &[]).is_empty());
        drop(client);
    }

    #[test]
    fn a_connection_that_was_to_be_closed_is_kept_when_something_comes_by_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let policy = Policy::Auto { idle: Duration::from_millis(100) };
        std::thread::sleep(Duration::from_millis(200));
        let me = rustix::process::getpid();
        let found = inspect(me, &owned(&[&listener, &server]), policy, &[]).unwrap();
        assert_eq!(found.closing.len(), 1, "{:?}", found.blockers);
        assert_eq!(come_to_life(me, &found.closing, policy).unwrap(), None);
        client.write_all(b"request").unwrap();
        let busy = come_to_life(me, &found.closing, policy).unwrap();
        assert_eq!(busy, Some((client.local_addr().unwrap(), Busy::Unread(7))));
        assert_eq!(come_to_life(me, &found.closing, Policy::Close).unwrap(), None);
        assert_eq!(come_to_life(me, &[], policy).unwrap(), None);
    }

    #[test]
    fn a_unix_connection_is_a_reason_when_its_other_end_is_somebody_elses() {
        let (one, other) = UnixStream::pair().unwrap();
        assert_eq!(kinds(&owned(&[&one]), Policy::Keep, &[]), ["unix-peer"]);
        assert!(kinds(&owned(&[&one, &other]), Policy::Keep, &[]).is_empty());
    }

    #[test]
    fn a_unix_connection_is_a_reason_when_it_came_from_another_network_namespace() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("door");
        let listener = UnixListener::bind(&path).unwrap();
        let client = std::thread::scope(|scope| {
            let outside = scope.spawn(|| {
                // SAFETY: a network namespace of its own concerns no descriptor that this thread has in common with others.
                let moved = unsafe { unshare_unsafe(UnshareFlags::NEWNET) };
                moved.is_ok().then(|| UnixStream::connect(&path).unwrap())
            });
            outside.join().unwrap()
        });
        let Some(_client) = client else {
            eprintln!("network namespaces cannot be made here");
            return;
        };
        let (server, _) = listener.accept().unwrap();
        assert_eq!(kinds(&owned(&[&listener, &server]), Policy::Keep, &[]), ["unix-peer"]);
    }

    #[test]
    fn a_unix_listener_is_a_reason_when_others_can_find_it() {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("door")).unwrap();
        let volume = [directory.path().to_owned()];
        assert_eq!(kinds(&owned(&[&listener]), Policy::Keep, &volume), ["unix-listener"]);
        assert!(kinds(&owned(&[&listener]), Policy::Keep, &["/elsewhere".into()]).is_empty());
        drop(listener);
        let mailbox = UnixDatagram::bind(directory.path().join("mailbox")).unwrap();
        assert_eq!(kinds(&owned(&[&mailbox]), Policy::Keep, &volume), ["unix-listener"]);
        assert!(lies_on(Path::new("door"), &volume), "where a relative path leads is not known");
    }

    #[test]
    fn somebody_elses_client_that_waits_at_a_unix_listener_is_a_reason_also_when_it_has_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("door");
        let listener = UnixListener::bind(&path).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        assert_eq!(kinds(&owned(&[&listener]), Policy::Keep, &[]), ["queue"]);
        assert!(kinds(&owned(&[&listener, &client]), Policy::Keep, &[]).is_empty());
        drop(client);
        assert_eq!(kinds(&owned(&[&listener]), Policy::Keep, &[]), ["queue"]);
    }

    #[test]
    fn an_abstract_datagram_socket_is_a_reason_unless_it_hears_one_peer_alone() {
        let name = format!("agentcube-test-mailbox-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let mailbox = UnixDatagram::bind_addr(&address).unwrap();
        let found = inspect(rustix::process::getpid(), &owned(&[&mailbox]), Policy::Keep, &[]).unwrap();
        let pid = rustix::process::getpid();
        assert_eq!(found.blockers, [Blocker::Mailbox { pid, address: format!("@{name}") }]);
        let sender = UnixDatagram::unbound().unwrap();
        sender.connect_addr(&address).unwrap();
        assert!(kinds(&owned(&[&sender, &mailbox]), Policy::Keep, &[]).contains(&"unix-datagram"));
        mailbox.connect_addr(&address).unwrap();
        assert!(kinds(&owned(&[&mailbox]), Policy::Keep, &[]).is_empty());
    }
}
