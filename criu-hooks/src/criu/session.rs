//! One `criu swrk` process and the conversation with it.
//!
//! CRIU takes one request over a sequenced-packet socket, one protobuf message a datagram, and answers it, after any
//! number of notifications that it waits on. Descriptors of the caller are named by number: `images_dir_fd` and
//! `work_dir_fd` are opened through the caller's `/proc`, inherited ones must be open in CRIU itself.

use std::{
    ffi::CString,
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use protobuf::Message;
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::CWD,
    io::{Errno, FdFlags},
    mount::{MountPropagationFlags, MoveMountFlags, mount_change, move_mount},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags,
        SocketFlags, SocketType,
    },
    process::{Pid, Signal, pidfd_send_signal},
    thread::{LinkNameSpaceType, UnshareFlags},
};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    hooks::{Event, HookError, NoHooks, NotifyHooks},
    rpc::{Criu_req, Criu_req_type, Criu_resp},
};
use crate::{
    cgroup::{self, Cgroup},
    readiness,
    spawn::{Exit, ExitFuture, Spawner},
};

/// The longest answer that is taken. CRIU's own are a few hundred bytes.
const MAX_MESSAGE: usize = 64 * 1024;

/// How long CRIU may take to end after its last answer, or after its end of the socket was closed.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);

/// What can go wrong in a session.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program could not be started.
    #[error("cannot start CRIU at {}: {source}", binary.display())]
    Spawn {
        /// What was to be run.
        binary: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The container's cgroup could not be entered.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// The socket failed.
    #[error("the socket to CRIU failed: {0}")]
    Socket(#[from] io::Error),
    /// CRIU ended without an answer.
    #[error("CRIU ended before it answered ({exit})")]
    Died {
        /// How it ended.
        exit: Exit,
    },
    /// CRIU said something that is not its protocol.
    #[error("CRIU's answer is not understood: {0}")]
    Protocol(String),
    /// CRIU answered that it failed; the reason is in its log.
    #[error("CRIU failed (error number {})", errno.unwrap_or_default())]
    Failed {
        /// Its `cr_errno`.
        errno: Option<i32>,
        /// Its `cr_errmsg`, which is the first error it met and may be a harmless one.
        message: Option<String>,
    },
    /// A hook refused, and CRIU gave up as it was told.
    #[error("given up at {event}: {reason}")]
    Refused {
        /// CRIU's name of the moment.
        event: String,
        /// Why the hook refused.
        reason: HookError,
    },
}

/// How a CRIU is started.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The program.
    pub binary: &'a Path,
    /// The cgroup that CRIU enters before it runs: what it restores is then in that cgroup.
    pub cgroup: Option<&'a Cgroup>,
    /// CRIU makes its cgroup the root of a new cgroup namespace: what it restores then sees nothing above it.
    pub new_cgroup_namespace: bool,
    /// CRIU mounts what it needs where nobody else sees it, and where it goes with CRIU even when that is killed.
    pub new_mount_namespace: bool,
    /// Detached mounts, and where in its new mount namespace CRIU finds them: below a private mount.
    pub mounts: Vec<(OwnedFd, CString)>,
    /// Namespaces that CRIU joins before it runs.
    pub join: Vec<(OwnedFd, LinkNameSpaceType)>,
    /// Descriptors that CRIU inherits under the numbers that they have here.
    pub inherit: Vec<OwnedFd>,
}

impl<'a> Launch<'a> {
    /// A CRIU that runs as its caller does.
    pub fn new(binary: &'a Path) -> Launch<'a> {
        Launch {
            binary,
            cgroup: None,
            new_cgroup_namespace: false,
            new_mount_namespace: false,
            mounts: Vec::new(),
            join: Vec::new(),
            inherit: Vec::new(),
        }
    }
}

/// A running `criu swrk`. Dropping it kills that process and nothing else.
pub struct Session {
    socket: AsyncFd<OwnedFd>,
    pid: Pid,
    pidfd: OwnedFd,
    /// `None` once CRIU has ended.
    exit: Option<ExitFuture>,
}

impl Session {
    /// Starts CRIU.
    ///
    /// # Errors
    /// [`Error::Spawn`] when it does not start, or what it was to enter or join is gone.
    pub fn start(spawner: &dyn Spawner, launch: Launch<'_>) -> Result<Session, Error> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(io::Error::from)?;
        // CRIU reads and writes this end without looking for EAGAIN; the flag belongs to the end, not to the pair.
        rustix::io::ioctl_fionbio(&theirs, false).map_err(io::Error::from)?;
        let socket = readiness::watch(ours, Interest::READABLE | Interest::WRITABLE)?;

        let binary = launch.binary.to_owned();
        let procs = launch.cgroup.map(Cgroup::open_procs).transpose()?;
        let mut command = Command::new(&binary);
        command
            .args(["--no-default-config", "swrk", &theirs.as_raw_fd().to_string()])
            // Nothing of the caller's environment may steer CRIU; it runs tar and sh by name.
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut inherited = launch.inherit;
        inherited.push(theirs);
        let (join, mounts) = (launch.join, launch.mounts);
        let mut unshare = UnshareFlags::empty();
        unshare.set(UnshareFlags::NEWCGROUP, launch.new_cgroup_namespace);
        unshare.set(UnshareFlags::NEWNS, launch.new_mount_namespace);
        let enter = move || enter(procs.as_ref(), unshare, &join, &mounts, &inherited);
        // SAFETY: the closure runs in the child between fork and exec; it makes system calls only, on descriptors
        // that it owns, and neither allocates nor locks.
        unsafe { command.pre_exec(enter) };

        let child = spawner.spawn(command).map_err(|source| Error::Spawn { binary, source })?;
        Ok(Session { socket, pid: child.pid, pidfd: child.pidfd, exit: Some(child.exit) })
    }

