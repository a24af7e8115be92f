//! Dumping.
//!
//! The order is what keeps an agent from being lost: freeze; CRIU writes; the manifest completes the image; the caller
//! has the last word; only then does CRIU kill. Between the last word and the end the cgroup is frozen again, so that
//! even when CRIU dies in the middle of the kill nothing has run past the image.
//!
//! CRIU works inside the container's namespaces when nothing speaks against it (see [`super::mode`]). When it fails there
//! for a reason that is not known, it tries once more outside, on the same frozen processes.

use std::{
    collections::HashSet,
    os::fd::{AsFd, AsRawFd},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use rustix::{process::Pid, thread::LinkNameSpaceType};

use super::{
    DEATH_TIMEOUT, DumpHooks, Engine, Failure, NETWORK_KEY, Timers, elapse, ext_mounts, freezer, ghosts,
    memory::{self, Memory},
    mode::{ClassicReason, Look},
    namespaces::{self, Kept, Kind},
    predump, request, restart,
};
use crate::{
    cgroup::{self, Cgroup},
    container::{self, Blocker, Container, Namespace},
    criu::{
        self, Event, HookError, Launch, NotifyHooks, Session,
        rpc::{Criu_req, Criu_req_type},
    },
    image::{self, Facts, ImageWriter, Mode, Outside, Revoker},
    procfs,
    waits::TimedWait,
};

const LOG: &str = "dump.log";

/// How a dump is to be made.
#[derive(Debug, Clone)]
pub struct DumpOptions {
    /// The processes run on after the dump. The image is then of the classic mode.
    pub leave_running: bool,
    /// Where CRIU is to work. Inside the container's namespaces it works only when nothing speaks against it.
    pub mode: Mode,
    /// How much the container's memory file systems may hold, in bytes and in all, to live on in memory while it sleeps.
    /// The largest ones go into the image until the rest is within the limit.
    pub memory_limit: u64,
    /// Established TCP connections are closed; without it they make the dump fail.
    pub tcp_close: bool,
    /// File locks are dumped; without it they make the dump fail.
    pub file_locks: bool,
    /// The largest deleted file that is dumped, in bytes.
    pub ghost_limit: u32,
    /// How long the processes may take to stand still.
    pub freeze_timeout: Duration,
    /// How long CRIU may take. Grows with the memory of the container: about half a second a GiB on a fast disk.
    pub timeout: Duration,
    /// How much CRIU logs: 2 for errors and warnings, 4 for everything.
    pub log_level: u8,
    /// What its threads wait for until a time, as far as the caller knows.
    pub waits: Vec<TimedWait>,
}

impl Default for DumpOptions {
    fn default() -> DumpOptions {
        DumpOptions {
            leave_running: false,
            mode: Mode::PodNamespaces,
            memory_limit: 16 * 1024 * 1024,
            tcp_close: false,
            file_locks: true,
            ghost_limit: 64 * 1024 * 1024,
            freeze_timeout: Duration::from_secs(2),
            timeout: Duration::from_mins(1),
            log_level: 2,
            waits: Vec::new(),
        }
    }
}

/// What a dump came to.
#[derive(Debug, Default)]
pub struct DumpReport {
    /// From the call to the end.
    pub total: Duration,
    /// How long the processes stood still before they were killed, or ran on.
    pub stopped: Duration,
    /// The bytes of the image.
    pub image_bytes: u64,
    /// What descriptors 0, 1 and 2 of the first process were: a restore needs something in place of each pipe.
    pub stdio: [Option<String>; 3],
    /// Where CRIU worked.
    pub mode: Mode,
    /// Why it was not inside the container's namespaces.
    pub classic_because: Option<ClassicReason>,
    /// The memory that file systems hold while the container sleeps, in bytes.
    pub memory_bytes: u64,
    /// What must be kept open until the restore.
    pub kept: Kept,
    /// What is due in it, where that could be read.
    pub timers: Option<Timers>,
}

/// Why there is no image. In each case the processes run on as before.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// There is nothing to dump.
    #[error("process {0} does not run in the container's cgroup")]
    NotRunning(Pid),
    /// A look at the container showed that it must not be tried.
    #[error("the container cannot be dumped now: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Blocked(Vec<Blocker>),
    /// The container could not be looked at.
    #[error(transparent)]
    Container(#[from] container::Error),
    /// The cgroup could not be frozen or thawed.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// The image could not be described.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// It is not known which deleted files the processes have open: a restore could leave them behind.
    #[error("the image's list of open files cannot be read, so it was discarded: {0}")]
    Files(std::io::Error),
    /// The caller's hook called it off.
    #[error("the dump was called off: {0}")]
    Vetoed(HookError),
    /// CRIU failed. When it was killed from outside in the middle of its work, a process may have ended with it.
    #[error("the dump failed: {0}")]
    Criu(Failure),
    /// CRIU did not come to an end.
    #[error("the dump was given up after {} s: {}", .after.as_secs(), reason.as_ref().map_or_else(|| "no reason in CRIU's log".to_owned(), ToString::to_string))]
    Timeout {
        /// How long it was waited for.
        after: Duration,
        /// What CRIU's log says.
        reason: Option<criu::log::Reason>,
    },
}

impl Engine {
    /// Dumps the container whose first process is `init` into `writer`'s image. The cgroup may be frozen or not. After
    /// success no process is left in the cgroup (unless they are to run on), which stays, thawed.
    ///
    /// # Errors
    /// See [`DumpError`]; on every one of them the processes run on, thawed, and the image is revoked. When the future
    /// is dropped, the same happens in the background, as soon as CRIU has let go of them: in the time of a dump at most.
    pub async fn dump(
        &self,
        container: &Container,
        init: Pid,
        writer: &ImageWriter,
        options: &DumpOptions,
        hooks: &mut dyn DumpHooks,
    ) -> Result<DumpReport, DumpError> {
        let started = Instant::now();
        if !procfs::alive(init) || !container.cgroup.procs()?.contains(&init) {
            return Err(DumpError::NotRunning(init));
        }
        let mut attempt = Attempt {
            cgroup: container.cgroup.clone(),
            session: None,
            patience: options.timeout.saturating_add(DEATH_TIMEOUT),
            may_kill: false,
            revoker: Some(writer.revoker()),
            in_background: false,
        };
        let job = Job { container, init, writer, options, mounts: &[] };
        let mut report = DumpReport::default();
        let mut frozen = started;
        if let Err(error) = self.freeze_and_dump(&mut attempt, &job, hooks, &mut frozen, &mut report).await {
            match attempt.settle().await {
                End::RunsOn => {
                    // As for a second try, should the caller make one.
                    if let Err(error) = writer.remove_parent() {
                        tracing::warn!(%error, "what was written in advance stays for now");
                    }
                    return Err(error);
                }
                End::Dead => tracing::warn!(%error, "CRIU failed while it killed what it had dumped"),
            }
        }
        attempt.revoker = None;
        let end = if options.leave_running { Ok(()) } else { empty(&container.cgroup).await };
        // The image is whole, so this is no failure of the dump.
        if let Err(error) = end.and(container.cgroup.thaw().await) {
            tracing::error!(%error, "the cgroup is not as it should be after a dump");
        }
        report.stopped = frozen.elapsed();
        report.total = started.elapsed();
        Ok(report)
    }

    /// From the freeze to CRIU's success, inside the container's namespaces or outside.
    async fn freeze_and_dump(
        &self,
        attempt: &mut Attempt,
        job: &Job<'_>,
        hooks: &mut dyn DumpHooks,
        frozen: &mut Instant,
        report: &mut DumpReport,
    ) -> Result<(), DumpError> {
        let Job { container, init, writer, options, .. } = *job;
        container.freeze(options.freeze_timeout).await?;
        *frozen = Instant::now();
        let look = Look::take(init, &container.cgroup.procs()?);
        let look = look.map_err(|source| container::Error::Process { pid: init, source })?;
        let mounts = container.live_mounts(init)?;
        let job = &Job { mounts: &mounts, ..*job };
        let mut blockers = container.blockers_with(init, &mounts)?;
        blockers.extend(look.stray());
        if !blockers.is_empty() {
            return Err(DumpError::Blocked(blockers));
        }
        report.classic_because = against_pod_namespaces(&look, options);
        if report.classic_because.is_none() {
            let error = match self.try_dump(attempt, job, Mode::PodNamespaces, hooks, *frozen, report).await {
                Err(error) if error.is_unexplained() && attempt.lets_go_again().await => error,
                outcome => return outcome,
            };
            tracing::warn!(container = container.id, %error, "the dump is tried again outside the container's namespaces");
            writer.clear()?;
            // CRIU has forgotten what was written since: to this dump all would be as in the parent.
            writer.remove_parent()?;
            report.classic_because = Some(ClassicReason::Failed(error.to_string()));
        }
        self.try_dump(attempt, job, Mode::Classic, hooks, *frozen, report).await
    }

    /// From the start of CRIU to its success.
    async fn try_dump(
        &self,
        attempt: &mut Attempt,
        job: &Job<'_>,
        mode: Mode,
        hooks: &mut dyn DumpHooks,
        frozen: Instant,
        report: &mut DumpReport,
    ) -> Result<(), DumpError> {
        let Job { container, init, writer, options, .. } = *job;
        let look = |source| container::Error::Process { pid: init, source };
        report.mode = mode;
        report.stdio = procfs::stdio_keys(init).map_err(look)?;
        let plan = match mode {
            Mode::PodNamespaces => Plan::inside(job).map_err(look)?,
            Mode::Classic => Plan::outside(job).map_err(look)?,
        };
        let thaws = freezer::is_ours(container);
        let mut request = prepare(job, &plan);
        if !thaws {
            let path = container.cgroup.path().to_string_lossy().into_owned();
            request.opts.mut_or_insert_default().set_freeze_cgroup(path);
        }
        let failed = |error| DumpError::Criu(Failure::new(error, writer.work_dir(), LOG));

        let _writeback = writer.bound_dirty_pages();
        let launch = Launch { join: plan.join, ..Launch::new(&self.criu) };
        let session = attempt.session.insert(Session::start(&*self.spawner, launch).map_err(failed)?);
        let mut notify = Notify {
            writer,
            cgroup: &container.cgroup,
            options,
            facts: Facts {
                spec_digest: container.spec_digest.clone(),
                init_pid: init.as_raw_nonzero().get(),
                cgroup: container.cgroup.path().to_string_lossy().into_owned(),
                stdio: report.stdio.clone(),
                stopped_us: 0,
                mode,
                outside: plan.outside,
                versions: self.versions.clone(),
            },
            frozen,
            may_kill: &mut attempt.may_kill,
            hooks,
            image_bytes: 0,
            refusal: None,
            thaws,
            timers: None,
        };
        let outcome = tokio::time::timeout(options.timeout, session.request(&request, &mut notify)).await;
        report.image_bytes = notify.image_bytes;
        report.timers = notify.timers;
        report.memory_bytes = plan.memory.bytes;
        report.kept = plan.kept;
        match (outcome, notify.refusal) {
            (Ok(Ok(_)), _) => {}
            (Ok(Err(_)), Some(refusal)) => return Err(refusal),
            (Ok(Err(error)), None) => {
                let failure = Failure::new(error, writer.work_dir(), LOG);
                // On a full disk there is no room for the reason in CRIU's log either.
                if !failure.is_explained() {
                    writer.check_space()?;
                }
                return Err(DumpError::Criu(failure));
            }
            (Err(_elapsed), _) => {
                let reason = criu::log::read_reason(writer.work_dir(), LOG).unwrap_or_default();
                return Err(DumpError::Timeout { after: options.timeout, reason });
            }
        }
        if let Some(session) = attempt.session.take() {
            let _ = session.finish().await;
        }
        if let Some(kept) = &report.kept.mounts
            && let Err(error) = memory::let_go(kept.as_fd(), &plan.memory)
        {
            tracing::warn!(container = container.id, %error, "what was dumped of memory file systems stays in memory, too");
        }
        Ok(())
    }
}

impl DumpError {
    /// Whether CRIU failed by itself, and it is not known why.
    fn is_unexplained(&self) -> bool {
        matches!(self, DumpError::Criu(failure @ Failure { error: criu::Error::Failed { .. }, .. }) if !failure.is_explained())
    }
}

/// What is to be dumped, where to, and how.
#[derive(Clone, Copy)]
struct Job<'a> {
    container: &'a Container,
    init: Pid,
    writer: &'a ImageWriter,
    options: &'a DumpOptions,
    /// Where its volumes and masked files are, see [`Container::live_mounts`].
    mounts: &'a [(String, String)],
}

