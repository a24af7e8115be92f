//! Dumps and restores of real containers. They need root and a root file system with runc and CRIU, named by
//! `AGENTCUBE_TEST_ROOTFS`; each runs on a node of its own, made of namespaces.
#![allow(clippy::unwrap_used)]

#[path = "live/agent.rs"]
mod agent;
#[path = "live/node.rs"]
mod node;
// The shim's handling of runc's private files, proven here against real containers.
#[allow(dead_code, missing_docs)]
#[path = "../../shim/src/runc/state_file.rs"]
mod state_file;

use std::{
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use agent::{Agent, Census, NAMESPACE, Setup, reap, start_with_terminal};
use criu_hooks::{
    cgroup::Cgroup,
    container::{self, Blocker},
    criu::{HookError, NoHooks, log::Cause},
    engine::{DumpError, DumpHooks, DumpOptions, Engine, Failure, Handover, RestoreError, RestoreHooks},
    image,
    preflight::{self, Preflight},
    procfs,
    spawn::{Child, LocalSpawner, Spawner},
};
use node::in_node;
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

/// Names a test once.
macro_rules! on_a_node {
    ($name:ident, $body:expr) => {
        #[test]
        fn $name() {
            // The test's path within this program: what stands behind the program's own name.
            let module = module_path!().split_once("::").map_or("", |(_, module)| module);
            let path = [module, stringify!($name)].join("::");
            in_node(path.trim_start_matches("::"), $body);
        }
    };
}

#[path = "live/ahead.rs"]
mod ahead;
#[path = "live/fast.rs"]
mod fast;
#[path = "live/incremental.rs"]
mod incremental;
#[path = "live/kills.rs"]
mod kills;
#[path = "live/lazy.rs"]
mod lazy;
#[path = "live/mounts.rs"]
mod mounts;
#[path = "live/scribbler.rs"]
mod scribbler;

/// Puts another page map in place, and a manifest that has its right size and digest.
fn forge_pagemap(image: &Path, bytes: &[u8]) {
    fs::write(image.join("img/pagemap-1.img"), bytes).unwrap();
    let path = image.join("manifest.json");
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let files = manifest["files"].as_array_mut().unwrap();
    let entry = files.iter_mut().find(|file| file["name"] == "pagemap-1.img").unwrap();
    entry["size"] = json!(bytes.len());
    entry["sha256"] = json!(image::digest(bytes));
    fs::write(&path, serde_json::to_vec(&manifest).unwrap()).unwrap();
}

on_a_node!(a_page_map_that_lies_is_refused_before_criu_runs_though_its_digest_is_right, async || {
    let mut agent = Agent::start("lied", &Setup::default());
    let last = agent.count_on(0, 5).await;
    agent.dump().await.unwrap();
    let kept = agent.image().path().to_owned();
    let [map, manifest] =
        ["img/pagemap-1.img", "manifest.json"].map(|name| fs::read(kept.join(name)).unwrap());
    // Up to its entries, and its last entry.
    let record =
        |at: usize| 4 + usize::try_from(u32::from_le_bytes(map[at..at + 4].try_into().unwrap())).unwrap();
    let mut ends = vec![8];
    while *ends.last().unwrap() < map.len() {
        let end = *ends.last().unwrap();
        ends.push(end + record(end));
    }
    let last_entry = &map[ends[ends.len() - 2]..];
    let overlapping = [&map[..], last_entry].concat();
    let outside = map[..ends[ends.len() - 2]].to_vec();
    for (bytes, words) in [
        (overlapping, ["pagemap-1.img", "overlaps"]),
        (outside, ["pagemap-1.img", "not as many pages"]),
        (map[..map.len() - 1].to_vec(), ["pagemap-1.img", "ends within"]),
        (b"nonsense".to_vec(), ["pagemap-1.img", "does not begin"]),
    ] {
        forge_pagemap(&kept, &bytes);
        let error = agent.restore().await.unwrap_err();
        assert!(matches!(error, RestoreError::Image(_)), "{error}");
        let error = error.to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
        assert!(!kept.join("work/restore.log").exists(), "CRIU was run");
    }
    fs::write(kept.join("img/pagemap-1.img"), &map).unwrap();
    fs::write(kept.join("manifest.json"), manifest).unwrap();
    agent.restore().await.unwrap();
    agent.count_on(last, 0).await;
    agent.assert_running();
    agent.delete();
});

on_a_node!(an_image_that_no_restore_would_take_is_refused_while_the_agent_lives, async || {
    let mut agent = Agent::start("refused", &Setup::default());
    let last = agent.count_on(0, 5).await;
    let writer = agent.store.begin(NAMESPACE, "refused", None).unwrap();
    // As if a newer CRIU had written it; this one leaves it alone.
    fs::write(writer.path().join("img/pagemap-999.img"), "nonsense").unwrap();
    let options = DumpOptions::default();
    let dumped = agent.engine.dump(&agent.container, agent.pid, &writer, &options, &mut NoHooks).await;
    let error = dumped.unwrap_err();
    assert!(matches!(error, DumpError::Image(image::Error::Pagemap { .. })), "{error}");
    assert!(error.to_string().contains("pagemap-999.img"), "{error}");
    drop(writer);
    agent.assert_running();
    let last = agent.count_on(last, 10).await;
    assert!(agent.store.latest(NAMESPACE, "refused").unwrap().is_none());
    agent.dump().await.unwrap();
    agent.restore().await.unwrap();
    agent.count_on(last, 10).await;
    agent.delete();
});

on_a_node!(a_counter_goes_on_over_five_cycles, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let mut last = agent.count_on(0, 5).await;
    for cycle in 0..5 {
        let dumped = agent.dump().await.unwrap();
        assert!(!agent.container.cgroup.populated().unwrap());
        assert!(!agent.container.cgroup.is_frozen().unwrap());
        let restored = agent.restore().await.unwrap();
        println!(
            "cycle {cycle}: dump {:?} (stopped {:?}, {} bytes), restore {:?}",
            dumped.total, dumped.stopped, dumped.image_bytes, restored.total
        );
        agent.assert_running();
        last = agent.count_on(last, 10).await;
    }
    agent.delete();
});

