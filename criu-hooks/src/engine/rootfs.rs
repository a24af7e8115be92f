//! Where CRIU finds what it mounts in a restore: the root file system as a mount of its own, nothing mounted over what is
//! above it, and beside it places for other mounts that only CRIU sees.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount_bind_recursive, mount_change, unmount},
};

/// The directory of a bundle where all of this is mounted. It stays mounted when this process dies in a restore.
pub const RESTORE_ROOT: &str = "criu-root";

/// The directory below it for the root file system.
const ROOT: &str = "root";

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
        let mount = RootMount { path: path.canonicalize()? };
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("tmpfs", &mount.path, "tmpfs", flags, c"mode=700")?;
        // What is mounted below it, here or by CRIU in its own mount namespace, is seen nowhere else.
        mount_change(&mount.path, MountPropagationFlags::PRIVATE)?;
        let root = mount.root();
        fs::create_dir(&root)?;
        mount_bind_recursive(rootfs, &root)?;
        // What happens in it stays in it: an unmount here must not reach the container's own root. Not private: with an
        // older runc the container's root receives from the host's, and CRIU takes that from this mount.
        mount_change(&root, MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
        Ok(mount)
    }

    /// The root file system.
    pub(super) fn root(&self) -> PathBuf {
        self.path.join(ROOT)
    }

    /// A place for a mount, a directory or a file.
    pub(super) fn place(&self, name: &str, is_directory: bool) -> io::Result<PathBuf> {
        let place = self.path.join(name);
        if is_directory {
            fs::create_dir(&place)?;
        } else {
            fs::File::create_new(&place)?;
        }
        Ok(place)
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
