//! Keeping the dirty pages of a dump bounded.
//!
//! CRIU writes as fast as memory is copied, and the kernel lets a fifth of the memory become dirty before it holds
//! *every* writer of the node back. So the way to the disk begins while CRIU is still writing: there is then never more
//! outstanding than what CRIU writes in the time that the disk takes for one round.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Arc, Condvar, Mutex, PoisonError, Weak},
    thread,
    time::Duration,
};

use rustix::fs::{AtFlags, Mode, OFlags};

use super::{ImageWriter, directory, manifest::is_pages, writer::Generation};

/// How many bytes may be dirty before they are written to the disk. Smaller dumps are left to themselves: they are over
/// before it would help.
pub(super) const LIMIT: u64 = 64 << 20;
/// How often it is looked at how far CRIU is.
const INTERVAL: Duration = Duration::from_millis(20);
/// The thread needs no more.
const STACK: usize = 64 * 1024;

/// Watches a dump and writes its pages to the disk as they grow. Dropping it ends that, without waiting.
#[derive(Debug)]
pub struct Writeback {
    over: Arc<(Mutex<bool>, Condvar)>,
}

impl ImageWriter {
    /// Begins to bound the dirty pages of the dump into this image. Without a thread for it the dump is as it would be
    /// without.
    pub fn bound_dirty_pages(&self) -> Writeback {
        let over = Arc::new((Mutex::new(false), Condvar::new()));
        let (generation, told) = (Arc::downgrade(&self.generation), Arc::clone(&over));
        let builder = thread::Builder::new().name("writeback".to_owned()).stack_size(STACK);
        let _ = builder.spawn(move || watch(&generation, &told));
        Writeback { over }
    }
}

impl Drop for Writeback {
    fn drop(&mut self) {
        let (over, changed) = &*self.over;
        *over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        changed.notify_all();
    }
}

fn watch(generation: &Weak<Generation>, (over, changed): &(Mutex<bool>, Condvar)) {
    let mut written = 0;
    loop {
        let guard = over.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = changed.wait_timeout_while(guard, INTERVAL, |over| !*over);
        if *waited.unwrap_or_else(PoisonError::into_inner).0 {
            return;
        }
        let Some(generation) = generation.upgrade() else {
            return;
        };
        match write_back(&generation.images, &generation.path, written) {
            Ok(now) => written = now,
            Err(error) => {
                // CRIU meets the same trouble, and has more to say about it.
                tracing::debug!(image = %generation.path.display(), %error, "pages are not written early");
                return;
            }
        }
    }
}

/// Writes to the disk what was added beyond `written` bytes, when that is much. Gives back up to where it is there.
fn write_back(images: &OwnedFd, path: &Path, written: u64) -> std::io::Result<u64> {
    let names = directory::names(images.as_fd(), path).map_err(std::io::Error::other)?;
    let mut pages = Vec::new();
    for name in names.into_iter().filter(|name| is_pages(name)) {
        let stat = rustix::fs::statat(images, name.as_str(), AtFlags::SYMLINK_NOFOLLOW)?;
        pages.push((name, u64::try_from(stat.st_size).unwrap_or_default()));
    }
    let total: u64 = pages.iter().map(|(_, bytes)| bytes).sum();
    if total.saturating_sub(written) < LIMIT {
        return Ok(written);
    }
    for (name, _) in pages {
        // Also of files that are finished: for them it is cheap.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::fdatasync(rustix::fs::openat(images, name, flags, Mode::empty())?)?;
    }
    Ok(total)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        fs,
        io::Write,
        os::fd::OwnedFd,
        time::{Duration, Instant},
    };

    use super::*;

    #[test]
    fn little_is_left_alone_and_much_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let images = OwnedFd::from(fs::File::open(folder.path()).unwrap());
        fs::write(folder.path().join("pages-1.img"), vec![1; 1 << 20]).unwrap();
        fs::write(folder.path().join("core-1.img"), vec![1; 1 << 20]).unwrap();
        assert_eq!(write_back(&images, folder.path(), 0).unwrap(), 0);
        let large = fs::File::create(folder.path().join("pages-2.img")).unwrap();
        large.set_len(LIMIT).unwrap();
        (&large).write_all(&[1; 4096]).unwrap();
        assert_eq!(write_back(&images, folder.path(), 0).unwrap(), LIMIT + (1 << 20));
        assert_eq!(write_back(&images, folder.path(), LIMIT).unwrap(), LIMIT);
    }

    #[test]
    fn its_end_does_not_wait() {
        let folder = tempfile::tempdir().unwrap();
        let store = super::super::Store::open(folder.path().join("images")).unwrap();
        let writer = store.begin("k8s.io", "agent", None).unwrap();
        let began = Instant::now();
        drop(writer.bound_dirty_pages());
        assert!(began.elapsed() < Duration::from_secs(1));
    }
}
