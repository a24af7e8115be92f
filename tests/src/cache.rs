//! The cache folder: what is slow to make (root file systems, images) is made once and kept outside the repository.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

/// Why the cache can't be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Neither variable that says where caches live is set.
    #[error(
        "neither XDG_CACHE_HOME nor HOME is set: set one of them to say where the node's files may be cached"
    )]
    NoHome,
    /// A file operation failed.
    #[error("the cache folder {path} can't be used: {source}; set XDG_CACHE_HOME to a writable folder")]
    Io {
        /// What was touched.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The cache folder of this project, `$XDG_CACHE_HOME/agentcube` or `~/.cache/agentcube`, made when missing.
///
/// # Errors
/// When no home is known or the folder can't be made.
pub fn folder() -> Result<PathBuf, CacheError> {
    let base = match (non_empty("XDG_CACHE_HOME"), non_empty("HOME")) {
        (Some(cache), _) => cache,
        (None, Some(home)) => home.join(".cache"),
        (None, None) => return Err(CacheError::NoHome),
    };
    let path = base.join("agentcube");
    fs::create_dir_all(&path).map_err(|source| CacheError::Io { path: path.clone(), source })?;
    Ok(path)
}

fn non_empty(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Sixteen hexadecimal digits that name a thing by all that it is made of.
pub fn key<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize())[..16].to_owned()
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// An exclusive lock between processes, given back when dropped or when the process dies.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code, reason = "held for its flock")] File);

impl Lock {
    /// Takes the lock `name` in `folder`, waiting for another holder and telling so on stderr.
    ///
    /// # Errors
    /// When the lock file can't be made.
    pub fn take(folder: &Path, name: &str) -> Result<Self, CacheError> {
        let path = folder.join(format!("{name}.lock"));
        let error = |source: io::Error| CacheError::Io { path: path.clone(), source };
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(error)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            eprintln!("Waiting for another process that is making {name} …");
            flock(&file, FlockOperation::LockExclusive).map_err(|errno| error(errno.into()))?;
        }
        Ok(Self(file))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn keys_depend_on_where_parts_end() {
        let one = key([b"ab".as_slice(), b"c"]);
        let other = key([b"a".as_slice(), b"bc"]);
        assert_eq!(one.len(), 16);
        assert_ne!(one, other);
        assert_eq!(one, key([b"ab".as_slice(), b"c"]));
    }

    #[test]
    fn a_lock_excludes_a_second_holder_until_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let first = Lock::take(folder.path(), "thing").unwrap();
        let second = File::options().write(true).open(folder.path().join("thing.lock")).unwrap();
        assert!(flock(&second, FlockOperation::NonBlockingLockExclusive).is_err());
        drop(first);
        flock(&second, FlockOperation::NonBlockingLockExclusive).unwrap();
    }
}
