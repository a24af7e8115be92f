//! Whether CRIU can work inside the container's namespaces.
//!
//! CRIU dumps those namespaces that are not its own. When it works inside the container's it dumps none of them, which is
//! most of the time of a small dump; but a process that has left them would then be dumped without the one that it is
//! in, and only its restore would fail. So every thread is looked at before.

use std::{fmt, fs, io, os::fd::AsFd};

use rustix::{process::Pid, thread::LinkNameSpaceType};

use super::namespaces::{self, Kind};
use crate::{container::Blocker, procfs};

/// The namespaces of a task that are looked at: those that CRIU can work in, and that of its mounts.
type Numbers = [u64; 5];
const NAMES: [&str; 5] = ["net", "ipc", "uts", "cgroup", "mnt"];

/// Why a dump is not made inside the container's namespaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClassicReason {
    /// The caller wants it so.
    Asked,
    /// The processes run on, and will change what the image would leave out.
    LeavesRunning,
    /// A thread is in another namespace than the container's first process.
    LeftNamespace {
        /// Its process.
        pid: Pid,
        /// The thread.
        tid: i32,
        /// `net`, `ipc`, `uts` or `cgroup`.
        namespace: &'static str,
    },
    /// A process has mapped System V shared memory, which is dumped with its namespace.
    SharedMemory {
        /// The process.
        pid: Pid,
    },
    /// It was tried, and CRIU failed for a reason that is not known.
    Failed(String),
}

impl fmt::Display for ClassicReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClassicReason::Asked => f.write_str("asked for"),
            ClassicReason::LeavesRunning => f.write_str("the processes run on"),
            ClassicReason::LeftNamespace { pid, tid, namespace } => {
                write!(
                    f,
                    "thread {tid} of process {pid} is in another {namespace} namespace than the container"
                )
            }
            ClassicReason::SharedMemory { pid } => {
                write!(f, "process {pid} has mapped System V shared memory")
            }
            ClassicReason::Failed(why) => write!(f, "CRIU failed inside the container's namespaces: {why}"),
        }
    }
}

/// A thread of the container and the numbers of its namespaces, in the order of [`NAMES`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Task {
    pub(super) pid: Pid,
    pub(super) tid: i32,
    pub(super) namespaces: Numbers,
}

/// What decides.
#[derive(Debug, Clone)]
pub(super) struct Look {
    /// The namespaces of the first process.
    pub(super) init: Numbers,
    /// Every thread of every process that is not dead.
    pub(super) tasks: Vec<Task>,
    /// A process that has mapped System V shared memory.
    pub(super) shares: Option<Pid>,
}

impl Look {
    /// Looks at the processes `pids`, which stand still.
    pub(super) fn take(init: Pid, pids: &[Pid]) -> io::Result<Look> {
        let mut tasks = Vec::new();
        for pid in pids {
            tasks_of(*pid, &mut tasks)?;
        }
        let shares = if has_attached_segments(init)? { sharer(pids)? } else { None };
        Ok(Look { init: numbers(&format!("/proc/{init}"))?, tasks, shares })
    }

    /// A thread that is not where its process is: CRIU would put it there, in either mode.
    pub(super) fn stray(&self) -> Option<Blocker> {
        let leader = |pid: Pid| {
            let is_leader = |task: &&Task| task.pid == pid && task.tid == pid.as_raw_nonzero().get();
            self.tasks.iter().find(is_leader)
        };
        self.tasks.iter().find_map(|task| {
            let at = first_difference(&task.namespaces, &leader(task.pid)?.namespaces)?;
            Some(Blocker::StrayThread { pid: task.pid, tid: task.tid, namespace: NAMES[at] })
        })
    }

    /// What speaks against the fast mode.
    pub(super) fn against(&self) -> Option<ClassicReason> {
        for task in &self.tasks {
            // Mounts are dumped in either mode.
            if let Some(at) = first_difference(&task.namespaces[..4], &self.init[..4]) {
                let (pid, tid) = (task.pid, task.tid);
                return Some(ClassicReason::LeftNamespace { pid, tid, namespace: NAMES[at] });
            }
        }
        self.shares.map(|pid| ClassicReason::SharedMemory { pid })
    }
}

fn first_difference(one: &[u64], other: &[u64]) -> Option<usize> {
    one.iter().zip(other).position(|(one, other)| one != other)
}

/// The numbers of the namespaces of the task whose directory in `/proc` is `directory`.
fn numbers(directory: &str) -> io::Result<Numbers> {
    let mut found = [0; 5];
    for (number, name) in found.iter_mut().zip(NAMES) {
        *number = procfs::inode(format!("{directory}/ns/{name}").as_ref())?;
    }
    Ok(found)
}

