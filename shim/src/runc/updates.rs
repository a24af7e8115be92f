//! Limits that the OCI runtime does not know yet.
//!
//! An agent that sleeps, or is about to, takes limits through its cgroup alone. runc keeps a record of its own and
//! writes all of it back with the next update: it must learn of each change, in the order in which they were made.

use std::path::Path;

use async_trait::async_trait;
use oci_spec::runtime::LinuxResources;
use tokio::sync::{Mutex, MutexGuard};
use tracing::warn;

use crate::{
    limits::high::{self, Lifted},
    runtime::RuntimeError,
};

/// Changes limits, and keeps a record of them: runc.
#[async_trait]
pub(super) trait Recorder: Send + Sync {
    async fn update(&self, resources: &LinuxResources) -> Result<(), RuntimeError>;
    /// A change that holds could not be recorded.
    fn missed(&self, error: &RuntimeError);
}

/// Changes that runc is still to be told of. Held while limits are changed, so that changes never overtake each other.
#[derive(Debug, Default)]
pub(super) struct Updates(Mutex<Vec<LinuxResources>>);

impl Updates {
    /// Changes limits past runc with `apply`; runc is told of `resources` later.
    pub(super) async fn past_runc(
        &self,
        resources: LinuxResources,
        apply: impl Future<Output = Result<(), RuntimeError>> + Send,
    ) -> Result<(), RuntimeError> {
        let mut later = self.0.lock().await;
        apply.await?;
        later.push(resources);
        Ok(())
    }

    /// Changes limits with `runc`, after it was told what it does not know yet.
    pub(super) async fn by_runc(
        &self,
        resources: &LinuxResources,
        runc: &impl Recorder,
    ) -> Result<(), RuntimeError> {
        let mut later = self.0.lock().await;
        flush(&mut later, runc).await;
        runc.update(resources).await
    }

    /// Lifts the `memory.high` of the cgroup `dir` of container `id` for a restore. Until it is put back no limit is
    /// changed: a newer one would be overwritten.
    pub(super) async fn make_room(&self, id: &str, dir: &Path) -> Room<'_> {
        let order = self.0.lock().await;
        match high::lift(dir) {
            Ok(lifted) => Room { order: lifted.is_some().then_some(order), lifted },
            Err(error) => {
                warn!(%id, %error, "memory.high holds during a restore, which may be slow");
                Room { lifted: None, order: None }
            }
        }
    }

    /// Tells `runc` what it does not know yet. When it fails, the limits hold all the same.
    pub(super) async fn catch_up(&self, runc: &impl Recorder) {
        flush(&mut *self.0.lock().await, runc).await;
    }
}

/// What holds while `memory.high` is lifted. It is put back when this goes, before limits change again.
pub(super) struct Room<'a> {
    lifted: Option<Lifted>,
    order: Option<MutexGuard<'a, Vec<LinuxResources>>>,
}

impl Room<'_> {
    /// Puts it back: the kernel may reclaim for that, and takes its time.
    pub(super) async fn over(self) {
        let Self { lifted, order } = self;
        if let Some(lifted) = lifted {
            let _ = tokio::task::spawn_blocking(move || drop(lifted)).await;
        }
        drop(order);
    }
}

