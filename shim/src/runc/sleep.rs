//! Sleep and wake: the order of what happens around a dump and a restore.

use std::{path::Path, sync::Arc};

use async_trait::async_trait;
use criu_hooks::{
    container::Container,
    criu::HookError,
    engine::{DumpError, DumpHooks, DumpOptions, InheritFd, RestoreHooks, RestoreOptions},
    image::{self, Store},
};
use rustix::process::Pid;
use tracing::warn;

use super::{
    FREEZE, ImageKind, RuncContainer, SleepImage, failed, precondition,
    process::{self, ProcessHandle},
    state_file,
};
use crate::{
    reaper::{ExitWatch, Mark, Reaper},
    runtime::{CheckpointConfig, DumpReport, Restored, RuntimeError, Veto},
};

/// The engine's name in reports: CRIU driven by the shim.
const DIRECT: &str = "direct";

/// Gives the dump up while nothing is lost.
struct UnlessWoken(Veto);

#[async_trait]
impl DumpHooks for UnlessWoken {
    async fn before_kill(&mut self) -> Result<(), HookError> {
        if self.0.is_raised() { Err("something needs the agent awake".into()) } else { Ok(()) }
    }
}

/// Watches for the end of the new init process from before it can run.
struct ClaimInit {
    reaper: Reaper,
    mark: Option<Mark>,
    exit: Option<ExitWatch>,
}

#[async_trait]
impl RestoreHooks for ClaimInit {
    async fn created(&mut self, pid: Pid) -> Result<(), HookError> {
        self.exit = self.mark.take().map(|mark| self.reaper.claim(pid, mark));
        Ok(())
    }
}

/// A store that cannot take an image: what kind of trouble that is.
fn store_error(error: &image::Error) -> RuntimeError {
    match error {
        image::Error::Full { .. } => RuntimeError::ResourceExhausted(error.to_string()),
        _ => precondition(error),
    }
}

fn dump_error(error: DumpError) -> RuntimeError {
    match error {
        DumpError::Vetoed(_) => RuntimeError::Vetoed,
        DumpError::Image(error) => store_error(&error),
        DumpError::NotRunning(_) => failed(error),
        other => precondition(other),
    }
}

/// Removes every image of a container that has ended. A store that is not there holds none.
pub(super) fn remove_images(root: &Path, namespace: &str, id: &str) -> Result<(), RuntimeError> {
    if !root.exists() {
        return Ok(());
    }
    Store::open(root).and_then(|store| store.remove_all(namespace, id)).map_err(failed)
}

impl RuncContainer {
    /// The container as the engine sees it, derived anew from its bundle.
    fn for_engine(&self) -> Result<Container, RuntimeError> {
        Container::load(&self.id, &self.bundle, self.cgroup.clone()).map_err(precondition)
    }

    pub(super) async fn put_to_sleep(&self, veto: Veto) -> Result<DumpReport, RuntimeError> {
        let outcome = self.freeze_and_dump(veto).await;
        if outcome.is_err() {
            // Also when it failed before the engine had a hand in it.
            self.cgroup.thaw().await.map_err(failed)?;
            self.io.abort_dump();
        }
        outcome
    }

    async fn freeze_and_dump(&self, veto: Veto) -> Result<DumpReport, RuntimeError> {
        let container = self.for_engine()?;
        let init = self.lock().init.raw().ok_or_else(|| failed("there is no init process"))?;
        state_file::StateFile::read(&self.state_file()).map_err(precondition)?;
        let store = Store::open(&self.options.image_dir).map_err(|error| store_error(&error))?;
        store.sweep_incomplete(&self.namespace, &self.id).map_err(|error| store_error(&error))?;
        let writer = store.begin(&self.namespace, &self.id, None).map_err(|error| store_error(&error))?;
        let pids: Vec<u32> = self.cgroup.procs().map_err(failed)?.into_iter().map(process::number).collect();
        self.cgroup.freeze(FREEZE).await.map_err(precondition)?;
        self.io.prepare_dump().await.map_err(failed)?;

        let options = DumpOptions::default();
        let mut hooks = UnlessWoken(veto);
        let report =
            self.engine.dump(&container, init, &writer, &options, &mut hooks).await.map_err(dump_error)?;
        let image = Arc::new(writer.finish().map_err(failed)?);
        let image_dir = image.path().to_owned();
        {
            let mut inner = self.lock();
            inner.last_pids = pids;
            inner.image = Some(SleepImage { kind: ImageKind::Direct(image), network: report.network });
        }
        Ok(DumpReport { stopped: report.stopped, image_bytes: report.image_bytes, image_dir, engine: DIRECT })
    }

    pub(super) async fn wake_up(&self) -> Result<Restored, RuntimeError> {
        let (kind, network) = {
            let inner = self.lock();
            let image = inner.image.as_ref().ok_or_else(|| failed("there is no image of it"))?;
            let network = image.network.as_ref().map(std::os::fd::OwnedFd::try_clone).transpose();
            (image.kind.clone(), network.map_err(failed)?)
        };
        let container = self.for_engine()?;
        let inherit = self.io.inherit().map_err(failed)?;
        let inherit = inherit.into_iter().map(|end| InheritFd { key: end.key, fd: end.fd }).collect();
        let options = RestoreOptions { network, ..RestoreOptions::default() };
        let mut hooks = ClaimInit { reaper: self.reaper.clone(), mark: Some(self.reaper.mark()), exit: None };
        let restored = self
            .engine
            .restore(&self.namespace, &container, kind.image(), &options, inherit, &mut hooks)
            .await
            .map_err(failed)?;
        let Some(exit) = hooks.exit else {
            return Err(failed("CRIU restored a container without telling of its init process"));
        };
        if let Err(error) = self.io.finish_restore(restored.console) {
            warn!(id = %self.id, %error, "its terminal has not the size that it should have");
        }
        if let Err(error) = state_file::update(&self.state_file(), restored.pid) {
            warn!(id = %self.id, %error, "exec will not work: runc does not know the new init process");
        }
        self.lock().init = ProcessHandle::open(restored.pid);
        Ok(Restored { process: process::of(restored.pid, exit), engine: DIRECT })
    }

    pub(super) async fn checkpoint_for_client(
        &self,
        config: &CheckpointConfig,
        asleep: bool,
    ) -> Result<(), RuntimeError> {
        let _ = (config, asleep);
        Err(precondition("not yet"))
    }

    fn state_file(&self) -> std::path::PathBuf {
        state_file::path(&self.options.runc_root, &self.namespace, &self.id)
    }
}
