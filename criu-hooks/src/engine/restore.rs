//! Restoring.
//!
//! The image outlives every failure: what is changed in it for a restore is put back, and what a failed restore has made is
//! killed with its cgroup. So a restore can be tried again.

use std::{
    ffi::CString,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::ffi::OsStringExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use rustix::{process::Pid, thread::LinkNameSpaceType};

use super::{
    DEATH_TIMEOUT, Engine, Failure, NETWORK_KEY, RestoreHooks, Spare, Timers,
    elapse::{self, Remainders},
    ext_mounts,
    ghosts::Ghosts,
    memory::{self, Detached},
    namespaces::{self, Kept, Kind},
    oom::OomKills,
    request,
    rootfs::RootMount,
};
use crate::{
    cgroup::{self, Cgroup},
    container::{Container, Namespace},
    criu::{
        self, Event, HookError, Launch, NotifyHooks, Session,
        rpc::{Criu_req, Criu_req_type, Inherit_fd, Join_namespace},
    },
    image::{self, Claim, Expected, Image, Mode, Outside, PageCheck, PageMaps, Pages},
    pager::{self, Eager, Fill, FillError, LazyOptions, Place},
    procfs,
    spawn::{ExitFuture, Spawner},
};

const LOG: &str = "restore.log";

/// A descriptor that takes the place of one that the processes had.
#[derive(Debug)]
pub struct InheritFd {
    /// What it stands for: `pipe:[1234]`, or the path of a file without its leading slash.
    pub key: String,
    /// The descriptor.
    pub fd: OwnedFd,
}

/// What a restore uses up.
#[derive(Debug, Default)]
pub struct Handover {
    /// Stands in for pipes and files that the processes had from outside.
    pub inherit: Vec<InheritFd>,
    /// A CRIU that waits: from [`Engine::start_ahead`]. One that has ended or does not fit costs nothing but a start.
    pub spare: Option<Spare>,
}

impl From<Vec<InheritFd>> for Handover {
    fn from(inherit: Vec<InheritFd>) -> Handover {
        Handover { inherit, spare: None }
    }
}

/// How a restore is to be made.
#[derive(Debug)]
pub struct RestoreOptions {
    /// As at the dump.
    pub tcp_close: bool,
    /// As at the dump.
    pub file_locks: bool,
    /// Take files whose permissions have changed.
    pub skip_file_mode_check: bool,
    /// What was kept open since the dump: from [`super::DumpReport::kept`].
    pub kept: Kept,
    /// How long CRIU may take.
    pub timeout: Duration,
    /// How much CRIU logs: 2 for errors and warnings, 4 for everything.
    pub log_level: u8,
    /// Let the agent run before all of its memory is there.
    pub lazy: Option<LazyOptions>,
    /// Let the time pass for these that the container has slept: from [`super::DumpReport::timers`]. Without them its
    /// timers, waits and clocks go on where they were.
    pub timers: Option<Timers>,
}

impl Default for RestoreOptions {
    fn default() -> RestoreOptions {
        RestoreOptions {
            tcp_close: false,
            file_locks: true,
            skip_file_mode_check: true,
            kept: Kept::default(),
            timeout: Duration::from_mins(1),
            log_level: 2,
            lazy: None,
            timers: None,
        }
    }
}

/// A container that runs again.
#[derive(Debug)]
pub struct Restored {
    /// Its first process, a child of this process.
    pub pid: Pid,
    /// The new master of its terminal, when it had one.
    pub console: Option<OwnedFd>,
    /// From the call to the end.
    pub total: Duration,
    /// What is still to come of its memory, or why all of it is there.
    pub fill: Result<Fill, Eager>,
}

/// Why a container does not run again. The image is untouched, and nothing else is left.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The image is not as it was, or not the container's.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// The container's cgroup has processes already.
    #[error("the container already has processes in its cgroup {}", .0.display())]
    Running(PathBuf),
    /// The cgroup is gone or cannot be used.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// A volume is not there.
    #[error("{} cannot be mounted at {} of the container: {source}", path.display(), target.display())]
    Volume {
        /// The path on the host.
        path: PathBuf,
        /// Where it belongs.
        target: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A namespace to join is not there.
    #[error("the container's {name} namespace {} is gone: {source}", path.display())]
    Namespace {
        /// "net", "ipc", "uts" or "cgroup".
        name: &'static str,
        /// Where it was.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A namespace of the container's own was not kept.
    #[error("the container's {0} namespace was not kept open while it was asleep")]
    NamespaceLost(&'static str),
    /// A namespace to join is not the one in which the dump was made.
    #[error("the {0} namespace is not the one in which the container fell asleep")]
    OtherNamespace(&'static str),
    /// A deleted file that a process has open would be lost if this restore failed.
    #[error("a deleted file that has another name cannot be kept: {0}")]
    Ghosts(io::Error),
    /// A disk or a volume gives no answer.
    #[error("{} gave no answer for {} s: does its disk or its server hang?", path.display(), after.as_secs())]
    Hangs {
        /// What was looked at.
        path: PathBuf,
        /// How long it was waited for.
        after: Duration,
    },
    /// A memory file system cannot be shown again.
    #[error("a memory file system of the container cannot be mounted: {0}")]
    Memory(io::Error),
    /// The root file system cannot be made ready.
    #[error("cannot mount the root file system {}: {source}", path.display())]
    Rootfs {
        /// The root file system.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// CRIU could not be started before it is needed.
    #[error("CRIU cannot be started ahead: {0}")]
    Ahead(io::Error),
    /// CRIU failed, or a hook called it off.
    #[error("the restore failed: {0}")]
    Criu(Failure),
    /// Its memory could not be brought before anything ran, for which CRIU was killed.
    #[error("the memory of a lazy restore failed before anything ran: {0}")]
    Fill(FillError),
    /// The kernel killed it for want of memory.
    #[error(
        "the kernel killed the restore for want of memory ({}): raise the limit and wake it again; {error}",
        limit.map_or_else(|| "the container has no limit, its pod or the node has".to_owned(), |bytes| format!("memory.max is {bytes} bytes"))
    )]
    OutOfMemory {
        /// The container's own limit in bytes, when it has one.
        limit: Option<u64>,
        /// What came of it.
        error: Box<RestoreError>,
    },
    /// CRIU did not come to an end.
    #[error("the restore was given up after {} s: {}", .after.as_secs(), reason.as_ref().map_or_else(|| "no reason in CRIU's log".to_owned(), ToString::to_string))]
    Timeout {
        /// How long it was waited for.
        after: Duration,
        /// What CRIU's log says.
        reason: Option<criu::log::Reason>,
    },
}

impl RestoreError {
    /// Whether an eager restore may succeed where this lazy one did not.
    pub fn is_lazy_refused(&self) -> bool {
        match self {
            RestoreError::Criu(failure) => failure.is_caused_by(criu::log::Cause::Userfaultfd),
            RestoreError::Fill(_) => true,
            _ => false,
        }
    }
}

impl Engine {
    /// Restores `container`, of the containerd namespace `namespace`, from `image`. The first process becomes a
    /// child of this process, and is reaped by whoever reaps its children.
    ///
    /// # Errors
    /// See [`RestoreError`]; on every one of them nothing of the container runs and the image can be tried again. When
    /// the future is dropped, what was made is killed in the background: better not in the last milliseconds, when it
    /// may already have run.
    pub async fn restore(
        &self,
        namespace: &str,
        container: &Container,
        image: &Image,
        options: &RestoreOptions,
        handover: Handover,
        hooks: &mut dyn RestoreHooks,
    ) -> Result<Restored, RestoreError> {
        let started = Instant::now();
        image.give_up_finishing();
        if container.cgroup.populated()? {
            return Err(RestoreError::Running(container.cgroup.path().to_owned()));
        }
        container.cgroup.thaw().await?;
        let (maps, ghosts) = look(namespace, container, image, options).await?;
        let memory = memory_mounts(&image.manifest().facts.outside, &options.kept)?;
        let root = RootMount::new(&container.rootfs, &container.bundle)
            .map_err(|source| RestoreError::Rootfs { path: container.rootfs.clone(), source })?;
        let oom_kills = OomKills::count(&container.cgroup);
        let mut attempt = Attempt {
            cgroup: container.cgroup.clone(),
            spawner: Arc::clone(&self.spawner),
            ghosts,
            root: Some(root),
            session: None,
            dying: None,
            fill: None,
            created: None,
            resumed: false,
            failed: true,
            in_background: false,
        };
        let (fill, eager) = match self.start_fill(container, image, &maps, options) {
            Ok(fill) => (Some(fill), None),
            Err(eager) => (None, Some(eager)),
        };
        attempt.fill = fill;
        let result = self.try_restore(&mut attempt, container, image, options, handover, memory, hooks).await;
        match result {
            Ok((pid, console)) => {
                attempt.failed = false;
                attempt.root = None;
                on_volumes(&attempt.ghosts, Ghosts::finish).await;
                let fill = attempt.fill.take().ok_or(eager.unwrap_or(Eager::Off));
                Ok(Restored { pid, console, total: started.elapsed(), fill })
            }
            Err(error) => {
                let error = match attempt.settle().await {
                    // What CRIU says of it is only that it was killed. An altered image is one for eager restores, too.
                    Some(fill) if !attempt.resumed && matches!(error, RestoreError::Criu(_)) => {
                        tracing::debug!(%error, "CRIU's own words");
                        RestoreError::Fill(fill)
                    }
                    _ => error,
                };
                Err(oom_kills.explain(error))
            }
        }
    }

    /// A pager for a restore that can be lazy.
    fn start_fill(
        &self,
        container: &Container,
        image: &Image,
        maps: &PageMaps,
        options: &RestoreOptions,
    ) -> Result<Fill, Eager> {
        let lazy = options.lazy.as_ref().ok_or(Eager::Off)?;
        pager::consider(lazy, maps, &container.cgroup)?;
        let sums = Claim::open(image).map_err(|error| Eager::Pager(io::Error::other(error)))?;
        let place = Place {
            images: image.images_dir(),
            work: image.work_dir(),
            store: image.container_dir(),
            generation: image.manifest().generation,
            sums,
            cgroup: &container.cgroup,
        };
        pager::start(place, lazy, &self.spawner).map_err(Eager::Pager)
    }

    /// From the mounted root file system to processes that run.
    #[allow(clippy::too_many_arguments)]
    async fn try_restore(
        &self,
        attempt: &mut Attempt,
        container: &Container,
        image: &Image,
        options: &RestoreOptions,
        handover: Handover,
        memory: Vec<Detached>,
        hooks: &mut dyn RestoreHooks,
    ) -> Result<(Pid, Option<OwnedFd>), RestoreError> {
        let mut launch = Launch::new(&self.criu);
        launch.cgroup = Some(&container.cgroup);
        launch.new_mount_namespace = true;
        let mut request = request(Criu_req_type::RESTORE, LOG, options.log_level);
        let opts = request.opts.mut_or_insert_default();
        let edition = elapse::edition(image, options.timers.as_ref()).await;
        let remainders = Remainders::of(options.timers.as_ref().filter(|_| edition.is_some()));
        opts.set_images_dir_fd(image.images_dir().as_raw_fd());
        opts.set_work_dir_fd(image.work_dir().as_raw_fd());
        let mut mounts = container.mount_sources();
        if let Some(root) = &attempt.root {
            opts.set_root(root.root().to_string_lossy().into_owned());
            show(root, memory, &mut launch, &mut mounts).map_err(RestoreError::Memory)?;
        }
        opts.set_rst_sibling(true);
        opts.set_evasive_devices(true);
        opts.set_lazy_pages(attempt.fill.is_some());
        opts.set_tcp_close(options.tcp_close);
        opts.set_file_locks(options.file_locks);
        opts.set_skip_file_rwx_check(options.skip_file_mode_check);
        opts.ext_mnt = ext_mounts(mounts);
        let facts = &image.manifest().facts;
        match facts.mode {
            Mode::PodNamespaces => launch.join = join(container, &options.kept, &facts.outside)?,
            Mode::Classic => {
                launch.new_cgroup_namespace = container.namespaces.cgroup != Namespace::Inherited;
                join_namespaces(&mut request, &mut launch, container, options)?;
            }
        }
        let Handover { inherit, spare } = handover;
        let spare = match spare.filter(|spare| spare.fits(&facts.outside, &inherit)) {
            Some(spare) => spare.move_in(&container.cgroup).await,
            None => None,
        };
        for InheritFd { key, fd } in inherit {
            match spare.as_ref().and_then(|spare| spare.number(&key)) {
                Some(number) => name_inherited(&mut request, key, number),
                None => inherit_as(&mut request, &mut launch, key, fd),
            }
        }

        // Both go on beside CRIU: what it reads next is on its way, and what it has read is compared.
        let _readahead = image.readahead(&[])?;
        let lazy = attempt.fill.is_some();
        let check = image.check_in_background(if lazy { Pages::Eager } else { Pages::All });
        let failed = |error| RestoreError::Criu(Failure::new(error, image.work_dir(), LOG));
        let session = match spare {
            Some(spare) => spare.show(&launch.mounts).map_err(RestoreError::Memory)?,
            None => Session::start(&*self.spawner, launch).map_err(failed)?,
        };
        let session = attempt.session.insert(session);
        let mut notify = Notify {
            hooks,
            created: &mut attempt.created,
            resumed: &mut attempt.resumed,
            console: None,
            check: Some(check),
            refusal: None,
            remainders: Some((remainders, container.cgroup.clone())),
        };
        let outcome = tokio::time::timeout(options.timeout, session.request(&request, &mut notify)).await;
        let Notify { console, refusal, check, .. } = notify;
        if let Some(refusal) = refusal {
            return Err(RestoreError::Image(refusal));
        }
        let answered = match outcome {
            Ok(answered) => answered.map(|answer| Pid::from_raw(answer.restore.pid())),
            Err(_elapsed) if attempt.resumed => {
                Err(criu::Error::Protocol(format!("none within {} s", options.timeout.as_secs())))
            }
            Err(_elapsed) => {
                let reason = criu::log::read_reason(image.work_dir(), LOG).unwrap_or_default();
                return Err(RestoreError::Timeout { after: options.timeout, reason });
            }
        };
        let pid = match (answered, attempt.created.filter(|pid| attempt.resumed && procfs::alive(*pid))) {
            (Ok(Some(pid)), _) => pid,
            // It only failed to say so; to kill what runs again would be worse.
            (Err(error), Some(pid)) => {
                tracing::warn!(%error, "CRIU failed after it had restored the container");
                pid
            }
            (Err(error), None) => {
                // Pages that were altered may upset CRIU before the check comes to them.
                if let Some(mut check) = check {
                    check.outcome().await.map_err(RestoreError::Image)?;
                }
                return Err(failed(error));
            }
            (Ok(None), _) => {
                return Err(failed(criu::Error::Protocol("a restore without a process".to_owned())));
            }
        };
        // It is still in the container's cgroup: it must be gone before anybody counts the processes there.
        if let Some(session) = attempt.session.take() {
            let _ = session.finish().await;
        }
        Ok((pid, console))
    }
}

/// Looks at all that is on disks and volumes, before anything is made. They may hang, so it is done on another thread.
async fn look(
    namespace: &str,
    container: &Container,
    image: &Image,
    options: &RestoreOptions,
) -> Result<(PageMaps, Arc<Ghosts>), RestoreError> {
    let place = Arc::new(Mutex::new(image.path().to_owned()));
    let (namespace, container, image) = (namespace.to_owned(), container.clone(), image.clone());
    let mounts = options.kept.mounts.as_ref().and_then(|mounts| mounts.try_clone().ok());
    let at = Arc::clone(&place);
    let looking = tokio::task::spawn_blocking(move || {
        let go_to = |path: &Path| path.clone_into(&mut at.lock().unwrap_or_else(PoisonError::into_inner));
        let Container { id, spec_digest, external_mounts, .. } = &container;
        let maps = image.verify(&Expected { namespace: &namespace, container: id, spec_digest })?;
        for external in external_mounts {
            go_to(&external.source);
            rustix::fs::stat(&external.source).map_err(|error| RestoreError::Volume {
                path: external.source.clone(),
                target: external.target.clone(),
                source: error.into(),
            })?;
        }
        // Without the list nothing that an earlier try left can be removed; mostly there is nothing.
        let ghosts = Ghosts::of(image.images_dir(), &container, mounts).unwrap_or_else(|error| {
            tracing::warn!(container = id, %error, "the image's list of open files cannot be read");
            Ghosts::default()
        });
        go_to(&container.rootfs);
        ghosts.prepare().map_err(RestoreError::Ghosts)?;
        Ok((maps, Arc::new(ghosts)))
    });
    match tokio::time::timeout(options.timeout, looking).await {
        Ok(looked) => looked.unwrap_or_else(|error| Err(RestoreError::Ghosts(io::Error::other(error)))),
        Err(_elapsed) => {
            let path = place.lock().unwrap_or_else(PoisonError::into_inner).clone();
            Err(RestoreError::Hangs { path, after: options.timeout })
        }
    }
}

/// Does `work` on another thread, and no longer than what is dead may take.
async fn on_volumes(ghosts: &Arc<Ghosts>, work: fn(&Ghosts)) {
    let at_work = Arc::clone(ghosts);
    let working = tokio::task::spawn_blocking(move || work(&at_work));
    if tokio::time::timeout(DEATH_TIMEOUT, working).await.is_err() {
        ghosts.give_up();
        tracing::error!("a volume hangs: names of deleted files may be left there");
    }
}

/// Copies of the mounts whose file systems have lived on.
fn memory_mounts(outside: &Outside, kept: &Kept) -> Result<Vec<Detached>, RestoreError> {
    let Some(&number) = outside.namespaces.get("mnt") else { return Ok(Vec::new()) };
    let kept = kept.mounts.as_ref().ok_or(RestoreError::NamespaceLost("mount"))?;
    if namespaces::number(kept).map_err(RestoreError::Memory)? != number {
        return Err(RestoreError::OtherNamespace("mount"));
    }
    memory::copies(kept.as_fd(), &outside.mounts).map_err(RestoreError::Memory)
}

/// Gives each of `memory` a place that only CRIU will see, and adds it to CRIU's `mounts`: pairs of name and source.
fn show(
    root: &RootMount,
    memory: Vec<Detached>,
    launch: &mut Launch<'_>,
    mounts: &mut Vec<(String, String)>,
) -> io::Result<()> {
    for (at, Detached { mount, is_directory }) in memory.into_iter().enumerate() {
        let name = memory::name(at);
        let place = root.place(&name, is_directory)?;
        mounts.push((name, place.to_string_lossy().into_owned()));
        launch.mounts.push((mount, CString::new(place.into_os_string().into_vec())?));
    }
    Ok(())
}

/// The namespaces in which the dump was made, for CRIU to work in.
pub(super) fn join(
    container: &Container,
    kept: &Kept,
    outside: &Outside,
) -> Result<Vec<(OwnedFd, LinkNameSpaceType)>, RestoreError> {
    let mut join = Vec::new();
    for kind in Kind::ALL {
        let name = kind.name();
        let opened = match kind.of(&container.namespaces) {
            Namespace::Inherited => continue,
            Namespace::Private => {
                let clone = kind.kept(kept).and_then(|kept| kept.try_clone().ok());
                clone.ok_or(RestoreError::NamespaceLost(name))?
            }
            Namespace::Joined(path) => namespaces::open_path(path)
                .map_err(|source| RestoreError::Namespace { name, path: path.clone(), source })?,
        };
        let number = namespaces::number(&opened).ok();
        if number.is_none() || number != outside.namespaces.get(name).copied() {
            return Err(RestoreError::OtherNamespace(name));
        }
        join.push((opened, kind.link()));
    }
    Ok(join)
}

/// Has CRIU join the namespaces that it does not make.
fn join_namespaces(
    request: &mut Criu_req,
    launch: &mut Launch<'_>,
    container: &Container,
    options: &RestoreOptions,
) -> Result<(), RestoreError> {
    let gone = |name, path: &PathBuf| {
        let path = path.clone();
        move |source: io::Error| RestoreError::Namespace { name, path, source }
    };
    match &container.namespaces.network {
        Namespace::Inherited => {}
        Namespace::Joined(path) => {
            let opened = File::open(path).map_err(gone("net", path))?;
            inherit_as(request, launch, NETWORK_KEY.to_owned(), opened.into());
        }
        Namespace::Private => {
            let kept = options.kept.network.as_ref().and_then(|kept| kept.try_clone().ok());
            let kept = kept.ok_or(RestoreError::NamespaceLost("net"))?;
            inherit_as(request, launch, NETWORK_KEY.to_owned(), kept);
        }
    }
    for (name, namespace) in [("ipc", &container.namespaces.ipc), ("uts", &container.namespaces.uts)] {
        if let Namespace::Joined(path) = namespace {
            rustix::fs::stat(path).map_err(|error| gone(name, path)(error.into()))?;
            let mut join = Join_namespace::new();
            join.set_ns(name.to_owned());
            join.set_ns_file(path.to_string_lossy().into_owned());
            request.opts.mut_or_insert_default().join_ns.push(join);
        }
    }
    Ok(())
}

/// Hands a descriptor to CRIU under a key.
fn inherit_as(request: &mut Criu_req, launch: &mut Launch<'_>, key: String, fd: OwnedFd) {
    name_inherited(request, key, fd.as_raw_fd());
    launch.inherit.push(fd);
}

/// Tells CRIU what its descriptor `number` is.
fn name_inherited(request: &mut Criu_req, key: String, number: RawFd) {
    let mut inherit = Inherit_fd::new();
    inherit.set_key(key);
    inherit.set_fd(number);
    request.opts.mut_or_insert_default().inherit_fd.push(inherit);
}

/// What must be put right when a restore goes wrong or is given up.
struct Attempt {
    cgroup: Cgroup,
    spawner: Arc<dyn Spawner>,
    /// Undone when it goes wrong.
    ghosts: Arc<Ghosts>,
    /// Unmounted when this is dropped, in any case.
    root: Option<RootMount>,
    session: Option<Session>,
    dying: Option<ExitFuture>,
    /// Of a lazy restore.
    fill: Option<Fill>,
    /// The first process, once there is one.
    created: Option<Pid>,
    /// CRIU's work was done, and it was about to let the processes go. All of them stand still at the end of their restore
    /// then, so they go on also when CRIU ends: the kernel lets go of them as CRIU would.
    resumed: bool,
    failed: bool,
    in_background: bool,
}

impl Attempt {
    /// Kills CRIU and all that it has made; why the fill had failed before, if it had. May be broken off and called again.
    async fn settle(&mut self) -> Option<FillError> {
        // What exists already must not run, not even while CRIU ends; and it is easier to count.
        let _ = self.cgroup.freeze_now();
        if let Some(session) = self.session.take() {
            self.dying = session.kill();
        }
        if let Some(dying) = self.dying.as_mut() {
            let _ = tokio::time::timeout(DEATH_TIMEOUT, dying).await;
            self.dying = None;
        }
        self.adopt();
        let gone = match self.cgroup.kill() {
            Ok(()) => self.cgroup.wait_unpopulated(DEATH_TIMEOUT).await,
            Err(error) => Err(error),
        };
        if let Err(error) = gone {
            tracing::error!(%error, "what a failed restore had made cannot be killed");
        }
        let _ = self.cgroup.thaw_now();
        on_volumes(&self.ghosts, Ghosts::undo).await;
        let failed = match self.fill.take() {
            Some(fill) => fill.abandon().await,
            None => None,
        };
        self.root = None;
        self.failed = false;
        failed
    }

    /// Has the first process reaped when it ends, known or not: CRIU makes it a child of this process.
    fn adopt(&mut self) {
        let me = rustix::process::getpid().as_raw_nonzero().get();
        let mut ours = self.cgroup.own_procs().unwrap_or_default();
        ours.retain(|pid| procfs::stat(*pid).is_ok_and(|stat| stat.ppid == me));
        if let Some(created) = self.created.take().filter(|created| !ours.contains(created)) {
            ours.push(created);
        }
        for pid in ours {
            self.spawner.adopt(pid);
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if !self.failed {
            return;
        }
        let _ = self.cgroup.freeze_now();
        self.dying = self.session.take().and_then(Session::kill);
        let runtime = tokio::runtime::Handle::try_current();
        let (Ok(runtime), false) = (runtime, self.in_background) else {
            let _ = self.cgroup.kill();
            let _ = self.cgroup.thaw_now();
            return;
        };
        let mut rest = Attempt {
            cgroup: self.cgroup.clone(),
            spawner: Arc::clone(&self.spawner),
            ghosts: Arc::clone(&self.ghosts),
            root: self.root.take(),
            session: None,
            dying: self.dying.take(),
            fill: self.fill.take(),
            created: self.created.take(),
            resumed: false,
            failed: true,
            in_background: true,
        };
        runtime.spawn(async move {
            rest.settle().await;
        });
    }
}

/// Passes CRIU's notifications on.
struct Notify<'a> {
    hooks: &'a mut dyn RestoreHooks,
    created: &'a mut Option<Pid>,
    resumed: &'a mut bool,
    console: Option<OwnedFd>,
    /// Until it has been heard.
    check: Option<PageCheck>,
    /// What the check has found.
    refusal: Option<image::Error>,
    /// Until they are written.
    remainders: Option<(Remainders, Cgroup)>,
}

#[async_trait]
impl NotifyHooks for Notify<'_> {
    async fn notify(&mut self, event: Event) -> Result<(), HookError> {
        match event {
            Event::SetupNamespaces { pid: Some(pid) } => {
                *self.created = Some(pid);
                self.hooks.created(pid).await
            }
            Event::OrphanPtsMaster { master } => {
                self.console = Some(master);
                Ok(())
            }
            // The last moment at which CRIU heeds a refusal.
            Event::PostRestore { pid: Some(pid) } => {
                if let Some(mut check) = self.check.take() {
                    match check.outcome().await {
                        Ok(bytes) => tracing::debug!(bytes, "pages are as they were dumped"),
                        Err(error) => {
                            let words = error.to_string();
                            self.refusal = Some(error);
                            return Err(words.into());
                        }
                    }
                }
                let remainders = self.remainders.take().filter(|(remainders, _)| !remainders.is_empty());
                if let Some((remainders, cgroup)) = remainders {
                    // Not later: its threads would take that memory for their own by then.
                    tokio::task::spawn_blocking(move || remainders.write(&cgroup)).await?;
                }
                self.hooks.before_resume(pid).await
            }
            Event::PreResume => {
                *self.resumed = true;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
