//! The fast mode: CRIU inside the pod's namespaces, memory file systems that live on, and when it is not used.

#![allow(clippy::unwrap_used)]

mod cycle;

use agentcube_tests::images::Image;
use agentcube_tests::node::{Agent, Net, Node, NodeOptions};
use cycle::{SOON, agent, inspect, sleep, start, wake};
use serde_json::Value;

/// A node whose shims have these options beside those that it needs.
fn start_with(shim_toml: &str) -> Node {
    let mut options = NodeOptions::default();
    options.shim_toml.push_str(shim_toml);
    Node::start(options).unwrap()
}

/// The last sleep, and the mode in which it was.
fn last_sleep(node: &Node, agent: &Agent) -> (String, Value) {
    let slept = inspect(node, agent)["last_sleep"].take();
    (slept["mode"].as_str().unwrap().to_owned(), slept)
}

/// Runs a script in the container; python has the standard library for all of it.
fn inside(agent: &Agent, script: &str) -> String {
    agent.exec(&["python3", "-c", script]).unwrap().check().unwrap()
}

/// Fills /dev/shm with random bytes and gives back their digest.
fn fill(agent: &Agent, bytes: usize) -> String {
    inside(
        agent,
        &format!(
            "import os; os.makedirs('/dev/shm/d'); open('/dev/shm/d/f', 'wb').write(os.urandom({bytes}))"
        ),
    );
    shared(agent)
}

/// What /dev/shm holds.
fn shared(agent: &Agent) -> String {
    inside(agent, "import hashlib; print(hashlib.sha256(open('/dev/shm/d/f', 'rb').read()).hexdigest())")
}

/// The container's mounts, without what the kernel numbers.
fn mounts(agent: &Agent) -> Vec<String> {
    let table = inside(agent, "print(open('/proc/1/mountinfo').read(), end='')");
    let without_numbers = |line: &str| {
        let (fields, rest) = line.split_once(" - ").unwrap();
        let kept: Vec<&str> =
            fields.split(' ').skip(3).map(|field| field.split(':').next().unwrap()).collect();
        format!("{} - {rest}", kept.join(" "))
    };
    let mut table: Vec<String> = table.lines().map(without_numbers).collect();
    table.sort();
    table
}

#[test]
fn an_agent_sleeps_fast_and_its_mounts_and_shared_memory_are_as_before() {
    let node = start();
    let before = node.snapshot();
    let agent = node.run_agent(&agent(Image::Python, "a").net(Net::Pod)).unwrap();
    agent.wait_healthy().unwrap();
    let (wanted, table) = (fill(&agent, 3 << 20), mounts(&agent));
    let host = node.sh("wc -l < /proc/self/mountinfo").unwrap();
    for _ in 0..3 {
        sleep(&node, &agent);
        let (mode, slept) = last_sleep(&node, &agent);
        assert_eq!(mode, "pod-namespaces", "{slept}");
        assert!(slept["memory_bytes"].as_u64().unwrap() > 3 << 20, "{slept}");
        // The node's own mount table does not grow by what is kept.
        assert_eq!(node.sh("wc -l < /proc/self/mountinfo").unwrap(), host);
        wake(&node, &agent);
        assert_eq!(inspect(&node, &agent)["last_wake"]["mode"], "pod-namespaces");
        assert_eq!(shared(&agent), wanted);
        assert_eq!(mounts(&agent), table);
    }
    sleep(&node, &agent);
    agent.delete().unwrap();
    node.wait_until_clean(&before, SOON).unwrap();
}

#[test]
fn shared_memory_beyond_the_limit_goes_into_the_image() {
    let node = start_with("memory_limit_mib = 2\n");
    let agent = node.run_agent(&agent(Image::Python, "a")).unwrap();
    agent.wait_healthy().unwrap();
    let wanted = fill(&agent, 6 << 20);
    for _ in 0..3 {
        sleep(&node, &agent);
        let (mode, slept) = last_sleep(&node, &agent);
        assert_eq!(mode, "pod-namespaces");
        assert!(slept["memory_bytes"].as_u64().unwrap() < 2 << 20, "{slept}");
        assert!(slept["image_bytes"].as_u64().unwrap() > 6 << 20, "{slept}");
        wake(&node, &agent);
        assert_eq!(shared(&agent), wanted);
    }
}

