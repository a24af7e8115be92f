//! Tells of kills for want of memory: the counter `oom_kill` of the cgroup's `memory.events`, which counts processes of
//! the container and of cgroups below it, whichever limit it was.
//!
//! It lives as long as the cgroup, so sleeps and wakes are nothing to it, but for one thing: a restore that fails for
//! want of memory has lost no process of the agent's.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
};

use criu_hooks::cgroup::oom_kills;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{Mutex, OwnedMutexGuard},
    task::AbortHandle,
};
use tracing::debug;

/// Watches one cgroup until it is dropped.
pub struct OomWatch {
    kills: Arc<Mutex<Kills>>,
    watching: AbortHandle,
}

/// How far the kills have been told.
struct Kills {
    events: File,
    told: u64,
    tell: Box<dyn Fn() + Send>,
}

/// A restore under way: kills are told when it is over, unless they were its own.
pub struct Restoring(Option<OwnedMutexGuard<Kills>>);

impl OomWatch {
    /// Watches the cgroup `dir`, and calls `tell` each time that there have been kills: once for those that the kernel
    /// made at the same time. None where there is no memory controller.
    ///
    /// # Errors
    /// When `memory.events` is there but cannot be watched.
    pub fn new(dir: &Path, tell: impl Fn() + Send + 'static) -> io::Result<Option<Self>> {
        let mut events = match File::open(dir.join("memory.events")) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let told = count(&mut events)?;
        // The kernel signals a change of such a file as an exceptional condition (POLLPRI), to each opener for itself.
        let signals = OwnedFd::from(File::open(dir.join("memory.events"))?);
        // SAFETY: an `OwnedFd` never changes its descriptor, and keeps it open for as long as it is registered.
        let signals = unsafe { AsyncFd::register_with_interest(signals, Interest::PRIORITY)? };
        let kills = Arc::new(Mutex::new(Kills { events, told, tell: Box::new(tell) }));
        let watching = tokio::spawn(watch(signals, kills.clone())).abort_handle();
        Ok(Some(Self { kills, watching }))
    }

    /// Tells of kills that have not been told yet. The kernel counts a kill before it sends it, but signals it up to 10 ms
    /// later: after this no exit can overtake the kill that was its cause.
    pub async fn look(&self) {
        if let Err(error) = self.kills.lock().await.look() {
            debug!(%error, "the cgroup is gone");
        }
    }

    /// Tells nothing until the restore is over.
    pub async fn restoring(&self) -> Restoring {
        Restoring(Some(self.kills.clone().lock_owned().await))
    }
}

impl Drop for OomWatch {
    fn drop(&mut self) {
        self.watching.abort();
    }
}

impl Restoring {
    /// The restore has failed: nothing that was killed had been the agent.
    pub fn failed(mut self) {
        if let Some(kills) = &mut self.0
            && let Ok(count) = count(&mut kills.events)
        {
            kills.told = count;
        }
    }
}

impl Drop for Restoring {
    fn drop(&mut self) {
        if let Some(mut kills) = self.0.take() {
            let _ = kills.look();
        }
    }
}

impl Kills {
    fn look(&mut self) -> io::Result<()> {
        let count = count(&mut self.events)?;
        if count > self.told {
            self.told = count;
            (self.tell)();
        }
        Ok(())
    }
}

async fn watch(signals: AsyncFd<OwnedFd>, kills: Arc<Mutex<Kills>>) -> io::Result<()> {
    // An error is the end of the cgroup.
    loop {
        let mut ready = signals.ready(Interest::PRIORITY).await?;
        ready.clear_ready();
        // Reading is what makes the kernel signal the next change to this opener.
        let mut text = [0; 512];
        rustix::io::pread(signals.get_ref(), &mut text, 0)?;
        kills.lock().await.look()?;
    }
}

fn count(events: &mut File) -> io::Result<u64> {
    let mut text = String::new();
    events.seek(SeekFrom::Start(0))?;
    events.read_to_string(&mut text)?;
    Ok(oom_kills(&text))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        fs,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    /// A directory that stands in for a cgroup, its kills, and how often they were told.
    struct Fake {
        dir: tempfile::TempDir,
        kills: Arc<Mutex<Kills>>,
        told: Arc<AtomicUsize>,
    }

    impl Fake {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("memory.events"), "oom_kill 0\n").unwrap();
            let told = Arc::new(AtomicUsize::new(0));
            let counter = told.clone();
            let kills = Kills {
                events: File::open(dir.path().join("memory.events")).unwrap(),
                told: 0,
                tell: Box::new(move || {
                    counter.fetch_add(1, Ordering::SeqCst);
                }),
            };
            Self { dir, kills: Arc::new(Mutex::new(kills)), told }
        }

        fn kill(&self, count: u64) {
            let text = format!("low 0\nhigh 5\nmax 7\noom 3\noom_kill {count}\noom_group_kill 9\n");
            fs::write(self.dir.path().join("memory.events"), text).unwrap();
        }

        async fn look(&self) -> usize {
            self.kills.lock().await.look().unwrap();
            self.told.load(Ordering::SeqCst)
        }
    }

    #[tokio::test]
    async fn each_kill_is_told_once() {
        let fake = Fake::new();
        assert_eq!(fake.look().await, 0);
        fake.kill(1);
        assert_eq!(fake.look().await, 1);
        assert_eq!(fake.look().await, 1);
        fake.kill(3);
        assert_eq!(fake.look().await, 2);
    }

    #[tokio::test]
    async fn kills_of_a_restore_that_fails_are_its_own() {
        let fake = Fake::new();
        let restoring = Restoring(Some(fake.kills.clone().lock_owned().await));
        fake.kill(1);
        restoring.failed();
        assert_eq!(fake.look().await, 0);
        fake.kill(2);
        assert_eq!(fake.look().await, 1);
    }

    #[tokio::test]
    async fn kills_after_a_restore_that_succeeds_are_the_agents() {
        let fake = Fake::new();
        let restoring = Restoring(Some(fake.kills.clone().lock_owned().await));
        fake.kill(1);
        drop(restoring);
        assert_eq!(fake.told.load(Ordering::SeqCst), 1);
        assert_eq!(fake.look().await, 1);
    }

    #[test]
    fn kills_are_told_from_other_events() {
        assert_eq!(oom_kills("low 0\nhigh 5\nmax 7\noom 3\noom_kill 2\noom_group_kill 9\n"), 2);
        assert_eq!(oom_kills(""), 0);
    }

    #[tokio::test]
    async fn a_node_without_the_controller_has_nothing_to_watch() {
        let dir = tempfile::tempdir().unwrap();
        assert!(OomWatch::new(dir.path(), || ()).unwrap().is_none());
    }

    proptest::proptest! {
        #[test]
        fn no_text_upsets_it_and_its_own_line_counts(noise in "\\PC{0,40}", kills: u64) {
            let _ = oom_kills(&noise);
            proptest::prop_assume!(!noise.starts_with("oom_kill "));
            proptest::prop_assert_eq!(oom_kills(&format!("{noise}\noom_kill {kills}\noom 7\n")), kills);
        }
    }
}
