//! What goes wrong around a sleeping agent, and that its state survives it.

#![allow(clippy::unwrap_used)]

mod sleeper;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use agentcube_control::{ClientError, Depth};
use agentcube_tests::images::Image;
use agentcube_tests::node::{Leftovers, Node};
use rustix::process::{Signal, pidfd_send_signal};
use sleeper::{
    Remembering, SOON, agentcube, assert_refused, assert_says, block_on, client, inspect, on_node, python,
    run, start, start_with,
};

/// A node that holds an image already, and what is there before any agent is.
fn fresh(shim_toml: &str) -> (Node, Leftovers) {
    let node = start_with(shim_toml);
    node.import(Image::Python, "default").unwrap();
    // The folder of all images is made once and stays.
    node.sh("mkdir -p -m 700 /var/lib/agentcube/images").unwrap();
    let before = node.snapshot();
    (node, before)
}

// What an end leaves behind.

#[test]
fn an_agent_deleted_in_its_sleep_leaves_nothing() {
    let (node, before) = fresh("");
    let agent = run(&node, &python("a"));
    agent.sleeps();
    let added = node.snapshot().added_since(&before);
    assert!(added.files.keys().any(|path| path.contains("/images/default/a/")), "no image is seen:\n{added}");
    assert!(!added.cgroups.is_empty() && !added.mounts.is_empty() && !added.sockets.is_empty(), "{added}");
    agent.agent.delete().unwrap();
    node.wait_until_clean(&before, SOON).unwrap();
}

#[test]
fn an_agent_deleted_after_sleeps_and_wakes_leaves_nothing() {
    let (node, before) = fresh("");
    let mut agent = run(&node, &python("a"));
    for _ in 0..3 {
        agent.sleeps();
        agent.wakes();
        // An image that is no longer needed goes at once.
        node.wait_until("the image to go", SOON, || Ok(images(&node).is_empty())).unwrap();
    }
    agent.agent.delete().unwrap();
    node.wait_until_clean(&before, SOON).unwrap();
}

#[test]
fn an_agent_killed_in_its_sleep_ends_with_137_and_leaves_nothing() {
    let (node, before) = fresh("");
    let agent = run(&node, &python("a"));
    agent.sleeps();
    agent.agent.kill("SIGKILL").unwrap();
    assert_eq!(agent.agent.wait_and_delete(SOON).unwrap(), 137);
    node.wait_until_clean(&before, SOON).unwrap();
}

/// All files of images: below their folder, but for what wakes have taught, which stays as long as the agent.
fn images(node: &Node) -> Vec<PathBuf> {
    fn files(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                files(&entry.path(), found);
            } else if entry.file_name() != "working-set.json" {
                found.push(entry.path());
            }
        }
    }
    let mut found = Vec::new();
    files(&on_node(node, "/var/lib/agentcube/images"), &mut found);
    found
}

// containerd and the shim die.

#[test]
fn a_sleeping_agent_outlives_containerd() {
    let (node, before) = fresh("");
    let mut agent = run(&node, &python("a"));
    agent.sleeps();
    let task = agent.agent.task().unwrap();
    node.restart_containerd().unwrap();
    assert_eq!(agent.agent.task().unwrap(), task, "containerd sees another task");
    agent.assert_running_for_containerd();
    agent.assert_state("asleep");
    agent.wakes();
    agent.sleeps();
    agent.wakes();
    agent.sleeps();
    agent.agent.delete().unwrap();
    node.wait_until_clean(&before, SOON).unwrap();
}

/// Kills the agent's shim and waits until containerd has noticed.
fn kill_shim(agent: &Remembering<'_>) {
    agent.node.sh(&format!("kill -KILL {}", agent.shim_pid())).unwrap();
    let stopped = || Ok(agent.agent.task()?.is_none_or(|(_, state)| state == "STOPPED"));
    agent.node.wait_until("containerd to notice", SOON, stopped).unwrap();
}

