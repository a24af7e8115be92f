//! An agent's state outlives its sleep, and everything about the task stays as containerd expects it.

#![allow(clippy::unwrap_used)]

mod cycle;

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use agentcube_tests::images::Image;
use agentcube_tests::node::{Agent, Net, Node, Runtime};
use agentcube_tests::skipped;
use containerd_shim::protos::api::CheckpointTaskRequest;
use cycle::{
    SOON, agent, agentcube, assert_asleep, cgroup, counts_on, host_pids, inspect, patience, running, script,
    shim, sleep, sleep_at, start, update, wake, wakes,
};
use serde_json::{Value, json};

const CYCLES: u64 = 5;

/// Long enough for a counter that runs to show it.
const SEVERAL_TICKS: Duration = Duration::from_millis(400);

#[test]
fn a_counter_counts_on_over_five_cycles() {
    let node = start();
    let counter = node.run_agent(&agent(Image::Counter, "c")).unwrap();
    for _ in 0..CYCLES {
        counts_on(&node, &counter, 2);
        sleep(&node, &counter);
        let asleep = counter.log().unwrap();
        thread::sleep(SEVERAL_TICKS);
        assert_eq!(counter.log().unwrap(), asleep);
        wake(&node, &counter);
    }
    counts_on(&node, &counter, 2);
    let told = inspect(&node, &counter);
    assert_eq!((told["sleeps"].as_u64(), told["wakes"].as_u64()), (Some(CYCLES), Some(CYCLES)));
}

#[test]
fn a_python_agent_keeps_its_state_over_five_cycles() {
    remembers(Image::Python, Net::Pod, 32);
}

#[test]
fn a_node_agent_keeps_its_state_over_five_cycles() {
    remembers(Image::NodeJs, Net::Host, 16);
}

fn remembers(image: Image, net: Net, ballast: u32) {
    let node = start();
    // CRIU knows no io_uring. Node uses it unless it is kept from it, as by the seccomp profile that pods have.
    let spec = agent(image, "a").net(net).port(8123).env("BALLAST_MIB", &ballast).flag("--seccomp");
    let agent = node.run_agent(&spec).unwrap();
    agent.wait_healthy().unwrap();
    for turn in 1..=CYCLES {
        let said = agent.chat(&format!("message {turn}, ä")).unwrap();
        assert_eq!((said.turn, said.history), (turn, 2 * turn));
        // Each reply holds the message before: what was said before the sleep comes back after it.
        assert!(turn == 1 || said.reply.contains(&format!("message {}, ä", turn - 1)), "{}", said.reply);
        let before = agent.digest().unwrap();
        sleep(&node, &agent);
        wake(&node, &agent);
        assert_eq!(agent.turn().unwrap(), turn);
        assert_eq!(agent.digest().unwrap(), before);
    }
    let turns = (1..=CYCLES).map(|turn| format!("turn {turn}\n")).collect::<Vec<_>>().concat();
    assert!(agent.log().unwrap().ends_with(&turns), "{:?}", agent.log());
    assert_eq!(wakes(&node, &agent), CYCLES);
}

