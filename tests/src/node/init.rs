//! The first process of a node: it makes the namespaces and mounts, then reaps orphans until it is killed.

use std::fs;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::Command;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, mount_change,
    unmount,
};
use rustix::process::{WaitOptions, pivot_root, wait};
use rustix::system::sethostname;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};

use super::error::{Doing as _, NodeError, Result};
use super::supervisor::Plan;
use crate::cgroup;

/// What the first process says when the node is ready for containerd.
pub(super) const READY: &str = "ready";

/// Runs the first process of a node. Comes back only with an error, which it has also printed for the supervisor.
///
/// # Errors
/// When a namespace or a mount can't be made.
pub fn init(plan: &str) -> Result<()> {
    let result = serde_json::from_str(plan)
        .map_err(|error| NodeError::Answer {
            what: format!("this is no plan of a node ({error})"),
            answer: plan.into(),
        })
        .and_then(|plan| build(&plan));
    match &result {
        Ok(()) => println!("{READY}"),
        Err(error) => println!("{}", error.to_string().replace('\n', " ")),
    }
    result?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .doing(|| "starting the reaper".into())?;
    runtime.block_on(reap())
}

fn build(plan: &Plan) -> Result<()> {
    // The supervisor may have died before the parent-death signal was armed: then the lifeline has ended too, or is
    // about to be watched by nobody but this process.
    if lifeline_ended()? {
        return Err(NodeError::Start("the process that wanted this node is gone".into()));
    }
    enter_cgroup(plan)?;
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: none of these concerns the table of file descriptors.
    unsafe { unshare_unsafe(flags) }.doing(|| "making namespaces".into())?;
    sethostname(plan.name.as_bytes()).doing(|| "setting the host name".into())?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .doing(|| "making the mounts private".into())?;
    mount_root(plan)?;
    // Service managers make all of a node's mounts shared; what runs on a node has to cope with it.
    mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)
        .doing(|| "making the node's mounts shared".into())?;
    set_up_network()
}

fn lifeline_ended() -> Result<bool> {
    let stdin = std::io::stdin();
    let mut events = [PollFd::new(&stdin, PollFlags::empty())];
    poll(&mut events, Some(&Timespec::default())).doing(|| "looking at the lifeline".into())?;
    Ok(!events[0].revents().is_empty())
}

/// The node's cgroup becomes the root of a cgroup namespace; this process then moves to a child of it.
fn enter_cgroup(plan: &Plan) -> Result<()> {
    let join = |path: &Path| {
        fs::write(path.join("cgroup.procs"), "0").doing(|| format!("entering the cgroup {}", path.display()))
    };
    // While the node's cgroup gives controllers to its children no process may be in it, so it takes them back for
    // this moment.
    let given = plan.cgroup.join("cgroup.subtree_control");
    let controllers = fs::read_to_string(&given).unwrap_or_default();
    for controller in controllers.split_whitespace() {
        fs::write(&given, format!("-{controller}")).doing(|| format!("writing {}", given.display()))?;
    }
    join(&plan.cgroup)?;
    // SAFETY: this does not concern the table of file descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWCGROUP) }.doing(|| "making a cgroup namespace".into())?;
    join(&plan.cgroup.join(cgroup::INIT))?;
    for controller in controllers.split_whitespace() {
        fs::write(&given, format!("+{controller}")).doing(|| format!("writing {}", given.display()))?;
    }
    Ok(())
}

