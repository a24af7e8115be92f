//! Sleep and wake with the command line that users have, and what the tests ask about them.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]
#![allow(dead_code, reason = "each test file uses what it needs")]

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use agentcube_tests::images::Image;
use agentcube_tests::node::{Agent, AgentSpec, Node, NodeOptions, Runtime};
use agentcube_tests::patience::scaled;
use containerd_shim::protos::api::UpdateTaskRequest;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::{shim_async::TaskClient, ttrpc};
use serde_json::Value;

/// For what takes a moment, on a machine that is busy with other things.
pub const SOON: Duration = Duration::from_secs(30);

pub fn start() -> Node {
    Node::start(NodeOptions::default()).unwrap()
}

/// An agent for this project's shim.
pub fn agent(image: Image, id: &str) -> AgentSpec {
    AgentSpec::new(image, id, Runtime::Agentcube).flag("--cpu-shares=0")
}

/// A shell script in a container of its own.
pub fn script(id: &str, runtime: Runtime, text: &str) -> AgentSpec {
    AgentSpec::new(Image::Counter, id, runtime).flag("--cpu-shares=0").args(&["/bin/sh", "-c", text])
}

/// What `agentcube` says of one agent: the `ok` of its answer, or the message of its error.
pub fn agentcube(node: &Node, agent: &Agent, words: &[&str]) -> Result<Value, String> {
    let begun = Instant::now();
    loop {
        match ask(node, agent, words) {
            // Asked what there is, which changes nothing, a shim has 2 s: on a busy machine that is emulated it may need more.
            Err(error) if error.contains("did not answer List") && begun.elapsed() < scaled(SOON) => {}
            said => return said,
        }
    }
}

fn ask(node: &Node, agent: &Agent, words: &[&str]) -> Result<Value, String> {
    let mut line = vec!["agentcube", "--json", "--namespace", &agent.spec().namespace];
    line.extend(words);
    line.push(agent.id());
    let output = node.exec(&line).unwrap();
    let Ok(mut answer) = serde_json::from_str::<Value>(&output.stdout) else { panic!("{output:?}") };
    match answer["results"][0].take() {
        Value::Object(result) if result.contains_key("ok") => {
            assert_eq!(output.status, 0, "{result:?}");
            Ok(result["ok"].clone())
        }
        result => {
            assert_ne!(output.status, 0, "{result:?}");
            Err(result["error"]["message"].as_str().unwrap_or_else(|| panic!("{result}")).to_owned())
        }
    }
}

/// Puts an agent to sleep that must be able to.
pub fn sleep_at(node: &Node, agent: &Agent, depth: &str) {
    let slept = agentcube(node, agent, &["sleep", "--depth", depth]).unwrap();
    assert_eq!(slept["slept"][0]["depth"], depth, "{slept}");
}

/// Puts an agent to sleep as deep as possible, and sees to it that it is.
pub fn sleep(node: &Node, agent: &Agent) {
    sleep_at(node, agent, "checkpointed");
    assert_asleep(node, agent);
}

/// Puts an agent to sleep with its processes in place, as soon as it has done with what its clients asked for last, and with
/// a wait that was interrupted before.
pub fn sleep_in_place(node: &Node, agent: &Agent, depth: &str) {
    let asleep = || match agentcube(node, agent, &["sleep", "--depth", depth]) {
        Err(reason) if reason.contains("at work") || reason.contains("interrupted") => Ok(false),
        other => Ok(other.map(|_| true).unwrap()),
    };
    node.wait_until(&format!("{} to sleep {depth}", agent.id()), SOON, asleep).unwrap();
}

/// Wakes an agent.
pub fn wake(node: &Node, agent: &Agent) {
    let woke = agentcube(node, agent, &["wake"]).unwrap();
    assert_eq!(woke["woke"].as_array().map(Vec::len), Some(1), "{woke}");
}

/// One sleep and one wake.
pub fn cycle(node: &Node, agent: &Agent) {
    sleep(node, agent);
    wake(node, agent);
}

