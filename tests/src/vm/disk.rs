//! Disks as files: ext4 file systems made from folders, without mounting anything.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::error::{Doing as _, Result, VmError};
use crate::cache::{self, Lock};
use crate::rootfs;

/// Bumped when the way of making the root disk changes.
const FORMAT: &str = "2";

/// The bytes of the root disk. Only what is in use takes space, on the disk and in the guest's writes.
const ROOT_BYTES: u64 = 4 << 30;

/// What names the partition of the root disk to the kernel.
pub(super) const ROOT_PARTITION: &str = "41677443-01";

/// Where that partition begins.
const ROOT_OFFSET: u64 = 1 << 20;

/// The root disk: the node's root file system, unchanged. Made when it is not cached; nobody ever writes to it.
pub(super) fn root() -> Result<PathBuf> {
    let rootfs = rootfs::ensure()?;
    let folder = cache::folder()?;
    let name = format!("vm-root-{}", cache::key([FORMAT.as_bytes(), rootfs::key().as_bytes()]));
    let done = folder.join(format!("{name}.ext4"));
    if done.exists() {
        return Ok(done);
    }
    let _lock = Lock::take(&folder, &name)?;
    if !done.exists() {
        // Whoever holds the lock owns this name; what a killed process left there is overwritten.
        let partial = folder.join(format!("{name}.partial"));
        make(&rootfs, &partial, "root", ROOT_OFFSET, ROOT_BYTES)?;
        partition(&partial).doing(|| format!("partitioning {}", partial.display()))?;
        fs::rename(&partial, &done).doing(|| format!("renaming {}", partial.display()))?;
    }
    Ok(done)
}

/// Makes a disk that holds what is in `folder` and has about as much room again. The guest finds it by its label.
pub(super) fn of_folder(folder: &Path, disk: &Path, label: &str) -> Result<()> {
    let used = size(folder).doing(|| format!("measuring {}", folder.display()))?;
    make(folder, disk, label, 0, used * 2 + (64 << 20))
}

/// Writes a partition table with one entry. The kernel numbers disks in any order, and without an initial RAM disk it
/// finds its root by the name of a partition alone.
fn partition(disk: &Path) -> io::Result<()> {
    const SECTOR: usize = 512;
    const LINUX: u8 = 0x83;
    let sectors = |bytes: u64| u32::try_from(bytes / SECTOR as u64).map_err(io::Error::other);
    let mut table = [0; SECTOR];
    table[440..444].copy_from_slice(&0x4167_7443_u32.to_le_bytes());
    table[450] = LINUX;
    table[454..458].copy_from_slice(&sectors(ROOT_OFFSET)?.to_le_bytes());
    table[458..462].copy_from_slice(&sectors(ROOT_BYTES)?.to_le_bytes());
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    let disk = fs::File::options().write(true).open(disk)?;
    disk.write_all_at(&table, 0)?;
    disk.set_len(ROOT_OFFSET + ROOT_BYTES)
}

fn make(folder: &Path, disk: &Path, label: &str, offset: u64, bytes: u64) -> Result<()> {
    let _ = fs::remove_file(disk);
    let output = Command::new("mke2fs")
        // The disk is never written but by a guest whose writes are thrown away: it needs no journal and no reserve.
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal,^resize_inode", "-L", label])
        .args(["-E", &format!("offset={offset}"), "-d"])
        .args([folder, disk])
        .arg(format!("{}k", bytes >> 10))
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .output();
    let output = output.map_err(|_| VmError::NoProgram { program: "mke2fs", package: "e2fsprogs" })?;
    if output.status.success() {
        return Ok(());
    }
    let _ = fs::remove_file(disk);
    let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(VmError::Disk { program: "mke2fs", path: disk.into(), why })
}

/// The bytes of all files below a folder, rounded up to whole blocks.
fn size(folder: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        // Links are not followed.
        let meta = entry.metadata()?;
        sum += if meta.is_dir() { size(&entry.path())? } else { meta.size().next_multiple_of(4096) };
    }
    Ok(sum)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_holds_its_folder_and_has_room() {
        let work = tempfile::tempdir().unwrap();
        let folder = work.path().join("folder");
        fs::create_dir_all(folder.join("below")).unwrap();
        fs::write(folder.join("below/file"), vec![7; 5000]).unwrap();
        assert_eq!(size(&folder).unwrap(), 8192);
        let disk = work.path().join("disk");
        match of_folder(&folder, &disk, "test") {
            // Where unit tests run alone nothing is installed.
            Err(VmError::NoProgram { .. }) => crate::skipped("mke2fs is not installed"),
            made => {
                made.unwrap();
                assert!(fs::metadata(&disk).unwrap().len() >= 64 << 20);
            }
        }
        assert!(matches!(of_folder(&work.path().join("none"), &disk, "test"), Err(VmError::Io { .. })));
    }
}
