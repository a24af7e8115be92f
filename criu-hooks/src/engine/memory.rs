//! Mounts of file systems that live in the kernel, not in a process: tmpfs, sysfs, mqueue, cgroup2.
//!
//! CRIU packs up the contents of each tmpfs with tar, and makes each of these mounts anew; both take longer than all the
//! rest of a small dump. Instead the container's old mount namespace is kept while it sleeps, and each of these mounts is
//! shown to the restored container once more. What a tmpfs holds then stays in memory, so there is a limit to it.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, FileType, StatFs, StatxFlags},
    mount::{OpenTreeFlags, UnmountFlags, open_tree, unmount},
    process::Pid,
    thread::LinkNameSpaceType,
};

use super::namespaces;
use crate::{
    container::Root,
    image::OutsideMount,
    procfs::{self, Mount},
};

/// File systems whose mounts can be shown again while the file system lives on.
const KINDS: [&str; 4] = ["tmpfs", "sysfs", "mqueue", "cgroup2"];

/// The memory of a file in a tmpfs beside its contents, about.
const INODE_BYTES: u64 = 1024;

/// What becomes of the mounts of memory file systems in a dump.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// They live on, in this order.
    pub(super) kept: Vec<OutsideMount>,
    /// CRIU dumps them because they hold too much.
    pub(super) dumped: Vec<OutsideMount>,
    /// What those that live on hold.
    pub(super) bytes: u64,
}

/// The name under which CRIU knows the mount at this place in the list.
pub(super) fn name(at: usize) -> String {
    format!("memory-{at}")
}

impl Memory {
    /// Looks at the mounts of `init`, which stands still. `external` are the mount points that the specification's
    /// volumes have. At most `limit` bytes are to live on.
    pub(super) fn survey(init: Pid, external: &HashSet<String>, limit: u64) -> io::Result<Memory> {
        let mounts = procfs::mounts(init)?;
        let root = Root::of(init)?;
        let mut candidates = candidates(&mounts, external);
        let mut bytes = BTreeMap::new();
        let mut unfit: HashSet<&str> = HashSet::new();
        for mount in &candidates {
            // One that is hidden under another cannot be reached.
            let held = match root.mount_and_usage(&mount.mount_point)? {
                Some((id, usage)) if id == mount.id => held_bytes(&mount.fs_type, &usage),
                _ => None,
            };
            match held {
                Some(held) => drop(bytes.insert(mount.device.as_str(), held)),
                None => drop(unfit.insert(mount.device.as_str())),
            }
        }
        candidates.retain(|mount| !unfit.contains(mount.device.as_str()));
        bytes.retain(|device, _| !unfit.contains(device));
        let large = over_limit(&bytes, limit);
        let outside = |mount: &&Mount| OutsideMount {
            id: mount.id,
            mount_point: mount.mount_point.to_string_lossy().into_owned(),
        };
        let (dumped, kept): (Vec<&Mount>, Vec<&Mount>) =
            candidates.into_iter().partition(|mount| large.contains(mount.device.as_str()));
        Ok(Memory {
            kept: kept.iter().map(outside).collect(),
            dumped: dumped.iter().map(outside).collect(),
            bytes: bytes.iter().filter(|(device, _)| !large.contains(*device)).map(|(_, bytes)| bytes).sum(),
        })
    }
}

impl Memory {
    /// The mount points of what was dumped. With a mount goes what is mounted below it, so nothing that lives on may be.
    fn freeable(&self) -> Vec<&str> {
        let holds =
            |point: &str| self.kept.iter().any(|kept| Path::new(&kept.mount_point).starts_with(point));
        self.dumped.iter().map(|mount| mount.mount_point.as_str()).filter(|point| !holds(point)).collect()
    }
}

/// The mounts that may live on. Left to CRIU is whatever it could mistake: two mounts at one place; a file system that is
/// also the root's or a volume's; one of which a directory was deleted after it was bound elsewhere.
fn candidates<'a>(mounts: &'a [Mount], external: &HashSet<String>) -> Vec<&'a Mount> {
    let is_external =
        |mount: &Mount| mount.mount_point.to_str().is_some_and(|point| external.contains(point));
    let is_odd = |mount: &Mount| {
        let point = &mount.mount_point;
        let twice = mounts.iter().filter(|other| other.mount_point == *point).count() > 1;
        twice
            || mount.unbindable
            // CRIU is told of a mount as `mnt[POINT]:NAME`, and takes the first end that it finds.
            || point.to_str().is_none_or(|point| point.contains("]:"))
            || point.as_os_str() == "/"
            || is_external(mount)
            || mount.root.to_string_lossy().ends_with("//deleted")
    };
    let is_candidate = |mount: &&Mount| KINDS.contains(&mount.fs_type.as_str());
    // The host's one cgroup file system and one sysfs may well be a volume, too.
    let odd: HashSet<&str> = mounts
        .iter()
        .filter(|mount| {
            is_odd(mount) && (mount.fs_type == "tmpfs" || !KINDS.contains(&mount.fs_type.as_str()))
        })
        .map(|mount| mount.device.as_str())
        .collect();
    let fit = |mount: &&Mount| !odd.contains(mount.device.as_str()) && !is_odd(mount);
    mounts.iter().filter(is_candidate).filter(fit).collect()
}

