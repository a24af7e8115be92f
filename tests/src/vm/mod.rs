//! Virtual nodes: a command of this machine runs as root in a virtual machine of its own, with another kernel, every
//! controller of cgroup v2, and swap. Nothing is shared and there is no network: what the command needs goes in on a
//! disk, what it prints comes out through a virtual serial port.
//!
//! Test binaries run there unchanged. `node vm test` runs those that a file lists, several in each machine and several
//! machines at a time (`make test-vm`); for one alone there are cargo's own means:
//! ```text
//! cargo test --config "target.'cfg(all())'.runner = ['target/debug/node', 'vm', 'run']" --test state
//! ```

mod disk;
mod error;
mod fleet;
mod guest;
mod kernel;
mod qemu;
mod suites;
mod work;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read as _, Write};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, getppid, pidfd_open, set_parent_process_death_signal};

use crate::images::Image;
use crate::rootfs;

pub use error::{Result, VmError};
pub use fleet::test;
pub use guest::{Ended, GuestCommand, init};
pub use qemu::Accelerator;
pub use suites::{MachinePlan, plans};

use error::Doing as _;
use guest::Plan;
use qemu::Machine;
use work::Work;

/// The release of Debian whose kernel boots when nothing is said: that of the node's root file system.
pub const KERNEL: &str = "forky";

/// The releases of Debian whose kernels the tests are run on: 6.12, and the newest.
pub const KERNELS: [&str; 2] = ["trixie", KERNEL];

/// How a virtual machine is to be.
#[derive(Debug, Clone)]
pub struct VmOptions {
    /// The release of Debian whose newest kernel boots.
    pub kernel: String,
    /// The guest's memory in MiB; as much again in swap.
    pub memory_mib: u32,
    /// The guest's processors.
    pub processors: u32,
    /// How long all of it may take.
    pub timeout: Duration,
    /// How the guest's instructions are executed.
    pub accelerator: Accelerator,
    /// systemd is the guest's first process.
    pub systemd: bool,
}

impl Default for VmOptions {
    fn default() -> Self {
        Self {
            kernel: KERNEL.into(),
            memory_mib: 3072,
            processors: 2,
            timeout: Duration::from_mins(10),
            accelerator: Accelerator::choose(),
            systemd: false,
        }
    }
}

/// Makes what virtual machines need beside the root file system, unless that is done: a kernel and a disk.
///
/// # Errors
/// When something is missing on this machine, which the error says.
pub fn prepare(kernel: &str) -> Result<()> {
    supported()?;
    disk::root()?;
    kernel::ensure(kernel).map(drop)
}

fn supported() -> Result<()> {
    if std::env::consts::ARCH == "x86_64" { Ok(()) } else { Err(VmError::Architecture) }
}

/// Runs commands in a virtual machine of their own, one after another, whether or not those before were successful.
/// Gives back how each ended. What they print goes to `output` as it comes.
///
/// # Errors
/// When the machine can't be made, dies, or does not end in time.
pub fn run(
    options: &VmOptions,
    commands: &[GuestCommand],
    output: impl Write + Send + 'static,
) -> Result<Vec<Ended>> {
    supported()?;
    let kernel = kernel::ensure(&options.kernel)?;
    let root = disk::root()?;
    let work = Work::make()?;
    let (programs, cwd) = fill(&work, commands)?;
    let plan = Plan {
        commands: commands.to_vec(),
        cwd,
        programs,
        patience: options.accelerator.patience(),
        memory_mib: options.memory_mib,
        systemd: options.systemd,
    };
    plan.write(&work.input())?;
    let input = work.path("input.ext4");
    disk::of_folder(&work.input(), &input, guest::INPUT_LABEL)?;

    let (read, write) = pipe_with(PipeFlags::CLOEXEC).doing(|| "making a pipe".into())?;
    let (console, status) = (work.path("console.log"), work.path("status"));
    let machine = Machine {
        kernel: &kernel.image,
        disks: [&root, &kernel.modules, &input],
        append: &guest::command_line(),
        console: &console,
        status: &status,
        output: write.as_raw_fd(),
        accelerator: options.accelerator,
        memory_mib: options.memory_mib,
        processors: options.processors,
    };
    let mut qemu = start(&machine, write, work.folder())?;
    let copier = thread::spawn(move || copy(read, output));
    let ended = watch(&mut qemu, options.timeout);
    // The pipe ends with QEMU.
    let _ = copier.join();
    let told = guest::told(&status);
    let under_way = || commands.get(told.len()).and_then(|command| command.title.clone());
    match ended? {
        End::Itself(_) if told.len() == commands.len() => {
            if told.iter().any(|ended| ended.code != 0) {
                let (console, _) = work.keep_console();
                eprintln!("The console of the virtual machine is in {}.", console.display());
            }
            Ok(told)
        }
        End::Itself(how) => {
            let (console, tail) = work.keep_console();
            Err(VmError::Died { how, command: under_way().unwrap_or_default(), console, tail })
        }
        End::Late => {
            let (console, tail) = work.keep_console();
            let command = under_way().unwrap_or_default();
            Err(VmError::Timeout { after: options.timeout, command, console, tail })
        }
        End::Orphaned => Err(VmError::Orphaned),
    }
}

