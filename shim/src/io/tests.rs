use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use criu_hooks::spawn::{Child, Exit, Spawner};
use rustix::{
    fs::{FileType, Mode as FileMode, OFlags},
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{LocalModes, OptionalActions, Winsize, tcgetattr, tcgetwinsize, tcsetattr},
};
use tempfile::TempDir;

use super::*;
use crate::{reaper::tests::shared as reaper, runtime::Stdio as StdioPaths};

const LIMIT: Duration = Duration::from_secs(20);
const IDENTITY: LoggerContext<'_> = LoggerContext { id: "agent-1", namespace: "k8s.io" };

/// The FIFOs that containerd makes for a process.
struct Fifos {
    directory: TempDir,
}

impl Fifos {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["stdin", "stdout", "stderr"] {
            let mode = FileMode::RUSR | FileMode::WUSR;
            rustix::fs::mknodat(rustix::fs::CWD, directory.path().join(name), FileType::Fifo, mode, 0)
                .unwrap();
        }
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn paths(&self, stdin: bool, terminal: bool) -> StdioPaths {
        StdioPaths {
            stdin: if stdin { self.text("stdin") } else { String::new() },
            stdout: self.text("stdout"),
            stderr: if terminal { String::new() } else { self.text("stderr") },
            terminal,
        }
    }

    async fn open(&self, stdin: bool, terminal: bool) -> Arc<ProcessIo> {
        ProcessIo::open(&self.paths(stdin, terminal), &IDENTITY, &reaper()).await.unwrap()
    }

    /// Reads a FIFO to its end in a thread, `delay` between pieces.
    fn reader(&self, name: &str, delay: Duration) -> std::thread::JoinHandle<Vec<u8>> {
        let path = self.path(name);
        let (opened, wait) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            let mut file = OpenOptions::new().read(true).open(path).unwrap();
            opened.send(()).unwrap();
            let mut all = Vec::new();
            let mut piece = vec![0; 20_000];
            loop {
                match file.read(&mut piece).unwrap() {
                    0 => return all,
                    read => all.extend_from_slice(&piece[..read]),
                }
                std::thread::sleep(delay);
            }
        });
        wait.recv().unwrap();
        reader
    }

    /// containerd's end of stdin.
    fn writer(&self) -> File {
        OpenOptions::new().write(true).open(self.path("stdin")).unwrap()
    }
}

/// Starts a process as `runc` would.
async fn start(io: &ProcessIo, script: &str) -> Child {
    let mut command = runc::Command::new("sh");
    command.args(["-c", script]);
    runc::io::Io::set(&*io.child_ends().unwrap(), &mut command).await.unwrap();
    let child = Spawner::spawn(&reaper(), command.into_std()).unwrap();
    io.started();
    child
}

/// Starts a process with what CRIU would inherit.
fn restore(io: &ProcessIo, script: &str) -> Child {
    let mut command = Command::new("sh");
    command.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut inherited: Vec<_> = io.inherit().unwrap().into_iter().map(|inherit| inherit.fd).collect();
    for fd in &inherited {
        assert!(!rustix::fs::fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK));
    }
    command.stderr(inherited.pop().unwrap()).stdout(inherited.pop().unwrap());
    if let Some(stdin) = inherited.pop() {
        command.stdin(stdin);
    }
    Spawner::spawn(&reaper(), command).unwrap()
}

/// Whether everything was passed on before the limit.
async fn drained(io: &ProcessIo, limit: Duration) -> bool {
    let started = Instant::now();
    io.drained(limit).await;
    started.elapsed() < limit
}

async fn end(child: Child) {
    assert_eq!(tokio::time::timeout(LIMIT, child.exit).await.unwrap().unwrap(), Exit::Code(0));
}

async fn join<T: Send + 'static>(thread: std::thread::JoinHandle<T>) -> T {
    let joined = tokio::task::spawn_blocking(move || thread.join().unwrap());
    tokio::time::timeout(LIMIT, joined).await.unwrap().unwrap()
}

fn lines(from: u32, to: u32) -> String {
    (from..=to).flat_map(|number| [number.to_string(), "\n".to_owned()]).collect()
}

