//! Files that a restore makes for a moment: deleted files that a process has open.
//!
//! CRIU makes each beside where it was, under a name of its own, opens it, and unlinks it when all is restored. A CRIU
//! that is killed in between leaves it behind, and every later restore fails because it is there.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
};

use protobuf::CodedInputStream;
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags},
    io::Errno,
    thread::LinkNameSpaceType,
};

use super::namespaces;
use crate::container::Container;

/// The longest image that is read, in bytes.
const MAX: u64 = 256 << 20;
const COMMON: u32 = 0x5456_4319;
/// The files' images and what follows the common beginning: which files have another name, and all open files.
const REMAPS: (&str, u32) = ("remap-fpath.img", 0x5913_3954);
const FILES: (&str, u32) = ("files.img", 0x5630_3138);
/// A remap's type: the file was deleted, and its contents are in the image.
const GHOST: u64 = 1;

/// The files that a broken-off restore of one image may have left.
#[derive(Debug, Default)]
pub(super) struct Ghosts {
    names: Vec<PathBuf>,
    /// The mount namespace that has the container's mounts; without it they are looked for in the root and the volumes.
    mounts: Option<OwnedFd>,
    root: PathBuf,
    volumes: Vec<(PathBuf, PathBuf)>,
}

impl Ghosts {
    /// The ghosts of the image in `images`.
    pub(super) fn of(
        images: BorrowedFd<'_>,
        container: &Container,
        mounts: Option<OwnedFd>,
    ) -> io::Result<Ghosts> {
        let names = names(images)?;
        let volume = |mount: &crate::container::ExternalMount| (mount.target.clone(), mount.source.clone());
        let volumes = container.external_mounts.iter().map(volume).collect();
        Ok(Ghosts { names, mounts, root: container.rootfs.clone(), volumes })
    }

    /// Removes those that are there.
    pub(super) fn remove(&self) {
        if self.names.is_empty() {
            return;
        }
        let removed = match &self.mounts {
            Some(mounts) => namespaces::inside(mounts.as_fd(), LinkNameSpaceType::Mount, || {
                self.names.iter().try_for_each(|name| remove_in(Path::new("/"), name))
            }),
            None => self.names.iter().try_for_each(|name| {
                let (root, inside) = self.place_of(name);
                remove_in(root, &inside)
            }),
        };
        if let Err(error) = removed {
            tracing::warn!(%error, "what a restore that failed has left cannot be removed");
        }
    }

    /// The root or the volume that `name` is in, and where in it.
    fn place_of(&self, name: &Path) -> (&Path, PathBuf) {
        let inside = self
            .volumes
            .iter()
            .filter_map(|(target, source)| Some((source, name.strip_prefix(target).ok()?)));
        match inside.min_by_key(|(_, rest)| rest.as_os_str().len()) {
            Some((source, rest)) => (source, rest.to_owned()),
            None => (&self.root, name.to_owned()),
        }
    }
}

/// Reads what [`Ghosts::of`] reads at a restore, on another thread: while the processes still live, an image can be
/// discarded.
pub(super) async fn check(images: BorrowedFd<'_>) -> io::Result<()> {
    let images = images.try_clone_to_owned()?;
    let read = tokio::task::spawn_blocking(move || names(images.as_fd()).map(drop)).await;
    read.map_err(io::Error::other)?
}

/// Removes `name`, seen from `root`, whatever its links say.
fn remove_in(root: &Path, name: &Path) -> io::Result<()> {
    let (Some(above), Some(file)) = (name.parent(), name.file_name()) else { return Ok(()) };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let remove = || {
        let root = rustix::fs::openat(CWD, root, flags, Mode::empty())?;
        let above = if above.as_os_str().is_empty() { Path::new(".") } else { above };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let above = rustix::fs::openat2(&root, above, flags, Mode::empty(), resolve)?;
        match rustix::fs::unlinkat(&above, file, AtFlags::empty()) {
            Err(Errno::ISDIR) => rustix::fs::unlinkat(&above, file, AtFlags::REMOVEDIR),
            done => done,
        }
    };
    match remove() {
        Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
        Err(error) => {
            Err(io::Error::new(io::Error::from(error).kind(), format!("{}: {error}", name.display())))
        }
    }
}