/// What speaks against working inside the container's namespaces.
fn against_pod_namespaces(look: &Look, options: &DumpOptions) -> Option<ClassicReason> {
    if options.leave_running {
        return Some(ClassicReason::LeavesRunning);
    }
    if options.mode == Mode::Classic {
        return Some(ClassicReason::Asked);
    }
    look.against()
}

/// What CRIU does not dump, and where it works.
#[derive(Default)]
struct Plan {
    /// The namespaces that it joins.
    join: Vec<(rustix::fd::OwnedFd, LinkNameSpaceType)>,
    /// The network namespace that is neither dumped nor joined.
    network: Option<u64>,
    memory: Memory,
    outside: Outside,
    kept: Kept,
}

impl Plan {
    /// Inside all of the container's namespaces that CRIU can work in.
    fn inside(job: &Job<'_>) -> std::io::Result<Plan> {
        let Job { container, init, options, mounts: live, .. } = *job;
        let mut plan = Plan::default();
        for kind in Kind::ALL {
            let namespace = kind.of(&container.namespaces);
            if *namespace == Namespace::Inherited {
                continue;
            }
            let opened = namespaces::open(init, kind.name())?;
            plan.outside.namespaces.insert(kind.name().to_owned(), namespaces::number(&opened)?);
            if *namespace == Namespace::Private {
                kind.keep(&mut plan.kept, opened.try_clone()?);
            }
            plan.join.push((opened, kind.link()));
        }
        let volumes = live.iter().filter(|(_, name)| name != container::MASKED);
        let volumes: HashSet<String> = volumes.map(|(mount_point, _)| mount_point.clone()).collect();
        plan.memory = Memory::survey(init, &volumes, options.memory_limit)?;
        plan.outside.mounts.clone_from(&plan.memory.kept);
        let mounts = namespaces::open(init, "mnt")?;
        plan.outside.namespaces.insert("mnt".to_owned(), namespaces::number(&mounts)?);
        plan.kept.mounts = Some(mounts);
        Ok(plan)
    }