#[test]
fn containerd_learns_of_a_killed_shim_and_nothing_is_left_of_its_agent() {
    let (node, before) = fresh("");
    let agent = run(&node, &python("a"));
    let (pid, _) = agent.agent.task().unwrap().unwrap();
    kill_shim(&agent);
    node.wait_until("the agent to end", SOON, || Ok(!on_node(&node, &format!("/proc/{pid}")).exists()))
        .unwrap();
    agent.agent.delete().unwrap();
    node.wait_until_clean(&before, SOON).unwrap();
}

#[test]
fn the_image_of_a_wake_that_was_not_yet_filled_goes_with_the_shim() {
    let (node, before) = fresh("lazy_restore_min_mib = 0\n");
    let agent = run(&node, &python("a").env("BALLAST_MIB", &256));
    let shim = agent.shim_pid();
    let signal = |name: &str| node.sh(&format!("kill -{name} {shim}")).unwrap();
    let caught = (0..10).any(|_| {
        agent.sleeps();
        agentcube(&node, &["wake", "a"]).check().unwrap();
        // Stopped, it cannot remove the image when the fill has ended.
        signal("STOP");
        let caught = !images(&node).is_empty();
        if !caught {
            signal("CONT");
        }
        caught
    });
    assert!(caught, "each fill was complete before the shim could be stopped");
    signal("KILL");
    let stopped = || Ok(agent.agent.task()?.is_none_or(|(_, state)| state == "STOPPED"));
    node.wait_until("containerd to notice", SOON, stopped).unwrap();
    agent.agent.delete().unwrap();
    node.wait_until_clean(&before, SOON).unwrap();
}

#[test]
fn the_image_of_a_sleeper_whose_shim_was_killed_stays_and_the_log_names_it() {
    let (node, before) = fresh("");
    let agent = run(&node, &python("a"));
    agent.sleeps();
    let image = agent.inspect()["image_dir"].as_str().unwrap().to_owned();
    let files = images(&node);
    assert!(!files.is_empty());
    kill_shim(&agent);
    agent.agent.delete().unwrap();
    assert_eq!(images(&node), files);
    node.wait_until("the log to name the image", SOON, || Ok(node.containerd_log().contains(&image)))
        .unwrap();
    assert_says(&node.containerd_log(), &["its state is kept in"]);
    // All else goes.
    node.sh("rm -r /var/lib/agentcube/images/*").unwrap();
    node.wait_until_clean(&before, SOON).unwrap();
}

// Dumps that must fail.

#[test]
fn an_agent_that_watches_files_is_not_put_to_sleep_until_it_stops() {
    let node = start();
    let watch = "import ctypes, os, signal
libc = ctypes.CDLL(None)
fd = libc.inotify_init1(0o2000000)
assert libc.inotify_add_watch(fd, b'/agent.py', 2) >= 0
signal.signal(signal.SIGUSR1, lambda *_: os.close(fd))
exec(open('/agent.py').read())";
    let mut agent = run(&node, &python("a").args(&["/usr/bin/python3", "-c", watch]));
    for _ in 0..2 {
        assert_refused(&agent.sleep(), &["cannot put a to sleep", "watches files", "shallower depth"]);
        agent.assert_state("running");
        assert_says(&agent.last_error(), &["watches files"]);
        assert_says(&agentcube(&node, &["inspect", "a"]).stdout, &["Last error:", "watches files"]);
        agent.assert_whole();
        assert!(images(&node).is_empty(), "{:?}", images(&node));
    }
    agent.agent.kill("SIGUSR1").unwrap();
    let (pid, _) = agent.agent.task().unwrap().unwrap();
    let watching = format!("ls -l /proc/{pid}/fd");
    node.wait_until("the watch to go", SOON, || Ok(!node.sh(&watching)?.contains("inotify"))).unwrap();
    agent.sleeps();
    assert_eq!(agent.last_error(), "");
    agent.wakes();
}

