//! Wrong requests, wrong options and nodes that lack something: each is told in words, and nothing is lost.

#![allow(clippy::unwrap_used)]

mod sleeper;

use std::fs;

use agentcube_tests::images::Image;
use agentcube_tests::node::{AgentSpec, Node, Output, Runtime};
use serde_json::{Value, json};
use sleeper::{
    Remembering, SOON, agentcube, assert_refused, assert_says, configured, on_node, python, run, spec, start,
    start_with,
};

/// What every file of options on these nodes begins with.
const BASE: &str = "ignore_missing_controllers = true\n";

/// Writes a file of options, and gives back its path.
fn options(node: &Node, name: &str, text: &str) -> String {
    let path = format!("/etc/agentcube/{name}.toml");
    node.write_file(&path, text).unwrap();
    path
}

/// Writes a script that stands in for CRIU, and options that name it.
fn criu(node: &Node, name: &str, script: &str) -> String {
    let path = format!("/usr/local/bin/{name}");
    node.write_file(&path, script).unwrap();
    node.sh(&format!("chmod 755 {path}")).unwrap();
    options(node, name, &format!("{BASE}criu_binary = \"{path}\"\n"))
}

/// The agent was asked to sleep in vain, said why, and is as it was.
fn assert_stays_awake(agent: &mut Remembering<'_>, words: &[&str]) {
    assert_refused(&agent.sleep(), words);
    agent.assert_state("running");
    agent.assert_running_for_containerd();
    assert_says(&agent.last_error(), words);
    agent.assert_whole();
}

// Requests.

#[test]
fn unknown_containers_are_told_apart_from_failures() {
    let node = start();
    let mut agent = run(&node, &python("known"));
    for verb in ["sleep", "wake", "inspect"] {
        let refused = agentcube(&node, &[verb, "unknown"]);
        assert_eq!(refused.status, 3, "{refused:?}");
        assert_refused(&refused, &["no container or sandbox \"unknown\"", "agentcube ps"]);
    }
    // One that is there is served all the same.
    let mixed = agentcube(&node, &["sleep", "unknown", "known"]);
    assert_refused(&mixed, &["no container or sandbox", "known: asleep (checkpointed)"]);
    agent.assert_state("asleep");
    agent.wakes();
    // Not a start of an id, but of a path.
    for nonsense in ["../known", "known/..", "*", " "] {
        assert_refused(&agentcube(&node, &["sleep", nonsense]), &["no container or sandbox"]);
    }
    assert_eq!(agentcube(&node, &["sleep", "known", "--depth", "archived"]).status, 2);
    assert_refused(
        &agentcube(&node, &["sleep", "known", "--depth", "reclaimed"]),
        &["cannot be reclaimed", "nothing to reclaim to"],
    );
    agent.assert_state("running");
    agent.assert_whole();
}

#[test]
fn a_sleep_of_a_sleeper_and_a_wake_of_one_awake_change_nothing() {
    let node = start();
    let mut agent = run(&node, &python("a"));
    let awake = agent.wake();
    assert_says(&awake.check().unwrap(), &["a: was awake already"]);
    agent.sleeps();
    let image = agent.image();
    for depth in [&["sleep", "a"][..], &["sleep", "a", "--depth", "frozen"]] {
        assert_refused(
            &agentcube(&node, depth),
            &["cannot put a to sleep", "asleep already", "checkpointed"],
        );
    }
    agent.assert_state("asleep");
    assert_eq!(agent.image(), image);
    assert_eq!(agent.last_error(), "");
    agent.wakes();
    assert_eq!(agent.inspect()["sleeps"], 1);
}

