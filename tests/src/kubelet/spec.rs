//! Pods as a test describes them, and what a kubelet makes of that for its runtime.

use std::collections::HashMap;
use std::time::Duration;

use protobuf::{EnumOrUnknown, MessageField};

use super::api::{
    ContainerConfig, ContainerMetadata, DNSConfig, ImageSpec, KeyValue, LinuxContainerConfig,
    LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
};
use super::probe::Probe;
use crate::images::Image;
use crate::node::Runtime;

/// The labels by which a kubelet finds its pods and containers again.
pub(super) const UID: &str = "io.kubernetes.pod.uid";
pub(super) const POD: &str = "io.kubernetes.pod.name";
const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub(super) const CONTAINER: &str = "io.kubernetes.container.name";
/// The annotation in which it counts the restarts of a container.
pub(super) const RESTARTS: &str = "io.kubernetes.container.restartCount";

/// When a container that has ended is started again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RestartPolicy {
    /// Always.
    #[default]
    Always,
    /// When it failed.
    OnFailure,
    /// Never.
    Never,
}

/// A container of a pod.
#[derive(Debug, Clone)]
pub struct ContainerSpec {
    /// Its name in the pod.
    pub name: String,
    /// What it runs.
    pub image: Image,
    /// A command line in place of the image's.
    pub command: Vec<String>,
    /// Environment variables.
    pub env: Vec<(String, String)>,
    /// Whether it has a terminal, or takes input.
    pub tty: bool,
    /// Whether input can be attached.
    pub stdin: bool,
    /// Decides whether it is restarted.
    pub liveness: Option<Probe>,
    /// Decides whether its pod is ready.
    pub readiness: Option<Probe>,
    /// Keeps the other probes waiting until it has succeeded.
    pub startup: Option<Probe>,
    /// An init container that stays: the next ones do not wait for its end.
    pub sidecar: bool,
    /// Its limits and shares.
    pub resources: LinuxContainerResources,
}

impl ContainerSpec {
    /// A container without probes and limits.
    pub fn new(name: &str, image: Image) -> Self {
        Self {
            name: name.to_owned(),
            image,
            command: Vec::new(),
            env: Vec::new(),
            tty: false,
            stdin: false,
            liveness: None,
            readiness: None,
            startup: None,
            sidecar: false,
            resources: LinuxContainerResources::default(),
        }
    }

    /// A script of the shell.
    pub fn script(name: &str, text: &str) -> Self {
        Self::new(name, Image::Counter).command(&["/bin/sh", "-c", text])
    }

    /// Sets the command line.
    #[must_use]
    pub fn command(mut self, words: &[&str]) -> Self {
        self.command = words.iter().map(ToString::to_string).collect();
        self
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &impl ToString) -> Self {
        self.env.push((name.to_owned(), value.to_string()));
        self
    }

    /// Takes input.
    #[must_use]
    pub fn stdin(mut self) -> Self {
        self.stdin = true;
        self
    }

    /// Gives it a terminal, which takes input.
    #[must_use]
    pub fn tty(mut self) -> Self {
        self.tty = true;
        self.stdin()
    }

    /// Sets the liveness probe.
    #[must_use]
    pub fn liveness(mut self, probe: Probe) -> Self {
        self.liveness = Some(probe);
        self
    }

    /// Sets the readiness probe.
    #[must_use]
    pub fn readiness(mut self, probe: Probe) -> Self {
        self.readiness = Some(probe);
        self
    }

    /// Sets the startup probe.
    #[must_use]
    pub fn startup(mut self, probe: Probe) -> Self {
        self.startup = Some(probe);
        self
    }

    /// Lets the next init container start while this one runs.
    #[must_use]
    pub fn sidecar(mut self) -> Self {
        self.sidecar = true;
        self
    }

    /// The file of its log below the pod's folder of logs.
    pub(super) fn log_path(&self, attempt: u32) -> String {
        format!("{}/{attempt}.log", self.name)
    }

