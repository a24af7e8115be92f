//! Several virtual machines at a time, with one output.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use super::guest::Ended;
use super::suites::MachinePlan;
use super::{Result, VmOptions, run};

/// Memory that QEMU takes beside the guest's, and that is left to others.
const SPARE_MIB: u64 = 512;

/// Runs machines as far as possible at the same time, each with the suites of its plan. What they print comes line by
/// line, marked with the machine's name; what became of each suite stands at the end. Gives back whether all passed.
pub fn test(plans: &[MachinePlan], options: &VmOptions) -> bool {
    let start = Instant::now();
    let (next, verdicts) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(plan) = plans.get(number) else { return };
            let options = VmOptions { kernel: plan.kernel.clone(), systemd: plan.systemd, ..options.clone() };
            let output = Marked { name: plan.name.clone(), line: Vec::new() };
            let verdict = judge(plan, run(&options, &plan.commands, output));
            verdicts.lock().unwrap_or_else(PoisonError::into_inner).insert(number, verdict);
        }
    };
    let count = at_a_time(processors(), available_mib(), options.memory_mib).min(plans.len());
    thread::scope(|scope| {
        for _ in 0..count {
            scope.spawn(work);
        }
    });

    let verdicts = verdicts.into_inner().unwrap_or_else(PoisonError::into_inner);
    let seconds = start.elapsed().as_secs();
    println!("\nIn {} virtual machines, {count} at a time, in {seconds} s:", plans.len());
    for verdict in verdicts.values() {
        println!("{}", verdict.text);
    }
    verdicts.values().all(|verdict| verdict.passed)
}

/// What became of one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Verdict {
    passed: bool,
    text: String,
}

fn judge(plan: &MachinePlan, ran: Result<Vec<Ended>>) -> Verdict {
    let name = &plan.name;
    match ran {
        Ok(ended) => {
            let lines = plan.commands.iter().zip(&ended).map(|(command, ended)| {
                let word = if ended.code == 0 { "passed" } else { "FAILED" };
                let title = command.title.as_deref().unwrap_or_default();
                format!("{word} {:4} s  {name}: {title}", ended.after.as_secs())
            });
            Verdict {
                passed: ended.len() == plan.commands.len() && ended.iter().all(|ended| ended.code == 0),
                text: lines.collect::<Vec<_>>().join("\n"),
            }
        }
        Err(error) => Verdict { passed: false, text: format!("FAILED  {name}: {error}") },
    }
}

/// How many machines run at a time: three on two processors, as each waits a third of the time, as far as memory goes, and
/// always one.
fn at_a_time(processors: usize, available_mib: Option<u64>, memory_mib: u32) -> usize {
    let processors = (processors * 3).div_ceil(2);
    let each = u64::from(memory_mib) + SPARE_MIB;
    let fit = available_mib.map_or(processors, |mib| usize::try_from(mib / each).unwrap_or(processors));
    processors.min(fit).max(1)
}

fn processors() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

fn available_mib() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib >> 10)
}

/// Writes whole lines to the standard output, each with a name before it.
struct Marked {
    name: String,
    line: Vec<u8>,
}

impl Write for Marked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(bytes);
        if let Some(end) = self.line.iter().rposition(|&byte| byte == b'\n') {
            let whole: Vec<u8> = self.line.drain(..=end).collect();
            io::stdout().lock().write_all(&marked(&self.name, &whole))?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

impl Drop for Marked {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            let _ = self.write(b"\n");
        }
    }
}

fn marked(name: &str, lines: &[u8]) -> Vec<u8> {
    lines
        .split_inclusive(|&byte| byte == b'\n')
        .flat_map(|line| [format!("{name} | ").as_bytes(), line].concat())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::vm::{GuestCommand, VmError};

    #[test]
    fn machines_run_one_on_each_processor_as_far_as_memory_goes() {
        assert_eq!(at_a_time(2, Some(24_000), 3072), 3);
        assert_eq!(at_a_time(8, Some(8_000), 3072), 2);
        assert_eq!(at_a_time(2, Some(1_000), 3072), 1);
        assert_eq!(at_a_time(1, None, 3072), 2);
    }

    #[test]
    fn every_line_has_the_name_of_its_machine() {
        assert_eq!(marked("a", b"one\ntwo\n"), b"a | one\na | two\n");
    }

    #[test]
    fn a_machine_passes_only_when_every_suite_did() {
        let command = |title: &str| GuestCommand { title: Some(title.into()), argv: vec![], env: vec![] };
        let plan = MachinePlan {
            name: "m".into(),
            kernel: "forky".into(),
            systemd: false,
            commands: vec![command("one"), command("two")],
        };
        let ended = |code| Ended { code, after: Duration::from_secs(7) };
        let verdict = judge(&plan, Ok(vec![ended(0), ended(101)]));
        assert!(!verdict.passed);
        assert_eq!(verdict.text, "passed    7 s  m: one\nFAILED    7 s  m: two");
        assert!(judge(&plan, Ok(vec![ended(0), ended(0)])).passed);
        assert!(!judge(&plan, Ok(vec![ended(0)])).passed);
        assert!(!judge(&plan, Err(VmError::Orphaned)).passed);
    }
}