    /// The process id of this CRIU.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether it has not ended. One that ends while this is asked may still count as alive.
    pub fn is_alive(&self) -> bool {
        let mut poll = [PollFd::new(&self.pidfd, PollFlags::IN)];
        self.exit.is_some() && matches!(rustix::event::poll(&mut poll, Some(&Timespec::default())), Ok(0))
    }

    /// Waits until this CRIU has started: from then on it uses nothing of its surroundings until the next request.
    ///
    /// # Errors
    /// As [`Session::request`].
    pub async fn wait_until_ready(&mut self) -> Result<(), Error> {
        let mut request = Criu_req::new();
        request.set_type(Criu_req_type::VERSION);
        request.set_keep_open(true);
        self.request(&request, &mut NoHooks).await.map(drop)
    }

    /// Sends one request and sees it through: each notification goes to `hooks`, whose word is CRIU's order.
    ///
    /// # Errors
    /// [`Error::Failed`] when CRIU says so, [`Error::Refused`] when a hook did, [`Error::Died`] when CRIU ended
    /// without an answer.
    pub async fn request(
        &mut self,
        request: &Criu_req,
        hooks: &mut dyn NotifyHooks,
    ) -> Result<Criu_resp, Error> {
        self.send(request).await?;
        let mut refused = None;
        loop {
            let (answer, descriptor) = self.receive().await?;
            if answer.type_() != Criu_req_type::NOTIFY {
                return match refused {
                    _ if answer.success() && answer.type_() == request.type_() => Ok(answer),
                    Some((event, reason)) => Err(Error::Refused { event, reason }),
                    None if !answer.success() => {
                        Err(Error::Failed { errno: answer.cr_errno, message: answer.cr_errmsg })
                    }
                    None => Err(Error::Protocol(format!("an answer to {:?}", answer.type_()))),
                };
            }
            let script = answer.notify.script();
            let event = Event::new(script, answer.notify.pid, descriptor)
                .ok_or_else(|| Error::Protocol(format!("{script} without a descriptor")))?;
            tracing::trace!(event = script, "CRIU notifies");
            let verdict = hooks.notify(event).await;
            let mut reply = Criu_req::new();
            reply.set_type(Criu_req_type::NOTIFY);
            reply.set_notify_success(verdict.is_ok());
            if let Err(reason) = verdict {
                refused.get_or_insert((script.to_owned(), reason));
            }
            self.send(&reply).await?;
        }
    }

    /// Ends the conversation and waits for CRIU's end; one that does not end within five seconds is killed.
    ///
    /// # Errors
    /// When the exit status cannot be had.
    pub async fn finish(mut self) -> io::Result<Exit> {
        self.hang_up(EXIT_TIMEOUT).await
    }

    /// Ends the conversation, whatever CRIU is at, and waits for its end: with nobody to answer its next notification it
    /// gives up by itself, and puts right what it has done to processes. One that has not ended after `patience` is
    /// killed. May be broken off and called again.
    ///
    /// # Errors
    /// When the exit status cannot be had.
    pub async fn hang_up(&mut self, patience: Duration) -> io::Result<Exit> {
        rustix::net::shutdown(self.socket.get_ref(), rustix::net::Shutdown::Both).ok();
        self.await_exit(patience).await
    }

    /// Kills this CRIU and hands over the future of its end, for those who must act after it.
    pub fn kill(mut self) -> Option<ExitFuture> {
        self.signal();
        self.exit.take()
    }

    fn signal(&self) {
        if self.exit.is_some() {
            let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        }
    }

    async fn await_exit(&mut self, patience: Duration) -> io::Result<Exit> {
        let Some(exit) = self.exit.as_mut() else {
            return Err(io::Error::other("CRIU's exit was already taken"));
        };
        let result = if let Ok(result) = tokio::time::timeout(patience, &mut *exit).await {
            result
        } else {
            pidfd_send_signal(&self.pidfd, Signal::KILL).ok();
            exit.await
        };
        self.exit = None;
        result
    }