on_a_node!(runc_works_on_a_restored_container, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let before = agent.exec(&["ls", "/sys/fs/cgroup"]);
    let own_cgroup = agent.exec(&["cat", "/proc/self/cgroup"]);
    for _ in 0..2 {
        agent.dump().await.unwrap();
        agent.restore().await.unwrap();
        assert_eq!(Cgroup::of_pid(agent.pid).unwrap(), agent.container.cgroup);
        state_file::update(&agent.state_file(), agent.pid).unwrap();
        assert_eq!(agent.exec(&["echo", "here"]), "here\n");
        // The container sees no more of the host's cgroups than before.
        assert_eq!(agent.exec(&["ls", "/sys/fs/cgroup"]), before);
        assert_eq!(agent.exec(&["cat", "/proc/1/cgroup"]), own_cgroup);
        assert!(agent.exec(&["ps"]).contains("i=$((i+1))"));
        let runc = |args: &[&str]| {
            let output = Command::new("/usr/sbin/runc").args(args).arg("counter").output().unwrap();
            assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        let state: Value = serde_json::from_str(&runc(&["state"])).unwrap();
        assert_eq!(state["status"], "running");
        assert_eq!(state["pid"], agent.pid.as_raw_nonzero().get());
        runc(&["pause"]);
        assert!(agent.container.cgroup.is_frozen().unwrap());
        runc(&["resume"]);
        agent.line().await;
    }
    let killed = Command::new("/usr/sbin/runc").args(["kill", "counter", "KILL"]).status().unwrap();
    assert!(killed.success());
    reap(agent.pid);
    assert!(Command::new("/usr/sbin/runc").args(["delete", "counter"]).status().unwrap().success());
    assert!(!agent.container.cgroup.path().exists());
});

