//! A control group of the unified (v2) hierarchy: freezing, killing, and who is in it.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::{Mode, OFlags},
    process::Pid,
};
use tokio::io::Interest;

use crate::{procfs, readiness};

/// The type of a cgroup2 file system, as `statfs` tells it (`CGROUP2_SUPER_MAGIC`).
const CGROUP2_MAGIC: i64 = 0x6367_7270;

/// How often a state is looked at while no notification arrives: the kernel holds notifications of one cgroup
/// back until 10 ms have passed since the last one.
const RECHECK: Duration = Duration::from_millis(1);

/// The child cgroup of what is in a container's cgroup without being of the container: see [`Cgroup::set_aside`].
const ASIDE: &str = "agentcube.aside";

/// What can go wrong with a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path is not a directory of a cgroup v2 tree.
    #[error("{} is not a cgroup v2 directory; this runtime needs the unified hierarchy", .0.display())]
    NotUnified(PathBuf),
    /// No cgroup v2 tree is mounted here.
    #[error("no cgroup v2 file system is mounted (looked in /proc/self/mountinfo)")]
    NotMounted,
    /// The process is in a cgroup that this mount namespace cannot reach.
    #[error("process {pid} is in cgroup {path:?}, which is outside the mounted cgroup v2 tree")]
    Unreachable {
        /// The process.
        pid: Pid,
        /// Its cgroup, as `/proc/PID/cgroup` has it.
        path: String,
    },
    /// The cgroup is no longer there.
    #[error("cgroup {} is gone", .0.display())]
    Gone(PathBuf),
    /// A file of it could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// "read", "write" and the like.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The awaited state did not come in time.
    #[error("cgroup {} was not {wanted} after {} ms", path.display(), waited.as_millis())]
    Timeout {
        /// The cgroup.
        path: PathBuf,
        /// "frozen", "thawed" or "empty".
        wanted: &'static str,
        /// How long was waited.
        waited: Duration,
    },
}

/// The two facts of `cgroup.events`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Events {
    /// Some process is in the cgroup or below it.
    pub populated: bool,
    /// Every process in it stands still.
    pub frozen: bool,
}