#[tokio::test]
async fn output_is_neither_lost_nor_doubled_over_sleeps_with_a_slow_reader() {
    let fifos = Fifos::new();
    let io = fifos.open(false, false).await;
    let stdout = fifos.reader("stdout", Duration::from_millis(1));
    let stderr = fifos.reader("stderr", Duration::ZERO);
    let script =
        |cycle: u32| format!("seq {} {}; echo {cycle} >&2", cycle * 100_000 + 1, (cycle + 1) * 100_000);

    let mut child = start(&io, &script(0)).await;
    for cycle in 1..4 {
        // The process is gone before all of its output has been read: what is in the pipe must stay there.
        io.prepare_dump().await.unwrap();
        end(child).await;
        child = restore(&io, &script(cycle));
        io.finish_restore(None).unwrap();
    }
    end(child).await;
    assert!(drained(&io, LIMIT).await);
    assert!(join(stdout).await == lines(1, 400_000).into_bytes(), "output differs");
    assert_eq!(join(stderr).await, b"0\n1\n2\n3\n");
}

#[tokio::test]
async fn the_keys_are_what_criu_reads_of_the_process() {
    let fifos = Fifos::new();
    let io = fifos.open(true, false).await;
    let child = start(&io, "read line").await;
    io.prepare_dump().await.unwrap();
    let inherit = io.inherit().unwrap();
    assert_eq!(inherit.len(), 3);
    for (fd, inherit) in inherit.iter().enumerate() {
        let link = std::fs::read_link(format!("/proc/{}/fd/{fd}", child.pid.as_raw_nonzero())).unwrap();
        assert_eq!(link.to_str().unwrap(), inherit.key);
    }
    drop(inherit);
    io.abort_dump();
    fifos.writer().write_all(b"\n").unwrap();
    end(child).await;
    assert!(drained(&io, LIMIT).await, "an end of a pipe was left open");
}

#[tokio::test]
async fn a_reader_that_goes_away_and_comes_back_misses_nothing() {
    let fifos = Fifos::new();
    let io = fifos.open(false, false).await;
    // A pause lets the process write while nobody reads: more than all buffers hold.
    let child = start(&io, "seq 1 60000").await;
    let path = fifos.path("stdout");
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        let mut piece = [0; 10_000];
        for _ in 0..8 {
            let mut file = OpenOptions::new().read(true).open(&path).unwrap();
            let read = file.read(&mut piece).unwrap();
            all.extend_from_slice(&piece[..read]);
            drop(file);
            std::thread::sleep(Duration::from_millis(20));
        }
        OpenOptions::new().read(true).open(&path).unwrap().read_to_end(&mut all).unwrap();
        all
    });
    end(child).await;
    assert!(drained(&io, LIMIT).await);
    assert!(join(reader).await == lines(1, 60_000).into_bytes(), "output differs");
}

#[tokio::test]
async fn what_nobody_has_read_at_the_end_waits_for_a_reader() {
    let fifos = Fifos::new();
    let io = fifos.open(false, false).await;
    end(start(&io, "echo last words").await).await;
    assert!(drained(&io, LIMIT).await);
    tokio::time::sleep(Duration::from_millis(120)).await;
    assert_eq!(join(fifos.reader("stdout", Duration::ZERO)).await, b"last words\n");
}

#[tokio::test]
async fn a_process_that_is_left_behind_with_the_pipe_does_not_hold_the_end_up() {
    let fifos = Fifos::new();
    let io = fifos.open(false, false).await;
    let stdout = fifos.reader("stdout", Duration::ZERO);
    end(start(&io, "echo done; sleep 5 &").await).await;
    let started = Instant::now();
    assert!(!drained(&io, Duration::from_millis(300)).await);
    assert!(started.elapsed() < Duration::from_secs(3));
    assert_eq!(join(stdout).await, b"done\n");
}

#[tokio::test]
async fn streams_that_are_not_wanted_are_dev_null() {
    let fifos = Fifos::new();
    let paths = StdioPaths { stdout: fifos.text("stdout"), ..StdioPaths::default() };
    let io = ProcessIo::open(&paths, &IDENTITY, &reaper()).await.unwrap();
    let stdout = fifos.reader("stdout", Duration::ZERO);
    end(start(&io, "readlink /proc/self/fd/0 /proc/self/fd/2").await).await;
    assert!(drained(&io, LIMIT).await);
    assert_eq!(join(stdout).await, b"/dev/null\n/dev/null\n");
}

