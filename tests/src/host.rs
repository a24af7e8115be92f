//! What the harness needs of the machine it runs on, and what to do when something is missing.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::statvfs;
use rustix::process::geteuid;

use crate::cache;

/// Bytes that building the root file system and the images takes, with room to spare.
const NEEDED_BYTES: u64 = 2 << 30;

/// One thing that is missing, with what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// Not the superuser.
    #[error("a node needs root, for mounts and namespaces: run it as root, for example with sudo")]
    Root,
    /// No cgroup v2 hierarchy is mounted.
    #[error(
        "cgroup v2 is not mounted: boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 none /sys/fs/cgroup/unified"
    )]
    Cgroup2,
    /// The kernel can't freeze or kill a cgroup.
    #[error(
        "the kernel's cgroup v2 has no cgroup.freeze and cgroup.kill: a kernel of 5.14 or newer is needed"
    )]
    CgroupKill,
    /// No overlay file system.
    #[error("the kernel has no overlay file system: modprobe overlay, or enable CONFIG_OVERLAY_FS")]
    Overlay,
    /// No PID namespaces.
    #[error("the kernel has no PID namespaces: enable CONFIG_PID_NS")]
    PidNamespaces,
    /// The disk under the cache folder is nearly full.
    #[error(
        "{} has {} MiB left, and the node's root file system and images need {} MiB: free some space or set XDG_CACHE_HOME to a folder elsewhere",
        .folder.display(), .free / (1 << 20), NEEDED_BYTES / (1 << 20)
    )]
    DiskSpace {
        /// The cache folder.
        folder: PathBuf,
        /// Bytes that are free.
        free: u64,
    },
}

/// Facts about the machine that decide whether a node can run.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Effective user id.
    pub uid: u32,
    /// Where cgroup v2 is mounted.
    pub cgroup2: Option<PathBuf>,
    /// The overlay file system is known to the kernel.
    pub overlay: bool,
    /// PID namespaces exist.
    pub pid_namespaces: bool,
    /// The cache folder and the bytes that are free there; only asked when something has to be built.
    pub space: Option<(PathBuf, u64)>,
}

impl Facts {
    /// Looks at this machine. `building` tells that the root file system is not cached yet.
    pub fn gather(building: bool) -> Self {
        let free = |folder: PathBuf| {
            let stat = statvfs(&folder).ok()?;
            Some((folder, stat.f_bavail * stat.f_frsize))
        };
        Self {
            uid: geteuid().as_raw(),
            cgroup2: cgroup2_mount(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()),
            overlay: overlay_known(),
            pid_namespaces: Path::new("/proc/self/ns/pid").exists(),
            space: building.then(|| cache::folder().ok().and_then(free)).flatten(),
        }
    }

    /// Everything that keeps a node from running; empty when nothing does.
    pub fn missing(&self) -> Vec<Missing> {
        let mut missing = Vec::new();
        if self.uid != 0 {
            missing.push(Missing::Root);
        }
        if self.cgroup2.is_none() {
            missing.push(Missing::Cgroup2);
        }
        if !self.overlay {
            missing.push(Missing::Overlay);
        }
        if !self.pid_namespaces {
            missing.push(Missing::PidNamespaces);
        }
        match &self.space {
            Some((folder, free)) if *free < NEEDED_BYTES => {
                missing.push(Missing::DiskSpace { folder: folder.clone(), free: *free });
            }
            _ => {}
        }
        missing
    }
}

/// The mount point of cgroup v2 in the text of a mountinfo, wherever it is: alone at `/sys/fs/cgroup`, or beside v1.
pub fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        // The fields after " - " are the type, the source and the options of the file system.
        let (mount, filesystem) = line.split_once(" - ")?;
        (filesystem.split(' ').next() == Some("cgroup2"))
            .then(|| mount.split(' ').nth(4).map(PathBuf::from))
            .flatten()
    })
}

fn overlay_known() -> bool {
    let known = || {
        fs::read_to_string("/proc/filesystems")
            .is_ok_and(|text| text.lines().any(|line| line.ends_with("\toverlay")))
    };
    // A module that is not loaded yet is not listed; loading it is harmless where it is built in.
    known()
        || (std::process::Command::new("modprobe").arg("overlay").status().is_ok_and(|s| s.success())
            && known())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn good() -> Facts {
        Facts {
            uid: 0,
            cgroup2: Some("/sys/fs/cgroup".into()),
            overlay: true,
            pid_namespaces: true,
            space: Some(("/cache".into(), NEEDED_BYTES)),
        }
    }

    #[test]
    fn nothing_is_missing_on_a_good_machine() {
        assert_eq!(good().missing(), []);
    }

    #[test]
    fn each_missing_thing_is_named_with_what_to_do() {
        let facts = Facts {
            uid: 1000,
            cgroup2: None,
            overlay: false,
            pid_namespaces: false,
            space: Some(("/cache".into(), 5 << 20)),
        };
        let told: Vec<String> = facts.missing().iter().map(ToString::to_string).collect();
        for word in ["sudo", "mount -t cgroup2", "modprobe overlay", "CONFIG_PID_NS", "/cache has 5 MiB left"]
        {
            assert!(told.iter().any(|line| line.contains(word)), "{word} not in {told:?}");
        }
    }

    #[test]
    fn cgroup2_is_found_alone_and_beside_v1() {
        let pure = "25 18 0:21 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n";
        let hybrid = "24 18 0:20 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      25 24 0:21 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      26 24 0:22 / /sys/fs/cgroup/unified rw shared:3 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_mount(pure).unwrap(), Path::new("/sys/fs/cgroup"));
        assert_eq!(cgroup2_mount(hybrid).unwrap(), Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(cgroup2_mount("24 18 0:20 / /cgroup2 rw - tmpfs cgroup2 rw\n"), None);
    }
}
