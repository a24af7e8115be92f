//! Making a container.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use containerd_shim::protos::events::task::TaskOOM;
use criu_hooks::{cgroup::Cgroup, engine::Engine};
use oci_spec::runtime::Spec;
use runc::{
    Runc,
    options::{CreateOpts, DeleteOpts, GlobalOpts},
};
use rustix::process::Pid;
use tracing::{info, warn};

use super::{
    Frozen, Inner, RuncContainer, failed, has_own_pid_namespace, precondition,
    process::{self, ProcessHandle, runc_error},
};
use crate::{
    bundle,
    container::{Journal, Phase, Record},
    controllers,
    events::EventSink,
    io::{ConsoleSocket, LoggerContext, ProcessIo},
    oom::OomWatch,
    options::Options,
    reaper::{ExitWatch, Reaper},
    rootfs,
    runtime::{CreateConfig, Process, Runtime, RuntimeError, RuntimeFactory},
};

/// runc's log, in the bundle.
pub(super) const RUNC_LOG: &str = "log.json";
/// The pid of the init process, in the bundle, under the name that containerd's own shim uses.
pub(super) const INIT_PID: &str = "init.pid";

/// Makes containers with runc.
pub struct RuncFactory {
    reaper: Reaper,
    events: EventSink,
}

impl RuncFactory {
    /// A factory whose processes `reaper` reaps; OOM kills are published to `events`.
    pub fn new(reaper: Reaper, events: EventSink) -> Self {
        Self { reaper, events }
    }
}

/// What a logger of the user's is told.
pub(super) fn logger<'a>(id: &'a str, namespace: &'a str) -> LoggerContext<'a> {
    LoggerContext { id, namespace }
}

/// runc as the options want it.
///
/// # Errors
/// When the binary is not there.
pub(super) fn runc_of(
    options: &Options,
    namespace: &str,
    bundle: &Path,
    reaper: &Reaper,
) -> Result<Runc, RuntimeError> {
    let mut global = GlobalOpts::new()
        .command(&options.runc_binary)
        .root(options.runc_root.join(namespace))
        .log(bundle.join(RUNC_LOG))
        .log_json()
        .systemd_cgroup(options.systemd_cgroup);
    global.custom_spawner(Arc::new(reaper.clone()));
    global.build().map_err(|error| {
        let binary = options.runc_binary.display();
        precondition(format!("the OCI runtime {binary} cannot be used: {error}; set runc_binary"))
    })
}

/// What a container cannot do without.
fn check(spec: &Spec, bundle: &Path) -> Result<(), RuntimeError> {
    let cgroups = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_ref());
    if cgroups.is_none_or(|path| path.as_os_str().is_empty()) {
        return Err(RuntimeError::InvalidArgument(format!(
            "{} names no cgroup (linux.cgroupsPath): without one of its own a container cannot be put to sleep",
            bundle.join("config.json").display()
        )));
    }
    Ok(())
}

/// A bundle in the making: what has been done is undone when something fails.
struct Making<'a> {
    config: &'a CreateConfig,
    runc: &'a Runc,
    reaper: &'a Reaper,
}

impl Making<'_> {
    async fn create(&self, io: &Arc<ProcessIo>) -> Result<(ProcessHandle, Pid, ExitWatch), RuntimeError> {
        let CreateConfig { id, bundle, stdio, .. } = self.config;
        let console = if stdio.terminal { Some(ConsoleSocket::new().map_err(failed)?) } else { None };
        let pid_file = bundle.join(INIT_PID);
        let options = CreateOpts {
            io: io.child_ends().map(|ends| ends as Arc<dyn runc::io::Io>),
            pid_file: Some(pid_file.clone()),
            console_socket: console.as_ref().map(|socket| socket.path().to_owned()),
            ..Default::default()
        };
        let mark = self.reaper.mark();
        let outcome = self.runc.create(id, bundle, Some(&options)).await;
        io.started();
        outcome.map_err(|error| runc_error("create", error, &bundle.join(RUNC_LOG)))?;
        let pid = process::read_pid(&pid_file)?;
        let exit = self.reaper.claim(pid, mark);
        // At once: nothing is reaped in between, so the pid is still its own.
        let handle = ProcessHandle::open(pid);
        if let Some(console) = console {
            io.attach_console(console.receive().await.map_err(failed)?).map_err(failed)?;
        }
        Ok((handle, pid, exit))
    }

    async fn undo(&self, error: &RuntimeError) {
        let CreateConfig { id, bundle, .. } = self.config;
        // A container of this id that is not ours must live.
        if !error.to_string().contains("already exists") {
            // Mostly there is nothing yet; runc says so, and that is no news.
            let _ = self.runc.delete(id, Some(&DeleteOpts { force: true })).await;
        }
        if let Err(error) = rootfs::unmount(bundle) {
            warn!(%id, %error, "after a failed create");
        }
    }
}

