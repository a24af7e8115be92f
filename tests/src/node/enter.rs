//! How a command gets into a node: a small process joins the namespaces and the cgroup, and starts the command there.

use std::ffi::OsString;
use std::fs;
use std::os::fd::AsFd as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use rustix::process::{Signal, set_parent_process_death_signal};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use super::error::{Doing as _, NodeError, Result};
use super::supervisor::open_pidfd;
use crate::cgroup;
use crate::host;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin";

/// What it takes to enter a running node.
#[derive(Debug, Clone)]
pub struct Entrance {
    /// The node's name.
    pub name: String,
    /// The pid of its first process, as the host sees it.
    pub init: u32,
    /// Its cgroup, as the host sees it.
    pub cgroup: PathBuf,
}

impl Entrance {
    /// The entrances of all nodes that run on this machine, in the order of their names.
    pub fn all() -> Vec<Self> {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let Some(root) = host::cgroup2_mount(&mountinfo) else {
            return Vec::new();
        };
        let entrance = |name: String| {
            let cgroup = root.join(&name);
            let init = first_process(&cgroup)?;
            Some(Self { name, init, cgroup })
        };
        cgroup::nodes(&root).into_iter().filter_map(entrance).collect()
    }

    /// The program and arguments that run `argv` on the node, in the node's child cgroup `cgroup`.
    ///
    /// # Errors
    /// When the harness's own binary can't be found.
    pub fn command(&self, cgroup: &str, argv: &[OsString]) -> Result<Command> {
        let mut command = Command::new(program()?);
        command.arg("enter").arg(self.init.to_string()).arg(self.cgroup.join(cgroup)).arg("--").args(argv);
        command.env_clear();
        // Where the harness runs under a coverage or debugging tool its variables may matter; commands on the node
        // get an environment of their own.
        command.env("PATH", PATH).env("HOME", "/root").env("LANG", "C.UTF-8");
        command.env("TERM", std::env::var_os("TERM").unwrap_or_else(|| "xterm".into()));
        Ok(command)
    }
}

/// The process of the cgroup that is the first one of a PID namespace below this one.
fn first_process(cgroup: &Path) -> Option<u32> {
    let pids = fs::read_to_string(cgroup.join(cgroup::INIT).join("cgroup.procs")).ok()?;
    pids.lines().find_map(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        let ids: Vec<&str> = ids.split_whitespace().collect();
        (ids.len() == 2 && ids[1] == "1").then(|| pid.parse().ok()).flatten()
    })
}

/// The harness's own binary, which supervises nodes and enters them: `AGENTCUBE_NODE_BIN`, or `node` beside the running
/// program or one folder up (where test binaries are one below).
///
/// # Errors
/// When it is not built.
pub(super) fn program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("AGENTCUBE_NODE_BIN") {
        return Ok(path.into());
    }
    let this = std::env::current_exe().doing(|| "finding this program".into())?;
    sibling(&this, "node").map_err(NodeError::NoSupervisor)
}

/// The program `name` of the same build as `this`; the error is where it should be.
pub(super) fn sibling(this: &Path, name: &str) -> std::result::Result<PathBuf, PathBuf> {
    let folder = this.parent().unwrap_or(Path::new("/"));
    let target = if folder.ends_with("deps") || folder.ends_with("examples") {
        folder.parent().unwrap_or(folder)
    } else {
        folder
    };
    let path = target.join(name);
    if path.exists() { Ok(path) } else { Err(path) }
}

/// Joins the cgroup and the namespaces of a node, runs a command there and waits for its end.
///
/// # Errors
/// When the node is gone or the command can't be started.
pub fn enter(init: u32, cgroup: &Path, argv: &[OsString]) -> Result<i32> {
    let Some((program, arguments)) = argv.split_first() else {
        return Err(NodeError::Start("no command given".into()));
    };
    let pidfd = open_pidfd(init)?;
    fs::write(cgroup.join("cgroup.procs"), "0")
        .doing(|| format!("entering the cgroup {}", cgroup.display()))?;
    let namespaces = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::PROCESS_ID
        | ThreadNameSpaceType::NETWORK
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::CONTROL_GROUP;
    move_into_thread_name_spaces(pidfd.as_fd(), namespaces)
        .doing(|| format!("entering the node of process {init}"))?;
    drop(pidfd);
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/");
    // SAFETY: the closure only makes a system call. The signal is bound to this thread, the only one.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
    let status = command.status().doing(|| format!("starting {}", program.display()))?;
    Ok(code(status))
}

/// An exit status as shells tell it: 128 and the number of the signal for one that was killed.
pub(super) fn code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn siblings_are_found_from_programs_and_from_test_binaries() {
        let target = tempfile::tempdir().unwrap();
        fs::create_dir(target.path().join("deps")).unwrap();
        let node = target.path().join("node");
        assert_eq!(sibling(&target.path().join("demo"), "node"), Err(node.clone()));
        fs::write(&node, "").unwrap();
        assert_eq!(sibling(&target.path().join("demo"), "node"), Ok(node.clone()));
        assert_eq!(sibling(&target.path().join("deps/smoke-0123"), "node"), Ok(node));
    }
}
