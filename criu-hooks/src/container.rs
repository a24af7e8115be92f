//! What CRIU has to know about a container, derived from its OCI specification.
//!
//! Everything here comes from the live bundle and the live processes, at the dump and again at the restore; nothing is
//! taken from an image. Annotations are not read at all, `org.criu.config` (which would let a tenant configure CRIU)
//! among them.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatFs, StatxAttributes, StatxFlags},
    io::Errno,
    process::Pid,
};

use crate::{
    cgroup::{self, Cgroup},
    image, procfs,
};

/// The longest `config.json` that is read, in bytes.
const MAX_SPEC: u64 = 16 * 1024 * 1024;

/// How long a process that was found in the middle of a `vfork` is left alone.
const FORK_PAUSE: Duration = Duration::from_millis(1);

/// The name under which masked files are known to CRIU.
pub(crate) const MASKED: &str = "masked";

/// What can be wrong with a container, as far as its dump goes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The specification cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The specification is not one.
    #[error("{} is not an OCI specification: {why}", path.display())]
    Invalid {
        /// The file, or the bundle.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The container is of a kind that is not checkpointed.
    #[error("a container with {0} cannot be checkpointed; use a shallower depth")]
    Unsupported(&'static str),
    /// A mount of the specification is not where it should be.
    #[error("the container's mount at {} is not there: it was unmounted or a link on the way was changed", .0.display())]
    MountLost(PathBuf),
    /// The process is gone or cannot be looked at.
    #[error("cannot look at process {pid} of the container: {source}")]
    Process {
        /// The process.
        pid: Pid,
        /// Why.
        source: io::Error,
    },
    /// The cgroup is gone, or its processes do not stand still.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// A process waits in `vfork` for a child that does not run its program. CRIU could not stop it.
    #[error("process {0} has started a child that does not get to run its program")]
    Forking(Pid),
}

/// A namespace of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Namespace {
    /// The host's, or whichever the runtime is in.
    Inherited,
    /// Made for the container, gone with it.
    Private,
    /// Joined, usually the sandbox's.
    Joined(PathBuf),
}

/// The namespaces that matter to a dump.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespaces {
    /// Network.
    pub network: Namespace,
    /// System V IPC and message queues.
    pub ipc: Namespace,
    /// Host name.
    pub uts: Namespace,
    /// Control groups.
    pub cgroup: Namespace,
}

/// A mount whose contents are not the container's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalMount {
    /// Where the specification puts it in the container.
    pub target: PathBuf,
    /// What is mounted, a path of the host.
    pub source: PathBuf,
}

/// What stands in the way of a dump, found before it is tried.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Blocker {
    /// A debugger is attached.
    #[error("process {pid} is traced by process {tracer}; detach the debugger")]
    Traced {
        /// The process.
        pid: Pid,
        /// Its tracer.
        tracer: Pid,
    },
    /// A process in the cgroup is no descendant of the container's first: an exec. It would be killed and lost.
    #[error("process {pid} ({comm}) was started beside the container's own, by an exec; wait until it ends")]
    Exec {
        /// The process.
        pid: Pid,
        /// Its name.
        comm: String,
    },
    /// A process is in a cgroup of its own, which a restore would not bring back.
    #[error("process {pid} is in a cgroup below the container's")]
    NestedCgroup {
        /// The process.
        pid: Pid,
    },
    /// A thread has left a namespace of its process, which a restore would not bring back: CRIU knows only the process's.
    #[error("thread {tid} of process {pid} is in another {namespace} namespace than its process")]
    StrayThread {
        /// The process.
        pid: Pid,
        /// The thread.
        tid: i32,
        /// `net`, `ipc`, `uts`, `cgroup` or `mnt`.
        namespace: &'static str,
    },
    /// A mount that the specification does not name and CRIU cannot remake.
    #[error("{fs_type} is mounted at {}, which the specification does not name", mount_point.display())]
    ForeignMount {
        /// Where.
        mount_point: PathBuf,
        /// What.
        fs_type: String,
    },
}

/// File systems that CRIU remakes, with or without their contents.
const REMADE: &[&str] = &[
    "binfmt_misc",
    "cgroup",
    "cgroup2",
    "debugfs",
    "devpts",
    "devtmpfs",
    "fusectl",
    "mqueue",
    "proc",
    "pstore",
    "securityfs",
    "sysfs",
    "tmpfs",
    "tracefs",
];

