//! A CRIU that waits while its container sleeps.

use criu_hooks::engine::Kept;
use rustix::process::kill_process;

use super::*;

impl Agent {
    /// Starts a CRIU for the next restore, and gives its process id.
    pub async fn start_ahead(&mut self) -> Pid {
        let image = self.image();
        let before = criu_pids();
        let spare = self.engine.start_ahead(&self.container, &image, &self.kept, self.inherit(&image)).await;
        self.spare = spare.unwrap();
        assert!(self.spare.is_some());
        let new: Vec<Pid> = criu_pids().into_iter().filter(|pid| !before.contains(pid)).collect();
        let [pid] = new[..] else { panic!("{new:?} instead of one CRIU") };
        pid
    }
}

/// The CRIUs of this node that have not ended.
fn criu_pids() -> Vec<Pid> {
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
    pids.filter(|pid| procfs::stat(*pid).is_ok_and(|stat| stat.comm == "criu" && stat.state != 'Z')).collect()
}

async fn wait_until_gone(pid: Pid) {
    for _ in 0..500 {
        if !criu_pids().contains(&pid) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("CRIU {pid} has not ended");
}

/// The CRIUs that run in the middle of a restore.
#[derive(Default)]
struct AtWork(Vec<Pid>);

#[async_trait::async_trait]
impl RestoreHooks for AtWork {
    async fn created(&mut self, _pid: Pid) -> Result<(), HookError> {
        self.0 = criu_pids();
        Ok(())
    }
}

on_a_node!(a_criu_that_waits_is_the_one_that_restores, async || {
    let mut agent = Agent::start("ahead", &Setup::default());
    let mut last = agent.count_on(0, 5).await;
    let census = Census::take();
    for _ in 0..5 {
        agent.dump().await.unwrap();
        let waiting = agent.start_ahead().await;
        assert_ne!(
            procfs::namespace(waiting, "mnt").unwrap(),
            procfs::namespace(Pid::from_raw(1).unwrap(), "mnt").unwrap()
        );
        assert!(!agent.container.cgroup.populated().unwrap());
        let (image, mut at_work) = (agent.image(), AtWork::default());
        let handover = Handover { inherit: agent.inherit(&image), spare: agent.spare.take() };
        let options = agent.restore_options();
        let restored =
            agent.engine.restore(NAMESPACE, &agent.container, &image, &options, handover, &mut at_work).await;
        agent.pid = restored.unwrap().pid;
        assert!(at_work.0.contains(&waiting), "{waiting} is not one of {:?}", at_work.0);
        assert!(!criu_pids().contains(&waiting));
        image.remove().unwrap();
        last = agent.count_on(last, 5).await;
    }
    agent.kept = Kept::default();
    assert_eq!(Census::take(), census);
    agent.delete();
});

on_a_node!(a_criu_that_waits_holds_no_mount_of_the_host, async || {
    let volume = Path::new("/run/volume");
    fs::create_dir(volume).unwrap();
    assert!(Command::new("mount").args(["-t", "tmpfs", "volume"]).arg(volume).status().unwrap().success());
    fs::write(volume.join("file"), "first").unwrap();
    let change = |spec: &mut Value| {
        let mount = json!({"destination": "/tmp", "type": "bind", "source": "/run/volume", "options": ["rbind", "rw"]});
        spec["mounts"].as_array_mut().unwrap().push(mount);
    };
    let mut agent = Agent::start("holds", &Setup { change: &change, ..Setup::default() });
    let last = agent.count_on(0, 5).await;
    agent.dump().await.unwrap();
    let waiting = agent.start_ahead().await;
    let seen = procfs::mounts(waiting).unwrap();
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert_eq!(seen[0].fs_type, "tmpfs");
    assert_eq!(fs::read_dir(format!("/proc/{waiting}/root")).unwrap().count(), 1);
    // Not even lazily: what is busy would be refused.
    assert!(Command::new("umount").arg(volume).status().unwrap().success());
    // What is mounted in its place meanwhile is what the container finds.
    assert!(Command::new("mount").args(["-t", "tmpfs", "second"]).arg(volume).status().unwrap().success());
    fs::write(volume.join("file"), "second").unwrap();
    agent.restore().await.unwrap();
    assert!(!criu_pids().contains(&waiting));
    state_file::update(&agent.state_file(), agent.pid).unwrap();
    assert_eq!(agent.exec(&["cat", "/tmp/file"]), "second");
    agent.count_on(last, 5).await;
    agent.delete();
    assert!(Command::new("umount").arg(volume).status().unwrap().success());
});

on_a_node!(a_criu_that_dies_while_it_waits_costs_nothing, async || {
    let mut agent = Agent::start("dies", &Setup::default());
    let last = agent.count_on(0, 5).await;
    agent.dump().await.unwrap();
    let waiting = agent.start_ahead().await;
    kill_process(waiting, Signal::KILL).unwrap();
    wait_until_gone(waiting).await;
    agent.restore().await.unwrap();
    agent.count_on(last, 5).await;
    agent.delete();
});

on_a_node!(a_criu_that_waits_ends_with_what_it_waits_for, async || {
    let mut agent = Agent::start("ends", &Setup::default());
    let last = agent.count_on(0, 5).await;
    agent.dump().await.unwrap();
    let waiting = agent.start_ahead().await;
    agent.spare = None;
    wait_until_gone(waiting).await;
    agent.restore().await.unwrap();
    agent.count_on(last, 5).await;
    agent.delete();
});

on_a_node!(a_criu_that_waits_for_something_else_is_not_used, async || {
    let mut agent = Agent::start("other", &Setup::default());
    let last = agent.count_on(0, 5).await;
    agent.dump().await.unwrap();
    let image = agent.image();
    // Without the pipes.
    let spare = agent.engine.start_ahead(&agent.container, &image, &agent.kept, Vec::new()).await.unwrap();
    agent.spare = spare;
    agent.restore().await.unwrap();
    agent.count_on(last, 5).await;
    agent.delete();
});

on_a_node!(a_restore_that_fails_with_a_criu_that_waited_leaves_nothing_and_can_be_tried_again, async || {
    let change = |spec: &mut Value| {
        let mount = json!({"destination": "/tmp", "type": "bind", "source": "/run/files", "options": ["rbind", "rw"]});
        spec["mounts"].as_array_mut().unwrap().push(mount);
    };
    fs::create_dir("/run/files").unwrap();
    fs::write("/run/files/file", "here").unwrap();
    let script = format!("exec 5</tmp/file; {}", crate::agent::COUNTER[2]);
    let args = ["sh", "-c", &script];
    let mut agent = Agent::start("again", &Setup { args: &args, change: &change, ..Setup::default() });
    let last = agent.count_on(0, 5).await;
    agent.dump().await.unwrap();
    let census = Census::take();
    agent.start_ahead().await;
    fs::rename("/run/files/file", "/run/files/away").unwrap();
    let error = agent.restore().await.unwrap_err();
    assert!(matches!(error, RestoreError::Criu(_)), "{error}");
    assert_eq!(Census::take_as_init(), census);
    assert!(!agent.container.cgroup.populated().unwrap());
    fs::rename("/run/files/away", "/run/files/file").unwrap();
    agent.start_ahead().await;
    agent.restore().await.unwrap();
    agent.count_on(last, 5).await;
    agent.delete();
});
