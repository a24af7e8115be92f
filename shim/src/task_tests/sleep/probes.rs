//! Exec probes of a sleeping container, driven through the Task API.

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