/// A container, as far as CRIU is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle: a directory that only this runtime uses.
    pub bundle: PathBuf,
    /// The mounted root file system, a path of the host.
    pub rootfs: PathBuf,
    /// Its control group.
    pub cgroup: Cgroup,
    /// The digest of its specification, see [`image::digest`].
    pub spec_digest: String,
    /// Volumes and the like, topmost ones only.
    pub external_mounts: Vec<ExternalMount>,
    /// Files that are hidden under `/dev/null`, and directories under an empty one.
    pub masked_paths: Vec<PathBuf>,
    /// Whether it has a terminal.
    pub has_terminal: bool,
    /// Its namespaces.
    pub namespaces: Namespaces,
}

impl Container {
    /// Reads the specification in `bundle` and derives the container from it.
    ///
    /// # Errors
    /// When it cannot be read or is not supported.
    pub fn load(id: &str, bundle: &Path, cgroup: Cgroup) -> Result<Container, Error> {
        let path = bundle.join("config.json");
        let mut bytes = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(MAX_SPEC).read_to_end(&mut bytes))
            .map_err(|source| Error::Read { path: path.clone(), source })?;
        let spec: Spec = serde_json::from_slice(&bytes)
            .map_err(|error| Error::Invalid { path: path.clone(), why: error.to_string() })?;
        Container::from_spec(id, bundle, &spec, image::digest(&bytes), cgroup)
    }

    /// Derives a container from its specification, as `runc checkpoint` and `runc restore` would. Pure: what the live
    /// container's mounts are is found out at the dump.
    ///
    /// # Errors
    /// When the specification lacks a part, or the container is of a kind that is not supported.
    pub fn from_spec(
        id: &str,
        bundle: &Path,
        spec: &Spec,
        spec_digest: String,
        cgroup: Cgroup,
    ) -> Result<Container, Error> {
        let invalid = |why: &str| Error::Invalid { path: bundle.to_owned(), why: why.to_owned() };
        let rootfs =
            spec.root().as_ref().map(|root| bundle.join(root.path())).ok_or_else(|| invalid("no root"))?;
        let linux = spec.linux().as_ref().ok_or_else(|| invalid("no part for Linux"))?;
        let namespace = |kind: LinuxNamespaceType| {
            let found = linux.namespaces().iter().flatten().find(|namespace| namespace.typ() == kind);
            match found.map(|namespace| namespace.path().clone().filter(|path| path != Path::new(""))) {
                None => Namespace::Inherited,
                Some(None) => Namespace::Private,
                Some(Some(path)) => Namespace::Joined(path),
            }
        };
        if namespace(LinuxNamespaceType::User) != Namespace::Inherited {
            return Err(Error::Unsupported("a user namespace"));
        }
        if namespace(LinuxNamespaceType::Time) != Namespace::Inherited {
            return Err(Error::Unsupported("a time namespace of its own"));
        }
        if namespace(LinuxNamespaceType::Pid) != Namespace::Private {
            return Err(Error::Unsupported("the process ids of the host or of its sandbox"));
        }
        if namespace(LinuxNamespaceType::Mount) != Namespace::Private {
            return Err(Error::Unsupported("a mount namespace that is not its own"));
        }
        let masked = linux.masked_paths().iter().flatten().map(PathBuf::from).collect();
        Ok(Container {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            rootfs,
            cgroup,
            spec_digest,
            external_mounts: external_mounts(spec.mounts().as_deref().unwrap_or_default(), bundle),
            masked_paths: masked,
            has_terminal: spec
                .process()
                .as_ref()
                .and_then(oci_spec::runtime::Process::terminal)
                .unwrap_or(false),
            namespaces: Namespaces {
                network: namespace(LinuxNamespaceType::Network),
                ipc: namespace(LinuxNamespaceType::Ipc),
                uts: namespace(LinuxNamespaceType::Uts),
                cgroup: namespace(LinuxNamespaceType::Cgroup),
            },
        })
    }

    /// Where the external mounts really are in the live container, and the name of each for CRIU: pairs of mount point
    /// and name. Names do not depend on the container's file system, so a restore needs nothing but the specification.
    ///
    /// # Errors
    /// [`Error::MountLost`] when one is not there.
    pub fn live_mounts(&self, init: Pid) -> Result<Vec<(String, String)>, Error> {
        let process = |source: io::Error| Error::Process { pid: init, source };
        let mounts = procfs::mounts(init).map_err(process)?;
        let root = Root::of(init).map_err(|error| process(error.into()))?;
        let mut found: Vec<(u64, String, String)> = Vec::new();
        for external in &self.external_mounts {
            let seen = root.mount_at(&external.target).map_err(|error| process(error.into()))?;
            let (id, _) = seen.ok_or_else(|| Error::MountLost(external.target.clone()))?;
            // Two targets may lead to one place through a link: the later mount is the one on top.
            found.retain(|(other, ..)| *other != id);
            found.push((id, String::new(), external.target.to_string_lossy().into_owned()));
        }
        for masked in &self.masked_paths {
            // A path that does not exist in this container, or is a directory, has no file mounted over it.
            if let Some((id, FileType::CharacterDevice)) =
                root.mount_at(masked).map_err(|error| process(error.into()))?
                && !found.iter().any(|(other, ..)| *other == id)
            {
                found.push((id, String::new(), MASKED.to_owned()));
            }
        }
        for (id, mount_point, name) in &mut found {
            let mount = mounts.iter().find(|mount| mount.id == *id);
            let mount = mount.ok_or_else(|| Error::MountLost(PathBuf::from(&*name)))?;
            *mount_point = mount.mount_point.to_string_lossy().into_owned();
        }
        Ok(found.into_iter().map(|(_, mount_point, name)| (mount_point, name)).collect())
    }

    /// The external mounts for a restore: pairs of name and source.
    pub fn mount_sources(&self) -> Vec<(String, String)> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let mut sources: Vec<_> = self
            .external_mounts
            .iter()
            .map(|external| (text(&external.target), text(&external.source)))
            .collect();
        sources.push((MASKED.to_owned(), "/dev/null".to_owned()));
        sources
    }

    /// Freezes the container at a moment at which it can be dumped. A process that waits in `vfork` counts as frozen, but
    /// CRIU could not stop it; such a wait usually lasts less than a millisecond, so it is let pass. Whoever does
    /// something between the freeze and the dump freezes by this: a dump then finds the container as it must be, and does
    /// not let it run for a moment in between. On failure the container runs on.
    ///
    /// # Errors
    /// [`Error::Cgroup`] when it does not stand still in time, [`Error::Forking`].
    pub async fn freeze(&self, timeout: Duration) -> Result<(), Error> {
        let started = Instant::now();
        loop {
            self.cgroup.freeze(timeout).await?;
            let Some(pid) = self.forking()? else { return Ok(()) };
            self.cgroup.thaw().await?;
            if started.elapsed() > timeout {
                return Err(Error::Forking(pid));
            }
            tokio::time::sleep(FORK_PAUSE).await;
        }
    }

    /// A process of the container, all of it frozen, that waits in `vfork`.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn forking(&self) -> Result<Option<Pid>, cgroup::Error> {
        let pids = self.cgroup.procs()?;
        Ok(pids.into_iter().find(|pid| procfs::is_forking(*pid).unwrap_or(false)))
    }

    /// What stands in the way of a dump of the live container, as far as a look at `/proc` shows. `init` is its first
    /// process. Best while it is frozen.
    ///
    /// # Errors
    /// When the container is gone.
    pub fn blockers(&self, init: Pid) -> Result<Vec<Blocker>, Error> {
        self.blockers_with(init, &self.live_mounts(init)?)
    }

    /// As [`Container::blockers`], with what [`Container::live_mounts`] has found.
    pub(crate) fn blockers_with(&self, init: Pid, live: &[(String, String)]) -> Result<Vec<Blocker>, Error> {
        let mut blockers = Vec::new();
        let own = self.cgroup.own_procs()?;
        for pid in self.cgroup.procs()? {
            // One that was born since the first look is in the second, when the processes run.
            if !own.contains(&pid) && procfs::alive(pid) && !self.cgroup.own_procs()?.contains(&pid) {
                blockers.push(Blocker::NestedCgroup { pid });
            }
            // One that ends meanwhile blocks nothing.
            if let Ok(Some(tracer)) = procfs::tracer(pid) {
                blockers.push(Blocker::Traced { pid, tracer });
            }
            if let Ok(Some(comm)) = exec_name(pid, init) {
                blockers.push(Blocker::Exec { pid, comm });
            }
        }
        let mounts = procfs::mounts(init).map_err(|source| Error::Process { pid: init, source })?;
        let external: Vec<_> = live.iter().map(|(mount_point, _)| mount_point.clone()).collect();
        blockers.extend(foreign_mounts(&mounts, &external));
        Ok(blockers)
    }
}

