//! The watch over processes that are stopped rather than frozen: it reads the same of both.

use super::*;

fn thread(number: u64, switches: u64) -> Thread {
    let call = Call { number, arguments: [3, 0, 0, u64::MAX, 0, 0], stack: 1 << 40, instruction: 1 << 30 };
    let me = rustix::process::getpid();
    Thread {
        process: me,
        id: me,
        name: "agent".to_owned(),
        state: 'S',
        call: Some(call),
        switches,
        began: Some(Duration::from_secs(10)),
        read: Some(0),
        signals: threads::Signals::default(),
    }
}

fn before(thread: Thread) -> Before {
    Before { threads: HashMap::from([(thread.id, thread)]), packets: None }
}

const EPOLL_PWAIT: u64 = if cfg!(target_arch = "x86_64") { 281 } else { 22 };

#[test]
fn a_thread_that_did_anything_since_it_was_looked_at_is_at_work() {
    let (earlier, later) = (thread(EPOLL_PWAIT, 7), thread(EPOLL_PWAIT, 8));
    assert!(stood_still(&earlier, &later) && stood_still(&earlier, &earlier));
    let changed = [
        thread(EPOLL_PWAIT, 9),
        thread(EPOLL_PWAIT + 1000, 8),
        Thread { call: None, ..later.clone() },
        Thread { read: Some(1), ..later.clone() },
    ];
    for later in changed {
        assert!(!stood_still(&earlier, &later), "{later:?}");
    }
}

#[test]
fn threads_that_run_are_told_and_those_that_wait_are_remembered_all_the_same() {
    let me = rustix::process::getpid();
    let (reader, writer) = std::io::pipe().unwrap();
    let blocked = std::thread::spawn(move || std::io::Read::read(&mut &reader, &mut [0]));
    let find = || {
        let all = threads::all(&[me]);
        all.into_iter().find(|thread| {
            let waits = |call: Call| calls::wait_of(&call, &|_, _| Ok(())).is_ok_and(|wait| wait.takes);
            thread.call.is_some_and(waits)
        })
    };
    let waiting = loop {
        if let Some(found) = find() {
            break found;
        }
        std::thread::yield_now();
    };
    let mut interrupted = Interrupted::default();
    let error = examine(&[me], &look(&[me]), Instant::now(), &mut interrupted).unwrap_err();
    assert!(matches!(error, Error::Busy(_)), "this thread runs: {error}");
    assert!(interrupted.0.contains_key(&waiting.id));
    drop(writer);
    let _ = blocked.join();
}

#[test]
fn what_a_freeze_has_interrupted_since_the_last_look_is_known_from_that_look() {
    let first = thread(EPOLL_PWAIT, 7);
    let call = first.call.unwrap();
    let later = Thread { call: Some(Call { number: RESTART, ..call }), switches: 9, ..first.clone() };
    let (wait, known) = wait_of(&before(first), &later, Instant::now(), &Interrupted::default()).unwrap();
    assert_eq!((wait.descriptors.len(), known.call), (1, call));
}

#[test]
fn an_interrupted_wait_is_known_again_by_its_registers_and_ends_when_it_was_to_end() {
    let end = Instant::now() + Duration::from_secs(50);
    let first = thread(EPOLL_PWAIT, 7);
    let call = first.call.unwrap();
    let interrupted = Interrupted(HashMap::from([(
        first.id,
        Known { process: first.process, call, until: Some(end), left: None, switches: 5 },
    )]));
    let restarted =
        |instruction| Thread { call: Some(Call { number: RESTART, instruction, ..call }), ..first.clone() };
    let same = restarted(call.instruction);
    let timed = interrupted.timed();
    assert_eq!((timed.len(), timed[0].thread, timed[0].call, timed[0].until), (1, first.id, call, end));
    let (wait, known) = wait_of(&before(same.clone()), &same, Instant::now(), &interrupted).unwrap();
    assert_eq!((wait.descriptors.len(), known.call, known.until), (1, call, Some(end)));
    let other = restarted(call.instruction + 1);
    let error = wait_of(&before(other.clone()), &other, Instant::now(), &interrupted).unwrap_err();
    assert!(matches!(error, Error::Unseen { .. }), "{error}");
}

#[test]
fn a_time_limit_counts_from_where_it_began() {
    let frozen = Instant::now();
    let at = |until, elapsed| deadline(until, rustix::process::getpid(), frozen, elapsed).unwrap() - frozen;
    let second = Duration::from_secs(1);
    assert_eq!(at(Until::Left(10 * second), 3 * second), 10 * second);
    assert_eq!(at(Until::Lasts(10 * second), 3 * second), 7 * second);
    assert_eq!(at(Until::Lasts(2 * second), 3 * second), Duration::ZERO);
    assert!(at(Until::Realtime(Duration::ZERO), second) < second, "past");
}

#[tokio::test]
async fn a_watch_tells_of_readiness_and_of_time() {
    use std::os::fd::AsRawFd;
    let (reader, writer) = std::io::pipe().unwrap();
    let me = rustix::process::getpid();
    let wanted = Wanted::from([((me, reader.as_raw_fd()), rustix::event::epoll::EventFlags::IN)]);
    let prepared = |deadline| {
        let duplicates = Duplicates::take(&mut Owners::default(), &wanted).unwrap();
        Watch::begin(Prepared { duplicates, deadline, listeners: Vec::new() }).unwrap()
    };
    let soon = Duration::from_millis(5);
    assert_eq!(prepared(Some(Instant::now() + soon)).demand().await, WakeCause::Timer);
    let watch = prepared(None);
    assert!(tokio::time::timeout(soon, watch.demand()).await.is_err(), "silent");
    rustix::io::write(&writer, b"x").unwrap();
    assert_eq!(watch.demand().await, WakeCause::Traffic);
    assert_eq!(watch.demand().await, WakeCause::Traffic, "it stays so until it is given up");
}

#[test]
fn a_wait_of_the_same_registers_is_another_one_when_its_thread_has_run_in_between() {
    let known = thread(EPOLL_PWAIT, 7);
    let call = known.call.unwrap();
    let interrupted = Interrupted(HashMap::from([(
        known.id,
        Known { process: known.process, call, until: None, left: None, switches: known.switches },
    )]));
    assert!(interrupted.of(&thread(EPOLL_PWAIT, 9), &call).is_some());
    assert!(interrupted.of(&thread(EPOLL_PWAIT, 8 + AGAIN), &call).is_none());
    assert!(interrupted.of(&thread(EPOLL_PWAIT, 8 + AGAIN), &Call { number: RESTART, ..call }).is_some());
}

proptest::proptest! {
    /// Whatever time limit a program asks for, to wait for its end upsets nothing.
    #[test]
    fn no_time_limit_is_too_long_to_wait_for(
        whole in proptest::prop_oneof![0u64..10, proptest::strategy::Just(i64::MAX.unsigned_abs()), 0u64..u64::MAX],
        nanos in proptest::prop_oneof![0u32..=9, 999_999_990u32..=999_999_999],
        kind in 0usize..4,
    ) {
        let at = Duration::new(whole, nanos);
        let until = [Until::Left(at), Until::Lasts(at), Until::Monotonic(at), Until::Realtime(at)][kind];
        let end = deadline(until, rustix::process::getpid(), Instant::now(), Duration::ZERO);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            // Looked at once, which registers it.
            tokio::select! { biased; () = due(end) => {}, () = async {} => {} }
        });
    }
}
