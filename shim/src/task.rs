//! containerd's Task API: looks up the container, asks its actor or its snapshot, and words the answer.

use std::{
    collections::{HashMap, hash_map},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use containerd_shim::{
    ExitSignal, Task, TtrpcContext, TtrpcResult,
    api::{
        ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest,
        DeleteResponse, Empty, ExecProcessRequest, KillRequest, PidsRequest, PidsResponse, ResizePtyRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    protos::{
        api::{CheckpointTaskRequest, CloseIORequest, PauseRequest, ProcessInfo, ResumeRequest},
        events::task::{TaskCreate, TaskIO},
        protobuf::{EnumOrUnknown, Message, MessageField},
        shim::oci::CheckpointOptions,
    },
};
use oci_spec::runtime::LinuxResources;
use tokio::sync::Notify;
use tracing::{debug, info};

use crate::{
    bundle::{self, Identity},
    container::{Birth, Handle, ProcessView},
    error::TaskError,
    events::{EventSink, timestamp},
    runtime::{CheckpointConfig, CreateConfig, ExecConfig, RuntimeFactory, Stdio},
    sandbox,
};

/// The shim's containers, by id. Looked up, never held across work.
#[derive(Clone, Default)]
pub struct Containers {
    map: Arc<Mutex<HashMap<String, Entry>>>,
    /// Told when a container has been made, or could not be.
    settled: Arc<Notify>,
}

/// What an id stands for.
enum Entry {
    /// A container in the making.
    Coming,
    /// A container.
    Made(Handle),
}

impl Containers {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        // Nothing that holds this lock can leave the map half-changed.
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The container `id`.
    ///
    /// # Errors
    /// [`TaskError::NoContainer`].
    pub fn get(&self, id: &str) -> Result<Handle, TaskError> {
        match self.lock().get(id) {
            Some(Entry::Made(handle)) => Ok(handle.clone()),
            Some(Entry::Coming) | None => Err(TaskError::NoContainer(id.to_owned())),
        }
    }

    /// The container `id`, when it is being made as soon as that has come to an end.
    async fn get_settled(&self, id: &str) -> Result<Handle, TaskError> {
        loop {
            let settled = self.settled.notified();
            if !matches!(self.lock().get(id), Some(Entry::Coming)) {
                return self.get(id);
            }
            settled.await;
        }
    }

    /// Reserves `id` for a container in the making.
    fn reserve(&self, id: &str) -> Result<(), TaskError> {
        match self.lock().entry(id.to_owned()) {
            hash_map::Entry::Occupied(_) => Err(TaskError::ContainerExists(id.to_owned())),
            hash_map::Entry::Vacant(free) => {
                free.insert(Entry::Coming);
                Ok(())
            }
        }
    }

    /// Gives a reserved id back.
    fn release(&self, id: &str) {
        self.lock().remove(id);
        self.settled.notify_waiters();
    }

    /// Puts a container where its id was reserved; it goes by itself when it has been deleted.
    fn insert(&self, handle: Handle) {
        self.lock().insert(handle.id().to_owned(), Entry::Made(handle.clone()));
        self.settled.notify_waiters();
        if !handle.identity().sandbox_id.is_empty() && !handle.identity().is_sandbox {
            tokio::spawn(sandbox::keep_company(self.clone(), handle.clone()));
        }
        let containers = self.clone();
        tokio::spawn(async move {
            handle.closed().await;
            containers.remove(&handle);
        });
    }

    /// Removes `handle`, but not another container of the same id that came after it.
    fn remove(&self, handle: &Handle) {
        let mut map = self.lock();
        if let Some(Entry::Made(current)) = map.get(handle.id())
            && current.same_as(handle)
        {
            map.remove(handle.id());
        }
    }

    /// Whether there is no container, not even one in the making.
    fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// All containers, ordered by id.
    pub fn all(&self) -> Vec<Handle> {
        let mut all: Vec<_> = self
            .lock()
            .values()
            .filter_map(|entry| match entry {
                Entry::Made(handle) => Some(handle.clone()),
                Entry::Coming => None,
            })
            .collect();
        all.sort_by(|a, b| a.id().cmp(b.id()));
        all
    }
}

/// The Task service of one shim.
#[derive(Clone)]
pub struct TaskService {
    namespace: String,
    containers: Containers,
    factory: Arc<dyn RuntimeFactory>,
    events: EventSink,
    exit: Arc<ExitSignal>,
}

impl TaskService {
    /// A service without containers.
    pub fn new(
        namespace: &str,
        containers: Containers,
        factory: Arc<dyn RuntimeFactory>,
        events: EventSink,
        exit: Arc<ExitSignal>,
    ) -> Self {
        Self { namespace: namespace.to_owned(), containers, factory, events, exit }
    }

    async fn create_container(self, request: CreateTaskRequest) -> Result<u32, TaskError> {
        let id = request.id.clone();
        self.containers.reserve(&id)?;
        let made = self.make_container(request).await;
        if made.is_err() {
            self.containers.release(&id);
        }
        made
    }

    async fn make_container(&self, request: CreateTaskRequest) -> Result<u32, TaskError> {
        let id = request.id.clone();
        let stdio = Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let config = CreateConfig {
            id: id.clone(),
            namespace: self.namespace.clone(),
            bundle: PathBuf::from(&request.bundle),
            rootfs: request.rootfs.clone(),
            stdio: stdio.clone(),
            checkpoint: (!request.checkpoint.is_empty()).then(|| PathBuf::from(&request.checkpoint)),
            options: request.options.into_option(),
        };
        let (runtime, init) = self.factory.create(&config).await.map_err(|source| TaskError::Runtime {
            id: id.clone(),
            what: "cannot be created",
            source,
        })?;
        let pid = init.pid;
        self.events.publish(TaskCreate {
            container_id: id.clone(),
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: MessageField::some(TaskIO {
                stdin: stdio.stdin.clone(),
                stdout: stdio.stdout.clone(),
                stderr: stdio.stderr.clone(),
                terminal: stdio.terminal,
                ..Default::default()
            }),
            checkpoint: request.checkpoint,
            pid,
            ..Default::default()
        });
        let identity = bundle::read_spec(&config.bundle).map(|spec| Identity::of(&spec)).unwrap_or_default();
        let birth = Birth { id, bundle: config.bundle, identity, stdio, runtime, init };
        self.containers.insert(Handle::spawn(birth, self.events.clone()));
        Ok(pid)
    }

    fn state_of(&self, id: &str, exec_id: &str) -> Result<StateResponse, TaskError> {
        let handle = self.containers.get(id)?;
        let snapshot = handle.snapshot();
        let exec = exec(exec_id);
        let no_exec = || TaskError::NoExec { id: id.to_owned(), exec_id: exec_id.to_owned() };
        let process = snapshot.process(exec).ok_or_else(no_exec)?;
        let status = snapshot.status(exec).ok_or_else(no_exec)?;
        Ok(StateResponse {
            id: id.to_owned(),
            bundle: handle.bundle().to_string_lossy().into_owned(),
            pid: process.pid,
            status: EnumOrUnknown::new(status),
            stdin: process.stdio.stdin.clone(),
            stdout: process.stdio.stdout.clone(),
            stderr: process.stdio.stderr.clone(),
            terminal: process.stdio.terminal,
            exit_status: process.exit.map_or(0, |exit| exit.code),
            exited_at: process.exit.map(|exit| timestamp(exit.at)).into(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        })
    }
}

/// The wire has an empty string for the container's own process.
fn exec(exec_id: &str) -> Option<&str> {
    (!exec_id.is_empty()).then_some(exec_id)
}

fn owned_exec(exec_id: &str) -> Option<String> {
    exec(exec_id).map(str::to_owned)
}

fn deleted(view: &ProcessView) -> DeleteResponse {
    DeleteResponse {
        pid: view.pid,
        exit_status: view.exit.map_or(0, |exit| exit.code),
        exited_at: view.exit.map(|exit| timestamp(exit.at)).into(),
        ..Default::default()
    }
}

/// Terminals have sizes of 16 bits.
fn cells(what: &str, value: u32) -> Result<u16, TaskError> {
    u16::try_from(value)
        .map_err(|_| TaskError::Invalid(format!("a terminal's {what} is at most 65535, not {value}")))
}

fn checkpoint_config(request: &CheckpointTaskRequest) -> Result<CheckpointConfig, TaskError> {
    let mut config = CheckpointConfig { image_path: PathBuf::from(&request.path), ..Default::default() };
    if let Some(any) = request.options.as_ref() {
        let options = CheckpointOptions::parse_from_bytes(&any.value).map_err(|error| {
            TaskError::Invalid(format!("checkpoint options of type {}: {error}", any.type_url))
        })?;
        if !options.image_path.is_empty() {
            config.image_path = PathBuf::from(&options.image_path);
        }
        config.work_path = (!options.work_path.is_empty()).then(|| PathBuf::from(&options.work_path));
        config.exit = options.exit;
        config.open_tcp = options.open_tcp;
        config.external_unix_sockets = options.external_unix_sockets;
        config.terminal = options.terminal;
        config.file_locks = options.file_locks;
    }
    if config.image_path.as_os_str().is_empty() {
        return Err(TaskError::Invalid("a checkpoint needs a path for its image".to_owned()));
    }
    Ok(config)
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> TtrpcResult<StateResponse> {
        Ok(self.state_of(&request.id, &request.exec_id)?)
    }

    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> TtrpcResult<CreateTaskResponse> {
        info!(id = %request.id, bundle = %request.bundle, "create");
        // It is finished even when the client goes away: half a container would belong to nobody.
        let creation = tokio::spawn(self.clone().create_container(request));
        let pid = creation.await.map_err(|error| TaskError::Dependency(error.to_string()))??;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> TtrpcResult<StartResponse> {
        debug!(id = %request.id, exec = %request.exec_id, "start");
        let pid = self.containers.get(&request.id)?.start(owned_exec(&request.exec_id)).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> TtrpcResult<DeleteResponse> {
        info!(id = %request.id, exec = %request.exec_id, "delete");
        let exec_id = owned_exec(&request.exec_id);
        let whole = exec_id.is_none();
        let handle = self.containers.get_settled(&request.id).await?;
        let view = handle.delete(exec_id).await?;
        if whole {
            // A shutdown may follow at once.
            self.containers.remove(&handle);
        }
        Ok(deleted(&view))
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> TtrpcResult<PidsResponse> {
        let handle = self.containers.get(&request.id)?;
        let mut pids = handle.runtime().pids();
        if pids.is_empty() {
            // containerd takes a task without pids for a leak and deletes it.
            pids.push(handle.snapshot().init.pid);
        }
        let processes = pids.into_iter().map(|pid| ProcessInfo { pid, ..Default::default() }).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> TtrpcResult<Empty> {
        self.containers.get(&request.id)?.pause().await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> TtrpcResult<Empty> {
        self.containers.get(&request.id)?.resume().await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> TtrpcResult<Empty> {
        info!(id = %request.id, path = %request.path, "checkpoint");
        let config = checkpoint_config(&request)?;
        self.containers.get(&request.id)?.checkpoint(config).await?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> TtrpcResult<Empty> {
        info!(id = %request.id, exec = %request.exec_id, signal = request.signal, all = request.all, "kill");
        let handle = self.containers.get(&request.id)?;
        handle.kill(owned_exec(&request.exec_id), request.signal, request.all).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> TtrpcResult<Empty> {
        debug!(id = %request.id, exec = %request.exec_id, "exec");
        if request.exec_id.is_empty() {
            return Err(TaskError::Invalid("an exec needs an id".to_owned()).into());
        }
        let handle = self.containers.get(&request.id)?;
        let config = ExecConfig {
            exec_id: request.exec_id,
            spec: request.spec.into_option().map(|any| any.value).unwrap_or_default(),
            stdio: Stdio {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
            taps: None,
        };
        handle.add_exec(config).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> TtrpcResult<Empty> {
        let (width, height) = (cells("width", request.width)?, cells("height", request.height)?);
        self.containers.get(&request.id)?.resize(owned_exec(&request.exec_id), width, height).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> TtrpcResult<Empty> {
        let handle = self.containers.get(&request.id)?;
        if request.stdin {
            handle.close_stdin(owned_exec(&request.exec_id)).await?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> TtrpcResult<Empty> {
        let handle = self.containers.get(&request.id)?;
        let Some(any) = request.resources.into_option() else {
            return Err(TaskError::Invalid("an update needs resources".to_owned()).into());
        };
        let resources: LinuxResources = serde_json::from_slice(&any.value)
            .map_err(|error| TaskError::Invalid(format!("resources of type {}: {error}", any.type_url)))?;
        handle.update(resources).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> TtrpcResult<WaitResponse> {
        let exit = self.containers.get(&request.id)?.wait(exec(&request.exec_id)).await?;
        Ok(WaitResponse {
            exit_status: exit.code,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> TtrpcResult<StatsResponse> {
        let handle = self.containers.get(&request.id)?;
        let stats = handle.runtime().stats().map_err(|source| TaskError::Runtime {
            id: request.id,
            what: "its statistics cannot be read",
            source,
        })?;
        Ok(StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> TtrpcResult<ConnectResponse> {
        let task_pid = self.containers.get(&request.id).map_or(0, |handle| handle.snapshot().init.pid);
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> TtrpcResult<Empty> {
        // Other containers of the sandbox still need this shim.
        if self.containers.is_empty() {
            info!("shutdown");
            self.exit.signal();
        }
        Ok(Empty::new())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "task_tests/mod.rs"]
mod tests;