/// All that the shim tells of an agent.
pub fn inspect(node: &Node, agent: &Agent) -> Value {
    agentcube(node, agent, &["inspect"]).unwrap()["container"].take()
}

/// Sees to it that an agent is checkpointed: by what the shim says, and by its processes.
pub fn assert_asleep(node: &Node, agent: &Agent) {
    let told = inspect(node, agent);
    assert_eq!((told["state"].as_str(), told["depth"].as_str()), (Some("asleep"), Some("checkpointed")));
    assert_eq!(host_pids(node, agent), Vec::<u32>::new());
}

/// How often it has woken.
pub fn wakes(node: &Node, agent: &Agent) -> u64 {
    inspect(node, agent)["wakes"].as_u64().unwrap()
}

/// The agent's cgroup on the host.
pub fn cgroup(node: &Node, agent: &Agent) -> PathBuf {
    node.cgroup(&format!("/{}/{}", agent.spec().namespace, agent.id()))
}

/// The agent's processes, by their pids on the host.
pub fn host_pids(node: &Node, agent: &Agent) -> Vec<u32> {
    let text = fs::read_to_string(cgroup(node, agent).join("cgroup.procs")).unwrap();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

/// The pid that containerd has for a task that it takes for running.
pub fn running(agent: &Agent) -> u32 {
    let (pid, state) = agent.task().unwrap().unwrap();
    assert_eq!(state, "RUNNING");
    pid
}

/// The whole lines of a counter's output. Sees to it that they count from 1, leaving out and repeating nothing.
pub fn counted(output: &str) -> usize {
    let whole = output.rfind('\n').map_or("", |end| &output[..end]);
    let mut last = 0;
    for (number, line) in (1..).zip(whole.lines()) {
        let line = line.trim_end_matches('\r');
        assert_eq!(line.parse(), Ok(number), "after {last}: {:?}", around(output, last));
        last = number;
    }
    last
}

/// The lines about number `at`, which a failing test shows.
fn around(output: &str, at: usize) -> Vec<&str> {
    output.lines().skip(at.saturating_sub(3)).take(8).collect()
}

/// Waits until a detached counter has counted on by `more` lines; gives back how far it is.
pub fn counts_on(node: &Node, agent: &Agent, more: usize) -> usize {
    let before = counted(&agent.log().unwrap());
    node.wait_until("the counter to go on", SOON, || Ok(agent.log()?.lines().count() > before + more))
        .unwrap();
    counted(&agent.log().unwrap())
}

/// Calls the Task API of an agent's shim, past containerd: for what `ctr` has no command for, or checks by itself.
pub fn shim<T, F>(node: &Node, agent: &Agent, call: impl FnOnce(TaskClient) -> F) -> Result<T, ttrpc::Error>
where
    F: Future<Output = Result<T, ttrpc::Error>>,
{
    // Where containerd has all bundles, whichever shim they belong to.
    let (namespace, id) = (&agent.spec().namespace, agent.id());
    let bootstrap = format!("/run/containerd/io.containerd.runtime.v2.task/{namespace}/{id}/bootstrap.json");
    let text = node.read_file(&bootstrap).unwrap();
    let bootstrap: Value = serde_json::from_str(&text).unwrap();
    let path = bootstrap["address"].as_str().unwrap().strip_prefix("unix://").unwrap();
    let address = format!("unix:///proc/{}/root{path}", node.entrance().init);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let client = ttrpc::asynchronous::Client::connect(&address).await.unwrap();
        call(TaskClient::new(client)).await
    })
}

/// How long a call of [`shim`] may take.
pub fn patience() -> ttrpc::context::Context {
    ttrpc::context::with_duration(scaled(SOON))
}

/// Changes limits as containerd does, for `ctr` has no command for it.
pub fn update(node: &Node, agent: &Agent, resources: &Value) -> Result<(), ttrpc::Error> {
    let resources = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
        value: resources.to_string().into_bytes(),
        ..Any::default()
    };
    let request =
        UpdateTaskRequest { id: agent.id().into(), resources: Some(resources).into(), ..Default::default() };
    shim(node, agent, async |task| task.update(patience(), &request).await).map(drop)
}
