#![allow(clippy::unwrap_used)]

use std::{
    os::unix::{
        fs::{MetadataExt, PermissionsExt, symlink},
        net::{UnixListener as StdListener, UnixStream},
    },
    sync::Barrier,
};

use super::*;

const ID: &str = "4f0c6f6f7b8b2f7ab2c1e0cf2a5f4f0c6f6f7b8b2f7ab2c1e0cf2a5f4f0c6f6f";

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn a_socket_is_named_after_its_namespace_and_id() {
    let root = Path::new(DEFAULT_ROOT);
    assert_eq!(path(root, "k8s.io", ID).unwrap(), root.join(format!("k8s.io/{ID}.sock")));
    assert_eq!(path(root, "default", "a").unwrap(), root.join("default/a.sock"));
}

#[test]
fn every_name_that_containerd_allows_fits_below_the_default_root() {
    let root = Path::new(DEFAULT_ROOT);
    for namespace in 1..=MAX_IDENTIFIER {
        for id in 1..=MAX_IDENTIFIER {
            let path = path(root, &"n".repeat(namespace), &"i".repeat(id)).unwrap();
            assert!(path.as_os_str().len() <= MAX_PATH, "{}", path.display());
        }
    }
}

#[test]
fn long_names_give_different_paths_that_no_identifier_can_equal() {
    let root = Path::new("/run/a-root-of-some-length/agentcube");
    let one = path(root, "k8s.io", &format!("{}1", "x".repeat(70))).unwrap();
    let two = path(root, "k8s.io", &format!("{}2", "x".repeat(70))).unwrap();
    assert_ne!(one, two);
    assert!(one.file_name().unwrap().to_str().unwrap().starts_with('_'));
    assert!(matches!(path(root, "k8s.io", "_x"), Err(SocketError::InvalidName { .. })));
}

#[test]
fn a_root_that_leaves_no_room_is_an_error() {
    let root = PathBuf::from(format!("/{}", "r".repeat(90)));
    assert!(path(&root, "default", "a").is_ok());
    assert!(matches!(path(&root, "default", ID), Err(SocketError::TooLong(_))));
}

#[test]
fn names_that_could_leave_the_directory_are_refused() {
    let long = "x".repeat(MAX_IDENTIFIER + 1);
    for bad in ["", ".", "..", "../x", "a/b", "/a", "a..b", "-a", "a-", "a b", "a\0b", "ä", &long] {
        let error = path(Path::new("/r"), "default", bad).unwrap_err();
        assert!(matches!(error, SocketError::InvalidName { what: "id", .. }), "{bad:?}");
        let error = path(Path::new("/r"), bad, "a").unwrap_err();
        assert!(matches!(error, SocketError::InvalidName { what: "namespace", .. }), "{bad:?}");
    }
}

#[test]
fn directories_and_socket_are_private_and_the_socket_answers() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path().join("agentcube");
    let listener = listen(&root, "k8s.io", ID).unwrap();
    let path = path(&root, "k8s.io", ID).unwrap();
    assert_eq!((mode(&root), mode(&root.join("k8s.io")), mode(&path)), (0o700, 0o700, 0o600));
    UnixStream::connect(&path).unwrap();
    listener.accept().unwrap();
}

#[test]
fn a_readable_directory_of_our_own_is_tightened() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path().join("agentcube");
    std::fs::create_dir(&root).unwrap();
    std::fs::set_permissions(&root, PermissionsExt::from_mode(0o755)).unwrap();
    listen(&root, "default", "a").unwrap();
    assert_eq!(mode(&root), 0o700);
}

#[test]
fn a_directory_that_others_can_write_is_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path().join("agentcube");
    std::fs::create_dir(&root).unwrap();
    std::fs::set_permissions(&root, PermissionsExt::from_mode(0o770)).unwrap();
    let error = listen(&root, "default", "a").unwrap_err();
    assert!(error.to_string().contains("is writable by others"), "{error}");
    assert_eq!(mode(&root), 0o770, "it was left alone");
}

#[test]
fn a_directory_of_somebody_else_is_refused() {
    if !geteuid().is_root() {
        eprintln!("skipped: only root can give a directory away");
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path().join("agentcube");
    std::fs::create_dir_all(root.join("default")).unwrap();
    std::os::unix::fs::chown(root.join("default"), Some(12345), None).unwrap();
    let error = listen(&root, "default", "a").unwrap_err();
    assert!(error.to_string().contains("belongs to another user"), "{error}");
}

#[test]
fn a_link_in_the_chain_is_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let elsewhere = tmp.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    let root = tmp.path().join("agentcube");
    symlink(&elsewhere, &root).unwrap();
    assert!(matches!(listen(&root, "default", "a"), Err(SocketError::Untrusted { .. })));
    std::fs::remove_file(&root).unwrap();

    std::fs::create_dir(&root).unwrap();
    symlink(&elsewhere, root.join("default")).unwrap();
    assert!(matches!(listen(&root, "default", "a"), Err(SocketError::Untrusted { .. })));
    assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 0);
}

