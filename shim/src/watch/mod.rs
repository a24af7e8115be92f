//! The readiness watch: notices what would have made a frozen agent run.
//!
//! A frozen process does not see that a connection has come or that its timer is due. While it is frozen the shim holds
//! duplicates of exactly those descriptors that its threads are blocked on (an epoll, a listener, a pipe) and polls
//! them, and it keeps the earliest time limit of their waits. A descriptor that no thread waits for is no demand:
//! unread input that the agent does not read would otherwise keep it awake for ever.
//!
//! What a thread is blocked on is told by its system call. It is looked at twice, before the freeze ([`look`]) and
//! after it ([`watch`]): a thread that did anything in between was about to work, and the sleep is given up. That also
//! covers what no descriptor shows any more, such as a request that a thread has read but not begun to answer.

mod descriptors;
mod ready;
mod signals;
mod sockets;

use std::{
    collections::{HashMap, HashSet},
    io,
    time::{Duration, Instant},
};

use criu_hooks::{
    readiness,
    waits::{
        self, TimedWait,
        calls::{self, Call, RESTART, Unclear, Until, Wait},
        threads::{self, Space, Thread},
    },
};
use rustix::{io::Errno, process::Pid, time::ClockId};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::debug;

use self::{
    descriptors::{Duplicates, Owners, Wanted},
    signals::Listener,
};
use crate::wake::WakeCause;

/// How often a thread goes to sleep, at most, on its way out of the freezer, back to its call and into the freezer again.
/// With more it may be in another call that looks the same.
const AGAIN: u64 = 6;
/// A time limit that is further away is none: no clock of this machine needs to count that far.
const NEVER: Duration = Duration::from_hours(30 * 365 * 24);

/// Why an agent cannot be watched, and so cannot sleep with its processes in place.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It has something to do. It may sleep a moment later.
    #[error("it is at work: {0}")]
    Busy(String),
    /// What a thread waits for cannot be seen from outside.
    #[error(
        "thread {thread} ({name}) waits for {what}, which would not wake it: it can only run or be checkpointed"
    )]
    Unseen {
        /// The thread.
        thread: Pid,
        /// Its name.
        name: String,
        /// What it waits for.
        what: &'static str,
    },
    /// A descriptor cannot be duplicated or polled.
    #[error("descriptor {number} of process {process}, which it waits for, cannot be watched: {source}")]
    Descriptor {
        /// The process.
        process: Pid,
        /// Its number there.
        number: i32,
        /// Why.
        source: io::Error,
    },
    /// It waits for more than the shim may have open.
    #[error(
        "it waits for {wanted} descriptors, and the shim may have {limit} open: raise containerd's LimitNOFILE"
    )]
    TooMany {
        /// How many.
        wanted: usize,
        /// The limit.
        limit: u64,
    },
    /// No epoll could be made.
    #[error("cannot make an epoll: {0}")]
    Epoll(Errno),
}

impl Error {
    fn descriptor(process: Pid, number: i32, error: Errno) -> Self {
        Error::Descriptor { process, number, source: error.into() }
    }
}

/// How an agent was just before its freeze.
#[derive(Debug, Default, Clone)]
pub struct Before {
    threads: HashMap<Pid, Thread>,
    packets: Option<u64>,
}

/// Looks at an agent that runs. Blocks for some ten microseconds a thread.
pub fn look(processes: &[Pid]) -> Before {
    // First: a packet that comes while the threads are looked at counts as one that came after.
    let packets = processes.first().and_then(|&first| threads::packets(first));
    Before {
        threads: threads::all(processes).into_iter().map(|thread| (thread.id, thread)).collect(),
        packets,
    }
}

/// Waits with a time limit that a freeze has interrupted, by thread. The kernel takes them up again under another number,
/// which tells neither the call nor how much of its limit is left.
#[derive(Debug, Default)]
pub struct Interrupted(HashMap<Pid, Known>);