#[test]
fn memory_is_written_in_advance_where_the_kernel_tracks_it_and_elsewhere_the_reason_is_told() {
    let node = start_with("pre_dump = true\npre_dump_min_mib = 0\n");
    let tracked = node.sh("criu check --feature mem_dirty_track").is_ok();
    let agent = node.run_agent(&agent(Image::Python, "a")).unwrap();
    agent.wait_healthy().unwrap();
    let wanted = fill(&agent, 1 << 20);
    for _ in 0..3 {
        sleep(&node, &agent);
        let (mode, slept) = last_sleep(&node, &agent);
        assert_eq!(mode, "pod-namespaces", "{slept}");
        let parents = node.sh("find /var/lib/agentcube/images -path '*/parent/pages-1.img' | wc -l").unwrap();
        if tracked {
            assert_eq!((parents.trim(), &slept["whole_because"]), ("1", &Value::Null));
        } else {
            let reason = slept["whole_because"].as_str().unwrap();
            assert!(reason.contains("does not track"), "{reason}");
            assert_eq!(parents.trim(), "0");
        }
        wake(&node, &agent);
        agent.wait_healthy().unwrap();
        assert_eq!(shared(&agent), wanted);
    }
    let log = node.containerd_log();
    let told = if tracked { "memory written in advance" } else { "no memory is written in advance" };
    assert!(log.contains(told), "{log}");
}

#[test]
fn the_classic_mode_can_be_asked_for() {
    let node = start_with("criu_mode = \"classic\"\n");
    let agent = node.run_agent(&agent(Image::Python, "a").net(Net::Pod)).unwrap();
    agent.wait_healthy().unwrap();
    let wanted = fill(&agent, 1 << 20);
    for _ in 0..2 {
        sleep(&node, &agent);
        let (mode, slept) = last_sleep(&node, &agent);
        assert_eq!((mode.as_str(), slept["memory_bytes"].as_u64()), ("classic", Some(0)));
        assert_eq!(slept["classic_because"], "asked for");
        wake(&node, &agent);
        assert_eq!(shared(&agent), wanted);
    }
}

#[test]
fn an_agent_with_a_network_in_its_network_sleeps_in_the_classic_mode_and_says_why() {
    let node = start();
    let script = "import os, time
mine = os.stat('/proc/self/ns/net').st_ino
if os.fork() == 0:
    os.unshare(os.CLONE_NEWNET)
    while os.stat('/proc/self/ns/net').st_ino != os.stat('/proc/1/ns/net').st_ino:
        time.sleep(0.01)
    os._exit(1)
while os.waitpid(-1, os.WNOHANG) == (0, 0):
    time.sleep(0.01)";
    let spec = agent(Image::Python, "a").net(Net::Pod).flag("--privileged").args(&["python3", "-c", script]);
    let agent = node.run_agent(&spec).unwrap();
    let is_two = || Ok(cycle::host_pids(&node, &agent).len() == 2);
    node.wait_until("the second process", SOON, is_two).unwrap();
    for _ in 0..2 {
        std::thread::sleep(std::time::Duration::from_millis(200));
        sleep(&node, &agent);
        let (mode, slept) = last_sleep(&node, &agent);
        assert_eq!(mode, "classic", "{slept}");
        let reason = slept["classic_because"].as_str().unwrap();
        assert!(reason.contains("net namespace"), "{slept}");
        wake(&node, &agent);
        // It would have ended if its network were not its own.
        std::thread::sleep(std::time::Duration::from_millis(200));
        assert_eq!(cycle::host_pids(&node, &agent).len(), 2);
    }
    assert!(node.containerd_log().contains("is in another net namespace"), "{}", node.containerd_log());
}

#[test]
fn a_killed_shim_leaves_nothing_of_what_it_kept_and_says_what_is_lost() {
    let node = start();
    node.sh("mkdir -p -m 700 /var/lib/agentcube/images").unwrap();
    let before = node.snapshot();
    let agent = node.run_agent(&agent(Image::Python, "a").net(Net::Pod)).unwrap();
    agent.wait_healthy().unwrap();
    fill(&agent, 1 << 20);
    sleep(&node, &agent);
    let told = inspect(&node, &agent);
    node.sh(&format!("kill -KILL {}", told["shim_pid"])).unwrap();
    let stopped = || Ok(agent.task()?.is_none_or(|(_, state)| state == "STOPPED"));
    node.wait_until("containerd to notice", SOON, stopped).unwrap();
    agent.delete().unwrap();
    let named = || Ok(node.containerd_log().contains("without the contents of its tmpfs mounts"));
    node.wait_until("the log to say what is lost", SOON, named).unwrap();
    node.sh("rm -r /var/lib/agentcube/images/default").unwrap();
    node.wait_until_clean(&before, SOON).unwrap();
}

