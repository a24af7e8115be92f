//! What has come and gone in a network namespace.

use std::{fs, io};

use super::{
    diag::{self, CLOSED, LISTEN, Tcp},
    queue::{CLOSE_WAIT, ESTABLISHED, SYN_RECV, Waiting},
};

/// How often the tables are read again when something comes in between.
const TRIES: usize = 10;

/// A network namespace at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Network {
    /// How many TCP connections were made so far, from either side, and how many datagrams came.
    pub events: u64,
    /// Its TCP connections.
    pub connections: Vec<Connection>,
}

/// A TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// Both ends of it.
    pub ends: Waiting,
    /// The inode of its socket, 0 when no process has it.
    pub inode: u64,
    /// Its own side has not closed it.
    pub open: bool,
    /// Bytes that came, and those that went and were acknowledged.
    pub bytes: u64,
}

impl Network {
    /// The network namespace of the calling thread. What is connected is counted, and what is counted is among the
    /// connections or has ended.
    ///
    /// # Errors
    /// When the kernel does not answer, or there is no moment between two events.
    pub fn now() -> io::Result<Self> {
        for _ in 0..TRIES {
            let before = events()?;
            let connections = diag::tcp()?.iter().filter_map(Connection::of).collect();
            if events()? == before {
                return Ok(Self { events: before, connections });
            }
        }
        Err(io::Error::other("connections come and go all the time"))
    }
}

/// Tells of connections in a network namespace that have ended, however short they were.
#[derive(Debug)]
pub struct Ended(diag::Ends);

impl Ended {
    /// For the network namespace of the calling thread, from now on.
    ///
    /// # Errors
    /// When the kernel does not offer it.
    pub fn listen() -> io::Result<Self> {
        diag::Ends::listen().map(Self)
    }

    /// The ends of those that have ended since this was last asked. The kernel tells of each a moment later.
    ///
    /// # Errors
    /// When there were more than the kernel keeps.
    pub fn take(&self) -> io::Result<Vec<Waiting>> {
        let connections = self.0.take()?.into_iter().filter(|socket| socket.remote.port() != 0);
        Ok(connections.map(|socket| Waiting::new(socket.local, socket.remote)).collect())
    }
}

impl Connection {
    fn of(socket: &Tcp) -> Option<Self> {
        let open = matches!(socket.state, ESTABLISHED | SYN_RECV | CLOSE_WAIT);
        let ends = Waiting::new(socket.local, socket.remote);
        let connection = Self { ends, inode: socket.inode, open, bytes: socket.bytes };
        (!matches!(socket.state, LISTEN | CLOSED)).then_some(connection)
    }
}

/// What the kernel has counted in the calling thread's network namespace.
fn events() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/thread-self/net/snmp")?;
    let counted = [("Tcp:", "ActiveOpens"), ("Tcp:", "PassiveOpens"), ("Udp:", "InDatagrams")];
    let mut sum: u64 = 0;
    for (protocol, name) in counted {
        let found = counter(&text, protocol, name);
        sum =
            sum.wrapping_add(found.ok_or_else(|| io::Error::other(format!("no counter {protocol} {name}")))?);
    }
    // Not there where IPv6 is switched off.
    let ipv6 = fs::read_to_string("/proc/thread-self/net/snmp6").unwrap_or_default();
    let datagrams = ipv6.lines().find_map(|line| line.strip_prefix("Udp6InDatagrams")?.trim().parse().ok());
    Ok(sum.wrapping_add(datagrams.unwrap_or(0)))
}

/// A counter in a table of a line of names above a line of values.
fn counter(text: &str, protocol: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(protocol));
    let place = lines.next()?.split_whitespace().position(|field| field == name)?;
    lines.next()?.split_whitespace().nth(place)?.parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    #[test]
    fn counters_are_found_by_their_names() {
        let text = "Tcp: A ActiveOpens PassiveOpens\nTcp: 1 7 9\nUdp: InDatagrams\nUdp: 5\n";
        assert_eq!(counter(text, "Tcp:", "PassiveOpens"), Some(9));
        assert_eq!(counter(text, "Udp:", "InDatagrams"), Some(5));
        assert_eq!(counter(text, "Udp:", "PassiveOpens"), None);
        assert_eq!(counter("", "Tcp:", "A"), None);
    }

    /// Other tests of this process make connections, too: only that ours are seen is certain.
    #[test]
    fn connections_are_seen_with_what_they_carried_and_until_they_are_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let local = listener.local_addr().unwrap();
        let ended = Ended::listen().unwrap();
        let before = events().unwrap();
        let mut client = TcpStream::connect(local).unwrap();
        let (mut server, peer) = listener.accept().unwrap();
        assert!(events().unwrap() >= before + 2);
        let find = || {
            let network = (0..100).find_map(|_| Network::now().ok()).unwrap();
            network.connections.into_iter().find(|one| one.ends == Waiting::new(local, peer))
        };
        let quiet = find().unwrap();
        assert!(quiet.open);
        client.write_all(b"hello").unwrap();
        server.read_exact(&mut [0; 5]).unwrap();
        let busy = find().unwrap();
        assert!(busy.open && busy.bytes == quiet.bytes + 5, "{quiet:?} {busy:?}");
        drop(client);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(find().is_some_and(|one| one.open), "it has not been told yet");
        drop(server);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(find().is_none_or(|one| !one.open));
        let told = (0..100).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            ended.take().unwrap().contains(&Waiting::new(local, peer))
        });
        assert!(told, "nothing tells of its end");
    }
}
