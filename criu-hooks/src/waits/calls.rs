//! What a system call waits for: a table, and the arguments read out of the caller's memory.

use std::{io, time::Duration};

use rustix::event::epoll::EventFlags;

/// A system call that a thread is in, as `/proc/PID/task/TID/syscall` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Its number.
    pub number: u64,
    /// Its arguments.
    pub arguments: [u64; 6],
    /// The stack pointer of the caller.
    pub stack: u64,
    /// The instruction after the call.
    pub instruction: u64,
}

impl Call {
    /// Whether this may be `other`, taken up again after an interruption: of the same place and arguments.
    pub fn is_rest_of(&self, other: &Call) -> bool {
        Call { number: other.number, ..*self } == *other
    }
}

/// Reads the memory of a process: exactly so many bytes from an address.
pub type Memory<'a> = &'a dyn Fn(u64, &mut [u8]) -> io::Result<()>;

/// What a thread waits for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wait {
    /// Descriptors of its process, and the readiness that would end the call.
    pub descriptors: Vec<(i32, EventFlags)>,
    /// When the call ends by itself.
    pub until: Option<Until>,
    /// Signals that end it although they are blocked: one bit each.
    pub signals: u64,
    /// The call takes what it waited for, so that afterwards the descriptor no longer shows that there was something.
    pub takes: bool,
}

/// The end of a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// So long from the interruption by the freeze: the kernel has written down what was left.
    Left(Duration),
    /// So long from the beginning of the call.
    Lasts(Duration),
    /// A time of CLOCK_MONOTONIC (or of CLOCK_BOOTTIME, which differs by the suspensions of the machine).
    Monotonic(Duration),
    /// A time of CLOCK_REALTIME.
    Realtime(Duration),
}

/// Why it cannot be told what a call waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unclear {
    /// It is not a call that waits: the thread runs.
    Runs,
    /// It was interrupted before, and what it was then is not known.
    Restarted,
    /// Its end cannot be seen from outside; why.
    Unseen(&'static str),
    /// The arguments cannot be read.
    Unreadable,
}

/// Numbers of system calls.
#[cfg(target_arch = "x86_64")]
mod number {
    pub const READ: u64 = 0;
    pub const WRITE: u64 = 1;
    pub const POLL: u64 = 7;
    pub const READV: u64 = 19;
    pub const WRITEV: u64 = 20;
    pub const SELECT: u64 = 23;
    pub const PAUSE: u64 = 34;
    pub const NANOSLEEP: u64 = 35;
    pub const CONNECT: u64 = 42;
    pub const ACCEPT: u64 = 43;
    pub const SENDTO: u64 = 44;
    pub const RECVFROM: u64 = 45;
    pub const SENDMSG: u64 = 46;
    pub const RECVMSG: u64 = 47;
    pub const WAIT4: u64 = 61;
    pub const SEMOP: u64 = 65;
    pub const MSGRCV: u64 = 70;
    pub const FLOCK: u64 = 73;
    pub const RT_SIGTIMEDWAIT: u64 = 128;
    pub const RT_SIGSUSPEND: u64 = 130;
    pub const FUTEX: u64 = 202;
    pub const IO_GETEVENTS: u64 = 208;
    pub const RESTART: u64 = 219;
    pub const SEMTIMEDOP: u64 = 220;
    pub const CLOCK_NANOSLEEP: u64 = 230;
    pub const EPOLL_WAIT: u64 = 232;
    pub const MQ_TIMEDRECEIVE: u64 = 243;
    pub const WAITID: u64 = 247;
    pub const PSELECT6: u64 = 270;
    pub const PPOLL: u64 = 271;
    pub const EPOLL_PWAIT: u64 = 281;
    pub const ACCEPT4: u64 = 288;
    pub const RECVMMSG: u64 = 299;
    pub const IO_PGETEVENTS: u64 = 333;
}

