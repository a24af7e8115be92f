//! Which established connections may end for the sake of a sleep.

use std::{fmt, net::SocketAddr, time::Duration};

use super::diag::{CLOSED, LISTEN, Tcp};

/// What becomes of an established TCP connection when the agent is checkpointed: it cannot be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// One that is idle may be closed, as any server does. Any other keeps the agent from being checkpointed.
    Auto {
        /// How long no byte may have come or gone.
        idle: Duration,
    },
    /// Each keeps the agent from being checkpointed.
    Keep,
    /// Each may be closed.
    Close,
}

impl Default for Policy {
    fn default() -> Self {
        Self::Auto { idle: Duration::from_mins(1) }
    }
}

/// Why a connection must not be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Busy {
    /// The policy says so.
    Kept,
    /// It is being made, or torn down with something to be sent.
    Changing,
    /// So many bytes were received, and not read.
    Unread(u32),
    /// So many bytes were written, and not acknowledged.
    Unsent(u32),
    /// A byte came or went so long ago.
    Active(Duration),
}

impl fmt::Display for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kept => f.write_str("and connections are to be kept"),
            Self::Changing => f.write_str("which is being made or ended"),
            Self::Unread(bytes) => write!(f, "with {bytes} bytes that it has not read"),
            Self::Unsent(bytes) => write!(f, "with {bytes} bytes on their way"),
            Self::Active(ago) => write!(f, "which was used {:.1} s ago", ago.as_secs_f64()),
        }
    }
}

/// What is to be done about an agent's connections.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// The inodes of those that would be closed.
    pub closing: Vec<u64>,
    /// Those that keep it from being checkpointed: the peers, and why.
    pub busy: Vec<(SocketAddr, Busy)>,
    /// Listeners with connections that nobody has accepted, and how many.
    pub queued: Vec<(SocketAddr, u32)>,
}

/// Decides about an agent's TCP sockets.
pub fn judge<'a>(sockets: impl IntoIterator<Item = &'a Tcp>, policy: Policy) -> Verdict {
    let mut verdict = Verdict::default();
    for socket in sockets {
        match (socket.state, busy(socket, policy)) {
            (CLOSED, _) => {}
            (LISTEN, _) if socket.unread > 0 => verdict.queued.push((socket.local, socket.unread)),
            (LISTEN, _) => {}
            (_, Some(busy)) => verdict.busy.push((socket.remote, busy)),
            (_, None) => verdict.closing.push(socket.inode),
        }
    }
    verdict
}

/// Why the connection `socket` must not be closed, if it must not.
fn busy(socket: &Tcp, policy: Policy) -> Option<Busy> {
    const ESTABLISHED: u8 = 1;
    const CLOSE_WAIT: u8 = 8;
    const FIN_WAIT2: u8 = 5;
    let idle = match policy {
        Policy::Close => return None,
        Policy::Keep => return Some(Busy::Kept),
        Policy::Auto { idle } => idle,
    };
    if !matches!(socket.state, ESTABLISHED | CLOSE_WAIT | FIN_WAIT2) {
        return Some(Busy::Changing);
    }
    if socket.unread > 0 {
        return Some(Busy::Unread(socket.unread));
    }
    if socket.unsent > 0 {
        return Some(Busy::Unsent(socket.unsent));
    }
    (socket.idle < idle).then_some(Busy::Active(socket.idle))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn socket(state: u8, idle_seconds: u64) -> Tcp {
        let (local, remote) = ("10.0.0.1:80".parse().unwrap(), "10.0.0.9:999".parse().unwrap());
        let idle = Duration::from_secs(idle_seconds);
        Tcp { inode: 7, state, local, remote, device: 0, unread: 0, unsent: 0, idle, bytes: 0 }
    }

    fn reason(socket: &Tcp, policy: Policy) -> Option<Busy> {
        judge([socket], policy).busy.first().map(|(_, busy)| *busy)
    }

    #[test]
    fn only_an_idle_connection_with_nothing_in_flight_is_closed_by_default() {
        let auto = Policy::default();
        assert_eq!(judge([&socket(1, 60)], auto), Verdict { closing: vec![7], ..Verdict::default() });
        assert_eq!(reason(&socket(1, 59), auto), Some(Busy::Active(Duration::from_secs(59))));
        assert_eq!(reason(&Tcp { unread: 3, ..socket(1, 99) }, auto), Some(Busy::Unread(3)));
        assert_eq!(reason(&Tcp { unsent: 4, ..socket(1, 99) }, auto), Some(Busy::Unsent(4)));
        assert_eq!(reason(&socket(2, 99), auto), Some(Busy::Changing));
        assert_eq!(reason(&socket(8, 99), auto), None);
    }

    #[test]
    fn the_other_policies_do_not_look() {
        let busy = Tcp { unread: 3, ..socket(1, 0) };
        assert_eq!(reason(&busy, Policy::Close), None);
        assert_eq!(reason(&socket(1, 1000), Policy::Keep), Some(Busy::Kept));
    }

    #[test]
    fn listeners_and_closed_sockets_are_no_connections() {
        let listener = Tcp { unread: 2, ..socket(LISTEN, 0) };
        let verdict = judge([&listener, &socket(LISTEN, 0), &socket(CLOSED, 0)], Policy::Keep);
        assert_eq!(verdict, Verdict { queued: vec![(listener.local, 2)], ..Verdict::default() });
    }
}
