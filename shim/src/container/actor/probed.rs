//! A frozen agent that answers a probe: it runs for a moment, and nobody is told of a wake.

use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::{super::Message, Actor};
use crate::{
    error::TaskError,
    lifecycle::{Event, State},
    runtime::RuntimeError,
    wake::WakeCause,
};

/// How long a probe may take, as long as a kubelet waits by default. What takes longer is a wake.
const LONGEST: Duration = Duration::from_secs(1);
/// How long the agent may be at work after the probe. What takes longer is a wake.
const GRACE: Duration = Duration::from_millis(500);
/// How long it is left at work before it is asked again.
const AT_WORK: Duration = Duration::from_millis(10);

/// A probe that is being answered.
#[derive(Debug)]
pub(super) struct Probe {
    /// Tells it from others: what comes of an earlier one is of no interest.
    number: u64,
    since: Instant,
    /// When nothing was left of it but the agent's own work.
    over: Option<Instant>,
}

impl Actor {
    /// Lets the frozen agent answer a probe.
    pub(super) async fn probe(&mut self) {
        if let Err(error) = self.apply(Event::Probe).await {
            self.deafen();
            warn!(id = %self.id, %error, "it cannot answer a probe");
            return;
        }
        self.probed += 1;
        self.probe = Some(Probe { number: self.probed, since: Instant::now(), over: None });
        debug!(id = %self.id, "a frozen agent is let answer a probe");
        self.await_probe(Duration::ZERO);
    }

    /// Waits for the end of the probe, after a pause.
    fn await_probe(&self, pause: Duration) {
        let Some(Probe { number, since, .. }) = self.probe else { return };
        let (runtime, left) = (self.runtime.clone(), LONGEST.saturating_sub(since.elapsed()));
        self.beside(async move {
            tokio::time::sleep(pause).await;
            let over = tokio::time::timeout(left, runtime.probe_over()).await;
            Message::ProbeOver { number, alone: over.unwrap_or(false) }
        });
    }

    /// Nothing is left of the probe, or something else has come.
    pub(super) async fn probe_over(&mut self, number: u64, alone: bool) {
        let Some(probe) = self.probe.as_mut().filter(|probe| probe.number == number) else { return };
        if !matches!(self.snapshot.borrow().state, State::Probed { .. }) {
            self.probe = None;
            return;
        }
        let over = *probe.over.get_or_insert_with(Instant::now);
        let took = probe.since.elapsed();
        if !alone {
            info!(id = %self.id, ms = took.as_millis(), "something else came with a probe, or it took too long");
            return self.woken_by_probe().await;
        }
        match self.apply(Event::ProbeOver).await {
            Ok(()) => {
                debug!(id = %self.id, ms = took.as_millis(), "a probe was answered: it sleeps on");
                self.probe = None;
            }
            Err(TaskError::Runtime { source: RuntimeError::Busy(_), .. })
                if over.elapsed() < GRACE && took < LONGEST =>
            {
                self.await_probe(AT_WORK);
            }
            Err(error) => {
                info!(id = %self.id, %error, ms = took.as_millis(), "a probe was more than that");
                self.woken_by_probe().await;
            }
        }
    }

    async fn woken_by_probe(&mut self) {
        self.probe = None;
        self.wake_for(WakeCause::Traffic).await;
    }
}