/// Numbers of system calls. Those that this machine does not have are given numbers that no call has.
#[cfg(not(target_arch = "x86_64"))]
mod number {
    pub const EPOLL_PWAIT: u64 = 22;
    pub const FLOCK: u64 = 32;
    pub const READ: u64 = 63;
    pub const WRITE: u64 = 64;
    pub const READV: u64 = 65;
    pub const WRITEV: u64 = 66;
    pub const PSELECT6: u64 = 72;
    pub const PPOLL: u64 = 73;
    pub const WAITID: u64 = 95;
    pub const FUTEX: u64 = 98;
    pub const NANOSLEEP: u64 = 101;
    pub const CLOCK_NANOSLEEP: u64 = 115;
    pub const RESTART: u64 = 128;
    pub const RT_SIGSUSPEND: u64 = 133;
    pub const RT_SIGTIMEDWAIT: u64 = 137;
    pub const MQ_TIMEDRECEIVE: u64 = 183;
    pub const MSGRCV: u64 = 188;
    pub const SEMTIMEDOP: u64 = 192;
    pub const SEMOP: u64 = 193;
    pub const ACCEPT: u64 = 202;
    pub const CONNECT: u64 = 203;
    pub const SENDTO: u64 = 206;
    pub const RECVFROM: u64 = 207;
    pub const SENDMSG: u64 = 211;
    pub const RECVMSG: u64 = 212;
    pub const ACCEPT4: u64 = 242;
    pub const RECVMMSG: u64 = 243;
    pub const WAIT4: u64 = 260;
    pub const IO_GETEVENTS: u64 = 4;
    pub const IO_PGETEVENTS: u64 = 292;
    pub const POLL: u64 = 1 << 32;
    pub const SELECT: u64 = (1 << 32) + 1;
    pub const PAUSE: u64 = (1 << 32) + 2;
    pub const EPOLL_WAIT: u64 = (1 << 32) + 3;
}

/// Numbers that are the same on every machine.
mod newer {
    pub const IO_URING_ENTER: u64 = 426;
    pub const EPOLL_PWAIT2: u64 = 441;
    pub const FUTEX_WAITV: u64 = 449;
    pub const FUTEX_WAIT: u64 = 455;
}

/// The call by which the kernel goes on with one that was interrupted; it tells nothing of that one.
pub const RESTART: u64 = number::RESTART;

/// The most descriptors of one `poll` or `select` that are looked at: as many as a process may usually have open.
const MOST: u64 = 1 << 20;
const CLOCK_REALTIME: u64 = 0;
const CLOCK_TAI: u64 = 11;
const FUTEX_CLOCK_REALTIME: u64 = 256;
/// Flags of `io_uring_enter` that change neither the meaning of its first argument nor when it ends: GETEVENTS, SQ_WAKEUP and
/// SQ_WAIT.
const IORING_PLAIN: u64 = 7;

fn on(descriptor: u64, readiness: EventFlags, takes: bool) -> Wait {
    // A descriptor is an int: the upper half of its register means nothing.
    #[allow(clippy::cast_possible_truncation)]
    Wait { descriptors: vec![(descriptor as i32, readiness)], takes, ..Wait::default() }
}

fn time(until: Option<Until>) -> Wait {
    Wait { until, ..Wait::default() }
}

