//! What is done to an image once the agent sleeps: checksums of its pages, the space of zero pages given back, and its
//! way to the disk.
//!
//! All of it can wait and none of it may be in the way: it runs on one short-lived thread of the lowest priority, reads
//! what is still in the page cache, and stops when the agent is woken. An image without it is as good as one with it,
//! only not checked page by page.

use std::{
    fs::File,
    io::{self, Write},
    ops::Range,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::{
    fs::{Advice, AtFlags, FallocateFlags, Mode, OFlags},
    io::Errno,
};
use tokio::sync::oneshot;

use super::{
    Error, IMAGES, Image,
    manifest::pages_name,
    sums::{BLOCK, FileSums, Owner, SUMS, sum_of},
};

/// The name of checksums that are not yet whole.
const UNFINISHED: &str = ".pages.sums.tmp";
/// What is read at once, in bytes. Between two reads it is looked at whether to go on.
const PIECE: usize = 256 * 1024;
/// The shortest run of zero bytes whose space is given back: shorter ones would break the file into crumbs.
const LEAST_HOLE: u64 = 16 * 1024;
/// A block of zeros.
const ZERO: [u8; 4096] = [0; 4096];
/// The thread needs no more.
const STACK: usize = 128 * 1024;
/// The lowest priority that the kernel has for ordinary threads.
const LOWEST: i32 = 19;

/// How far it has come; shared by the image and the thread.
#[derive(Debug, Default)]
pub(super) struct Finish {
    given_up: AtomicBool,
    /// Told of that.
    changed: Condvar,
    /// The checksum of the published checksums. Locked while they are being published.
    published: Mutex<Option<u64>>,
}

impl Finish {
    fn goes_on(&self) -> bool {
        !self.given_up.load(Ordering::Acquire)
    }

    /// Ends it. When this returns, nothing more is written beside the image.
    pub(super) fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
        drop(self.lock());
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Option<u64>> {
        self.published.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits; says whether it goes on then.
    fn wait(&self, duration: Duration) -> bool {
        drop(self.changed.wait_timeout_while(self.lock(), duration, |_| self.goes_on()));
        self.goes_on()
    }

    /// What the checksums must be, when they were published by this program.
    pub(super) fn published(&self) -> Option<u64> {
        *self.lock()
    }
}

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Finished {
    /// There are checksums of the pages.
    pub summed: bool,
    /// The bytes of zero pages that were given back to the file system.
    pub freed: u64,
    /// All is on the disk: the kernel can take the memory of its page cache at any time.
    pub clean: bool,
}

impl Image {
    /// Begins with what can be done while the agent sleeps, on a thread of its own, and tells what came of it.
    /// [`Image::give_up_finishing`] ends it early, as does removing the image.
    ///
    /// An image stays in the page cache, which serves a wake best; once it is on the disk the kernel takes that memory
    /// back when it needs it. With `drop_cache_after` it is given back so long after that, needed or not.
    ///
    /// # Errors
    /// When there is no thread for it; the image is none the worse.
    pub fn finish_in_background(
        &self,
        drop_cache_after: Option<Duration>,
    ) -> Result<oneshot::Receiver<Finished>, Error> {
        let failed = |source| Error::io("finish", &self.path, source);
        let work = Work {
            path: self.path.clone(),
            directory: Arc::clone(&self.directory),
            images: Arc::clone(&self.images),
            owner: self.owner(),
            state: Arc::clone(&self.finish),
        };
        let (done, told) = oneshot::channel();
        let run = move || {
            // Of this thread alone: on Linux each has its own.
            let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), LOWEST);
            let finished = work.run();
            let _ = done.send(finished);
            if let Some(after) = drop_cache_after.filter(|_| finished.clean) {
                work.drop_cache(after);
            }
        };
        thread::Builder::new().name("image".to_owned()).stack_size(STACK).spawn(run).map_err(failed)?;
        Ok(told)
    }

    /// Ends what [`Image::finish_in_background`] has begun; before the image is read or removed.
    pub fn give_up_finishing(&self) {
        self.finish.give_up();
    }

    /// The bytes that the image takes on the disk, which are fewer than [`Image::bytes`] once zero pages are given
    /// back.
    ///
    /// # Errors
    /// When a file cannot be looked at.
    pub fn disk_bytes(&self) -> Result<u64, Error> {
        let mut blocks = 0_u64;
        for file in &self.manifest.files {
            let stat = rustix::fs::statat(&self.images, file.name.as_str(), AtFlags::SYMLINK_NOFOLLOW);
            let stat = stat
                .map_err(|error| Error::io("stat", &self.path.join(IMAGES).join(&file.name), error.into()))?;
            blocks = blocks.saturating_add(u64::try_from(stat.st_blocks).unwrap_or_default());
        }
        // The unit of st_blocks, whatever the file system's blocks are.
        Ok(blocks.saturating_mul(512))
    }
}

