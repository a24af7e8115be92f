//! The socket on which the OCI runtime hands over the master of a new terminal.

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags},
    rand::{GetRandomFlags, getrandom},
};
use tokio::{io::Interest, net::UnixListener};

use super::IoError;

/// How long the runtime may take to send the master once it has ended with success.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Sockets have short paths, which bundles have not.
const PARENT: &str = "/run";

/// A socket in a directory of its own, both removed when dropped.
pub struct ConsoleSocket {
    directory: PathBuf,
    path: PathBuf,
    listener: UnixListener,
}

impl ConsoleSocket {
    /// Makes the socket.
    ///
    /// # Errors
    /// [`IoError::Console`].
    pub fn new() -> Result<Self, IoError> {
        Self::new_in(Path::new(PARENT))
    }

    fn new_in(parent: &Path) -> Result<Self, IoError> {
        let mut random = [0; 8];
        let name = getrandom(&mut random, GetRandomFlags::empty()).map(|_| u64::from_ne_bytes(random));
        let directory = parent.join(format!("agentcube-console-{:016x}", name.unwrap_or(0)));
        let path = directory.join("s");
        let bind = || -> io::Result<UnixListener> {
            std::fs::DirBuilder::new().mode(0o700).create(&directory)?;
            UnixListener::bind(&path)
        };
        match bind() {
            Ok(listener) => Ok(Self { directory, path, listener }),
            Err(error) => {
                let _ = std::fs::remove_dir(&directory);
                Err(IoError::Console { path, reason: error.to_string() })
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the master.
    ///
    /// # Errors
    /// [`IoError::Console`] when none comes in time.
    pub async fn receive(self) -> Result<OwnedFd, IoError> {
        let failed = |reason: String| IoError::Console { path: self.path.clone(), reason };
        let receive = async {
            let (stream, _) = self.listener.accept().await?;
            loop {
                stream.readable().await?;
                match stream.try_io(Interest::READABLE, || take_descriptor(&stream)) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other,
                }
            }
        };
        match tokio::time::timeout(TIMEOUT, receive).await {
            Ok(received) => received.map_err(|error| failed(error.to_string())),
            Err(_) => Err(failed(format!("nothing after {} s", TIMEOUT.as_secs()))),
        }
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        // Whoever removed them first did what is done here.
        let _ = std::fs::remove_file(&self.path);
        let _ = std::fs::remove_dir(&self.directory);
    }
}

fn take_descriptor(stream: &tokio::net::UnixStream) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 4096];
    let mut parts = [IoSliceMut::new(&mut name)];
    let received = rustix::net::recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("more than one descriptor came"));
    }
    control
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        })
        .ok_or_else(|| io::Error::other("a message without a descriptor came"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_socket_is_private_and_goes_with_its_owner() {
        use std::os::unix::fs::PermissionsExt;
        let parent = tempfile::tempdir().unwrap();
        let socket = ConsoleSocket::new_in(parent.path()).unwrap();
        let mode = std::fs::metadata(&socket.directory).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let path = socket.path().to_owned();
        drop(socket);
        assert!(!path.exists());
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_message_without_a_descriptor_is_an_error() {
        let parent = tempfile::tempdir().unwrap();
        let socket = ConsoleSocket::new_in(parent.path()).unwrap();
        let mut client = std::os::unix::net::UnixStream::connect(socket.path()).unwrap();
        io::Write::write_all(&mut client, b"/dev/ptmx").unwrap();
        let error = socket.receive().await.unwrap_err().to_string();
        assert!(error.contains("without a descriptor"), "{error}");
    }
}
