#![allow(clippy::unwrap_used)]

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
};

use super::*;

const WANTED: Expected<'_> = Expected { namespace: "k8s.io", container: "agent", spec_digest: "d1" };

fn facts() -> Facts {
    Facts {
        spec_digest: "d1".to_owned(),
        init_pid: 7,
        stdio: [None, Some("pipe:[5]".to_owned()), None],
        ..Facts::default()
    }
}

fn store() -> (tempfile::TempDir, Store) {
    let above = tempfile::tempdir().unwrap();
    let store = Store::open(above.path().join("images")).unwrap();
    (above, store)
}

/// A complete image with two files and a page file.
fn image(store: &Store) -> Image {
    let writer = store.begin("k8s.io", "agent", Some(100)).unwrap();
    for (name, contents) in [("core-1.img", "core"), ("inventory.img", "inventory"), ("pages-1.img", "pages")]
    {
        fs::write(writer.path().join("img").join(name), contents).unwrap();
    }
    writer.complete(facts()).unwrap();
    writer.open().unwrap()
}

/// Pages of a process: ten that CRIU loads, ten lazy ones, 40 of zeros, and one more.
const MAP: [(u64, u64, u64); 4] =
    [(0x1000, 10, 4), (0x10_0000, 10, 6), (0x20_0000, 40, 6), (0x30_0000, 1, 4)];

fn pages() -> Vec<u8> {
    let page = |number: u32| if (20..60).contains(&number) { vec![0; 4096] } else { noise(number) };
    (0..61).flat_map(page).collect()
}

fn noise(number: u32) -> Vec<u8> {
    (0..4096_u32)
        .map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[2] ^ number.to_le_bytes()[0])
        .collect()
}

/// A complete image with a page map and its pages.
fn image_with(store: &Store, files: &[(&str, &[u8])]) -> Image {
    let writer = store.begin("k8s.io", "agent", None).unwrap();
    for (name, contents) in files {
        fs::write(writer.path().join("img").join(name), contents).unwrap();
    }
    writer.complete(facts()).unwrap();
    writer.open().unwrap()
}

fn image_with_pages(store: &Store) -> Image {
    image_with(store, &[("pagemap-1.img", &pagemap::tests::pagemap(&MAP)), ("pages-7.img", &pages())])
}

fn finish(image: &Image) -> Finished {
    image.finish_in_background(None).unwrap().blocking_recv().unwrap()
}

fn check(image: &Image, which: Pages) -> Result<u64, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async { image.check_in_background(which).outcome().await })
}

/// Changes one byte of a file.
fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_finished_image_is_the_same_but_smaller_and_each_of_its_pages_is_checked() {
    let (_above, store) = store();
    let image = image_with_pages(&store);
    assert_eq!(check(&image, Pages::All).unwrap(), 0, "there is nothing to check with");
    let before = image.disk_bytes().unwrap();
    let finished = finish(&image);
    assert_eq!(finished, Finished { summed: true, freed: 40 * 4096, clean: true });
    assert!(before - image.disk_bytes().unwrap() >= 36 * 4096);
    let file = image.path().join("img/pages-7.img");
    assert_eq!(fs::read(&file).unwrap(), pages());
    image.verify(&WANTED).unwrap();
    assert_eq!(check(&image, Pages::All).unwrap(), 61 * 4096);
    assert_eq!(check(&image, Pages::Eager).unwrap(), 11 * 4096);

    let sums = PageSums::open(&image).unwrap().unwrap();
    sums.check(7, 8192, &pages()[8192..20480]).unwrap();
    for (at, eager) in [(0, true), (10 * 4096 + 5, false), (30 * 4096 + 1, false), (60 * 4096 + 4095, true)] {
        flip(&file, at);
        image.verify(&WANTED).unwrap();
        let block = (at / 4096 * 4096) as u64;
        let found = check(&image, Pages::All).unwrap_err();
        assert!(matches!(&found, Error::PageAltered { offset, .. } if *offset == block), "{found}");
        assert_eq!(check(&image, Pages::Eager).is_err(), eager);
        flip(&file, at);
    }
    assert_eq!(check(&image, Pages::All).unwrap(), 61 * 4096);
    // Another program's view of the same image.
    let found = store.latest("k8s.io", "agent").unwrap().unwrap();
    assert_eq!(check(&found, Pages::All).unwrap(), 61 * 4096);
}

