//! Options of sockets that rustix does not have.

use std::{
    ffi::{c_int, c_uint, c_void},
    io,
    os::fd::{AsFd, AsRawFd as _},
};

/// A level of options, and one of them: whole numbers all of them.
type Name = (c_int, c_int);
const TCP_REPAIR: Name = (6, 19);
const UDP_GRO: Name = (17, 104);
/// The length of their values.
const LENGTH: c_uint = 4;

unsafe extern "C" {
    /// See `setsockopt(2)`.
    fn setsockopt(socket: c_int, level: c_int, name: c_int, value: *const c_void, length: c_uint) -> c_int;
    /// See `getsockopt(2)`.
    fn getsockopt(socket: c_int, level: c_int, name: c_int, value: *mut c_void, length: *mut c_uint)
    -> c_int;
}

fn set(socket: impl AsFd, (level, name): Name, value: c_int) -> io::Result<()> {
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel reads `LENGTH` bytes, which `value` has, and the descriptor is open as long as the call lasts.
    let done = unsafe { setsockopt(socket, level, name, (&raw const value).cast(), LENGTH) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn get(socket: impl AsFd, (level, name): Name) -> io::Result<c_int> {
    let (socket, mut value, mut length) = (socket.as_fd().as_raw_fd(), 0, LENGTH);
    // SAFETY: the kernel writes at most `length` bytes, which `value` has, and the length; the descriptor is open as long
    // as the call lasts.
    let done = unsafe { getsockopt(socket, level, name, (&raw mut value).cast(), &raw mut length) };
    if done == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// Lets a TCP socket bind to a port whoever else has it.
pub(super) fn force_bind(socket: impl AsFd) -> io::Result<()> {
    set(socket, TCP_REPAIR, 1)
}

/// Whether the kernel puts datagrams for a UDP socket together.
pub(super) fn puts_together(socket: impl AsFd) -> io::Result<bool> {
    Ok(get(socket, UDP_GRO)? != 0)
}

/// Has the kernel put datagrams for a UDP socket together, or leave them as they come.
pub(super) fn put_together(socket: impl AsFd, on: bool) -> io::Result<()> {
    set(socket, UDP_GRO, c_int::from(on))
}
