//! What can go wrong between a kubelet and its runtime.

use std::io;
use std::time::Duration;

use super::grpc::Code;
use crate::node::NodeError;

/// Why the runtime did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum KubeletError {
    /// The node itself failed.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The runtime answered with an error.
    #[error("{call}: the runtime answered {code:?}: {message}")]
    Status {
        /// The method.
        call: String,
        /// The code of gRPC.
        code: Code,
        /// What the runtime said.
        message: String,
    },
    /// The connection broke, or what came over it is not gRPC.
    #[error("{call}: {reason}; does containerd run, and is its CRI plugin on?")]
    Transport {
        /// The method.
        call: String,
        /// What happened.
        reason: String,
    },
    /// There was no answer in time.
    #[error("{call}: no answer within {after:?}")]
    Timeout {
        /// The method.
        call: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// A stream of exec, attach or port-forward failed.
    #[error("{doing}: {reason}")]
    Stream {
        /// What was streamed.
        doing: String,
        /// What happened.
        reason: String,
    },
    /// A line of a container's log is not in the format of the CRI.
    #[error("this is no line of a container's log: {0:?}")]
    Log(String),
    /// A pod did not become what it was to be.
    #[error("pod {pod}: {reason}")]
    Pod {
        /// Its name.
        pod: String,
        /// What is wrong.
        reason: String,
    },
}

impl KubeletError {
    pub(super) fn transport(call: &str, reason: &impl ToString) -> Self {
        Self::Transport { call: call.to_owned(), reason: reason.to_string() }
    }

    pub(super) fn stream(doing: &str, reason: &impl ToString) -> Self {
        Self::Stream { doing: doing.to_owned(), reason: reason.to_string() }
    }

    /// The code that the runtime answered with, if it did answer.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Status { code, .. } => Some(*code),
            _ => None,
        }
    }
}

/// A result of this module.
pub type Result<T> = std::result::Result<T, KubeletError>;

/// Gives a failed system call its place.
pub(super) trait Doing<T> {
    fn doing(self, what: &str) -> Result<T>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, what: &str) -> Result<T> {
        self.map_err(|error| KubeletError::stream(what, &error))
    }
}
