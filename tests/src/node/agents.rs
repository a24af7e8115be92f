//! Agents in containers on a node, started with `ctr`.

use std::fmt;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use serde::Deserialize;

use super::Node;
use super::containerd::SHIM_TOML;
use super::error::{Doing as _, NodeError, Result};
use super::http::{self, Reply};
use super::process::{NodeCommand, Output, Spawned};
use crate::images::Image;

/// How long an agent may take to answer.
const ANSWER: Duration = Duration::from_secs(30);

/// What runs a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Runtime {
    /// containerd's own shim for runc: the reference for what containers do.
    Runc,
    /// The shim of this project.
    Agentcube,
}

impl Runtime {
    /// The name by which containerd knows the runtime.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "io.containerd.runc.v2",
            Self::Agentcube => "io.containerd.agentcube.v1",
        }
    }
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An agent's network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Net {
    /// The node's own.
    Host,
    /// A network namespace of its own that exists before the container and outlives it, as a pod's does.
    Pod,
}

/// An agent to be started.
#[derive(Debug, Clone)]
pub struct AgentSpec {
    /// The container's id.
    pub id: String,
    /// What it runs.
    pub image: Image,
    /// What runs it.
    pub runtime: Runtime,
    /// containerd's namespace.
    pub namespace: String,
    /// Its network.
    pub net: Net,
    /// The port where it listens; it gets the number as `PORT`.
    pub port: u16,
    /// Whether it has a terminal.
    pub tty: bool,
    /// Environment variables.
    pub env: Vec<(String, String)>,
    /// A command line in place of the image's.
    pub args: Vec<String>,
    /// Mounts as `ctr run --mount` takes them, such as `type=bind,src=/a,dst=/b,options=rbind:ro`.
    pub mounts: Vec<String>,
    /// Annotations of the OCI spec.
    pub annotations: Vec<(String, String)>,
    /// More flags of `ctr run`.
    pub flags: Vec<String>,
}

impl AgentSpec {
    /// An agent without terminal in the node's network, which listens on port 8080 if it listens at all.
    pub fn new(image: Image, id: impl Into<String>, runtime: Runtime) -> Self {
        Self {
            id: id.into(),
            image,
            runtime,
            namespace: "default".into(),
            net: Net::Host,
            port: 8080,
            tty: false,
            env: Vec::new(),
            args: Vec::new(),
            mounts: Vec::new(),
            annotations: Vec::new(),
            flags: Vec::new(),
        }
    }

    /// Sets the network.
    #[must_use]
    pub fn net(mut self, net: Net) -> Self {
        self.net = net;
        self
    }

    /// Sets the port.
    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// Gives it a terminal.
    #[must_use]
    pub fn tty(mut self) -> Self {
        self.tty = true;
        self
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &(impl ToString + ?Sized)) -> Self {
        self.env.push((name.into(), value.to_string()));
        self
    }

    /// Sets the command line.
    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args = args.iter().map(ToString::to_string).collect();
        self
    }

    /// Adds a mount.
    #[must_use]
    pub fn mount(mut self, mount: impl Into<String>) -> Self {
        self.mounts.push(mount.into());
        self
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        self.annotations.push((name.into(), value.into()));
        self
    }

    /// Adds a flag of `ctr run`.
    #[must_use]
    pub fn flag(mut self, flag: impl Into<String>) -> Self {
        self.flags.push(flag.into());
        self
    }

    /// The file on the node where a detached agent's output goes.
    pub fn log(&self) -> String {
        format!("/var/log/agents/{}-{}.log", self.namespace, self.id)
    }

    /// The arguments of `ctr` that start the agent on a node whose cgroups have a CPU controller or have none.
    pub fn command_line(&self, detached: bool, cpu_controller: bool) -> Vec<String> {
        let mut words: Vec<String> =
            ["ctr", "--namespace", &self.namespace, "run", "--runtime", self.runtime.name()]
                .map(str::to_owned)
                .into();
        let mut flag = |name: &str, value: String| words.extend([name.to_owned(), value]);
        if self.runtime == Runtime::Agentcube {
            flag("--runtime-config-path", SHIM_TOML.into());
        }
        if self.runtime == Runtime::Runc && !cpu_controller {
            // ctr sets shares when it is not told otherwise, and runc then insists on a controller.
            flag("--cpu-shares", "0".into());
        }
        if detached && !self.tty {
            flag("--log-uri", format!("file://{}", self.log()));
        }
        if self.net == Net::Pod {
            flag("--with-ns", format!("network:{}", netns(&self.id)));
        }
        flag("--env", format!("PORT={}", self.port));
        for (name, value) in &self.env {
            flag("--env", format!("{name}={value}"));
        }
        for mount in &self.mounts {
            flag("--mount", mount.clone());
        }
        for (name, value) in &self.annotations {
            flag("--annotation", format!("{name}={value}"));
        }
        words.extend(detached.then(|| "--detach".to_owned()));
        words.extend(self.tty.then(|| "--tty".to_owned()));
        words.extend((self.net == Net::Host).then(|| "--net-host".to_owned()));
        words.extend(self.flags.iter().cloned());
        words.extend([self.image.reference().to_owned(), self.id.clone()]);
        words.extend(self.args.iter().cloned());
        words
    }
}

