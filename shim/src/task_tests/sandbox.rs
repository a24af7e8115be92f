//! Several containers of one sandbox, each with a runtime of its own.

use std::collections::HashMap;

use agentcube_control::{
    Control, Depth as WireDepth, SleepRequest, Transition as WireTransition, WakeRequest,
};

use super::*;
use crate::{
    bundle::Identity,
    container::{Birth, Handle},
    control::ControlService,
    lifecycle::{FrozenBy, State},
    runtime::{CreateConfig, RuntimeFactory, Stdio},
    sandbox::CONTAINERS,
    wake::WakeCause,
};

const NAME: &str = "io.kubernetes.cri.container-name";

struct Pod {
    containers: Containers,
    fakes: HashMap<&'static str, Fake>,
    bundle: tempfile::TempDir,
}

impl Pod {
    /// A sandbox whose pause container and containers run.
    async fn running(annotation: Option<&str>, names: &[&'static str]) -> Self {
        let mut pod = Self {
            containers: Containers::default(),
            fakes: HashMap::new(),
            bundle: tempfile::tempdir().unwrap(),
        };
        let annotations = annotation.map(|text| (CONTAINERS.to_owned(), text.to_owned()));
        pod.add("pod", Identity { is_sandbox: true, ..identity(annotations) }).await;
        for name in names {
            pod.add(name, identity([(NAME.to_owned(), (*name).to_owned())])).await;
        }
        pod
    }

    async fn add(&mut self, id: &'static str, identity: Identity) {
        let fake = Fake::default();
        let bundle = self.bundle.path().join(id);
        std::fs::create_dir(&bundle).unwrap();
        let config = CreateConfig {
            id: id.to_owned(),
            namespace: "k8s.io".to_owned(),
            bundle: bundle.clone(),
            rootfs: Vec::new(),
            stdio: Stdio::default(),
            checkpoint: None,
            options: None,
        };
        let (runtime, init) = fake.create(&config).await.unwrap();
        let birth = Birth { id: id.to_owned(), bundle, identity, stdio: Stdio::default(), runtime, init };
        let handle = Handle::spawn(birth, EventSink::channel().0);
        self.containers.insert(handle.clone());
        handle.start(None).await.unwrap();
        settle().await;
        fake.calls();
        self.fakes.insert(id, fake);
    }

    fn handle(&self, id: &str) -> Handle {
        self.containers.get(id).unwrap()
    }

    fn state(&self, id: &str) -> State {
        self.handle(id).snapshot().state
    }

    fn calls(&self, id: &str) -> Vec<String> {
        self.fakes[id].calls()
    }

    /// Begins to put the sandbox to sleep, and lets that get as far as it can.
    async fn begin_sleep(&self) -> tokio::task::JoinHandle<ttrpc::Result<Vec<String>>> {
        let control = ControlService::new("k8s.io", self.containers.clone());
        let request = SleepRequest { id: "pod".to_owned(), ..Default::default() };
        let sleeping = tokio::spawn(async move {
            let slept = control.sleep(&ctx(), request).await?;
            Ok(slept.transitions.into_iter().map(|transition| transition.id).collect())
        });
        settle().await;
        sleeping
    }

    async fn sleep(&self) -> ttrpc::Result<Vec<String>> {
        self.begin_sleep().await.await.unwrap()
    }

    async fn sleep_at(&self, depth: WireDepth, or_shallower: bool) -> ttrpc::Result<Vec<WireTransition>> {
        let control = ControlService::new("k8s.io", self.containers.clone());
        let request =
            SleepRequest { id: "pod".to_owned(), depth: depth.into(), or_shallower, ..Default::default() };
        Ok(control.sleep(&ctx(), request).await?.transitions)
    }
}

const ASLEEP_FROZEN: State = State::Frozen { by: FrozenBy::Sleep };

fn identity(annotations: impl IntoIterator<Item = (String, String)>) -> Identity {
    let annotations = annotations.into_iter().collect();
    Identity { sandbox_id: "pod".to_owned(), is_sandbox: false, annotations }
}

#[tokio::test]
async fn all_are_frozen_before_the_first_is_dumped() {
    let pod = Pod::running(None, &["a", "b"]).await;
    pod.fakes["b"].hold("freeze");
    let sleeping = pod.begin_sleep().await;
    assert_eq!(pod.calls("a"), ["freeze"]);
    pod.fakes["b"].release();
    assert_eq!(sleeping.await.unwrap().unwrap(), ["a", "b"]);
    assert_eq!((pod.calls("a"), pod.calls("b")), (vec!["dump".into()], vec!["freeze".into(), "dump".into()]));
    assert_eq!((pod.state("a"), pod.state("b")), (State::Checkpointed, State::Checkpointed));
    assert_eq!(pod.calls("pod"), [""; 0], "the pause container is left alone");
}

#[tokio::test]
async fn a_dump_that_fails_wakes_the_others() {
    let pod = Pod::running(None, &["a", "b"]).await;
    pod.fakes["b"].fail_next("dump", RuntimeError::FailedPrecondition("io_uring".to_owned()));
    let refused = message(pod.sleep().await);
    assert!(refused.contains("io_uring") && refused.contains("container b"), "{refused}");
    settle().await;
    assert_eq!((pod.state("a"), pod.state("b")), (State::Running, State::Running));
}

#[tokio::test]
async fn whatever_wakes_one_wakes_the_others() {
    let pod = Pod::running(None, &["a", "b", "c"]).await;
    pod.sleep().await.unwrap();
    pod.handle("c").kill(None, 9, true).await.unwrap();
    settle().await;
    assert_eq!(pod.state("a"), State::Checkpointed, "an end is no wake");
    pod.fakes["a"].input_arrives();
    settle().await;
    assert_eq!((pod.state("a"), pod.state("b")), (State::Running, State::Running));
    assert_eq!(pod.state("c"), State::Stopped);
    // Those that have ended keep the others from nothing.
    assert_eq!(pod.sleep().await.unwrap(), ["a", "b"]);
}

#[tokio::test]
async fn a_wake_while_the_others_are_being_frozen_gives_the_sleep_up() {
    let pod = Pod::running(None, &["a", "b"]).await;
    pod.fakes["b"].hold("freeze");
    let sleeping = pod.begin_sleep().await;
    pod.handle("a").kill(None, 15, false).await.unwrap();
    settle().await;
    pod.fakes["b"].release();
    let refused = message(sleeping.await.unwrap());
    assert!(refused.contains("a was woken while it fell asleep"), "{refused}");
    settle().await;
    assert_eq!((pod.state("a"), pod.state("b")), (State::Running, State::Running));
    assert!(!pod.calls("b").contains(&"dump".to_owned()));
}

#[tokio::test]
async fn a_wake_during_the_dump_of_one_wakes_the_one_that_is_dumped_already() {
    let pod = Pod::running(None, &["a", "b"]).await;
    pod.fakes["b"].hold("dump");
    let sleeping = pod.begin_sleep().await;
    assert_eq!(pod.state("a"), State::Checkpointed);
    let waking = tokio::spawn({
        let b = pod.handle("b");
        async move { b.wake().await }
    });
    settle().await;
    pod.fakes["b"].release();
    waking.await.unwrap().unwrap();
    assert!(message(sleeping.await.unwrap()).contains("something needs the agent awake"));
    settle().await;
    assert_eq!((pod.state("a"), pod.state("b")), (State::Running, State::Running));
}

#[tokio::test]
async fn a_wake_of_a_sandbox_joins_the_one_that_is_under_way() {
    for fails in [false, true] {
        let pod = Pod::running(None, &["a", "b"]).await;
        pod.sleep().await.unwrap();
        let fake = &pod.fakes["a"];
        fake.hold("restore");
        if fails {
            fake.fail_next("restore", RuntimeError::Failed("no memory".to_owned()));
        }
        fake.input_arrives();
        settle().await;
        assert!(matches!(pod.state("a"), State::Restoring { .. }));
        let control = ControlService::new("k8s.io", pod.containers.clone());
        let request = WakeRequest { id: "pod".to_owned(), ..Default::default() };
        let waking = tokio::spawn(async move { control.wake(&ctx(), request).await.map(drop) });
        settle().await;
        assert!(!waking.is_finished(), "one of them sleeps");
        fake.release();
        let woken = waking.await.unwrap();
        if fails {
            assert!(message(woken).contains("no memory"));
        } else {
            woken.unwrap();
            assert_eq!((pod.state("a"), pod.state("b")), (State::Running, State::Running));
        }
    }
}

#[tokio::test]
async fn those_that_the_annotation_does_not_name_stay_awake() {
    let pod = Pod::running(Some("a"), &["a", "sidecar"]).await;
    assert_eq!(pod.sleep().await.unwrap(), ["a"]);
    assert_eq!((pod.state("a"), pod.state("sidecar")), (State::Checkpointed, State::Running));
    let control = ControlService::new("k8s.io", pod.containers.clone());
    let request = WakeRequest { id: "pod".to_owned(), ..Default::default() };
    assert_eq!(control.wake(&ctx(), request).await.unwrap().transitions.len(), 1);
    let nobody = Pod::running(Some("x"), &["a"]).await;
    assert!(message(nobody.sleep().await).contains("none that agentcube.volcano.sh/containers=x names"));
}

#[tokio::test]
async fn a_freeze_and_the_dump_after_it_are_one_sleep() {
    let pod = Pod::running(None, &["a", "b"]).await;
    pod.sleep().await.unwrap();
    pod.handle("a").demand(WakeCause::Traffic).await.unwrap();
    settle().await;
    let cause = |id: &str| pod.handle(id).snapshot().last_wake.unwrap().cause;
    assert_eq!((cause("a"), cause("b")), (Some(WakeCause::Traffic), Some(WakeCause::Sandbox)));
    for id in ["a", "b"] {
        let now = pod.handle(id).snapshot();
        assert_eq!((now.sleeps, now.wakes), (1, 1), "{id}");
    }
}

#[tokio::test]
async fn where_one_cannot_be_dumped_it_sleeps_frozen_and_they_still_wake_as_one() {
    let pod = Pod::running(None, &["a", "b"]).await;
    let fake = &pod.fakes["b"];
    fake.fail_next("dump", RuntimeError::FailedPrecondition("io_uring".to_owned()));
    fake.fail_next("can reclaim", RuntimeError::FailedPrecondition("no swap".to_owned()));
    let slept = pod.sleep_at(WireDepth::DEPTH_CHECKPOINTED, true).await.unwrap();
    let told: Vec<_> =
        slept.iter().map(|one| (one.id.as_str(), one.depth.unwrap(), one.shortfalls.len())).collect();
    assert_eq!(told, [("a", WireDepth::DEPTH_CHECKPOINTED, 0), ("b", WireDepth::DEPTH_FROZEN, 2)]);
    assert!(slept[1].shortfalls[0].reason.contains("io_uring"), "{slept:?}");
    assert!(slept[1].shortfalls[1].reason.contains("no swap"), "{slept:?}");
    assert_eq!((pod.state("a"), pod.state("b")), (State::Checkpointed, ASLEEP_FROZEN));
    fake.input_arrives();
    settle().await;
    assert_eq!((pod.state("a"), pod.state("b")), (State::Running, State::Running));
}

#[tokio::test]
async fn a_depth_that_one_cannot_reach_leaves_all_awake_unless_a_shallower_will_do() {
    let pod = Pod::running(None, &["a", "b"]).await;
    let nowhere = || RuntimeError::FailedPrecondition("there is nothing to reclaim to".to_owned());
    pod.fakes["b"].fail_next("can reclaim", nowhere());
    let refused = message(pod.sleep_at(WireDepth::DEPTH_RECLAIMED, false).await);
    assert!(refused.contains("container b") && refused.contains("nothing to reclaim to"), "{refused}");
    settle().await;
    assert_eq!((pod.state("a"), pod.state("b")), (State::Running, State::Running));
    pod.fakes["b"].fail_next("can reclaim", nowhere());
    pod.sleep_at(WireDepth::DEPTH_RECLAIMED, true).await.unwrap();
    assert_eq!((pod.state("a"), pod.state("b")), (State::Reclaimed, ASLEEP_FROZEN));
    // From there all go deeper without a wake.
    pod.sleep_at(WireDepth::DEPTH_CHECKPOINTED, false).await.unwrap();
    assert_eq!((pod.state("a"), pod.state("b")), (State::Checkpointed, State::Checkpointed));
    assert_eq!(pod.handle("a").snapshot().wakes, 1);
}

#[tokio::test]
async fn what_one_of_them_does_by_itself_meanwhile_is_waited_for() {
    let pod = Pod::running(None, &["a", "b"]).await;
    pod.fakes["a"].fail_next("watch", RuntimeError::Busy("it is at work".to_owned()));
    pod.sleep().await.unwrap();
    assert_eq!(pod.calls("a"), ["freeze", "thaw", "freeze", "dump"]);
    assert_eq!(pod.calls("b"), ["freeze", "dump"], "it has not been woken by one that never slept");
    pod.handle("a").demand(WakeCause::Traffic).await.unwrap();
    settle().await;
    // One whose timer is due while the other is being frozen.
    pod.fakes["b"].hold("freeze");
    let sleeping = pod.begin_sleep().await;
    pod.handle("a").demand(WakeCause::Timer).await.unwrap();
    pod.fakes["b"].release();
    assert_eq!(sleeping.await.unwrap().unwrap(), ["a", "b"]);
    assert_eq!((pod.state("a"), pod.state("b")), (State::Checkpointed, State::Checkpointed));
}

#[tokio::test]
async fn one_that_is_at_work_after_a_failed_dump_is_awake_and_wakes_the_others() {
    let pod = Pod::running(None, &["a", "b"]).await;
    pod.sleep_at(WireDepth::DEPTH_FROZEN, false).await.unwrap();
    let fake = &pod.fakes["b"];
    fake.fail_next("dump", RuntimeError::FailedPrecondition("io_uring".to_owned()));
    fake.fail_next("watch", RuntimeError::Busy("it is at work".to_owned()));
    pod.handle("b").sleep(crate::lifecycle::Depth::Checkpointed).await.unwrap_err();
    settle().await;
    assert_eq!((pod.state("a"), pod.state("b")), (State::Running, State::Running));
    for id in ["a", "b"] {
        let now = pod.handle(id).snapshot();
        assert_eq!((now.sleeps, now.wakes), (1, 1), "{id}");
    }
}
