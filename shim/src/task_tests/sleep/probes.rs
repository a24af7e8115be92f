//! Probes of a sleeping container, driven through the Task API.

use agentcube_control::{Control, ProbeCommand, ProbeCommands, ProbesRequest, ProbesResponse};

use super::{super::fake::ANSWERER, *};

const SPEC: &[u8] = b"{\"args\":[\"cat\",\"/healthy\"],\"cwd\":\"/\",\"user\":{\"uid\":0,\"gid\":0}}";

impl Shim {
    /// A shim with the running container "c", whose probe `cat /healthy` is answered for it.
    async fn probed() -> Self {
        let shim = Self::new();
        shim.fake.answers(&[&["cat", "/healthy"]]);
        shim.create("c").await.unwrap();
        shim.start("").await.unwrap();
        shim.fake.calls();
        shim
    }

    /// Executes the probe's command as a kubelet does; gives back its pid.
    async fn probe(&self, exec_id: &str, stdin: &str) -> ttrpc::Result<u32> {
        let request = ExecProcessRequest {
            id: "c".to_owned(),
            exec_id: exec_id.to_owned(),
            stdin: stdin.to_owned(),
            stdout: "/fifo/out".to_owned(),
            spec: MessageField::some(Any { value: SPEC.to_vec(), ..Default::default() }),
            ..Default::default()
        };
        self.task.exec(&ctx(), request).await?;
        self.start(exec_id).await
    }

    /// Lets the probe run while the container is awake.
    async fn learn(&self, exec_id: &str, code: u32) {
        let pid = self.probe(exec_id, "").await.unwrap();
        self.fake.exit(pid, code);
        settle().await;
        self.delete(exec_id).await.unwrap();
    }

    async fn probes(&self, commands: Option<&[&[&str]]>) -> ttrpc::Result<ProbesResponse> {
        let command = |words: &&[&str]| ProbeCommand {
            arguments: words.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        let commands = commands.map(|commands| ProbeCommands {
            commands: commands.iter().map(command).collect(),
            ..Default::default()
        });
        let request = ProbesRequest { id: "c".to_owned(), commands: commands.into(), ..Default::default() };
        self.control().probes(&ctx(), request).await
    }
}

#[tokio::test]
async fn a_probe_that_succeeded_before_is_answered_without_a_wake_at_every_depth() {
    for depth in [WireDepth::DEPTH_FROZEN, WireDepth::DEPTH_RECLAIMED, WireDepth::DEPTH_CHECKPOINTED] {
        let mut shim = Shim::probed().await;
        shim.learn("first", 0).await;
        shim.sleep_at(depth).await.unwrap();
        settle().await;
        shim.topics();
        shim.fake.calls();
        let before = shim.inspect().await;
        assert_eq!(shim.probe("second", "").await.unwrap(), ANSWERER);
        assert_eq!(shim.wait("second").await.unwrap(), 0);
        assert_eq!(shim.fake.calls(), ["answer exec second fine"]);
        assert_eq!(shim.delete("second").await.unwrap(), (ANSWERER, 0));
        assert_eq!(shim.topics(), ["exec-added", "exec-started", "exit"]);
        let now = shim.inspect().await;
        assert_eq!((now.wakes, now.since_unix_ms, now.depth), (0, before.since_unix_ms, before.depth));
        // An exec that is no probe wakes it.
        shim.probe("typed", "/fifo/in").await.unwrap();
        assert_eq!(shim.inspect().await.wakes, 1);
    }
}

#[tokio::test]
async fn a_probe_that_failed_or_never_ran_wakes_it() {
    let shim = Shim::probed().await;
    shim.sleep().await.unwrap();
    settle().await;
    shim.learn("never ran", 0).await;
    assert_eq!(shim.inspect().await.wakes, 1);
    shim.learn("failed", 1).await;
    shim.sleep().await.unwrap();
    settle().await;
    shim.learn("asks", 0).await;
    assert_eq!(shim.inspect().await.wakes, 2);
}

#[tokio::test]
async fn a_probe_in_the_middle_of_a_dump_does_not_cancel_it_unless_it_is_given_up_anyway() {
    let shim = Shim::probed().await;
    shim.learn("first", 0).await;
    shim.fake.hold("dump");
    let asleep = beside!(shim, |_, control: ControlService| async move {
        let request = SleepRequest { id: "c".to_owned(), ..Default::default() };
        control.sleep(&ctx(), request).await
    });
    assert_eq!(shim.probe("during", "").await.unwrap(), ANSWERER);
    shim.delete("during").await.unwrap();
    shim.fake.release();
    asleep.await.unwrap().unwrap();
    assert_eq!(shim.inspect().await.wakes, 0);
}

#[tokio::test]
async fn commands_are_told_over_the_control_socket_and_come_back_with_their_results() {
    let shim = Shim::probed().await;
    shim.learn("first", 3).await;
    let told = shim.probes(None).await.unwrap().results;
    assert_eq!((told.len(), told[0].known, told[0].exit_status), (1, true, 3));
    let told = shim.probes(Some(&[&["true"], &["cat", "/healthy"]])).await.unwrap().results;
    assert_eq!((told[0].known, told[1].known), (false, true));
    assert_eq!(code(shim.probes(Some(&[&[]])).await), Code::INVALID_ARGUMENT);
    assert!(shim.probes(Some(&[])).await.unwrap().results.is_empty());
}

#[tokio::test]
async fn where_probes_wake_their_commands_are_refused() {
    let shim = Shim::running().await;
    let refused = shim.probes(Some(&[&["true"]])).await;
    assert!(message(refused).contains("probes = \"answer\""));
    assert_eq!(code(shim.probes(None).await), Code::FAILED_PRECONDITION);
}

/// What a frozen container does for a probe that it answers.
const ANSWERED: [&str; 3] = ["thaw for probe", "probe over", "refreeze"];

impl Shim {
    /// A shim with the container "c", which sleeps at this depth.
    async fn asleep_at(depth: WireDepth) -> Self {
        let shim = Self::running().await;
        shim.sleep_at(depth).await.unwrap();
        settle().await;
        shim.fake.calls();
        shim
    }

