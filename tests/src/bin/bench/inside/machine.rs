//! What the run ran on.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::thread;

use rustix::fs::{major, minor};

use super::command;
use crate::record::Machine;

/// Where images are.
const IMAGES: &str = "/var/lib/agentcube";

/// Describes the machine; what can't be found out stays empty.
pub fn describe() -> Machine {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':'))
            .map(|(_, value)| value.trim().to_owned())
            .unwrap_or_default()
    };
    let memory = field(&read("/proc/meminfo"), "MemTotal");
    let memory: u64 = memory.split(' ').next().and_then(|kib| kib.parse().ok()).unwrap_or(0);
    Machine {
        cpu: field(&read("/proc/cpuinfo"), "model name"),
        cores: thread::available_parallelism().map_or(1, usize::from),
        memory: memory << 10,
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        disk: disk(&read("/proc/self/mountinfo")),
        load_percent: load_percent(&read("/proc/loadavg")),
        programs: programs(),
    }
}

/// The mean of the last minute, without its point: `0.42 …` is 42.
fn load_percent(loadavg: &str) -> u64 {
    let digits: String =
        loadavg.split(' ').next().unwrap_or_default().chars().filter(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

/// The file system below the images, and the driver of the disk below that.
fn disk(mountinfo: &str) -> String {
    let Ok(metadata) = fs::metadata(IMAGES) else { return String::new() };
    let number = format!("{}:{}", major(metadata.dev()), minor(metadata.dev()));
    let kind = kind_of(mountinfo, &number).unwrap_or("unknown file system");
    let driver = fs::canonicalize(format!("/sys/dev/block/{number}")).unwrap_or_default();
    let driver = driver.to_string_lossy().into_owned();
    let device = ["virtio", "nvme", "ata", "scsi"].into_iter().find(|name| driver.contains(name));
    match device {
        Some("ata") => format!("{kind} on a SATA disk"),
        Some(device) => format!("{kind} on a {device} disk"),
        None => kind.to_owned(),
    }
}

/// The type of the file system with this device number.
fn kind_of<'a>(mountinfo: &'a str, number: &str) -> Option<&'a str> {
    mountinfo.lines().find_map(|line| {
        let (mount, system) = line.split_once(" - ")?;
        (mount.split(' ').nth(2) == Some(number)).then(|| system.split(' ').next()).flatten()
    })
}

fn programs() -> Vec<(String, String)> {
    let version = |words: &[&str]| {
        let said = command::output(words).unwrap_or_default();
        said.split_whitespace().find_map(numbers).unwrap_or_default()
    };
    [
        ("containerd", ["containerd", "--version"]),
        ("runc", ["runc", "--version"]),
        ("crun", ["crun", "--version"]),
        ("CRIU", ["criu", "--version"]),
    ]
    .map(|(name, words)| (name.to_owned(), version(&words)))
    .into()
}

/// A version without what distributions append to it.
fn numbers(word: &str) -> Option<String> {
    let end = word.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(word.len());
    let version = &word[..end];
    (version.contains('.') && version.starts_with(|letter: char| letter.is_ascii_digit()))
        .then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_without_the_distributions_words() {
        assert_eq!(numbers("2.1.9~ds1"), Some("2.1.9".into()));
        assert_eq!(numbers("1.28"), Some("1.28".into()));
        assert_eq!(numbers("github.com/containerd"), None);
        assert_eq!(numbers("crun"), None);
    }

    #[test]
    fn the_load_is_that_of_the_last_minute() {
        assert_eq!(load_percent("18.70 14.42 11.59 3/512 4711\n"), 1870);
        assert_eq!(load_percent("0.05 0.01 0.00 1/99 7\n"), 5);
        assert_eq!(load_percent(""), 0);
    }

    #[test]
    fn the_file_system_is_found_by_its_number() {
        let mountinfo =
            "24 18 0:20 / /a rw - tmpfs tmpfs rw\n25 18 254:0 /x /b rw shared:1 - ext4 /dev/vda rw\n";
        assert_eq!(kind_of(mountinfo, "254:0"), Some("ext4"));
        assert_eq!(kind_of(mountinfo, "8:1"), None);
    }
}
