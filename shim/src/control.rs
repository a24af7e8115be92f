//! The control service: sleep, wake, status and list, for the node agent and the command line.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use agentcube_control::{
    Container, Control, Depth as WireDepth, ListRequest, ListResponse, ProbeCommands,
    ProbeResult as WireProbe, ProbesRequest, ProbesResponse, Reason as WireReason, Shortfall, SleepRequest,
    SleepResponse, State as WireState, StatusRequest, StatusResponse, Transition as WireTransition,
    WakeRequest, WakeResponse, WhyRequest, WhyResponse, labels,
};
use async_trait::async_trait;
use containerd_shim::protos::ttrpc::r#async::TtrpcContext;
use protobuf::{EnumOrUnknown, MessageField};

use crate::{
    container::{Handle, Snapshot, Transition},
    error::TaskError,
    lifecycle::{Asleep, Depth, FrozenBy, Refusal, State},
    probe_commands::{Commands, ProbeResult},
    runtime::{Reason, Reasons},
    sandbox::{self, Slept, Wish},
    task::Containers,
};

/// The control service of one shim.
pub struct ControlService {
    namespace: String,
    containers: Containers,
}

impl ControlService {
    /// Serves the containers of one shim.
    pub fn new(namespace: &str, containers: Containers) -> Self {
        Self { namespace: namespace.to_owned(), containers }
    }

    fn describe(&self, handle: &Handle) -> Container {
        let snapshot = handle.snapshot();
        let identity = handle.identity();
        let (memory_bytes, memory_source) = handle.runtime().memory();
        let (image_dir, image_bytes) = snapshot.image.clone().unwrap_or_else(|| (PathBuf::new(), 0));
        let labels = labels::ALL
            .iter()
            .filter_map(|key| Some(((*key).to_owned(), identity.annotations.get(*key)?.clone())))
            .collect();
        Container {
            id: handle.id().to_owned(),
            namespace: self.namespace.clone(),
            sandbox_id: identity.sandbox_id.clone(),
            is_sandbox: identity.is_sandbox,
            state: EnumOrUnknown::new(wire_state(&snapshot)),
            depth: EnumOrUnknown::new(snapshot.depth().map_or(WireDepth::DEPTH_UNSPECIFIED, wire_depth)),
            pid: snapshot.init.pid,
            memory_bytes,
            memory_source: memory_source.to_owned(),
            charged_bytes: handle.runtime().charged(),
            image_bytes,
            image_dir: image_dir.to_string_lossy().into_owned(),
            since_unix_ms: unix_ms(snapshot.since),
            sleeps: snapshot.sleeps,
            wakes: snapshot.wakes,
            last_sleep: snapshot.last_sleep.as_ref().map(|slept| wire_transition(handle.id(), slept)).into(),
            last_wake: snapshot.last_wake.as_ref().map(|woke| wire_transition(handle.id(), woke)).into(),
            last_error: snapshot.last_error.unwrap_or_default(),
            shim_pid: std::process::id(),
            bundle: handle.bundle().to_string_lossy().into_owned(),
            labels,
            ..Default::default()
        }
    }
}

fn wire_slept(slept: Slept) -> WireTransition {
    let shortfall = |shortfall: sandbox::Shortfall| Shortfall {
        depth: EnumOrUnknown::new(wire_depth(shortfall.depth)),
        reason: shortfall.reason,
        ..Default::default()
    };
    WireTransition {
        shortfalls: slept.shortfalls.into_iter().map(shortfall).collect(),
        ..wire_transition(slept.handle.id(), &slept.transition)
    }
}

#[async_trait]
impl Control for ControlService {
    async fn sleep(
        &self,
        _: &TtrpcContext,
        request: SleepRequest,
    ) -> containerd_shim::TtrpcResult<SleepResponse> {
        let wish = Wish { depth: depth(request.depth)?, or_shallower: request.or_shallower };
        let targets = sandbox::members(&self.containers, &request.id)?;
        // The whole of it goes on when the client goes away: half a sandbox must not be left asleep.
        let slept = tokio::spawn(async move { sandbox::sleep(&request.id, targets, wish).await }).await;
        let slept = slept.map_err(|error| TaskError::Dependency(error.to_string()))??;
        Ok(SleepResponse { transitions: slept.into_iter().map(wire_slept).collect(), ..Default::default() })
    }

    async fn wake(
        &self,
        _: &TtrpcContext,
        request: WakeRequest,
    ) -> containerd_shim::TtrpcResult<WakeResponse> {
        let woken = sandbox::wake(sandbox::members(&self.containers, &request.id)?).await?;
        let transitions = woken.iter().map(|(handle, woke)| wire_transition(handle.id(), woke)).collect();
        Ok(WakeResponse { transitions, ..Default::default() })
    }

    async fn status(
        &self,
        _: &TtrpcContext,
        request: StatusRequest,
    ) -> containerd_shim::TtrpcResult<StatusResponse> {
        let handle = self.containers.get(&request.id)?;
        Ok(StatusResponse { container: MessageField::some(self.describe(&handle)), ..Default::default() })
    }