/// A directory in the cgroup v2 tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup at an absolute `path`.
    ///
    /// # Errors
    /// [`Error::Gone`] when nothing is there, [`Error::NotUnified`] when it is something else.
    pub fn at(path: impl Into<PathBuf>) -> Result<Cgroup, Error> {
        let path = path.into();
        match rustix::fs::statfs(&path) {
            Ok(stat) if stat.f_type == CGROUP2_MAGIC && path.is_absolute() => Ok(Cgroup { path }),
            Ok(_) => Err(Error::NotUnified(path)),
            Err(rustix::io::Errno::NOENT) => Err(Error::Gone(path)),
            Err(error) => Err(Error::Io { action: "stat", path, source: error.into() }),
        }
    }

    /// The cgroup that process `pid` is in.
    ///
    /// # Errors
    /// When the process is gone, or its cgroup cannot be reached through a mounted cgroup v2 tree.
    pub fn of_pid(pid: Pid) -> Result<Cgroup, Error> {
        let read = |path: PathBuf| {
            fs::read_to_string(&path).map_err(|source| Error::Io { action: "read", path, source })
        };
        let membership = read(format!("/proc/{pid}/cgroup").into())?;
        let mounts = fs::read("/proc/self/mountinfo").map_err(|source| Error::Io {
            action: "read",
            path: "/proc/self/mountinfo".into(),
            source,
        })?;
        let inside = unified_path(&membership).ok_or(Error::NotMounted)?;
        let mounts = procfs::parse_mountinfo(&mounts);
        let mount = mounts.iter().find(|mount| mount.fs_type == "cgroup2").ok_or(Error::NotMounted)?;
        let path = resolve(&mount.mount_point, &mount.root, inside)
            .ok_or_else(|| Error::Unreachable { pid, path: inside.to_owned() })?;
        Cgroup::at(path)
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Stops every process in it and returns when all stand still, usually within half a millisecond. On failure it
    /// is thawed again.
    ///
    /// # Errors
    /// [`Error::Timeout`] when a process would not stop in time (one that waits for a device, say).
    pub async fn freeze(&self, timeout: Duration) -> Result<(), Error> {
        self.freeze_now()?;
        let result = self.wait(timeout, "frozen", |events| events.frozen).await;
        if result.is_err() {
            let _ = self.thaw_now();
        }
        result
    }

    /// Lets its processes run again and returns when they may. Thawing what is not frozen is no error.
    ///
    /// # Errors
    /// When the cgroup is gone, or an ancestor of it is frozen.
    pub async fn thaw(&self) -> Result<(), Error> {
        self.thaw_now()?;
        self.wait(Duration::from_secs(1), "thawed", |events| !events.frozen).await
    }

    /// Asks the kernel to let its processes run, without waiting until they do: for destructors.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn thaw_now(&self) -> Result<(), Error> {
        self.write("cgroup.freeze", "0")
    }

    /// Asks the kernel to stop its processes, without waiting until they stand still: for destructors.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn freeze_now(&self) -> Result<(), Error> {
        self.write("cgroup.freeze", "1")
    }

    /// Whether every process in it stands still.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn is_frozen(&self) -> Result<bool, Error> {
        Ok(self.events()?.frozen)
    }

    /// Whether a process is in it or below it, other than one that was [set aside](Self::set_aside).
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn populated(&self) -> Result<bool, Error> {
        Ok(self.is_populated(self.events()?))
    }

    fn is_populated(&self, events: Events) -> bool {
        let aside = self.path.join(ASIDE).exists();
        // What is aside counts for the kernel. A cgroup that is gone has nothing in it.
        events.populated && !(aside && self.procs().is_ok_and(|procs| procs.is_empty()))
    }

    /// Returns when no process is left in it.
    ///
    /// # Errors
    /// [`Error::Timeout`].
    pub async fn wait_unpopulated(&self, timeout: Duration) -> Result<(), Error> {
        self.wait(timeout, "empty", |events| !self.is_populated(events)).await
    }

    /// Kills every process in it and below it, frozen or not. With one [aside](Self::set_aside), which is spared, those
    /// that are there now: they should stand still.
    ///
    /// # Errors
    /// When the cgroup is gone, or the kernel is older than 5.14.
    pub fn kill(&self) -> Result<(), Error> {
        if !self.path.join(ASIDE).exists() {
            return self.write("cgroup.kill", "1");
        }
        for pid in self.procs()? {
            // One that has ended is as good.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        Ok(())
    }

    /// Puts a process, which is no part of the container, into a child cgroup of its own: for the kernel, and so for
    /// systemd, the cgroup is not empty any more. For all that is asked and done here it is not there.
    ///
    /// # Errors
    /// When the cgroup is gone, or a process is aside already.
    pub fn set_aside(&self, pid: Pid) -> Result<(), Error> {
        // What an earlier one has left; one with processes in it stays, and then there can be no other.
        let _ = self.clear_aside();
        let aside = self.path.join(ASIDE);
        fs::create_dir(&aside).map_err(|source| self.io("make", ASIDE, source))?;
        Cgroup { path: aside }.add(pid)
    }

    /// Removes what was for a process that was set aside and has ended.
    ///
    /// # Errors
    /// When it has not ended.
    pub fn clear_aside(&self) -> Result<(), Error> {
        match fs::remove_dir(self.path.join(ASIDE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.io("remove", ASIDE, error)),
            _ => Ok(()),
        }
    }

    /// Moves a process into it.
    ///
    /// # Errors
    /// When either is gone, or the cgroup has children with controllers.
    pub fn add(&self, pid: Pid) -> Result<(), Error> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// Every process in it and below it, in no order, without one that was [set aside](Self::set_aside).
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn procs(&self) -> Result<Vec<Pid>, Error> {
        let mut found = Vec::new();
        collect(&self.path, &mut found)?;
        Ok(found)
    }

    /// The processes directly in it.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn own_procs(&self) -> Result<Vec<Pid>, Error> {
        procs_of(&self.path)
    }

    /// What `cgroup.events` says now.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn events(&self) -> Result<Events, Error> {
        let path = self.path.join("cgroup.events");
        let text = fs::read_to_string(&path).map_err(|source| self.io("read", "cgroup.events", source))?;
        Ok(parse_events(&text))
    }

    /// A descriptor of `cgroup.procs` through which a new child can move itself here before it runs.
    pub(crate) fn open_procs(&self) -> Result<OwnedFd, Error> {
        rustix::fs::open(self.path.join("cgroup.procs"), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| self.io("open", "cgroup.procs", error.into()))
    }

    /// Moves a process here.
    pub(crate) fn enter(&self, pid: Pid) -> Result<(), Error> {
        let procs = self.open_procs()?;
        rustix::io::write(&procs, pid.as_raw_nonzero().to_string().as_bytes())
            .map(drop)
            .map_err(|error| self.io("write", "cgroup.procs", error.into()))
    }

    async fn wait(
        &self,
        timeout: Duration,
        wanted: &'static str,
        reached: impl Fn(Events) -> bool,
    ) -> Result<(), Error> {
        let start = Instant::now();
        if reached(self.events()?) {
            return Ok(());
        }
        let path = self.path.join("cgroup.events");
        let file = fs::File::open(&path).map_err(|source| self.io("open", "cgroup.events", source))?;
        let file = readiness::watch(file, Interest::PRIORITY)
            .map_err(|source| self.io("watch", "cgroup.events", source))?;
        loop {
            let mut text = [0u8; 256];
            let length = rustix::io::pread(file.get_ref(), &mut text, 0)
                .map_err(|error| self.io("read", "cgroup.events", error.into()))?;
            if reached(parse_events(&String::from_utf8_lossy(&text[..length]))) {
                return Ok(());
            }
            let waited = start.elapsed();
            if waited >= timeout {
                return Err(Error::Timeout { path: self.path.clone(), wanted, waited });
            }
            if let Ok(Ok(mut ready)) = tokio::time::timeout(RECHECK, file.ready(Interest::PRIORITY)).await {
                ready.clear_ready();
            }
        }
    }

    fn write(&self, file: &'static str, value: &str) -> Result<(), Error> {
        fs::write(self.path.join(file), value).map_err(|source| self.io("write", file, source))
    }

    fn io(&self, action: &'static str, file: &str, source: io::Error) -> Error {
        // ENODEV: the directory was removed while a file of it was open.
        let gone = source.kind() == io::ErrorKind::NotFound || source.raw_os_error() == Some(19);
        if gone && !self.path.exists() {
            return Error::Gone(self.path.clone());
        }
        Error::Io { action, path: self.path.join(file), source }
    }
}