#[test]
fn checksums_that_are_not_those_that_were_written_are_refused() {
    let (_above, store) = store();
    let (first, second) = (image_with_pages(&store), image_with_pages(&store));
    finish(&first);
    finish(&second);
    let path = second.path().join("pages.sums");
    let (right, other) = (fs::read(&path).unwrap(), fs::read(first.path().join("pages.sums")).unwrap());
    let refused = |image: &Image| {
        let error = check(image, Pages::All).unwrap_err();
        assert!(matches!(error, Error::SumsInvalid { .. }), "{error}");
        assert!(error.to_string().contains("pages.sums"), "{error}");
    };
    fs::write(&path, &other).unwrap();
    refused(&second);
    refused(&store.latest("k8s.io", "agent").unwrap().unwrap());
    for at in [0, 9, 20, 60, right.len() - 9, right.len() - 1] {
        fs::write(&path, &right).unwrap();
        flip(&path, at);
        refused(&second);
    }
    fs::write(&path, &right[..right.len() - 1]).unwrap();
    refused(&second);
    fs::write(&path, "").unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    refused(&second);
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    refused(&second);
    fs::remove_dir(&path).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
    refused(&second);
    fs::remove_file(&path).unwrap();
    symlink("manifest.json", &path).unwrap();
    refused(&second);
    fs::remove_file(&path).unwrap();
    assert!(matches!(check(&second, Pages::All), Err(Error::Missing { file, .. }) if file == "pages.sums"));
    fs::write(&path, &right).unwrap();
    check(&second, Pages::All).unwrap();
}

#[test]
fn pages_and_checksums_of_another_generation_are_refused_together() {
    let (_above, store) = store();
    let first = image_with_pages(&store);
    let mut changed = pages();
    changed[5] ^= 1;
    let second =
        image_with(&store, &[("pagemap-1.img", &pagemap::tests::pagemap(&MAP)), ("pages-7.img", &changed)]);
    finish(&first);
    finish(&second);
    for file in ["img/pages-7.img", "pages.sums"] {
        fs::copy(first.path().join(file), second.path().join(file)).unwrap();
    }
    second.verify(&WANTED).unwrap();
    assert!(matches!(check(&second, Pages::All), Err(Error::SumsInvalid { .. })));
}

#[test]
fn finishing_that_is_given_up_leaves_nothing_and_harms_nothing() {
    let (_above, store) = store();
    for _ in 0..20 {
        let image = image_with_pages(&store);
        let told = image.finish_in_background(None).unwrap();
        image.give_up_finishing();
        let names = directory::names(image.directory.as_fd(), image.path()).unwrap();
        let summed = names.iter().any(|name| name == "pages.sums");
        assert!(names.iter().all(|name| ["img", "work", "manifest.json", "pages.sums"].contains(&&**name)));
        assert_eq!(fs::read(image.path().join("img/pages-7.img")).unwrap(), pages());
        assert_eq!(check(&image, Pages::All).unwrap() > 0, summed);
        assert_eq!(told.blocking_recv().unwrap().summed, summed);
        // One that is removed while it is finished.
        let other = image_with_pages(&store);
        drop(other.finish_in_background(None).unwrap());
        let path = other.path().to_owned();
        other.remove().unwrap();
        assert!(!path.exists());
    }
}

