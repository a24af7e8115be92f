//! Falling asleep and waking, and the requests that wait for that.

use std::time::Instant;

use containerd_shim::protos::events::task::TaskResumed;
use tokio::sync::oneshot;
use tracing::{error, info, warn};

use super::{
    super::{Phase, Reply, Transition},
    Actor, Deferred, FREEZER, Falling, RETRY, Waking, answer,
};
use crate::{
    container::Message,
    error::TaskError,
    lifecycle::{Depth, DumpOutcome, Event, Refusal, State},
    runtime::{DumpReport, ReclaimReport, Restored, RuntimeError, Veto},
    wake::WakeCause,
};

/// A sleep in the freezer that was asked for at `since`.
fn froze(since: Instant) -> Transition {
    Transition { total: since.elapsed(), engine: FREEZER, ..Transition::now(Depth::Frozen) }
}

impl Actor {
    pub(super) async fn sleep(&mut self, depth: Depth, reply: Reply<Transition>) {
        let since = Instant::now();
        if depth == Depth::Reclaimed
            && let Err(error) = self.runtime.can_reclaim()
        {
            return answer(
                reply,
                Err(self.failed("its memory cannot be reclaimed, and it stays as it is", error)),
            );
        }
        // The dump's veto must exist before the dump begins; a refused sleep must not disturb one under way.
        let fresh = self.falling.is_none();
        let deeper = self.state().sleeps();
        if fresh {
            self.falling = Some(Falling { since, veto: Veto::default(), reply: None });
        }
        let outcome = self.apply(Event::Sleep(depth)).await;
        match (outcome, self.state()) {
            (Ok(()), state @ (State::Dumping { .. } | State::Reclaiming)) => {
                if state == State::Reclaiming && !deeper {
                    self.fell_asleep(froze(since), deeper);
                }
                if let Some(falling) = &mut self.falling {
                    falling.reply = Some(reply);
                }
            }
            (Ok(()), _) => {
                self.falling = None;
                let slept = froze(since);
                self.fell_asleep(slept.clone(), deeper);
                answer(reply, Ok(slept));
            }
            (Err(error), _) => {
                if fresh {
                    self.falling = None;
                }
                answer(reply, Err(error));
            }
        }
    }

    /// Takes note of a sleep; one that slept before and sleeps deeper now has fallen asleep once.
    pub(super) fn fell_asleep(&mut self, slept: Transition, deeper: bool) {
        let (depth, mode, ms) = (slept.depth, slept.mode, slept.total.as_millis());
        match &slept.classic_because {
            None => info!(id = %self.id, %depth, mode, ms, "asleep"),
            Some(reason) => info!(id = %self.id, %depth, mode, %reason, ms, "asleep"),
        }
        self.deaf_until = None;
        self.snapshot.send_modify(|now| {
            now.sleeps += u64::from(!deeper);
            now.last_sleep = Some(slept);
            now.last_error = None;
        });
    }

    pub(super) fn begin_reclaim(&mut self) {
        let veto = self.falling.as_ref().map(|falling| falling.veto.clone()).unwrap_or_default();
        let runtime = self.runtime.clone();
        self.beside(async move {
            let result = runtime.reclaim(veto.clone()).await;
            Message::Reclaimed { veto, result }
        });
    }

    /// Whoever asked for the reclaim learns at once that it was given up; its last step may take a little longer.
    pub(super) fn cancel_reclaim(&mut self) {
        let Some(falling) = self.falling.take() else { return };
        falling.veto.raise();
        if let Some(reply) = falling.reply {
            answer(reply, Err(self.failed("its memory is not reclaimed", RuntimeError::Vetoed)));
        }
    }

    pub(super) async fn reclaimed(&mut self, veto: &Veto, result: Result<ReclaimReport, RuntimeError>) {
        // The end of one that was given up is of no interest to anybody: another may be under way.
        if veto.is_raised() {
            return;
        }
        let falling = self.falling.take();
        let since = falling.as_ref().map_or_else(Instant::now, |falling| falling.since);
        let ok = result.is_ok();
        let answered = match result {
            Ok(ReclaimReport { before, after, engine, rest_because }) => {
                let slept = Transition {
                    total: since.elapsed(),
                    engine,
                    memory: Some((before, after)),
                    rest_because,
                    ..Transition::now(Depth::Reclaimed)
                };
                self.record(Phase::Reclaimed);
                let rest = slept.rest_because.as_deref().unwrap_or_default();
                info!(id = %self.id, before, after, engine, rest, "memory reclaimed");
                self.fell_asleep(slept.clone(), true);
                Ok(slept)
            }
            Err(error) => {
                warn!(id = %self.id, %error, "its memory could not be reclaimed: it sleeps on, frozen");
                self.snapshot.send_modify(|now| now.last_error = Some(error.to_string()));
                Err(self.failed("its memory cannot be reclaimed, and it sleeps frozen", error))
            }
        };
        self.note(Event::ReclaimDone { ok }).await;
        if let Some(reply) = falling.and_then(|falling| falling.reply) {
            answer(reply, answered);
        }
    }

