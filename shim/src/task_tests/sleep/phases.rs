//! Each request in each phase of a sleep and a wake.

use super::*;

/// Where the agent is when the request comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    Freezing,
    Frozen,
    Reclaiming,
    Reclaimed,
    Dumping,
    /// It is dumped out of the freezer.
    Deepening,
    Checkpointed,
    Restoring,
}

const ALL: [When; 8] = [
    When::Freezing,
    When::Frozen,
    When::Reclaiming,
    When::Reclaimed,
    When::Dumping,
    When::Deepening,
    When::Checkpointed,
    When::Restoring,
];

impl When {
    /// The work that is under way, if any.
    fn held(self) -> Option<&'static str> {
        match self {
            When::Freezing => Some("freeze"),
            When::Reclaiming => Some("reclaim"),
            When::Dumping | When::Deepening => Some("dump"),
            When::Restoring => Some("restore"),
            When::Frozen | When::Reclaimed | When::Checkpointed => None,
        }
    }

    /// Brings a shim's agent to where this begins, lets `request` come in its middle, and lets it end.
    async fn meet<T>(self, shim: &Shim, request: impl Future<Output = T>) -> T {
        match self {
            When::Frozen | When::Deepening => shim.sleeps(WireDepth::DEPTH_FROZEN).await,
            When::Reclaimed => shim.sleeps(WireDepth::DEPTH_RECLAIMED).await,
            When::Checkpointed | When::Restoring => shim.sleeps(WireDepth::DEPTH_CHECKPOINTED).await,
            When::Freezing | When::Reclaiming | When::Dumping => {}
        }
        let Some(held) = self.held() else { return request.await };
        shim.fake.hold(held);
        let beside = async {
            // Each may fail, because of the request.
            match self {
                When::Freezing => drop(shim.sleep_at(WireDepth::DEPTH_FROZEN).await),
                When::Reclaiming => drop(shim.sleep_at(WireDepth::DEPTH_RECLAIMED).await),
                When::Restoring => drop(shim.wake().await),
                _ => drop(shim.sleep_at(WireDepth::DEPTH_CHECKPOINTED).await),
            }
        };
        let asked = async {
            settle().await;
            request.await
        };
        let released = async {
            settle().await;
            settle().await;
            shim.fake.release();
        };
        tokio::join!(beside, asked, released).1
    }
}

impl Shim {
    async fn sleeps(&self, depth: WireDepth) {
        self.sleep_at(depth).await.unwrap();
    }

    /// Sees to it that the agent runs, once, and can be put to sleep again.
    async fn assert_runs(&self, when: When) {
        settle().await;
        let told = self.inspect().await;
        assert_eq!(told.state.unwrap(), WireState::STATE_RUNNING, "{when:?}");
        assert_eq!(self.status().await, Status::RUNNING, "{when:?}");
    }
}

#[tokio::test]
async fn a_wake_in_any_phase_leaves_the_agent_running() {
    for when in ALL {
        let shim = Shim::running().await;
        let woken = when.meet(&shim, shim.wake()).await;
        // Asked for as such in a wake, a second one is refused.
        assert_eq!(woken.is_ok(), when != When::Restoring, "{when:?}: {woken:?}");
        shim.assert_runs(when).await;
        shim.sleep().await.unwrap();
    }
}

#[tokio::test]
async fn an_exec_in_any_phase_is_started_once_and_keeps_the_agent_awake() {
    for when in ALL {
        let shim = Shim::running().await;
        shim.exec("e").await.unwrap();
        let pid = when.meet(&shim, shim.start("e")).await.unwrap();
        shim.assert_runs(when).await;
        let begun = shim.fake.calls().iter().filter(|call| call.starts_with("exec e")).count();
        assert_eq!(begun, 1, "{when:?}");
        assert!(message(shim.sleep().await).contains("exec process"), "{when:?}");
        shim.fake.exit(pid, 0);
        shim.wait("e").await.unwrap();
        shim.sleep().await.unwrap();
    }
}

#[tokio::test]
async fn a_signal_in_any_phase_reaches_the_agent_once() {
    for when in ALL {
        let shim = Shim::running().await;
        when.meet(&shim, shim.kill("", 15, false)).await.unwrap();
        shim.assert_runs(when).await;
        let sent = shim.fake.calls().iter().filter(|call| call.starts_with("signal 15")).count();
        assert_eq!(sent, 1, "{when:?}");
    }
}

#[tokio::test]
async fn a_kill_in_any_phase_ends_the_agent_once() {
    for when in ALL {
        let mut shim = Shim::running().await;
        shim.topics();
        when.meet(&shim, shim.kill("", 9, false)).await.unwrap();
        assert_eq!(shim.wait("").await.unwrap(), 137, "{when:?}");
        settle().await;
        assert_eq!(shim.status().await, Status::STOPPED, "{when:?}");
        let ends = shim.topics().iter().filter(|topic| *topic == "exit").count();
        assert_eq!(ends, 1, "{when:?}");
        shim.delete("").await.unwrap();
    }
}

#[tokio::test]
async fn a_delete_in_any_phase_is_refused_and_costs_nothing() {
    for when in ALL {
        let shim = Shim::running().await;
        assert_eq!(code(when.meet(&shim, shim.delete("")).await), Code::FAILED_PRECONDITION, "{when:?}");
        settle().await;
        assert_eq!(shim.status().await, Status::RUNNING, "{when:?}");
        if when == When::Restoring {
            assert_eq!(shim.depth(), None);
        } else {
            assert!(shim.depth().is_some(), "{when:?}");
            shim.wake().await.unwrap();
        }
        shim.assert_runs(when).await;
    }
}

#[tokio::test]
async fn a_pause_in_any_phase_holds_until_the_resume_or_is_refused() {
    for when in ALL {
        let shim = Shim::running().await;
        let paused = when.meet(&shim, shim.pause()).await;
        settle().await;
        let refused = matches!(when, When::Dumping | When::Deepening | When::Restoring);
        assert_eq!(paused.is_err(), refused, "{when:?}: {paused:?}");
        if !refused {
            shim.resume().await.unwrap();
        } else if when != When::Restoring {
            shim.wake().await.unwrap();
        }
        shim.assert_runs(when).await;
    }
}
