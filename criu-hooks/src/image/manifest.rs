//! What an image says of itself.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
};

use serde::{Deserialize, Serialize};

use super::{Error, Expected, pagemap::Pagemap, parent};

/// The version of the manifest that this program writes, and the only one that it reads.
pub const MANIFEST_VERSION: u32 = 2;

/// The longest manifest that is read, in bytes.
pub const MAX_MANIFEST: u64 = 4 * 1024 * 1024;

/// The namespaces that an image may leave out, as `/proc/PID/ns` names them.
const NAMESPACES: [&str; 5] = ["net", "ipc", "uts", "cgroup", "mnt"];

/// A complete description of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// See [`MANIFEST_VERSION`].
    pub version: u32,
    /// The containerd namespace of the container.
    pub namespace: String,
    /// The container's id.
    pub container: String,
    /// The number of this dump of the container.
    pub generation: u64,
    /// The boot of the machine during which the dump was made.
    pub boot_id: String,
    /// When the manifest was written, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// What the caller knew.
    pub facts: Facts,
    /// CRIU's files.
    pub files: Vec<FileEntry>,
}

/// What the maker of a dump knows about it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// The digest of the container's OCI spec, see [`super::digest`].
    pub spec_digest: String,
    /// The first process of the container at the dump.
    pub init_pid: i32,
    /// The cgroup of the container.
    pub cgroup: String,
    /// What descriptors 0, 1 and 2 of the first process were, as `/proc/PID/fd` names them.
    pub stdio: [Option<String>; 3],
    /// How long the processes had stood still when the image was complete, in microseconds.
    pub stopped_us: u64,
    /// How it was made, and must be restored.
    pub mode: Mode,
    /// What it leaves out; nothing in the classic mode.
    pub outside: Outside,
    /// The programs that made it.
    pub versions: Versions,
}

/// Where CRIU works. A restore must be made as the dump was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Inside the container's network, IPC, UTS and cgroup namespaces. They are not in the image, and neither are the
    /// contents of its memory file systems: all of these live on while the container sleeps.
    PodNamespaces,
    /// Outside of them: the image has everything but the network namespace.
    #[default]
    Classic,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Mode::PodNamespaces => "pod-namespaces",
            Mode::Classic => "classic",
        })
    }
}

/// What an image leaves out because it lives on beside it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outside {
    /// Namespaces: their names in `/proc/PID/ns`, and the numbers that tell each from others.
    pub namespaces: BTreeMap<String, u64>,
    /// Mounts whose file systems live on, with their contents.
    pub mounts: Vec<OutsideMount>,
}

/// A mount of the container, in its old mount namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutsideMount {
    /// The kernel's number of it.
    pub id: u64,
    /// Where it is, seen from the container's root.
    pub mount_point: String,
}

impl Outside {
    /// What is wrong with it in an image of `mode`, if anything is.
    fn fault(&self, mode: Mode) -> Option<String> {
        if mode == Mode::Classic && *self != Outside::default() {
            return Some("an image of the classic mode leaves nothing out".to_owned());
        }
        if let Some(name) = self.namespaces.keys().find(|name| !NAMESPACES.contains(&name.as_str())) {
            return Some(format!("{name:?} is no namespace that may be left out"));
        }
        if !self.mounts.is_empty() && !self.namespaces.contains_key("mnt") {
            return Some("mounts are left out, but not their namespace".to_owned());
        }
        let mut seen = HashSet::new();
        let is_bad = |path: &str| !path.starts_with('/') || path.contains('\0');
        let bad = self.mounts.iter().find(|mount| is_bad(&mount.mount_point) || !seen.insert(mount.id));
        bad.map(|mount| format!("the mount {} at {:?} is not possible", mount.id, mount.mount_point))
    }
}

/// The programs that made an image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Versions {
    /// CRIU's, "4.2.1".
    pub criu: String,
    /// The kernel's release.
    pub kernel: String,
    /// runc's, empty when it had no part.
    pub runc: String,
    /// This crate's.
    pub engine: String,
}

