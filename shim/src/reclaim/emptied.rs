//! What a cgroup without processes is still charged with: the page cache of files that they read, and memory that file
//! systems hold.

use std::{path::PathBuf, time::Duration};

use tracing::{debug, warn};

use super::{Limit, RECLAIM, by_cgroup};
use crate::{runtime::Veto, stats};

/// Has it given back in the background. Dropping it ends that: who is about to wake needs these files.
pub struct Emptied(Veto);

impl Emptied {
    /// Begins `after` some time: an agent that wakes sooner finds its files in memory. Takes no longer than `time`.
    pub fn start(id: String, cgroup: PathBuf, after: Duration, time: Duration) -> Self {
        let veto = Veto::default();
        let this = Self(veto.clone());
        tokio::spawn(async move {
            let file = cgroup.join(RECLAIM);
            if veto.unless_raised(tokio::time::sleep(after)).await.is_err() || !file.exists() {
                return;
            }
            let reclaimed = tokio::task::spawn_blocking(move || {
                let held = || stats::memory_used(&cgroup).0;
                let before = held();
                by_cgroup(&file, held, &Limit::new(&veto, time)).map(|()| (before, held()))
            });
            match reclaimed.await {
                Ok(Ok((before, after))) => {
                    debug!(%id, before, after, "what it was charged with is given back");
                }
                Ok(Err(super::Error::Vetoed)) | Err(_) => {}
                Ok(Err(error)) => warn!(%id, %error, "it stays charged with what its files hold in memory"),
            }
        });
        this
    }
}

impl Drop for Emptied {
    fn drop(&mut self) {
        self.0.raise();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

    const LONG: Duration = Duration::from_mins(1);

    fn cgroup() -> tempfile::TempDir {
        let cgroup = tempfile::tempdir().unwrap();
        fs::write(cgroup.path().join(RECLAIM), "").unwrap();
        fs::write(cgroup.path().join("memory.current"), "4096\n").unwrap();
        cgroup
    }

    fn start(cgroup: &tempfile::TempDir, after: Duration) -> Emptied {
        Emptied::start("a".into(), cgroup.path().to_owned(), after, Duration::from_millis(50))
    }

    fn asked(cgroup: &tempfile::TempDir) -> String {
        fs::read_to_string(cgroup.path().join(RECLAIM)).unwrap()
    }

    #[tokio::test]
    async fn it_asks_for_all_that_is_charged_once_the_time_has_come() {
        let cgroup = cgroup();
        let emptied = start(&cgroup, Duration::ZERO);
        while asked(&cgroup) != "4096" {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(emptied);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wake_before_that_time_ends_it() {
        let cgroup = cgroup();
        drop(start(&cgroup, LONG));
        tokio::time::sleep(LONG * 2).await;
        assert_eq!(asked(&cgroup), "");
    }
}
