//! Where the bytes of lazy pages come from.
//!
//! All bytes that reach a process pass [`Source::read`], and are compared with the checksums there.

use std::{
    fs::File,
    io::{self, IoSliceMut},
    os::fd::{AsFd, BorrowedFd},
    rc::Rc,
};

use rustix::{
    fs::{Advice, Mode, OFlags},
    io::{Errno, ReadWriteFlags},
};

use super::space::{Run, Space};
use crate::image::{
    self, PageSums, name_in_parent, number_in_parent,
    pagemap::{Entry, PAGE, Pagemap, PagemapError},
};

/// Why pages cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The page map is not usable.
    #[error(transparent)]
    Pagemap(#[from] PagemapError),
    /// The pages file cannot be opened or read.
    #[error("cannot {action} {file}: {source}")]
    Io {
        /// "open", "read".
        action: &'static str,
        /// The pages file.
        file: String,
        /// Why.
        source: io::Error,
    },
    /// A page map and its parent do not fit.
    #[error(
        "page {address:#x} is in the parent by the page map, but the parent does not have it to be served"
    )]
    NotInParent {
        /// Its address at the dump.
        address: u64,
    },
    /// The pages file has become shorter.
    #[error("{file} ends before its page {page}")]
    Truncated {
        /// The pages file.
        file: String,
        /// The page that it lacks.
        page: u64,
    },
    /// The pages are not those of the dump.
    #[error(transparent)]
    Altered(image::Error),
}

impl SourceError {
    /// Whether another attempt may succeed: a disk or a network between may come back, bytes do not change back.
    pub fn may_pass(&self) -> bool {
        matches!(self, SourceError::Io { action: "read", .. })
    }
}

/// Lazy pages that follow one another in the pages file.
#[derive(Debug, Clone, Copy)]
struct Segment {
    /// Their address at the dump.
    address: u64,
    /// The number of the first among all lazy pages of the process.
    source: u64,
    /// Whether they are in the parent's file.
    in_parent: bool,
    /// The number of the first among all pages of the file.
    position: u64,
    pages: u64,
}

/// A file of pages.
#[derive(Debug)]
struct PagesFile {
    name: String,
    /// Its number among the checksums.
    number: u32,
    file: File,
}

impl PagesFile {
    fn open(
        images: BorrowedFd<'_>,
        (name, number): (String, u32),
        map: &Pagemap,
    ) -> Result<PagesFile, SourceError> {
        let failed =
            |error: Errno| SourceError::Io { action: "open", file: name.clone(), source: error.into() };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(images, name.as_str(), flags, Mode::empty()).map_err(failed)?;
        let size = rustix::fs::fstat(&file).map_err(failed)?.st_size;
        map.check_pages(u64::try_from(size).unwrap_or_default())?;
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::Sequential);
        Ok(PagesFile { name, number, file: file.into() })
    }
}

/// The lazy pages of one process.
#[derive(Debug)]
pub(super) struct Source {
    own: PagesFile,
    parent: Option<PagesFile>,
    sums: Option<Rc<PageSums>>,
    segments: Vec<Segment>,
    pages: u64,
}

impl Source {
    /// Those of the process `pid`, by its id inside the container, in the directory `images`.
    pub fn open(images: BorrowedFd<'_>, pid: u32, sums: Option<Rc<PageSums>>) -> Result<Source, SourceError> {
        let map_name = Pagemap::name(pid);
        let map = Pagemap::read(images, &map_name)?;
        let own = PagesFile::open(images, (map.pages_name(), map.pages_id), &map)?;
        let parent_map = if map.entries.iter().any(|entry| entry.lazy && entry.in_parent) {
            Some(Pagemap::read(images, &name_in_parent(&map_name))?)
        } else {
            None
        };
        let open = |map: &Pagemap| {
            let names = (name_in_parent(&map.pages_name()), number_in_parent(map.pages_id));
            PagesFile::open(images, names, map)
        };
        let parent = parent_map.as_ref().map(open).transpose()?;
        let mut source = Source { own, parent, sums, segments: Vec::new(), pages: 0 };
        // What is in the parent and not lazy CRIU restores by itself.
        for entry in map.entries.iter().filter(|entry| entry.lazy) {
            let Some(parent) = parent_map.as_ref().filter(|_| entry.in_parent) else {
                source.add(entry, false);
                continue;
            };
            let mut next = entry.start;
            for piece in parent.within(entry).filter(|piece| piece.position.is_some()) {
                if piece.start != next {
                    break;
                }
                next = piece.end();
                source.add(&piece, true);
            }
            if next != entry.end() {
                return Err(SourceError::NotInParent { address: next });
            }
        }
        Ok(source)
    }

