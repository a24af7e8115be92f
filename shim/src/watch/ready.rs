//! Which descriptors are ready of those that a frozen agent waits for.

use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::FileType,
    net::{AddressFamily, sockopt},
    process::Pid,
};

use super::descriptors::{Held, ONCE, Owners};

/// The flags of a registration that ask for no readiness: how it reports (edge-triggered, one-shot, exclusive, keeping
/// the machine awake).
const MANNER: u32 = ONCE | 1 << 29 | 1 << 28;

/// The TCP listeners at which somebody waits, when nothing else is ready of what is `held`; nothing when something else
/// is, or that cannot be told.
pub(super) fn listeners(held: &[Held]) -> Option<Vec<OwnedFd>> {
    let mut owners = Owners::default();
    let mut found = Vec::new();
    for Held { process, number, duplicate, readiness } in held {
        let wanted = PollFlags::from_bits_retain(u16::try_from(readiness.bits() & !MANNER).ok()?);
        if !is_ready(duplicate, wanted) {
            continue;
        }
        match registrations(*process, *number) {
            None => found.push(listener(duplicate)?),
            Some(registered) => {
                for one in registered {
                    match one.look(&mut owners, *process) {
                        Found::Quiet => {}
                        Found::Listener(listener) => found.push(listener),
                        Found::Other => return None,
                    }
                }
            }
        }
    }
    Some(found)
}

/// What an epoll was told to poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Registration {
    number: i32,
    events: u32,
}

/// What the epoll polls that descriptor `number` of a process is; nothing when it is no epoll.
fn registrations(process: Pid, number: i32) -> Option<Vec<Registration>> {
    let fdinfo = fs::read_to_string(format!("/proc/{process}/fdinfo/{number}")).ok()?;
    fdinfo.contains("tfd:").then(|| parse(&fdinfo))
}

fn parse(fdinfo: &str) -> Vec<Registration> {
    let registration = |line: &str| {
        let mut fields = line.strip_prefix("tfd:")?.split_whitespace();
        let number = fields.next()?.parse().ok()?;
        Some(Registration { number, events: u32::from_str_radix(fields.nth(1)?, 16).ok()? })
    };
    fdinfo.lines().filter_map(registration).collect()
}

/// What is ready of what an epoll polls.
enum Found {
    /// Nothing.
    Quiet,
    /// A TCP listener.
    Listener(OwnedFd),
    /// Something else, or it cannot be told.
    Other,
}

impl Registration {
    fn look(self, owners: &mut Owners, process: Pid) -> Found {
        let Ok(Some(duplicate)) = owners.duplicate(process, self.number) else { return Found::Other };
        let Ok(wanted) = u16::try_from(self.events & !MANNER) else { return Found::Other };
        let mut wanted = PollFlags::from_bits_retain(wanted);
        if self.events & ONCE != 0 {
            // Writable as ever. And of what else than a stream is readable the agent may have been told before the freeze.
            wanted.remove(PollFlags::OUT | PollFlags::WRNORM);
            if !is_stream(&duplicate) {
                return Found::Quiet;
            }
        }
        if !is_ready(&duplicate, wanted) {
            return Found::Quiet;
        }
        listener(&duplicate).map_or(Found::Other, Found::Listener)
    }
}

/// A TCP listener; nothing of anything else.
fn listener(socket: &OwnedFd) -> Option<OwnedFd> {
    let inet = matches!(sockopt::socket_domain(socket), Ok(AddressFamily::INET | AddressFamily::INET6));
    let listens = inet && sockopt::socket_acceptconn(socket) == Ok(true);
    if listens { socket.try_clone().ok() } else { None }
}

pub(super) fn is_stream(descriptor: &OwnedFd) -> bool {
    rustix::fs::fstat(descriptor)
        .is_ok_and(|stat| matches!(FileType::from_raw_mode(stat.st_mode), FileType::Socket | FileType::Fifo))
}

/// Whether a descriptor has one of the `wanted` kinds of readiness now, or an error or an end.
pub(super) fn is_ready(descriptor: impl AsFd, wanted: PollFlags) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut polled = [PollFd::new(&descriptor, wanted)];
    poll(&mut polled, Some(&now)).is_ok_and(|count| count > 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        io::Write as _,
        net::{TcpListener, TcpStream},
        os::fd::AsRawFd as _,
    };

    use rustix::{
        event::epoll::{self, EventFlags},
        process::getpid,
    };

    use super::{super::descriptors::Duplicates, *};

    /// An epoll of a listener, and what polls it for an agent that waits for it.
    struct Agent {
        epoll: OwnedFd,
        listener: TcpListener,
        manner: EventFlags,
    }

    impl Agent {
        fn new(manner: EventFlags) -> Self {
            let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let agent = Self { epoll, listener, manner };
            agent.polls(&agent.listener, EventFlags::IN);
            agent
        }

        fn polls(&self, descriptor: impl AsFd, readiness: EventFlags) {
            let data = epoll::EventData::new_u64(0);
            epoll::add(&self.epoll, descriptor, data, readiness | self.manner).unwrap();
        }

        fn watched(&self) -> Duplicates {
            let wanted = [((getpid(), self.epoll.as_raw_fd()), EventFlags::IN)].into();
            Duplicates::take(&mut Owners::default(), &wanted).unwrap()
        }

        fn dial(&self) -> TcpStream {
            TcpStream::connect(self.listener.local_addr().unwrap()).unwrap()
        }
    }

    #[test]
    fn a_listener_in_an_epoll_is_found_when_somebody_waits_there_and_for_nothing_else() {
        for manner in [EventFlags::empty(), EventFlags::ET, EventFlags::ET | EventFlags::OUT] {
            let agent = Agent::new(manner);
            let mut client = agent.dial();
            let (server, _) = agent.listener.accept().unwrap();
            agent.polls(&server, EventFlags::IN | EventFlags::RDHUP);
            let mut events: Vec<epoll::Event> = Vec::with_capacity(8);
            let at_once = Timespec::default();
            // It has been told of what there is.
            epoll::wait(&agent.epoll, rustix::buffer::spare_capacity(&mut events), Some(&at_once)).unwrap();
            let watched = agent.watched();
            assert!(listeners(&watched.held).unwrap().is_empty());
            let _probe = agent.dial();
            assert!(watched.are_ready());
            assert_eq!(listeners(&watched.held).unwrap().len(), 1, "{manner:?}");
            client.write_all(b"x").unwrap();
            assert!(listeners(&watched.held).is_none(), "{manner:?}: a byte has come, too");
        }
    }

    #[test]
    fn a_thread_in_accept_waits_for_its_listener_alone() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (reader, mut writer) = std::io::pipe().unwrap();
        let wanted =
            [&listener.as_fd(), &reader.as_fd()].map(|fd| ((getpid(), fd.as_raw_fd()), EventFlags::IN));
        let watched = Duplicates::take(&mut Owners::default(), &wanted.into()).unwrap();
        let _probe = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(listeners(&watched.held).unwrap().len(), 1);
        writer.write_all(b"x").unwrap();
        assert!(listeners(&watched.held).is_none());
    }

    #[test]
    fn registrations_are_read_with_what_they_ask_for() {
        let text = "pos:\t0\ntfd:        8 events: 80002005 data:  8  pos:0 ino:61af sdev:7\ntfd: x\n";
        assert_eq!(parse(text), [Registration { number: 8, events: 0x8000_2005 }]);
    }
}
