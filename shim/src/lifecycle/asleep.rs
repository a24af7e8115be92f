//! The states of an agent that sleeps with its processes in place: frozen, reclaiming, reclaimed, and out of these for a
//! moment to answer a probe.

use super::{
    ASLEEP_FROZEN, Asleep, DEEPENING, Depth, Effect, Event, Facts, FrozenBy, PAUSED, Refusal, State, Step, to,
};

pub(super) fn frozen(by: FrozenBy, facts: Facts, event: Event) -> Result<Step, Refusal> {
    let here = State::Frozen { by };
    match (by, event) {
        (_, Event::Start) => Err(Refusal::AlreadyStarted),
        (_, Event::FreezeFailed) => to(State::Running, &[Effect::Thaw, Effect::Release]),
        // A frozen process dies of SIGKILL as any other; the cgroup must not stay frozen behind it.
        (_, Event::Kill) => to(here, &[Effect::Kill]),
        (_, Event::Exited) => to(State::Stopped, &[Effect::Thaw, Effect::ReportExit, Effect::Refuse]),
        (FrozenBy::Client, Event::Resume) | (FrozenBy::Sleep, Event::Resume | Event::Wake | Event::Need) => {
            to(State::Running, &[Effect::Thaw, Effect::Release])
        }
        (FrozenBy::Client, Event::Pause) => to(here, &[]),
        (FrozenBy::Client, Event::Sleep(_) | Event::Wake | Event::Need) => Err(Refusal::Paused),
        (FrozenBy::Sleep, Event::Sleep(Depth::Frozen)) => Err(Refusal::AlreadyAsleep(Depth::Frozen)),
        (FrozenBy::Sleep, Event::Sleep(Depth::Checkpointed)) => {
            facts.allow_dump()?;
            to(DEEPENING, &[Effect::Dump])
        }
        (FrozenBy::Sleep, Event::Sleep(Depth::Reclaimed)) => to(State::Reclaiming, &[Effect::Reclaim]),
        (FrozenBy::Sleep, Event::Pause) => to(PAUSED, &[Effect::Unwatch, Effect::PublishPaused]),
        (FrozenBy::Sleep, Event::Probe | Event::RefreezeFailed) => {
            to(State::Probed { asleep: Asleep::Frozen }, &[Effect::ThawForProbe])
        }
        (
            _,
            Event::Probe
            | Event::ProbeOver
            | Event::RefreezeFailed
            | Event::ThawFailed(_)
            | Event::StartDone { .. }
            | Event::ReclaimDone { .. }
            | Event::DumpDone(_)
            | Event::RestoreDone { .. },
        ) => to(here, &[]),
    }
}

pub(super) fn reclaiming(event: Event) -> Result<Step, Refusal> {
    match event {
        Event::Start => Err(Refusal::AlreadyStarted),
        Event::Sleep(_) => Err(Refusal::FallingAsleep),
        Event::FreezeFailed => to(State::Running, &[Effect::CancelReclaim, Effect::Thaw, Effect::Release]),
        // What was pushed out comes back page by page; the rest is there at once.
        Event::Wake | Event::Need | Event::Resume => {
            to(State::Running, &[Effect::CancelReclaim, Effect::Thaw, Effect::Release])
        }
        Event::Pause => to(PAUSED, &[Effect::CancelReclaim, Effect::Unwatch, Effect::PublishPaused]),
        Event::Kill => to(State::Reclaiming, &[Effect::Kill]),
        Event::Exited => {
            let effects = [Effect::CancelReclaim, Effect::Thaw, Effect::ReportExit, Effect::Refuse];
            to(State::Stopped, &effects)
        }
        Event::ReclaimDone { ok: true } => to(State::Reclaimed, &[]),
        Event::ReclaimDone { ok: false } => to(ASLEEP_FROZEN, &[]),
        // Its memory is pushed out meanwhile.
        Event::Probe | Event::RefreezeFailed => {
            to(State::Probed { asleep: Asleep::Reclaiming }, &[Effect::ThawForProbe])
        }
        Event::ProbeOver
        | Event::ThawFailed(_)
        | Event::StartDone { .. }
        | Event::DumpDone(_)
        | Event::RestoreDone { .. } => to(State::Reclaiming, &[]),
    }
}

pub(super) fn reclaimed(facts: Facts, event: Event) -> Result<Step, Refusal> {
    match event {
        Event::Sleep(Depth::Frozen | Depth::Reclaimed) => Err(Refusal::AlreadyAsleep(Depth::Reclaimed)),
        Event::Kill => to(State::Reclaimed, &[Effect::Kill]),
        Event::Probe | Event::RefreezeFailed => {
            to(State::Probed { asleep: Asleep::Reclaimed }, &[Effect::ThawForProbe])
        }
        Event::ProbeOver
        | Event::ThawFailed(_)
        | Event::StartDone { .. }
        | Event::ReclaimDone { .. }
        | Event::DumpDone(_)
        | Event::RestoreDone { .. } => to(State::Reclaimed, &[]),
        // Its processes are frozen, wherever their memory is.
        _ => frozen(FrozenBy::Sleep, facts, event),
    }
}

pub(super) fn probed(asleep: Asleep, event: Event) -> Result<Step, Refusal> {
    let here = State::Probed { asleep };
    let (back, depth) = match asleep {
        Asleep::Frozen => (ASLEEP_FROZEN, Depth::Frozen),
        Asleep::Reclaiming => (State::Reclaiming, Depth::Frozen),
        Asleep::Reclaimed => (State::Reclaimed, Depth::Reclaimed),
    };
    let end = |next, effects: &[Effect]| {
        let cancel = (asleep == Asleep::Reclaiming).then_some(Effect::CancelReclaim);
        Ok(Step { next, effects: cancel.into_iter().chain(effects.iter().copied()).collect() })
    };
    match event {
        Event::Start => Err(Refusal::AlreadyStarted),
        Event::Sleep(_) if asleep == Asleep::Reclaiming => Err(Refusal::FallingAsleep),
        Event::Sleep(wanted) if wanted <= depth => Err(Refusal::AlreadyAsleep(depth)),
        // The probe's connection would be in the way of whatever is deeper.
        Event::Sleep(_) => Err(Refusal::Probed),
        Event::Wake | Event::Need | Event::Resume => end(State::Running, &[Effect::Thaw, Effect::Release]),
        Event::Pause => end(PAUSED, &[Effect::Freeze, Effect::PublishPaused]),
        Event::Kill => to(here, &[Effect::Kill]),
        Event::Exited => end(State::Stopped, &[Effect::Thaw, Effect::ReportExit, Effect::Refuse]),
        Event::ProbeOver => to(back, &[Effect::Refreeze]),
        // It could not be thawed for the probe, and is watched as before.
        Event::ThawFailed(_) => to(back, &[]),
        Event::ReclaimDone { ok } => {
            let asleep = if ok { Asleep::Reclaimed } else { Asleep::Frozen };
            to(State::Probed { asleep }, &[])
        }
        Event::Probe
        | Event::RefreezeFailed
        | Event::FreezeFailed
        | Event::StartDone { .. }
        | Event::DumpDone(_)
        | Event::RestoreDone { .. } => to(here, &[]),
    }
}
