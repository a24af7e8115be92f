//! Whether a restore can be lazy, and is better so.

use std::{fs, io, path::Path};

use super::{LazyOptions, uffd};
use crate::{
    cgroup::Cgroup,
    image::{
        PageMaps,
        pagemap::{PAGE, Pagemap},
    },
};

/// Why a restore was eager: all memory was in place before anything ran.
#[derive(Debug, thiserror::Error)]
pub enum Eager {
    /// It was not asked for.
    #[error("lazy restore is off")]
    Off,
    /// There is not enough to gain.
    #[error("only {bytes} bytes could come later, less than {least}")]
    Small {
        /// Bytes of lazy memory.
        bytes: u64,
        /// The bytes from which on it is lazy.
        least: u64,
    },
    /// The memory would not fit: better the restore fails than the agent that runs.
    #[error(
        "the memory of the image, {bytes} bytes, and a sixteenth more are over the {limit} that limits leave free"
    )]
    Limit {
        /// Bytes of memory in the image.
        bytes: u64,
        /// What the limits of the container and of the cgroups above it leave free, in bytes.
        limit: u64,
    },
    /// The kernel does not allow it.
    #[error("the kernel refuses userfaultfd: {0}")]
    Refused(io::Error),
    /// The pager or the means to end the container are not there.
    #[error("the pager cannot be started: {0}")]
    Pager(io::Error),
}

/// What the page maps of an image say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Amount {
    /// Pages of memory, lazy or not.
    pages: u64,
    /// Pages that may come later.
    lazy: u64,
}

impl Amount {
    fn of<'a>(maps: impl IntoIterator<Item = &'a Pagemap>) -> Amount {
        maps.into_iter().flat_map(|map| &map.entries).fold(Amount::default(), |sum, entry| Amount {
            pages: sum.pages + entry.pages,
            lazy: sum.lazy + if entry.lazy { entry.pages } else { 0 },
        })
    }
}

/// Decides from the facts.
fn decide(amount: Amount, least: u64, limit: Option<u64>) -> Result<(), Eager> {
    let (bytes, all) = (amount.lazy * PAGE, amount.pages * PAGE);
    if bytes == 0 || bytes < least {
        return Err(Eager::Small { bytes, least });
    }
    match limit {
        // CRIU, page tables and what the agent takes meanwhile come on top.
        Some(limit) if all.saturating_add(all / 16) > limit => Err(Eager::Limit { bytes: all, limit }),
        _ => Ok(()),
    }
}

/// What the limits of the cgroup `path` and of those above it leave free, in bytes; none without a limit. The page cache
/// counts as free: the kernel takes it back before it refuses memory.
fn free(path: &Path) -> Option<u64> {
    let least = |path: &Path| {
        let read = |name: &str| fs::read_to_string(path.join(name)).ok();
        let limit: u64 = read("memory.max")?.trim().parse().ok()?;
        let current: u64 = read("memory.current").and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        let cache = read("memory.stat").map_or(0, |text| file_cache(&text));
        Some(limit.saturating_sub(current.saturating_sub(cache)))
    };
    path.ancestors().filter_map(least).min()
}

/// Bytes of files in memory that can be dropped or written back.
fn file_cache(stat: &str) -> u64 {
    let of = |line: &str| match line.split_once(' ')? {
        ("inactive_file" | "active_file", bytes) => bytes.parse::<u64>().ok(),
        _ => None,
    };
    stat.lines().filter_map(of).sum()
}

/// Whether the restore of an image with the page maps `maps` into `cgroup` is to be lazy; the reason when not.
pub(crate) fn consider(options: &LazyOptions, maps: &PageMaps, cgroup: &Cgroup) -> Result<(), Eager> {
    decide(Amount::of(maps.of_processes()), options.least_bytes, free(cgroup.path()))?;
    uffd::probe().map_err(Eager::Refused)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::image::pagemap::tests::pagemap;

    #[test]
    fn all_processes_count() {
        let maps = [
            Pagemap::parse(&pagemap(&[(0x1000, 10, 6), (0x20000, 5, 4)])).unwrap(),
            Pagemap::parse(&pagemap(&[(0x1000, 7, 6), (0x20000, 5, 1)])).unwrap(),
        ];
        assert_eq!(Amount::of(&maps), Amount { pages: 27, lazy: 17 });
        let parent = Pagemap::parse(&pagemap(&[(0x1000, 10, 3), (0x20000, 5, 1)])).unwrap();
        assert_eq!(Amount::of([&parent]), Amount { pages: 15, lazy: 10 });
    }

    #[test]
    fn lazy_only_where_it_gains_and_fits() {
        let amount = Amount { pages: 2000, lazy: 1000 };
        assert!(decide(amount, 1000 * PAGE, None).is_ok());
        assert!(matches!(decide(amount, 1001 * PAGE, None), Err(Eager::Small { .. })));
        assert!(matches!(decide(Amount::default(), 0, None), Err(Eager::Small { bytes: 0, .. })));
        assert!(decide(amount, 0, Some(2125 * PAGE)).is_ok());
        assert!(matches!(decide(amount, 0, Some(2125 * PAGE - 1)), Err(Eager::Limit { .. })));
    }

    #[test]
    fn the_tightest_limit_counts() {
        let top = tempfile::tempdir().unwrap();
        let container = top.path().join("pod/container");
        fs::create_dir_all(&container).unwrap();
        assert_eq!(free(&container), None);
        let set = |path: &Path, max: &str, current: &str, stat: &str| {
            fs::write(path.join("memory.max"), max).unwrap();
            fs::write(path.join("memory.current"), current).unwrap();
            fs::write(path.join("memory.stat"), stat).unwrap();
        };
        set(&container, "max\n", "5\n", "");
        assert_eq!(free(&container), None);
        set(&top.path().join("pod"), "1000\n", "700\n", "anon 500\ninactive_file 150\nactive_file 50\n");
        assert_eq!(free(&container), Some(500));
        set(&container, "400\n", "0\n", "");
        assert_eq!(free(&container), Some(400));
        set(top.path(), "100\n", "300\n", "");
        assert_eq!(free(&container), Some(0));
    }
}
