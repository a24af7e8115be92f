//! The shim as containerd runs it: the actions `start` and `delete`, and the server in between.

use std::{
    fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use agentcube_control::{server, socket};
use async_trait::async_trait;
use containerd_shim::{
    Config, DeleteResponse, Error, ExitSignal, Flags, Result, Shim, StartOpts,
    protos::{protobuf::well_known_types::any::Any, types::introspection::RuntimeInfo},
    publisher::RemotePublisher,
    spawn,
    util::write_str_to_file,
};
use tracing::{info, warn};

use crate::{
    bundle,
    control::ControlService,
    events::{self, EventSink},
    files, info, logging,
    options::Options,
    reaper::Reaper,
    runc::{RuncFactory, cleanup},
    task::{Containers, TaskService},
};

/// Carries the log level from `start`, which gets the options, to the server.
const LOG_LEVEL: &str = "AGENTCUBE_LOG_LEVEL";

/// Has the C library serve all threads from one heap (mallopt(3)): what the shim computes is little, and each heap that a
/// thread once used stays with it, a quarter of a MiB.
const ONE_HEAP: (&str, &str) = ("MALLOC_ARENA_MAX", "1");

/// The action by which the shim starts itself as the pager of a lazy restore.
pub const PAGER: &str = "pager";

/// The action by which the shim starts itself as a process that does nothing until its standard input ends: it stands in
/// for a sleeping agent in a scope of systemd.
pub const PLACEHOLDER: &str = "placeholder";

/// How long the last events may take to reach containerd when the shim ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// One invocation of the shim's binary.
pub struct Daemon {
    id: String,
    namespace: String,
    debug: bool,
    /// Where the Task API is served.
    socket: String,
    bundle: PathBuf,
    containers: Containers,
    exit: Arc<ExitSignal>,
    events: OnceLock<EventSink>,
}

impl Daemon {
    /// The id that the control socket is named by: the sandbox's, or the container's own.
    fn group(&self) -> String {
        match bundle::read_spec(&self.bundle) {
            Ok(spec) => bundle::group(&spec, &self.id).to_owned(),
            Err(_) => self.id.clone(),
        }
    }
}

/// How the crate is to run the shim. It reads this before it makes a [`Daemon`], so `new` is too late to change it.
pub fn config() -> Config {
    // One place reaps, and it is ours: whoever waits for any child takes the exits of all others.
    Config { no_reaper: true, no_setup_logger: true, ..Config::default() }
}

/// The file that holds the address of the Task API's socket, in the bundle.
const ADDRESS: &str = "address";

/// Removes the socket of a server that has died; one that listens, as for other containers of a pod, keeps its own.
fn remove_dead_socket(address: &str) -> io::Result<()> {
    let Some(path) = address.strip_prefix("unix://").map(Path::new) else { return Ok(()) };
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        _ => Ok(()),
    }
}

fn other(error: impl std::fmt::Display) -> Error {
    Error::Other(error.to_string())
}

#[async_trait]
impl Shim for Daemon {
    type T = TaskService;

    async fn new(_: &str, flags: &Flags, _: &mut Config) -> Self {
        Self {
            id: flags.id.clone(),
            namespace: flags.namespace.clone(),
            debug: flags.debug,
            socket: flags.socket.clone(),
            bundle: std::env::current_dir().unwrap_or_default(),
            containers: Containers::default(),
            exit: Arc::new(ExitSignal::default()),
            events: OnceLock::new(),
        }
    }

    fn runtime_info(runtime_id: &str, options: Option<&Any>) -> Result<RuntimeInfo> {
        info::runtime_info(runtime_id, options).map_err(other)
    }

