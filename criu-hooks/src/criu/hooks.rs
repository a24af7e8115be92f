//! What CRIU tells its caller while it works, and may be refused.

use std::os::fd::OwnedFd;

use async_trait::async_trait;
use rustix::process::Pid;

/// Why a hook refuses: CRIU then gives the dump or the restore up.
pub type HookError = Box<dyn std::error::Error + Send + Sync>;

/// A moment at which CRIU waits for its caller's word.
#[derive(Debug)]
pub enum Event {
    /// Before anything is touched by a dump.
    PreDump,
    /// Every process is in the grip of a dump, and nothing has been done to one.
    QueryExtFiles,
    /// The image is written and every process still stands still. A refusal lets them run on.
    PostDump,
    /// Before anything is made by a restore.
    PreRestore,
    /// The first process exists, in its new namespaces, and nothing else does.
    SetupNamespaces {
        /// The first process, seen from here.
        pid: Option<Pid>,
    },
    /// The namespaces are as in the image.
    PostSetupNamespaces,
    /// The other end of a restored terminal.
    OrphanPtsMaster {
        /// The new master.
        master: OwnedFd,
    },
    /// Every process is made and none runs yet.
    PostRestore {
        /// The first process, seen from here.
        pid: Option<Pid>,
    },
    /// The last moment at which a restore can be refused.
    PreResume,
    /// The processes run.
    PostResume,
    /// Any other moment, by CRIU's name for it.
    Other(String),
}

impl Event {
    /// CRIU's name of the moment.
    pub fn name(&self) -> &str {
        match self {
            Event::PreDump => "pre-dump",
            Event::QueryExtFiles => "query-ext-files",
            Event::PostDump => "post-dump",
            Event::PreRestore => "pre-restore",
            Event::SetupNamespaces { .. } => "setup-namespaces",
            Event::PostSetupNamespaces => "post-setup-namespaces",
            Event::OrphanPtsMaster { .. } => "orphan-pts-master",
            Event::PostRestore { .. } => "post-restore",
            Event::PreResume => "pre-resume",
            Event::PostResume => "post-resume",
            Event::Other(name) => name,
        }
    }

    /// The event that CRIU calls `name`. A terminal that comes without its descriptor is no event but a fault of
    /// the protocol: `None`.
    pub(crate) fn new(name: &str, pid: Option<i32>, descriptor: Option<OwnedFd>) -> Option<Event> {
        let pid = pid.filter(|&pid| pid > 0).and_then(Pid::from_raw);
        Some(match name {
            "pre-dump" => Event::PreDump,
            "query-ext-files" => Event::QueryExtFiles,
            "post-dump" => Event::PostDump,
            "pre-restore" => Event::PreRestore,
            "setup-namespaces" => Event::SetupNamespaces { pid },
            "post-setup-namespaces" => Event::PostSetupNamespaces,
            "orphan-pts-master" => Event::OrphanPtsMaster { master: descriptor? },
            "post-restore" => Event::PostRestore { pid },
            "pre-resume" => Event::PreResume,
            "post-resume" => Event::PostResume,
            other => Event::Other(other.to_owned()),
        })
    }
}

/// What is done at these moments.
#[async_trait]
pub trait NotifyHooks: Send {
    /// Called at each of them; CRIU waits meanwhile. An error is a refusal.
    ///
    /// # Errors
    /// To make CRIU give up.
    async fn notify(&mut self, event: Event) -> Result<(), HookError>;
}

/// Lets CRIU go on at every moment.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoHooks;

#[async_trait]
impl NotifyHooks for NoHooks {
    async fn notify(&mut self, _event: Event) -> Result<(), HookError> {
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_event_keeps_the_name_it_came_with() {
        for name in [
            "pre-dump",
            "post-dump",
            "pre-restore",
            "setup-namespaces",
            "post-setup-namespaces",
            "post-restore",
            "pre-resume",
            "post-resume",
            "query-ext-files",
            "some-later-event",
        ] {
            assert_eq!(Event::new(name, Some(7), None).unwrap().name(), name);
        }
    }

    #[test]
    fn a_terminal_without_its_descriptor_is_no_event() {
        assert!(Event::new("orphan-pts-master", None, None).is_none());
    }

    #[test]
    fn a_pid_that_cannot_be_is_none() {
        let event = Event::new("post-restore", Some(-1), None).unwrap();
        assert!(matches!(event, Event::PostRestore { pid: None }));
    }
}
