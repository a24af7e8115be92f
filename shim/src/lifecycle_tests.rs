//! Random orders of events against the life-cycle, and all events in all situations that any order leads to, with a
//! model of what its effects bring about.

use std::collections::{HashSet, VecDeque};

use proptest::prelude::*;

use super::*;

/// What is true outside the state machine while it runs.
#[derive(Debug, Clone, Default)]
struct World {
    processes: bool,
    frozen: bool,
    watched: bool,
    reclaiming: bool,
    image: bool,
    starting: bool,
    dumping: bool,
    cancelled: bool,
    restoring: bool,
    kill_pending: bool,
    dumps_own_exit: bool,
    waiting: usize,
    reports: usize,
    /// The next freeze or watch fails.
    no_freeze: bool,
    /// The next thaw fails.
    no_thaw: bool,
    /// An exec lives in it.
    exec: bool,
    /// A checkpoint is being taken for a client.
    checkpoint: bool,
}

/// What the outside does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Move {
    Ask(Event),
    /// Let the work under way end, this way.
    Finish {
        ok: bool,
    },
    /// The init process ends by itself.
    Crash,
    FreezeFails,
    ThawFails,
    /// An exec begins or ends, if the agent runs.
    Exec,
    /// A checkpoint for a client begins or ends, if the agent does not sleep.
    Checkpoint,
}

const MOVES: [Move; 16] = [
    Move::Ask(Event::Start),
    Move::Ask(Event::Sleep(Depth::Frozen)),
    Move::Ask(Event::Sleep(Depth::Reclaimed)),
    Move::Ask(Event::Sleep(Depth::Checkpointed)),
    Move::Ask(Event::Wake),
    Move::Ask(Event::Need),
    Move::Ask(Event::Pause),
    Move::Ask(Event::Resume),
    Move::Ask(Event::Kill),
    Move::Finish { ok: true },
    Move::Finish { ok: false },
    Move::Crash,
    Move::FreezeFails,
    Move::ThawFails,
    Move::Exec,
    Move::Checkpoint,
];

fn moves() -> impl Strategy<Value = Move> {
    prop_oneof![
        2 => Just(Move::Ask(Event::Start)),
        3 => Just(Move::Ask(Event::Sleep(Depth::Checkpointed))),
        2 => Just(Move::Ask(Event::Sleep(Depth::Frozen))),
        2 => Just(Move::Ask(Event::Sleep(Depth::Reclaimed))),
        2 => Just(Move::Ask(Event::Wake)),
        3 => Just(Move::Ask(Event::Need)),
        2 => Just(Move::Ask(Event::Probe)),
        2 => Just(Move::Ask(Event::ProbeOver)),
        1 => Just(Move::Ask(Event::Pause)),
        1 => Just(Move::Ask(Event::Resume)),
        1 => Just(Move::Ask(Event::Kill)),
        6 => any::<bool>().prop_map(|ok| Move::Finish { ok }),
        1 => Just(Move::Crash),
        1 => Just(Move::FreezeFails),
        1 => Just(Move::ThawFails),
        1 => Just(Move::Exec),
        1 => Just(Move::Checkpoint),
    ]
}

impl World {
    fn new() -> Self {
        Self { processes: true, ..Self::default() }
    }

    /// Carries out one effect and checks that it makes sense.
    fn perform(&mut self, effect: Effect, next: State) {
        match effect {
            Effect::Start => {
                assert!(!self.starting, "started twice");
                self.starting = true;
            }
            Effect::Freeze => {
                assert!(!self.checkpoint, "CRIU would thaw it, or never come to its end");
                self.frozen = true;
            }
            Effect::Thaw => {
                assert!(!self.reclaiming, "thawed while its memory is pushed out");
                self.frozen = false;
                self.watched = false;
            }
            Effect::ThawForProbe => {
                self.frozen = false;
                self.watched = false;
            }
            Effect::Refreeze => {
                assert!(!self.frozen, "frozen twice");
                self.frozen = true;
                self.watched = true;
            }
            Effect::Watch => {
                assert!(self.frozen, "watched while it runs");
                self.watched = true;
            }
            Effect::Unwatch => self.watched = false,
            Effect::Reclaim => {
                assert!(self.frozen && !self.reclaiming, "reclaimed while it runs, or twice");
                self.reclaiming = true;
            }
            Effect::CancelReclaim => self.reclaiming = false,
            Effect::Dump => {
                assert!(self.processes, "a dump of nothing");
                assert!(!self.dumping && !self.restoring && !self.reclaiming, "two engines at work");
                self.watched = false;
                self.dumping = true;
                self.cancelled = false;
            }
            Effect::CancelDump => {
                assert!(self.dumping, "no dump to cancel");
                self.cancelled = true;
            }
            Effect::Restore => {
                assert!(self.image, "a restore without an image");
                assert!(!self.processes, "a restore beside living processes");
                assert!(!self.dumping && !self.restoring, "two engines at work");
                self.restoring = true;
            }
            Effect::Kill => self.kill_pending = true,
            Effect::DropImage => {
                let ended = next == State::Stopped || self.kill_pending || self.dumps_own_exit;
                assert!(self.processes || ended, "the image is dropped, and nothing else holds the state");
                self.image = false;
            }
            Effect::Release | Effect::Refuse => self.waiting = 0,
            Effect::ReportExit => {
                assert!(!self.processes, "the exit of a living process");
                self.reports += 1;
            }
            Effect::ReportKilledAsleep => {
                assert!(!self.processes, "killed asleep, with processes");
                self.reports += 1;
            }
            Effect::PublishPaused => {}
        }
    }
}