    async fn why(&self, _: &TtrpcContext, request: WhyRequest) -> containerd_shim::TtrpcResult<WhyResponse> {
        let handle = self.containers.get(&request.id)?;
        if let Some(depth @ Depth::Checkpointed) = handle.snapshot().depth() {
            return Err(TaskError::Refused { id: request.id, refusal: Refusal::AlreadyAsleep(depth) }.into());
        }
        let told = handle.runtime().why().await.map_err(|source| TaskError::Runtime {
            id: request.id,
            what: "cannot be looked at",
            source,
        })?;
        Ok(wire_reasons(told))
    }

    async fn probes(
        &self,
        _: &TtrpcContext,
        request: ProbesRequest,
    ) -> containerd_shim::TtrpcResult<ProbesResponse> {
        let handle = self.containers.get(&request.id)?;
        let commands = request.commands.into_option().map(probe_commands).transpose()?;
        let results = handle.probes(commands).await?.into_iter().map(wire_probe).collect();
        Ok(ProbesResponse { results, ..Default::default() })
    }

    async fn list(&self, _: &TtrpcContext, _: ListRequest) -> containerd_shim::TtrpcResult<ListResponse> {
        let containers = self.containers.all().iter().map(|handle| self.describe(handle)).collect();
        Ok(ListResponse { containers, ..Default::default() })
    }
}

/// The depth that a request asks for; none for the deepest.
fn depth(wire: EnumOrUnknown<WireDepth>) -> Result<Option<Depth>, TaskError> {
    match wire.enum_value() {
        Ok(WireDepth::DEPTH_UNSPECIFIED) => Ok(None),
        Ok(WireDepth::DEPTH_FROZEN) => Ok(Some(Depth::Frozen)),
        Ok(WireDepth::DEPTH_CHECKPOINTED) => Ok(Some(Depth::Checkpointed)),
        Ok(WireDepth::DEPTH_RECLAIMED) => Ok(Some(Depth::Reclaimed)),
        Err(unknown) => Err(TaskError::Invalid(format!("there is no depth with the number {unknown}"))),
    }
}

fn probe_commands(wire: ProbeCommands) -> Result<Commands, TaskError> {
    let commands: Vec<_> = wire.commands.into_iter().map(|command| command.arguments).collect();
    Commands::try_from(commands).map_err(|error| TaskError::Invalid(error.to_string()))
}

fn wire_probe(result: ProbeResult) -> WireProbe {
    WireProbe {
        arguments: result.arguments,
        known: result.exit.is_some(),
        exit_status: result.exit.map_or(0, |exit| exit.code),
        at_unix_ms: result.exit.map_or(0, |exit| unix_ms(exit.at)),
        ..Default::default()
    }
}

fn wire_depth(depth: Depth) -> WireDepth {
    match depth {
        Depth::Frozen => WireDepth::DEPTH_FROZEN,
        Depth::Reclaimed => WireDepth::DEPTH_RECLAIMED,
        Depth::Checkpointed => WireDepth::DEPTH_CHECKPOINTED,
    }
}

fn wire_state(snapshot: &Snapshot) -> WireState {
    match snapshot.state {
        State::Created | State::Starting { .. } => WireState::STATE_CREATED,
        State::Running => WireState::STATE_RUNNING,
        State::Frozen { by: FrozenBy::Client } => WireState::STATE_PAUSED,
        State::Frozen { by: FrozenBy::Sleep }
        | State::Reclaimed
        | State::Probed { asleep: Asleep::Frozen | Asleep::Reclaimed }
        | State::Checkpointed => WireState::STATE_ASLEEP,
        State::Reclaiming | State::Probed { asleep: Asleep::Reclaiming } | State::Dumping { .. } => {
            WireState::STATE_FALLING_ASLEEP
        }
        State::Restoring { .. } => WireState::STATE_WAKING,
        State::Stopped => WireState::STATE_STOPPED,
    }
}

fn wire_reasons(told: Reasons) -> WhyResponse {
    let reason = |reason: Reason| WireReason { kind: reason.kind, text: reason.text, ..Default::default() };
    WhyResponse {
        deepest: EnumOrUnknown::new(wire_depth(told.deepest)),
        reasons: told.reasons.into_iter().map(reason).collect(),
        doubts: told.doubts,
        closing: u32::try_from(told.closing).unwrap_or(u32::MAX),
        next_timer_us: told.next_timer.map_or(0, micros),
        ..Default::default()
    }
}

fn wire_transition(id: &str, transition: &Transition) -> WireTransition {
    let (memory_before_bytes, memory_after_bytes) = transition.memory.unwrap_or_default();
    WireTransition {
        memory_before_bytes,
        memory_after_bytes,
        id: id.to_owned(),
        depth: EnumOrUnknown::new(wire_depth(transition.depth)),
        total_us: micros(transition.total),
        stopped_us: micros(transition.stopped),
        image_bytes: transition.image_bytes,
        engine: transition.engine.to_owned(),
        at_unix_ms: unix_ms(transition.at),
        mode: transition.mode.to_owned(),
        classic_because: transition.classic_because.clone().unwrap_or_default(),
        whole_because: transition.whole_because.clone().unwrap_or_default(),
        memory_bytes: transition.memory_bytes,
        cause: transition.cause.map(|cause| cause.name().to_owned()).unwrap_or_default(),
        rest_because: transition.rest_because.clone().unwrap_or_default(),
        ..Default::default()
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn unix_ms(at: SystemTime) -> i64 {
    at.duration_since(UNIX_EPOCH).ok().and_then(|since| i64::try_from(since.as_millis()).ok()).unwrap_or(0)
}