/// Reads from a terminal until `wanted` appears.
async fn read_until(master: &OwnedFd, wanted: &str) -> String {
    let mut seen = String::new();
    for _ in 0..1000 {
        let mut bytes = [0; 4096];
        match rustix::io::read(master, &mut bytes) {
            Ok(length) => seen.push_str(&String::from_utf8_lossy(&bytes[..length])),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
        if seen.contains(wanted) {
            return seen;
        }
    }
    panic!("{wanted:?} did not come, but {seen:?}");
}

on_a_node!(a_terminal_and_its_shell_survive, async || {
    let (mut agent, mut master) = start_with_terminal("shell", &["sh"]);
    assert!(agent.container.has_terminal);
    let size = rustix::termios::Winsize { ws_row: 33, ws_col: 99, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&master, size).unwrap();
    rustix::io::ioctl_fionbio(&master, true).unwrap();
    rustix::io::write(&master, b"remembered=42; echo set-$remembered\n").unwrap();
    read_until(&master, "set-42").await;
    for _ in 0..3 {
        agent.dump().await.unwrap();
        drop(master);
        master = agent.restore().await.unwrap().console.expect("a terminal");
        rustix::io::ioctl_fionbio(&master, true).unwrap();
        rustix::io::write(&master, b"echo still-$remembered; stty size\n").unwrap();
        let seen = read_until(&master, "33 99").await;
        assert!(seen.contains("still-42"), "{seen}");
        // Back at its prompt: a terminal cannot be dumped while a job has its foreground.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    rustix::io::write(&master, b"sh -c 'echo in-front; sleep 0.5'; echo back\n").unwrap();
    read_until(&master, "in-front\r").await;
    let error = agent.dump().await.unwrap_err();
    assert_eq!(cause(&error), Cause::ForegroundJob, "{error}");
    agent.assert_running();
    read_until(&master, "back\r").await;
    agent.delete();
});

/// Refuses at the last moment.
struct Veto;

#[async_trait::async_trait]
impl DumpHooks for Veto {
    async fn before_kill(&mut self) -> Result<(), HookError> {
        Err("somebody wants the agent".into())
    }
}

on_a_node!(a_veto_before_the_kill_lets_the_agent_run_on, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let last = agent.count_on(0, 5).await;
    let writer = agent.store.begin(NAMESPACE, "counter", None).unwrap();
    let options = DumpOptions::default();
    let error =
        agent.engine.dump(&agent.container, agent.pid, &writer, &options, &mut Veto).await.unwrap_err();
    assert!(matches!(error, DumpError::Vetoed(_)), "{error}");
    assert!(error.to_string().contains("somebody wants the agent"), "{error}");
    drop(writer);
    assert!(agent.store.latest(NAMESPACE, "counter").unwrap().is_none());
    agent.assert_running();
    let last = agent.count_on(last, 20).await;
    // Nothing of it stands in the way of a real one.
    agent.dump().await.unwrap();
    agent.restore().await.unwrap();
    agent.count_on(last, 20).await;
    agent.delete();
});

/// The cause of a dump that CRIU gave up.
fn cause(error: &DumpError) -> Cause {
    match error {
        DumpError::Criu(Failure { reason: Some(reason), .. }) => reason.cause,
        other => panic!("{other}"),
    }
}

on_a_node!(a_dump_that_fails_gives_the_reason_and_the_agent_runs_on, async || {
    let script = "import ctypes, time, itertools
libc = ctypes.CDLL(None)
assert libc.inotify_add_watch(libc.inotify_init(), b'/srv', 2) >= 0
for i in itertools.count(1):
    print(i, flush=True)
    time.sleep(0.02)";
    let watching = ["python3", "-c", script];
    let mut agent =
        Agent::start("watching", &Setup { args: &watching, whole_root: true, ..Setup::default() });
    let last = agent.count_on(0, 5).await;
    let error = agent.dump().await.unwrap_err();
    assert_eq!(cause(&error), Cause::FileWatch, "{error}");
    assert!(error.to_string().contains("shallower depth"), "{error}");
    agent.assert_running();
    agent.count_on(last, 10).await;
    assert!(agent.store.latest(NAMESPACE, "watching").unwrap().is_none());
    agent.delete();

    let script = "import fcntl, time, itertools
lock = open('/tmp/lock', 'w')
fcntl.flock(lock, fcntl.LOCK_EX)
for i in itertools.count(1):
    print(i, flush=True)
    time.sleep(0.02)";
    let locking = ["python3", "-c", script];
    let mut agent = Agent::start("locking", &Setup { args: &locking, whole_root: true, ..Setup::default() });
    let last = agent.count_on(0, 5).await;
    let without = DumpOptions { file_locks: false, ..DumpOptions::default() };
    let error = agent.dump_with(&without).await.unwrap_err();
    assert_eq!(cause(&error), Cause::FileLock, "{error}");
    agent.assert_running();
    let last = agent.count_on(last, 10).await;
    agent.dump().await.unwrap();
    agent.restore().await.unwrap();
    agent.count_on(last, 10).await;
    agent.delete();
});

on_a_node!(every_file_truncated_fails_the_restore_and_keeps_the_image, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let last = agent.count_on(0, 5).await;
    agent.dump().await.unwrap();
    let image = agent.image();
    let names: Vec<_> = image.manifest().files.iter().map(|file| (file.name.clone(), file.size)).collect();
    // Fewer when the counter has no child at that moment.
    assert!(names.len() > 10, "{names:?}");
    for (name, size) in names.iter().filter(|(_, size)| *size > 0) {
        let path = image.path().join("img").join(name);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        let error = agent.restore().await.unwrap_err();
        match error {
            RestoreError::Image(image::Error::Truncated { file, expected, .. }) => {
                assert_eq!((&file, expected), (name, *size));
            }
            other => panic!("{name}: {other}"),
        }
        assert!(!agent.container.cgroup.populated().unwrap());
        fs::write(&path, whole).unwrap();
    }
    let manifest = image.path().join("manifest.json");
    let whole = fs::read(&manifest).unwrap();
    fs::write(&manifest, &whole[..whole.len() / 2]).unwrap();
    let error = agent.store.latest(NAMESPACE, "counter").unwrap_err();
    assert!(matches!(error, image::Error::ManifestInvalid { .. }), "{error}");
    fs::write(&manifest, whole).unwrap();
    agent.restore().await.unwrap();
    agent.count_on(last, 10).await;
    agent.delete();
});

