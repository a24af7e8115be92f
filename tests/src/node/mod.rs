//! A node: containerd with its runtimes in namespaces of their own, which end with the process that started them.

mod agents;
mod containerd;
mod enter;
mod error;
mod http;
mod init;
mod leftovers;
mod machine;
mod process;
mod supervisor;

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::process::Signal;

use crate::host::{self, Facts, Missing};
use crate::images::Image;
use crate::patience::scaled;
use crate::{cache, cgroup, rootfs};

pub use agents::{Agent, AgentSpec, Net, Runtime, Turn};
pub use containerd::SHIM_TOML;
pub use enter::{Entrance, enter};
pub use error::{NodeError, Result};
pub use http::{Reply, ask, connect, request};
pub use init::init;
pub use leftovers::Leftovers;
pub use machine::has_systemd;
pub use process::{NodeCommand, Output, Spawned, TIMEOUT};
pub use supervisor::supervise;

use error::Doing as _;
use supervisor::{Plan, Report};

/// Where the shim goes: containerd finds it there by the name of the runtime.
const SHIM: &str = "/usr/local/bin/containerd-shim-agentcube-v1";

/// How long containerd may take to answer.
const CONTAINERD: Duration = Duration::from_secs(30);

/// How long a node may take to go away.
const FAREWELL: Duration = Duration::from_secs(20);

/// How a node is to be.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// The shim to copy in; the default is the one of the same build, if there is one.
    pub shim: Option<PathBuf>,
    /// The `agentcube` command line to copy in; the default is the one of the same build, if there is one.
    pub cli: Option<PathBuf>,
    /// More files to copy in, as paths of the host and of the node, with their modes.
    pub files: Vec<(PathBuf, String)>,
    /// The shim's options, without tables: they also stand in containerd's configuration.
    pub shim_toml: String,
    /// How much containerd logs: `info`, `debug`, …; shims follow it.
    pub log_level: String,
    /// Keep the images of sleeping agents on disk, as real nodes do, and not in memory.
    pub images_on_disk: bool,
}

impl Default for NodeOptions {
    fn default() -> Self {
        let this = std::env::current_exe().unwrap_or_default();
        let find = |variable: &str, name: &str| {
            let set = std::env::var_os(variable).map(PathBuf::from);
            set.or_else(|| enter::sibling(&this, name).ok())
        };
        Self {
            shim: find("AGENTCUBE_SHIM", "containerd-shim-agentcube-v1"),
            cli: find("AGENTCUBE_CLI", "agentcube"),
            files: Vec::new(),
            shim_toml: "ignore_missing_controllers = true\n".into(),
            log_level: "info".into(),
            images_on_disk: true,
        }
    }
}

/// A running node. Dropping it ends it; so does the end of this process, however it ends.
#[derive(Debug)]
pub struct Node {
    entrance: Entrance,
    options: NodeOptions,
    rootfs: PathBuf,
    /// Where containerd's output goes, on the host.
    log: PathBuf,
    /// The node's root folder, network namespace: kept open to reach them without entering.
    root: OwnedFd,
    net: OwnedFd,
    containerd: Mutex<Option<Spawned>>,
    imported: Mutex<HashSet<(Image, String)>>,
    /// None for the machine itself as a node.
    supervisor: Option<Child>,
    /// The supervisor watches the other end of this pipe.
    lifeline: Option<ChildStdin>,
}

