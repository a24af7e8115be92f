//! Taking back an update that was refused half-way.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use tracing::warn;

use super::{LimitError, Setting, write_lines};

/// What was in force before an update, in the files that it is about to change.
#[derive(Debug)]
pub struct Before(Vec<(PathBuf, String)>);

impl Before {
    /// Takes note of what `settings` would change in the cgroup `dir`. What cannot be read has no state to go back to.
    pub fn read(dir: &Path, settings: &[Setting]) -> Self {
        let mut files: Vec<(PathBuf, String)> = Vec::new();
        for setting in settings {
            let path = dir.join(&setting.file);
            if files.iter().all(|(known, _)| *known != path)
                && let Ok(contents) = fs::read_to_string(&path)
            {
                files.push((path, contents));
            }
        }
        Self(files)
    }

    /// Puts it in force again, the last change first.
    pub fn put_back(&self) {
        for (path, before) in self.0.iter().rev() {
            let now = fs::read_to_string(path).unwrap_or_default();
            if now == *before {
                continue;
            }
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            let written = write_lines(path, &lines_back(&file, before, &now));
            if let Err(error) = written.or_else(|error| without_limit(path, &file, error)) {
                warn!(%error, "a limit stays that belongs to an update which was refused");
            }
        }
    }
}

/// Allows all that the parent has. Linux 6.12 does not take its set of processors or memory nodes from a cgroup with
/// processes (ENOSPC); this one has the same effect.
fn without_limit(path: &Path, file: &str, error: LimitError) -> Result<(), LimitError> {
    let refused = matches!(&error, LimitError::Write { value, source, .. }
        if value.is_empty() && source.kind() == io::ErrorKind::StorageFull);
    let all = path.parent().and_then(Path::parent).map(|parent| parent.join(format!("{file}.effective")));
    match all.and_then(|all| fs::read_to_string(all).ok()) {
        Some(all) if refused => write_lines(path, all.trim_end()),
        _ => Err(error),
    }
}

/// What to write to a file that says `now`, for it to say what it did `before`. Files of several lines have one for each
/// device, and only for those that have a limit.
fn lines_back(file: &str, before: &str, now: &str) -> String {
    let unlimited = match file {
        "io.max" => "rbps=max wbps=max riops=max wiops=max",
        "io.weight" | "io.bfq.weight" => "default",
        _ => return before.trim_end().to_owned(),
    };
    let device = |line: &str| line.split_whitespace().next().unwrap_or_default().to_owned();
    let known: Vec<String> = before.lines().map(device).collect();
    let new = now.lines().map(device).filter(|device| !known.contains(device));
    let mut lines: Vec<String> = new.map(|device| format!("{device} {unlimited}")).collect();
    lines.extend(before.lines().map(str::to_owned));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_a_limit_gets_none_back() {
        assert_eq!(
            lines_back("io.max", "8:0 rbps=1 wbps=max\n", "8:0 rbps=9 wbps=max\n8:16 wiops=7\n"),
            "8:16 rbps=max wbps=max riops=max wiops=max\n8:0 rbps=1 wbps=max"
        );
        assert_eq!(lines_back("io.max", "", "8:0 rbps=9\n"), "8:0 rbps=max wbps=max riops=max wiops=max");
        assert_eq!(
            lines_back("io.weight", "default 100\n", "default 7\n8:0 5\n"),
            "8:0 default\ndefault 100"
        );
        assert_eq!(lines_back("cpu.max", "max 100000\n", "5 6\n"), "max 100000");
        assert_eq!(lines_back("cpuset.cpus", "\n", "0\n"), "");
    }
}