on_a_node!(a_restore_that_criu_fails_leaves_nothing_and_can_be_tried_again, async || {
    let args = ["sh", "-c", "echo kept > /tmp/file; exec 5</tmp/file; exec sh -c \"$0\"", agent::COUNTER[2]];
    let mut agent = Agent::start("reader", &Setup { args: &args, ..Setup::default() });
    let last = agent.count_on(0, 5).await;
    agent.dump().await.unwrap();
    let before = Census::take();
    let file = agent.container.rootfs.join("tmp/file");
    fs::rename(&file, file.with_extension("away")).unwrap();
    for _ in 0..3 {
        let error = agent.restore().await.unwrap_err();
        match &error {
            RestoreError::Criu(Failure { reason: Some(reason), .. }) => {
                assert_eq!(reason.cause, Cause::FileChanged, "{error}");
            }
            other => panic!("{other}"),
        }
        assert!(!agent.container.cgroup.populated().unwrap());
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(Census::take(), before);
    }
    fs::rename(file.with_extension("away"), &file).unwrap();
    agent.restore().await.unwrap();
    agent.count_on(last, 10).await;
    agent.delete();
});

on_a_node!(nothing_leaks_in_twenty_cycles, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let mut last = agent.count_on(0, 5).await;
    let mut before = None;
    let (mut dumps, mut restores) = (Vec::new(), Vec::new());
    for cycle in 0..20 {
        dumps.push(agent.dump().await.unwrap().total);
        restores.push(agent.restore().await.unwrap().total);
        agent.image().remove().unwrap();
        last = agent.count_on(last, 3).await;
        if cycle == 0 {
            // The first restore brings a time namespace with it, and descriptors that stay for the next.
            before = Some(Census::take());
        }
    }
    assert_eq!(Some(Census::take()), before);
    assert_eq!(fs::read_dir("/run/images/test/counter").unwrap().count(), 0);
    dumps.sort();
    restores.sort();
    println!("median of 20: dump {:?}, restore {:?}", dumps[10], restores[10]);
    agent.delete();
});

