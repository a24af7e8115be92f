//! What the tests of sleeping agents share: the command line on the node, and what an agent remembers.

// Each test file uses a part of it.
#![allow(dead_code)]

use std::path::PathBuf;
use std::time::Duration;

use agentcube_control::{Client, Timeouts};
use agentcube_tests::images::Image;
use agentcube_tests::node::{Agent, AgentSpec, Net, Node, NodeOptions, Output, Runtime};
use serde_json::Value;

/// How long anything may take that is no measurement: the machine may be busy.
pub const SOON: Duration = Duration::from_secs(30);

/// A node with these options for the shim beside those that it needs.
pub fn start_with(shim_toml: &str) -> Node {
    let mut options = NodeOptions::default();
    options.shim_toml.push_str(shim_toml);
    Node::start(options).unwrap()
}

/// A node.
pub fn start() -> Node {
    start_with("")
}

/// An agent in Python with a network of its own, as in a pod.
pub fn python(id: &str) -> AgentSpec {
    spec(Image::Python, id)
}

/// An agent with a network of its own, without limits that this node may not have.
pub fn spec(image: Image, id: &str) -> AgentSpec {
    AgentSpec::new(image, id, Runtime::Agentcube).net(Net::Pod).flag("--cpu-shares").flag("0")
}

/// The same agent, with the shim's options in another file of the node.
pub fn configured(spec: AgentSpec, path: &str) -> AgentSpec {
    // The last of several counts.
    spec.flag("--runtime-config-path").flag(path)
}

/// Starts an agent and tells it something to remember.
pub fn run<'node>(node: &'node Node, spec: &AgentSpec) -> Remembering<'node> {
    let agent = node.run_agent(spec).unwrap();
    agent.wait_healthy().unwrap();
    agent.chat(&format!("my name is {}", spec.id)).unwrap();
    let (turn, digest) = (agent.turn().unwrap(), agent.digest().unwrap());
    Remembering { agent, node, turn, digest }
}

/// Starts a program and waits until it says that it is ready.
pub fn run_ready<'node>(node: &'node Node, spec: &AgentSpec) -> Agent<'node> {
    let agent = node.run_agent(spec).unwrap();
    says(node, &agent, "ready");
    agent
}

/// Waits until a word stands in what an agent has printed.
pub fn says(node: &Node, agent: &Agent, word: &str) {
    let said =
        node.wait_until(&format!("{} to say {word:?}", agent.id()), SOON, || Ok(agent.log()?.contains(word)));
    said.unwrap_or_else(|error| panic!("{error}: {:?}", agent.log()));
}

/// An agent, and what it knew when it was last looked at.
pub struct Remembering<'node> {
    pub agent: Agent<'node>,
    pub node: &'node Node,
    turn: u64,
    digest: String,
}

impl Remembering<'_> {
    pub fn id(&self) -> &str {
        self.agent.id()
    }

    /// The agent answers, knows all that it knew, and learns.
    pub fn assert_whole(&mut self) {
        assert_eq!(self.agent.digest().unwrap(), self.digest, "{} has another memory", self.id());
        assert_eq!(self.agent.turn().unwrap(), self.turn);
        assert_eq!(self.agent.chat("and now?").unwrap().turn, self.turn + 1);
        self.turn += 1;
        self.digest = self.agent.digest().unwrap();
    }

    pub fn sleep(&self) -> Output {
        agentcube(self.node, &["sleep", self.id()])
    }

    pub fn wake(&self) -> Output {
        agentcube(self.node, &["wake", self.id()])
    }

    pub fn sleeps(&self) {
        self.sleep().check().unwrap();
        self.assert_state("asleep");
    }

    pub fn wakes(&mut self) {
        self.wake().check().unwrap();
        self.assert_state("running");
        self.assert_whole();
    }

    /// What `agentcube inspect` says.
    pub fn inspect(&self) -> Value {
        inspect(self.node, self.id())
    }

    pub fn state(&self) -> String {
        text(&self.inspect(), "state")
    }

    pub fn assert_state(&self, state: &str) {
        let now = self.inspect();
        assert_eq!(now["state"], state, "{now:#}");
    }

    /// Why the last sleep or wake failed; empty after a success.
    pub fn last_error(&self) -> String {
        text(&self.inspect(), "last_error")
    }

    /// The pid of its shim on the node.
    pub fn shim_pid(&self) -> u64 {
        self.inspect()["shim_pid"].as_u64().unwrap()
    }

    /// The folder of its image, as this test sees it.
    pub fn image(&self) -> PathBuf {
        let folder = text(&self.inspect(), "image_dir");
        assert!(!folder.is_empty(), "{} has no image", self.id());
        on_node(self.node, &folder)
    }

    /// containerd has the task, running.
    pub fn assert_running_for_containerd(&self) {
        let (_, state) = self.agent.task().unwrap().expect("containerd has lost the task");
        assert_eq!(state, "RUNNING");
    }
}

fn text(container: &Value, field: &str) -> String {
    container[field].as_str().unwrap_or_default().to_owned()
}

/// A path of the node as this test sees it. A link on the way would be followed on this machine, out of the node, so
/// there must be none.
pub fn on_node(node: &Node, path: &str) -> PathBuf {
    let mut outside = PathBuf::from(format!("/proc/{}/root", node.entrance().init));
    for name in path.split('/').filter(|name| !name.is_empty()) {
        outside.push(name);
        let is_link = std::fs::symlink_metadata(&outside).is_ok_and(|found| found.is_symlink());
        assert!(!is_link, "{path} of the node leads over a link, out of the node");
    }
    outside
}

/// The command line of the project on the node.
pub fn agentcube(node: &Node, words: &[&str]) -> Output {
    let line: Vec<&str> = std::iter::once("agentcube").chain(words.iter().copied()).collect();
    node.command(line).run().unwrap()
}

/// What `agentcube inspect` says of a container.
pub fn inspect(node: &Node, id: &str) -> Value {
    let answer = agentcube(node, &["inspect", "--json", id]).check().unwrap();
    let mut answer: Value = serde_json::from_str(&answer).unwrap();
    answer["results"][0]["ok"]["container"].take()
}

/// Asserts that a command failed and says all of these, in any case.
pub fn assert_refused(output: &Output, words: &[&str]) {
    assert_ne!(output.status, 0, "{} succeeded: {}", output.command, output.stdout);
    assert_says(&format!("{}{}", output.stdout, output.stderr), words);
}

/// Asserts that a text holds all of these, in any case.
pub fn assert_says(text: &str, words: &[&str]) {
    let lower = text.to_lowercase();
    for word in words {
        assert!(lower.contains(&word.to_lowercase()), "{word:?} is not in {text:?}");
    }
}

/// A connection to the shim of an agent in containerd's namespace `default`.
pub async fn client(node: &Node, id: &str) -> Client {
    let socket = on_node(node, &format!("/run/agentcube/default/{id}.sock"));
    Client::connect_path(&socket, Timeouts::default()).await.unwrap()
}

/// Lets a future of the client run here.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}
