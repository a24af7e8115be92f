//! Advice to the kernel about the memory of other processes, where no memory controller can reclaim.

use std::{
    ffi::{c_int, c_long, c_uint},
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
};

use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};

use super::{Error, Limit, STEP};

/// The engine's name in reports.
pub const ENGINE: &str = "process_madvise";

/// The number of `process_madvise`, the same on every machine.
const PROCESS_MADVISE: c_long = 440;
/// Read ahead: from swap, too.
const MADV_WILLNEED: c_int = 3;
/// Push out.
const MADV_PAGEOUT: c_int = 21;

#[repr(C)]
struct Area {
    start: usize,
    length: usize,
}

unsafe extern "C" {
    /// The C library's way to any system call.
    fn syscall(number: c_long, ...) -> c_long;
}

/// `process_madvise(2)` for one area.
fn advise(process: &OwnedFd, area: &Area, advice: c_int) -> Result<(), Errno> {
    let flags: c_uint = 0;
    // SAFETY: `area` is a valid iovec for as long as the call lasts, which reads that one and writes nothing. The area
    // it names belongs to another process; neither advice changes what is in it.
    let done = unsafe {
        syscall(PROCESS_MADVISE, process.as_raw_fd(), std::ptr::from_ref(area), 1usize, advice, flags)
    };
    if done >= 0 { Ok(()) } else { Err(last_error()) }
}

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// The areas of a `maps` file that may be pushed out, cut into pieces.
fn areas(maps: &str) -> Vec<Area> {
    let mut found = Vec::new();
    for line in maps.lines() {
        let Some((start, end, rest)) = area(line) else { continue };
        // The kernel's own pages, and what is a device rather than memory.
        if rest.contains("[v") || (rest.contains(" /dev/") && !rest.contains(" /dev/shm/")) {
            continue;
        }
        let step = usize::try_from(STEP).unwrap_or(usize::MAX);
        found.extend((start..end).step_by(step).map(|at| Area { start: at, length: step.min(end - at) }));
    }
    found
}

fn area(line: &str) -> Option<(usize, usize, &str)> {
    let (range, rest) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    let (start, end) = (number(start)?, number(end)?);
    // What cannot be accessed has no pages.
    (start < end && !rest.starts_with("---")).then_some((start, end, rest))
}

/// Whether a file of a process could not be opened, or read, because the process has ended.
fn has_ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || Errno::from_io_error(error) == Some(Errno::SRCH)
}

/// Gives `advice` about each area of each process, as long as it may go on.
fn each(
    processes: &[Pid],
    advice: c_int,
    mut goes_on: impl FnMut() -> Result<bool, Error>,
) -> Result<(), Error> {
    for &process in processes {
        let failed = |source: io::Error| Error::Process { process, source };
        let handle = match pidfd_open(process, PidfdFlags::empty()) {
            Ok(handle) => handle,
            // It has ended: it has no memory.
            Err(Errno::SRCH) => continue,
            Err(error) => return Err(failed(error.into())),
        };
        let maps = match fs::read_to_string(format!("/proc/{process}/maps")) {
            Ok(maps) => maps,
            Err(error) if has_ended(&error) => continue,
            Err(error) => return Err(failed(error)),
        };
        for area in areas(&maps) {
            if !goes_on()? {
                return Ok(());
            }
            match advise(&handle, &area, advice) {
                // EINVAL: locked, or huge pages. ENOMEM: a hole. Both stay.
                Ok(()) | Err(Errno::INVAL | Errno::NOMEM) => {}
                Err(Errno::SRCH) => break,
                Err(error) => return Err(failed(error.into())),
            }
        }
    }
    Ok(())
}

/// Pushes out what the processes hold, as far as `limit` lets it.
pub(super) fn all(processes: &[Pid], limit: &Limit) -> Result<(), Error> {
    each(processes, MADV_PAGEOUT, || limit.goes_on())
}

/// Starts to read back what was pushed out of these processes, without waiting for it.
///
/// # Errors
/// [`Error::Process`]. They need it not: what is missing is read when it is touched.
pub fn prefetch(processes: &[Pid]) -> Result<(), Error> {
    each(processes, MADV_WILLNEED, || Ok(true))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::runtime::Veto;

    #[test]
    fn memory_is_advised_about_and_the_kernels_own_pages_are_not() {
        let maps = "00400000-00401000 r-xp 00000000 08:01 7 /usr/bin/agent\n\
            7f0000000000-7f0004000000 rw-p 00000000 00:00 0\n\
            7f1000000000-7f1000001000 ---p 00000000 00:00 0\n\
            7f2000000000-7f2000001000 rw-s 00000000 00:01 5 /dev/dri/card0\n\
            7f3000000000-7f3000001000 rw-s 00000000 00:01 5 /dev/shm/x\n\
            7ffc00000000-7ffc00002000 r--p 00000000 00:00 0 [vvar]\n\
            bad line\n";
        let found = areas(maps);
        assert_eq!(found.len(), 1 + 4 + 1);
        assert_eq!((found[1].start, found[1].length), (0x7f00_0000_0000, 16 << 20));
        assert!(areas("2-1 rw-p 0\n-\n1-").is_empty());
    }

    #[test]
    fn advice_about_this_process_changes_nothing_in_it() {
        let held = vec![7u8; 1 << 20];
        let me = [rustix::process::getpid()];
        let veto = Veto::default();
        match all(&me, &Limit::new(&veto, Duration::from_secs(5))) {
            Ok(()) => prefetch(&me).unwrap(),
            // Without CAP_SYS_NICE.
            Err(error) => assert!(error.to_string().contains("cannot advise"), "{error}"),
        }
        assert!(held.iter().all(|&byte| byte == 7));
    }

    #[test]
    fn a_process_that_has_ended_holds_nothing() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = Pid::from_child(&child);
        // The reaper of other tests may have been there first: it has ended either way.
        let _ = child.wait();
        prefetch(&[pid]).unwrap();
        // Or just now: its file was not there, or was open already.
        assert!(has_ended(&fs::File::open(format!("/proc/{pid}/maps")).unwrap_err()));
        assert!(has_ended(&Errno::SRCH.into()));
        assert!(!has_ended(&Errno::ACCESS.into()));
    }

    #[test]
    fn a_veto_stops_it() {
        let veto = Veto::default();
        veto.raise();
        let stopped = all(&[rustix::process::getpid()], &Limit::new(&veto, Duration::from_secs(5)));
        assert!(matches!(stopped, Err(Error::Vetoed)), "{stopped:?}");
    }
}
