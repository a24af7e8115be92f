//! A container made by runc, with its ends of the pipes or the terminal.

use std::{
    fs,
    io::Read,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::symlink,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use criu_hooks::{
    cgroup::Cgroup,
    container::Container,
    criu::NoHooks,
    engine::{
        DumpError, DumpOptions, DumpReport, Engine, Handover, InheritFd, Kept, RestoreError, RestoreOptions,
        Restored, Spare,
    },
    image::{Image, Store},
    procfs,
    spawn::LocalSpawner,
};
use rustix::{
    pipe::{PipeFlags, pipe_with},
    process::{Pid, WaitId, WaitIdOptions, waitid},
};
use serde_json::{Value, json};

pub const NAMESPACE: &str = "test";
const RUNC: &str = "/usr/sbin/runc";

pub struct Agent {
    pub id: String,
    pub pid: Pid,
    pub container: Container,
    pub store: Store,
    pub engine: Engine,
    /// The end of the container's output that we read, and the one that it writes.
    output: (fs::File, OwnedFd),
    /// What has been read and not yet been looked at.
    seen: String,
    pub kept: Kept,
    pub spare: Option<Spare>,
}

/// How a container differs from runc's default.
pub struct Setup<'a> {
    pub args: &'a [&'a str],
    /// Changes the specification.
    pub change: &'a dyn Fn(&mut Value),
    /// Node and python need the whole root file system.
    pub whole_root: bool,
}

impl Default for Setup<'_> {
    fn default() -> Self {
        Setup { args: &COUNTER, change: &|_| {}, whole_root: false }
    }
}

/// Counts on its output and, in memory alone, on.
pub const COUNTER: [&str; 3] = ["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"];

pub fn engine() -> Engine {
    Engine::new("/usr/sbin/criu", Arc::new(LocalSpawner)).with_versions("test", "test")
}

impl Agent {
    pub fn start(id: &str, setup: &Setup<'_>) -> Agent {
        let bundle = PathBuf::from(format!("/run/bundles/{id}"));
        make_bundle(id, &bundle, setup);
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        rustix::io::ioctl_fionbio(&read, true).unwrap();
        let stdio = || Stdio::from(write.try_clone().unwrap());
        let status = Command::new(RUNC)
            .args(["run", "--detach", "--pid-file", "/run/pid", "--bundle"])
            .args([bundle.as_os_str(), id.as_ref()])
            .stdin(Stdio::null())
            .stdout(stdio())
            .stderr(stdio())
            .status()
            .unwrap();
        assert!(status.success(), "runc run: {status}: {}", drain(&mut fs::File::from(read)));
        Agent::adopt(id, &bundle, (read.into(), write))
    }

    /// A container that runc has started.
    fn adopt(id: &str, bundle: &Path, output: (fs::File, OwnedFd)) -> Agent {
        let pid: i32 = fs::read_to_string("/run/pid").unwrap().trim().parse().unwrap();
        let pid = Pid::from_raw(pid).unwrap();
        let cgroup = Cgroup::of_pid(pid).unwrap();
        let container = Container::load(id, bundle, cgroup).unwrap();
        Agent {
            id: id.to_owned(),
            pid,
            container,
            store: Store::open("/run/images").unwrap(),
            engine: engine(),
            output,
            seen: String::new(),
            kept: Kept::default(),
            spare: None,
        }
    }