/// All that the thread needs.
struct Work {
    path: PathBuf,
    directory: Arc<OwnedFd>,
    images: Arc<OwnedFd>,
    owner: Owner,
    state: Arc<Finish>,
}

impl Work {
    fn run(&self) -> Finished {
        let mut finished = Finished::default();
        if let Err(error) = self.sum_and_free(&mut finished) {
            tracing::warn!(image = %self.path.display(), %error, "the image's pages have no checksums");
        }
        match self.write_back() {
            Ok(clean) => finished.clean = clean,
            Err(error) => {
                tracing::warn!(image = %self.path.display(), %error, "the image could not be written to the disk yet");
            }
        }
        tracing::debug!(image = %self.path.display(), ?finished, "image finished");
        finished
    }

    fn drop_cache(&self, after: Duration) {
        if !self.state.wait(after) {
            return;
        }
        for (number, _) in &self.owner.pages {
            let dropped =
                self.open(*number).and_then(|file| Ok(rustix::fs::fadvise(file, 0, None, Advice::DontNeed)?));
            if let Err(error) = dropped {
                tracing::debug!(image = %self.path.display(), %error, "the image stays in the page cache");
            }
        }
    }

    fn open(&self, number: u32) -> io::Result<File> {
        let name = pages_name(number);
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.images, name, flags, Mode::empty())?.into())
    }

    /// Reads all pages once: sums them, frees runs of zeros, and publishes the sums.
    fn sum_and_free(&self, finished: &mut Finished) -> io::Result<()> {
        if self.owner.length().is_none() {
            return Err(io::Error::other("there are too many pages"));
        }
        let mut files = Vec::with_capacity(self.owner.pages.len());
        for (number, bytes) in &self.owner.pages {
            let file = self.open(*number)?;
            let Some(scanned) = scan(&file, *bytes, &self.state)? else {
                return Ok(());
            };
            finished.freed += free(&file, &scanned.zeros, &self.state)?;
            files.push(FileSums { number: *number, bytes: *bytes, sums: scanned.sums });
        }
        finished.summed = self.publish(&files)?;
        Ok(())
    }

    fn publish(&self, files: &[FileSums]) -> io::Result<bool> {
        let bytes = self.owner.encode(files);
        let (_, own) = self.owner.parse(&bytes).map_err(io::Error::other)?;
        let mut published = self.state.lock();
        if !self.state.goes_on() {
            return Ok(false);
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&self.directory, UNFINISHED, flags, Mode::RUSR | Mode::WUSR)?;
        let written = File::from(opened).write_all(&bytes).and_then(|()| {
            // Not synced: after a crash the image is not used any more, and neither are they.
            Ok(rustix::fs::renameat(&self.directory, UNFINISHED, &self.directory, SUMS)?)
        });
        if let Err(error) = written {
            let _ = rustix::fs::unlinkat(&self.directory, UNFINISHED, AtFlags::empty());
            return Err(error);
        }
        *published = Some(own);
        Ok(true)
    }

    /// Writes all pages to the disk, so that their memory can be taken when it is needed.
    fn write_back(&self) -> io::Result<bool> {
        for (number, _) in &self.owner.pages {
            if !self.state.goes_on() {
                return Ok(false);
            }
            rustix::fs::fdatasync(self.open(*number)?)?;
        }
        Ok(true)
    }
}

/// What a pages file holds.
#[derive(Debug, Default)]
struct Scanned {
    sums: Vec<u64>,
    /// Where it holds nothing but zeros: whole blocks, in order, as far apart as possible.
    zeros: Vec<Range<u64>>,
}