/// What a thread in `call` waits for. To be asked while it is frozen: the kernel writes down what is left of some
/// time limits when it interrupts them.
///
/// # Errors
/// [`Unclear`] when the call does not wait, or for something that cannot be seen.
pub fn wait_of(call: &Call, memory: Memory) -> Result<Wait, Unclear> {
    let [first, second, third, fourth, fifth, _] = call.arguments;
    match call.number {
        number::READ | number::READV | number::ACCEPT | number::ACCEPT4 => {
            Ok(on(first, EventFlags::IN, true))
        }
        // The time limit of `recvmmsg` is looked at only when something has come.
        number::RECVFROM | number::RECVMSG | number::RECVMMSG => Ok(on(first, EventFlags::IN, true)),
        number::MQ_TIMEDRECEIVE => {
            let until = timespec(memory, fifth)?.map(Until::Realtime);
            Ok(Wait { until, ..on(first, EventFlags::IN, true) })
        }
        newer::IO_URING_ENTER if fourth & !IORING_PLAIN != 0 => {
            Err(Unclear::Unseen("io_uring with a time limit or a registered ring"))
        }
        newer::IO_URING_ENTER => Ok(on(first, EventFlags::IN, true)),
        number::WRITE | number::WRITEV | number::SENDTO | number::SENDMSG | number::CONNECT => {
            Ok(on(first, EventFlags::OUT, true))
        }
        number::EPOLL_WAIT | number::EPOLL_PWAIT => {
            Ok(Wait { until: milliseconds(fourth), ..on(first, EventFlags::IN, false) })
        }
        newer::EPOLL_PWAIT2 => {
            let until = timespec(memory, fourth)?.map(Until::Lasts);
            Ok(Wait { until, ..on(first, EventFlags::IN, false) })
        }
        number::POLL => {
            let descriptors = polled(memory, first, second)?;
            Ok(Wait { descriptors, until: milliseconds(third), ..Wait::default() })
        }
        number::PPOLL => {
            let until = timespec(memory, third)?.map(Until::Left);
            Ok(Wait { descriptors: polled(memory, first, second)?, until, ..Wait::default() })
        }
        number::SELECT | number::PSELECT6 => {
            let left = if call.number == number::SELECT { timeval } else { timespec };
            let until = left(memory, fifth)?.map(Until::Left);
            let descriptors = selected(memory, first, [second, third, fourth])?;
            Ok(Wait { descriptors, until, ..Wait::default() })
        }
        number::NANOSLEEP => Ok(time(relative_sleep(memory, first, second)?)),
        number::CLOCK_NANOSLEEP if second & 1 == 0 => Ok(time(relative_sleep(memory, third, fourth)?)),
        number::CLOCK_NANOSLEEP => Ok(time(timespec(memory, third)?.map(|at| absolute(first, at)))),
        number::FUTEX => futex(memory, second, fourth),
        newer::FUTEX_WAITV => Ok(time(timespec(memory, fourth)?.map(|at| absolute(fifth, at)))),
        newer::FUTEX_WAIT => {
            let [.., clock] = call.arguments;
            Ok(time(timespec(memory, fifth)?.map(|at| absolute(clock, at))))
        }
        number::RT_SIGTIMEDWAIT => {
            let mut awaited = [0; 8];
            memory(first, &mut awaited).map_err(|_| Unclear::Unreadable)?;
            let until = timespec(memory, third)?.map(Until::Lasts);
            Ok(Wait { until, signals: u64::from_ne_bytes(awaited), ..Wait::default() })
        }
        // What ends these comes from threads of the same container, which are frozen too, or as a signal.
        number::WAIT4 | number::WAITID | number::PAUSE | number::RT_SIGSUSPEND => Ok(Wait::default()),
        // These are shared with whoever has the volume or the pod's IPC namespace.
        number::FLOCK => Err(Unclear::Unseen("a lock of a file")),
        number::SEMOP | number::SEMTIMEDOP => Err(Unclear::Unseen("a semaphore of System V")),
        number::MSGRCV => Err(Unclear::Unseen("a message queue of System V")),
        number::IO_GETEVENTS | number::IO_PGETEVENTS => Err(Unclear::Unseen("asynchronous input or output")),
        number::RESTART => Err(Unclear::Restarted),
        _ => Err(Unclear::Runs),
    }
}

/// Where the kernel writes down what is left of the time of a call that it interrupts, in which unit of the fraction of a
/// second, in nanoseconds.
pub fn remainder(call: &Call) -> Option<(u64, u32)> {
    let [_, second, third, fourth, fifth, _] = call.arguments;
    let (address, unit) = match call.number {
        number::NANOSLEEP => (second, 1),
        number::CLOCK_NANOSLEEP if second & 1 == 0 => (fourth, 1),
        number::PPOLL => (third, 1),
        number::PSELECT6 => (fifth, 1),
        number::SELECT => (fifth, 1000),
        _ => return None,
    };
    (address != 0).then_some((address, unit))
}

fn futex(memory: Memory, operation: u64, timeout: u64) -> Result<Wait, Unclear> {
    let at = || timespec(memory, timeout);
    let clock =
        |at| if operation & FUTEX_CLOCK_REALTIME == 0 { Until::Monotonic(at) } else { Until::Realtime(at) };
    match operation & 0x7f {
        // FUTEX_WAIT
        0 => Ok(time(at()?.map(Until::Lasts))),
        // FUTEX_WAIT_BITSET, FUTEX_WAIT_REQUEUE_PI
        9 | 11 => Ok(time(at()?.map(clock))),
        // FUTEX_LOCK_PI
        6 => Ok(time(at()?.map(Until::Realtime))),
        // FUTEX_LOCK_PI2
        13 => Ok(time(at()?.map(clock))),
        _ => Err(Unclear::Runs),
    }
}

