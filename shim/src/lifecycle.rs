//! The life-cycle of one container: a pure state machine.
//!
//! [`step`] takes a state, the facts it needs and an event, and returns the next state with the effects that the
//! actor must carry out, in order. It does no work of its own, so that it can be tested by the million.
//!
//! ```text
//! Created → Starting → Running ⇄ Frozen
//!                      Running|Frozen → Reclaiming → Reclaimed → Running
//!                      Frozen|Reclaiming|Reclaimed ⇄ Probed → Running
//!                      Running|Frozen|Reclaimed → Dumping → Checkpointed → Restoring → Running
//!                      any → Stopped
//! ```

mod asleep;

use std::fmt;

use self::asleep::{frozen, probed, reclaimed, reclaiming};

/// How deep an agent sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Depth {
    /// The cgroup is frozen; processes, memory and connections stay.
    Frozen,
    /// Frozen, and its memory pushed out to swap as far as it goes.
    Reclaimed,
    /// Dumped to an image; the processes are gone.
    Checkpointed,
}

impl Depth {
    /// The next shallower depth, if there is one.
    pub fn shallower(self) -> Option<Depth> {
        match self {
            Depth::Frozen => None,
            Depth::Reclaimed => Some(Depth::Frozen),
            Depth::Checkpointed => Some(Depth::Reclaimed),
        }
    }
}

impl fmt::Display for Depth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Depth::Frozen => "frozen",
            Depth::Reclaimed => "reclaimed",
            Depth::Checkpointed => "checkpointed",
        })
    }
}

/// On whose behalf a container is frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrozenBy {
    /// A client of the Task API paused it; only `Resume` (or death) ends that.
    Client,
    /// It sleeps; whatever needs it wakes it.
    Sleep,
}

/// How an agent sleeps with its processes in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asleep {
    /// As [`State::Frozen`].
    Frozen,
    /// As [`State::Reclaiming`].
    Reclaiming,
    /// As [`State::Reclaimed`].
    Reclaimed,
}

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The OCI runtime has made it; its program has not begun.
    Created,
    /// The OCI runtime is starting its program.
    Starting {
        /// The program has ended already.
        exited: bool,
    },
    /// It runs.
    Running,
    /// Its cgroup is frozen.
    Frozen {
        /// Why.
        by: FrozenBy,
    },
    /// It sleeps frozen, and its memory is being pushed out.
    Reclaiming,
    /// It sleeps frozen, and its memory has been pushed out.
    Reclaimed,
    /// It sleeps with its processes in place, and runs for a moment to answer a probe.
    Probed {
        /// How it sleeps otherwise.
        asleep: Asleep,
    },
    /// It is being dumped.
    Dumping {
        /// It slept before: it sleeps on, frozen, when the dump fails.
        asleep: bool,
        /// Something needs it awake: the dump is to be given up, or followed by a restore.
        woken: bool,
        /// It was killed meanwhile.
        killed: bool,
        /// Its init process has ended: by the dump itself if that succeeds, by something else if not.
        exited: bool,
    },
    /// Its image is on disk, its processes are gone.
    Checkpointed,
    /// It is being restored.
    Restoring {
        /// It was killed meanwhile.
        killed: bool,
    },
    /// It has ended.
    Stopped,
}

impl State {
    /// Whether it sleeps, or is falling asleep.
    pub fn sleeps(self) -> bool {
        match self {
            Self::Frozen { by: FrozenBy::Sleep }
            | Self::Reclaiming
            | Self::Reclaimed
            | Self::Probed { .. }
            | Self::Dumping { .. }
            | Self::Checkpointed => true,
            Self::Created
            | Self::Starting { .. }
            | Self::Running
            | Self::Frozen { by: FrozenBy::Client }
            | Self::Restoring { .. }
            | Self::Stopped => false,
        }
    }

    /// Whether it sleeps, or is falling asleep, and nothing has ended that yet.
    pub fn sleeps_on(self) -> bool {
        self.sleeps()
            && !matches!(self, Self::Dumping { woken: true, .. } | Self::Dumping { killed: true, .. })
    }
}

/// What happened, or what somebody asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A client starts the container.
    Start,
    /// The OCI runtime's start has ended.
    StartDone {
        /// With success.
        ok: bool,
    },
    /// Go to sleep.
    Sleep(Depth),
    /// Wake up, asked for as such.
    Wake,
    /// A request that only an awake agent can serve has been queued.
    Need,
    /// A probe has come, and nothing else, that the agent can answer without a wake.
    Probe,
    /// The probe is over, and nothing else has come: it can sleep on.
    ProbeOver,
    /// The cgroup could not be frozen again after a probe, or the agent still has something to do.
    RefreezeFailed,
    /// A client pauses the task.
    Pause,
    /// A client resumes the task.
    Resume,
    /// SIGKILL for the whole container.
    Kill,
    /// The cgroup could not be frozen, or the agent has something to do and cannot sleep frozen.
    FreezeFailed,
    /// The cgroup could not be thawed, on whosever behalf it was frozen.
    ThawFailed(FrozenBy),
    /// The reclaim under way has ended. The end of one that was given up is no event.
    ReclaimDone {
        /// With success.
        ok: bool,
    },
    /// The dump has ended.
    DumpDone(DumpOutcome),
    /// The restore has ended.
    RestoreDone {
        /// With success.
        ok: bool,
    },
    /// The init process has ended.
    Exited,
}