/// The names that CRIU gives to the deleted files of an image.
fn names(images: BorrowedFd<'_>) -> io::Result<Vec<PathBuf>> {
    let remaps = match read(images, REMAPS.0) {
        Ok(remaps) => remaps,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let odd = |name| io::Error::new(io::ErrorKind::InvalidData, format!("{name} is not as expected"));
    let ghosts = ghosts(&remaps).ok_or_else(|| odd(REMAPS.0))?;
    if ghosts.is_empty() {
        return Ok(Vec::new());
    }
    ghost_names(&read(images, FILES.0)?, &ghosts).ok_or_else(|| odd(FILES.0))
}

fn read(images: BorrowedFd<'_>, name: &str) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut bytes = Vec::new();
    let file = File::from(rustix::fs::openat(images, name, flags, Mode::empty())?);
    file.take(MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX {
        return Err(io::Error::other(format!("{name} is longer than {MAX} bytes")));
    }
    Ok(bytes)
}

/// The messages of an image whose second word is `magic`.
fn records(image: &[u8], magic: u32) -> Option<Vec<&[u8]>> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at.checked_add(4)?)?.try_into().ok()?));
    if [word(0)?, word(4)?] != [COMMON, magic] {
        return None;
    }
    let (mut at, mut found) = (8, Vec::new());
    while at < image.len() {
        let length = usize::try_from(word(at)?).ok()?;
        let end = (at + 4).checked_add(length)?;
        found.push(image.get(at + 4..end)?);
        at = end;
    }
    Some(found)
}

/// A field of a message.
enum Value {
    Number(u64),
    Bytes(Vec<u8>),
}

/// The fields of a message, by number.
fn fields(message: &[u8]) -> Option<Vec<(u32, Value)>> {
    let mut input = CodedInputStream::from_bytes(message);
    let mut found = Vec::new();
    while let Some(tag) = input.read_raw_tag_or_eof().ok()? {
        match tag & 7 {
            0 => found.push((tag >> 3, Value::Number(input.read_raw_varint64().ok()?))),
            1 => drop(input.read_fixed64().ok()?),
            2 => found.push((tag >> 3, Value::Bytes(input.read_bytes().ok()?))),
            5 => drop(input.read_fixed32().ok()?),
            _ => return None,
        }
    }
    Some(found)
}

/// The number in field `wanted`, 0 when it is not there.
fn number(fields: &[(u32, Value)], wanted: u32) -> u64 {
    let found = fields.iter().find_map(|(field, value)| match value {
        Value::Number(number) if *field == wanted => Some(*number),
        _ => None,
    });
    found.unwrap_or_default()
}

fn bytes(fields: Vec<(u32, Value)>, wanted: u32) -> Option<Vec<u8>> {
    fields.into_iter().find_map(|(field, value)| match value {
        Value::Bytes(bytes) if field == wanted => Some(bytes),
        _ => None,
    })
}

/// Pairs of an open file's id and its ghost's.
fn ghosts(remaps: &[u8]) -> Option<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    for record in records(remaps, REMAPS.1)? {
        let fields = fields(record)?;
        if number(&fields, 3) == GHOST {
            found.push((number(&fields, 1), number(&fields, 2)));
        }
    }
    Some(found)
}

fn ghost_names(files: &[u8], ghosts: &[(u64, u64)]) -> Option<Vec<PathBuf>> {
    let mut found = Vec::new();
    for record in records(files, FILES.1)? {
        // A regular file's own part.
        let Some(file) = bytes(fields(record)?, 3) else { continue };
        let file = fields(&file)?;
        let id = number(&file, 1);
        let Some(name) = bytes(file, 6) else { continue };
        for (_, ghost) in ghosts.iter().filter(|(of, _)| *of == id) {
            found.push(ghost_name(OsStr::from_bytes(&name), *ghost));
        }
    }
    Some(found)
}

