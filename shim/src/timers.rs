//! Timers of checkpointed agents: which of them wake it, and the alarm for the first.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use criu_hooks::{readiness, waits};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::io::{Interest, unix::AsyncFd};

/// An agent whose timer is due sooner than this would wake about when it has fallen asleep.
const LEAST: Duration = Duration::from_secs(1);
/// How long it takes until a wake that has failed is tried again, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_mins(10);

/// What becomes of the timers of an agent that is checkpointed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// They stand still with it, and wake it never.
    Resume,
    /// The first wakes it.
    Wake,
    /// The first wakes it of those that are due so late or later; sooner ones are taken for a poll's tick.
    Auto {
        /// How late.
        horizon: Duration,
    },
}

impl Policy {
    /// Whether the time that the agent sleeps counts for its timers.
    pub fn counts(self) -> bool {
        self != Policy::Resume
    }

    /// Which of these times until a timer is due wakes the agent.
    pub fn first(self, due: impl Iterator<Item = Duration>) -> Option<Duration> {
        match self {
            Policy::Resume => None,
            Policy::Wake => due.min(),
            Policy::Auto { horizon } => due.filter(|left| *left >= horizon).min(),
        }
    }

    /// The time until a timer that is too near for a sleep.
    pub fn too_near(self, next: Option<Duration>) -> Option<Duration> {
        next.filter(|next| self == Policy::Wake && *next < LEAST)
    }
}

/// Rings at a moment by CLOCK_BOOTTIME, which the suspension of the machine does not stop.
#[derive(Debug)]
pub struct Alarm {
    timer: AsyncFd<OwnedFd>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    at: Option<Duration>,
    /// How long it was put off the last time.
    pause: Duration,
}

impl Alarm {
    /// One that is not set, on the runtime of the caller.
    ///
    /// # Errors
    /// When the shim has no descriptor left.
    pub fn new() -> io::Result<Alarm> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Boottime, flags)?;
        let timer = readiness::watch(timer, Interest::READABLE)?;
        Ok(Alarm { timer, state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets it ring in so long.
    ///
    /// # Errors
    /// When the kernel refuses the time.
    pub fn set(&self, left: Duration) -> io::Result<()> {
        let at = waits::now(ClockId::Boottime).saturating_add(left);
        let value = Timespec {
            tv_sec: i64::try_from(at.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: at.subsec_nanos().into(),
        };
        let once = Itimerspec { it_interval: Timespec::default(), it_value: value };
        timerfd_settime(self.timer.get_ref(), TimerfdTimerFlags::ABSTIME, &once)?;
        self.lock().at = Some(at);
        Ok(())
    }

    /// Whether it has rung, or rings.
    fn is_due(&self) -> bool {
        let at = self.lock().at;
        at.is_some_and(|at| at <= waits::now(ClockId::Boottime))
    }

    /// Completes when it rings. Nothing is lost when this is dropped and called anew.
    pub async fn rings(&self) {
        while !self.is_due() {
            // An error means that the shim ends.
            let Ok(mut guard) = self.timer.readable().await else { return std::future::pending().await };
            if !self.is_due() {
                guard.clear_ready();
            }
        }
    }

    /// Puts it off if it has rung: what it rang for has failed. Each time for longer.
    pub fn put_off(&self) {
        if !self.is_due() {
            return;
        }
        let pause = {
            let mut state = self.lock();
            state.pause = (state.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
            state.pause
        };
        if let Err(error) = self.set(pause) {
            tracing::warn!(%error, "a wake that has failed is tried again at once");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;

    const AUTO: Policy = Policy::Auto { horizon: Duration::from_secs(10) };

    fn first(policy: Policy, due: &[u64]) -> Option<u64> {
        policy.first(due.iter().copied().map(Duration::from_secs)).map(|left| left.as_secs())
    }

    #[test]
    fn a_policy_says_which_timer_wakes() {
        assert_eq!(first(AUTO, &[0, 3, 60, 9, 10]), Some(10));
        assert_eq!(first(AUTO, &[9]), None);
        assert_eq!(first(Policy::Wake, &[4, 3, 60]), Some(3));
        assert_eq!(first(Policy::Resume, &[4, 60]), None);
        assert!(AUTO.counts() && Policy::Wake.counts() && !Policy::Resume.counts());
    }

    #[test]
    fn only_where_each_timer_wakes_is_one_too_near() {
        let near = Some(Duration::from_millis(900));
        assert_eq!(Policy::Wake.too_near(near), near);
        assert_eq!(Policy::Wake.too_near(Some(LEAST)), None);
        assert_eq!(Policy::Wake.too_near(None), None);
        assert_eq!(AUTO.too_near(near).or(Policy::Resume.too_near(near)), None);
    }

    #[tokio::test]
    async fn an_alarm_rings_in_time_and_again_only_when_it_was_put_off() {
        let alarm = Alarm::new().unwrap();
        let soon = Duration::from_millis(30);
        assert!(tokio::time::timeout(soon, alarm.rings()).await.is_err(), "it was not set");
        let since = Instant::now();
        alarm.set(soon).unwrap();
        alarm.rings().await;
        assert!(since.elapsed() >= soon);
        alarm.rings().await;
        for pause in [10, 20, 40] {
            alarm.put_off();
            assert!(tokio::time::timeout(soon, alarm.rings()).await.is_err());
            let state = std::mem::take(&mut *alarm.state.lock().unwrap());
            assert_eq!(state.pause.as_secs(), pause);
            *alarm.state.lock().unwrap() = State { at: Some(Duration::ZERO), pause: state.pause };
        }
        alarm.set(Duration::from_mins(1)).unwrap();
        alarm.put_off();
        let at = alarm.state.lock().unwrap().at.unwrap();
        assert!(at > waits::now(ClockId::Boottime) + Duration::from_secs(59), "it had not rung");
    }

    proptest! {
        /// What wakes is one of the timers, none that wakes is before it, and whoever waits long enough wakes.
        #[test]
        fn no_timer_beyond_the_horizon_is_missed(due in prop::collection::vec(0u64..100, 0..8), horizon in 0u64..50) {
            let policy = Policy::Auto { horizon: Duration::from_secs(horizon) };
            match first(policy, &due) {
                Some(found) => {
                    prop_assert!(due.contains(&found) && found >= horizon);
                    prop_assert!(due.iter().all(|left| *left < horizon || *left >= found));
                }
                None => prop_assert!(due.iter().all(|left| *left < horizon)),
            }
            prop_assert_eq!(first(Policy::Wake, &due), due.iter().copied().min());
        }
    }
}
