//! A typed, asynchronous client for one shim.

use std::{
    future::Future,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{net::UnixStream, time::timeout};
use ttrpc::{r#async::transport::Socket, context::Context};

use crate::{
    error::{Failure, Kind},
    proto::{
        control::{
            Container, Depth, ListRequest, ProbeCommand, ProbeCommands, ProbeResult, ProbesRequest,
            SleepRequest, StatusRequest, Transition, WakeRequest, WhyRequest, WhyResponse,
        },
        control_ttrpc::ControlClient,
    },
};

/// How long a client waits for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// For connecting, `status` and `list`, which never wait for a sleep or a wake.
    pub query: Duration,
    /// For `sleep` and `wake`. When it expires the shim goes on with what it began.
    pub transition: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts { query: Duration::from_secs(2), transition: Duration::from_mins(2) }
    }
}

/// Why a call brought no answer, or a refusal.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Not an address of a path socket.
    #[error("{0:?} is no address of a control socket: use unix:///path/to/ID.sock")]
    InvalidAddress(String),
    /// No shim listens there.
    #[error("no shim listens on {}: {source}{}", socket.display(), unavailable_hint(source))]
    Unavailable {
        /// The socket.
        socket: PathBuf,
        /// What connecting to it said.
        source: io::Error,
    },
    /// The shim did not answer in time.
    #[error(
        "the shim on {} did not answer {call} within {:.1} s: look at its log, and whether it hangs or is stopped",
        socket.display(),
        after.as_secs_f64()
    )]
    Timeout {
        /// The call's name.
        call: &'static str,
        /// The socket.
        socket: PathBuf,
        /// How long the client waited.
        after: Duration,
    },
    /// The connection ended before the answer came.
    #[error("the shim on {} went away during {call}: {reason}; look at its log", socket.display())]
    Lost {
        /// The call's name.
        call: &'static str,
        /// The socket.
        socket: PathBuf,
        /// What the transport said.
        reason: String,
    },
    /// The shim does not have this container.
    #[error("no container or sandbox {id:?}")]
    NotFound {
        /// The id asked for.
        id: String,
    },
    /// The container's state does not allow it.
    #[error("{reason}")]
    FailedPrecondition {
        /// The id asked for.
        id: String,
        /// The shim's reason.
        reason: String,
    },
    /// The shim tried and failed, or refused for another reason.
    #[error("{failure}")]
    Failed {
        /// The id asked for; empty for `list`.
        id: String,
        /// What the shim answered.
        failure: Failure,
    },
}

fn unavailable_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => " (control sockets are for root: run this as root)",
        io::ErrorKind::WouldBlock => " (its queue is full: it hangs or is stopped)",
        _ => "",
    }
}

impl ClientError {
    /// A stable name for machines: that of the shim's [`Kind`], or `timeout`, `lost`, `unavailable`.
    pub fn name(&self) -> &'static str {
        match self {
            ClientError::InvalidAddress(_) => Kind::InvalidArgument.name(),
            ClientError::Unavailable { .. } => Kind::Unavailable.name(),
            ClientError::Timeout { .. } => "timeout",
            ClientError::Lost { .. } => "lost",
            ClientError::NotFound { .. } => Kind::NotFound.name(),
            ClientError::FailedPrecondition { .. } => Kind::FailedPrecondition.name(),
            ClientError::Failed { failure, .. } => failure.kind.name(),
        }
    }
}

/// A connection to one shim. Calls may overlap.
pub struct Client {
    inner: ControlClient,
    socket: PathBuf,
    timeouts: Timeouts,
}

impl Client {
    /// Connects to a shim by its address, `unix:///path/to/ID.sock`, with the default [`Timeouts`].
    ///
    /// # Errors
    /// [`ClientError::InvalidAddress`], [`ClientError::Unavailable`].
    pub async fn connect(address: &str) -> Result<Client, ClientError> {
        // "@" and "unix://@" would be an abstract socket, which anybody in the network namespace can own.
        let path = address
            .strip_prefix("unix://")
            .filter(|path| path.starts_with('/'))
            .ok_or_else(|| ClientError::InvalidAddress(address.to_owned()))?;
        Client::connect_path(Path::new(path), Timeouts::default()).await
    }

    /// Connects to a shim by the path of its socket.
    ///
    /// # Errors
    /// [`ClientError::Unavailable`].
    pub async fn connect_path(socket: &Path, timeouts: Timeouts) -> Result<Client, ClientError> {
        // Not ttrpc's own connect: that blocks the thread while the queue of a hanging shim is full.
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|source| ClientError::Unavailable { socket: socket.to_owned(), source })?;
        Ok(Client {
            inner: ControlClient::new(ttrpc::r#async::Client::new(Socket::from(stream))),
            socket: socket.to_owned(),
            timeouts,
        })
    }

    /// The same connection with other timeouts.
    #[must_use]
    pub fn with_timeouts(self, timeouts: Timeouts) -> Client {
        Client { timeouts, ..self }
    }

