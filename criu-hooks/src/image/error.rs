//! What can be wrong with an image or the place where it is kept.

use std::{
    io,
    path::{Path, PathBuf},
};

use rustix::io::Errno;

use super::pagemap::PagemapError;

/// What can go wrong with images.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A namespace or a container id that cannot be the name of a directory.
    #[error("{what} {value:?} cannot name a directory: {why}")]
    Name {
        /// "namespace" or "container id".
        what: &'static str,
        /// What was given, shortened.
        value: String,
        /// Why not.
        why: &'static str,
    },
    /// Something that is no directory stands where one is needed.
    #[error("{} is not a directory (links are not followed); move it away or configure another image directory", .0.display())]
    NotADirectory(PathBuf),
    /// The file system cannot be written.
    #[error("{} is on a read-only file system; configure an image directory that can be written", .0.display())]
    ReadOnly(PathBuf),
    /// The disk is full, or would be.
    #[error("no space for an image in {}: {free} bytes free{}", path.display(), needed.map(|bytes| format!(", {bytes} needed")).unwrap_or_default())]
    Full {
        /// The image directory.
        path: PathBuf,
        /// The bytes that are free.
        free: u64,
        /// The bytes that are needed, when known.
        needed: Option<u64>,
    },
    /// Not root, or a file system that refuses root.
    #[error("permission denied to {action} {}", path.display())]
    Permission {
        /// "create", "open" and the like.
        action: &'static str,
        /// On what.
        path: PathBuf,
    },
    /// Others could read or change the images.
    #[error("{} belongs to user {uid} with mode {mode:03o}; it must be this user's alone (chmod 700)", path.display())]
    Exposed {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// Its permissions.
        mode: u32,
    },
    /// Any other failure of a system call.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// "create", "open" and the like.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The manifest is longer than any that this program writes.
    #[error("{} is longer than {} bytes and was not read", path.display(), super::MAX_MANIFEST)]
    ManifestTooLong {
        /// The manifest.
        path: PathBuf,
    },
    /// The manifest cannot be understood.
    #[error("{} is damaged: {why}", path.display())]
    ManifestInvalid {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The manifest is of a version that this program does not know.
    #[error("{} has version {found}, this program knows version {}", path.display(), super::MANIFEST_VERSION)]
    UnknownVersion {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// A file is not there.
    #[error("the image {} lacks its file {file}", image.display())]
    Missing {
        /// The image.
        image: PathBuf,
        /// The file.
        file: String,
    },
    /// A file is shorter than it was.
    #[error("the file {file} of the image {} is truncated: {found} bytes of {expected}", image.display())]
    Truncated {
        /// The image.
        image: PathBuf,
        /// The file.
        file: String,
        /// Its bytes at the dump.
        expected: u64,
        /// Its bytes now.
        found: u64,
    },
    /// A file is longer than it was.
    #[error("the file {file} of the image {} has grown: {found} bytes instead of {expected}", image.display())]
    Grown {
        /// The image.
        image: PathBuf,
        /// The file.
        file: String,
        /// Its bytes at the dump.
        expected: u64,
        /// Its bytes now.
        found: u64,
    },
    /// A file has other contents than it had.
    #[error("the file {file} of the image {} was altered", image.display())]
    Altered {
        /// The image.
        image: PathBuf,
        /// The file.
        file: String,
    },
    /// A page has other contents than it had.
    #[error("the file {file} of the image {} was altered at byte {offset}: the page there is not the one that was dumped", image.display())]
    PageAltered {
        /// The image.
        image: PathBuf,
        /// The pages file.
        file: String,
        /// Where the block with the difference begins.
        offset: u64,
    },
    /// The checksums of the pages cannot be used.
    #[error("the checksums {} cannot be used: {why}", path.display())]
    SumsInvalid {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// A page map is not what CRIU writes.
    #[error("the file {file} of the image {} is damaged: {source}", image.display())]
    Pagemap {
        /// The image.
        image: PathBuf,
        /// The page map.
        file: String,
        /// What is wrong with it.
        source: PagemapError,
    },
    /// A page map points to pages that are not there, or to those of another.
    #[error("the file {file} of the image {} is damaged: {pages} {why}", image.display())]
    PagesMismatch {
        /// The image.
        image: PathBuf,
        /// The page map.
        file: String,
        /// The pages file that it names.
        pages: String,
        /// What is wrong.
        why: &'static str,
    },
    /// A file that the dump did not write.
    #[error("the image {} has a file {file} that the dump did not write", image.display())]
    Unlisted {
        /// The image.
        image: PathBuf,
        /// The file.
        file: String,
    },
    /// Another directory has taken the place of the image, or of its files.
    #[error("{} is not the directory that the dump wrote: put that one back", .0.display())]
    Displaced(PathBuf),
    /// The image belongs to another container.
    #[error("the image {} belongs to container {found:?}, not to {expected:?}", image.display())]
    ForeignContainer {
        /// The image.
        image: PathBuf,
        /// `namespace/container` wanted.
        expected: String,
        /// `namespace/container` in the manifest.
        found: String,
    },
    /// The container's specification is not the one of the dump.
    #[error("the image {} was made with another OCI specification of the container", image.display())]
    ForeignSpec {
        /// The image.
        image: PathBuf,
    },
    /// The machine was started anew since the dump.
    #[error("the image {} was made before this machine was last started", image.display())]
    OtherBoot {
        /// The image.
        image: PathBuf,
    },
}

impl Error {
    /// The most telling error for a system call that failed.
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Error {
        let path = path.to_owned();
        match Errno::from_io_error(&source) {
            Some(Errno::ROFS) => Error::ReadOnly(path),
            Some(Errno::NOSPC | Errno::DQUOT) => {
                let free = super::directory::free_bytes(&path).unwrap_or_default();
                Error::Full { path, free, needed: None }
            }
            Some(Errno::ACCESS | Errno::PERM) => Error::Permission { action, path },
            Some(Errno::NOTDIR | Errno::LOOP) => Error::NotADirectory(path),
            _ => Error::Io { action, path, source },
        }
    }
}