/// A wait as it was when a freeze interrupted it.
#[derive(Debug, Clone, Copy)]
struct Known {
    process: Pid,
    call: Call,
    until: Option<Instant>,
    /// What was left of its time limit, where the kernel writes that down.
    left: Option<Duration>,
    /// How often its thread had gone to sleep by then, the freezer included.
    switches: u64,
}

impl Interrupted {
    /// The wait that a thread has taken up again after its last freeze.
    fn of(&self, thread: &Thread, call: &Call) -> Option<Known> {
        let known = self.0.get(&thread.id)?;
        let same = call.is_rest_of(&known.call);
        let again = call.number == RESTART || thread.switches <= known.switches + AGAIN;
        (same && again).then_some(*known)
    }

    /// The waits that end by themselves, as the last look at the frozen agent has shown them.
    pub fn timed(&self) -> Vec<TimedWait> {
        let timed = self.0.iter().filter_map(|(&thread, known)| {
            let Known { process, call, until, .. } = *known;
            Some(TimedWait { process, thread, call, until: until? })
        });
        timed.collect()
    }
}

/// What a frozen agent waits for, before there is anything to poll.
#[derive(Debug)]
pub struct Prepared {
    duplicates: Duplicates,
    deadline: Option<Instant>,
    listeners: Vec<Listener>,
}

/// The end of a wait of a thread of `process`, seen from the freeze; none when it is out of reach.
fn deadline(until: Until, process: Pid, frozen: Instant, elapsed: Duration) -> Option<Instant> {
    let now = Instant::now();
    let end = match until {
        Until::Left(left) => frozen.checked_add(left),
        Until::Lasts(all) => frozen.checked_add(all.saturating_sub(elapsed)),
        Until::Monotonic(at) => now.checked_add(waits::time_to(ClockId::Monotonic, at, process)),
        Until::Realtime(at) => now.checked_add(waits::time_to(ClockId::Realtime, at, process)),
    };
    end.filter(|end| end.saturating_duration_since(now) < NEVER)
}

/// How long a thread had been blocked when the freeze came: the time between two runs, by its processor's clock.
/// Nothing when that is not known, so that it wakes too late rather than again and again.
fn elapsed(before: &Thread, after: &Thread) -> Duration {
    match (before.began, after.began) {
        (Some(before), Some(after)) => after.saturating_sub(before),
        _ => Duration::ZERO,
    }
}

/// Whether a thread did nothing between two looks but be frozen: it is in the same call, and has gone to sleep at most
/// once more, in the freezer.
fn stood_still(before: &Thread, after: &Thread) -> bool {
    before.call == after.call && after.switches <= before.switches + 1 && before.read == after.read
}

