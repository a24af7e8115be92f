#![allow(clippy::unwrap_used)]

use super::*;

fn cgroup() -> Option<Cgroup> {
    Cgroup::of_pid(rustix::process::getpid()).ok()
}

/// Derives from `json`; skipped where no cgroup v2 tree is mounted.
fn derive(json: &str) -> Option<Result<Container, Error>> {
    let Some(cgroup) = cgroup() else {
        eprintln!("skipped: no cgroup v2 tree is mounted here");
        return None;
    };
    let spec: Spec = serde_json::from_str(json).unwrap();
    Some(Container::from_spec("c1", Path::new("/run/bundle"), &spec, "d".to_owned(), cgroup))
}

fn spec(mounts: &str, namespaces: &str) -> String {
    format!(
        r#"{{"ociVersion": "1.0.2", "root": {{"path": "rootfs"}},
            "annotations": {{"org.criu.config": "/tmp/evil.conf"}},
            "process": {{"terminal": true, "user": {{"uid": 0, "gid": 0}}, "args": ["x"], "cwd": "/"}},
            "mounts": [{mounts}],
            "linux": {{"maskedPaths": ["/proc/kcore"], "namespaces": [{namespaces}]}}}}"#
    )
}

const USUAL: &str = r#"{"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "cgroup"},
    {"type": "network", "path": "/proc/7/ns/net"}, {"type": "ipc", "path": ""}"#;

#[test]
fn a_usual_container_is_derived() {
    let mounts = r#"{"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/etc/hosts", "type": "bind", "source": "/var/lib/hosts", "options": ["rbind", "ro"]},
        {"destination": "data/", "source": "volume", "options": ["bind"]}"#;
    let Some(container) = derive(&spec(mounts, USUAL)) else {
        return;
    };
    let container = container.unwrap();
    assert_eq!(container.rootfs, Path::new("/run/bundle/rootfs"));
    assert!(container.has_terminal);
    let external =
        |target: &str, source: &str| ExternalMount { target: target.into(), source: source.into() };
    assert_eq!(
        container.external_mounts,
        [external("/etc/hosts", "/var/lib/hosts"), external("/data", "/run/bundle/volume")]
    );
    assert_eq!(container.namespaces.network, Namespace::Joined("/proc/7/ns/net".into()));
    assert_eq!(container.namespaces.ipc, Namespace::Private);
    let sources = container.mount_sources();
    assert!(sources.contains(&("/data".to_owned(), "/run/bundle/volume".to_owned())));
    assert!(sources.contains(&("masked".to_owned(), "/dev/null".to_owned())));
    assert!(!format!("{container:?}").contains("evil"));
}

#[test]
fn of_two_mounts_with_one_target_the_last_decides() {
    let mounts = r#"{"destination": "/a", "source": "/first", "options": ["rbind"]},
        {"destination": "/a/", "source": "/second", "options": ["rbind"]},
        {"destination": "/b", "source": "/hidden", "options": ["rbind"]},
        {"destination": "/b", "type": "tmpfs", "source": "tmpfs"}"#;
    let Some(container) = derive(&spec(mounts, USUAL)) else {
        return;
    };
    let external = container.unwrap().external_mounts;
    assert_eq!(external, [ExternalMount { target: "/a".into(), source: "/second".into() }]);
}

