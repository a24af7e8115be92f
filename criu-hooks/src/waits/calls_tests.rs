//! Calls as they were seen in frozen processes of one kind and another.

#![cfg(target_arch = "x86_64")]

use std::collections::HashMap;

use super::*;

const MINUTE: Duration = Duration::from_mins(1);

fn call(number: u64, arguments: [u64; 6]) -> Call {
    Call { number, arguments, stack: 1 << 40, instruction: 1 << 30 }
}

/// What the call waits for in a memory of these pieces.
fn waits(call: &Call, pieces: &[(u64, Vec<u8>)]) -> Result<Wait, Unclear> {
    let pieces: HashMap<u64, Vec<u8>> = pieces.iter().cloned().collect();
    let read = |address: u64, bytes: &mut [u8]| {
        let piece = pieces.get(&address).filter(|piece| piece.len() >= bytes.len());
        let piece = piece.ok_or(io::ErrorKind::InvalidInput)?;
        bytes.copy_from_slice(&piece[..bytes.len()]);
        Ok(())
    };
    wait_of(call, &read)
}

fn timespec_bytes(seconds: i64, nanos: i64) -> Vec<u8> {
    [seconds.to_ne_bytes(), nanos.to_ne_bytes()].concat()
}

fn until(wait: Result<Wait, Unclear>) -> Option<Until> {
    wait.expect("it waits").until
}

#[test]
fn event_loops_wait_on_their_epoll_and_for_their_next_timer() {
    for number in [232, 281] {
        let wait = waits(&call(number, [3, 9, 1, 60_000, 0, 0]), &[]).expect("it waits");
        assert_eq!(wait.descriptors, [(3, EventFlags::IN)]);
        assert_eq!(wait.until, Some(Until::Lasts(MINUTE)));
    }
    // -1, with and without the upper half of its register.
    for forever in [u64::MAX, 0xffff_ffff] {
        assert_eq!(until(waits(&call(232, [3, 9, 1, forever, 0, 0]), &[])), None);
    }
    let limited = waits(&call(441, [3, 9, 1, 0x10, 0, 0]), &[(0x10, timespec_bytes(60, 0))]);
    assert_eq!(until(limited), Some(Until::Lasts(MINUTE)));
}

#[test]
fn blocking_calls_wait_on_their_descriptor() {
    for (number, readiness) in
        [(0, EventFlags::IN), (288, EventFlags::IN), (47, EventFlags::IN), (1, EventFlags::OUT)]
    {
        let wait = waits(&call(number, [5, 0, 0, 0, 0, 0]), &[]).expect("it waits");
        assert_eq!((wait.descriptors, wait.takes), (vec![(5, readiness)], true));
    }
}

#[test]
fn a_poll_waits_on_its_array() {
    let entry = |fd: i32, events: u16| [&fd.to_ne_bytes()[..], &events.to_ne_bytes(), &[0, 0]].concat();
    let array = [entry(4, 1), entry(-1, 1), entry(7, 4)].concat();
    let wait = waits(&call(7, [0x20, 3, u64::MAX, 0, 0, 0]), &[(0x20, array.clone())]).expect("it waits");
    assert_eq!(wait.descriptors, [(4, EventFlags::IN), (7, EventFlags::OUT)]);
    assert_eq!(wait.until, None);
    // The kernel writes back what is left of the limit of a ppoll.
    let memory = [(0x20, array), (0x30, timespec_bytes(60, 0))];
    assert_eq!(until(waits(&call(271, [0x20, 3, 0x30, 0, 0, 0]), &memory)), Some(Until::Left(MINUTE)));
    assert_eq!(waits(&call(7, [0x99, 3, 0, 0, 0, 0]), &[]), Err(Unclear::Unreadable));
}

#[test]
fn a_select_waits_on_its_sets() {
    let mut readable = vec![0u8; 16];
    readable[0] = 0b1000;
    readable[8] = 1;
    let mut writable = vec![0u8; 16];
    writable[0] = 0b10_0000;
    let memory = [(0x20, readable), (0x40, writable), (0x60, timespec_bytes(60, 0))];
    let wait = waits(&call(270, [65, 0x20, 0x40, 0, 0x60, 0]), &memory).expect("it waits");
    let expected = [(3, EventFlags::IN), (64, EventFlags::IN), (5, EventFlags::OUT)];
    assert_eq!(wait.descriptors, expected);
    assert_eq!(wait.until, Some(Until::Left(MINUTE)));
    let memory = [(0x60, timespec_bytes(1, 500_000))];
    let wait = waits(&call(23, [0, 0, 0, 0, 0x60, 0]), &memory);
    assert_eq!(until(wait), Some(Until::Left(Duration::from_millis(1500))));
}

