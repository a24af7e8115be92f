//! Work inside the network namespace of a container.

use std::{fs, io, os::fd::BorrowedFd, thread};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Whether the kernel moves the connections that wait for a listener to another of its group when it is closed. Holds
/// for IPv4 and IPv6; since Linux 5.14.
const MIGRATE: &str = "/proc/sys/net/ipv4/tcp_migrate_req";

/// Does `work` inside the network namespace `namespace`, on a thread of its own: to enter a namespace changes a thread
/// for good. Sockets that are made there stay there, and can be used from anywhere. The work must be short.
///
/// # Errors
/// When the namespace cannot be entered, and those of the work.
pub(super) fn within<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
            work()
        });
        inside.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
}

/// Has the kernel move waiting connections, in the network namespace `namespace`.
///
/// # Errors
/// When the kernel is too old, or does not let this process.
pub(super) fn migrate_requests(namespace: BorrowedFd<'_>) -> io::Result<()> {
    within(namespace, || {
        if fs::read_to_string(MIGRATE)?.trim() == "1" {
            return Ok(());
        }
        fs::write(MIGRATE, "1")
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use super::*;

    #[test]
    fn the_work_of_a_thread_comes_back_and_leaves_the_others_where_they_are() {
        let own = || fs::read_link("/proc/thread-self/ns/net").unwrap();
        let before = own();
        let namespace = File::open("/proc/self/ns/net").unwrap();
        assert_eq!(within(namespace.as_fd(), || Ok(7)).unwrap(), 7);
        assert_eq!(own(), before);
    }

    #[test]
    fn what_is_no_network_namespace_is_refused() {
        let other = File::open("/proc/self/ns/uts").unwrap();
        assert!(within(other.as_fd(), || Ok(())).is_err());
    }
}