/// A time limit in milliseconds, an int; negative for none.
fn milliseconds(register: u64) -> Option<Until> {
    #[allow(clippy::cast_possible_truncation)]
    let limit = (register as u32).cast_signed();
    u64::try_from(limit).ok().map(|limit| Until::Lasts(Duration::from_millis(limit)))
}

fn absolute(clock: u64, at: Duration) -> Until {
    match clock {
        CLOCK_REALTIME | CLOCK_TAI => Until::Realtime(at),
        _ => Until::Monotonic(at),
    }
}

/// A sleep of which the kernel writes down what is left where the caller wants to know.
fn relative_sleep(memory: Memory, request: u64, remainder: u64) -> Result<Option<Until>, Unclear> {
    match timespec(memory, remainder)? {
        Some(left) => Ok(Some(Until::Left(left))),
        None => Ok(timespec(memory, request)?.map(Until::Lasts)),
    }
}

fn pair(memory: Memory, address: u64) -> Result<Option<(i64, i64)>, Unclear> {
    if address == 0 {
        return Ok(None);
    }
    let mut bytes = [0; 16];
    memory(address, &mut bytes).map_err(|_| Unclear::Unreadable)?;
    let (seconds, fraction) = bytes.split_at(8);
    let number = |half: &[u8]| half.try_into().map(i64::from_ne_bytes).unwrap_or_default();
    Ok(Some((number(seconds), number(fraction))))
}

fn timespec(memory: Memory, address: u64) -> Result<Option<Duration>, Unclear> {
    Ok(pair(memory, address)?.map(|(seconds, nanos)| span(seconds, nanos)))
}

fn timeval(memory: Memory, address: u64) -> Result<Option<Duration>, Unclear> {
    Ok(pair(memory, address)?.map(|(seconds, micros)| span(seconds, micros.saturating_mul(1000))))
}

fn span(seconds: i64, nanos: i64) -> Duration {
    let whole = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    whole.saturating_add(Duration::from_nanos(u64::try_from(nanos).unwrap_or(0)))
}

/// The array of a `poll`.
fn polled(memory: Memory, address: u64, count: u64) -> Result<Vec<(i32, EventFlags)>, Unclear> {
    let length = usize::try_from(count.min(MOST) * 8).map_err(|_| Unclear::Unreadable)?;
    let mut bytes = vec![0; length];
    memory(address, &mut bytes).map_err(|_| Unclear::Unreadable)?;
    let entry = |bytes: &[u8]| {
        let descriptor = i32::from_ne_bytes(bytes[..4].try_into().ok()?);
        let events = u16::from_ne_bytes(bytes[4..6].try_into().ok()?);
        (descriptor >= 0).then(|| (descriptor, EventFlags::from_bits_truncate(events.into()) & POLLABLE))
    };
    Ok(bytes.chunks_exact(8).filter_map(entry).collect())
}

/// What `poll` may ask for; the other bits of an epoll registration mean something else.
const POLLABLE: EventFlags = EventFlags::from_bits_truncate(0x23c7);

/// The three sets of a `select`: readable, writable, exceptional.
fn selected(memory: Memory, count: u64, sets: [u64; 3]) -> Result<Vec<(i32, EventFlags)>, Unclear> {
    let words = usize::try_from(count.min(MOST).div_ceil(64)).map_err(|_| Unclear::Unreadable)?;
    let mut found: Vec<(i32, EventFlags)> = Vec::new();
    for (address, readiness) in sets.into_iter().zip([EventFlags::IN, EventFlags::OUT, EventFlags::PRI]) {
        if address == 0 {
            continue;
        }
        let mut bytes = vec![0; words * 8];
        memory(address, &mut bytes).map_err(|_| Unclear::Unreadable)?;
        for (number, byte) in (0i32..).step_by(8).zip(bytes) {
            let members = (0i32..8).filter(|bit| byte >> bit & 1 == 1).map(|bit| (number + bit, readiness));
            found.extend(members);
        }
    }
    Ok(found)
}

#[cfg(test)]
#[path = "calls_tests.rs"]
mod tests;