#[test]
fn an_agent_with_a_client_is_not_put_to_sleep_until_the_client_goes() {
    let node = start();
    let mut agent = run(&node, &python("a"));
    let connection = agent.agent.connect().unwrap();
    let (pid, _) = agent.agent.task().unwrap().unwrap();
    let established = || {
        let table = fs::read_to_string(on_node(&node, &format!("/proc/{pid}/net/tcp"))).unwrap();
        // 01 is an established connection, 08 one whose other end is closed.
        Ok(table
            .lines()
            .skip(1)
            .any(|line| line.contains(":1F90 ") && (line.contains(" 01 ") || line.contains(" 08 "))))
    };
    node.wait_until("the connection", SOON, established).unwrap();
    // Until the agent has accepted it the connection waits in a queue, which is another reason.
    node.wait_until("the agent to accept", SOON, || {
        Ok(node.sh(&format!("ls -l /proc/{pid}/fd"))?.matches("socket:").count() > 3)
    })
    .unwrap();
    assert_refused(&agent.sleep(), &["cannot put a to sleep", "TCP connection is established"]);
    agent.assert_state("running");
    assert_says(&agent.last_error(), &["TCP connection is established"]);
    assert_says(
        &agentcube(&node, &["inspect", "a"]).stdout,
        &["Last error:", "TCP connection is established"],
    );
    agent.assert_whole();
    drop(connection);
    node.wait_until("the connection to go", SOON, || Ok(!established()?)).unwrap();
    agent.sleeps();
    agent.wakes();
}

// Images that are not what they were.

/// Breaks the image, sees the wake fail with these words, mends it.
fn broken(agent: &Remembering<'_>, words: &[&str], file: &Path, change: impl FnOnce(&Path)) {
    let kept = agent.node.name().to_owned() + "-" + &file.file_name().unwrap().to_string_lossy();
    let kept = std::env::temp_dir().join(kept);
    fs::copy(file, &kept).unwrap();
    change(file);
    let refused = agent.wake();
    // Whatever is there now goes first: a copy would follow a link.
    let _ = fs::remove_file(file);
    fs::copy(&kept, file).unwrap();
    fs::remove_file(&kept).unwrap();
    let name = file.file_name().unwrap().to_string_lossy();
    assert_refused(&refused, &[&["cannot wake a", &*name], words].concat());
}

fn cut(file: &Path, by: u64) {
    let length = fs::metadata(file).unwrap().len();
    fs::File::options().write(true).open(file).unwrap().set_len(length - by).unwrap();
}

