//! The namespaces that live on while a container sleeps.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    process::Pid,
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space},
};

use crate::container::{Namespace, Namespaces};

/// The stack of a thread that makes a few system calls.
const SMALL_STACK: usize = 128 * 1024;

/// Namespaces that are the container's own: each lives as long as this is open, and the restore needs it.
#[derive(Debug, Default)]
pub struct Kept {
    /// Network.
    pub network: Option<OwnedFd>,
    /// System V IPC and message queues, with what is in them.
    pub ipc: Option<OwnedFd>,
    /// Host name.
    pub uts: Option<OwnedFd>,
    /// Control groups.
    pub cgroup: Option<OwnedFd>,
    /// Mounts: only those of memory file systems are used, whose contents live on with it.
    pub mounts: Option<OwnedFd>,
}

impl Kept {
    /// Another hold of the same namespaces.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn try_clone(&self) -> io::Result<Kept> {
        let clone = |kept: &Option<OwnedFd>| kept.as_ref().map(OwnedFd::try_clone).transpose();
        Ok(Kept {
            network: clone(&self.network)?,
            ipc: clone(&self.ipc)?,
            uts: clone(&self.uts)?,
            cgroup: clone(&self.cgroup)?,
            mounts: clone(&self.mounts)?,
        })
    }
}

/// One of the namespaces that CRIU can work inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Network,
    Ipc,
    Uts,
    Cgroup,
}

impl Kind {
    /// In the order in which they are joined.
    pub(super) const ALL: [Kind; 4] = [Kind::Network, Kind::Ipc, Kind::Uts, Kind::Cgroup];

    /// Its name in `/proc/PID/ns`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Network => "net",
            Kind::Ipc => "ipc",
            Kind::Uts => "uts",
            Kind::Cgroup => "cgroup",
        }
    }

    pub(super) fn link(self) -> LinkNameSpaceType {
        match self {
            Kind::Network => LinkNameSpaceType::Network,
            Kind::Ipc => LinkNameSpaceType::InterProcessCommunication,
            Kind::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
            Kind::Cgroup => LinkNameSpaceType::ControlGroup,
        }
    }

    /// What the specification says of it.
    pub(super) fn of(self, namespaces: &Namespaces) -> &Namespace {
        match self {
            Kind::Network => &namespaces.network,
            Kind::Ipc => &namespaces.ipc,
            Kind::Uts => &namespaces.uts,
            Kind::Cgroup => &namespaces.cgroup,
        }
    }

    pub(super) fn kept(self, kept: &Kept) -> Option<&OwnedFd> {
        match self {
            Kind::Network => kept.network.as_ref(),
            Kind::Ipc => kept.ipc.as_ref(),
            Kind::Uts => kept.uts.as_ref(),
            Kind::Cgroup => kept.cgroup.as_ref(),
        }
    }

    pub(super) fn keep(self, kept: &mut Kept, namespace: OwnedFd) {
        let place = match self {
            Kind::Network => &mut kept.network,
            Kind::Ipc => &mut kept.ipc,
            Kind::Uts => &mut kept.uts,
            Kind::Cgroup => &mut kept.cgroup,
        };
        *place = Some(namespace);
    }
}

/// Opens the namespace `name` of a process.
pub(super) fn open(pid: Pid, name: &str) -> io::Result<OwnedFd> {
    open_path(Path::new(&format!("/proc/{pid}/ns/{name}")))
}

pub(super) fn open_path(path: &Path) -> io::Result<OwnedFd> {
    Ok(File::open(path)?.into())
}

/// The number that tells a namespace from others.
pub(super) fn number(namespace: impl AsFd) -> io::Result<u64> {
    Ok(rustix::fs::fstat(namespace)?.st_ino)
}

/// Does `work` inside `namespace`, on a thread of its own: nothing else of this process enters it. In a mount namespace
/// `/` is the container's root, and only what has been opened before is the host's.
pub(super) fn inside<T: Send>(
    namespace: BorrowedFd<'_>,
    kind: LinkNameSpaceType,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let enter_and_work = || {
        // SAFETY: it parts the root and the working directory of this short-lived thread from those of the others; the
        // descriptor table stays shared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS)? };
        move_into_link_name_space(namespace, Some(kind))?;
        work()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(SMALL_STACK);
        let thread = thread.spawn_scoped(scope, enter_and_work)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread inside a namespace panicked")))
    })
}
