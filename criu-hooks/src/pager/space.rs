//! Which pages of a process are still missing, and which page of the image belongs to each address.
//!
//! Pages of the image are named by their number among the lazy pages of the process (its *source*); addresses change
//! as the process moves its memory.
//!
//! **Late words of `munmap`.** The kernel tells of an unmapping when others may have changed the same addresses since:
//! one thread unmaps A and is interrupted, another moves B to the hole and tells of that first. The word of A's end must
//! not be taken for B's. So the space knows where registered memory *stands*, as far as it was told: where it was
//! dumped, and where it was moved to; not where that was unmapped. When memory moves to where some stands already, the
//! word that the latter is gone is *owed*, and it takes nothing away when it comes. `mremap` itself tells of the end of the
//! old place after the move, which is owed when another thread has moved memory there meanwhile.
//!
//! When the words come in order nothing is owed, and what is unmapped is out at once. That is more than tidiness: memory
//! beside the hole may grow into it (`mremap` in place), which nobody is told of; the new pages are zeros, and registered
//! with the same userfaultfd. Other memory that comes there is not registered: the kernel takes no pages for it.

use std::collections::BTreeMap;

use super::uffd::Event;
use crate::image::pagemap::PAGE;

/// Consecutive missing pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// The address of the first.
    pub address: u64,
    /// Which page of the image it is.
    pub source: u64,
    /// How many pages.
    pub pages: u64,
}

/// The missing pages of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Space {
    /// By address: the first source, and how many pages.
    runs: BTreeMap<u64, (u64, u64)>,
    pages: u64,
    /// Where registered memory is known to be, unless that is told to be gone.
    standing: Ranges,
    /// What is still to be told to be gone, while something else is there already.
    owed: Ranges,
}

/// Addresses: where ranges begin, and where they end. None touches another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    fn add(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let (mut first, mut last) = (start, end);
        while let Some((&from, &to)) = self.0.range(..=last).next_back().filter(|(_, to)| **to >= first) {
            (first, last) = (first.min(from), last.max(to));
            self.0.remove(&from);
        }
        self.0.insert(first, last);
    }

    /// Takes out what is between `start` and `end`, and gives it.
    fn take(&mut self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let mut taken = Vec::new();
        while let Some((&from, &to)) =
            self.0.range(..end).next_back().filter(|(_, to)| **to > start && start < end)
        {
            self.0.remove(&from);
            taken.push((from.max(start), to.min(end)));
            if from < start {
                self.0.insert(from, start);
            }
            if to > end {
                self.0.insert(end, to);
            }
        }
        taken
    }
}

impl Space {
    /// How many pages are missing.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The address of the first missing page.
    pub fn first(&self) -> Option<u64> {
        self.runs.keys().next().copied()
    }

    /// Adds missing pages where none were.
    pub fn insert(&mut self, run: Run) {
        self.standing.add(run.address, run.address.saturating_add(run.pages * PAGE));
        self.pages += run.pages;
        self.runs.insert(run.address, (run.source, run.pages));
    }

    /// The page of the image that is missing at `address`.
    pub fn at(&self, address: u64) -> Option<u64> {
        let (start, (source, pages)) = self.runs.range(..=address).next_back()?;
        let page = (address - start) / PAGE;
        (page < *pages).then_some(source + page)
    }

    /// The first missing pages at or above `address`, at most `most` of them. They are consecutive in the image, so that
    /// they can be read at once, and fall into runs of consecutive addresses.
    pub fn gather(&self, address: u64, most: u64, found: &mut Vec<Run>) {
        found.clear();
        let mut room = most;
        let inside = self.at(address).map(|source| {
            let (start, (_, pages)) = self.runs.range(..=address).next_back().unwrap_or((&0, &(0, 0)));
            Run { address, source, pages: pages - (address - start) / PAGE }
        });
        let from = inside.map_or(address, |run| run.address + run.pages * PAGE);
        let above =
            self.runs.range(from..).map(|(&address, &(source, pages))| Run { address, source, pages });
        for run in inside.into_iter().chain(above) {
            let follows = found.last().is_none_or(|last| last.source + last.pages == run.source);
            if room == 0 || !follows {
                return;
            }
            let pages = run.pages.min(room);
            room -= pages;
            found.push(Run { pages, ..run });
        }
    }

    /// Takes all from `start` to `end` out, as it is in place or gone.
    pub fn cut(&mut self, start: u64, end: u64) -> Vec<Run> {
        if start >= end {
            return Vec::new();
        }
        self.split(start);
        self.split(end);
        let cut: Vec<Run> = self
            .runs
            .extract_if(start..end, |_, _| true)
            .map(|(address, (source, pages))| Run { address, source, pages })
            .collect();
        self.pages -= cut.iter().map(|run| run.pages).sum::<u64>();
        cut
    }

