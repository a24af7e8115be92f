//! Namespaces of single processes.

use std::io;

use rustix::process::Pid;

use super::blocker::Blocker;
use crate::procfs;

/// The namespaces that all processes must share with the first one. Mount and network namespaces of their own are dumped.
const SHARED: &[&str] = &["user", "pid", "ipc", "uts", "time"];

/// The namespaces of a container's first process.
pub(super) struct Namespaces(Vec<(&'static str, u64)>);

impl Namespaces {
    pub(super) fn of(init: Pid) -> io::Result<Self> {
        let of = |name: &'static str| Ok((name, procfs::namespace(init, name)?));
        Ok(Self(SHARED.iter().copied().map(of).collect::<io::Result<_>>()?))
    }

    /// In what `pid` is elsewhere, if it is.
    pub(super) fn blocker(&self, pid: Pid) -> io::Result<Option<Blocker>> {
        for &(kind, own) in &self.0 {
            if procfs::namespace(pid, kind)? != own {
                return Ok(Some(Blocker::Namespace { pid, kind }));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_in_another_namespace_is_told_by_its_kind() {
        let me = rustix::process::getpid();
        let own = Namespaces::of(me).unwrap();
        assert_eq!(own.blocker(me).unwrap(), None);
        let mut child = Command::new("unshare").args(["--uts", "sleep", "60"]).spawn().unwrap();
        let pid = Pid::from_child(&child);
        let find = || own.blocker(pid).unwrap();
        let found = (0..500).find_map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            find()
        });
        child.kill().unwrap();
        child.wait().unwrap();
        // Without the right to make one there is none.
        assert!(found.is_none_or(|found| found == Blocker::Namespace { pid, kind: "uts" }));
    }
}