/// One thread after the freeze: what it waits for, and what is to be known of it when it goes on.
fn wait_of(
    before: &Before,
    thread: &Thread,
    frozen: Instant,
    interrupted: &Interrupted,
) -> Result<(Wait, Known), Error> {
    let busy = |what: &str| Error::Busy(format!("thread {} ({}) {what}", thread.id, thread.name));
    let Some(call) = thread.call else { return Err(busy("runs")) };
    // A program of 32 bits has other numbers.
    if call.stack < 1 << 32 {
        return Err(Error::Unseen {
            thread: thread.id,
            name: thread.name.clone(),
            what: "a 32-bit system call",
        });
    }
    let earlier = before.threads.get(&thread.id);
    let seen = earlier.and_then(|earlier| earlier.call);
    let resumed = interrupted.of(thread, &call);
    let real = match (resumed, seen) {
        (Some(known), _) => known.call,
        // Interrupted since it was looked at.
        (None, Some(seen)) if call.number == RESTART && call.is_rest_of(&seen) => seen,
        _ => call,
    };
    let space =
        Space::open(thread.process).map_err(|error| busy(&format!("cannot be looked at: {error}")))?;
    let mut wait =
        calls::wait_of(&real, &|address, bytes| space.read(address, bytes)).map_err(|unclear| {
            let unseen = |what| Error::Unseen { thread: thread.id, name: thread.name.clone(), what };
            match unclear {
                Unclear::Runs => busy(&format!("is in system call {}", real.number)),
                Unclear::Unreadable => busy("changes the arguments of its system call"),
                Unclear::Restarted => unseen("the rest of an interrupted time limit"),
                Unclear::Unseen(what) => unseen(what),
            }
        })?;
    // The call takes what it waits for: it is not a poll, to which the limit of a socket means nothing.
    if let ([(number, readiness)], true, None) = (&*wait.descriptors, wait.takes, wait.until) {
        wait.until = sockets::limit(thread.process, *number, *readiness).map(Until::Lasts);
    }
    let until = match (resumed, wait.until) {
        (Some(known), _) if call.number == RESTART => known.until,
        // A limit that is written down as what is left begins anew after each freeze; its program's clock does not.
        (Some(known), Some(Until::Left(left))) if known.left.is_some_and(|before| left <= before) => {
            known.until
        }
        _ => {
            let elapsed = earlier.filter(|_| seen == Some(real)).map(|earlier| elapsed(earlier, thread));
            wait.until.and_then(|until| deadline(until, thread.process, frozen, elapsed.unwrap_or_default()))
        }
    };
    let left = match wait.until {
        Some(Until::Left(left)) => Some(left),
        _ => None,
    };
    let (process, switches) = (thread.process, thread.switches);
    Ok((wait, Known { process, call: real, until, left, switches }))
}

/// What the threads of a frozen agent wait for.
#[derive(Debug)]
pub struct Examined {
    wanted: Wanted,
    deadline: Option<Instant>,
    takes: bool,
    packets_came: bool,
    listeners: Vec<Listener>,
}

/// Finds out what an agent waits for that was frozen at `frozen`, and remembers what the freeze has interrupted. Blocks for
/// some ten microseconds a thread.
///
/// # Errors
/// [`Error::Busy`] and [`Error::Unseen`]; what was interrupted is remembered all the same.
pub fn examine(
    processes: &[Pid],
    before: &Before,
    frozen: Instant,
    interrupted: &mut Interrupted,
) -> Result<Examined, Error> {
    // At once: nobody of the agent can have taken a packet that comes from now on.
    let packets = processes.first().and_then(|&first| threads::packets(first));
    let packets_came = packets != before.packets;
    let mut wanted = Wanted::new();
    let mut deadlines = Vec::new();
    let mut takes = false;
    let mut remembered = HashMap::new();
    let mut outcome = Ok(());
    let threads = threads::all(processes);
    // The memory and the descriptors of a process are reached by its main thread, which may end before the others.
    let led: HashSet<Pid> = threads.iter().map(|thread| thread.id).collect();
    let mut listeners = Vec::with_capacity(threads.len());
    for thread in &threads {
        let mut listener = Listener { process: thread.process, thread: thread.id, awaited: 0 };
        if thread.is_stopped() {
            listeners.push(listener);
            continue;
        }
        let still = before.threads.get(&thread.id).is_some_and(|earlier| stood_still(earlier, thread));
        let busy = |what: &str| Err(Error::Busy(format!("thread {} ({}) {what}", thread.id, thread.name)));
        let unseen = |what| Error::Unseen { thread: thread.id, name: thread.name.clone(), what };
        let waits = if led.contains(&thread.process) {
            wait_of(before, thread, frozen, interrupted)
        } else {
            Err(unseen("something, and the main thread of its process has ended"))
        };
        match waits {
            Ok((wait, known)) => {
                remembered.insert(thread.id, known);
                deadlines.extend(known.until);
                takes |= wait.takes;
                listener.awaited = wait.signals;
                for (number, readiness) in wait.descriptors {
                    let place = (thread.process, number);
                    if !wanted.contains_key(&place) && signals::by_descriptor(thread.process, number) {
                        outcome = outcome.and(Err(unseen("signals, by a signalfd")));
                    }
                    *wanted.entry(place).or_insert(readiness) |= readiness;
                }
            }
            Err(error) => outcome = outcome.and(Err(error)),
        }
        if thread.signals.rouse(listener.awaited) {
            outcome = outcome.and(busy("has a signal to act on"));
        } else if !still {
            outcome = outcome.and(busy("runs"));
        }
        listeners.push(listener);
    }
    *interrupted = Interrupted(remembered);
    outcome?;
    Ok(Examined { wanted, deadline: deadlines.into_iter().min(), takes, packets_came, listeners })
}

