//! The timers that CRIU writes into an image, and what becomes of them when time has passed.
//!
//! All of them are written as what remains of them, and are restored so: as if no time had passed.

use std::time::Duration;

use super::message::{self, Message};

/// The second words of images: open files, and the clocks of a time namespace.
pub(super) const FILES: u32 = 0x5630_3138;
pub(super) const CLOCKS: u32 = 0x4311_4433;

/// The clocks whose timers tell time, as the kernel numbers them; those of others tell the use of a processor.
const CLOCKS_OF_TIME: [u64; 6] = [REALTIME, 1, 7, 8, 9, 11];
const REALTIME: u64 = 0;
/// A timer that goes off silently, for whoever asks.
const SIGEV_NONE: u64 = 1;
/// A timer descriptor that was set to a moment rather than to a time from now.
const ABSOLUTE: u64 = 1;

/// Of an open file: what it is if it is a timer descriptor.
const TIMER_DESCRIPTOR: u32 = 12;
/// Fields of a timer descriptor.
mod descriptor {
    use super::Fields;

    pub const CLOCK: u32 = 4;
    pub const TICKS: u32 = 5;
    pub const FLAGS: u32 = 6;
    pub const TIMES: Fields = Fields { value: (7, 8), interval: (9, 10), fraction: 1 };
}

/// Of the image of a process: its own part, in that its timers, in that ITIMER_REAL, and POSIX timers.
const TASK: u32 = 3;
const TIMERS: u32 = 7;
const ITIMER_REAL: u32 = 1;
const POSIX: u32 = 4;
/// Fields of ITIMER_REAL, in microseconds, and of a POSIX timer.
const ITIMER: Fields = Fields { value: (3, 4), interval: (1, 2), fraction: 1000 };
const POSIX_TIMES: Fields = Fields { value: (9, 10), interval: (7, 8), fraction: 1 };
const POSIX_CLOCK: u32 = 2;
const POSIX_NOTIFY: u32 = 4;

/// In which fields the times of a timer are: pairs of seconds and fractions, of so many nanoseconds.
struct Fields {
    value: (u32, u32),
    interval: (u32, u32),
    fraction: u32,
}

impl Fields {
    fn read(&self, message: &Message, (seconds, fraction): (u32, u32)) -> Option<Duration> {
        let nanos = message.number(fraction)?.checked_mul(self.fraction.into())?;
        Duration::from_secs(message.number(seconds)?).checked_add(Duration::from_nanos(nanos))
    }

    /// What remains of a timer, when it is set.
    fn value(&self, message: &Message) -> Option<Duration> {
        self.read(message, self.value).filter(|value| !value.is_zero())
    }

    fn interval(&self, message: &Message) -> Duration {
        self.read(message, self.interval).unwrap_or_default()
    }

    fn set_value(&self, message: &mut Message, value: Duration) {
        let (seconds, fraction) = self.value;
        let per_second = 1_000_000_000 / u64::from(self.fraction);
        let rounded = u64::from(value.subsec_nanos().div_ceil(self.fraction));
        message.set(seconds, value.as_secs().saturating_add(rounded / per_second));
        message.set(fraction, rounded % per_second);
    }
}

/// How much time has passed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Elapsed {
    /// In truth.
    pub(super) time: Duration,
    /// By CLOCK_REALTIME, which may have been set meanwhile.
    pub(super) realtime: Duration,
    /// The fraction of the second that CLOCK_REALTIME shows now.
    pub(super) fraction: Duration,
}

/// What becomes of a timer in so much time: what remains of it, nothing when it is over, and how often it went off.
fn advance(value: Duration, interval: Duration, by: Duration) -> (Duration, u64) {
    let Some(over) = by.checked_sub(value) else { return (value.saturating_sub(by), 0) };
    let (over, period) = (over.as_nanos(), interval.as_nanos());
    if period == 0 {
        return (Duration::ZERO, 1);
    }
    let rest = u64::try_from(period - over % period).unwrap_or(u64::MAX);
    (Duration::from_nanos(rest), u64::try_from(over / period).unwrap_or(u64::MAX).saturating_add(1))
}

