//! Whether the CRIU of a node can be relied on: its version, its features on this kernel, and a try.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock},
    io::Errno,
    pipe::PipeFlags,
    process::{Pid, Signal, pidfd_send_signal},
};
use tokio::io::Interest;

use crate::{
    criu::{
        self, Launch, NoHooks, Session, log,
        rpc::{Criu_cg_mode, Criu_features, Criu_network_lock_method, Criu_opts, Criu_req, Criu_req_type},
    },
    readiness,
    spawn::Spawner,
};

/// The oldest CRIU that can dump sockets on kernels from 6.16 on.
pub const OLDEST: Version = Version { major: 4, minor: 2, sublevel: 0 };

/// Where CRIU notes what the kernel can do; a tmpfs, so that the note is gone with the boot that it was made in.
const KERNEL_NOTE: &str = "/run/criu.kdat";
/// Held while this program has it made.
const KERNEL_NOTE_LOCK: &str = "/run/criu.kdat.lock";

/// How long any of CRIU's answers may take here.
const PATIENCE: Duration = Duration::from_secs(20);
/// The longest answer to `--version` that is read.
const MAX_ANSWER: usize = 4096;

/// A version of CRIU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 4 in 4.2.1.
    pub major: u32,
    /// 2 in 4.2.1.
    pub minor: u32,
    /// 1 in 4.2.1.
    pub sublevel: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        if self.sublevel > 0 { write!(f, ".{}", self.sublevel) } else { Ok(()) }
    }
}

impl Version {
    /// Finds the version in what `criu --version` prints: a line `Version: 4.2.1`.
    pub fn parse(text: &str) -> Option<Version> {
        let version = text.lines().find_map(|line| line.trim().strip_prefix("Version:"))?.trim();
        // A build from a repository has more behind it: 4.2-rc1, 4.2.g1234.
        let mut numbers = version.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
        Some(Version {
            major: numbers.next()?,
            minor: numbers.next()?,
            sublevel: numbers.next().unwrap_or(0),
        })
    }
}

/// What the kernel offers to CRIU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// Memory changes are tracked: incremental dumps work.
    pub mem_track: bool,
    /// Pages can be served on demand.
    pub lazy_pages: bool,
    /// Processes can be told apart by descriptors.
    pub pidfd_store: bool,
}

/// Why CRIU cannot be relied on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such program.
    #[error("there is no CRIU: {} {hint}; install CRIU {OLDEST} or newer, or set criu_binary", binary.display())]
    Missing {
        /// What was looked for.
        binary: PathBuf,
        /// Where.
        hint: &'static str,
    },
    /// It cannot be run.
    #[error("the CRIU {} cannot be run: {source}", binary.display())]
    Run {
        /// The program.
        binary: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not say which version it is.
    #[error("{} does not say which version of CRIU it is, but {answer:?}", binary.display())]
    NoVersion {
        /// The program.
        binary: PathBuf,
        /// What it printed.
        answer: String,
    },
    /// It is too old.
    #[error("the CRIU {} is version {found}, and {OLDEST} or newer is needed; install a newer one, or set criu_binary", binary.display())]
    TooOld {
        /// The program.
        binary: PathBuf,
        /// Its version.
        found: Version,
    },
    /// It did not answer in time.
    #[error("the CRIU {} has not answered for {} s", binary.display(), PATIENCE.as_secs())]
    Timeout {
        /// The program.
        binary: PathBuf,
    },
    /// It failed where it should not.
    #[error("the CRIU {} failed to {what}: {why}", binary.display())]
    Failed {
        /// The program.
        binary: PathBuf,
        /// What was asked of it.
        what: &'static str,
        /// Why it failed.
        why: String,
    },
}

/// A CRIU to be looked at.
pub struct Preflight<'a> {
    binary: &'a Path,
    spawner: &'a dyn Spawner,
}

impl<'a> Preflight<'a> {
    /// Looks at the CRIU `binary`, a path or a name on the PATH.
    pub fn new(binary: &'a Path, spawner: &'a dyn Spawner) -> Self {
        Self { binary, spawner }
    }

    fn failed(&self, what: &'static str, why: impl std::fmt::Display) -> Error {
        Error::Failed { binary: self.binary.to_owned(), what, why: why.to_string() }
    }

    /// Its version. Cheap: some milliseconds.
    ///
    /// # Errors
    /// When it is missing, cannot be run, or is older than [`OLDEST`].
    pub async fn version(&self) -> Result<Version, Error> {
        let binary = || self.binary.to_owned();
        let answer = tokio::time::timeout(PATIENCE, self.ask_version()).await;
        let answer = answer.map_err(|_| Error::Timeout { binary: binary() })?.map_err(|source| {
            let hint = if self.binary.is_absolute() {
                "does not exist"
            } else {
                "is not on the PATH of this process"
            };
            match source.kind() {
                io::ErrorKind::NotFound => Error::Missing { binary: binary(), hint },
                _ => Error::Run { binary: binary(), source },
            }
        })?;
        let found = Version::parse(&answer).ok_or_else(|| Error::NoVersion { binary: binary(), answer })?;
        if found < OLDEST { Err(Error::TooOld { binary: binary(), found }) } else { Ok(found) }
    }