    pub(super) async fn begin_dump(&mut self) {
        let veto = self.falling.as_ref().map(|falling| falling.veto.clone()).unwrap_or_default();
        if let Err(error) = self.try_record(Phase::Dumping) {
            // Deepening starts from a frozen cgroup, and after a failure the agent runs on.
            if let Err(error) = self.runtime.thaw().await {
                error!(id = %self.id, %error, "cannot thaw it after a dump that could not begin");
            }
            let failed = Err(RuntimeError::FailedPrecondition(error.to_string()));
            return self.beside(async move { Message::Dumped(failed) });
        }
        let runtime = self.runtime.clone();
        self.beside(async move { Message::Dumped(runtime.dump(veto).await) });
    }

    pub(super) async fn dumped(&mut self, result: Result<DumpReport, RuntimeError>) {
        let falling = self.falling.take();
        let since = falling.as_ref().map_or_else(Instant::now, |falling| falling.since);
        let (outcome, answered) = match result {
            Ok(report) => {
                let slept = Transition {
                    total: since.elapsed(),
                    stopped: report.stopped,
                    image_bytes: report.image_bytes,
                    engine: report.engine,
                    mode: report.mode,
                    classic_because: report.classic_because,
                    whole_because: report.whole_because,
                    memory_bytes: report.memory_bytes,
                    ..Transition::now(Depth::Checkpointed)
                };
                self.snapshot
                    .send_modify(|now| now.image = Some((report.image_dir.clone(), report.image_bytes)));
                self.record(Phase::Checkpointed);
                let deeper = matches!(self.state(), State::Dumping { asleep: true, .. });
                self.fell_asleep(slept.clone(), deeper);
                (DumpOutcome::Complete, Ok(slept))
            }
            Err(error) => {
                self.record(Phase::Running);
                warn!(id = %self.id, %error, "the agent could not be dumped");
                if !matches!(error, RuntimeError::Vetoed) {
                    self.snapshot.send_modify(|now| now.last_error = Some(error.to_string()));
                }
                let what = match self.state() {
                    State::Dumping { asleep: true, woken: false, .. } => {
                        "cannot be checkpointed and sleeps on"
                    }
                    _ => "cannot be put to sleep and runs on",
                };
                (DumpOutcome::Abandoned, Err(self.failed(what, error)))
            }
        };
        self.note(Event::DumpDone(outcome)).await;
        if let Some(reply) = falling.and_then(|falling| falling.reply) {
            answer(reply, answered);
        }
    }

    /// Wakes it for what came from below.
    pub(super) async fn wake_for(&mut self, cause: WakeCause) {
        info!(id = %self.id, %cause, "a sleeping agent is needed: it wakes");
        if let Err(error) = self.apply_for(cause, Event::Need).await {
            self.deafen();
            warn!(id = %self.id, %cause, %error, "it cannot be woken");
        }
    }

    pub(super) async fn wake(&mut self, reply: Reply<Option<Transition>>) {
        // Asked for as such, a wake of a waking agent is refused; all else that needs it joins the wake.
        if matches!(self.state(), State::Restoring { .. }) {
            return answer(reply, Err(self.refused(Refusal::Waking)));
        }
        self.need(WakeCause::Request, Deferred::Wake { reply }).await;
    }

    pub(super) async fn resume(&mut self, reply: Reply<()>) {
        // Whoever asked for a pause that has not come yet must not find it paused after this.
        if self.call_off_pauses() {
            return answer(reply, Ok(()));
        }
        self.waiting.push(Deferred::Resume { reply });
        let resumed = self.apply_for(WakeCause::Resume, Event::Resume).await;
        self.unqueue_on(resumed);
    }

    /// Queues a request until the agent is awake, and sees to it that it wakes.
    pub(super) async fn need(&mut self, cause: WakeCause, deferred: Deferred) {
        self.waiting.push(deferred);
        let needed = self.apply_for(cause, Event::Need).await;
        self.unqueue_on(needed);
    }

