//! Datagrams that came for a sleeping agent, sent on to its new socket.
//!
//! The kernel moves no datagrams from one socket to another, and CRIU cannot give the agent the old one. So they are
//! read, and sent again inside the container's network namespace with the sender's address as their source: the agent
//! answers whoever asked.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{BorrowedFd, OwnedFd},
};

use criu_hooks::netns;
use rustix::{
    io::Errno,
    net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto},
};
use tracing::warn;

/// The largest datagram.
const LARGEST: usize = 1 << 16;
const UDP: u8 = 17;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const UDP_HEADER: usize = 8;
/// What the kernel charges at least for each datagram in a queue, besides its bytes. It charges more.
const LEAST_CHARGE: usize = 256;
/// How many routers a packet that never leaves its machine may pass.
const HOPS: u8 = 64;

/// Sends what waits in `old`, a UDP socket of the network namespace `namespace`, to the socket that has taken its place,
/// and closes it. Tells how many datagrams were sent, and why the last of those that were not could not be.
///
/// # Errors
/// When none can be read.
pub(super) fn pass_on(namespace: BorrowedFd<'_>, old: OwnedFd) -> io::Result<Passed> {
    netns::within(namespace, move || {
        let bound = local_address(&old)?;
        // From here on nothing new comes to the old socket: it only hears itself.
        if let Err(error) = hear_nobody(&old, bound) {
            warn!(%bound, %error, "datagrams that come in this moment may be lost");
        }
        let waiting = take_all(&old)?;
        // Whatever it hears, what is sent from here on is for its successor.
        drop(old);
        let mut passed = Passed::default();
        for (sender, data) in waiting {
            let to = SocketAddr::new(destination(bound.ip(), sender), bound.port());
            let Some(packet) = packet(sender, to, &data) else { continue };
            match send(&packet, to) {
                Ok(()) => passed.sent += 1,
                Err(error) => {
                    passed.lost += 1;
                    passed.error = Some(error);
                }
            }
        }
        Ok(passed)
    })
}

/// What became of the datagrams of a socket.
#[derive(Debug, Default)]
pub(super) struct Passed {
    pub(super) sent: usize,
    pub(super) lost: usize,
    /// Of the last that was lost.
    pub(super) error: Option<io::Error>,
}

/// Connects a socket to its own port on the loopback device. One for both families can do so by either.
fn hear_nobody(socket: &OwnedFd, bound: SocketAddr) -> rustix::io::Result<()> {
    let connect = |to: IpAddr| net::connect(socket, &SocketAddr::new(to, bound.port()));
    match connect(loopback(bound)) {
        Err(_) if bound.is_ipv6() => connect(Ipv4Addr::LOCALHOST.to_ipv6_mapped().into()),
        connected => connected,
    }
}

/// Reads all datagrams that wait at a socket, with their senders: at most as many as its queue can hold, should more come
/// meanwhile.
fn take_all(socket: &OwnedFd) -> io::Result<Vec<(SocketAddr, Vec<u8>)>> {
    let capacity = net::sockopt::socket_recv_buffer_size(socket)?;
    let mut buffer = vec![0; LARGEST];
    let mut taken = Vec::new();
    let mut size = 0;
    while size <= capacity {
        size += LEAST_CHARGE;
        match net::recvfrom(socket, &mut buffer[..], RecvFlags::DONTWAIT) {
            Ok((length, _, sender)) => {
                size += length;
                let sender = sender.and_then(|sender| SocketAddr::try_from(sender).ok());
                let Some(sender) = sender else { continue };
                let sender = SocketAddr::new(sender.ip().to_canonical(), sender.port());
                taken.push((sender, buffer[..length].to_vec()));
            }
            Err(Errno::AGAIN) => break,
            // What an earlier answer of the agent has met with. It is told once, and says nothing of what waits.
            Err(_) => {}
        }
    }
    Ok(taken)
}

fn local_address(socket: &OwnedFd) -> io::Result<SocketAddr> {
    Ok(SocketAddr::try_from(net::getsockname(socket)?)?)
}

fn loopback(address: SocketAddr) -> IpAddr {
    if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
}

/// Where `sender` has sent to: the address that the socket is bound to, or the one from which it would be answered.
fn destination(bound: IpAddr, sender: SocketAddr) -> IpAddr {
    let bound = bound.to_canonical();
    if !bound.is_unspecified() && bound.is_ipv4() == sender.is_ipv4() {
        return bound;
    }
    let any: IpAddr =
        if sender.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let answering = std::net::UdpSocket::bind((any, 0))
        .and_then(|socket| socket.connect(sender).and_then(|()| socket.local_addr()));
    answering.map_or_else(|_| loopback(sender), |address| address.ip())
}

fn send(packet: &[u8], to: SocketAddr) -> io::Result<()> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    // A socket of this protocol takes packets with their headers.
    let raw = net::socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW))?;
    net::sendto(&raw, packet, SendFlags::empty(), &SocketAddr::new(to.ip(), 0))?;
    Ok(())
}

