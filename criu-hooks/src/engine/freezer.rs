//! Who thaws a container for CRIU once CRIU has every process in its grip: CRIU itself, where it can.
//!
//! Inside the container's cgroup namespace CRIU may not write the files of that namespace's root where the hierarchy is
//! mounted with `nsdelegate`, as systemd mounts it. There the engine thaws, when CRIU asks for external files: that is
//! after the last process was stopped, and before code of CRIU's runs in one. It differs in one thing: a CRIU that fails
//! can't freeze again before it lets go, so the processes run on, and no second try follows.

use crate::container::{Container, Namespace};

/// Whether the engine must thaw.
pub(super) fn is_ours(container: &Container) -> bool {
    container.namespaces.cgroup != Namespace::Inherited
        && delegates(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
}

/// Whether cgroup v2 is mounted with `nsdelegate`, by the text of a mountinfo.
fn delegates(mountinfo: &str) -> bool {
    mountinfo.lines().filter_map(|line| line.split_once(" - ")).any(|(_, filesystem)| {
        let mut words = filesystem.split(' ');
        words.next() == Some("cgroup2")
            && words.nth(1).is_some_and(|options| options.split(',').any(|option| option == "nsdelegate"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delegating_hierarchy_is_told_by_its_options() {
        let mount =
            |options: &str| format!("25 18 0:21 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 {options}\n");
        assert!(delegates(&mount("rw,nsdelegate,memory_recursiveprot")));
        assert!(!delegates(&mount("rw,memory_recursiveprot")));
        assert!(!delegates("25 18 0:21 / /mnt rw - tmpfs nsdelegate rw,nsdelegate\n"));
        assert!(!delegates(""));
    }
}