/// Adds the living threads of `pid`.
fn tasks_of(pid: Pid, tasks: &mut Vec<Task>) -> io::Result<()> {
    let entries = match fs::read_dir(format!("/proc/{pid}/task")) {
        Ok(entries) => entries,
        // Nothing is born in a frozen cgroup, but what is dead may go.
        Err(_) if !procfs::alive(pid) => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let name = entry?.file_name();
        let Some(tid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        let directory = format!("/proc/{pid}/task/{tid}");
        match numbers(&directory) {
            Ok(namespaces) => tasks.push(Task { pid, tid, namespaces }),
            Err(_) if is_dead(&directory) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether a task is gone or a zombie: it has no namespaces any more.
fn is_dead(directory: &str) -> bool {
    let stat = fs::read(format!("{directory}/stat")).ok();
    stat.as_deref().and_then(procfs::parse_stat).is_none_or(|stat| matches!(stat.state, 'Z' | 'X'))
}

/// Whether anybody has mapped a segment of the IPC namespace of `init`. The kernel counts, so no name can deceive.
fn has_attached_segments(init: Pid) -> io::Result<bool> {
    let namespace = namespaces::open(init, Kind::Ipc.name())?;
    let read = || fs::read_to_string("/proc/sysvipc/shm");
    match namespaces::inside(namespace.as_fd(), LinkNameSpaceType::InterProcessCommunication, read) {
        Ok(table) => Ok(is_any_attached(&table)),
        // A kernel without System V IPC.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a segment of the table is mapped. A line that is not understood counts as one.
fn is_any_attached(table: &str) -> bool {
    let attached =
        |line: &str| line.split_ascii_whitespace().nth(6).and_then(|count| count.parse::<u64>().ok());
    table.lines().skip(1).any(|line| attached(line) != Some(0))
}

/// The first process that has mapped a segment, or a file that looks like one. In a pod others may have.
fn sharer(pids: &[Pid]) -> io::Result<Option<Pid>> {
    for pid in pids {
        let maps = match fs::read(format!("/proc/{pid}/maps")) {
            Ok(maps) => maps,
            Err(_) if !procfs::alive(*pid) => continue,
            Err(error) => return Err(error),
        };
        if maps.windows(6).any(|part| part == b" /SYSV") {
            return Ok(Some(*pid));
        }
    }
    Ok(None)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const HOME: Numbers = [1, 2, 3, 4, 5];

    fn pid() -> Pid {
        Pid::from_raw(7).unwrap()
    }

    fn task(tid: i32, namespaces: Numbers) -> Task {
        Task { pid: pid(), tid, namespaces }
    }

    fn look(tasks: Vec<Task>) -> Look {
        Look { init: HOME, tasks, shares: None }
    }

    #[test]
    fn a_container_whose_threads_are_all_where_init_is_speaks_for_the_fast_mode() {
        let look = look(vec![task(7, HOME), task(8, HOME)]);
        assert_eq!((look.against(), look.stray()), (None, None));
    }

    #[test]
    fn a_process_elsewhere_is_named_with_its_namespace() {
        for (at, namespace) in ["net", "ipc", "uts", "cgroup"].into_iter().enumerate() {
            let mut elsewhere = HOME;
            elsewhere[at] = 9;
            let look = look(vec![task(7, elsewhere), task(8, elsewhere)]);
            assert_eq!(look.against(), Some(ClassicReason::LeftNamespace { pid: pid(), tid: 7, namespace }));
            assert_eq!(look.stray(), None);
        }
    }

    #[test]
    fn a_thread_that_left_its_process_is_named_with_its_namespace() {
        for (at, namespace) in NAMES.into_iter().enumerate() {
            let mut elsewhere = HOME;
            elsewhere[at] = 9;
            let look = look(vec![task(7, HOME), task(8, elsewhere)]);
            assert_eq!(look.stray(), Some(Blocker::StrayThread { pid: pid(), tid: 8, namespace }));
        }
    }

    #[test]
    fn mounts_of_its_own_do_not_speak_against_the_fast_mode() {
        assert_eq!(look(vec![task(7, [1, 2, 3, 4, 9])]).against(), None);
    }

    #[test]
    fn mapped_shared_memory_speaks_against_it() {
        let look = Look { shares: Some(pid()), ..look(vec![task(7, HOME)]) };
        assert_eq!(look.against(), Some(ClassicReason::SharedMemory { pid: pid() }));
    }

    #[test]
    fn segments_count_when_somebody_has_mapped_them() {
        let head = "       key      shmid perms       size  cpid  lpid nattch   uid\n";
        let line = |attached: &str| {
            format!("{head}         0          0   600       4096   100   100 {attached}  0\n")
        };
        assert!(!is_any_attached(""));
        assert!(!is_any_attached(head));
        assert!(!is_any_attached(&line("0")));
        assert!(is_any_attached(&line("1")));
        assert!(is_any_attached(&format!("{head}something else\n")));
    }

    #[test]
    fn this_process_is_where_it_is() {
        let me = rustix::process::getpid();
        let mut tasks = Vec::new();
        tasks_of(me, &mut tasks).unwrap();
        let mine = numbers("/proc/self").unwrap();
        assert!(tasks.iter().any(|task| task.namespaces == mine), "{tasks:?}");
    }

    proptest::proptest! {
        #[test]
        fn no_table_makes_it_panic(table: String) {
            let _ = is_any_attached(&table);
        }
    }
}
