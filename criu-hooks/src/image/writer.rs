//! An image that is being made.

use std::{
    fs::File,
    io::Write,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags},
    io::Errno,
};

use super::{
    Error, Facts, FileEntry, IMAGES, Image, MANIFEST, MANIFEST_VERSION, MAX_MANIFEST, Manifest, PageMaps,
    SPARE, WORK, digest_of, directory,
    manifest::is_pages,
    parent::{self, PARENT},
};

/// The name of a manifest that is not yet whole.
const UNFINISHED: &str = ".manifest.json.tmp";

/// How far an image has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    Complete,
    /// Never to be completed, whoever may still be about to.
    Revoked,
}

/// A new generation. Dropping it before it is complete removes it.
#[derive(Debug)]
pub struct ImageWriter {
    pub(super) generation: Arc<Generation>,
}

/// What outlives the writer while a thread still reads files.
#[derive(Debug)]
pub(super) struct Generation {
    pub(super) path: PathBuf,
    namespace: String,
    container: String,
    number: u64,
    parent: OwnedFd,
    directory: OwnedFd,
    pub(super) images: OwnedFd,
    work: OwnedFd,
    state: Mutex<State>,
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
        let generation = Generation {
            path: parent_path.join(name),
            namespace: namespace.to_owned(),
            container: container.to_owned(),
            number: generation,
            parent,
            directory,
            images,
            work,
            state: Mutex::new(State::Open),
        };
        Ok(ImageWriter { generation: Arc::new(generation) })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.generation.path
    }

    /// The number of this dump of the container.
    pub fn generation(&self) -> u64 {
        self.generation.number
    }

    /// Where CRIU writes its files.
    pub fn images_dir(&self) -> BorrowedFd<'_> {
        self.generation.images.as_fd()
    }

    /// Where CRIU writes its logs.
    pub fn work_dir(&self) -> BorrowedFd<'_> {
        self.generation.work.as_fd()
    }

    /// The names of CRIU's files so far.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub(crate) fn names(&self) -> Result<Vec<String>, Error> {
        directory::names(self.images_dir(), &self.path().join(IMAGES))
    }

    /// Makes the directory of a parent, of what CRIU writes in advance; empty, whatever was there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn make_parent(&self) -> Result<OwnedFd, Error> {
        self.remove_parent()?;
        let made = directory::make(self.generation.directory.as_fd(), PARENT);
        made.map_err(|error| Error::io("create", &self.path().join(PARENT), error.into()))
    }

    /// Removes the parent, if there is one.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub(crate) fn remove_parent(&self) -> Result<(), Error> {
        directory::remove_tree(self.generation.directory.as_fd(), PARENT, &self.path().join(PARENT))
    }

    /// Whether there is a parent.
    pub(crate) fn has_parent(&self) -> bool {
        directory::open(self.generation.directory.as_fd(), PARENT).is_ok()
    }

    /// The bytes of the parent's files.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub(crate) fn parent_bytes(&self) -> Result<u64, Error> {
        let path = self.path().join(PARENT);
        let fail = |error: Errno| Error::io("read", &path, error.into());
        let directory = directory::open(self.generation.directory.as_fd(), PARENT).map_err(fail)?;
        let mut sum = 0;
        for name in directory::names(directory.as_fd(), &path)? {
            let stat = rustix::fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
            sum += u64::try_from(stat.st_size).unwrap_or_default();
        }
        Ok(sum)
    }

    /// Checks that there is still space beside the image.
    ///
    /// # Errors
    /// [`Error::Full`].
    pub(crate) fn check_space(&self) -> Result<(), Error> {
        let path = self.path();
        let free = directory::free_bytes(path).map_err(|source| Error::io("measure", path, source))?;
        if free < SPARE {
            return Err(Error::Full { path: path.to_owned(), free, needed: None });
        }
        Ok(())
    }

    /// Removes what CRIU wrote, before it is to write once more.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub(crate) fn clear(&self) -> Result<(), Error> {
        for (directory, name) in [(&self.generation.images, IMAGES), (&self.generation.work, WORK)] {
            let path = self.path().join(name);
            for file in directory::names(directory.as_fd(), &path)? {
                rustix::fs::unlinkat(directory, file.as_str(), AtFlags::empty())
                    .map_err(|error| Error::io("remove", &path.join(file), error.into()))?;
            }
        }
        Ok(())
    }

    /// Whether the manifest is there.
    pub fn is_complete(&self) -> bool {
        *self.generation.state() == State::Complete
    }

    /// Describes what CRIU wrote in the manifest: from here on the image is one. Takes time in proportion to the files,
    /// memory pages apart.
    ///
    /// # Errors
    /// When a file cannot be read, or the manifest cannot be written; the image then stays incomplete.
    pub fn complete(&self, facts: Facts) -> Result<Manifest, Error> {
        self.generation.write(self.generation.describe_all(facts)?)
    }

    /// As [`ImageWriter::complete`], on another thread, and only when a restore would take the page maps: nothing may be
    /// killed for an image that cannot be restored. When the future is dropped, the image may still become complete
    /// until it is revoked.
    ///
    /// # Errors
    /// As [`ImageWriter::complete`], and [`Error::Pagemap`] or [`Error::PagesMismatch`].
    pub async fn complete_in_background(&self, facts: Facts) -> Result<Manifest, Error> {
        let generation = Arc::clone(&self.generation);
        let done = tokio::task::spawn_blocking(move || generation.complete_restorable(facts)).await;
        done.unwrap_or_else(|error| Err(Error::io("describe", self.path(), std::io::Error::other(error))))
    }

    /// Takes the completion back for good, when the processes run on after all: the image would be stale.
    ///
    /// # Errors
    /// When the manifest cannot be removed.
    pub fn revoke(&self) -> Result<(), Error> {
        self.generation.revoke()
    }

    /// Another hold of the same image, for those who must be able to revoke it after its writer is gone.
    pub(crate) fn revoker(&self) -> Revoker {
        Revoker(Arc::clone(&self.generation))
    }

    /// The finished image. Opened before the processes are killed, it needs nothing more that could fail afterwards.
    ///
    /// # Errors
    /// [`Error::Missing`] when it is not complete.
    pub fn open(&self) -> Result<Image, Error> {
        let generation = &self.generation;
        let missing = || Error::Missing { image: generation.path.clone(), file: MANIFEST.to_owned() };
        if !self.is_complete() {
            return Err(missing());
        }
        let parent =
            generation.parent.try_clone().map_err(|source| Error::io("open", &generation.path, source))?;
        let above = generation.path.parent().unwrap_or(&generation.path);
        super::store::open_image(parent, above, generation.number)?.ok_or_else(missing)
    }
}

