//! A CRIU that was started before it is needed, so that a wake does not wait for its start.
//!
//! While it waits it holds nothing of the host's file systems: its mount namespace has been emptied, so volumes and root
//! file systems can be unmounted and deleted as if it were not there. Before its request the host's mounts, as they are
//! at that moment, are put in their place: `pivot_root` changes the root of every process of a namespace.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    time::Duration,
};

use rustix::{
    fs::{CWD, Mode},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
        UnmountFlags, fsconfig_create, fsmount, fsopen, mount_change, move_mount, open_tree, unmount,
    },
    process::{fchdir, pivot_root},
    thread::LinkNameSpaceType,
};

use super::{
    DEATH_TIMEOUT, Engine, Failure, InheritFd, Kept, RestoreError,
    namespaces::{self, Kind},
    restore::join,
};
use crate::{
    cgroup::Cgroup,
    container::Container,
    criu::{Launch, Session},
    image::{self, Image, Outside},
};

/// How long CRIU may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// The directory of the emptied mount namespace where the host's mounts come.
const HOST: &str = "host";

/// A CRIU that waits for one restore. Dropping it ends it; it also ends when this process does.
pub struct Spare {
    session: Session,
    /// Its mount namespace.
    mounts: OwnedFd,
    /// The other namespaces that it works in: names and numbers.
    joined: Vec<(&'static str, u64)>,
    /// What it has inherited: keys, and the numbers of its descriptors.
    inherited: Vec<(String, RawFd)>,
}

impl std::fmt::Debug for Spare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spare").field("pid", &self.session.pid()).finish_non_exhaustive()
    }
}

impl Engine {
    /// Starts a CRIU for the next restore of `container` from `image`, to be passed to [`Engine::restore`]. It holds
    /// `inherit` and the namespaces of the dump, and is in the cgroup of this process until then. `None` when the image
    /// is of a mode in which CRIU cannot be started before.
    ///
    /// # Errors
    /// When it does not start, or the namespaces are gone.
    pub async fn start_ahead(
        &self,
        container: &Container,
        image: &Image,
        kept: &Kept,
        inherit: Vec<InheritFd>,
    ) -> Result<Option<Spare>, RestoreError> {
        let facts = &image.manifest().facts;
        // In the classic mode CRIU makes its cgroup the root of a namespace, and it is not in that cgroup yet.
        if facts.mode != image::Mode::PodNamespaces {
            return Ok(None);
        }
        let mut launch = Launch::new(self.criu());
        launch.new_mount_namespace = true;
        launch.join = join(container, kept, &facts.outside)?;
        let joined = numbers(&facts.outside);
        let inherited = inherit.iter().map(|end| (end.key.clone(), end.fd.as_raw_fd())).collect();
        launch.inherit = inherit.into_iter().map(|end| end.fd).collect();

        let failed = |error| RestoreError::Criu(Failure { reason: None, error });
        let mut session = Session::start(&*self.spawner, launch).map_err(failed)?;
        let ready = tokio::time::timeout(START_TIMEOUT, session.wait_until_ready()).await;
        ready.map_err(|_| RestoreError::Timeout { after: START_TIMEOUT, reason: None })?.map_err(failed)?;
        let mounts = namespaces::open(session.pid(), "mnt").map_err(RestoreError::Ahead)?;
        namespaces::inside(mounts.as_fd(), LinkNameSpaceType::Mount, empty).map_err(RestoreError::Ahead)?;
        Ok(Some(Spare { session, mounts, joined, inherited }))
    }
}

impl Spare {
    /// Whether it still waits, in the namespaces of `outside`, with all that `inherit` stands for.
    pub(super) fn fits(&self, outside: &Outside, inherit: &[InheritFd]) -> bool {
        self.session.is_alive()
            && self.joined == numbers(outside)
            && inherit.iter().all(|end| self.number(&end.key).is_some())
    }

    /// The number of the descriptor that it has for `key`.
    pub(super) fn number(&self, key: &str) -> Option<RawFd> {
        self.inherited.iter().find(|(of, _)| of == key).map(|(_, number)| *number)
    }

    /// Moves it to where a CRIU that is started now would be: into `cgroup`, with the mounts of the host. `None` when that
    /// fails, and it has ended then.
    pub(super) async fn move_in(self, cgroup: &Cgroup) -> Option<Spare> {
        match self.try_move_in(cgroup) {
            Ok(()) if self.session.is_alive() => return Some(self),
            Ok(()) => {}
            Err(error) => {
                tracing::warn!(%error, "the CRIU that waited cannot be used: another one is started");
            }
        }
        // It may be in the cgroup already, where only what is restored may be.
        if let Some(end) = self.session.kill() {
            let _ = tokio::time::timeout(DEATH_TIMEOUT, end).await;
        }
        None
    }

    fn try_move_in(&self, cgroup: &Cgroup) -> io::Result<()> {
        let tree = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let host = open_tree(CWD, c"/", tree | OpenTreeFlags::AT_RECURSIVE)?;
        cgroup.enter(self.session.pid()).map_err(io::Error::other)?;
        namespaces::inside(self.mounts.as_fd(), LinkNameSpaceType::Mount, || fill(&host))
    }

    /// Shows it detached mounts, as [`Launch::mounts`] has them.
    pub(super) fn show(self, mounts: &[(OwnedFd, CString)]) -> io::Result<Session> {
        namespaces::inside(self.mounts.as_fd(), LinkNameSpaceType::Mount, || {
            for (mount, path) in mounts {
                move_mount(mount, c"", CWD, path.as_c_str(), MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
            }
            Ok(())
        })?;
        Ok(self.session)
    }
}

/// The numbers of the namespaces that CRIU joins.
fn numbers(outside: &Outside) -> Vec<(&'static str, u64)> {
    let number = |kind: Kind| Some((kind.name(), *outside.namespaces.get(kind.name())?));
    Kind::ALL.into_iter().filter_map(number).collect()
}

/// Leaves nothing in this mount namespace but one empty directory. Nobody else sees it.
fn empty() -> io::Result<()> {
    // First of all: what is unmounted below must stay mounted where it came from.
    mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&tmpfs)?;
    let root = fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    rustix::fs::mkdirat(&root, HOST, Mode::RWXU)?;
    move_mount(&root, c"", CWD, c"/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    pivot(&root)
}

/// Makes `host` the root of this mount namespace, which is as [`empty`] has left it.
fn fill(host: &OwnedFd) -> io::Result<()> {
    let point = format!("/{HOST}");
    move_mount(host, c"", CWD, point.as_str(), MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    // Only where CRIU mounts for itself: as for a CRIU that is started in time.
    mount_change(point.as_str(), MountPropagationFlags::DOWNSTREAM)?;
    pivot(host)?;
    match mount_change(c"/tmp", MountPropagationFlags::DOWNSTREAM) {
        // It is no mount of its own.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Makes `root` the root of all processes of this mount namespace, and unmounts the old one with all that is below it.
fn pivot(root: &OwnedFd) -> io::Result<()> {
    fchdir(root)?;
    pivot_root(c".", c".")?;
    unmount(c".", UnmountFlags::DETACH)?;
    Ok(())
}