fn netns(id: &str) -> String {
    format!("/run/netns/{id}")
}

/// An agent's answer to a message.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Turn {
    /// How many messages it has had, this one included.
    pub turn: u64,
    /// How many entries its conversation has: each message and each reply is one.
    pub history: u64,
    /// What it replied.
    pub reply: String,
}

/// An agent in a container. It lives until it is deleted or the node ends.
#[derive(Debug)]
pub struct Agent<'node> {
    node: &'node Node,
    spec: AgentSpec,
    /// The network namespace where it is reached.
    net: OwnedFd,
}

impl Node {
    /// Starts an agent detached, its output going to a file that [`Agent::log`] reads (with a terminal: nowhere, until
    /// something attaches).
    ///
    /// # Errors
    /// When the image can't be made or `ctr run` fails.
    pub fn run_agent(&self, spec: &AgentSpec) -> Result<Agent<'_>> {
        let net = self.prepare(spec)?;
        self.command(spec.command_line(true, self.has_controller("cpu"))).run()?.check()?;
        Ok(Agent { node: self, spec: spec.clone(), net })
    }

    /// Starts an agent with `ctr run` in the foreground, which passes on its output and its exit status. With a
    /// terminal, `ctr` runs on one of 24 rows and 80 columns.
    ///
    /// # Errors
    /// When the image can't be made or `ctr` can't be started.
    pub fn run_attached(&self, spec: &AgentSpec) -> Result<(Agent<'_>, Spawned)> {
        let net = self.prepare(spec)?;
        let mut command = self.command(spec.command_line(false, self.has_controller("cpu")));
        if spec.tty {
            command = command.terminal(24, 80);
        }
        let spawned = command.spawn()?;
        Ok((Agent { node: self, spec: spec.clone(), net }, spawned))
    }

    fn prepare(&self, spec: &AgentSpec) -> Result<OwnedFd> {
        if spec.runtime == Runtime::Agentcube {
            self.require_shim()?;
        }
        self.import(spec.image, &spec.namespace)?;
        let log = spec.log();
        if let Some((folder, _)) = log.rsplit_once('/') {
            self.make_folder(folder)?;
        }
        match spec.net {
            Net::Host => self.net().try_clone().doing(|| "copying a descriptor".into()),
            Net::Pod => {
                let id = &spec.id;
                self.sh(&format!("ip netns add {id} && ip -n {id} link set lo up"))?;
                self.open(&netns(id)).map(OwnedFd::from)
            }
        }
    }
}