/// Can take an image back.
pub(crate) struct Revoker(Arc<Generation>);

impl Revoker {
    /// Revokes the image and removes it.
    pub(crate) fn remove(&self) {
        if let Err(error) = self.0.revoke() {
            tracing::error!(%error, "a stale image could not be revoked");
        }
        self.0.remove();
    }
}

impl Generation {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn complete_restorable(&self, facts: Facts) -> Result<Manifest, Error> {
        let manifest = self.describe_all(facts)?;
        PageMaps::read(self.images.as_fd(), &self.path, &manifest.files)?;
        self.write(manifest)
    }

    fn describe_all(&self, facts: Facts) -> Result<Manifest, Error> {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let boot_id = crate::procfs::boot_id()
            .map_err(|source| Error::io("read", Path::new("/proc/sys/kernel/random/boot_id"), source))?;
        Ok(Manifest {
            version: MANIFEST_VERSION,
            namespace: self.namespace.clone(),
            container: self.container.clone(),
            generation: self.number,
            boot_id,
            created_unix_ms: u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX),
            facts,
            files: self.files()?,
        })
    }

    fn revoke(&self) -> Result<(), Error> {
        let mut state = self.state();
        *state = State::Revoked;
        match rustix::fs::unlinkat(&self.directory, MANIFEST, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(Error::io("remove", &self.path.join(MANIFEST), error.into())),
        }
    }

    fn remove(&self) {
        let name = self.number.to_string();
        if let Err(error) = directory::remove_tree(self.parent.as_fd(), &name, &self.path) {
            tracing::warn!(%error, "an incomplete image could not be removed");
        }
    }

    fn files(&self) -> Result<Vec<FileEntry>, Error> {
        let path = self.path.join(IMAGES);
        let mut names = parent::names(self.images.as_fd(), &path)?;
        names.sort();
        names.into_iter().map(|name| self.describe(name, &path)).collect()
    }

    fn describe(&self, name: String, path: &Path) -> Result<FileEntry, Error> {
        let path = path.join(&name);
        let fail = |error: Errno| Error::io("read", &path, error.into());
        let opened = directory::open_file(self.images.as_fd(), &name).map_err(fail)?;
        let stat = rustix::fs::fstat(&opened).map_err(fail)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::Altered { image: self.path.clone(), file: name });
        }
        let sha256 = if is_pages(&name) {
            None
        } else {
            let found =
                digest_of(&mut File::from(opened)).map_err(|source| Error::io("read", &path, source))?;
            Some(found)
        };
        Ok(FileEntry { name, size: u64::try_from(stat.st_size).unwrap_or_default(), sha256 })
    }

    fn write(&self, manifest: Manifest) -> Result<Manifest, Error> {
        let path = self.path.join(MANIFEST);
        let failed = |source| Error::io("write", &path, source);
        let text = serde_json::to_vec(&manifest).map_err(|error| failed(error.into()))?;
        if u64::try_from(text.len()).unwrap_or(u64::MAX) > MAX_MANIFEST {
            return Err(Error::ManifestTooLong { path });
        }
        self.publish(&text).map_err(failed)?;
        Ok(manifest)
    }

    fn publish(&self, manifest: &[u8]) -> std::io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let mut file = File::from(rustix::fs::openat(&self.directory, UNFINISHED, flags, mode)?);
        file.write_all(manifest)?;
        // Neither the manifest nor its name waits for the disk, as CRIU's files do not: an image is of use only in the boot
        // that made it, and to that one all of it is there at once. The agent stands still meanwhile, and a disk takes
        // as long for this as CRIU for a small dump.
        let mut state = self.state();
        if *state == State::Revoked {
            let _ = rustix::fs::unlinkat(&self.directory, UNFINISHED, AtFlags::empty());
            return Err(std::io::Error::other("the image was revoked"));
        }
        rustix::fs::renameat(&self.directory, UNFINISHED, &self.directory, MANIFEST)?;
        *state = State::Complete;
        Ok(())
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        let mut state = self.generation.state();
        if *state != State::Complete {
            *state = State::Revoked;
            drop(state);
            self.generation.remove();
        }
    }
}