/// Puts in place what the guest gets to read; gives back where this build's programs are, and the working folder.
fn fill(work: &Work, commands: &[GuestCommand]) -> Result<(PathBuf, PathBuf)> {
    let this = std::env::current_exe().doing(|| "finding this program".into())?;
    let folder = this.parent().unwrap_or(Path::new("/"));
    let target = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    for name in ["node", "containerd-shim-agentcube-v1", "agentcube"] {
        if target.join(name).exists() {
            work.add(&target.join(name), &Path::new("programs").join(name))?;
        }
    }
    let own =
        |command: &GuestCommand| Some(Path::new(command.argv.first()?).strip_prefix(target).ok()?.to_owned());
    for inside in commands.iter().filter_map(own).collect::<BTreeSet<_>>() {
        work.add(&target.join(&inside), &Path::new("programs").join(&inside))?;
    }
    let rootfs = rootfs::ensure()?;
    for image in Image::ALL {
        let tar = image.ensure(&rootfs)?;
        work.add(&tar, &Path::new("cache").join(tar.file_name().unwrap_or_default()))?;
    }
    let cwd = std::env::current_dir().doing(|| "finding the working folder".into())?;
    Ok((target.to_owned(), cwd))
}

fn start(machine: &Machine<'_>, output: OwnedFd, work: &Path) -> Result<Child> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(qemu::arguments(machine)).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // Where what the guest writes to its disks goes; it has no name there.
    command.env("TMPDIR", work);
    // SAFETY: the closure only makes system calls. The signal is bound to this thread, which waits for the child.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            Ok(fcntl_setfd(&output, FdFlags::empty())?)
        });
    }
    // The closure, and with it this process's own copy of the pipe's end, goes with the command.
    command
        .spawn()
        .map_err(|_| VmError::NoProgram { program: "qemu-system-x86_64", package: "qemu-system-x86" })
}

fn copy(from: OwnedFd, mut to: impl Write) {
    let mut from = File::from(from);
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        // Nobody to tell is no reason to stop the guest.
        let _ = to.write_all(&buffer[..count]).and_then(|()| to.flush());
    }
}

/// How a virtual machine ended.
enum End {
    /// By itself, and what QEMU said.
    Itself(String),
    /// It took too long.
    Late,
    /// Nobody wants it any more.
    Orphaned,
}

/// Waits for the machine's end, and ends it when time is up or the parent of this process is gone.
fn watch(qemu: &mut Child, timeout: Duration) -> Result<End> {
    let doing = || "watching the virtual machine".to_owned();
    let pidfd = pidfd_open(Pid::from_child(qemu), PidfdFlags::empty()).doing(doing)?;
    let parent = getppid().and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or_default();
        let mut events = vec![PollFd::new(&pidfd, PollFlags::IN)];
        events.extend(parent.as_ref().map(|parent| PollFd::new(parent, PollFlags::IN)));
        match poll(&mut events, Some(&left)) {
            Ok(_) if !events[0].revents().is_empty() => {
                let mut said = String::new();
                if let Some(stderr) = &mut qemu.stderr {
                    // What is no text is not worth a failure.
                    let _ = stderr.read_to_string(&mut said);
                }
                let status = qemu.wait().doing(doing)?;
                return Ok(End::Itself(format!("{status} {}", said.trim()).trim().to_owned()));
            }
            Ok(ready) => {
                let _ = qemu.kill();
                qemu.wait().doing(doing)?;
                return Ok(if ready == 0 { End::Late } else { End::Orphaned });
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => {
                let _ = qemu.kill();
                let _ = qemu.wait();
                return Err(errno).doing(doing);
            }
        }
    }
}
