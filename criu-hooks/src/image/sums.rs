//! Checksums of memory pages.
//!
//! The manifest has none: hashing all pages while the agent stands still would cost more than it is worth. They are
//! computed afterwards, from the page cache, and kept beside `img/` in a file of their own:
//!
//! ```text
//! magic "AGCSUMS1", u32 block size, u32 number of pages files
//! u64 generation, 32 bytes SHA-256 of manifest.json
//! for each pages file, by number: u32 number, u32 zero, u64 bytes
//! for each block of each pages file: u64 XXH3-64
//! u64 XXH3-64 of all of the above
//! ```
//! All numbers are little-endian. The file belongs to one manifest alone, so it cannot serve another image; its length
//! follows from the manifest, so nothing in it decides how much is read. XXH3 finds what breaks by itself: it is no
//! defence against who can write as root, who could replace CRIU as well.

use std::{fs::File, io::Read, os::fd::AsFd, path::PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::{
    Error, Image, Manifest, directory,
    manifest::{pages_name, pages_number},
};

/// The name of the file.
pub(super) const SUMS: &str = "pages.sums";
/// The bytes that one checksum covers: the least that a page server reads.
pub const BLOCK: u64 = 4096;
/// The longest file of checksums that is read, in bytes: of half a tebibyte of memory.
const MAX_SUMS: u64 = 1 << 30;

const MAGIC: [u8; 8] = *b"AGCSUMS1";
const HEADER: usize = 56;
const FILE_HEADER: usize = 16;
const SUM: usize = 8;

/// The checksum of one block.
pub(super) fn sum_of(block: &[u8]) -> u64 {
    xxh3_64(block)
}

/// One pages file and the checksums of its blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileSums {
    pub(super) number: u32,
    pub(super) bytes: u64,
    pub(super) sums: Vec<u64>,
}

/// The checksums of all pages of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSums {
    image: PathBuf,
    files: Vec<FileSums>,
}

/// What a file of checksums must belong to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    pub(super) generation: u64,
    pub(super) manifest_sha256: [u8; 32],
    /// The numbers and sizes of the pages files, by number.
    pub(super) pages: Vec<(u32, u64)>,
}

impl Owner {
    pub(super) fn new(manifest: &Manifest, manifest_sha256: [u8; 32]) -> Owner {
        let number = |file: &super::FileEntry| pages_number(&file.name).map(|number| (number, file.size));
        let mut pages: Vec<_> = manifest.files.iter().filter_map(number).collect();
        pages.sort_unstable();
        Owner { generation: manifest.generation, manifest_sha256, pages }
    }

    /// The bytes that its file of checksums has.
    pub(super) fn length(&self) -> Option<u64> {
        let blocks = self.pages.iter().try_fold(0_u64, |sum, (_, bytes)| sum.checked_add(blocks(*bytes)))?;
        let fixed = (HEADER + SUM + FILE_HEADER * self.pages.len()) as u64;
        blocks.checked_mul(SUM as u64)?.checked_add(fixed).filter(|length| *length <= MAX_SUMS)
    }

    fn header(&self) -> Vec<u8> {
        let mut header = Vec::with_capacity(HEADER + FILE_HEADER * self.pages.len());
        header.extend(MAGIC);
        header.extend(u32::try_from(BLOCK).unwrap_or_default().to_le_bytes());
        header.extend(u32::try_from(self.pages.len()).unwrap_or(u32::MAX).to_le_bytes());
        header.extend(self.generation.to_le_bytes());
        header.extend(self.manifest_sha256);
        for (number, bytes) in &self.pages {
            header.extend(number.to_le_bytes());
            header.extend([0; 4]);
            header.extend(bytes.to_le_bytes());
        }
        header
    }

    /// The file for these checksums, which are those of its pages files in their order.
    pub(super) fn encode(&self, files: &[FileSums]) -> Vec<u8> {
        let mut bytes = self.header();
        bytes.reserve(files.iter().map(|file| file.sums.len() * SUM).sum::<usize>() + SUM);
        for file in files {
            bytes.extend(file.sums.iter().flat_map(|sum| sum.to_le_bytes()));
        }
        let own = xxh3_64(&bytes);
        bytes.extend(own.to_le_bytes());
        bytes
    }

