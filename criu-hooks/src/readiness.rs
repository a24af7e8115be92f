//! Waiting for descriptors.

use std::{io, os::fd::OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Watches `descriptor` for `interest`, on the runtime of the caller.
///
/// # Errors
/// When the kernel cannot watch it, or no runtime is there.
pub fn watch(descriptor: impl Into<OwnedFd>, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor stays open, and the same, until the registration that owns it is dropped: its
    // number is never changed and nothing else closes it.
    let watched = unsafe { AsyncFd::register_with_interest(descriptor.into(), interest) };
    Ok(watched?)
}
