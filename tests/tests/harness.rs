//! The harness itself, on containerd's own runtime: what the behaviour suite stands on.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use agentcube_tests::images::Image;
use agentcube_tests::node::{AgentSpec, Net, Node, NodeError, NodeOptions, Runtime, cgroup_root};
use agentcube_tests::{cache, cgroup, runtime_tests};

const SOON: Duration = Duration::from_secs(20);

runtime_tests!([runc]
    a_counter_counts_without_gaps,
    a_python_agent_remembers,
    a_node_agent_remembers,
    a_shell_has_a_terminal_of_the_right_size,
    exit_statuses_come_through,
    a_deleted_agent_leaves_nothing,
    agents_outlive_containerd,
);

fn start() -> Node {
    Node::start(NodeOptions::default()).unwrap()
}

fn a_counter_counts_without_gaps(runtime: Runtime) {
    let node = start();
    let (_agent, counter) = node.run_attached(&AgentSpec::new(Image::Counter, "c", runtime)).unwrap();
    let text = counter.wait_for_output("five lines", SOON, |text| text.lines().count() > 5).unwrap();
    let numbers: Vec<u32> = text.lines().take(5).map(|line| line.parse().unwrap()).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5]);

    let logged = node.run_agent(&AgentSpec::new(Image::Counter, "d", runtime)).unwrap();
    node.wait_until("lines in the log", SOON, || Ok(logged.log()?.lines().count() > 5)).unwrap();
    assert!(logged.log().unwrap().starts_with("1\n2\n3\n4\n5\n"));
}

fn a_python_agent_remembers(runtime: Runtime) {
    remembers(Image::Python, runtime);
}

fn a_node_agent_remembers(runtime: Runtime) {
    remembers(Image::NodeJs, runtime);
}

fn remembers(image: Image, runtime: Runtime) {
    let node = start();
    let spec = AgentSpec::new(image, "a", runtime).net(Net::Pod).port(8123).env("BALLAST_MIB", &8);
    let agent = node.run_agent(&spec).unwrap();
    agent.wait_healthy().unwrap();
    assert_eq!(agent.turn().unwrap(), 0);
    let before = agent.digest().unwrap();
    assert_eq!(before, agent.digest().unwrap());

    assert_eq!(agent.chat("good morning").unwrap().turn, 1);
    let second = agent.chat("and \"good\" evening, ä").unwrap();
    assert_eq!((second.turn, second.history), (2, 4));
    assert!(second.reply.contains("evening, ä") && second.reply.contains("good morning"), "{}", second.reply);
    assert_eq!(agent.turn().unwrap(), 2);
    assert_ne!(agent.digest().unwrap(), before);
    assert!(agent.log().unwrap().ends_with("turn 1\nturn 2\n"), "{:?}", agent.log());

    let (pid, state) = agent.task().unwrap().unwrap();
    assert!(pid > 1);
    assert_eq!(state, "RUNNING");
    let inside = agent.exec(&["cat", "/proc/1/comm"]).unwrap().check().unwrap();
    assert!(["python3\n", "node\n", "MainThread\n"].contains(&inside.as_str()), "{inside:?}");
    agent.delete().unwrap();
    assert_eq!(agent.task().unwrap(), None);
}

fn a_shell_has_a_terminal_of_the_right_size(runtime: Runtime) {
    let node = start();
    let (_agent, shell) = node.run_attached(&AgentSpec::new(Image::Shell, "s", runtime).tty()).unwrap();
    shell.wait_for_output("a prompt", SOON, |text| text.contains("agent$ ")).unwrap();
    shell.write("echo $((6 * 7))\n").unwrap();
    shell.wait_for_output("an answer", SOON, |text| text.contains("\n42\r")).unwrap();
    // ctr starts to watch its terminal some time after the prompt, and forgets what happened before.
    node.wait_until("the new size to arrive", SOON, || {
        shell.resize(34, 99)?;
        shell.resize(33, 99)?;
        shell.write("stty size\n")?;
        thread::sleep(Duration::from_millis(200));
        Ok(shell.stdout().contains("33 99\r"))
    })
    .unwrap();
    shell.write("exit 3\n").unwrap();
    assert_eq!(shell.wait(SOON).unwrap().status, 3);
}

fn exit_statuses_come_through(runtime: Runtime) {
    let node = start();
    let run = |id: &str, script: &str| {
        let spec = AgentSpec::new(Image::Counter, id, runtime).args(&["/bin/sh", "-c", script]);
        node.run_agent(&spec).unwrap().wait_and_delete(SOON).unwrap()
    };
    assert_eq!(run("crash", "exit 42"), 42);
    assert_eq!(run("fine", "exit 0"), 0);

    let agent = node.run_agent(&AgentSpec::new(Image::Python, "a", runtime).env("TERM_STATUS", &7)).unwrap();
    agent.wait_healthy().unwrap();
    agent.kill("SIGTERM").unwrap();
    assert_eq!(agent.wait_and_delete(SOON).unwrap(), 7);
    let agent = node.run_agent(&AgentSpec::new(Image::Counter, "k", runtime)).unwrap();
    agent.kill("SIGKILL").unwrap();
    assert_eq!(agent.wait_and_delete(SOON).unwrap(), 137);
}

