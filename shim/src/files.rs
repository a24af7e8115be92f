//! How many files the shim may have open.
//!
//! containerd starts shims with a soft limit of 1,024. While the memory of a wake is on its way the shim holds two
//! descriptors for each of the container's processes and for each that they fork, and a descriptor that does not fit is
//! cut from its message without a word. So the shim takes what the hard limit allows. Its children begin with what the shim
//! began with: runc passes that on to a container whose specification has no limit of its own.

use std::{io, os::unix::process::CommandExt, process::Command, sync::OnceLock};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What the shim began with, when that was changed.
static ORIGINAL: OnceLock<(Option<u64>, Option<u64>)> = OnceLock::new();

/// Raises the soft limit of open files to the hard one.
///
/// # Errors
/// Those of `setrlimit`; the limit is as it was then.
pub fn raise_limit() -> io::Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
        let _ = ORIGINAL.set((current, maximum));
    }
    Ok(())
}

/// Has `command` begin with the limit that the shim began with.
pub(crate) fn with_original_limit(command: &mut Command) {
    let Some(&(current, maximum)) = ORIGINAL.get() else { return };
    // SAFETY: it is one system call, which allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(move || Ok(setrlimit(Resource::Nofile, Rlimit { current, maximum })?));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::Stdio;

    use super::*;

    #[test]
    fn the_shim_may_open_more_files_and_its_children_no_more_than_before() {
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        let fewer = 1000.min(maximum.unwrap_or(u64::MAX) - 1);
        setrlimit(Resource::Nofile, Rlimit { current: Some(fewer), maximum }).unwrap();
        raise_limit().unwrap();
        assert_eq!(getrlimit(Resource::Nofile).current, maximum);
        let said = |command: &mut Command| {
            command.args(["-c", "ulimit -Sn; ulimit -Hn"]).stdout(Stdio::piped());
            let mut child = command.spawn().unwrap();
            let said = std::io::read_to_string(child.stdout.take().unwrap()).unwrap();
            // The reaper of other tests may have been there first.
            let _ = child.wait();
            said
        };
        let mut command = Command::new("/bin/sh");
        with_original_limit(&mut command);
        let hard = maximum.map_or_else(|| "unlimited".to_owned(), |maximum| maximum.to_string());
        assert_eq!(said(&mut command), format!("{fewer}\n{hard}\n"));
        // No file that this program opens is beyond what it may.
        assert_eq!(said(&mut Command::new("/bin/sh")), format!("{hard}\n{hard}\n"));
    }
}