#[test]
fn a_page_map_that_does_not_fit_its_pages_is_refused() {
    let (_above, store) = store();
    let map = |entries: &[(u64, u64, u64)]| pagemap::tests::pagemap(entries);
    let pages = pages();
    let verified = |files: &[(&str, &[u8])]| image_with(&store, files).verify(&WANTED);
    let refused = |files: &[(&str, &[u8])], words: &[&str]| {
        let error = verified(files).unwrap_err();
        assert!(matches!(error, Error::Pagemap { .. } | Error::PagesMismatch { .. }), "{error}");
        let error = error.to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    verified(&[("pagemap-1.img", &map(&MAP)), ("pages-7.img", &pages)]).unwrap();
    let overlapping = [(0x1000, 60, 4), (0x2000, 1, 4)];
    refused(
        &[("pagemap-1.img", &map(&overlapping)), ("pages-7.img", &pages)],
        &["pagemap-1.img", "overlaps"],
    );
    let outside = [(0x1000, 62, 4)];
    let wrong = &["pagemap-1.img", "pages-7.img", "not as many"];
    refused(&[("pagemap-1.img", &map(&outside)), ("pages-7.img", &pages)], wrong);
    refused(&[("pagemap-1.img", &map(&[(0x1000, 60, 4)])), ("pages-7.img", &pages)], wrong);
    refused(&[("pagemap-1.img", &map(&[(0x1000, 1 << 40, 4)])), ("pages-7.img", &pages)], wrong);
    refused(&[("pagemap-1.img", &map(&MAP))], &["pagemap-1.img", "pages-7.img", "not there"]);
    refused(
        &[("pagemap-1.img", &map(&MAP)), ("pagemap-2.img", &map(&MAP)), ("pages-7.img", &pages)],
        &["pagemap-2.img", "another page map"],
    );
    refused(&[("pagemap-shmem-9.img", b"nonsense"), ("pages-7.img", &pages)], &["pagemap-shmem-9.img"]);
}

#[test]
fn an_image_that_is_not_in_its_place_is_neither_used_nor_removed() {
    let (_above, store) = store();
    for inside in ["", "img"] {
        let (mine, other) = (image(&store), image(&store));
        let (here, there) = (mine.path().join(inside), other.path().join(inside));
        let exchange = || {
            use rustix::fs::{CWD, RenameFlags, renameat_with};
            renameat_with(CWD, &here, CWD, &there, RenameFlags::EXCHANGE).unwrap();
        };
        exchange();
        assert!(matches!(mine.verify(&WANTED), Err(Error::Displaced(path)) if path == here));
        assert!(matches!(mine.clone().remove(), Err(Error::Displaced(_))));
        assert!(other.path().join("img/core-1.img").exists());
        exchange();
        mine.verify(&WANTED).unwrap();
        other.verify(&WANTED).unwrap();
        mine.remove().unwrap();
        other.verify(&WANTED).unwrap();
    }
}

#[test]
fn a_manifest_that_was_changed_since_is_refused_even_when_what_it_says_is_known() {
    let (_above, store) = store();
    let image = image(&store);
    let path = image.path().join("manifest.json");
    let right = fs::read(&path).unwrap();
    let altered = || match image.verify(&WANTED) {
        Err(Error::Altered { file, .. }) => file == "manifest.json",
        other => panic!("{other:?}"),
    };
    fs::write(&path, [&right[..], b" "].concat()).unwrap();
    assert!(altered());
    flip(&path, 40);
    assert!(altered());
    fs::File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(image.verify(&WANTED), Err(Error::ManifestTooLong { .. })));
    fs::remove_file(&path).unwrap();
    assert!(matches!(image.verify(&WANTED), Err(Error::Missing { .. })));
    rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
    assert!(matches!(image.verify(&WANTED), Err(Error::ManifestInvalid { .. })));
    fs::remove_file(&path).unwrap();
    fs::write(&path, &right).unwrap();
    image.verify(&WANTED).unwrap();
}

#[test]
fn an_image_that_is_on_the_disk_can_leave_the_page_cache() {
    // On the disk of the build, for a tmpfs is nothing but page cache.
    let above = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let store = Store::open(above.path().join("images")).unwrap();
    let image = image_with_pages(&store);
    assert_eq!(image.readahead(&[]).unwrap().cold_bytes(), 0);
    let told = image.finish_in_background(Some(std::time::Duration::from_millis(1))).unwrap();
    assert!(told.blocking_recv().unwrap().clean);
    let is_cold = || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        image.readahead(&[Part { number: 7, offset: 0, length: 4096 }]).unwrap().cold_bytes() > 0
    };
    assert!((0..100).any(|_| is_cold()), "it is still in memory");
    let is_warm = || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        image.readahead(&[]).unwrap().cold_bytes() == 0
    };
    assert!((0..100).any(|_| is_warm()), "readahead reads nothing");
    image.verify(&WANTED).unwrap();
}

#[test]
fn a_complete_image_is_found_and_verifies() {
    let (_above, store) = store();
    assert!(store.latest("k8s.io", "agent").unwrap().is_none());
    let written = image(&store);
    let found = store.latest("k8s.io", "agent").unwrap().unwrap();
    assert_eq!(found.manifest(), written.manifest());
    assert_eq!(found.bytes(), 18);
    found.verify(&WANTED).unwrap();
    let pages = found.manifest().files.iter().find(|file| file.name == "pages-1.img").unwrap();
    assert_eq!(pages.sha256, None);
    for directory in ["", "img", "work"] {
        let mode = fs::metadata(found.path().join(directory)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "{directory}");
    }
}

