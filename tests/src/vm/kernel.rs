//! Kernels for virtual machines: Debian's cloud kernels as they are packaged. What it takes to mount a root disk and to
//! report (NVMe, ext4, virtio-serial) is built into them, so that none needs an initial RAM disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::error::{Doing as _, Result, VmError};
use super::{disk, guest};
use crate::cache::{self, Lock};
use crate::debian::Apt;
use crate::rootfs;

/// Bumped when the way of preparing kernels changes.
const FORMAT: &str = "2";

/// The package that names a release's newest kernel.
const META: &str = "linux-image-cloud-amd64";

/// Writes the index of modules, by the node's own depmod. In a mount namespace, which ends with the command.
const DEPMOD: &str = r#"set -eu
rootfs=$1 modules=$2 version=$3
mount -t tmpfs tmpfs "$rootfs/tmp"
mkdir -p "$rootfs/tmp/base/lib/modules"
mount --bind "$modules" "$rootfs/tmp/base/lib/modules"
exec chroot "$rootfs" depmod -b /tmp/base "$version"
"#;

/// A kernel that is ready to boot.
#[derive(Debug, Clone)]
pub(super) struct Kernel {
    /// The kernel itself.
    pub(super) image: PathBuf,
    /// A disk with its modules, to be mounted at `/usr/lib/modules`.
    pub(super) modules: PathBuf,
}

/// The newest kernel of a Debian release as it was when it was first asked for; fetched then, in some seconds.
pub(super) fn ensure(release: &str) -> Result<Kernel> {
    let failed = |why: String| VmError::Kernel { release: release.into(), why };
    if release.is_empty() || !release.bytes().all(|byte| byte.is_ascii_lowercase()) {
        return Err(failed("this is no name of a release".into()));
    }
    let folder = cache::folder()?;
    let name = format!("vm-kernel-{release}-{}", cache::key([FORMAT.as_bytes(), META.as_bytes()]));
    let done = folder.join(&name);
    let kernel = Kernel { image: done.join("vmlinuz"), modules: done.join("modules.ext4") };
    if done.exists() {
        return Ok(kernel);
    }
    let rootfs = rootfs::ensure()?;
    let _lock = Lock::take(&folder, &name)?;
    if done.exists() {
        return Ok(kernel);
    }
    eprintln!("Fetching the kernel of Debian {release} for virtual nodes (once) …");
    let partial = folder.join(format!("{name}.partial"));
    // What a killed process left.
    let _ = fs::remove_dir_all(&partial);
    fs::create_dir_all(&partial).doing(|| format!("making {}", partial.display()))?;

    let apt = Apt::new(release, &rootfs, folder.join(format!("{name}.apt"))).map_err(failed)?;
    let (version, packages) = packages(&apt).map_err(failed)?;
    let tree = apt.unpack(&packages).map_err(failed)?;
    let modules = ["usr/lib/modules", "lib/modules"].map(|path| tree.join(path));
    let modules = modules.iter().find(|path| path.join(&version).exists());
    let modules = modules.ok_or_else(|| failed(format!("{packages:?} have no modules")))?;
    let images = [modules.join(&version).join("vmlinuz"), tree.join(format!("boot/vmlinuz-{version}"))];
    let image = images.iter().find(|path| path.exists());
    let image = image.ok_or_else(|| failed(format!("{packages:?} have no kernel")))?;
    fs::rename(image, partial.join("vmlinuz")).doing(|| format!("moving {}", image.display()))?;
    index(&rootfs, modules, &version).map_err(failed)?;
    disk::of_folder(modules, &partial.join("modules.ext4"), guest::MODULES_LABEL)?;
    // The rename is what makes it complete.
    fs::rename(&partial, &done).doing(|| format!("renaming {}", partial.display()))?;
    Ok(kernel)
}

/// The kernel's version, and the packages that hold it: one until Debian 13, several from then on.
fn packages(apt: &Apt) -> std::result::Result<(String, Vec<String>), String> {
    let of_meta = apt.depends(META)?;
    let image = of_meta.iter().find(|name| name.starts_with("linux-image-"));
    let image = image.ok_or_else(|| format!("{META} depends on no kernel, but on {of_meta:?}"))?;
    let version = image.trim_start_matches("linux-image-").to_owned();
    let mut packages = vec![image.clone()];
    packages.extend(apt.depends(image)?.into_iter().filter(|name| name.ends_with(&version)));
    Ok((version, packages))
}

fn index(rootfs: &Path, modules: &Path, version: &str) -> std::result::Result<(), String> {
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", DEPMOD, "depmod"])
        .args([rootfs, modules])
        .arg(version)
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .output();
    let output = output.map_err(|error| format!("unshare: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("depmod failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim()))
}