#[tokio::test]
async fn closing_stdin_gives_the_process_everything_and_then_the_end() {
    let fifos = Fifos::new();
    let io = fifos.open(true, false).await;
    let stdout = fifos.reader("stdout", Duration::from_millis(1));
    let child = start(&io, "cat; echo end").await;
    let text = lines(1, 100_000);
    let (mut writer, sent) = (fifos.writer(), text.clone());
    join(std::thread::spawn(move || {
        writer.write_all(sent.as_bytes()).unwrap();
    }))
    .await;
    // containerd's end is closed: only the shim's own keeps the FIFO open, until it is told.
    tokio::time::sleep(Duration::from_millis(50)).await;
    io.close_stdin();
    end(child).await;
    assert!(drained(&io, LIMIT).await);
    assert!(join(stdout).await == (text + "end\n").into_bytes(), "input differs");
}

#[tokio::test]
async fn a_writer_that_goes_away_and_comes_back_is_not_the_end_of_stdin() {
    let fifos = Fifos::new();
    let io = fifos.open(true, false).await;
    let stdout = fifos.reader("stdout", Duration::ZERO);
    let child = start(&io, "cat").await;
    for word in ["one\n", "two\n", "three\n"] {
        fifos.writer().write_all(word.as_bytes()).unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    io.close_stdin();
    end(child).await;
    assert!(drained(&io, LIMIT).await);
    assert_eq!(join(stdout).await, b"one\ntwo\nthree\n");
}

#[tokio::test]
async fn input_that_comes_during_a_sleep_wakes_and_is_delivered_after_it() {
    let fifos = Fifos::new();
    let io = fifos.open(true, false).await;
    let stdout = fifos.reader("stdout", Duration::ZERO);
    let child = start(&io, "head -c 4; sleep 0.3").await;
    let mut writer = fifos.writer();
    writer.write_all(b"one\nunread\n").unwrap();
    {
        tokio::time::sleep(Duration::from_millis(50)).await;
        io.prepare_dump().await.unwrap();
    };
    end(child).await;
    let waiting = io.input_waiting();
    tokio::pin!(waiting);
    let quiet = tokio::time::timeout(Duration::from_millis(100), &mut waiting).await;
    assert!(quiet.is_err(), "nothing has come, and yet there is input");

    writer.write_all(b"two\n").unwrap();
    tokio::time::timeout(LIMIT, &mut waiting).await.unwrap();
    // Closing while it sleeps is remembered too.
    drop(writer);
    io.close_stdin();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let child = restore(&io, "cat; echo end");
    io.finish_restore(None).unwrap();
    end(child).await;
    assert!(drained(&io, LIMIT).await);
    assert_eq!(join(stdout).await, b"one\nunread\ntwo\nend\n");
}

#[tokio::test]
async fn a_close_of_stdin_during_a_sleep_wakes_once() {
    let fifos = Fifos::new();
    let io = fifos.open(true, false).await;
    let stdout = fifos.reader("stdout", Duration::ZERO);
    let child = start(&io, "cat; echo end").await;
    io.set_asleep(true);
    io.close_stdin();
    tokio::time::timeout(LIMIT, io.input_waiting()).await.unwrap();
    tokio::time::timeout(LIMIT, io.input_waiting()).await.unwrap();
    io.set_asleep(false);
    end(child).await;
    assert_eq!(join(stdout).await, b"end\n");
    io.set_asleep(true);
    io.close_stdin();
    let again = tokio::time::timeout(Duration::from_millis(50), io.input_waiting()).await;
    assert!(again.is_err(), "it has had its end");
}

#[tokio::test]
async fn a_process_killed_in_its_sleep_ends_its_streams() {
    let fifos = Fifos::new();
    let io = fifos.open(true, false).await;
    let stdout = fifos.reader("stdout", Duration::ZERO);
    let child = start(&io, "echo good night").await;
    io.prepare_dump().await.unwrap();
    end(child).await;
    assert!(drained(&io, LIMIT).await, "the shim waits for an end that it holds itself");
    assert_eq!(join(stdout).await, b"good night\n");
}

#[tokio::test]
async fn the_output_of_a_process_killed_in_its_sleep_ends_before_its_delete() {
    for terminal in [false, true] {
        let fifos = Fifos::new();
        let io = fifos.open(true, terminal).await;
        let stdout = fifos.reader("stdout", Duration::ZERO);
        if terminal {
            let (master, mut process) = self::terminal();
            io.attach_console(master).unwrap();
            process.write_all(b"good night\n").unwrap();
            io.prepare_dump().await.unwrap();
        } else {
            let child = start(&io, "echo good night").await;
            io.prepare_dump().await.unwrap();
            end(child).await;
        }
        io.end_asleep();
        let read = tokio::time::timeout(LIMIT, join(stdout)).await.expect("its output does not end");
        assert_eq!(read, b"good night\n", "terminal: {terminal}");
        assert!(drained(&io, LIMIT).await);
    }
}

#[tokio::test]
async fn the_streams_of_a_process_that_has_woken_go_on_without_its_image() {
    let fifos = Fifos::new();
    let io = fifos.open(false, false).await;
    let stdout = fifos.reader("stdout", Duration::ZERO);
    let child = start(&io, "echo one").await;
    io.prepare_dump().await.unwrap();
    end(child).await;
    let child = restore(&io, "sleep 0.1; echo two");
    io.finish_restore(None).unwrap();
    io.end_asleep();
    end(child).await;
    assert_eq!(join(stdout).await, b"one\ntwo\n");
}

#[tokio::test]
async fn a_file_uri_appends_both_streams_to_the_file() {
    let fifos = Fifos::new();
    let file = fifos.path("logs/agent.log");
    std::fs::create_dir(fifos.path("logs")).unwrap();
    std::fs::write(&file, "before\n").unwrap();
    let paths = logging(format!("file://{}", file.display()));
    let io = ProcessIo::open(&paths, &IDENTITY, &reaper()).await.unwrap();
    end(start(&io, "seq 1 20000; echo problem >&2").await).await;
    assert!(drained(&io, LIMIT).await);
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.starts_with("before\n1\n") || text.starts_with("before\nproblem\n"));
    assert!(text.contains("problem\n"));
    assert_eq!(text.replace("problem\n", ""), format!("before\n{}", lines(1, 20_000)));
}

