//! The container's root file system: what containerd asks to be mounted on the bundle's `rootfs`.

use std::{
    io,
    path::{Path, PathBuf},
};

use containerd_shim::{
    mount::umount_recursive,
    protos::api::Mount,
    util::{mkdir, mount_rootfs},
};
use criu_hooks::engine::RESTORE_ROOT;
use rustix::mount::UnmountFlags;
use tracing::warn;

/// Why a root file system could not be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// A mount failed; those before it are undone.
    #[error("cannot mount {kind} from {source_dir:?} on {target}: {reason}")]
    Mount {
        /// The file system's type.
        kind: String,
        /// Its source.
        source_dir: String,
        /// Where.
        target: PathBuf,
        /// Why.
        reason: String,
    },
    /// It could not be unmounted.
    #[error("cannot unmount {target}: {source}")]
    Unmount {
        /// Where.
        target: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The directory that holds the root file system of the container in `bundle`.
pub fn path(bundle: &Path) -> PathBuf {
    bundle.join("rootfs")
}

/// Mounts `mounts`, one over the other, on the bundle's `rootfs`. Nothing to do without mounts: the bundle then
/// brings its own.
///
/// # Errors
/// [`RootfsError::Mount`]; nothing stays mounted then.
pub async fn mount(bundle: &Path, mounts: &[Mount]) -> Result<(), RootfsError> {
    let target = path(bundle);
    for one in mounts {
        let failed = |error: containerd_shim::Error| RootfsError::Mount {
            kind: one.type_.clone(),
            source_dir: one.source.clone(),
            target: target.clone(),
            reason: error.to_string(),
        };
        let mounted = async {
            mkdir(&target, 0o711).await?;
            mount_rootfs(one, &target).await
        };
        if let Err(error) = mounted.await {
            if let Err(error) = unmount(bundle) {
                warn!(%error, "after a failed mount");
            }
            return Err(failed(error));
        }
    }
    Ok(())
}

/// Unmounts all that is mounted on the bundle's `rootfs`, and what a restore may have left; at once, or lazily where
/// something still uses it. What is not mounted is no error. Nothing may stay mounted: containerd removes the bundle
/// with all that is below it.
///
/// # Errors
/// [`RootfsError::Unmount`].
pub fn unmount(bundle: &Path) -> Result<(), RootfsError> {
    for target in [bundle.join(RESTORE_ROOT), path(bundle)] {
        if umount_recursive(target.to_str(), 0).is_ok() {
            continue;
        }
        match rustix::mount::unmount(&target, UnmountFlags::DETACH) {
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(errno) => return Err(RootfsError::Unmount { target, source: errno.into() }),
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_mounts_are_nothing_to_do_and_nothing_to_undo() {
        let bundle = tempfile::tempdir().unwrap();
        mount(bundle.path(), &[]).await.unwrap();
        assert!(!path(bundle.path()).exists());
        unmount(bundle.path()).unwrap();
    }

    #[tokio::test]
    async fn a_failed_mount_names_what_and_where() {
        let bundle = tempfile::tempdir().unwrap();
        let wrong = Mount { type_: "no-such-fs".to_owned(), source: "none".to_owned(), ..Default::default() };
        let error = mount(bundle.path(), &[wrong]).await.unwrap_err().to_string();
        assert!(error.contains("no-such-fs") && error.contains("rootfs"), "{error}");
    }
}
