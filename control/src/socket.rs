//! Where control sockets live, how a shim listens on one, and how tools find them.
//!
//! A shim listens on `ROOT/NAMESPACE/ID.sock`, where ID is that of the sandbox, or of the container when it
//! belongs to none. Sockets are path sockets with mode 0600 in directories with mode 0700: whoever may connect
//! is root, and nothing in another network namespace can reach them, as it could an abstract socket.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{self, AtFlags, CWD, FileType, FlockOperation, Mode, OFlags},
    io::Errno,
    net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
    process::geteuid,
};
use sha2::{Digest, Sha256};

/// Where the sockets of a node live.
pub const DEFAULT_ROOT: &str = "/run/agentcube";

/// The longest path of a socket, in bytes: `sun_path` holds 108 with the closing zero.
pub const MAX_PATH: usize = 107;

/// The longest namespace that stands in a path as it is, in bytes. A longer one is replaced by a digest.
const MAX_NAMESPACE: usize = 32;

/// The longest identifier containerd allows, in bytes.
const MAX_IDENTIFIER: usize = 76;

const SUFFIX: &str = ".sock";

/// How many connections may wait for the shim to accept them.
const BACKLOG: i32 = 64;

/// Why a socket could not be named, made or found.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Not an identifier of containerd's, so it must not become a path.
    #[error(
        "{what} {value:?} is no containerd identifier: use letters, digits and single '.', '_' or '-' between them, \
         at most 76 bytes"
    )]
    InvalidName {
        /// "namespace" or "id".
        what: &'static str,
        /// What was given.
        value: String,
    },
    /// The path does not fit in a socket address.
    #[error("the socket path {} is longer than {MAX_PATH} bytes: choose a shorter socket root", .0.display())]
    TooLong(PathBuf),
    /// A directory in the chain cannot be trusted.
    #[error("{} {problem}: remove it, or choose another socket root", path.display())]
    Untrusted {
        /// What cannot be trusted.
        path: PathBuf,
        /// Why.
        problem: &'static str,
    },
    /// Another process listens there.
    #[error("another process listens on {}: a shim for this sandbox runs already", .0.display())]
    InUse(PathBuf),
    /// A system call failed.
    #[error("cannot {action} {}: {source}{}", path.display(), hint(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => " (control sockets are for root: run this as root)",
        _ => "",
    }
}

impl SocketError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(Errno) -> SocketError {
        move |errno| SocketError::Io { action, path: path.to_owned(), source: errno.into() }
    }
}

/// The directory of a namespace's sockets.
///
/// # Errors
/// [`SocketError::InvalidName`].
pub fn namespace_dir(root: &Path, namespace: &str) -> Result<PathBuf, SocketError> {
    check_identifier("namespace", namespace)?;
    if namespace.len() <= MAX_NAMESPACE { Ok(root.join(namespace)) } else { Ok(root.join(digest(namespace))) }
}

/// The path of the socket of a sandbox, or of a container without one. The same arguments always give the
/// same path; a name that would make it too long is replaced by a digest, which no identifier can equal.
///
/// # Errors
/// [`SocketError::InvalidName`], and [`SocketError::TooLong`] when `root` leaves no room.
pub fn path(root: &Path, namespace: &str, id: &str) -> Result<PathBuf, SocketError> {
    check_identifier("id", id)?;
    let dir = namespace_dir(root, namespace)?;
    let plain = dir.join(format!("{id}{SUFFIX}"));
    if plain.as_os_str().len() <= MAX_PATH {
        return Ok(plain);
    }
    let hashed = dir.join(format!("{}{SUFFIX}", digest(id)));
    if hashed.as_os_str().len() <= MAX_PATH { Ok(hashed) } else { Err(SocketError::TooLong(hashed)) }
}

/// containerd's rule for namespaces and ids. It excludes '/', '..' and a leading '_', so a name can neither
/// leave its directory nor equal a digest.
fn check_identifier(what: &'static str, value: &str) -> Result<(), SocketError> {
    let valid = value.len() <= MAX_IDENTIFIER
        && value
            .split(['.', '_', '-'])
            .all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric()));
    if valid { Ok(()) } else { Err(SocketError::InvalidName { what, value: value.to_owned() }) }
}

