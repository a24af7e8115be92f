//! Exec probes of a sleeping agent: their commands, and what each of them last said while the agent was awake.
//!
//! An exec probe looks like any other exec but for its arguments, so somebody must tell what they are. What such a
//! command says is recorded whenever it runs, and stands in for the command while the agent sleeps. A failure never
//! does: a kubelet would restart the container for it.

use std::sync::{Arc, Mutex, PoisonError};

use oci_spec::runtime::Process;
use serde::{Deserialize, Serialize};

use crate::runtime::{ExecConfig, ProcessExit};

/// How many commands a container may have.
const MOST: usize = 32;
/// How long the arguments of one may be in all, in bytes.
const LONGEST: usize = 16 << 10;
/// How much is remembered of each stream, in bytes: a kubelet reads no more.
const MOST_OUTPUT: usize = 10 << 10;

/// The argument vectors of a container's exec probes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Vec<String>>", into = "Vec<Vec<String>>")]
pub struct Commands(Vec<Vec<String>>);

/// What cannot be the commands of probes.
#[derive(Debug, thiserror::Error)]
pub enum InvalidCommands {
    /// More than there may be.
    #[error("{0} probe commands are too many: there may be {MOST}")]
    TooMany(usize),
    /// One without a program.
    #[error("a probe command needs the name of a program")]
    Empty,
    /// One that is longer than it may be.
    #[error("the probe command {program:?} has {length} bytes of arguments: there may be {LONGEST}")]
    TooLong {
        /// Its first argument.
        program: String,
        /// Its length.
        length: usize,
    },
}

impl TryFrom<Vec<Vec<String>>> for Commands {
    type Error = InvalidCommands;

    fn try_from(commands: Vec<Vec<String>>) -> Result<Self, InvalidCommands> {
        if commands.len() > MOST {
            return Err(InvalidCommands::TooMany(commands.len()));
        }
        for arguments in &commands {
            let Some(program) = arguments.first().filter(|program| !program.is_empty()) else {
                return Err(InvalidCommands::Empty);
            };
            let length = arguments.iter().map(String::len).sum();
            if length > LONGEST {
                // A program's name alone may be that long.
                let program = program.chars().take(80).collect();
                return Err(InvalidCommands::TooLong { program, length });
            }
        }
        Ok(Self(commands))
    }
}

impl From<Commands> for Vec<Vec<String>> {
    fn from(commands: Commands) -> Self {
        commands.0
    }
}

/// What a stream has carried, up to a limit.
#[derive(Debug, Clone, Default)]
pub struct Tap(Arc<Mutex<Vec<u8>>>);

impl Tap {
    /// Takes note of bytes that came after all others.
    pub fn note(&self, bytes: &[u8]) {
        let mut noted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = MOST_OUTPUT.saturating_sub(noted.len());
        noted.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    /// What was noted.
    pub fn noted(&self) -> Vec<u8> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Records what one exec writes.
#[derive(Debug, Clone, Default)]
pub struct Taps {
    /// Its standard output.
    pub stdout: Tap,
    /// Its standard error.
    pub stderr: Tap,
}

/// What a command has said, as far as it is remembered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// How and when it ended.
    pub exit: ProcessExit,
    /// The beginning of its standard output.
    pub stdout: Vec<u8>,
    /// The beginning of its standard error.
    pub stderr: Vec<u8>,
}

/// What an exec probe last came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeResult {
    /// Its command.
    pub arguments: Vec<String>,
    /// How and when it last ended, once it has.
    pub exit: Option<ProcessExit>,
}

/// An exec of a probe's command under way.
#[derive(Debug)]
pub struct Recording {
    process: Process,
    taps: Taps,
}

impl Recording {
    /// Where its streams are to be noted.
    pub fn taps(&self) -> Taps {
        self.taps.clone()
    }
}

/// One command, and what it last said.
#[derive(Debug, Clone)]
struct Known {
    arguments: Vec<String>,
    /// With the whole of what was executed: in another directory or as another user it is another command.
    last: Option<(Process, Said)>,
}

