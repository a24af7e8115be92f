//! What containers leave behind on a node: counted before and after, and compared.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use super::enter::Entrance;
use crate::cgroup;

/// Where containerd keeps bundles, in a folder for each of its namespaces.
const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task";

/// Folders whose files belong to sleeping agents, to shims or to runc.
const STATE: &[&str] = &[
    BUNDLES,
    "/var/lib/containerd/io.containerd.runtime.v2.task",
    "/run/containerd/runc",
    "/run/runc",
    "/var/lib/agentcube",
    "/run/agentcube",
    "/run/netns",
];

/// The folder of the image store, which its first use makes.
const IMAGE_STORE: &str = "/var/lib/agentcube/images";

/// How many of each thing there are, by kind and name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// Mount points.
    pub mounts: BTreeMap<String, usize>,
    /// Cgroups, relative to the node's; those of the harness's own commands are left out.
    pub cgroups: BTreeMap<String, usize>,
    /// Processes by name, zombies included and marked.
    pub processes: BTreeMap<String, usize>,
    /// Unix sockets: bound ones by their address, and socket files below `/run` whoever bound them.
    pub sockets: BTreeMap<String, usize>,
    /// Files and folders below `/var/lib/agentcube` (images) and in the state folders of shims and runc.
    pub files: BTreeMap<String, usize>,
}

impl Leftovers {
    pub(super) fn count(entrance: &Entrance) -> Self {
        let proc = Path::new("/proc").join(entrance.init.to_string());
        let root = proc.join("root");
        let mut counted = Self::default();
        // What the first use of a containerd namespace or of a network namespace makes, and nothing ever removes, is
        // no leftover: the folders and the cgroup called like the namespace, and the mount below which others go.
        let namespaces: Vec<String> = fs::read_dir(root.join(BUNDLES.trim_start_matches('/')))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        let mountinfo = fs::read_to_string(proc.join("mountinfo")).unwrap_or_default();
        let points = mountinfo.lines().filter_map(|line| line.split(' ').nth(4));
        for point in points.filter(|point| *point != "/run/netns") {
            add(&mut counted.mounts, point);
        }
        for path in cgroup::tree(&entrance.cgroup) {
            let name = path.strip_prefix(&entrance.cgroup).unwrap_or(&path).to_string_lossy().into_owned();
            if !name.starts_with(cgroup::EXEC_PREFIX) && !namespaces.contains(&name) {
                add(&mut counted.cgroups, &name);
            }
        }
        for entry in fs::read_dir(root.join("proc")).into_iter().flatten().flatten() {
            if let Some(name) = process_name(&entry.path()) {
                add(&mut counted.processes, &name);
            }
        }
        let bound = fs::read_to_string(proc.join("net/unix")).unwrap_or_default();
        let mut addresses: Vec<&str> =
            bound.lines().skip(1).filter_map(|line| line.split_whitespace().nth(7)).collect();
        // Accepted connections carry the address of their listener: how many there are says nothing.
        addresses.sort_unstable();
        addresses.dedup();
        for address in addresses {
            add(&mut counted.sockets, address);
        }
        walk(&root, Path::new("/run"), &mut |path, kind| {
            if kind.is_socket() {
                add(&mut counted.sockets, &format!("file {path}"));
            }
        });
        for folder in STATE {
            let namespace = |path: &str| namespaces.iter().any(|name| path == format!("{folder}/{name}"));
            walk(&root, Path::new(folder), &mut |path, _| {
                if !namespace(path) && path != IMAGE_STORE {
                    add(&mut counted.files, path);
                }
            });
        }
        counted
    }

    /// What is there now and was not there `before`, or is there more often.
    #[must_use]
    pub fn added_since(&self, before: &Self) -> Self {
        Self {
            mounts: more(&self.mounts, &before.mounts),
            cgroups: more(&self.cgroups, &before.cgroups),
            processes: more(&self.processes, &before.processes),
            sockets: more(&self.sockets, &before.sockets),
            files: more(&self.files, &before.files),
        }
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.kinds().iter().all(|(_, things)| things.is_empty())
    }

    fn kinds(&self) -> [(&'static str, &BTreeMap<String, usize>); 5] {
        [
            ("mounts", &self.mounts),
            ("cgroups", &self.cgroups),
            ("processes", &self.processes),
            ("sockets", &self.sockets),
            ("files", &self.files),
        ]
    }
}

impl fmt::Display for Leftovers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, things) in self.kinds() {
            for (name, count) in things {
                writeln!(f, "{kind}: {name} ({count})")?;
            }
        }
        Ok(())
    }
}

fn add(things: &mut BTreeMap<String, usize>, name: &str) {
    *things.entry(name.to_owned()).or_default() += 1;
}

fn more(now: &BTreeMap<String, usize>, before: &BTreeMap<String, usize>) -> BTreeMap<String, usize> {
    now.iter()
        .filter_map(|(name, count)| {
            let added = count.saturating_sub(before.get(name).copied().unwrap_or(0));
            (added > 0).then(|| (name.clone(), added))
        })
        .collect()
}

/// The name of the process with this folder in /proc; none for what is no process.
fn process_name(folder: &Path) -> Option<String> {
    let stat = fs::read_to_string(folder.join("stat")).ok()?;
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(") ")?;
    Some(if rest.starts_with('Z') { format!("{name} (zombie)") } else { name.to_owned() })
}

/// Calls `found` for everything below a folder of the node, without following links.
fn walk(root: &Path, folder: &Path, found: &mut impl FnMut(&str, fs::FileType)) {
    let Ok(inside) = folder.strip_prefix("/") else {
        return;
    };
    for entry in fs::read_dir(root.join(inside)).into_iter().flatten().flatten() {
        let path = folder.join(entry.file_name());
        let Ok(kind) = entry.file_type() else { continue };
        found(&path.to_string_lossy(), kind);
        // A container's root file system may be mounted below: its files are the container's business.
        if kind.is_dir() && entry.file_name() != "rootfs" {
            walk(root, &path, found);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_new_or_more_is_added() {
        let mut before = Leftovers::default();
        add(&mut before.processes, "shim");
        add(&mut before.mounts, "/gone");
        let mut after = Leftovers::default();
        add(&mut after.processes, "shim");
        add(&mut after.processes, "shim");
        add(&mut after.files, "/var/lib/agentcube/x");
        let added = after.added_since(&before);
        assert_eq!(added.to_string(), "processes: shim (1)\nfiles: /var/lib/agentcube/x (1)\n");
        assert!(!added.is_empty());
        assert!(after.added_since(&after).is_empty());
    }

    #[test]
    fn names_of_processes_may_hold_anything() {
        let folder = tempfile::tempdir().unwrap();
        let stat = folder.path().join("stat");
        fs::write(&stat, "12 (a) b) S 1 12").unwrap();
        assert_eq!(process_name(folder.path()).unwrap(), "a) b");
        fs::write(&stat, "12 (sh) Z 1 12").unwrap();
        assert_eq!(process_name(folder.path()).unwrap(), "sh (zombie)");
    }
}