#[test]
fn a_damaged_image_is_refused_by_the_name_of_the_file_and_kept() {
    let node = start();
    let mut agent = run(&node, &python("a"));
    agent.sleeps();
    let (shim, image) = (agent.shim_pid(), agent.image());
    let mut files: Vec<PathBuf> =
        fs::read_dir(image.join("img")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let names: Vec<_> = files.iter().map(|file| file.file_name().unwrap().to_str().unwrap()).collect();
    assert!(names.len() > 10 && names.contains(&"pages-1.img") && names.contains(&"pstree.img"), "{names:?}");

    for file in &files {
        if fs::metadata(file).unwrap().len() > 0 {
            broken(&agent, &["truncated"], file, |file| cut(file, 1));
        } else {
            broken(&agent, &["has grown"], file, |file| fs::write(file, "x").unwrap());
        }
    }
    assert_says(&agent.last_error(), &["image"]);
    let pages = image.join("img/pages-1.img");
    broken(&agent, &["truncated", "0 bytes of"], &pages, |file| cut(file, fs::metadata(file).unwrap().len()));
    let core = files.iter().find(|file| file.to_string_lossy().contains("core-1.img")).unwrap();
    broken(&agent, &["altered"], core, |file| {
        let mut bytes = fs::read(file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(file, bytes).unwrap();
    });
    broken(&agent, &["lacks its file"], core, |file| fs::remove_file(file).unwrap());
    broken(&agent, &["altered"], core, |file| {
        // A link to where it stood, and no way out of the folder.
        fs::rename(file, image.join("aside")).unwrap();
        std::os::unix::fs::symlink("../aside", file).unwrap();
    });
    assert!(fs::symlink_metadata(core).unwrap().is_file());
    let strange = image.join("img/strange.img");
    fs::rename(image.join("aside"), &strange).unwrap();
    assert_refused(&agent.wake(), &["strange.img", "did not write"]);
    fs::remove_file(&strange).unwrap();

    // All of that cost the agent nothing.
    assert_eq!(agent.shim_pid(), shim);
    agent.assert_running_for_containerd();
    agent.assert_state("asleep");
    assert_eq!(agent.image(), image);
    agent.wakes();
    assert_eq!(agent.last_error(), "");
    agent.sleeps();
    agent.wakes();
}

#[test]
fn an_altered_manifest_makes_no_damaged_image_good() {
    let node = start();
    let mut agent = run(&node, &python("a"));
    agent.sleeps();
    let image = agent.image();
    let (manifest, pages) = (image.join("manifest.json"), image.join("img/pages-1.img"));
    let (text, bytes) = (fs::read_to_string(&manifest).unwrap(), fs::read(&pages).unwrap());
    // The shorter file, and a manifest that says so.
    cut(&pages, 4096);
    let forged = text.replacen(&bytes.len().to_string(), &(bytes.len() - 4096).to_string(), 1);
    assert_ne!(forged, text);
    fs::write(&manifest, forged).unwrap();
    assert_refused(&agent.wake(), &["cannot wake a", &image.file_name().unwrap().to_string_lossy()]);
    agent.assert_state("asleep");
    fs::write(&pages, bytes).unwrap();
    fs::write(&manifest, text).unwrap();
    agent.wakes();
}

// CRIU dies.

/// Puts a CRIU in place that tells its pid before it begins.
fn with_criu_script(node: &Node) {
    let script = "#!/bin/sh
# Only what the shell does by itself: a process of its own would be in the agent's cgroup.
[ \"$1\" = --version ] || echo $$ > /run/criu.pid
exec /usr/sbin/criu \"$@\"
";
    node.write_file("/usr/local/bin/criu-script", script).unwrap();
    node.sh("chmod 755 /usr/local/bin/criu-script").unwrap();
}

const CRIU_SCRIPT: &str = "criu_binary = \"/usr/local/bin/criu-script\"\n";

/// Kills a process of the node by its pid there, if it is a CRIU.
fn kill_criu(node: &Node, pid: u32) -> bool {
    let folder = on_node(node, &format!("/proc/{pid}"));
    // The folder stands for this one process, as a pidfd does.
    let Ok(process) = fs::File::open(&folder) else { return false };
    let command = fs::read_to_string(folder.join("cmdline")).unwrap_or_default();
    command.contains("criu") && pidfd_send_signal(&process, Signal::KILL).is_ok()
}

/// Runs `work` and kills the CRIU that it starts, `delay` after that began. Gives back the work's outcome and whether
/// there was a CRIU to kill.
fn killing_criu<T>(node: &Node, delay: Duration, work: impl FnOnce() -> T) -> (T, bool) {
    let file = on_node(node, "/run/criu.pid");
    let _ = fs::remove_file(&file);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let killer = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                if let Ok(pid) = fs::read_to_string(&file).unwrap_or_default().trim().parse() {
                    thread::sleep(delay);
                    return kill_criu(node, pid);
                }
                thread::sleep(Duration::from_micros(200));
            }
            false
        });
        let outcome = work();
        done.store(true, Ordering::SeqCst);
        (outcome, killer.join().unwrap())
    })
}

/// From the start of CRIU to some time after its end, in even steps. What it does a good part of took `whole`
/// undisturbed.
fn delays(whole: Duration) -> impl Iterator<Item = Duration> {
    (0..24).map(move |step| whole / 32 * step)
}

/// How long that takes.
fn time(work: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    work();
    begun.elapsed()
}

/// What a process ends with in whose code CRIU died: SIGTRAP and SIGSEGV.
const BROKEN: [u64; 2] = [128 + 5, 128 + 11];