#[test]
fn sleeps_end_when_their_program_says() {
    let memory = [(0x10, timespec_bytes(60, 0)), (0x20, timespec_bytes(7, 0))];
    let ends = |number, arguments| until(waits(&call(number, arguments), &memory));
    // Without a place for what is left, all that is known is how long it was to be.
    assert_eq!(ends(35, [0x10, 0, 0, 0, 0, 0]), Some(Until::Lasts(MINUTE)));
    assert_eq!(ends(35, [0x10, 0x20, 0, 0, 0, 0]), Some(Until::Left(Duration::from_secs(7))));
    assert_eq!(ends(230, [0, 0, 0x10, 0x20, 0, 0]), Some(Until::Left(Duration::from_secs(7))));
    assert_eq!(ends(230, [1, 1, 0x10, 0, 0, 0]), Some(Until::Monotonic(MINUTE)));
    assert_eq!(ends(230, [0, 1, 0x10, 0, 0, 0]), Some(Until::Realtime(MINUTE)));
}

#[test]
fn locks_end_with_their_time_limit_or_not_at_all() {
    let memory = [(0x10, timespec_bytes(60, 0))];
    let ends = |operation, timeout| until(waits(&call(202, [1, operation, 0, timeout, 0, 0]), &memory));
    assert_eq!(ends(0x80, 0), None);
    assert_eq!(ends(0x80, 0x10), Some(Until::Lasts(MINUTE)));
    assert_eq!(ends(0x89, 0x10), Some(Until::Monotonic(MINUTE)));
    assert_eq!(ends(0x189, 0x10), Some(Until::Realtime(MINUTE)));
    assert_eq!(waits(&call(202, [1, 1, 1, 0, 0, 0]), &[]), Err(Unclear::Runs));
}

#[test]
fn signals_that_are_blocked_and_waited_for_are_told() {
    let memory = [(0x10, vec![0, 2, 0, 0, 0, 0, 0, 1]), (0x20, timespec_bytes(60, 0))];
    let wait = waits(&call(128, [0x10, 0, 0x20, 8, 0, 0]), &memory).expect("it waits");
    assert_eq!((wait.signals, wait.until), (1 << 9 | 1 << 56, Some(Until::Lasts(MINUTE))));
    assert_eq!(waits(&call(128, [0x30, 0, 0, 8, 0, 0]), &memory), Err(Unclear::Unreadable));
}

#[test]
fn message_queues_end_in_time_and_rings_with_a_limit_are_not_guessed() {
    let memory = [(0x10, timespec_bytes(60, 0))];
    let wait = waits(&call(243, [5, 0, 0, 0, 0x10, 0]), &memory).expect("it waits");
    assert_eq!((wait.descriptors, wait.until), (vec![(5, EventFlags::IN)], Some(Until::Realtime(MINUTE))));
    assert!(waits(&call(426, [5, 0, 1, 1, 0, 0]), &[]).is_ok());
    for flags in [1 | 8, 1 | 16] {
        assert!(matches!(waits(&call(426, [5, 0, 1, flags, 0x10, 24]), &memory), Err(Unclear::Unseen(_))));
    }
}

#[test]
fn what_others_share_is_not_guessed() {
    for number in [65, 70, 73, 220] {
        assert!(matches!(waits(&call(number, [0; 6]), &[]), Err(Unclear::Unseen(_))), "{number}");
    }
}

#[test]
fn what_does_not_wait_runs_and_what_cannot_be_seen_is_not_guessed() {
    assert_eq!(waits(&call(39, [0; 6]), &[]), Err(Unclear::Runs));
    assert_eq!(waits(&call(219, [0; 6]), &[]), Err(Unclear::Restarted));
    assert!(matches!(waits(&call(208, [0; 6]), &[]), Err(Unclear::Unseen(_))));
    assert_eq!(waits(&call(61, [0; 6]), &[]), Ok(Wait::default()));
}

proptest::proptest! {
    /// Whatever registers and memory hold, the answer comes, and within bounds.
    #[test]
    fn no_call_upsets_it(number in 0u64..460, arguments: [u64; 6], fill: u8) {
        let read = |_: u64, bytes: &mut [u8]| { bytes.fill(fill); Ok(()) };
        let _ = wait_of(&call(number, arguments), &read);
    }
}
