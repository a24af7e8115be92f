//! An image that is being made.

use std::{
    fs::File,
    io::Write,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags},
    io::Errno,
};

use super::{
    Error, Facts, FileEntry, IMAGES, Image, MANIFEST, MANIFEST_VERSION, Manifest, WORK, digest_of, directory,
    manifest::is_pages,
};

/// The name of a manifest that is not yet whole.
const UNFINISHED: &str = ".manifest.json.tmp";

/// A new generation. Dropping it before it is complete removes it.
#[derive(Debug)]
pub struct ImageWriter {
    path: PathBuf,
    namespace: String,
    container: String,
    generation: u64,
    parent: OwnedFd,
    directory: OwnedFd,
    images: OwnedFd,
    work: OwnedFd,
    complete: AtomicBool,
}

impl ImageWriter {
    /// Makes the directory of `generation` in `parent`.
    pub(super) fn create(
        parent: OwnedFd,
        parent_path: &Path,
        namespace: &str,
        container: &str,
        generation: u64,
    ) -> Result<ImageWriter, Errno> {
        let name = generation.to_string();
        let directory = directory::make(parent.as_fd(), &name)?;
        let inside = directory::make(directory.as_fd(), IMAGES)
            .and_then(|images| Ok((images, directory::make(directory.as_fd(), WORK)?)));
        let (images, work) = match inside {
            Ok(inside) => inside,
            Err(error) => {
                let _ = directory::remove_tree(parent.as_fd(), &name, parent_path);
                return Err(error);
            }
        };
        Ok(ImageWriter {
            path: parent_path.join(name),
            namespace: namespace.to_owned(),
            container: container.to_owned(),
            generation,
            parent,
            directory,
            images,
            work,
            complete: AtomicBool::new(false),
        })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of this dump of the container.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Where CRIU writes its files.
    pub fn images_dir(&self) -> BorrowedFd<'_> {
        self.images.as_fd()
    }

    /// Where CRIU writes its logs.
    pub fn work_dir(&self) -> BorrowedFd<'_> {
        self.work.as_fd()
    }

    /// Whether the manifest is there.
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Describes what CRIU wrote in the manifest, and puts it on the disk: from here on the image is one. Takes time in
    /// proportion to the files, memory pages apart.
    ///
    /// # Errors
    /// When a file cannot be read, or the manifest cannot be written; the image then stays incomplete.
    pub fn complete(&self, facts: Facts) -> Result<Manifest, Error> {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let boot_id = crate::procfs::boot_id()
            .map_err(|source| Error::io("read", Path::new("/proc/sys/kernel/random/boot_id"), source))?;
        let manifest = Manifest {
            version: MANIFEST_VERSION,
            namespace: self.namespace.clone(),
            container: self.container.clone(),
            generation: self.generation,
            boot_id,
            created_unix_ms: u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX),
            facts,
            files: self.files()?,
        };
        self.write(&manifest)?;
        self.complete.store(true, Ordering::Release);
        Ok(manifest)
    }

    /// Takes the completion back, when the processes run on after all: the image would be stale.
    ///
    /// # Errors
    /// When the manifest cannot be removed.
    pub fn revoke(&self) -> Result<(), Error> {
        self.complete.store(false, Ordering::Release);
        match rustix::fs::unlinkat(&self.directory, MANIFEST, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(Error::io("remove", &self.path.join(MANIFEST), error.into())),
        }
    }

    /// The finished image.
    ///
    /// # Errors
    /// [`Error::Missing`] when it is not complete.
    pub fn finish(self) -> Result<Image, Error> {
        if !self.is_complete() {
            return Err(Error::Missing {
                image: self.path.clone(),
                file: MANIFEST.to_owned(),
            });
        }
        let parent = self
            .parent
            .try_clone()
            .map_err(|source| Error::io("open", &self.path, source))?;
        super::store::open_image(parent, self.path.parent().unwrap_or(&self.path), self.generation)?
            .ok_or_else(|| Error::Missing {
                image: self.path.clone(),
                file: MANIFEST.to_owned(),
            })
    }

    fn files(&self) -> Result<Vec<FileEntry>, Error> {
        let path = self.path.join(IMAGES);
        let mut names = directory::names(self.images.as_fd(), &path)?;
        names.sort();
        names.into_iter().map(|name| self.describe(name, &path)).collect()
    }

    fn describe(&self, name: String, path: &Path) -> Result<FileEntry, Error> {
        let path = path.join(&name);
        let fail = |error: Errno| Error::io("read", &path, error.into());
        let opened = directory::open_file(self.images.as_fd(), &name).map_err(fail)?;
        let stat = rustix::fs::fstat(&opened).map_err(fail)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::Altered {
                image: self.path.clone(),
                file: name,
            });
        }
        let sha256 = if is_pages(&name) {
            None
        } else {
            let found =
                digest_of(&mut File::from(opened)).map_err(|source| Error::io("read", &path, source))?;
            Some(found)
        };
        Ok(FileEntry {
            name,
            size: u64::try_from(stat.st_size).unwrap_or_default(),
            sha256,
        })
    }

    fn write(&self, manifest: &Manifest) -> Result<(), Error> {
        let path = self.path.join(MANIFEST);
        let write = || -> std::io::Result<()> {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mode = Mode::RUSR | Mode::WUSR;
            let mut file = File::from(rustix::fs::openat(&self.directory, UNFINISHED, flags, mode)?);
            file.write_all(&serde_json::to_vec(manifest)?)?;
            file.sync_all()?;
            rustix::fs::renameat(&self.directory, UNFINISHED, &self.directory, MANIFEST)?;
            rustix::fs::fsync(&self.directory)?;
            Ok(())
        };
        write().map_err(|source| {
            // After a failed fsync of the directory the manifest may stand or not: it must not.
            let _ = rustix::fs::unlinkat(&self.directory, MANIFEST, AtFlags::empty());
            Error::io("write", &path, source)
        })
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        if !self.is_complete() {
            let name = self.generation.to_string();
            if let Err(error) = directory::remove_tree(self.parent.as_fd(), &name, &self.path) {
                tracing::warn!(%error, "an incomplete image could not be removed");
            }
        }
    }
}
