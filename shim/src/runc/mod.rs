//! The real runtime: runc for create, start, exec and delete, the engine for sleeps, the cgroup for the rest.

mod ahead;
mod checkpoint;
mod cleanup;
mod create;
mod execs;
mod freezer;
mod inspect;
mod probed;
mod process;
mod scope;
mod sleep;
pub mod state_file;
mod updates;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use criu_hooks::{
    cgroup::Cgroup,
    engine::{Engine, Kept, Timers},
    image::Image,
    pager::Fill,
    preflight::{self, Preflight},
};
use oci_spec::runtime::{LinuxNamespaceType, LinuxResources, Spec};
use runc::{Runc, options::DeleteOpts};
use tokio::sync::OnceCell;
use tracing::{debug, info, warn};

use self::{
    ahead::Ahead,
    execs::Exec,
    freezer::Frozen,
    inspect::Rebuff,
    process::{ProcessHandle, runc_error},
    scope::Placeholder,
    updates::{Recorder, Updates},
};
pub use self::{cleanup::cleanup, create::RuncFactory};
use crate::{
    controllers,
    io::ProcessIo,
    limits::{self, Before},
    oom::{OomWatch, Restoring},
    options::Options,
    probe_commands::{Commands, Said},
    reaper::Reaper,
    reclaim::{self, Emptied},
    rootfs,
    runtime::{
        CheckpointConfig, DumpReport, ExecConfig, Process, Reasons, ReclaimReport, Restored, Runtime,
        RuntimeError, Veto,
    },
    stats,
    timers::Alarm,
    traffic::Listeners,
    wake::{Demand, WakeCause},
};

/// How long a process's last output may take to be passed on when it is deleted; as in containerd's own shim.
const DRAIN: Duration = Duration::from_secs(2);
/// How long a cgroup may take to stand still.
const FREEZE: Duration = Duration::from_secs(2);
/// How often an image that is in use is asked whether it still is.
const IN_USE: Duration = Duration::from_millis(200);
const SIGKILL: u32 = 9;

/// A container made by runc.
pub struct RuncContainer {
    id: String,
    namespace: String,
    bundle: PathBuf,
    options: Options,
    reaper: Reaper,
    runc: Runc,
    engine: Engine,
    /// Looked at before the first dump.
    criu: Arc<OnceCell<preflight::Version>>,
    cgroup: Cgroup,
    own_pid_namespace: bool,
    io: Arc<ProcessIo>,
    inner: Mutex<Inner>,
    /// Limits that were changed in its sleep.
    updates: Arc<Updates>,
    /// Ends with the container.
    oom: Option<OomWatch>,
}

/// What changes in the life of a container.
struct Inner {
    init: ProcessHandle,
    execs: HashMap<String, Exec>,
    /// The processes at the last dump: what `Pids` tells of a sleeping container.
    last_pids: Vec<u32>,
    image: Option<SleepImage>,
    /// Memory that comes, or came, after the last wake.
    fill: Option<Fill>,
    /// The sockets by which a checkpointed agent is reached.
    listeners: Option<Arc<Listeners>>,
    /// What CRIU could not dump the last time.
    rebuff: Option<Rebuff>,
    frozen: Frozen,
}

/// What a checkpointed container is restored from.
struct SleepImage {
    kind: ImageKind,
    /// Keeps namespaces that are the container's own.
    kept: Kept,
    /// A CRIU that waits for the wake.
    ahead: Option<Ahead>,
    /// Connections were closed: they are restored closed.
    tcp_close: bool,
    /// For which of its timers the time asleep counts.
    timers: Option<Timers>,
    /// Rings when it is to wake for one of them.
    alarm: Arc<Alarm>,
    /// Gives back what its cgroup is still charged with.
    emptied: Option<Emptied>,
    /// Keeps the container's scope, where systemd has made its cgroup.
    placeholder: Option<Placeholder>,
}

/// By which engine the image was made, and must be restored.
#[derive(Clone)]
enum ImageKind {
    /// CRIU driven by the shim.
    Direct(Arc<Image>),
    /// `runc checkpoint`.
    Runc(Arc<Image>),
}

impl ImageKind {
    fn image(&self) -> &Arc<Image> {
        match self {
            Self::Direct(image) | Self::Runc(image) => image,
        }
    }
}

fn failed(error: impl std::fmt::Display) -> RuntimeError {
    RuntimeError::Failed(error.to_string())
}