/// The bind mounts of a specification. Where several mounts have one target, only the last is visible: it decides.
fn external_mounts(mounts: &[Mount], bundle: &Path) -> Vec<ExternalMount> {
    let is_bind = |mount: &Mount| {
        let by_option = mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind");
        by_option || mount.typ().as_deref() == Some("bind")
    };
    let normal = |path: &Path| Path::new("/").join(path).components().collect::<PathBuf>();
    let is_hidden = |at: usize| {
        mounts[at + 1..].iter().any(|later| normal(later.destination()) == normal(mounts[at].destination()))
    };
    mounts
        .iter()
        .enumerate()
        .filter(|(at, mount)| is_bind(mount) && !is_hidden(*at))
        .filter_map(|(_, mount)| {
            let source = bundle.join(mount.source().as_ref()?);
            Some(ExternalMount { target: normal(mount.destination()), source })
        })
        .collect()
}

/// Mounts that CRIU could not remake.
fn foreign_mounts(mounts: &[procfs::Mount], external: &[String]) -> Vec<Blocker> {
    let is_external =
        |mount: &procfs::Mount| external.iter().any(|point| Path::new(point) == mount.mount_point);
    let is_remade = |mount: &procfs::Mount| {
        mount.mount_point == Path::new("/")
            || is_external(mount)
            || REMADE.contains(&mount.fs_type.as_str())
            // Another view of a file system that is there anyway.
            || mounts.iter().any(|other| {
                other.id != mount.id
                    && other.device == mount.device
                    && (other.mount_point == Path::new("/") || is_external(other))
                    && procfs::is_below(&mount.root, &other.root)
            })
    };
    let foreign = mounts.iter().filter(|mount| !is_remade(mount));
    foreign
        .map(|mount| Blocker::ForeignMount {
            mount_point: mount.mount_point.clone(),
            fs_type: mount.fs_type.clone(),
        })
        .collect()
}

