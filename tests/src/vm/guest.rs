//! The first process of a virtual machine: it makes a node of the machine, runs its commands one after another, tells
//! how each ended, and powers off.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount, mount_bind, mount_remount};
use rustix::process::{Pid, WaitOptions, wait};
use rustix::system::{RebootCommand, reboot, sethostname};
use serde::{Deserialize, Serialize};

use super::disk;
use super::error::{Doing as _, Result, VmError};
use crate::cgroup;
use crate::patience;
use crate::rootfs;

/// The label of the disk that the host made.
pub(super) const INPUT_LABEL: &str = "agentcube-in";

/// Where that is mounted.
const INPUT: &str = "/mnt";

/// The label of the disk with the kernel's modules.
pub(super) const MODULES_LABEL: &str = "agentcube-mod";

/// Where the node's root file system is seen without what is mounted on it.
const ROOTFS: &str = "/run/agentcube-rootfs";

/// The unit of the commands where systemd is the first process.
const UNIT: &str = "/run/systemd/system/agentcube-tests.service";

/// The harness's cache folder is in here.
const CACHE: &str = "/var/cache";

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Modules that CRIU, runc or a bridge would look for by other ways than the kernel's own loading.
const MODULES: &[&str] = &[
    "overlay",
    "zram",
    "tun",
    "veth",
    "bridge",
    "nf_tables",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "raw_diag",
    "unix_diag",
    "netlink_diag",
    "af_packet_diag",
];

/// What the kernel is told: the root disk, and how to find this program on the disk that the host made.
pub(super) fn command_line() -> String {
    // Labels are looked for with the help of /proc and /sys; the disk may come later than the root.
    let mounts = format!(
        "mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys; \
         for i in 1 2 3 4 5 6 7 8 9; do mount -o ro LABEL={INPUT_LABEL} {INPUT} && break; sleep 1; done"
    );
    // On a busy host an emulated timer can be too late for the kernel's check of it, which then panics.
    format!(
        "loglevel=5 panic=1 no_timer_check mitigations=off apparmor=0 selinux=0 root=PARTUUID={} rootwait rw \
         init=/bin/sh -- -c \"{mounts}; exec {INPUT}/programs/node vm init\"",
        disk::ROOT_PARTITION
    )
}

/// A command for a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestCommand {
    /// What is printed before its output, if anything.
    pub title: Option<String>,
    /// The command line. A program that is named by a path of this machine goes in, with the programs of the same
    /// build; others are those of the node's root file system.
    pub argv: Vec<String>,
    /// More environment variables.
    pub env: Vec<(String, String)>,
}

/// How a command of a guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Its exit status, as shells tell it.
    pub code: i32,
    /// How long it took.
    pub after: Duration,
}

/// What the guest is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    /// One after another.
    pub(super) commands: Vec<GuestCommand>,
    /// The folder where they run; made when missing.
    pub(super) cwd: PathBuf,
    /// Where the host has the programs of this build: they are found there in the guest too.
    pub(super) programs: PathBuf,
    /// See [`patience`].
    pub(super) patience: u32,
    /// The guest's memory in MiB.
    pub(super) memory_mib: u32,
    /// systemd is the guest's first process once the machine is a node, and the commands are a unit of its.
    pub(super) systemd: bool,
}

impl Plan {
    /// Writes the plan to where the guest reads it.
    pub(super) fn write(&self, input: &Path) -> Result<()> {
        let doing = || "writing the plan of a virtual machine".to_owned();
        let text = serde_json::to_string(self).map_err(std::io::Error::from).doing(doing)?;
        fs::write(input.join("plan.json"), text).doing(doing)
    }

    fn read() -> Result<Self> {
        let doing = || "reading the plan of a virtual machine".to_owned();
        let bytes = fs::read(Path::new(INPUT).join("plan.json")).doing(doing)?;
        serde_json::from_slice(&bytes).map_err(std::io::Error::from).doing(doing)
    }
}

/// How the guest's commands ended, as far as it has told.
pub(super) fn told(status: &Path) -> Vec<Ended> {
    let text = fs::read_to_string(status).unwrap_or_default();
    // What follows the last line's end has not arrived whole.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map_while(parse_ended).collect()
}

fn parse_ended(line: &str) -> Option<Ended> {
    let (code, millis) = line.strip_prefix("exit ")?.split_once(" after ")?;
    Some(Ended { code: code.parse().ok()?, after: Duration::from_millis(millis.parse().ok()?) })
}

/// Runs the guest's first process, or what systemd runs for it. It does not come back.
///
/// # Errors
/// None that anybody would see: they go to the console, and the machine powers off.
pub fn init() -> Result<()> {
    let first = std::process::id() == 1;
    if !first && !Path::new(UNIT).exists() {
        return Err(VmError::Io {
            doing: "running as the first process of a virtual machine".into(),
            source: std::io::ErrorKind::Unsupported.into(),
        });
    }
    if let Err(error) = live(first) {
        eprintln!("agentcube: {error}");
    }
    rustix::fs::sync();
    reboot(RebootCommand::PowerOff).doing(|| "powering off".into())
}

