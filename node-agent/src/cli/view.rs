//! What the command line shows, as data: the answers of shims in a form that serializes to stable JSON.

use std::collections::BTreeMap;

use agentcube_control::{
    self as control, Depth, State,
    find::{FindError, Found, Survey},
};
use serde::Serialize;

/// `agentcube ps --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Listing {
    /// The containers, ordered by namespace, sandbox and id.
    pub containers: Vec<Container>,
    /// Sockets behind which no shim answered.
    pub unreachable: Vec<Silent>,
}

/// A container.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The pod's sandbox; null for a container without one.
    pub sandbox_id: Option<String>,
    /// Whether it is the pod's pause container.
    pub is_sandbox: bool,
    /// Pod, container and image as CRI names them.
    pub labels: BTreeMap<String, String>,
    /// `created`, `running`, `paused`, `falling-asleep`, `asleep`, `waking`, `stopped`, `unknown`.
    pub state: &'static str,
    /// `frozen`, `reclaimed`, `checkpointed`; null while awake.
    pub depth: Option<&'static str>,
    /// The first process; while asleep, the last known.
    pub pid: u32,
    /// Memory held now.
    pub memory_bytes: u64,
    /// Where that figure comes from: `memory.current` or `pss`.
    pub memory_source: String,
    /// What its cgroup is charged with, by the kernel's names (`memory.stat`, and `swap`): what is not 0.
    pub charged_bytes: BTreeMap<String, u64>,
    /// The image on disk; 0 without one.
    pub image_bytes: u64,
    /// Where the image is; null without one.
    pub image_dir: Option<String>,
    /// When it came into this state, in milliseconds since 1970.
    pub since_unix_ms: i64,
    /// How often it fell asleep.
    pub sleeps: u64,
    /// How often it woke.
    pub wakes: u64,
    /// The last sleep.
    pub last_sleep: Option<Transition>,
    /// The last wake.
    pub last_wake: Option<Transition>,
    /// Why the last sleep or wake failed; null after a success.
    pub last_error: Option<String>,
    /// The process of its shim.
    pub shim_pid: u32,
    /// Its bundle's directory.
    pub bundle: String,
    /// Its shim's control socket.
    pub socket: String,
}

/// A depth that did not work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Shortfall {
    /// The depth.
    pub depth: Option<&'static str>,
    /// Why it did not work.
    pub reason: String,
}

impl From<&control::Shortfall> for Shortfall {
    fn from(shortfall: &control::Shortfall) -> Shortfall {
        let depth = depth_name(shortfall.depth.enum_value().unwrap_or_default());
        Shortfall { depth, reason: shortfall.reason.clone() }
    }
}

/// A sleep or a wake that happened.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Transition {
    /// The container.
    pub id: String,
    /// The depth reached, or left.
    pub depth: Option<&'static str>,
    /// From the request until it was done, in microseconds.
    pub total_us: u64,
    /// How long the agent stood still before it was written, in microseconds; 0 for a wake.
    pub stopped_us: u64,
    /// The image on disk.
    pub image_bytes: u64,
    /// Which path did it: `direct` or `runc`.
    pub engine: String,
    /// Where CRIU worked: `pod-namespaces` or `classic`; empty when it had no part.
    pub mode: String,
    /// Of a sleep in the classic mode: why.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub classic_because: String,
    /// Of a sleep: why no memory was written in advance, though `pre_dump` asks for that.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub whole_because: String,
    /// Of a sleep: what tmpfs mounts go on holding in memory.
    pub memory_bytes: u64,
    /// Of a reclaim: why no more could be pushed out.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub rest_because: String,
    /// What a wake was for: `request`, `resume`, `checkpoint`, `exec`, `signal`, `input`, `traffic`, `timer`; null for a
    /// sleep.
    pub cause: Option<String>,
    /// Deeper depths that did not work for a sleep, deepest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub shortfalls: Vec<Shortfall>,
    /// When it was done, in milliseconds since 1970.
    pub at_unix_ms: i64,
    /// Memory held before; null when it could not be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_before_bytes: Option<u64>,
    /// Memory held after; null when it could not be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_after_bytes: Option<u64>,
}