/// Proportional set size of a process of the host, in bytes.
fn pss(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn a_program_that_waits_goes_on_waiting_after_a_wake() {
    let node = start();
    let before = "import time, threading\nprint('waits', flush=True)\n";
    let in_python = format!("{before}threading.Event().wait(1000)\nprint('over', flush=True)");
    let waiting = [
        ("sleep", script("sleep", Runtime::Agentcube, "echo waits; exec sleep 1000")),
        ("child", script("child", Runtime::Agentcube, "echo waits; sleep 1000; echo over")),
        ("python", agent(Image::Python, "python").args(&["python3", "-c", &in_python])),
    ];
    for (name, spec) in waiting {
        let agent = node.run_agent(&spec).unwrap();
        node.wait_until("it to wait", SOON, || Ok(agent.log()?.contains("waits"))).unwrap();
        for _ in 0..3 {
            thread::sleep(SEVERAL_TICKS);
            sleep(&node, &agent);
            wake(&node, &agent);
        }
        thread::sleep(SEVERAL_TICKS);
        running(&agent);
        assert!(!agent.log().unwrap().contains("over"), "{name} waits no longer");
        agent.delete().unwrap();
    }
}

#[test]
fn locks_on_files_are_held_after_a_wake_and_by_nobody_else() {
    let node = start();
    let code = "import fcntl, time
files = [open(f'/tmp/{name}', 'w') for name in ('flock', 'posix')]
fcntl.flock(files[0], fcntl.LOCK_EX)
fcntl.lockf(files[1], fcntl.LOCK_EX, 10, 5)
print('ready', flush=True)
time.sleep(1000)";
    let agent = node.run_agent(&agent(Image::Python, "a").args(&["python3", "-c", code])).unwrap();
    node.wait_until("the locks to be taken", SOON, || Ok(agent.log()?.contains("ready"))).unwrap();
    let other = "import fcntl
for name, lock in (('flock', fcntl.flock), ('posix', lambda file, how: fcntl.lockf(file, how, 1, 14))):
  try: lock(open(f'/tmp/{name}', 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB); print('free')
  except BlockingIOError: print('held')
fcntl.lockf(open('/tmp/posix', 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 0)";
    for _ in 0..3 {
        let found = agent.exec(&["python3", "-c", other]).unwrap().check().unwrap();
        assert_eq!(found, "held\nheld\n");
        cycle::cycle(&node, &agent);
    }
}

#[test]
fn what_is_left_of_a_short_sleep_ends_after_a_wake() {
    let node = start();
    let agent = node.run_agent(&script("s", Runtime::Agentcube, "echo waits; sleep 3; echo over")).unwrap();
    node.wait_until("it to wait", SOON, || Ok(agent.log()?.contains("waits"))).unwrap();
    cycle::cycle(&node, &agent);
    node.wait_until("its sleep to end", SOON, || Ok(agent.log()?.contains("over"))).unwrap();
}

#[test]
fn a_sleeping_agent_holds_no_memory_and_is_a_running_task_for_containerd() {
    const BALLAST: u64 = 96;
    let node = start();
    let agent = node.run_agent(&agent(Image::Python, "a").env("BALLAST_MIB", &BALLAST)).unwrap();
    agent.wait_healthy().unwrap();
    let pids = host_pids(&node, &agent);
    assert!(pids.iter().copied().map(pss).sum::<u64>() > BALLAST << 20);
    let pid = running(&agent);
    let listed = agent.ctr(&["task", "ps", "a"]).unwrap().check().unwrap();
    assert!(listed.lines().any(|line| line.starts_with(&pid.to_string())), "{listed}");

    sleep(&node, &agent);
    assert!(pids.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists()), "{pids:?}");
    assert!(!node.snapshot().processes.keys().any(|name| name.contains("python")));
    let cgroup = cgroup(&node, &agent);
    let events = fs::read_to_string(cgroup.join("cgroup.events")).unwrap();
    assert!(events.contains("populated 0"), "{events}");
    if let Ok(current) = fs::read_to_string(cgroup.join("memory.current")) {
        assert!(current.trim().parse::<u64>().unwrap() < 16 << 20, "{current}");
    }

    assert_eq!(running(&agent), pid);
    assert_eq!(agent.ctr(&["task", "ps", "a"]).unwrap().check().unwrap(), listed);
    // Looking at it does not wake it.
    assert_asleep(&node, &agent);
    assert_eq!(wakes(&node, &agent), 0);

    wake(&node, &agent);
    let now = host_pids(&node, &agent);
    assert_eq!(now.len(), pids.len());
    let after = running(&agent);
    let listed = agent.ctr(&["task", "ps", "a"]).unwrap().check().unwrap();
    assert!(listed.lines().any(|line| line.starts_with(&after.to_string())), "{listed}");
    agent.digest().unwrap();
    assert!(now.iter().copied().map(pss).sum::<u64>() > BALLAST << 20);
}

#[test]
fn metrics_answer_awake_and_asleep() {
    let node = start();
    let counter = node.run_agent(&agent(Image::Counter, "c")).unwrap();
    let metrics = || {
        let text = counter.ctr(&["task", "metrics", "--format", "json", "c"]).unwrap().check().unwrap();
        serde_json::from_str::<Value>(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    };
    let awake = metrics();
    assert!(awake.is_object(), "{awake}");
    sleep(&node, &counter);
    let asleep = metrics();
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&asleep), keys(&awake));
    assert_asleep(&node, &counter);
    if node.has_controller("memory") {
        assert!(asleep["memory"]["usage"].as_u64() < awake["memory"]["usage"].as_u64(), "{asleep}");
    }
}

/// runc's own view of a container.
fn runc_state(node: &Node, agent: &Agent) -> (String, u64) {
    let root = format!("/run/containerd/runc/{}", agent.spec().namespace);
    let text = node.exec(&["runc", "--root", &root, "state", agent.id()]).unwrap().check().unwrap();
    let state: Value = serde_json::from_str(&text).unwrap();
    (state["status"].as_str().unwrap().to_owned(), state["pid"].as_u64().unwrap())
}

#[test]
fn an_exec_works_before_and_after_a_sleep_and_wakes_a_sleeping_agent() {
    let node = start();
    let agent = node.run_agent(&agent(Image::Python, "a")).unwrap();
    agent.wait_healthy().unwrap();
    agent.chat("hello").unwrap();
    let digest = agent.digest().unwrap();
    let execs = || {
        let name = agent.exec(&["cat", "/proc/1/cmdline"]).unwrap().check().unwrap();
        assert!(name.contains("python3") && name.contains("agent.py"), "{name:?}");
        assert_eq!(agent.exec(&["sh", "-c", "exit 7"]).unwrap().status, 7);
        assert_eq!(runc_state(&node, &agent), ("running".to_owned(), u64::from(running(&agent))));
    };
    execs();
    sleep(&node, &agent);
    wake(&node, &agent);
    execs();
    sleep(&node, &agent);
    execs();
    assert_eq!(wakes(&node, &agent), 2);
    sleep_at(&node, &agent, "frozen");
    execs();
    assert_eq!(wakes(&node, &agent), 3);
    assert_eq!(agent.digest().unwrap(), digest);
    // Those execs are no longer in the way of a sleep.
    sleep(&node, &agent);
}

fn frozen(node: &Node, agent: &Agent) -> bool {
    fs::read_to_string(cgroup(node, agent).join("cgroup.events")).unwrap().contains("frozen 1")
}

#[test]
fn a_frozen_agent_stands_still_and_sleeps_deeper_without_waking() {
    let node = start();
    let agent = node.run_agent(&agent(Image::Python, "a")).unwrap();
    agent.wait_healthy().unwrap();
    agent.chat("hello").unwrap();
    let digest = agent.digest().unwrap();
    let (task, pids) = (running(&agent), host_pids(&node, &agent));

    sleep_at(&node, &agent, "frozen");
    assert!(frozen(&node, &agent));
    assert_eq!(host_pids(&node, &agent), pids);
    assert_eq!(running(&agent), task);
    wake(&node, &agent);
    assert!(!frozen(&node, &agent));
    assert_eq!(running(&agent), task);
    assert_eq!(agent.digest().unwrap(), digest);

    sleep_at(&node, &agent, "frozen");
    thread::sleep(SEVERAL_TICKS);
    let refused = agentcube(&node, &agent, &["sleep", "--depth", "frozen"]).unwrap_err();
    assert!(refused.contains("asleep already"), "{refused}");
    sleep(&node, &agent);
    assert_eq!(wakes(&node, &agent), 1);
    let refused = agentcube(&node, &agent, &["sleep"]).unwrap_err();
    assert!(refused.contains("asleep already"), "{refused}");
    assert_eq!(running(&agent), task);
    wake(&node, &agent);
    assert_eq!(agent.digest().unwrap(), digest);
}

#[test]
fn a_frozen_counter_wakes_for_its_own_timer_and_counts_on() {
    let node = start();
    let counter = node.run_agent(&agent(Image::Counter, "c")).unwrap();
    counts_on(&node, &counter, 2);
    for round in 1..=CYCLES {
        sleep_at(&node, &counter, "frozen");
        node.wait_until("it to wake", SOON, || Ok(wakes(&node, &counter) == round)).unwrap();
        assert_eq!(inspect(&node, &counter)["last_wake"]["cause"], "timer");
        counts_on(&node, &counter, 2);
    }
}

#[test]
fn pause_stops_an_agent_and_resume_wakes_it_however_it_sleeps() {
    let node = start();
    let counter = node.run_agent(&agent(Image::Counter, "c")).unwrap();
    let task = |verb: &str| counter.ctr(&["task", verb, "c"]).unwrap().check().map(drop);
    let state = || counter.task().unwrap().unwrap().1;
    counts_on(&node, &counter, 2);

    task("pause").unwrap();
    assert_eq!(state(), "PAUSED");
    assert!(frozen(&node, &counter));
    thread::sleep(SEVERAL_TICKS);
    let still = counter.log().unwrap();
    let refused = agentcube(&node, &counter, &["sleep"]).unwrap_err();
    assert!(refused.contains("paused"), "{refused}");
    thread::sleep(SEVERAL_TICKS);
    assert_eq!(counter.log().unwrap(), still);
    task("resume").unwrap();
    assert_eq!(state(), "RUNNING");
    counts_on(&node, &counter, 2);
    let refused = task("resume").unwrap_err().to_string();
    assert!(refused.contains("not paused"), "{refused}");

    sleep(&node, &counter);
    assert_eq!(state(), "RUNNING");
    task("resume").unwrap();
    assert_eq!(inspect(&node, &counter)["state"], "running");
    counts_on(&node, &counter, 2);

    sleep(&node, &counter);
    task("pause").unwrap();
    thread::sleep(SEVERAL_TICKS);
    let still = counter.log().unwrap();
    thread::sleep(SEVERAL_TICKS);
    assert_eq!(counter.log().unwrap(), still);
    task("resume").unwrap();
    assert_eq!(state(), "RUNNING");
    counts_on(&node, &counter, 2);
}

#[test]
fn pause_of_a_frozen_agent_keeps_it_frozen_and_resume_wakes_it() {
    let node = start();
    let agent = node.run_agent(&agent(Image::Python, "a")).unwrap();
    agent.wait_healthy().unwrap();
    let task = |verb: &str| agent.ctr(&["task", verb, "a"]).unwrap().check().map(drop);
    let state = || agent.task().unwrap().unwrap().1;
    for pause in [false, true, true] {
        sleep_at(&node, &agent, "frozen");
        assert_eq!(state(), "RUNNING");
        if pause {
            task("pause").unwrap();
            assert_eq!(state(), "PAUSED");
            assert!(frozen(&node, &agent));
        }
        task("resume").unwrap();
        assert_eq!(inspect(&node, &agent)["state"], "running");
        assert_eq!(agent.turn().unwrap(), 0);
    }
}

/// The names of the files in the CRIU image that a checkpoint is, and the sum of their sizes.
fn checkpoint(node: &Node, agent: &Agent) -> (String, u64) {
    let name = agent.ctr(&["task", "checkpoint", agent.id()]).unwrap().check().unwrap();
    let name = name.trim();
    let images = agent.ctr(&["images", "ls"]).unwrap().check().unwrap();
    let line = images.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{images}"));
    let index = line.split_whitespace().nth(2).unwrap();
    let content = |digest: &str| agent.ctr(&["content", "get", digest]).unwrap().check().unwrap();
    let index: Value = serde_json::from_str(&content(index)).unwrap();
    let manifests = index["manifests"].as_array().unwrap();
    let criu = |entry: &&Value| {
        entry["mediaType"].as_str().is_some_and(|kind| kind.contains("criu.checkpoint.criu.tar"))
    };
    let digest = manifests.iter().find(criu).unwrap_or_else(|| panic!("{index}"))["digest"].as_str().unwrap();
    let listing = node.sh(&format!("ctr content get {digest} | tar -tv")).unwrap();
    let size =
        |line: &str| line.split_whitespace().nth(2).and_then(|size| size.parse::<u64>().ok()).unwrap_or(0);
    // ctr names it by the second: another might come in the same one.
    agent.ctr(&["images", "rm", name]).unwrap().check().unwrap();
    (listing.clone(), listing.lines().map(size).sum())
}

#[test]
fn a_checkpoint_for_a_client_is_a_whole_image_and_leaves_the_agent_as_it_was() {
    const BALLAST: u64 = 24;
    let node = start();
    let agent = node.run_agent(&agent(Image::Python, "a").env("BALLAST_MIB", &BALLAST)).unwrap();
    agent.wait_healthy().unwrap();
    agent.chat("hello").unwrap();
    let digest = agent.digest().unwrap();
    let pid = running(&agent);
    let whole = |(files, size): (String, u64)| {
        assert!(files.contains("inventory.img") && files.contains("pages-1.img"), "{files}");
        assert!(size > BALLAST << 20, "{files}");
    };
    whole(checkpoint(&node, &agent));
    assert_eq!(running(&agent), pid);
    assert_eq!(agent.digest().unwrap(), digest);
    assert_eq!(agent.chat("again").unwrap().turn, 2);

    // A sleeping agent is woken for it.
    sleep(&node, &agent);
    whole(checkpoint(&node, &agent));
    assert_eq!(agent.turn().unwrap(), 2);
    sleep(&node, &agent);
    wake(&node, &agent);
    assert_eq!(agent.chat("and again").unwrap().turn, 3);
}

#[test]
fn a_pause_in_the_middle_of_a_clients_checkpoint_holds_after_it() {
    let node = start();
    let agent = node.run_agent(&agent(Image::Python, "a").env("BALLAST_MIB", &64)).unwrap();
    agent.wait_healthy().unwrap();
    let task = |verb: &str| agent.ctr(&["task", verb, "a"]).unwrap().check().unwrap();
    for delay in [0, 30, 60, 120, 240, 480] {
        thread::scope(|scope| {
            let taking = scope.spawn(|| {
                let path = format!("/run/checkpoint-{delay}");
                let request = CheckpointTaskRequest { id: agent.id().into(), path, ..Default::default() };
                shim(&node, &agent, async |task| task.checkpoint(patience(), &request).await).unwrap();
            });
            thread::sleep(Duration::from_millis(delay));
            task("pause");
            taking.join().unwrap();
        });
        assert_eq!(agent.task().unwrap().unwrap().1, "PAUSED", "after {delay} ms");
        assert!(frozen(&node, &agent), "after {delay} ms");
        task("resume");
        running(&agent);
        assert_eq!(agent.turn().unwrap(), 0);
    }
}

#[test]
fn limits_changed_in_its_sleep_hold_at_once_and_after_the_wake() {
    let node = start();
    let counter = node.run_agent(&agent(Image::Counter, "c")).unwrap();
    let cgroup = cgroup(&node, &counter);
    let limit = |file: &str| fs::read_to_string(cgroup.join(file)).unwrap().trim().to_owned();
    sleep(&node, &counter);

    // A limit that needs no controller.
    update(&node, &counter, &json!({ "unified": { "cgroup.max.descendants": "7" } })).unwrap();
    assert_eq!(limit("cgroup.max.descendants"), "7");
    assert_asleep(&node, &counter);
    let controllers = node.has_controller("memory") && node.has_controller("pids");
    if controllers {
        update(&node, &counter, &json!({ "memory": { "limit": 64 << 20 }, "pids": { "limit": 33 } }))
            .unwrap();
        assert_eq!((limit("memory.max"), limit("pids.max")), ((64 << 20).to_string(), "33".to_owned()));
        assert_asleep(&node, &counter);
    }
    wake(&node, &counter);
    counts_on(&node, &counter, 2);
    assert_eq!(limit("cgroup.max.descendants"), "7");
    if controllers {
        assert_eq!((limit("memory.max"), limit("pids.max")), ((64 << 20).to_string(), "33".to_owned()));
    } else {
        skipped(
            "in part: no limits of memory and processes, because this node's cgroups have no such controllers",
        );
    }
}
