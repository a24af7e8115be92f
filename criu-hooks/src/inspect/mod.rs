//! A look at a live container: can it be checkpointed, and if not, why?
//!
//! All of it is reading: of `/proc`, and of the kernel's tables of sockets. The container may run meanwhile; what is found
//! then is how it was a moment ago.

mod blocker;
mod connections;
mod diag;
mod files;
mod namespaces;
mod network;
mod queue;
mod sockets;

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    path::PathBuf,
    time::Duration,
};

use rustix::process::Pid;

pub use self::{
    blocker::Blocker,
    connections::{Busy, Policy},
    network::{Connection, Ended, Network},
    queue::{Queue, Waiting},
};
use self::{
    namespaces::Namespaces,
    sockets::{Owner, Sockets},
};
use crate::{
    container::{self, Container},
    descriptors::{Descriptor, Listing},
    procfs, waits,
};

/// What a look at a container has shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inspection {
    /// What keeps it from being checkpointed; when there is nothing, CRIU may be tried.
    pub blockers: Vec<Blocker>,
    /// What only CRIU can tell, in words.
    pub doubts: Vec<String>,
    /// The inodes of established TCP connections that a checkpoint would close.
    pub closing: Vec<u64>,
    /// How long it is until the first of its timer descriptors goes off, or the first wait of a thread ends by itself.
    pub next_timer: Option<Duration>,
    /// Tells whether the container has the same processes and files open as at another look; connections do not count.
    pub fingerprint: u64,
}

/// Looks at `container`, whose first process is `init` and whose processes have `open` open.
///
/// # Errors
/// When the container is gone.
pub fn inspect(
    container: &Container,
    init: Pid,
    open: &Listing,
    policy: Policy,
) -> Result<Inspection, container::Error> {
    let look = |pid| move |source| container::Error::Process { pid, source };
    let mut found = Inspection::default();
    found.blockers.extend(container.blockers(init)?.into_iter().map(Blocker::Container));
    let namespaces = Namespaces::of(init).map_err(look(init))?;
    let mut sockets = Sockets::new();
    for (pid, descriptors) in open {
        match found.look_at(*pid, descriptors, &namespaces, &mut sockets) {
            Ok(()) => {}
            // It has ended meanwhile.
            Err(_) if !procfs::alive(*pid) => {}
            Err(error) => return Err(look(*pid)(error)),
        }
    }
    let volumes: Vec<PathBuf> =
        container.live_mounts(init)?.into_iter().map(|(mount_point, _)| mount_point.into()).collect();
    let seen = sockets::inspect(init, &sockets, policy, &volumes).map_err(look(init))?;
    found.blockers.extend(seen.blockers);
    found.closing = seen.closing;
    Ok(found)
}

/// Looks again at the connections with the inodes `closing`, which were to be closed, of a container whose first process is
/// `init`: its processes stand still, but what comes for them does not. Tells of one that must not be closed any more.
///
/// # Errors
/// When the container is gone, or the kernel does not answer.
pub fn come_to_life(init: Pid, closing: &[u64], policy: Policy) -> io::Result<Option<Blocker>> {
    let busy = sockets::come_to_life(init, closing, policy)?;
    Ok(busy.map(|(peer, busy)| Blocker::Connection { peer, busy }))
}

impl Inspection {
    /// Adds to the fingerprint, in whatever order.
    fn note(&mut self, pid: Pid, descriptor: &Descriptor) {
        let mut hasher = DefaultHasher::new();
        (pid.as_raw_nonzero(), descriptor.number, &descriptor.target).hash(&mut hasher);
        self.fingerprint = self.fingerprint.wrapping_add(hasher.finish());
    }

    /// Looks at one process.
    fn look_at(
        &mut self,
        pid: Pid,
        descriptors: &[Descriptor],
        namespaces: &Namespaces,
        sockets: &mut Sockets,
    ) -> io::Result<()> {
        self.blockers.extend(namespaces.blocker(pid)?);
        let mut watches = false;
        for descriptor in descriptors {
            if let Some(inode) = descriptor.socket() {
                sockets.entry(inode).or_insert(Owner { pid, number: descriptor.number });
                continue;
            }
            self.note(pid, descriptor);
            let blocker = files::blocker(pid, descriptor);
            self.blockers.extend(blocker.filter(|blocker| !self.blockers.contains(blocker)));
            watches |= descriptor.anonymous() == Some("inotify");
            if let Ok(Some(remains)) = files::timer(pid, descriptor) {
                self.next_timer = Some(self.next_timer.map_or(remains, |next| next.min(remains)));
            }
        }
        self.next_timer = self.next_timer.into_iter().chain(waits::next(pid)).min();
        if watches {
            self.doubts.push(format!(
                "process {pid} watches files (inotify): whether CRIU can dump that depends on their file system, \
                 and shows only when it is put to sleep"
            ));
        }
        Ok(())
    }
}