#[test]
fn containers_that_cannot_be_checkpointed_are_told_apart() {
    let cases = [
        (r#"{"type": "mount"}"#, "process ids"),
        (r#"{"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "mount"}"#, "process ids"),
        (r#"{"type": "pid"}"#, "mount namespace"),
        (r#"{"type": "pid"}, {"type": "mount"}, {"type": "user"}"#, "user namespace"),
    ];
    for (namespaces, words) in cases {
        let Some(derived) = derive(&spec("", namespaces)) else {
            return;
        };
        let error = derived.unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[test]
fn a_missing_or_broken_specification_is_named() {
    let Some(cgroup) = cgroup() else { return };
    let bundle = tempfile::tempdir().unwrap();
    let load = || Container::load("c1", bundle.path(), cgroup.clone()).unwrap_err();
    assert!(matches!(load(), Error::Read { path, .. } if path.ends_with("config.json")));
    std::fs::write(bundle.path().join("config.json"), "{").unwrap();
    assert!(matches!(load(), Error::Invalid { .. }));
}

fn mount(id: u64, device: &str, root: &str, mount_point: &str, fs_type: &str) -> procfs::Mount {
    procfs::Mount {
        id,
        parent: 1,
        device: device.to_owned(),
        root: root.into(),
        mount_point: mount_point.into(),
        fs_type: fs_type.to_owned(),
        unbindable: false,
    }
}

#[test]
fn only_mounts_that_cannot_be_remade_block() {
    let mounts = [
        mount(1, "0:40", "/", "/", "overlay"),
        mount(2, "0:41", "/", "/proc", "proc"),
        mount(3, "0:41", "/sys", "/proc/sys", "proc"),
        mount(4, "8:1", "/var/lib/volume", "/data", "ext4"),
        mount(5, "8:1", "/var/lib/volume/sub", "/view", "ext4"),
        mount(6, "8:2", "/", "/data/disk", "xfs"),
        mount(7, "8:1", "/var/lib/other", "/other", "ext4"),
        mount(8, "0:40", "/usr", "/copy", "overlay"),
    ];
    let blockers = foreign_mounts(&mounts, &["/data".to_owned()]);
    let points: Vec<_> = blockers
        .iter()
        .map(|blocker| match blocker {
            Blocker::ForeignMount { mount_point, .. } => mount_point.to_str().unwrap(),
            other => panic!("{other}"),
        })
        .collect();
    assert_eq!(points, ["/data/disk", "/other"]);
}

#[test]
fn a_child_descends_from_this_process_and_this_process_not_from_it() {
    let mut child = std::process::Command::new("sleep").arg("10").spawn().unwrap();
    let (pid, me) = (Pid::from_child(&child), rustix::process::getpid());
    assert_eq!(exec_name(pid, me).unwrap(), None);
    assert!(exec_name(me, pid).unwrap().is_some());
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn mounts_are_found_by_their_root() {
    let root = Root::of(rustix::process::getpid()).unwrap();
    assert!(root.mount_at(Path::new("/proc")).unwrap().is_some());
    assert!(root.mount_at(Path::new("/proc/self")).unwrap().is_none());
    assert!(root.mount_at(Path::new("/nonexistent")).unwrap().is_none());
}

proptest::proptest! {
    #[test]
    fn no_specification_makes_it_panic(bytes: Vec<u8>) {
        let (Some(cgroup), bundle) = (cgroup(), tempfile::tempdir().unwrap()) else { return Ok(()) };
        std::fs::write(bundle.path().join("config.json"), &bytes).unwrap();
        let refused = matches!(Container::load("c1", bundle.path(), cgroup), Err(Error::Invalid { .. }));
        proptest::prop_assert!(refused);
    }

    /// A byte of it changed: a container that is derived keeps its root below what the bundle says, or an error.
    #[test]
    fn a_specification_with_a_byte_changed_is_derived_or_refused(at: proptest::sample::Index, byte: u8) {
        let (Some(cgroup), bundle) = (cgroup(), tempfile::tempdir().unwrap()) else { return Ok(()) };
        let mounts = r#"{"destination": "/etc/hosts", "type": "bind", "source": "/h", "options": ["rbind"]}"#;
        let mut bytes = spec(mounts, USUAL).into_bytes();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        std::fs::write(bundle.path().join("config.json"), &bytes).unwrap();
        if let Ok(container) = Container::load("c1", bundle.path(), cgroup) {
            proptest::prop_assert_eq!(container.spec_digest, image::digest(&bytes));
        }
    }
}