/// One file of CRIU's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its name.
    pub name: String,
    /// Its bytes.
    pub size: u64,
    /// The digest of its contents; memory pages have none, for hashing them would take longer than restoring them.
    pub sha256: Option<String>,
}

impl Manifest {
    /// Reads a manifest. `path` is for errors.
    ///
    /// # Errors
    /// When it is of another version, or anything in it is not as this program writes it.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Manifest, Error> {
        #[derive(Deserialize)]
        struct OnlyVersion {
            version: u64,
        }
        let invalid = |why: String| Error::ManifestInvalid { path: path.to_owned(), why };
        let OnlyVersion { version } =
            serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        if version != u64::from(MANIFEST_VERSION) {
            return Err(Error::UnknownVersion { path: path.to_owned(), found: version });
        }
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        if let Some(fault) = manifest.facts.outside.fault(manifest.facts.mode) {
            return Err(invalid(fault));
        }
        let mut seen = HashSet::new();
        for file in &manifest.files {
            let name = &file.name;
            if !parent::is_file_name(name) {
                return Err(invalid(format!("{name:?} is not the name of a file")));
            }
            if !seen.insert(name) {
                return Err(invalid(format!("{name:?} is listed twice")));
            }
            if file.sha256.is_none() && !is_pages(name) {
                return Err(invalid(format!("{name:?} has no digest")));
            }
        }
        Ok(manifest)
    }

    /// Checks that the image is the one that is wanted. `path` is for errors.
    pub(super) fn check_owner(&self, path: &Path, expected: &Expected<'_>) -> Result<(), Error> {
        if (self.namespace.as_str(), self.container.as_str()) != (expected.namespace, expected.container) {
            return Err(Error::ForeignContainer {
                image: path.to_owned(),
                expected: format!("{}/{}", expected.namespace, expected.container),
                found: format!("{}/{}", self.namespace, self.container),
            });
        }
        if self.facts.spec_digest != expected.spec_digest {
            return Err(Error::ForeignSpec { image: path.to_owned() });
        }
        Ok(())
    }
}

/// Added to the number of a pages file of the parent: CRIU counts in each directory from 1 on.
pub(super) const OF_PARENT: u32 = 1 << 31;

/// The number of the file `name`, when CRIU keeps memory pages in it; no two files of an image have the same.
pub(super) fn pages_number(name: &str) -> Option<u32> {
    let own = parent::own_name(name);
    let number = own.strip_prefix("pages-")?.strip_suffix(".img")?;
    let parsed =
        number.parse().ok().filter(|parsed: &u32| parsed.to_string() == number && *parsed < OF_PARENT)?;
    Some(if parent::is_of_parent(name) { parsed | OF_PARENT } else { parsed })
}

/// The number of the pages file of the page map `name`.
pub(super) fn number_beside(name: &str, map: &Pagemap) -> u32 {
    if parent::is_of_parent(name) { map.pages_id | OF_PARENT } else { map.pages_id }
}

/// The number among all pages files of an image of that which the parent counts as `number`.
pub(crate) fn number_in_parent(number: u32) -> u32 {
    number | OF_PARENT
}

/// The name of the pages file with this number.
pub(super) fn pages_name(number: u32) -> String {
    let name = format!("pages-{}.img", number & !OF_PARENT);
    if number & OF_PARENT == 0 { name } else { parent::name_in(&name) }
}

/// Whether CRIU keeps memory pages in the file `name`.
pub(super) fn is_pages(name: &str) -> bool {
    pages_number(name).is_some()
}

/// Whether the file `name` says where memory pages belong: of a process, or of shared memory.
pub(super) fn is_pagemap(name: &str) -> bool {
    parent::own_name(name).strip_prefix("pagemap-").is_some_and(|rest| rest.strip_suffix(".img").is_some())
}
