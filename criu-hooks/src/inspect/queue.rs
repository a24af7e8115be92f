//! Who waits at a listener to be accepted.

use std::{io, net::SocketAddr};

use super::diag::{self, LISTEN, Tcp};

pub(super) const ESTABLISHED: u8 = 1;
/// As a connection made with TCP Fast Open is at first.
pub(super) const SYN_RECV: u8 = 3;
/// The peer has nothing more to say.
pub(super) const CLOSE_WAIT: u8 = 8;

/// Who waits at a listener, in no order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Queue {
    /// How many connections were in the queue a moment before [`Self::waiting`] was looked up.
    pub length: usize,
    /// All that could be in the queue: connections to its port that no process has. Among them may be newer ones, and
    /// those of other listeners at that port. One that its peer has reset is in the queue, and not among them.
    pub waiting: Vec<Waiting>,
    /// The listener is bound to a network device: it cannot be reached from its own machine.
    pub on_device: bool,
}

/// A connection by its ends, mostly one that nobody has accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Waiting {
    /// Where the client has connected to.
    pub local: SocketAddr,
    /// The client.
    pub peer: SocketAddr,
}

impl Queue {
    /// The queue of the TCP listener with inode `listener` at `port`, in the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn of(listener: u64, port: u16) -> io::Result<Self> {
        Ok(Self::among(&diag::tcp_at(port)?, listener))
    }

    fn among(sockets: &[Tcp], listener: u64) -> Self {
        let own = sockets.iter().find(|socket| socket.state == LISTEN && socket.inode == listener);
        let length = own.map_or(0, |own| usize::try_from(own.unread).unwrap_or(usize::MAX));
        let on_device = own.is_some_and(|own| own.device != 0);
        // What a process has closed is without an inode, too, but never in one of these states.
        let waits =
            |socket: &&Tcp| socket.inode == 0 && matches!(socket.state, ESTABLISHED | SYN_RECV | CLOSE_WAIT);
        let waiting = sockets.iter().filter(waits);
        let waiting = waiting.map(|socket| Waiting::new(socket.local, socket.remote));
        Self { length, waiting: waiting.collect(), on_device }
    }
}

impl Waiting {
    /// A client at `peer` that has connected to `local`.
    pub fn new(local: SocketAddr, peer: SocketAddr) -> Self {
        Self { local: plain(local), peer: plain(peer) }
    }
}

/// An IPv4 address that is written as one of IPv6 becomes one of IPv4.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn queue(listener: &TcpListener) -> Queue {
        let inode = rustix::fs::fstat(listener).unwrap().st_ino;
        Queue::of(inode, listener.local_addr().unwrap().port()).unwrap()
    }

    #[test]
    fn those_who_wait_are_told_until_they_are_accepted() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let at = listener.local_addr().unwrap();
            assert_eq!(queue(&listener), Queue::default());
            let one = TcpStream::connect(at).unwrap();
            let other = TcpStream::connect(at).unwrap();
            let mut found = queue(&listener);
            found.waiting.sort_by_key(|waiting| waiting.peer);
            let mut peers = [one.local_addr().unwrap(), other.local_addr().unwrap()];
            peers.sort();
            assert_eq!(found.length, 2);
            assert_eq!(found.waiting, peers.map(|peer| Waiting { local: at, peer }));
            // First come, first accepted; whoever has said all still waits.
            let (_accepted, peer) = listener.accept().unwrap();
            assert_eq!(peer, one.local_addr().unwrap());
            drop(other);
            std::thread::sleep(std::time::Duration::from_millis(20));
            let found = queue(&listener);
            assert_eq!((found.length, found.waiting.len()), (1, 1));
        }
    }

    #[test]
    fn a_client_that_has_reset_its_connection_is_counted_and_not_told() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        rustix::net::sockopt::set_socket_linger(&client, Some(std::time::Duration::ZERO)).unwrap();
        drop(client);
        assert_eq!(queue(&listener), Queue { length: 1, ..Queue::default() });
    }

    #[test]
    fn a_client_of_the_other_family_is_told_by_its_own_address() {
        let Ok(listener) = TcpListener::bind("[::]:0") else { return };
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let waiting =
            Waiting { local: SocketAddr::from(([127, 0, 0, 1], port)), peer: client.local_addr().unwrap() };
        assert_eq!(queue(&listener), Queue { length: 1, waiting: vec![waiting], on_device: false });
    }
}
