//! What the Task API and the control service do around sleeps and wakes.

mod phases;

use agentcube_control::{
    Control, Depth as WireDepth, SleepRequest, State as WireState, StatusRequest, WakeRequest,
};
use containerd_shim::protos::protobuf::EnumOrUnknown;

use super::*;
use crate::{
    container::{Journal, Phase},
    control::ControlService,
    wake::WakeCause,
};

impl Shim {
    fn control(&self) -> ControlService {
        ControlService::new("default", self.containers.clone())
    }

    async fn sleep_at(&self, depth: WireDepth) -> ttrpc::Result<agentcube_control::SleepResponse> {
        let request =
            SleepRequest { id: "c".to_owned(), depth: EnumOrUnknown::new(depth), ..Default::default() };
        self.control().sleep(&ctx(), request).await
    }

    async fn sleep(&self) -> ttrpc::Result<agentcube_control::SleepResponse> {
        self.sleep_at(WireDepth::DEPTH_UNSPECIFIED).await
    }

    async fn wake(&self) -> ttrpc::Result<usize> {
        let request = WakeRequest { id: "c".to_owned(), ..Default::default() };
        Ok(self.control().wake(&ctx(), request).await?.transitions.len())
    }

    async fn inspect(&self) -> agentcube_control::Container {
        let request = StatusRequest { id: "c".to_owned(), ..Default::default() };
        self.control().status(&ctx(), request).await.unwrap().container.unwrap()
    }

    /// A shim whose container "c" is checkpointed.
    async fn asleep() -> Self {
        let mut shim = Self::running().await;
        shim.sleep().await.unwrap();
        settle().await;
        shim.fake.calls();
        shim.topics();
        shim
    }

    fn phase(&self) -> Phase {
        Journal::in_bundle(self.bundle.path()).read().unwrap().unwrap().phase
    }
}

/// Starts a request that will wait, and lets it get as far as it can.
macro_rules! beside {
    ($shim:ident, $request:expr) => {{
        let $shim = ($shim.task.clone(), $shim.containers.clone());
        let running = tokio::spawn(async move {
            let (task, containers) = $shim;
            #[allow(unused_variables)]
            let control = ControlService::new("default", containers);
            $request(task, control).await
        });
        settle().await;
        running
    }};
}

mod checkpoints;
mod probes;

#[tokio::test]
async fn a_sleeping_agent_is_running_to_containerd_and_its_dump_is_no_exit() {
    let mut shim = Shim::running().await;
    shim.topics();
    let slept = shim.sleep().await.unwrap();
    assert_eq!(slept.transitions[0].image_bytes, 4096);
    assert_eq!(slept.transitions[0].stopped_us, 7000);
    settle().await;
    assert_eq!(shim.status().await, Status::RUNNING);
    assert_eq!(shim.state("").await.unwrap().pid, FIRST_PID);
    assert_eq!(shim.topics(), [""; 0]);
    assert_eq!(shim.fake.calls(), ["dump"]);
    let pids =
        shim.task.pids(&ctx(), PidsRequest { id: "c".to_owned(), ..Default::default() }).await.unwrap();
    assert_eq!(pids.processes.len(), 1, "containerd deletes a task without pids");
    let inspected = shim.inspect().await;
    assert_eq!(inspected.state.unwrap(), WireState::STATE_ASLEEP);
    assert_eq!(inspected.depth.unwrap(), WireDepth::DEPTH_CHECKPOINTED);
    assert_eq!((inspected.sleeps, inspected.image_bytes), (1, 4096));
    assert_eq!(shim.phase(), Phase::Checkpointed);
}

#[tokio::test]
async fn a_wake_restores_and_then_drops_the_image() {
    let mut shim = Shim::asleep().await;
    assert_eq!(shim.wake().await.unwrap(), 1);
    assert_eq!(shim.fake.calls(), ["restore", "drop image"]);
    assert_eq!(shim.state("").await.unwrap().pid, FIRST_PID + 1);
    assert_eq!(shim.phase(), Phase::Running);
    assert_eq!(shim.wake().await.unwrap(), 0, "an awake agent has nothing to wake from");
    shim.fake.exit(FIRST_PID + 1, 5);
    assert_eq!(shim.wait("").await.unwrap(), 5);
    assert_eq!(shim.topics(), ["exit"]);
}