#[derive(Debug, Clone)]
struct Model {
    state: State,
    world: World,
}

impl Model {
    fn new() -> Self {
        Self { state: State::Created, world: World::new() }
    }

    fn facts(&self) -> Facts {
        Facts { live_execs: usize::from(self.world.exec), checkpoints: usize::from(self.world.checkpoint) }
    }

    fn event(&mut self, event: Event) {
        let queued = event == Event::Need;
        let before = self.state;
        match step(before, self.facts(), event) {
            Ok(step) => {
                if queued {
                    self.world.waiting += 1;
                }
                self.state = step.next;
                // As the actor does: what follows a freeze or a thaw that failed is not done.
                for effect in step.effects {
                    let freezes = matches!(effect, Effect::Freeze | Effect::Watch);
                    if freezes && std::mem::take(&mut self.world.no_freeze) {
                        return self.event(Event::FreezeFailed);
                    }
                    if effect == Effect::Refreeze && std::mem::take(&mut self.world.no_freeze) {
                        return self.event(Event::RefreezeFailed);
                    }
                    let probed = effect == Effect::ThawForProbe && event == Event::Probe;
                    if probed && std::mem::take(&mut self.world.no_thaw) {
                        return self.event(Event::ThawFailed(FrozenBy::Sleep));
                    }
                    let thaws = effect == Effect::Thaw
                        && step.next == State::Running
                        && !matches!(before, State::Probed { .. });
                    if thaws && event != Event::FreezeFailed && std::mem::take(&mut self.world.no_thaw) {
                        let by = if before == PAUSED { FrozenBy::Client } else { FrozenBy::Sleep };
                        return self.event(Event::ThawFailed(by));
                    }
                    self.world.perform(effect, step.next);
                }
            }
            Err(_) => assert!(
                !matches!(
                    event,
                    Event::Exited | Event::DumpDone(_) | Event::RestoreDone { .. } | Event::StartDone { .. }
                ),
                "{event:?} was refused in {:?}: facts cannot be refused",
                self.state
            ),
        }
    }

    fn make(&mut self, next: Move) {
        match next {
            Move::Ask(event) => self.event(event),
            Move::Finish { ok } => self.finish(ok),
            Move::Crash => self.die(),
            Move::FreezeFails => self.world.no_freeze = true,
            Move::ThawFails => self.world.no_thaw = true,
            Move::Exec if self.state == State::Running && self.world.processes => {
                self.world.exec = !self.world.exec;
            }
            Move::Exec => {}
            Move::Checkpoint if matches!(self.state, State::Running | PAUSED) && self.world.processes => {
                self.world.checkpoint = !self.world.checkpoint;
            }
            Move::Checkpoint => {}
        }
        if self.world.kill_pending && !self.world.dumping && !self.world.restoring {
            self.world.kill_pending = false;
            self.die();
        }
    }

    /// The init process ends, if it may: a frozen or dumped one only by a kill.
    fn die(&mut self) {
        if self.world.processes && !self.world.restoring {
            self.world.processes = false;
            self.world.exec = false;
            self.world.checkpoint = false;
            self.event(Event::Exited);
        }
    }