fn collect(directory: &Path, found: &mut Vec<Pid>) -> Result<(), Error> {
    found.extend(procs_of(directory)?);
    let Ok(entries) = fs::read_dir(directory) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && entry.file_name() != ASIDE {
            // A child cgroup may vanish while we look: its processes are then elsewhere or gone.
            let _ = collect(&entry.path(), found);
        }
    }
    Ok(())
}

fn procs_of(directory: &Path) -> Result<Vec<Pid>, Error> {
    let path = directory.join("cgroup.procs");
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)).collect()),
        // EOPNOTSUPP: a threaded cgroup, whose processes its domain lists.
        Err(error) if error.raw_os_error() == Some(95) => Ok(Vec::new()),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !directory.exists() => {
            Err(Error::Gone(directory.to_owned()))
        }
        Err(source) => Err(Error::Io { action: "read", path, source }),
    }
}

fn parse_events(text: &str) -> Events {
    let is_set =
        |key: &str| text.lines().any(|line| line.strip_prefix(key).is_some_and(|rest| rest.trim() == "1"));
    Events { populated: is_set("populated "), frozen: is_set("frozen ") }
}

/// The path of the v2 hierarchy in a `/proc/PID/cgroup`.
fn unified_path(membership: &str) -> Option<&str> {
    membership.lines().find_map(|line| line.strip_prefix("0::"))
}

