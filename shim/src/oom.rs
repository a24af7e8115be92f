//! Notices when the kernel kills for want of memory: the counter `oom_kill` of the cgroup's `memory.events`.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

use criu_hooks::cgroup::oom_kills;

use tokio::io::{Interest, unix::AsyncFd};

/// Watches one cgroup.
pub struct OomWatch {
    // The kernel signals a change of such a file as an exceptional condition (POLLPRI).
    events: AsyncFd<File>,
    seen: u64,
}

impl OomWatch {
    /// Watches the cgroup `dir`; none where it has no memory controller.
    ///
    /// # Errors
    /// When `memory.events` is there but cannot be watched.
    pub fn new(dir: &Path) -> io::Result<Option<Self>> {
        let mut file = match File::open(dir.join("memory.events")) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let seen = kills(&mut file)?;
        // SAFETY: a `File` owns its descriptor, never changes it, and keeps it open for as long as it is registered.
        let events = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY)? };
        Ok(Some(Self { events, seen }))
    }

    /// Waits until the kernel has killed again.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub async fn killed(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.events.ready_mut(Interest::PRIORITY).await?;
            ready.clear_ready();
            let kills = kills(ready.get_inner_mut())?;
            if kills > self.seen {
                self.seen = kills;
                return Ok(());
            }
        }
    }
}

fn kills(file: &mut File) -> io::Result<u64> {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_string(&mut text)?;
    Ok(oom_kills(&text))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_told_from_other_events() {
        assert_eq!(oom_kills("low 0\nhigh 5\nmax 7\noom 3\noom_kill 2\noom_group_kill 9\n"), 2);
        assert_eq!(oom_kills(""), 0);
    }

    #[tokio::test]
    async fn a_node_without_the_controller_has_nothing_to_watch() {
        let dir = tempfile::tempdir().unwrap();
        assert!(OomWatch::new(dir.path()).unwrap().is_none());
    }

    proptest::proptest! {
        #[test]
        fn no_text_upsets_it_and_its_own_line_counts(noise in "\\PC{0,40}", kills: u64) {
            let _ = oom_kills(&noise);
            proptest::prop_assume!(!noise.starts_with("oom_kill "));
            proptest::prop_assert_eq!(oom_kills(&format!("{noise}\noom_kill {kills}\noom 7\n")), kills);
        }
    }
}