    /// Fails the request queued last when the life-cycle refused it.
    pub(super) fn unqueue_on(&mut self, outcome: Result<(), TaskError>) {
        if let Err(error) = outcome
            && let Some(deferred) = self.waiting.pop()
        {
            deferred.fail(error);
        }
    }

    pub(super) async fn restored(&mut self, result: Result<Restored, RuntimeError>) {
        let ok = result.is_ok();
        match result {
            Ok(restored) => {
                self.adopt(restored.process);
                let (runtime, mailbox) = (self.runtime.clone(), self.mailbox.clone());
                tokio::spawn(async move {
                    if let Some(reason) = runtime.memory_lost().await {
                        let _ = mailbox.send(Message::MemoryLost(reason));
                    }
                });
                if let Some(waking) = &mut self.waking {
                    waking.engine = restored.engine;
                    waking.mode = restored.mode;
                }
                self.record(Phase::Running);
            }
            Err(error) => {
                self.waking = None;
                self.deafen();
                error!(id = %self.id, %error, "the agent could not be woken; its image is kept");
                self.snapshot.send_modify(|now| now.last_error = Some(error.to_string()));
                self.record(Phase::Checkpointed);
            }
        }
        self.note(Event::RestoreDone { ok }).await;
    }

    /// Says why it was killed: nobody else will know.
    pub(super) fn memory_lost(&mut self, reason: String) {
        error!(id = %self.id, %reason, "its memory could not be filled");
        self.snapshot.send_modify(|now| now.last_error = Some(reason));
    }

    /// Serves the requests that waited; they learn of the wake that they waited for, if there was one.
    pub(super) fn release(&mut self) {
        let woke = self.waking.take().map(|waking| self.woke(&waking));
        let paused = std::mem::take(&mut self.paused_asleep);
        self.cause = None;
        for deferred in std::mem::take(&mut self.waiting) {
            match deferred {
                Deferred::StartExec { exec_id, reply } => self.begin_exec(exec_id, reply),
                Deferred::Signal { signal, all, reply } => answer(reply, self.signal(signal, all)),
                Deferred::Resume { reply } => {
                    self.events.publish(TaskResumed { container_id: self.id.clone(), ..Default::default() });
                    answer(reply, Ok(()));
                }
                Deferred::Wake { reply } => answer(reply, Ok(woke.clone())),
                Deferred::Checkpoint { config, reply } => {
                    // Whoever paused it in its sleep copies files beside the image: it must not run meanwhile.
                    if paused {
                        let (reply, _) = oneshot::channel();
                        let _ = self.mailbox.send(Message::Pause { reply });
                    }
                    let _ = self.mailbox.send(Message::Checkpoint { config, reply });
                }
                Deferred::Demand { reply } => answer(reply, Ok(())),
            }
        }
    }

    pub(super) fn deafen(&mut self) {
        self.deaf_until = Some(tokio::time::Instant::now() + RETRY);
    }

    pub(super) fn woke(&self, waking: &Waking) -> Transition {
        let woke = Transition {
            total: waking.since.elapsed(),
            image_bytes: waking.image_bytes,
            engine: waking.engine,
            mode: waking.mode,
            cause: Some(waking.cause),
            ..Transition::now(waking.depth)
        };
        let (depth, mode, cause) = (woke.depth, woke.mode, waking.cause);
        info!(id = %self.id, %depth, mode, %cause, ms = woke.total.as_millis(), "awake");
        self.snapshot.send_modify(|now| {
            now.wakes += 1;
            now.last_error = None;
            now.last_wake = Some(woke.clone());
        });
        woke
    }

    pub(super) fn refuse(&mut self) {
        self.cause = None;
        let (ended, reason) = {
            let now = self.snapshot.borrow();
            (now.state == State::Stopped, now.last_error.clone().unwrap_or_default())
        };
        for deferred in std::mem::take(&mut self.waiting) {
            let error = match (&deferred, ended) {
                (Deferred::Signal { .. }, true) => TaskError::Finished,
                (_, true) => self.refused(Refusal::Ended),
                (_, false) => {
                    TaskError::Dependency(format!("container {}: cannot be woken: {reason}", self.id))
                }
            };
            deferred.fail(error);
        }
        if ended {
            for postponed in std::mem::take(&mut self.postponed) {
                postponed.fail(self.refused(Refusal::Ended));
            }
        }
    }
}