/// A CRIU that is killed while its code is in a process can take that process along: nobody is left who could put its
/// registers right. Rare, and then told as the end that it is; docs/operations.md names it among the limits.
#[test]
fn an_agent_whose_criu_is_killed_in_a_dump_runs_on_or_ends_with_a_status_that_says_so() {
    let node = start_with(CRIU_SCRIPT);
    with_criu_script(&node);
    let spec = python("a").env("BALLAST_MIB", &48);
    let mut agent = run(&node, &spec);
    let whole = time(|| agent.sleeps());
    agent.wakes();
    let (mut failed, mut ended) = (0, 0);
    for delay in delays(whole) {
        let (slept, _) = killing_criu(&node, delay, || agent.sleep());
        if slept.status == 0 {
            // It came too late, or in the middle of the kill, when the image was complete.
            agent.assert_state("asleep");
            agent.wakes();
            continue;
        }
        failed += 1;
        assert_refused(&slept, &["cannot put a to sleep", "CRIU"]);
        assert!(images(&node).is_empty(), "{:?}", images(&node));
        if agent.agent.turn().is_err() {
            ended += 1;
            let status = agent.agent.wait_and_delete(SOON).unwrap();
            assert!(BROKEN.contains(&u64::try_from(status).unwrap()), "it ended with {status}");
            agent = run(&node, &spec);
            continue;
        }
        agent.assert_state("running");
        agent.assert_running_for_containerd();
        agent.assert_whole();
    }
    println!("{ended} of {failed} agents ended with the CRIU that dumped them");
    assert!(failed > 2, "only {failed} dumps were broken off");
    assert!(ended * 3 <= failed, "{ended} of {failed} ended");
    agent.sleeps();
    agent.wakes();
}

#[test]
fn an_image_survives_a_criu_that_dies_in_the_middle_of_a_restore() {
    let (node, before) = {
        let (node, _) = fresh(CRIU_SCRIPT);
        with_criu_script(&node);
        let before = node.snapshot();
        (node, before)
    };
    let mut agent = run(&node, &python("a").env("BALLAST_MIB", &48));
    let shim = agent.shim_pid();
    agent.sleeps();
    let whole = time(|| agent.wakes());
    let mut failed = 0;
    for delay in delays(whole) {
        agent.sleeps();
        let asleep = node.snapshot();
        let (woken, _) = killing_criu(&node, delay, || agent.wake());
        if woken.status != 0 {
            failed += 1;
            assert_refused(&woken, &["cannot wake a", "CRIU"]);
            agent.assert_state("asleep");
            agent.assert_running_for_containerd();
            assert!(agent.image().join("manifest.json").exists());
            // Nothing of what was made remains, but for CRIU's log in the image. Its checksums may come late.
            node.wait_until("what was restored to go", SOON, || {
                let mut added = node.snapshot().added_since(&asleep);
                added.files.retain(|path, _| !path.contains("/work/") && !path.ends_with("/pages.sums"));
                Ok(added.is_empty())
            })
            .unwrap_or_else(|error| panic!("{error}\n{}", node.snapshot().added_since(&asleep)));
            agent.wakes();
        }
        agent.assert_state("running");
        agent.assert_whole();
    }
    println!("{failed} restores were broken off");
    assert!(failed > 2, "only {failed} restores were broken off");
    assert_eq!(agent.shim_pid(), shim);
    agent.agent.delete().unwrap();
    let _ = fs::remove_file(on_node(&node, "/run/criu.pid"));
    node.wait_until_clean(&before, SOON).unwrap();
}

// Many at once, and races.