/// Sets a timer descriptor again that goes off periodically, and has gone off without having been read since: as one that
/// is due after a whole period. The kernel tells that nothing remains of it, which CRIU would take for one that is not set.
/// Says whether it has changed anything.
pub(super) fn set_again(file: &mut Message) -> bool {
    file.change(TIMER_DESCRIPTOR, |timer| {
        let times = descriptor::TIMES;
        let interval = times.interval(timer);
        // One that is not set has not gone off either: to unset it forgets how often it did.
        let went_off = timer.number(descriptor::TICKS).is_some_and(|ticks| ticks > 0);
        if times.value(timer).is_some() || interval.is_zero() || !went_off {
            return false;
        }
        times.set_value(timer, interval);
        // A time from now, not a moment.
        let flags = timer.number(descriptor::FLAGS).unwrap_or_default();
        timer.set(descriptor::FLAGS, flags & !ABSOLUTE);
        true
    })
}

/// As [`set_again`], for ITIMER_REAL in the image of a process, of which the signal was not taken. One that is not set has
/// no period.
pub(super) fn set_process_again(core: &mut Message) -> bool {
    core.change(TASK, |task| {
        task.change(TIMERS, |timers| {
            timers.change(ITIMER_REAL, |timer| {
                let interval = ITIMER.interval(timer);
                let stands = ITIMER.value(timer).is_none() && !interval.is_zero();
                if stands {
                    ITIMER.set_value(timer, interval);
                }
                stands
            })
        })
    })
}

/// How long it is until each of the timer descriptors in the image of open files goes off.
pub(super) fn of_files(image: &[u8]) -> Vec<Duration> {
    let files = message::records(image, FILES).unwrap_or_default();
    let timers = files.into_iter().filter_map(Message::parse).filter_map(|file| {
        let timer = file.parts(TIMER_DESCRIPTOR).next()?;
        descriptor::TIMES.value(&timer)
    });
    timers.collect()
}

/// How long it is until each of the timers in the image of a process goes off.
pub(super) fn of_process(image: &[u8]) -> Vec<Duration> {
    let core = message::records(image, super::restart::CORE).unwrap_or_default();
    let mut found = Vec::new();
    for timers in core.into_iter().filter_map(Message::parse).flat_map(|core| {
        let tasks: Vec<_> = core.parts(TASK).collect();
        tasks.into_iter().flat_map(|task| task.parts(TIMERS).collect::<Vec<_>>()).collect::<Vec<_>>()
    }) {
        found.extend(timers.parts(ITIMER_REAL).filter_map(|timer| ITIMER.value(&timer)));
        let posix = timers.parts(POSIX).filter(tells_time);
        let heard = posix.filter(|timer| timer.number(POSIX_NOTIFY) != Some(SIGEV_NONE));
        found.extend(heard.filter_map(|timer| POSIX_TIMES.value(&timer)));
    }
    found
}

fn tells_time(timer: &Message) -> bool {
    timer.number(POSIX_CLOCK).is_some_and(|clock| CLOCKS_OF_TIME.contains(&clock))
}

/// Lets time pass for an open file. Says whether it has changed anything.
pub(super) fn elapse_file(file: &mut Message, elapsed: &Elapsed) -> bool {
    file.change(TIMER_DESCRIPTOR, |timer| {
        let times = descriptor::TIMES;
        let Some(value) = times.value(timer) else { return false };
        let flags = timer.number(descriptor::FLAGS).unwrap_or_default();
        let is_moment = flags & ABSOLUTE != 0 && timer.number(descriptor::CLOCK) == Some(REALTIME);
        let by = if is_moment { elapsed.realtime } else { elapsed.time };
        let (mut left, ticks) = advance(value, times.interval(timer), by);
        // CRIU adds the whole seconds of the clock to the time that is left to a moment, which makes it early. One of
        // CLOCK_REALTIME is kept, for whoever sets that clock, and the fraction added to it; any other is the same as a time
        // from now.
        match (is_moment, left.is_zero()) {
            (true, false) => left += elapsed.fraction,
            _ => timer.set(descriptor::FLAGS, flags & !ABSOLUTE),
        }
        times.set_value(timer, left);
        let before = timer.number(descriptor::TICKS).unwrap_or_default();
        timer.set(descriptor::TICKS, before.saturating_add(ticks));
        true
    })
}

/// Lets time pass for the timers of a process. One that is over goes off at once.
pub(super) fn elapse_process(core: &mut Message, elapsed: &Elapsed) -> bool {
    let pass = |timer: &mut Message, times: &Fields| {
        let Some(value) = times.value(timer) else { return false };
        let at_once = Duration::from_nanos(times.fraction.into());
        times.set_value(timer, value.saturating_sub(elapsed.time).max(at_once));
        true
    };
    core.change(TASK, |task| {
        task.change(TIMERS, |timers| {
            let real = timers.change(ITIMER_REAL, |timer| pass(timer, &ITIMER));
            timers.change(POSIX, |timer| tells_time(timer) && pass(timer, &POSIX_TIMES)) || real
        })
    })
}