    /// In the container's cgroup namespace alone, as at the restore.
    fn outside(job: &Job<'_>) -> std::io::Result<Plan> {
        let Job { container, init, .. } = *job;
        let mut plan = Plan::default();
        if container.namespaces.cgroup != Namespace::Inherited {
            plan.join.push((namespaces::open(init, Kind::Cgroup.name())?, Kind::Cgroup.link()));
        }
        let network = procfs::namespace(init, "net")?;
        if network != procfs::namespace(rustix::process::getpid(), "net")? {
            plan.network = Some(network);
            if container.namespaces.network == Namespace::Private {
                plan.kept.network = Some(namespaces::open(init, "net")?);
            }
        }
        Ok(plan)
    }

    /// The external mounts for CRIU: pairs of mount point and name.
    fn external_mounts(&self, live: &[(String, String)]) -> Vec<(String, String)> {
        let kept = self.memory.kept.iter().enumerate();
        let mut mounts: Vec<_> =
            kept.map(|(at, mount)| (mount.mount_point.clone(), memory::name(at))).collect();
        // A masked file may be a mount of the container's own /dev, which lives on.
        let is_new = |point: &String| self.memory.kept.iter().all(|kept| kept.mount_point != *point);
        mounts.extend(live.iter().filter(|(point, _)| is_new(point)).cloned());
        mounts
    }
}

