//! What comes while a checkpoint is taken for a client.

use super::*;

const TAKEN: &str = "checkpoint /image exit=false";

impl Shim {
    /// Takes a checkpoint, and lets `meanwhile` come in its middle.
    async fn checkpoint_beside<T>(&self, meanwhile: impl Future<Output = T>) -> (ttrpc::Result<()>, T) {
        self.fake.hold("checkpoint");
        let asked = async {
            settle().await;
            meanwhile.await
        };
        let released = async {
            settle().await;
            settle().await;
            assert_eq!(self.fake.calls(), [TAKEN], "nothing is done to it meanwhile");
            self.fake.release();
        };
        let (taken, met, ()) = tokio::join!(self.checkpoint("/image"), asked, released);
        (taken, met)
    }
}

#[tokio::test]
async fn a_pause_in_the_middle_of_a_checkpoint_comes_after_it_and_holds() {
    let shim = Shim::running().await;
    let (taken, paused) = shim.checkpoint_beside(shim.pause()).await;
    taken.unwrap();
    paused.unwrap();
    assert_eq!(shim.fake.calls(), ["thaw", "freeze"]);
    assert_eq!(shim.status().await, Status::PAUSED);
    shim.resume().await.unwrap();
    assert_eq!(shim.status().await, Status::RUNNING);
}

#[tokio::test]
async fn a_resume_calls_a_pause_off_that_waits_for_a_checkpoint() {
    let shim = Shim::running().await;
    let both = async {
        let resumed = async {
            settle().await;
            shim.resume().await
        };
        tokio::join!(shim.pause(), resumed)
    };
    let (taken, (paused, resumed)) = shim.checkpoint_beside(both).await;
    taken.unwrap();
    resumed.unwrap();
    assert!(message(paused).contains("resumed before it could be paused"));
    assert_eq!((shim.status().await, shim.fake.calls()), (Status::RUNNING, vec!["thaw".to_owned()]));
}

#[tokio::test]
async fn what_a_paused_agent_is_after_a_checkpoint_is_what_clients_are_told() {
    let shim = Shim::running().await;
    shim.pause().await.unwrap();
    shim.fake.calls();
    // A CRIU that is killed leaves it thawed.
    shim.fake.fail_next("checkpoint", RuntimeError::Failed("CRIU was killed".to_owned()));
    assert!(message(shim.checkpoint("/image").await).contains("was killed"));
    assert_eq!(
        (shim.status().await, shim.fake.calls()),
        (Status::PAUSED, vec![TAKEN.into(), "freeze".into()])
    );

    shim.fake.fail_next("freeze", RuntimeError::Failed("it does not stand still".to_owned()));
    shim.checkpoint("/image").await.unwrap();
    assert_eq!(shim.status().await, Status::RUNNING);
    assert_eq!(shim.fake.calls(), [TAKEN, "freeze", "thaw"]);
}

#[tokio::test]
async fn a_resume_and_a_pause_in_the_middle_of_a_checkpoint_leave_it_paused() {
    let shim = Shim::running().await;
    shim.pause().await.unwrap();
    shim.fake.calls();
    shim.fake.hold("checkpoint");
    let taking = beside!(shim, |task: TaskService, _| async move {
        let request =
            CheckpointTaskRequest { id: "c".to_owned(), path: "/image".to_owned(), ..Default::default() };
        task.checkpoint(&ctx(), request).await.map(drop)
    });
    shim.resume().await.unwrap();
    let paused = tokio::join!(shim.pause(), async {
        settle().await;
        assert_eq!(shim.fake.calls(), [TAKEN, "thaw"]);
        shim.fake.release();
    });
    paused.0.unwrap();
    taking.await.unwrap().unwrap();
    assert_eq!(
        (shim.status().await, shim.fake.calls()),
        (Status::PAUSED, vec!["thaw".into(), "freeze".into()])
    );
}

#[tokio::test]
async fn a_second_checkpoint_is_taken_after_the_first() {
    let shim = Shim::running().await;
    let (first, second) = shim.checkpoint_beside(shim.checkpoint("/other")).await;
    first.unwrap();
    second.unwrap();
    assert_eq!(shim.fake.calls(), ["thaw", "checkpoint /other exit=false", "thaw"]);
}

#[tokio::test]
async fn who_waits_for_a_checkpoint_learns_that_the_agent_has_ended() {
    let shim = Shim::running().await;
    let end = async {
        let killed = async {
            settle().await;
            shim.fake.exit(shim.fake.init(), 1);
        };
        tokio::join!(shim.pause(), shim.checkpoint("/other"), killed)
    };
    shim.fake.hold("checkpoint");
    let (_, (paused, other, ())) = tokio::join!(shim.checkpoint("/image"), async {
        settle().await;
        let ended = end.await;
        shim.fake.release();
        ended
    });
    for refused in [paused, other] {
        assert!(message(refused).contains("it has ended"));
    }
    assert_eq!(shim.status().await, Status::STOPPED);
}
