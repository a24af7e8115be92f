//! The program `agentcube`, run against shims that answer from a table: real sockets, real ttrpc.
#![allow(clippy::unwrap_used)]

use std::{
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use agentcube_control::{
    Container, Control, Depth, Failure, Kind, ListRequest, ListResponse, SleepRequest, SleepResponse, State,
    StatusRequest, StatusResponse, Transition, WakeRequest, WakeResponse, server, socket,
};
use async_trait::async_trait;
use tempfile::TempDir;
use ttrpc::r#async::{Server, TtrpcContext};

/// A shim whose containers sleep and wake at once; "stubborn" refuses, with a reason.
struct Shim {
    containers: Mutex<Vec<Container>>,
    depths: Arc<Mutex<Vec<Depth>>>,
    takes: Duration,
}

impl Shim {
    /// Changes the containers that `id` means: one, or all of a sandbox.
    fn change(
        &self,
        id: &str,
        mut change: impl FnMut(&mut Container) -> Option<Transition>,
    ) -> ttrpc::Result<Vec<Transition>> {
        let mut containers = self.containers.lock().unwrap();
        if !containers.iter().any(|container| container.id == id) {
            return Err(Failure::not_found(id).into());
        }
        let meant =
            containers.iter_mut().filter(|container| container.id == id || container.sandbox_id == id);
        Ok(meant.filter_map(&mut change).collect())
    }
}

#[async_trait]
impl Control for Shim {
    async fn sleep(&self, _: &TtrpcContext, request: SleepRequest) -> ttrpc::Result<SleepResponse> {
        tokio::time::sleep(self.takes).await;
        if request.id == "stubborn" {
            let reason =
                "stubborn uses io_uring (process 42), which cannot be checkpointed: use --depth frozen";
            return Err(Failure::new(Kind::FailedPrecondition, reason).into());
        }
        self.depths.lock().unwrap().push(request.depth.enum_value().unwrap());
        let transitions = self.change(&request.id, |container| {
            container.state = State::STATE_ASLEEP.into();
            container.depth = Depth::DEPTH_CHECKPOINTED.into();
            container.memory_bytes = 1 << 20;
            Some(Transition {
                id: container.id.clone(),
                depth: Depth::DEPTH_CHECKPOINTED.into(),
                total_us: 41_230,
                stopped_us: 38_000,
                image_bytes: 250 << 20,
                engine: "direct".to_owned(),
                at_unix_ms: 1,
                ..Transition::default()
            })
        })?;
        Ok(SleepResponse { transitions, ..SleepResponse::default() })
    }

    async fn wake(&self, _: &TtrpcContext, request: WakeRequest) -> ttrpc::Result<WakeResponse> {
        let transitions = self.change(&request.id, |container| {
            let asleep = container.state == State::STATE_ASLEEP.into();
            container.state = State::STATE_RUNNING.into();
            container.memory_bytes = 256 << 20;
            asleep.then(|| Transition {
                id: container.id.clone(),
                depth: Depth::DEPTH_CHECKPOINTED.into(),
                total_us: 30_500,
                ..Transition::default()
            })
        })?;
        Ok(WakeResponse { transitions, ..WakeResponse::default() })
    }

    async fn status(&self, _: &TtrpcContext, request: StatusRequest) -> ttrpc::Result<StatusResponse> {
        let containers = self.containers.lock().unwrap();
        let container = containers.iter().find(|container| container.id == request.id);
        let container = container.ok_or_else(|| Failure::not_found(&request.id))?.clone();
        Ok(StatusResponse { container: Some(container).into(), ..StatusResponse::default() })
    }

    async fn list(&self, _: &TtrpcContext, _: ListRequest) -> ttrpc::Result<ListResponse> {
        Ok(ListResponse { containers: self.containers.lock().unwrap().clone(), ..ListResponse::default() })
    }
}

fn container(namespace: &str, sandbox: &str, id: &str) -> Container {
    Container {
        id: id.to_owned(),
        namespace: namespace.to_owned(),
        sandbox_id: sandbox.to_owned(),
        is_sandbox: sandbox == id,
        state: State::STATE_RUNNING.into(),
        pid: 42,
        memory_bytes: 256 << 20,
        memory_source: "pss".to_owned(),
        ..Container::default()
    }
}

/// A node's sockets, and the runtime that serves them while the program runs.
struct Node {
    root: TempDir,
    runtime: tokio::runtime::Runtime,
    servers: Vec<Server>,
    depths: Arc<Mutex<Vec<Depth>>>,
}

impl Node {
    fn new() -> Node {
        Node {
            root: tempfile::tempdir().unwrap(),
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
            servers: Vec::new(),
            depths: Arc::default(),
        }
    }

    fn shim(self, containers: Vec<Container>) -> Node {
        self.slow_shim(containers, Duration::ZERO)
    }

    fn slow_shim(mut self, containers: Vec<Container>, takes: Duration) -> Node {
        let listener = socket::listen(self.root.path(), &containers[0].namespace, &containers[0].id).unwrap();
        let shim = Shim { containers: Mutex::new(containers), depths: Arc::clone(&self.depths), takes };
        self.servers.push(self.runtime.block_on(server::serve(listener, Arc::new(shim))).unwrap());
        self
    }

    fn run(&self, args: &[&str]) -> Ran {
        let root = self.root.path();
        self.beside(|| run(root, args))
    }

    /// Serves the sockets while `work` goes on in another thread.
    fn beside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let (done, wait) = tokio::sync::oneshot::channel();
            let thread = scope.spawn(move || {
                let result = work();
                let _ = done.send(());
                result
            });
            // An error means that `work` panicked, which joining tells.
            let _ = self.runtime.block_on(wait);
            thread.join().unwrap()
        })
    }
}

struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl Ran {
    fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {}", self.out))
    }
}

fn run(root: &Path, args: &[&str]) -> Ran {
    let output = Command::new(env!("CARGO_BIN_EXE_agentcube"))
        .args(args)
        .env("AGENTCUBE_SOCKET_ROOT", root)
        .output()
        .unwrap();
    Ran {
        code: output.status.code().unwrap(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

#[test]
fn ps_lists_all_shims_and_one_namespace_when_told() {
    let node = Node::new()
        .shim(vec![container("k8s.io", "pod", "pod"), container("k8s.io", "pod", "agent")])
        .shim(vec![container("default", "", "solo")]);
    let ran = node.run(&["ps"]);
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    let ids: Vec<_> = ran.out.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(ids, ["CONTAINER", "solo", "pod", "agent"]);

    let json = node.run(&["ps", "-n", "default", "--json"]).json();
    assert_eq!(json["containers"].as_array().unwrap().len(), 1);
    let solo = &json["containers"][0];
    assert_eq!((&solo["id"], &solo["state"], &solo["pid"]), (&"solo".into(), &"running".into(), &42.into()));
    assert_eq!((&solo["depth"], &solo["sandbox_id"]), (&serde_json::Value::Null, &serde_json::Value::Null));
    assert_eq!(json["unreachable"], serde_json::json!([]));
}

#[test]
fn ps_shows_dead_and_hanging_shims_and_neither_fails_nor_hangs() {
    let node = Node::new().shim(vec![container("default", "", "alive")]);
    drop(socket::listen(node.root.path(), "default", "dead").unwrap());
    let _hanging = socket::listen(node.root.path(), "default", "hanging").unwrap();
    let start = Instant::now();
    let ran = node.run(&["ps"]);
    assert!(start.elapsed() < Duration::from_secs(6), "took {:?}", start.elapsed());
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    let lines: Vec<&str> = ran.out.lines().collect();
    assert_eq!(lines.len(), 4, "{}", ran.out);
    assert!(lines[1].starts_with("alive") && lines[1].contains("Running"));
    assert!(
        lines[2].starts_with("dead")
            && lines[2].contains("Unreachable")
            && lines[2].contains("no shim listens")
    );
    assert!(lines[3].starts_with("hanging") && lines[3].contains("Unreachable"));

    let json = node.run(&["ps", "--json"]).json();
    let kinds = json["unreachable"].as_array().unwrap().iter().map(|shim| shim["error"]["kind"].clone());
    assert_eq!(kinds.collect::<Vec<_>>(), ["unavailable", "timeout"]);
}

#[test]
fn a_node_without_sockets_has_an_empty_list() {
    let tmp = tempfile::tempdir().unwrap();
    let ran = run(&tmp.path().join("agentcube"), &["ps"]);
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    assert!(ran.out.starts_with("No containers."), "{}", ran.out);
}

#[test]
fn sleep_and_wake_tell_what_happened() {
    let node = Node::new().shim(vec![container("default", "", "agent")]);
    let slept = node.run(&["sleep", "age"]);
    assert_eq!((slept.code, slept.err.as_str()), (0, ""));
    assert_eq!(
        slept.out,
        "agent: asleep (checkpointed) in 41.2 ms, stood still for 38.0 ms; freed 255.0 MiB; image 250.0 MiB\n"
    );
    let woke = node.run(&["wake", "agent"]);
    assert_eq!(woke.out, "agent: awake in 30.5 ms (was checkpointed); holds 256.0 MiB\n");
    let again = node.run(&["wake", "agent"]);
    assert_eq!((again.code, again.out.as_str()), (0, "agent: was awake already\n"));
}

#[test]
fn the_depth_reaches_the_shim() {
    let node = Node::new().shim(vec![container("default", "", "agent")]);
    for args in [
        &["sleep", "agent"][..],
        &["sleep", "agent", "--depth", "frozen"],
        &["sleep", "agent", "--depth=reclaimed"],
        &["sleep", "agent", "--depth", "checkpointed"],
    ] {
        assert_eq!(node.run(args).code, 0);
    }
    assert_eq!(
        *node.depths.lock().unwrap(),
        [Depth::DEPTH_UNSPECIFIED, Depth::DEPTH_FROZEN, Depth::DEPTH_RECLAIMED, Depth::DEPTH_CHECKPOINTED]
    );
}

#[test]
fn a_sandbox_sleeps_as_one() {
    let node = Node::new().shim(vec![container("k8s.io", "pod", "pod"), container("k8s.io", "pod", "agent")]);
    let json = node.run(&["sleep", "pod", "--json"]).json();
    let slept = json["results"][0]["ok"]["slept"].as_array().unwrap();
    assert_eq!(slept.len(), 2);
    assert_eq!(slept[1]["id"], "agent");
    assert_eq!(slept[1]["memory_before_bytes"], 256 << 20);
    assert_eq!(slept[1]["memory_after_bytes"], 1 << 20);
}

#[test]
fn several_containers_sleep_at_the_same_time_and_each_once() {
    let takes = Duration::from_millis(1500);
    let node = ["a", "b", "c", "d"]
        .into_iter()
        .fold(Node::new(), |node, id| node.slow_shim(vec![container("default", "", id)], takes));
    let start = Instant::now();
    let ran = node.run(&["sleep", "d", "c", "b", "a", "d"]);
    assert!(start.elapsed() < 2 * takes, "took {:?}", start.elapsed());
    assert_eq!(ran.code, 0, "{}", ran.err);
    let order: Vec<_> = ran.out.lines().map(|line| line.split(':').next().unwrap()).collect();
    assert_eq!(order, ["d", "c", "b", "a"], "in the order of the command line");
    assert_eq!(node.depths.lock().unwrap().len(), 4);
}

#[test]
fn one_failure_does_not_stop_the_others_and_says_what_to_do() {
    let node = Node::new()
        .shim(vec![container("default", "", "stubborn")])
        .shim(vec![container("default", "", "agent")]);
    let ran = node.run(&["sleep", "stubborn", "agent", "nobody"]);
    assert_eq!(ran.code, 1);
    assert!(ran.out.starts_with("agent: asleep"), "{}", ran.out);
    assert_eq!(
        ran.err,
        "agentcube: cannot put stubborn to sleep: stubborn uses io_uring (process 42), which cannot be checkpointed: \
         use --depth frozen\n\
         agentcube: cannot put nobody to sleep: no container or sandbox \"nobody\": `agentcube ps` lists them\n"
    );
    let json = node.run(&["sleep", "stubborn", "--json"]).json();
    assert_eq!(json["results"][0]["error"]["kind"], "failed-precondition");
    assert_eq!(json["results"][0]["id"], "stubborn");
}

#[test]
fn ids_that_mean_nothing_or_too_much_are_told_apart() {
    let node = Node::new()
        .shim(vec![container("default", "", "abc")])
        .shim(vec![container("default", "", "abd")])
        .shim(vec![container("k8s.io", "", "abc")]);
    let unknown = node.run(&["inspect", "nobody"]);
    assert_eq!((unknown.code, unknown.out.as_str()), (3, ""));
    let both = node.run(&["wake", "abc"]);
    assert_eq!(both.code, 1);
    assert!(
        both.err.contains("exists in the namespaces default, k8s.io: choose one with -n"),
        "{}",
        both.err
    );
    let start = node.run(&["wake", "ab", "-n", "default"]);
    assert!(start.err.contains("default/abc, default/abd; give more of it"), "{}", start.err);
    assert_eq!(node.run(&["wake", "abc", "-n", "k8s.io"]).code, 0);
}

#[test]
fn a_sleep_on_a_dead_shim_says_so() {
    let node = Node::new();
    drop(socket::listen(node.root.path(), "default", "dead").unwrap());
    let ran = node.run(&["sleep", "dead"]);
    assert_eq!(ran.code, 1);
    assert!(ran.err.starts_with("agentcube: cannot put dead to sleep: no shim listens on /"), "{}", ran.err);
}

#[test]
fn patience_ends_when_told() {
    let node = Node::new().slow_shim(vec![container("default", "", "agent")], Duration::from_mins(1));
    let start = Instant::now();
    let ran = node.run(&["sleep", "agent", "--timeout", "1"]);
    assert!(start.elapsed() < Duration::from_secs(10));
    assert_eq!(ran.code, 1);
    assert!(ran.err.contains("did not answer Sleep within 1.0 s"), "{}", ran.err);
}

#[test]
fn inspect_tells_all() {
    let node = Node::new().shim(vec![container("default", "", "agent")]);
    let ran = node.run(&["inspect", "agent"]);
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    assert!(
        ran.out.starts_with("Container:   agent\nNamespace:   default\nState:       Running"),
        "{}",
        ran.out
    );
    let json = node.run(&["inspect", "agent", "--json"]).json();
    let socket = json["results"][0]["ok"]["container"]["socket"].as_str().unwrap();
    assert_eq!(Path::new(socket), node.root.path().join("default/agent.sock"));
}

#[test]
fn wrong_usage_is_exit_code_2_on_stderr() {
    let ran = run(Path::new("/nonexistent"), &["sleep"]);
    assert_eq!((ran.code, ran.out.as_str()), (2, ""));
    assert!(ran.err.contains("Usage: agentcube sleep"), "{}", ran.err);
    let bad = run(Path::new("/nonexistent"), &["ps", "-n", "../x"]);
    assert_eq!(bad.code, 1);
    assert!(bad.err.contains("is no containerd identifier"), "{}", bad.err);
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let node = Node::new().shim(vec![container("default", "", "agent")]);
    let root = node.root.path();
    let output = node.beside(|| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_agentcube"))
            .arg("ps")
            .env("AGENTCUBE_SOCKET_ROOT", root)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        child.wait_with_output().unwrap()
    });
    assert_eq!((output.status.code(), String::from_utf8(output.stderr).unwrap().as_str()), (Some(0), ""));
}