fn ghost_name(name: &OsStr, ghost: u64) -> PathBuf {
    let mut bytes = name.as_bytes().to_vec();
    bytes.extend(format!(".cr.{ghost:x}.ghost").bytes());
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn image(magic: u32, records: &[&[u8]]) -> Vec<u8> {
        let mut image = [COMMON.to_le_bytes(), magic.to_le_bytes()].concat();
        for record in records {
            image.extend(u32::try_from(record.len()).unwrap().to_le_bytes());
            image.extend(*record);
        }
        image
    }

    #[test]
    fn deleted_files_are_found_by_name_and_others_are_not() {
        // File 5 has ghost 0x1f, file 6 only another name.
        let remaps = image(REMAPS.1, &[&[8, 5, 16, 31, 24, 1], &[8, 6, 16, 32, 24, 0]]);
        let ghosts = ghosts(&remaps).unwrap();
        assert_eq!(ghosts, [(5, 31)]);
        // type REG, id, reg { id, name }.
        let file = |id: u8, name: &[u8]| {
            let mut reg = vec![8, id, 50, u8::try_from(name.len()).unwrap()];
            reg.extend(name);
            [&[8, 1, 16, id, 26, u8::try_from(reg.len()).unwrap()][..], &reg].concat()
        };
        let files = image(FILES.1, &[&file(5, b"/dev/shm/a\xff"), &file(6, b"/b"), &[8, 2, 16, 7]]);
        let names = ghost_names(&files, &ghosts).unwrap();
        assert_eq!(names, [Path::new(OsStr::from_bytes(b"/dev/shm/a\xff.cr.1f.ghost"))]);
    }

    #[test]
    fn they_are_removed_where_they_are_and_links_lead_nowhere_else() {
        let above = tempfile::tempdir().unwrap();
        let (root, volume) = (above.path().join("root"), above.path().join("volume"));
        for directory in [&root.join("tmp/dir.ghost"), &volume] {
            std::fs::create_dir_all(directory).unwrap();
        }
        for file in [
            root.join("tmp/a.ghost"),
            root.join("tmp/kept"),
            volume.join("b.ghost"),
            above.path().join("out.ghost"),
        ] {
            std::fs::write(file, "x").unwrap();
        }
        std::os::unix::fs::symlink("../..", root.join("up")).unwrap();
        let names = ["/tmp/a.ghost", "/tmp/dir.ghost", "/data/b.ghost", "/up/out.ghost", "/none/c.ghost"];
        let ghosts = Ghosts {
            names: names.iter().map(PathBuf::from).collect(),
            mounts: None,
            root: root.clone(),
            volumes: vec![("/data".into(), volume.clone())],
        };
        ghosts.remove();
        assert!(!root.join("tmp/a.ghost").exists() && !root.join("tmp/dir.ghost").exists());
        assert!(!volume.join("b.ghost").exists());
        assert!(root.join("tmp/kept").exists() && above.path().join("out.ghost").exists());
    }

    #[tokio::test]
    async fn a_list_that_is_not_as_expected_is_told_before_anything_is_killed() {
        let images = tempfile::tempdir().unwrap();
        let opened = File::open(images.path()).unwrap();
        check(opened.as_fd()).await.unwrap();
        let remaps = image(REMAPS.1, &[&[8, 5, 16, 31, 24, 1]]);
        std::fs::write(images.path().join(REMAPS.0), remaps).unwrap();
        assert_eq!(check(opened.as_fd()).await.unwrap_err().kind(), io::ErrorKind::NotFound);
        std::fs::write(images.path().join(FILES.0), "of another kind").unwrap();
        let error = check(opened.as_fd()).await.unwrap_err();
        assert!(error.to_string().contains(FILES.0), "{error}");
        File::create(images.path().join(FILES.0)).unwrap().set_len(MAX + 1).unwrap();
        let error = check(opened.as_fd()).await.unwrap_err();
        assert!(error.to_string().contains("longer"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(noise: Vec<u8>, magic in proptest::sample::select(vec![REMAPS.1, FILES.1])) {
            let image = [&COMMON.to_le_bytes()[..], &magic.to_le_bytes(), &noise].concat();
            let _ = ghosts(&image);
            let _ = ghost_names(&image, &[(1, 2)]);
            let _ = ghosts(&noise);
        }
    }
}