/// What containerd passes for a log URI: both streams have it.
fn logging(uri: String) -> StdioPaths {
    StdioPaths { stdout: uri.clone(), stderr: uri, ..StdioPaths::default() }
}

fn script(path: &Path, text: &str) {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o700).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

#[tokio::test]
async fn a_logging_binary_gets_both_streams_its_arguments_and_the_containers_name() {
    let fifos = Fifos::new();
    let (logger, out) = (fifos.path("logger"), fifos.text("out"));
    script(
        &logger,
        "#!/bin/sh\necho \"$CONTAINER_NAMESPACE $CONTAINER_ID $1=$2\" >> $2.info\nexec 5>&-\n\
         while read line; do echo \"$line\"; done <&4 > $2.err &\nexec /bin/cat <&3 > $2.out\n",
    );
    let paths = logging(format!("binary://{}?to={out}", logger.display()));
    let io = ProcessIo::open(&paths, &IDENTITY, &reaper()).await.unwrap();
    assert_eq!(std::fs::read_to_string(format!("{out}.info")).unwrap(), format!("k8s.io agent-1 to={out}\n"));

    let child = start(&io, "seq 1 50000; echo problem >&2").await;
    io.prepare_dump().await.unwrap();
    end(child).await;
    let child = restore(&io, "seq 50001 60000");
    io.finish_restore(None).unwrap();
    end(child).await;
    assert!(drained(&io, LIMIT).await);
    let want = lines(1, 60_000);
    let deadline = Instant::now() + LIMIT;
    while std::fs::read_to_string(format!("{out}.out")).unwrap() != want {
        assert!(Instant::now() < deadline, "the logging binary did not get everything");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(std::fs::read_to_string(format!("{out}.err")).unwrap(), "problem\n");
}

#[tokio::test]
async fn a_logging_binary_that_fails_is_named() {
    let fifos = Fifos::new();
    let logger = fifos.path("logger");
    script(&logger, "#!/bin/sh\nexit 3\n");
    for (path, want) in
        [(logger.to_str().unwrap(), "it ended with exit code 3"), ("/nonexistent", "did not become ready")]
    {
        let paths = logging(format!("binary://{path}"));
        let err = ProcessIo::open(&paths, &IDENTITY, &reaper()).await.err().unwrap().to_string();
        assert!(err.contains(want) && err.contains(path), "{err}");
    }
}

#[tokio::test]
async fn a_logging_binary_that_dies_does_not_stop_the_agent() {
    let fifos = Fifos::new();
    let logger = fifos.path("logger");
    script(&logger, "#!/bin/sh\nexec 5>&-\nread line <&3\nexit 0\n");
    let paths = logging(format!("binary://{}", logger.display()));
    let io = ProcessIo::open(&paths, &IDENTITY, &reaper()).await.unwrap();
    end(start(&io, "seq 1 100000").await).await;
    assert!(drained(&io, LIMIT).await);
}

/// A terminal and the process's side of it, as runc or CRIU makes one.
fn terminal() -> (OwnedFd, File) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let process =
        ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    let mut modes = tcgetattr(&process).unwrap();
    modes.output_modes.remove(rustix::termios::OutputModes::OPOST);
    tcsetattr(&process, OptionalActions::Now, &modes).unwrap();
    (master, process.into())
}

