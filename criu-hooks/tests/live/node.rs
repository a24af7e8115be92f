//! A node for one test: its own root file system, mounts, process ids, network and cgroups. All of it ends with the test.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

/// Set in the process that runs inside a node.
const INSIDE: &str = "AGENTCUBE_TEST_INSIDE";

/// A Debian root file system with runc, CRIU and busybox; not modified.
const ROOTFS: &str = "AGENTCUBE_TEST_ROOTFS";

/// Runs as the first process of new namespaces: makes the node and becomes the test.
const SETUP: &str = r#"set -eu
rootfs=$1 work=$2 binary=$3 test=$4
mount --make-rprivate /
mount -t tmpfs tmpfs "$work"
mkdir "$work/upper" "$work/work" "$work/root"
mount -t overlay overlay -o "lowerdir=$rootfs,upperdir=$work/upper,workdir=$work/work" "$work/root"
cd "$work/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /dev dev
mount -t cgroup2 cgroup2 sys/fs/cgroup
mkdir sys/fs/cgroup/node
echo $$ > sys/fs/cgroup/node/cgroup.procs
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs tmpfs tmp
ip link set lo up
touch run/test-binary
mount --bind "$binary" run/test-binary
mkdir run/rootfs
mount --bind "$rootfs" run/rootfs
mount -o remount,bind,ro run/rootfs
mkdir run/old
bin/busybox pivot_root . run/old
umount -l /run/old
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
exec /run/test-binary --exact "$test" --nocapture --test-threads 1
"#;

/// Runs `body` inside a node of its own, as its first process. Where that is not possible it says why and passes.
pub fn in_node(test: &str, body: impl AsyncFnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(body());
        return;
    }
    match launch(test) {
        Ok(success) => assert!(success, "{test} failed inside its node, see above"),
        Err(why) => eprintln!("skipped: {test}: {why}"),
    }
}

/// Tells the nodes of one process apart.
static NUMBER: AtomicU32 = AtomicU32::new(0);

fn launch(test: &str) -> Result<bool, String> {
    if !rustix::process::geteuid().is_root() {
        return Err("it needs root".to_owned());
    }
    let rootfs = std::env::var_os(ROOTFS).map(PathBuf::from);
    let rootfs = rootfs.ok_or(format!("{ROOTFS} does not name a root file system with runc and CRIU"))?;
    for program in ["usr/sbin/criu", "usr/sbin/runc", "bin/busybox"] {
        if fs::symlink_metadata(rootfs.join(program)).is_err() {
            return Err(format!("{} lacks {program}", rootfs.display()));
        }
    }
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let tree = unified_tree().ok_or("no cgroup v2 file system is mounted")?;
    let cgroup = tree.join(format!("agentcube-engine-test-{}-{number}", std::process::id()));
    fs::create_dir(&cgroup).map_err(|error| format!("cannot make {}: {error}", cgroup.display()))?;
    let work = tempfile::tempdir().map_err(|error| error.to_string())?;
    let binary = std::env::current_exe().map_err(|error| error.to_string())?;

    let status = Command::new("/bin/sh")
        .args(["-c", "echo $$ > \"$0/cgroup.procs\" && exec \"$@\""])
        .arg(&cgroup)
        .args([
            "unshare",
            "--cgroup",
            "--mount",
            "--pid",
            "--net",
            "--ipc",
            "--uts",
            "--fork",
            "--kill-child",
        ])
        .args(["sh", "-c", SETUP, "setup"])
        .args([&rootfs, work.path(), &binary])
        .arg(test)
        .env(INSIDE, "1")
        .status();
    remove_cgroup(&cgroup);
    Ok(status.map_err(|error| error.to_string())?.success())
}

fn unified_tree() -> Option<PathBuf> {
    let mounts = fs::read("/proc/self/mountinfo").ok()?;
    let mounts = criu_hooks::procfs::parse_mountinfo(&mounts);
    mounts.into_iter().find(|mount| mount.fs_type == "cgroup2").map(|mount| mount.mount_point)
}

fn remove_cgroup(path: &Path) {
    for _ in 0..100 {
        let mut below: Vec<PathBuf> = vec![path.to_owned()];
        let mut at = 0;
        while let Some(directory) = below.get(at).cloned() {
            let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
            below.extend(entries.filter(|entry| entry.path().is_dir()).map(|entry| entry.path()));
            at += 1;
        }
        let removed = below.iter().rev().all(|directory| fs::remove_dir(directory).is_ok());
        if removed || !path.exists() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    eprintln!("the cgroup {} could not be removed", path.display());
}
