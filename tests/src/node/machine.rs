//! The machine itself as a node: for what needs systemd as the first process, with containerd a unit of its. That changes
//! the machine's files, so it is for virtual machines alone.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::enter::Entrance;
use super::error::{Doing as _, NodeError, Result};
use super::{CONTAINERD, Node, NodeOptions, cgroup_root};
use crate::rootfs;

/// Where containerd's output goes.
const LOG: &str = "/var/log/containerd.log";

/// Beside what Debian's own unit says.
const DROP_IN: &str = "[Service]\nStandardOutput=append:/var/log/containerd.log\nStandardError=append:/var/log/containerd.log\n";

/// Whether this is a virtual machine of the harness with systemd as its first process.
pub fn has_systemd() -> bool {
    Path::new("/run/systemd/system/agentcube-tests.service").exists()
}

impl Node {
    /// Makes this machine a node and starts its containerd by systemd. There can be one at a time.
    ///
    /// # Errors
    /// Where [`has_systemd`] is not so, or containerd does not come up.
    pub fn of_machine(options: NodeOptions) -> Result<Self> {
        if !has_systemd() {
            return Err(NodeError::Start(
                "this machine is no virtual machine of the harness with systemd".into(),
            ));
        }
        let doing = || "making a node of the machine".to_owned();
        let own = fs::read_to_string("/proc/self/cgroup").doing(doing)?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        let open = |path: &str| File::open(path).map(OwnedFd::from).doing(doing);
        let node = Self {
            root: open("/")?,
            net: open("/proc/self/ns/net")?,
            log: PathBuf::from(LOG),
            entrance: Entrance { name: "the machine".into(), init: 1, cgroup: cgroup_root()?.join(own) },
            options,
            rootfs: rootfs::ensure()?,
            containerd: Mutex::default(),
            imported: Mutex::new(HashSet::new()),
            supervisor: None,
            lifeline: None,
        };
        node.furnish()?;
        node.write_file("/etc/systemd/system/containerd.service.d/log.conf", DROP_IN)?;
        node.sh("systemctl daemon-reload && systemctl restart containerd")?;
        node.wait_until("containerd to answer", CONTAINERD, || {
            Ok(node.exec(&["ctr", "version"])?.status == 0)
        })?;
        Ok(node)
    }
}