/// A CRIU that stops itself at its start while `/run/criu-hold` is there.
const HELD: &str = "#!/bin/sh
[ \"$1\" = --version ] && exec /usr/sbin/criu --version
echo $$ > /run/criu.pid
while [ -e /run/criu-hold ]; do kill -STOP $$; done
exec /usr/sbin/criu \"$@\"
";

fn hold(node: &Node) {
    node.sh("rm -f /run/criu.pid; touch /run/criu-hold").unwrap();
}

fn release(node: &Node) {
    node.sh("rm /run/criu-hold; kill -CONT $(cat /run/criu.pid)").unwrap();
}

#[test]
fn requests_in_the_middle_of_a_sleep_and_a_wake_are_answered_at_once() {
    let node = start();
    let held = criu(&node, "criu-held", HELD);
    let mut agent = run(&node, &configured(python("a"), &held));

    hold(&node);
    let sleep = node.spawn(&["agentcube", "sleep", "a"]).unwrap();
    node.wait_until("the sleep to begin", SOON, || Ok(agent.state() == "falling-asleep")).unwrap();
    assert_refused(&agent.sleep(), &["cannot put a to sleep", "falling asleep already"]);
    agent.assert_running_for_containerd();
    release(&node);
    sleep.wait(SOON).unwrap().check().unwrap();
    agent.assert_state("asleep");

    hold(&node);
    let wake = node.spawn(&["agentcube", "wake", "a"]).unwrap();
    node.wait_until("the wake to begin", SOON, || Ok(agent.state() == "waking")).unwrap();
    assert_refused(&agent.wake(), &["cannot wake a", "waking already"]);
    assert_refused(&agent.sleep(), &["cannot put a to sleep", "waking already"]);
    agent.assert_running_for_containerd();
    agent.assert_state("waking");
    release(&node);
    wake.wait(SOON).unwrap().check().unwrap();
    agent.assert_state("running");
    agent.assert_whole();
}

#[test]
fn a_wake_that_waits_for_a_held_dump_is_served() {
    let node = start();
    let held = criu(&node, "criu-held", HELD);
    let mut agent = run(&node, &configured(python("a"), &held));
    hold(&node);
    let sleep = node.spawn(&["agentcube", "sleep", "a"]).unwrap();
    node.wait_until("the sleep to begin", SOON, || {
        Ok(agent.state() == "falling-asleep" && on_node(&node, "/run/criu.pid").exists())
    })
    .unwrap();
    let mut wake = node.spawn(&["agentcube", "wake", "a"]).unwrap();
    // It waits for the dump, which waits for us.
    assert!(wake.running());
    agent.assert_state("falling-asleep");
    release(&node);
    wake.wait(SOON).unwrap().check().unwrap();
    // The dump was called off, or it was complete before the wake came.
    drop(sleep.wait(SOON).unwrap());
    agent.assert_state("running");
    agent.assert_whole();
}

#[test]
fn nonsense_in_signals_and_execs_is_refused_and_harms_nothing() {
    let node = start();
    let mut agent = run(&node, &python("a"));
    let exec = |id: &str| agent.agent.ctr(&["task", "exec", "--exec-id", id, "a", "/bin/true"]).unwrap();
    for id in ["../../etc", "a/b", "", "x y"] {
        assert_ne!(exec(id).status, 0, "an exec called {id:?} was started");
    }
    assert!(!on_node(&node, "/run/etc.pid").exists());
    let missing = agent.agent.exec(&["/no/such/program"]).unwrap();
    assert_refused(&missing, &["/no/such/program", "no such file"]);
    for signal in ["65", "4000000000", "SIGNONSENSE"] {
        let killed = agent.agent.ctr(&["task", "kill", "--signal", signal, "a"]).unwrap();
        assert_refused(&killed, &["signal"]);
    }
    agent.assert_whole();
    agent.sleeps();
    let killed = agent.agent.ctr(&["task", "kill", "--signal", "65", "a"]).unwrap();
    assert_refused(&killed, &["signal"]);
    // A failed exec may wake the agent, which is no harm.
    assert_ne!(agent.agent.exec(&["/no/such/program"]).unwrap().status, 0);
    agent.wake().check().unwrap();
    agent.assert_whole();
    agent.sleeps();
    agent.wakes();
}

// CRIU.

#[test]
fn a_node_without_criu_runs_agents_and_says_why_they_do_not_sleep() {
    let node = start();
    let missing = options(&node, "missing", &format!("{BASE}criu_binary = \"/opt/criu/criu\"\n"));
    let mut agent = run(&node, &configured(python("a"), &missing));
    assert_stays_awake(&mut agent, &["/opt/criu/criu", "does not exist", "install CRIU"]);
    assert_stays_awake(&mut agent, &["/opt/criu/criu"]);
    // Frozen it can be, without CRIU.
    agentcube(&node, &["sleep", "a", "--depth", "frozen"]).check().unwrap();
    agent.wakes();

    let by_name = options(&node, "by-name", &format!("{BASE}criu_binary = \"no-such-criu\"\n"));
    let mut other = run(&node, &configured(python("b"), &by_name));
    assert_stays_awake(&mut other, &["no-such-criu"]);
}

#[test]
fn a_criu_that_is_too_old_is_refused_with_both_versions_before_it_touches_the_agent() {
    let node = start();
    let script = "#!/bin/sh
case \"$*\" in *--version*|*-V*) echo 'Version: 3.17.1'; exit 0;; esac
echo \"$@\" >> /run/old-criu-was-used
exec /usr/sbin/criu \"$@\"
";
    let old = criu(&node, "old-criu", script);
    let mut agent = run(&node, &configured(python("a"), &old));
    assert_stays_awake(&mut agent, &["3.17.1", "4.2", "criu"]);
    assert!(!on_node(&node, "/run/old-criu-was-used").exists());
}

#[test]
fn a_criu_that_is_something_else_is_refused() {
    let node = start();
    let other = criu(&node, "not-criu", "#!/bin/sh\necho hello\nexit 1\n");
    let mut agent = run(&node, &configured(python("a"), &other));
    assert_stays_awake(&mut agent, &["CRIU"]);
}

// Disks.

/// Mounts a tmpfs on the node, and gives back options that have it for images.
fn image_disk(node: &Node, name: &str, size: &str) -> String {
    node.sh(&format!("mkdir -p /mnt/{name} && mount -t tmpfs -o mode=700,size={size} none /mnt/{name}"))
        .unwrap();
    options(node, name, &format!("{BASE}image_dir = \"/mnt/{name}\"\n"))
}

#[test]
fn a_full_disk_keeps_an_agent_awake_until_there_is_space() {
    let node = start();
    let disk = image_disk(&node, "small", "64M");
    let mut agent = run(&node, &configured(python("a").env("BALLAST_MIB", &16), &disk));
    node.sh("dd if=/dev/zero of=/mnt/small/filler bs=1M count=63 2>/dev/null").unwrap();
    for _ in 0..2 {
        assert_stays_awake(&mut agent, &["full", "space"]);
        // A failed dump leaves nothing where there is so little.
        let left = node.sh("cd /mnt/small && find . -type f ! -name filler").unwrap();
        assert_eq!(left, "");
    }
    // Not even a directory can be made.
    node.sh("mount -o remount,nr_inodes=1 /mnt/small 2>/dev/null || dd if=/dev/zero of=/mnt/small/more bs=64k 2>/dev/null || :").unwrap();
    assert_stays_awake(&mut agent, &["space"]);
    node.sh("rm -f /mnt/small/filler /mnt/small/more; mount -o remount,nr_inodes=0 /mnt/small || :").unwrap();
    agent.sleeps();
    assert!(agent.image().starts_with(on_node(&node, "/mnt/small")));
    agent.wakes();
}

#[test]
fn a_read_only_disk_keeps_an_agent_awake_until_it_can_be_written() {
    let node = start();
    let disk = image_disk(&node, "locked", "64M");
    let mut agent = run(&node, &configured(python("a"), &disk));
    node.sh("mount -o remount,ro /mnt/locked").unwrap();
    assert_stays_awake(&mut agent, &["/mnt/locked", "read-only"]);
    node.sh("mount -o remount,rw /mnt/locked").unwrap();
    agent.sleeps();
    agent.wakes();
}

#[test]
fn an_image_directory_that_others_can_read_or_that_is_none_is_refused() {
    let node = start();
    node.sh("mkdir -p -m 755 /srv/open && touch /srv/file").unwrap();
    let open = options(&node, "open", &format!("{BASE}image_dir = \"/srv/open\"\n"));
    let mut agent = run(&node, &configured(python("a"), &open));
    assert_stays_awake(&mut agent, &["/srv/open", "755", "chmod 700"]);
    node.sh("chmod 700 /srv/open").unwrap();
    agent.sleeps();
    agent.wakes();

    let file = options(&node, "file", &format!("{BASE}image_dir = \"/srv/file\"\n"));
    let mut other = run(&node, &configured(python("b"), &file));
    assert_stays_awake(&mut other, &["/srv/file", "not a directory"]);
}

// Options.

/// Starts a container that must be refused.
fn refused(node: &Node, spec: &AgentSpec, words: &[&str]) {
    let error = node.run_agent(spec).expect_err("the container was created").to_string();
    assert_says(&error, words);
    let tasks = node.ctr(&["task", "ls", "-q"]).unwrap();
    assert!(!tasks.contains(&spec.id), "{tasks}");
    let _ = node.exec(&["ctr", "container", "delete", &spec.id]);
    let _ = node.exec(&["ip", "netns", "delete", &spec.id]);
}

#[test]
fn wrong_options_are_named_and_no_container_is_made() {
    let node = start();
    node.import(Image::Counter, "default").unwrap();
    let before = node.snapshot();
    let counter = |id: &str, path: &str| configured(spec(Image::Counter, id), path);
    for (name, text, words) in [
        ("unknown", "criu_path = \"/usr/sbin/criu\"\n", &["/etc/agentcube/unknown.toml", "criu_path"][..]),
        ("type", "image_dir = 3\n", &["/etc/agentcube/type.toml", "image_dir", "string"]),
        ("bool", "ignore_missing_controllers = \"yes\"\n", &["ignore_missing_controllers", "boolean"]),
        ("relative", "image_dir = \"images\"\n", &["image_dir", "absolute path", "images"]),
        ("level", "log_level = \"loud\"\n", &["log_level", "loud"]),
        ("syntax", "image_dir = \n", &["/etc/agentcube/syntax.toml"]),
        ("runc", "runc_binary = \"/opt/no/runc\"\n", &["/opt/no/runc", "runc_binary"]),
    ] {
        let path = options(&node, name, text);
        refused(&node, &counter(name, &path), words);
    }
    let absent = "/etc/agentcube/absent.toml";
    refused(&node, &counter("absent", absent), &[absent, "no such file"]);
    node.sh("mkdir /etc/agentcube/folder.toml && truncate -s 2M /etc/agentcube/large.toml").unwrap();
    refused(
        &node,
        &counter("folder", "/etc/agentcube/folder.toml"),
        &["/etc/agentcube/folder.toml", "directory"],
    );
    refused(&node, &counter("large", "/etc/agentcube/large.toml"), &["/etc/agentcube/large.toml", "bytes"]);
    node.wait_until_clean(&before, SOON).unwrap();
    // The next one with right options is fine.
    node.run_agent(&spec(Image::Counter, "fine")).unwrap().delete().unwrap();
    node.wait_until_clean(&before, SOON).unwrap();
}

/// Runs a container from a specification of a running one, changed.
fn run_changed(node: &Node, id: &str, change: impl FnOnce(&mut Value)) -> Output {
    let model = node.run_agent(&spec(Image::Counter, "model")).unwrap();
    let bundle = "/run/containerd/io.containerd.runtime.v2.task/default/model/config.json";
    let mut text: Value = serde_json::from_str(&node.read_file(bundle).unwrap()).unwrap();
    model.delete().unwrap();
    node.sh("test -d /srv/rootfs || { mkdir -p /srv/rootfs && cp -a /usr/bin/busybox /srv/rootfs/; }")
        .unwrap();
    text["root"] = json!({ "path": "/srv/rootfs" });
    text["process"]["args"] = json!(["/busybox", "sleep", "1000"]);
    text["linux"]["cgroupsPath"] = json!(format!("/default/{id}"));
    let namespaces = text["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "network");
    change(&mut text);
    node.write_file("/srv/spec.json", &text.to_string()).unwrap();
    let runtime = Runtime::Agentcube.name();
    let toml = agentcube_tests::node::SHIM_TOML;
    let line = ["ctr", "run", "--detach", "--runtime", runtime, "--runtime-config-path", toml];
    node.command(line.into_iter().chain(["--config", "/srv/spec.json", id])).run().unwrap()
}

#[test]
fn a_container_without_a_cgroup_of_its_own_is_refused() {
    let node = start();
    // Unchanged, such a container runs and sleeps: what is refused below is what was changed.
    run_changed(&node, "right", |_| {}).check().unwrap();
    agentcube(&node, &["sleep", "right"]).check().unwrap();
    agentcube(&node, &["wake", "right"]).check().unwrap();
    for (id, path) in [("none", None), ("empty", Some(""))] {
        let before = node.snapshot();
        let output = run_changed(&node, id, |text| match path {
            Some(path) => text["linux"]["cgroupsPath"] = json!(path),
            None => drop(text["linux"].as_object_mut().unwrap().remove("cgroupsPath")),
        });
        assert_refused(&output, &["config.json", "cgroupsPath", "cgroup"]);
        node.ctr(&["container", "delete", id]).unwrap();
        let _ = node.exec(&["ip", "netns", "delete", "model"]);
        node.wait_until_clean(&before, SOON).unwrap();
    }
}

// Controllers.

#[test]
fn a_limit_whose_controller_is_missing_is_refused_by_name_or_left_out_by_option() {
    let node = start_with("");
    if node.has_controller("memory") {
        return agentcube_tests::skipped("this machine's cgroups have a memory controller");
    }
    let before = {
        node.import(Image::Python, "default").unwrap();
        node.snapshot()
    };
    let limited = |id: &str| python(id).flag("--memory-limit").flag("100000000");
    let strict = options(&node, "strict", "");
    refused(
        &node,
        &configured(limited("strict"), &strict),
        &["memory", "controller", "ignore_missing_controllers"],
    );
    node.wait_until_clean(&before, SOON).unwrap();

    let mut agent = run(&node, &limited("lenient"));
    assert_says(&node.containerd_log(), &["memory", "controller"]);
    agent.sleeps();
    agent.wakes();
    // What is in force can be read: there is no limit, and no file to hold one.
    assert!(!fs::exists(node.cgroup("/default/lenient").join("memory.max")).unwrap());
}
