//! Dumping a container to an image and restoring it, with CRIU driven directly.
//!
//! Every future here may be dropped at any time, on a runtime that goes on: a dump then lets the agent run on (unless the
//! kill had begun: then it is seen through), a restore leaves nothing of what it had made. Both have bounds in time.

mod ahead;
mod dump;
mod elapse;
mod freezer;
mod ghosts;
mod memory;
mod message;
mod mode;
mod namespaces;
mod oom;
mod predump;
mod restart;
mod restore;
mod rootfs;
mod timers;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use rustix::process::Pid;

pub use ahead::Spare;
pub use dump::{DumpError, DumpOptions, DumpReport};
pub use elapse::Timers;
pub use mode::ClassicReason;
pub use namespaces::Kept;
pub use predump::{PredumpError, PredumpReport};
pub use restore::{Handover, InheritFd, RestoreError, RestoreOptions, Restored};
pub use rootfs::RESTORE_ROOT;

use crate::{
    criu::{
        self, HookError, NoHooks,
        log::{self, Reason},
        rpc::{Criu_cg_mode, Criu_network_lock_method, Criu_opts, Criu_req, Criu_req_type, Ext_mount_map},
    },
    image::Versions,
    spawn::Spawner,
};

/// The key under which CRIU knows the network namespace that it neither dumps nor makes.
const NETWORK_KEY: &str = "extRootNetNS";

/// How long what is dead may take to be gone.
const DEATH_TIMEOUT: Duration = Duration::from_secs(10);

/// What is done in the course of a dump.
#[async_trait]
pub trait DumpHooks: Send {
    /// Called when the image is complete and before a process is killed. An error lets the processes run on and
    /// discards the image.
    ///
    /// # Errors
    /// To call the dump off.
    async fn before_kill(&mut self) -> Result<(), HookError> {
        Ok(())
    }
}

/// What is done in the course of a restore.
#[async_trait]
pub trait RestoreHooks: Send {
    /// The container's first process exists. It is a child of this process and may end at any time from now on.
    ///
    /// # Errors
    /// To call the restore off.
    async fn created(&mut self, pid: Pid) -> Result<(), HookError> {
        let _ = pid;
        Ok(())
    }

    /// Everything is restored and nothing runs yet.
    ///
    /// # Errors
    /// To call the restore off.
    async fn before_resume(&mut self, pid: Pid) -> Result<(), HookError> {
        let _ = pid;
        Ok(())
    }
}

impl DumpHooks for NoHooks {}
impl RestoreHooks for NoHooks {}

/// Dumps and restores containers.
#[derive(Clone)]
pub struct Engine {
    criu: PathBuf,
    spawner: Arc<dyn Spawner>,
    versions: Versions,
}

impl Engine {
    /// An engine that runs the CRIU at `criu`.
    pub fn new(criu: impl Into<PathBuf>, spawner: Arc<dyn Spawner>) -> Engine {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let engine = env!("CARGO_PKG_VERSION").to_owned();
        let versions = Versions { kernel, engine, ..Versions::default() };
        Engine { criu: criu.into(), spawner, versions }
    }

    /// The versions of CRIU and runc to be noted in images.
    #[must_use]
    pub fn with_versions(mut self, criu: &str, runc: &str) -> Engine {
        criu.clone_into(&mut self.versions.criu);
        runc.clone_into(&mut self.versions.runc);
        self
    }

    /// The CRIU that is run.
    pub fn criu(&self) -> &Path {
        &self.criu
    }
}

/// Why CRIU failed, in words.
#[derive(Debug)]
pub struct Failure {
    /// What CRIU's log says, when it says anything.
    pub reason: Option<Reason>,
    /// What the session with it came to.
    pub error: criu::Error,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.reason, &self.error) {
            (Some(reason), criu::Error::Failed { .. }) => reason.fmt(f),
            (Some(reason), error) => write!(f, "{error}; {reason}"),
            (None, error) => error.fmt(f),
        }
    }
}

impl Failure {
    /// Whether it is known what it comes from.
    fn is_explained(&self) -> bool {
        self.reason.as_ref().is_some_and(|reason| reason.cause != log::Cause::Other)
    }

    /// Whether it comes from this.
    fn is_caused_by(&self, cause: log::Cause) -> bool {
        self.reason.as_ref().is_some_and(|reason| reason.cause == cause)
    }

    /// Looks for the reason of `error` in the log `name` of `directory`.
    fn new(error: criu::Error, directory: impl std::os::fd::AsFd, name: &str) -> Failure {
        let reason = match &error {
            criu::Error::Spawn { .. } | criu::Error::Refused { .. } => None,
            _ => log::read_reason(directory, name).unwrap_or_default(),
        };
        Failure { reason, error }
    }
}

/// A request with the options that dump and restore share.
fn request(kind: Criu_req_type, log_file: &str, log_level: u8) -> Criu_req {
    let mut opts = Criu_opts::new();
    opts.set_log_file(log_file.to_owned());
    opts.set_log_level(log_level.into());
    opts.set_notify_scripts(true);
    opts.set_orphan_pts_master(true);
    opts.set_manage_cgroups_mode(Criu_cg_mode::IGNORE);
    opts.set_network_lock(Criu_network_lock_method::SKIP);
    let mut request = Criu_req::new();
    request.set_type(kind);
    request.opts = protobuf::MessageField::some(opts);
    request
}

fn ext_mounts(pairs: Vec<(String, String)>) -> Vec<Ext_mount_map> {
    pairs
        .into_iter()
        .map(|(key, value)| {
            let mut map = Ext_mount_map::new();
            map.set_key(key);
            map.set_val(value);
            map
        })
        .collect()
}
