//! What the shim and its pager say to each other, one message a datagram, with descriptors.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::image::Claim;

/// The longest message, in bytes.
const MAX: usize = 64 * 1024;
/// The most descriptors of a message.
const DESCRIPTORS: usize = 4;

/// What a pager begins with. Three descriptors come with it: the directory of the images, the one where the working set is
/// kept, and the container's `cgroup.kill`; a fourth when there are checksums, their file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Start {
    /// Ids of forked processes count from here.
    pub next_id: u32,
    /// The generation of the image.
    pub generation: u64,
    /// How long after the wake faults are recorded, in milliseconds.
    pub window: u64,
    /// The most that is recorded, in bytes.
    pub cap: u64,
    /// What the checksums of the pages must be.
    pub sums: Option<Claim>,
}

/// From the shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum ToPager {
    /// A process, with its userfaultfd, and its journal when another pager had it before.
    Task {
        /// What it is called between shim and pager.
        id: u32,
        /// Its process id in the image.
        pid: u32,
        /// How many of its children the shim knows of.
        forks: usize,
        /// It was forked after the restore.
        forked: bool,
    },
    /// All processes are as they were, and run from now on.
    Finished,
    /// Somebody waits for the end.
    Hurry,
    /// The shim has closed this userfaultfd.
    Released {
        /// Whose.
        id: u32,
    },
}

/// From the pager.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum FromPager {
    /// The journal of a process, before the first event is taken.
    Journal {
        /// Whose.
        id: u32,
    },
    /// A process has forked: with the child's userfaultfd and journal.
    Forked {
        /// The child.
        id: u32,
        /// The process that forked.
        parent: u32,
        /// The parent's process id in the image.
        pid: u32,
    },
    /// Every page of the process is in place, or it is gone.
    Filled {
        /// Which.
        id: u32,
    },
    /// It goes no further, and the container's processes were killed.
    Failed {
        /// Why.
        why: String,
    },
    /// All is done.
    Done(Tally),
}

/// What a pager did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tally {
    /// Pages that were put in place.
    pub pages: u64,
    /// Of these, pages of zeros that take no memory.
    pub zero_pages: u64,
    /// Pages for which there was no memory any more.
    pub absent_pages: u64,
    /// Faults that were served.
    pub faults: u64,
    /// Pages that were put in place because an earlier wake had needed them.
    pub prefetched: u64,
    /// From the wake to the first fault, in microseconds.
    pub first_fault: Option<u64>,
    /// Pages that are recorded for the next wake.
    pub working_set: u64,
}

/// Sends a message. `EPIPE` when nobody is there any more.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX {
        return Err(io::Error::other("a message that is too long"));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    loop {
        match rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, flags | SendFlags::NOSIGNAL)
        {
            Err(rustix::io::Errno::INTR) => {}
            sent => return sent.map(drop).map_err(Into::into),
        }
    }
}

/// Receives a message; none at the end.
pub(super) fn receive<T: DeserializeOwned>(
    socket: impl AsFd,
    flags: RecvFlags,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MAX];
    let (length, descriptors) = receive_bytes(socket, &mut bytes, flags)?;
    if length == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&bytes[..length])?, descriptors)))
}

/// Receives bytes and the descriptors that come with them.
pub(super) fn receive_bytes(
    socket: impl AsFd,
    bytes: &mut [u8],
    flags: RecvFlags,
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        let mut parts = [IoSliceMut::new(bytes)];
        match rustix::net::recvmsg(&socket, &mut parts, &mut control, flags | RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received?,
        }
    };
    let mut descriptors = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            descriptors.extend(received);
        }
    }
    if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message that is too long"));
    }
    Ok((message.bytes, descriptors))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    #[test]
    fn a_message_takes_its_descriptors_along() {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let (read, write) = rustix::pipe::pipe().unwrap();
        let sent = ToPager::Task { id: 3, pid: 7, forks: 1, forked: false };
        send(ours.as_fd(), &sent, &[read.as_fd()], SendFlags::empty()).unwrap();
        let (received, descriptors) = receive::<ToPager>(&theirs, RecvFlags::empty()).unwrap().unwrap();
        assert_eq!((received, descriptors.len()), (sent, 1));
        rustix::io::write(&write, b"x").unwrap();
        assert_eq!(rustix::io::read(&descriptors[0], &mut [0; 2]), Ok(1));
        drop(ours);
        assert!(receive::<ToPager>(&theirs, RecvFlags::empty()).unwrap().is_none());
        let error = send(theirs.as_fd(), &sent, &[], SendFlags::empty()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    proptest! {
        #[test]
        fn arbitrary_datagrams_never_panic(bytes in prop::collection::vec(any::<u8>(), 1..200)) {
            let (ours, theirs) =
                socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
            rustix::io::write(&ours, &bytes).unwrap();
            let _ = receive::<FromPager>(&theirs, RecvFlags::empty());
        }
    }
}