impl Node {
    /// Starts a node and waits until containerd answers. The first time on a machine this builds the root file system.
    ///
    /// # Errors
    /// When something is missing on this machine, which the error says, or the node does not come up.
    pub fn start(options: NodeOptions) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let facts = Facts::gather(false);
        let missing = facts.missing();
        let (Some(cgroups), true) = (facts.cgroup2, missing.is_empty()) else {
            return Err(NodeError::Missing(missing));
        };
        let rootfs = rootfs::ensure()?;
        let nodes = cache::folder()?.join("nodes");
        cgroup::sweep(&cgroups);
        supervisor::sweep_work(&nodes, &cgroups);

        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}{}-{number}", cgroup::PREFIX, std::process::id());
        let plan = Plan {
            cgroup: cgroups.join(&name),
            work: nodes.join(&name),
            name,
            rootfs: rootfs.clone(),
            images_on_disk: options.images_on_disk,
        };
        let (supervisor, lifeline, init) = start_supervisor(&plan)?;
        let doing = || format!("entering the node {}", plan.name);
        let proc = PathBuf::from(format!("/proc/{init}"));
        let open = |path: PathBuf, flags: OFlags| {
            openat(CWD, path, flags | OFlags::CLOEXEC, Mode::empty()).doing(doing)
        };
        let node = Self {
            root: open(proc.join("root"), OFlags::PATH | OFlags::DIRECTORY)?,
            net: open(proc.join("ns/net"), OFlags::RDONLY)?,
            log: plan.work.join("containerd.log"),
            entrance: Entrance { name: plan.name, init, cgroup: plan.cgroup },
            options,
            rootfs,
            containerd: Mutex::default(),
            imported: Mutex::default(),
            supervisor: Some(supervisor),
            lifeline: Some(lifeline),
        };
        node.furnish()?;
        node.start_containerd()?;
        Ok(node)
    }

    /// Puts in place what a node needs beside its root file system.
    fn furnish(&self) -> Result<()> {
        self.write_file(
            containerd::CONFIG,
            &containerd::config(&self.options.shim_toml, &self.options.log_level, self.has_controller("cpu")),
        )?;
        self.write_with_mode(containerd::RUNC_PATH, containerd::RUNC, 0o755)?;
        self.write_file(SHIM_TOML, &self.options.shim_toml)?;
        self.write_file(containerd::CNI_PATH, containerd::CNI)?;
        for (program, path) in [(&self.options.shim, SHIM), (&self.options.cli, "/usr/local/bin/agentcube")] {
            if let Some(program) = program {
                self.copy_in(program, path)?;
            }
        }
        self.options.files.iter().try_for_each(|(from, to)| self.copy_in(from, to))
    }

    /// The node's name, by which `node exec` and `node down` know it.
    pub fn name(&self) -> &str {
        &self.entrance.name
    }

    /// What it takes to enter the node.
    pub fn entrance(&self) -> &Entrance {
        &self.entrance
    }

    /// The controllers that its cgroups have; none on hosts whose controllers all belong to cgroup v1.
    pub fn controllers(&self) -> Vec<String> {
        cgroup::controllers(&self.entrance.cgroup)
    }

    /// Whether its cgroups have a controller, such as `memory`.
    pub fn has_controller(&self, name: &str) -> bool {
        self.controllers().iter().any(|controller| controller == name)
    }

    /// The folder of a container's cgroup, as the host sees it; `path` is the one in the OCI spec, such as `/default/ID`.
    pub fn cgroup(&self, path: &str) -> PathBuf {
        self.entrance.cgroup.join(path.trim_start_matches('/'))
    }

    /// A command to be run or spawned on the node.
    pub fn command(&self, argv: impl IntoIterator<Item = impl Into<std::ffi::OsString>>) -> NodeCommand {
        NodeCommand::new(self.entrance.clone(), argv)
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// When it can't be started or takes longer than a minute; a status other than 0 is no error here.
    pub fn exec(&self, argv: &[&str]) -> Result<Output> {
        self.command(argv).run()
    }

    /// Starts a command with piped stdio; it is killed when the handle is dropped.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn spawn(&self, argv: &[&str]) -> Result<Spawned> {
        self.command(argv).spawn()
    }

    /// Runs a script of the shell that must succeed; gives back what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.exec(&["sh", "-euc", script])?.check()
    }

    /// Runs `ctr`, which must succeed; gives back what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn ctr(&self, words: &[&str]) -> Result<String> {
        let line: Vec<&str> = std::iter::once("ctr").chain(words.iter().copied()).collect();
        self.exec(&line)?.check()
    }

    /// Asks again and again until the answer is yes.
    ///
    /// # Errors
    /// When that takes too long, or asking fails.
    pub fn wait_until(
        &self,
        what: &str,
        timeout: Duration,
        mut yes: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let timeout = scaled(timeout);
        let start = Instant::now();
        let mut pause = Duration::from_millis(1);
        while !yes()? {
            if start.elapsed() > timeout {
                return Err(NodeError::Timeout { what: what.into(), after: timeout });
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Does `work` in the node's network namespace: a client on the node, or a kubelet.
    ///
    /// # Errors
    /// When the namespace can't be entered.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        http::within(self.net(), || Ok(work())).doing(|| "entering the node's network".into())
    }

    /// Connects to an address in the node's network.
    ///
    /// # Errors
    /// When nothing listens there.
    pub fn connect(&self, address: SocketAddr, timeout: Duration) -> Result<TcpStream> {
        http::connect(&self.net, address, timeout)
    }

    /// Opens a file of the node for reading. Links are followed as the node would follow them.
    ///
    /// # Errors
    /// When it can't be opened.
    pub fn open(&self, path: &str) -> Result<File> {
        self.open_with(path, OFlags::RDONLY, 0)
    }

    fn open_with(&self, path: &str, flags: OFlags, mode: u32) -> Result<File> {
        let opened = openat2(
            &self.root,
            path,
            flags | OFlags::CLOEXEC,
            Mode::from_raw_mode(mode),
            ResolveFlags::IN_ROOT,
        );
        Ok(File::from(opened.doing(|| format!("opening {path} on {}", self.name()))?))
    }

    /// Reads a file of the node as text.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn read_file(&self, path: &str) -> Result<String> {
        let mut bytes = Vec::new();
        self.open(path)?.read_to_end(&mut bytes).doing(|| format!("reading {path} on {}", self.name()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Writes a file on the node, making the folders above it.
    ///
    /// # Errors
    /// When that fails.
    pub fn write_file(&self, path: &str, text: &str) -> Result<()> {
        self.write_with_mode(path, text, 0o644)
    }

    fn write_with_mode(&self, path: &str, text: &str, mode: u32) -> Result<()> {
        self.create(path, mode)?
            .write_all(text.as_bytes())
            .doing(|| format!("writing {path} on {}", self.name()))
    }

    /// Copies a file of the host to the node with its mode, making the folders above it. A file that is there is
    /// replaced, even while it runs.
    ///
    /// # Errors
    /// When that fails.
    pub fn copy_in(&self, from: &Path, to: &str) -> Result<()> {
        let doing = || format!("copying {} to {to} on {}", from.display(), self.name());
        let mut source = File::open(from).doing(doing)?;
        let mode = source.metadata().doing(doing)?.permissions().mode();
        let name = format!("{to}.new");
        let mut target = self.create(&name, mode)?;
        std::io::copy(&mut source, &mut target).doing(doing)?;
        target.set_permissions(fs::Permissions::from_mode(mode)).doing(doing)?;
        let (folder, file) = to.rsplit_once('/').unwrap_or(("/", to));
        let folder = self.open_with(folder, OFlags::RDONLY | OFlags::DIRECTORY, 0)?;
        rustix::fs::renameat(&folder, format!("{file}.new"), &folder, file).doing(doing)
    }

    fn create(&self, path: &str, mode: u32) -> Result<File> {
        if let Some((folder, _)) = path.rsplit_once('/') {
            self.make_folder(folder)?;
        }
        self.open_with(path, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC, mode & 0o777)
    }

    /// Makes a folder and those above it.
    fn make_folder(&self, path: &str) -> Result<()> {
        let mut folder = self.open_with("/", OFlags::RDONLY | OFlags::DIRECTORY, 0)?;
        let mut done = String::new();
        for name in path.split('/').filter(|name| !name.is_empty()) {
            done = format!("{done}/{name}");
            match rustix::fs::mkdirat(&folder, name, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(errno) => return Err(errno).doing(|| format!("making {done} on {}", self.name())),
            }
            folder = self.open_with(&done, OFlags::RDONLY | OFlags::DIRECTORY, 0)?;
        }
        Ok(())
    }

    /// The path on this machine of the socket on which containerd answers, its CRI included.
    pub fn containerd_socket(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{}", self.entrance.init, containerd::SOCKET))
    }

    /// containerd's log, that of the shims included.
    pub fn containerd_log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The pid of containerd as the host sees it.
    ///
    /// # Errors
    /// When it does not run.
    pub fn containerd_pid(&self) -> Result<u32> {
        let running = self.containerd.lock().unwrap_or_else(PoisonError::into_inner);
        running.as_ref().ok_or_else(|| NodeError::Start("containerd does not run".into()))?.pid()
    }

    /// Kills containerd with SIGKILL, and nothing else; shims and containers go on.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill_containerd(&self) -> Result<()> {
        let running = self.containerd.lock().unwrap_or_else(PoisonError::into_inner).take();
        let running = running.ok_or_else(|| NodeError::Start("containerd does not run".into()))?;
        running.signal(Signal::KILL)?;
        running.wait(FAREWELL).map(drop)
    }

    /// Starts containerd after [`Self::kill_containerd`] and waits until it answers.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_containerd(&self) -> Result<()> {
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.doing(|| format!("opening {}", self.log.display()))?;
        let null = File::open("/dev/null").doing(|| "opening /dev/null".into())?;
        let mut started = self.command(["/usr/bin/containerd"]).stdin(null).service(log).spawn()?;
        let waited = self.wait_until("containerd to answer", CONTAINERD, || {
            if !started.running() {
                return Err(NodeError::Start("containerd ended at once".into()));
            }
            // Asking costs a process; while there is no socket there is no need to.
            let there = self.exec(&["test", "-S", containerd::SOCKET])?.status == 0;
            Ok(there && self.command(["ctr", "version"]).timeout(CONTAINERD).run()?.status == 0)
        });
        match waited {
            Err(NodeError::Timeout { .. } | NodeError::Start(_)) => {
                let log = containerd::tail(&self.containerd_log(), 30);
                Err(NodeError::Containerd { after: CONTAINERD, log })
            }
            other => {
                *self.containerd.lock().unwrap_or_else(PoisonError::into_inner) = Some(started);
                other
            }
        }
    }

    /// Kills containerd with SIGKILL and starts it again.
    ///
    /// # Errors
    /// When it does not run or does not come up again.
    pub fn restart_containerd(&self) -> Result<()> {
        self.kill_containerd()?;
        self.start_containerd()
    }

    /// Counts what there is now of what containers could leave behind.
    pub fn snapshot(&self) -> Leftovers {
        Leftovers::count(&self.entrance)
    }

    /// Waits until nothing is there any more that was not there `before`.
    ///
    /// # Errors
    /// When something stays; the error lists it.
    pub fn wait_until_clean(&self, before: &Leftovers, timeout: Duration) -> Result<()> {
        let mut added = Leftovers::default();
        let waited = self.wait_until("", timeout, || {
            added = self.snapshot().added_since(before);
            Ok(added.is_empty())
        });
        waited.map_err(|error| match error {
            NodeError::Timeout { after, .. } => {
                NodeError::Timeout { what: format!("these to go:\n{added}"), after }
            }
            other => other,
        })
    }

    /// Waits until the node ends by somebody else's hand (`node down`).
    ///
    /// # Errors
    /// When waiting fails.
    pub fn wait_for_end(&mut self) -> Result<()> {
        let Some(supervisor) = &mut self.supervisor else { return Ok(()) };
        // Unlike Child::wait, this leaves the lifeline open.
        supervisor.wait().map(drop).doing(|| "waiting for the node's end".into())
    }

    fn net(&self) -> &OwnedFd {
        &self.net
    }

    fn rootfs(&self) -> &Path {
        &self.rootfs
    }

    fn imported(&self) -> MutexGuard<'_, HashSet<(Image, String)>> {
        self.imported.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn require_shim(&self) -> Result<()> {
        match &self.options.shim {
            Some(_) => Ok(()),
            None => Err(NodeError::NoShim(SHIM.into())),
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!(
                "The end of containerd's log on {}:\n{}",
                self.name(),
                containerd::tail(&self.containerd_log(), 200)
            );
        }
        drop(self.lifeline.take());
        let Some(supervisor) = &mut self.supervisor else { return };
        if matches!(supervisor.try_wait(), Ok(Some(_))) {
            return;
        }
        // The supervisor kills everything. To wait here keeps one test's end out of the next one's time.
        let waited = supervisor::open_pidfd(supervisor.id()).is_ok_and(|pidfd| {
            let timeout = Timespec::try_from(scaled(FAREWELL)).unwrap_or_default();
            poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)).is_ok_and(|ended| ended > 0)
        });
        if waited {
            // It is a zombie by now.
            let _ = supervisor.wait();
        } else {
            eprintln!("{} did not end within {FAREWELL:?}", self.entrance.name);
        }
    }
}

