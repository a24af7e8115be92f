//! The calls of the CRI that a kubelet makes, with its time limits.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use protobuf::{Message, MessageField};
use tokio::net::UnixStream;

use super::api::{
    AttachRequest, AttachResponse, Container, ContainerConfig, ContainerStats, ContainerStatus,
    ContainerStatusRequest, ContainerStatusResponse, CreateContainerRequest, CreateContainerResponse,
    ExecRequest, ExecResponse, ExecSyncRequest, ExecSyncResponse, Image, ImageSpec, LinuxContainerResources,
    ListContainerStatsRequest, ListContainerStatsResponse, ListContainersRequest, ListContainersResponse,
    ListImagesRequest, ListImagesResponse, ListPodSandboxRequest, ListPodSandboxResponse,
    ListPodSandboxStatsRequest, ListPodSandboxStatsResponse, PodSandbox, PodSandboxConfig, PodSandboxStats,
    PodSandboxStatus, PodSandboxStatusRequest, PodSandboxStatusResponse, PortForwardRequest,
    PortForwardResponse, RemoveContainerRequest, RemoveContainerResponse, RemoveImageRequest,
    RemoveImageResponse, RemovePodSandboxRequest, RemovePodSandboxResponse, ReopenContainerLogRequest,
    ReopenContainerLogResponse, RunPodSandboxRequest, RunPodSandboxResponse, StartContainerRequest,
    StartContainerResponse, StatusRequest, StatusResponse, StopContainerRequest, StopContainerResponse,
    StopPodSandboxRequest, StopPodSandboxResponse, UpdateContainerResourcesRequest,
    UpdateContainerResourcesResponse,
};
use super::error::{KubeletError, Result};
use super::grpc::{self, Call};
use crate::node::Node;

/// How long the kubelet waits for an answer (its `runtimeRequestTimeout` is two minutes: a test has less patience).
const PATIENCE: Duration = Duration::from_mins(1);

const RUNTIME: &str = "/runtime.v1.RuntimeService/";
const IMAGES: &str = "/runtime.v1.ImageService/";

/// What streams in an exec or an attach.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Streams {
    /// The client sends input.
    pub stdin: bool,
    /// The process has a terminal, and no stderr of its own.
    pub tty: bool,
}

/// A client of a node's CRI. It holds no connection: it may be used from many threads, and while containerd restarts.
#[derive(Debug, Clone)]
pub struct Cri {
    socket: PathBuf,
}

impl Cri {
    /// The client of a node.
    pub fn of(node: &Node) -> Self {
        Self { socket: node.containerd_socket() }
    }

    fn call<Q: Message, A: Message>(
        &self,
        service: &str,
        method: &str,
        request: &Q,
        timeout: Duration,
    ) -> Result<A> {
        let path = format!("{service}{method}");
        let failed = |error: std::io::Error| KubeletError::transport(&path, &error);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        runtime.block_on(async {
            let stream = UnixStream::connect(&self.socket).await.map_err(failed)?;
            let call = Call { path: &path, user_agent: "kubelet", timeout };
            grpc::unary(stream, call, request).await
        })
    }

    fn runtime<Q: Message, A: Message>(&self, method: &str, request: &Q) -> Result<A> {
        self.call(RUNTIME, method, request, PATIENCE)
    }

    fn images<Q: Message, A: Message>(&self, method: &str, request: &Q) -> Result<A> {
        self.call(IMAGES, method, request, PATIENCE)
    }

