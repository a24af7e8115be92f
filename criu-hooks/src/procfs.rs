//! What `/proc` says about processes, read strictly.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use rustix::process::Pid;

/// One line of a `mountinfo` file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The kernel's number of this mount.
    pub id: u64,
    /// The number of the mount that it sits on.
    pub parent: u64,
    /// The device, `major:minor`.
    pub device: String,
    /// The directory of the file system that is visible here.
    pub root: PathBuf,
    /// Where it is mounted, seen from the root of the process.
    pub mount_point: PathBuf,
    /// The type of the file system.
    pub fs_type: String,
    /// Nobody may bind it elsewhere.
    pub unbindable: bool,
}

/// Some fields of `/proc/PID/stat`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// The name of the program, at most 15 bytes, chosen by the program.
    pub comm: String,
    /// `R`, `S`, `Z` and so on.
    pub state: char,
    /// The parent, 0 when it is not visible.
    pub ppid: i32,
    /// When it started, in clock ticks since the boot of the machine.
    pub start_time: u64,
}

/// Reads `/proc/PID/stat`.
///
/// # Errors
/// When the process is gone, or the file is not as known.
pub fn stat(pid: Pid) -> io::Result<Stat> {
    let bytes = fs::read(format!("/proc/{pid}/stat"))?;
    parse_stat(&bytes).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat is not as expected"))
    })
}

/// Parses a `stat` file. The name may hold spaces, newlines and parentheses: fields are counted from the last `)`.
pub fn parse_stat(bytes: &[u8]) -> Option<Stat> {
    let open = bytes.iter().position(|&byte| byte == b'(')?;
    let close = bytes.iter().rposition(|&byte| byte == b')')?;
    let comm = String::from_utf8_lossy(bytes.get(open + 1..close)?).into_owned();
    let rest = std::str::from_utf8(bytes.get(close + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    Some(Stat {
        comm,
        state: fields.first()?.chars().next()?,
        ppid: fields.get(1)?.parse().ok()?,
        // Field 22 of the file; the state is field 3.
        start_time: fields.get(19)?.parse().ok()?,
    })
}

/// The process that traces a thread of `pid` (a debugger), if any.
///
/// # Errors
/// When the process is gone.
pub fn tracer(pid: Pid) -> io::Result<Option<Pid>> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end meanwhile.
        let Ok(status) = fs::read(task?.path().join("status")) else {
            continue;
        };
        if let Some(pid) = parse_tracer(&status) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// The tracer in a `/proc/PID/status`.
fn parse_tracer(status: &[u8]) -> Option<Pid> {
    let status = String::from_utf8_lossy(status);
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?;
    // Pids of the kernel are positive.
    Pid::from_raw(tracer.trim().parse().ok().filter(|pid| *pid > 0)?)
}

/// The number that `pid` has in its own process id namespace: a restore gives it the same one again.
///
/// # Errors
/// When the process is gone.
pub fn inner_pid(pid: Pid) -> io::Result<i32> {
    let status = fs::read(format!("/proc/{pid}/status"))?;
    let status = String::from_utf8_lossy(&status);
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    line.and_then(|numbers| numbers.split_ascii_whitespace().last()?.parse().ok()).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/status is not as expected"))
    })
}

/// Whether a thread of `pid` waits for a child that it has started by `vfork` and that has not yet run its own program.
/// Only to be asked of a process in a frozen cgroup: what is frozen otherwise is in an interruptible wait there, while
/// such a one is in an uninterruptible wait, or runs the last steps towards it.
///
/// # Errors
/// When the process is gone.
pub fn is_forking(pid: Pid) -> io::Result<bool> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = fs::read(task?.path().join("stat")).ok().as_deref().and_then(parse_stat);
        if stat.is_some_and(|stat| matches!(stat.state, 'D' | 'R')) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The mounts that process `pid` sees.
///
/// # Errors
/// When the process is gone.
pub fn mounts(pid: Pid) -> io::Result<Vec<Mount>> {
    Ok(parse_mountinfo(&fs::read(format!("/proc/{pid}/mountinfo"))?))
}

/// Parses a `mountinfo` file; lines that are not as known are left out.
pub fn parse_mountinfo(bytes: &[u8]) -> Vec<Mount> {
    bytes.split(|&byte| byte == b'\n').filter_map(parse_mount).collect()
}

fn parse_mount(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let text = |field: &[u8]| std::str::from_utf8(field).ok().map(str::to_owned);
    let id = text(fields.next()?)?.parse().ok()?;
    let parent = text(fields.next()?)?.parse().ok()?;
    let device = text(fields.next()?)?;
    let root = unescape(fields.next()?);
    let mount_point = unescape(fields.next()?);
    let optional: Vec<&[u8]> = fields.by_ref().take_while(|field| *field != b"-").collect();
    let unbindable = optional.contains(&&b"unbindable"[..]);
    let fs_type = text(fields.next()?)?;
    Some(Mount { id, parent, device, root, mount_point, fs_type, unbindable })
}

