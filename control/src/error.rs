//! What a shim answers when it cannot do what was asked, on both sides of the wire.
//!
//! A shim returns a [`Failure`] (it turns into ttrpc's error by itself); the client gets the same value back.

use std::fmt;

use ttrpc::Code;

/// Why a request was not fulfilled. Each kind has its own status code on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The shim has no container or sandbox of that id.
    NotFound,
    /// The request itself is wrong, whatever the state: an empty id, an unknown depth.
    InvalidArgument,
    /// The container's state does not allow it: it sleeps already, it has stopped, a blocker forbids a dump.
    FailedPrecondition,
    /// Something else came first: a wake cancelled the sleep. Asking again may succeed.
    Aborted,
    /// Disk, memory or quota is spent.
    ResourceExhausted,
    /// It took longer than the shim allows.
    DeadlineExceeded,
    /// This shim does not offer it.
    Unimplemented,
    /// The shim is going away.
    Unavailable,
    /// State was lost: an image is incomplete or does not belong to the container.
    DataLoss,
    /// Anything else: CRIU or the runtime failed.
    Internal,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 10] = [
        Kind::NotFound,
        Kind::InvalidArgument,
        Kind::FailedPrecondition,
        Kind::Aborted,
        Kind::ResourceExhausted,
        Kind::DeadlineExceeded,
        Kind::Unimplemented,
        Kind::Unavailable,
        Kind::DataLoss,
        Kind::Internal,
    ];

    /// The status code that stands for this kind on the wire.
    pub fn code(self) -> Code {
        match self {
            Kind::NotFound => Code::NOT_FOUND,
            Kind::InvalidArgument => Code::INVALID_ARGUMENT,
            Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
            Kind::Aborted => Code::ABORTED,
            Kind::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
            Kind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
            Kind::Unimplemented => Code::UNIMPLEMENTED,
            Kind::Unavailable => Code::UNAVAILABLE,
            Kind::DataLoss => Code::DATA_LOSS,
            Kind::Internal => Code::INTERNAL,
        }
    }

    /// The kind that a status code stands for; codes without a kind of their own are [`Kind::Internal`].
    pub fn from_code(code: Code) -> Kind {
        Kind::ALL.into_iter().find(|kind| kind.code() == code).unwrap_or(Kind::Internal)
    }

    /// A stable name for machines: `not-found`, `failed-precondition`, …
    pub fn name(self) -> &'static str {
        match self {
            Kind::NotFound => "not-found",
            Kind::InvalidArgument => "invalid-argument",
            Kind::FailedPrecondition => "failed-precondition",
            Kind::Aborted => "aborted",
            Kind::ResourceExhausted => "resource-exhausted",
            Kind::DeadlineExceeded => "deadline-exceeded",
            Kind::Unimplemented => "unimplemented",
            Kind::Unavailable => "unavailable",
            Kind::DataLoss => "data-loss",
            Kind::Internal => "internal",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A request that was not fulfilled: the kind for programs, the message for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Why.
    pub kind: Kind,
    /// What failed, on what, and what to do.
    pub message: String,
}

impl Failure {
    /// A failure of `kind` with a message for people.
    pub fn new(kind: Kind, message: impl Into<String>) -> Failure {
        Failure { kind, message: message.into() }
    }

    /// The usual answer to an id that the shim does not have.
    pub fn not_found(id: &str) -> Failure {
        Failure::new(Kind::NotFound, format!("no container or sandbox {id:?} in this shim"))
    }

    /// Reads a status off the wire.
    pub fn from_status(status: &ttrpc::Status) -> Failure {
        Failure::new(Kind::from_code(status.code()), status.message())
    }
}

impl From<Failure> for ttrpc::Error {
    fn from(failure: Failure) -> ttrpc::Error {
        ttrpc::Error::RpcStatus(ttrpc::get_status(failure.kind.code(), failure.message))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_kind_has_a_code_and_a_name_of_its_own() {
        let codes: HashSet<i32> = Kind::ALL.into_iter().map(|kind| kind.code() as i32).collect();
        let names: HashSet<&str> = Kind::ALL.into_iter().map(Kind::name).collect();
        assert_eq!(codes.len(), Kind::ALL.len());
        assert_eq!(names.len(), Kind::ALL.len());
    }

    #[test]
    fn a_failure_comes_back_from_the_wire_as_it_went_in() {
        for kind in Kind::ALL {
            let failure = Failure::new(kind, "why it failed");
            let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(failure.clone()) else {
                panic!("{kind} did not become a status");
            };
            assert_eq!(Failure::from_status(&status), failure);
        }
    }

    #[test]
    fn a_code_without_a_kind_is_internal() {
        assert_eq!(Kind::from_code(Code::UNKNOWN), Kind::Internal);
        assert_eq!(Kind::from_code(Code::CANCELLED), Kind::Internal);
    }
}
