//! `memory.high`, out of the way while an agent is restored.
//!
//! Above it the kernel slows a cgroup down, by up to two seconds for each allocation: right for an agent that grows, but a
//! restore brings nothing but what the agent had before, and in one go.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;
use tracing::error;

const FILE: &str = "memory.high";
const NONE: &str = "max";

/// A `memory.high` that does not hold at the moment. It is put back when this goes.
#[derive(Debug)]
pub struct Lifted {
    path: PathBuf,
    value: String,
}

/// Lifts the `memory.high` of the cgroup `dir`; nothing where there is none.
///
/// # Errors
/// When it is there but cannot be read or written.
pub fn lift(dir: &Path) -> io::Result<Option<Lifted>> {
    let path = dir.join(FILE);
    let value = match fs::read_to_string(&path) {
        Ok(text) => text.trim().to_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if value == NONE {
        return Ok(None);
    }
    fs::write(&path, NONE)?;
    Ok(Some(Lifted { path, value }))
}

impl Drop for Lifted {
    fn drop(&mut self) {
        if let Err(error) = write(&self.path, &self.value)
            // A container that has ended needs none.
            && self.path.exists()
        {
            let (path, value) = (self.path.display(), &self.value);
            error!(%path, %value, %error, "the limit was lifted for a wake and could not be put back: write it by hand");
        }
    }
}

/// Where the kernel can, without waiting until it has reclaimed what is above: the agent does that.
fn write(path: &Path, value: &str) -> io::Result<()> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let mut file = fs::File::options().write(true).truncate(true).custom_flags(flags).open(path)?;
    file.write_all(value.as_bytes())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn in_force(dir: &Path) -> String {
        fs::read_to_string(dir.join(FILE)).unwrap()
    }

    #[test]
    fn it_is_lifted_and_put_back() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "4096\n").unwrap();
        let lifted = lift(dir.path()).unwrap().unwrap();
        assert_eq!(in_force(dir.path()), "max");
        drop(lifted);
        assert_eq!(in_force(dir.path()), "4096");
    }

    #[test]
    fn where_none_is_set_nothing_is_written() {
        let dir = tempfile::tempdir().unwrap();
        assert!(lift(dir.path()).unwrap().is_none());
        fs::write(dir.path().join(FILE), "max\n").unwrap();
        assert!(lift(dir.path()).unwrap().is_none());
        assert_eq!(in_force(dir.path()), "max\n");
    }

    #[test]
    fn one_that_is_gone_is_no_trouble() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "4096\n").unwrap();
        let lifted = lift(dir.path()).unwrap();
        fs::remove_file(dir.path().join(FILE)).unwrap();
        drop(lifted);
        assert!(!dir.path().join(FILE).exists());
    }
}
