//! What can go wrong with a virtual machine.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::cache::CacheError;
use crate::host::Missing;
use crate::images::ImageError;
use crate::rootfs::RootfsError;

/// Why a virtual machine did not run or did not tell how its command ended.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The cache folder can't be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// There is no root file system.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// An image of a container could not be made.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The machine lacks something.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// The harness knows how to boot only one architecture.
    #[error("virtual nodes exist on x86_64 alone, and this machine is {}", std::env::consts::ARCH)]
    Architecture,
    /// A program is not installed.
    #[error("{program} is not installed: run make test-vm, or apt-get install {package}")]
    NoProgram {
        /// What was to be run.
        program: &'static str,
        /// What has it.
        package: &'static str,
    },
    /// There is no kernel.
    #[error(
        "the kernel of Debian {release}: {why}\nIs the mirror that apt uses reachable? Set AGENTCUBE_MIRROR to use another"
    )]
    Kernel {
        /// The release of Debian.
        release: String,
        /// Why.
        why: String,
    },
    /// A disk could not be made.
    #[error("{program} could not make {path}: {why}")]
    Disk {
        /// The program.
        program: &'static str,
        /// The disk.
        path: PathBuf,
        /// What it said.
        why: String,
    },
    /// A file or system call failed.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The machine took too long.
    #[error(
        "the virtual machine was ended after {} s, its time limit{}; its console is in {}, which ends with:\n{tail}",
        .after.as_secs(), during(.command), .console.display()
    )]
    Timeout {
        /// How long it may take.
        after: Duration,
        /// The title of the command that ran; empty for none.
        command: String,
        /// Where what it printed on its console is.
        console: PathBuf,
        /// The last lines of that.
        tail: String,
    },
    /// The machine ended before the command did.
    #[error(
        "the virtual machine ended ({how}) before all of its commands did{}; its console is in {}, which ends with:\n{tail}",
        during(.command), .console.display()
    )]
    Died {
        /// How QEMU ended, and what it said.
        how: String,
        /// The title of the command that ran; empty for none.
        command: String,
        /// Where what it printed on its console is.
        console: PathBuf,
        /// The last lines of that.
        tail: String,
    },
    /// The list of what to test can't be used.
    #[error("{path}: {why}")]
    Suites {
        /// The list.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The test binaries could not be built.
    #[error("cargo could not build the test binaries: {0}")]
    Cargo(String),
    /// The process that wanted the machine is gone.
    #[error("the process that started this one is gone, and the virtual machine with it")]
    Orphaned,
}

/// For messages: while which command it happened.
fn during(command: &str) -> String {
    if command.is_empty() { String::new() } else { format!(", while it ran {command:?}") }
}

/// Results of virtual machines.
pub type Result<T> = std::result::Result<T, VmError>;

/// Names what was being done when a system call failed.
pub(super) trait Doing<T> {
    /// Turns the error into one that says `doing`.
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| VmError::Io { doing: doing(), source: source.into() })
    }
}
