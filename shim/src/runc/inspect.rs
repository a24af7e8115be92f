//! Whether a container can be checkpointed, looked at before it is tried.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use criu_hooks::{
    container::Container,
    criu::log::Cause,
    descriptors::{self, Listing},
    engine::DumpError,
    inspect::{self, Blocker, Inspection},
};
use rustix::process::Pid;

use super::{RuncContainer, blocking, precondition};
use crate::{
    lifecycle::Depth,
    runtime::{Reason, Reasons, RuntimeError},
};

/// How long CRIU is not tried after it could not dump a container.
const FIRST_PAUSE: Duration = Duration::from_mins(1);
/// How long at most, when it fails again and again.
const LONGEST_PAUSE: Duration = Duration::from_mins(16);

/// CRIU could not dump a container. As long as the container is what it was, it is not tried again for a while.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rebuff {
    fingerprint: u64,
    reason: String,
    at: Instant,
    pause: Duration,
}

impl Rebuff {
    /// Takes note of a failure; `before` is the one before it.
    pub(super) fn after(before: Option<&Self>, fingerprint: u64, reason: String, now: Instant) -> Self {
        let again = before.filter(|before| before.fingerprint == fingerprint);
        let pause = again.map_or(FIRST_PAUSE, |before| (before.pause * 2).min(LONGEST_PAUSE));
        Self { fingerprint, reason, at: now, pause }
    }

    /// Why a container with this fingerprint is not worth a try, if it is not.
    pub(super) fn stands(&self, fingerprint: u64, now: Instant) -> Option<String> {
        let passed = now.saturating_duration_since(self.at);
        let rest = self.pause.checked_sub(passed)?;
        (fingerprint == self.fingerprint).then(|| {
            format!(
                "{} (found {} s ago; tried again in {} s, or when its processes or open files change)",
                self.reason,
                passed.as_secs(),
                rest.as_secs() + 1
            )
        })
    }
}

/// Whether a failed dump is the fault of what the container does, and will fail again.
pub(super) fn is_lasting(error: &DumpError) -> bool {
    let DumpError::Criu(failure) = error else { return false };
    failure.reason.as_ref().is_some_and(|reason| {
        matches!(
            reason.cause,
            Cause::IoUring
                | Cause::FileWatch
                | Cause::ExternalUnixSocket
                | Cause::ForeignFile
                | Cause::ForeignMount
                | Cause::GhostTooLarge
                | Cause::MissingCapability
                | Cause::UnsupportedFile
                | Cause::UnsupportedNamespace
        )
    })
}

impl RuncContainer {
    /// What these processes of it have open.
    pub(super) async fn open_files(&self, pids: Vec<Pid>) -> Result<Arc<Listing>, RuntimeError> {
        let listed = blocking(move || descriptors::of_all(&pids)).await?;
        Ok(Arc::new(listed.map_err(precondition)?))
    }

    /// Looks at the live container, awake or frozen.
    pub(super) async fn inspection(
        &self,
        container: &Container,
        init: Pid,
        open: Arc<Listing>,
    ) -> Result<Inspection, RuntimeError> {
        let (container, policy) = (container.clone(), self.options.connection_policy());
        let looked = blocking(move || inspect::inspect(&container, init, &open, policy)).await?;
        let mut seen = looked.map_err(precondition)?;
        if self.cgroup.is_frozen().unwrap_or(false) {
            let now = Instant::now();
            let waits = self.timed_waits().into_iter().map(|wait| wait.until.saturating_duration_since(now));
            seen.next_timer = seen.next_timer.into_iter().chain(waits).min();
        }
        let too_near = self.options.timer_policy().too_near(seen.next_timer);
        seen.blockers.extend(too_near.map(|left| Blocker::Timer { left }));
        Ok(seen)
    }

    /// Refuses a dump for what a look has shown.
    pub(super) fn admit(&self, seen: &Inspection) -> Result<(), RuntimeError> {
        let mut reasons: Vec<String> = seen.blockers.iter().map(ToString::to_string).collect();
        reasons.extend(self.rebuffed(seen));
        if reasons.is_empty() {
            return Ok(());
        }
        Err(precondition(format!("it cannot be checkpointed now: {}", reasons.join("; "))))
    }

    /// Why it is not worth a try, if CRIU could not dump it as it is.
    fn rebuffed(&self, seen: &Inspection) -> Option<String> {
        self.lock().rebuff.as_ref()?.stands(seen.fingerprint, Instant::now())
    }

    /// Takes note of a dump that CRIU could not make, and of one that it could.
    pub(super) fn learn(&self, seen: &Inspection, failure: Option<&DumpError>) {
        let mut inner = self.lock();
        inner.rebuff = failure.filter(|error| is_lasting(error)).map(|error| {
            Rebuff::after(inner.rebuff.as_ref(), seen.fingerprint, error.to_string(), Instant::now())
        });
    }

    /// What keeps the live container from being checkpointed.
    pub(super) async fn explain(&self) -> Result<Reasons, RuntimeError> {
        let container = self.for_engine()?;
        let init = self.lock().init.raw().ok_or_else(|| precondition("it has no processes"))?;
        let open = self.open_files(self.processes()?).await?;
        let seen = self.inspection(&container, init, open).await?;
        let mut reasons: Vec<Reason> = seen
            .blockers
            .iter()
            .map(|blocker| Reason { kind: blocker.kind().to_owned(), text: blocker.to_string() })
            .collect();
        reasons.extend(self.rebuffed(&seen).map(|text| Reason { kind: "criu".to_owned(), text }));
        let deepest = if reasons.is_empty() { Depth::Checkpointed } else { Depth::Frozen };
        let Inspection { doubts, closing, next_timer, .. } = seen;
        Ok(Reasons { deepest, reasons, doubts, closing: closing.len(), next_timer })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_left_alone_for_a_while_unless_the_container_changes() {
        let now = Instant::now();
        let rebuff = Rebuff::after(None, 7, "a process watches files".to_owned(), now);
        let later = now + Duration::from_secs(50);
        let reason = rebuff.stands(7, later).unwrap_or_default();
        assert!(reason.contains("watches files") && reason.contains("50 s ago"), "{reason}");
        assert_eq!(rebuff.stands(8, later), None);
        assert_eq!(rebuff.stands(7, now + Duration::from_secs(61)), None);
    }

    #[test]
    fn what_fails_again_is_left_alone_for_longer_up_to_a_limit() {
        let now = Instant::now();
        let mut rebuff = Rebuff::after(None, 7, String::new(), now);
        let mut pauses = Vec::new();
        for _ in 0..6 {
            pauses.push(rebuff.pause.as_secs() / 60);
            rebuff = Rebuff::after(Some(&rebuff), 7, String::new(), now);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 16]);
        assert_eq!(Rebuff::after(Some(&rebuff), 8, String::new(), now).pause, FIRST_PAUSE);
    }
}
