//! What can go wrong with a node.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::cache::CacheError;
use crate::host::Missing;
use crate::images::ImageError;
use crate::rootfs::RootfsError;

/// Why a node did not start or did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The cache folder can't be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// There is no root file system.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// An image could not be made.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The machine lacks something.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Missing(Vec<Missing>),
    /// The harness's own binary is not built.
    #[error("{0} is not there: run cargo build -p agentcube-tests --bin node, or set AGENTCUBE_NODE_BIN")]
    NoSupervisor(PathBuf),
    /// The shim is not built.
    #[error(
        "this node has no shim {0}: run cargo build -p containerd-shim-agentcube-v1 with the same profile, or set AGENTCUBE_SHIM"
    )]
    NoShim(PathBuf),
    /// The supervisor or the node's first process gave up.
    #[error("the node did not start: {0}")]
    Start(String),
    /// containerd did not answer.
    #[error("containerd did not answer within {after:?}; the end of its log:\n{log}")]
    Containerd {
        /// How long it was waited for.
        after: Duration,
        /// The last lines of its log.
        log: String,
    },
    /// No such node, or none at all.
    #[error("no node {0} is running: start one with cargo run -p agentcube-tests --bin node -- up")]
    Unknown(String),
    /// A file or system call failed.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A command failed.
    #[error("{command} on the node ended with status {status}\nstdout: {stdout}\nstderr: {stderr}")]
    Command {
        /// The command line.
        command: String,
        /// Its exit status; 128 and more tell of a signal.
        status: i32,
        /// What it printed.
        stdout: String,
        /// What it complained about.
        stderr: String,
    },
    /// Something did not happen in time.
    #[error("gave up after {after:?} waiting for {what}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        after: Duration,
    },
    /// An answer made no sense.
    #[error("{what}: {answer:?}")]
    Answer {
        /// Whose answer it is, and to what.
        what: String,
        /// The answer.
        answer: String,
    },
}

/// Results of nodes.
pub type Result<T> = std::result::Result<T, NodeError>;

/// Names what was being done when a system call failed.
pub(crate) trait Doing<T> {
    /// Turns the error into one that says `doing`.
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| NodeError::Io { doing: doing(), source: source.into() })
    }
}
