//! An edition of an image for one restore.
//!
//! Some of an image must be changed before CRIU reads it, each time in another way: what remains of timers. The image
//! itself stays as it is, so that a restore which fails can be tried again. An edition is a directory of links to its
//! files, and of the changed files in place of some.

use std::{
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, Mode, OFlags},
    io::Errno,
};

use super::{IMAGES, Image, directory, parent};

/// Its name in the directory of logs.
const EDITION: &str = "edition";

/// An edition of an image. It goes when it is dropped.
#[derive(Debug)]
pub(crate) struct Edition {
    work: OwnedFd,
    directory: OwnedFd,
    names: Vec<String>,
}

impl Edition {
    /// Makes an edition of `image` with these files, by name, in place of those that it has.
    ///
    /// # Errors
    /// When the disk is full, or cannot be written.
    pub(crate) fn of(image: &Image, changed: &[(String, Vec<u8>)]) -> io::Result<Edition> {
        let work = image.work_dir().try_clone_to_owned()?;
        match rustix::fs::unlinkat(&work, EDITION, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            // A shim that died in the middle of a restore has left it.
            Err(_) => {
                directory::remove_tree(work.as_fd(), EDITION, image.path()).map_err(io::Error::other)?;
            }
        }
        let made = directory::make(work.as_fd(), EDITION)?;
        let mut edition = Edition { work, directory: made, names: Vec::new() };
        let own = image.manifest().files.iter().map(|file| file.name.as_str());
        let mut own: Vec<&str> = own.filter(|name| !parent::is_of_parent(name)).collect();
        own.extend((own.len() < image.manifest().files.len()).then_some(parent::PARENT));
        for name in own {
            edition.names.push(name.to_owned());
            if let Some((_, bytes)) = changed.iter().find(|(of, _)| of == name) {
                edition.write(name, bytes)?;
            } else {
                rustix::fs::symlinkat(format!("../../{IMAGES}/{name}"), &edition.directory, name)?;
            }
        }
        Ok(edition)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, name, flags, Mode::RUSR | Mode::WUSR)?;
        std::fs::File::from(file).write_all(bytes)
    }

    /// The directory, for CRIU.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

impl Drop for Edition {
    fn drop(&mut self) {
        // What stays is removed with the image.
        for name in &self.names {
            let _ = rustix::fs::unlinkat(&self.directory, name.as_str(), AtFlags::empty());
        }
        let _ = rustix::fs::unlinkat(&self.work, EDITION, AtFlags::REMOVEDIR);
    }
}