/// The request for a dump.
fn prepare(job: &Job<'_>, plan: &Plan) -> Criu_req {
    let Job { container, init, writer, options, mounts } = *job;
    let mut request = request(Criu_req_type::DUMP, LOG, options.log_level);
    let opts = request.opts.mut_or_insert_default();
    // It bounds the time that CRIU takes to stop the processes, and nothing else.
    let seconds = options.freeze_timeout.as_secs().saturating_add(1);
    opts.set_timeout(u32::try_from(seconds).unwrap_or(u32::MAX));
    opts.set_pid(init.as_raw_nonzero().get());
    opts.set_images_dir_fd(writer.images_dir().as_raw_fd());
    opts.set_work_dir_fd(writer.work_dir().as_raw_fd());
    opts.set_root(container.rootfs.to_string_lossy().into_owned());
    opts.set_leave_running(options.leave_running);
    opts.set_tcp_close(options.tcp_close);
    opts.set_file_locks(options.file_locks);
    opts.set_link_remap(true);
    opts.set_ghost_limit(options.ghost_limit);
    if writer.has_parent() {
        opts.set_parent_img(image::FROM_IMAGES.to_owned());
        // Without it CRIU links the parent and then writes everything all the same.
        opts.set_track_mem(true);
    }
    opts.ext_mnt = ext_mounts(plan.external_mounts(mounts));
    if let Some(network) = plan.network {
        opts.external.push(format!("net[{network}]:{NETWORK_KEY}"));
    }
    request
}