#[test]
fn a_link_or_a_file_in_the_socket_s_place_is_refused_and_kept() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path().join("agentcube");
    drop(listen(&root, "default", "a").unwrap());
    let path = path(&root, "default", "a").unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(listen(&root, "default", "a"), Err(SocketError::Untrusted { .. })));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");

    std::fs::remove_file(&path).unwrap();
    let target = tmp.path().join("other.sock");
    drop(StdListener::bind(&target).unwrap());
    symlink(&target, &path).unwrap();
    assert!(matches!(listen(&root, "default", "a"), Err(SocketError::Untrusted { .. })));
    assert!(target.exists());
}

#[test]
fn a_stale_socket_is_replaced() {
    let tmp = tempfile::tempdir().unwrap();
    drop(listen(tmp.path(), "default", "a").unwrap());
    let path = path(tmp.path(), "default", "a").unwrap();
    assert!(path.exists(), "closing a socket leaves its file");
    let listener = listen(tmp.path(), "default", "a").unwrap();
    UnixStream::connect(&path).unwrap();
    listener.accept().unwrap();
}

#[test]
fn a_socket_on_which_somebody_listens_is_left_alone() {
    let tmp = tempfile::tempdir().unwrap();
    let first = listen(tmp.path(), "default", "a").unwrap();
    assert!(matches!(listen(tmp.path(), "default", "a"), Err(SocketError::InUse(_))));
    UnixStream::connect(path(tmp.path(), "default", "a").unwrap()).unwrap();
    first.accept().unwrap();
}

#[test]
fn of_many_that_listen_at_once_exactly_one_wins() {
    let tmp = tempfile::tempdir().unwrap();
    drop(listen(tmp.path(), "default", "a").unwrap());
    let barrier = Barrier::new(8);
    let winners = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    listen(tmp.path(), "default", "a")
                })
            })
            .collect();
        // Winners must stay alive until all have tried: collect first, count then.
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        for error in results.iter().filter_map(|result| result.as_ref().err()) {
            assert!(matches!(error, SocketError::InUse(_)), "{error}");
        }
        results.iter().filter(|result| result.is_ok()).count()
    });
    assert_eq!(winners, 1);
}

#[test]
fn remove_takes_the_socket_away_and_is_content_when_there_is_none() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path().join("agentcube");
    remove(&root, "default", "a").unwrap();
    let _listener = listen(&root, "default", "a").unwrap();
    remove(&root, "default", "a").unwrap();
    assert!(!path(&root, "default", "a").unwrap().exists());
    remove(&root, "default", "a").unwrap();
}

#[test]
fn discover_finds_sockets_by_namespace_and_nothing_else() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path().join("agentcube");
    assert_eq!(discover(&root, None).unwrap(), []);
    let _kept = [
        listen(&root, "k8s.io", "b").unwrap(),
        listen(&root, "k8s.io", "a").unwrap(),
        listen(&root, "default", "c").unwrap(),
    ];
    std::fs::write(root.join("k8s.io/file.sock"), "").unwrap();
    symlink(root.join("k8s.io/a.sock"), root.join("k8s.io/link.sock")).unwrap();
    std::fs::write(root.join("file"), "").unwrap();
    symlink(root.join("k8s.io"), root.join("link")).unwrap();

    let names = |namespace| -> Vec<String> {
        let found = discover(&root, namespace).unwrap();
        found.iter().map(|e| format!("{}/{}", e.namespace, e.name)).collect()
    };
    assert_eq!(names(None), ["default/c", "k8s.io/a", "k8s.io/b"]);
    assert_eq!(names(Some("k8s.io")), ["k8s.io/a", "k8s.io/b"]);
    assert_eq!(names(Some("moby")), [] as [&str; 0]);
    assert!(matches!(discover(&root, Some("../k8s.io")), Err(SocketError::InvalidName { .. })));
}

#[test]
fn a_permission_error_says_to_be_root() {
    let error = SocketError::io("read the directory", Path::new("/run/agentcube"))(Errno::ACCESS);
    assert_eq!(
        error.to_string(),
        "cannot read the directory /run/agentcube: Permission denied (os error 13) \
         (control sockets are for root: run this as root)"
    );
}
