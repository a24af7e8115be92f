//! The process that stands between a test and its node, and cleans up whatever happens to the test.
//!
//! ```text
//! test process ── lifeline (a pipe) ──> supervisor ── parent-death signal ──> first process of the node (PID 1)
//! ```
//! The supervisor reads the lifeline: its end means that the test is gone, even by SIGKILL. It then kills the node's
//! first process, with which the kernel kills the whole PID namespace and ends the mounts, and removes the cgroups.
//! When the supervisor is killed the node dies by the parent-death signal; the next node that starts anywhere removes
//! the empty cgroups. The supervisor has one thread, because the signal is bound to the thread that made the child.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, set_parent_process_death_signal};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde::{Deserialize, Serialize};

use super::error::{Doing as _, NodeError, Result};
use crate::cgroup;
use crate::host::Missing;
use crate::patience::scaled;

/// How long processes in the node's cgroup may take to die.
const PATIENCE: Duration = Duration::from_secs(10);

/// All that a supervisor and the first process of a node need to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// The node's name: host name, cgroup and work folder are called so.
    pub name: String,
    /// The read-only root file system.
    pub rootfs: PathBuf,
    /// The node's cgroup.
    pub cgroup: PathBuf,
    /// A folder on disk for this node alone, removed with it.
    pub work: PathBuf,
    /// Keep `/var/lib/agentcube` on disk, as real nodes do, and not in memory.
    pub images_on_disk: bool,
}

/// What a supervisor tells its parent, once.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// The node is up; the pid of its first process as the host sees it.
    Ready(u32),
    /// It is not, and why.
    Failed(String),
}

/// Runs a supervisor: reads a [`Plan`] from stdin, prints a [`Report`], and lasts as long as stdin and the node do.
///
/// # Errors
/// When there is no plan on stdin, or the cleaning up fails.
pub fn supervise() -> Result<()> {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).doing(|| "reading the plan of a node".into())?;
    let plan: Plan = serde_json::from_str(&line).map_err(|error| NodeError::Answer {
        what: format!("this is no plan of a node ({error})"),
        answer: line,
    })?;
    let started = start(&plan);
    let report = match &started {
        Ok(init) => Report::Ready(init.id()),
        Err(error) => Report::Failed(error.to_string()),
    };
    let told = serde_json::to_string(&report).map_err(std::io::Error::from).and_then(|text| {
        let mut stdout = std::io::stdout();
        writeln!(stdout, "{text}")?;
        stdout.flush()
    });
    // Nobody to tell means that the parent is gone: on to cleaning up.
    let lasted = match (started, told) {
        (Ok(mut init), Ok(())) => watch(&mut init),
        (Ok(mut init), Err(_)) => end(&mut init),
        (Err(_), _) => Ok(()),
    };
    clean_up(&plan).and(lasted)
}

fn start(plan: &Plan) -> Result<Child> {
    fs::create_dir_all(&plan.work).doing(|| format!("making {}", plan.work.display()))?;
    cgroup::create(&plan.cgroup).doing(|| format!("making the cgroup {}", plan.cgroup.display()))?;
    if !plan.cgroup.join("cgroup.kill").exists() || !plan.cgroup.join("cgroup.freeze").exists() {
        return Err(NodeError::Missing(vec![Missing::CgroupKill]));
    }
    // SAFETY: this concerns the PID namespace of children only, not the table of file descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.doing(|| "making a PID namespace".into())?;

    let program = std::env::current_exe().doing(|| "finding this program".into())?;
    let plan =
        serde_json::to_string(plan).map_err(std::io::Error::from).doing(|| "writing the plan".into())?;
    let mut command = Command::new(program);
    command.args(["init", &plan]).stdin(Stdio::inherit()).stdout(Stdio::piped());
    // SAFETY: the closure only makes a system call.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
    let mut init = command.spawn().doing(|| "starting the first process of the node".into())?;
    let mut said = String::new();
    if let Some(stdout) = init.stdout.take() {
        BufReader::new(stdout).read_line(&mut said).doing(|| "listening to the first process".into())?;
    }
    if said.trim() == super::init::READY {
        return Ok(init);
    }
    end(&mut init)?;
    Err(NodeError::Start(said.trim().to_owned()))
}

/// Waits until the lifeline ends or the first process does.
fn watch(init: &mut Child) -> Result<()> {
    let stdin = std::io::stdin();
    let pidfd = open_pidfd(init.id())?;
    loop {
        // The lifeline carries nothing; its end alone counts.
        let mut events = [PollFd::new(&stdin, PollFlags::empty()), PollFd::new(&pidfd, PollFlags::IN)];
        match poll(&mut events, None) {
            Ok(_) if events.iter().any(|event| !event.revents().is_empty()) => return end(init),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).doing(|| "watching the node".into()),
        }
    }
}

fn end(init: &mut Child) -> Result<()> {
    // An error means that it is dead already. Its end waits for the end of every process of its PID namespace.
    let _ = init.kill();
    init.wait().doing(|| "waiting for the node's end".into())?;
    Ok(())
}

fn clean_up(plan: &Plan) -> Result<()> {
    cgroup::kill_and_remove(&plan.cgroup, scaled(PATIENCE))
        .doing(|| format!("removing the cgroup {}", plan.cgroup.display()))?;
    remove_work(&plan.work)
}

fn remove_work(work: &Path) -> Result<()> {
    match fs::remove_dir_all(work) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).doing(|| format!("removing {}", work.display()))
        }
        _ => Ok(()),
    }
}

/// Removes the work folders of nodes that are gone.
pub(super) fn sweep_work(folder: &Path, cgroups: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if cgroup::owner(&name).is_some_and(|pid| !cgroup::alive(pid)) && !cgroups.join(&*name).exists() {
            // Best effort; what is left is tried again by the next node.
            let _ = remove_work(&entry.path());
        }
    }
}

/// A pidfd of a process.
pub(super) fn open_pidfd(pid: u32) -> Result<rustix::fd::OwnedFd> {
    i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()))
        .doing(|| format!("opening the process {pid}"))
}
