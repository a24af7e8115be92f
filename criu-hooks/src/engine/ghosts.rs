//! Files that were deleted while a process has them open.
//!
//! CRIU makes each anew beside where it was (a ghost), or finds it under a name that the dump has given it (a file that
//! has another name: `link_remap.N`). It links that to the old name, opens it, and unlinks both when all is restored.
//! Killed in between it leaves ghosts and old names behind, and every later restore fails because they are there. Or a
//! restore fails after the name of the dump is gone, and every later one finds it missing.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use protobuf::CodedInputStream;
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags},
    io::Errno,
    thread::LinkNameSpaceType,
};

use super::{message::records, namespaces};
use crate::container::Container;

/// The longest image that is read, in bytes.
const MAX: u64 = 256 << 20;
/// The files' images and what follows the common beginning: which files have another name, and all open files.
const REMAPS: (&str, u32) = ("remap-fpath.img", 0x5913_3954);
const FILES: (&str, u32) = ("files.img", 0x5630_3138);
/// A remap's types: the file was deleted and has another name, made for the dump or not; it has none, and its contents
/// are in the image.
const LINKED: u64 = 0;
const GHOST: u64 = 1;

/// A deleted file that a process has open.
#[derive(Debug, PartialEq, Eq)]
struct Deleted {
    /// Where it was. CRIU links the file there once more to open it, or beside it, and unlinks it again.
    name: PathBuf,
    /// Where the file is while the restore goes on.
    stand_in: PathBuf,
    /// The stand-in was made at the dump, because the file has another name. CRIU removes it before the restore has
    /// succeeded for good.
    linked: bool,
}

/// The deleted files that the processes of one image have open.
#[derive(Debug, Default)]
pub(super) struct Ghosts {
    files: Vec<Deleted>,
    /// The mount namespace that has the container's mounts; without it they are looked for in the root and the volumes.
    mounts: Option<OwnedFd>,
    root: PathBuf,
    volumes: Vec<(PathBuf, PathBuf)>,
    given_up: AtomicBool,
}

impl Ghosts {
    /// The deleted files of the image in `images`.
    pub(super) fn of(
        images: BorrowedFd<'_>,
        container: &Container,
        mounts: Option<OwnedFd>,
    ) -> io::Result<Ghosts> {
        let files = deleted(images)?;
        let volume = |mount: &crate::container::ExternalMount| (mount.target.clone(), mount.source.clone());
        let volumes = container.external_mounts.iter().map(volume).collect();
        Ok(Ghosts {
            files,
            mounts,
            root: container.rootfs.clone(),
            volumes,
            given_up: AtomicBool::new(false),
        })
    }

    /// Before CRIU runs: removes what an earlier try has left, and gives each file that has another name one more.
    ///
    /// # Errors
    /// When a file would be lost with a restore that fails.
    pub(super) fn prepare(&self) -> io::Result<()> {
        self.each(|root, above, file| {
            if file.linked {
                keep(root, above, &file.stand_in)?;
            }
            match clean(root, above, file) {
                Err(error) => {
                    warn(&error);
                    Ok(())
                }
                done => done,
            }
        })
    }

    /// After a failure: removes what is left, and puts back the files that have another name.
    pub(super) fn undo(&self) {
        let undone = self.each(|root, above, file| {
            if file.linked {
                keep(root, above, &file.stand_in)?;
            }
            clean(root, above, file)?;
            if file.linked { let_go(root, above, &file.stand_in) } else { Ok(()) }
        });
        if let Err(error) = undone {
            warn(&error);
        }
    }

    /// After a success: the files need no more names.
    pub(super) fn finish(&self) {
        let done = self.each(
            |root, above, file| {
                if file.linked { let_go(root, above, &file.stand_in) } else { Ok(()) }
            },
        );
        if let Err(error) = done {
            warn(&error);
        }
    }

