//! CPU time of everything on the node but this program.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use rustix::time::{ClockId, clock_gettime};

/// The node's cgroup, as seen from inside: containerd, shims, CRIU, runc and the agents are in it or below it, and those
/// that have ended stay counted.
const NODE: &str = "/sys/fs/cgroup";

/// CPU time used so far, in microseconds.
pub fn used() -> Result<u64> {
    let all = used_by(Path::new(NODE))?;
    // Probing and polling cost time that nobody else would spend.
    let own = clock_gettime(ClockId::ProcessCPUTime);
    let own = own.tv_sec.unsigned_abs() * 1_000_000 + own.tv_nsec.unsigned_abs() / 1000;
    Ok(all.saturating_sub(own))
}

/// CPU time that a cgroup has used so far, in microseconds.
pub fn used_by(cgroup: &Path) -> Result<u64> {
    let path = cgroup.join("cpu.stat");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    usage(&text).with_context(|| format!("{} has no usage_usec", path.display()))
}

fn usage(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("usage_usec ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usage_is_found_among_the_other_lines() {
        assert_eq!(usage("user_usec 5\nusage_usec 168612\nsystem_usec 6\n"), Some(168_612));
        assert_eq!(usage(""), None);
    }
}