fn a_deleted_agent_leaves_nothing(runtime: Runtime) {
    let node = start();
    node.import(Image::Counter, "default").unwrap();
    let before = node.snapshot();
    let agent = node.run_agent(&AgentSpec::new(Image::Counter, "c", runtime).net(Net::Pod)).unwrap();
    let added = node.snapshot().added_since(&before);
    // What can't be seen can't be missed afterwards.
    for (kind, things) in [
        ("mounts", &added.mounts),
        ("cgroups", &added.cgroups),
        ("processes", &added.processes),
        ("sockets", &added.sockets),
        ("files", &added.files),
    ] {
        assert!(!things.is_empty(), "a running agent has no {kind}:\n{added}");
    }
    let cgroup = node.cgroup("/default/c");
    assert!(!fs::read_to_string(cgroup.join("cgroup.procs")).unwrap().is_empty());
    agent.delete().unwrap();
    node.wait_until_clean(&before, SOON).unwrap();
    assert!(!cgroup.exists());
}

fn agents_outlive_containerd(runtime: Runtime) {
    let node = start();
    let agent = node.run_agent(&AgentSpec::new(Image::Python, "a", runtime)).unwrap();
    agent.wait_healthy().unwrap();
    assert_eq!(agent.chat("remember this").unwrap().turn, 1);
    let task = agent.task().unwrap();
    let pid = node.containerd_pid().unwrap();
    node.restart_containerd().unwrap();
    assert_ne!(node.containerd_pid().unwrap(), pid);
    assert_eq!(agent.task().unwrap(), task);
    assert_eq!(agent.chat("still there?").unwrap().turn, 2);
}

#[test]
fn commands_have_status_output_and_a_time_limit() {
    let node = start();
    let output = node.exec(&["sh", "-c", "echo out; echo err >&2; exit 5"]).unwrap();
    assert_eq!((output.status, output.stdout.as_str(), output.stderr.as_str()), (5, "out\n", "err\n"));
    assert!(matches!(output.check(), Err(NodeError::Command { status: 5, .. })));
    assert_eq!(node.exec(&["sh", "-c", "kill -9 $$"]).unwrap().status, 137);
    assert_eq!(node.exec(&["no-such-command"]).unwrap().status, 127);
    assert_eq!(node.sh("hostname").unwrap().trim(), node.name());

    let before = node.snapshot();
    let start = Instant::now();
    let late = node.command(["sh", "-c", "sleep 61 & sleep 62"]).timeout(Duration::from_millis(200)).run();
    assert!(matches!(late, Err(NodeError::Timeout { .. })), "{late:?}");
    assert!(start.elapsed() < SOON);
    node.wait_until_clean(&before, SOON).unwrap();

    let mut cat = node.spawn(&["cat"]).unwrap();
    cat.write("to and fro\n").unwrap();
    cat.wait_for_output("an echo", SOON, |text| text == "to and fro\n").unwrap();
    assert!(cat.running());
    drop(cat);
    node.wait_until_clean(&before, SOON).unwrap();
}

#[test]
fn orphans_are_reaped() {
    let node = start();
    let before = node.snapshot();
    node.sh("for i in 1 2 3 4 5; do (sleep 0.1 &) ; done").unwrap();
    thread::sleep(Duration::from_millis(300));
    node.wait_until_clean(&before, SOON).unwrap();
}

#[test]
fn files_go_in_and_come_out_as_the_node_sees_them() {
    let node = start();
    node.write_file("/srv/deep/er/file", "text").unwrap();
    // An absolute link must not lead to the host's files.
    node.sh("ln -s /srv/deep /srv/link && echo here > /etc/only-here").unwrap();
    assert_eq!(node.read_file("/srv/link/er/file").unwrap(), "text");
    assert_eq!(node.read_file("/etc/only-here").unwrap(), "here\n");
    assert!(!Path::new("/etc/only-here").exists() && !Path::new("/srv/deep").exists());
    node.copy_in(&std::env::current_exe().unwrap(), "/usr/local/bin/me").unwrap();
    assert_eq!(node.sh("test -x /usr/local/bin/me && echo yes").unwrap(), "yes\n");
    // What the rest of the harness promises about a node.
    assert_eq!(node.sh("findmnt -no PROPAGATION /").unwrap().trim(), "shared");
    assert_eq!(node.sh("stat -fc %T /var/lib/containerd").unwrap().trim(), "tmpfs");
    assert_ne!(node.sh("stat -fc %T /var/lib/agentcube").unwrap().trim(), "overlayfs");
}