    fn finish(&mut self, ok: bool) {
        if std::mem::take(&mut self.world.starting) {
            self.event(Event::StartDone { ok });
        } else if std::mem::take(&mut self.world.reclaiming) {
            self.event(Event::ReclaimDone { ok });
        } else if std::mem::take(&mut self.world.dumping) {
            // The engine leaves no cgroup frozen, however the dump ends.
            self.world.frozen = false;
            // A dump of a dead process fails; one that was cancelled in time does not kill.
            if ok && self.world.processes && !self.world.cancelled {
                self.world.image = true;
                self.world.processes = false;
                self.world.dumps_own_exit = true;
                self.event(Event::DumpDone(DumpOutcome::Complete));
                self.event(Event::Exited);
                self.world.dumps_own_exit = false;
            } else {
                self.event(Event::DumpDone(DumpOutcome::Abandoned));
            }
        } else if std::mem::take(&mut self.world.restoring) {
            self.world.processes = ok;
            self.event(Event::RestoreDone { ok });
        }
    }

    fn check(&self) {
        let World { processes, frozen, watched, reclaiming, image, reports, .. } = self.world;
        assert!(reports <= 1, "the exit was reported {reports} times");
        assert!(!(self.state.sleeps() && self.world.exec), "an exec lives in a sleeping agent");
        assert!(!(self.state.sleeps() && self.world.checkpoint), "asleep while a checkpoint is taken");
        match self.state {
            State::Checkpointed => assert!(image && !processes, "asleep without an image: {:?}", self.world),
            State::Stopped => {
                assert!(!processes, "stopped with processes");
                assert!(!frozen, "a dead container's cgroup stays frozen");
                assert!(reports == 1, "stopped in silence");
                assert!(self.world.waiting == 0, "a request waits for a dead container");
            }
            State::Running => {
                assert!(!frozen && !watched && !reclaiming, "running and frozen: {:?}", self.world);
                assert!(self.world.waiting == 0, "a request waits for a running container");
            }
            State::Probed { asleep } => {
                assert!(!frozen && !watched, "{:?}", self.world);
                assert_eq!(reclaiming, asleep == Asleep::Reclaiming);
            }
            State::Frozen { by: FrozenBy::Sleep } | State::Reclaimed => {
                assert!(frozen && watched && !reclaiming, "nothing would wake it: {:?}", self.world);
            }
            State::Reclaiming => assert!(frozen && watched && reclaiming, "{:?}", self.world),
            State::Frozen { by: FrozenBy::Client } => {
                assert!(frozen && !watched && !reclaiming, "paused, and watched: {:?}", self.world);
            }
            _ => {}
        }
        // An exit that came during a start or a dump is reported when that has ended.
        let held =
            matches!(self.state, State::Starting { exited: true } | State::Dumping { exited: true, .. });
        assert!(processes || image || held || reports == 1, "the state is lost: {:?}", self.world);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    /// Whatever comes in whatever order: the agent's state is in its processes or in its image until it has ended,
    /// its exit is reported once, and no request waits for ever.
    #[test]
    fn no_order_of_events_loses_the_state(moves in prop::collection::vec(moves(), 1..60)) {
        let mut model = Model::new();
        for next in moves {
            model.make(next);
            model.check();
        }
        // All work ends some day; then nobody may still wait.
        for _ in 0..4 {
            model.make(Move::Finish { ok: true });
            model.check();
        }
        prop_assert_eq!(model.world.waiting, 0);
    }

    /// A live exec or a checkpoint for a client keeps a container awake in every state.
    #[test]
    fn execs_and_checkpoints_keep_it_awake(live_execs in 0usize..3, checkpoints in 0usize..2) {
        let facts = Facts { live_execs, checkpoints };
        for state in [State::Running, ASLEEP_FROZEN, State::Reclaimed] {
            let slept = step(state, facts, Event::Sleep(Depth::Checkpointed));
            prop_assert_eq!(slept.is_ok(), live_execs == 0 && checkpoints == 0);
        }
        // An agent that runs is paused when the checkpoint is over.
        let paused = step(State::Running, facts, Event::Pause);
        prop_assert_eq!(paused.is_ok(), checkpoints == 0);
    }
}

/// Tells, when a check fails, which moves led there.
struct Trace<'a>(&'a [Move], Move);

impl Drop for Trace<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("after {:?}, at {:?}", self.0, self.1);
        }
    }
}

/// Not a sample but all of them: each situation that can be reached, and in it each move. More than two requests that
/// wait are like two.
#[test]
fn every_event_in_every_situation_that_can_be_reached_keeps_the_state() {
    let mut seen = HashSet::new();
    let mut states = HashSet::new();
    let mut ahead = VecDeque::from([(Model::new(), Vec::new())]);
    while let Some((model, path)) = ahead.pop_front() {
        states.insert(format!("{:?}", model.state));
        for next in MOVES {
            let _trace = Trace(&path, next);
            let mut after = model.clone();
            after.make(next);
            after.check();
            after.world.waiting = after.world.waiting.min(2);
            if seen.insert(format!("{after:?}")) {
                let mut path = path.clone();
                path.push(next);
                ahead.push_back((after, path));
            }
        }
    }
    println!("{} situations, {} states", seen.len(), states.len());
    for state in every_state() {
        assert!(states.remove(&format!("{state:?}")), "{state:?} is never reached");
    }
    assert!(states.is_empty(), "{states:?}");
}