/// Undoes the octal escapes (`\040` for a space) of mountinfo.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .filter(|digits| byte == b'\\' && digits.iter().all(|digit| (b'0'..=b'7').contains(digit)))
            .and_then(|digits| {
                u8::try_from(digits.iter().fold(0u32, |value, digit| value * 8 + u32::from(digit - b'0')))
                    .ok()
            });
        out.push(octal.unwrap_or(byte));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsString::from_vec(out))
}

/// What the descriptors 0, 1 and 2 of `pid` are, as `/proc/PID/fd` names them (`pipe:[1234]`, `/dev/pts/0`); `None` for
/// a closed one.
///
/// # Errors
/// When the process is gone.
pub fn stdio_keys(pid: Pid) -> io::Result<[Option<String>; 3]> {
    let mut keys = [None, None, None];
    for (number, key) in keys.iter_mut().enumerate() {
        match fs::read_link(format!("/proc/{pid}/fd/{number}")) {
            Ok(target) => *key = Some(target.to_string_lossy().into_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound && alive(pid) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(keys)
}

/// Whether `pid` exists and is not a zombie.
pub fn alive(pid: Pid) -> bool {
    stat(pid).is_ok_and(|stat| !matches!(stat.state, 'Z' | 'X'))
}

/// The number of the namespace `name` ("net", "cgroup") of `pid`, which tells two namespaces apart.
///
/// # Errors
/// When the process is gone.
pub fn namespace(pid: Pid, name: &str) -> io::Result<u64> {
    inode(Path::new(&format!("/proc/{pid}/ns/{name}")))
}

/// The inode of what `path` leads to.
pub(crate) fn inode(path: &Path) -> io::Result<u64> {
    Ok(rustix::fs::stat(path)?.st_ino)
}

/// The identifier of this boot of the machine.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Whether `path` is at or below `directory`, by bytes and component.
pub(crate) fn is_below(path: &Path, directory: &Path) -> bool {
    path.as_os_str().as_bytes() == directory.as_os_str().as_bytes() || path.starts_with(directory)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let text = b"77 (a) S (b\n) R 12 77 77 0 -1 4194304 1 0 0 0 1 2 0 0 20 0 1 0 987654 1 2 3";
        let stat = parse_stat(text).unwrap();
        assert_eq!(
            (stat.comm.as_str(), stat.state, stat.ppid, stat.start_time),
            ("a) S (b\n", 'R', 12, 987_654)
        );
    }

    #[test]
    fn a_torn_stat_is_refused() {
        for text in [&b""[..], b"1", b"1 (", b")(", b"1 (a", b"1 (a) S", b"1 (a) S x 3"] {
            assert_eq!(parse_stat(text), None, "{text:?}");
        }
    }

    #[test]
    fn mountinfo_is_read_with_optional_fields_and_escapes() {
        let text = b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:3 - ext3 /dev/root rw\n\
            bad line\n40 36 0:5 / /dev rw - tmpfs tmpfs rw";
        let mounts = parse_mountinfo(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].mount_point, Path::new("/mnt 2"));
        assert_eq!((mounts[0].fs_type.as_str(), mounts[0].device.as_str()), ("ext3", "98:0"));
        assert!(!mounts[0].unbindable);
        assert_eq!((mounts[1].id, mounts[1].parent, mounts[1].fs_type.as_str()), (40, 36, "tmpfs"));
    }

    #[test]
    fn an_unbindable_mount_is_known() {
        let mounts = parse_mountinfo(b"40 36 0:5 / /dev rw unbindable - tmpfs tmpfs rw");
        assert!(mounts[0].unbindable && mounts[0].fs_type == "tmpfs", "{mounts:?}");
    }

    #[test]
    fn a_torn_escape_stays_as_it_is() {
        assert_eq!(unescape(b"a\\04"), Path::new("a\\04"));
        assert_eq!(unescape(b"a\\777"), Path::new("a\\777"));
    }

    #[test]
    fn this_process_is_alive_and_untraced() {
        let me = rustix::process::getpid();
        assert!(alive(me));
        assert_eq!(tracer(me).unwrap(), None);
        assert!(mounts(me).unwrap().iter().any(|mount| mount.mount_point == Path::new("/proc")));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_upset_the_parsers(bytes: Vec<u8>) {
            let _ = parse_stat(&bytes);
            let _ = parse_mountinfo(&bytes);
            let _ = parse_tracer(&bytes);
        }

        #[test]
        fn fields_are_read_whatever_stands_around_them(
            comm in "\\PC{0,15}",
            ppid in 0_i32..,
            start: u64,
            tracer in 1_i32..,
            other in "[A-Z][a-z]{0,9}",
        ) {
            let zeros = ["0"; 17].join(" ");
            let line = format!("7 ({comm}) S {ppid} {zeros} {start} 0 0\n");
            let stat = parse_stat(line.as_bytes()).unwrap();
            proptest::prop_assert_eq!((stat.comm, stat.state), (comm, 'S'));
            proptest::prop_assert_eq!((stat.ppid, stat.start_time), (ppid, start));
            let status = format!("Name:\tx\n{other}:\t9\nTracerPid:\t{tracer}\n");
            proptest::prop_assert_eq!(parse_tracer(status.as_bytes()), Pid::from_raw(tracer));
        }
    }
}
