//! Reading an image into the page cache before it is needed.
//!
//! CRIU reads pages in their order and waits for each read; a disk could serve several at once. Several threads of
//! `POSIX_FADV_WILLNEED` ask for all of it beforehand, the working set first.

use std::{
    io::IoSliceMut,
    num::NonZeroU64,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use rustix::{
    fs::Advice,
    io::{Errno, ReadWriteFlags},
};

use super::{Error, IMAGES, Image, directory, manifest::pages_number};

/// How many threads ask.
const THREADS: usize = 4;
/// What is asked for at once, in bytes: as much as the kernel submits before it looks up.
const STEP: u64 = 2 << 20;
/// At how many places of a file it is looked at whether it is in the page cache.
const SAMPLES: u64 = 32;
/// The thread needs no more.
const STACK: usize = 64 * 1024;

/// A part of a pages file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The number in the file's name.
    pub number: u32,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
}

/// Readahead under way. Dropping it ends it, as far as nothing has been asked for yet.
#[derive(Debug)]
pub struct Readahead {
    given_up: Arc<AtomicBool>,
    /// How many bytes were not in memory, by estimate, when it began.
    cold: u64,
}

impl Readahead {
    /// How many bytes of pages were not in memory when it began: an estimate from samples, 0 when all was found there
    /// and nothing is being read.
    pub fn cold_bytes(&self) -> u64 {
        self.cold
    }
}

impl Drop for Readahead {
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Release);
    }
}

impl Image {
    /// Begins to read what of the pages is not in memory: the parts `first`, then all the rest. Returns at once; a few
    /// dozen microseconds when all is in memory already. Trouble is no error here: whoever reads the pages will meet
    /// it.
    ///
    /// # Errors
    /// When a pages file cannot be opened.
    pub fn readahead(&self, first: &[Part]) -> Result<Readahead, Error> {
        let mut files = Vec::new();
        let mut cold = 0;
        for entry in &self.manifest.files {
            let Some(number) = pages_number(&entry.name) else {
                continue;
            };
            let path = self.path.join(IMAGES).join(&entry.name);
            let opened = directory::open_file(self.images.as_fd(), &entry.name);
            let file = opened.map_err(|error| Error::io("open", &path, error.into()))?;
            cold += estimate_cold(&file, entry.size);
            files.push((number, entry.size, file));
        }
        let given_up = Arc::new(AtomicBool::new(cold == 0));
        if cold > 0 {
            let steps = steps(first, files.iter().map(|(number, bytes, _)| (*number, *bytes)));
            let work = Arc::new(Work { steps, files, next: AtomicUsize::new(0) });
            for _ in 0..THREADS.min(work.steps.len()) {
                let (work, given_up) = (Arc::clone(&work), Arc::clone(&given_up));
                let builder = thread::Builder::new().name("readahead".to_owned()).stack_size(STACK);
                // With fewer threads it only takes longer.
                let _ = builder.spawn(move || work.run(&given_up));
            }
        }
        Ok(Readahead { given_up, cold })
    }
}

/// What is shared by the threads.
struct Work {
    files: Vec<(u32, u64, OwnedFd)>,
    steps: Vec<Part>,
    next: AtomicUsize,
}

impl Work {
    fn run(&self, given_up: &AtomicBool) {
        while !given_up.load(Ordering::Acquire)
            && let Some(step) = self.steps.get(self.next.fetch_add(1, Ordering::Relaxed))
        {
            if let Some((_, _, file)) = self.files.iter().find(|(number, ..)| *number == step.number) {
                let _ =
                    rustix::fs::fadvise(file, step.offset, NonZeroU64::new(step.length), Advice::WillNeed);
            }
        }
    }
}

/// In which steps files are read: parts that come first, then everything, each file in its order.
fn steps(first: &[Part], sizes: impl Iterator<Item = (u32, u64)>) -> Vec<Part> {
    let whole = sizes.map(|(number, length)| Part { number, offset: 0, length });
    let cut = |part: Part| {
        let end = part.offset.saturating_add(part.length);
        let step = usize::try_from(STEP).unwrap_or(usize::MAX);
        (part.offset..end).step_by(step).map(move |offset| Part {
            offset,
            length: STEP.min(end - offset),
            ..part
        })
    };
    first.iter().copied().chain(whole).flat_map(cut).collect()
}

/// How many bytes of a file are not in the page cache, judged by reads that do not wait.
fn estimate_cold(file: &OwnedFd, bytes: u64) -> u64 {
    let mut missing = 0;
    let samples = SAMPLES.min(bytes / 4096).max(1);
    for sample in 0..samples {
        let mut byte = [0];
        let at = bytes / samples * sample;
        let read = rustix::io::preadv2(file, &mut [IoSliceMut::new(&mut byte)], at, ReadWriteFlags::NOWAIT);
        // Where the file system does not know such reads, nothing can be said and all may be missing.
        missing += u64::from(matches!(read, Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INVAL)));
    }
    bytes / samples * missing
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{fs::File, io::Write};

    use super::*;

    #[test]
    fn the_working_set_comes_first_and_everything_comes() {
        let set = Part { number: 2, offset: 5 << 20, length: 3 << 20 };
        let steps = super::steps(&[set], [(1, 5 << 20), (2, 10 << 20), (3, 0)].into_iter());
        assert_eq!(steps[0], Part { length: STEP, ..set });
        assert_eq!(steps[1], Part { number: 2, offset: 7 << 20, length: 1 << 20 });
        let rest = |number| steps[2..].iter().filter(move |step| step.number == number);
        assert_eq!(rest(1).map(|step| step.length).sum::<u64>(), 5 << 20);
        assert_eq!(rest(2).map(|step| step.length).sum::<u64>(), 10 << 20);
        assert_eq!(rest(3).count(), 0);
        assert!(steps.iter().all(|step| step.length <= STEP));
    }

    fn cold_bytes(file: &File) -> u64 {
        estimate_cold(&file.try_clone().unwrap().into(), file.metadata().unwrap().len())
    }

    #[test]
    fn what_is_in_memory_is_told_from_what_is_not() {
        // On the disk of the build, for a tmpfs has no cold pages.
        let mut file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all(&vec![1; 4 << 20]).unwrap();
        file.sync_all().unwrap();
        assert_eq!(cold_bytes(&file), 0);
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        assert_eq!(cold_bytes(&file), 4 << 20);
    }
}
