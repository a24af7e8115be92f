//! What an agent needs at once: the memory that it touched in the first moments after a wake.
//!
//! Kept beside the generations of a container's images, learnt from one wake and used at the next. Memory is counted in
//! blocks of 64 KiB. What is put in place ahead of its use cannot be seen to be used, so at each wake another sixteenth
//! of the blocks is left out: those that nobody misses leave the set. A set that is wrong, old or damaged costs time and
//! nothing else.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read, Write},
    os::fd::BorrowedFd,
};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

/// Its file, beside the directories of the generations.
pub const FILE: &str = "working-set.json";
/// Its file while it is written.
const NEW: &str = "working-set.json.new";
/// The size of a block in bytes.
pub(super) const BLOCK: u64 = 64 * 1024;
/// One block in so many sits out.
const ROTATION: u64 = 16;
const VERSION: u32 = 1;
/// The longest file that is read, in bytes.
const MAX_FILE: u64 = 4 << 20;
/// The most blocks of a set, whatever its cap: 4 GiB.
const MAX_BLOCKS: u64 = 64 * 1024;

/// A set as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WorkingSet {
    version: u32,
    /// The generation of the image whose wake it was learnt from.
    pub generation: u64,
    /// Counts the wakes: which blocks sit out.
    pub round: u64,
    /// By process id in the image: the first block and the number of blocks of each range.
    tasks: BTreeMap<u32, Vec<(u64, u64)>>,
}

impl WorkingSet {
    /// Of these blocks, named by process and number.
    pub fn new(generation: u64, round: u64, blocks: &BTreeSet<(u32, u64)>) -> WorkingSet {
        let mut tasks: BTreeMap<u32, Vec<(u64, u64)>> = BTreeMap::new();
        for (pid, block) in blocks {
            let ranges = tasks.entry(*pid).or_default();
            match ranges.last_mut() {
                Some((first, count)) if *first + *count == *block => *count += 1,
                _ => ranges.push((*block, 1)),
            }
        }
        WorkingSet { version: VERSION, generation, round, tasks }
    }

    /// All its blocks.
    pub fn blocks(&self) -> impl Iterator<Item = (u32, u64)> {
        self.tasks.iter().flat_map(|(pid, ranges)| {
            ranges
                .iter()
                .flat_map(move |(first, count)| (*first..first + count).map(move |block| (*pid, block)))
        })
    }

    /// Whether a block is put in place ahead of its use at the wake number `round`.
    pub fn is_prefetched(block: u64, round: u64) -> bool {
        !block.wrapping_add(round).is_multiple_of(ROTATION)
    }

    /// Reads what was kept; none when there is nothing that can be used.
    pub fn load(directory: BorrowedFd<'_>) -> Option<WorkingSet> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(directory, FILE, flags, Mode::empty()).ok()?);
        let mut bytes = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut bytes).ok()?;
        if bytes.len() as u64 > MAX_FILE { None } else { WorkingSet::parse(&bytes) }
    }

    /// Keeps it for the next wake.
    pub fn save(&self, directory: BorrowedFd<'_>) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::openat(directory, NEW, flags, Mode::RUSR | Mode::WUSR)?);
        file.write_all(&serde_json::to_vec(self)?)?;
        Ok(rustix::fs::renameat(directory, NEW, directory, FILE)?)
    }

    /// Removes what is kept in `directory`.
    pub fn remove(directory: BorrowedFd<'_>) {
        for name in [FILE, NEW] {
            let _ = rustix::fs::unlinkat(directory, name, rustix::fs::AtFlags::empty());
        }
    }

    fn parse(bytes: &[u8]) -> Option<WorkingSet> {
        let set: WorkingSet = serde_json::from_slice(bytes).ok()?;
        let mut room = MAX_BLOCKS;
        for ranges in set.tasks.values() {
            let mut free = 0;
            for (first, count) in ranges {
                let end = first.checked_add(*count).filter(|end| *end <= u64::MAX / BLOCK)?;
                if *count == 0 || *first < free {
                    return None;
                }
                room = room.checked_sub(*count)?;
                free = end;
            }
        }
        (set.version == VERSION).then_some(set)
    }
}