/// Mounts the root file system with a writable layer in memory, and makes it the root.
fn mount_root(plan: &Plan) -> Result<()> {
    let memory = plan.work.join("memory");
    make_folder(&memory)?;
    mount_tmpfs(&memory, "mode=0755")?;
    let [upper, scratch, root] = ["upper", "work", "root"].map(|name| memory.join(name));
    for folder in [&upper, &scratch, &root] {
        make_folder(folder)?;
    }
    let layers = format!(
        "lowerdir={},upperdir={},workdir={}",
        plan.rootfs.display(),
        upper.display(),
        scratch.display()
    );
    mount_fs("overlay", &root, MountFlags::empty(), &layers)?;

    let quiet = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_fs("proc", &root.join("proc"), quiet, "")?;
    mount_fs("sysfs", &root.join("sys"), quiet, "")?;
    mount_fs("cgroup2", &root.join("sys/fs/cgroup"), quiet, "")?;
    mount_devices(&root.join("dev"))?;
    for (folder, options) in [
        ("run", "mode=0755"),
        ("tmp", "mode=1777"),
        // An overlay can't be the upper layer of another, so containers' layers are not on the node's root.
        ("var/lib/containerd", "mode=0711"),
        ("var/lib/agentcube", "mode=0700"),
    ] {
        make_folder(&root.join(folder))?;
        if folder == "var/lib/agentcube" && plan.images_on_disk {
            let images = plan.work.join("images");
            make_folder(&images)?;
            mount_bind(&images, root.join(folder)).doing(|| format!("mounting {}", images.display()))?;
        } else {
            mount_tmpfs(&root.join(folder), options)?;
        }
    }

    std::env::set_current_dir(&root).doing(|| "entering the new root".into())?;
    // CRIU refuses processes whose root is not the root of their mount namespace, so chroot would not do. With both
    // arguments the same, the old root lies on top of the new one and can be let go without a place of its own.
    pivot_root(".", ".").doing(|| "changing the root".into())?;
    unmount(".", UnmountFlags::DETACH).doing(|| "letting go of the host's root".into())?;
    std::env::set_current_dir("/").doing(|| "entering the new root".into())
}

/// The host's devices, with shared memory and terminals of the node's own.
fn mount_devices(dev: &Path) -> Result<()> {
    mount_bind_recursive("/dev", dev).doing(|| "mounting /dev".into())?;
    if dev.join("shm").is_dir() {
        mount_tmpfs(&dev.join("shm"), "mode=1777")?;
    }
    if dev.join("pts").is_dir() {
        mount_fs(
            "devpts",
            &dev.join("pts"),
            MountFlags::NOSUID | MountFlags::NOEXEC,
            "newinstance,ptmxmode=0666,mode=0620",
        )?;
    }
    Ok(())
}

fn mount_tmpfs(target: &Path, options: &str) -> Result<()> {
    mount_fs("tmpfs", target, MountFlags::NOSUID | MountFlags::NODEV, options)
}

fn mount_fs(kind: &str, target: &Path, flags: MountFlags, options: &str) -> Result<()> {
    let doing = || format!("mounting {kind} on {}", target.display());
    let options = std::ffi::CString::new(options).map_err(|_| rustix::io::Errno::INVAL).doing(doing)?;
    mount(kind, target, kind, flags, options.as_c_str()).doing(doing)
}

fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).doing(|| format!("making {}", path.display()))
}

fn set_up_network() -> Result<()> {
    let up = Command::new("/usr/sbin/ip").args(["link", "set", "lo", "up"]).output();
    let up = up.doing(|| "starting ip".into())?;
    if !up.status.success() {
        return Err(NodeError::Start(format!(
            "ip link set lo up: {}",
            String::from_utf8_lossy(&up.stderr).trim()
        )));
    }
    Ok(())
}

/// Reaps every orphan of the node until the lifeline ends.
async fn reap() -> Result<()> {
    let doing = || "reaping orphans".to_owned();
    let mut children = signal(SignalKind::child()).doing(doing)?;
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().doing(doing)?;
    let lifeline = pipe::Receiver::from_owned_fd(stdin).doing(doing)?;
    loop {
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        tokio::select! {
            _ = children.recv() => {}
            // Nothing is ever written to the lifeline, so that it is readable means that it has ended.
            _ = lifeline.readable() => return Ok(()),
        }
    }
}