/// Takes duplicates of what a frozen agent waits for. Blocks for some microseconds a descriptor.
///
/// # Errors
/// [`Error`], and nothing is held.
pub fn watch(examined: Examined) -> Result<Prepared, Error> {
    let Examined { wanted, deadline, takes, packets_came, listeners } = examined;
    let mut owners = Owners::default();
    let mut told = false;
    for &(process, number) in wanted.keys() {
        let epoll = descriptors::epoll(process, number);
        told |= epoll.as_ref().is_some_and(descriptors::Epoll::reports_once);
        if let Some(epoll) = epoll
            && epoll.owes_a_read(&mut owners, process)?
        {
            return Err(Error::Busy(format!("process {process} has not read all that it was told of")));
        }
    }
    if (takes || told) && packets_came {
        return Err(Error::Busy("packets came as it was frozen".to_owned()));
    }
    let duplicates = Duplicates::take(&mut owners, &wanted)?;
    if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
        return Err(Error::Busy("a time that it waits for has come".to_owned()));
    }
    debug!(descriptors = duplicates.len(), ?deadline, "watching");
    Ok(Prepared { duplicates, deadline, listeners })
}

/// A frozen agent that is watched. Dropping it gives all duplicates back.
#[derive(Debug)]
pub struct Watch {
    ready: AsyncFd<std::os::fd::OwnedFd>,
    duplicates: Duplicates,
    deadline: Option<Instant>,
    listeners: Vec<Listener>,
}

impl Watch {
    /// Begins to poll, on the runtime of the caller.
    ///
    /// # Errors
    /// When the shim has no descriptor left.
    pub fn begin(prepared: Prepared) -> io::Result<Watch> {
        let Prepared { duplicates, deadline, listeners } = prepared;
        let epoll = duplicates.epoll.try_clone()?;
        let ready = readiness::watch(epoll, Interest::READABLE)?;
        Ok(Watch { ready, duplicates, deadline, listeners })
    }

    /// How many duplicates it holds.
    pub fn held(&self) -> usize {
        self.duplicates.len()
    }

    /// When the first time comes that the agent waits for.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The TCP listeners at which somebody waits, when nothing else is ready of what the agent waits for and no time has
    /// come; nothing otherwise, or when that cannot be told. Blocks for some microseconds a descriptor.
    pub fn listeners(&self) -> Option<Vec<std::os::fd::OwnedFd>> {
        let timely = self.deadline.is_none_or(|deadline| deadline > Instant::now());
        timely.then(|| ready::listeners(&self.duplicates.held)).flatten()
    }

    /// Completes when the agent would have run, and says what for. Nothing is lost when it is dropped and called anew.
    pub async fn demand(&self) -> WakeCause {
        tokio::select! {
            () = self.readiness() => WakeCause::Traffic,
            () = due(self.deadline) => WakeCause::Timer,
            () = signals::arrive(&self.listeners) => WakeCause::Signal,
        }
    }

    async fn readiness(&self) {
        loop {
            // An error means that the shim ends.
            let Ok(mut guard) = self.ready.readable().await else { return std::future::pending().await };
            if self.duplicates.are_ready() {
                return;
            }
            guard.clear_ready();
        }
    }
}

async fn due(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
