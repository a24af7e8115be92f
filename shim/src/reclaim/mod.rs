//! Pushing memory out, in steps, so that a wake never waits for it: a frozen agent's to swap, and what an emptied cgroup is
//! still charged with.

mod emptied;
mod pageout;
mod swap;

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::process::Pid;
use tracing::debug;

pub use self::{
    emptied::Emptied,
    pageout::prefetch,
    swap::{Nowhere, destination},
};
use crate::{
    runtime::{ReclaimReport, Veto},
    stats,
};

/// What is pushed out at once: the longest that a wake may find a step under way is what this takes.
const STEP: u64 = 16 << 20;
/// How often in a row the kernel may find nothing more to push out.
const PATIENCE: u32 = 3;
/// The file that reclaims from a cgroup; there where the node has a memory controller and Linux 5.19 or newer.
const RECLAIM: &str = "memory.reclaim";

/// Why memory could not be pushed out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing to push it out to.
    #[error(transparent)]
    Nowhere(#[from] Nowhere),
    /// Something needs the agent awake.
    #[error("given up, because something needs the agent awake")]
    Vetoed,
    /// The kernel took nothing.
    #[error("the kernel pushed nothing out of {held} bytes ({by}): its swap may be full or too slow")]
    Nothing {
        /// Memory held.
        held: u64,
        /// The means.
        by: &'static str,
    },
    /// A file of the cgroup cannot be written.
    #[error("cannot reclaim through {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A process's memory cannot be advised about.
    #[error("cannot advise the kernel about the memory of process {process}: {source}")]
    Process {
        /// The process.
        process: Pid,
        /// Why.
        source: io::Error,
    },
}

/// When to stop.
pub struct Limit<'a> {
    veto: &'a Veto,
    until: Instant,
}

impl<'a> Limit<'a> {
    /// No longer than `time`, and not after `veto` was raised.
    pub fn new(veto: &'a Veto, time: Duration) -> Self {
        Self { veto, until: Instant::now() + time }
    }

    /// Whether another step may be taken.
    ///
    /// # Errors
    /// [`Error::Vetoed`].
    fn goes_on(&self) -> Result<bool, Error> {
        if self.veto.is_raised() { Err(Error::Vetoed) } else { Ok(Instant::now() < self.until) }
    }
}

/// Pushes out the memory of the processes in a cgroup. Blocks; a step takes some ten milliseconds.
///
/// # Errors
/// [`Error`]. What has been pushed out until then stays out.
pub fn reclaim(cgroup: &Path, processes: &[Pid], limit: &Limit) -> Result<ReclaimReport, Error> {
    destination(cgroup, Path::new(swap::SWAPS))?;
    let before = stats::memory_used(cgroup).0;
    let file = cgroup.join(RECLAIM);
    let engine = if file.exists() {
        by_cgroup(&file, || stats::memory_used(cgroup).0, limit)?;
        RECLAIM
    } else {
        pageout::all(processes, limit)?;
        pageout::ENGINE
    };
    let after = stats::memory_used(cgroup).0;
    debug!(before, after, engine, "reclaimed");
    if after >= before && before > STEP {
        return Err(Error::Nothing { held: before, by: engine });
    }
    let rest_because = destination(cgroup, Path::new(swap::SWAPS)).err().map(|rest| rest.to_string());
    Ok(ReclaimReport { before, after, engine, rest_because })
}

/// Writes one step after the other to `memory.reclaim` until the kernel finds nothing more.
fn by_cgroup(file: &Path, held: impl Fn() -> u64, limit: &Limit) -> Result<(), Error> {
    let mut fruitless = 0;
    let mut last = held();
    while fruitless < PATIENCE && last > 0 && limit.goes_on()? {
        match fs::write(file, last.min(STEP).to_string()) {
            Ok(()) => fruitless = 0,
            // EAGAIN: less than asked for was found, perhaps nothing.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                fruitless = if held() < last { 0 } else { fruitless + 1 };
            }
            Err(source) => return Err(Error::Io { path: file.to_owned(), source }),
        }
        last = held();
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn steps(held: &Cell<u64>, freed: u64, veto: &Veto, time: Duration) -> (Result<(), Error>, u32) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let asked = Cell::new(0);
        let taken = || {
            asked.set(asked.get() + 1);
            if asked.get() > 1 {
                held.set(held.get().saturating_sub(freed));
            }
            held.get()
        };
        let outcome = by_cgroup(file.path(), taken, &Limit::new(veto, time));
        (outcome, asked.get())
    }

    #[test]
    fn it_goes_on_step_by_step_until_nothing_is_left() {
        let held = Cell::new(10 * STEP);
        let (outcome, asked) = steps(&held, STEP, &Veto::default(), Duration::from_mins(1));
        outcome.unwrap();
        assert_eq!((held.get(), asked), (0, 11));
    }

    #[test]
    fn it_stops_in_time_and_at_a_veto() {
        let held = Cell::new(10 * STEP);
        let (outcome, asked) = steps(&held, STEP, &Veto::default(), Duration::ZERO);
        outcome.unwrap();
        assert_eq!((held.get(), asked), (10 * STEP, 1));
        let veto = Veto::default();
        veto.raise();
        let (outcome, _) = steps(&held, STEP, &veto, Duration::from_mins(1));
        assert!(matches!(outcome, Err(Error::Vetoed)), "{outcome:?}");
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let missing = Path::new("/nonexistent/memory.reclaim");
        let limit = Veto::default();
        let error = by_cgroup(missing, || STEP, &Limit::new(&limit, Duration::from_mins(1))).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/memory.reclaim"), "{error}");
    }
}