/// An IP packet with one datagram; nothing when it would be too long, or the addresses are not of one family.
fn packet(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(UDP_HEADER + data.len()).ok()?;
    let mut datagram = Vec::with_capacity(IPV6_HEADER + usize::from(length));
    let mut pseudo = Vec::new();
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let total = u16::try_from(IPV4_HEADER + usize::from(length)).ok()?.to_be_bytes();
            // Version 4 and five words of header. The kernel fills in the identification and the checksum.
            datagram.extend([0x45, 0, total[0], total[1], 0, 0, 0, 0, HOPS, UDP, 0, 0]);
            datagram.extend(from.octets());
            datagram.extend(to.octets());
            pseudo.extend(from.octets());
            pseudo.extend(to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let length = length.to_be_bytes();
            datagram.extend([0x60, 0, 0, 0, length[0], length[1], UDP, HOPS]);
            datagram.extend(from.octets());
            datagram.extend(to.octets());
            pseudo.extend(from.octets());
            pseudo.extend(to.octets());
        }
        _ => return None,
    }
    pseudo.extend([0, UDP]);
    pseudo.extend(length.to_be_bytes());
    let start = datagram.len();
    for number in [from.port(), to.port(), length, 0] {
        datagram.extend(number.to_be_bytes());
    }
    datagram.extend(data);
    let checksum = checksum(&[&pseudo, &datagram[start..]]).to_be_bytes();
    datagram[start + 6..start + UDP_HEADER].copy_from_slice(&checksum);
    Some(datagram)
}

/// The Internet checksum (RFC 1071) of these parts one after the other, as UDP has it: never 0, which means none. All
/// parts but the last are of even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let word = |pair: &[u8]| u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    let mut sum: u64 = words.map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    match !u16::try_from(sum).unwrap_or(0) {
        0 => 0xffff,
        other => other,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// What a socket at `bound`, which a successor at the same port has replaced, passes on to it.
    fn succeed(bound: &str, senders: usize) -> (Passed, Vec<Vec<u8>>) {
        let bind = |at: SocketAddr| {
            let family = if at.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
            let socket = net::socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None).unwrap();
            net::sockopt::set_socket_reuseport(&socket, true).unwrap();
            net::bind(&socket, &at).unwrap();
            socket
        };
        let old = bind(address(bound));
        let at = local_address(&old).unwrap();
        let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), at.port());
        let client = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        for number in 0..senders {
            client.send_to(&[u8::try_from(number).unwrap()], to).unwrap();
        }
        let new = bind(at);
        let namespace = std::fs::File::open("/proc/self/ns/net").unwrap();
        let passed = pass_on(std::os::fd::AsFd::as_fd(&namespace), old).unwrap();
        (passed, take_all(&new).unwrap().into_iter().map(|(_, data)| data).collect())
    }

    #[test]
    fn all_that_waits_at_a_socket_comes_to_its_successor() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("raw sockets are for root");
            return;
        }
        for bound in ["0.0.0.0:0", "127.0.0.1:0", "[::]:0"] {
            let (passed, came) = succeed(bound, 100);
            assert_eq!((passed.sent, passed.lost), (100, 0), "{bound}: {passed:?}");
            assert_eq!(came, (0..100).map(|number| vec![number]).collect::<Vec<_>>());
        }
    }

    #[test]
    fn errors_at_a_socket_keep_nobody_from_being_heard() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        client.send_to(b"before", socket.local_addr().unwrap()).unwrap();
        // Nobody listens there, which the kernel tells at the next call of a connected socket.
        socket.connect(nobody).unwrap();
        socket.send(b"?").unwrap();
        let taken = take_all(&socket.into()).unwrap();
        assert_eq!(taken, [(client.local_addr().unwrap(), b"before".to_vec())]);
    }

    #[test]
    fn a_socket_to_which_more_comes_all_the_time_is_read_for_as_long_as_its_queue_was() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let at = socket.local_addr().unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let client = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = client.send_to(b"more", at);
                }
            });
            let taken = take_all(&socket.into()).unwrap().len();
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(taken < 1 << 16, "{taken}");
        });
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_packet_has_the_addresses_the_length_and_a_checksum_that_adds_up() {
        let packet = packet(address("10.1.2.3:5353"), address("127.0.0.1:53"), b"odd").unwrap();
        assert_eq!(packet.len(), 31);
        assert_eq!(packet[..4], [0x45, 0, 0, 31]);
        assert_eq!(packet[12..20], [10, 1, 2, 3, 127, 0, 0, 1]);
        assert_eq!(packet[20..26], [0x14, 0xe9, 0, 53, 0, 11]);
        assert_eq!(&packet[28..], b"odd");
        // With its own checksum in it, the sum over it all is that of nothing.
        let pseudo = [10, 1, 2, 3, 127, 0, 0, 1, 0, UDP, 0, 11];
        assert_eq!(checksum(&[&pseudo, &packet[20..]]), 0xffff);
    }

    #[test]
    fn a_packet_of_the_other_family_is_like_that_too() {
        let packet = packet(address("[fd00::7]:9"), address("[::1]:7"), b"").unwrap();
        assert_eq!(packet.len(), 48);
        assert_eq!(packet[..8], [0x60, 0, 0, 0, 0, 8, UDP, HOPS]);
        assert_eq!(packet[40..46], [0, 9, 0, 7, 0, 8]);
    }

    #[test]
    fn what_is_no_packet_is_left_out() {
        assert_eq!(packet(address("10.1.2.3:1"), address("[::1]:1"), b""), None);
        assert_eq!(packet(address("10.1.2.3:1"), address("10.1.2.4:1"), &vec![0; 65508]), None);
        assert!(packet(address("10.1.2.3:1"), address("10.1.2.4:1"), &vec![0; 65507]).is_some());
    }

    #[test]
    fn a_datagram_was_sent_to_where_the_socket_is_bound() {
        let sender = address("127.0.0.1:4");
        assert_eq!(destination("10.0.0.1".parse().unwrap(), sender).to_string(), "10.0.0.1");
        assert_eq!(destination("0.0.0.0".parse().unwrap(), sender).to_string(), "127.0.0.1");
        assert_eq!(destination("::".parse().unwrap(), sender).to_string(), "127.0.0.1");
    }
}