/// What is known of a container's exec probes.
#[derive(Debug, Default)]
pub struct Memory(Vec<Known>);

impl Memory {
    /// Nothing yet of these commands.
    pub fn of(commands: Commands) -> Self {
        let mut memory = Self::default();
        memory.set(commands);
        memory
    }

    /// Takes these for the commands of probes from now on. What the same command said before stays known.
    pub fn set(&mut self, commands: Commands) {
        let mut before = std::mem::take(&mut self.0);
        self.0 = commands
            .0
            .into_iter()
            .map(|arguments| match before.iter().position(|known| known.arguments == arguments) {
                Some(place) => before.swap_remove(place),
                None => Known { arguments, last: None },
            })
            .collect();
    }

    /// What each command last came to.
    pub fn results(&self) -> Vec<ProbeResult> {
        let result = |known: &Known| ProbeResult {
            arguments: known.arguments.clone(),
            exit: known.last.as_ref().map(|(_, said)| said.exit),
        };
        self.0.iter().map(result).collect()
    }

    /// The process that an exec is to be, if it is a probe: one of the commands, with neither input nor terminal.
    fn probe(&self, exec: &ExecConfig) -> Option<Process> {
        if self.0.is_empty() || exec.stdio.terminal || !exec.stdio.stdin.is_empty() {
            return None;
        }
        // Whoever executes it is told what is wrong with it.
        let process: Process = serde_json::from_slice(&exec.spec).ok()?;
        let arguments = process.args().as_deref()?;
        let listed = self.0.iter().any(|known| known.arguments == arguments);
        (listed && !process.terminal().unwrap_or_default()).then_some(process)
    }

    /// Begins to record an exec if it is a probe.
    pub fn record(&self, exec: &ExecConfig) -> Option<Recording> {
        let process = self.probe(exec)?;
        Some(Recording { process, taps: Taps::default() })
    }

    /// Remembers how a recorded exec has ended; without that it could not even be started.
    pub fn learn(&mut self, recording: Recording, exit: Option<ProcessExit>) {
        let Recording { process, taps } = recording;
        let arguments = process.args().as_deref().unwrap_or_default();
        let Some(known) = self.0.iter_mut().find(|known| known.arguments == arguments) else { return };
        known.last = exit.map(|exit| {
            let said = Said { exit, stdout: taps.stdout.noted(), stderr: taps.stderr.noted() };
            (process, said)
        });
    }

