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