#[test]
fn two_nodes_run_side_by_side() {
    let (one, other) = (start(), start());
    assert_ne!(one.name(), other.name());
    let spec = |id: &str| AgentSpec::new(Image::Python, id, Runtime::Runc);
    let first = one.run_agent(&spec("a")).unwrap();
    let second = other.run_agent(&spec("a")).unwrap();
    first.wait_healthy().unwrap();
    second.wait_healthy().unwrap();
    assert_eq!(first.chat("one").unwrap().turn, 1);
    assert_eq!(first.chat("two").unwrap().turn, 2);
    assert_eq!(second.chat("one").unwrap().turn, 1);
    let name = one.name().to_owned();
    drop(one);
    assert!(!cgroup_root().unwrap().join(name).exists());
    assert_eq!(second.chat("two").unwrap().turn, 2);
}

/// A node that `node up` holds, in a process of its own.
struct Up {
    process: Child,
    name: String,
}

impl Up {
    fn start() -> Self {
        let mut process =
            Command::new(env!("CARGO_BIN_EXE_node")).arg("up").stdout(Stdio::piped()).spawn().unwrap();
        let mut name = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut name).unwrap();
        let name = name.trim().to_owned();
        assert!(name.starts_with(cgroup::PREFIX), "{name:?}");
        Self { process, name }
    }

    fn cgroup(&self) -> PathBuf {
        cgroup_root().unwrap().join(&self.name)
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // A failed test must not leave its node; mostly the process is gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn node(words: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_node")).args(words).output().unwrap()
}

/// Host pids of everything in a node's cgroup.
fn processes(cgroup: &Path) -> Vec<String> {
    let all = cgroup::tree(cgroup);
    all.iter()
        .flat_map(|path| {
            let pids = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
            pids.lines().map(str::to_owned).collect::<Vec<_>>()
        })
        .collect()
}

/// Mounts of any process on this machine that belong to the node.
fn mounts(name: &str) -> usize {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let texts = entries.filter_map(|entry| fs::read_to_string(entry.path().join("mountinfo")).ok());
    texts.map(|text| text.lines().filter(|line| line.contains(name)).count()).sum()
}

fn start_daemons(name: &str) {
    // What would love to survive: processes in sessions of their own whose parents are gone.
    let started = node(&[
        "exec",
        name,
        "sh",
        "-c",
        "exec >/dev/null 2>&1; setsid sleep 1000 & setsid setsid sleep 1001 &",
    ]);
    assert!(started.status.success(), "{started:?}");
}

/// Waits until nothing on this machine is left of a node.
fn gone(name: &str, pids: &[String]) {
    let cgroup = cgroup_root().unwrap().join(name);
    let deadline = Instant::now() + SOON;
    let alive = || pids.iter().filter(|pid| Path::new("/proc").join(pid).exists()).collect::<Vec<_>>();
    while cgroup.exists() || !alive().is_empty() || mounts(name) > 0 {
        assert!(
            Instant::now() < deadline,
            "left: {:?}, cgroup {}, mounts {}",
            alive(),
            cgroup.exists(),
            mounts(name)
        );
        thread::sleep(Duration::from_millis(10));
    }
    let work = cache::folder().unwrap().join("nodes").join(name);
    assert!(!work.exists(), "{} is left", work.display());
}

#[test]
fn a_killed_parent_leaves_no_process_mount_or_cgroup() {
    let mut up = Up::start();
    start_daemons(&up.name);
    let pids = processes(&up.cgroup());
    assert!(pids.len() > 3, "{pids:?}");
    assert!(mounts(&up.name) > 0);
    up.kill();
    gone(&up.name, &pids);
}

#[test]
fn a_node_dies_with_its_supervisor_and_the_next_one_removes_its_cgroup() {
    let mut up = Up::start();
    start_daemons(&up.name);
    let pids = processes(&up.cgroup());
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", up.process.id())).unwrap();
    let supervisor = children
        .split_whitespace()
        .find(|pid| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap().contains("supervise"))
        .unwrap();
    let pid = rustix::process::Pid::from_raw(supervisor.parse().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    // Without its supervisor the command has nothing to wait for, and ends.
    up.process.wait().unwrap();
    let deadline = Instant::now() + SOON;
    while cgroup::populated(&up.cgroup()) {
        assert!(Instant::now() < deadline, "left: {:?}", processes(&up.cgroup()));
        thread::sleep(Duration::from_millis(10));
    }
    drop(start());
    gone(&up.name, &pids);
}

#[test]
fn the_command_line_runs_commands_on_a_node_and_ends_it() {
    let mut up = Up::start();
    let version = node(&["exec", &up.name, "ctr", "version"]);
    assert!(version.status.success(), "{version:?}");
    assert!(String::from_utf8_lossy(&version.stdout).contains("Server:"), "{version:?}");
    assert_eq!(node(&["exec", &up.name, "sh", "-c", "exit 9"]).status.code(), Some(9));
    let pids = processes(&up.cgroup());
    let down = node(&["down", &up.name]);
    assert!(down.status.success(), "{down:?}");
    assert!(up.process.wait().unwrap().success());
    gone(&up.name, &pids);
    let unknown = node(&["down", &up.name]);
    assert!(!unknown.status.success());
    assert!(String::from_utf8_lossy(&unknown.stderr).contains(&up.name), "{unknown:?}");
}
