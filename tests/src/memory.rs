//! Memory of processes and of cgroups, as /proc tells it.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// Memory of one or more processes, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Resident: all pages mapped.
    pub rss: u64,
    /// Proportional: a page that n processes map counts 1/n for each.
    pub pss: u64,
    /// Pages that nobody else maps.
    pub private: u64,
}

impl Memory {
    /// Reads `/proc/PID/smaps_rollup`.
    ///
    /// # Errors
    /// When a field is missing: the kernel gives all of them or none.
    pub fn parse(smaps_rollup: &str) -> Result<Self> {
        let field = |name: &str| -> Result<u64> {
            let value = smaps_rollup.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let value = value.with_context(|| format!("smaps_rollup has no {name}"))?;
            let kib: u64 =
                value.trim().trim_end_matches("kB").trim().parse().context("a size in smaps_rollup")?;
            Ok(kib << 10)
        };
        Ok(Self {
            rss: field("Rss")?,
            pss: field("Pss")?,
            private: field("Private_Clean")? + field("Private_Dirty")?,
        })
    }
}

/// The processes of a cgroup, as this machine numbers them.
///
/// # Errors
/// When the cgroup is not there.
pub fn processes(cgroup: &Path) -> Result<Vec<u32>> {
    let path = cgroup.join("cgroup.procs");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    text.lines().map(|line| line.parse().with_context(|| format!("a pid in {}", path.display()))).collect()
}

/// The proportional set size of all processes in a cgroup, in bytes.
///
/// # Errors
/// When the cgroup or one of its processes is not there.
pub fn pss(cgroup: &Path) -> Result<u64> {
    processes(cgroup)?.into_iter().try_fold(0, |sum, pid| {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        Ok(sum + Memory::parse(&text)?.pss)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_rollup_of_a_process() {
        let text = "\
55d0-7ffe ---p 00000000 00:00 0                          [rollup]
Rss:                8832 kB
Pss:                5127 kB
Pss_Dirty:          4000 kB
Shared_Clean:       4000 kB
Private_Clean:       832 kB
Private_Dirty:      4000 kB
Swap:                  0 kB
";
        let expected = Memory { rss: 8832 << 10, pss: 5127 << 10, private: 4832 << 10 };
        assert_eq!(Memory::parse(text).unwrap(), expected);
        assert!(Memory::parse("Rss: 1 kB\n").is_err());
        let own = fs::read_to_string("/proc/self/smaps_rollup").unwrap();
        assert!(Memory::parse(&own).unwrap().rss > 0);
    }

    #[test]
    fn a_cgroup_that_is_gone_is_an_error() {
        assert!(processes(Path::new("/nonexistent")).is_err());
    }
}