    /// Reads a file of checksums; with its own checksum, which tells it from every other.
    pub(super) fn parse(&self, bytes: &[u8]) -> Result<(Vec<FileSums>, u64), &'static str> {
        if self.length() != Some(bytes.len() as u64) {
            return Err("its length is not that of the checksums of these pages");
        }
        let (rest, own) = bytes.split_at(bytes.len() - SUM);
        let own = word(own);
        if xxh3_64(rest) != own {
            return Err("it was altered");
        }
        let header = self.header();
        let Some(mut rest) = rest.strip_prefix(header.as_slice()) else {
            return Err("it belongs to another image or another version of this program");
        };
        let mut files = Vec::with_capacity(self.pages.len());
        for (number, bytes) in &self.pages {
            let length = usize::try_from(blocks(*bytes)).map_err(|_| "it is too long")? * SUM;
            let (of_file, after) = rest.split_at_checked(length).ok_or("it is too short")?;
            let sums = of_file.chunks_exact(SUM).map(word).collect();
            files.push(FileSums { number: *number, bytes: *bytes, sums });
            rest = after;
        }
        Ok((files, own))
    }
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; SUM];
    word.copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// How many blocks so many bytes have.
pub(super) fn blocks(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK)
}

/// What tells the checksums of an image from any others: for another process to read them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claim {
    image: PathBuf,
    owner: Owner,
    /// The checksum of the checksums, when this program wrote them.
    known: Option<u64>,
}

impl Claim {
    /// The file of an image's checksums, not yet read, and what they must be; none when there are none.
    pub(crate) fn open(image: &Image) -> Result<Option<(File, Claim)>, Error> {
        let path = image.path.join(SUMS);
        let known = image.finish.published();
        let file = match directory::open_file(image.directory.as_fd(), SUMS) {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::NOENT) if known.is_none() => return Ok(None),
            Err(rustix::io::Errno::NOENT) => {
                return Err(Error::Missing { image: image.path.clone(), file: SUMS.to_owned() });
            }
            Err(rustix::io::Errno::LOOP) => return Err(Error::SumsInvalid { path, why: "it is a link" }),
            Err(error) => return Err(Error::io("open", &path, error.into())),
        };
        Ok(Some((file, Claim { image: image.path.clone(), owner: image.owner(), known })))
    }

    /// Reads the checksums.
    pub(crate) fn read(self, file: File) -> Result<PageSums, Error> {
        let path = self.image.join(SUMS);
        let invalid = |why| Error::SumsInvalid { path: path.clone(), why };
        let read = |source| Error::io("read", &path, source);
        let length = self.owner.length().ok_or_else(|| invalid("there are too many pages"))?;
        let found = file.metadata().map_err(read)?;
        if !found.is_file() || found.len() != length {
            return Err(invalid("its length is not that of the checksums of these pages"));
        }
        let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or_default());
        file.take(length + 1).read_to_end(&mut bytes).map_err(read)?;
        let (files, own) = self.owner.parse(&bytes).map_err(invalid)?;
        if self.known.is_some_and(|known| known != own) {
            return Err(invalid("it is not the one that was written after the dump"));
        }
        Ok(PageSums { image: self.image, files })
    }
}

impl PageSums {
    /// Reads the checksums of an image; none when there are none, because the agent was woken before they were
    /// computed.
    ///
    /// # Errors
    /// [`Error::SumsInvalid`] when they are not this image's, [`Error::Missing`] when they are known to have been there.
    pub fn open(image: &Image) -> Result<Option<PageSums>, Error> {
        Claim::open(image)?.map(|(file, claim)| claim.read(file)).transpose()
    }

    /// Checks bytes that were read from `pages-<number>.img` at `offset`: both whole blocks, but for a last one that
    /// the file's end cuts. Costs about a quarter of a microsecond a page.
    ///
    /// # Errors
    /// [`Error::PageAltered`] with the first block that differs; also for bytes that the file never had.
    pub fn check(&self, number: u32, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let altered =
            |offset| Error::PageAltered { image: self.image.clone(), file: pages_name(number), offset };
        let file = self.files.iter().find(|file| file.number == number).ok_or_else(|| altered(offset))?;
        let end = offset.saturating_add(bytes.len() as u64);
        let whole = offset.is_multiple_of(BLOCK)
            && (end.is_multiple_of(BLOCK) || end == file.bytes)
            && end <= file.bytes;
        let first = usize::try_from(offset / BLOCK).unwrap_or(usize::MAX);
        let sums = file.sums.get(first..).filter(|_| whole).ok_or_else(|| altered(offset))?;
        let blocks = bytes.chunks(usize::try_from(BLOCK).unwrap_or(usize::MAX));
        for ((block, sum), at) in blocks.zip(sums).zip((offset..).step_by(4096)) {
            if sum_of(block) != *sum {
                return Err(altered(at));
            }
        }
        Ok(())
    }

