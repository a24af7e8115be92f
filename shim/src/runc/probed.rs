//! A frozen container that answers a probe.

use std::{sync::Arc, time::Duration};

use tracing::{debug, warn};

use super::{RuncContainer, blocking, failed};
use crate::{
    runtime::RuntimeError,
    traffic::{Progress, Visit},
    wake::{Demand, WakeCause},
    watch::Watch,
};

/// How long after each other it is looked whether a probe is over: at first, and at most.
const FIRST_LOOK: Duration = Duration::from_millis(2);
const LAST_LOOK: Duration = Duration::from_millis(20);

impl RuncContainer {
    /// Whether somebody whose traffic makes the frozen container stir must wake it, or is a probe that it can answer.
    pub(super) async fn visited(&self, watch: Arc<Watch>) -> Demand {
        let wake = Demand::Wake(WakeCause::Traffic);
        let Some(sources) = self.options.answered_probes() else { return wake };
        let Ok(pids) = self.processes() else { return wake };
        let begun = blocking(move || {
            let listeners = watch.listeners().filter(|listeners| !listeners.is_empty());
            listeners.map_or(Ok(None), |listeners| Visit::begin(&pids, &listeners, &sources))
        });
        match begun.await {
            Ok(Ok(Some(visit))) => {
                self.lock().frozen.visit = Some(visit);
                Demand::Probe
            }
            Ok(Ok(None)) => wake,
            Ok(Err(error)) => {
                warn!(id = %self.id, %error, "cannot tell who waits for the agent: it wakes");
                wake
            }
            Err(_) => wake,
        }
    }

    /// Lets it run, but for its input, which waits as in its sleep.
    pub(super) async fn let_answer(&self) -> Result<(), RuntimeError> {
        self.cgroup.thaw().await.map_err(failed)?;
        self.end_watch();
        Ok(())
    }

    /// Waits until the probes are over, or something else has come.
    pub(super) async fn answered(&self) -> bool {
        let mut pause = FIRST_LOOK;
        loop {
            match self.look_at_visit().await {
                Ok(Progress::Over) => return true,
                Ok(Progress::Disturbed) => return false,
                Ok(Progress::Under) => {}
                Err(error) => {
                    debug!(id = %self.id, %error, "cannot tell whether a probe is over");
                    return false;
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LAST_LOOK);
        }
    }

    /// Freezes and watches it again. What came before the freeze is noticed by this look, what comes after it by the watch.
    pub(super) async fn sleep_on(&self) -> Result<(), RuntimeError> {
        self.stop().await?;
        self.begin_watch().await?;
        match self.look_at_visit().await? {
            Progress::Over => {
                self.lock().frozen.visit = None;
                Ok(())
            }
            Progress::Under => Err(RuntimeError::Busy("another probe has come".to_owned())),
            Progress::Disturbed => Err(failed("something else has come beside the probe")),
        }
    }

    async fn look_at_visit(&self) -> Result<Progress, RuntimeError> {
        let visit = self.lock().frozen.visit.take();
        let mut visit = visit.ok_or_else(|| failed("there is no probe"))?;
        let (visit, progress) = blocking(move || {
            let progress = visit.look();
            (visit, progress)
        })
        .await?;
        self.lock().frozen.visit = Some(visit);
        progress.map_err(failed)
    }
}