fn precondition(error: impl std::fmt::Display) -> RuntimeError {
    RuntimeError::FailedPrecondition(error.to_string())
}

/// Runs what blocks beside the shim's only thread.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, RuntimeError> {
    tokio::task::spawn_blocking(work).await.map_err(failed)
}

/// Whether the processes of `spec` have ids of their own, so that the kernel ends them with the first.
fn has_own_pid_namespace(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.into_iter().flatten().any(|namespace| {
        namespace.typ() == LinuxNamespaceType::Pid
            && namespace.path().as_ref().is_none_or(|path| path.as_os_str().is_empty())
    })
}

/// Changes the limits of one container with runc.
struct LimitsOf {
    runc: Runc,
    id: String,
    log: PathBuf,
    cgroup: PathBuf,
}

#[async_trait]
impl Recorder for LimitsOf {
    async fn update(&self, resources: &LinuxResources) -> Result<(), RuntimeError> {
        // Of an update that it refuses half-way, runc takes back what it has a record of.
        let settings = limits::settings(resources, &self.cgroup).unwrap_or_default();
        let before = Before::read(&self.cgroup, &settings);
        let updated = self.runc.update(&self.id, resources).await;
        if updated.is_err() {
            blocking(move || before.put_back()).await?;
        }
        updated.map_err(|error| runc_error("update", error, &self.log))
    }

    fn missed(&self, error: &RuntimeError) {
        warn!(id = %self.id, %error, "limits hold, but runc could not be told");
    }
}

impl RuncContainer {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn io_of(&self, exec_id: Option<&str>) -> Result<Arc<ProcessIo>, RuntimeError> {
        match exec_id {
            None => Ok(self.io.clone()),
            Some(id) => self
                .lock()
                .execs
                .get(id)
                .map(|exec| exec.io.clone())
                .ok_or_else(|| RuntimeError::NotFound(format!("exec {id} is not running"))),
        }
    }

    fn runc_log(&self) -> PathBuf {
        self.bundle.join(create::RUNC_LOG)
    }

    fn recorder(&self) -> LimitsOf {
        let (runc, id, cgroup) = (self.runc.clone(), self.id.clone(), self.cgroup.path().to_owned());
        LimitsOf { runc, id, log: self.runc_log(), cgroup }
    }

    /// Gives runc the limits that were changed while there was no process for it. Nobody waits for that: they hold.
    fn catch_up(&self) {
        let (updates, recorder) = (self.updates.clone(), self.recorder());
        tokio::spawn(async move { updates.catch_up(&recorder).await });
    }

    /// Has a look at CRIU that the first dump would else have to wait for. It matters to nobody else, so whatever is
    /// wrong is told then.
    fn look_at_criu(&self) {
        let (binary, reaper, criu) = (self.engine.criu().to_owned(), self.reaper.clone(), self.criu.clone());
        let id = self.id.clone();
        tokio::spawn(async move {
            let preflight = Preflight::new(&binary, &reaper);
            let looked = async {
                criu.get_or_try_init(|| preflight.version()).await?;
                preflight.warm().await
            };
            if let Err(error) = looked.await {
                debug!(%id, %error, "CRIU cannot be looked at yet");
            }
        });
    }

