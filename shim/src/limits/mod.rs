//! Limits written straight to a cgroup v2 directory: how an update reaches an agent that sleeps.
//!
//! The OCI runtime refuses to update a container that has no processes, but the cgroup is there and a limit must hold
//! from the moment it is set. The values are those that runc would write; after the wake runc gets the update, too,
//! so that its own record is right. Each controller has a file that turns its part of an update into [`Setting`]s.

mod cpu;
pub mod high;
mod io;
mod memory;
#[cfg(test)]
mod tests;
mod undo;
mod unified;

use std::{
    fs,
    path::{Path, PathBuf},
};

use oci_spec::runtime::LinuxResources;

pub use self::undo::Before;

/// One file of a cgroup and what to write to it, line by line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The file's name.
    pub file: String,
    /// Its new contents.
    pub value: String,
}

/// Why limits could not be set.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// The kernel does not take a value.
    #[error("cannot write {value:?} to {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The value.
        value: String,
        /// Why.
        source: std::io::Error,
    },
    /// The node has no such controller.
    #[error("{path} does not exist: the node's cgroup v2 lacks the controller {controller}")]
    NoController {
        /// The file.
        path: PathBuf,
        /// The controller that would make it.
        controller: String,
    },
    /// A name that is no file of a cgroup.
    #[error("{0:?} is not the name of a cgroup file")]
    NoFile(String),
    /// A file that rules the agent's processes rather than their limits.
    #[error(
        "{0} is no limit: while the agent sleeps its cgroup is frozen, filled and emptied by its shim alone"
    )]
    NoLimit(String),
    /// The request contradicts itself.
    #[error("the memory and swap limit ({swap} bytes) is below the memory limit ({limit} bytes)")]
    SwapBelowMemory {
        /// Memory and swap together.
        swap: i64,
        /// Memory.
        limit: i64,
    },
}

/// What is in force in a cgroup.
#[derive(Debug, Clone, Copy)]
struct InForce<'a>(&'a Path);

impl InForce<'_> {
    /// The words of a file that has one line; none where it is missing.
    fn words(self, file: &str) -> Vec<String> {
        let text = fs::read_to_string(self.0.join(file)).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    }

    /// A word of such a file that is a number: `max` is none.
    fn number(self, file: &str, word: usize) -> Option<i64> {
        self.words(file).get(word)?.parse().ok()
    }
}

/// What `resources` asks of the cgroup `dir`, in the order in which it is to be written. An update that tells one part of
/// a limit alone keeps the other as it is in force.
///
/// # Errors
/// [`LimitError::SwapBelowMemory`], [`LimitError::NoFile`] and [`LimitError::NoLimit`].
pub fn settings(resources: &LinuxResources, dir: &Path) -> Result<Vec<Setting>, LimitError> {
    let (now, mut all) = (InForce(dir), Vec::new());
    // Zero is not set, for runc as well; less is no limit.
    if let Some(limit) = resources.pids().map(|pids| pids.limit()).filter(|limit| *limit != 0) {
        set(&mut all, "pids.max", max_or(limit));
    }
    if let Some(memory) = resources.memory() {
        memory::settings(memory, now, &mut all)?;
    }
    if let Some(block_io) = resources.block_io() {
        io::settings(block_io, now, &mut all);
    }
    if let Some(cpu) = resources.cpu() {
        cpu::settings(cpu, now, &mut all);
    }
    if let Some(unified) = resources.unified() {
        unified::settings(unified, &mut all)?;
    }
    Ok(all)
}

fn set(all: &mut Vec<Setting>, file: &str, value: impl Into<String>) {
    all.push(Setting { file: file.to_owned(), value: value.into() });
}

/// Less than zero means "no limit" in an OCI specification.
fn max_or(limit: i64) -> String {
    if limit > 0 { limit.to_string() } else { "max".to_owned() }
}

/// Writes `settings` to the cgroup `dir`: all of them or, on error, none.
///
/// # Errors
/// [`LimitError`], for the first that fails.
pub fn apply(dir: &Path, settings: &[Setting]) -> Result<(), LimitError> {
    let before = Before::read(dir, settings);
    let applied = settings.iter().try_for_each(|Setting { file, value }| {
        let path = dir.join(file);
        if !path.exists() {
            let controller = file.split('.').next().unwrap_or(file).to_owned();
            return Err(LimitError::NoController { path, controller });
        }
        write_lines(&path, value)
    });
    if applied.is_err() {
        before.put_back();
    }
    applied
}

/// The kernel takes one line of a file that has several at a time. An empty one counts where it is the only one.
fn write_lines(path: &Path, value: &str) -> Result<(), LimitError> {
    let written = if value.is_empty() {
        fs::write(path, "\n")
    } else {
        value.lines().try_for_each(|line| fs::write(path, line))
    };
    written.map_err(|source| LimitError::Write { path: path.to_owned(), value: value.to_owned(), source })
}
