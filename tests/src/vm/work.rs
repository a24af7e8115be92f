//! The folder of one virtual machine: what goes in, and what it says on its console.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::error::{Doing as _, Result};
use crate::{cache, cgroup};

/// How many consoles of machines that failed are kept.
const CONSOLES: usize = 10;

/// A folder that goes with this value. One whose process was killed is removed by the next.
#[derive(Debug)]
pub(super) struct Work(PathBuf);

impl Work {
    pub(super) fn make() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let all = cache::folder()?.join("vms");
        sweep(&all);
        let name = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let work = Self(all.join(name));
        fs::create_dir_all(work.input()).doing(|| format!("making {}", work.0.display()))?;
        Ok(work)
    }

    pub(super) fn folder(&self) -> &Path {
        &self.0
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The folder whose contents the guest gets to read.
    pub(super) fn input(&self) -> PathBuf {
        self.0.join("input")
    }

    /// Adds a file to what the guest gets to read.
    pub(super) fn add(&self, file: &Path, name: &Path) -> Result<()> {
        let to = self.input().join(name);
        let doing = || format!("copying {} to {}", file.display(), to.display());
        fs::create_dir_all(to.parent().unwrap_or(&self.0)).doing(doing)?;
        // A second name costs nothing, but exists on the same file system only.
        fs::hard_link(file, &to).or_else(|_| fs::copy(file, &to).map(drop)).doing(doing)
    }

    /// Moves the console's output to where it stays; gives back its path and its last lines.
    pub(super) fn keep_console(&self) -> (PathBuf, String) {
        let from = self.path("console.log");
        let text = String::from_utf8_lossy(&fs::read(&from).unwrap_or_default()).into_owned();
        let tail = tail(&text);
        let kept = self.0.parent().and_then(Path::parent).unwrap_or(&self.0).join("vm-consoles");
        let name = self.0.file_name().unwrap_or_default().to_string_lossy();
        let to = kept.join(format!("{name}.log"));
        // Best effort: the tail is in the message in any case.
        let _ = fs::create_dir_all(&kept).and_then(|()| fs::rename(&from, &to));
        forget_old(&kept);
        (to, tail)
    }
}

/// The last lines that tell something: a panic's call trace only pushes them out of sight.
fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().take_while(|line| !line.contains("Call Trace:")).collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

impl Drop for Work {
    fn drop(&mut self) {
        // Best effort; the next one removes what is left.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Removes the folders of processes that are gone.
fn sweep(all: &Path) {
    for entry in fs::read_dir(all).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.split_once('-')?.0.parse().ok());
        if owner.is_some_and(|pid| !cgroup::alive(pid)) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Keeps the newest consoles alone.
fn forget_old(kept: &Path) {
    let mut consoles: Vec<_> = fs::read_dir(kept)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    consoles.sort();
    for (_, path) in consoles.iter().rev().skip(CONSOLES) {
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_of_a_console_shows_why_it_panicked_and_not_where() {
        let text = "booting\n[1.0] Kernel panic - not syncing\n[1.0] Call Trace:\n[1.0]  do_exit\n";
        assert_eq!(tail(text), "booting\n[1.0] Kernel panic - not syncing");
        assert_eq!(tail(&"line\n".repeat(50)).lines().count(), 20);
        assert_eq!(tail(""), "");
    }
}
