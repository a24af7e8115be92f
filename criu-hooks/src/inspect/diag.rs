//! The kernel's tables of sockets, asked by netlink (`sock_diag(7)`).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    time::Duration,
};

use rustix::{
    io::Errno,
    net::{
        self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType,
        netlink::{self, SocketAddrNetlink},
    },
};

const AF_UNIX: u8 = 1;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// The header of a netlink message.
const NLMSG_HEADER: usize = 16;
/// `struct inet_diag_msg`.
const INET_MESSAGE: usize = 72;
/// `struct unix_diag_msg`.
const UNIX_MESSAGE: usize = 16;
const INET_DIAG_INFO: u16 = 2;
const UNIX_DIAG_NAME: u16 = 0;
const UNIX_DIAG_PEER: u16 = 2;
const UNIX_DIAG_ICONS: u16 = 3;
/// The kernel fills at most this much at a time.
const ANSWER: usize = 32 << 10;

/// The number of the state of a listener.
pub(super) const LISTEN: u8 = 10;
/// The number of the state of a socket that is neither connected nor listens.
pub(super) const CLOSED: u8 = 7;

/// A TCP socket, as far as the kernel tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tcp {
    /// Its inode, 0 for one that no process has (any more, or yet).
    pub inode: u64,
    /// Its state, as the kernel numbers them.
    pub state: u8,
    /// Its own address.
    pub local: SocketAddr,
    /// Its peer's.
    pub remote: SocketAddr,
    /// The number of the network device that it is bound to, 0 for any.
    pub device: u32,
    /// Bytes that were received and not read; of a listener: connections that wait.
    pub unread: u32,
    /// Bytes that were written and not acknowledged by the peer.
    pub unsent: u32,
    /// How long no byte has come or gone.
    pub idle: Duration,
    /// Bytes that came, and those that went and were acknowledged.
    pub bytes: u64,
}

/// A unix socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unix {
    /// Its inode.
    pub inode: u64,
    /// It is one for datagrams.
    pub is_datagram: bool,
    /// Clients can connect to it.
    pub listens: bool,
    /// Where it is bound: a path, or a name that begins with a zero; empty when it is not.
    pub name: Vec<u8>,
    /// The inode of the socket that it is connected to.
    pub peer: Option<u64>,
    /// The inodes of those who wait to be accepted, 0 for one who has left again.
    pub waiting: Vec<u64>,
}

/// The TCP sockets of the calling thread's network namespace.
///
/// # Errors
/// When the kernel does not answer.
pub(super) fn tcp() -> io::Result<Vec<Tcp>> {
    tcp_at(0)
}

/// The TCP sockets of the calling thread's network namespace with this port of their own, or with any port for 0. A
/// listener is told before the connections that wait for it: none is in its queue and left out.
///
/// # Errors
/// When the kernel does not answer.
pub(super) fn tcp_at(port: u16) -> io::Result<Vec<Tcp>> {
    let mut found = Vec::new();
    for family in [AF_INET, AF_INET6] {
        each(&inet_request(family, IPPROTO_TCP, port), |message| found.extend(parse_tcp(message)))?;
    }
    Ok(found)
}

/// The inodes of the UDP sockets of the calling thread's network namespace.
///
/// # Errors
/// When the kernel does not answer.
pub(super) fn udp() -> io::Result<Vec<u64>> {
    let mut found = Vec::new();
    for family in [AF_INET, AF_INET6] {
        each(&inet_request(family, IPPROTO_UDP, 0), |message| {
            found.extend(parse_tcp(message).map(|socket| socket.inode));
        })?;
    }
    Ok(found)
}

/// The unix sockets of the calling thread's network namespace.
///
/// # Errors
/// When the kernel does not answer.
pub(super) fn unix() -> io::Result<Vec<Unix>> {
    /// Tell the name, the peer, and who waits.
    const SHOW: u32 = 1 | 4 | 8;
    let mut request = vec![AF_UNIX, 0, 0, 0];
    for number in [u32::MAX, 0, SHOW, u32::MAX, u32::MAX] {
        request.extend(number.to_ne_bytes());
    }
    let mut found = Vec::new();
    each(&request, |message| found.extend(parse_unix(message)))?;
    Ok(found)
}

