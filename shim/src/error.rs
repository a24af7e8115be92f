//! Errors of the Task API and of the control service, and their codes on the wire.

use containerd_shim::protos::ttrpc::{self, Code};

use crate::{lifecycle::Refusal, runtime::RuntimeError};

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// No such container here.
    #[error("container {0} is not known to this shim")]
    NoContainer(String),
    /// The container exists already.
    #[error("container {0} exists already in this shim")]
    ContainerExists(String),
    /// No such exec.
    #[error("container {id} has no exec {exec_id}")]
    NoExec {
        /// The container.
        id: String,
        /// The exec.
        exec_id: String,
    },
    /// The exec exists already.
    #[error("container {id} has an exec {exec_id} already")]
    ExecExists {
        /// The container.
        id: String,
        /// The exec.
        exec_id: String,
    },
    /// The process has ended. containerd and CRI take the words "process already finished" for a success of a kill.
    #[error("process already finished")]
    Finished,
    /// The process has not ended.
    #[error("container {0} still runs: kill it before it is deleted")]
    StillRuns(String),
    /// The life-cycle does not allow it now.
    #[error("container {id}: {refusal}")]
    Refused {
        /// The container.
        id: String,
        /// Why.
        refusal: Refusal,
    },
    /// The request is malformed.
    #[error("{0}")]
    Invalid(String),
    /// This shim does not offer it.
    #[error("{0}")]
    Unsupported(String),
    /// The runtime failed.
    #[error("container {id}: {what}: {source}")]
    Runtime {
        /// The container.
        id: String,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: RuntimeError,
    },
    /// What the request waited for failed: a wake, mostly.
    #[error("{0}")]
    Dependency(String),
    /// The container went away while the request waited.
    #[error("container {0} was deleted while the request waited")]
    Gone(String),
}

impl TaskError {
    /// The code on the wire.
    pub fn code(&self) -> Code {
        match self {
            Self::NoContainer(_) | Self::NoExec { .. } | Self::Finished | Self::Gone(_) => Code::NOT_FOUND,
            Self::ContainerExists(_) | Self::ExecExists { .. } => Code::ALREADY_EXISTS,
            Self::Refused { refusal: Refusal::Probed, .. } => Code::ABORTED,
            Self::StillRuns(_) | Self::Dependency(_) | Self::Refused { .. } => Code::FAILED_PRECONDITION,
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Runtime { source, .. } => match source {
                RuntimeError::InvalidArgument(_) => Code::INVALID_ARGUMENT,
                RuntimeError::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
                RuntimeError::NotFound(_) => Code::NOT_FOUND,
                RuntimeError::ResourceExhausted(_) => Code::RESOURCE_EXHAUSTED,
                RuntimeError::Vetoed | RuntimeError::Busy(_) => Code::ABORTED,
                RuntimeError::Failed(_) => Code::INTERNAL,
            },
        }
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}