    async fn send(&mut self, request: &Criu_req) -> Result<(), Error> {
        let bytes = request.write_to_bytes().map_err(|error| Error::Protocol(error.to_string()))?;
        loop {
            let mut ready = self.socket.writable().await?;
            let sent = ready.try_io(|socket| {
                Ok(rustix::net::send(socket.get_ref(), &bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
            });
            match sent {
                Ok(Ok(length)) if length == bytes.len() => return Ok(()),
                Ok(Ok(length)) => {
                    return Err(Error::Protocol(format!("{length} of {} bytes sent", bytes.len())));
                }
                Ok(Err(error)) if ended(&error) => return Err(self.death().await),
                Ok(Err(error)) => return Err(error.into()),
                Err(_would_block) => {}
            }
        }
    }

    async fn receive(&mut self) -> Result<(Criu_resp, Option<OwnedFd>), Error> {
        loop {
            let ended_first = {
                let Some(exit) = self.exit.as_mut() else {
                    return Err(Error::Protocol("the conversation is over".to_owned()));
                };
                tokio::select! {
                    biased;
                    ready = self.socket.readable() => {
                        match ready?.try_io(|socket| receive_one(socket.get_ref())) {
                            Ok(Ok(Some((bytes, descriptor)))) => return parse(&bytes, descriptor),
                            Ok(Ok(None)) => None,
                            Ok(Err(error)) if ended(&error) => None,
                            Ok(Err(error)) => return Err(error.into()),
                            Err(_would_block) => continue,
                        }
                    }
                    exit = exit => Some(exit),
                }
            };
            // CRIU is gone or going. Its children may still hold its end of the socket, so the end of the stream
            // alone cannot tell; but a last answer may lie in the queue.
            let Some(exit) = ended_first else {
                return Err(self.death().await);
            };
            self.exit = None;
            return match receive_one(self.socket.get_ref()) {
                Ok(Some((bytes, descriptor))) => parse(&bytes, descriptor),
                _ => Err(exit.map_or_else(Error::Socket, |exit| Error::Died { exit })),
            };
        }
    }

    /// The error of a CRIU that closed its end.
    async fn death(&mut self) -> Error {
        self.await_exit(EXIT_TIMEOUT).await.map_or_else(Error::Socket, |exit| Error::Died { exit })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.signal();
        // Whoever reaps through the future must get to poll it.
        if let (Some(exit), Ok(runtime)) = (self.exit.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn(exit);
        }
    }
}

/// What the child does between fork and exec. System calls only.
fn enter(
    procs: Option<&OwnedFd>,
    unshare: UnshareFlags,
    join: &[(OwnedFd, LinkNameSpaceType)],
    mounts: &[(OwnedFd, CString)],
    inherited: &[OwnedFd],
) -> io::Result<()> {
    for (namespace, kind) in join {
        rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(*kind))?;
    }
    if let Some(procs) = procs {
        rustix::io::write(procs, b"0")?;
    }
    if !unshare.is_empty() {
        // SAFETY: the flags name namespaces only, so no memory or descriptor table changes.
        unsafe { rustix::thread::unshare_unsafe(unshare)? };
    }
    if unshare.contains(UnshareFlags::NEWNS) {
        // Only where CRIU mounts for itself, which is in /tmp: volumes elsewhere keep what they share with the host.
        mount_change(c"/", MountPropagationFlags::DOWNSTREAM)?;
        match mount_change(c"/tmp", MountPropagationFlags::DOWNSTREAM) {
            // It is no mount of its own.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for (mount, path) in mounts {
        move_mount(mount, c"", CWD, path.as_c_str(), MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    }
    for descriptor in inherited {
        rustix::io::fcntl_setfd(descriptor, FdFlags::empty())?;
    }
    Ok(())
}

/// One datagram and the first descriptor that came with it; `None` at the end of the stream.
fn receive_one(socket: &OwnedFd) -> io::Result<Option<(Vec<u8>, Option<OwnedFd>)>> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
    let mut descriptor = None;
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = part {
            for received in descriptors {
                descriptor.get_or_insert(received);
            }
        }
    }
    if message.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer of more than 64 KiB"));
    }
    bytes.truncate(message.bytes);
    Ok((message.bytes > 0).then_some((bytes, descriptor)))
}

fn parse(bytes: &[u8], descriptor: Option<OwnedFd>) -> Result<(Criu_resp, Option<OwnedFd>), Error> {
    let answer = Criu_resp::parse_from_bytes(bytes).map_err(|error| Error::Protocol(error.to_string()))?;
    Ok((answer, descriptor))
}

fn ended(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

#[cfg(test)]
mod tests;
