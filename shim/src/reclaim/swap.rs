//! Whether there is anything to push memory out to.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Where the kernel lists its swap.
pub const SWAPS: &str = "/proc/swaps";
/// The limit of a cgroup's swap.
const MAX: &str = "memory.swap.max";
/// What a cgroup has in swap.
const CURRENT: &str = "memory.swap.current";
/// Below this much free swap there is nothing to be gained, in bytes.
const LEAST: u64 = 1 << 20;

/// Why memory cannot be pushed out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Nowhere {
    /// The node has no swap.
    #[error(
        "there is nothing to reclaim to: the node has no swap ({SWAPS} is empty); add swap or zram, or use another depth"
    )]
    NoSwap,
    /// All of it is used.
    #[error("there is nothing to reclaim to: the node's swap is full ({free} bytes free)")]
    Full {
        /// What is free, in bytes.
        free: u64,
    },
    /// A cgroup forbids it.
    #[error("there is nothing to reclaim to: {file} allows {max} bytes of swap, of which {used} are used")]
    Forbidden {
        /// The file with the limit.
        file: PathBuf,
        /// The limit, in bytes.
        max: u64,
        /// What is used of it, in bytes.
        used: u64,
    },
}

/// Whether the memory of `cgroup` can be pushed out to the swap that `swaps` (`/proc/swaps`) lists.
///
/// # Errors
/// [`Nowhere`].
pub fn destination(cgroup: &Path, swaps: &Path) -> Result<(), Nowhere> {
    let text = fs::read_to_string(swaps).unwrap_or_default();
    let free: u64 = free(&text).ok_or(Nowhere::NoSwap)?;
    if free < LEAST {
        return Err(Nowhere::Full { free });
    }
    // The limits of all above hold too. Where there is no such file there is no limit.
    for directory in cgroup.ancestors() {
        let number = |file| fs::read_to_string(directory.join(file)).ok()?.trim().parse::<u64>().ok();
        let Some(max) = number(MAX) else { continue };
        let used = number(CURRENT).unwrap_or(0);
        if max.saturating_sub(used) < LEAST {
            return Err(Nowhere::Forbidden { file: directory.join(MAX), max, used });
        }
    }
    Ok(())
}

/// Free swap in bytes; none when there is no swap.
fn free(swaps: &str) -> Option<u64> {
    let mut lines = swaps.lines().skip(1).filter(|line| !line.trim().is_empty()).peekable();
    lines.peek()?;
    // Filename, Type, Size, Used, Priority; sizes in KiB. A name has its spaces escaped.
    let free = |line: &str| {
        let mut numbers = line.split_whitespace().skip(2).map_while(|field| field.parse::<u64>().ok());
        Some(numbers.next()?.saturating_sub(numbers.next()?) * 1024)
    };
    Some(lines.filter_map(free).sum())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const HEADER: &str = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
    const ZRAM: &str = "/dev/zram0                              partition\t1048572\t\t1024\t\t100\n";

    fn look(swaps: &str, limits: &[(&str, &str)]) -> Result<(), Nowhere> {
        let root = tempfile::tempdir().unwrap();
        let cgroup = root.path().join("pod/container");
        fs::create_dir_all(&cgroup).unwrap();
        fs::write(root.path().join("swaps"), swaps).unwrap();
        for (file, value) in limits {
            fs::write(root.path().join(file), value).unwrap();
        }
        destination(&cgroup, &root.path().join("swaps"))
    }

    #[test]
    fn without_swap_there_is_nothing_to_reclaim_to() {
        for none in ["", HEADER] {
            assert_eq!(look(none, &[]), Err(Nowhere::NoSwap));
        }
        assert!(Nowhere::NoSwap.to_string().contains("nothing to reclaim to"));
    }

    #[test]
    fn swap_without_limits_will_do_and_full_swap_will_not() {
        assert_eq!(look(&format!("{HEADER}{ZRAM}"), &[]), Ok(()));
        assert_eq!(look(&format!("{HEADER}{ZRAM}"), &[("pod/memory.swap.max", "max\n")]), Ok(()));
        let full = format!("{HEADER}/swap file 1024 1000 -2\n");
        assert_eq!(look(&full, &[]), Err(Nowhere::Full { free: 24 << 10 }));
    }

    #[test]
    fn a_limit_anywhere_above_holds() {
        for place in ["pod/container", "pod"] {
            let file = format!("{place}/memory.swap.max");
            let refused = look(&format!("{HEADER}{ZRAM}"), &[(&file, "0\n")]).unwrap_err();
            assert!(matches!(refused, Nowhere::Forbidden { max: 0, .. }), "{refused}");
            assert!(refused.to_string().contains(&file), "{refused}");
        }
        let used = [("pod/memory.swap.max", "8388608\n"), ("pod/memory.swap.current", "8388608\n")];
        assert!(look(&format!("{HEADER}{ZRAM}"), &used).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_text_upsets_the_parser(text: String) {
            let _ = free(&text);
        }
    }
}
