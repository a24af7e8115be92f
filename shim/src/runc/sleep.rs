//! Sleep and wake: the order of what happens around a dump and a restore.

use std::{
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use criu_hooks::{
    container::Container,
    criu::HookError,
    descriptors::Listing,
    engine::{
        DumpError, DumpHooks, DumpOptions, Engine, Handover, InheritFd, Kept, RestoreError, RestoreHooks,
        RestoreOptions, Spare, Timers,
    },
    image::{self, Expected, Image, ImageWriter, Mode, Pages, Store},
    inspect::{self, Blocker, Policy},
    pager::{Eager, Fill},
    preflight::Preflight,
    waits,
};
use rustix::{process::Pid, time::ClockId};
use tracing::{info, warn};

use super::{
    Ahead, FREEZE, ImageKind, RuncContainer, SleepImage, blocking, failed, precondition,
    process::{self, ProcessHandle},
    scope::Placeholder,
    state_file,
};
use crate::{
    io::Inherit,
    reaper::{ExitWatch, Mark, Reaper},
    reclaim::Emptied,
    runtime::{DumpReport, Restored, RuntimeError, Veto},
    stats,
    timers::{self, Alarm},
    traffic::Listeners,
    watch::{self, Before},
};

/// The engine's name in reports: CRIU driven by the shim.
const DIRECT: &str = "direct";
/// The engine's name in reports: `runc checkpoint` and `runc restore`.
const RUNC: &str = "runc";

/// Why runc cannot checkpoint a container whose cgroup is systemd's.
const SYSTEMD: &str = "runc is of an unknown kind, and with systemd_cgroup it would end the container's scope: it can sleep frozen";

/// How long CRIU may take, whatever the size.
const LEAST_TIME: Duration = Duration::from_mins(1);
/// How long an agent that is at work is given to come to its next wait.
const AT_WORK: Duration = Duration::from_millis(300);
/// How long a pager may take to see that its container has ended.
const FILL_END: Duration = Duration::from_secs(2);
/// How long each look at a frozen container may take.
const LONGEST_LOOK: Duration = Duration::from_secs(10);
/// The slowest disk that is waited for, in bytes a second.
const SLOWEST: u64 = 20 << 20;

/// How long CRIU may take with so many bytes of memory.
fn time_for(bytes: u64) -> Duration {
    LEAST_TIME + Duration::from_secs(bytes / SLOWEST)
}

/// Does a part of a sleep for which the agent stands still. It is given up when somebody needs the agent, or when it takes
/// too long: what it waits for may stand still as well.
async fn while_frozen<T>(
    veto: &Veto,
    work: impl Future<Output = Result<T, RuntimeError>>,
) -> Result<T, RuntimeError> {
    let done = veto.unless_raised(tokio::time::timeout(LONGEST_LOOK, work)).await?;
    done.unwrap_or_else(|_| {
        let seconds = LONGEST_LOOK.as_secs();
        Err(failed(format_args!("what it has open could not be looked at within {seconds} s of its freeze")))
    })
}

/// What may speak against a sleep until its last moment.
pub(super) struct Objections {
    veto: Veto,
    listeners: Listeners,
}

impl Objections {
    /// Who needs the agent awake, if anybody does.
    pub(super) fn raised(&self) -> Option<String> {
        if self.veto.is_raised() {
            return Some("something needs the agent awake".to_owned());
        }
        self.listeners.demand().map(|address| format!("a client waits at {address}"))
    }
}

/// Connections that the end of the agent's processes closes. Until then the kernel takes bytes in by them.
struct Closing {
    init: Pid,
    /// Their inodes.
    connections: Vec<u64>,
    policy: Policy,
}

impl Closing {
    /// Why one of them must not be closed any more, if one must not.
    async fn come_to_life(&self) -> Result<Option<Blocker>, HookError> {
        if self.connections.is_empty() {
            return Ok(None);
        }
        let (init, connections, policy) = (self.init, self.connections.clone(), self.policy);
        Ok(tokio::task::spawn_blocking(move || inspect::come_to_life(init, &connections, policy)).await??)
    }
}

/// Gives the dump up while nothing is lost. Opens the image: once the processes are gone, nothing may fail any more.
struct LastWord<'a> {
    objections: &'a Objections,
    connections: &'a Closing,
    writer: &'a ImageWriter,
    placeholder: Option<&'a Placeholder>,
    image: Option<Image>,
}

