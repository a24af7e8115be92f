//! Images on disk: one directory a dump, complete only when its manifest is there.
//!
//! ```text
//! <root>/<namespace>/<container>/<generation>/
//!     img/            what CRIU wrote
//!     parent/         what CRIU wrote in advance, if it did
//!     work/           CRIU's logs, and during a restore what is changed for it of img/, as it was
//!     manifest.json   written last: what is in img/ and parent/, and whose it is
//!     pages.sums      checksums of memory pages, computed while the agent sleeps
//! ```
//! CRIU trusts its images as it trusts its own program, so everything here is root's alone, is opened without
//! following links, and is checked against the manifest before CRIU reads it.

mod check;
mod directory;
mod edition;
mod error;
mod finish;
mod manifest;
mod maps;
pub mod pagemap;
mod parent;
mod readahead;
mod store;
mod sums;
mod writeback;
mod writer;

use std::{
    io::Read,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::FileType;
use sha2::{Digest, Sha256};

pub use check::{PageCheck, Pages};
pub(crate) use edition::Edition;
pub use error::Error;
pub use finish::Finished;
pub(crate) use manifest::number_in_parent;
pub use manifest::{
    Facts, FileEntry, MANIFEST_VERSION, MAX_MANIFEST, Manifest, Mode, Outside, OutsideMount, Versions,
};
pub use maps::PageMaps;
use pagemap::Pagemap;
pub(crate) use parent::{FROM_IMAGES, name_in as name_in_parent};
pub use readahead::{Part, Readahead};
pub use store::Store;
pub(crate) use sums::Claim;
pub use sums::{BLOCK, PageSums};
pub use writeback::Writeback;
pub use writer::ImageWriter;
pub(crate) use writer::Revoker;

/// The directory of a generation that holds what CRIU wrote.
pub const IMAGES: &str = "img";
/// The directory of a generation that holds CRIU's logs.
pub const WORK: &str = "work";
/// Space that is left on the disk beside an image.
const SPARE: u64 = 1024 * 1024;
/// The file whose presence makes an image complete.
const MANIFEST: &str = "manifest.json";

/// Whose image is wanted.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// The containerd namespace.
    pub namespace: &'a str,
    /// The container's id.
    pub container: &'a str,
    /// The digest of its OCI spec, see [`digest`].
    pub spec_digest: &'a str,
}

/// A complete image. A clone is the same image, for another thread.
#[derive(Debug, Clone)]
pub struct Image {
    path: PathBuf,
    parent: Arc<OwnedFd>,
    directory: Arc<OwnedFd>,
    images: Arc<OwnedFd>,
    work: Arc<OwnedFd>,
    manifest: Manifest,
    manifest_sha256: [u8; 32],
    finish: Arc<finish::Finish>,
}

