//! CPU time of everything on the node but this program.

use std::fs;

use anyhow::{Context as _, Result};
use rustix::time::{ClockId, clock_gettime};

/// The node's cgroup, as seen from inside: containerd, shims, CRIU, runc and the agents are in it or below it, and those
/// that have ended stay counted.
const CPU_STAT: &str = "/sys/fs/cgroup/cpu.stat";

/// CPU time used so far, in microseconds.
pub fn used() -> Result<u64> {
    let text = fs::read_to_string(CPU_STAT).with_context(|| format!("reading {CPU_STAT}"))?;
    let all = usage(&text).with_context(|| format!("{CPU_STAT} has no usage_usec"))?;
    // Probing and polling cost time that nobody else would spend.
    let own = clock_gettime(ClockId::ProcessCPUTime);
    let own = own.tv_sec.unsigned_abs() * 1_000_000 + own.tv_nsec.unsigned_abs() / 1000;
    Ok(all.saturating_sub(own))
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
