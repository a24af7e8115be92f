//! Comparing all pages of an image with their checksums, while CRIU reads them too.

use std::{
    fs::File,
    os::{fd::AsFd, unix::fs::FileExt},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use tokio::task::JoinHandle;

use super::{
    Error, IMAGES, Image, PageSums, directory,
    manifest::{OF_PARENT, is_pagemap, pages_name},
    pagemap::{Entry, PAGE, Pagemap},
    parent::is_of_parent,
};

/// What one thread takes at a time, in bytes.
const SHARE: u64 = 8 << 20;
/// More threads than this find no more bandwidth.
const MAX_THREADS: usize = 4;
/// What is read at once, in bytes.
const PIECE: u64 = 256 * 1024;

/// Which pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// All: for a restore that reads them all.
    All,
    /// Those that CRIU reads itself when the others are left to a server of lazy pages, which checks what it serves.
    Eager,
}

/// A part of a pages file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Extent {
    number: u32,
    start: u64,
    end: u64,
}

/// A comparison under way, on threads of its own. Dropping it ends it.
#[derive(Debug)]
pub struct PageCheck {
    checking: JoinHandle<Result<u64, Error>>,
    given_up: Arc<AtomicBool>,
    image: PathBuf,
}

impl PageCheck {
    /// Waits for its end; says how many bytes were compared, none when the image has no checksums.
    ///
    /// # Errors
    /// [`Error::PageAltered`] with the file and the place; [`Error::SumsInvalid`].
    pub async fn outcome(&mut self) -> Result<u64, Error> {
        let ended = (&mut self.checking).await;
        ended.unwrap_or_else(|error| Err(Error::io("check", &self.image, std::io::Error::other(error))))
    }
}

impl Drop for PageCheck {
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Release);
    }
}

impl Image {
    /// Begins to read pages and to compare them with the checksums, meant to run beside CRIU and to be heard before
    /// anything runs; with several threads when there is much.
    pub fn check_in_background(&self, which: Pages) -> PageCheck {
        let image = self.clone();
        let given_up = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&given_up);
        let checking = tokio::task::spawn_blocking(move || image.check_pages(which, threads(), &flag));
        PageCheck { checking, given_up, image: self.path.clone() }
    }

    /// Compares pages on this thread and others.
    fn check_pages(&self, which: Pages, threads: usize, given_up: &AtomicBool) -> Result<u64, Error> {
        let Some(sums) = PageSums::open(self)? else {
            return Ok(0);
        };
        let extents = match which {
            Pages::All => sums.files().map(|(number, end)| Extent { number, start: 0, end }).collect(),
            Pages::Eager => self.eager()?,
        };
        let shares = shares(&extents);
        let threads = threads.min(shares.len());
        let next = AtomicUsize::new(0);
        let work = || {
            let mut buffer = vec![0; usize::try_from(PIECE).unwrap_or_default()];
            while !given_up.load(Ordering::Acquire)
                && let Some(share) = shares.get(next.fetch_add(1, Ordering::Relaxed))
            {
                if let Err(error) = self.check_extent(&sums, *share, &mut buffer) {
                    // The others have no reason to go on.
                    next.store(shares.len(), Ordering::Relaxed);
                    return Err(error);
                }
            }
            Ok(())
        };
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut result = work();
            for other in others {
                let ended = other.join().unwrap_or_else(|_| {
                    Err(Error::io("check", &self.path, std::io::Error::other("the checking thread panicked")))
                });
                result = result.and(ended);
            }
            result
        })?;
        Ok(extents.iter().map(|extent| extent.end - extent.start).sum())
    }

    fn check_extent(&self, sums: &PageSums, extent: Extent, buffer: &mut [u8]) -> Result<(), Error> {
        let name = pages_name(extent.number);
        let path = self.path.join(IMAGES).join(&name);
        let opened = directory::open_file(self.images.as_fd(), &name);
        let file = File::from(opened.map_err(|error| Error::io("open", &path, error.into()))?);
        let mut at = extent.start;
        while at < extent.end {
            let piece = &mut buffer[..usize::try_from((extent.end - at).min(PIECE)).unwrap_or_default()];
            file.read_exact_at(piece, at).map_err(|source| Error::io("read", &path, source))?;
            sums.check(extent.number, at, piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// What CRIU reads when private anonymous memory is left to others.
    fn eager(&self) -> Result<Vec<Extent>, Error> {
        let mut extents = Vec::new();
        let mut add = |number, entry: &Entry| {
            if let Some(position) = entry.position {
                let start = position.saturating_mul(PAGE);
                let end = start.saturating_add(entry.pages.saturating_mul(PAGE));
                extents.push(Extent { number, start, end });
            }
        };
        let names = self.manifest.files.iter().map(|file| file.name.as_str());
        for name in names.filter(|name| is_pagemap(name) && !is_of_parent(name)) {
            let (map, parent) = self.pagemap_and_parent(name)?;
            for entry in map.entries.iter().filter(|entry| !entry.lazy) {
                add(map.pages_id, entry);
                let parent = parent.as_ref().filter(|_| entry.in_parent);
                for (parent, piece) in
                    parent.iter().flat_map(|parent| parent.within(entry).map(move |piece| (parent, piece)))
                {
                    add(parent.pages_id | OF_PARENT, &piece);
                }
            }
        }
        Ok(extents)
    }

    /// Reads the page map `name`.
    pub(super) fn pagemap(&self, name: &str) -> Result<Pagemap, Error> {
        Pagemap::read(self.images.as_fd(), name).map_err(|source| Error::Pagemap {
            image: self.path.clone(),
            file: name.to_owned(),
            source,
        })
    }
}

/// One for each core but the one where CRIU is busy with the same pages.
fn threads() -> usize {
    thread::available_parallelism().map_or(1, |cores| cores.get().saturating_sub(1).clamp(1, MAX_THREADS))
}

/// Cuts extents into what threads take one by one.
fn shares(extents: &[Extent]) -> Vec<Extent> {
    let cut = |extent: &Extent| {
        let Extent { number, start, end } = *extent;
        let step = usize::try_from(SHARE).unwrap_or(usize::MAX);
        (start..end).step_by(step).map(move |start| Extent { number, start, end: end.min(start + SHARE) })
    };
    extents.iter().flat_map(cut).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_extents_without_gap_or_overlap() {
        let extents = [
            Extent { number: 1, start: 0, end: 0 },
            Extent { number: 2, start: 4096, end: 2 * SHARE + 8192 },
            Extent { number: 3, start: 0, end: 4096 },
        ];
        let shares = shares(&extents);
        assert_eq!(shares.len(), 4);
        assert_eq!((shares[0].start, shares[2].end), (4096, 2 * SHARE + 8192));
        assert!(shares[..3].windows(2).all(|pair| pair[0].end == pair[1].start));
        assert_eq!(shares[3], extents[2]);
    }
}