/// Learns a set in the course of one wake.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    missed: BTreeSet<(u32, u64)>,
    used: BTreeSet<(u32, u64)>,
}

impl Recorder {
    /// Somebody had to wait for a page.
    pub fn missed(&mut self, pid: u32, address: u64) {
        self.missed.insert((pid, address / BLOCK));
    }

    /// A block of the earlier set was put in place.
    pub fn prefetched(&mut self, pid: u32, block: u64) {
        self.used.insert((pid, block));
    }

    /// What is to be kept, at most `cap` bytes: first what was waited for.
    pub fn finish(self, generation: u64, round: u64, cap: u64) -> WorkingSet {
        let most = usize::try_from((cap / BLOCK).min(MAX_BLOCKS)).unwrap_or_default();
        let used = self.used.difference(&self.missed);
        let blocks = self.missed.iter().chain(used).take(most).copied().collect();
        WorkingSet::new(generation, round, &blocks)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::fd::AsFd;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_kept_is_read_again_and_can_be_removed() {
        let directory = tempfile::tempdir().unwrap();
        let opened = File::open(directory.path()).unwrap();
        assert_eq!(WorkingSet::load(opened.as_fd()), None);
        let blocks = [(1, 5), (1, 6), (1, 9), (4, 5)].into();
        let set = WorkingSet::new(3, 8, &blocks);
        set.save(opened.as_fd()).unwrap();
        let read = WorkingSet::load(opened.as_fd()).unwrap();
        assert_eq!(read, set);
        assert_eq!(read.blocks().collect::<BTreeSet<_>>(), blocks);
        WorkingSet::remove(opened.as_fd());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn blocks_that_nobody_misses_leave_within_one_turn() {
        let all: BTreeSet<_> = (0..64).map(|block| (1, block)).collect();
        let mut set = WorkingSet::new(0, 0, &all);
        for round in 1..=ROTATION {
            let mut recorder = Recorder::default();
            for (pid, block) in set.blocks() {
                if WorkingSet::is_prefetched(block, round) {
                    recorder.prefetched(pid, block);
                } else if block < 10 {
                    recorder.missed(pid, block * BLOCK + 5);
                }
            }
            set = recorder.finish(round, round, u64::MAX);
        }
        assert_eq!(set.blocks().collect::<Vec<_>>(), (0..10).map(|block| (1, block)).collect::<Vec<_>>());
    }

    #[test]
    fn a_set_is_capped_and_what_was_missed_goes_first() {
        let mut recorder = Recorder::default();
        (0..10).for_each(|block| recorder.prefetched(1, block));
        recorder.missed(2, 0);
        recorder.missed(1, 3 * BLOCK);
        let kept: Vec<_> = recorder.finish(0, 0, 3 * BLOCK).blocks().collect();
        assert_eq!(kept, [(1, 0), (1, 3), (2, 0)]);
    }

    #[test]
    fn what_cannot_be_is_ignored() {
        let file = |ranges: &str| {
            format!(r#"{{"version":1,"generation":1,"round":1,"tasks":{{"1":{ranges}}}}}"#).into_bytes()
        };
        assert!(WorkingSet::parse(&file("[[1,2],[3,1]]")).is_some());
        for ranges in [
            "[[1,2],[2,1]]",
            "[[3,1],[1,1]]",
            "[[1,0]]",
            "[[1,65537]]",
            "[[18446744073709551615,1]]",
            "[[1]]",
        ] {
            assert_eq!(WorkingSet::parse(&file(ranges)), None, "{ranges}");
        }
        let other = String::from_utf8(file("[]")).unwrap().replace("\"version\":1", "\"version\":2");
        assert_eq!(WorkingSet::parse(other.as_bytes()), None);
    }

    proptest! {
        #[test]
        fn arbitrary_files_are_used_or_ignored(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            ranges in prop::collection::vec(any::<(u64, u64)>(), 0..4),
        ) {
            let _ = WorkingSet::parse(&bytes);
            let set = WorkingSet { version: 1, generation: 0, round: 0, tasks: [(1, ranges)].into() };
            if let Some(set) = WorkingSet::parse(&serde_json::to_vec(&set).unwrap()) {
                prop_assert!(set.blocks().count() as u64 <= MAX_BLOCKS);
            }
        }
    }
}