    /// What stands in for an exec of a sleeping agent: what the same command said last, if that was a success.
    pub fn recall(&self, exec: &ExecConfig) -> Option<Said> {
        let process = self.probe(exec)?;
        let known = self.0.iter().filter_map(|known| known.last.as_ref());
        let (_, said) = known.into_iter().find(|(last, _)| *last == process)?;
        (said.exit.code == 0).then(|| said.clone())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::runtime::Stdio;

    fn commands(commands: &[&[&str]]) -> Commands {
        let owned = |words: &&[&str]| words.iter().map(ToString::to_string).collect();
        Commands::try_from(commands.iter().map(owned).collect::<Vec<Vec<String>>>()).unwrap()
    }

    fn memory() -> Memory {
        Memory::of(commands(&[&["cat", "/healthy"], &["true"]]))
    }

    fn exec(arguments: &[&str], directory: &str) -> ExecConfig {
        let spec = serde_json::json!({ "args": arguments, "cwd": directory, "user": { "uid": 0, "gid": 0 } });
        ExecConfig {
            exec_id: "e".to_owned(),
            spec: spec.to_string().into_bytes(),
            stdio: Stdio { stdout: "/out".to_owned(), ..Stdio::default() },
            taps: None,
        }
    }

    fn probe() -> ExecConfig {
        exec(&["cat", "/healthy"], "/")
    }

    fn ended(code: u32) -> ProcessExit {
        ProcessExit { code, at: SystemTime::UNIX_EPOCH }
    }

    fn ran(memory: &mut Memory, exec: &ExecConfig, said: &[u8], code: u32) {
        let recording = memory.record(exec).unwrap();
        recording.taps().stdout.note(said);
        memory.learn(recording, Some(ended(code)));
    }

    #[test]
    fn a_probe_is_answered_with_what_it_said_last() {
        let mut memory = memory();
        assert_eq!(memory.recall(&probe()), None, "it has never run");
        for text in ["first\n", "second\n"] {
            ran(&mut memory, &probe(), text.as_bytes(), 0);
            let said = memory.recall(&probe()).unwrap();
            assert_eq!((said.exit, said.stdout.as_slice()), (ended(0), text.as_bytes()));
        }
    }

    #[test]
    fn a_failure_and_a_start_that_failed_leave_nothing_to_answer_with() {
        let mut memory = memory();
        ran(&mut memory, &probe(), b"fine", 0);
        ran(&mut memory, &probe(), b"not fine", 1);
        assert_eq!(memory.recall(&probe()), None);
        let arguments = vec!["cat".to_owned(), "/healthy".to_owned()];
        let told = ProbeResult { arguments, exit: Some(ended(1)) };
        assert_eq!(memory.results()[0], told, "but it is told to who asks");
        ran(&mut memory, &probe(), b"fine again", 0);
        let recording = memory.record(&probe()).unwrap();
        memory.learn(recording, None);
        assert_eq!(memory.recall(&probe()), None);
        assert_eq!(memory.results()[0].exit, None);
    }

    #[test]
    fn nothing_but_the_very_command_is_a_probe() {
        let mut memory = memory();
        ran(&mut memory, &probe(), b"fine", 0);
        for other in [&["cat"][..], &["cat", "/healthy", "/etc/passwd"], &["cat", "/healthy "], &[]] {
            assert!(memory.record(&exec(other, "/")).is_none(), "{other:?}");
        }
        assert_eq!(memory.recall(&exec(&["true"], "/")), None, "another command");
        assert_eq!(memory.recall(&exec(&["cat", "/healthy"], "/tmp")), None, "in another directory");
        let with = |stdio| ExecConfig { stdio, ..probe() };
        let terminal = Stdio { terminal: true, ..Stdio::default() };
        let input = Stdio { stdin: "/in".to_owned(), ..Stdio::default() };
        for stdio in [terminal, input] {
            assert_eq!(memory.recall(&with(stdio.clone())), None, "{stdio:?}");
            assert!(memory.record(&with(stdio)).is_none());
        }
        assert!(memory.record(&ExecConfig { spec: b"{".to_vec(), ..probe() }).is_none());
    }

    #[test]
    fn commands_that_are_told_anew_keep_what_they_said() {
        let mut memory = memory();
        ran(&mut memory, &probe(), b"fine", 0);
        let recording = memory.record(&exec(&["true"], "/")).unwrap();
        memory.set(commands(&[&["cat", "/healthy"]]));
        assert!(memory.recall(&probe()).is_some());
        // One that is no probe any more when it ends.
        memory.learn(recording, Some(ended(0)));
        assert_eq!(memory.results().len(), 1);
        memory.set(Commands::default());
        assert_eq!(memory.recall(&probe()), None);
    }

    #[test]
    fn no_more_is_remembered_than_a_kubelet_reads() {
        let tap = Tap::default();
        tap.note(&vec![b'a'; MOST_OUTPUT - 1]);
        tap.note(b"bcd");
        tap.note(b"e");
        let noted = tap.noted();
        assert_eq!((noted.len(), noted.last()), (MOST_OUTPUT, Some(&b'b')));
    }

    #[test]
    fn commands_without_a_program_and_too_much_of_them_are_refused() {
        let refused = |commands: Vec<Vec<String>>| Commands::try_from(commands).unwrap_err().to_string();
        assert!(refused(vec![vec![]]).contains("name of a program"));
        assert!(refused(vec![vec![String::new()]]).contains("name of a program"));
        assert!(refused(vec![vec!["true".to_owned()]; MOST + 1]).contains("33 probe commands"));
        assert!(refused(vec![vec!["cat".to_owned(), "a".repeat(LONGEST)]]).contains("\"cat\" has"));
        assert_eq!(commands(&[]), Commands::default());
    }
}