/// 33 bytes that stand for a longer name.
fn digest(name: &str) -> String {
    use std::fmt::Write as _;
    let hash = Sha256::digest(name.as_bytes());
    hash.iter().take(16).fold(String::from("_"), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Listens on the socket of a sandbox, or of a container without one.
///
/// Makes the directories (mode 0700) and the socket (mode 0600 before anybody can connect). A socket on which
/// nobody listens any more is replaced; two shims that try at once cannot both win. The listener is closed on
/// exec and blocking; `ttrpc`'s `Listener::try_from` makes it non-blocking.
///
/// # Errors
/// As [`path`]; [`SocketError::Untrusted`] when a directory is a link, is somebody else's or is writable by
/// others, or when something that is no socket is in the way; [`SocketError::InUse`] when a shim listens there.
pub fn listen(root: &Path, namespace: &str, id: &str) -> Result<UnixListener, SocketError> {
    let path = path(root, namespace, id)?;
    let dir = namespace_dir(root, namespace)?;
    private_dir(root)?;
    let dir_fd = private_dir(&dir)?;
    // Between "nobody listens" and the new socket another shim may do the same: one at a time.
    fs::flock(&dir_fd, FlockOperation::LockExclusive).map_err(SocketError::io("lock", &dir))?;
    remove_stale(&dir_fd, &path)?;

    let address = SocketAddrUnix::new(&path).map_err(SocketError::io("name", &path))?;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(SocketError::io("make a socket for", &path))?;
    // Linux makes the socket's file with the mode of the descriptor, so it never has another one.
    fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(SocketError::io("set the mode of", &path))?;
    net::bind(&socket, &address).map_err(SocketError::io("bind", &path))?;
    net::listen(&socket, BACKLOG).map_err(SocketError::io("listen on", &path))?;
    Ok(UnixListener::from(socket))
}

/// Removes the socket of a sandbox that is gone. Nothing there is fine.
///
/// # Errors
/// As [`path`], and [`SocketError::Io`].
pub fn remove(root: &Path, namespace: &str, id: &str) -> Result<(), SocketError> {
    let path = path(root, namespace, id)?;
    match fs::unlink(&path) {
        Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
        Err(errno) => Err(SocketError::io("remove", &path)(errno)),
    }
}

/// Opens a directory that only we can use, making it when it is missing. Its parent must exist.
fn private_dir(path: &Path) -> Result<OwnedFd, SocketError> {
    let untrusted = |problem| SocketError::Untrusted { path: path.to_owned(), problem };
    match fs::mkdir(path, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => (),
        Err(errno) => return Err(SocketError::io("make the directory", path)(errno)),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = match fs::openat(CWD, path, flags, Mode::empty()) {
        Ok(dir) => dir,
        Err(Errno::LOOP | Errno::NOTDIR) => return Err(untrusted("is no directory but a link or a file")),
        Err(errno) => return Err(SocketError::io("open the directory", path)(errno)),
    };
    let stat = fs::fstat(&dir).map_err(SocketError::io("look at", path))?;
    if stat.st_uid != geteuid().as_raw() {
        return Err(untrusted("belongs to another user"));
    }
    let mode = Mode::from_raw_mode(stat.st_mode);
    if mode.intersects(Mode::WGRP | Mode::WOTH) {
        return Err(untrusted("is writable by others"));
    }
    if mode.intersects(Mode::RWXG | Mode::RWXO) {
        // Made by hand or by an init system with its usual mode; nobody else could put anything in it.
        fs::fchmod(&dir, Mode::RWXU).map_err(SocketError::io("set the mode of", path))?;
    }
    Ok(dir)
}

/// Makes room for a new socket: removes an old one on which nobody listens.
fn remove_stale(dir: impl AsFd, path: &Path) -> Result<(), SocketError> {
    let name = path.file_name().unwrap_or_default();
    let stat = match fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(SocketError::io("look at", path)(errno)),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(SocketError::Untrusted { path: path.to_owned(), problem: "is in the way and no socket" });
    }
    match knock(path) {
        // Refused: the file is there, but nobody listens.
        Err(Errno::CONNREFUSED) => {
            fs::unlinkat(&dir, name, AtFlags::empty()).map_err(SocketError::io("remove the stale", path))
        }
        // A full queue (AGAIN) belongs to somebody who listens, if slowly.
        Ok(()) | Err(Errno::AGAIN) => Err(SocketError::InUse(path.to_owned())),
        Err(errno) => Err(SocketError::io("connect to", path)(errno)),
    }
}

/// Connects to a socket and hangs up. Never waits.
fn knock(path: &Path) -> Result<(), Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    net::connect(&socket, &SocketAddrUnix::new(path)?)
}

/// A control socket that [`discover`] found.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    /// The name of its directory: the namespace, or a digest that starts with `_` when that is long.
    pub namespace: String,
    /// Its own name without `.sock`: an id, or a digest that starts with `_`.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
}

impl Endpoint {
    /// The address in ttrpc's form, `unix://…`.
    pub fn address(&self) -> String {
        format!("unix://{}", self.path.display())
    }
}

/// All control sockets below `root`, or those of one namespace, in order of namespace and name. Whether
/// anybody listens on them is not looked at. A `root` that does not exist holds none.
///
/// # Errors
/// [`SocketError::InvalidName`] of the namespace; [`SocketError::Io`] when a directory cannot be read.
pub fn discover(root: &Path, namespace: Option<&str>) -> Result<Vec<Endpoint>, SocketError> {
    let dirs = match namespace {
        Some(namespace) => vec![namespace_dir(root, namespace)?],
        None => entries(root, FileType::Directory)?,
    };
    let mut found = Vec::new();
    for dir in dirs {
        let namespace = name_of(&dir);
        for path in entries(&dir, FileType::Socket)? {
            if let Some(name) = name_of(&path).strip_suffix(SUFFIX) {
                found.push(Endpoint { namespace: namespace.clone(), name: name.to_owned(), path });
            }
        }
    }
    found.sort();
    Ok(found)
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The entries of one type in a directory; none when there is no directory. Links are not followed.
fn entries(dir: &Path, wanted: FileType) -> Result<Vec<PathBuf>, SocketError> {
    let error = |source| SocketError::Io { action: "read the directory", path: dir.to_owned(), source };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(error(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(error)?;
        // An entry may vanish between the listing and the look at it: its shim has ended.
        if let Ok(stat) = fs::statat(CWD, entry.path(), AtFlags::SYMLINK_NOFOLLOW)
            && FileType::from_raw_mode(stat.st_mode) == wanted
        {
            found.push(entry.path());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