#[test]
fn an_incomplete_writer_leaves_nothing() {
    let (_above, store) = store();
    let writer = store.begin("k8s.io", "agent", None).unwrap();
    let path = writer.path().to_owned();
    fs::write(path.join("img/core-1.img"), "x").unwrap();
    fs::create_dir_all(path.join("work/tmp/deeper")).unwrap();
    drop(writer);
    assert!(!path.exists());
    assert!(store.latest("k8s.io", "agent").unwrap().is_none());
}

#[test]
fn a_revoked_image_is_none() {
    let (_above, store) = store();
    let writer = store.begin("k8s.io", "agent", None).unwrap();
    writer.complete(facts()).unwrap();
    writer.revoke().unwrap();
    assert!(store.latest("k8s.io", "agent").unwrap().is_none());
    assert!(writer.complete(facts()).is_err(), "revoked for good");
    let path = writer.path().to_owned();
    drop(writer);
    assert!(!path.exists());
}

#[test]
fn the_newest_complete_generation_counts_and_a_damaged_one_is_an_error() {
    let (_above, store) = store();
    let first = image(&store);
    let second = image(&store);
    assert_eq!((first.manifest().generation, second.manifest().generation), (1, 2));
    let unfinished = store.begin("k8s.io", "agent", None).unwrap();
    assert_eq!(unfinished.generation(), 3);
    assert_eq!(store.latest("k8s.io", "agent").unwrap().unwrap().manifest().generation, 2);
    fs::write(second.path().join("manifest.json"), "{}").unwrap();
    assert!(matches!(store.latest("k8s.io", "agent"), Err(Error::ManifestInvalid { .. })));
}

#[test]
fn every_change_of_a_file_is_named() {
    let (_above, store) = store();
    let image = image(&store);
    let file = |name: &str| image.path().join("img").join(name);
    let verify = || image.verify(&WANTED).unwrap_err();

    fs::write(file("pages-1.img"), "page").unwrap();
    assert!(
        matches!(verify(), Error::Truncated { file, expected: 5, found: 4, .. } if file == "pages-1.img")
    );
    fs::write(file("pages-1.img"), "pages!").unwrap();
    assert!(matches!(verify(), Error::Grown { file, .. } if file == "pages-1.img"));
    fs::write(file("pages-1.img"), "pages").unwrap();
    image.verify(&WANTED).unwrap();

    fs::write(file("core-1.img"), "cork").unwrap();
    assert!(matches!(verify(), Error::Altered { file, .. } if file == "core-1.img"));
    fs::remove_file(file("core-1.img")).unwrap();
    assert!(matches!(verify(), Error::Missing { file, .. } if file == "core-1.img"));
    fs::write(image.path().join("elsewhere"), "core").unwrap();
    symlink(image.path().join("elsewhere"), file("core-1.img")).unwrap();
    assert!(matches!(verify(), Error::Altered { file, .. } if file == "core-1.img"));
    fs::remove_file(file("core-1.img")).unwrap();
    fs::write(file("core-1.img"), "core").unwrap();
    image.verify(&WANTED).unwrap();

    fs::write(file("fdinfo-9.img"), "smuggled").unwrap();
    assert!(matches!(verify(), Error::Unlisted { file, .. } if file == "fdinfo-9.img"));
}

#[test]
fn a_foreign_image_is_refused() {
    let (_above, store) = store();
    let image = image(&store);
    let wanted = |namespace, container, spec_digest| Expected { namespace, container, spec_digest };
    assert!(matches!(image.verify(&wanted("moby", "agent", "d1")), Err(Error::ForeignContainer { .. })));
    assert!(matches!(image.verify(&wanted("k8s.io", "other", "d1")), Err(Error::ForeignContainer { .. })));
    assert!(matches!(image.verify(&wanted("k8s.io", "agent", "d2")), Err(Error::ForeignSpec { .. })));
}