/// `struct inet_diag_req_v2`: all sockets but those that only wait for stray packets; those with this port alone, unless
/// it is 0.
fn inet_request(family: u8, protocol: u8, port: u16) -> Vec<u8> {
    const TIME_WAIT: u32 = 6;
    const NEW_SYN_RECV: u32 = 12;
    /// The struct begins with the socket's own port. A request for all leaves the rest empty: the other port, addresses, a
    /// device and a cookie.
    const IDENTITY: usize = 48;
    let states: u32 = !(1 << TIME_WAIT | 1 << NEW_SYN_RECV);
    let mut request = vec![family, protocol, 1 << (INET_DIAG_INFO - 1), 0];
    request.extend(states.to_ne_bytes());
    let identity = request.len();
    request.extend(port.to_be_bytes());
    request.resize(identity + IDENTITY, 0);
    request
}

/// Tells of the TCP sockets of a network namespace that have ended.
#[derive(Debug)]
pub(super) struct Ends(OwnedFd);

impl Ends {
    /// For the network namespace of the calling thread, from now on.
    ///
    /// # Errors
    /// When the kernel does not offer it.
    pub(super) fn listen() -> io::Result<Self> {
        /// `SKNLGRP_INET_TCP_DESTROY` and `SKNLGRP_INET6_TCP_DESTROY`, the first and the third group.
        const GROUPS: u32 = 1 << 0 | 1 << 2;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::SOCK_DIAG))?;
        net::bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
        Ok(Self(socket))
    }

    /// Those that have ended since this was last asked. The kernel tells of each a moment later.
    ///
    /// # Errors
    /// When there were more than the kernel keeps.
    pub(super) fn take(&self) -> io::Result<Vec<Tcp>> {
        let mut buffer = vec![0; ANSWER];
        let mut found = Vec::new();
        loop {
            let length = match net::recv(&self.0, &mut buffer[..], RecvFlags::empty()) {
                Ok((length, _)) => length,
                Err(Errno::AGAIN) => return Ok(found),
                Err(error) => return Err(error.into()),
            };
            let mut rest = &buffer[..length];
            while let Some((kind, body, after)) = next_message(rest) {
                if kind == SOCK_DIAG_BY_FAMILY {
                    found.extend(parse_tcp(body));
                }
                rest = after;
            }
        }
    }
}

/// Sends a request for a table, and passes each message of the answer on.
fn each(request: &[u8], mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let flags = SocketFlags::CLOEXEC;
    let socket = net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::SOCK_DIAG))?;
    let length = u32::try_from(NLMSG_HEADER + request.len()).map_err(io::Error::other)?;
    let mut message = Vec::with_capacity(NLMSG_HEADER + request.len());
    message.extend(length.to_ne_bytes());
    message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(request);
    net::sendto(&socket, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut buffer = vec![0; ANSWER];
    loop {
        let (length, _) = net::recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        let mut rest = &buffer[..length];
        if rest.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        while let Some((kind, body, after)) = next_message(rest) {
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let number = number::<4>(body, 0).map_or(0, i32::from_ne_bytes);
                    return Err(io::Error::from_raw_os_error(-number));
                }
                SOCK_DIAG_BY_FAMILY => take(body),
                _ => {}
            }
            rest = after;
        }
    }
}

