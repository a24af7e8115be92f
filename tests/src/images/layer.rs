//! The contents of a layer: what goes where, and its tar.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use tar::{Builder, EntryType, Header};

use super::ImageError;

/// Folders of the file system's top level that are links into `/usr`.
const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

#[derive(Debug)]
enum Entry {
    Folder(u32),
    Link(PathBuf),
    Text(&'static str),
    /// A file of the host, copied with its mode and its time (which Python compares with its compiled files).
    Copy(PathBuf),
}

/// A layer in the making. Paths are relative to the root of the image.
#[derive(Debug)]
pub(super) struct Layer<'a> {
    rootfs: &'a Path,
    entries: BTreeMap<PathBuf, Entry>,
}

impl<'a> Layer<'a> {
    /// A layer with the folders that every container needs.
    pub(super) fn new(rootfs: &'a Path) -> Self {
        let mut entries = BTreeMap::new();
        for name in MERGED {
            entries.insert(name.into(), Entry::Link(Path::new("usr").join(name)));
            entries.insert(Path::new("usr").join(name), Entry::Folder(0o755));
        }
        for name in ["usr", "dev", "etc", "proc", "root", "run", "sys", "var"] {
            entries.insert(name.into(), Entry::Folder(0o755));
        }
        entries.insert("tmp".into(), Entry::Folder(0o1777));
        Self { rootfs, entries }
    }

    /// Adds an executable text.
    pub(super) fn text(&mut self, path: &str, text: &'static str) {
        self.entries.insert(path.trim_start_matches('/').into(), Entry::Text(text));
    }

    /// Adds a symbolic link.
    pub(super) fn link(&mut self, path: &str, target: &str) {
        self.entries.insert(path.trim_start_matches('/').into(), Entry::Link(target.into()));
    }

    /// Adds a file of the root file system, or what its link leads to, under the same path or another one.
    pub(super) fn file(&mut self, path: &str, target: &str) -> Result<(), ImageError> {
        let source = self.resolve(path)?;
        self.entries.insert(merged(target), Entry::Copy(source));
        Ok(())
    }

    /// Adds a program, and the libraries that it loads when it starts, under their own paths.
    pub(super) fn program(&mut self, path: &str) -> Result<(), ImageError> {
        self.file(path, path)?;
        self.libraries(path)
    }

    /// Adds a folder with all below it but what is called like one of `unwanted`, and the libraries that its
    /// extension modules load.
    pub(super) fn folder(&mut self, path: &str, unwanted: &[&str]) -> Result<(), ImageError> {
        let source = self.resolve(path)?;
        self.entries.insert(merged(path), Entry::Folder(0o755));
        let error = |source: io::Error| ImageError::Io { path: path.into(), source };
        for entry in fs::read_dir(&source).map_err(error)? {
            let name = entry.map_err(error)?.file_name();
            let name = name.to_string_lossy();
            if unwanted.contains(&&*name) {
                continue;
            }
            let inner = format!("{path}/{name}");
            let Ok(resolved) = self.resolve(&inner) else {
                // A link to a file that another package would bring.
                continue;
            };
            if resolved.is_dir() {
                self.folder(&inner, unwanted)?;
            } else {
                self.file(&inner, &inner)?;
                if Path::new(&inner).extension().is_some_and(|end| end == "so") {
                    self.libraries(&inner)?;
                }
            }
        }
        Ok(())
    }

    fn libraries(&mut self, path: &str) -> Result<(), ImageError> {
        let output = Command::new("chroot").arg(self.rootfs).args(["/usr/bin/ldd", path]).output();
        let output = output.map_err(|source| ImageError::Io { path: "chroot".into(), source })?;
        for library in loaded(&String::from_utf8_lossy(&output.stdout)) {
            if !self.entries.contains_key(&merged(&library)) {
                self.file(&library, &library)?;
            }
        }
        Ok(())
    }

    /// The host's path of a path in the root file system, links resolved.
    fn resolve(&self, path: &str) -> Result<PathBuf, ImageError> {
        let lacking = || ImageError::Lacking { path: path.into(), rootfs: self.rootfs.into() };
        let real = fs::canonicalize(self.rootfs.join(path.trim_start_matches('/'))).map_err(|_| lacking())?;
        // Debian's links inside /usr are relative; one that leads out of the root file system is not ours to follow.
        let root = fs::canonicalize(self.rootfs).map_err(|_| lacking())?;
        if real.starts_with(root) { Ok(real) } else { Err(lacking()) }
    }