/// Sees to it that nothing is left in a cgroup whose processes were dumped.
async fn empty(cgroup: &Cgroup) -> Result<(), cgroup::Error> {
    if cgroup.wait_unpopulated(Duration::from_secs(1)).await.is_ok() {
        return Ok(());
    }
    cgroup.kill()?;
    cgroup.wait_unpopulated(DEATH_TIMEOUT).await
}

/// What became of the processes of a dump that went wrong.
enum End {
    /// They run on.
    RunsOn,
    /// CRIU was free to kill: they are dead, and the image is the agent now.
    Dead,
}

/// What must be put right when a dump goes wrong or is given up.
struct Attempt {
    cgroup: Cgroup,
    session: Option<Session>,
    /// How long CRIU may take to let go of the processes.
    patience: Duration,
    /// The image is complete, the processes are frozen, and CRIU is free to kill them.
    may_kill: bool,
    /// `None` once there is nothing to put right.
    revoker: Option<Revoker>,
    in_background: bool,
}

impl Attempt {
    /// Whether CRIU has let go of the processes as it found them, all of them frozen, so that it can be started again.
    async fn lets_go_again(&mut self) -> bool {
        if let Some(session) = self.session.as_mut() {
            let _ = session.hang_up(self.patience).await;
            self.session = None;
        }
        !self.may_kill && self.cgroup.is_frozen().unwrap_or(false)
    }