    /// The numbers and sizes of the pages files.
    pub(super) fn files(&self) -> impl Iterator<Item = (u32, u64)> {
        self.files.iter().map(|file| (file.number, file.bytes))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn owner(pages: &[(u32, u64)]) -> Owner {
        Owner { generation: 3, manifest_sha256: [7; 32], pages: pages.to_vec() }
    }

    fn sums(owner: &Owner, seed: u64) -> Vec<FileSums> {
        let sums = |bytes| (0..blocks(bytes)).map(|block| block.wrapping_mul(seed)).collect();
        let of =
            |(number, bytes): &(u32, u64)| FileSums { number: *number, bytes: *bytes, sums: sums(*bytes) };
        owner.pages.iter().map(of).collect()
    }

    fn page_sums(contents: &[u8]) -> PageSums {
        let sums = contents.chunks(4096).map(sum_of).collect();
        let file = FileSums { number: 1, bytes: contents.len() as u64, sums };
        PageSums { image: "/image".into(), files: vec![file] }
    }

    fn altered_at(result: Result<(), Error>) -> u64 {
        match result {
            Err(Error::PageAltered { offset, .. }) => offset,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_checksum_is_the_known_one() {
        // From the reference implementation of XXH3.
        assert_eq!(sum_of(b""), 0x2d06_8005_38d3_94c2);
    }

    #[test]
    fn a_wrong_page_is_found_by_its_place() {
        let contents: Vec<u8> = (0..5 * 4096 + 100_u32).map(|at| (at / 7 % 251).to_le_bytes()[0]).collect();
        let sums = page_sums(&contents);
        sums.check(1, 0, &contents).unwrap();
        sums.check(1, 4096, &contents[4096..3 * 4096]).unwrap();
        sums.check(1, 5 * 4096, &contents[5 * 4096..]).unwrap();
        let mut flipped = contents.clone();
        flipped[3 * 4096 + 17] ^= 1;
        assert_eq!(altered_at(sums.check(1, 0, &flipped)), 3 * 4096);
        sums.check(1, 0, &flipped[..3 * 4096]).unwrap();
        // Right pages in a wrong place.
        assert_eq!(altered_at(sums.check(1, 0, &contents[4096..8192])), 0);
        // Not whole, beyond the end, and of another file.
        assert_eq!(altered_at(sums.check(1, 0, &contents[..100])), 0);
        assert_eq!(altered_at(sums.check(1, 1, &contents[1..4097])), 1);
        assert_eq!(altered_at(sums.check(1, 6 * 4096, &contents[..4096])), 6 * 4096);
        assert_eq!(altered_at(sums.check(1, u64::MAX - 4095, &contents[..4096])), u64::MAX - 4095);
        assert_eq!(altered_at(sums.check(2, 0, &contents)), 0);
    }

    #[test]
    fn checksums_of_another_image_are_refused() {
        let mine = owner(&[(1, 8192), (2, 4096)]);
        let bytes = mine.encode(&sums(&mine, 5));
        assert_eq!(mine.parse(&bytes).unwrap().0, sums(&mine, 5));
        for other in [
            Owner { generation: 4, ..mine.clone() },
            Owner { manifest_sha256: [8; 32], ..mine.clone() },
            owner(&[(1, 8192), (3, 4096)]),
            owner(&[(1, 4096), (2, 8192)]),
        ] {
            assert!(other.parse(&bytes).unwrap_err().contains("another image"), "{other:?}");
        }
        assert!(owner(&[(1, 4096)]).parse(&bytes).unwrap_err().contains("length"));
    }

    #[test]
    fn pages_beyond_measure_have_no_checksums() {
        assert_eq!(owner(&[(1, u64::MAX)]).length(), None);
        assert_eq!(owner(&[(1, u64::MAX), (2, u64::MAX)]).length(), None);
        assert!(owner(&[(1, 400 << 30)]).length().is_some());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_and_no_changed_byte_passes(
            sizes in prop::collection::vec(0_u64..100_000, 0..4),
            at: prop::sample::Index,
            flip in 1_u8..,
        ) {
            let owner = owner(&(1..).zip(sizes).collect::<Vec<_>>());
            let mut bytes = owner.encode(&sums(&owner, 977));
            prop_assert_eq!(owner.length(), Some(bytes.len() as u64));
            prop_assert_eq!(owner.parse(&bytes).unwrap().0, sums(&owner, 977));
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(owner.parse(&bytes).is_err());
            prop_assert!(owner.parse(&bytes[..at]).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_pass(bytes: Vec<u8>, size in 0_u64..5000) {
            prop_assert!(owner(&[(1, size)]).parse(&bytes).is_err());
        }
    }
}