on_a_node!(an_exec_or_a_debugger_stops_a_dump_before_it_begins, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let last = agent.count_on(0, 5).await;
    let blockers = |error: DumpError| match error {
        DumpError::Blocked(blockers) => blockers,
        other => panic!("{other}"),
    };
    let mut exec = Command::new("/usr/sbin/runc")
        .args(["exec", "counter", "sleep", "100"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    while agent.container.cgroup.procs().unwrap().len() < 3 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let found = blockers(agent.dump().await.unwrap_err());
    assert!(matches!(&found[..], [Blocker::Exec { comm, .. }] if comm == "sleep"), "{found:?}");
    agent.assert_running();
    let _ = exec.kill();
    exec.wait().unwrap();
    for pid in agent.container.cgroup.procs().unwrap() {
        let args = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if args.starts_with("sleep\x00100") {
            rustix::process::kill_process(pid, Signal::KILL).unwrap();
            reap(pid);
        }
    }

    let script = "import ctypes, sys, time\nctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), 0, 0)\nprint('traced', flush=True)\ntime.sleep(100)";
    let mut tracer = Command::new("python3")
        .args(["-c", script, &agent.pid.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Read::read_exact(tracer.stdout.as_mut().unwrap(), &mut [0; 6]).unwrap();
    let found = blockers(agent.dump().await.unwrap_err());
    assert!(matches!(&found[..], [Blocker::Traced { pid, .. }] if *pid == agent.pid), "{found:?}");
    tracer.kill().unwrap();
    tracer.wait().unwrap();
    agent.assert_running();
    agent.count_on(last, 10).await;
    agent.delete();
});

on_a_node!(a_dump_may_leave_the_agent_running, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let last = agent.count_on(0, 5).await;
    let options = DumpOptions { leave_running: true, ..DumpOptions::default() };
    let writer = agent.store.begin(NAMESPACE, "counter", None).unwrap();
    let report =
        agent.engine.dump(&agent.container, agent.pid, &writer, &options, &mut NoHooks).await.unwrap();
    assert!(writer.is_complete());
    agent.kept = report.kept;
    agent.assert_running();
    let later = agent.count_on(last, 20).await;
    // The image is of the moment of the dump.
    agent.container.cgroup.kill().unwrap();
    reap(agent.pid);
    agent.container.cgroup.wait_unpopulated(Duration::from_secs(5)).await.unwrap();
    while agent.count_to_end().await {}
    agent.restore().await.unwrap();
    let first: u64 = agent.line().await.parse().unwrap();
    assert!(first >= last && first < later, "{first} is not between {last} and {later}");
    agent.delete();
});

on_a_node!(a_full_disk_fails_the_dump_and_the_agent_runs_on, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let last = agent.count_on(0, 5).await;
    fs::create_dir("/run/small").unwrap();
    let small = ["-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", "/run/small"];
    assert!(Command::new("mount").args(small).status().unwrap().success());
    agent.store = image::Store::open("/run/small").unwrap();
    let error = agent.dump().await.unwrap_err();
    match &error {
        DumpError::Criu(Failure { reason: Some(reason), .. }) => {
            assert_eq!(reason.cause, Cause::DiskFull, "{error}");
        }
        DumpError::Image(image::Error::Full { .. }) => {}
        other => panic!("{other}"),
    }
    agent.assert_running();
    agent.count_on(last, 10).await;
    assert_eq!(fs::read_dir("/run/small/test/counter").unwrap().count(), 0);
    assert!(Command::new("mount").args(["-o", "remount,ro", "/run/small"]).status().unwrap().success());
    let error = agent.store.begin(NAMESPACE, "counter", None).unwrap_err();
    assert!(matches!(error, image::Error::ReadOnly(_)), "{error}");
    agent.delete();
});

/// Notes the order of a restore, and refuses where it is told to.
#[derive(Default)]
struct Order {
    created: Option<Pid>,
    before_resume: Option<Pid>,
    refuse: bool,
}

#[async_trait::async_trait]
impl RestoreHooks for Order {
    async fn created(&mut self, pid: Pid) -> Result<(), HookError> {
        self.created = Some(pid);
        Ok(())
    }

    async fn before_resume(&mut self, pid: Pid) -> Result<(), HookError> {
        self.before_resume = Some(pid);
        if self.refuse { Err("not now".into()) } else { Ok(()) }
    }
}

on_a_node!(the_process_is_known_before_it_runs_and_a_restore_can_be_refused, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let last = agent.count_on(0, 5).await;
    agent.dump().await.unwrap();
    let image = agent.image();
    let options = agent.restore_options();
    let mut hooks = Order { refuse: true, ..Order::default() };
    let restore = agent.engine.restore(
        NAMESPACE,
        &agent.container,
        &image,
        &options,
        agent.inherit(&image).into(),
        &mut hooks,
    );
    let error = restore.await.unwrap_err();
    assert!(error.to_string().contains("not now"), "{error}");
    assert!(!agent.container.cgroup.populated().unwrap());
    let mut hooks = Order::default();
    let restore = agent.engine.restore(
        NAMESPACE,
        &agent.container,
        &image,
        &options,
        agent.inherit(&image).into(),
        &mut hooks,
    );
    agent.pid = restore.await.unwrap().pid;
    assert_eq!((hooks.created, hooks.before_resume), (Some(agent.pid), Some(agent.pid)));
    agent.count_on(last, 10).await;
    let again = agent
        .engine
        .restore(NAMESPACE, &agent.container, &image, &options, Handover::default(), &mut NoHooks)
        .await;
    assert!(matches!(again, Err(RestoreError::Running(_))));
    agent.assert_running();
    agent.delete();
});