#[tokio::test]
async fn a_wait_from_before_the_sleep_gets_the_exit_after_the_wake() {
    let shim = Shim::running().await;
    let waiting = beside!(shim, |task: TaskService, _| async move {
        let request = WaitRequest { id: "c".to_owned(), ..Default::default() };
        task.wait(&ctx(), request).await.unwrap().exit_status
    });
    shim.sleep().await.unwrap();
    shim.wake().await.unwrap();
    shim.fake.exit(shim.fake.init(), 42);
    assert_eq!(waiting.await.unwrap(), 42);
}

#[tokio::test]
async fn sleeping_twice_and_waking_twice_are_refused_with_reasons_of_their_own() {
    let shim = Shim::asleep().await;
    assert!(message(shim.sleep().await).contains("asleep already (checkpointed)"));
    shim.fake.hold("restore");
    let waking = beside!(shim, |_, control: ControlService| async move {
        let request = WakeRequest { id: "c".to_owned(), ..Default::default() };
        control.wake(&ctx(), request).await.unwrap().transitions.len()
    });
    assert_eq!(shim.inspect().await.state.unwrap(), WireState::STATE_WAKING);
    assert!(message(shim.wake().await).contains("waking already"));
    assert!(message(shim.sleep().await).contains("waking already"));
    shim.fake.release();
    assert_eq!(waking.await.unwrap(), 1);
}

#[tokio::test]
async fn a_container_that_this_shim_does_not_know_can_neither_sleep_nor_wake() {
    let shim = Shim::new();
    assert_eq!(code(shim.sleep().await), Code::NOT_FOUND);
    assert_eq!(code(shim.wake().await), Code::NOT_FOUND);
    let request = StatusRequest { id: "c".to_owned(), ..Default::default() };
    assert_eq!(code(shim.control().status(&ctx(), request).await), Code::NOT_FOUND);
}

#[tokio::test]
async fn a_failed_dump_leaves_the_agent_running_and_gives_the_reason() {
    let shim = Shim::running().await;
    shim.fake.fail_next("dump", RuntimeError::FailedPrecondition("inotify on overlay".to_owned()));
    let failed = message(shim.sleep().await);
    assert!(failed.contains("inotify on overlay") && failed.contains("runs on"), "{failed}");
    assert_eq!(shim.status().await, Status::RUNNING);
    assert_eq!(shim.inspect().await.last_error, "inotify on overlay");
    assert_eq!(shim.phase(), Phase::Running);
    shim.sleep().await.unwrap();
    assert_eq!(shim.inspect().await.last_error, "");
}