impl Image {
    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What its manifest says; only [`Image::verify`] shows that it is true.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The directory with CRIU's files.
    pub fn images_dir(&self) -> BorrowedFd<'_> {
        self.images.as_fd()
    }

    /// The directory with CRIU's logs.
    pub fn work_dir(&self) -> BorrowedFd<'_> {
        self.work.as_fd()
    }

    /// The directory of all images of its container.
    pub(crate) fn container_dir(&self) -> BorrowedFd<'_> {
        self.parent.as_fd()
    }

    /// How many bytes CRIU's files have, by the manifest.
    pub fn bytes(&self) -> u64 {
        self.manifest.files.iter().map(|file| file.size).sum()
    }

    /// Checks that the image is the container's own, of this boot of the machine, and that each file is as it was
    /// when the dump ended: sizes of all, contents of all but the memory pages, and that each page map fits its pages. It
    /// gives back these page maps.
    /// The pages themselves are checked by [`Image::check_in_background`] and [`PageSums`].
    ///
    /// # Errors
    /// One that names the file, or says whose the image is.
    pub fn verify(&self, expected: &Expected<'_>) -> Result<PageMaps, Error> {
        self.manifest.check_owner(&self.path, expected)?;
        let boot = crate::procfs::boot_id()
            .map_err(|source| Error::io("read", Path::new("/proc/sys/kernel/random/boot_id"), source))?;
        if self.manifest.boot_id != boot {
            return Err(Error::OtherBoot { image: self.path.clone() });
        }
        self.verify_place()?;
        edition::put_back(self)?;
        self.verify_manifest()?;
        for name in parent::names(self.images.as_fd(), &self.path.join(IMAGES))? {
            if !self.manifest.files.iter().any(|file| file.name == name) {
                return Err(Error::Unlisted { image: self.path.clone(), file: name });
            }
        }
        self.manifest.files.iter().try_for_each(|file| self.verify_file(file))?;
        PageMaps::read(self.images.as_fd(), &self.path, &self.manifest.files)
    }

    /// What its checksums must belong to.
    fn owner(&self) -> sums::Owner {
        sums::Owner::new(&self.manifest, self.manifest_sha256)
    }

    /// Checks that the names on the disk still lead to what is open here: else an image that is removed could be that
    /// of somebody else.
    fn verify_place(&self) -> Result<(), Error> {
        let number = self.manifest.generation.to_string();
        let places = [
            (&self.parent, number.as_str(), &self.directory, self.path.clone()),
            (&self.directory, IMAGES, &self.images, self.path.join(IMAGES)),
        ];
        for (parent, name, held, path) in places {
            let found = directory::open(parent.as_fd(), name).and_then(rustix::fs::fstat);
            let held = rustix::fs::fstat(held).map_err(|error| Error::io("stat", &path, error.into()))?;
            if !found.is_ok_and(|found| (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)) {
                return Err(Error::Displaced(path));
            }
        }
        Ok(())
    }

    /// Checks that the manifest on the disk is the one that was read. The other would do; but who changed one file may
    /// have changed more.
    fn verify_manifest(&self) -> Result<(), Error> {
        match store::read_manifest(self.directory.as_fd(), &self.path)? {
            Some(bytes) if sha256(&bytes) == self.manifest_sha256 => Ok(()),
            Some(_) => Err(Error::Altered { image: self.path.clone(), file: MANIFEST.to_owned() }),
            None => Err(Error::Missing { image: self.path.clone(), file: MANIFEST.to_owned() }),
        }
    }

    /// Reads the page map `name`, and that of the parent when pages are there.
    fn pagemap_and_parent(&self, name: &str) -> Result<(Pagemap, Option<Pagemap>), Error> {
        let map = self.pagemap(name)?;
        let in_parent = map.entries.iter().any(|entry| entry.in_parent);
        let parent = in_parent.then(|| self.pagemap(&parent::name_in(name))).transpose()?;
        Ok((map, parent))
    }

    fn verify_file(&self, entry: &FileEntry) -> Result<(), Error> {
        let (image, file) = (self.path.clone(), entry.name.clone());
        let path = self.path.join(IMAGES).join(&entry.name);
        let opened = match directory::open_file(self.images.as_fd(), &entry.name) {
            Ok(opened) => opened,
            Err(rustix::io::Errno::NOENT) => return Err(Error::Missing { image, file }),
            Err(rustix::io::Errno::LOOP) => return Err(Error::Altered { image, file }),
            Err(error) => return Err(Error::io("open", &path, error.into())),
        };
        let stat = rustix::fs::fstat(&opened).map_err(|error| Error::io("stat", &path, error.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::Altered { image, file });
        }
        let found = u64::try_from(stat.st_size).unwrap_or_default();
        match found.cmp(&entry.size) {
            std::cmp::Ordering::Less => {
                return Err(Error::Truncated { image, file, expected: entry.size, found });
            }
            std::cmp::Ordering::Greater => {
                return Err(Error::Grown { image, file, expected: entry.size, found });
            }
            std::cmp::Ordering::Equal => {}
        }
        if let Some(expected) = &entry.sha256 {
            let found = digest_of(&mut std::fs::File::from(opened))
                .map_err(|source| Error::io("read", &path, source))?;
            if found != *expected {
                return Err(Error::Altered { image, file });
            }
        }
        Ok(())
    }

    /// Removes it from the disk.
    ///
    /// # Errors
    /// When a part of it cannot be removed; nothing outside it is touched, not even through a mount in it.
    pub fn remove(self) -> Result<(), Error> {
        self.give_up_finishing();
        self.verify_place()?;
        let name = self.manifest.generation.to_string();
        // Without its manifest a half-removed image is incomplete, never damaged.
        directory::unlink_in(self.parent.as_fd(), &name, MANIFEST, &self.path)?;
        directory::remove_tree(self.parent.as_fd(), &name, &self.path)
    }
}

/// The SHA-256 of `bytes` in hexadecimal: for the OCI spec of a container.
pub fn digest(bytes: &[u8]) -> String {
    hexadecimal(&sha256(bytes))
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

fn digest_of(reader: &mut impl Read) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 128 * 1024];
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(hexadecimal(&hasher.finalize())),
            length => hasher.update(&buffer[..length]),
        }
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests;
