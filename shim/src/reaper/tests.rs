#![allow(clippy::unwrap_used)]

use std::{
    process::{Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use criu_hooks::spawn::Spawner as _;
use tokio::{runtime::Runtime, time::timeout};

use super::*;

/// One reaper for the process, as in a shim: a second one would take the first one's exits. Its runtime has a
/// thread of its own, so every test here also races with it.
fn reaper() -> &'static (Runtime, Reaper) {
    static REAPER: OnceLock<(Runtime, Reaper)> = OnceLock::new();
    REAPER.get_or_init(|| {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let guard = runtime.enter();
        let reaper = Reaper::start().unwrap();
        drop(guard);
        (runtime, reaper)
    })
}

/// For other modules' tests: their children must be spawned by it, because it reaps all children of the process.
pub(crate) fn shared() -> Reaper {
    reaper().1.clone()
}

fn run<T>(future: impl Future<Output = T>) -> T {
    reaper().0.block_on(async { timeout(Duration::from_mins(1), future).await.expect("the test hangs") })
}

fn sh(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

async fn execute(script: &str) -> (ExitStatus, String, String) {
    let mut command = runc::Command::from(sh(script));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let (status, _, stdout, stderr) = runc::Spawner::execute(&reaper().1, command).await.unwrap();
    (status, stdout, stderr)
}

/// Makes a process that the test's process adopts, as `runc create` does with a container's init; its pid. The
/// launcher is not a shell: a shell waits for a background child that ends early.
async fn adopt(script: &str) -> Pid {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let pid_file = directory.path().join("pid");
    let script = format!("echo $$ > {}; {script}", pid_file.display());
    execute(&format!("exec setsid --fork sh -c '{script}' >/dev/null 2>&1 </dev/null")).await;
    loop {
        match std::fs::read_to_string(&pid_file) {
            Ok(pid) if pid.ends_with('\n') => return Pid::from_raw(pid.trim().parse().unwrap()).unwrap(),
            _ => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
}

#[test]
fn hundreds_of_children_each_get_their_own_exit() {
    run(async {
        let mut waits = Vec::new();
        for number in 0..300 {
            let script = if number % 3 == 0 {
                format!("sleep 0.02; exit {}", number % 200)
            } else {
                format!("exit {}", number % 200)
            };
            let child = reaper().1.spawn(sh(&script)).unwrap();
            waits.push(tokio::spawn(async move { (number % 200, child.exit.await.unwrap()) }));
        }
        for wait in waits {
            let (code, exit) = wait.await.unwrap();
            assert_eq!(exit, Exit::Code(code));
        }
    });
}

#[test]
fn a_signal_is_reported_as_128_and_its_number() {
    run(async {
        let child = reaper().1.spawn(sh("sleep 100")).unwrap();
        rustix::process::pidfd_send_signal(&child.pidfd, rustix::process::Signal::KILL).unwrap();
        let status = child.exit.await.unwrap();
        assert_eq!(status, Exit::Signal(9));
        assert_eq!(ProcessExit { status, at: SystemTime::now() }.code(), 137);
        assert_eq!(ProcessExit { status: Exit::Code(42), at: SystemTime::now() }.code(), 42);
    });
}

#[test]
fn a_program_that_does_not_exist_is_an_error_and_takes_no_exit() {
    run(async {
        assert!(reaper().1.spawn(Command::new("/nonexistent/program")).is_err());
        let child = reaper().1.spawn(sh("exit 7")).unwrap();
        assert_eq!(child.exit.await.unwrap(), Exit::Code(7));
    });
}

#[test]
fn an_adopted_process_that_ended_before_its_claim_is_found() {
    run(async {
        let mark = reaper().1.mark();
        let pid = adopt("exit 42").await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(lock(&reaper().1.state).unclaimed.iter().any(|(_, of, _)| *of == pid), "not reaped yet");
        let exit = reaper().1.claim(pid, mark).await;
        assert_eq!(exit.code(), 42);
    });
}

#[test]
fn an_adopted_process_that_still_runs_is_watched() {
    run(async {
        let mark = reaper().1.mark();
        let pid = adopt("sleep 0.2; exit 43").await;
        let exit = reaper().1.claim(pid, mark).await;
        assert_eq!(exit.code(), 43);
    });
}

#[test]
fn many_adopted_processes_claimed_at_any_moment_keep_their_exits() {
    run(async {
        let tasks: Vec<_> = (0..100)
            .map(|number: i32| {
                tokio::spawn(async move {
                    let mark = reaper().1.mark();
                    let pid = adopt(&format!("sleep 0.0{}; exit {number}", number % 10)).await;
                    tokio::time::sleep(Duration::from_millis(u64::from(number.unsigned_abs() % 7) * 15))
                        .await;
                    let exit = reaper().1.claim(pid, mark).await;
                    assert_eq!(exit.status, Exit::Code(number));
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    });
}

#[test]
fn an_exit_before_the_mark_belongs_to_another_process() {
    let pid = Pid::from_raw(77).unwrap();
    let exit = ProcessExit { status: Exit::Code(1), at: SystemTime::now() };
    let mut state = State { marks: 1, ..State::default() };
    state.reaped(pid, exit);
    let mark = state.reaped;
    assert_eq!(state.take_unclaimed(pid, mark), None);
    let later = ProcessExit { status: Exit::Code(2), at: SystemTime::now() };
    state.reaped(pid, later);
    assert_eq!(state.take_unclaimed(pid, mark), Some(later));
}

#[test]
fn unwatched_exits_are_kept_only_under_a_mark_and_bounded() {
    let pid = Pid::from_raw(77).unwrap();
    let exit = ProcessExit { status: Exit::Code(1), at: SystemTime::now() };
    let mut state = State::default();
    state.reaped(pid, exit);
    assert!(state.unclaimed.is_empty());
    state.marks = 1;
    for _ in 0..2 * MAX_UNCLAIMED {
        state.reaped(pid, exit);
    }
    assert_eq!(state.unclaimed.len(), MAX_UNCLAIMED);
    let shared = Arc::new(Mutex::new(state));
    drop(Mark { at: 0, state: Arc::clone(&shared) });
    assert!(lock(&shared).unclaimed.is_empty());
}

#[test]
fn a_commands_output_is_collected_whole() {
    run(async {
        let (status, stdout, stderr) =
            execute("head -c 200000 /dev/zero | tr '\\0' x; echo problem >&2; exit 3").await;
        assert_eq!(status.code(), Some(3));
        assert_eq!(stdout.len(), 200_000);
        assert_eq!(stderr, "problem\n");
    });
}

#[test]
fn a_process_left_behind_with_the_pipes_does_not_hold_the_command_up() {
    run(async {
        let started = Instant::now();
        let (status, stdout, _) = execute("echo before; sleep 3 & exit 0").await;
        assert!(status.success());
        assert_eq!(stdout, "before\n");
        assert!(started.elapsed() < Duration::from_secs(2), "waited for the process left behind");
    });
}