impl Agent<'_> {
    /// The container's id.
    pub fn id(&self) -> &str {
        &self.spec.id
    }

    /// What it was started from.
    pub fn spec(&self) -> &AgentSpec {
        &self.spec
    }

    /// Connects to the agent's port.
    ///
    /// # Errors
    /// When nothing listens there.
    pub fn connect(&self) -> Result<TcpStream> {
        let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), self.spec.port);
        http::connect(&self.net, address, ANSWER)
    }

    /// Does `work` in the agent's network namespace: a client on the agent's own machine, or on a pod's.
    ///
    /// # Errors
    /// When the namespace can't be entered.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        http::within(&self.net, || Ok(work())).doing(|| format!("entering the network of {}", self.id()))
    }

    /// Sends a request over a connection of its own.
    ///
    /// # Errors
    /// When the agent can't be reached or breaks off.
    pub fn http(&self, method: &str, path: &str, body: &str) -> Result<Reply> {
        http::request(self.connect()?, method, path, body)
    }

    fn get(&self, method: &str, path: &str, body: &str) -> Result<String> {
        let reply = self.http(method, path, body)?;
        if reply.status == 200 {
            return Ok(reply.body);
        }
        let what = format!("{} answered {} to {method} {path}", self.id(), reply.status);
        Err(NodeError::Answer { what, answer: reply.body })
    }

    /// Waits until the agent answers `GET /health`.
    ///
    /// # Errors
    /// When it does not within half a minute; the error holds its log.
    pub fn wait_healthy(&self) -> Result<()> {
        let what = format!("{} to answer", self.id());
        let waited = self.node.wait_until(&what, ANSWER, || Ok(self.get("GET", "/health", "").is_ok()));
        waited.map_err(|error| match (error, self.log()) {
            (NodeError::Timeout { what, after }, Ok(log)) => {
                NodeError::Timeout { what: format!("{what}; its log: {log:?}"), after }
            }
            (error, _) => error,
        })
    }

    /// Says something to the agent.
    ///
    /// # Errors
    /// When it does not answer, or with nonsense.
    pub fn chat(&self, text: &str) -> Result<Turn> {
        let answer = self.get("POST", "/chat", text)?;
        let what = || format!("the answer of {} to a message", self.id());
        serde_json::from_str(&answer).map_err(|_| NodeError::Answer { what: what(), answer })
    }

    /// How many messages the agent has had.
    ///
    /// # Errors
    /// When it does not answer, or with nonsense.
    pub fn turn(&self) -> Result<u64> {
        let answer = self.get("GET", "/turn", "")?;
        let value: Option<serde_json::Value> = serde_json::from_str(&answer).ok();
        value
            .and_then(|value| value["turn"].as_u64())
            .ok_or_else(|| NodeError::Answer { what: format!("the turn of {}", self.id()), answer })
    }

    /// A hash over all that the agent holds in memory: its ballast and its conversation.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn digest(&self) -> Result<String> {
        self.get("GET", "/digest", "")
    }

    /// What the agent has printed; only a detached one has a log.
    ///
    /// # Errors
    /// When the file can't be read.
    pub fn log(&self) -> Result<String> {
        self.node.read_file(&self.spec.log())
    }

    /// Runs `ctr` in the agent's namespace of containerd.
    ///
    /// # Errors
    /// When it can't be started; a status other than 0 is no error here.
    pub fn ctr(&self, words: &[&str]) -> Result<Output> {
        self.ctr_command(words).run()
    }

    /// `ctr` in the agent's namespace of containerd, to be run or spawned.
    pub fn ctr_command(&self, words: &[&str]) -> NodeCommand {
        let mut line = vec!["ctr", "--namespace", &self.spec.namespace];
        line.extend(words);
        self.node.command(line)
    }

    /// Runs a command in the agent's container.
    ///
    /// # Errors
    /// When `ctr` can't be started; a status other than 0 is no error here.
    pub fn exec(&self, words: &[&str]) -> Result<Output> {
        self.exec_command(words).run()
    }

    /// A command in the agent's container, to be run or spawned.
    pub fn exec_command(&self, words: &[&str]) -> NodeCommand {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let exec_id = format!("exec-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let mut line = vec!["task", "exec", "--exec-id", &exec_id, self.id()];
        line.extend(words);
        self.ctr_command(&line)
    }

    /// The pid of the agent's first process as the node sees it, and the task's state in containerd's words; nothing
    /// when there is no task.
    ///
    /// # Errors
    /// When `ctr` fails.
    pub fn task(&self) -> Result<Option<(u32, String)>> {
        let list = self.ctr(&["task", "ls"])?.check()?;
        Ok(list.lines().find_map(|line| {
            let mut fields = line.split_whitespace();
            (fields.next() == Some(self.id())).then_some(())?;
            Some((fields.next()?.parse().ok()?, fields.next()?.to_owned()))
        }))
    }

    /// Sends a signal, such as `SIGTERM`, through containerd.
    ///
    /// # Errors
    /// When containerd refuses.
    pub fn kill(&self, signal: &str) -> Result<()> {
        self.ctr(&["task", "kill", "--signal", signal, self.id()])?.check().map(drop)
    }

    /// Waits until the task has stopped, then deletes it and the container; gives back the exit status.
    ///
    /// # Errors
    /// When it does not stop in time, or something can't be deleted.
    pub fn wait_and_delete(&self, timeout: Duration) -> Result<i32> {
        let what = format!("{} to stop", self.id());
        self.node
            .wait_until(&what, timeout, || Ok(self.task()?.is_some_and(|(_, state)| state == "STOPPED")))?;
        let deleted = self.ctr(&["task", "delete", self.id()])?;
        if let Some((_, state)) = self.task()? {
            let what = format!("ctr task delete {} left a task in state {state}", self.id());
            return Err(NodeError::Answer { what, answer: deleted.stderr });
        }
        self.delete_container()?;
        Ok(exit_status(&deleted.stderr))
    }

    /// Deletes the container, with its task if there still is one, by force.
    ///
    /// # Errors
    /// When something can't be deleted.
    pub fn delete(&self) -> Result<()> {
        if self.task()?.is_some() {
            let deleted = self.ctr(&["task", "delete", "--force", self.id()])?;
            if self.task()?.is_some() {
                return deleted.check().map(drop);
            }
        }
        self.delete_container()
    }

    fn delete_container(&self) -> Result<()> {
        self.ctr(&["container", "delete", self.id()])?.check()?;
        if self.spec.net == Net::Pod {
            self.node.exec(&["ip", "netns", "delete", self.id()])?.check()?;
        }
        Ok(())
    }
}