    async fn start_shim(&mut self, opts: StartOpts) -> Result<String> {
        // A wrong option is told here, where containerd passes on what is wrong.
        let options = Options::from_extensions(&opts.extensions).map_err(other)?;
        let spec = bundle::read_spec(&self.bundle).map_err(other)?;
        let group = bundle::group(&spec, &opts.id).to_owned();
        let level = options.log_level.to_string();
        let address = spawn(opts, &group, vec![(LOG_LEVEL, level.as_str()), ONE_HEAP]).await?;
        write_str_to_file(ADDRESS, &address).await?;
        Ok(address)
    }

    async fn delete_shim(&mut self) -> Result<DeleteResponse> {
        let reaper = Reaper::start().map_err(other)?;
        let ended = cleanup(&self.namespace, &self.id, &self.bundle, &reaper).await;
        let group = self.group();
        if group == self.id
            && let Err(error) = socket::remove(socket::DEFAULT_ROOT.as_ref(), &self.namespace, &group)
        {
            eprintln!("the control socket of {group} stays behind: {error}");
        }
        let address = fs::read_to_string(self.bundle.join(ADDRESS)).unwrap_or_default();
        if let Err(error) = remove_dead_socket(&address) {
            eprintln!("the socket {address} stays behind: {error}");
        }
        Ok(DeleteResponse {
            pid: ended.pid,
            exit_status: ended.code,
            exited_at: Some(events::timestamp(ended.at)).into(),
            ..Default::default()
        })
    }

    async fn wait(&mut self) {
        // Only now: a second `start` for the same sandbox comes as far as the task service, but never here.
        let group = self.group();
        let control = Arc::new(ControlService::new(&self.namespace, self.containers.clone()));
        let root = socket::DEFAULT_ROOT.as_ref();
        let serving = match socket::listen(root, &self.namespace, &group) {
            Ok(listener) => server::serve(listener, control).await.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = &serving {
            warn!(%error, "no control socket: agents of this shim can be woken, but not put to sleep");
        }
        self.exit.wait().await;
        // At once, so that nobody finds this shim any more: a container of the same id may be started already. The
        // crate looks for its address in the bundle, which containerd removes meanwhile.
        if let Err(error) = std::fs::remove_file(self.socket.trim_start_matches("unix://")) {
            warn!(%error, "the socket of the Task API stays behind");
        }
        if let Ok(mut server) = serving {
            if let Err(error) = socket::remove(root, &self.namespace, &group) {
                warn!(%error, "the control socket stays behind");
            }
            // Not only `disconnect`: that waits for the listener, too, and for ten seconds in vain.
            if let Err(error) = server.shutdown().await {
                warn!(%error, "the control service did not end well");
            }
        }
        if let Some(events) = self.events.get() {
            events.forwarded(FAREWELL).await;
        }
    }

    async fn create_task_service(&self, publisher: RemotePublisher) -> Self::T {
        let level = std::env::var(LOG_LEVEL).unwrap_or_default();
        logging::init(&self.bundle, if self.debug { "debug" } else { &level }, &self.namespace, &self.id);
        info!(version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), "the shim serves");
        if let Err(error) = files::raise_limit() {
            warn!(%error, "no more files can be open: wakes of containers with many processes may fail");
        }
        let (sink, receiver) = EventSink::channel();
        tokio::spawn(events::forward(publisher, self.namespace.clone(), receiver, sink.pending()));
        let _ = self.events.set(sink.clone());
        let reaper = Reaper::start().expect("a tokio runtime with signals is running");
        let factory = Arc::new(RuncFactory::new(reaper, sink.clone()));
        TaskService::new(&self.namespace, self.containers.clone(), factory, sink, self.exit.clone())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_the_socket_of_a_server_that_has_died_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let address = format!("unix://{}", path.display());
        let listener = UnixListener::bind(&path).unwrap();
        remove_dead_socket(&address).unwrap();
        assert!(path.exists());
        drop(listener);
        remove_dead_socket(&address).unwrap();
        assert!(!path.exists());
        for nothing in ["", "unix:///nonexistent/s", &address] {
            remove_dead_socket(nothing).unwrap();
        }
    }
}