    /// Ends CRIU, but never by force while it may hold the processes: one that dies with its code in them can take
    /// them along. It is told by hanging up, and lets go of them when it next wants a word, at the end of its work at
    /// the latest. When it was free to kill, what is left of the processes follows; otherwise they run on and the
    /// image is void. May be
    /// broken off and called again.
    async fn settle(&mut self) -> End {
        if let Some(session) = self.session.as_mut() {
            let _ = session.hang_up(self.patience).await;
            self.session = None;
        }
        // Whether a process was killed cannot be seen: one that CRIU has sent SIGKILL may look alive a while longer. All
        // of them stand still since before the last word, so the image is the agent as it is.
        if self.may_kill {
            let _ = self.cgroup.kill();
            if let Err(error) = empty(&self.cgroup).await {
                tracing::error!(%error, "what was dumped cannot be killed");
            }
            self.revoker = None;
            return End::Dead;
        }
        if let Some(revoker) = self.revoker.take() {
            revoker.remove();
        }
        if let Err(error) = self.cgroup.thaw().await {
            tracing::error!(%error, "the container could not be thawed after a dump that failed");
        }
        End::RunsOn
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if self.revoker.is_none() || self.in_background {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let mut rest = Attempt {
            cgroup: self.cgroup.clone(),
            session: self.session.take(),
            patience: self.patience,
            may_kill: self.may_kill,
            revoker: self.revoker.take(),
            in_background: true,
        };
        runtime.spawn(async move { rest.settle().await });
    }
}

/// Completes the image and asks the caller, while CRIU waits.
struct Notify<'a> {
    writer: &'a ImageWriter,
    cgroup: &'a Cgroup,
    options: &'a DumpOptions,
    facts: Facts,
    frozen: Instant,
    may_kill: &'a mut bool,
    hooks: &'a mut dyn DumpHooks,
    image_bytes: u64,
    refusal: Option<DumpError>,
    /// See [`freezer`].
    thaws: bool,
    timers: Option<Timers>,
}

impl Notify<'_> {
    async fn post_dump(&mut self) -> Result<(), DumpError> {
        if !self.options.leave_running {
            // Thawed when CRIU had every process in its grip, they are in that alone. Frozen again, they stand still even when it lets go of
            // them by dying.
            self.cgroup.freeze(self.options.freeze_timeout).await?;
        }
        let (images, work) = (self.writer.images_dir(), self.writer.work_dir());
        let again = restart::let_calls_go_on(images, work, LOG, &self.options.waits);
        let again = again.map_err(|source| image::Error::Io {
            action: "let sleeping system calls go on in",
            path: self.writer.path().to_owned(),
            source,
        })?;
        tracing::debug!(again, "system calls that go on after the restore");
        elapse::keep_periods(self.writer).map_err(|source| image::Error::Io {
            action: "let timers go on in",
            path: self.writer.path().to_owned(),
            source,
        })?;
        self.timers = Timers::read(self.writer, &self.options.waits)
            .inspect_err(|error| tracing::warn!(%error, "the timers of the image cannot be read"))
            .ok();
        if self.writer.has_parent()
            && let Err(error) = predump::let_parent_be_lazy(self.writer)
        {
            tracing::warn!(%error, "what was written in advance will be restored before the agent runs");
        }
        let early = elapse::let_remainders_be_early(self.writer, &self.options.waits);
        early.map_err(|source| image::Error::Io {
            action: "let what remains of waits be early in",
            path: self.writer.path().to_owned(),
            source,
        })?;
        let mut facts = self.facts.clone();
        facts.stopped_us = u64::try_from(self.frozen.elapsed().as_micros()).unwrap_or(u64::MAX);
        ghosts::check(self.writer.images_dir()).await.map_err(DumpError::Files)?;
        let manifest = self.writer.complete_in_background(facts).await?;
        self.image_bytes = manifest.files.iter().map(|file| file.size).sum();
        if !self.options.leave_running {
            self.hooks.before_kill().await.map_err(DumpError::Vetoed)?;
            *self.may_kill = true;
        }
        Ok(())
    }
}

#[async_trait]
impl NotifyHooks for Notify<'_> {
    async fn notify(&mut self, event: Event) -> Result<(), HookError> {
        let done = match event {
            Event::QueryExtFiles if self.thaws => self.cgroup.thaw().await.map_err(DumpError::from),
            Event::PostDump => self.post_dump().await,
            _ => Ok(()),
        };
        done.map_err(|refusal| {
            let words = refusal.to_string();
            self.refusal = Some(refusal);
            words.into()
        })
    }
}
