//! A pod that runs.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::api::{
    ContainerState, ContainerStatus, ExecSyncResponse, LinuxContainerResources, PodSandboxConfig,
};
use super::decide::Seen;
use super::error::{KubeletError, Result};
use super::log::{self, Entry};
use super::spec::{ContainerSpec, PodSpec};
use super::stream::{Forward, Session};
use super::{Kubelet, Streams, handler, make_cgroup, transport};
use crate::node::{Reply, request};

/// How long an init container may run, and how long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// The container that stands for one of the pod's specification now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Current {
    pub(super) id: String,
    /// How often it has been replaced.
    pub(super) attempt: u32,
}

/// A pod that was started, and lives until it is removed or the node ends.
#[derive(Debug)]
pub struct Pod<'kubelet> {
    kubelet: &'kubelet Kubelet<'kubelet>,
    spec: PodSpec,
    uid: String,
    config: PodSandboxConfig,
    sandbox: String,
    ip: IpAddr,
    current: Mutex<BTreeMap<String, Current>>,
}

impl<'kubelet> Pod<'kubelet> {
    /// Starts the sandbox.
    pub(super) fn begin(kubelet: &'kubelet Kubelet<'kubelet>, spec: PodSpec, uid: String) -> Result<Self> {
        make_cgroup(kubelet.node, &PodSpec::cgroup(&uid))?;
        let logs = spec.log_directory(&uid);
        kubelet.node.sh(&format!("mkdir -p {logs}"))?;
        let config = spec.config(&uid);
        let sandbox = kubelet.cri.run_pod_sandbox(&config, handler(spec.runtime))?;
        let status = kubelet.cri.pod_sandbox_status(&sandbox)?;
        let ip = status.network.unwrap_or_default().ip;
        let ip = ip.parse().map_err(|_| KubeletError::Pod {
            pod: spec.name.clone(),
            reason: format!("it has no address, but {ip:?}"),
        })?;
        Ok(Self { kubelet, spec, uid, config, sandbox, ip, current: Mutex::default() })
    }

    /// Starts the containers in their order.
    pub(super) fn start_all(&self) -> Result<()> {
        for container in &self.spec.init {
            self.start(container)?;
            if !container.sidecar {
                self.wait_for_success(&container.name)?;
            }
        }
        self.spec.containers.iter().try_for_each(|container| self.start(container))
    }

    /// Creates and starts the next container for this part of the specification.
    pub(super) fn start(&self, container: &ContainerSpec) -> Result<()> {
        let attempt = self.current().get(&container.name).map_or(0, |current| current.attempt + 1);
        let logs = self.spec.log_directory(&self.uid);
        self.kubelet.node.sh(&format!("mkdir -p {logs}/{}", container.name))?;
        let config = container.config(&self.uid, &self.spec, attempt);
        let id = self.kubelet.cri.create_container(&self.sandbox, &config, &self.config)?;
        self.current().insert(container.name.clone(), Current { id: id.clone(), attempt });
        self.kubelet.cri.start_container(&id)
    }

    fn wait_for_success(&self, name: &str) -> Result<()> {
        let mut seen = Seen::Running;
        self.kubelet
            .node
            .wait_until(&format!("the init container {name} to end"), PATIENCE, || {
                seen = self.seen(name).unwrap_or(Seen::Unknown);
                Ok(matches!(seen, Seen::Exited(_)))
            })
            .map_err(|error| self.wrong(format!("{error}, and it is {seen:?}")))?;
        match seen {
            Seen::Exited(0) => Ok(()),
            other => Err(self.wrong(format!("its init container {name} is {other:?}"))),
        }
    }

    pub(super) fn wrong(&self, reason: String) -> KubeletError {
        KubeletError::Pod { pod: self.spec.name.clone(), reason }
    }

    pub(super) fn current(&self) -> MutexGuard<'_, BTreeMap<String, Current>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it was started from.
    pub fn spec(&self) -> &PodSpec {
        &self.spec
    }

    /// The id of its sandbox.
    pub fn sandbox(&self) -> &str {
        &self.sandbox
    }

    /// Its address.
    pub fn ip(&self) -> IpAddr {
        self.ip
    }

    /// The id of the container that stands for a name now.
    ///
    /// # Errors
    /// When none was started.
    pub fn id(&self, name: &str) -> Result<String> {
        let current = self.current().get(name).cloned();
        current
            .map(|current| current.id)
            .ok_or_else(|| self.wrong(format!("no container {name} was started")))
    }

    /// How often a container has been restarted.
    pub fn restarts(&self, name: &str) -> u32 {
        self.current().get(name).map_or(0, |current| current.attempt)
    }

    /// What the runtime says of a container.
    ///
    /// # Errors
    /// When it does not know it.
    pub fn status(&self, name: &str) -> Result<ContainerStatus> {
        self.kubelet.cri.container_status(&self.id(name)?)
    }