on_a_node!(python_and_node_agents_keep_their_memory, async || {
    let python = "import time, os\nballast = bytearray(os.urandom(1 << 20) * 64)\ncheck = sum(ballast[::4096])\ni = 0\nwhile True:\n    i += 1\n    assert sum(ballast[::4096]) == check\n    print(i, flush=True)\n    time.sleep(0.02)";
    let node = "const http = require('http'); let i = 0; const s = http.createServer((q, r) => r.end(String(i))); s.listen(8080, () => setInterval(() => console.log(++i), 20))";
    let agents: [(&str, [&str; 3]); 2] =
        [("python", ["python3", "-c", python]), ("node", ["node", "-e", node])];
    // Node prefers io_uring, which cannot be dumped; container runtimes deny it by default, as here.
    let change = |spec: &mut Value| {
        let denied = json!({"names": ["io_uring_setup"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1});
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [denied]});
    };
    for (id, args) in agents {
        let setup = Setup { args: &args, change: &change, whole_root: true };
        let mut agent = Agent::start(id, &setup);
        let mut last = agent.count_on(0, 5).await;
        for _ in 0..5 {
            let dumped = agent.dump().await.unwrap();
            let restored = agent.restore().await.unwrap();
            println!(
                "{id}: {} MB, dump {:?}, restore {:?}",
                dumped.image_bytes >> 20,
                dumped.total,
                restored.total
            );
            agent.image().remove().unwrap();
            last = agent.count_on(last, 5).await;
        }
        agent.delete();
    }
});

