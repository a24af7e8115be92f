//! When the memory of a woken agent is back.

use std::fs;
use std::path::Path;
use std::sync::mpsc::{Sender, TryRecvError, channel};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use agentcube_tests::memory;
use anyhow::Result;

use crate::record::RESIDENT_PATIENCE_US;

/// How often the memory is looked at.
const INTERVAL: Duration = Duration::from_millis(1);

/// How long it may take to be back.
const PATIENCE: Duration = Duration::from_micros(RESIDENT_PATIENCE_US);

/// What must be back, in hundredths of what there was.
const SHARE: u64 = 99;

/// Anonymous memory that the processes of a cgroup hold resident, in pages. Pages of files are left out: the program and
/// its libraries come back when they are used, whoever restores them.
pub fn anonymous(cgroup: &Path) -> u64 {
    let pids = memory::processes(cgroup).unwrap_or_default();
    let pages = |pid| pages(&fs::read_to_string(format!("/proc/{pid}/statm")).ok()?);
    pids.into_iter().filter_map(pages).sum()
}

/// `statm`: size, resident and shared pages come first.
fn pages(statm: &str) -> Option<u64> {
    let mut fields = statm.split_ascii_whitespace().skip(1).map(str::parse::<u64>);
    let (resident, shared) = (fields.next()?.ok()?, fields.next()?.ok()?);
    Some(resident.saturating_sub(shared))
}

/// A thread that is ready to watch. It gives up when this is dropped.
pub struct Watch<'scope> {
    go: Sender<Instant>,
    watching: ScopedJoinHandle<'scope, Option<Duration>>,
}

impl<'scope> Watch<'scope> {
    /// Prepares a thread that waits until the processes of `cgroup` hold nearly `before` pages again.
    pub fn arm<'env>(scope: &'scope thread::Scope<'scope, 'env>, cgroup: &'env Path, before: u64) -> Self {
        let (go, wait) = channel::<Instant>();
        let enough = before * SHARE / 100;
        let watching = scope.spawn(move || {
            let start = wait.recv().ok()?;
            while start.elapsed() < PATIENCE {
                if anonymous(cgroup) >= enough {
                    return Some(start.elapsed());
                }
                if wait.try_recv() == Err(TryRecvError::Disconnected) {
                    return None;
                }
                thread::sleep(INTERVAL);
            }
            None
        });
        Self { go, watching }
    }

    /// Begins to watch; times count from `start`.
    pub fn go(&self, start: Instant) {
        let _ = self.go.send(start);
    }

    /// When the memory was back; nothing when that took too long.
    pub fn back(self) -> Result<Option<Duration>> {
        // `go` must live until then.
        let Self { go: _go, watching } = self;
        watching.join().map_err(|_| anyhow::anyhow!("the watching thread panicked"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_files_do_not_count() {
        assert_eq!(pages("9000 2500 500 10 0 2000 0\n"), Some(2000));
        assert_eq!(pages("9000"), None);
    }

    #[test]
    fn a_cgroup_that_is_gone_holds_nothing() {
        assert_eq!(anonymous(Path::new("/nonexistent")), 0);
    }
}