    /// The conditions of the runtime that do not hold, such as `NetworkReady`, with their reasons.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub fn unready(&self) -> Result<Vec<String>> {
        let answer: StatusResponse = self.runtime("Status", &StatusRequest::default())?;
        let conditions = answer.status.unwrap_or_default().conditions;
        // A condition that only warns would be a failure to a kubelet as well; containerd has none that do.
        let unmet = conditions.into_iter().filter(|condition| !condition.status);
        Ok(unmet.map(|condition| format!("{}: {}", condition.type_, condition.message)).collect())
    }

    /// Starts a sandbox; gives back its id.
    ///
    /// # Errors
    /// When the runtime refuses.
    pub fn run_pod_sandbox(&self, config: &PodSandboxConfig, handler: &str) -> Result<String> {
        let request = RunPodSandboxRequest {
            config: MessageField::some(config.clone()),
            runtime_handler: handler.to_owned(),
            ..Default::default()
        };
        let answer: RunPodSandboxResponse = self.runtime("RunPodSandbox", &request)?;
        Ok(answer.pod_sandbox_id)
    }

    /// Stops a sandbox with all of its containers.
    ///
    /// # Errors
    /// When the runtime fails to.
    pub fn stop_pod_sandbox(&self, id: &str) -> Result<()> {
        let request = StopPodSandboxRequest { pod_sandbox_id: id.to_owned(), ..Default::default() };
        self.runtime::<_, StopPodSandboxResponse>("StopPodSandbox", &request).map(drop)
    }

    /// Removes a sandbox with all of its containers.
    ///
    /// # Errors
    /// When the runtime fails to.
    pub fn remove_pod_sandbox(&self, id: &str) -> Result<()> {
        let request = RemovePodSandboxRequest { pod_sandbox_id: id.to_owned(), ..Default::default() };
        self.runtime::<_, RemovePodSandboxResponse>("RemovePodSandbox", &request).map(drop)
    }

    /// How a sandbox is.
    ///
    /// # Errors
    /// When there is none.
    pub fn pod_sandbox_status(&self, id: &str) -> Result<PodSandboxStatus> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), ..Default::default() };
        let answer: PodSandboxStatusResponse = self.runtime("PodSandboxStatus", &request)?;
        Ok(answer.status.unwrap_or_default())
    }

    /// All sandboxes.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub fn list_pod_sandboxes(&self) -> Result<Vec<PodSandbox>> {
        let answer: ListPodSandboxResponse =
            self.runtime("ListPodSandbox", &ListPodSandboxRequest::default())?;
        Ok(answer.items)
    }

    /// Creates a container; gives back its id.
    ///
    /// # Errors
    /// When the runtime refuses.
    pub fn create_container(
        &self,
        sandbox: &str,
        config: &ContainerConfig,
        pod: &PodSandboxConfig,
    ) -> Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: MessageField::some(config.clone()),
            sandbox_config: MessageField::some(pod.clone()),
            ..Default::default()
        };
        let answer: CreateContainerResponse = self.runtime("CreateContainer", &request)?;
        Ok(answer.container_id)
    }

    /// Starts a container.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_container(&self, id: &str) -> Result<()> {
        let request = StartContainerRequest { container_id: id.to_owned(), ..Default::default() };
        self.runtime::<_, StartContainerResponse>("StartContainer", &request).map(drop)
    }

    /// Stops a container: its stop signal, and SIGKILL after `grace`.
    ///
    /// # Errors
    /// When it does not stop.
    pub fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        let timeout = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
        let request = StopContainerRequest { container_id: id.to_owned(), timeout, ..Default::default() };
        self.call::<_, StopContainerResponse>(RUNTIME, "StopContainer", &request, PATIENCE + grace).map(drop)
    }

    /// Removes a container.
    ///
    /// # Errors
    /// When the runtime fails to.
    pub fn remove_container(&self, id: &str) -> Result<()> {
        let request = RemoveContainerRequest { container_id: id.to_owned(), ..Default::default() };
        self.runtime::<_, RemoveContainerResponse>("RemoveContainer", &request).map(drop)
    }

    /// All containers, those that have ended included.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub fn list_containers(&self) -> Result<Vec<Container>> {
        let answer: ListContainersResponse =
            self.runtime("ListContainers", &ListContainersRequest::default())?;
        Ok(answer.containers)
    }

    /// How a container is.
    ///
    /// # Errors
    /// When there is none.
    pub fn container_status(&self, id: &str) -> Result<ContainerStatus> {
        Ok(self.verbose_status(id, false)?.status.unwrap_or_default())
    }

    /// What containerd tells besides: among it, in `info`, the pid of the container's first process.
    ///
    /// # Errors
    /// When there is no such container.
    pub fn container_info(&self, id: &str) -> Result<HashMap<String, String>> {
        Ok(self.verbose_status(id, true)?.info)
    }

    fn verbose_status(&self, id: &str, verbose: bool) -> Result<ContainerStatusResponse> {
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose, ..Default::default() };
        self.runtime("ContainerStatus", &request)
    }

    /// The usage of all running containers.
    ///
    /// # Errors
    /// When one container's cannot be had: that fails the whole list.
    pub fn list_container_stats(&self) -> Result<Vec<ContainerStats>> {
        let answer: ListContainerStatsResponse =
            self.runtime("ListContainerStats", &ListContainerStatsRequest::default())?;
        Ok(answer.stats)
    }

    /// The usage of all sandboxes.
    ///
    /// # Errors
    /// When one sandbox's cannot be had: that fails the whole list.
    pub fn list_pod_sandbox_stats(&self) -> Result<Vec<PodSandboxStats>> {
        let answer: ListPodSandboxStatsResponse =
            self.runtime("ListPodSandboxStats", &ListPodSandboxStatsRequest::default())?;
        Ok(answer.stats)
    }

    /// Changes the limits of a container.
    ///
    /// # Errors
    /// When the runtime refuses.
    pub fn update_container_resources(&self, id: &str, linux: LinuxContainerResources) -> Result<()> {
        let request = UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: MessageField::some(linux),
            ..Default::default()
        };
        self.runtime::<_, UpdateContainerResourcesResponse>("UpdateContainerResources", &request).map(drop)
    }

    /// Has a container's log written to a new file of the same name.
    ///
    /// # Errors
    /// When the container does not run.
    pub fn reopen_container_log(&self, id: &str) -> Result<()> {
        let request = ReopenContainerLogRequest { container_id: id.to_owned(), ..Default::default() };
        self.runtime::<_, ReopenContainerLogResponse>("ReopenContainerLog", &request).map(drop)
    }

    /// Runs a command in a container to its end. The runtime kills it after `timeout`, which counts in whole seconds.
    ///
    /// # Errors
    /// When it takes too long ([`Code::DeadlineExceeded`](super::Code)), or cannot be started.
    pub fn exec_sync(&self, id: &str, command: &[&str], timeout: Duration) -> Result<ExecSyncResponse> {
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.iter().map(ToString::to_string).collect(),
            timeout: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            ..Default::default()
        };
        // The runtime keeps the time; a kubelet gives it somewhat more for the answer.
        self.call(RUNTIME, "ExecSync", &request, timeout + PATIENCE)
    }

    /// The address where a command's streams can be had.
    ///
    /// # Errors
    /// When the container does not run.
    pub fn exec(&self, id: &str, command: &[&str], streams: Streams) -> Result<String> {
        let request = ExecRequest {
            container_id: id.to_owned(),
            cmd: command.iter().map(ToString::to_string).collect(),
            tty: streams.tty,
            stdin: streams.stdin,
            stdout: true,
            stderr: !streams.tty,
            ..Default::default()
        };
        let answer: ExecResponse = self.runtime("Exec", &request)?;
        Ok(answer.url)
    }

    /// The address where the streams of a container's first process can be had.
    ///
    /// # Errors
    /// When the container does not run.
    pub fn attach(&self, id: &str, streams: Streams) -> Result<String> {
        let request = AttachRequest {
            container_id: id.to_owned(),
            tty: streams.tty,
            stdin: streams.stdin,
            stdout: true,
            stderr: !streams.tty,
            ..Default::default()
        };
        let answer: AttachResponse = self.runtime("Attach", &request)?;
        Ok(answer.url)
    }

    /// The address where connections to a port of a sandbox can be had.
    ///
    /// # Errors
    /// When the sandbox is not ready.
    pub fn port_forward(&self, sandbox: &str, port: u16) -> Result<String> {
        let request = PortForwardRequest {
            pod_sandbox_id: sandbox.to_owned(),
            port: vec![port.into()],
            ..Default::default()
        };
        let answer: PortForwardResponse = self.runtime("PortForward", &request)?;
        Ok(answer.url)
    }

    /// All images.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub fn list_images(&self) -> Result<Vec<Image>> {
        let answer: ListImagesResponse = self.images("ListImages", &ListImagesRequest::default())?;
        Ok(answer.images)
    }

    /// Removes an image by its id or name.
    ///
    /// # Errors
    /// When the runtime fails to.
    pub fn remove_image(&self, name: &str) -> Result<()> {
        let image = ImageSpec { image: name.to_owned(), ..Default::default() };
        let request = RemoveImageRequest { image: MessageField::some(image), ..Default::default() };
        self.images::<_, RemoveImageResponse>("RemoveImage", &request).map(drop)
    }
}
