//! Container images made on the spot from the node's root file system, without a registry.

mod layer;
mod oci;
mod recipe;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::cache::{self, CacheError, Lock};
use recipe::Recipe;

/// Bumped when the way of making images changes what they contain.
const FORMAT: &str = "1";

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The cache folder can't be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A file operation failed.
    #[error("{path}: {source}")]
    Io {
        /// What was touched.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The root file system lacks what the image is made of.
    #[error("{path} is not in the node's root file system {rootfs}: remove that folder and run make setup")]
    Lacking {
        /// The path inside.
        path: PathBuf,
        /// The root file system.
        rootfs: PathBuf,
    },
}

/// The images. Each is one layer, loaded under a name that no registry has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Image {
    /// Writes a numbered line to stdout every 100 ms. Has busybox, and so `/bin/sh`.
    Counter,
    /// An HTTP server in Python that remembers a conversation and holds `BALLAST_MIB` MiB of random bytes.
    Python,
    /// bash on a terminal, with busybox for the other commands.
    Shell,
    /// The same HTTP server for node.
    NodeJs,
    /// Fills `MEMORY_MIB` MiB of memory of every kind with a known pattern and verifies it to the last byte when it is
    /// asked to, over HTTP or by SIGUSR1.
    Memory,
    /// Does nothing until it is told to end: the sandbox of pods.
    Pause,
}

impl Image {
    /// All images.
    pub const ALL: [Self; 6] =
        [Self::Counter, Self::Python, Self::Shell, Self::NodeJs, Self::Memory, Self::Pause];

    /// The name under which containerd has the image.
    pub fn reference(self) -> &'static str {
        match self {
            Self::Counter => "localhost/counter:1",
            Self::Python => "localhost/python-agent:1",
            Self::Shell => "localhost/shell:1",
            Self::NodeJs => "localhost/node-agent-js:1",
            Self::Memory => "localhost/memory:1",
            Self::Pause => "localhost/pause:1",
        }
    }

    /// The path of the image as an OCI layout in a tar file, made from this root file system when it is not cached.
    ///
    /// # Errors
    /// When the root file system lacks something or a file can't be written.
    pub fn ensure(self, rootfs: &Path) -> Result<PathBuf, ImageError> {
        let recipe = Recipe::of(self);
        let folder = cache::folder()?;
        let named = rootfs.file_name().unwrap_or_default();
        let key = cache::key([FORMAT.as_bytes(), named.as_encoded_bytes(), format!("{recipe:?}").as_bytes()]);
        let name = format!("image-{}-{key}", recipe.name);
        let done = folder.join(format!("{name}.tar"));
        if done.exists() {
            return Ok(done);
        }
        let _lock = Lock::take(&folder, &name)?;
        if done.exists() {
            return Ok(done);
        }
        // Whoever holds the lock owns this name; what a killed process left there is overwritten.
        let partial = folder.join(format!("{name}.partial"));
        let layer = recipe.layer(rootfs)?;
        oci::write(&partial, self.reference(), &layer, &recipe.config())?;
        fs::rename(&partial, &done).map_err(|source| ImageError::Io { path: done.clone(), source })?;
        Ok(done)
    }
}