    /// Lets a probe come, and all be done that comes of it.
    async fn is_probed(&self) {
        self.fake.probe_arrives();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_probe_of_a_frozen_agent_is_no_wake_and_no_change() {
    for depth in [WireDepth::DEPTH_FROZEN, WireDepth::DEPTH_RECLAIMED] {
        let shim = Shim::asleep_at(depth).await;
        let (before, phase) = (shim.inspect().await, shim.phase());
        for _ in 0..3 {
            shim.is_probed().await;
            assert_eq!(shim.fake.calls(), ANSWERED);
        }
        let now = shim.inspect().await;
        assert_eq!((now.state, now.depth, now.wakes, now.sleeps), (before.state, depth.into(), 0, 1));
        assert_eq!((now.since_unix_ms, shim.phase()), (before.since_unix_ms, phase));
        assert!(now.last_wake.is_none() && now.last_error.is_empty());
        assert_eq!(shim.wake().await.unwrap(), 1);
    }
}

#[tokio::test]
async fn a_probe_in_the_middle_of_a_reclaim_does_not_end_it() {
    let shim = Shim::running().await;
    shim.fake.hold("reclaim");
    let asleep = beside!(shim, |_, control: ControlService| async move {
        let depth = EnumOrUnknown::new(WireDepth::DEPTH_RECLAIMED);
        let request = SleepRequest { id: "c".to_owned(), depth, ..Default::default() };
        control.sleep(&ctx(), request).await
    });
    shim.fake.calls();
    shim.is_probed().await;
    assert_eq!(shim.fake.calls(), ANSWERED);
    assert_eq!(shim.inspect().await.state.unwrap(), WireState::STATE_FALLING_ASLEEP);
    shim.fake.release();
    asleep.await.unwrap().unwrap();
    let now = shim.inspect().await;
    assert_eq!((now.depth.unwrap(), now.wakes), (WireDepth::DEPTH_RECLAIMED, 0));
}

#[tokio::test]
async fn an_agent_that_is_still_at_work_after_a_probe_is_given_a_little_time() {
    let shim = Shim::asleep_at(WireDepth::DEPTH_FROZEN).await;
    let busy = || RuntimeError::Busy("it works".to_owned());
    shim.fake.fail_next("refreeze", busy());
    shim.is_probed().await;
    assert_eq!(shim.fake.calls(), [&ANSWERED[..], &ANSWERED[..]].concat());
    assert_eq!(shim.inspect().await.wakes, 0);
    for _ in 0..100 {
        shim.fake.fail_next("refreeze", busy());
    }
    shim.is_probed().await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    let now = shim.inspect().await;
    assert_eq!((now.state.unwrap(), now.wakes), (WireState::STATE_RUNNING, 1));
    assert_eq!(now.last_wake.cause, "traffic");
}

#[tokio::test]
async fn what_comes_with_a_probe_or_takes_too_long_wakes_the_agent() {
    let disturbed = || RuntimeError::Failed("a client".to_owned());
    for what in ["probe over", "refreeze"] {
        let shim = Shim::asleep_at(WireDepth::DEPTH_RECLAIMED).await;
        shim.fake.fail_next(what, disturbed());
        shim.is_probed().await;
        let now = shim.inspect().await;
        assert_eq!((now.state.unwrap(), now.wakes), (WireState::STATE_RUNNING, 1), "{what}");
        assert_eq!(now.last_wake.depth.unwrap(), WireDepth::DEPTH_RECLAIMED);
    }
    let shim = Shim::asleep_at(WireDepth::DEPTH_FROZEN).await;
    shim.fake.hold("probe over");
    shim.is_probed().await;
    assert_eq!(shim.inspect().await.state.unwrap(), WireState::STATE_ASLEEP);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(shim.inspect().await.wakes, 1);
}

#[tokio::test]
async fn a_request_in_the_middle_of_a_probe_wakes_the_agent_and_the_end_of_the_probe_changes_nothing() {
    let shim = Shim::asleep_at(WireDepth::DEPTH_FROZEN).await;
    shim.fake.hold("probe over");
    shim.is_probed().await;
    assert!(message(shim.sleep().await).contains("answers a probe"));
    shim.exec("e").await.unwrap();
    shim.start("e").await.unwrap();
    assert_eq!(shim.inspect().await.last_wake.cause, "exec");
    shim.fake.release();
    settle().await;
    assert_eq!(shim.inspect().await.state.unwrap(), WireState::STATE_RUNNING);
    assert!(!shim.fake.calls().contains(&"refreeze".to_owned()));
}

#[tokio::test]
async fn a_probe_that_it_cannot_be_thawed_for_leaves_it_asleep() {
    let shim = Shim::asleep_at(WireDepth::DEPTH_FROZEN).await;
    shim.fake.fail_next("thaw for probe", RuntimeError::Failed("no".to_owned()));
    shim.is_probed().await;
    assert_eq!(shim.inspect().await.state.unwrap(), WireState::STATE_ASLEEP);
    assert_eq!(shim.wake().await.unwrap(), 1);
}