    async fn ask_version(&self) -> io::Result<String> {
        let (output, end) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let mut command = Command::new(self.binary);
        command.arg("--version").stdin(Stdio::null()).stdout(end).stderr(Stdio::null());
        let child = self.spawner.spawn(command)?;
        let answer = read(output).await;
        // Not one that closes its output and stays.
        let _ = pidfd_send_signal(&child.pidfd, Signal::KILL);
        child.exit.await?;
        answer
    }

    /// What the kernel offers to it.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub async fn features(&self) -> Result<Features, Error> {
        let mut asked = Criu_features::new();
        asked.set_mem_track(true);
        asked.set_lazy_pages(true);
        asked.set_pidfd_store(true);
        let mut request = Criu_req::new();
        request.set_type(Criu_req_type::FEATURE_CHECK);
        request.features = protobuf::MessageField::some(asked);
        let answer =
            self.request(&request).await?.map_err(|error| self.failed("tell its features", error))?;
        Ok(Features {
            mem_track: answer.features.mem_track(),
            lazy_pages: answer.features.lazy_pages(),
            pidfd_store: answer.features.pidfd_store(),
        })
    }

    /// Sees to it that CRIU has its note of what this kernel can do, which takes it some 30 ms to find out: otherwise the
    /// first dump after the machine's start pays for it. Of several processes that find none, one lets CRIU make it.
    ///
    /// # Errors
    /// When CRIU cannot be asked, or the lock is not to be had.
    pub async fn warm(&self) -> Result<(), Error> {
        if is_newer(Path::new(KERNEL_NOTE), self.binary) {
            return Ok(());
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = rustix::fs::open(KERNEL_NOTE_LOCK, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|error| self.failed("lock its note of the kernel's features", error))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            // CRIU replaces a note of another CRIU or another kernel by itself.
            Ok(()) => self.features().await.map(drop),
            Err(Errno::WOULDBLOCK) => Ok(()),
            Err(error) => Err(self.failed("lock its note of the kernel's features", error)),
        }
    }

    async fn request(&self, request: &Criu_req) -> Result<Result<criu::rpc::Criu_resp, criu::Error>, Error> {
        let work = async {
            let mut session = Session::start(self.spawner, Launch::new(self.binary))?;
            let answer = session.request(request, &mut NoHooks).await;
            let _ = session.finish().await;
            answer
        };
        let done = tokio::time::timeout(PATIENCE, work).await;
        done.map_err(|_| Error::Timeout { binary: self.binary.to_owned() })
    }

    /// Dumps a small process into `directory`, an empty one, and restores it. What it makes there stays.
    ///
    /// # Errors
    /// When either fails, with CRIU's reason.
    pub async fn self_test(&self, directory: &Path) -> Result<(), Error> {
        let images = std::fs::File::open(directory).map_err(|error| self.failed("open its images", error))?;
        let mut command = Command::new("sleep");
        command.arg("1000").current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        in_session_of_its_own(&mut command);
        let sleeper = self.spawner.spawn(command).map_err(|error| self.failed("start a process", error))?;
        let dumped = self.try_request(Criu_req_type::DUMP, Some(sleeper.pid), &images).await;
        if dumped.is_err() {
            let _ = pidfd_send_signal(&sleeper.pidfd, Signal::KILL);
        }
        // It must be reaped before its pid can be had again.
        sleeper.exit.await.map_err(|error| self.failed("see the end of a process", error))?;
        dumped?;
        let restored = self.try_request(Criu_req_type::RESTORE, None, &images).await?;
        if restored != Some(sleeper.pid) {
            return Err(self.failed("restore a small process", format!("{restored:?} came back")));
        }
        let _ = rustix::process::kill_process(sleeper.pid, Signal::KILL);
        self.spawner.adopt(sleeper.pid);
        Ok(())
    }

    async fn try_request(
        &self,
        kind: Criu_req_type,
        pid: Option<Pid>,
        images: &std::fs::File,
    ) -> Result<Option<Pid>, Error> {
        use std::os::fd::AsRawFd;
        let (what, log_file) = match kind {
            Criu_req_type::DUMP => ("dump a small process", "dump.log"),
            _ => ("restore a small process", "restore.log"),
        };
        let mut opts = Criu_opts::new();
        opts.set_images_dir_fd(images.as_raw_fd());
        opts.set_log_file(log_file.to_owned());
        opts.set_log_level(2);
        opts.set_manage_cgroups_mode(Criu_cg_mode::IGNORE);
        opts.set_network_lock(Criu_network_lock_method::SKIP);
        match pid {
            Some(pid) => opts.set_pid(pid.as_raw_nonzero().get()),
            // CRIU takes this for a restore alone.
            None => opts.set_rst_sibling(true),
        }
        let mut request = Criu_req::new();
        request.set_type(kind);
        request.opts = protobuf::MessageField::some(opts);
        match self.request(&request).await? {
            Ok(answer) => Ok(Pid::from_raw(answer.restore.pid())),
            Err(error) => {
                let reason = log::read_reason(images, log_file).ok().flatten();
                Err(self.failed(what, reason.map_or_else(|| error.to_string(), |reason| reason.to_string())))
            }
        }
    }
}

