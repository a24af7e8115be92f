//! Page maps: which pages of a process are in an image, and where.
//!
//! `pagemap-PID.img` is two magic words and then records, each a 32-bit length and a protobuf message: first a head that
//! names the pages file, then entries, sorted by address. `pages-ID.img` holds the pages of all entries that are
//! PRESENT, in their order, without anything in between.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::BorrowedFd,
};

use protobuf::CodedInputStream;

use super::directory;

/// The size of a page in bytes. CRIU's images on x86-64 know no other.
pub const PAGE: u64 = 4096;
/// The longest page map that is read, in bytes: three million entries and more.
pub const MAX_PAGEMAP: u64 = 64 << 20;
/// What a page map begins with.
const MAGIC: [u32; 2] = [0x5456_4319, 0x5608_4025];
/// The longest record: five numbers and their tags take less.
const MAX_RECORD: usize = 64;
/// Where addresses of programs end, with page tables of five levels.
const END_OF_ADDRESSES: u64 = 1 << 56;

/// Flags of an entry.
mod flag {
    pub const PARENT: u32 = 1;
    pub const LAZY: u32 = 2;
    pub const PRESENT: u32 = 4;
}

/// Why a page map cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PagemapError {
    /// It cannot be read.
    #[error("the page map {name} cannot be read: {source}")]
    Read {
        /// The file.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// It is longer than any that is read.
    #[error("the page map {0} is longer than {MAX_PAGEMAP} bytes and was not read")]
    TooLong(String),
    /// It is not what CRIU writes.
    #[error("the page map is damaged at byte {at}: {why}")]
    Damaged {
        /// Where, in bytes from its beginning.
        at: usize,
        /// What is wrong.
        why: &'static str,
    },
    /// The pages file is shorter than its page map.
    #[error("the page map needs {needed} pages, and its pages file holds {held}")]
    TooFewPages {
        /// How many pages are PRESENT.
        needed: u64,
        /// How many the pages file has.
        held: u64,
    },
}

/// Consecutive pages that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The address of the first page.
    pub start: u64,
    /// How many pages; never none.
    pub pages: u64,
    /// They are in the parent image, at the same addresses.
    pub in_parent: bool,
    /// They may be restored after the process has started.
    pub lazy: bool,
    /// Where they are in the pages file, in pages from its beginning; none when they are not in it.
    pub position: Option<u64>,
}

impl Entry {
    /// The address behind the last page.
    pub fn end(&self) -> u64 {
        self.start + self.pages * PAGE
    }
}

/// A page map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pagemap {
    /// The number in the name of its pages file.
    pub pages_id: u32,
    /// Sorted by address, none overlapping another.
    pub entries: Vec<Entry>,
}

impl Pagemap {
    /// The name of the page map of process `pid`, by its id inside the container.
    pub fn name(pid: u32) -> String {
        format!("pagemap-{pid}.img")
    }

    /// The name of the pages file.
    pub fn pages_name(&self) -> String {
        format!("pages-{}.img", self.pages_id)
    }

    /// How many pages the pages file must hold.
    pub fn present(&self) -> u64 {
        self.entries.iter().filter(|entry| entry.position.is_some()).map(|entry| entry.pages).sum()
    }

    /// What this map says of the pages of `entry`, an entry of another map: the parts of its own entries, in order.
    pub fn within(&self, entry: &Entry) -> impl Iterator<Item = Entry> {
        let (start, end) = (entry.start, entry.end());
        let first = self.entries.partition_point(|own| own.end() <= start);
        self.entries[first..].iter().take_while(move |own| own.start < end).map(move |own| {
            let from = own.start.max(start);
            let skipped = (from - own.start) / PAGE;
            Entry {
                start: from,
                pages: (own.end().min(end) - from) / PAGE,
                position: own.position.map(|position| position + skipped),
                ..*own
            }
        })
    }

