//! Time limits of sockets (SO_RCVTIMEO, SO_SNDTIMEO), which no system call names.

use std::time::Duration;

use rustix::{
    event::epoll::EventFlags,
    net::sockopt::{Timeout, socket_timeout},
    process::Pid,
};

use super::descriptors::Owners;

/// How long a call may last that is blocked on this descriptor of a process; none for ever, or for what is no socket.
pub fn limit(process: Pid, number: i32, readiness: EventFlags) -> Option<Duration> {
    let socket = Owners::default().duplicate(process, number).ok()??;
    let which = if readiness.contains(EventFlags::OUT) { Timeout::Send } else { Timeout::Recv };
    socket_timeout(&socket, which).ok()?
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::{fd::AsRawFd, unix::net::UnixStream};

    use rustix::process::getpid;

    use super::*;

    #[test]
    fn each_direction_has_a_limit_of_its_own() {
        let (socket, _other) = UnixStream::pair().unwrap();
        let limit = |readiness| limit(getpid(), socket.as_raw_fd(), readiness);
        assert_eq!(limit(EventFlags::IN), None);
        let seconds = Duration::from_secs;
        socket.set_read_timeout(Some(seconds(3))).unwrap();
        socket.set_write_timeout(Some(seconds(5))).unwrap();
        assert_eq!(limit(EventFlags::IN), Some(seconds(3)));
        assert_eq!(limit(EventFlags::OUT), Some(seconds(5)));
        let (pipe, _writer) = std::io::pipe().unwrap();
        assert_eq!(super::limit(getpid(), pipe.as_raw_fd(), EventFlags::IN), None);
    }
}
