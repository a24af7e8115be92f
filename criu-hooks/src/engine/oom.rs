//! Whether a restore failed for want of memory: CRIU and all that it makes live in the container's cgroup, and the
//! kernel kills there what goes beyond its limit or its pod's.

use super::RestoreError;
use crate::cgroup::{Cgroup, oom_kills};

/// How often the kernel has killed in a cgroup for want of memory.
pub(super) struct OomKills<'a> {
    cgroup: &'a Cgroup,
    before: u64,
}

impl<'a> OomKills<'a> {
    /// Counts those that there have been until now.
    pub(super) fn count(cgroup: &'a Cgroup) -> OomKills<'a> {
        OomKills { cgroup, before: kills(cgroup) }
    }

    /// Says so when there have been more since, in place of an error that shows only what came of it.
    pub(super) fn explain(&self, error: RestoreError) -> RestoreError {
        if kills(self.cgroup) == self.before {
            return error;
        }
        let limit = read(self.cgroup, "memory.max").trim().parse().ok();
        RestoreError::OutOfMemory { limit, error: Box::new(error) }
    }
}

fn kills(cgroup: &Cgroup) -> u64 {
    oom_kills(&read(cgroup, "memory.events"))
}

/// A file of the cgroup; empty where there is no memory controller.
fn read(cgroup: &Cgroup, file: &str) -> String {
    std::fs::read_to_string(cgroup.path().join(file)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_told_from_other_events() {
        assert_eq!(oom_kills("low 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 9\n"), 2);
        assert_eq!(oom_kills("oom 1\n"), 0);
        assert_eq!(oom_kills(""), 0);
    }
}