#[test]
fn a_checkpoint_of_a_sleeping_agent_has_its_shared_memory_and_loses_nothing() {
    let node = start();
    let agent = node.run_agent(&agent(Image::Python, "a")).unwrap();
    agent.wait_healthy().unwrap();
    agent.chat("hello").unwrap();
    let wanted = fill(&agent, 1 << 20);
    sleep(&node, &agent);
    let name = agent.ctr(&["task", "checkpoint", agent.id()]).unwrap().check().unwrap();
    let images = agent.ctr(&["images", "ls"]).unwrap().check().unwrap();
    let index = images.lines().find(|line| line.starts_with(name.trim())).unwrap();
    let content = |digest: &str| agent.ctr(&["content", "get", digest]).unwrap().check().unwrap();
    let index: Value = serde_json::from_str(&content(index.split_whitespace().nth(2).unwrap())).unwrap();
    let criu = |entry: &&Value| entry["mediaType"].as_str().is_some_and(|kind| kind.contains("criu.tar"));
    let digest = index["manifests"].as_array().unwrap().iter().find(criu).unwrap()["digest"].clone();
    let digest = digest.as_str().unwrap();
    let files = node.sh(&format!("ctr content get {digest} | tar -tv")).unwrap();
    let packed = files.lines().find(|line| {
        line.contains("tmpfs-dev") && {
            line.split_whitespace().nth(2).and_then(|size| size.parse::<u64>().ok()).unwrap() > 1 << 20
        }
    });
    assert!(packed.is_some(), "{files}");
    node.wait_until("the agent to run", SOON, || Ok(inspect(&node, &agent)["state"] == "running")).unwrap();
    assert_eq!(shared(&agent), wanted);
    assert_eq!(agent.chat("again").unwrap().turn, 2);
    sleep(&node, &agent);
    wake(&node, &agent);
    assert_eq!(shared(&agent), wanted);
}

/// The process ids of the CRIUs that run on the node.
fn criu_pids(node: &Node) -> Vec<String> {
    node.sh("pgrep -x criu || true").unwrap().lines().map(str::to_owned).collect()
}

/// Puts the agent to sleep and waits for the one CRIU that waits then.
fn sleep_with_criu(node: &Node, agent: &Agent) -> String {
    sleep(node, agent);
    let is_empty = |pid: &String| Ok(node.sh(&format!("wc -l < /proc/{pid}/mountinfo"))?.trim() == "1");
    let waits = || match &criu_pids(node)[..] {
        [pid] => is_empty(pid),
        _ => Ok(false),
    };
    node.wait_until("one CRIU that waits", SOON, waits).unwrap();
    criu_pids(node).remove(0)
}

#[test]
fn a_criu_that_is_started_ahead_waits_beside_the_agent_and_no_longer_than_its_sleep() {
    let node = start_with("criu_started_ahead = true\n");
    let before = node.snapshot();
    let agent = node.run_agent(&agent(Image::Python, "a").net(Net::Pod)).unwrap();
    agent.wait_healthy().unwrap();
    let wanted = fill(&agent, 1 << 20);
    for round in 0..4 {
        let criu = sleep_with_criu(&node, &agent);
        cycle::assert_asleep(&node, &agent);
        // One that has been killed is replaced by one that is started for the wake.
        if round % 2 == 1 {
            node.sh(&format!("kill -KILL {criu}")).unwrap();
        }
        wake(&node, &agent);
        assert_eq!(criu_pids(&node), Vec::<String>::new());
        assert_eq!(shared(&agent), wanted);
    }
    sleep_with_criu(&node, &agent);
    agent.delete().unwrap();
    node.wait_until_clean(&before, SOON).unwrap();
}

#[test]
fn a_criu_that_is_started_ahead_ends_with_its_shim() {
    let node = start_with("criu_started_ahead = true\n");
    let agent = node.run_agent(&agent(Image::Counter, "c")).unwrap();
    sleep_with_criu(&node, &agent);
    node.sh(&format!("kill -KILL {}", inspect(&node, &agent)["shim_pid"])).unwrap();
    node.wait_until("CRIU to end", SOON, || Ok(criu_pids(&node).is_empty())).unwrap();
}
