//! Images on disk: how large they are, and whether they are in the page cache.

use std::fs::{self, File};
use std::io::{ErrorKind, IoSliceMut};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::fs::{Advice, fadvise};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

/// At how many places of each file the page cache is looked at.
const SAMPLES: u64 = 128;

/// Bytes that the files of a folder take up on disk.
pub fn bytes_on_disk(folder: &Path) -> Result<u64> {
    let sizes = files(folder)?.into_iter().map(|path| match fs::metadata(&path) {
        Ok(metadata) => Ok(metadata.blocks() * 512),
        // Checksums are written under another name first, while this looks.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error).with_context(|| format!("looking at {}", path.display())),
    });
    sizes.sum()
}

/// Writes the files of a folder to disk, drops them from the page cache, and gives the share that is still there.
pub fn drop_cached(folder: &Path) -> Result<f64> {
    let files = files(folder)?;
    let opened = files.iter().filter_map(|path| match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        opened => Some(opened.with_context(|| path.display().to_string())),
    });
    let opened = opened.collect::<Result<Vec<File>>>()?;
    for file in &opened {
        file.sync_all().context("syncing an image")?;
    }
    let forget = || opened.iter().try_for_each(|file| fadvise(file, 0, None, Advice::DontNeed));
    forget().context("dropping an image from the page cache")?;
    let mut found = (0, 0);
    for file in &opened {
        let (cached, looked_at) = sample(file)?;
        found = (found.0 + cached, found.1 + looked_at);
    }
    // Looking at a page that is not cached may begin to read it.
    forget().context("dropping an image from the page cache")?;
    Ok(f64::from(found.0) / f64::from(found.1.max(1)))
}

/// How many of a file's pages are in the page cache, of how many that were looked at.
fn sample(file: &File) -> Result<(u32, u32)> {
    // Without this each look would read more than its page ahead.
    fadvise(file, 0, None, Advice::Random).context("preparing to look at the page cache")?;
    let length = file.metadata().context("the length of an image's file")?.len();
    let (mut cached, mut looked_at) = (0, 0);
    let step = (length / SAMPLES).max(4096);
    let mut offset = 0;
    while offset < length {
        let mut byte = [0];
        match preadv2(file, &mut [IoSliceMut::new(&mut byte)], offset, ReadWriteFlags::NOWAIT) {
            Ok(_) => cached += 1,
            Err(Errno::AGAIN) => {}
            Err(errno) => return Err(errno).context("looking at the page cache"),
        }
        looked_at += 1;
        offset += step;
    }
    Ok((cached, looked_at))
}

/// The files in a folder and in those below it.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("listing {}", folder.display()))?;
        let kind = entry.file_type().with_context(|| format!("looking at {}", entry.path().display()))?;
        if kind.is_dir() {
            found.extend(files(&entry.path())?);
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// What statfs calls a tmpfs.
    const TMPFS: i64 = 0x0102_1994;

    #[test]
    fn files_are_counted_in_all_folders_by_what_they_occupy() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        fs::create_dir(folder.path().join("inner")).unwrap();
        fs::write(folder.path().join("inner/a"), vec![1; 100_000]).unwrap();
        let hole = File::create(folder.path().join("b")).unwrap();
        hole.set_len(1 << 30).unwrap();
        File::open(folder.path().join("inner/a")).unwrap().sync_all().unwrap();
        let bytes = bytes_on_disk(folder.path()).unwrap();
        assert!((100_000..1 << 20).contains(&bytes), "{bytes}");
        assert!(bytes_on_disk(&folder.path().join("none")).is_err());
    }

    #[test]
    fn what_was_written_is_cached_until_it_is_dropped() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        if rustix::fs::statfs(folder.path()).unwrap().f_type == TMPFS {
            eprintln!("skipped: this source is on a tmpfs, whose pages are in memory and nowhere else");
            return;
        }
        let path = folder.path().join("pages");
        fs::write(&path, vec![1; 4 << 20]).unwrap();
        let (cached, looked_at) = sample(&File::open(&path).unwrap()).unwrap();
        assert_eq!((cached, looked_at), (128, 128));
        let left = drop_cached(folder.path()).unwrap();
        assert!(left < 0.05, "{left} of a file on disk is still cached");
    }
}
