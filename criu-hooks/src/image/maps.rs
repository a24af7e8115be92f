//! The page maps of an image together: what a restore asks of them, and a dump before anything is killed.

use std::{collections::HashSet, os::fd::BorrowedFd, path::Path};

use super::{
    Error, FileEntry,
    manifest::{is_pagemap, number_beside, pages_name},
    pagemap::{PAGE, Pagemap},
};

/// The page maps of an image that belong to their pages files.
#[derive(Debug, Clone, Default)]
pub struct PageMaps(Vec<(String, Pagemap)>);

impl PageMaps {
    /// Reads the page maps among `files` from the directory `images`, and checks that each has a pages file of its own,
    /// as long as the map says. `path` is the image's.
    pub(super) fn read(images: BorrowedFd<'_>, path: &Path, files: &[FileEntry]) -> Result<PageMaps, Error> {
        let mut taken = HashSet::new();
        let mut maps = Vec::new();
        for FileEntry { name, .. } in files.iter().filter(|file| is_pagemap(&file.name)) {
            let (image, file) = (path.to_owned(), name.clone());
            let map = match Pagemap::read(images, name) {
                Ok(map) => map,
                Err(source) => return Err(Error::Pagemap { image, file, source }),
            };
            let number = number_beside(name, &map);
            let pages = pages_name(number);
            let bytes = files.iter().find(|file| file.name == pages).map(|file| file.size);
            let why = match bytes {
                None => "is not there",
                Some(bytes) if map.present().checked_mul(PAGE) != Some(bytes) => {
                    "has not as many pages as it says"
                }
                Some(_) if !taken.insert(number) => "belongs to another page map",
                Some(_) => {
                    maps.push((file, map));
                    continue;
                }
            };
            return Err(Error::PagesMismatch { image, file, pages, why });
        }
        Ok(PageMaps(maps))
    }

    /// Those of processes' memory, without those of memory that they share.
    pub(crate) fn of_processes(&self) -> impl Iterator<Item = &Pagemap> {
        let is_process = |name: &str| {
            let id = name.strip_prefix("pagemap-").and_then(|rest| rest.strip_suffix(".img"));
            id.is_some_and(|id| id.bytes().all(|byte| byte.is_ascii_digit()))
        };
        self.0.iter().filter(move |(name, _)| is_process(name)).map(|(_, map)| map)
    }
}