    /// How many pages may be restored after the process has started.
    pub fn lazy(&self) -> u64 {
        self.entries.iter().filter(|entry| entry.lazy).map(|entry| entry.pages).sum()
    }

    /// Reads the page map `name` of the directory `images`. Nothing is said about its pages file, see
    /// [`Pagemap::check_pages`].
    ///
    /// # Errors
    /// [`PagemapError`].
    pub fn read(images: BorrowedFd<'_>, name: &str) -> Result<Pagemap, PagemapError> {
        let failed = |source| PagemapError::Read { name: name.to_owned(), source };
        let file = File::from(directory::open_file(images, name).map_err(|error| failed(error.into()))?);
        let mut bytes = Vec::new();
        file.take(MAX_PAGEMAP + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > MAX_PAGEMAP {
            return Err(PagemapError::TooLong(name.to_owned()));
        }
        Pagemap::parse(&bytes)
    }

    /// Reads a page map from its bytes.
    ///
    /// # Errors
    /// [`PagemapError::Damaged`].
    pub fn parse(bytes: &[u8]) -> Result<Pagemap, PagemapError> {
        let mut records = Records { bytes, at: 0 };
        if [records.word()?, records.word()?] != MAGIC {
            return Err(records.damaged("it does not begin as one"));
        }
        let head = records.next()?.ok_or_else(|| records.damaged("it has no head"))?;
        let pages_id = head_of(head).map_err(|why| records.damaged(why))?;
        let mut entries: Vec<Entry> = Vec::new();
        let (mut free, mut position) = (0, 0);
        while let Some(record) = records.next()? {
            let entry = entry_of(record, position).map_err(|why| records.damaged(why))?;
            if entry.start < free {
                return Err(records.damaged("an entry overlaps the one before it or is out of order"));
            }
            free = entry.end();
            if entry.position.is_some() {
                position += entry.pages;
            }
            entries.push(entry);
        }
        Ok(Pagemap { pages_id, entries })
    }

    /// Checks that a pages file of `bytes` bytes holds all that this map says. It may hold more: it can serve several.
    ///
    /// # Errors
    /// [`PagemapError::TooFewPages`].
    pub fn check_pages(&self, bytes: u64) -> Result<(), PagemapError> {
        let (needed, held) = (self.present(), bytes / PAGE);
        if needed > held { Err(PagemapError::TooFewPages { needed, held }) } else { Ok(()) }
    }
}

/// The page map `bytes` with the pages that are in `parent` marked as lazy where they are lazy there, but for those at
/// the addresses `kept`; none when nothing changes. CRIU marks only pages that it writes itself.
pub(crate) fn with_lazy_parent(
    bytes: &[u8],
    parent: &Pagemap,
    kept: &[u64],
) -> Result<Option<Vec<u8>>, PagemapError> {
    let map = Pagemap::parse(bytes)?;
    let mut entries = Vec::with_capacity(map.entries.len());
    for entry in &map.entries {
        if !entry.in_parent || entry.lazy {
            entries.push(*entry);
            continue;
        }
        let mut next = entry.start;
        let mut push = |start: u64, end: u64, lazy| {
            if start < end {
                entries.push(Entry { start, pages: (end - start) / PAGE, lazy, ..*entry });
            }
        };
        for piece in parent.within(entry).filter(|piece| piece.lazy && piece.position.is_some()) {
            push(next, piece.start, false);
            next = piece.start;
            let mut stacks: Vec<u64> = kept.iter().map(|address| address / PAGE * PAGE).collect();
            stacks.retain(|page| (piece.start..piece.end()).contains(page));
            stacks.sort_unstable();
            stacks.dedup();
            for page in stacks {
                push(next, page, true);
                push(page, page + PAGE, false);
                next = page + PAGE;
            }
            push(next, piece.end(), true);
            next = piece.end();
        }
        push(next, entry.end(), false);
    }
    if entries == map.entries {
        return Ok(None);
    }
    Ok(Some(encode(bytes, &entries)))
}

/// The page map `bytes` with the pages at these addresses marked as not lazy; none when nothing changes.
pub(crate) fn with_eager(bytes: &[u8], addresses: &[u64]) -> Result<Option<Vec<u8>>, PagemapError> {
    let map = Pagemap::parse(bytes)?;
    let mut pages: Vec<u64> = addresses.iter().map(|address| address / PAGE * PAGE).collect();
    pages.sort_unstable();
    pages.dedup();
    let mut entries = Vec::with_capacity(map.entries.len());
    for entry in &map.entries {
        let mut next = entry.start;
        let mut push = |start: u64, end: u64, lazy| {
            if start < end {
                entries.push(Entry { start, pages: (end - start) / PAGE, lazy, ..*entry });
            }
        };
        for &page in pages.iter().filter(|page| entry.lazy && (entry.start..entry.end()).contains(*page)) {
            push(next, page, true);
            push(page, page + PAGE, false);
            next = page + PAGE;
        }
        push(next, entry.end(), entry.lazy);
    }
    Ok((entries != map.entries).then(|| encode(bytes, &entries)))
}

/// The page map of which `bytes` is an older version, with these entries.
fn encode(bytes: &[u8], entries: &[Entry]) -> Vec<u8> {
    // The magic numbers and the head stay as they are: both were read.
    let head = bytes.get(8..12).map_or(0, |word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
    let mut encoded = bytes[..12 + head as usize].to_vec();
    for entry in entries {
        let mut flags = if entry.in_parent { flag::PARENT } else { flag::PRESENT };
        if entry.lazy {
            flags |= flag::LAZY;
        }
        // The old field for the number of pages is a required one.
        let fields =
            [(1, entry.start), (2, entry.pages & u64::from(u32::MAX)), (4, flags.into()), (5, entry.pages)];
        let mut message = Vec::with_capacity(MAX_RECORD);
        for (field, mut value) in fields {
            message.push(field << 3);
            while value > 0x7f {
                message.push(value.to_le_bytes()[0] | 0x80);
                value >>= 7;
            }
            message.push(value.to_le_bytes()[0]);
        }
        encoded.extend(u32::try_from(message.len()).unwrap_or_default().to_le_bytes());
        encoded.extend(message);
    }
    encoded
}

/// Walks over the records.
struct Records<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Records<'a> {
    fn damaged(&self, why: &'static str) -> PagemapError {
        PagemapError::Damaged { at: self.at, why }
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], PagemapError> {
        let taken = self.bytes.get(self.at..).and_then(|rest| rest.get(..length));
        let taken = taken.ok_or_else(|| self.damaged("it ends within a record"))?;
        self.at += length;
        Ok(taken)
    }

    fn word(&mut self) -> Result<u32, PagemapError> {
        let mut word = [0; 4];
        word.copy_from_slice(self.take(4)?);
        Ok(u32::from_le_bytes(word))
    }

    fn next(&mut self) -> Result<Option<&'a [u8]>, PagemapError> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let length = self.word()? as usize;
        if length > MAX_RECORD {
            return Err(self.damaged("a record is too long"));
        }
        self.take(length).map(Some)
    }
}