    /// How a container looks to a kubelet.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub fn seen(&self, name: &str) -> Result<Seen> {
        Ok(Seen::of(&self.status(name)?))
    }

    /// Whether the sandbox is ready.
    ///
    /// # Errors
    /// When the runtime does not know it.
    pub fn is_ready(&self) -> Result<bool> {
        use super::api::PodSandboxState::SANDBOX_READY;
        let status = self.kubelet.cri.pod_sandbox_status(&self.sandbox)?;
        Ok(status.state.enum_value() == Ok(SANDBOX_READY))
    }

    /// Runs a command in a container to its end.
    ///
    /// # Errors
    /// When it takes longer than `timeout`, in whole seconds, or can't be started.
    pub fn exec(&self, name: &str, command: &[&str], timeout: Duration) -> Result<ExecSyncResponse> {
        self.kubelet.cri.exec_sync(&self.id(name)?, command, timeout)
    }

    /// Runs a command in a container, its streams connected.
    ///
    /// # Errors
    /// When the runtime refuses.
    pub fn stream(&self, name: &str, command: &[&str], streams: Streams) -> Result<Session> {
        let url = self.kubelet.cri.exec(&self.id(name)?, command, streams)?;
        Session::open(self.kubelet.node, &url)
    }

    /// Attaches to a container's first process, which must have been specified like `streams`.
    ///
    /// # Errors
    /// When the runtime refuses.
    pub fn attach(&self, name: &str, streams: Streams) -> Result<Session> {
        let url = self.kubelet.cri.attach(&self.id(name)?, streams)?;
        Session::open(self.kubelet.node, &url)
    }

    /// Connects to a port on the pod's own loopback interface.
    ///
    /// # Errors
    /// When the runtime refuses; that nothing listens shows only when it is read from.
    pub fn forward(&self, port: u16) -> Result<Forward> {
        Forward::open(self.kubelet.node, &self.kubelet.cri.port_forward(&self.sandbox, port)?)
    }

    /// Sends a request to a port of the pod's address.
    ///
    /// # Errors
    /// When nothing answers.
    pub fn http(&self, port: u16, method: &str, path: &str, body: &str) -> Result<Reply> {
        let stream = self.kubelet.node.connect(SocketAddr::new(self.ip, port), PATIENCE)?;
        Ok(request(stream, method, path, body)?)
    }

    /// Waits until something answers `GET /health` at a port.
    ///
    /// # Errors
    /// When nothing does within half a minute.
    pub fn wait_healthy(&self, port: u16) -> Result<()> {
        let what = format!("port {port} of pod {} to answer", self.spec.name);
        Ok(self.kubelet.node.wait_until(&what, PATIENCE, || {
            Ok(self.http(port, "GET", "/health", "").is_ok_and(|reply| reply.status == 200))
        })?)
    }

    /// The path on the node of a container's log.
    pub fn log_path(&self, name: &str) -> String {
        let logs = self.spec.log_directory(&self.uid);
        format!("{logs}/{name}/{}.log", self.restarts(name))
    }

    /// What a container has written, by its log as it is now.
    ///
    /// # Errors
    /// When there is no log, or it is not in the format.
    pub fn log(&self, name: &str) -> Result<Vec<Entry>> {
        log::parse(&self.kubelet.node.read_file(&self.log_path(name))?)
    }

    /// Does what a kubelet does with a log that has grown: renames it and has it opened anew. Gives back the path of
    /// the old one.
    ///
    /// # Errors
    /// When the runtime refuses.
    pub fn rotate_log(&self, name: &str) -> Result<String> {
        let path = self.log_path(name);
        let old = format!("{path}.1");
        self.kubelet.node.sh(&format!("mv {path} {old}"))?;
        self.kubelet.cri.reopen_container_log(&self.id(name)?)?;
        Ok(old)
    }

    /// Changes the limits of a container.
    ///
    /// # Errors
    /// When the runtime refuses.
    pub fn resize(&self, name: &str, resources: LinuxContainerResources) -> Result<()> {
        self.kubelet.cri.update_container_resources(&self.id(name)?, resources)
    }

    /// Kills a container and starts another in its place.
    pub(super) fn replace(&self, container: &ContainerSpec) -> Result<()> {
        self.kubelet.cri.stop_container(&self.id(&container.name)?, self.spec.grace)?;
        self.start(container)
    }

    /// Stops the pod: the containers side by side, each with its grace, then the sandbox.
    ///
    /// # Errors
    /// When something does not stop.
    pub fn stop(&self) -> Result<()> {
        let ids: Vec<String> = self.current().values().map(|current| current.id.clone()).collect();
        thread::scope(|scope| {
            let stop = |id: &str| self.kubelet.cri.stop_container(id, self.spec.grace);
            let stopping: Vec<_> = ids.iter().map(|id| scope.spawn(move || stop(id))).collect();
            stopping.into_iter().try_for_each(|one| {
                one.join().unwrap_or_else(|_| Err(self.wrong("a stopping thread panicked".into())))
            })
        })?;
        self.kubelet.cri.stop_pod_sandbox(&self.sandbox)
    }

    /// Stops and removes the pod with all that a kubelet has made for it.
    ///
    /// # Errors
    /// When something stays: a cgroup with processes in it or below, among others.
    pub fn remove(&self) -> Result<()> {
        self.stop()?;
        for container in self.kubelet.cri.list_containers()? {
            if container.pod_sandbox_id == self.sandbox {
                self.kubelet.cri.remove_container(&container.id)?;
            }
        }
        self.kubelet.cri.remove_pod_sandbox(&self.sandbox)?;
        self.kubelet.node.sh(&format!("rm -r {}", self.spec.log_directory(&self.uid)))?;
        self.remove_cgroup()
    }

    /// The pod's cgroup as the host sees it.
    pub fn cgroup(&self) -> std::path::PathBuf {
        self.kubelet.node.cgroup(&PodSpec::cgroup(&self.uid))
    }

    fn remove_cgroup(&self) -> Result<()> {
        match fs::remove_dir(self.cgroup()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => transport(Err(error)),
            _ => Ok(()),
        }
    }

    /// The containers that the runtime takes for running, by their names.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub fn running(&self) -> Result<Vec<String>> {
        let all = self.kubelet.cri.list_containers()?;
        let running = all.into_iter().filter(|container| {
            container.pod_sandbox_id == self.sandbox
                && container.state.enum_value() == Ok(ContainerState::CONTAINER_RUNNING)
        });
        Ok(running.map(|container| container.metadata.unwrap_or_default().name).collect())
    }
}
