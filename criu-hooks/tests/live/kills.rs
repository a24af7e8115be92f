//! CRIU killed, and dumps and restores given up, at every moment.

use super::*;

/// When to kill.
#[derive(Clone)]
enum When {
    /// So long after the start.
    After(Duration),
    /// As soon as the files of this directory have so many bytes.
    Grown(PathBuf, u64),
}

fn bytes_in(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
}

/// Kills each CRIU that it starts.
struct Killer(When);

impl Killer {
    fn engine(when: When) -> Engine {
        Engine::new("/usr/sbin/criu", std::sync::Arc::new(Killer(when)))
    }
}

impl Spawner for Killer {
    fn spawn(&self, command: Command) -> std::io::Result<Child> {
        let child = LocalSpawner.spawn(command)?;
        let (pidfd, when) = (child.pidfd.try_clone()?, self.0.clone());
        tokio::spawn(async move {
            match when {
                When::After(after) => tokio::time::sleep(after).await,
                When::Grown(path, bytes) => {
                    while bytes_in(&path) < bytes {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
            }
            let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
        });
        Ok(child)
    }

    fn adopt(&self, pid: Pid) {
        LocalSpawner.adopt(pid);
    }
}

/// Waits until something holds, however busy the machine is.
async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let begun = std::time::Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_mins(1), "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

impl Agent {
    /// Forgets what it has said after a restore that failed: a CRIU that is killed just before it is to let go of the
    /// processes lets them run for the moment until they are killed, and the image knows nothing of that.
    fn undone(&mut self) {
        self.rest();
    }

    /// Reads what it had said before it was dumped, after `last`.
    fn catch_up(&mut self, last: u64) -> u64 {
        last + u64::try_from(self.rest().lines().count()).unwrap()
    }
}

/// Memory that takes a while to write, and a check that it is whole.
const BALLAST: &str = "import time, os
ballast = bytearray(os.urandom(1 << 20) * 256)
check = sum(ballast[::4096])
i = 0
while True:
    i += 1
    assert sum(ballast[::4096]) == check
    print(i, flush=True)
    time.sleep(0.02)";

on_a_node!(criu_killed_while_it_writes_memory_leaves_the_agent_running, async || {
    let args = ["python3", "-c", BALLAST];
    let mut agent = Agent::start("ballast", &Setup { args: &args, whole_root: true, ..Setup::default() });
    let mut last = agent.count_on(0, 5).await;
    for mebibytes in [20, 60, 100, 140] {
        let images = PathBuf::from("/run/images/test/ballast/1/img");
        let kept = std::mem::replace(&mut agent.engine, Killer::engine(When::Grown(images, mebibytes << 20)));
        let error = agent.dump().await.unwrap_err();
        agent.engine = kept;
        assert!(error.to_string().contains("signal 9"), "at {mebibytes} MiB: {error}");
        assert!(agent.store.latest(NAMESPACE, "ballast").unwrap().is_none());
        agent.assert_running();
        last = agent.count_on(last, 4).await;
    }
    let whole = agent.dump().await.unwrap();
    let restored = agent.restore().await.unwrap();
    println!("256 MiB: dump {:?}, restore {:?}", whole.total, restored.total);
    agent.count_on(last, 4).await;
    agent.delete();
});

/// Kills CRIU when it asks for the last word.
struct KillAtTheEnd<'a>(&'a Cgroup);

#[async_trait::async_trait]
impl DumpHooks for KillAtTheEnd<'_> {
    async fn before_kill(&mut self) -> Result<(), HookError> {
        assert!(self.0.is_frozen().unwrap(), "nothing may run past the image");
        let pid = children_called("criu");
        rustix::process::kill_process(pid[0], Signal::KILL)?;
        Ok(())
    }
}

/// The living children of this process with this name. (As the first process of its node it inherits dead ones too.)
fn children_called(name: &str) -> Vec<Pid> {
    let me = rustix::process::getpid().as_raw_nonzero().get();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
    pids.filter(|pid| {
        procfs::stat(*pid).is_ok_and(|stat| stat.ppid == me && stat.comm == name && stat.state != 'Z')
    })
    .collect()
}

on_a_node!(criu_killed_when_it_has_the_last_word_leaves_the_agent_in_its_image, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let mut last = agent.count_on(0, 5).await;
    agent.keep_namespaces();
    for _ in 0..5 {
        let writer = agent.store.begin(NAMESPACE, "counter", None).unwrap();
        let options = DumpOptions::default();
        let cgroup = agent.container.cgroup.clone();
        let mut hooks = KillAtTheEnd(&cgroup);
        let dump = agent.engine.dump(&agent.container, agent.pid, &writer, &options, &mut hooks);
        // CRIU was free to kill, and may have begun to: the image is complete, and nothing has run past it.
        agent.slept(dump.await.unwrap());
        writer.open().unwrap();
        assert!(!cgroup.populated().unwrap());
        agent.restore().await.unwrap();
        last = agent.count_on(last, 10).await;
        agent.store.remove_all(NAMESPACE, "counter").unwrap();
    }
    agent.delete();
});

