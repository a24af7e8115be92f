//! Directories by descriptor: nothing here follows a link or leaves its file system.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};

use super::Error;

/// How deep a tree is that may be removed: a generation has two levels, CRIU's temporary directories a few more.
const MAX_DEPTH: usize = 8;

/// The longest name of a container or a namespace; containerd's own limit is 76.
const MAX_NAME: usize = 128;

/// The mode of every directory here.
const PRIVATE: Mode = Mode::RWXU;

/// Checks that `value`, which a caller chose, can only be the name of one directory.
pub(super) fn check_name(what: &'static str, value: &str) -> Result<(), Error> {
    let why = if value.is_empty() {
        "it is empty"
    } else if value.len() > MAX_NAME {
        "it is longer than 128 bytes"
    } else if value.starts_with('.') {
        "it starts with a dot"
    } else if !value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:+@".contains(&byte)) {
        "only letters, digits and -_.:+@ are allowed"
    } else {
        return Ok(());
    };
    Err(Error::Name { what, value: value.chars().take(MAX_NAME).collect(), why })
}

/// Opens the directory `name` in `parent`.
pub(super) fn open(parent: BorrowedFd<'_>, name: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// Opens the directory `name` in `parent`, made when missing.
pub(super) fn open_or_make(parent: BorrowedFd<'_>, name: &str) -> rustix::io::Result<OwnedFd> {
    match rustix::fs::mkdirat(parent, name, PRIVATE) {
        Ok(()) | Err(Errno::EXIST) => open(parent, name),
        Err(error) => Err(error),
    }
}

/// Makes the directory `name` in `parent` and opens it.
pub(super) fn make(parent: BorrowedFd<'_>, name: &str) -> rustix::io::Result<OwnedFd> {
    rustix::fs::mkdirat(parent, name, PRIVATE)?;
    open(parent, name)
}

/// Opens the file `name` in `parent` for reading; does not block on a pipe in its place.
pub(super) fn open_file(parent: BorrowedFd<'_>, name: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// The names in a directory, without `.` and `..`. `path` is for errors.
pub(super) fn names(directory: BorrowedFd<'_>, path: &Path) -> Result<Vec<String>, Error> {
    let read = || -> rustix::io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(directory)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    };
    read().map_err(|error| Error::io("list", path, error.into()))
}

/// The bytes that a program may still write at `path`.
pub(super) fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Removes the file `name` in the directory `directory` in `parent`, if it is there.
pub(super) fn unlink_in(
    parent: BorrowedFd<'_>,
    directory: &str,
    name: &str,
    path: &Path,
) -> Result<(), Error> {
    let unlink = || {
        let directory = open(parent, directory)?;
        rustix::fs::unlinkat(&directory, name, AtFlags::empty())
    };
    match unlink() {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(Error::io("remove", &path.join(name), error.into())),
    }
}

/// Removes the directory `name` in `parent` and all in it, but never anything of another file system: a mount in it
/// is an error. A file that somebody adds meanwhile goes too.
pub(super) fn remove_tree(parent: BorrowedFd<'_>, name: &str, path: &Path) -> Result<(), Error> {
    let name = std::ffi::CString::new(name).map_err(|error| Error::io("remove", path, error.into()))?;
    let mut removed = remove_below(parent, &name, MAX_DEPTH);
    for _ in 0..2 {
        if removed == Err(Errno::NOTEMPTY) {
            removed = remove_below(parent, &name, MAX_DEPTH);
        }
    }
    match removed {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(Error::io("remove", path, error.into())),
    }
}

fn remove_below(parent: BorrowedFd<'_>, name: &CStr, depth: usize) -> rustix::io::Result<()> {
    if depth == 0 {
        return Err(Errno::NOTEMPTY);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let directory = rustix::fs::openat2(parent, name, flags, Mode::empty(), resolve)?;
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let inside = entry.file_name();
        if inside == c"." || inside == c".." {
            continue;
        }
        // Some file systems do not tell the type in a listing.
        let kind = match entry.file_type() {
            FileType::Unknown => {
                let stat = rustix::fs::statat(&directory, inside, AtFlags::SYMLINK_NOFOLLOW)?;
                FileType::from_raw_mode(stat.st_mode)
            }
            kind => kind,
        };
        if kind == FileType::Directory {
            remove_below(directory.as_fd(), inside, depth - 1)?;
        } else {
            rustix::fs::unlinkat(&directory, inside, AtFlags::empty())?;
        }
    }
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
}