    /// Heeds what the process did with its memory.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Fault(_) | Event::Fork(_) => {}
            Event::Remove { start, end } => {
                self.cut(start, end);
            }
            Event::Unmap { start, end } => {
                let owed = self.owed.take(start, end);
                let spared: Vec<Run> = owed.iter().flat_map(|(start, end)| self.cut(*start, *end)).collect();
                self.cut(start, end);
                self.standing.take(start, end);
                for (start, end) in owed {
                    self.standing.add(start, end);
                }
                for run in spared {
                    self.insert(run);
                }
            }
            Event::Remap { from, to, bytes } => {
                let end = to.saturating_add(bytes);
                for (start, end) in self.standing.take(to, end) {
                    self.owed.add(start, end);
                }
                self.standing.add(to, end);
                // It was there, and that it is gone is told next, unless it stays (`MREMAP_DONTUNMAP`).
                self.standing.add(from, from.saturating_add(bytes));
                let moved = self.cut(from, from.saturating_add(bytes));
                self.cut(to, to.saturating_add(bytes));
                for run in moved {
                    self.insert(Run { address: run.address.wrapping_sub(from).wrapping_add(to), ..run });
                }
            }
        }
    }

    /// The space of a child that is forked now, to which nothing is owed.
    pub fn forked(&self) -> Space {
        Space { owed: Ranges::default(), ..self.clone() }
    }

    /// Takes out whatever `placed` knows to be in place, by its source.
    pub fn discard(&mut self, placed: impl Fn(u64) -> bool) {
        let runs = std::mem::take(&mut self.runs);
        self.pages = 0;
        for (address, (source, pages)) in runs {
            let mut page = 0;
            while page < pages {
                let first = page;
                let is_placed = placed(source + first);
                while page < pages && placed(source + page) == is_placed {
                    page += 1;
                }
                if !is_placed {
                    let address = address + first * PAGE;
                    self.insert(Run { address, source: source + first, pages: page - first });
                }
            }
        }
    }

    /// Makes a run begin at `address`, when it is inside one.
    fn split(&mut self, address: u64) {
        let Some((&start, &(source, pages))) = self.runs.range(..address).next_back() else { return };
        // Never in the middle of a page: what is half gone is gone.
        let before = (address - start).div_ceil(PAGE);
        if before < pages {
            self.runs.insert(start, (source, before));
            self.runs.insert(start + before * PAGE, (source + before, pages - before));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    fn space(runs: &[(u64, u64, u64)]) -> Space {
        let mut space = Space::default();
        for (page, source, pages) in runs {
            space.insert(Run { address: page * PAGE, source: *source, pages: *pages });
        }
        space
    }

    /// Page by page: the address's page, and the source.
    fn pages(space: &Space) -> BTreeMap<u64, u64> {
        let mut pages = BTreeMap::new();
        for (address, (source, count)) in &space.runs {
            for page in 0..*count {
                assert!(pages.insert(address / PAGE + page, source + page).is_none(), "{space:?}");
            }
        }
        assert_eq!(pages.len() as u64, space.pages());
        pages
    }

    #[test]
    fn what_is_read_at_once_is_consecutive_in_the_image() {
        let space = space(&[(1, 0, 4), (10, 4, 2), (20, 9, 3)]);
        let mut found = Vec::new();
        space.gather(2 * PAGE, 100, &mut found);
        let first = Run { address: 2 * PAGE, source: 1, pages: 3 };
        assert_eq!(found, [first, Run { address: 10 * PAGE, source: 4, pages: 2 }]);
        space.gather(2 * PAGE, 4, &mut found);
        assert_eq!(found, [first, Run { address: 10 * PAGE, source: 4, pages: 1 }]);
        space.gather(30 * PAGE, 4, &mut found);
        assert_eq!(found, []);
    }

    /// What happens to memory, in pages.
    #[derive(Debug, Clone)]
    enum Step {
        Placed(u64, u64),
        Removed(u64, u64),
        Unmapped(u64, u64),
        Moved(u64, u64, u64),
    }

    fn unmap(start: u64, end: u64) -> Event {
        Event::Unmap { start: start * PAGE, end: end * PAGE }
    }

    fn remap(from: u64, to: u64, pages: u64) -> Event {
        Event::Remap { from: from * PAGE, to: to * PAGE, bytes: pages * PAGE }
    }

    #[test]
    fn a_late_word_of_an_end_takes_nothing_of_what_came_since() {
        // 10 to 14 were unmapped, and 50 to 54 were moved there, of which the word came first.
        let mut late = space(&[(10, 0, 4), (50, 4, 4)]);
        late.apply(remap(50, 10, 4));
        late.apply(unmap(50, 54));
        late.apply(unmap(10, 14));
        let moved = BTreeMap::from([(10, 4), (11, 5), (12, 6), (13, 7)]);
        assert_eq!(pages(&late), moved);
        // It was owed once.
        late.apply(unmap(10, 14));
        assert!(pages(&late).is_empty());

        // All of it was in place when it was unmapped.
        let mut filled = space(&[(10, 0, 4), (50, 4, 4)]);
        filled.cut(10 * PAGE, 14 * PAGE);
        filled.apply(remap(50, 10, 4));
        filled.apply(unmap(10, 14));
        assert_eq!(pages(&filled), moved);

        // A second move to where the first came from, before the word of that place's end.
        let mut chain = space(&[(10, 0, 2), (20, 2, 2)]);
        chain.apply(remap(10, 30, 2));
        chain.apply(remap(20, 10, 2));
        chain.apply(unmap(10, 12));
        chain.apply(unmap(20, 22));
        assert_eq!(pages(&chain), BTreeMap::from([(30, 0), (31, 1), (10, 2), (11, 3)]));
    }

    #[test]
    fn what_is_unmapped_after_a_move_is_gone() {
        let mut space = space(&[(10, 0, 4), (50, 4, 4)]);
        // In order: the hole is told first.
        space.apply(unmap(10, 14));
        space.apply(remap(50, 10, 4));
        space.apply(unmap(50, 54));
        assert_eq!(space.pages(), 4);
        space.apply(unmap(11, 14));
        assert_eq!(pages(&space), BTreeMap::from([(10, 4)]));
        space.apply(unmap(10, 11));
        assert_eq!(space.pages(), 0);
        // A child is owed nothing.
        let mut parent = self::space(&[(10, 0, 4), (50, 4, 4)]);
        parent.apply(remap(50, 10, 4));
        let mut child = parent.forked();
        child.apply(unmap(10, 14));
        assert_eq!((child.pages(), parent.pages()), (0, 4));
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u64..70, 0u64..20).prop_map(|(at, pages)| Step::Placed(at, pages)),
            (0u64..70, 0u64..20).prop_map(|(at, pages)| Step::Removed(at, pages)),
            (0u64..70, 0u64..20).prop_map(|(at, pages)| Step::Unmapped(at, pages)),
            // The kernel lets no area move onto itself.
            (0u64..30, 0u64..20, 50u64..70).prop_map(|(from, pages, to)| Step::Moved(from, to, pages)),
            (50u64..70, 0u64..20, 0u64..30).prop_map(|(from, pages, to)| Step::Moved(from, to, pages)),
        ]
    }

    proptest! {
        /// The runs say the same as a table of single pages.
        #[test]
        fn runs_agree_with_single_pages(steps in prop::collection::vec(step(), 0..30), asked in 0u64..90) {
            let mut space = space(&[(5, 0, 20), (25, 20, 5), (40, 25, 9), (60, 40, 3)]);
            let mut model = pages(&space);
            // Every address that anything stood at and whose end was not told, and those whose end is owed.
            let (mut standing, mut owed) = (model.keys().copied().collect::<BTreeSet<_>>(), BTreeSet::new());
            for step in steps {
                match step {
                    Step::Placed(at, pages) => {
                        space.cut(at * PAGE, (at + pages) * PAGE);
                        model.retain(|page, _| *page < at || *page >= at + pages);
                    }
                    Step::Removed(at, pages) => {
                        space.apply(Event::Remove { start: at * PAGE, end: (at + pages) * PAGE });
                        model.retain(|page, _| *page < at || *page >= at + pages);
                    }
                    Step::Unmapped(at, pages) => {
                        space.apply(unmap(at, at + pages));
                        for page in at..at + pages {
                            if !owed.remove(&page) {
                                standing.remove(&page);
                                model.remove(&page);
                            }
                        }
                    }
                    Step::Moved(from, to, pages) => {
                        space.apply(remap(from, to, pages));
                        for page in to..to + pages {
                            if !standing.insert(page) {
                                owed.insert(page);
                            }
                        }
                        standing.extend(from..from + pages);
                        let moved: Vec<_> = (from..from + pages).filter_map(|page| Some((page, model.remove(&page)?))).collect();
                        model.retain(|page, _| *page < to || *page >= to + pages);
                        model.extend(moved.into_iter().map(|(page, source)| (page - from + to, source)));
                    }
                }
            }
            prop_assert_eq!(&pages(&space), &model);
            prop_assert_eq!(space.at(asked * PAGE), model.get(&asked).copied());
            let mut found = Vec::new();
            space.gather(asked * PAGE, 7, &mut found);
            let gathered: Vec<_> = found
                .iter()
                .flat_map(|run| (0..run.pages).map(|page| (run.address / PAGE + page, run.source + page)))
                .collect();
            prop_assert_eq!(gathered.is_empty(), model.range(asked..).next().is_none());
            prop_assert!(gathered.len() <= 7);
            for (expected, found) in model.range(asked..).zip(&gathered) {
                prop_assert_eq!((*expected.0, *expected.1), *found);
            }
            space.discard(|source| source % 3 == 0);
            model.retain(|_, source| *source % 3 != 0);
            prop_assert_eq!(&pages(&space), &model);
        }

        /// Whatever an event says.
        #[test]
        fn arbitrary_events_never_panic(words in any::<[u64; 3]>(), event in 0x12u32..0x17) {
            let mut space = space(&[(5, 0, 20), (40, 25, 9)]);
            if let Some(event) = Event::decode(&super::super::uffd::tests::message(event, words)) {
                space.apply(event);
            }
        }
    }
}