/// Where the cgroup `inside` is, when the tree's `root` is mounted at `mount_point`.
fn resolve(mount_point: &Path, root: &Path, inside: &str) -> Option<PathBuf> {
    let inside = Path::new(inside);
    let below = inside.strip_prefix(root).ok()?;
    let escapes = below.components().any(|part| part == std::path::Component::ParentDir);
    (!escapes).then(|| if below == Path::new("") { mount_point.to_owned() } else { mount_point.join(below) })
}

/// The value of `oom_kill` in `memory.events`: processes of this cgroup and those below it, whichever limit it was; 0
/// where it is missing.
pub fn oom_kills(events: &str) -> u64 {
    let value = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_whatever_their_order() {
        let events = parse_events("populated 1\nfrozen 0\n");
        assert_eq!(events, Events { populated: true, frozen: false });
        let events = parse_events("frozen 1\npopulated 0\nlater 7\n");
        assert_eq!(events, Events { populated: false, frozen: true });
    }

    #[test]
    fn the_unified_path_is_found_among_v1_controllers() {
        assert_eq!(unified_path("9:memory:/a\n0::/kubepods/pod1/c1\n"), Some("/kubepods/pod1/c1"));
        assert_eq!(unified_path("9:memory:/a\n"), None);
    }

    #[test]
    fn a_cgroup_resolves_through_the_mount_or_not_at_all() {
        let at = |root: &str, inside: &str| resolve(Path::new("/sys/fs/cgroup"), Path::new(root), inside);
        assert_eq!(at("/", "/a/b").unwrap(), Path::new("/sys/fs/cgroup/a/b"));
        assert_eq!(at("/", "/").unwrap(), Path::new("/sys/fs/cgroup"));
        assert_eq!(at("/a", "/a/b").unwrap(), Path::new("/sys/fs/cgroup/b"));
        assert_eq!(at("/a", "/other"), None);
        assert_eq!(at("/", "/../sibling"), None);
    }

    #[test]
    fn a_directory_elsewhere_is_no_cgroup() {
        let elsewhere = tempfile::tempdir().unwrap();
        assert!(matches!(Cgroup::at(elsewhere.path()), Err(Error::NotUnified(_))));
        assert!(matches!(Cgroup::at(elsewhere.path().join("none")), Err(Error::Gone(_))));
    }

    proptest::proptest! {
        #[test]
        fn no_text_upsets_the_parsers(text in "\\PC*|([a-z0:]{0,9}[ :/]?[01/]{0,4}\n){0,6}") {
            let _ = parse_events(&text);
            let _ = unified_path(&text);
        }

        /// Whatever a path says, it leads nowhere but below the mount.
        #[test]
        fn a_resolved_path_stays_below_the_mount(root in "/([a-z.]{0,3}/?){0,3}", inside in "/([a-z.]{0,3}/?){0,5}") {
            if let Some(path) = resolve(Path::new("/sys/fs/cgroup"), Path::new(&root), &inside) {
                proptest::prop_assert!(path.starts_with("/sys/fs/cgroup"));
                proptest::prop_assert!(!path.components().any(|part| part == std::path::Component::ParentDir));
            }
        }

        #[test]
        fn events_are_read_in_any_order(populated: bool, frozen: bool, other in "[a-z]{1,9}") {
            let mut lines = [
                format!("populated {}", u8::from(populated)),
                format!("x{other} 1"),
                format!("frozen {}", u8::from(frozen)),
            ];
            for _ in 0..3 {
                lines.rotate_left(1);
                let events = parse_events(&lines.join("\n"));
                proptest::prop_assert_eq!((events.populated, events.frozen), (populated, frozen));
            }
        }
    }
}
