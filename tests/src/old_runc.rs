//! The runc of older Debian releases, to test that the shim works with each: the node's root file system has the newest.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cache::{self, Lock};
use crate::debian::Apt;
use crate::rootfs;

/// The releases.
pub const RELEASES: [&str; 2] = ["bookworm", "trixie"];

/// The path of a release's runc in the cache folder, fetched first when it is not there. It runs on the node.
///
/// # Errors
/// Why it can't be had, in words: whoever needs it is then skipped with this reason.
pub fn ensure(release: &str) -> Result<PathBuf, String> {
    let text = |error: &dyn std::fmt::Display| format!("runc of Debian {release}: {error}");
    let folder = cache::folder().map_err(|error| text(&error))?;
    let done = folder.join(format!("runc-{release}"));
    if done.exists() {
        return Ok(done);
    }
    let _lock = Lock::take(&folder, &format!("runc-{release}")).map_err(|error| text(&error))?;
    if done.exists() {
        return Ok(done);
    }
    let rootfs = rootfs::ensure().map_err(|error| text(&error))?;
    let work = folder.join(format!("runc-{release}.partial"));
    fetch(release, &rootfs, work, &done).map_err(|error| text(&error))?;
    Ok(done)
}

fn fetch(release: &str, rootfs: &Path, work: PathBuf, done: &Path) -> Result<(), String> {
    let apt = Apt::new(release, rootfs, work)?;
    let tree = apt.unpack(&["runc"])?;
    let runc = ["usr/sbin/runc", "usr/bin/runc"].map(|path| tree.join(path));
    let runc = runc.into_iter().find(|path| path.exists()).ok_or("the package has no runc")?;
    fs::rename(runc, done).map_err(|error| error.to_string())
}
