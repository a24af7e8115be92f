//! What the threads of a container wait for, as far as it can be seen from outside.

pub mod calls;
pub mod threads;

use std::{
    fs,
    time::{Duration, Instant},
};

use rustix::{
    process::Pid,
    time::{ClockId, clock_gettime},
};

use self::{
    calls::{Call, Until},
    threads::Space,
};

/// A wait with a time limit of a thread that stands still.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TimedWait {
    /// Its process.
    pub process: Pid,
    /// The thread.
    pub thread: Pid,
    /// The call that it waits in, as it was first made.
    pub call: Call,
    /// When it ends by itself.
    pub until: Instant,
}

/// How long it is until a moment of one of the clocks of `process`; nothing when it has passed.
pub fn time_to(clock: ClockId, at: Duration, process: Pid) -> Duration {
    let (ahead, behind) = match clock {
        ClockId::Monotonic => offset(process),
        _ => (Duration::ZERO, Duration::ZERO),
    };
    at.saturating_add(behind).saturating_sub(now(clock).saturating_add(ahead))
}

/// The time of a clock.
pub fn now(clock: ClockId) -> Duration {
    let now = clock_gettime(clock);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// By how much the monotonic clock of a process is ahead of this machine's, or behind it.
fn offset(process: Pid) -> (Duration, Duration) {
    let text = fs::read_to_string(format!("/proc/{process}/timens_offsets")).unwrap_or_default();
    parse_offset(&text).unwrap_or_default()
}

fn parse_offset(text: &str) -> Option<(Duration, Duration)> {
    let mut fields = text.lines().find_map(|line| line.strip_prefix("monotonic"))?.split_whitespace();
    let (seconds, nanos): (i64, u32) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let fraction = Duration::from_nanos(nanos.into());
    Some(if seconds < 0 { (fraction, whole) } else { (whole + fraction, Duration::ZERO) })
}

/// How long it is until the first time limit of the threads of `process`, which may run or stand still. About: how long a
/// call has lasted is told by when its thread last ran.
pub fn next(process: Pid) -> Option<Duration> {
    // Both are times of a processor's clock.
    rustix::thread::sched_yield();
    let ran = threads::all(&[process]);
    let clock = threads::began_here()?;
    let space = Space::open(process).ok()?;
    let limits = ran.iter().filter(|thread| !thread.is_stopped()).filter_map(|thread| {
        let wait = calls::wait_of(&thread.call?, &|address, bytes| space.read(address, bytes)).ok()?;
        Some(match wait.until? {
            Until::Left(time) | Until::Lasts(time) => {
                time.saturating_sub(clock.saturating_sub(thread.began?))
            }
            Until::Monotonic(at) => time_to(ClockId::Monotonic, at, process),
            Until::Realtime(at) => time_to(ClockId::Realtime, at, process),
        })
    });
    limits.min()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_offset_of_a_clock_is_read_whatever_its_sign() {
        let text = "monotonic           -12  250000000\nboottime             7         0\n";
        let (ahead, behind) = parse_offset(text).unwrap();
        assert_eq!((ahead, behind), (Duration::from_millis(250), Duration::from_secs(12)));
        assert_eq!(parse_offset("monotonic 3 5"), Some((Duration::new(3, 5), Duration::ZERO)));
        assert_eq!(parse_offset("monotonic x 5"), None);
        let me = rustix::process::getpid();
        let at = now(ClockId::Monotonic) + Duration::from_mins(1);
        assert!(time_to(ClockId::Monotonic, at, me) > Duration::from_secs(59));
        assert_eq!(time_to(ClockId::Realtime, at, me), Duration::ZERO);
    }

    #[test]
    fn the_next_limit_of_a_sleeping_process_is_told() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Pid::from_child(&child);
        let found = (0..500).find_map(|_| {
            std::thread::sleep(Duration::from_millis(10));
            next(process)
        });
        child.kill().unwrap();
        child.wait().unwrap();
        let found = found.unwrap();
        assert!(found > Duration::from_secs(50) && found <= Duration::from_mins(1), "{found:?}");
    }
}