fn live(first: bool) -> Result<()> {
    let plan = Plan::read()?;
    if first {
        mount_all()?;
    }
    let output = port("output")?;
    let status = port("status")?;
    if first && let Err(error) = furnish(&plan) {
        let _ = writeln!(&output, "The virtual node is not complete: {error}");
        return Err(error);
    }
    if first && plan.systemd {
        drop((output, status));
        return hand_over();
    }
    run_all(&plan, &output, status)
}

/// systemd becomes the first process, and runs this program as a service.
fn hand_over() -> Result<()> {
    let doing = || "handing over to systemd".to_owned();
    fs::create_dir_all(Path::new(UNIT).parent().unwrap_or(Path::new("/"))).doing(doing)?;
    let unit = format!(
        "[Unit]\nWants=dbus.socket\nAfter=dbus.socket\n\
         [Service]\nExecStart={INPUT}/programs/node vm init\nDelegate=yes\nTasksMax=infinity\n\
         StandardOutput=tty\nStandardError=tty\nTTYPath=/dev/console\n"
    );
    fs::write(UNIT, unit).doing(doing)?;
    // Without these this would be a first boot, with work that nobody needs.
    fs::write("/etc/machine-id", "0123456789abcdef0123456789abcdef\n").doing(doing)?;
    for stamp in ["/etc/.updated", "/var/.updated"] {
        fs::write(stamp, "").doing(doing)?;
    }
    let name = Path::new(UNIT).file_name().unwrap_or_default().to_string_lossy();
    let mut systemd = Command::new("/usr/lib/systemd/systemd");
    systemd.arg(format!("--unit={name}")).arg("--show-status=no").env_clear().env("PATH", PATH);
    Err(systemd.exec()).doing(doing)
}

fn run_all(plan: &Plan, output: &File, mut status: File) -> Result<()> {
    for command in &plan.commands {
        if let Some(title) = &command.title {
            let _ = writeln!(&*output, "--- {title}");
        }
        let start = Instant::now();
        let code = run(plan, command, output).unwrap_or_else(|error| {
            let _ = writeln!(&*output, "{error}");
            // As shells do.
            127
        });
        let told = format!("exit {code} after {}\n", start.elapsed().as_millis());
        status.write_all(told.as_bytes()).doing(|| "telling an exit status".into())?;
    }
    Ok(())
}

fn mount_all() -> Result<()> {
    let quiet = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let secure = MountFlags::NOSUID | MountFlags::NODEV;
    for (kind, target, flags, options) in [
        ("cgroup2", "/sys/fs/cgroup", quiet, c"nsdelegate,memory_recursiveprot"),
        ("tmpfs", "/run", secure, c"mode=0755"),
        ("tmpfs", "/tmp", secure, c"mode=1777"),
        ("devpts", "/dev/pts", MountFlags::NOSUID | MountFlags::NOEXEC, c"ptmxmode=0666,mode=0620"),
        ("tmpfs", "/dev/shm", secure, c"mode=1777"),
        ("mqueue", "/dev/mqueue", quiet, c""),
    ] {
        let doing = || format!("mounting {kind} on {target}");
        fs::create_dir_all(target).doing(doing)?;
        mount(kind, target, kind, flags, options).doing(doing)?;
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
        ("ptmx", "pts/ptmx"),
    ] {
        let link = Path::new("/dev").join(name);
        // The kernel makes some of them.
        let _ = fs::remove_file(&link);
        symlink(target, &link).doing(|| format!("linking {}", link.display()))?;
    }
    Ok(())
}

/// A serial port to the host, by the name that the host gave it.
fn port(name: &str) -> Result<File> {
    let doing = || format!("opening the port {name}");
    for entry in fs::read_dir("/sys/class/virtio-ports").doing(doing)?.flatten() {
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|found| found.trim() == name) {
            let path = Path::new("/dev").join(entry.file_name());
            return File::options().write(true).open(path).doing(doing);
        }
    }
    Err(std::io::Error::from(std::io::ErrorKind::NotFound)).doing(doing)
}