#[async_trait]
impl DumpHooks for LastWord<'_> {
    async fn before_kill(&mut self) -> Result<(), HookError> {
        if let Some(objection) = self.objections.raised() {
            return Err(objection.into());
        }
        if let Some(busy) = self.connections.come_to_life().await? {
            return Err(busy.to_string().into());
        }
        self.placeholder.map_or(Ok(()), Placeholder::take_place)?;
        self.image = Some(self.writer.open()?);
        Ok(())
    }
}

/// Watches for the end of the new init process from before it can run.
struct ClaimInit {
    reaper: Reaper,
    mark: Option<Mark>,
    init: Option<(ProcessHandle, ExitWatch)>,
}

#[async_trait]
impl RestoreHooks for ClaimInit {
    async fn created(&mut self, pid: Pid) -> Result<(), HookError> {
        // Both at once: nothing is reaped in between, so the pid is still its own.
        self.init = self.mark.take().map(|mark| (ProcessHandle::open(pid), self.reaper.claim(pid, mark)));
        Ok(())
    }
}

/// A container's new init process, and its terminal if it has one.
pub(super) struct Woken {
    pub(super) pid: Pid,
    pub(super) init: ProcessHandle,
    pub(super) exit: ExitWatch,
    pub(super) console: Option<OwnedFd>,
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
        DumpError::Vetoed(reason) => match reason.downcast::<image::Error>() {
            Ok(error) => store_error(&error),
            Err(_) => RuntimeError::Vetoed,
        },
        DumpError::Image(error) => store_error(&error),
        DumpError::NotRunning(_) => failed(error),
        other => precondition(other),
    }
}

/// What stands in for pipes, as the engine takes it.
fn for_engine(inherit: Vec<Inherit>) -> Vec<InheritFd> {
    inherit.into_iter().map(|end| InheritFd { key: end.key, fd: end.fd }).collect()
}