/// All states that a container can be in.
fn every_state() -> Vec<State> {
    let by = [FrozenBy::Client, FrozenBy::Sleep];
    let mut states =
        vec![State::Created, State::Running, State::Reclaiming, State::Reclaimed, State::Checkpointed];
    states.push(State::Stopped);
    states.extend(by.map(|by| State::Frozen { by }));
    for flag in [false, true] {
        states.extend([State::Starting { exited: flag }, State::Restoring { killed: flag }]);
    }
    for bits in 0..16u8 {
        let bit = |place: u8| bits >> place & 1 == 1;
        states.push(State::Dumping { asleep: bit(0), woken: bit(1), killed: bit(2), exited: bit(3) });
    }
    states
}

#[test]
fn a_wake_during_a_dump_cancels_it_once() {
    let dumping = step(State::Running, Facts::default(), Event::Sleep(Depth::Checkpointed)).expect("sleeps");
    let woken = step(dumping.next, Facts::default(), Event::Need).expect("is taken");
    assert_eq!(woken.effects, [Effect::CancelDump]);
    let again = step(woken.next, Facts::default(), Event::Need).expect("is taken");
    assert_eq!(again.effects, []);
    let abandoned =
        step(again.next, Facts::default(), Event::DumpDone(DumpOutcome::Abandoned)).expect("ends");
    assert_eq!((abandoned.next, abandoned.effects), (State::Running, vec![Effect::Release]));
}

#[test]
fn a_wake_that_comes_too_late_for_a_dump_restores() {
    let state = State::Dumping { asleep: false, woken: true, killed: false, exited: false };
    let step = step(state, Facts::default(), Event::DumpDone(DumpOutcome::Complete)).expect("ends");
    assert_eq!((step.next, step.effects), (State::Restoring { killed: false }, vec![Effect::Restore]));
}

#[test]
fn a_failed_restore_keeps_the_image_and_can_be_tried_again() {
    let state = State::Restoring { killed: false };
    let failed = step(state, Facts::default(), Event::RestoreDone { ok: false }).expect("ends");
    assert_eq!((failed.next, failed.effects), (State::Checkpointed, vec![Effect::Refuse]));
    let again = step(failed.next, Facts::default(), Event::Need).expect("is taken");
    assert_eq!(again.effects, [Effect::Restore]);
}

#[test]
fn what_makes_no_sense_is_refused_with_a_reason_of_its_own() {
    let sleep = Event::Sleep(Depth::Checkpointed);
    let refusals = [
        (State::Created, sleep, Refusal::NotStarted),
        (State::Running, Event::Start, Refusal::AlreadyStarted),
        (State::Running, Event::Resume, Refusal::NotPaused),
        (State::Checkpointed, sleep, Refusal::AlreadyAsleep(Depth::Checkpointed)),
        (
            State::Frozen { by: FrozenBy::Sleep },
            Event::Sleep(Depth::Frozen),
            Refusal::AlreadyAsleep(Depth::Frozen),
        ),
        (State::Reclaimed, Event::Sleep(Depth::Frozen), Refusal::AlreadyAsleep(Depth::Reclaimed)),
        (State::Reclaimed, Event::Sleep(Depth::Reclaimed), Refusal::AlreadyAsleep(Depth::Reclaimed)),
        (State::Reclaiming, sleep, Refusal::FallingAsleep),
        (State::Probed { asleep: Asleep::Frozen }, sleep, Refusal::Probed),
        (
            State::Probed { asleep: Asleep::Reclaimed },
            Event::Sleep(Depth::Frozen),
            Refusal::AlreadyAsleep(Depth::Reclaimed),
        ),
        (DUMPING, sleep, Refusal::FallingAsleep),
        (RESTORING, Event::Wake, Refusal::Waking),
        (PAUSED, sleep, Refusal::Paused),
        (PAUSED, Event::Wake, Refusal::Paused),
        (State::Stopped, sleep, Refusal::Ended),
        (State::Stopped, Event::Need, Refusal::Ended),
    ];
    for (state, event, refusal) in refusals {
        assert_eq!(step(state, Facts::default(), event), Err(refusal), "{event:?} in {state:?}");
    }
}