/// Lets time pass for the clocks of a time namespace: the monotonic one, and the one that also counts suspensions.
pub(super) fn elapse_clocks(clocks: &mut Message, elapsed: &Elapsed) -> bool {
    const EACH: Fields = Fields { value: (1, 2), interval: (1, 2), fraction: 1 };
    let pass = |clock: &mut Message| {
        let Some(shown) = EACH.value(clock) else { return false };
        EACH.set_value(clock, shown.saturating_add(elapsed.time));
        true
    };
    let monotonic = clocks.change(1, pass);
    clocks.change(2, pass) || monotonic
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn slept(time: u64) -> Elapsed {
        Elapsed { time: seconds(time), realtime: seconds(time + 100), fraction: Duration::from_millis(250) }
    }

    fn descriptor(clock: u64, flags: u64, value: u64, interval: u64) -> Message {
        let timer = [(1, 3), (4, clock), (5, 2), (6, flags), (7, value), (8, 0), (9, interval), (10, 0)];
        Message::of(&[(1, 17), (2, 3)]).with(TIMER_DESCRIPTOR, &Message::of(&timer))
    }

    /// Ticks, flags, seconds and nanoseconds of a timer descriptor after a sleep.
    fn after(mut file: Message, time: u64) -> [u64; 4] {
        assert!(elapse_file(&mut file, &slept(time)));
        let timer = file.parts(TIMER_DESCRIPTOR).next().unwrap();
        [5, 6, 7, 8].map(|field| timer.number(field).unwrap())
    }

    #[test]
    fn a_timer_descriptor_goes_on_or_has_gone_off_as_often_as_it_would_have() {
        assert_eq!(after(descriptor(1, 0, 60, 0), 20), [2, 0, 40, 0]);
        assert_eq!(after(descriptor(1, 0, 60, 0), 60), [3, 0, 0, 0]);
        assert_eq!(after(descriptor(1, 0, 60, 60), 130), [4, 0, 50, 0]);
        // One that is not set stays so.
        assert!(!elapse_file(&mut descriptor(1, 0, 0, 0), &slept(9)));
        assert!(!elapse_file(&mut Message::of(&[(1, 1)]), &slept(9)));
    }

    #[test]
    fn a_period_that_is_over_and_was_not_read_is_followed_by_another() {
        let mut file = descriptor(1, 1, 0, 5);
        assert!(set_again(&mut file));
        assert!(!set_again(&mut file), "it is set now");
        assert_eq!(of_files(&message::image(FILES, std::slice::from_ref(&file))), [seconds(5)]);
        assert_eq!(after(file, 12), [2 + 2, 0, 3, 0]);
        // Without a period, or never gone off.
        assert!(!set_again(&mut descriptor(1, 0, 0, 0)));
        assert!(!set_again(&mut descriptor(1, 0, 60, 5)));
        let unset = [(1, 3), (4, 1), (5, 0), (6, 0), (7, 0), (8, 0), (9, 5), (10, 0)];
        assert!(!set_again(&mut Message::of(&[(1, 17)]).with(TIMER_DESCRIPTOR, &Message::of(&unset))));
    }

    #[test]
    fn an_interval_timer_whose_signal_was_not_taken_goes_on() {
        let itimer = |interval, left| {
            let timer = Message::of(&[(1, interval), (2, 0), (3, left), (4, 0)]);
            message::image(
                super::super::restart::CORE,
                &[Message::of(&[(1, 1)]).with(
                    TASK,
                    &Message::of(&[(1, 1)]).with(TIMERS, &Message::of(&[]).with(ITIMER_REAL, &timer)),
                )],
            )
        };
        let again = |image: &[u8]| message::edited(image, super::super::restart::CORE, set_process_again);
        assert_eq!(of_process(&again(&itimer(5, 0)).unwrap()), [seconds(5)]);
        assert!(again(&itimer(5, 2)).is_none());
        assert!(again(&itimer(0, 0)).is_none());
    }

    #[test]
    fn a_moment_of_the_wall_clock_stays_one_and_others_become_times() {
        assert_eq!(after(descriptor(0, 3, 160, 0), 20), [2, 3, 40, 250_000_000]);
        assert_eq!(after(descriptor(0, 1, 110, 0), 20), [3, 0, 0, 0], "the clock was set forward");
        assert_eq!(after(descriptor(1, 1, 60, 0), 20), [2, 0, 40, 0]);
    }

    fn process(timers: &Message) -> Vec<u8> {
        let task = Message::of(&[(1, 1)]).with(TIMERS, timers);
        message::image(super::super::restart::CORE, &[Message::of(&[(1, 1)]).with(TASK, &task)])
    }

    fn timers(real: u64, clock: u64, notify: u64, posix: u64) -> Message {
        let itimer = Message::of(&[(1, 0), (2, 0), (3, real), (4, 500)]);
        let posix =
            [(1, 0), (2, clock), (3, 14), (4, notify), (5, 0), (6, 0), (7, 0), (8, 0), (9, posix), (10, 0)];
        let cpu = Message::of(&[(1, 0), (2, 0), (3, 1), (4, 0)]);
        Message::of(&[]).with(1, &itimer).with(2, &cpu).with(3, &cpu).with(4, &Message::of(&posix))
    }

    #[test]
    fn the_timers_of_a_process_are_told_but_those_that_nobody_hears_or_that_count_work() {
        let both = [seconds(30) + Duration::from_micros(500), seconds(9)];
        assert_eq!(of_process(&process(&timers(30, 1, 0, 9))), both);
        assert_eq!(of_process(&process(&timers(30, 1, SIGEV_NONE, 9))), both[..1]);
        assert_eq!(of_process(&process(&timers(30, 2, 0, 9))), both[..1]);
        assert!(of_process(b"nonsense").is_empty());
        let files =
            message::image(FILES, &[descriptor(1, 0, 0, 5), descriptor(0, 1, 7, 0), Message::of(&[(1, 1)])]);
        assert_eq!(of_files(&files), [seconds(7)]);
    }

    #[test]
    fn the_timers_of_a_process_have_less_left_or_go_off_at_once() {
        let after = |time| {
            let edit = |core: &mut Message| elapse_process(core, &slept(time));
            let edited = message::edited(&process(&timers(30, 1, 0, 9)), super::super::restart::CORE, edit);
            of_process(&edited.unwrap())
        };
        assert_eq!(after(5), [seconds(25) + Duration::from_micros(500), seconds(4)]);
        assert_eq!(after(20), [seconds(10) + Duration::from_micros(500), Duration::from_nanos(1)]);
        assert_eq!(after(40)[0], Duration::from_micros(1));
    }

    #[test]
    fn clocks_go_on() {
        let clock = |time: u64| Message::of(&[(1, time), (2, 999_999_999)]);
        let clocks = |a, b| Message::of(&[]).with(1, &clock(a)).with(2, &clock(b));
        let mut both = clocks(100, 200);
        assert!(elapse_clocks(&mut both, &slept(7)));
        assert_eq!(both, clocks(107, 207));
    }

    proptest! {
        /// Whether it sleeps once or twice, a timer is where it would have been, and never goes off before its time.
        #[test]
        fn two_sleeps_are_as_one(value in 1u64..1 << 40, interval in 0u64..1 << 20, first in 0u64..1 << 40, second in 0u64..1 << 40) {
            let nanos = Duration::from_nanos;
            let (whole, times) = advance(nanos(value), nanos(interval), nanos(first + second));
            let (left, before) = advance(nanos(value), nanos(interval), nanos(first));
            prop_assert_eq!(before > 0, first >= value);
            if left.is_zero() {
                prop_assert_eq!((whole, times), (Duration::ZERO, 1));
            } else {
                let (again, then) = advance(left, nanos(interval), nanos(second));
                prop_assert_eq!((again, before + then), (whole, times));
            }
        }

        /// Whatever an image holds, it is read and changed, or left alone.
        #[test]
        fn arbitrary_images_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), time: u64) {
            let elapsed = Elapsed { time: Duration::from_secs(time), ..Elapsed::default() };
            for magic in [FILES, CLOCKS, super::super::restart::CORE] {
                let mut image = message::image(magic, &[]);
                image.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
                image.extend(&bytes);
                let _ = (of_files(&image), of_process(&image));
                let _ = message::edited(&image, magic, |message| {
                    elapse_file(message, &elapsed) | elapse_process(message, &elapsed) | elapse_clocks(message, &elapsed)
                });
            }
        }
    }
}
