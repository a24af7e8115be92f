//! The runc of older Debian releases, to test that the shim works with each: the node's root file system has the newest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::cache::{self, Lock};
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
    // What a killed process left.
    let _ = fs::remove_dir_all(&work);
    let fetched =
        fetch(release, &rootfs, &work).and_then(|runc| fs::rename(runc, &done).map_err(|e| e.to_string()));
    let _ = fs::remove_dir_all(&work);
    fetched.map(|()| done).map_err(|error| text(&error))
}

/// Downloads and unpacks the package with an apt of its own: lists, cache and sources are all below `work`.
fn fetch(release: &str, rootfs: &Path, work: &Path) -> Result<PathBuf, String> {
    let mirror = rootfs::mirror().map_err(|error| error.to_string())?;
    for part in ["state/lists/partial", "cache/archives/partial", "tree"] {
        fs::create_dir_all(work.join(part)).map_err(|error| error.to_string())?;
    }
    // The node's keys are newer than the host's may be.
    let keys = ["debian-archive-keyring.pgp", "debian-archive-keyring.gpg"]
        .map(|name| rootfs.join("usr/share/keyrings").join(name));
    let keys = keys.iter().find(|path| path.exists()).ok_or("the node has no archive keys")?;
    let sources = work.join("sources.list");
    let line = format!("deb [signed-by={}] {mirror} {release} main\n", keys.display());
    fs::write(&sources, line).map_err(|error| error.to_string())?;
    let status = work.join("status");
    fs::write(&status, "").map_err(|error| error.to_string())?;
    let apt = |words: &[&str]| {
        let option = |name: &str, path: &Path| format!("{name}={}", path.display());
        let mut command = Command::new("apt-get");
        command.current_dir(work).args([
            "-qq",
            "-o",
            "Dir::Etc::sourceparts=-",
            "-o",
            "APT::Sandbox::User=root",
        ]);
        command.args(["-o", "Acquire::Check-Valid-Until=false", "-o", "Acquire::Languages=none"]);
        for (name, path) in [
            ("Dir::Etc::sourcelist", sources.clone()),
            ("Dir::State", work.join("state")),
            ("Dir::State::status", status.clone()),
            ("Dir::Cache", work.join("cache")),
        ] {
            command.args(["-o", &option(name, &path)]);
        }
        run(command.args(words))
    };
    apt(&["update"])?;
    apt(&["download", "runc"])?;
    let entries = fs::read_dir(work).map_err(|error| error.to_string())?;
    let package = entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|end| end == "deb"))
        .ok_or("apt-get download left no package")?;
    let tree = work.join("tree");
    run(Command::new("dpkg-deb").arg("-x").args([&package, &tree]))?;
    let runc = ["usr/sbin/runc", "usr/bin/runc"].map(|path| tree.join(path));
    runc.into_iter().find(|path| path.exists()).ok_or_else(|| "the package has no runc".to_owned())
}

fn run(command: &mut Command) -> Result<(), String> {
    let shown = command.get_program().to_string_lossy().into_owned();
    let Output { status, stderr, .. } = command.output().map_err(|error| format!("{shown}: {error}"))?;
    if status.success() {
        return Ok(());
    }
    Err(format!("{shown} failed ({status}): {}", String::from_utf8_lossy(&stderr).trim()))
}