async fn flush(later: &mut Vec<LinuxResources>, runc: &impl Recorder) {
    for resources in std::mem::take(later) {
        if let Err(error) = runc.update(&resources).await {
            runc.missed(&error);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        sync::{
            Mutex,
            atomic::{AtomicUsize, Ordering},
        },
        time::Duration,
    };

    use oci_spec::runtime::LinuxMemoryBuilder;

    use super::*;

    fn limit(bytes: i64) -> LinuxResources {
        let mut resources = LinuxResources::default();
        resources.set_memory(Some(LinuxMemoryBuilder::default().limit(bytes).build().unwrap()));
        resources
    }

    fn bytes(resources: &LinuxResources) -> i64 {
        resources.memory().as_ref().and_then(oci_spec::runtime::LinuxMemory::limit).unwrap()
    }

    /// Takes its time and refuses the limit 13.
    #[derive(Default)]
    struct Slow {
        told: Mutex<Vec<i64>>,
        missed: AtomicUsize,
    }

    #[async_trait]
    impl Recorder for Slow {
        async fn update(&self, resources: &LinuxResources) -> Result<(), RuntimeError> {
            tokio::time::sleep(Duration::from_millis(1)).await;
            self.told.lock().unwrap().push(bytes(resources));
            if bytes(resources) == 13 { Err(RuntimeError::Failed("refused".into())) } else { Ok(()) }
        }

        fn missed(&self, _: &RuntimeError) {
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn a_newer_limit_is_never_followed_by_an_older_one() {
        let (updates, runc) = (Updates::default(), Slow::default());
        // Falling asleep; the dump fails; awake; asleep and awake again.
        updates.past_runc(limit(1), async { Ok(()) }).await.unwrap();
        updates.by_runc(&limit(2), &runc).await.unwrap();
        updates.catch_up(&runc).await;
        assert_eq!(*runc.told.lock().unwrap(), [1, 2]);
    }

    #[tokio::test]
    async fn changes_do_not_overtake_each_other() {
        let (updates, runc) = (Updates::default(), Slow::default());
        let slow = async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            Ok(())
        };
        let newer = limit(2);
        let (asleep, awake, ()) = tokio::join!(
            updates.past_runc(limit(1), slow),
            updates.by_runc(&newer, &runc),
            updates.catch_up(&runc),
        );
        assert!(asleep.is_ok() && awake.is_ok());
        assert_eq!(*runc.told.lock().unwrap(), [1, 2]);
    }

    #[tokio::test]
    async fn a_memory_high_that_is_set_during_a_restore_holds_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("memory.high");
        std::fs::write(&file, "4096\n").unwrap();
        let updates = Updates::default();
        let room = updates.make_room("a", dir.path()).await;
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "max");
        let newer = updates.past_runc(limit(1), async {
            assert_eq!(std::fs::read_to_string(&file).unwrap(), "4096");
            std::fs::write(&file, "8192").unwrap();
            Ok(())
        });
        let restore = async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            room.over().await;
        };
        let (updated, ()) = tokio::join!(newer, restore);
        updated.unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "8192");
    }

    #[tokio::test]
    async fn without_a_memory_high_limits_change_during_a_restore() {
        let dir = tempfile::tempdir().unwrap();
        let updates = Updates::default();
        let room = updates.make_room("a", dir.path()).await;
        updates.past_runc(limit(1), async { Ok(()) }).await.unwrap();
        room.over().await;
    }

    #[tokio::test]
    async fn a_restore_that_is_broken_off_puts_it_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("memory.high");
        std::fs::write(&file, "4096\n").unwrap();
        let updates = Updates::default();
        drop(updates.make_room("a", dir.path()).await);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "4096");
        updates.past_runc(limit(1), async { Ok(()) }).await.unwrap();
    }

    #[tokio::test]
    async fn what_does_not_hold_is_forgotten_and_what_runc_refuses_does_not_stand_in_the_way() {
        let (updates, runc) = (Updates::default(), Slow::default());
        let refused = async { Err(RuntimeError::Failed("the kernel does not take it".into())) };
        updates.past_runc(limit(1), refused).await.unwrap_err();
        updates.past_runc(limit(13), async { Ok(()) }).await.unwrap();
        updates.by_runc(&limit(2), &runc).await.unwrap();
        updates.by_runc(&limit(13), &runc).await.unwrap_err();
        assert_eq!(*runc.told.lock().unwrap(), [13, 2, 13]);
        assert_eq!(runc.missed.load(Ordering::Relaxed), 1);
    }
}