/// Gives each field of a message, all of them plain numbers, to `field`; which says whether it knows it.
fn fields(message: &[u8], mut field: impl FnMut(u32, u64) -> bool) -> Result<(), &'static str> {
    const DAMAGED: &str = "a record is no message";
    let mut input = CodedInputStream::from_bytes(message);
    while let Some(tag) = input.read_raw_tag_or_eof().map_err(|_| DAMAGED)? {
        if tag & 7 != 0 || !field(tag >> 3, input.read_raw_varint64().map_err(|_| DAMAGED)?) {
            return Err("a record has a field that is not known");
        }
    }
    Ok(())
}

fn head_of(message: &[u8]) -> Result<u32, &'static str> {
    let mut id = None;
    fields(message, |field, value| {
        id = Some(value);
        field == 1
    })?;
    id.and_then(|id| u32::try_from(id).ok()).ok_or("the head names no pages file")
}

fn entry_of(message: &[u8], position: u64) -> Result<Entry, &'static str> {
    let (mut start, mut short, mut long, mut in_parent, mut flags) = (None, None, None, None, None);
    fields(message, |field, value| {
        let of = match field {
            1 => &mut start,
            2 => &mut short,
            3 => &mut in_parent,
            4 => &mut flags,
            5 => &mut long,
            _ => return false,
        };
        *of = Some(value);
        true
    })?;
    let start = start.ok_or("an entry has no address")?;
    let pages = long.or(short).filter(|pages| *pages > 0).ok_or("an entry has no pages")?;
    if start % PAGE != 0 {
        return Err("an entry does not begin with a page");
    }
    let end = pages.checked_mul(PAGE).and_then(|bytes| bytes.checked_add(start));
    if end.is_none_or(|end| end > END_OF_ADDRESSES) {
        return Err("an entry reaches beyond the addresses of a program");
    }
    // As older versions of CRIU wrote them: present unless they are in the parent.
    let mut flags = match flags {
        Some(flags) => u32::try_from(flags).map_err(|_| "an entry has flags that are not known")?,
        None if in_parent.is_some_and(|set| set != 0) => 0,
        None => flag::PRESENT,
    };
    if in_parent.is_some_and(|set| set != 0) {
        flags |= flag::PARENT;
    }
    if flags & !(flag::PARENT | flag::LAZY | flag::PRESENT) != 0 {
        return Err("an entry has flags that are not known");
    }
    let (in_parent, present) = (flags & flag::PARENT != 0, flags & flag::PRESENT != 0);
    if in_parent == present {
        return Err("the pages of an entry must be either in this image or in its parent");
    }
    Ok(Entry {
        start,
        pages,
        in_parent,
        lazy: flags & flag::LAZY != 0,
        position: present.then_some(position),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use protobuf::CodedOutputStream;

    use super::*;

    fn record(fields: &[(u32, u64)]) -> Vec<u8> {
        let mut message = Vec::new();
        let mut output = CodedOutputStream::vec(&mut message);
        for (field, value) in fields {
            output.write_uint64(*field, *value).unwrap();
        }
        output.flush().unwrap();
        drop(output);
        let mut bytes = u32::try_from(message.len()).unwrap().to_le_bytes().to_vec();
        bytes.extend(message);
        bytes
    }

    /// A page map as CRIU writes it, of (address, pages, flags).
    pub(crate) fn pagemap(entries: &[(u64, u64, u64)]) -> Vec<u8> {
        let mut bytes: Vec<u8> = MAGIC.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(record(&[(1, 7)]));
        for (start, pages, flags) in entries {
            bytes.extend(record(&[(1, *start), (2, pages & 0xffff_ffff), (4, *flags), (5, *pages)]));
        }
        bytes
    }

    fn why(bytes: &[u8]) -> &'static str {
        match Pagemap::parse(bytes) {
            Err(PagemapError::Damaged { why, .. }) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn positions_count_the_present_pages_alone() {
        let map =
            Pagemap::parse(&pagemap(&[(0x1000, 2, 4), (0x8000, 3, 1), (0x10000, 1, 6), (0x11000, 4, 4)]))
                .unwrap();
        assert_eq!(map.pages_name(), "pages-7.img");
        let positions: Vec<_> = map.entries.iter().map(|entry| entry.position).collect();
        assert_eq!(positions, [Some(0), None, Some(2), Some(3)]);
        assert_eq!((map.present(), map.lazy()), (7, 1));
        map.check_pages(7 * PAGE).unwrap();
        let error = map.check_pages(7 * PAGE - 1).unwrap_err();
        assert!(matches!(error, PagemapError::TooFewPages { needed: 7, held: 6 }), "{error}");
    }

    #[test]
    fn old_images_are_understood() {
        let mut bytes = pagemap(&[]);
        bytes.extend(record(&[(1, 0x1000), (2, 5)]));
        bytes.extend(record(&[(1, 0x9000), (2, 1), (3, 1)]));
        let map = Pagemap::parse(&bytes).unwrap();
        assert_eq!((map.entries[0].position, map.entries[0].in_parent), (Some(0), false));
        assert_eq!((map.entries[1].position, map.entries[1].in_parent), (None, true));
    }

    #[test]
    fn what_criu_would_not_write_is_refused_by_name() {
        for (bytes, word) in [
            (vec![0; 8], "begin"),
            (pagemap(&[])[..8].to_vec(), "head"),
            (pagemap(&[(0x2000, 2, 4), (0x3000, 1, 4)]), "overlaps"),
            (pagemap(&[(0x2000, 1, 4), (0x1000, 1, 4)]), "out of order"),
            (pagemap(&[(0x1001, 1, 4)]), "begin with a page"),
            (pagemap(&[(0x1000, 0, 4)]), "no pages"),
            (pagemap(&[(0x1000, 1 << 45, 4)]), "beyond"),
            (pagemap(&[(0x1000, u64::MAX, 4)]), "beyond"),
            (pagemap(&[(0xffff_8000_0000_0000, 1, 4)]), "beyond"),
            (pagemap(&[(0x1000, 1, 12)]), "flags"),
            (pagemap(&[(0x1000, 1, 1 << 40)]), "flags"),
            (pagemap(&[(0x1000, 1, 5)]), "either"),
            (pagemap(&[(0x1000, 1, 0)]), "either"),
            ([pagemap(&[]), record(&[(1, 0x1000), (2, 1), (9, 1)])].concat(), "field"),
            ([pagemap(&[]), 65u32.to_le_bytes().to_vec(), vec![0; 65]].concat(), "too long"),
        ] {
            assert!(why(&bytes).contains(word), "{word}: {}", why(&bytes));
        }
        let whole = pagemap(&[(0x1000, 1, 4)]);
        assert!(why(&whole[..whole.len() - 1]).contains("ends within"));
    }

    /// Of (address, pages, flags), as [`pagemap`] takes them.
    fn flags_of(bytes: &[u8]) -> Vec<(u64, u64, bool, bool)> {
        let entries = Pagemap::parse(bytes).unwrap().entries;
        entries.iter().map(|entry| (entry.start, entry.pages, entry.in_parent, entry.lazy)).collect()
    }

    #[test]
    fn pages_of_the_parent_are_lazy_where_they_are_there_but_for_stacks() {
        let parent = Pagemap::parse(&pagemap(&[(0x1000, 4, 6), (0x5000, 2, 4), (0x7000, 9, 6)])).unwrap();
        let own = pagemap(&[(0x2000, 12, 1), (0x20000, 1, 6)]);
        let changed = with_lazy_parent(&own, &parent, &[0x3ff8, 0x3000, 0x90_0000]).unwrap().unwrap();
        assert_eq!(
            flags_of(&changed),
            [
                (0x2000, 1, true, true),
                (0x3000, 1, true, false),
                (0x4000, 1, true, true),
                (0x5000, 2, true, false),
                (0x7000, 7, true, true),
                (0x20000, 1, false, true),
            ]
        );
        assert_eq!(with_lazy_parent(&changed, &parent, &[0x3000]).unwrap(), None);
        let none = Pagemap::parse(&pagemap(&[])).unwrap();
        assert_eq!(with_lazy_parent(&own, &none, &[]).unwrap(), None);
    }

    fn entries() -> impl Strategy<Value = Vec<(u64, u64, u64)>> {
        prop::collection::vec((0u64..9, 1u64..9, prop::sample::select(vec![1u64, 4, 6])), 0..20).prop_map(
            |gaps| {
                let mut at = 0x1000;
                gaps.into_iter()
                    .map(|(gap, pages, flags)| {
                        let start = at + gap * PAGE;
                        at = start + pages * PAGE;
                        (start, pages, flags)
                    })
                    .collect()
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(entries in entries()) {
            let map = Pagemap::parse(&pagemap(&entries)).unwrap();
            let read: Vec<_> = map.entries.iter().map(|entry| (entry.start, entry.pages)).collect();
            let written: Vec<_> = entries.iter().map(|(start, pages, _)| (*start, *pages)).collect();
            prop_assert_eq!(read, written);
        }

        /// Marking changes no page and no place, whatever the two maps are.
        #[test]
        fn marking_lazy_pages_keeps_every_page(own in entries(), parent in entries(), kept: Vec<u64>) {
            let bytes = pagemap(&own);
            let parent = Pagemap::parse(&pagemap(&parent)).unwrap();
            let pages = |bytes: &[u8]| {
                let map = Pagemap::parse(bytes).unwrap();
                let pages = |entry: &Entry| {
                    let (start, in_parent, position) = (entry.start, entry.in_parent, entry.position);
                    (0..entry.pages).map(move |page| (start + page * PAGE, in_parent, position.map(|of| of + page))).collect::<Vec<_>>()
                };
                (map.pages_id, map.entries.iter().flat_map(pages).collect::<Vec<_>>())
            };
            if let Some(changed) = with_lazy_parent(&bytes, &parent, &kept).unwrap() {
                prop_assert_eq!(pages(&changed), pages(&bytes));
                let lazy = Pagemap::parse(&changed).unwrap();
                for entry in lazy.entries.iter().filter(|entry| entry.in_parent && entry.lazy) {
                    prop_assert!(parent.within(entry).all(|piece| piece.lazy));
                    prop_assert_eq!(parent.within(entry).map(|piece| piece.pages).sum::<u64>(), entry.pages);
                }
            }
        }

        /// Whatever a file holds: an error, or entries in order whose pages follow one another.
        /// Pages at some addresses are no longer lazy, and nothing else changes.
        #[test]
        fn only_the_pages_at_these_addresses_are_no_longer_lazy(
            entries in entries(),
            chosen in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let bytes = pagemap(&entries);
            let Ok(map) = Pagemap::parse(&bytes) else { return Ok(()) };
            let pages = |map: &Pagemap| {
                let pages = map.entries.iter().flat_map(|entry| {
                    (0..entry.pages.min(64)).map(move |page| (entry.start + page * PAGE, entry.in_parent, entry.lazy))
                });
                pages.collect::<Vec<_>>()
            };
            let before = pages(&map);
            prop_assume!(!before.is_empty() && map.entries.iter().all(|entry| entry.pages <= 64));
            let addresses: Vec<u64> = chosen.iter().map(|index| before[index.index(before.len())].0 + 7).collect();
            let after = with_eager(&bytes, &addresses).unwrap();
            prop_assert_eq!(after.is_some(), before.iter().any(|page| page.2 && addresses.contains(&(page.0 + 7))));
            let expected: Vec<_> =
                before.iter().map(|page| (page.0, page.1, page.2 && !addresses.contains(&(page.0 + 7)))).collect();
            prop_assert_eq!(pages(&Pagemap::parse(&after.unwrap_or(bytes)).unwrap()), expected);
        }

        #[test]
        fn arbitrary_bytes_never_break_an_invariant(
            entries in entries(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            tail in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut bytes = pagemap(&entries);
            bytes.extend(tail);
            for (at, value) in damage {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(map) = Pagemap::parse(&bytes) {
                let (mut free, mut position) = (0, 0);
                for entry in &map.entries {
                    prop_assert!(entry.start >= free && entry.pages > 0);
                    free = entry.end();
                    prop_assert!(free <= END_OF_ADDRESSES);
                    prop_assert_eq!(entry.position.is_none(), entry.in_parent);
                    if let Some(of) = entry.position {
                        prop_assert_eq!(of, position);
                        position += entry.pages;
                    }
                }
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Pagemap::parse(&bytes);
        }
    }
}
