//! Writing memory in advance, while the agent runs: the dump that follows writes only what has changed since, so that the
//! agent stands still for less time. The kernel must track which pages are written ("soft-dirty"); many do not.
//! A huge page counts as one: a write to it marks 2 MiB.
//!
//! What was written in advance is the parent of the image that follows, and part of its generation. A failure leaves no
//! parent: the dump is then a whole one.

use std::{
    io::{self, Read},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use rustix::{fs::OFlags, process::Pid};

use super::{DEATH_TIMEOUT, DumpOptions, Engine, Failure, request, restart};
use crate::{
    container::{self, Blocker, Container},
    criu::{Launch, NoHooks, Session, rpc::Criu_req_type},
    image::{
        self, ImageWriter,
        pagemap::{self, Pagemap, PagemapError},
    },
    preflight::{self, Preflight},
};

const LOG: &str = "predump.log";

/// What writing in advance came to.
#[derive(Debug, Clone, Copy)]
pub struct PredumpReport {
    /// From the call to the end; the processes run for nearly all of it.
    pub total: Duration,
    /// The bytes of the parent.
    pub bytes: u64,
}

/// Why nothing was written in advance. The processes run on, and a dump can follow.
#[derive(Debug, thiserror::Error)]
pub enum PredumpError {
    /// The kernel does not tell which pages were written.
    #[error("this kernel does not track which pages are written (CONFIG_MEM_SOFT_DIRTY)")]
    NotTracked,
    /// A process has its own use for what the kernel notes of written pages, and would make CRIU miss some.
    #[error("process {0} resets by itself which pages count as written (/proc/PID/clear_refs is open)")]
    OwnTracking(Pid),
    /// CRIU could not be asked whether it does.
    #[error(transparent)]
    Preflight(#[from] preflight::Error),
    /// A look at the container showed that it must not be tried.
    #[error("the container cannot be dumped now: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Blocked(Vec<Blocker>),
    /// The container could not be looked at.
    #[error(transparent)]
    Container(#[from] container::Error),
    /// There is no place for it.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// CRIU failed.
    #[error("writing memory in advance failed: {0}")]
    Criu(Failure),
    /// CRIU did not come to an end.
    #[error("writing memory in advance was given up after {} s", .0.as_secs())]
    Timeout(Duration),
}

impl Engine {
    /// Writes the memory of the container whose first process is `init` as the parent of `writer`'s image, while the
    /// processes run; they stop for a moment to have their memory mapped. To be followed by [`Engine::dump`] with the
    /// same writer, soon: what is written until then is written again. The cgroup must not be frozen.
    ///
    /// # Errors
    /// See [`PredumpError`]; the image then has no parent, and a dump with this writer is a whole one.
    pub async fn predump(
        &self,
        container: &Container,
        init: Pid,
        writer: &ImageWriter,
        options: &DumpOptions,
    ) -> Result<PredumpReport, PredumpError> {
        let started = Instant::now();
        if !Preflight::new(&self.criu, &*self.spawner).features().await?.mem_track {
            return Err(PredumpError::NotTracked);
        }
        let blockers = container.blockers(init)?;
        if !blockers.is_empty() {
            return Err(PredumpError::Blocked(blockers));
        }
        if let Some(pid) = container
            .cgroup
            .procs()
            .map_err(container::Error::from)?
            .into_iter()
            .find(|pid| tracks_itself(*pid))
        {
            return Err(PredumpError::OwnTracking(pid));
        }
        match self.write_parent(init, writer, options).await {
            Ok(bytes) => Ok(PredumpReport { total: started.elapsed(), bytes }),
            Err(error) => {
                // A parent that is not whole must not become one.
                writer.remove_parent()?;
                Err(error)
            }
        }
    }

    async fn write_parent(
        &self,
        init: Pid,
        writer: &ImageWriter,
        options: &DumpOptions,
    ) -> Result<u64, PredumpError> {
        let parent = writer.make_parent()?;
        // Without this it would answer, and then wait for the dump itself.
        let mut request = request(Criu_req_type::SINGLE_PRE_DUMP, LOG, options.log_level);
        let opts = request.opts.mut_or_insert_default();
        opts.set_pid(init.as_raw_nonzero().get());
        opts.set_images_dir_fd(parent.as_raw_fd());
        opts.set_work_dir_fd(writer.work_dir().as_raw_fd());
        opts.set_track_mem(true);
        let seconds = options.freeze_timeout.as_secs().saturating_add(1);
        opts.set_timeout(u32::try_from(seconds).unwrap_or(u32::MAX));

        let failed = |error| PredumpError::Criu(Failure::new(error, writer.work_dir(), LOG));
        let patience = options.timeout.saturating_add(DEATH_TIMEOUT);
        let mut grip = Grip { session: None, patience };
        let session = Session::start(&*self.spawner, Launch::new(&self.criu)).map_err(failed)?;
        let session = grip.session.insert(session);
        let outcome = tokio::time::timeout(options.timeout, session.request(&request, &mut NoHooks)).await;
        grip.let_go().await;
        match outcome {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                let failure = Failure::new(error, writer.work_dir(), LOG);
                if !failure.is_explained() {
                    writer.check_space()?;
                }
                return Err(PredumpError::Criu(failure));
            }
            Err(_elapsed) => return Err(PredumpError::Timeout(options.timeout)),
        }
        Ok(writer.parent_bytes()?)
    }
}

/// Whether a process keeps the file open by which written pages are counted anew, as some garbage collectors do.
fn tracks_itself(pid: Pid) -> bool {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let mut files = descriptors.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    files.any(|file| file.file_name().is_some_and(|name| name == "clear_refs"))
}

/// Lets a pager serve pages of the parent, too: CRIU marks only those that it writes itself, and would restore all others
/// before the agent runs.
pub(super) fn let_parent_be_lazy(writer: &ImageWriter) -> io::Result<()> {
    let images = writer.images_dir();
    let names = writer.names().map_err(io::Error::other)?;
    let Some(stacks) = restart::stacks(images, &names)? else { return Ok(()) };
    let maps = names.iter().filter(|name| name.starts_with("pagemap-"));
    for name in maps.filter(|name| !name.starts_with("pagemap-shmem-")) {
        let mut bytes = Vec::new();
        let file = restart::open(images, name, OFlags::RDWR)?;
        (&file).take(pagemap::MAX_PAGEMAP).read_to_end(&mut bytes)?;
        let parent = match Pagemap::read(images, &image::name_in_parent(name)) {
            Ok(parent) => parent,
            // A process that was not there yet.
            Err(PagemapError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(io::Error::other(error)),
        };
        let marked = pagemap::with_lazy_parent(&bytes, &parent, &stacks).map_err(io::Error::other)?;
        if let Some(marked) = marked {
            restart::replace(&file, &marked)?;
        }
    }
    Ok(())
}

/// A CRIU that may hold processes in its grip: it is never killed before it has let go of them, not even when nobody
/// waits for it any more.
struct Grip {
    session: Option<Session>,
    patience: Duration,
}

impl Grip {
    async fn let_go(&mut self) {
        if let Some(session) = self.session.as_mut() {
            let _ = session.hang_up(self.patience).await;
            self.session = None;
        }
    }
}

impl Drop for Grip {
    fn drop(&mut self) {
        let (Some(session), Ok(runtime)) = (self.session.take(), tokio::runtime::Handle::try_current())
        else {
            return;
        };
        let mut rest = Grip { session: Some(session), patience: self.patience };
        runtime.spawn(async move { rest.let_go().await });
    }
}
