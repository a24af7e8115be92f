//! The root file system of a node: Debian forky, made once with debootstrap and kept in the cache folder.
//!
//! The build machine's own packages may be too old (CRIU must be 4.2 or newer), so a node brings its own.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::process::{Signal, set_parent_process_death_signal};

use crate::cache::{self, CacheError, Lock};
use crate::host::{Facts, Missing};

const SUITE: &str = "forky";

/// Bumped when the way of building changes what the root file system contains.
const FORMAT: &str = "1";

const PACKAGES: &[&str] = &[
    "busybox-static",
    "containerd",
    "containernetworking-plugins",
    "criu",
    "crun",
    "curl",
    "dbus",
    "iproute2",
    "iptables",
    "jq",
    "kmod",
    "libcriu2",
    "nftables",
    "nodejs",
    "procps",
    "python3",
    "runc",
    "systemd-sysv",
    "util-linux",
];

/// debootstrap of older Debian releases has no script for forky; all suites of Debian share this one.
const SCRIPT: &str = "/usr/share/debootstrap/scripts/sid";

/// Folders that nothing on a node reads.
const UNUSED: &[&str] = &[
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "var/cache/apt",
    "var/lib/apt/lists",
    "var/log",
];

/// Why there is no root file system.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// The cache folder can't be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The machine lacks something.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Missing(Vec<Missing>),
    /// debootstrap is not installed.
    #[error("debootstrap is not installed: run make setup, or apt-get install debootstrap")]
    NoDebootstrap,
    /// apt has no Debian mirror.
    #[error(
        "apt's configuration names no Debian mirror: set AGENTCUBE_MIRROR to the address of one that has {SUITE}"
    )]
    NoMirror,
    /// debootstrap failed.
    #[error(
        "debootstrap of {SUITE} failed ({status}); the end of its output:\n{tail}\nIs the mirror that apt uses reachable, and does it have {SUITE}? Set AGENTCUBE_MIRROR to use another"
    )]
    Debootstrap {
        /// How it ended.
        status: String,
        /// The last lines that it printed.
        tail: String,
    },
    /// A file operation failed.
    #[error("{path}: {source}")]
    Io {
        /// What was touched.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The key of the root file system: it names all that it contains.
pub fn key() -> String {
    let parts = [SUITE, FORMAT, std::env::consts::ARCH];
    cache::key(parts.iter().chain(PACKAGES).map(|part| part.as_bytes()))
}

/// Where the root file system is, or will be once it is built.
///
/// # Errors
/// When the cache folder can't be used.
pub fn path() -> Result<PathBuf, CacheError> {
    Ok(cache::folder()?.join(format!("rootfs-{}", key())))
}

/// The path of the root file system, which is built first when it is not cached: that takes about a minute.
///
/// # Errors
/// When the machine lacks something, or debootstrap fails; each says what to do.
pub fn ensure() -> Result<PathBuf, RootfsError> {
    let done = path()?;
    if done.exists() {
        return Ok(done);
    }
    let folder = cache::folder()?;
    let missing = Facts::gather(true).missing();
    if !missing.is_empty() {
        return Err(RootfsError::Missing(missing));
    }
    let name = format!("rootfs-{}", key());
    let _lock = Lock::take(&folder, &name)?;
    if done.exists() {
        return Ok(done);
    }
    remove_unfinished(&folder)?;
    let partial = folder.join(format!("{name}.partial-{}", std::process::id()));
    build(&partial)?;
    // The rename is what makes it complete: a build that was killed leaves only a name that nobody looks for.
    rename(&partial, &done)?;
    Ok(done)
}

/// The mirror to use: `AGENTCUBE_MIRROR`, or else the first Debian mirror in apt's own configuration.
///
/// # Errors
/// When neither names one.
pub fn mirror() -> Result<String, RootfsError> {
    if let Some(mirror) = std::env::var("AGENTCUBE_MIRROR").ok().filter(|mirror| !mirror.is_empty()) {
        return Ok(mirror);
    }
    let targets = Command::new("apt-get")
        .args(["indextargets", "--format", "$(SITE) $(RELEASE)", "Created-By: Packages"])
        .output()
        .map_err(|_| RootfsError::NoMirror)?;
    pick_mirror(&String::from_utf8_lossy(&targets.stdout)).ok_or(RootfsError::NoMirror)
}

/// The first address of a whole archive among lines of `address release`.
fn pick_mirror(targets: &str) -> Option<String> {
    targets
        .lines()
        .filter_map(|line| line.trim().split_once(' '))
        .find(|(site, release)| {
            ["http://", "https://", "file:"].iter().any(|scheme| site.starts_with(scheme))
                && !release.contains("-security")
                && !site.trim_end_matches('/').ends_with("-security")
        })
        .map(|(site, _)| site.to_owned())
}

/// apt's HTTP proxy, which debootstrap would not look up.
pub(crate) fn proxy() -> Option<String> {
    let dump = Command::new("apt-config").args(["shell", "PROXY", "Acquire::http::Proxy"]).output().ok()?;
    let text = String::from_utf8_lossy(&dump.stdout).into_owned();
    let value = text.trim().strip_prefix("PROXY='")?.strip_suffix('\'')?;
    (!value.is_empty() && value != "DIRECT").then(|| value.to_owned())
}

fn build(target: &Path) -> Result<(), RootfsError> {
    if !Path::new("/usr/sbin/debootstrap").exists() {
        return Err(RootfsError::NoDebootstrap);
    }
    let mirror = mirror()?;
    eprintln!("Building the node's root file system (Debian {SUITE}, once; this takes about a minute) …");
    let start = Instant::now();

    // Its own mount namespace: debootstrap mounts /proc in the target, and a killed build must not leave that behind.
    let mut command = Command::new("unshare");
    command
        .args([
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "debootstrap",
            "--variant=minbase",
        ])
        .arg(format!("--include={}", PACKAGES.join(",")))
        .arg(SUITE)
        .arg(target)
        .args([&mirror, SCRIPT])
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null());
    if let Some(proxy) = proxy() {
        command.env("http_proxy", proxy);
    }
    // SAFETY: the closure only makes a system call. The signal is bound to this thread, which waits for the child.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
    let output = command.output().map_err(|source| RootfsError::Io { path: "unshare".into(), source })?;
    if !output.status.success() {
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(12)..].join("\n");
        // Best effort: what can't be removed now is removed by the next build.
        let _ = fs::remove_dir_all(target);
        return Err(RootfsError::Debootstrap { status: output.status.to_string(), tail });
    }
    for unused in UNUSED {
        let path = target.join(unused);
        if path.exists() {
            fs::remove_dir_all(&path).map_err(|source| RootfsError::Io { path, source })?;
        }
    }
    let log = target.join("var/log");
    fs::create_dir_all(&log).map_err(|source| RootfsError::Io { path: log, source })?;
    eprintln!("Built in {} s.", start.elapsed().as_secs());
    Ok(())
}

fn rename(from: &Path, to: &Path) -> Result<(), RootfsError> {
    fs::rename(from, to).map_err(|source| RootfsError::Io { path: to.into(), source })
}

/// Removes what killed builds left. The caller holds the lock, so none is in use.
fn remove_unfinished(folder: &Path) -> Result<(), RootfsError> {
    let error = |source| RootfsError::Io { path: folder.into(), source };
    for entry in fs::read_dir(folder).map_err(error)? {
        let entry = entry.map_err(error)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(&format!("rootfs-{}.partial-", key())) {
            fs::remove_dir_all(entry.path()).map_err(error)?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_first_that_holds_a_whole_archive() {
        let targets = "cdrom://disc bookworm\n\
                       http://one.example/debian-security bookworm-security\n\
                       http://two.example/debian bookworm-updates\n\
                       http://three.example/debian bookworm\n";
        assert_eq!(pick_mirror(targets).unwrap(), "http://two.example/debian");
        assert_eq!(pick_mirror(""), None);
        assert_eq!(pick_mirror("cdrom://disc bookworm\n"), None);
    }
}