impl Scanned {
    fn add(&mut self, block: &[u8], offset: u64) {
        self.sums.push(sum_of(block));
        if block != ZERO {
            return;
        }
        let end = offset + BLOCK;
        match self.zeros.last_mut() {
            Some(last) if last.end == offset => last.end = end,
            // What is too short is forgotten, or there would be as many as pages.
            Some(last) if last.end - last.start < LEAST_HOLE => *last = offset..end,
            _ => self.zeros.push(offset..end),
        }
    }
}

/// Reads a pages file; nothing when it is given up.
fn scan(file: &File, bytes: u64, state: &Finish) -> io::Result<Option<Scanned>> {
    let mut scanned = Scanned::default();
    let mut piece = vec![0; PIECE];
    let mut offset = 0;
    while offset < bytes {
        if !state.goes_on() {
            return Ok(None);
        }
        let length = usize::try_from(bytes - offset).unwrap_or(PIECE).min(PIECE);
        file.read_exact_at(&mut piece[..length], offset)?;
        for (block, at) in piece[..length].chunks(4096).zip((offset..).step_by(4096)) {
            scanned.add(block, at);
        }
        offset += length as u64;
    }
    Ok(Some(scanned))
}

/// Gives the space of zeros back; the contents and the size of the file stay as they are. Says how many bytes.
fn free(file: &File, zeros: &[Range<u64>], state: &Finish) -> io::Result<u64> {
    // Of the file system's blocks only whole ones are worth it: of others the zeros would be written once more.
    let unit = file.metadata()?.blksize().max(BLOCK);
    let mut freed = 0;
    for run in zeros {
        let (start, end) = (run.start.next_multiple_of(unit), run.end / unit * unit);
        if end.saturating_sub(start) < LEAST_HOLE {
            continue;
        }
        if !state.goes_on() {
            break;
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(file, mode, start, end - start) {
            Ok(()) => freed += end - start,
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(freed)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Only zeros are given back, none of the long runs is kept, and no byte changes.
        #[test]
        fn zeros_are_freed_and_nothing_changes(runs in prop::collection::vec((0_usize..40, any::<bool>()), 0..12)) {
            let mut contents = Vec::new();
            for (pages, zero) in runs {
                contents.resize(contents.len() + pages * 4096, if zero { 0 } else { 7 });
            }
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&contents, 0).unwrap();
            let state = Finish::default();
            let scanned = scan(&file, contents.len() as u64, &state).unwrap().unwrap();
            let mut zeros = 0;
            for run in &scanned.zeros {
                let run = usize::try_from(run.start).unwrap()..usize::try_from(run.end).unwrap();
                prop_assert!(contents[run.clone()].iter().all(|byte| *byte == 0));
                zeros += if run.len() < 4 * 4096 { 0 } else { run.len() };
            }
            let expected: usize = contents
                .chunk_by(|a, b| a == b)
                .filter(|run| run[0] == 0 && run.len() >= 4 * 4096)
                .map(<[u8]>::len)
                .sum();
            prop_assert_eq!(zeros, expected);
            let freed = free(&file, &scanned.zeros, &state).unwrap();
            prop_assert!(freed <= expected as u64);
            let mut after = vec![1; contents.len()];
            file.read_exact_at(&mut after, 0).unwrap();
            prop_assert_eq!(after, contents);
        }
    }

    #[test]
    fn space_comes_back() {
        let file = tempfile::tempfile().unwrap();
        let mut contents = vec![9; 4 << 20];
        contents[1 << 20..3 << 20].fill(0);
        file.write_all_at(&contents, 0).unwrap();
        file.sync_all().unwrap();
        let before = file.metadata().unwrap().blocks();
        let state = Finish::default();
        let scanned = scan(&file, 4 << 20, &state).unwrap().unwrap();
        assert_eq!(free(&file, &scanned.zeros, &state).unwrap(), 2 << 20);
        assert_eq!(before - file.metadata().unwrap().blocks(), (2 << 20) / 512);
    }

    #[test]
    fn it_stops_when_it_is_given_up() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let state = Finish::default();
        state.give_up();
        assert!(scan(&file, 1 << 20, &state).unwrap().is_none());
    }
}