#[test]
fn an_image_of_an_earlier_boot_is_refused() {
    let (_above, store) = store();
    let image = image(&store);
    let mut manifest = image.manifest().clone();
    manifest.boot_id = "another".to_owned();
    fs::write(image.path().join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
    let image = store.latest("k8s.io", "agent").unwrap().unwrap();
    assert!(matches!(image.verify(&WANTED), Err(Error::OtherBoot { .. })));
}

#[test]
fn manifests_of_other_versions_and_lengths_are_refused() {
    let (_above, store) = store();
    let image = image(&store);
    let path = image.path().join("manifest.json");
    let replaced = |text: &[u8]| {
        fs::write(&path, text).unwrap();
        store.latest("k8s.io", "agent").unwrap_err()
    };
    assert!(matches!(replaced(b"{\"version\": 1, \"old\": []}"), Error::UnknownVersion { found: 1, .. }));
    let long = vec![b' '; usize::try_from(MAX_MANIFEST).unwrap() + 1];
    assert!(matches!(replaced(&long), Error::ManifestTooLong { .. }));
    let mut manifest = image.manifest().clone();
    manifest.files[0].name = "../../etc/shadow".to_owned();
    assert!(matches!(replaced(&serde_json::to_vec(&manifest).unwrap()), Error::ManifestInvalid { .. }));
    manifest.files[0] = manifest.files[1].clone();
    assert!(matches!(replaced(&serde_json::to_vec(&manifest).unwrap()), Error::ManifestInvalid { .. }));
    manifest.files[0] = FileEntry { name: "core-1.img".to_owned(), size: 4, sha256: None };
    assert!(matches!(replaced(&serde_json::to_vec(&manifest).unwrap()), Error::ManifestInvalid { .. }));
    fs::remove_file(&path).unwrap();
    symlink("/etc/passwd", &path).unwrap();
    assert!(store.latest("k8s.io", "agent").is_err());
}

#[test]
fn names_that_are_no_names_are_refused() {
    let (_above, store) = store();
    let long = "x".repeat(129);
    for bad in ["", ".", "..", "a/b", "../a", ".hidden", "a\0b", "a b", long.as_str()] {
        assert!(matches!(store.begin("k8s.io", bad, None), Err(Error::Name { .. })), "{bad:?}");
        assert!(matches!(store.latest(bad, "agent"), Err(Error::Name { .. })), "{bad:?}");
        assert!(matches!(store.remove_all(bad, "agent"), Err(Error::Name { .. })), "{bad:?}");
    }
    store.begin("k8s.io", "0a1B-_.:+@", None).unwrap();
}

#[test]
fn links_above_an_image_are_not_followed() {
    let (above, store) = store();
    let target = above.path().join("target");
    fs::create_dir(&target).unwrap();
    symlink(&target, store.path().join("k8s.io")).unwrap();
    assert!(matches!(store.begin("k8s.io", "agent", None), Err(Error::NotADirectory(_))));
    symlink(&target, above.path().join("link")).unwrap();
    assert!(matches!(Store::open(above.path().join("link")), Err(Error::NotADirectory(_))));
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
}

#[test]
fn a_store_that_others_can_read_is_refused() {
    let (_above, store) = store();
    fs::set_permissions(store.path(), fs::Permissions::from_mode(0o755)).unwrap();
    assert!(matches!(Store::open(store.path()), Err(Error::Exposed { mode: 0o755, .. })));
}

#[test]
fn a_file_in_place_of_the_store_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    assert!(matches!(Store::open(file.path()), Err(Error::NotADirectory(path)) if path == file.path()));
    assert!(matches!(Store::open(file.path().join("below")), Err(Error::NotADirectory(_))));
}

#[test]
fn an_image_that_cannot_fit_is_refused_with_both_figures() {
    let (_above, store) = store();
    let error = store.begin("k8s.io", "agent", Some(u64::MAX / 2)).unwrap_err();
    assert!(
        matches!(error, Error::Full { free, needed: Some(needed), .. } if free > 0 && needed == u64::MAX / 2)
    );
    assert!(!store.path().join("k8s.io").exists());
}

#[test]
fn a_full_disk_is_told_from_other_errors() {
    let error = Error::io("write", Path::new("/"), std::io::Error::from_raw_os_error(28));
    assert!(matches!(error, Error::Full { needed: None, .. }), "{error}");
    let error = Error::io("write", Path::new("/"), std::io::Error::from_raw_os_error(30));
    assert!(matches!(error, Error::ReadOnly(_)), "{error}");
}