    /// Puts a container, or all of a sandbox, to sleep; returns when it sleeps, with one transition a container.
    ///
    /// # Errors
    /// [`ClientError`], all but `InvalidAddress` and `Unavailable`.
    pub async fn sleep(&self, id: &str, depth: Depth) -> Result<Vec<Transition>, ClientError> {
        let request = SleepRequest { id: id.to_owned(), depth: depth.into(), ..SleepRequest::default() };
        let call = self.inner.sleep(Context::default(), &request);
        let response = self.call("Sleep", id, self.timeouts.transition, call).await?;
        Ok(response.transitions)
    }

    /// As [`Client::sleep`], but at the deepest depth that works, `depth` at most. What did not work stands in the
    /// transition's `shortfalls`.
    ///
    /// # Errors
    /// As [`Client::sleep`], when no depth works.
    pub async fn sleep_or_shallower(&self, id: &str, depth: Depth) -> Result<Vec<Transition>, ClientError> {
        let request = SleepRequest {
            id: id.to_owned(),
            depth: depth.into(),
            or_shallower: true,
            ..SleepRequest::default()
        };
        let call = self.inner.sleep(Context::default(), &request);
        let response = self.call("Sleep", id, self.timeouts.transition, call).await?;
        Ok(response.transitions)
    }

    /// Wakes a container, or all of a sandbox; returns when it runs, with one transition for each that slept.
    ///
    /// # Errors
    /// As [`Client::sleep`].
    pub async fn wake(&self, id: &str) -> Result<Vec<Transition>, ClientError> {
        let request = WakeRequest { id: id.to_owned(), ..WakeRequest::default() };
        let call = self.inner.wake(Context::default(), &request);
        let response = self.call("Wake", id, self.timeouts.transition, call).await?;
        Ok(response.transitions)
    }

    /// Tells all about one container.
    ///
    /// # Errors
    /// As [`Client::sleep`].
    pub async fn status(&self, id: &str) -> Result<Container, ClientError> {
        let request = StatusRequest { id: id.to_owned(), ..StatusRequest::default() };
        let call = self.inner.status(Context::default(), &request);
        let response = self.call("Status", id, self.timeouts.query, call).await?;
        response.container.into_option().ok_or_else(|| ClientError::Failed {
            id: id.to_owned(),
            failure: Failure::new(
                Kind::Internal,
                format!("the shim on {} sent an empty status", self.socket.display()),
            ),
        })
    }

    /// Asks how deep a container could sleep, and why no deeper.
    ///
    /// # Errors
    /// As [`Client::sleep`].
    pub async fn why(&self, id: &str) -> Result<WhyResponse, ClientError> {
        let request = WhyRequest { id: id.to_owned(), ..WhyRequest::default() };
        let call = self.inner.why(Context::default(), &request);
        self.call("Why", id, self.timeouts.query, call).await
    }

    /// Tells the shim the commands of a container's exec probes, all of them, and returns what they last came to. With
    /// none they stay as they are.
    ///
    /// # Errors
    /// As [`Client::sleep`].
    pub async fn probes(
        &self,
        id: &str,
        commands: Option<&[Vec<String>]>,
    ) -> Result<Vec<ProbeResult>, ClientError> {
        let command = |arguments: &Vec<String>| ProbeCommand {
            arguments: arguments.clone(),
            ..ProbeCommand::default()
        };
        let commands = commands.map(|commands| ProbeCommands {
            commands: commands.iter().map(command).collect(),
            ..ProbeCommands::default()
        });
        let request =
            ProbesRequest { id: id.to_owned(), commands: commands.into(), ..ProbesRequest::default() };
        let call = self.inner.probes(Context::default(), &request);
        let response = self.call("Probes", id, self.timeouts.query, call).await?;
        Ok(response.results)
    }

    /// Lists the shim's containers.
    ///
    /// # Errors
    /// As [`Client::sleep`], without `NotFound`.
    pub async fn list(&self) -> Result<Vec<Container>, ClientError> {
        let request = ListRequest::default();
        let call = self.inner.list(Context::default(), &request);
        let response = self.call("List", "", self.timeouts.query, call).await?;
        Ok(response.containers)
    }

    async fn call<T>(
        &self,
        call: &'static str,
        id: &str,
        after: Duration,
        future: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, ClientError> {
        match timeout(after, future).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(ttrpc::Error::RpcStatus(status))) => Err(refusal(id, Failure::from_status(&status))),
            Ok(Err(other)) => {
                Err(ClientError::Lost { call, socket: self.socket.clone(), reason: other.to_string() })
            }
            Err(_) => Err(ClientError::Timeout { call, socket: self.socket.clone(), after }),
        }
    }
}

fn refusal(id: &str, failure: Failure) -> ClientError {
    let id = id.to_owned();
    match failure.kind {
        Kind::NotFound if !id.is_empty() => ClientError::NotFound { id },
        Kind::FailedPrecondition => ClientError::FailedPrecondition { id, reason: failure.message },
        _ => ClientError::Failed { id, failure },
    }
}

#[cfg(test)]
mod tests;
