//! Sleep with the processes in place: the freezer, the readiness watch around it, and reclaim below it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use criu_hooks::waits::TimedWait;
use rustix::process::Pid;
use tracing::warn;

use super::{FREEZE, RuncContainer, blocking, failed, precondition};
use crate::{
    reclaim::{self, Limit},
    runtime::{ReclaimReport, RuntimeError, Veto},
    traffic::Visit,
    wake::{Demand, WakeCause},
    watch::{self, Before, Examined, Interrupted, Watch},
};

/// What is known of a container in the freezer.
#[derive(Default)]
pub(super) struct Frozen {
    /// What it waits for, as long as that is not watched.
    examined: Option<Result<Examined, watch::Error>>,
    interrupted: Interrupted,
    watch: Option<Arc<Watch>>,
    /// Probes that it answers.
    pub(super) visit: Option<Visit>,
    /// Its memory has been pushed out, as far as it went.
    reclaimed: bool,
}

impl RuncContainer {
    pub(super) fn processes(&self) -> Result<Vec<Pid>, RuntimeError> {
        self.cgroup.procs().map_err(failed)
    }

    /// Freezes it, and finds out what it waits for. One that stands still since the last call is left as it is.
    pub(super) async fn stop(&self) -> Result<(), RuntimeError> {
        if self.lock().frozen.examined.is_some() && self.cgroup.is_frozen().map_err(failed)? {
            return Ok(());
        }
        let before = self.look().await?;
        self.cgroup.freeze(FREEZE).await.map_err(failed)?;
        self.io.set_asleep(true);
        let examined = self.examine(before).await?;
        self.lock().frozen.examined = Some(examined);
        Ok(())
    }

    /// Looks at it before a freeze.
    pub(super) async fn look(&self) -> Result<Before, RuntimeError> {
        let processes = self.processes()?;
        blocking(move || watch::look(&processes)).await
    }

    /// Finds out what it waits for, and what a freeze has interrupted that was now, or ended just now.
    pub(super) async fn examine(
        &self,
        before: Before,
    ) -> Result<Result<Examined, watch::Error>, RuntimeError> {
        let frozen = Instant::now();
        let processes = self.processes()?;
        let mut interrupted = std::mem::take(&mut self.lock().frozen.interrupted);
        let (examined, interrupted) = blocking(move || {
            let examined = watch::examine(&processes, &before, frozen, &mut interrupted);
            (examined, interrupted)
        })
        .await?;
        self.lock().frozen.interrupted = interrupted;
        Ok(examined)
    }

    /// The waits of the frozen container that end by themselves.
    pub(super) fn timed_waits(&self) -> Vec<TimedWait> {
        self.lock().frozen.interrupted.timed()
    }

    /// Takes duplicates of what the frozen container waits for.
    pub(super) async fn begin_watch(&self) -> Result<(), RuntimeError> {
        let examined = self.lock().frozen.examined.take();
        let examined = examined.ok_or_else(|| failed("it was frozen by something else"))?;
        let prepared = match examined {
            Ok(examined) => blocking(move || watch::watch(examined)).await?,
            Err(error) => Err(error),
        };
        let prepared = prepared.map_err(|error| match error {
            watch::Error::Busy(_) => RuntimeError::Busy(error.to_string()),
            other => precondition(other),
        })?;
        let watch = Watch::begin(prepared).map_err(failed)?;
        self.lock().frozen.watch = Some(Arc::new(watch));
        Ok(())
    }

    pub(super) fn end_watch(&self) {
        self.lock().frozen.watch = None;
    }

    /// Completes when the frozen container would have run.
    pub(super) async fn stirred(&self) -> Demand {
        let watch = self.lock().frozen.watch.clone();
        let Some(watch) = watch else { return std::future::pending().await };
        match watch.demand().await {
            WakeCause::Traffic => self.visited(watch).await,
            cause => Demand::Wake(cause),
        }
    }

    /// Thaws it. The duplicates go after that: until they do, a connection that it closes stays open.
    pub(super) async fn go_on(&self) -> Result<(), RuntimeError> {
        if let Err(error) = self.cgroup.thaw().await {
            // One that could not fall asleep counts as awake, and runs as soon as what keeps it from that lets it.
            if self.lock().frozen.watch.is_none() {
                self.io.set_asleep(false);
            }
            return Err(failed(error));
        }
        self.end_watch();
        self.io.set_asleep(false);
        let reclaimed = {
            let frozen = &mut self.lock().frozen;
            (frozen.visit, frozen.examined) = (None, None);
            std::mem::take(&mut frozen.reclaimed)
        };
        if reclaimed && self.options.prefetch_on_wake {
            self.prefetch();
        }
        Ok(())
    }

    /// Pushes out its memory, when all of it is there. A wake need not wait for either.
    pub(super) async fn push_out(&self, veto: Veto) -> Result<ReclaimReport, RuntimeError> {
        self.complete_fill().await?;
        let processes = self.processes()?;
        let cgroup = self.cgroup.path().to_owned();
        let time = Duration::from_secs(self.options.reclaim_timeout.into());
        self.lock().frozen.reclaimed = true;
        let reclaimed =
            blocking(move || reclaim::reclaim(&cgroup, &processes, &Limit::new(&veto, time))).await?;
        reclaimed.map_err(|error| match error {
            reclaim::Error::Vetoed => RuntimeError::Vetoed,
            reclaim::Error::Nowhere(_) => precondition(error),
            other => failed(other),
        })
    }

    fn prefetch(&self) {
        let (id, processes) = (self.id.clone(), self.processes().unwrap_or_default());
        tokio::task::spawn_blocking(move || {
            if let Err(error) = reclaim::prefetch(&processes) {
                warn!(%id, %error, "its memory is read back when it is touched");
            }
        });
    }
}