/// The mode's name in reports.
fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::PodNamespaces => "pod-namespaces",
        Mode::Classic => "classic",
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
    pub(super) fn for_engine(&self) -> Result<Container, RuntimeError> {
        Container::load(&self.id, &self.bundle, self.cgroup.clone()).map_err(precondition)
    }

    pub(super) async fn put_to_sleep(&self, veto: Veto) -> Result<DumpReport, RuntimeError> {
        // A dump that fails has interrupted what the agent waits for.
        let before = self.look().await;
        let outcome = self.freeze_and_dump(veto, before.as_ref().ok()).await;
        if outcome.is_ok() {
            self.give_back_soon();
        }
        if let Err(error) = &outcome {
            self.end_watch();
            self.io.abort_dump();
            // Also when it failed before the engine had a hand in it.
            if let Err(thaw) = self.cgroup.thaw().await {
                warn!(id = %self.id, %error, %thaw, "it could not be thawed after a sleep that failed");
            }
            // It runs, so what it waits for is of no use; what was interrupted is remembered.
            if let Ok(before) = before {
                let _ = self.examine(before).await;
            }
        }
        outcome
    }

    async fn freeze_and_dump(&self, veto: Veto, before: Option<&Before>) -> Result<DumpReport, RuntimeError> {
        let criu = self
            .criu
            .get_or_try_init(async || Preflight::new(self.engine.criu(), &self.reaper).version().await)
            .await
            .map_err(precondition)?;
        let engine = self.engine.clone().with_versions(&criu.to_string(), "");
        let container = self.for_engine()?;
        let init = self.lock().init.raw().ok_or_else(|| failed("there is no init process"))?;
        self.fill_up(&veto).await?;
        let writer = veto.unless_raised(self.begin_image()).await??;
        let whole_because = self.write_in_advance(&engine, &container, init, &writer).await.err();
        if veto.is_raised() {
            return Err(RuntimeError::Vetoed);
        }
        let placeholder = self.options.systemd_cgroup.then(|| Placeholder::start(&self.cgroup, &self.reaper));
        let placeholder = placeholder.transpose().map_err(failed)?;
        // Nothing may be thawed again after this: the streams are as they are from here on.
        let frozen = self.freeze_between_work(&container, before, &veto).await?;
        let pids = self.cgroup.procs().map_err(failed)?;
        let open = while_frozen(&veto, self.open_files(pids.clone())).await?;
        let listeners = while_frozen(&veto, self.listeners(init, Arc::clone(&open))).await?;
        let objections = Objections { veto, listeners };
        if objections.raised().is_some() {
            return Err(RuntimeError::Vetoed);
        }
        let veto = &objections.veto;
        let seen = while_frozen(veto, self.inspection(&container, init, open)).await?;
        self.admit(&seen)?;
        let alarm = Alarm::new().map_err(failed)?;
        let tcp_close = !seen.closing.is_empty();
        let policy = self.options.connection_policy();
        let connections = Closing { init, connections: seen.closing.clone(), policy };
        while_frozen(veto, async { self.io.prepare_dump().await.map_err(failed) }).await?;

        // runc's record must be brought up to date after a direct restore, or exec would not work.
        let (made_by, dumped, image) = match state_file::StateFile::read(&self.state_file()) {
            Ok(_) => {
                let mut hooks = LastWord {
                    objections: &objections,
                    connections: &connections,
                    writer: &writer,
                    placeholder: placeholder.as_ref(),
                    image: None,
                };
                let timeout = time_for(stats::resident(self.cgroup.path()));
                let options = DumpOptions {
                    timeout,
                    tcp_close,
                    mode: self.options.criu_mode.into(),
                    memory_limit: self.options.memory_limit_mib.saturating_mul(1 << 20),
                    waits: self.timed_waits(),
                    ..DumpOptions::default()
                };
                let dump = engine.dump(&container, init, &writer, &options, &mut hooks).await;
                self.learn(&seen, dump.as_ref().err());
                (DIRECT, dump.map_err(dump_error)?, hooks.image)
            }
            Err(_) if tcp_close => {
                return Err(precondition("connections are established, and runc cannot close them"));
            }
            Err(_) if placeholder.is_some() => return Err(precondition(SYSTEMD)),
            Err(reason) => {
                warn!(id = %self.id, %reason, "runc is of an unknown kind: it dumps and restores this container itself");
                let image =
                    self.dump_with_runc(init, container.spec_digest.clone(), &writer, &objections).await?;
                (RUNC, criu_hooks::engine::DumpReport::default(), Some(image))
            }
        };
        objections.listeners.hold();
        let image = Arc::new(image.ok_or_else(|| failed("CRIU killed without a last word"))?);
        let stopped = frozen.elapsed();
        let cached = self.options.image_cache_seconds.map(Duration::from_secs);
        if let Err(error) = image.finish_in_background(cached) {
            warn!(id = %self.id, %error, "its image has no checksums of its pages");
        }
        let report = DumpReport {
            stopped,
            image_bytes: image.bytes(),
            image_dir: image.path().to_owned(),
            engine: made_by,
            mode: mode_name(dumped.mode),
            classic_because: dumped.classic_because.map(|reason| reason.to_string()),
            whole_because: whole_because.flatten(),
            memory_bytes: dumped.memory_bytes,
        };
        self.lock().listeners = Some(Arc::new(objections.listeners));
        let ahead = self.options.criu_started_ahead && made_by == DIRECT;
        let ahead = if ahead { self.start_ahead(container, &image, &dumped.kept) } else { None };
        let kind = if made_by == DIRECT { ImageKind::Direct(image) } else { ImageKind::Runc(image) };
        let timers = dumped.timers.filter(|_| self.options.timer_policy().counts());
        self.set_alarm(&alarm, timers.as_ref());
        let (alarm, emptied) = (Arc::new(alarm), None);
        let mut inner = self.lock();
        inner.last_pids = pids.into_iter().map(process::number).collect();
        let kept = dumped.kept;
        inner.image = Some(SleepImage { kind, kept, ahead, tcp_close, timers, alarm, emptied, placeholder });
        Ok(report)
    }

    /// Waits until all memory of the last wake is there. That can take long, and who needs the agent need not wait for it.
    async fn fill_up(&self, veto: &Veto) -> Result<(), RuntimeError> {
        // One that sleeps frozen is watched as long as that, and no longer: a dump sees who else has its descriptors.
        tokio::select! {
            filled = veto.unless_raised(self.complete_fill()) => filled??,
            _ = self.stirred() => return Err(RuntimeError::Vetoed),
        }
        self.end_watch();
        Ok(())
    }

    /// Freezes it, in a moment in which each of its threads waits if there soon is one: of a thread that is at work it is not
    /// known until when it would wait next. Gives back since when it stands still. `before` is how it was a while ago.
    async fn freeze_between_work(
        &self,
        container: &Container,
        before: Option<&Before>,
        veto: &Veto,
    ) -> Result<Instant, RuntimeError> {
        // One that sleeps frozen was looked at when it fell asleep.
        let asleep = self.cgroup.is_frozen().unwrap_or(false);
        let policy = self.options.timer_policy();
        let begun = Instant::now();
        loop {
            // Without a look of this moment the earlier one must do: only its timers are not known as well then.
            let before = if asleep { None } else { self.look().await.ok().or_else(|| before.cloned()) };
            let frozen = Instant::now();
            container.freeze(FREEZE).await.map_err(precondition)?;
            let Some(before) = before else { return Ok(frozen) };
            match while_frozen(veto, self.examine(before)).await? {
                Err(watch::Error::Busy(_)) if policy.counts() && begun.elapsed() < AT_WORK => {}
                // That it has something to do matters only where it is to sleep no longer than it would wait.
                Err(busy @ watch::Error::Busy(_)) if policy == timers::Policy::Wake => {
                    return Err(RuntimeError::Busy(busy.to_string()));
                }
                _ => return Ok(frozen),
            }
            self.cgroup.thaw().await.map_err(failed)?;
            veto.unless_raised(tokio::time::sleep(AT_WORK / 10)).await?;
        }
    }

    /// Takes hold of the sockets by which the frozen agent is reached.
    async fn listeners(&self, init: Pid, open: Arc<Listing>) -> Result<Listeners, RuntimeError> {
        let probes = self.options.answered_probes();
        blocking(move || Listeners::duplicate(init, &open, probes)).await?.map_err(precondition)
    }

    /// Sets the alarm for the first of its timers that is to wake it.
    fn set_alarm(&self, alarm: &Alarm, timers: Option<&Timers>) {
        let now = waits::now(ClockId::Boottime);
        let due = timers.into_iter().flat_map(Timers::due).map(|due| due.saturating_sub(now));
        let Some(first) = self.options.timer_policy().first(due) else { return };
        info!(id = %self.id, seconds = first.as_secs_f64(), "a timer is to wake it");
        if let Err(error) = alarm.set(first) {
            warn!(id = %self.id, %error, "its timers will not wake it");
        }
    }

    /// Completes when the checkpointed agent is to wake for a timer.
    pub(super) async fn alarmed(&self) {
        let alarm = self.lock().image.as_ref().map(|image| image.alarm.clone());
        match alarm {
            Some(alarm) => alarm.rings().await,
            None => std::future::pending().await,
        }
    }

    /// What stands in at a restore for what the image has not: pipes of the streams, and sockets that were held.
    fn to_inherit(&self) -> Result<Vec<InheritFd>, RuntimeError> {
        let mut inherit = for_engine(self.io.inherit().map_err(failed)?);
        if let Some(listeners) = self.lock().listeners.as_ref() {
            for (inode, fd) in listeners.to_inherit().map_err(failed)? {
                inherit.push(InheritFd { key: format!("socket:[{inode}]"), fd });
            }
        }
        Ok(inherit)
    }

    /// Starts a CRIU for the next wake, without waiting for it.
    fn start_ahead(&self, container: Container, image: &Arc<Image>, kept: &Kept) -> Option<Ahead> {
        let ready = kept.try_clone().map_err(failed).and_then(|kept| Ok((kept, self.to_inherit()?)));
        match ready {
            Ok((kept, inherit)) => {
                Some(Ahead::start(self.engine.clone(), container, Arc::clone(image), kept, inherit))
            }
            Err(error) => {
                warn!(id = %self.id, %error, "CRIU is not started ahead");
                None
            }
        }
    }

    /// Writes memory while the agent still runs, so that it stands still for less time. When it does not: the reason, or
    /// none when that was not asked for.
    async fn write_in_advance(
        &self,
        engine: &Engine,
        container: &Container,
        init: Pid,
        writer: &ImageWriter,
    ) -> Result<(), Option<String>> {
        if !self.options.pre_dump {
            return Err(None);
        }
        let resident = stats::resident(self.cgroup.path());
        let least = self.options.pre_dump_min_mib;
        let reason = if resident < least.saturating_mul(1 << 20) {
            format!("it has less memory than pre_dump_min_mib, {least} MiB")
        } else if self.cgroup.is_frozen().map_err(|error| Some(error.to_string()))? {
            "it was frozen already".to_owned()
        } else if let Err(error) = state_file::StateFile::read(&self.state_file()) {
            error.to_string()
        } else {
            let options = DumpOptions { timeout: time_for(resident), ..DumpOptions::default() };
            match engine.predump(container, init, writer, &options).await {
                Ok(report) => {
                    info!(id = %self.id, ms = report.total.as_millis(), bytes = report.bytes, "memory written in advance");
                    return Ok(());
                }
                Err(error) => error.to_string(),
            }
        };
        info!(id = %self.id, %reason, "no memory is written in advance");
        Err(Some(reason))
    }

    /// A new image on the disk, without what earlier failures have left.
    async fn begin_image(&self) -> Result<ImageWriter, RuntimeError> {
        let (root, namespace, id) = (self.options.image_dir.clone(), self.namespace.clone(), self.id.clone());
        let begun = blocking(move || {
            let store = Store::open(&root)?;
            store.sweep_incomplete(&namespace, &id)?;
            store.begin(&namespace, &id, None)
        });
        begun.await?.map_err(|error| store_error(&error))
    }

    /// Has what the emptied cgroup is charged with given back, in a while.
    pub(super) fn give_back_soon(&self) {
        let after = Duration::from_secs(self.options.file_cache_seconds.into());
        let time = Duration::from_secs(self.options.reclaim_timeout.into());
        let emptied = Emptied::start(self.id.clone(), self.cgroup.path().to_owned(), after, time);
        if let Some(image) = &mut self.lock().image {
            image.emptied = Some(emptied);
        }
    }

    pub(super) async fn wake_up(&self) -> Result<Restored, RuntimeError> {
        let (kind, kept, ahead, tcp_close, timers) = {
            let mut inner = self.lock();
            let image = inner.image.as_mut().ok_or_else(|| failed("there is no image of it"))?;
            image.emptied = None;
            let kept = image.kept.try_clone().map_err(failed)?;
            (image.kind.clone(), kept, image.ahead.take(), image.tcp_close, image.timers.clone())
        };
        let spare = match ahead {
            Some(ahead) => ahead.take().await,
            None => None,
        };
        let container = self.for_engine()?;
        let (woken, engine) = match &kind {
            ImageKind::Direct(image) => {
                let options = RestoreOptions {
                    kept,
                    tcp_close,
                    timeout: time_for(image.bytes()),
                    lazy: self.options.lazy(),
                    timers,
                    ..RestoreOptions::default()
                };
                let woken = self.restore_directly(&container, image, options, spare).await?;
                if let Err(error) = state_file::update(&self.state_file(), woken.pid) {
                    warn!(id = %self.id, %error, "runc does not know the new init process: the next exec tells it");
                }
                (woken, DIRECT)
            }
            ImageKind::Runc(image) => {
                let inherit = self.io.inherit().map_err(failed)?;
                let (namespace, id) = (self.namespace.as_str(), self.id.as_str());
                let spec_digest = container.spec_digest.as_str();
                image.give_up_finishing();
                image.verify(&Expected { namespace, container: id, spec_digest }).map_err(failed)?;
                // runc cannot be stopped before its container runs, so all pages are looked at first.
                image.check_in_background(Pages::All).outcome().await.map_err(failed)?;
                (self.restore_with_runc(image, &inherit, container.has_terminal).await?, RUNC)
            }
        };
        if let Err(error) = self.io.finish_restore(woken.console) {
            warn!(id = %self.id, %error, "its terminal has not the size that it should have");
        }
        self.lock().init = woken.init;
        self.hand_over().await;
        let mode = mode_name(kind.image().manifest().facts.mode);
        Ok(Restored { process: process::of(woken.pid, woken.exit), engine, mode })
    }

    async fn restore_directly(
        &self,
        container: &Container,
        image: &Image,
        mut options: RestoreOptions,
        spare: Option<Spare>,
    ) -> Result<Woken, RuntimeError> {
        match self.restore_once(container, image, &options, spare).await? {
            Ok(woken) => Ok(woken),
            Err(error) if error.is_lazy_refused() => {
                warn!(id = %self.id, %error, "a lazy restore failed: all memory is restored at once");
                options.lazy = None;
                self.restore_once(container, image, &options, None).await?.map_err(failed)
            }
            Err(error) => Err(failed(error)),
        }
    }

    async fn restore_once(
        &self,
        container: &Container,
        image: &Image,
        options: &RestoreOptions,
        spare: Option<Spare>,
    ) -> Result<Result<Woken, RestoreError>, RuntimeError> {
        let handover = Handover { inherit: self.to_inherit()?, spare };
        let mut hooks = ClaimInit { reaper: self.reaper.clone(), mark: Some(self.reaper.mark()), init: None };
        let restored =
            self.engine.restore(&self.namespace, container, image, options, handover, &mut hooks).await;
        let restored = match restored {
            Ok(restored) => restored,
            Err(error) => return Ok(Err(error)),
        };
        self.keep_fill(restored.fill);
        let (init, exit) =
            hooks.init.ok_or_else(|| failed("CRIU restored it without telling of its init process"))?;
        Ok(Ok(Woken { pid: restored.pid, init, exit, console: restored.console }))
    }

    /// Keeps what is to come of the memory, and says in the log what became of it.
    fn keep_fill(&self, fill: Result<Fill, Eager>) {
        let id = self.id.clone();
        let fill = match fill {
            Ok(fill) => Some(fill),
            Err(eager) => {
                info!(%id, reason = %eager, "all memory was restored before it ran");
                None
            }
        };
        self.lock().fill.clone_from(&fill);
        let Some(mut fill) = fill else { return };
        tokio::spawn(async move {
            // Of a failure the actor says why.
            if let Ok(report) = fill.complete().await {
                info!(
                    %id,
                    ms = report.resident.as_millis(),
                    bytes = report.bytes,
                    faults = report.faults,
                    prefetched = report.prefetched_bytes,
                    absent = report.absent_bytes,
                    "all memory is there"
                );
            }
        });
    }

    /// Waits until all memory of the last wake is there: no dump may be without a part of it, and a reclaim
    /// would only push out what has come.
    pub(super) async fn complete_fill(&self) -> Result<(), RuntimeError> {
        let fill = self.lock().fill.clone();
        if let Some(mut fill) = fill {
            fill.hurry();
            fill.complete().await.map_err(failed)?;
        }
        Ok(())
    }

    /// Why the memory of the last wake could not be brought, when that is known.
    pub(super) async fn failed_fill(&self) -> Option<String> {
        let mut fill = self.lock().fill.clone()?;
        fill.complete().await.err().map(|error| error.to_string())
    }

    /// Waits until a pager of a container that has ended has ended too.
    pub(super) async fn await_end_of_fill(&self) {
        let fill = self.lock().fill.take();
        if let Some(mut fill) = fill {
            let _ = tokio::time::timeout(FILL_END, fill.complete()).await;
        }
    }

    /// Gives the clients that came in its sleep to the agent, which is awake.
    async fn hand_over(&self) {
        let Some(listeners) = self.lock().listeners.take() else { return };
        let pids = self.cgroup.procs().unwrap_or_default();
        if let Err(error) = tokio::task::spawn_blocking(move || listeners.hand_over(&pids)).await {
            warn!(id = %self.id, %error, "clients that came in its sleep may be lost");
        }
    }

    /// Completes when a client waits for the sleeping agent.
    pub(super) async fn client(&self) {
        let listeners = self.lock().listeners.clone();
        match listeners {
            Some(listeners) => {
                let address = listeners.waiting().await;
                info!(id = %self.id, address, "a client waits for the sleeping agent");
            }
            None => std::future::pending().await,
        }
    }

    pub(super) fn state_file(&self) -> std::path::PathBuf {
        state_file::path(&self.options.runc_root, &self.namespace, &self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_memory_is_given_more_time() {
        assert_eq!(time_for(0), LEAST_TIME);
        assert_eq!(time_for(100 << 30), LEAST_TIME + Duration::from_secs(5120));
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_that_hangs_is_given_up_for_whoever_needs_the_agent_and_in_any_case() {
        let hangs = || std::future::pending::<Result<(), RuntimeError>>();
        let veto = Veto::default();
        assert_eq!(while_frozen(&veto, async { Ok(7) }).await.ok(), Some(7));
        assert!(matches!(while_frozen(&veto, hangs()).await, Err(RuntimeError::Failed(_))));
        veto.raise();
        assert!(matches!(while_frozen(&veto, hangs()).await, Err(RuntimeError::Vetoed)));
    }

    #[test]
    fn a_full_disk_is_told_from_other_trouble() {
        let full = image::Error::Full { path: "/images".into(), free: 1, needed: None };
        assert!(matches!(store_error(&full), RuntimeError::ResourceExhausted(_)));
        let readonly = image::Error::ReadOnly("/images".into());
        assert!(matches!(store_error(&readonly), RuntimeError::FailedPrecondition(_)));
    }
}