/// Whether `file` is there and was written after the program `binary` was installed.
fn is_newer(file: &Path, binary: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let Ok(written) = std::fs::metadata(file).map(|file| (file.mtime(), file.mtime_nsec())) else {
        return false;
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = if binary.is_absolute() {
        std::fs::metadata(binary).ok()
    } else {
        std::env::split_paths(&path).find_map(|directory| std::fs::metadata(directory.join(binary)).ok())
    };
    found.is_some_and(|binary| (binary.ctime(), binary.ctime_nsec()) < written)
}

/// CRIU dumps sessions as a whole, and this process must not be in the one that it dumps.
fn in_session_of_its_own(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: one system call that is safe between fork and exec.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
}

/// Reads to the end, or as much as is of interest.
async fn read(pipe: OwnedFd) -> io::Result<String> {
    let pipe = readiness::watch(pipe, Interest::READABLE)?;
    let mut answer = Vec::new();
    while answer.len() < MAX_ANSWER {
        let mut ready = pipe.readable().await?;
        let mut piece = [0; 512];
        match ready.try_io(|pipe| Ok(rustix::io::read(pipe.get_ref(), &mut piece)?)) {
            Ok(Ok(0)) => break,
            Ok(Ok(read)) => answer.extend_from_slice(&piece[..read]),
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::spawn::LocalSpawner;

    fn script(body: &str) -> tempfile::TempPath {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        file.into_temp_path()
    }

    #[test]
    fn versions_are_found_and_ordered() {
        let parse = |text| Version::parse(text).unwrap();
        assert_eq!(parse("Version: 4.2.1\nGitID: v4.2.1\n"), Version { major: 4, minor: 2, sublevel: 1 });
        assert_eq!(parse("Version: 4.2"), OLDEST);
        assert_eq!(parse("Version: 4.3-rc1").to_string(), "4.3");
        assert!(parse("Version: 3.17.1") < OLDEST && parse("Version: 4.10") > OLDEST);
        assert_eq!(Version::parse("criu 4.2"), None);
        assert_eq!(Version::parse("Version: four"), None);
    }

    #[test]
    fn a_note_is_of_use_when_it_was_written_after_the_program() {
        let folder = tempfile::tempdir().unwrap();
        let (older, newer) = (folder.path().join("older"), folder.path().join("newer"));
        std::fs::write(&older, "").unwrap();
        std::thread::sleep(Duration::from_millis(20));
        std::fs::write(&newer, "").unwrap();
        assert!(is_newer(&newer, &older) && !is_newer(&older, &newer));
        assert!(is_newer(&newer, Path::new("sh")) && !is_newer(&newer, Path::new("no-such-program")));
        assert!(!is_newer(&folder.path().join("none"), &older));
    }

    #[tokio::test]
    async fn a_missing_criu_is_told_with_where_it_was_looked_for() {
        for (binary, words) in
            [("/nonexistent/criu", "does not exist"), ("no-such-criu", "is not on the PATH")]
        {
            let error = Preflight::new(Path::new(binary), &LocalSpawner).version().await.unwrap_err();
            assert!(matches!(error, Error::Missing { .. }));
            let text = error.to_string();
            assert!(text.contains(binary) && text.contains(words) && text.contains("criu_binary"), "{text}");
        }
    }

    #[tokio::test]
    async fn an_old_criu_is_told_with_both_versions() {
        let old = script("echo Version: 3.17.1");
        let error = Preflight::new(&old, &LocalSpawner).version().await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("3.17.1") && text.contains("4.2 or newer"), "{text}");
    }

    #[tokio::test]
    async fn what_is_no_criu_is_told_with_what_it_said() {
        let other = script("echo Hello; exec sleep 100 >&-");
        let error = Preflight::new(&other, &LocalSpawner).version().await.unwrap_err();
        assert!(error.to_string().contains("Hello"), "{error}");
        let newer = script("echo Version: 5.0");
        assert_eq!(Preflight::new(&newer, &LocalSpawner).version().await.unwrap().major, 5);
    }

    proptest::proptest! {
        #[test]
        fn no_text_upsets_the_version(text in "\\PC*|Version: [0-9.]{0,40}") {
            let _ = Version::parse(&text);
        }
    }
}
