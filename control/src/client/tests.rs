#![allow(clippy::unwrap_used)]

use std::{
    os::unix::net::UnixListener,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use async_trait::async_trait;
use tokio::sync::Notify;
use ttrpc::r#async::{Server, TtrpcContext};

use super::*;
use crate::{
    proto::{
        control::{ListResponse, SleepResponse, State, StatusResponse, WakeResponse},
        control_ttrpc::Control,
    },
    server, socket,
};

/// A shim with one container, "agent", whose sleeps wait until they are let through.
#[derive(Default)]
struct Shim {
    let_sleep: Notify,
    asked_depth: std::sync::Mutex<Option<Depth>>,
    handler_dropped: Arc<AtomicBool>,
}

struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn agent() -> Container {
    Container {
        id: "agent".to_owned(),
        namespace: "default".to_owned(),
        state: State::STATE_RUNNING.into(),
        pid: 42,
        ..Container::default()
    }
}

#[async_trait]
impl Control for Shim {
    async fn sleep(&self, _: &TtrpcContext, request: SleepRequest) -> ttrpc::Result<SleepResponse> {
        let _dropped = SetOnDrop(Arc::clone(&self.handler_dropped));
        match request.id.as_str() {
            "agent" => (),
            "stopped" => return Err(Failure::new(Kind::FailedPrecondition, "it has stopped").into()),
            "full" => return Err(Failure::new(Kind::ResourceExhausted, "the disk is full").into()),
            other => return Err(Failure::not_found(other).into()),
        }
        *self.asked_depth.lock().unwrap() = Some(request.depth.enum_value().unwrap());
        self.let_sleep.notified().await;
        let transition = Transition {
            id: request.id,
            depth: Depth::DEPTH_CHECKPOINTED.into(),
            total_us: 41_000,
            ..Transition::default()
        };
        Ok(SleepResponse { transitions: vec![transition], ..SleepResponse::default() })
    }

    async fn wake(&self, _: &TtrpcContext, _: WakeRequest) -> ttrpc::Result<WakeResponse> {
        Ok(WakeResponse::default())
    }

    async fn status(&self, _: &TtrpcContext, request: StatusRequest) -> ttrpc::Result<StatusResponse> {
        if request.id == "empty" {
            return Ok(StatusResponse::default());
        }
        Ok(StatusResponse { container: Some(agent()).into(), ..StatusResponse::default() })
    }

    async fn list(&self, _: &TtrpcContext, _: ListRequest) -> ttrpc::Result<ListResponse> {
        Ok(ListResponse { containers: vec![agent()], ..ListResponse::default() })
    }
}

struct Node {
    shim: Arc<Shim>,
    server: Server,
    client: Client,
    _tmp: tempfile::TempDir,
}

async fn node() -> Node {
    let tmp = tempfile::tempdir().unwrap();
    let shim = Arc::new(Shim::default());
    let listener = socket::listen(tmp.path(), "default", "agent").unwrap();
    let control: Arc<dyn Control + Send + Sync> = shim.clone();
    let server = server::serve(listener, control).await.unwrap();
    let path = socket::path(tmp.path(), "default", "agent").unwrap();
    let client = Client::connect(&format!("unix://{}", path.display())).await.unwrap();
    Node { shim, server, client, _tmp: tmp }
}

#[tokio::test]
async fn calls_bring_what_the_shim_answers() {
    let node = node().await;
    node.shim.let_sleep.notify_one();
    let transitions = node.client.sleep("agent", Depth::DEPTH_RECLAIMED).await.unwrap();
    assert_eq!(transitions.len(), 1);
    assert_eq!(transitions[0].total_us, 41_000);
    assert_eq!(*node.shim.asked_depth.lock().unwrap(), Some(Depth::DEPTH_RECLAIMED));
    assert_eq!(node.client.wake("agent").await.unwrap(), []);
    assert_eq!(node.client.status("agent").await.unwrap(), agent());
    assert_eq!(node.client.list().await.unwrap(), [agent()]);
}

#[tokio::test]
async fn refusals_are_typed_and_carry_the_shim_s_words() {
    let node = node().await;
    let sleep = async |id| node.client.sleep(id, Depth::DEPTH_UNSPECIFIED).await.unwrap_err();
    assert!(matches!(sleep("nobody").await, ClientError::NotFound { id } if id == "nobody"));
    assert!(matches!(
        sleep("stopped").await,
        ClientError::FailedPrecondition { id, reason } if id == "stopped" && reason == "it has stopped"
    ));
    let full = sleep("full").await;
    assert_eq!((full.name(), full.to_string().as_str()), ("resource-exhausted", "the disk is full"));
}

#[tokio::test]
async fn a_status_without_a_container_is_an_error() {
    let error = node().await.client.status("empty").await.unwrap_err();
    assert!(error.to_string().ends_with("sent an empty status"), "{error}");
}

#[tokio::test]
async fn status_and_list_answer_while_a_sleep_is_in_progress() {
    let node = node().await;
    let sleep = node.client.sleep("agent", Depth::DEPTH_UNSPECIFIED);
    let look = async {
        node.client.status("agent").await.unwrap();
        node.client.list().await.unwrap();
        node.shim.let_sleep.notify_one();
    };
    let (sleep, ()) = tokio::join!(sleep, look);
    sleep.unwrap();
}

#[tokio::test]
async fn a_sleep_that_takes_too_long_is_a_timeout() {
    let node = node().await;
    let client =
        node.client.with_timeouts(Timeouts { transition: Duration::from_millis(50), ..Timeouts::default() });
    let error = client.sleep("agent", Depth::DEPTH_UNSPECIFIED).await.unwrap_err();
    assert_eq!(error.name(), "timeout");
    assert!(error.to_string().contains("did not answer Sleep within 0.1 s"), "{error}");
    client.status("agent").await.unwrap();
}

#[tokio::test]
async fn a_shim_that_goes_away_during_a_call_is_lost() {
    let mut node = node().await;
    let sleep = node.client.sleep("agent", Depth::DEPTH_UNSPECIFIED);
    let stop = async {
        node.client.status("agent").await.unwrap();
        node.server.shutdown().await.unwrap();
    };
    let (sleep, ()) = tokio::join!(sleep, stop);
    let error = sleep.unwrap_err();
    assert!(matches!(error, ClientError::Lost { call: "Sleep", .. }), "{error}");
}

#[tokio::test]
async fn the_server_drops_the_handler_of_a_client_that_left() {
    let node = node().await;
    let dropped = Arc::clone(&node.shim.handler_dropped);
    let Node { shim, client, server: _server, .. } = node;
    let sleep = tokio::spawn(async move { client.sleep("agent", Depth::DEPTH_UNSPECIFIED).await });
    while shim.asked_depth.lock().unwrap().is_none() {
        tokio::task::yield_now().await;
    }
    sleep.abort();
    let deadline = Instant::now() + Duration::from_secs(5);
    while !dropped.load(Ordering::SeqCst) {
        assert!(Instant::now() < deadline, "the handler lives on: rustdoc of server::serve is wrong");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_socket_without_a_shim_is_unavailable() {
    let tmp = tempfile::tempdir().unwrap();
    drop(socket::listen(tmp.path(), "default", "gone").unwrap());
    let path = socket::path(tmp.path(), "default", "gone").unwrap();
    for path in [path, tmp.path().join("never")] {
        let error = Client::connect_path(&path, Timeouts::default()).await.err().unwrap();
        assert!(matches!(error, ClientError::Unavailable { .. }), "{error}");
        assert!(error.to_string().starts_with("no shim listens on /"), "{error}");
    }
}

#[tokio::test]
async fn a_shim_that_accepts_nothing_costs_a_timeout_and_a_full_queue_costs_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("hanging.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let timeouts = Timeouts { query: Duration::from_millis(100), ..Timeouts::default() };
    let client = Client::connect_path(&path, timeouts).await.unwrap();
    assert_eq!(client.list().await.unwrap_err().name(), "timeout");

    let mut waiting = Vec::new();
    let full = loop {
        match Client::connect_path(&path, timeouts).await {
            Ok(client) => waiting.push(client),
            Err(error) => break error,
        }
        assert!(waiting.len() < 10_000, "the queue never filled up");
    };
    assert!(full.to_string().contains("its queue is full"), "{full}");
}

#[tokio::test]
async fn only_path_sockets_are_connected_to() {
    for bad in ["/run/a.sock", "unix://@abstract", "unix://relative", "tcp://127.0.0.1:80", ""] {
        let error = Client::connect(bad).await.err().unwrap();
        assert!(matches!(error, ClientError::InvalidAddress(_)), "{bad}");
    }
}
