//! The root file system as CRIU wants it for a restore: a mount of its own, nothing mounted over what is above it.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    mount::{MountPropagationFlags, UnmountFlags, mount_bind_recursive, mount_change, unmount},
};

/// The directory of a bundle where it is mounted. It stays mounted when this process dies in a restore.
pub const RESTORE_ROOT: &str = "criu-root";

/// A mount that goes away with this value.
#[derive(Debug)]
pub(super) struct RootMount {
    path: PathBuf,
}

impl RootMount {
    /// Mounts `rootfs` once more, in a directory of `bundle`. What an earlier restore left there, killed in the middle,
    /// is unmounted first.
    pub(super) fn new(rootfs: &Path, bundle: &Path) -> io::Result<RootMount> {
        let path = bundle.join(RESTORE_ROOT);
        match fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => clear(&path)?,
            Err(error) => return Err(error),
        }
        let path = path.canonicalize()?;
        let mount = RootMount { path };
        mount_bind_recursive(rootfs, &mount.path)?;
        // What happens in it stays in it: an unmount here must not reach the container's own root. Not private: with an
        // older runc the container's root receives from the host's, and CRIU takes that from this mount.
        mount_change(&mount.path, MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
        Ok(mount)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RootMount {
    fn drop(&mut self) {
        let gone = clear(&self.path).and_then(|()| fs::remove_dir(&self.path));
        if let Err(error) = gone {
            tracing::warn!(path = %self.path.display(), %error, "a mount of a restore could not be removed");
        }
    }
}

/// Unmounts everything at `path`.
fn clear(path: &Path) -> io::Result<()> {
    loop {
        match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Nothing is mounted there.
            Err(Errno::INVAL) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
