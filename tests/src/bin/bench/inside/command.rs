//! Commands of the node: how they are run, timed and given up.

use std::fs::File;
use std::io::Read as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// After this long a command is killed.
const PATIENCE: Duration = Duration::from_mins(2);

/// Runs a command whose output nobody needs; the error has what it complained about.
pub fn run(argv: &[String]) -> Result<()> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    // Not a pipe: what the command leaves running could hold its other end.
    let path = format!("{}/stderr-{}", super::SCRATCH, COUNT.fetch_add(1, Ordering::Relaxed));
    let file = File::create(&path).with_context(|| format!("making {path}"))?;
    let ended = end(argv, Stdio::from(file));
    let mut said = String::new();
    if ended.is_err() {
        let _ = File::open(&path).and_then(|mut file| file.read_to_string(&mut said));
    }
    let _ = std::fs::remove_file(&path);
    ended.with_context(|| last_lines(&said, 6))
}

/// Runs a command that has `/dev/null` for all of its stdio, as a container that it leaves behind inherits it.
pub fn run_mute(argv: &[String]) -> Result<()> {
    end(argv, Stdio::null())
}

/// Runs a command that is over soon and gives what it printed.
pub fn output(words: &[&str]) -> Result<String> {
    let output = Command::new(words[0]).args(&words[1..]).stdin(Stdio::null()).output();
    let output = output.with_context(|| words.join(" "))?;
    if !output.status.success() {
        bail!("{}: {}: {}", words.join(" "), output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The end of a text that may be long, in one line.
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(count)..].join("; ")
}

fn end(argv: &[String], stderr: Stdio) -> Result<()> {
    let shown = || argv.iter().map(String::as_str).take(8).collect::<Vec<_>>().join(" ");
    let (program, arguments) = argv.split_first().context("no command given")?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    let mut child = command.spawn().with_context(shown)?;
    if !ends_in_time(&child)? {
        let _ = child.kill();
        let _ = child.wait();
        bail!("{} did not end within {PATIENCE:?}", shown());
    }
    let status = child.wait().with_context(shown)?;
    if !status.success() {
        bail!("{}: {status}", shown());
    }
    Ok(())
}

fn ends_in_time(child: &Child) -> Result<bool> {
    let pid = Pid::from_child(child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("watching a command")?;
    let timeout = Timespec::try_from(PATIENCE).context("a time")?;
    Ok(poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)).context("watching a command")? > 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_command_that_fails_or_is_not_there_is_an_error() {
        run_mute(&words(&["true"])).unwrap();
        assert!(run_mute(&words(&["false"])).unwrap_err().to_string().contains("false"));
        assert!(run_mute(&words(&["/nonexistent"])).is_err());
        assert!(run_mute(&[]).is_err());
        assert_eq!(output(&["echo", "a"]).unwrap(), "a\n");
    }

    #[test]
    fn long_texts_are_cut_to_their_end() {
        assert_eq!(last_lines("a\n\n b\nc\n", 2), "b; c");
        assert_eq!(last_lines("", 2), "");
    }
}