/// The memory that a file system holds; `None` when it does not tell, as a tmpfs without a limit.
fn held_bytes(fs_type: &str, usage: &StatFs) -> Option<u64> {
    if fs_type != "tmpfs" {
        return Some(0);
    }
    if usage.f_blocks == 0 {
        return None;
    }
    let block = u64::try_from(usage.f_bsize).ok()?;
    let pages = usage.f_blocks.saturating_sub(usage.f_bfree).saturating_mul(block);
    let files = usage.f_files.saturating_sub(usage.f_ffree).saturating_mul(INODE_BYTES);
    Some(pages.saturating_add(files))
}

/// The devices that hold too much: the largest first, until the rest is within the limit.
fn over_limit<'a>(bytes: &BTreeMap<&'a str, u64>, limit: u64) -> HashSet<&'a str> {
    let mut sum = bytes.values().fold(0u64, |sum, bytes| sum.saturating_add(*bytes));
    let mut by_size: Vec<(&str, u64)> = bytes.iter().map(|(device, bytes)| (*device, *bytes)).collect();
    by_size.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    let mut over = HashSet::new();
    for (device, bytes) in by_size {
        if sum <= limit {
            break;
        }
        sum = sum.saturating_sub(bytes);
        over.insert(device);
    }
    over
}

/// A mount that was taken out of a namespace, and belongs to none.
#[derive(Debug)]
pub(super) struct Detached {
    pub(super) mount: OwnedFd,
    pub(super) is_directory: bool,
}

/// Copies of the mounts `wanted` of the mount namespace `kept`, in which no process is left.
pub(super) fn copies(kept: BorrowedFd<'_>, wanted: &[OutsideMount]) -> io::Result<Vec<Detached>> {
    namespaces::inside(kept, LinkNameSpaceType::Mount, || wanted.iter().map(copy).collect())
}