/// How a dump ended. The agent runs on after anything but `Complete`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DumpOutcome {
    /// The image is complete and the processes are gone.
    Complete,
    /// It failed, or was given up because of a wake.
    Abandoned,
}

/// What the actor must do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Let the OCI runtime start the program; ends with [`Event::StartDone`].
    Start,
    /// Freeze the cgroup; ends with [`Event::FreezeFailed`] if that fails.
    Freeze,
    /// Watch the frozen agent for what would make it run; ends with [`Event::FreezeFailed`] if there is something now.
    Watch,
    /// Watch it no longer.
    Unwatch,
    /// Begin to push its memory out; ends with [`Event::ReclaimDone`].
    Reclaim,
    /// Give the reclaim under way up, at its next step. Nobody waits for that.
    CancelReclaim,
    /// Thaw the cgroup; ends with [`Event::ThawFailed`] if that fails.
    Thaw,
    /// Thaw the cgroup for a probe, and see what comes of it; ends with [`Event::ThawFailed`] if that fails.
    ThawForProbe,
    /// Freeze it again and watch it; ends with [`Event::RefreezeFailed`] if that fails or it has something to do.
    Refreeze,
    /// Begin a dump, which ends the watch; ends with [`Event::DumpDone`].
    Dump,
    /// Ask the dump under way to be given up before it kills.
    CancelDump,
    /// Begin a restore; ends with [`Event::RestoreDone`].
    Restore,
    /// Send SIGKILL to all processes of the container.
    Kill,
    /// Remove the image: its state lives on in processes, or has ended for good.
    DropImage,
    /// Serve the requests that waited for the agent to be awake.
    Release,
    /// Fail the requests that waited for the agent to be awake.
    Refuse,
    /// Report the exit of the init process with the status that it had.
    ReportExit,
    /// Report an end by SIGKILL of an agent that has no processes.
    ReportKilledAsleep,
    /// Tell containerd that the task is paused.
    PublishPaused,
}

/// Why an event is refused. The state stays as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It has not been started yet.
    #[error("it has not been started yet")]
    NotStarted,
    /// It was started before.
    #[error("it was started before")]
    AlreadyStarted,
    /// It sleeps that deep already.
    #[error("it is asleep already ({0})")]
    AlreadyAsleep(Depth),
    /// It is falling asleep.
    #[error("it is falling asleep already")]
    FallingAsleep,
    /// It answers a probe.
    #[error("it answers a probe at this moment: ask again")]
    Probed,
    /// It is waking.
    #[error("it is waking already")]
    Waking,
    /// A client paused it.
    #[error("a client of the Task API has paused it: resume the task first")]
    Paused,
    /// It was resumed before the pause had come.
    #[error("it was resumed before it could be paused")]
    Resumed,
    /// It runs, so there is nothing to resume.
    #[error("it is not paused")]
    NotPaused,
    /// An exec lives in it.
    #[error(
        "{0} exec process(es) live in it: they would be lost with a dump; it can sleep when they have ended"
    )]
    ExecsAlive(usize),
    /// A client takes a checkpoint of it.
    #[error("a checkpoint of it is being taken")]
    BeingCheckpointed,
    /// It has ended.
    #[error("it has ended")]
    Ended,
}

/// What [`step`] must know beside the state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Facts {
    /// Exec processes that live or are being started.
    pub live_execs: usize,
    /// Checkpoints for clients under way.
    pub checkpoints: usize,
}

impl Facts {
    /// Whether a dump would lose or disturb something.
    fn allow_dump(self) -> Result<(), Refusal> {
        match self {
            Facts { checkpoints: 0, live_execs: 0 } => Ok(()),
            Facts { checkpoints: 0, live_execs } => Err(Refusal::ExecsAlive(live_execs)),
            _ => Err(Refusal::BeingCheckpointed),
        }
    }
}

/// The next state and what to do on the way there, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The state from now on.
    pub next: State,
    /// What to do, in order.
    pub effects: Vec<Effect>,
}

