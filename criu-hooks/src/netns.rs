//! Work inside the network namespace of a container.

use std::{io, os::fd::BorrowedFd, thread};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Does `work` inside the network namespace `namespace`, on a thread of its own: to enter a namespace changes a thread
/// for good. Sockets that are made there stay there, and can be used from anywhere. The work must be short.
///
/// # Errors
/// When the namespace cannot be entered, and those of the work.
pub fn within<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    thread::scope(|scope| {
        let inside = thread::Builder::new().spawn_scoped(scope, || {
            move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
            work()
        })?;
        inside.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        fs::{self, File},
        os::fd::AsFd,
    };

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
