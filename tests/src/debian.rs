//! Packages of other Debian releases than the machine's own, with an apt of their own: nothing is installed, and the
//! machine's lists and caches stay as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::rootfs;

/// apt for one release. All that it writes is below one folder, which is removed with it.
#[derive(Debug)]
pub(crate) struct Apt {
    work: PathBuf,
}

impl Apt {
    /// Fetches the lists of a release into `work`, whose former contents go. The keys come from the node's `rootfs`.
    ///
    /// # Errors
    /// What failed, in words.
    pub(crate) fn new(release: &str, rootfs: &Path, work: PathBuf) -> Result<Self, String> {
        // What a killed process left.
        let _ = fs::remove_dir_all(&work);
        let apt = Self { work };
        let mirror = rootfs::mirror().map_err(|error| error.to_string())?;
        for part in ["state/lists/partial", "cache/archives/partial", "tree"] {
            fs::create_dir_all(apt.work.join(part)).map_err(|error| error.to_string())?;
        }
        // The node's keys are newer than the host's may be.
        let keys = ["debian-archive-keyring.pgp", "debian-archive-keyring.gpg"]
            .map(|name| rootfs.join("usr/share/keyrings").join(name));
        let keys = keys.iter().find(|path| path.exists()).ok_or("the node has no archive keys")?;
        let line = format!("deb [signed-by={}] {mirror} {release} main\n", keys.display());
        fs::write(apt.work.join("sources.list"), line).map_err(|error| error.to_string())?;
        fs::write(apt.work.join("status"), "").map_err(|error| error.to_string())?;
        run(apt.command("apt-get").arg("update"))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.work).args(["-qq", "-o", "Dir::Etc::sourceparts=-"]);
        command.args(["-o", "APT::Sandbox::User=root", "-o", "Acquire::Check-Valid-Until=false"]);
        command.args(["-o", "Acquire::Languages=none"]);
        for (name, path) in [
            ("Dir::Etc::sourcelist", "sources.list"),
            ("Dir::State", "state"),
            ("Dir::State::status", "status"),
            ("Dir::Cache", "cache"),
        ] {
            command.args(["-o", &format!("{name}={}", self.work.join(path).display())]);
        }
        command
    }

    /// The packages that a package depends on, by name, in the order of its description.
    ///
    /// # Errors
    /// When there is no such package.
    pub(crate) fn depends(&self, package: &str) -> Result<Vec<String>, String> {
        let shown = run(self.command("apt-cache").args(["show", "--no-all-versions", package]))?;
        Ok(parse_depends(&shown))
    }

    /// Downloads packages and unpacks them into one tree, whose path is given back. No script of theirs runs.
    ///
    /// # Errors
    /// What failed, in words.
    pub(crate) fn unpack(&self, packages: &[impl AsRef<str>]) -> Result<PathBuf, String> {
        run(self.command("apt-get").arg("download").args(packages.iter().map(AsRef::as_ref)))?;
        let tree = self.work.join("tree");
        for entry in fs::read_dir(&self.work).map_err(|error| error.to_string())?.flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|end| end == "deb") {
                run(Command::new("dpkg-deb").arg("-x").args([&path, &tree]))?;
            }
        }
        Ok(tree)
    }
}

impl Drop for Apt {
    fn drop(&mut self) {
        // Best effort; the next one removes what is left.
        let _ = fs::remove_dir_all(&self.work);
    }
}

/// The names in the field `Depends` of a package's description; of alternatives the first.
fn parse_depends(description: &str) -> Vec<String> {
    let Some(field) = description.lines().find_map(|line| line.strip_prefix("Depends:")) else {
        return Vec::new();
    };
    field.split(',').filter_map(|word| Some(word.split_whitespace().next()?.to_owned())).collect()
}

fn run(command: &mut Command) -> Result<String, String> {
    let shown = command.get_program().to_string_lossy().into_owned();
    let Output { status, stdout, stderr } = command.output().map_err(|error| format!("{shown}: {error}"))?;
    if status.success() {
        return Ok(String::from_utf8_lossy(&stdout).into_owned());
    }
    Err(format!("{shown} failed ({status}): {}", String::from_utf8_lossy(&stderr).trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_by_name_alone() {
        let text =
            "Package: linux-image\nDepends: kmod (>= 2), linux-image-7.2-cloud (= 7.2-1), a | b\nSize: 1\n";
        assert_eq!(parse_depends(text), ["kmod", "linux-image-7.2-cloud", "a"]);
        assert_eq!(parse_depends("Package: x\n"), [""; 0]);
    }
}