#[allow(clippy::unnecessary_wraps)] // It is every arm's result.
fn to(next: State, effects: &[Effect]) -> Result<Step, Refusal> {
    Ok(Step { next, effects: effects.to_vec() })
}

const DUMPING: State = State::Dumping { asleep: false, woken: false, killed: false, exited: false };
const DEEPENING: State = State::Dumping { asleep: true, woken: false, killed: false, exited: false };
const RESTORING: State = State::Restoring { killed: false };
const ASLEEP_FROZEN: State = State::Frozen { by: FrozenBy::Sleep };
const PAUSED: State = State::Frozen { by: FrozenBy::Client };

/// Decides what `event` does to a container in `state`.
///
/// # Errors
/// [`Refusal`] when the event makes no sense in this state; nothing changes then.
pub fn step(state: State, facts: Facts, event: Event) -> Result<Step, Refusal> {
    match state {
        State::Created => created(event),
        State::Starting { exited } => starting(exited, event),
        State::Running => running(facts, event),
        State::Frozen { by } => frozen(by, facts, event),
        State::Reclaiming => reclaiming(event),
        State::Reclaimed => reclaimed(facts, event),
        State::Probed { asleep } => probed(asleep, event),
        State::Dumping { asleep, woken, killed, exited } => {
            dumping(Dump { asleep, woken, killed, exited }, event)
        }
        State::Checkpointed => checkpointed(event),
        State::Restoring { killed } => restoring(killed, event),
        State::Stopped => stopped(event),
    }
}

fn created(event: Event) -> Result<Step, Refusal> {
    match event {
        Event::Start => to(State::Starting { exited: false }, &[Effect::Start]),
        Event::Kill => to(State::Created, &[Effect::Kill]),
        Event::Exited => to(State::Stopped, &[Effect::ReportExit]),
        _ => Err(Refusal::NotStarted),
    }
}

fn starting(exited: bool, event: Event) -> Result<Step, Refusal> {
    match event {
        Event::Start => Err(Refusal::AlreadyStarted),
        Event::StartDone { .. } if exited => to(State::Stopped, &[Effect::ReportExit, Effect::Refuse]),
        Event::StartDone { ok: true } => to(State::Running, &[Effect::Release]),
        Event::StartDone { ok: false } => to(State::Created, &[Effect::Refuse]),
        Event::Kill => to(State::Starting { exited }, &[Effect::Kill]),
        Event::Exited => to(State::Starting { exited: true }, &[]),
        // Whatever needs it awake waits for the start to end.
        Event::Need => to(State::Starting { exited }, &[]),
        _ => Err(Refusal::NotStarted),
    }
}

fn running(facts: Facts, event: Event) -> Result<Step, Refusal> {
    match event {
        Event::Start => Err(Refusal::AlreadyStarted),
        // An exec keeps the sandbox awake at every depth.
        Event::Sleep(depth) => {
            facts.allow_dump()?;
            match depth {
                Depth::Frozen => to(ASLEEP_FROZEN, &[Effect::Freeze, Effect::Watch]),
                Depth::Reclaimed => to(State::Reclaiming, &[Effect::Freeze, Effect::Watch, Effect::Reclaim]),
                Depth::Checkpointed => to(DUMPING, &[Effect::Dump]),
            }
        }
        Event::Wake | Event::Need => to(State::Running, &[Effect::Release]),
        // CRIU thaws the cgroup as soon as it has hold of the processes, and leaves it at its end as it found it.
        Event::Pause if facts.checkpoints > 0 => Err(Refusal::BeingCheckpointed),
        Event::Pause => to(PAUSED, &[Effect::Freeze, Effect::PublishPaused]),
        Event::Resume => Err(Refusal::NotPaused),
        Event::Kill => to(State::Running, &[Effect::Kill]),
        Event::Exited => to(State::Stopped, &[Effect::ReportExit, Effect::Refuse]),
        Event::ThawFailed(by) => to(State::Frozen { by }, &[Effect::Refuse]),
        Event::FreezeFailed
        | Event::Probe
        | Event::ProbeOver
        | Event::RefreezeFailed
        | Event::StartDone { .. }
        | Event::ReclaimDone { .. }
        | Event::DumpDone(_)
        | Event::RestoreDone { .. } => to(State::Running, &[]),
    }
}

/// What is known of a dump under way: the fields of [`State::Dumping`].
#[derive(Clone, Copy)]
struct Dump {
    asleep: bool,
    woken: bool,
    killed: bool,
    exited: bool,
}

