//! Input that was typed ahead: written to a terminal and not yet read by its process.
//!
//! It is in the kernel's terminal and nowhere else, and a terminal does not outlive its last process. So it is taken
//! out while the process is frozen, and put into the terminal that the process wakes with.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
    pty::{OpenptFlags, ioctl_tiocgptpeer},
    termios::{LocalModes, OptionalActions, SpecialCodeIndex, tcgetattr, tcsetattr},
};

/// Twice what a terminal holds.
const MAX: usize = 8192;

/// Opens the process's side of a terminal, nonblocking.
fn peer(master: impl AsFd) -> io::Result<OwnedFd> {
    let peer = ioctl_tiocgptpeer(master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::fs::fcntl_setfl(&peer, OFlags::RDWR | OFlags::NONBLOCK)?;
    Ok(peer)
}

/// Takes out what the frozen process has not read, unfinished lines too.
pub(super) fn take(master: impl AsFd) -> io::Result<Vec<u8>> {
    let peer = peer(master)?;
    let modes = tcgetattr(&peer)?;
    let mut raw = modes.clone();
    // A line is given out only when it is finished, unless the terminal knows no lines.
    raw.local_modes.remove(LocalModes::ICANON);
    raw.special_codes[SpecialCodeIndex::VMIN] = 1;
    raw.special_codes[SpecialCodeIndex::VTIME] = 0;
    tcsetattr(&peer, OptionalActions::Now, &raw)?;
    let mut typed = Vec::new();
    let mut piece = [0; 4096];
    while typed.len() < MAX {
        match rustix::io::read(&peer, &mut piece) {
            Ok(read) if read > 0 => typed.extend_from_slice(&piece[..read]),
            Ok(_) | Err(_) => break,
        }
    }
    tcsetattr(&peer, OptionalActions::Now, &modes)?;
    Ok(typed)
}

/// Puts in what was taken out, here or of another terminal; how many bytes fit. It was echoed and interpreted when it
/// was typed, so it is not again.
pub(super) fn put_back(master: impl AsFd, typed: &[u8]) -> io::Result<usize> {
    let peer = peer(master.as_fd())?;
    let modes = tcgetattr(&peer)?;
    let mut silent = modes.clone();
    silent.local_modes.remove(LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ISIG | LocalModes::IEXTEN);
    tcsetattr(&peer, OptionalActions::Now, &silent)?;
    let written = rustix::io::write(master, typed);
    // The kernel passes input on in the background. A poll that finds nothing yet waits for that, and the change of
    // modes waits for the piece that is being passed on.
    let mut fds = [PollFd::new(&peer, PollFlags::IN)];
    let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 10_000_000 }));
    tcsetattr(&peer, OptionalActions::Now, &modes)?;
    Ok(written?)
}