on_a_node!(criu_killed_in_the_middle_of_a_restore_leaves_nothing, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let last = agent.count_on(0, 5).await;
    agent.dump().await.unwrap();
    let last = agent.catch_up(last);
    let before = Census::take();
    let mut broken_off = 0;
    for after in (0..30).step_by(2) {
        let engine = Killer::engine(When::After(Duration::from_millis(after)));
        let kept = std::mem::replace(&mut agent.engine, engine);
        let result = agent.restore().await;
        agent.engine = kept;
        let Err(error) = result else { break };
        broken_off += 1;
        assert!(matches!(error, RestoreError::Criu(_)), "after {after} ms: {error}");
        assert!(!agent.container.cgroup.populated().unwrap());
        eventually(&format!("a restore broken off after {after} ms to leave nothing"), || {
            Census::take_as_init() == before
        })
        .await;
        agent.undone();
    }
    assert!(broken_off >= 3, "only {broken_off} restores were broken off");
    if !procfs::alive(agent.pid) {
        agent.restore().await.unwrap();
    }
    agent.count_on(last, 10).await;
    agent.delete();
});

/// Kills CRIU so long after the last word of a restore has been asked for, or right then.
struct KillBeforeResume(Option<Duration>);

#[async_trait::async_trait]
impl RestoreHooks for KillBeforeResume {
    async fn before_resume(&mut self, _: Pid) -> Result<(), HookError> {
        let criu = children_called("criu")[0];
        let kill = move || rustix::process::kill_process(criu, Signal::KILL);
        match self.0 {
            None => kill()?,
            Some(after) => drop(std::thread::spawn(move || {
                std::thread::sleep(after);
                // It may have ended.
                let _ = kill();
            })),
        }
        Ok(())
    }
}

impl Agent {
    async fn restore_under(&mut self, kill: KillBeforeResume) -> Result<(), RestoreError> {
        let image = self.image();
        let (options, inherit) = (self.restore_options(), self.inherit(&image));
        let mut hooks = kill;
        let handover = inherit.into();
        let restored =
            self.engine.restore(NAMESPACE, &self.container, &image, &options, handover, &mut hooks).await?;
        self.pid = restored.pid;
        Ok(())
    }
}

on_a_node!(criu_killed_before_it_lets_anything_run_is_a_restore_that_never_was, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let mut last = agent.count_on(0, 5).await;
    for _ in 0..3 {
        agent.dump().await.unwrap();
        last = agent.catch_up(last);
        let error = agent.restore_under(KillBeforeResume(None)).await.unwrap_err();
        assert!(matches!(error, RestoreError::Criu(_)), "{error}");
        assert!(!agent.container.cgroup.populated().unwrap());
        assert_eq!(agent.rest(), "", "nothing has run");
        agent.restore().await.unwrap();
        last = agent.count_on(last, 5).await;
        agent.image().remove().unwrap();
    }
    agent.delete();
});

on_a_node!(criu_killed_while_it_lets_the_agent_run_leaves_one_that_runs_or_none, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let mut last = agent.count_on(0, 5).await;
    let (mut succeeded, mut failed) = (0, 0);
    for after in (0..16_000).step_by(800).map(Duration::from_micros) {
        agent.dump().await.unwrap();
        last = agent.catch_up(last);
        if agent.restore_under(KillBeforeResume(Some(after))).await.is_ok() {
            succeeded += 1;
        } else {
            failed += 1;
            assert!(!agent.container.cgroup.populated().unwrap(), "{after:?}");
            agent.undone();
            agent.restore().await.unwrap();
        }
        agent.assert_running();
        last = agent.count_on(last, 3).await;
        agent.image().remove().unwrap();
    }
    println!("{succeeded} restores had succeeded when CRIU was killed, {failed} had not");
    agent.delete();
});

on_a_node!(a_dump_given_up_at_any_moment_leaves_the_agent_running_or_whole_on_disk, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let mut last = agent.count_on(0, 5).await;
    let mut given_up = 0;
    for after in 0..40 {
        agent.keep_namespaces();
        let cut = tokio::time::timeout(Duration::from_millis(after), agent.dump()).await;
        given_up += usize::from(cut.is_err());
        // What goes on in the background takes no longer than a dump.
        while !children_called("criu").is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        if agent.container.cgroup.populated().unwrap() {
            assert!(agent.store.latest(NAMESPACE, "counter").unwrap().is_none(), "after {after} ms");
        } else {
            // The kill had begun: the image is the agent now.
            assert!(after > 4, "dead after {after} ms");
            if cut.is_err() {
                reap(agent.pid);
            }
            agent.restore().await.unwrap();
            agent.image().remove().unwrap();
        }
        agent.assert_running();
        last = agent.count_on(last, 4).await;
    }
    assert!(given_up >= 5, "only {given_up} dumps were given up");
    agent.delete();
});