/// A socket behind which no shim answered.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Silent {
    /// The socket's name without `.sock`: the sandbox's or container's id.
    pub name: String,
    /// The socket's directory: containerd's namespace.
    pub namespace: String,
    /// The socket.
    pub socket: String,
    /// What went wrong.
    pub error: Problem,
}

/// An error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// A stable name: `not-found`, `ambiguous`, `failed-precondition`, `timeout`, `unavailable`, …
    pub kind: &'static str,
    /// For people.
    pub message: String,
}

/// One id that was asked for, and what came of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// As it was typed.
    pub requested: String,
    /// The whole id; null when it means no container.
    pub id: Option<String>,
    /// What came of it.
    #[serde(flatten)]
    pub answer: Answer,
}

/// What came of it: the field `ok` or the field `error`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It worked.
    Ok(Result),
    /// It did not.
    Error(Problem),
}

/// What a command brought.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Result {
    /// Of `inspect`.
    Container(Box<Container>),
    /// Of `sleep`: one transition for each container.
    Slept(Vec<Transition>),
    /// Of `wake`: one transition for each container that slept.
    Woke(Vec<Transition>),
    /// Of `why`.
    Why(Why),
    /// Of `probes`: one for each command.
    Probes(Vec<Probe>),
}

/// An exec probe of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Probe {
    /// Its program and arguments.
    pub command: Vec<String>,
    /// How it last ended; null when it has not run yet.
    pub exit_status: Option<u32>,
    /// When that was.
    pub at_unix_ms: Option<i64>,
}

impl From<&control::ProbeResult> for Probe {
    fn from(result: &control::ProbeResult) -> Probe {
        Probe {
            command: result.arguments.clone(),
            exit_status: result.known.then_some(result.exit_status),
            at_unix_ms: result.known.then_some(result.at_unix_ms),
        }
    }
}

/// How deep a container could sleep, and why no deeper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Why {
    /// The deepest depth that is worth a try.
    pub deepest: Option<&'static str>,
    /// Why no deeper.
    pub reasons: Vec<Reason>,
    /// What shows only when it is tried, in words.
    pub doubts: Vec<String>,
    /// How many idle connections a checkpoint would close.
    pub closing: u32,
    /// Microseconds until the first of its timer descriptors goes off; null when none is set.
    pub next_timer_us: Option<u64>,
}

/// One thing that keeps a container from sleeping deeper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// A stable name: `connection`, `io-uring`, `debugger`.
    pub kind: String,
    /// For people.
    pub text: String,
}

impl From<&control::WhyResponse> for Why {
    fn from(told: &control::WhyResponse) -> Why {
        let reason =
            |reason: &control::Reason| Reason { kind: reason.kind.clone(), text: reason.text.clone() };
        Why {
            deepest: depth_name(told.deepest.enum_value().unwrap_or_default()),
            reasons: told.reasons.iter().map(reason).collect(),
            doubts: told.doubts.clone(),
            closing: told.closing,
            next_timer_us: (told.next_timer_us > 0).then_some(told.next_timer_us),
        }
    }
}

/// `agentcube sleep | wake | inspect | why --json`: in the order in which they were asked for.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcomes {
    /// One for each container.
    pub results: Vec<Outcome>,
}

/// A state's stable name.
pub fn state_name(state: State) -> &'static str {
    match state {
        State::STATE_UNSPECIFIED => "unknown",
        State::STATE_CREATED => "created",
        State::STATE_RUNNING => "running",
        State::STATE_PAUSED => "paused",
        State::STATE_FALLING_ASLEEP => "falling-asleep",
        State::STATE_ASLEEP => "asleep",
        State::STATE_WAKING => "waking",
        State::STATE_STOPPED => "stopped",
    }
}

