//! The threads of a container, as `/proc` shows them.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::Pid;

use super::calls::Call;
use crate::procfs;

/// One thread.
#[derive(Debug, Clone, PartialEq)]
pub struct Thread {
    /// Its process.
    pub process: Pid,
    /// Its own id.
    pub id: Pid,
    /// The name of its program.
    pub name: String,
    /// `S`, `T` and so on.
    pub state: char,
    /// The call that it is in; none when it is in none.
    pub call: Option<Call>,
    /// How often it has gone to sleep by itself.
    pub switches: u64,
    /// When it last began to run, by the clock of its processor.
    pub began: Option<Duration>,
    /// How many bytes it has read by `read` and the like.
    pub read: Option<u64>,
    /// Its signals.
    pub signals: Signals,
}

impl Thread {
    /// Whether it is stopped, by a signal or a debugger, so that nothing but those makes it run.
    pub fn is_stopped(&self) -> bool {
        matches!(self.state, 'T' | 't')
    }
}

/// The threads of these processes, without those that end meanwhile or have ended.
pub fn all(processes: &[Pid]) -> Vec<Thread> {
    let mut threads = Vec::new();
    for &process in processes {
        let Ok(tasks) = fs::read_dir(format!("/proc/{process}/task")) else { continue };
        threads.extend(tasks.flatten().filter_map(|task| read(process, &task.path())));
    }
    threads
}

fn read(process: Pid, task: &Path) -> Option<Thread> {
    let id = Pid::from_raw(task.file_name()?.to_str()?.parse().ok()?)?;
    let text = |name: &str| fs::read_to_string(task.join(name)).ok();
    let stat = procfs::parse_stat(&fs::read(task.join("stat")).ok()?)?;
    if matches!(stat.state, 'Z' | 'X') {
        return None;
    }
    let status = text("status")?;
    Some(Thread {
        process,
        id,
        name: stat.comm,
        state: stat.state,
        call: text("syscall").as_deref().and_then(call),
        switches: field(&status, "voluntary_ctxt_switches:").and_then(|text| text.parse().ok())?,
        began: text("sched").as_deref().and_then(began),
        read: text("io").as_deref().and_then(|io| field(io, "rchar:")).and_then(|text| text.parse().ok()),
        signals: Signals::parse(&status),
    })
}

fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key)).map(str::trim)
}

/// Parses `/proc/PID/task/TID/syscall`: none for a thread that runs, or is in no call.
pub fn call(text: &str) -> Option<Call> {
    let mut fields = text.split_whitespace();
    let number = fields.next()?.parse().ok()?;
    let mut register = || u64::from_str_radix(fields.next()?.strip_prefix("0x")?, 16).ok();
    let mut arguments = [0; 6];
    for argument in &mut arguments {
        *argument = register()?;
    }
    Some(Call { number, arguments, stack: register()?, instruction: register()? })
}

/// Finds `se.exec_start` in `/proc/PID/task/TID/sched`, milliseconds with a fraction.
fn began(text: &str) -> Option<Duration> {
    let value = text.lines().find_map(|line| line.strip_prefix("se.exec_start"))?;
    let milliseconds: f64 = value.trim().strip_prefix(':')?.trim().parse().ok()?;
    Duration::try_from_secs_f64(milliseconds / 1000.0).ok()
}

/// When the calling thread last began to run, by the clock of its processor.
pub(super) fn began_here() -> Option<Duration> {
    began(&fs::read_to_string("/proc/thread-self/sched").ok()?)
}

/// The signals that are pending for a thread or its process, and what it makes of them: one bit each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Signals {
    pending: u64,
    blocked: u64,
    ignored: u64,
}

impl Signals {
    /// Those of a thread; none when it is gone.
    pub fn of(process: Pid, thread: Pid) -> Signals {
        let status = fs::read_to_string(format!("/proc/{process}/task/{thread}/status"));
        status.map_or(Signals::default(), |status| Signals::parse(&status))
    }

    /// Parses `/proc/PID/task/TID/status`.
    fn parse(status: &str) -> Signals {
        let set = |key| field(status, key).and_then(|text| u64::from_str_radix(text, 16).ok()).unwrap_or(0);
        Signals { pending: set("SigPnd:") | set("ShdPnd:"), blocked: set("SigBlk:"), ignored: set("SigIgn:") }
    }

    /// Whether one is pending that makes the thread run: that it would act on, or that is among `awaited`, which it waits
    /// for. Those are blocked again as soon as its wait is interrupted.
    pub fn rouse(self, awaited: u64) -> bool {
        self.pending & (awaited | !(self.blocked | self.ignored)) != 0
    }
}