#[test]
fn a_wake_during_a_dump_either_cancels_it_or_follows_it() {
    let node = start();
    let mut agent = run(&node, &python("a").env("BALLAST_MIB", &16));
    let (mut cancelled, mut followed) = (0, 0);
    for round in 0..40 {
        let delay = Duration::from_millis(round * 4);
        let (slept, woken) = block_on(async {
            let (sleeper, waker) = (client(&node, "a").await, client(&node, "a").await);
            tokio::join!(sleeper.sleep("a", Depth::DEPTH_CHECKPOINTED), async {
                tokio::time::sleep(delay).await;
                waker.wake("a").await
            })
        });
        match slept {
            Ok(slept) => {
                assert_eq!(slept.len(), 1);
                followed += 1;
                // A wake that came before the sleep had begun found it awake.
                if woken.unwrap().is_empty() {
                    assert!(delay.is_zero(), "the wake after {delay:?} did nothing");
                    agent.wakes();
                }
            }
            Err(ClientError::Failed { failure, .. }) => {
                cancelled += 1;
                assert_says(&failure.to_string(), &["given up", "needs the agent awake"]);
                assert!(woken.unwrap().is_empty(), "it never slept");
            }
            Err(other) => panic!("{other}"),
        }
        agent.assert_state("running");
        agent.assert_whole();
    }
    assert!(cancelled > 0 && followed > 0, "{cancelled} cancelled, {followed} followed by a wake");
    node.wait_until("all images to go", SOON, || Ok(images(&node).is_empty())).unwrap();
}

#[test]
fn twenty_agents_sleep_and_wake_at_once() {
    let (node, before) = fresh("");
    let ids: Vec<String> = (0..20).map(|number| format!("agent-{number:02}")).collect();
    let mut agents: Vec<Remembering<'_>> = thread::scope(|scope| {
        let node = &node;
        let halves = ids.chunks(10).map(|half| {
            scope.spawn(move || half.iter().map(|id| run(node, &python(id))).collect::<Vec<_>>())
        });
        let halves: Vec<_> = halves.collect();
        halves.into_iter().flat_map(|half| half.join().unwrap()).collect()
    });
    let line = |verb| -> Vec<&str> { std::iter::once(verb).chain(ids.iter().map(String::as_str)).collect() };
    for _ in 0..2 {
        let slept = agentcube(&node, &line("sleep")).check().unwrap();
        assert_eq!(slept.matches(": asleep (checkpointed)").count(), 20, "{slept}");
        let listed = agentcube(&node, &["ps"]).check().unwrap();
        assert_eq!(listed.matches("Asleep (checkpointed)").count(), 20, "{listed}");
        agentcube(&node, &line("wake")).check().unwrap();
        for agent in &mut agents {
            agent.assert_whole();
        }
    }
    // Half of them end asleep.
    agentcube(&node, &line("sleep")[..11]).check().unwrap();
    thread::scope(|scope| {
        for half in agents.chunks(10) {
            scope.spawn(move || half.iter().for_each(|agent| agent.agent.delete().unwrap()));
        }
    });
    node.wait_until_clean(&before, SOON).unwrap();
}

#[test]
fn thirty_sleeps_cost_the_shim_no_descriptor_and_no_memory() {
    let node = start();
    let mut agent = run(&node, &python("a"));
    let shim = on_node(&node, &format!("/proc/{}", agent.shim_pid()));
    let descriptors = || {
        let mut all: Vec<String> = fs::read_dir(shim.join("fd"))
            .unwrap()
            .filter_map(|entry| Some(fs::read_link(entry.ok()?.path()).ok()?.to_string_lossy().into_owned()))
            // Numbers of pipes and sockets change.
            .map(|link| link.split(':').next().unwrap_or_default().to_owned())
            .collect();
        all.sort();
        all
    };
    let resident = || -> u64 {
        let status = fs::read_to_string(shim.join("status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let cycles = |count: usize| {
        for _ in 0..count {
            agentcube(&node, &["sleep", "a"]).check().unwrap();
            agentcube(&node, &["wake", "a"]).check().unwrap();
        }
    };
    // What the first cycles allocate is kept.
    cycles(5);
    let (fds, memory) = (descriptors(), resident());
    cycles(30);
    // The connection of the last client may take a moment to go.
    let same = node.wait_until("", SOON, || Ok(descriptors().len() <= fds.len()));
    assert!(same.is_ok(), "before: {fds:?}\nafter: {:?}", descriptors());
    let grown = resident().saturating_sub(memory);
    assert!(grown < 2048, "{grown} KiB more than the {memory} KiB before");
    agent.assert_whole();
    assert_eq!(inspect(&node, "a")["sleeps"], 35);
}
