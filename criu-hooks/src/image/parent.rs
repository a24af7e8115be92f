//! The parent of an incremental image: the memory as it was written in advance, of which the image itself repeats only
//! what has changed since.
//!
//! ```text
//! <generation>/img/           what CRIU wrote at the end, and its link `parent` to ../parent
//! <generation>/parent/        what CRIU wrote while the processes ran
//! ```
//! Both are of one generation: they are described by one manifest, in which the parent's files are named `parent/…`, are
//! checked together, and go together.

use std::{
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use rustix::{fs::FileType, io::Errno};

use super::{Error, directory};

/// The directory of a generation that holds a parent, and CRIU's link to it.
pub(super) const PARENT: &str = "parent";

/// What CRIU is told, and what its link says: the parent's directory, seen from the image's.
pub(crate) const FROM_IMAGES: &str = "../parent";

/// Whether `name` can be that of a file of an image, or of its parent.
pub(super) fn is_file_name(name: &str) -> bool {
    let plain = own_name(name);
    !plain.is_empty() && plain.len() <= 255 && plain != "." && plain != ".." && !plain.contains(['/', '\0'])
}

/// The name of a file within its directory, the image's or the parent's.
pub(super) fn own_name(name: &str) -> &str {
    name.strip_prefix(PARENT).and_then(|rest| rest.strip_prefix('/')).unwrap_or(name)
}

/// The name of the parent's file `name` in the manifest, and seen from the image's directory.
pub(crate) fn name_in(name: &str) -> String {
    format!("{PARENT}/{name}")
}

/// Whether this is the name of a file of the parent.
pub(super) fn is_of_parent(name: &str) -> bool {
    own_name(name).len() < name.len()
}

/// The names of all files of an image, its parent's included. They can be opened from `images`, as CRIU opens them.
/// `path` is that of `images`.
pub(super) fn names(images: BorrowedFd<'_>, path: &Path) -> Result<Vec<String>, Error> {
    let mut names = directory::names(images, path)?;
    let Some(at) = names.iter().position(|name| name == PARENT) else { return Ok(names) };
    let altered =
        || Error::Altered { image: path.parent().unwrap_or(path).to_owned(), file: PARENT.to_owned() };
    match rustix::fs::readlinkat(images, PARENT, Vec::new()) {
        Ok(target) if target.as_bytes() == FROM_IMAGES.as_bytes() => {}
        // No link, or one to somewhere else.
        Ok(_) | Err(Errno::INVAL) => return Err(altered()),
        Err(error) => return Err(Error::io("read", &path.join(PARENT), error.into())),
    }
    // The link itself is no file of the image, and its target must not be another link.
    names.swap_remove(at);
    let parent = match directory::open(images, FROM_IMAGES) {
        Ok(parent) => parent,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Err(altered()),
        Err(error) => return Err(Error::io("open", &path.join(PARENT), error.into())),
    };
    let stat = rustix::fs::fstat(&parent).map_err(|error| Error::io("stat", path, error.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(altered());
    }
    let inside = directory::names(parent.as_fd(), &path.join(PARENT))?;
    names.extend(inside.iter().map(|name| name_in(name)));
    Ok(names)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn only_plain_names_and_those_below_the_parent_are_names_of_files() {
        for name in ["pages-1.img", "parent/pages-1.img", "parent"] {
            assert!(is_file_name(name), "{name}");
        }
        for name in
            ["", ".", "..", "a/b", "/a", "parent/", "parent/..", "parent/a/b", "parent/parent/a", "a\0"]
        {
            assert!(!is_file_name(name), "{name}");
        }
        assert_eq!(own_name("parent/pages-1.img"), "pages-1.img");
        assert_eq!(own_name("parents"), "parents");
    }

    #[test]
    fn the_files_of_both_are_listed_and_a_link_to_elsewhere_is_refused() {
        let generation = tempfile::tempdir().unwrap();
        let path = generation.path().join("img");
        for directory in ["img", "parent", "other"] {
            fs::create_dir(generation.path().join(directory)).unwrap();
        }
        fs::write(path.join("core.img"), "").unwrap();
        fs::write(generation.path().join("parent/pages-1.img"), "").unwrap();
        let images = fs::File::open(&path).unwrap();
        let list = || {
            let mut names = names(images.as_fd(), &path)?;
            names.sort();
            Ok::<_, Error>(names)
        };
        assert_eq!(list().unwrap(), ["core.img"]);
        symlink(FROM_IMAGES, path.join("parent")).unwrap();
        assert_eq!(list().unwrap(), ["core.img", "parent/pages-1.img"]);

        let refused = || matches!(list(), Err(Error::Altered { file, .. }) if file == "parent");
        fs::rename(generation.path().join("parent"), generation.path().join("away")).unwrap();
        assert!(refused());
        symlink("away", generation.path().join("parent")).unwrap();
        assert!(refused());
        fs::remove_file(path.join("parent")).unwrap();
        symlink("../other", path.join("parent")).unwrap();
        assert!(refused());
        fs::remove_file(path.join("parent")).unwrap();
        fs::write(path.join("parent"), "").unwrap();
        assert!(refused());
    }
}