/// Makes a node of the machine: modules, network, controllers, swap, the programs and the cache where tests expect them.
fn furnish(plan: &Plan) -> Result<()> {
    sethostname(b"agentcube-vm").doing(|| "setting the host name".into())?;
    fs::create_dir_all("/usr/lib/modules").doing(|| "making /usr/lib/modules".into())?;
    tool("mount", &["-o", "ro", &format!("LABEL={MODULES_LABEL}"), "/usr/lib/modules"])?;
    tool("modprobe", &[&["--all"], MODULES].concat())?;
    tool("ip", &["link", "set", "lo", "up"])?;

    let root = Path::new("/sys/fs/cgroup");
    cgroup::enable_controllers(root);
    for controller in ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"] {
        let enabled = fs::read_to_string(root.join("cgroup.subtree_control")).unwrap_or_default();
        if !enabled.split_whitespace().any(|name| name == controller) {
            return Err(std::io::Error::other("the kernel does not give it"))
                .doing(|| format!("enabling the controller {controller}"));
        }
    }
    add_swap(plan.memory_mib)?;

    fs::create_dir_all(ROOTFS).doing(|| format!("making {ROOTFS}"))?;
    mount_bind("/", ROOTFS).doing(|| format!("mounting {ROOTFS}"))?;
    mount_remount(ROOTFS, MountFlags::BIND | MountFlags::RDONLY, c"")
        .doing(|| format!("making {ROOTFS} read-only"))?;
    let cache = Path::new(CACHE).join("agentcube");
    let link = |target: &Path, name: &Path| {
        symlink(target, cache.join(name)).doing(|| format!("linking {}", name.display()))
    };
    fs::create_dir_all(&cache).doing(|| format!("making {}", cache.display()))?;
    link(Path::new(ROOTFS), Path::new(&format!("rootfs-{}", rootfs::key())))?;
    let images = Path::new(INPUT).join("cache");
    for image in fs::read_dir(&images).doing(|| format!("listing {}", images.display()))?.flatten() {
        link(&image.path(), Path::new(&image.file_name()))?;
    }
    let doing = || format!("putting the programs at {}", plan.programs.display());
    fs::create_dir_all(&plan.programs).doing(doing)?;
    mount_bind(Path::new(INPUT).join("programs"), &plan.programs).doing(doing)?;
    fs::create_dir_all(&plan.cwd).doing(|| format!("making {}", plan.cwd.display()))
}

/// Compressed memory first, and a file for what does not fit.
fn add_swap(memory_mib: u32) -> Result<()> {
    let bytes = u64::from(memory_mib / 2) << 20;
    fs::write("/sys/block/zram0/disksize", bytes.to_string()).doing(|| "sizing zram0".into())?;
    let path = "/var/swap";
    let doing = || format!("making {path}");
    let file = File::create(path).doing(doing)?;
    rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o600)).doing(doing)?;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes).doing(doing)?;
    for (swap, priority) in [("/dev/zram0", "10"), (path, "1")] {
        tool("mkswap", &["--quiet", swap])?;
        tool("swapon", &["--priority", priority, swap])?;
    }
    Ok(())
}

fn tool(program: &str, arguments: &[&str]) -> Result<()> {
    let doing = || format!("{program} {}", arguments.join(" "));
    let output = Command::new(program).args(arguments).env("PATH", PATH).output().doing(doing)?;
    if output.status.success() {
        return Ok(());
    }
    Err(std::io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned())).doing(doing)
}

/// Runs a command to its end, and reaps what it and those before it leave behind.
fn run(plan: &Plan, wanted: &GuestCommand, output: &File) -> Result<i32> {
    let Some((program, arguments)) = wanted.argv.split_first() else {
        return Err(std::io::Error::other("no command given")).doing(|| "running a command".into());
    };
    let doing = || format!("running {program} in the virtual machine");
    let mut command = Command::new(program);
    command.args(arguments).current_dir(&plan.cwd).stdin(Stdio::null()).env_clear();
    command.stdout(output.try_clone().doing(doing)?).stderr(output.try_clone().doing(doing)?);
    command.env("PATH", PATH);
    command.env("HOME", "/root").env("LANG", "C.UTF-8").env("TERM", "dumb");
    command.env("XDG_CACHE_HOME", CACHE).env("AGENTCUBE_TEST_ROOTFS", ROOTFS);
    command.env(patience::VARIABLE, plan.patience.to_string());
    command.envs(wanted.env.iter().map(|(name, value)| (name, value)));
    let child = Pid::from_child(&command.spawn().doing(doing)?);
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == child => {
                let code = status.exit_status().or_else(|| status.terminating_signal().map(|s| 128 + s));
                return Ok(code.unwrap_or(-1));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).doing(doing),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_end_counts_only_when_it_was_told_whole() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (text, codes) in [
            ("exit 3 after 12\n", vec![3]),
            ("exit 0 after 1\nexit -1 after 2\n", vec![0, -1]),
            ("exit 0 after 1\nexit 1 after 2", vec![0]),
            ("exit 0\nexit 0 after 1\n", vec![]),
            ("exit x after 1\n", vec![]),
            ("", vec![]),
        ] {
            fs::write(file.path(), text).unwrap();
            let told: Vec<i32> = told(file.path()).iter().map(|ended| ended.code).collect();
            assert_eq!(told, codes, "{text:?}");
        }
        assert_eq!(told(Path::new("/nonexistent")), []);
    }

    #[test]
    fn a_plan_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let command = GuestCommand {
            title: Some("a title".into()),
            argv: vec!["a".into(), "b c".into()],
            env: vec![("X".into(), "1".into())],
        };
        let plan = Plan {
            commands: vec![command],
            cwd: "/here".into(),
            programs: "/target".into(),
            patience: 20,
            memory_mib: 1024,
            systemd: false,
        };
        plan.write(folder.path()).unwrap();
        let read: Plan = serde_json::from_slice(&fs::read(folder.path().join("plan.json")).unwrap()).unwrap();
        assert_eq!(format!("{read:?}"), format!("{plan:?}"));
    }
}