    /// Sees to it that runc knows the init process, should that have failed after the wake.
    fn introduce_init(&self) -> Result<(), RuntimeError> {
        let Some(init) = self.lock().init.raw() else { return Ok(()) };
        let path = self.state_file();
        let known = state_file::StateFile::read(&path).map(|state| state.init_pid());
        match known {
            Ok(known) if known != i64::from(init.as_raw_nonzero().get()) => {
                state_file::update(&path, init).map_err(failed)
            }
            // Of an unknown kind: then runc itself restores, and knows.
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl Runtime for RuncContainer {
    async fn start(&self) -> Result<Option<Process>, RuntimeError> {
        let init = self.lock().init.raw();
        let of_runc = init.and_then(process::program);
        let started = self.runc.start(&self.id).await;
        started.map_err(|error| runc_error("start", error, &self.runc_log()))?;
        if let (Some(init), Some(of_runc)) = (init, of_runc) {
            process::begun(init, of_runc).await;
        }
        self.look_at_criu();
        Ok(None)
    }

    async fn exec(&self, config: &ExecConfig) -> Result<Process, RuntimeError> {
        self.execute(config).await
    }

    async fn answer_exec(&self, config: &ExecConfig, said: Said) -> Result<Process, RuntimeError> {
        self.play_exec(config, said).await
    }

    fn probe_commands(&self) -> Option<Commands> {
        self.options.answered_commands()
    }

    fn signal(&self, exec_id: Option<&str>, signal: u32, all: bool) -> Result<(), RuntimeError> {
        let number = process::signal_number(signal)?;
        match exec_id {
            None if all && signal == SIGKILL => self.cgroup.kill().map_err(failed),
            None if all => {
                for pid in self.cgroup.procs().map_err(failed)? {
                    process::signal_pid(pid, number)?;
                }
                Ok(())
            }
            None => self.lock().init.signal(number),
            Some(id) => {
                let inner = self.lock();
                let exec =
                    inner.execs.get(id).ok_or_else(|| RuntimeError::NotFound(format!("no exec {id}")))?;
                exec.process.signal(number)
            }
        }
    }

    fn resize(&self, exec_id: Option<&str>, width: u16, height: u16) -> Result<(), RuntimeError> {
        self.io_of(exec_id)?.resize(width, height).map_err(precondition)
    }

    fn close_stdin(&self, exec_id: Option<&str>) -> Result<(), RuntimeError> {
        self.io_of(exec_id)?.close_stdin();
        Ok(())
    }

    async fn update(&self, resources: &LinuxResources, asleep: bool) -> Result<(), RuntimeError> {
        let resources = &controllers::of_update(resources, self.options.ignore_missing_controllers)
            .map_err(precondition)?;
        if !asleep {
            return self.updates.by_runc(resources, &self.recorder()).await;
        }
        let (cgroup, wanted) = (self.cgroup.path().to_owned(), resources.clone());
        if self.options.systemd_cgroup {
            let settings = limits::settings(resources, &cgroup);
            let settings = settings.map_err(|error| RuntimeError::InvalidArgument(error.to_string()))?;
            scope::set_properties(&self.cgroup, &settings, &self.reaper).await.map_err(precondition)?;
        }
        // To lower a memory limit the kernel reclaims, and takes its time.
        let apply = async {
            blocking(move || {
                let settings = limits::settings(&wanted, &cgroup);
                let settings = settings.map_err(|error| RuntimeError::InvalidArgument(error.to_string()))?;
                limits::apply(&cgroup, &settings).map_err(precondition)
            })
            .await?
        };
        self.updates.past_runc(resources.clone(), apply).await
    }

    async fn settle(&self) {
        // What has become of it is in the log, and a container without its memory has ended.
        let _ = self.complete_fill().await;
    }

    async fn freeze(&self) -> Result<(), RuntimeError> {
        self.stop().await
    }

    async fn watch(&self) -> Result<(), RuntimeError> {
        self.begin_watch().await
    }

    fn unwatch(&self) {
        self.end_watch();
    }

    async fn thaw_for_probe(&self) -> Result<(), RuntimeError> {
        self.let_answer().await
    }

    async fn probe_over(&self) -> bool {
        self.answered().await
    }

    async fn refreeze(&self) -> Result<(), RuntimeError> {
        self.sleep_on().await
    }

    fn can_reclaim(&self) -> Result<(), RuntimeError> {
        let swaps = std::path::Path::new("/proc/swaps");
        reclaim::destination(self.cgroup.path(), swaps).map_err(precondition)
    }

    async fn reclaim(&self, veto: Veto) -> Result<ReclaimReport, RuntimeError> {
        self.push_out(veto).await
    }

    async fn thaw(&self) -> Result<(), RuntimeError> {
        self.go_on().await?;
        self.catch_up();
        Ok(())
    }

    async fn dump(&self, veto: Veto) -> Result<DumpReport, RuntimeError> {
        let slept = self.put_to_sleep(veto).await;
        if slept.is_err() {
            // It runs on, and limits may have been changed meanwhile.
            self.catch_up();
        }
        slept
    }

    async fn restore(&self) -> Result<Restored, RuntimeError> {
        let room = self.updates.make_room(&self.id, self.cgroup.path()).await;
        let kills = match &self.oom {
            Some(oom) => Some(oom.restoring().await),
            None => None,
        };
        let restored = self.wake_up().await;
        room.over().await;
        if restored.is_ok() {
            self.catch_up();
        } else {
            kills.into_iter().for_each(Restoring::failed);
            self.lock().image.iter().for_each(|image| image.alarm.put_off());
            self.give_back_soon();
        }
        restored
    }

    async fn memory_lost(&self) -> Option<String> {
        self.failed_fill().await
    }

    async fn checkpoint(&self, config: &CheckpointConfig) -> Result<(), RuntimeError> {
        self.checkpoint_for_client(config).await
    }

    fn drop_image(&self) {
        // Without a wake before this, nothing will ever write again.
        self.io.end_asleep();
        let (image, listeners) = {
            let mut inner = self.lock();
            (inner.image.take(), inner.listeners.take())
        };
        // Of a container that was killed in its sleep: whoever waited for it learns that it is gone.
        drop(listeners);
        let Some(SleepImage { kind, kept, ahead, placeholder, .. }) = image else { return };
        drop((kept, ahead, placeholder));
        let id = self.id.clone();
        let fill = self.lock().fill.clone();
        let (ImageKind::Direct(mut image) | ImageKind::Runc(mut image)) = kind;
        tokio::spawn(async move {
            if let Some(mut fill) = fill
                && fill.complete().await.is_err()
            {
                // It is all that is left of the agent; it goes when the container is deleted.
                return;
            }
            // A checkpoint for a client may still be copying it.
            let image = loop {
                match Arc::try_unwrap(image) {
                    Ok(image) => break image,
                    Err(shared) => image = shared,
                }
                tokio::time::sleep(IN_USE).await;
            };
            // A large file takes its time to go.
            let removed = tokio::task::spawn_blocking(move || image.remove()).await;
            if let Ok(Err(error)) = removed {
                warn!(%id, %error, "an image that is no longer needed stays on the disk");
            }
        });
    }

    async fn ended(&self) {
        if let Some(oom) = &self.oom {
            oom.look().await;
        }
    }

    fn kill_rest(&self) {
        if !self.own_pid_namespace
            && let Err(error) = self.cgroup.kill()
        {
            warn!(id = %self.id, %error, "processes may be left of the container");
        }
    }

    async fn delete_exec(&self, exec_id: &str) -> Result<(), RuntimeError> {
        self.forget_exec(exec_id).await;
        Ok(())
    }

    async fn delete(&self) -> Result<(), RuntimeError> {
        self.io.drained(DRAIN).await;
        match self.runc.delete(&self.id, Some(&DeleteOpts { force: true })).await {
            Ok(()) => {}
            Err(error) => {
                let error = runc_error("delete", error, &self.runc_log());
                if !error.to_string().contains("does not exist") {
                    return Err(error);
                }
            }
        }
        {
            let mut inner = self.lock();
            inner.image = None;
            inner.listeners = None;
        }
        self.await_end_of_fill().await;
        let (root, namespace, id) = (self.options.image_dir.clone(), self.namespace.clone(), self.id.clone());
        let bundle = self.bundle.clone();
        let removed = blocking(move || {
            // A store in trouble must not keep the container from being deleted, and its pod from ending.
            if let Err(error) = sleep::remove_images(&root, &namespace, &id) {
                warn!(%id, %error, "images stay on the disk");
            }
            rootfs::unmount(&bundle)
        });
        removed.await?.map_err(failed)?;
        info!(id = %self.id, "deleted");
        Ok(())
    }

    async fn demand(&self) -> Demand {
        tokio::select! {
            () = self.io.input_waiting() => Demand::Wake(WakeCause::Input),
            demand = self.stirred() => demand,
            () = self.client() => Demand::Wake(WakeCause::Traffic),
            () = self.alarmed() => Demand::Wake(WakeCause::Timer),
        }
    }

    async fn why(&self) -> Result<Reasons, RuntimeError> {
        self.explain().await
    }

    fn pids(&self) -> Vec<u32> {
        let living = self.cgroup.procs().unwrap_or_default();
        let inner = self.lock();
        if !living.is_empty() && inner.image.is_none() {
            return living.into_iter().map(process::number).collect();
        }
        if inner.last_pids.is_empty() { vec![inner.init.pid()] } else { inner.last_pids.clone() }
    }

    fn stats(&self) -> Result<Any, RuntimeError> {
        Ok(stats::metrics_any(self.cgroup.path()))
    }

    fn memory(&self) -> (u64, &'static str) {
        stats::memory_used(self.cgroup.path())
    }

    fn charged(&self) -> HashMap<String, u64> {
        stats::charged(self.cgroup.path())
    }
}
