//! Every call of the Task API, driven through a runtime that records its arguments.

mod fake;
mod sandbox;
mod sleep;

use std::{sync::Arc, time::Duration};

use containerd_shim::{
    ExitSignal, Task,
    api::{
        ConnectRequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, PidsRequest,
        ResizePtyRequest, ShutdownRequest, StartRequest, StateRequest, StateResponse, StatsRequest, Status,
        UpdateTaskRequest, WaitRequest,
    },
    protos::{
        api::{CheckpointTaskRequest, CloseIORequest, PauseRequest, ResumeRequest},
        protobuf::{Message, MessageField, well_known_types::any::Any},
        shim::oci::CheckpointOptions,
        ttrpc::{self, Code, r#async::TtrpcContext},
    },
};
use tokio::sync::mpsc::UnboundedReceiver;

use self::fake::{FIRST_PID, Fake};
use super::{Containers, TaskService};
use crate::{
    events::{EventSink, TopicAndEvent},
    runtime::RuntimeError,
};

/// One shim with a fake runtime.
struct Shim {
    task: TaskService,
    fake: Fake,
    containers: Containers,
    events: UnboundedReceiver<TopicAndEvent>,
    exit: Arc<ExitSignal>,
    bundle: tempfile::TempDir,
}

fn ctx() -> TtrpcContext {
    TtrpcContext {
        mh: ttrpc::MessageHeader::default(),
        metadata: std::collections::HashMap::default(),
        timeout_nano: 0,
        ..Default::default()
    }
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    match result.expect_err("must fail") {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("{other:?} has no code"),
    }
}

fn message<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> String {
    match result.expect_err("must fail") {
        ttrpc::Error::RpcStatus(status) => status.message().to_owned(),
        other => panic!("{other:?} has no message"),
    }
}

impl Shim {
    fn new() -> Self {
        let (sink, events) = EventSink::channel();
        let (fake, containers) = (Fake::default(), Containers::default());
        let exit = Arc::new(ExitSignal::default());
        let task =
            TaskService::new("default", containers.clone(), Arc::new(fake.clone()), sink, exit.clone());
        Self { task, fake, containers, events, exit, bundle: tempfile::tempdir().unwrap() }
    }

    /// A shim with the container "c", created and started.
    async fn running() -> Self {
        let shim = Self::new();
        shim.create("c").await.unwrap();
        shim.start("").await.unwrap();
        shim.fake.calls();
        shim
    }

    async fn create(&self, id: &str) -> ttrpc::Result<u32> {
        let request = CreateTaskRequest {
            id: id.to_owned(),
            bundle: self.bundle.path().to_string_lossy().into_owned(),
            stdout: "/fifo/out".to_owned(),
            ..Default::default()
        };
        Ok(self.task.create(&ctx(), request).await?.pid)
    }

    async fn start(&self, exec_id: &str) -> ttrpc::Result<u32> {
        let request = StartRequest { id: "c".to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        Ok(self.task.start(&ctx(), request).await?.pid)
    }

    async fn exec(&self, exec_id: &str) -> ttrpc::Result<()> {
        let request = ExecProcessRequest {
            id: "c".to_owned(),
            exec_id: exec_id.to_owned(),
            stdin: "/fifo/in".to_owned(),
            spec: MessageField::some(Any { value: b"{\"args\":[\"sh\"]}".to_vec(), ..Default::default() }),
            ..Default::default()
        };
        self.task.exec(&ctx(), request).await.map(drop)
    }

    async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> ttrpc::Result<()> {
        let request = KillRequest {
            id: "c".to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.task.kill(&ctx(), request).await.map(drop)
    }

    async fn wait(&self, exec_id: &str) -> ttrpc::Result<u32> {
        let request = WaitRequest { id: "c".to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        Ok(self.task.wait(&ctx(), request).await?.exit_status)
    }

    async fn delete(&self, exec_id: &str) -> ttrpc::Result<(u32, u32)> {
        let request = DeleteRequest { id: "c".to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        let deleted = self.task.delete(&ctx(), request).await?;
        Ok((deleted.pid, deleted.exit_status))
    }

    async fn state(&self, exec_id: &str) -> ttrpc::Result<StateResponse> {
        let request = StateRequest { id: "c".to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        self.task.state(&ctx(), request).await
    }

    async fn status(&self) -> Status {
        self.state("").await.unwrap().status.unwrap()
    }

    async fn pause(&self) -> ttrpc::Result<()> {
        let request = PauseRequest { id: "c".to_owned(), ..Default::default() };
        self.task.pause(&ctx(), request).await.map(drop)
    }

    async fn resume(&self) -> ttrpc::Result<()> {
        let request = ResumeRequest { id: "c".to_owned(), ..Default::default() };
        self.task.resume(&ctx(), request).await.map(drop)
    }

    async fn checkpoint(&self, path: &str) -> ttrpc::Result<()> {
        let path = path.to_owned();
        let request = CheckpointTaskRequest { id: "c".to_owned(), path, ..Default::default() };
        self.task.checkpoint(&ctx(), request).await.map(drop)
    }

    /// The topics of the events so far, without their common prefix.
    fn topics(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.events.try_recv().ok())
            .map(|(topic, _)| topic.trim_start_matches("/tasks/").to_owned())
            .collect()
    }
}

/// Lets everything that can go on do so.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(5)).await;
}

#[tokio::test]
async fn create_passes_the_request_on_and_publishes() {
    let mut shim = Shim::new();
    assert_eq!(shim.create("c").await.unwrap(), FIRST_PID);
    let bundle = shim.bundle.path().display();
    let expected =
        format!("create default/c bundle={bundle} terminal=false stdout=/fifo/out checkpoint=None");
    assert_eq!(shim.fake.calls(), [expected]);
    assert_eq!(shim.status().await, Status::CREATED);
    assert_eq!(shim.topics(), ["create"]);
}

#[tokio::test]
async fn create_twice_is_refused_and_a_failed_create_leaves_nothing() {
    let shim = Shim::new();
    shim.fake.fail_next("create", RuntimeError::InvalidArgument("no cgroup path".to_owned()));
    let failed = shim.create("c").await;
    assert_eq!(code(failed), Code::INVALID_ARGUMENT);
    assert_eq!(code(shim.state("").await), Code::NOT_FOUND);
    shim.create("c").await.unwrap();
    assert_eq!(code(shim.create("c").await), Code::ALREADY_EXISTS);
}

#[tokio::test]
async fn start_runs_the_program_once() {
    let mut shim = Shim::new();
    shim.create("c").await.unwrap();
    assert_eq!(shim.start("").await.unwrap(), FIRST_PID);
    assert_eq!(shim.status().await, Status::RUNNING);
    assert_eq!(code(shim.start("").await), Code::FAILED_PRECONDITION);
    assert_eq!(shim.topics(), ["create", "start"]);
}

#[tokio::test]
async fn a_failed_start_can_be_deleted() {
    let shim = Shim::new();
    shim.create("c").await.unwrap();
    shim.fake.fail_next("start", RuntimeError::Failed("exec: no such file".to_owned()));
    assert!(message(shim.start("").await).contains("no such file"));
    assert_eq!(shim.status().await, Status::CREATED);
    shim.delete("").await.unwrap();
    assert!(shim.containers.all().is_empty());
}

#[tokio::test]
async fn every_call_for_an_unknown_container_is_not_found() {
    let shim = Shim::new();
    let id = || "nobody".to_owned();
    let ctx = ctx();
    let task = &shim.task;
    let codes = [
        code(task.state(&ctx, StateRequest { id: id(), ..Default::default() }).await),
        code(task.start(&ctx, StartRequest { id: id(), ..Default::default() }).await),
        code(task.delete(&ctx, DeleteRequest { id: id(), ..Default::default() }).await),
        code(task.pids(&ctx, PidsRequest { id: id(), ..Default::default() }).await),
        code(task.pause(&ctx, PauseRequest { id: id(), ..Default::default() }).await),
        code(task.resume(&ctx, ResumeRequest { id: id(), ..Default::default() }).await),
        code(task.kill(&ctx, KillRequest { id: id(), ..Default::default() }).await),
        code(task.resize_pty(&ctx, ResizePtyRequest { id: id(), ..Default::default() }).await),
        code(task.close_io(&ctx, CloseIORequest { id: id(), ..Default::default() }).await),
        code(task.update(&ctx, UpdateTaskRequest { id: id(), ..Default::default() }).await),
        code(task.wait(&ctx, WaitRequest { id: id(), ..Default::default() }).await),
        code(task.stats(&ctx, StatsRequest { id: id(), ..Default::default() }).await),
    ];
    assert!(codes.iter().all(|code| *code == Code::NOT_FOUND), "{codes:?}");
    let exec = ExecProcessRequest { id: id(), exec_id: id(), ..Default::default() };
    assert_eq!(code(task.exec(&ctx, exec).await), Code::NOT_FOUND);
    let path = "/checkpoint".to_owned();
    let checkpoint = CheckpointTaskRequest { id: id(), path, ..Default::default() };
    assert_eq!(code(task.checkpoint(&ctx, checkpoint).await), Code::NOT_FOUND);
}

#[tokio::test]
async fn an_exit_reaches_every_waiter_and_is_published_once() {
    let mut shim = Shim::running().await;
    let (a, b) = (shim.task.clone(), shim.task.clone());
    let wait = |task: TaskService| async move {
        let request = WaitRequest { id: "c".to_owned(), ..Default::default() };
        task.wait(&ctx(), request).await.unwrap()
    };
    let waiters = tokio::spawn(async move { tokio::join!(wait(a), wait(b)) });
    settle().await;
    shim.fake.exit(FIRST_PID, 42);
    let (a, b) = waiters.await.unwrap();
    assert_eq!((a.exit_status, b.exit_status), (42, 42));
    assert!(a.exited_at.seconds > 0);
    let state = shim.state("").await.unwrap();
    assert_eq!((state.status.unwrap(), state.exit_status), (Status::STOPPED, 42));
    assert_eq!(shim.topics(), ["create", "start", "exit"]);
    assert_eq!(code(shim.kill("", 15, false).await), Code::NOT_FOUND);
}

#[tokio::test]
async fn kill_passes_signal_and_all_on() {
    let shim = Shim::running().await;
    shim.kill("", 15, true).await.unwrap();
    shim.kill("", 1, false).await.unwrap();
    assert_eq!(shim.fake.calls(), ["signal 15 to init all=true", "signal 1 to init all=false"]);
    shim.kill("", 9, false).await.unwrap();
    assert_eq!(shim.wait("").await.unwrap(), 137);
}

#[tokio::test]
async fn delete_refuses_a_running_container_and_removes_an_ended_one() {
    let mut shim = Shim::running().await;
    assert_eq!(code(shim.delete("").await), Code::FAILED_PRECONDITION);
    shim.fake.exit(FIRST_PID, 3);
    shim.wait("").await.unwrap();
    shim.fake.calls();
    assert_eq!(shim.delete("").await.unwrap(), (FIRST_PID, 3));
    assert_eq!(shim.fake.calls(), ["delete"]);
    assert_eq!(code(shim.state("").await), Code::NOT_FOUND);
    assert_eq!(shim.topics(), ["create", "start", "exit", "delete"]);
}

#[tokio::test]
async fn a_failed_delete_can_be_tried_again() {
    let shim = Shim::running().await;
    shim.fake.exit(FIRST_PID, 0);
    shim.wait("").await.unwrap();
    shim.fake.fail_next("delete", RuntimeError::Failed("busy".to_owned()));
    assert!(message(shim.delete("").await).contains("busy"));
    assert_eq!(shim.status().await, Status::STOPPED);
    shim.delete("").await.unwrap();
}

#[tokio::test]
async fn an_exec_lives_its_own_life() {
    let mut shim = Shim::running().await;
    shim.exec("e").await.unwrap();
    assert_eq!(code(shim.exec("e").await), Code::ALREADY_EXISTS);
    assert_eq!(shim.state("e").await.unwrap().status.unwrap(), Status::CREATED);
    let pid = shim.start("e").await.unwrap();
    assert_eq!(pid, FIRST_PID + 1);
    assert_eq!(shim.fake.calls(), ["exec e {\"args\":[\"sh\"]} stdin=/fifo/in"]);
    assert_eq!(code(shim.start("e").await), Code::FAILED_PRECONDITION);
    assert_eq!(code(shim.delete("e").await), Code::FAILED_PRECONDITION);
    shim.kill("e", 15, false).await.unwrap();
    assert_eq!(shim.fake.calls(), ["signal 15 to e all=false"]);
    shim.fake.exit(pid, 7);
    assert_eq!(shim.wait("e").await.unwrap(), 7);
    assert_eq!(code(shim.kill("e", 15, false).await), Code::NOT_FOUND);
    assert_eq!(shim.delete("e").await.unwrap(), (pid, 7));
    assert_eq!(code(shim.state("e").await), Code::NOT_FOUND);
    assert_eq!(shim.topics(), ["create", "start", "exec-added", "exec-started", "exit"]);
}

#[tokio::test]
async fn an_exec_that_cannot_start_says_why_and_can_be_deleted() {
    let shim = Shim::running().await;
    shim.exec("e").await.unwrap();
    shim.fake.fail_next("exec", RuntimeError::Failed("no such file".to_owned()));
    assert!(message(shim.start("e").await).contains("no such file"));
    shim.delete("e").await.unwrap();
    assert_eq!(code(shim.start("unknown").await), Code::NOT_FOUND);
}

#[tokio::test]
async fn the_exit_of_the_container_is_reported_after_those_of_its_execs() {
    let mut shim = Shim::running().await;
    shim.exec("e").await.unwrap();
    let pid = shim.start("e").await.unwrap();
    shim.topics();
    shim.fake.exit(FIRST_PID, 1);
    settle().await;
    assert_eq!(shim.topics(), [""; 0]);
    assert_eq!(shim.status().await, Status::RUNNING);
    shim.fake.exit(pid, 137);
    assert_eq!(shim.wait("").await.unwrap(), 1);
    assert_eq!(shim.topics(), ["exit", "exit"]);
}

#[tokio::test]
async fn pids_stats_and_connect_tell_of_the_container() {
    let shim = Shim::running().await;
    let pids =
        shim.task.pids(&ctx(), PidsRequest { id: "c".to_owned(), ..Default::default() }).await.unwrap();
    assert_eq!(pids.processes.iter().map(|process| process.pid).collect::<Vec<_>>(), [FIRST_PID]);
    let stats =
        shim.task.stats(&ctx(), StatsRequest { id: "c".to_owned(), ..Default::default() }).await.unwrap();
    assert_eq!(stats.stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let request = ConnectRequest { id: "c".to_owned(), ..Default::default() };
    let connected = shim.task.connect(&ctx(), request).await.unwrap();
    assert_eq!((connected.task_pid, connected.shim_pid), (FIRST_PID, std::process::id()));
}

#[tokio::test]
async fn pause_freezes_and_resume_thaws() {
    let mut shim = Shim::running().await;
    assert_eq!(code(shim.resume().await), Code::FAILED_PRECONDITION);
    shim.pause().await.unwrap();
    assert_eq!(shim.status().await, Status::PAUSED);
    shim.exec("e").await.unwrap();
    assert!(message(shim.start("e").await).contains("resume the task first"));
    shim.resume().await.unwrap();
    assert_eq!(shim.status().await, Status::RUNNING);
    assert_eq!(shim.fake.calls(), ["freeze", "thaw"]);
    assert_eq!(shim.topics(), ["create", "start", "paused", "exec-added", "resumed"]);
}

#[tokio::test]
async fn a_failed_pause_leaves_the_container_running() {
    let mut shim = Shim::running().await;
    shim.fake.fail_next("freeze", RuntimeError::Failed("a task cannot be frozen".to_owned()));
    assert!(message(shim.pause().await).contains("cannot be frozen"));
    assert_eq!(shim.status().await, Status::RUNNING);
    assert_eq!(shim.fake.calls(), ["freeze", "thaw"]);
    assert_eq!(shim.topics(), ["create", "start"]);
}

#[tokio::test]
async fn a_paused_container_dies_of_sigkill_and_leaves_no_frozen_cgroup() {
    let shim = Shim::running().await;
    shim.pause().await.unwrap();
    shim.kill("", 9, true).await.unwrap();
    assert_eq!(shim.wait("").await.unwrap(), 137);
    assert_eq!(shim.fake.calls(), ["freeze", "signal 9 to init all=true", "thaw", "kill rest"]);
}

#[tokio::test]
async fn resize_and_close_io_reach_the_right_process() {
    let shim = Shim::running().await;
    let resize = |exec_id: &str, width| ResizePtyRequest {
        id: "c".to_owned(),
        exec_id: exec_id.to_owned(),
        width,
        height: 24,
        ..Default::default()
    };
    shim.task.resize_pty(&ctx(), resize("", 80)).await.unwrap();
    shim.task.resize_pty(&ctx(), resize("e", 100)).await.unwrap();
    assert_eq!(code(shim.task.resize_pty(&ctx(), resize("", 70_000)).await), Code::INVALID_ARGUMENT);
    let close = |stdin| CloseIORequest { id: "c".to_owned(), stdin, ..Default::default() };
    shim.task.close_io(&ctx(), close(false)).await.unwrap();
    shim.task.close_io(&ctx(), close(true)).await.unwrap();
    assert_eq!(shim.fake.calls(), ["resize init to 80x24", "resize e to 100x24", "close stdin of init"]);
}

#[tokio::test]
async fn update_passes_limits_on_and_refuses_what_is_none() {
    let shim = Shim::running().await;
    let update = |value: &[u8]| UpdateTaskRequest {
        id: "c".to_owned(),
        resources: MessageField::some(Any { value: value.to_vec(), ..Default::default() }),
        ..Default::default()
    };
    shim.task.update(&ctx(), update(b"{\"cpu\":{\"shares\":512}}")).await.unwrap();
    assert_eq!(shim.fake.calls(), ["update shares=Some(512) asleep=false"]);
    assert_eq!(code(shim.task.update(&ctx(), update(b"[")).await), Code::INVALID_ARGUMENT);
    let empty = UpdateTaskRequest { id: "c".to_owned(), ..Default::default() };
    assert_eq!(code(shim.task.update(&ctx(), empty).await), Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn checkpoint_reads_its_options_and_publishes() {
    let mut shim = Shim::running().await;
    let options = CheckpointOptions { image_path: "/images/c".to_owned(), exit: true, ..Default::default() };
    let request = CheckpointTaskRequest {
        id: "c".to_owned(),
        path: "/ignored".to_owned(),
        options: MessageField::some(Any {
            type_url: "containerd.runc.v1.CheckpointOptions".to_owned(),
            value: options.write_to_bytes().unwrap(),
            ..Default::default()
        }),
        ..Default::default()
    };
    shim.task.checkpoint(&ctx(), request).await.unwrap();
    assert_eq!(shim.fake.calls(), ["checkpoint /images/c exit=true", "thaw"]);
    assert_eq!(shim.topics(), ["create", "start", "checkpointed"]);
    let nowhere = CheckpointTaskRequest { id: "c".to_owned(), ..Default::default() };
    assert_eq!(code(shim.task.checkpoint(&ctx(), nowhere).await), Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn shutdown_waits_for_the_last_container() {
    let shim = Shim::running().await;
    let ctx = ctx();
    let shutdown = || {
        let request = ShutdownRequest { id: "c".to_owned(), ..Default::default() };
        shim.task.shutdown(&ctx, request)
    };
    shutdown().await.unwrap();
    let over = tokio::time::timeout(Duration::from_millis(20), shim.exit.wait()).await;
    assert!(over.is_err(), "the shim ended beneath a container");
    shim.fake.exit(FIRST_PID, 0);
    shim.wait("").await.unwrap();
    shim.delete("").await.unwrap();
    shutdown().await.unwrap();
    shim.exit.wait().await;
}

#[tokio::test]
async fn what_is_asked_of_an_exec_before_its_start_is_done_after_it() {
    let shim = Shim::running().await;
    shim.fake.fail_next("resize", RuntimeError::NotFound("no terminal yet".to_owned()));
    shim.exec("e").await.unwrap();
    let resize = ResizePtyRequest {
        id: "c".to_owned(),
        exec_id: "e".to_owned(),
        width: 80,
        height: 24,
        ..Default::default()
    };
    shim.task.resize_pty(&ctx(), resize).await.unwrap();
    shim.start("e").await.unwrap();
    let calls = shim.fake.calls();
    assert_eq!(calls.iter().filter(|call| *call == "resize e to 80x24").count(), 2, "{calls:?}");
    assert_eq!(calls.last().unwrap(), "resize e to 80x24");
}

#[tokio::test]
async fn a_delete_waits_for_a_create_and_a_shutdown_does_not_end_the_shim_in_its_middle() {
    let shim = Shim::new();
    shim.fake.hold("create");
    let (task, bundle) = (shim.task.clone(), shim.bundle.path().to_string_lossy().into_owned());
    let creating = tokio::spawn(async move {
        let request = CreateTaskRequest { id: "c".to_owned(), bundle, ..Default::default() };
        task.create(&ctx(), request).await.unwrap().pid
    });
    settle().await;
    assert_eq!(code(shim.create("c").await), Code::ALREADY_EXISTS);
    let request = ShutdownRequest { id: "c".to_owned(), ..Default::default() };
    shim.task.shutdown(&ctx(), request).await.unwrap();
    let over = tokio::time::timeout(Duration::from_millis(20), shim.exit.wait()).await;
    assert!(over.is_err(), "the shim ended beneath a container in the making");
    let task = shim.task.clone();
    let deleting = tokio::spawn(async move {
        let request = DeleteRequest { id: "c".to_owned(), ..Default::default() };
        task.delete(&ctx(), request).await.unwrap()
    });
    settle().await;
    assert!(!deleting.is_finished());
    shim.fake.release();
    assert_eq!(deleting.await.unwrap().pid, creating.await.unwrap());
    assert!(shim.containers.all().is_empty());
}

#[tokio::test]
async fn a_slow_end_of_an_execs_output_keeps_nobody_waiting() {
    let shim = Shim::running().await;
    shim.exec("e").await.unwrap();
    let pid = shim.start("e").await.unwrap();
    shim.fake.exit(pid, 0);
    shim.wait("e").await.unwrap();
    shim.fake.hold("delete exec");
    let task = shim.task.clone();
    let deleting = tokio::spawn(async move {
        let request = DeleteRequest { id: "c".to_owned(), exec_id: "e".to_owned(), ..Default::default() };
        task.delete(&ctx(), request).await.unwrap()
    });
    settle().await;
    shim.kill("", 15, false).await.unwrap();
    assert!(!deleting.is_finished());
    shim.fake.release();
    assert_eq!(deleting.await.unwrap().pid, pid);
}
