//! Lazy restore: the agent runs at once, and its memory comes after it.
//!
//! CRIU leaves the pages out that may come later and registers their memory with a userfaultfd for each process. A
//! **pager**, a process of its own, serves the faults and fills in the rest meanwhile. When all pages are in place it
//! ends: an agent that is awake and resident has none.
//!
//! **Who holds what.** The kernel ends the registration when the last descriptor of a userfaultfd is closed, and from
//! then on a page that was never put in place reads as zeros. So every userfaultfd has two holders: the pager, and the
//! [`Fill`] in the shim. A pager that dies is replaced by another, which knows from the journal (see `journal.rs`) what
//! has become of each page. Where that is not known for sure, or pagers die again and again, the container is killed
//! first and the userfaultfds are closed after. When the shim dies the pager finishes alone. Its image must stay
//! until the fill is complete.
//!
//! ```text
//! CRIU ──lazy-pages.socket──▶ shim (holder) ──socket──▶ pager ──UFFDIO_COPY──▶ agent
//!        (pid, userfaultfd)     keeps a duplicate        reads pages-N.img
//! ```

mod choice;
mod criu_socket;
mod holder;
mod journal;
mod server;
mod source;
mod space;
mod task;
mod uffd;
mod wire;
mod working_set;

use std::{ffi::OsString, path::PathBuf, time::Duration};

use tokio::sync::{mpsc, watch};

pub use choice::Eager;
pub(crate) use choice::consider;
pub(crate) use holder::{Place, start};
pub use server::run;
pub(crate) use working_set::WorkingSet;

/// Below this many bytes of lazy memory an eager restore is about as fast, and compares all pages before anything runs.
pub const LEAST_BYTES: u64 = 32 << 20;
/// The most that is recorded of a working set, in bytes.
pub const WORKING_SET_BYTES: u64 = 64 << 20;

/// How lazy restores are made.
#[derive(Debug, Clone)]
pub struct LazyOptions {
    /// The program that calls [`run`] with its standard input.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// With fewer bytes of lazy memory than this the restore is eager.
    pub least_bytes: u64,
    /// How long after a wake faults are recorded.
    pub window: Duration,
    /// The most that is recorded, in bytes; 0 to record nothing.
    pub working_set_bytes: u64,
}

impl LazyOptions {
    /// The defaults, with a program that runs the pager.
    pub fn new(
        program: impl Into<PathBuf>,
        args: impl IntoIterator<Item = impl Into<OsString>>,
    ) -> LazyOptions {
        LazyOptions {
            program: program.into(),
            args: args.into_iter().map(Into::into).collect(),
            least_bytes: LEAST_BYTES,
            window: Duration::from_secs(2),
            working_set_bytes: WORKING_SET_BYTES,
        }
    }
}

/// What a fill came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FillReport {
    /// Bytes that were put in place.
    pub bytes: u64,
    /// Of these, zeros that take no memory until they are written.
    pub zero_bytes: u64,
    /// Bytes that nobody can read, as a child's memory has holes where its parent asked for them.
    pub absent_bytes: u64,
    /// Faults that were served.
    pub faults: u64,
    /// From the wake to the first fault.
    pub first_fault: Option<Duration>,
    /// Bytes that were put in place because an earlier wake had needed them.
    pub prefetched_bytes: u64,
    /// Bytes that are recorded for the next wake.
    pub working_set_bytes: u64,
    /// From the wake until every page was in place.
    pub resident: Duration,
    /// How many pagers have died.
    pub deaths: u32,
}

/// Why a fill failed. The container was killed: its memory would have been wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FillError {
    /// The pager went no further.
    #[error("the container was killed because its memory could not be filled: {0}")]
    Failed(String),
    /// Pagers die.
    #[error("the container was killed because its pagers died {deaths} times before its memory was filled")]
    Died {
        /// How often.
        deaths: u32,
    },
    /// The restore that it belonged to failed.
    #[error("the restore that the fill belonged to failed")]
    Abandoned,
}

/// The result, once there is one.
type Outcome = Option<Result<FillReport, FillError>>;

/// What the holder is told.
#[derive(Debug, Clone, Copy)]
enum Command {
    Hurry,
    Abandon,
}

/// Memory that is being filled.
///
/// It goes on in the background, and kills the container when it fails, whether or not anybody waits for it here: this
/// may be dropped. But it needs the runtime that the restore was made on: when that ends, the pager finishes alone.
#[derive(Debug, Clone)]
pub struct Fill {
    outcome: watch::Receiver<Outcome>,
    commands: mpsc::UnboundedSender<Command>,
}

impl Fill {
    /// Has it filled as fast as possible, though faults may then take longer: somebody waits for the end.
    pub fn hurry(&self) {
        let _ = self.commands.send(Command::Hurry);
    }

    /// Waits for the end. May be dropped and called again, and gives the same then.
    ///
    /// # Errors
    /// [`FillError`].
    pub async fn complete(&mut self) -> Result<FillReport, FillError> {
        match self.outcome.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Err(FillError::Abandoned)),
            Err(_) => Err(FillError::Abandoned),
        }
    }

    /// Whether it has ended, well or not.
    pub fn is_complete(&self) -> bool {
        self.outcome.borrow().is_some()
    }

    /// Ends it, once nothing is left of the container; why it had failed before, if it had.
    pub(crate) async fn abandon(mut self) -> Option<FillError> {
        let _ = self.commands.send(Command::Abandon);
        self.complete().await.err().filter(|error| *error != FillError::Abandoned)
    }
}