fn copy(wanted: &OutsideMount) -> io::Result<Detached> {
    let point = wanted.mount_point.as_str();
    let fail = |error: rustix::io::Errno| {
        let error = io::Error::from(error);
        io::Error::new(error.kind(), format!("{point}: {error}"))
    };
    let found =
        rustix::fs::statx(CWD, point, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE | StatxFlags::MNT_ID);
    let found = found.map_err(fail)?;
    if found.stx_mnt_id != wanted.id {
        return Err(io::Error::other(format!("{point} is no longer the mount that it was")));
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount = open_tree(CWD, point, flags | OpenTreeFlags::AT_SYMLINK_NOFOLLOW).map_err(fail)?;
    let is_directory = FileType::from_raw_mode(found.stx_mode.into()) == FileType::Directory;
    Ok(Detached { mount, is_directory })
}

/// Unmounts in the namespace `namespace` what CRIU has dumped, so that its memory is free.
pub(super) fn let_go(namespace: BorrowedFd<'_>, memory: &Memory) -> io::Result<()> {
    let free = memory.freeable();
    if free.is_empty() {
        return Ok(());
    }
    namespaces::inside(namespace, LinkNameSpaceType::Mount, || {
        // The later a mount, the nearer it is to the top.
        for point in free.iter().rev() {
            unmount(*point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
        }
        Ok(())
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn points(mountinfo: &str, external: &[&str]) -> Vec<String> {
        let mounts = procfs::parse_mountinfo(mountinfo.as_bytes());
        let external = external.iter().map(|point| (*point).to_owned()).collect();
        let found = candidates(&mounts, &external);
        found.iter().map(|mount| mount.mount_point.to_string_lossy().into_owned()).collect()
    }

    const USUAL: &str = "\
        500 400 0:60 / / rw - overlay overlay rw\n\
        501 500 0:61 / /proc rw - proc proc rw\n\
        502 500 0:62 / /dev rw - tmpfs tmpfs rw\n\
        503 502 0:63 / /dev/pts rw - devpts devpts rw\n\
        504 502 0:64 / /dev/shm rw - tmpfs shm rw\n\
        505 502 0:58 / /dev/mqueue rw - mqueue mqueue rw\n\
        506 500 0:65 / /sys ro - sysfs sysfs ro\n\
        507 506 0:28 /pod/a /sys/fs/cgroup ro - cgroup2 cgroup rw\n\
        508 501 0:62 /null /proc/kcore rw - tmpfs tmpfs rw\n\
        509 501 0:66 / /proc/acpi ro - tmpfs tmpfs ro\n\
        510 500 0:20 /pods/7/hosts /etc/hosts rw - tmpfs tmpfs rw\n";

    #[test]
    fn a_usual_container_keeps_all_its_memory_file_systems() {
        let expected =
            ["/dev", "/dev/shm", "/dev/mqueue", "/sys", "/sys/fs/cgroup", "/proc/kcore", "/proc/acpi"];
        assert_eq!(points(USUAL, &["/etc/hosts"]), expected);
    }

    #[test]
    fn another_view_of_a_volume_s_file_system_is_left_to_criu() {
        let more = format!("{USUAL}511 500 0:20 /pods/7/sub /mnt rw - tmpfs tmpfs rw\n");
        assert!(!points(&more, &["/etc/hosts"]).contains(&"/mnt".to_owned()));
    }

    #[test]
    fn a_cgroup_volume_does_not_keep_the_container_s_own_from_it() {
        let more = format!("{USUAL}511 500 0:28 / /host-cgroup rw - cgroup2 cgroup rw\n");
        let found = points(&more, &["/etc/hosts", "/host-cgroup"]);
        assert!(found.contains(&"/sys/fs/cgroup".to_owned()) && !found.contains(&"/host-cgroup".to_owned()));
    }

    #[test]
    fn what_criu_could_mistake_is_left_to_it() {
        for (line, gone) in [
            ("511 504 0:70 / /dev/shm rw - tmpfs tmpfs rw\n", "/dev/shm"),
            ("511 500 0:64 /x//deleted /mnt rw - tmpfs shm rw\n", "/dev/shm"),
            ("511 500 0:64 /x /mnt rw unbindable - tmpfs shm rw\n", "/dev/shm"),
            ("511 500 0:70 / /a\\377 rw - tmpfs tmpfs rw\n", "/a\u{fffd}"),
            ("511 500 0:70 / /dev/shm]:x rw - tmpfs tmpfs rw\n", "/dev/shm]:x"),
        ] {
            let found = points(&format!("{USUAL}{line}"), &["/etc/hosts"]);
            assert!(!found.contains(&gone.to_owned()), "{line}: {found:?}");
            assert!(found.contains(&"/dev".to_owned()), "{line}: {found:?}");
        }
    }

    #[test]
    fn a_root_in_memory_is_not_one_of_them() {
        let found =
            points("500 400 0:60 / / rw - tmpfs tmpfs rw\n501 500 0:60 /a /b rw - tmpfs tmpfs rw\n", &[]);
        assert_eq!(found, Vec::<String>::new());
    }

    #[test]
    fn the_largest_go_until_the_rest_is_within_the_limit() {
        let bytes = BTreeMap::from([("a", 10), ("b", 30), ("c", 20)]);
        let over = |limit| {
            let mut over: Vec<_> = over_limit(&bytes, limit).into_iter().collect();
            over.sort_unstable();
            over
        };
        assert_eq!(over(60), Vec::<&str>::new());
        assert_eq!(over(59), ["b"]);
        assert_eq!(over(30), ["b"]);
        assert_eq!(over(29), ["b", "c"]);
        assert_eq!(over(0), ["a", "b", "c"]);
    }

    #[test]
    fn what_lives_on_is_not_unmounted_with_what_is_above_it() {
        let mount = |id, point: &str| OutsideMount { id, mount_point: point.to_owned() };
        let memory = Memory {
            kept: vec![mount(1, "/dev/shm")],
            dumped: vec![mount(2, "/dev"), mount(3, "/dev/sh"), mount(4, "/data")],
            bytes: 0,
        };
        assert_eq!(memory.freeable(), ["/dev/sh", "/data"]);
    }

    proptest::proptest! {
        #[test]
        fn what_stays_is_within_the_limit(sizes in proptest::collection::vec(0u64..1000, 0..8), limit in 0u64..4000) {
            let names: Vec<String> = (0..sizes.len()).map(|at| at.to_string()).collect();
            let bytes: BTreeMap<&str, u64> = names.iter().map(String::as_str).zip(sizes).collect();
            let over = over_limit(&bytes, limit);
            let rest: u64 = bytes.iter().filter(|(name, _)| !over.contains(*name)).map(|(_, bytes)| bytes).sum();
            proptest::prop_assert!(rest <= limit);
        }
    }
}
