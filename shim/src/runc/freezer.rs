//! Sleep with the processes in place: the freezer, the readiness watch around it, and reclaim below it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::process::Pid;
use tracing::warn;

use super::{FREEZE, RuncContainer, failed, precondition};
use crate::{
    reclaim::{self, Limit},
    runtime::{ReclaimReport, RuntimeError, Veto},
    wake::WakeCause,
    watch::{self, Before, Interrupted, Watch},
};

/// What is known of a container in the freezer.
#[derive(Default)]
pub(super) struct Frozen {
    /// How it was just before, and when it stood still.
    before: Option<(Before, Instant)>,
    interrupted: Interrupted,
    watch: Option<Arc<Watch>>,
    /// Its memory has been pushed out, as far as it went.
    reclaimed: bool,
}

/// Runs what blocks beside the shim's only thread.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, RuntimeError> {
    tokio::task::spawn_blocking(work).await.map_err(failed)
}

impl RuncContainer {
    fn processes(&self) -> Result<Vec<Pid>, RuntimeError> {
        self.cgroup.procs().map_err(failed)
    }

    /// Freezes it, and remembers what the watch must know.
    pub(super) async fn stop(&self) -> Result<(), RuntimeError> {
        // To look at memory that has not come yet is to wait for it, which a client that pauses need not.
        let before = if self.fill_is_complete() {
            let processes = self.processes()?;
            Some(blocking(move || watch::look(&processes)).await?)
        } else {
            None
        };
        self.cgroup.freeze(FREEZE).await.map_err(failed)?;
        self.io.set_asleep(true);
        self.lock().frozen.before = before.map(|before| (before, Instant::now()));
        Ok(())
    }

    /// Takes duplicates of what the frozen container waits for.
    pub(super) async fn begin_watch(&self) -> Result<(), RuntimeError> {
        let processes = self.processes()?;
        let (before, mut interrupted) = {
            let mut inner = self.lock();
            (inner.frozen.before.take(), std::mem::take(&mut inner.frozen.interrupted))
        };
        let (before, frozen) = before.ok_or_else(|| {
            RuntimeError::Busy("the memory of its last wake is still on its way".to_owned())
        })?;
        let (prepared, interrupted) = blocking(move || {
            let prepared = watch::watch(&processes, &before, frozen, &mut interrupted);
            (prepared, interrupted)
        })
        .await?;
        self.lock().frozen.interrupted = interrupted;
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
    pub(super) async fn stirred(&self) -> WakeCause {
        let watch = self.lock().frozen.watch.clone();
        match watch {
            Some(watch) => watch.demand().await,
            None => std::future::pending().await,
        }
    }

    /// Thaws it. The duplicates go after that: until they do, a connection that it closes stays open.
    pub(super) async fn go_on(&self) -> Result<(), RuntimeError> {
        self.cgroup.thaw().await.map_err(failed)?;
        self.end_watch();
        self.io.set_asleep(false);
        let reclaimed = std::mem::take(&mut self.lock().frozen.reclaimed);
        if reclaimed && self.options.prefetch_on_wake {
            self.prefetch();
        }
        Ok(())
    }

    /// Pushes out its memory.
    pub(super) async fn push_out(&self, veto: Veto) -> Result<ReclaimReport, RuntimeError> {
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
