//! A run in a virtual machine: what it has measured comes out as one line of its output.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agentcube_tests::vm::{self, GuestCommand, VmOptions};
use anyhow::{Context as _, Result, ensure};

use crate::outside;
use crate::plan::Plan;
use crate::results::Results;

/// What the line begins with.
const RESULTS: &str = "results of the run: ";

/// Beyond what the plan allows: booting and building the node, all of it perhaps emulated.
const BOOT: Duration = Duration::from_mins(10);

/// Runs a plan in a virtual machine of its own.
///
/// # Errors
/// When the machine can't be had, or it tells of no results.
pub fn run(plan: &Plan) -> Result<Results> {
    vm::prepare(vm::KERNEL)?;
    let program = std::env::current_exe().context("finding this program")?;
    let command = GuestCommand {
        title: None,
        argv: vec![program.display().to_string(), "guest".into(), serde_json::to_string(plan)?],
        env: Vec::new(),
    };
    let options = VmOptions { timeout: Duration::from_secs(plan.seconds) + BOOT, ..VmOptions::default() };
    let output = Output::default();
    let ended = vm::run(&options, &[command], output.clone())?;
    ensure!(ended.iter().all(|ended| ended.code == 0), "the run in the virtual machine failed");
    let lines = output.0.lock().unwrap_or_else(PoisonError::into_inner);
    let text = String::from_utf8_lossy(&lines);
    let found = text.lines().find_map(|line| line.trim().strip_prefix(RESULTS));
    serde_json::from_str(found.context("the run in the virtual machine told of no results")?)
        .context("reading the results of the run")
}

/// The part in the virtual machine.
///
/// # Errors
/// When nothing can be measured.
pub fn measure(plan: &str) -> Result<()> {
    let results = outside::measure(serde_json::from_str(plan).context("the plan is not readable")?)?;
    println!("{RESULTS}{}", serde_json::to_string(&results)?);
    Ok(())
}

/// Keeps what the guest prints, and shows how far it is.
#[derive(Debug, Default, Clone)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let unfinished = kept.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        kept.extend_from_slice(bytes);
        let whole = kept.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        for line in kept[unfinished..whole.max(unfinished)].split_inclusive(|byte| *byte == b'\n') {
            if !line.starts_with(RESULTS.as_bytes()) {
                std::io::stderr().write_all(line)?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_output_is_kept_whole_however_it_comes() {
        let mut output = Output::default();
        for part in ["a\nb", "c\nresults", " of the run: {}\n"] {
            output.write_all(part.as_bytes()).unwrap();
        }
        assert_eq!(*output.0.lock().unwrap(), b"a\nbc\nresults of the run: {}\n");
    }
}