on_a_node!(io_uring_fails_the_dump_by_name_and_the_agent_runs_on, async || {
    let node =
        "let i = 0; require('fs').promises.stat('/').then(() => setInterval(() => console.log(++i), 20))";
    let change = |spec: &mut Value| {
        spec["process"]["env"].as_array_mut().unwrap().push(json!("UV_USE_IO_URING=1"));
    };
    let setup = Setup { args: &["node", "-e", node], change: &change, whole_root: true };
    let mut agent = Agent::start("uring", &setup);
    let last = agent.count_on(0, 5).await;
    let error = agent.dump().await.unwrap_err();
    assert_eq!(cause(&error), Cause::IoUring, "{error}");
    agent.assert_running();
    agent.count_on(last, 10).await;
    agent.delete();
});

on_a_node!(a_process_in_the_middle_of_a_vfork_is_left_alone, async || {
    // CLONE_VFORK without CLONE_VM: the parent waits for a child that never runs a program.
    let script = "import ctypes, time
print(1, flush=True)
if ctypes.CDLL(None).syscall(56, 0x4000 | 17, 0, 0, 0, 0) == 0:
    time.sleep(2)
    raise SystemExit
for i in range(2, 1000000):
    print(i, flush=True)
    time.sleep(0.02)";
    let setup = Setup { args: &["python3", "-c", script], whole_root: true, ..Setup::default() };
    let mut agent = Agent::start("forking", &setup);
    agent.count_on(0, 1).await;
    let options = DumpOptions { freeze_timeout: Duration::from_millis(300), ..DumpOptions::default() };
    let error = agent.dump_with(&options).await.unwrap_err();
    let forking = matches!(&error, DumpError::Container(container::Error::Forking(pid)) if *pid == agent.pid);
    assert!(forking, "{error}");
    assert!(!agent.container.cgroup.is_frozen().unwrap());
    let last = agent.count_on(1, 10).await;
    agent.dump().await.unwrap();
    agent.restore().await.unwrap();
    agent.count_on(last, 10).await;
    agent.delete();
});

on_a_node!(criu_knows_the_kernel_before_the_first_dump, async || {
    let note = Path::new("/run/criu.kdat");
    let preflight = Preflight::new(Path::new("criu"), &LocalSpawner);
    let (first, second) = tokio::join!(preflight.warm(), preflight.warm());
    first.unwrap();
    second.unwrap();
    let made = fs::metadata(note).unwrap().modified().unwrap();
    preflight.warm().await.unwrap();
    assert_eq!(fs::metadata(note).unwrap().modified().unwrap(), made);
    // One of another CRIU is replaced.
    fs::write(note, "something else").unwrap();
    let old = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1);
    fs::File::options().write(true).open(note).unwrap().set_modified(old).unwrap();
    preflight.warm().await.unwrap();
    assert!(fs::metadata(note).unwrap().len() > 100);
});

on_a_node!(criu_is_looked_at_and_tried_on_a_small_process, async || {
    let preflight = Preflight::new(Path::new("criu"), &LocalSpawner);
    assert!(preflight.version().await.unwrap() >= preflight::OLDEST);
    assert!(preflight.features().await.unwrap().lazy_pages);
    let before = Census::take();
    for round in 0..3 {
        let directory = format!("/run/self-test-{round}");
        fs::create_dir(&directory).unwrap();
        preflight.self_test(Path::new(&directory)).await.unwrap();
        fs::remove_dir_all(&directory).unwrap();
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(Census::take_as_init(), before);
});