    /// Has it touch no more files, should it still be at work somewhere.
    pub(super) fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
    }

    /// Does `work` for each file, seen from a root and in a directory there, whatever becomes of the others. The first
    /// error is returned.
    fn each(&self, work: impl Fn(&Path, &Path, &Deleted) -> io::Result<()> + Sync) -> io::Result<()> {
        if self.files.is_empty() {
            return Ok(());
        }
        let all = |place: &dyn Fn(&Path) -> (PathBuf, PathBuf)| {
            let mut result = Ok(());
            for file in &self.files {
                if self.given_up.load(Ordering::Acquire) {
                    return Err(io::Error::other("given up"));
                }
                let (root, inside) = place(&file.stand_in);
                let done = work(&root, inside.parent().unwrap_or(&inside), file);
                let told = |error: io::Error| {
                    io::Error::new(error.kind(), format!("{}: {error}", file.stand_in.display()))
                };
                match (&result, done.map_err(told)) {
                    (Ok(()), done) => result = done,
                    (Err(_), Err(error)) => warn(&error),
                    (Err(_), Ok(())) => {}
                }
            }
            result
        };
        match &self.mounts {
            Some(mounts) => namespaces::inside(mounts.as_fd(), LinkNameSpaceType::Mount, || {
                all(&|name| (PathBuf::from("/"), name.to_owned()))
            }),
            None => all(&|name| {
                let (root, inside) = self.place_of(name);
                (root.to_owned(), inside)
            }),
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

fn warn(error: &io::Error) {
    tracing::warn!(%error, "what a restore makes for deleted files is not as it should be");
}

/// A directory that is held open, whatever its links say.
struct Directory(OwnedFd);

impl Directory {
    /// The directory `path`, seen from `root`; `None` when it is not there.
    fn open(root: &Path, path: &Path) -> io::Result<Option<Directory>> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let opened = rustix::fs::openat(CWD, root, flags, Mode::empty())
            .and_then(|root| rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve));
        match opened {
            Ok(opened) => Ok(Some(Directory(opened))),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// What tells the file `name` from others, links not followed; `None` when it is not there.
    fn identity(&self, name: &OsStr) -> io::Result<Option<(u64, u64)>> {
        match rustix::fs::statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some((stat.st_dev, stat.st_ino))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn link(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::linkat(&self.0, from, &self.0, to, AtFlags::empty())?)
    }

    fn remove(&self, name: &OsStr) -> io::Result<()> {
        let removed = match rustix::fs::unlinkat(&self.0, name, AtFlags::empty()) {
            Err(Errno::ISDIR) => rustix::fs::unlinkat(&self.0, name, AtFlags::REMOVEDIR),
            done => done,
        };
        match removed {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// The name under which a file is safe from CRIU.
fn safe_name(file: &OsStr) -> OsString {
    let mut name = file.to_owned();
    name.push(".agentcube");
    name
}

/// Sees to it that the file `stand_in` has its name and a safe one, whichever of the two is there.
fn keep(root: &Path, above: &Path, stand_in: &Path) -> io::Result<()> {
    let (Some(above), Some(file)) = (Directory::open(root, above)?, stand_in.file_name()) else {
        return Ok(());
    };
    let safe = safe_name(file);
    let kept = match (above.identity(file)?, above.identity(&safe)?) {
        (None, None) => Ok(()),
        (Some(file), Some(safe)) if file == safe => Ok(()),
        (Some(_), Some(_)) => above.remove(&safe).and_then(|()| above.link(file, &safe)),
        (Some(_), None) => above.link(file, &safe),
        (None, Some(_)) => above.link(&safe, file),
    };
    match kept {
        // Nor can CRIU remove a name there.
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(()),
        kept => kept,
    }
}

/// Takes the safe name away, when the file has its own.
fn let_go(root: &Path, above: &Path, stand_in: &Path) -> io::Result<()> {
    let (Some(above), Some(file)) = (Directory::open(root, above)?, stand_in.file_name()) else {
        return Ok(());
    };
    above.remove(&safe_name(file))
}

/// Removes the names that a CRIU that was killed has left: those that it opens a file by, and a stand-in of its making.
fn clean(root: &Path, above: &Path, file: &Deleted) -> io::Result<()> {
    let (Some(above), Some(stand_in), Some(name)) =
        (Directory::open(root, above)?, file.stand_in.file_name(), file.name.file_name())
    else {
        return Ok(());
    };
    let Some(identity) = above.identity(stand_in)? else { return Ok(()) };
    let mut beside = name.to_owned();
    beside.push(".cr_link");
    for name in [name, &beside] {
        if above.identity(name)? == Some(identity) {
            above.remove(name)?;
        }
    }
    if file.linked { Ok(()) } else { above.remove(stand_in) }
}

/// Reads what [`Ghosts::of`] reads at a restore, on another thread: while the processes still live, an image can be
/// discarded.
pub(super) async fn check(images: BorrowedFd<'_>) -> io::Result<()> {
    let images = images.try_clone_to_owned()?;
    let read = tokio::task::spawn_blocking(move || deleted(images.as_fd()).map(drop)).await;
    read.map_err(io::Error::other)?
}

/// The deleted files of an image.
fn deleted(images: BorrowedFd<'_>) -> io::Result<Vec<Deleted>> {
    let remaps = match read(images, REMAPS.0) {
        Ok(remaps) => remaps,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let odd = |name| io::Error::new(io::ErrorKind::InvalidData, format!("{name} is not as expected"));
    let remaps = self::remaps(&remaps).ok_or_else(|| odd(REMAPS.0))?;
    if remaps.is_empty() {
        return Ok(Vec::new());
    }
    let names = names(&read(images, FILES.0)?).ok_or_else(|| odd(FILES.0))?;
    Ok(pair(&remaps, &names))
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

/// What stands in for a deleted file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Remap {
    /// What the image has of it, under this number.
    Ghost(u64),
    /// The open file with this id.
    Linked(u64),
}

/// Pairs of an open file's id and what stands in for it.
fn remaps(remaps: &[u8]) -> Option<Vec<(u64, Remap)>> {
    let mut found = Vec::new();
    for record in records(remaps, REMAPS.1)? {
        let fields = fields(record)?;
        let (file, remap) = (number(&fields, 1), number(&fields, 2));
        match number(&fields, 3) {
            LINKED => found.push((file, Remap::Linked(remap))),
            GHOST => found.push((file, Remap::Ghost(remap))),
            _ => {}
        }
    }
    Some(found)
}

/// The names of regular files, by id.
fn names(files: &[u8]) -> Option<HashMap<u64, PathBuf>> {
    let mut found = HashMap::new();
    for record in records(files, FILES.1)? {
        // A regular file's own part.
        let Some(file) = bytes(fields(record)?, 3) else { continue };
        let file = fields(&file)?;
        let id = number(&file, 1);
        if let Some(name) = bytes(file, 6) {
            found.insert(id, Path::new("/").join(OsStr::from_bytes(&name)));
        }
    }
    Some(found)
}

fn pair(remaps: &[(u64, Remap)], names: &HashMap<u64, PathBuf>) -> Vec<Deleted> {
    let deleted = |(file, remap): &(u64, Remap)| {
        let name = names.get(file)?.clone();
        Some(match remap {
            Remap::Ghost(ghost) => {
                Deleted { stand_in: ghost_name(name.as_os_str(), *ghost), name, linked: false }
            }
            Remap::Linked(link) => Deleted { stand_in: names.get(link)?.clone(), name, linked: true },
        })
    };
    remaps.iter().filter_map(deleted).collect()
}

fn ghost_name(name: &OsStr, ghost: u64) -> PathBuf {
    let mut bytes = name.as_bytes().to_vec();
    bytes.extend(format!(".cr.{ghost:x}.ghost").bytes());
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{super::message::COMMON, *};

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
        // File 5 has ghost 0x1f, what was file 6 is now file 8.
        let remaps = image(REMAPS.1, &[&[8, 5, 16, 31, 24, 1], &[8, 6, 16, 8, 24, 0]]);
        let remaps = super::remaps(&remaps).unwrap();
        assert_eq!(remaps, [(5, Remap::Ghost(31)), (6, Remap::Linked(8))]);
        // type REG, id, reg { id, name }.
        let file = |id: u8, name: &[u8]| {
            let mut reg = vec![8, id, 50, u8::try_from(name.len()).unwrap()];
            reg.extend(name);
            [&[8, 1, 16, id, 26, u8::try_from(reg.len()).unwrap()][..], &reg].concat()
        };
        let others: [&[u8]; 2] = [&file(9, b"/other"), &[8, 2, 16, 7]];
        let files: [&[u8]; 3] = [&file(5, b"/dev/shm/a\xff"), &file(6, b"/b"), &file(8, b"/link_remap.1")];
        let names = names(&image(FILES.1, &[&files[..], &others].concat())).unwrap();
        let ghost = Path::new(OsStr::from_bytes(b"/dev/shm/a\xff.cr.1f.ghost"));
        let found = pair(&remaps, &names);
        assert_eq!(found.len(), 2);
        assert_eq!((&*found[0].stand_in, found[0].linked), (ghost, false));
        let link = Deleted { name: "/b".into(), stand_in: "/link_remap.1".into(), linked: true };
        assert_eq!(found[1], link);
    }

    fn ghosts(root: &Path, volumes: Vec<(PathBuf, PathBuf)>, files: &[(&str, &str, bool)]) -> Ghosts {
        let deleted = |(name, stand_in, linked): &(&str, &str, bool)| Deleted {
            name: name.into(),
            stand_in: stand_in.into(),
            linked: *linked,
        };
        let files = files.iter().map(deleted).collect();
        Ghosts { files, root: root.to_owned(), volumes, ..Ghosts::default() }
    }

    #[test]
    fn they_are_removed_where_they_are_and_links_lead_nowhere_else() {
        let above = tempfile::tempdir().unwrap();
        let (root, volume) = (above.path().join("root"), above.path().join("volume"));
        for directory in [&root.join("tmp/dir.ghost"), &root.join("tmp/full.ghost/x"), &volume] {
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
        // The first cannot be removed, and stands in no other's way.
        let names = [
            "/tmp/full.ghost",
            "/tmp/a.ghost",
            "/tmp/dir.ghost",
            "/data/b.ghost",
            "/up/out.ghost",
            "/none/c.ghost",
        ];
        let ghosts = ghosts(
            &root,
            vec![("/data".into(), volume.clone())],
            &names.map(|name| ("/tmp/kept", name, false)),
        );
        ghosts.undo();
        assert!(root.join("tmp/full.ghost").exists());
        assert!(!root.join("tmp/a.ghost").exists() && !root.join("tmp/dir.ghost").exists());
        assert!(!volume.join("b.ghost").exists());
        assert!(root.join("tmp/kept").exists() && above.path().join("out.ghost").exists());
    }

    #[test]
    fn names_by_which_a_killed_criu_opens_files_are_removed_and_others_are_not() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        for file in ["a.ghost", "b.ghost", "b"] {
            std::fs::write(path(file), "x").unwrap();
        }
        std::fs::hard_link(path("a.ghost"), path("a")).unwrap();
        // Somebody has made another file in place of this one.
        std::fs::hard_link(path("b.ghost"), path("b.cr_link")).unwrap();
        let ghosts = ghosts(root.path(), Vec::new(), &[("/a", "/a.ghost", false), ("/b", "/b.ghost", false)]);
        ghosts.prepare().unwrap();
        let left: Vec<_> =
            std::fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["b"]);
    }

    #[test]
    fn a_file_with_another_name_outlives_failures_and_goes_with_success() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        std::fs::write(path("other"), "x").unwrap();
        std::fs::hard_link(path("other"), path("link_remap.1")).unwrap();
        let ghosts = ghosts(root.path(), Vec::new(), &[("/a", "/link_remap.1", true)]);
        for _ in 0..2 {
            ghosts.prepare().unwrap();
            // CRIU, killed at its worst.
            std::fs::hard_link(path("link_remap.1"), path("a")).unwrap();
            std::fs::remove_file(path("link_remap.1")).unwrap();
            std::fs::remove_file(path("other")).unwrap();
            ghosts.undo();
            assert_eq!(std::fs::read(path("link_remap.1")).unwrap(), b"x");
            assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
            std::fs::hard_link(path("link_remap.1"), path("other")).unwrap();
        }
        // Killed with the whole shim: the next try finds the safe name.
        ghosts.prepare().unwrap();
        std::fs::remove_file(path("link_remap.1")).unwrap();
        ghosts.prepare().unwrap();
        assert!(path("link_remap.1").exists());
        std::fs::remove_file(path("link_remap.1")).unwrap();
        ghosts.finish();
        let left: Vec<_> =
            std::fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["other"]);
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
            let _ = (remaps(&image), names(&image), remaps(&noise));
        }
    }
}