on_a_node!(a_restore_given_up_at_any_moment_leaves_nothing, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let last = agent.count_on(0, 5).await;
    agent.dump().await.unwrap();
    let last = agent.catch_up(last);
    let before = Census::take();
    let mut given_up = 0;
    for after in (0..40).step_by(2) {
        if tokio::time::timeout(Duration::from_millis(after), agent.restore()).await.is_ok() {
            break;
        }
        given_up += 1;
        // It is cleaned up in the background.
        eventually(&format!("a restore given up after {after} ms to leave nothing"), || {
            !agent.container.cgroup.populated().unwrap() && Census::take_as_init() == before
        })
        .await;
        agent.undone();
    }
    assert!(given_up >= 3, "only {given_up} restores were given up");
    if !procfs::alive(agent.pid) {
        agent.restore().await.unwrap();
    }
    agent.count_on(last, 10).await;
    agent.delete();
});

on_a_node!(criu_killed_at_any_moment_never_leaves_the_agent_stuck, async || {
    // A CRIU that is killed while it puts its code into a process can take that process along: nothing that runs outside
    // can undo what it has written to its registers. What must never be is an agent that neither runs nor has ended.
    let (mut dumps, mut lost) = (0, 0);
    for round in 0..4 {
        let mut agent = Agent::start(&format!("counter{round}"), &Setup::default());
        let mut last = agent.count_on(0, 5).await;
        for after in (0..40).step_by(3) {
            let killer = Killer::engine(When::After(Duration::from_millis(after)));
            let kept = std::mem::replace(&mut agent.engine, killer);
            let result = agent.dump().await;
            agent.engine = kept;
            dumps += 1;
            if result.is_ok() {
                agent.restore().await.unwrap();
                agent.image().remove().unwrap();
            }
            assert!(!agent.container.cgroup.is_frozen().unwrap(), "after {after} ms");
            tokio::time::sleep(Duration::from_millis(20)).await;
            if !procfs::alive(agent.pid) {
                lost += 1;
                break;
            }
            let line = agent.line().await;
            if line.contains("trap") {
                // A child of the shell was hit; the shell goes on.
                lost += 1;
            } else {
                assert_eq!(line.parse(), Ok(last + 1));
                last += 1;
            }
            last = agent.count_on(last, 4).await;
        }
        agent.delete();
    }
    println!("{lost} processes ended in {dumps} dumps whose CRIU was killed");
    assert!(lost * 4 <= dumps, "{lost} of {dumps}");
});

/// A file that was deleted and has another name.
const OTHER_NAME: &str = "
import os, time
file = open('/tmp/first', 'w+')
file.write('kept'); file.flush()
os.link('/tmp/first', '/tmp/second')
os.unlink('/tmp/first')
i = 0
while True:
    i += 1
    file.seek(0)
    assert file.read() == 'kept' and os.fstat(file.fileno()).st_ino == os.stat('/tmp/second').st_ino
    print(i, flush=True)
    time.sleep(0.02)";

/// Removes the name that the dump has made, as CRIU does in its next step, and fails there.
struct Late(PathBuf);

#[async_trait::async_trait]
impl RestoreHooks for Late {
    async fn before_resume(&mut self, _: Pid) -> Result<(), HookError> {
        let name = names_in(&self.0).into_iter().find(|name| is_link(name)).ok_or("CRIU has removed it")?;
        fs::remove_file(self.0.join(name))?;
        Err("too late".into())
    }
}

/// The names in a directory, without those that a Debian system has hidden in it.
fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| !name.starts_with('.')).collect();
    names.sort();
    names
}

/// Whether the dump has made this name.
fn is_link(name: &str) -> bool {
    name.strip_prefix("link_remap.").is_some_and(|number| number.parse::<u32>().is_ok())
}

on_a_node!(a_restore_that_fails_late_loses_no_deleted_file_that_has_another_name, async || {
    let args = ["python3", "-c", OTHER_NAME];
    let mut agent = Agent::start("linked", &Setup { args: &args, whole_root: true, ..Setup::default() });
    let last = agent.count_on(0, 5).await;
    agent.dump().await.unwrap();
    let last = agent.catch_up(last);
    let tmp = agent.container.rootfs.join("tmp");
    let asleep = names_in(&tmp);
    assert!(asleep.iter().any(|name| is_link(name)), "{asleep:?}");
    for _ in 0..2 {
        let image = agent.image();
        let (options, inherit) = (agent.restore_options(), agent.inherit(&image));
        let mut late = Late(tmp.clone());
        let restored = agent
            .engine
            .restore(NAMESPACE, &agent.container, &image, &options, inherit.into(), &mut late)
            .await;
        assert!(restored.unwrap_err().to_string().contains("too late"));
        assert_eq!(names_in(&tmp), asleep);
    }
    for after in [5, 10, 15, 20, 25, 30] {
        let killer = Killer::engine(When::After(Duration::from_millis(after)));
        let kept = std::mem::replace(&mut agent.engine, killer);
        let restored = agent.restore().await;
        agent.engine = kept;
        if restored.is_ok() {
            break;
        }
        assert_eq!(names_in(&tmp), asleep, "after {after} ms");
        agent.undone();
    }
    if !procfs::alive(agent.pid) {
        agent.restore().await.unwrap();
    }
    agent.count_on(last, 10).await;
    assert_eq!(names_in(&tmp), ["second"]);
    agent.delete();
});
