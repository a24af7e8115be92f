//! What CRIU tells of the processes that it restores lazily.
//!
//! It connects to a socket in its work directory. For each process it sends the id that it has in the image, four bytes,
//! and then one byte with the userfaultfd; a zombie has a negative id and no userfaultfd. Four more bytes say that all
//! processes are as they were.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::{fs::AtFlags, net::RecvFlags};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::UnixListener,
};

use super::wire;
use crate::readiness;

/// The name that CRIU looks for.
const NAME: &str = "lazy-pages.socket";
/// What CRIU sends when all processes are restored.
const FINISHED: [u8; 4] = 0x5253_5446_u32.to_ne_bytes();

/// What CRIU says.
#[derive(Debug)]
pub(super) enum News {
    /// A process, by its id in the image, and its userfaultfd.
    Task(u32, OwnedFd),
    /// All processes are as they were.
    Finished,
    /// CRIU has hung up.
    Closed,
}

/// The conversation.
#[derive(Debug)]
pub(super) struct CriuSocket {
    state: State,
    work: OwnedFd,
}

#[derive(Debug)]
enum State {
    Listening(UnixListener),
    /// With the bytes of a message that is not complete, and whether a descriptor is due next.
    Connected(AsyncFd<OwnedFd>, Vec<u8>),
    Over,
}

impl CriuSocket {
    /// Waits for CRIU in its work directory.
    pub fn listen(work: BorrowedFd<'_>) -> io::Result<CriuSocket> {
        let work = work.try_clone_to_owned()?;
        remove(&work);
        // The path of the directory may be longer than the address of a socket.
        let path = format!("/proc/self/fd/{}/{NAME}", work.as_raw_fd());
        Ok(CriuSocket { state: State::Listening(UnixListener::bind(path)?), work })
    }

    /// Whether nothing more is to come.
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    /// The next news. May be dropped and called again.
    pub async fn next(&mut self) -> io::Result<News> {
        loop {
            match &mut self.state {
                State::Listening(listener) => {
                    let (stream, _) = listener.accept().await?;
                    // The directory is root's alone; this costs nothing.
                    let uid = stream.peer_cred()?.uid();
                    let stream = readiness::watch(stream.into_std()?, Interest::READABLE)?;
                    remove(&self.work);
                    if uid != rustix::process::geteuid().as_raw() {
                        return Err(io::Error::other(format!("user {uid} spoke in CRIU's place")));
                    }
                    self.state = State::Connected(stream, Vec::new());
                }
                State::Connected(stream, pending) => {
                    let mut ready = stream.readable().await?;
                    let received = ready.try_io(|stream| step(stream.get_ref().as_fd(), pending));
                    let Ok(news) = received else { continue };
                    match news? {
                        Some(news @ News::Task(..)) => return Ok(news),
                        Some(last) => {
                            self.state = State::Over;
                            return Ok(last);
                        }
                        None => {}
                    }
                }
                State::Over => std::future::pending().await,
            }
        }
    }
}

impl Drop for CriuSocket {
    fn drop(&mut self) {
        if matches!(self.state, State::Listening(_)) {
            remove(&self.work);
        }
    }
}

fn remove(work: &OwnedFd) {
    let _ = rustix::fs::unlinkat(work, NAME, AtFlags::empty());
}

/// Reads what is there of one message.
fn step(stream: BorrowedFd<'_>, pending: &mut Vec<u8>) -> io::Result<Option<News>> {
    let mut bytes = [0; 4];
    let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    if let Ok(id) = <[u8; 4]>::try_from(&pending[..]) {
        let (length, descriptors) = wire::receive_bytes(stream, &mut bytes[..1], RecvFlags::DONTWAIT)?;
        if length == 0 {
            return Ok(Some(News::Closed));
        }
        let uffd = descriptors.into_iter().next().ok_or_else(|| invalid("CRIU sent no userfaultfd"))?;
        pending.clear();
        return Ok(Some(News::Task(u32::from_ne_bytes(id), uffd)));
    }
    let room = &mut bytes[..4 - pending.len()];
    let (length, _) = wire::receive_bytes(stream, room, RecvFlags::DONTWAIT)?;
    if length == 0 {
        return Ok(Some(News::Closed));
    }
    pending.extend(&room[..length]);
    let Ok(word) = <[u8; 4]>::try_from(&pending[..]) else { return Ok(None) };
    if word == FINISHED {
        return Ok(Some(News::Finished));
    }
    if i32::from_ne_bytes(word) <= 0 {
        // A zombie has no memory.
        pending.clear();
    }
    Ok(None)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{fs::File, io::Write, os::unix::net::UnixStream};

    use rustix::net::SendFlags;

    use super::*;

    fn connected() -> (tempfile::TempDir, CriuSocket, UnixStream) {
        let directory = tempfile::tempdir().unwrap();
        let work = File::open(directory.path()).unwrap();
        let socket = CriuSocket::listen(work.as_fd()).unwrap();
        let criu = UnixStream::connect(directory.path().join(NAME)).unwrap();
        (directory, socket, criu)
    }

    fn send_descriptor(criu: &UnixStream) {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        let file = File::open("/dev/null").unwrap();
        let descriptors = [file.as_fd()];
        assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&descriptors)));
        rustix::net::sendmsg(criu, &[io::IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
    }

    #[tokio::test]
    async fn processes_come_with_their_userfaultfds_and_zombies_without() {
        let (directory, mut socket, mut criu) = connected();
        criu.write_all(&7_i32.to_ne_bytes()).unwrap();
        send_descriptor(&criu);
        criu.write_all(&(-8_i32).to_ne_bytes()).unwrap();
        criu.write_all(&9_i32.to_ne_bytes()[..2]).unwrap();
        assert!(matches!(socket.next().await.unwrap(), News::Task(7, _)));
        criu.write_all(&9_i32.to_ne_bytes()[2..]).unwrap();
        send_descriptor(&criu);
        criu.write_all(&FINISHED).unwrap();
        assert!(matches!(socket.next().await.unwrap(), News::Task(9, _)));
        assert!(matches!(socket.next().await.unwrap(), News::Finished));
        assert!(socket.is_over());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_process_without_its_userfaultfd_is_an_error() {
        let (_directory, mut socket, mut criu) = connected();
        criu.write_all(&7_i32.to_ne_bytes()).unwrap();
        criu.write_all(b"x").unwrap();
        assert!(socket.next().await.is_err());
    }

    #[tokio::test]
    async fn a_criu_that_dies_is_noticed() {
        let (_directory, mut socket, mut criu) = connected();
        criu.write_all(&7_i32.to_ne_bytes()).unwrap();
        drop(criu);
        assert!(matches!(socket.next().await.unwrap(), News::Closed));
    }
}