/// The first message in `bytes`: its type, its body, and what follows it.
fn next_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(number(bytes, 0)?)).ok()?;
    let kind = u16::from_ne_bytes(number(bytes, 4)?);
    let body = bytes.get(NLMSG_HEADER..length)?;
    Some((kind, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// The attribute `wanted` among those in `bytes`.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(number(bytes, 0)?));
        let kind = u16::from_ne_bytes(number(bytes, 2)?);
        let value = bytes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// Parses a `struct inet_diag_msg` and its attributes.
fn parse_tcp(message: &[u8]) -> Option<Tcp> {
    let word = |at| number(message, at).map(u32::from_ne_bytes);
    let family = *message.first()?;
    let address = |port: usize, at: usize| -> Option<SocketAddr> {
        let ip: IpAddr = match family {
            AF_INET => Ipv4Addr::from(number::<4>(message, at)?).into(),
            AF_INET6 => Ipv6Addr::from(number::<16>(message, at)?).into(),
            _ => return None,
        };
        Some(SocketAddr::new(ip, u16::from_be_bytes(number(message, port)?)))
    };
    // struct tcp_info: the milliseconds since data was last sent, and last received; the bytes of each.
    let info = attribute(message.get(INET_MESSAGE..)?, INET_DIAG_INFO).unwrap_or_default();
    let since = |at| number(info, at).map_or(0, u32::from_ne_bytes);
    let bytes = |at| number(info, at).map_or(0, u64::from_ne_bytes);
    Some(Tcp {
        state: *message.get(1)?,
        local: address(4, 8)?,
        remote: address(6, 24)?,
        device: word(40)?,
        unread: word(56)?,
        unsent: word(60)?,
        inode: word(68)?.into(),
        idle: Duration::from_millis(since(44).min(since(52)).into()),
        bytes: bytes(120).wrapping_add(bytes(128)),
    })
}

/// Parses a `struct unix_diag_msg` and its attributes.
fn parse_unix(message: &[u8]) -> Option<Unix> {
    const SOCK_DGRAM: u8 = 2;
    let inode = |bytes, at| number(bytes, at).map(|inode| u64::from(u32::from_ne_bytes(inode)));
    let attributes = message.get(UNIX_MESSAGE..)?;
    let waiting = attribute(attributes, UNIX_DIAG_ICONS).unwrap_or_default();
    Some(Unix {
        inode: inode(message, 4)?,
        is_datagram: *message.get(1)? == SOCK_DGRAM,
        listens: *message.get(2)? == LISTEN,
        name: attribute(attributes, UNIX_DIAG_NAME).unwrap_or_default().to_owned(),
        peer: attribute(attributes, UNIX_DIAG_PEER).and_then(|peer| inode(peer, 0)),
        waiting: waiting.chunks(4).filter_map(|one| inode(one, 0)).collect(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{TcpListener, TcpStream, UdpSocket},
        os::{fd::AsFd, unix::net::UnixStream},
    };

    use super::*;

    fn inode(socket: impl AsFd) -> u64 {
        rustix::fs::fstat(socket).unwrap().st_ino
    }

    #[test]
    fn a_connection_is_told_with_its_peer_and_what_is_in_flight() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let waiting = tcp().unwrap().into_iter().find(|found| found.inode == inode(&listener)).unwrap();
            assert_eq!((waiting.state, waiting.unread), (LISTEN, 1));
            let (mut server, peer) = listener.accept().unwrap();
            client.write_all(b"five!").unwrap();
            std::thread::sleep(Duration::from_millis(50));
            let find = || tcp().unwrap().into_iter().find(|found| found.inode == inode(&server)).unwrap();
            let found = find();
            assert_eq!((found.local, found.remote), (server.local_addr().unwrap(), peer));
            assert_eq!((found.state, found.unread, found.unsent), (1, 5, 0));
            assert!(found.idle >= Duration::from_millis(30), "{found:?}");
            assert!(found.idle < Duration::from_secs(10), "{found:?}");
            server.read_exact(&mut [0; 5]).unwrap();
            let found = tcp().unwrap().into_iter().find(|found| found.inode == inode(&server)).unwrap();
            assert_eq!(found.unread, 0);
        }
    }

    #[test]
    fn datagram_and_unix_sockets_are_told() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(udp().unwrap().contains(&inode(&socket)));
        let (one, other) = UnixStream::pair().unwrap();
        let found = unix().unwrap().into_iter().find(|found| found.inode == inode(&one)).unwrap();
        assert_eq!(found.peer, Some(inode(&other)));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_upset_the_parsers(bytes: Vec<u8>) {
            let _ = (next_message(&bytes), attribute(&bytes, 2), parse_tcp(&bytes), parse_unix(&bytes));
        }
    }
}