/// The name of `pid` when it does not descend from `init`.
fn exec_name(pid: Pid, init: Pid) -> io::Result<Option<String>> {
    let comm = procfs::stat(pid)?.comm;
    let mut current = pid;
    while current != init {
        let parent = procfs::stat(current)?.ppid;
        match Pid::from_raw(parent) {
            Some(parent) if parent != Pid::INIT => current = parent,
            _ => return Ok(Some(comm)),
        }
    }
    Ok(None)
}

/// The root directory of a process.
pub(crate) struct Root(rustix::fd::OwnedFd);

impl Root {
    pub(crate) fn of(pid: Pid) -> rustix::io::Result<Root> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(CWD, format!("/proc/{pid}/root"), flags, Mode::empty()).map(Root)
    }

    /// The number of the mount whose root is at `path`, links followed as the process would, and what is there;
    /// `None` when there is no mount.
    fn mount_at(&self, path: &Path) -> rustix::io::Result<Option<(u64, FileType)>> {
        let Some(opened) = self.open(path)? else { return Ok(None) };
        let wanted = StatxFlags::TYPE | StatxFlags::MNT_ID;
        let stat = rustix::fs::statx(&opened, "", AtFlags::EMPTY_PATH, wanted)?;
        let is_root = stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        Ok(is_root.then(|| (stat.stx_mnt_id, FileType::from_raw_mode(stat.stx_mode.into()))))
    }

    /// The number of the mount in which `path` is, links followed as the process would, and how full its file system is;
    /// `None` when there is nothing.
    pub(crate) fn mount_and_usage(&self, path: &Path) -> rustix::io::Result<Option<(u64, StatFs)>> {
        let Some(opened) = self.open(path)? else { return Ok(None) };
        let stat = rustix::fs::statx(&opened, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
        Ok(Some((stat.stx_mnt_id, rustix::fs::fstatfs(&opened)?)))
    }

    fn open(&self, path: &Path) -> rustix::io::Result<Option<rustix::fd::OwnedFd>> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        match rustix::fs::openat2(&self.0, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Ok(opened) => Ok(Some(opened)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