#[tokio::test]
async fn who_asks_learns_why_memory_was_lost() {
    let shim = Shim::running().await;
    shim.sleep().await.unwrap();
    shim.fake.fail_next("fill", RuntimeError::Failed("pages-1.img: Input/output error".to_owned()));
    shim.wake().await.unwrap();
    for _ in 0..500 {
        if shim.status().await == Status::STOPPED && !shim.inspect().await.last_error.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let inspected = shim.inspect().await;
    assert!(inspected.last_error.contains("Input/output error"), "{}", inspected.last_error);
    assert_eq!(shim.status().await, Status::STOPPED);
}

#[tokio::test]
async fn a_dump_does_not_begin_when_the_journal_cannot_be_written() {
    let shim = Shim::running().await;
    std::fs::create_dir(shim.bundle.path().join("agentcube-journal.json.next")).unwrap();
    assert!(message(shim.sleep().await).contains("journal"));
    assert_eq!(shim.fake.calls(), ["thaw"]);
    assert_eq!(shim.status().await, Status::RUNNING);
}

#[tokio::test]
async fn a_failed_restore_keeps_the_image_and_the_next_wake_tries_again() {
    let shim = Shim::asleep().await;
    shim.fake.fail_next("restore", RuntimeError::Failed("pages-1.img is truncated".to_owned()));
    assert!(message(shim.wake().await).contains("pages-1.img is truncated"));
    assert_eq!(shim.fake.calls(), ["restore"]);
    assert_eq!(shim.inspect().await.state.unwrap(), WireState::STATE_ASLEEP);
    assert_eq!(shim.phase(), Phase::Checkpointed);
    assert_eq!(shim.wake().await.unwrap(), 1);
}

#[tokio::test]
async fn exec_resume_and_signals_wake_a_sleeping_agent() {
    let shim = Shim::asleep().await;
    shim.exec("e").await.unwrap();
    assert_eq!(shim.fake.calls(), [""; 0], "to announce an exec wakes nobody");
    let pid = shim.start("e").await.unwrap();
    assert_eq!(shim.fake.calls()[..2], ["restore", "drop image"]);
    shim.fake.exit(pid, 0);
    shim.wait("e").await.unwrap();

    shim.sleep().await.unwrap();
    shim.fake.calls();
    shim.resume().await.unwrap();
    assert_eq!(shim.fake.calls(), ["restore", "drop image"]);

    shim.sleep().await.unwrap();
    shim.fake.calls();
    shim.kill("", 0, false).await.unwrap();
    assert_eq!(shim.fake.calls(), [""; 0], "signal 0 only asks");
    shim.kill("", 15, true).await.unwrap();
    assert_eq!(shim.fake.calls(), ["restore", "drop image", "signal 15 to init all=true"]);
}

#[tokio::test]
async fn input_wakes_a_sleeping_agent_and_stops_trying_when_that_fails() {
    let shim = Shim::asleep().await;
    shim.fake.fail_next("restore", RuntimeError::Failed("no memory".to_owned()));
    shim.fake.input_arrives();
    settle().await;
    assert_eq!(shim.fake.calls(), ["restore"]);
    shim.fake.input_arrives();
    settle().await;
    assert_eq!(shim.fake.calls(), [""; 0]);
    shim.wake().await.unwrap();
    shim.fake.calls();
    // The input from before is still unread: the agent must run to take it.
    shim.sleep().await.unwrap();
    settle().await;
    assert_eq!(shim.fake.calls(), ["dump", "restore", "drop image"]);
}

#[tokio::test]
async fn sigkill_ends_a_sleeping_agent_without_waking_it() {
    let mut shim = Shim::asleep().await;
    shim.kill("", 9, true).await.unwrap();
    assert_eq!(shim.wait("").await.unwrap(), 137);
    assert_eq!(shim.fake.calls(), ["drop image"]);
    assert_eq!(shim.topics(), ["exit"]);
    assert_eq!(shim.delete("").await.unwrap(), (FIRST_PID, 137));
}

#[tokio::test]
async fn an_exec_keeps_the_agent_awake() {
    let shim = Shim::running().await;
    shim.exec("e").await.unwrap();
    let pid = shim.start("e").await.unwrap();
    assert!(message(shim.sleep().await).contains("1 exec process(es) live in it"));
    shim.fake.exit(pid, 0);
    shim.wait("e").await.unwrap();
    shim.sleep().await.unwrap();
}

#[tokio::test]
async fn an_exec_during_a_dump_cancels_it() {
    let shim = Shim::running().await;
    shim.exec("e").await.unwrap();
    shim.fake.hold("dump");
    let sleeping = beside!(shim, |_, control: ControlService| async move {
        let request = SleepRequest { id: "c".to_owned(), ..Default::default() };
        control.sleep(&ctx(), request).await.map(drop)
    });
    let started = beside!(shim, |task: TaskService, _| async move {
        let request = StartRequest { id: "c".to_owned(), exec_id: "e".to_owned(), ..Default::default() };
        task.start(&ctx(), request).await.unwrap().pid
    });
    assert_eq!(shim.status().await, Status::RUNNING);
    shim.fake.release();
    assert_eq!(code(sleeping.await.unwrap()), Code::ABORTED);
    assert_eq!(started.await.unwrap(), FIRST_PID + 1);
    assert_eq!(shim.fake.calls()[0], "dump");
    assert_eq!(shim.inspect().await.last_error, "", "a cancelled sleep is no fault");
}

#[tokio::test]
async fn everything_that_needs_it_joins_a_restore_under_way() {
    let shim = Shim::asleep().await;
    shim.exec("e").await.unwrap();
    shim.fake.hold("restore");
    let started = beside!(shim, |task: TaskService, _| async move {
        let request = StartRequest { id: "c".to_owned(), exec_id: "e".to_owned(), ..Default::default() };
        task.start(&ctx(), request).await.unwrap().pid
    });
    let signalled = beside!(shim, |task: TaskService, _| async move {
        let request = KillRequest { id: "c".to_owned(), signal: 15, ..Default::default() };
        task.kill(&ctx(), request).await.unwrap();
    });
    shim.fake.release();
    started.await.unwrap();
    signalled.await.unwrap();
    let calls = shim.fake.calls();
    assert_eq!(calls.iter().filter(|call| *call == "restore").count(), 1);
    assert!(calls.contains(&"signal 15 to init all=false".to_owned()), "{calls:?}");
}

#[tokio::test]
async fn a_kill_during_a_dump_ends_the_agent_once() {
    let mut shim = Shim::running().await;
    shim.topics();
    shim.fake.hold("dump");
    let sleeping = beside!(shim, |_, control: ControlService| async move {
        let request = SleepRequest { id: "c".to_owned(), ..Default::default() };
        control.sleep(&ctx(), request).await.map(drop)
    });
    shim.kill("", 9, false).await.unwrap();
    assert!(shim.fake.calls().contains(&"signal 9 to init all=true".to_owned()));
    shim.fake.release();
    assert!(sleeping.await.unwrap().is_err());
    assert_eq!(shim.wait("").await.unwrap(), 137);
    settle().await;
    assert_eq!(shim.topics(), ["exit"]);
}

#[tokio::test]
async fn a_kill_during_a_restore_ends_the_agent() {
    for fails in [false, true] {
        let mut shim = Shim::asleep().await;
        shim.fake.hold("restore");
        if fails {
            shim.fake.fail_next("restore", RuntimeError::Failed("CRIU was killed".to_owned()));
        }
        let waking = beside!(shim, |_, control: ControlService| async move {
            let request = WakeRequest { id: "c".to_owned(), ..Default::default() };
            control.wake(&ctx(), request).await.map(drop)
        });
        shim.kill("", 9, false).await.unwrap();
        shim.fake.release();
        let _ = waking.await.unwrap();
        assert_eq!(shim.wait("").await.unwrap(), 137, "fails: {fails}");
        settle().await;
        assert_eq!(shim.topics(), ["exit"], "fails: {fails}");
    }
}

#[tokio::test]
async fn frozen_is_a_sleep_that_deepens_without_waking() {
    let shim = Shim::running().await;
    shim.sleep_at(WireDepth::DEPTH_FROZEN).await.unwrap();
    assert_eq!(shim.status().await, Status::RUNNING);
    assert_eq!(shim.inspect().await.depth.unwrap(), WireDepth::DEPTH_FROZEN);
    assert!(message(shim.sleep_at(WireDepth::DEPTH_FROZEN).await).contains("asleep already (frozen)"));
    shim.sleep_at(WireDepth::DEPTH_CHECKPOINTED).await.unwrap();
    assert_eq!(shim.fake.calls(), ["freeze", "dump"]);
    assert_eq!(shim.wake().await.unwrap(), 1);
    shim.sleep_at(WireDepth::DEPTH_FROZEN).await.unwrap();
    shim.fake.calls();
    shim.kill("", 15, false).await.unwrap();
    assert_eq!(shim.fake.calls(), ["thaw", "signal 15 to init all=false"]);
}

#[tokio::test]
async fn pause_of_a_sleeping_agent_succeeds_and_resume_wakes_it() {
    let shim = Shim::asleep().await;
    shim.pause().await.unwrap();
    assert_eq!(shim.status().await, Status::RUNNING);
    assert_eq!(shim.fake.calls(), [""; 0]);
    shim.resume().await.unwrap();
    assert_eq!(shim.fake.calls(), ["restore", "drop image"]);
}

#[tokio::test]
async fn nothing_that_comes_wakes_a_sleeping_agent_that_a_client_has_paused() {
    let shim = Shim::asleep().await;
    shim.pause().await.unwrap();
    shim.fake.input_arrives();
    settle().await;
    assert_eq!(shim.fake.calls(), [""; 0]);
    shim.resume().await.unwrap();
    assert_eq!(shim.fake.calls(), ["restore", "drop image"]);
}

#[tokio::test]
async fn an_update_of_a_sleeping_agent_leaves_it_asleep() {
    let shim = Shim::asleep().await;
    let update = UpdateTaskRequest {
        id: "c".to_owned(),
        resources: MessageField::some(Any {
            value: b"{\"cpu\":{\"shares\":2}}".to_vec(),
            ..Default::default()
        }),
        ..Default::default()
    };
    shim.task.update(&ctx(), update).await.unwrap();
    assert_eq!(shim.fake.calls(), ["update shares=Some(2) asleep=true"]);
    assert_eq!(shim.inspect().await.state.unwrap(), WireState::STATE_ASLEEP);
}

#[tokio::test]
async fn a_checkpoint_of_a_sleeping_agent_wakes_it_and_keeps_it_paused_if_it_was() {
    let shim = Shim::asleep().await;
    shim.checkpoint("/checkpoint").await.unwrap();
    assert_eq!(shim.fake.calls(), ["restore", "drop image", "checkpoint /checkpoint exit=false", "thaw"]);
    assert_eq!(shim.inspect().await.state.unwrap(), WireState::STATE_RUNNING);

    for depth in [WireDepth::DEPTH_FROZEN, WireDepth::DEPTH_RECLAIMED] {
        let shim = Shim::running().await;
        shim.sleep_at(depth).await.unwrap();
        shim.fake.calls();
        shim.checkpoint("/checkpoint").await.unwrap();
        assert_eq!(shim.fake.calls(), ["thaw", "checkpoint /checkpoint exit=false", "thaw"]);
        assert_eq!(shim.inspect().await.state.unwrap(), WireState::STATE_RUNNING);
    }

    let shim = Shim::asleep().await;
    shim.pause().await.unwrap();
    shim.checkpoint("/checkpoint").await.unwrap();
    // Also when CRIU has not left it frozen.
    let calls = ["restore", "drop image", "freeze", "checkpoint /checkpoint exit=false", "freeze"];
    assert_eq!(shim.fake.calls(), calls);
    assert_eq!(shim.inspect().await.state.unwrap(), WireState::STATE_PAUSED);
    shim.resume().await.unwrap();
    assert_eq!(shim.inspect().await.state.unwrap(), WireState::STATE_RUNNING);
}

#[tokio::test]
async fn an_agent_that_cannot_be_thawed_sleeps_on_and_says_why() {
    let shim = Shim::running().await;
    shim.sleep_at(WireDepth::DEPTH_FROZEN).await.unwrap();
    shim.fake.fail_next("thaw", RuntimeError::Failed("a parent is frozen".to_owned()));
    assert!(message(shim.wake().await).contains("a parent is frozen"));
    let inspected = shim.inspect().await;
    assert_eq!(inspected.state.unwrap(), WireState::STATE_ASLEEP);
    assert!(inspected.last_error.contains("a parent is frozen"), "{}", inspected.last_error);
    assert_eq!(shim.wake().await.unwrap(), 1);
}

#[tokio::test]
async fn a_frozen_agent_that_dies_is_reported_even_when_its_cgroup_is_gone() {
    let shim = Shim::running().await;
    shim.sleep_at(WireDepth::DEPTH_FROZEN).await.unwrap();
    shim.fake.fail_next("thaw", RuntimeError::Failed("the cgroup is gone".to_owned()));
    shim.kill("", 9, true).await.unwrap();
    assert_eq!(shim.wait("").await.unwrap(), 137);
    shim.delete("").await.unwrap();
}

#[tokio::test]
async fn a_pause_in_the_middle_of_a_dump_is_refused_rather_than_forgotten() {
    let shim = Shim::running().await;
    shim.fake.hold("dump");
    let sleeping = beside!(shim, |_, control: ControlService| async move {
        let request = SleepRequest { id: "c".to_owned(), ..Default::default() };
        control.sleep(&ctx(), request).await.map(drop)
    });
    assert!(message(shim.pause().await).contains("falling asleep already"));
    shim.fake.release();
    sleeping.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_wake_tells_what_it_was_for() {
    let shim = Shim::running().await;
    let handle = shim.containers.get("c").unwrap();
    let cause = async || shim.inspect().await.last_wake.unwrap().cause;
    shim.sleep().await.unwrap();
    handle.demand(WakeCause::Traffic).await.unwrap();
    assert_eq!(cause().await, "traffic");
    shim.sleep_at(WireDepth::DEPTH_FROZEN).await.unwrap();
    shim.wake().await.unwrap();
    assert_eq!(cause().await, "request");
    shim.sleep().await.unwrap();
    shim.exec("e").await.unwrap();
    shim.start("e").await.unwrap();
    assert_eq!(cause().await, "exec");
    // Of an agent that is awake it is no wake.
    handle.demand(WakeCause::Timer).await.unwrap();
    assert_eq!(cause().await, "exec");
}

#[tokio::test]
async fn of_several_reasons_the_first_is_told() {
    let shim = Shim::asleep().await;
    shim.fake.hold("restore");
    let handle = shim.containers.get("c").unwrap();
    let first = tokio::spawn({
        let handle = handle.clone();
        async move { handle.demand(WakeCause::Traffic).await }
    });
    settle().await;
    let second = tokio::spawn(async move { handle.demand(WakeCause::Timer).await });
    settle().await;
    assert!(!second.is_finished(), "it does not run yet");
    shim.fake.release();
    first.await.unwrap().unwrap();
    second.await.unwrap().unwrap();
    assert_eq!(shim.inspect().await.last_wake.unwrap().cause, "traffic");
    assert_eq!(shim.fake.calls().iter().filter(|call| *call == "restore").count(), 1);
}

impl Shim {
    async fn sleep_or_shallower(&self, depth: WireDepth) -> ttrpc::Result<agentcube_control::Transition> {
        let request = SleepRequest {
            id: "c".to_owned(),
            depth: EnumOrUnknown::new(depth),
            or_shallower: true,
            ..Default::default()
        };
        Ok(self.control().sleep(&ctx(), request).await?.transitions.remove(0))
    }

    fn depth(&self) -> Option<crate::lifecycle::Depth> {
        self.containers.get("c").unwrap().snapshot().depth()
    }
}

#[tokio::test]
async fn a_sleep_deepens_from_frozen_to_reclaimed_to_checkpointed() {
    let shim = Shim::running().await;
    for depth in [WireDepth::DEPTH_FROZEN, WireDepth::DEPTH_RECLAIMED, WireDepth::DEPTH_CHECKPOINTED] {
        let slept = shim.sleep_at(depth).await.unwrap().transitions.remove(0);
        assert_eq!(slept.depth.unwrap(), depth);
        assert_eq!(shim.inspect().await.depth.unwrap(), depth);
        if depth == WireDepth::DEPTH_RECLAIMED {
            assert_eq!((slept.memory_before_bytes, slept.memory_after_bytes), (4096, 1024));
            assert_eq!(shim.phase(), Phase::Reclaimed);
        }
    }
    assert_eq!(shim.fake.calls(), ["freeze", "reclaim", "dump"]);
    assert_eq!(shim.inspect().await.wakes, 0);
}

#[tokio::test]
async fn a_wake_during_a_reclaim_is_served_at_once_and_the_sleep_is_told_why_it_failed() {
    let shim = Shim::running().await;
    shim.fake.hold("reclaim");
    let sleeping = beside!(shim, |_, control: ControlService| async move {
        let depth = EnumOrUnknown::new(WireDepth::DEPTH_RECLAIMED);
        let request = SleepRequest { id: "c".to_owned(), depth, ..Default::default() };
        control.sleep(&ctx(), request).await
    });
    assert_eq!(shim.inspect().await.state.unwrap(), WireState::STATE_FALLING_ASLEEP);
    assert_eq!(shim.wake().await.unwrap(), 1);
    assert_eq!(code(sleeping.await.unwrap()), Code::ABORTED);
    assert_eq!(shim.inspect().await.state.unwrap(), WireState::STATE_RUNNING);
    // The end of the one that was given up is not taken for that of the next.
    shim.sleep_at(WireDepth::DEPTH_FROZEN).await.unwrap();
    shim.fake.release();
    settle().await;
    assert_eq!(shim.depth(), Some(crate::lifecycle::Depth::Frozen));
}

#[tokio::test]
async fn without_swap_nothing_is_reclaimed_and_a_shallower_depth_will_do_if_asked_for() {
    let shim = Shim::running().await;
    let nowhere = || RuntimeError::FailedPrecondition("there is nothing to reclaim to".to_owned());
    shim.fake.fail_next("can reclaim", nowhere());
    let refused = shim.sleep_at(WireDepth::DEPTH_RECLAIMED).await;
    assert!(message(refused).contains("nothing to reclaim to"));
    assert_eq!((shim.depth(), shim.fake.calls()), (None, vec![]));

    shim.fake.fail_next("dump", RuntimeError::FailedPrecondition("io_uring".to_owned()));
    shim.fake.fail_next("can reclaim", nowhere());
    let slept = shim.sleep_or_shallower(WireDepth::DEPTH_UNSPECIFIED).await.unwrap();
    assert_eq!(slept.depth.unwrap(), WireDepth::DEPTH_FROZEN);
    let reasons: Vec<_> = slept.shortfalls.iter().map(|fall| (fall.depth.unwrap(), &fall.reason)).collect();
    assert_eq!(reasons.len(), 2);
    assert!(
        reasons[0].0 == WireDepth::DEPTH_CHECKPOINTED && reasons[0].1.contains("io_uring"),
        "{reasons:?}"
    );
    assert!(reasons[1].0 == WireDepth::DEPTH_RECLAIMED && reasons[1].1.contains("nothing to"), "{reasons:?}");

    // Asked again, it sleeps on and says why it does not sleep deeper.
    shim.fake.fail_next("dump", RuntimeError::FailedPrecondition("io_uring".to_owned()));
    shim.fake.fail_next("can reclaim", nowhere());
    let slept = shim.sleep_or_shallower(WireDepth::DEPTH_CHECKPOINTED).await.unwrap();
    assert_eq!((slept.depth.unwrap(), slept.shortfalls.len()), (WireDepth::DEPTH_FROZEN, 2));
    assert_eq!(shim.inspect().await.wakes, 0, "a failed dump of a sleeping agent is no wake");
}

#[tokio::test]
async fn an_agent_at_work_is_asked_again_and_left_alone_if_it_stays_so() {
    let shim = Shim::running().await;
    let busy = || RuntimeError::Busy("it is at work".to_owned());
    shim.fake.fail_next("watch", busy());
    shim.sleep_at(WireDepth::DEPTH_FROZEN).await.unwrap();
    assert_eq!(shim.fake.calls(), ["freeze", "thaw", "freeze"]);
    shim.wake().await.unwrap();
    for _ in 0..200 {
        shim.fake.fail_next("watch", busy());
    }
    let refused = shim.sleep_at(WireDepth::DEPTH_FROZEN).await;
    assert_eq!(code(refused), Code::ABORTED);
    assert_eq!(shim.status().await, Status::RUNNING);
    assert_eq!(shim.inspect().await.state.unwrap(), WireState::STATE_RUNNING);
}

#[tokio::test]
async fn a_reclaim_that_fails_leaves_it_frozen() {
    let shim = Shim::running().await;
    shim.fake.fail_next("reclaim", RuntimeError::Failed("the kernel pushed nothing out".to_owned()));
    assert!(message(shim.sleep_at(WireDepth::DEPTH_RECLAIMED).await).contains("sleeps frozen"));
    assert_eq!(shim.depth(), Some(crate::lifecycle::Depth::Frozen));
    assert_eq!(shim.wake().await.unwrap(), 1);
}
