//! An edition of an image for one restore.
//!
//! Some of an image must be changed before CRIU reads it, each time in another way: what remains of timers. CRIU reads its
//! files when it has left the host's root behind, so the changed ones must lie beside the others. The originals are moved aside
//! meanwhile, never written, and moved back: when the restore is over, or before the next one looks at the image, should
//! a shim have died in between.

use std::{io, os::fd::AsFd};

use rustix::fs::{Mode, OFlags, renameat};

use super::{Error, IMAGES, Image, WORK, directory};

/// What the name of an original begins with as long as it lies among the logs.
const ASIDE: &str = "original-";

/// An edition of an image. When it is dropped the image is as it was.
#[derive(Debug)]
pub(crate) struct Edition(Image);

impl Edition {
    /// Makes an edition of `image` with these files, by name, in place of those that it has.
    ///
    /// # Errors
    /// When the disk is full, or cannot be written; the image is then as it was.
    pub(crate) fn of(image: &Image, changed: &[(String, Vec<u8>)]) -> io::Result<Edition> {
        let edition = Edition(image.clone());
        for (name, bytes) in changed {
            renameat(image.images_dir(), name, image.work_dir(), format!("{ASIDE}{name}"))?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let file = rustix::fs::openat(image.images_dir(), name, flags, Mode::RUSR | Mode::WUSR)?;
            io::Write::write_all(&mut std::fs::File::from(file), bytes)?;
        }
        Ok(edition)
    }
}

impl Drop for Edition {
    fn drop(&mut self) {
        if let Err(error) = put_back(&self.0) {
            tracing::error!(%error, "an image is put back as it was before it is used again");
        }
    }
}

/// Moves the originals back that lie aside.
pub(super) fn put_back(image: &Image) -> Result<(), Error> {
    for name in directory::names(image.work.as_fd(), &image.path.join(WORK))? {
        let Some(original) = name.strip_prefix(ASIDE) else { continue };
        renameat(image.work_dir(), &name, image.images_dir(), original)
            .map_err(|error| Error::io("put back", &image.path.join(IMAGES).join(original), error.into()))?;
    }
    Ok(())
}