/// The exit status in what `ctr task delete` says: it tells of any but 0.
fn exit_status(stderr: &str) -> i32 {
    let told = stderr.split_once("non-zero exit code ").map(|(_, rest)| rest);
    let digits =
        told.map(|rest| rest.split(|letter: char| !letter.is_ascii_digit()).next().unwrap_or_default());
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

impl Node {
    /// Loads an image into a namespace of containerd, once.
    ///
    /// # Errors
    /// When the image can't be made or containerd refuses it.
    pub fn import(&self, image: Image, namespace: &str) -> Result<()> {
        let mut imported = self.imported();
        let wanted = (image, namespace.to_owned());
        if imported.contains(&wanted) {
            return Ok(());
        }
        let path = image.ensure(self.rootfs())?;
        let file = File::open(&path).doing(|| format!("opening {}", path.display()))?;
        self.command(["ctr", "--namespace", namespace, "images", "import", "-"])
            .stdin(file)
            .run()?
            .check()?;
        imported.insert(wanted);
        Ok(())
    }

    /// Somebody else may have removed images from this namespace: the next import looks at nothing that was before.
    pub(crate) fn forget_images(&self, namespace: &str) {
        self.imported().retain(|(_, imported)| imported != namespace);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_has_the_flags_before_the_image_and_the_arguments_last() {
        let spec = AgentSpec::new(Image::Counter, "a1", Runtime::Agentcube)
            .net(Net::Pod)
            .env("A", &1)
            .annotation("k", "v")
            .args(&["/bin/sh", "-c", "exit 42"]);
        let line = spec.command_line(true, false).join(" ");
        let image = Image::Counter.reference();
        assert!(
            line.starts_with("ctr --namespace default run --runtime io.containerd.agentcube.v1 "),
            "{line}"
        );
        assert!(line.ends_with(&format!("--detach {image} a1 /bin/sh -c exit 42")), "{line}");
        for part in ["--with-ns network:/run/netns/a1", "--env PORT=8080 --env A=1", "--annotation k=v"] {
            assert!(line.contains(part), "{part} not in {line}");
        }
        assert!(!line.contains("--net-host") && !line.contains("--cpu-shares"), "{line}");
    }

    #[test]
    fn exit_statuses_are_read_from_what_ctr_says() {
        assert_eq!(exit_status(""), 0);
        assert_eq!(exit_status("level=warning msg=\"task x exit with non-zero exit code 42\"\n"), 42);
    }

    #[test]
    fn runc_gets_no_options_of_the_shim_and_no_shares_without_a_controller() {
        let spec = AgentSpec::new(Image::Shell, "s", Runtime::Runc).tty();
        let line = spec.command_line(false, false).join(" ");
        assert!(line.contains("--cpu-shares 0"), "{line}");
        assert!(!spec.command_line(false, true).contains(&"--cpu-shares".to_owned()));
        assert!(!line.contains("runtime-config-path") && !line.contains("log-uri"), "{line}");
        assert!(line.contains("--tty --net-host"), "{line}");
    }
}