fn dumping(dump: Dump, event: Event) -> Result<Step, Refusal> {
    let Dump { asleep, woken, killed, exited } = dump;
    let stay = |woken, killed, exited, effects: &[Effect]| {
        to(State::Dumping { asleep, woken, killed, exited }, effects)
    };
    match event {
        Event::Start => Err(Refusal::AlreadyStarted),
        Event::Sleep(_) => Err(Refusal::FallingAsleep),
        Event::Wake | Event::Need | Event::Resume if woken => stay(woken, killed, exited, &[]),
        Event::Wake | Event::Need | Event::Resume => stay(true, killed, exited, &[Effect::CancelDump]),
        // A dump that fails would let it run on behind the back of who paused it.
        Event::Pause => Err(Refusal::FallingAsleep),
        Event::Kill => stay(woken, true, exited, &[Effect::CancelDump, Effect::Kill]),
        Event::Exited => stay(woken, killed, true, &[]),
        Event::DumpDone(DumpOutcome::Complete) => match (killed, exited) {
            (true, true) => to(State::Stopped, &[Effect::DropImage, Effect::ReportExit, Effect::Refuse]),
            // The processes are gone; their exit is on its way and is the one to report.
            (true, false) => to(State::Running, &[Effect::DropImage, Effect::Release]),
            (false, _) if woken => to(RESTORING, &[Effect::Restore]),
            (false, _) => to(State::Checkpointed, &[]),
        },
        Event::DumpDone(DumpOutcome::Abandoned) => match (exited, killed) {
            (true, _) => to(State::Stopped, &[Effect::ReportExit, Effect::Refuse]),
            (false, true) => to(State::Running, &[Effect::Kill, Effect::Release]),
            // It slept before, and nothing needs it: the failed dump has let it run for a moment.
            (false, false) if asleep && !woken => to(ASLEEP_FROZEN, &[Effect::Freeze, Effect::Watch]),
            (false, false) => to(State::Running, &[Effect::Release]),
        },
        Event::FreezeFailed
        | Event::Probe
        | Event::ProbeOver
        | Event::RefreezeFailed
        | Event::ThawFailed(_)
        | Event::StartDone { .. }
        | Event::ReclaimDone { .. }
        | Event::RestoreDone { .. } => stay(woken, killed, exited, &[]),
    }
}

fn checkpointed(event: Event) -> Result<Step, Refusal> {
    match event {
        Event::Start => Err(Refusal::AlreadyStarted),
        Event::Sleep(_) => Err(Refusal::AlreadyAsleep(Depth::Checkpointed)),
        Event::Wake | Event::Need | Event::Resume => to(RESTORING, &[Effect::Restore]),
        Event::Kill => to(State::Stopped, &[Effect::ReportKilledAsleep, Effect::DropImage]),
        // Exited: the processes that the dump killed.
        Event::Pause
        | Event::Exited
        | Event::Probe
        | Event::ProbeOver
        | Event::RefreezeFailed
        | Event::FreezeFailed
        | Event::ThawFailed(_)
        | Event::StartDone { .. }
        | Event::ReclaimDone { .. }
        | Event::DumpDone(_)
        | Event::RestoreDone { .. } => to(State::Checkpointed, &[]),
    }
}

fn restoring(killed: bool, event: Event) -> Result<Step, Refusal> {
    let here = State::Restoring { killed };
    match event {
        Event::Start => Err(Refusal::AlreadyStarted),
        Event::Sleep(_) | Event::Pause | Event::Wake => Err(Refusal::Waking),
        Event::Need | Event::Resume => to(here, &[]),
        Event::Kill => to(State::Restoring { killed: true }, &[Effect::Kill]),
        Event::RestoreDone { ok: true } if killed => {
            to(State::Running, &[Effect::DropImage, Effect::Kill, Effect::Release])
        }
        Event::RestoreDone { ok: true } => to(State::Running, &[Effect::DropImage, Effect::Release]),
        Event::RestoreDone { ok: false } if killed => {
            to(State::Stopped, &[Effect::ReportKilledAsleep, Effect::DropImage, Effect::Refuse])
        }
        Event::RestoreDone { ok: false } => to(State::Checkpointed, &[Effect::Refuse]),
        Event::Exited
        | Event::Probe
        | Event::ProbeOver
        | Event::RefreezeFailed
        | Event::FreezeFailed
        | Event::ThawFailed(_)
        | Event::StartDone { .. }
        | Event::ReclaimDone { .. }
        | Event::DumpDone(_) => to(here, &[]),
    }
}

fn stopped(event: Event) -> Result<Step, Refusal> {
    match event {
        Event::Exited
        | Event::Probe
        | Event::ProbeOver
        | Event::RefreezeFailed
        | Event::FreezeFailed
        | Event::ThawFailed(_)
        | Event::StartDone { .. }
        | Event::ReclaimDone { .. }
        | Event::DumpDone(_)
        | Event::RestoreDone { .. } => to(State::Stopped, &[]),
        _ => Err(Refusal::Ended),
    }
}

#[cfg(test)]
#[path = "lifecycle_tests.rs"]
mod tests;
