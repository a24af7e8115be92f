//! Time that passes while a container has no processes.
//!
//! CRIU restores timers, waits and monotonic clocks as they were, as if no time had passed. Here they are brought to where they
//! would be: [`Timers`] says what is due and when; before a restore [`edition`] makes an edition of the image in which
//! what remains is less by the time since the dump; and what the kernel has written into the memory of processes is set
//! when they stand still again ([`Remainders`]). The image is put back as it was when the restore is over, so no time is counted
//! twice.

use std::{
    collections::HashMap,
    fs::OpenOptions,
    io::{self, Read as _},
    os::unix::fs::FileExt as _,
    time::{Duration, Instant},
};

use rustix::{fs::OFlags, process::Pid, time::ClockId};

use super::{
    message::{self, Message},
    restart,
    timers::{self, Elapsed},
};
use crate::{
    cgroup::Cgroup,
    image::{
        Edition, Image, ImageWriter,
        pagemap::{self, Pagemap},
    },
    waits::{self, TimedWait, calls},
};

/// What is due in a container that was dumped, and when. Times are of CLOCK_BOOTTIME, which the suspension of the machine
/// does not stop.
#[derive(Debug, Clone)]
pub struct Timers {
    /// The end of the dump, by CLOCK_BOOTTIME and by CLOCK_REALTIME.
    dumped: (Duration, Duration),
    /// What remained then of those in the image.
    remained: Vec<Duration>,
    waits: Vec<Wait>,
}

/// A wait of a thread that has no process now.
#[derive(Debug, Clone, Copy)]
struct Wait {
    /// The ids of its thread and process in their own PID namespace, by which the image and the next processes are known.
    thread: u32,
    process: u32,
    call: calls::Call,
    due: Duration,
}

impl Timers {
    /// Reads the timers of a complete image, and takes those waits whose threads are still there, standing still.
    ///
    /// # Errors
    /// When the image cannot be read.
    pub(super) fn read(writer: &ImageWriter, waits: &[TimedWait]) -> io::Result<Timers> {
        let dumped = (waits::now(ClockId::Boottime), waits::now(ClockId::Realtime));
        let now = Instant::now();
        let mut remained = Vec::new();
        for name in names(writer.images_dir())? {
            let read = |name: &str| restart::read(&restart::open(writer.images_dir(), name, OFlags::RDONLY)?);
            if name == FILES {
                remained.extend(timers::of_files(&read(&name)?));
            } else if is_core(&name) {
                remained.extend(timers::of_process(&read(&name)?));
            }
        }
        let inside = |id: Pid| restart::id_inside(id.as_raw_nonzero().get().cast_unsigned());
        let waits = waits.iter().filter_map(|wait| {
            let due = dumped.0 + wait.until.saturating_duration_since(now);
            let (thread, process) = (inside(wait.thread)?, inside(wait.process)?);
            Some(Wait { thread, process, call: wait.call, due })
        });
        Ok(Timers { dumped, remained, waits: waits.collect() })
    }

    /// When each of them is due, by CLOCK_BOOTTIME, in no order.
    pub fn due(&self) -> impl Iterator<Item = Duration> {
        let timers = self.remained.iter().map(|left| self.dumped.0.saturating_add(*left));
        timers.chain(self.waits.iter().map(|wait| wait.due))
    }
}

const FILES: &str = "files.img";
/// How many bytes the kernel writes to tell what remains.
const SPAN: u64 = 16;

fn is_core(name: &str) -> bool {
    name.starts_with("core-")
}

fn names(directory: rustix::fd::BorrowedFd<'_>) -> io::Result<Vec<String>> {
    let entries = rustix::fs::Dir::read_from(directory)?;
    let name = |entry: rustix::io::Result<rustix::fs::DirEntry>| {
        Ok(entry?.file_name().to_string_lossy().into_owned())
    };
    entries.map(name).collect()
}

/// Sees to it that timers go on going off periodically that went off just before the dump.
///
/// # Errors
/// When the image cannot be changed, and is of no use.
pub(super) fn keep_periods(writer: &ImageWriter) -> io::Result<()> {
    for name in names(writer.images_dir())? {
        let (magic, set_again): (_, fn(&mut Message) -> bool) = match name.as_str() {
            FILES => (timers::FILES, timers::set_again),
            core if is_core(core) => (restart::CORE, timers::set_process_again),
            _ => continue,
        };
        let file = restart::open(writer.images_dir(), &name, OFlags::RDWR)?;
        match restart::read(&file).map(|bytes| message::edited(&bytes, magic, set_again)) {
            Ok(Some(bytes)) => restart::replace(&file, &bytes)?,
            Ok(None) => {}
            Err(error) => tracing::warn!(name, %error, "timers that go off periodically may stop"),
        }
    }
    Ok(())
}

