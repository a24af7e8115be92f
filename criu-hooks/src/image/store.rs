//! Where images are kept.

use std::{
    fs::File,
    io::Read,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{AtFlags, Mode, OFlags},
    io::Errno,
};

use crate::pager::WorkingSet;

use super::{Error, IMAGES, Image, ImageWriter, MANIFEST, MAX_MANIFEST, Manifest, SPARE, WORK, directory};

/// How often a new generation is tried while somebody else removes the directories above it or takes its number.
const ATTEMPTS: u64 = 16;

/// All images of a node, or those that one program keeps.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    root: OwnedFd,
}

impl Store {
    /// Opens the store at `root`, an absolute path; the directory is made when it is missing.
    ///
    /// # Errors
    /// When it cannot be made or opened, or when others than this user could get at it.
    pub fn open(root: impl AsRef<Path>) -> Result<Store, Error> {
        let path = root.as_ref().to_owned();
        let fail = |action| {
            let path = path.clone();
            move |error: Errno| Error::io(action, &path, error.into())
        };
        match rustix::fs::mkdir(&path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            // What is above the store is not the store's: made as any other directory.
            Err(Errno::NOENT) => {
                let above = path.parent().unwrap_or(Path::new("/"));
                std::fs::create_dir_all(above).map_err(|source| Error::io("create", above, source))?;
                rustix::fs::mkdir(&path, Mode::RWXU).map_err(fail("create"))?;
            }
            // On a read-only file system a directory that is there is found to be unusable when it is used.
            Err(Errno::ROFS) if path.is_dir() => {}
            Err(error) => return Err(fail("create")(error)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = rustix::fs::open(&path, flags, Mode::empty()).map_err(fail("open"))?;
        let stat = rustix::fs::fstat(&root).map_err(fail("stat"))?;
        let (uid, mode) = (stat.st_uid, stat.st_mode & 0o777);
        if uid != rustix::process::geteuid().as_raw() || mode & 0o077 != 0 {
            return Err(Error::Exposed { path, uid, mode });
        }
        Ok(Store { path, root })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes that may still be written to it.
    ///
    /// # Errors
    /// When the file system does not tell.
    pub fn free_bytes(&self) -> Result<u64, Error> {
        directory::free_bytes(&self.path).map_err(|source| Error::io("measure", &self.path, source))
    }

    /// Starts a new generation of a container's images. When it is known how many bytes it will have, they must be
    /// free.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::ReadOnly`], [`Error::Permission`], [`Error::NotADirectory`], [`Error::Name`].
    pub fn begin(
        &self,
        namespace: &str,
        container: &str,
        expected_bytes: Option<u64>,
    ) -> Result<ImageWriter, Error> {
        let path = self.container_path(namespace, container)?;
        if let Some(needed) = expected_bytes {
            let free = self.free_bytes()?;
            if free < needed.saturating_add(SPARE) {
                return Err(Error::Full { path: self.path.clone(), free, needed: Some(needed) });
            }
        }
        let mut last = Errno::EXIST;
        for attempt in 0..ATTEMPTS {
            let begun = || -> Result<Result<ImageWriter, Errno>, Error> {
                let parent = match directory::open_or_make(self.root.as_fd(), namespace)
                    .and_then(|space| directory::open_or_make(space.as_fd(), container))
                {
                    Ok(parent) => parent,
                    Err(error) => return Ok(Err(error)),
                };
                let newest = generations(&parent, &path)?.into_iter().max().unwrap_or(0);
                let generation = newest.saturating_add(1 + attempt);
                Ok(ImageWriter::create(parent, &path, namespace, container, generation))
            };
            match begun()? {
                Ok(writer) => return Ok(writer),
                // Removed above us, or taken by another.
                Err(error @ (Errno::NOENT | Errno::EXIST)) => last = error,
                Err(error) => return Err(Error::io("create", &path, error.into())),
            }
        }
        Err(Error::io("create", &path, last.into()))
    }

    /// The newest complete image of a container. An older one never stands in for it: that would take the agent back
    /// in time.
    ///
    /// # Errors
    /// When its manifest cannot be read or understood.
    pub fn latest(&self, namespace: &str, container: &str) -> Result<Option<Image>, Error> {
        let path = self.container_path(namespace, container)?;
        let Some(parent) = self.open_container(namespace, container, &path)? else {
            return Ok(None);
        };
        let mut found = generations(&parent, &path)?;
        found.sort_unstable_by(|a, b| b.cmp(a));
        for generation in found {
            let parent = parent.try_clone().map_err(|source| Error::io("open", &path, source))?;
            if let Some(image) = open_image(parent, &path, generation)? {
                return Ok(Some(image));
            }
        }
        Ok(None)
    }

    /// Removes what a container's broken-off dumps have left. Not while one is going on.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn sweep_incomplete(&self, namespace: &str, container: &str) -> Result<(), Error> {
        let path = self.container_path(namespace, container)?;
        let Some(parent) = self.open_container(namespace, container, &path)? else {
            return Ok(());
        };
        for generation in generations(&parent, &path)? {
            let name = generation.to_string();
            let manifest = format!("{name}/{MANIFEST}");
            let found = rustix::fs::statat(&parent, manifest.as_str(), AtFlags::SYMLINK_NOFOLLOW);
            if matches!(found, Err(Errno::NOENT)) {
                directory::remove_tree(parent.as_fd(), &name, &path.join(&name))?;
            }
        }
        self.remove_empty(namespace, container);
        Ok(())
    }

    /// Removes every image of a container, complete or not.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn remove_all(&self, namespace: &str, container: &str) -> Result<(), Error> {
        let path = self.container_path(namespace, container)?;
        let Some(parent) = self.open_container(namespace, container, &path)? else {
            return Ok(());
        };
        for generation in generations(&parent, &path)? {
            let name = generation.to_string();
            directory::unlink_in(parent.as_fd(), &name, MANIFEST, &path.join(&name))?;
            directory::remove_tree(parent.as_fd(), &name, &path.join(&name))?;
        }
        WorkingSet::remove(parent.as_fd());
        self.remove_empty(namespace, container);
        Ok(())
    }

    /// Removes the directories of a container and a namespace that hold nothing.
    fn remove_empty(&self, namespace: &str, container: &str) {
        let inside = format!("{namespace}/{container}");
        for name in [inside.as_str(), namespace] {
            let _ = rustix::fs::unlinkat(&self.root, name, AtFlags::REMOVEDIR);
        }
    }

    fn container_path(&self, namespace: &str, container: &str) -> Result<PathBuf, Error> {
        directory::check_name("namespace", namespace)?;
        directory::check_name("container id", container)?;
        Ok(self.path.join(namespace).join(container))
    }

    fn open_container(
        &self,
        namespace: &str,
        container: &str,
        path: &Path,
    ) -> Result<Option<OwnedFd>, Error> {
        let opened = directory::open(self.root.as_fd(), namespace)
            .and_then(|space| directory::open(space.as_fd(), container));
        match opened {
            Ok(directory) => Ok(Some(directory)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(Error::io("open", path, error.into())),
        }
    }
}

/// Opens one generation; `None` when it is not complete.
pub(super) fn open_image(
    parent: OwnedFd,
    parent_path: &Path,
    generation: u64,
) -> Result<Option<Image>, Error> {
    let name = generation.to_string();
    let path = parent_path.join(&name);
    let fail = |error: Errno| Error::io("open", &path, error.into());
    let opened = match directory::open(parent.as_fd(), &name) {
        Ok(opened) => opened,
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(fail(error)),
    };
    let manifest_path = path.join(MANIFEST);
    let Some(bytes) = read_manifest(opened.as_fd(), &path)? else {
        return Ok(None);
    };
    let manifest = Manifest::parse(&bytes, &manifest_path)?;
    if manifest.generation != generation {
        let why = format!("it is of generation {}", manifest.generation);
        return Err(Error::ManifestInvalid { path: manifest_path, why });
    }
    let images = directory::open(opened.as_fd(), IMAGES).map_err(fail)?;
    let work = directory::open_or_make(opened.as_fd(), WORK).map_err(fail)?;
    let [parent, directory, images, work] = [parent, opened, images, work].map(Arc::new);
    let manifest_sha256 = super::sha256(&bytes);
    let finish = Arc::default();
    Ok(Some(Image { path, parent, directory, images, work, manifest, manifest_sha256, finish }))
}

/// The manifest of a generation; `None` when it has none. `path` is the generation's.
pub(super) fn read_manifest(generation: BorrowedFd<'_>, path: &Path) -> Result<Option<Vec<u8>>, Error> {
    let path = path.join(MANIFEST);
    let file = match directory::open_file(generation, MANIFEST) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(Error::io("open", &path, error.into())),
    };
    let read = |source| Error::io("read", &path, source);
    if !file.metadata().map_err(read)?.is_file() {
        return Err(Error::ManifestInvalid { path, why: "it is no regular file".to_owned() });
    }
    let mut bytes = Vec::new();
    file.take(MAX_MANIFEST + 1).read_to_end(&mut bytes).map_err(read)?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > MAX_MANIFEST {
        return Err(Error::ManifestTooLong { path });
    }
    Ok(Some(bytes))
}

/// The numbers of the generations in a container's directory; other names are none of ours.
fn generations(directory: &OwnedFd, path: &Path) -> Result<Vec<u64>, Error> {
    let names = directory::names(directory.as_fd(), path)?;
    let number = |name: &String| name.parse::<u64>().ok().filter(|number| number.to_string() == *name);
    Ok(names.iter().filter_map(number).collect())
}