/// How many packets the network namespace of a process has taken in; none when that cannot be told.
pub fn packets(process: Pid) -> Option<u64> {
    let mut sum = 0u64;
    for (file, prefix, wanted) in [("snmp", "Ip:", "InReceives"), ("snmp6", "Ip6InReceives", "")] {
        let path = PathBuf::from(format!("/proc/{process}/net/{file}"));
        let Ok(text) = fs::read_to_string(path) else { continue };
        sum = sum.wrapping_add(counter(&text, prefix, wanted)?);
    }
    Some(sum)
}

/// A counter in a file of a name and a value a line, or of a line of names above a line of values.
fn counter(text: &str, prefix: &str, wanted: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(prefix));
    let first = lines.next()?;
    if wanted.is_empty() {
        return first.trim().parse().ok();
    }
    let place = first.split_whitespace().position(|name| name == wanted)?;
    lines.next()?.split_whitespace().nth(place)?.parse().ok()
}

/// The memory of a process.
pub struct Space(fs::File);

impl Space {
    /// Opens it.
    ///
    /// # Errors
    /// When the process is gone, or may not be looked at.
    pub fn open(process: Pid) -> std::io::Result<Space> {
        fs::File::open(format!("/proc/{process}/mem")).map(Space)
    }

    /// Reads exactly so many bytes.
    ///
    /// # Errors
    /// When there is no such memory.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        self.0.read_exact_at(bytes, address)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_read_and_a_running_thread_has_none() {
        let text = "232 0x3 0x7f1abc9c4900 0x1 0x186a0 0x0 0x0 0x7ffe77c3abc0 0x7f1abcb37a02\n";
        let call = call(text).unwrap();
        assert_eq!((call.number, call.arguments[3], call.stack), (232, 100_000, 0x7ffe_77c3_abc0));
        for other in ["running\n", "-1 0x7ffe77c3abc0 0x7f1abcb37a02\n", "", "7 0x1 0x2"] {
            assert_eq!(super::call(other), None, "{other:?}");
        }
    }

    #[test]
    fn the_time_of_the_last_run_is_read() {
        let text = "head (23661, #threads: 1)\n---\nse.exec_start     :      12418277.354388\n";
        assert_eq!(began(text).unwrap().as_micros(), 12_418_277_354);
        assert_eq!(began("se.vruntime : 3"), None);
    }

    #[test]
    fn a_blocked_or_ignored_signal_is_none_to_act_on() {
        let rouse = |pending, blocked, ignored, awaited| {
            let text = format!("SigPnd:\t{pending}\nShdPnd:\t0000\nSigBlk:\t{blocked}\nSigIgn:\t{ignored}\n");
            Signals::parse(&text).rouse(awaited)
        };
        assert!(rouse("2000", "0000", "1000", 0));
        assert!(!rouse("2000", "2000", "0000", 0));
        assert!(!rouse("2000", "0000", "2000", 0));
        assert!(!rouse("0000", "0000", "0000", 0x2000));
        // Whoever waits for a signal blocks it.
        assert!(rouse("2000", "2000", "0000", 0x2000));
        assert!(!rouse("2000", "2000", "0000", 0x1000));
    }

    #[test]
    fn packets_are_counted_in_both_kinds_of_file() {
        let text = "Ip: Forwarding InReceives\nIp: 1 77\nTcp: a\nTcp: 3\n";
        assert_eq!(counter(text, "Ip:", "InReceives"), Some(77));
        assert_eq!(counter("Ip6InReceives      \t5\nIp6InOctets 9", "Ip6InReceives", ""), Some(5));
        assert_eq!(counter("Udp: 1", "Ip:", "InReceives"), None);
    }

    #[test]
    fn the_threads_of_this_process_are_found() {
        let me = rustix::process::getpid();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || stopped.recv());
        let blocked = || all(&[me]).iter().filter(|thread| thread.id != me && thread.call.is_some()).count();
        while blocked() == 0 {
            std::thread::yield_now();
        }
        drop(stop);
        let _ = other.join();
        let bytes = [7u8; 3];
        let mut copy = [0u8; 3];
        Space::open(me).unwrap().read(bytes.as_ptr() as u64, &mut copy).unwrap();
        assert_eq!(copy, bytes);
    }

    proptest::proptest! {
        #[test]
        fn no_text_upsets_the_parsers(text: String) {
            let _ = (call(&text), began(&text), Signals::parse(&text), counter(&text, "Ip:", "InReceives"));
        }
    }
}