/// An edition of `image` in which the time since its dump has passed, where that matters. Without one its timers go on
/// where they were: better than no wake.
pub(super) async fn edition(image: &Image, timers: Option<&Timers>) -> Option<Edition> {
    let (image, timers) = (image.clone(), timers?.clone());
    // Its disk may be slow.
    let made = tokio::task::spawn_blocking(move || make_edition(&image, &timers)).await;
    let made = made.map_err(io::Error::other).and_then(|made| made);
    made.inspect_err(|error| tracing::warn!(%error, "timers go on where they were")).ok()
}

fn make_edition(image: &Image, timers: &Timers) -> io::Result<Edition> {
    let (now, realtime) = (waits::now(ClockId::Boottime), waits::now(ClockId::Realtime));
    let elapsed = Elapsed {
        time: now.saturating_sub(timers.dumped.0),
        realtime: realtime.saturating_sub(timers.dumped.1),
        fraction: Duration::from_nanos(realtime.subsec_nanos().into()),
    };
    let mut changed = Vec::new();
    for file in &image.manifest().files {
        let name = file.name.as_str();
        let thread = name.strip_prefix("core-").and_then(|name| name.strip_suffix(".img"));
        let thread: Option<u32> = thread.and_then(|id| id.parse().ok());
        let is_clock = name.starts_with("timens-");
        if name != FILES && thread.is_none() && !is_clock {
            continue;
        }
        let bytes = restart::read(&restart::open(image.images_dir(), name, OFlags::RDONLY)?)?;
        let edited = if let Some(thread) = thread {
            let wait = timers.waits.iter().find(|wait| wait.thread == thread);
            message::edited(&bytes, restart::CORE, |core| {
                let passed = timers::elapse_process(core, &elapsed);
                let left = |wait: &Wait| wait.due.saturating_sub(now);
                wait.is_some_and(|wait| restart::elapsed(core, &wait.call, left(wait))) || passed
            })
        } else if is_clock {
            message::edited(&bytes, timers::CLOCKS, |clocks| timers::elapse_clocks(clocks, &elapsed))
        } else {
            message::edited(&bytes, timers::FILES, |file| timers::elapse_file(file, &elapsed))
        };
        changed.extend(edited.map(|bytes| (name.to_owned(), bytes)));
    }
    Edition::of(image, &changed)
}

/// Has the memory restored before anything runs in which the kernel has written what remains of these waits: what is to come
/// later cannot be written.
///
/// # Errors
/// When the image cannot be read or changed, and is of no use.
pub(super) fn let_remainders_be_early(writer: &ImageWriter, waits: &[TimedWait]) -> io::Result<()> {
    let mut pages: HashMap<Pid, Vec<u64>> = HashMap::new();
    for wait in waits {
        let Some((address, _)) = calls::remainder(&wait.call) else { continue };
        pages.entry(wait.process).or_default().extend([address, address.saturating_add(SPAN - 1)]);
    }
    for (process, addresses) in pages {
        let Some(inside) = restart::id_inside(process.as_raw_nonzero().get().cast_unsigned()) else {
            continue;
        };
        let file = match restart::open(writer.images_dir(), &Pagemap::name(inside), OFlags::RDWR) {
            Ok(file) => file,
            // It has ended.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let mut bytes = Vec::new();
        (&file).take(pagemap::MAX_PAGEMAP).read_to_end(&mut bytes)?;
        if let Some(marked) = pagemap::with_eager(&bytes, &addresses).map_err(io::Error::other)? {
            restart::replace(&file, &marked)?;
        }
    }
    Ok(())
}

/// What remains of waits, where the kernel has written it down for their threads.
#[derive(Debug)]
pub(super) struct Remainders(Vec<Wait>);

impl Remainders {
    /// Those of a container.
    pub(super) fn of(timers: Option<&Timers>) -> Remainders {
        let waits = timers.map(|timers| timers.waits.as_slice()).unwrap_or_default();
        let noted = waits.iter().filter(|wait| calls::remainder(&wait.call).is_some());
        Remainders(noted.copied().collect())
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Writes what is left now into the memory of the restored processes, which stand still. Where that fails a wait goes
    /// on with what remained.
    pub(super) fn write(&self, cgroup: &Cgroup) {
        let now = waits::now(ClockId::Boottime);
        for pid in cgroup.procs().unwrap_or_default() {
            let number = pid.as_raw_nonzero().get().cast_unsigned();
            let Some(inside) = restart::id_inside(number) else { continue };
            let own = self.0.iter().filter(|wait| wait.process == inside);
            for (wait, (address, unit)) in own.filter_map(|wait| Some((wait, calls::remainder(&wait.call)?)))
            {
                let left = wait.due.saturating_sub(now);
                let fraction = left.subsec_nanos() / unit;
                let bytes = [left.as_secs().to_ne_bytes(), u64::from(fraction).to_ne_bytes()].concat();
                let memory = OpenOptions::new().write(true).open(format!("/proc/{pid}/mem"));
                if let Err(error) = memory.and_then(|memory| memory.write_all_at(&bytes, address)) {
                    tracing::warn!(%pid, %error, "a wait goes on with what remained of it");
                }
            }
        }
    }
}