fn set_echo(process: &File, echo: bool) {
    let mut modes = tcgetattr(process).unwrap();
    modes.local_modes.set(LocalModes::ECHO, echo);
    tcsetattr(process, OptionalActions::Now, &modes).unwrap();
}

fn size(process: &File) -> (u16, u16) {
    let size = tcgetwinsize(process).unwrap();
    (size.ws_col, size.ws_row)
}

async fn read_line(process: &File) -> String {
    let mut process = process.try_clone().unwrap();
    join(std::thread::spawn(move || {
        let mut line = [0; 4096];
        let read = process.read(&mut line).unwrap();
        String::from_utf8_lossy(&line[..read]).into_owned()
    }))
    .await
}

#[tokio::test]
async fn a_terminal_keeps_its_size_and_loses_no_output_over_sleeps() {
    let fifos = Fifos::new();
    let io = fifos.open(true, true).await;
    let stdout = fifos.reader("stdout", Duration::from_millis(1));
    io.resize(80, 24).unwrap();
    let (master, mut process) = terminal();
    io.attach_console(master).unwrap();
    assert_eq!(size(&process), (80, 24), "a size set before the start was lost");

    let mut want = String::new();
    for cycle in 0..20_u16 {
        let text = lines(u32::from(cycle) * 500, u32::from(cycle) * 500 + 499);
        want += &text;
        // The last of it is still in the terminal when the process is frozen.
        let mut writing = process.try_clone().unwrap();
        join(std::thread::spawn(move || {
            writing.write_all(text.as_bytes()).unwrap();
        }))
        .await;
        io.prepare_dump().await.unwrap();
        drop(process);
        io.resize(100 + cycle, 40).unwrap();
        let (master, restored) = terminal();
        io.finish_restore(Some(master)).unwrap();
        assert_eq!(size(&restored), (100 + cycle, 40));
        process = restored;
    }
    drop(process);
    assert!(drained(&io, LIMIT).await);
    assert!(join(stdout).await == want.into_bytes(), "output differs");
}

#[tokio::test]
async fn a_process_whose_terminal_refuses_its_size_is_awake_all_the_same() {
    let fifos = Fifos::new();
    let io = fifos.open(false, true).await;
    io.resize(80, 24).unwrap();
    io.prepare_dump().await.unwrap();
    let (no_terminal, _writer) = std::io::pipe().unwrap();
    assert!(io.finish_restore(Some(no_terminal.into())).is_err());
    assert!(!*io.asleep.borrow(), "the end of its image would end its terminal");
}

#[tokio::test]
async fn a_size_that_the_process_set_itself_comes_back() {
    let fifos = Fifos::new();
    let io = fifos.open(false, true).await;
    let (master, process) = terminal();
    io.attach_console(master).unwrap();
    let own = Winsize { ws_col: 33, ws_row: 11, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&process, own).unwrap();
    io.prepare_dump().await.unwrap();
    drop(process);
    let (master, process) = terminal();
    io.finish_restore(Some(master)).unwrap();
    assert_eq!(size(&process), (33, 11));
}

