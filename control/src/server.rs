//! The shim's side of the protocol.

use std::{os::unix::net::UnixListener, sync::Arc};

use ttrpc::r#async::{Server, transport::Listener};

use crate::proto::control_ttrpc::{Control, create_control};

/// Serves `control` on a listener of [`socket::listen`](crate::socket::listen) until the server is shut down.
///
/// ```no_run
/// # use std::{path::Path, sync::Arc};
/// # use agentcube_control::{Control, Failure, Kind, SleepRequest, SleepResponse, server, socket};
/// struct Shim;
///
/// #[async_trait::async_trait]
/// impl Control for Shim {
///     async fn sleep(
///         &self,
///         _: &ttrpc::r#async::TtrpcContext,
///         request: SleepRequest,
///     ) -> ttrpc::Result<SleepResponse> {
///         // Hand the work to the container's own task and wait for its answer; see below.
///         Err(Failure::new(Kind::FailedPrecondition, format!("{} has stopped", request.id)).into())
///     }
///     // wake, status, list
/// }
///
/// # async fn start() -> Result<(), Box<dyn std::error::Error>> {
/// let listener = socket::listen(Path::new(socket::DEFAULT_ROOT), "k8s.io", "SANDBOX-ID")?;
/// let mut server = server::serve(listener, Arc::new(Shim)).await?;
/// // Keep `server` for as long as the shim lives, then:
/// server.shutdown().await?;
/// socket::remove(Path::new(socket::DEFAULT_ROOT), "k8s.io", "SANDBOX-ID")?;
/// # Ok(())
/// # }
/// ```
///
/// Two things to know about ttrpc's server:
/// - **It drops a handler's future when its client goes away.** A sleep or a wake must not live in the handler:
///   send it to the container's own task and await the answer, so that a Ctrl-C of the command line never stops
///   a dump half-way.
/// - Handlers of one connection run concurrently, so `status` and `list` answer while a `sleep` is in progress,
///   as long as they wait for no lock that a sleep holds.
///
/// `shutdown` waits some seconds for handlers that have not answered yet.
///
/// # Errors
/// When the listener cannot be made non-blocking or registered with the runtime.
///
/// # Panics
/// Outside a tokio runtime.
pub async fn serve(listener: UnixListener, control: Arc<dyn Control + Send + Sync>) -> ttrpc::Result<Server> {
    let listener = Listener::try_from(listener)
        .map_err(|e| ttrpc::Error::Others(format!("cannot serve on the control socket: {e}")))?;
    let mut server = Server::new().add_listener(listener).register_service(create_control(control));
    server.start().await?;
    Ok(server)
}