    /// The next whole line of the output.
    pub async fn line(&mut self) -> String {
        let start = Instant::now();
        loop {
            if let Some((line, rest)) = self.seen.split_once('\n') {
                let line = line.to_owned();
                let rest = rest.to_owned();
                self.seen = rest;
                return line;
            }
            self.seen.push_str(&drain(&mut self.output.0));
            // As long as an emulated machine may need.
            assert!(start.elapsed() < Duration::from_mins(2), "no output from {}", self.id);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Reads `lines` numbers that must follow `last` one by one.
    pub async fn count_on(&mut self, mut last: u64, lines: usize) -> u64 {
        for _ in 0..lines {
            let line = self.line().await;
            assert_eq!(line.parse(), Ok(last + 1), "after {last} came {line:?}");
            last += 1;
        }
        last
    }

    /// Drops one line that is there already; false when there is none.
    pub async fn count_to_end(&mut self) -> bool {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let read = drain(&mut self.output.0);
        let more = !read.is_empty() || !self.seen.is_empty();
        self.seen.clear();
        more
    }

    /// Holds all namespaces open, for dumps whose report is lost.
    pub fn keep_namespaces(&mut self) {
        let open = |name| Some(fs::File::open(format!("/proc/{}/ns/{name}", self.pid)).unwrap().into());
        self.kept = Kept {
            network: open("net"),
            ipc: open("ipc"),
            uts: open("uts"),
            cgroup: open("cgroup"),
            mounts: open("mnt"),
        };
    }

    /// What it has said and nobody has looked at.
    pub fn rest(&mut self) -> String {
        let mut rest = std::mem::take(&mut self.seen);
        rest.push_str(&drain(&mut self.output.0));
        rest
    }

    pub async fn dump(&mut self) -> Result<DumpReport, DumpError> {
        self.dump_with(&DumpOptions::default()).await
    }

    pub async fn dump_with(&mut self, options: &DumpOptions) -> Result<DumpReport, DumpError> {
        let writer = self.store.begin(NAMESPACE, &self.id, None).unwrap();
        let result = self.engine.dump(&self.container, self.pid, &writer, options, &mut NoHooks).await;
        result.map(|report| self.slept(report))
    }

    /// Takes note of a dump that has succeeded.
    pub fn slept(&mut self, mut report: DumpReport) -> DumpReport {
        self.kept = std::mem::take(&mut report.kept);
        reap(self.pid);
        report
    }

    pub fn image(&self) -> Image {
        self.store.latest(NAMESPACE, &self.id).unwrap().expect("an image")
    }

    pub fn restore_options(&self) -> RestoreOptions {
        RestoreOptions { kept: self.kept.try_clone().unwrap(), ..RestoreOptions::default() }
    }

    /// What stands in for the pipes of the dump.
    pub fn inherit(&self, image: &Image) -> Vec<InheritFd> {
        let mut keys: Vec<_> = image.manifest().facts.stdio.iter().flatten().collect();
        keys.retain(|key| key.starts_with("pipe:"));
        keys.dedup();
        let end = || self.output.1.try_clone().unwrap();
        keys.into_iter().map(|key| InheritFd { key: key.clone(), fd: end() }).collect()
    }

    pub async fn restore(&mut self) -> Result<Restored, RestoreError> {
        self.restore_with(self.restore_options()).await
    }

    pub async fn restore_with(&mut self, options: RestoreOptions) -> Result<Restored, RestoreError> {
        let image = self.image();
        let handover = Handover { inherit: self.inherit(&image), spare: self.spare.take() };
        let restored =
            self.engine.restore(NAMESPACE, &self.container, &image, &options, handover, &mut NoHooks).await?;
        self.pid = restored.pid;
        Ok(restored)
    }

    pub fn state_file(&self) -> PathBuf {
        Path::new("/run/runc").join(&self.id).join("state.json")
    }

    /// Runs a command in the container through runc and gives its output.
    pub fn exec(&self, args: &[&str]) -> String {
        let output = Command::new(RUNC).arg("exec").arg(&self.id).args(args).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "exec {args:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Whether its processes run: none is stopped, traced or frozen.
    pub fn assert_running(&self) {
        assert!(procfs::alive(self.pid), "{} is dead", self.id);
        assert!(!self.container.cgroup.is_frozen().unwrap(), "{} is frozen", self.id);
        let state = procfs::stat(self.pid).unwrap().state;
        assert!(matches!(state, 'R' | 'S' | 'D'), "{} is in state {state}", self.id);
    }

    /// Ends the container and removes what runc keeps of it.
    pub fn delete(&self) {
        let _ = self.container.cgroup.kill();
        // A container's first process does not end before what runc has put beside it is reaped too.
        while procfs::stat(self.pid).is_ok() && waitid(WaitId::All, WaitIdOptions::EXITED).is_ok() {}
        let _ = Command::new(RUNC).args(["delete", "--force", &self.id]).output();
    }
}

/// Waits for a child of this process.
pub fn reap(pid: Pid) {
    let _ = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED);
}

fn drain(file: &mut fs::File) -> String {
    let mut bytes = vec![0; 64 * 1024];
    match file.read(&mut bytes) {
        Ok(length) => String::from_utf8_lossy(&bytes[..length]).into_owned(),
        Err(_) => String::new(),
    }
}

/// Makes the root file system (an overlay, as containerd's) and the specification.
fn make_bundle(id: &str, bundle: &Path, setup: &Setup<'_>) {
    fs::create_dir_all(bundle.join("rootfs")).unwrap();
    let base = PathBuf::from(format!("/run/base/{id}"));
    for directory in [
        "lower/bin",
        "lower/proc",
        "lower/dev",
        "lower/sys",
        "lower/tmp",
        "lower/etc",
        "lower/run",
        "upper",
        "work",
    ] {
        fs::create_dir_all(base.join(directory)).unwrap();
    }
    let busybox = base.join("lower/bin/busybox");
    fs::copy("/bin/busybox", &busybox).unwrap();
    for applet in [
        "sh", "sleep", "cat", "echo", "ls", "ps", "mkdir", "tail", "inotifyd", "stty", "flock", "touch",
        "id", "hostname", "ip", "nc", "mount",
    ] {
        symlink("busybox", base.join("lower/bin").join(applet)).unwrap();
    }
    symlink("../run", base.join("lower/var-run")).unwrap();
    fs::create_dir(base.join("lower/var")).unwrap();
    symlink("../run", base.join("lower/var/run")).unwrap();
    let lower = if setup.whole_root { PathBuf::from("/run/rootfs") } else { base.join("lower") };
    let options = format!(
        "lowerdir={},upperdir={base}/upper,workdir={base}/work",
        lower.display(),
        base = base.display()
    );
    let rootfs = bundle.join("rootfs");
    // An overlay on the node's own, whose work directory must not be on an overlay: /run is a tmpfs.
    let mounted = Command::new("mount")
        .args(["-t", "overlay", "overlay", "-o", &options])
        .arg(&rootfs)
        .status()
        .unwrap();
    assert!(mounted.success());

    assert!(Command::new(RUNC).arg("spec").current_dir(bundle).status().unwrap().success());
    let path = bundle.join("config.json");
    let mut spec: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    spec["process"]["terminal"] = json!(false);
    spec["process"]["args"] = json!(setup.args);
    spec["process"]["env"] = json!(["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/"]);
    spec["process"].as_object_mut().unwrap().remove("rlimits");
    spec["root"]["readonly"] = json!(false);
    spec["linux"]["cgroupsPath"] = json!(format!("/containers/{id}"));
    spec["linux"].as_object_mut().unwrap().remove("resources");
    spec["linux"]["maskedPaths"].as_array_mut().unwrap().push(json!("/proc/does-not-exist"));
    (setup.change)(&mut spec);
    fs::write(&path, serde_json::to_vec(&spec).unwrap()).unwrap();
}

/// Starts a container with a terminal; the second value is the terminal's master.
pub fn start_with_terminal(id: &str, args: &[&str]) -> (Agent, OwnedFd) {
    let bundle = PathBuf::from(format!("/run/bundles/{id}"));
    let change = |spec: &mut Value| spec["process"]["terminal"] = json!(true);
    make_bundle(id, &bundle, &Setup { args, change: &change, ..Setup::default() });
    let path = format!("/run/{id}.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut runc = Command::new(RUNC)
        .args(["run", "--detach", "--pid-file", "/run/pid", "--console-socket", &path, "--bundle"])
        .args([bundle.as_os_str(), id.as_ref()])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let (connection, _) = listener.accept().unwrap();
    let master = receive_descriptor(&connection);
    assert!(runc.wait().unwrap().success());
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    (Agent::adopt(id, &bundle, (read.into(), write)), master)
}

fn receive_descriptor(connection: impl AsFd) -> OwnedFd {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut bytes = [0; 4096];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
    recvmsg(connection, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    control
        .drain()
        .find_map(|part| match part {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        })
        .expect("a descriptor")
}

/// Everything that a leak would show in: mounts, descriptors and processes of this node.
#[derive(Debug, PartialEq, Eq)]
pub struct Census {
    pub mounts: usize,
    pub descriptors: usize,
    pub processes: Vec<String>,
}

impl Census {
    /// As [`Census::take`], after the children that a killed CRIU left to the first process of this node are reaped.
    pub fn take_as_init() -> Census {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        while matches!(waitid(WaitId::All, options), Ok(Some(_))) {}
        Census::take()
    }

    pub fn take() -> Census {
        let mut processes: Vec<String> = fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
            // The containers' own come and go.
            .filter(|pid| {
                !fs::read_to_string(format!("/proc/{pid}/cgroup"))
                    .is_ok_and(|path| path.contains("/containers/"))
            })
            .filter_map(|pid| Some(procfs::stat(pid).ok()?.comm))
            .collect();
        processes.sort();
        Census {
            mounts: procfs::mounts(rustix::process::getpid()).unwrap().len(),
            descriptors: fs::read_dir("/proc/self/fd").unwrap().count(),
            processes,
        }
    }
}