/// A depth's stable name; none when it is not given.
pub fn depth_name(depth: Depth) -> Option<&'static str> {
    match depth {
        Depth::DEPTH_UNSPECIFIED => None,
        Depth::DEPTH_FROZEN => Some("frozen"),
        Depth::DEPTH_RECLAIMED => Some("reclaimed"),
        Depth::DEPTH_CHECKPOINTED => Some("checkpointed"),
    }
}

fn non_empty(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

impl Container {
    /// A shim's answer, and the socket it came from.
    pub fn new(container: &control::Container, socket: String) -> Container {
        Container {
            id: container.id.clone(),
            namespace: container.namespace.clone(),
            sandbox_id: non_empty(&container.sandbox_id),
            is_sandbox: container.is_sandbox,
            labels: container.labels.clone().into_iter().collect(),
            // A newer shim may know values that this program does not.
            state: state_name(container.state.enum_value().unwrap_or_default()),
            depth: depth_name(container.depth.enum_value().unwrap_or_default()),
            pid: container.pid,
            memory_bytes: container.memory_bytes,
            memory_source: container.memory_source.clone(),
            charged_bytes: container.charged_bytes.clone().into_iter().collect(),
            image_bytes: container.image_bytes,
            image_dir: non_empty(&container.image_dir),
            since_unix_ms: container.since_unix_ms,
            sleeps: container.sleeps,
            wakes: container.wakes,
            last_sleep: container.last_sleep.as_ref().map(Transition::from),
            last_wake: container.last_wake.as_ref().map(Transition::from),
            last_error: non_empty(&container.last_error),
            shim_pid: container.shim_pid,
            bundle: container.bundle.clone(),
            socket,
        }
    }
}

impl From<&Found> for Container {
    fn from(found: &Found) -> Container {
        Container::new(&found.container, found.endpoint.path.display().to_string())
    }
}

impl From<&control::Transition> for Transition {
    fn from(transition: &control::Transition) -> Transition {
        Transition {
            id: transition.id.clone(),
            depth: depth_name(transition.depth.enum_value().unwrap_or_default()),
            total_us: transition.total_us,
            stopped_us: transition.stopped_us,
            image_bytes: transition.image_bytes,
            engine: transition.engine.clone(),
            mode: transition.mode.clone(),
            classic_because: transition.classic_because.clone(),
            whole_because: transition.whole_because.clone(),
            memory_bytes: transition.memory_bytes,
            rest_because: transition.rest_because.clone(),
            cause: non_empty(&transition.cause),
            shortfalls: transition.shortfalls.iter().map(Shortfall::from).collect(),
            at_unix_ms: transition.at_unix_ms,
            memory_before_bytes: None,
            memory_after_bytes: None,
        }
    }
}

impl From<&Survey> for Listing {
    fn from(survey: &Survey) -> Listing {
        Listing {
            containers: survey.containers.iter().map(Container::from).collect(),
            unreachable: survey
                .unreachable
                .iter()
                .map(|shim| Silent {
                    name: shim.endpoint.name.clone(),
                    namespace: shim.endpoint.namespace.clone(),
                    socket: shim.endpoint.path.display().to_string(),
                    error: Problem::from(&shim.error),
                })
                .collect(),
        }
    }
}

impl From<&control::ClientError> for Problem {
    fn from(error: &control::ClientError) -> Problem {
        Problem { kind: error.name(), message: error.to_string() }
    }
}

impl From<&FindError> for Problem {
    fn from(error: &FindError) -> Problem {
        let kind = match error {
            FindError::Socket(_) => "socket",
            FindError::NotFound { .. } => "not-found",
            FindError::Unreachable { .. } => "unavailable",
            FindError::Ambiguous { .. } | FindError::SeveralNamespaces { .. } => "ambiguous",
        };
        Problem { kind, message: error.to_string() }
    }
}