    /// Writes the layer as a tar, the same one each time.
    pub(super) fn write(&self, target: impl Write) -> Result<(), ImageError> {
        let mut tar = Builder::new(target);
        for (path, entry) in self.with_parents() {
            append(&mut tar, &path, entry).map_err(|source| ImageError::Io { path, source })?;
        }
        tar.into_inner()
            .and_then(|mut target| target.flush())
            .map_err(|source| ImageError::Io { path: "the layer".into(), source })
    }

    /// All entries, each folder before what is in it.
    fn with_parents(&self) -> BTreeMap<PathBuf, &Entry> {
        let mut all: BTreeMap<PathBuf, &Entry> = BTreeMap::new();
        for (path, entry) in &self.entries {
            for parent in path.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty()) {
                if !self.entries.contains_key(parent) {
                    all.insert(parent.into(), &Entry::Folder(0o755));
                }
            }
            all.insert(path.clone(), entry);
        }
        all
    }
}

fn append(tar: &mut Builder<impl Write>, path: &Path, entry: &Entry) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    match entry {
        Entry::Folder(mode) => {
            header.set_entry_type(EntryType::Directory);
            header.set_mode(*mode);
            tar.append_data(&mut header, path, io::empty())
        }
        Entry::Link(target) => {
            header.set_entry_type(EntryType::Symlink);
            header.set_mode(0o777);
            tar.append_link(&mut header, path, target)
        }
        Entry::Text(text) => {
            header.set_mode(0o755);
            header.set_size(text.len() as u64);
            tar.append_data(&mut header, path, text.as_bytes())
        }
        Entry::Copy(source) => {
            let file = File::open(source)?;
            let metadata = file.metadata()?;
            header.set_mode(metadata.permissions().mode() & 0o777);
            header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
            header.set_size(metadata.len());
            tar.append_data(&mut header, path, file)
        }
    }
}

/// The path in the image, with the top-level links resolved.
fn merged(path: &str) -> PathBuf {
    let path = path.trim_start_matches('/');
    if MERGED.iter().any(|name| path.strip_prefix(name).is_some_and(|rest| rest.starts_with('/'))) {
        Path::new("usr").join(path)
    } else {
        path.into()
    }
}

/// The paths of libraries in the output of ldd.
fn loaded(ldd: &str) -> Vec<String> {
    ldd.lines()
        .filter_map(|line| {
            let line = line.trim().split_once(" (0x")?.0;
            let path = line.split_once(" => ").map_or(line, |(_, path)| path);
            path.starts_with('/').then(|| path.to_owned())
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let ldd = "\tlinux-vdso.so.1 (0x00007fff)\n\
                   \tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f01)\n\
                   \t/lib64/ld-linux-x86-64.so.2 (0x00007f02)\n";
        assert_eq!(loaded(ldd), ["/lib/x86_64-linux-gnu/libm.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        assert!(loaded("\tnot a dynamic executable\n").is_empty());
    }

    #[test]
    fn top_level_links_lead_to_usr() {
        assert_eq!(merged("/lib64/ld.so"), Path::new("usr/lib64/ld.so"));
        assert_eq!(merged("/libexec/x"), Path::new("libexec/x"));
        assert_eq!(merged("/usr/bin/x"), Path::new("usr/bin/x"));
    }

    #[test]
    fn the_tar_is_the_same_each_time_and_has_parents_first() {
        let rootfs = tempfile::tempdir().unwrap();
        fs::create_dir_all(rootfs.path().join("usr/lib/deep")).unwrap();
        fs::write(rootfs.path().join("usr/lib/deep/file"), "x").unwrap();
        let bytes = || {
            let mut layer = Layer::new(rootfs.path());
            layer.text("/agent", "text");
            layer.file("/usr/lib/deep/file", "/lib/deep/file").unwrap();
            let mut bytes = Vec::new();
            layer.write(&mut bytes).unwrap();
            bytes
        };
        let written = bytes();
        assert_eq!(written, bytes());
        let mut archive = tar::Archive::new(written.as_slice());
        let paths: Vec<String> =
            archive.entries().unwrap().map(|e| e.unwrap().path().unwrap().display().to_string()).collect();
        let place = |path: &str| paths.iter().position(|p| p.trim_end_matches('/') == path).unwrap();
        assert!(place("usr/lib/deep") < place("usr/lib/deep/file"));
        assert!(place("agent") < paths.len());
    }

    #[test]
    fn a_link_out_of_the_root_file_system_is_refused() {
        let rootfs = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/hostname", rootfs.path().join("out")).unwrap();
        let mut layer = Layer::new(rootfs.path());
        assert!(matches!(layer.file("/out", "/out"), Err(ImageError::Lacking { .. })));
    }
}