#[tokio::test]
async fn input_typed_ahead_survives_a_sleep_and_is_not_echoed_twice() {
    for (typed, first) in [("ls -l\necho hi\n", "ls -l\n"), ("unfinished", "unfinished")] {
        let fifos = Fifos::new();
        let io = fifos.open(true, true).await;
        let stdout = fifos.reader("stdout", Duration::ZERO);
        let (master, process) = terminal();
        io.attach_console(master).unwrap();
        fifos.writer().write_all(typed.as_bytes()).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        io.prepare_dump().await.unwrap();
        drop(process);

        let (master, process) = terminal();
        io.finish_restore(Some(master)).unwrap();
        assert!(
            tcgetattr(&process).unwrap().local_modes.contains(LocalModes::ECHO),
            "the modes were not put back"
        );
        if !typed.ends_with('\n') {
            fifos.writer().write_all(b"\n").unwrap();
        }
        assert_eq!(read_line(&process).await.trim_end(), first.trim_end());
        drop(process);
        assert!(drained(&io, LIMIT).await);
        let echoed = String::from_utf8(join(stdout).await).unwrap().replace('\r', "");
        assert_eq!(echoed.trim_end(), typed.trim_end(), "the echo differs");
    }
}

#[tokio::test]
async fn a_dump_that_fails_gives_the_terminal_back_with_what_was_typed() {
    let fifos = Fifos::new();
    let io = fifos.open(true, true).await;
    let stdout = fifos.reader("stdout", Duration::ZERO);
    let (master, mut process) = terminal();
    io.attach_console(master).unwrap();
    set_echo(&process, false);
    fifos.writer().write_all(b"typed\n").unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    io.prepare_dump().await.unwrap();
    io.resize(90, 30).unwrap();
    io.abort_dump();
    assert_eq!(size(&process), (90, 30));
    assert_eq!(read_line(&process).await, "typed\n");
    process.write_all(b"still here\n").unwrap();
    drop(process);
    assert!(drained(&io, LIMIT).await);
    assert_eq!(join(stdout).await, b"still here\n");
}

#[tokio::test]
async fn input_for_a_sleeping_terminal_wakes_and_waits() {
    let fifos = Fifos::new();
    let io = fifos.open(true, true).await;
    let (master, process) = terminal();
    io.attach_console(master).unwrap();
    io.prepare_dump().await.unwrap();
    drop(process);
    let quiet = tokio::time::timeout(Duration::from_millis(100), io.input_waiting()).await;
    assert!(quiet.is_err());
    fifos.writer().write_all(b"wake up\n").unwrap();
    tokio::time::timeout(LIMIT, io.input_waiting()).await.unwrap();
    let (master, process) = terminal();
    io.finish_restore(Some(master)).unwrap();
    assert_eq!(read_line(&process).await, "wake up\n");
}

#[tokio::test]
async fn output_that_a_late_client_has_not_read_yet_is_waited_for_before_the_end() {
    let fifos = Fifos::new();
    let io = fifos.open(false, false).await;
    let child = start(&io, "echo last").await;
    child.exit.await.unwrap();
    let path = fifos.path("stdout");
    let read = Arc::new(Mutex::new(String::new()));
    let client = std::thread::spawn({
        let read = Arc::clone(&read);
        move || {
            std::thread::sleep(Duration::from_millis(150));
            let mut file = File::open(path).unwrap();
            let mut piece = [0; 100];
            let mut text = lock(&read);
            let length = file.read(&mut piece).unwrap();
            text.push_str(std::str::from_utf8(&piece[..length]).unwrap());
        }
    });
    assert!(drained(&io, LIMIT).await);
    assert_eq!(*lock(&read), "last\n");
    client.join().unwrap();
}

#[tokio::test]
async fn what_is_played_reaches_its_readers_whole_and_is_noted() {
    let fifos = Fifos::new();
    let taps = crate::probe_commands::Taps::default();
    let paths = fifos.paths(false, false);
    let io = ProcessIo::open_taped(&paths, &IDENTITY, &reaper(), Some(&taps)).await.unwrap();
    let readers = ["stdout", "stderr"].map(|name| fifos.reader(name, Duration::ZERO));
    // More than the pipes hold, and more than is remembered.
    let long: Vec<u8> = (0..200_000_u32).map(|number| number.to_le_bytes()[0]).collect();
    tokio::time::timeout(LIMIT, io.play(long.clone(), b"and this".to_vec())).await.unwrap().unwrap();
    assert!(drained(&io, LIMIT).await);
    let [stdout, stderr] = readers;
    let said = join(stdout).await;
    assert!(said == long, "{} bytes", said.len());
    assert_eq!(join(stderr).await, b"and this");
    assert!(long.starts_with(&taps.stdout.noted()) && taps.stdout.noted().len() == 10 << 10);
    assert_eq!(taps.stderr.noted(), b"and this");
}
