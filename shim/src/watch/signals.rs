//! Signals of frozen threads, of which nothing tells.

use std::{fs, path::PathBuf, time::Duration};

use criu_hooks::waits::threads::Signals;
use rustix::process::Pid;

/// How often a frozen agent is looked at for signals: `alarm` and the like arrive that late.
const PERIOD: Duration = Duration::from_secs(1);
/// How much time there is at least between two looks for each of its threads, so that agents of thousands cost no more.
const PERIOD_OF_ONE: Duration = Duration::from_millis(1);
/// How many threads are looked at before the shim does other things.
const AT_ONCE: usize = 64;
/// How deep the kernel lets epolls be nested.
const NESTED: u32 = 5;

/// A thread whose signals are looked for.
#[derive(Debug, Clone, Copy)]
pub struct Listener {
    /// Its process.
    pub process: Pid,
    /// The thread.
    pub thread: Pid,
    /// The signals that it waits for although it blocks them.
    pub awaited: u64,
}

impl Listener {
    fn is_roused(&self) -> bool {
        Signals::of(self.process, self.thread).rouse(self.awaited)
    }
}

/// Completes when a signal has come that one of these acts on or waits for.
pub async fn arrive(listeners: &[Listener]) {
    let threads = u32::try_from(listeners.len()).unwrap_or(u32::MAX);
    let mut looks = tokio::time::interval(PERIOD.max(PERIOD_OF_ONE.saturating_mul(threads)));
    loop {
        looks.tick().await;
        for some in listeners.chunks(AT_ONCE) {
            if some.iter().any(Listener::is_roused) {
                return;
            }
            tokio::task::yield_now().await;
        }
    }
}

/// Whether a descriptor is a signalfd, or an epoll that has one. A signalfd is readable for whoever has a signal pending that
/// polls it: never for the shim, which would even take the news of it out of the epoll.
pub fn by_descriptor(process: Pid, number: i32) -> bool {
    is_signalfd(process, number, NESTED)
}

fn is_signalfd(process: Pid, number: i32, depth: u32) -> bool {
    let path = PathBuf::from(format!("/proc/{process}/fd/{number}"));
    let Ok(target) = fs::read_link(&path) else { return false };
    match target.to_str() {
        Some("anon_inode:[signalfd]") => true,
        Some("anon_inode:[eventpoll]") if depth > 0 => {
            // All of this kind are one inode, which spares a look at each connection.
            let (Ok(stat), Ok(fdinfo)) =
                (rustix::fs::stat(&path), fs::read_to_string(format!("/proc/{process}/fdinfo/{number}")))
            else {
                return false;
            };
            members(&fdinfo, stat.st_ino).any(|member| is_signalfd(process, member, depth - 1))
        }
        _ => false,
    }
}

/// The descriptors in an epoll that are of this inode, from `/proc/PID/fdinfo/EPOLL`.
fn members(fdinfo: &str, inode: u64) -> impl Iterator<Item = i32> + '_ {
    fdinfo.lines().filter_map(move |line| {
        let mut fields = line.strip_prefix("tfd:")?.split_whitespace();
        let number = fields.next()?.parse().ok()?;
        let of = fields.find_map(|field| field.strip_prefix("ino:"))?;
        (u64::from_str_radix(of, 16).ok()? == inode).then_some(number)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::fd::AsRawFd;

    use rustix::{
        event::{EventfdFlags, epoll, eventfd},
        process::getpid,
    };

    use super::*;

    #[test]
    fn members_of_an_epoll_are_told_by_their_inode() {
        let text = "pos:\t0\ntfd:        8 events:       19 data:  8  pos:0 ino:61af sdev:7\n\
            tfd:        9 events: 80002005 data:  9  pos:0 ino:d sdev:e\n";
        assert_eq!(members(text, 0x61af).collect::<Vec<_>>(), [8]);
        assert_eq!(members(text, 0xd).collect::<Vec<_>>(), [9]);
    }

    #[test]
    fn what_is_no_signalfd_is_taken_for_none() {
        let inner = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let outer = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        for member in [&inner, &event] {
            let data = epoll::EventData::new_u64(0);
            epoll::add(&outer, member, data, epoll::EventFlags::IN).unwrap();
        }
        for descriptor in [&inner, &event, &outer] {
            assert!(!by_descriptor(getpid(), descriptor.as_raw_fd()));
        }
        assert!(!by_descriptor(getpid(), 1_000_000));
    }
}