#[async_trait]
impl RuntimeFactory for RuncFactory {
    async fn create(&self, config: &CreateConfig) -> Result<(Arc<dyn Runtime>, Process), RuntimeError> {
        let CreateConfig { id, namespace, bundle, .. } = config;
        if config.checkpoint.is_some() {
            return Err(RuntimeError::FailedPrecondition(
                "a container cannot be created from a checkpoint by this runtime: use io.containerd.runc.v2"
                    .to_owned(),
            ));
        }
        let invalid = |error: &dyn std::fmt::Display| RuntimeError::InvalidArgument(error.to_string());
        let options = Options::from_any(config.options.as_ref()).map_err(|error| invalid(&error))?;
        options.save(bundle).map_err(failed)?;
        let spec = bundle::read_spec(bundle).map_err(|error| invalid(&error))?;
        check(&spec, bundle)?;
        let options = options.annotated(spec.annotations().as_ref()).map_err(|error| invalid(&error))?;
        controllers::prepare(bundle, &spec, options.ignore_missing_controllers).map_err(precondition)?;
        let runc = runc_of(&options, namespace, bundle, &self.reaper)?;
        rootfs::mount(bundle, &config.rootfs).await.map_err(failed)?;

        let making = Making { config, runc: &runc, reaper: &self.reaper };
        let made = async {
            let logger = logger(id, namespace);
            let io = ProcessIo::open(&config.stdio, &logger, &self.reaper)
                .await
                .map_err(|error| invalid(&error))?;
            let (init, pid, exit) = making.create(&io).await?;
            let cgroup = Cgroup::of_pid(pid).map_err(precondition)?;
            Ok((io, init, pid, exit, cgroup))
        };
        let (io, init, pid, exit, cgroup) = match made.await {
            Ok(made) => made,
            Err(error) => {
                making.undo(&error).await;
                return Err(error);
            }
        };
        info!(%id, pid = process::number(pid), cgroup = %cgroup.path().display(), "created");
        let engine = Engine::new(&options.criu_binary, Arc::new(self.reaper.clone()));
        let container = RuncContainer {
            id: id.clone(),
            namespace: namespace.clone(),
            bundle: bundle.clone(),
            oom: watch_oom(id, &cgroup, self.events.clone()),
            own_pid_namespace: has_own_pid_namespace(&spec),
            options,
            reaper: self.reaper.clone(),
            runc,
            engine,
            criu: Arc::default(),
            cgroup,
            io,
            inner: Mutex::new(Inner {
                init,
                execs: HashMap::new(),
                last_pids: Vec::new(),
                image: None,
                fill: None,
                listeners: None,
                rebuff: None,
                frozen: Frozen::default(),
            }),
            updates: Arc::default(),
        };
        Ok((Arc::new(container), process::of(pid, exit)))
    }
}

/// Tells containerd of OOM kills in the container, where the node can notice them.
fn watch_oom(id: &str, cgroup: &Cgroup, events: EventSink) -> Option<OomWatch> {
    let container_id = id.to_owned();
    let tell = move || {
        warn!(id = %container_id, "the kernel killed for want of memory");
        events.publish(TaskOOM { container_id: container_id.clone(), ..Default::default() });
    };
    OomWatch::new(cgroup.path(), tell).unwrap_or_else(|error| {
        warn!(%id, %error, "OOM kills in this container will not be noticed");
        None
    })
}

/// Where the journal stands, for the action `delete`.
pub(super) fn last_record(bundle: &Path) -> Option<Record> {
    match Journal::in_bundle(bundle).read() {
        Ok(record) => record,
        Err(error) => {
            eprintln!("{error}");
            None
        }
    }
}

/// What held the state of a container whose shim has died.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Holder<'a> {
    /// Its processes, which have ended with the shim: images are out of date.
    Processes,
    /// This image.
    Image(&'a PathBuf),
    /// It was falling asleep: an image, if one is complete, may be all that is left.
    Either,
}

pub(super) fn what_holds(record: &Record) -> Holder<'_> {
    match (record.phase, &record.image) {
        (Phase::Running | Phase::Frozen | Phase::Reclaimed | Phase::Stopped, _) => Holder::Processes,
        (Phase::Checkpointed | Phase::Restoring, Some(image)) => Holder::Image(image),
        (Phase::Checkpointed | Phase::Restoring | Phase::Dumping, _) => Holder::Either,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_images_that_hold_nothing_may_go() {
        let record = |phase, image: Option<&str>| Record { phase, pid: 7, image: image.map(PathBuf::from) };
        let image = Some("/images/7");
        for phase in [Phase::Running, Phase::Frozen, Phase::Reclaimed] {
            assert_eq!(what_holds(&record(phase, image)), Holder::Processes);
        }
        assert_eq!(what_holds(&record(Phase::Stopped, None)), Holder::Processes);
        assert_eq!(what_holds(&record(Phase::Dumping, None)), Holder::Either);
        assert_eq!(what_holds(&record(Phase::Checkpointed, None)), Holder::Either);
        for phase in [Phase::Checkpointed, Phase::Restoring] {
            assert_eq!(what_holds(&record(phase, image)), Holder::Image(&PathBuf::from("/images/7")));
        }
    }
}