    /// What the runtime is told of it.
    pub(super) fn config(&self, uid: &str, pod: &PodSpec, attempt: u32) -> ContainerConfig {
        let mut labels = pod.labels(uid);
        labels.insert(CONTAINER.into(), self.name.clone());
        let security = LinuxContainerSecurityContext {
            namespace_options: MessageField::some(namespaces()),
            ..Default::default()
        };
        ContainerConfig {
            metadata: MessageField::some(ContainerMetadata {
                name: self.name.clone(),
                attempt,
                ..Default::default()
            }),
            image: MessageField::some(ImageSpec {
                image: self.image.reference().to_owned(),
                ..Default::default()
            }),
            command: self.command.clone(),
            envs: self
                .env
                .iter()
                .map(|(key, value)| KeyValue { key: key.clone(), value: value.clone(), ..Default::default() })
                .collect(),
            labels,
            annotations: HashMap::from([(RESTARTS.to_owned(), attempt.to_string())]),
            log_path: self.log_path(attempt),
            stdin: self.stdin,
            tty: self.tty,
            linux: MessageField::some(LinuxContainerConfig {
                resources: MessageField::some(self.resources.clone()),
                security_context: MessageField::some(security),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

/// A pod.
#[derive(Debug, Clone)]
pub struct PodSpec {
    /// Its name.
    pub name: String,
    /// What runs it.
    pub runtime: Runtime,
    /// Its annotations; which of them reach the runtime is the configuration's affair.
    pub annotations: Vec<(String, String)>,
    /// Containers that run first, one after the other.
    pub init: Vec<ContainerSpec>,
    /// The others.
    pub containers: Vec<ContainerSpec>,
    /// What becomes of containers that have ended.
    pub restart: RestartPolicy,
    /// How long a container may take to end by itself.
    pub grace: Duration,
}

impl PodSpec {
    /// A pod without containers.
    pub fn new(name: &str, runtime: Runtime) -> Self {
        Self {
            name: name.to_owned(),
            runtime,
            annotations: Vec::new(),
            init: Vec::new(),
            containers: Vec::new(),
            restart: RestartPolicy::default(),
            grace: Duration::from_secs(2),
        }
    }

    /// Adds a container.
    #[must_use]
    pub fn container(mut self, container: ContainerSpec) -> Self {
        self.containers.push(container);
        self
    }

    /// Adds an init container.
    #[must_use]
    pub fn init(mut self, container: ContainerSpec) -> Self {
        self.init.push(container);
        self
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Sets what becomes of containers that have ended.
    #[must_use]
    pub fn restart(mut self, policy: RestartPolicy) -> Self {
        self.restart = policy;
        self
    }

    /// The containers that are to run as long as the pod does: the sidecars and all that are no init containers.
    pub(super) fn lasting(&self) -> impl Iterator<Item = &ContainerSpec> {
        self.init.iter().filter(|init| init.sidecar).chain(&self.containers)
    }

    /// The folder of its logs on the node.
    pub(super) fn log_directory(&self, uid: &str) -> String {
        format!("/var/log/pods/default_{}_{uid}", self.name)
    }

    /// Its cgroup, which a kubelet makes and removes.
    pub(super) fn cgroup(uid: &str) -> String {
        format!("/kubepods/pod{uid}")
    }

    fn labels(&self, uid: &str) -> HashMap<String, String> {
        [(POD, self.name.as_str()), (POD_NAMESPACE, "default"), (UID, uid)]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into()
    }

    /// What the runtime is told of its sandbox.
    pub(super) fn config(&self, uid: &str) -> PodSandboxConfig {
        let security = LinuxSandboxSecurityContext {
            namespace_options: MessageField::some(namespaces()),
            ..Default::default()
        };
        PodSandboxConfig {
            metadata: MessageField::some(PodSandboxMetadata {
                name: self.name.clone(),
                uid: uid.to_owned(),
                namespace: "default".into(),
                attempt: 0,
                ..Default::default()
            }),
            hostname: self.name.clone(),
            log_directory: self.log_directory(uid),
            dns_config: MessageField::some(DNSConfig {
                servers: vec!["10.96.0.10".into()],
                ..Default::default()
            }),
            labels: self.labels(uid),
            annotations: self.annotations.iter().cloned().collect(),
            linux: MessageField::some(LinuxPodSandboxConfig {
                cgroup_parent: Self::cgroup(uid),
                security_context: MessageField::some(security),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

/// Network and IPC are the pod's, processes the container's own.
fn namespaces() -> NamespaceOption {
    NamespaceOption {
        network: EnumOrUnknown::new(NamespaceMode::POD),
        ipc: EnumOrUnknown::new(NamespaceMode::POD),
        pid: EnumOrUnknown::new(NamespaceMode::CONTAINER),
        ..Default::default()
    }
}