fn start_supervisor(plan: &Plan) -> Result<(Child, ChildStdin, u32)> {
    let doing = || format!("starting the supervisor of {}", plan.name);
    let mut supervisor = Command::new(enter::program()?)
        .arg("supervise")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        // A Ctrl-C at the terminal is for the test alone: the supervisor has to outlive it to clean up.
        .process_group(0)
        .spawn()
        .doing(doing)?;
    let (Some(mut lifeline), Some(stdout)) = (supervisor.stdin.take(), supervisor.stdout.take()) else {
        return Err(NodeError::Start("the supervisor has no pipes".into()));
    };
    let text = serde_json::to_string(plan).map_err(std::io::Error::from).doing(doing)?;
    let mut line = String::new();
    let told =
        writeln!(lifeline, "{text}").and_then(|()| BufReader::new(stdout).read_line(&mut line)).doing(doing);
    let failed = |mut supervisor: Child, lifeline: ChildStdin, why: String| {
        drop(lifeline);
        // It ends by itself now that the lifeline has.
        let _ = supervisor.wait();
        Err(NodeError::Start(why))
    };
    match (told, serde_json::from_str(&line)) {
        (Ok(_), Ok(Report::Ready(init))) => Ok((supervisor, lifeline, init)),
        (Ok(_), Ok(Report::Failed(why))) => failed(supervisor, lifeline, why),
        (Ok(_), Err(_)) => failed(supervisor, lifeline, format!("the supervisor said {line:?}")),
        (Err(error), _) => failed(supervisor, lifeline, error.to_string()),
    }
}

/// Kills a running node from outside.
///
/// # Errors
/// When its first process can't be killed, or its cgroup stays.
pub fn down(entrance: &Entrance) -> Result<()> {
    let pidfd = supervisor::open_pidfd(entrance.init)?;
    rustix::process::pidfd_send_signal(&pidfd, Signal::KILL).doing(|| format!("ending {}", entrance.name))?;
    let start = Instant::now();
    while entrance.cgroup.exists() {
        if start.elapsed() > scaled(FAREWELL) {
            return Err(NodeError::Timeout {
                what: format!("the end of {}", entrance.name),
                after: FAREWELL,
            });
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Where cgroup v2 is mounted on this machine.
///
/// # Errors
/// When it is not.
pub fn cgroup_root() -> Result<PathBuf> {
    host::cgroup2_mount(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
        .ok_or_else(|| NodeError::Missing(vec![Missing::Cgroup2]))
}