/// The states that a row of events leads through.
fn states(from: State, events: &[Event]) -> Vec<State> {
    let next = |state: &mut State, event: &Event| {
        *state = step(*state, Facts::default(), *event).expect("is taken").next;
        Some(*state)
    };
    events.iter().scan(from, next).collect()
}

#[test]
fn a_sleep_deepens_step_by_step_without_a_wake() {
    let events = [
        Event::Sleep(Depth::Frozen),
        Event::Sleep(Depth::Reclaimed),
        Event::ReclaimDone { ok: true },
        Event::Sleep(Depth::Checkpointed),
        Event::DumpDone(DumpOutcome::Complete),
    ];
    let expected = [ASLEEP_FROZEN, State::Reclaiming, State::Reclaimed, DEEPENING, State::Checkpointed];
    assert_eq!(states(State::Running, &events), expected);
}

#[test]
fn a_wake_during_a_reclaim_does_not_wait_for_it() {
    for event in [Event::Wake, Event::Need, Event::Resume] {
        let woken = step(State::Reclaiming, Facts::default(), event).expect("is taken");
        assert_eq!(woken.next, State::Running);
        assert_eq!(woken.effects, [Effect::CancelReclaim, Effect::Thaw, Effect::Release]);
    }
}

#[test]
fn what_cannot_be_deepened_sleeps_on_unless_something_needs_it() {
    let failed = Event::DumpDone(DumpOutcome::Abandoned);
    assert_eq!(states(State::Reclaiming, &[Event::ReclaimDone { ok: false }]), [ASLEEP_FROZEN]);
    assert_eq!(states(DEEPENING, &[failed]), [ASLEEP_FROZEN]);
    assert_eq!(states(DEEPENING, &[Event::Need, failed])[1], State::Running);
    assert_eq!(states(DUMPING, &[failed]), [State::Running]);
}

#[test]
fn a_pause_of_a_sleeping_agent_ends_its_watch() {
    let probed = State::Probed { asleep: Asleep::Frozen };
    let paused = step(probed, Facts::default(), Event::Pause).expect("is taken");
    assert_eq!((paused.next, paused.effects), (PAUSED, vec![Effect::Freeze, Effect::PublishPaused]));
    for state in [ASLEEP_FROZEN, State::Reclaiming, State::Reclaimed] {
        let paused = step(state, Facts::default(), Event::Pause).expect("is taken");
        assert_eq!(paused.next, PAUSED);
        assert!(paused.effects.contains(&Effect::Unwatch), "{state:?}");
    }
}

#[test]
fn a_probe_leads_out_of_a_sleep_and_back_into_it_unless_something_needs_the_agent() {
    for (asleep, of) in [(ASLEEP_FROZEN, Asleep::Frozen), (State::Reclaimed, Asleep::Reclaimed)] {
        let probed = State::Probed { asleep: of };
        assert_eq!(states(asleep, &[Event::Probe, Event::ProbeOver]), [probed, asleep]);
        // It is at work still: later then.
        let again = [Event::Probe, Event::ProbeOver, Event::RefreezeFailed, Event::ProbeOver];
        assert_eq!(states(asleep, &again), [probed, asleep, probed, asleep]);
        let woken = step(probed, Facts::default(), Event::Need).expect("is taken");
        assert_eq!((woken.next, woken.effects), (State::Running, vec![Effect::Thaw, Effect::Release]));
        // What comes after a wake is of no interest any more.
        assert_eq!(states(probed, &[Event::Need, Event::ProbeOver])[1], State::Running);
    }
}

#[test]
fn memory_is_pushed_out_while_a_probe_is_answered() {
    let probed = |asleep| State::Probed { asleep };
    let done = |ok| [Event::Probe, Event::ReclaimDone { ok }, Event::ProbeOver];
    let reclaimed = [probed(Asleep::Reclaiming), probed(Asleep::Reclaimed), State::Reclaimed];
    assert_eq!(states(State::Reclaiming, &done(true)), reclaimed);
    let frozen = [probed(Asleep::Reclaiming), probed(Asleep::Frozen), ASLEEP_FROZEN];
    assert_eq!(states(State::Reclaiming, &done(false)), frozen);
    let back = [probed(Asleep::Reclaiming), State::Reclaiming];
    assert_eq!(states(State::Reclaiming, &[Event::Probe, Event::ProbeOver]), back);
    let woken = step(probed(Asleep::Reclaiming), Facts::default(), Event::Need).expect("is taken");
    assert_eq!(woken.effects, [Effect::CancelReclaim, Effect::Thaw, Effect::Release]);
}