    fn add(&mut self, entry: &Entry, in_parent: bool) {
        if let Some(position) = entry.position {
            let (address, source, pages) = (entry.start, self.pages, entry.pages);
            self.segments.push(Segment { address, source, in_parent, position, pages });
            self.pages += pages;
        }
    }

    /// How many lazy pages there are.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// All of them, at their addresses of the dump.
    pub fn space(&self) -> Space {
        let mut space = Space::default();
        for segment in &self.segments {
            space.insert(Run { address: segment.address, source: segment.source, pages: segment.pages });
        }
        space
    }

    /// Reads the pages from `source` on into `pages`. With `cached` it reads only what needs no disk, and says whether
    /// that was all.
    pub fn read(&self, source: u64, pages: &mut [u8], cached: bool) -> Result<bool, SourceError> {
        let (mut source, mut rest) = (source, pages);
        while !rest.is_empty() {
            let index = self.segments.partition_point(|segment| segment.source <= source) - 1;
            let segment = self.segments[index];
            let skipped = source - segment.source;
            let room = rest.len() as u64 / PAGE;
            let count = (segment.pages - skipped).min(room);
            let (piece, behind) = rest.split_at_mut(usize::try_from(count * PAGE).unwrap_or_default());
            let file = self.parent.as_ref().filter(|_| segment.in_parent).unwrap_or(&self.own);
            let position = segment.position + skipped;
            if !file.read_at(position, piece, cached)? {
                return Ok(false);
            }
            if let Some(sums) = &self.sums {
                sums.check(file.number, position * PAGE, piece).map_err(SourceError::Altered)?;
            }
            (source, rest) = (source + count, behind);
        }
        Ok(true)
    }
}

impl PagesFile {
    fn read_at(&self, position: u64, mut piece: &mut [u8], cached: bool) -> Result<bool, SourceError> {
        let mut offset = position * PAGE;
        let mut flags = if cached { ReadWriteFlags::NOWAIT } else { ReadWriteFlags::empty() };
        while !piece.is_empty() {
            match rustix::io::preadv2(self.file.as_fd(), &mut [IoSliceMut::new(piece)], offset, flags) {
                Ok(0) => return Err(SourceError::Truncated { file: self.name.clone(), page: offset / PAGE }),
                Ok(read) => {
                    offset += read as u64;
                    piece = &mut piece[read..];
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if cached => return Ok(false),
                // The file system does not know; then nobody does.
                Err(Errno::OPNOTSUPP) if !flags.is_empty() => flags = ReadWriteFlags::empty(),
                Err(error) => {
                    let file = self.name.clone();
                    return Err(SourceError::Io { action: "read", file, source: error.into() });
                }
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;
    use crate::image::pagemap::tests::pagemap;

    #[test]
    fn each_lazy_page_has_the_bytes_of_its_address() {
        let directory = tempfile::tempdir().unwrap();
        let map = pagemap(&[(0x1000, 2, 6), (0x3000, 3, 4), (0x10000, 1, 1), (0x20000, 4, 6)]);
        fs::write(directory.path().join("pagemap-5.img"), map).unwrap();
        let bytes: Vec<u8> = (0..9u8).flat_map(|page| vec![page; 4096]).collect();
        fs::write(directory.path().join("pages-7.img"), &bytes).unwrap();
        let images = File::open(directory.path()).unwrap();
        let source = Source::open(images.as_fd(), 5, None).unwrap();
        let space = source.space();
        assert_eq!((source.pages(), space.pages()), (6, 6));
        let at = |address| space.at(address);
        assert_eq!(
            (at(0x1000), at(0x2000), at(0x3000), at(0x20000), at(0x23000)),
            (Some(0), Some(1), None, Some(2), Some(5))
        );
        let mut pages = vec![0; 4 * 4096];
        assert!(source.read(1, &mut pages, true).unwrap());
        let firsts: Vec<_> = pages.chunks(4096).map(|page| page[17]).collect();
        assert_eq!(firsts, [1, 5, 6, 7]);

        fs::write(directory.path().join("pages-7.img"), &bytes[..4096 * 7]).unwrap();
        let error = source.read(4, &mut pages[..4096 * 2], false).unwrap_err();
        assert!(matches!(error, SourceError::Truncated { page: 7, .. }), "{error}");
        let error = Source::open(images.as_fd(), 5, None).unwrap_err();
        assert!(matches!(error, SourceError::Pagemap(PagemapError::TooFewPages { .. })), "{error}");
    }
}
