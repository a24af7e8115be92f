//! Scopes of systemd whose containers have no processes.
//!
//! With systemd's cgroup driver a container's cgroup is a scope. systemd ends a scope when its last process has ended,
//! and removes the cgroup with its limits. A checkpointed agent has no processes, so another one stands in for them
//! while it sleeps: in a child cgroup, where nobody takes it for the agent's, with all of its memory charged to the shim.

use std::{
    fs, io,
    os::fd::OwnedFd,
    process::{Command, Stdio},
};

use criu_hooks::{
    cgroup::{self, Cgroup},
    spawn::{Child, Spawner},
};
use rustix::{
    pipe::{PipeFlags, pipe_with},
    process::{Pid, Signal, pidfd_send_signal},
};
use tracing::warn;

use crate::{daemon::PLACEHOLDER, limits::Setting, reaper::Reaper};

/// Exempts a process from OOM kills, those of a whole cgroup included: see proc_pid_oom_score_adj(5).
const NEVER: &str = "-1000";

/// A process that does nothing and ends with this value, or with the shim.
pub(super) struct Placeholder {
    cgroup: Cgroup,
    pid: Pid,
    pidfd: OwnedFd,
    /// Its standard input.
    _lifeline: OwnedFd,
}

impl Placeholder {
    /// Starts it where the shim is. Best early: what it touches then is not charged to the container.
    pub(super) fn start(cgroup: &Cgroup, reaper: &Reaper) -> io::Result<Self> {
        let (stdin, lifeline) = pipe_with(PipeFlags::CLOEXEC)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg(PLACEHOLDER).env_clear().current_dir("/");
        command.stdin(stdin).stdout(Stdio::null()).stderr(Stdio::null());
        let Child { pid, pidfd, exit } = reaper.spawn(command)?;
        if let Err(error) = fs::write(format!("/proc/{pid}/oom_score_adj"), NEVER) {
            warn!(%error, "an OOM kill could end the scope of a sleeping container");
        }
        let (cgroup, left) = (cgroup.clone(), cgroup.clone());
        tokio::spawn(async move {
            let _ = exit.await;
            // Where the container is gone, so is this.
            let _ = left.clear_aside();
        });
        Ok(Self { cgroup, pid, pidfd, _lifeline: lifeline })
    }

    /// From here on the scope stays.
    pub(super) fn take_place(&self) -> Result<(), cgroup::Error> {
        self.cgroup.set_aside(self.pid)
    }
}

impl Drop for Placeholder {
    fn drop(&mut self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

/// Tells systemd of limits that are set past runc, or it would take them back with its next reload.
pub(super) async fn set_properties(
    cgroup: &Cgroup,
    settings: &[Setting],
    reaper: &Reaper,
) -> Result<(), String> {
    let properties: Vec<String> = settings.iter().filter_map(property).collect();
    let Some(unit) = cgroup.path().file_name().filter(|_| !properties.is_empty()) else { return Ok(()) };
    let mut command = Command::new("systemctl");
    command.args(["set-property", "--runtime", "--"]).arg(unit).args(properties);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let exit = async { reaper.spawn(command)?.exit.await };
    match exit.await {
        Ok(exit) if exit.success() => Ok(()),
        Ok(exit) => Err(format!("systemctl set-property {}: {exit}", unit.display())),
        Err(error) => Err(format!("systemctl: {error}")),
    }
}

/// The property of a unit that stands for a file of its cgroup: see systemd.resource-control(5). None for files that
/// systemd leaves alone.
fn property(Setting { file, value }: &Setting) -> Option<String> {
    let name = match file.as_str() {
        "cpu.max" => return quota(value),
        "cpu.weight" => "CPUWeight",
        "cpuset.cpus" => "AllowedCPUs",
        "cpuset.mems" => "AllowedMemoryNodes",
        "io.weight" => "IOWeight",
        "memory.high" => "MemoryHigh",
        "memory.low" => "MemoryLow",
        "memory.max" => "MemoryMax",
        "memory.min" => "MemoryMin",
        "memory.swap.max" => "MemorySwapMax",
        "pids.max" => "TasksMax",
        _ => return None,
    };
    let value = if value == "max" { "infinity" } else { value };
    Some(format!("{name}={value}"))
}

/// `cpu.max` as percents of one processor; the period, which has a property of its own, stays as it is.
fn quota(value: &str) -> Option<String> {
    let mut words = value.split_whitespace();
    let quota = words.next()?;
    if quota == "max" {
        return Some("CPUQuota=".to_owned());
    }
    let quota: u64 = quota.parse().ok()?;
    let period: u64 = words.next().map_or(Some(100_000), |period| period.parse().ok())?;
    Some(format!("CPUQuota={}%", (quota * 100).div_ceil(period.max(1))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_told_in_systemds_words() {
        let told = |file: &str, value: &str| property(&Setting { file: file.into(), value: value.into() });
        for (file, value, expected) in [
            ("memory.max", "1024", "MemoryMax=1024"),
            ("memory.swap.max", "max", "MemorySwapMax=infinity"),
            ("pids.max", "7", "TasksMax=7"),
            ("cpu.max", "50000 100000", "CPUQuota=50%"),
            ("cpu.max", "1000 3000", "CPUQuota=34%"),
            ("cpu.max", "max 100000", "CPUQuota="),
        ] {
            assert_eq!(told(file, value).as_deref(), Some(expected), "{file}");
        }
        for (file, value) in [("hugetlb.2MB.max", "0"), ("cpu.max", "kept 5"), ("cpu.max", "")] {
            assert_eq!(told(file, value), None, "{file}");
        }
    }
}
