//! The cgroup v2 subtree of a node: made by its supervisor, removed by it, and swept when the supervisor could not.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

/// What the names of all nodes begin with; the pid of the process that owns the node and a number follow.
pub const PREFIX: &str = "agentcube-node-";

/// The child that holds the node's first process and containerd: processes may not live in a cgroup that gives
/// controllers to its children.
pub const INIT: &str = "init";

/// What the names of the children begin with that hold one command of the harness each.
pub const EXEC_PREFIX: &str = "exec-";

/// Makes a cgroup for a node and gives its children every controller that there is.
///
/// # Errors
/// When the directory can't be made. A controller that can't be had is no error: see [`controllers`].
pub fn create(path: &Path) -> io::Result<()> {
    if let Some(root) = path.parent() {
        enable_controllers(root);
    }
    fs::create_dir(path)?;
    fs::create_dir(path.join(INIT))?;
    enable_controllers(path);
    Ok(())
}

/// The controllers that a cgroup can use; none on a host whose controllers all belong to cgroup v1.
pub fn controllers(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

/// Gives the children of a cgroup every controller that it has.
pub(crate) fn enable_controllers(path: &Path) {
    for controller in controllers(path) {
        // One by one, so that one that is refused does not keep the others away.
        let _ = fs::write(path.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// A cgroup and all below it, children first.
pub fn tree(path: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        found.append(&mut tree(&entry.path()));
    }
    found.push(path.to_owned());
    found
}

/// Whether a process lives in the cgroup or below it.
pub fn populated(path: &Path) -> bool {
    fs::read_to_string(path.join("cgroup.events"))
        .is_ok_and(|text| text.lines().any(|line| line == "populated 1"))
}

/// Kills everything in the cgroup and below it, frozen or not, and removes the directories. A cgroup that is gone is fine.
///
/// # Errors
/// When something is still there after `patience`.
pub fn kill_and_remove(path: &Path, patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        match kill_and_remove_once(path) {
            Err(error)
                if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) && Instant::now() < deadline =>
            {
                thread::sleep(Duration::from_millis(2));
            }
            result => return result,
        }
    }
}

fn kill_and_remove_once(path: &Path) -> io::Result<()> {
    if populated(path) {
        fs::write(path.join("cgroup.kill"), "1")?;
    }
    for path in tree(path) {
        match fs::remove_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// The pid of the owner in the name of a node.
pub fn owner(name: &str) -> Option<u32> {
    let (pid, number) = name.strip_prefix(PREFIX)?.split_once('-')?;
    number.parse::<u32>().ok()?;
    pid.parse().ok()
}

/// The names of all nodes under the root of cgroup v2, in order.
pub fn nodes(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| owner(name).is_some())
        .collect();
    names.sort();
    names
}

/// Removes the cgroups of nodes whose owner and whose processes are gone: a supervisor that was killed leaves them.
pub fn sweep(root: &Path) {
    for name in nodes(root) {
        let path = root.join(&name);
        if owner(&name).is_some_and(|pid| !alive(pid)) && !populated(&path) {
            // A supervisor that is cleaning up at this moment may be faster; that is fine.
            let _ = kill_and_remove(&path, Duration::ZERO);
        }
    }
}

/// Whether a process with this pid exists.
pub fn alive(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_is_read_from_well_formed_names_only() {
        assert_eq!(owner("agentcube-node-12-3"), Some(12));
        for other in
            ["agentcube-node-12", "agentcube-node-x-3", "agentcube-node-12-x", "agentcube-12-3", "init"]
        {
            assert_eq!(owner(other), None, "{other}");
        }
    }
}