#[test]
fn sweeping_spares_what_is_complete_and_removing_spares_other_containers() {
    let (_above, store) = store();
    let complete = image(&store);
    let leftover = store.path().join("k8s.io/agent/7");
    fs::create_dir_all(leftover.join("img")).unwrap();
    store.sweep_incomplete("k8s.io", "agent").unwrap();
    assert!(!leftover.exists() && complete.path().exists());

    let other = store.begin("k8s.io", "other", None).unwrap();
    other.complete(facts()).unwrap();
    store.remove_all("k8s.io", "agent").unwrap();
    assert!(!complete.path().exists() && other.path().exists());
    store.remove_all("k8s.io", "other").unwrap();
    assert!(!store.path().join("k8s.io").exists());
    store.remove_all("k8s.io", "never-was").unwrap();
}

#[test]
fn removing_an_image_removes_it_and_what_it_links_to_stays() {
    let (above, store) = store();
    let image = image(&store);
    let kept = above.path().join("kept");
    fs::write(&kept, "x").unwrap();
    symlink(&kept, image.path().join("work/link")).unwrap();
    let path = image.path().to_owned();
    image.remove().unwrap();
    assert!(!path.exists() && kept.exists());
}

#[test]
fn what_an_image_leaves_out_must_be_possible() {
    let mount = |id, mount_point: &str| OutsideMount { id, mount_point: mount_point.to_owned() };
    let outside = |names: &[&str], mounts: &[OutsideMount]| Outside {
        namespaces: names.iter().map(|name| ((*name).to_owned(), 7)).collect(),
        mounts: mounts.to_vec(),
    };
    let parsed = |mode, outside| {
        let (_above, store) = store();
        let image = image(&store);
        let mut manifest = image.manifest().clone();
        manifest.facts = Facts { mode, outside, ..manifest.facts };
        Manifest::parse(&serde_json::to_vec(&manifest).unwrap(), Path::new("manifest.json"))
    };
    let good = outside(&["net", "mnt"], &[mount(1, "/dev"), mount(2, "/dev/shm")]);
    assert_eq!(parsed(Mode::PodNamespaces, good.clone()).unwrap().facts.outside, good);
    assert!(parsed(Mode::Classic, Outside::default()).is_ok());
    for (mode, outside) in [
        (Mode::Classic, good),
        (Mode::PodNamespaces, outside(&["user"], &[])),
        (Mode::PodNamespaces, outside(&["net"], &[mount(1, "/dev")])),
        (Mode::PodNamespaces, outside(&["mnt"], &[mount(1, "dev")])),
        (Mode::PodNamespaces, outside(&["mnt"], &[mount(1, "/dev\0")])),
        (Mode::PodNamespaces, outside(&["mnt"], &[mount(1, "/a"), mount(1, "/b")])),
    ] {
        assert!(matches!(parsed(mode, outside), Err(Error::ManifestInvalid { .. })));
    }
}

#[test]
fn a_digest_is_the_known_one() {
    assert_eq!(digest(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

proptest::proptest! {
    #[test]
    fn no_manifest_makes_it_panic(bytes: Vec<u8>) {
        let _ = Manifest::parse(&bytes, Path::new("manifest.json"));
    }

    #[test]
    fn a_manifest_with_a_byte_changed_is_refused_or_still_holds_plain_names(at: proptest::sample::Index, byte: u8) {
        let (_above, store) = store();
        let image = image(&store);
        let mut bytes = serde_json::to_vec(image.manifest()).unwrap();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(manifest) = Manifest::parse(&bytes, Path::new("manifest.json")) {
            proptest::prop_assert!(manifest.files.iter().all(|file| !file.name.contains('/')));
        }
    }
}

#[test]
fn an_edition_shows_what_was_changed_and_the_image_is_put_back_also_after_a_death() {
    let (_above, store) = store();
    let image = image(&store);
    let changed = [("core-1.img".to_owned(), b"changed".to_vec())];
    let shown = |name: &str| fs::read_to_string(image.path().join("img").join(name)).unwrap();
    let edition = Edition::of(&image, &changed).unwrap();
    assert_eq!((shown("core-1.img"), shown("inventory.img")), ("changed".to_owned(), "inventory".to_owned()));
    drop(edition);
    assert_eq!(shown("core-1.img"), "core");
    std::mem::forget(Edition::of(&image, &changed).unwrap());
    image.verify(&WANTED).unwrap();
    assert_eq!(shown("core-1.img"), "core");
    // Half made.
    assert!(Edition::of(&image, &[changed[0].clone(), ("core-2.img".to_owned(), Vec::new())]).is_err());
    image.verify(&WANTED).unwrap();
    image.remove().unwrap();
}
