//! Does what was asked, on the shims.

use std::collections::{BTreeMap, BTreeSet};

use agentcube_control::{
    self as control, Client, ClientError, Depth, Timeouts,
    find::{FindError, Found, Survey},
};
use tokio::task::JoinHandle;

use super::view::{Answer, Container, Outcome, Probe, Problem, Result as Done, Transition, Why};

/// What to do to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Put it to sleep.
    Sleep {
        /// How deep.
        depth: Depth,
        /// A shallower depth will do.
        or_shallower: bool,
    },
    /// Wake it.
    Wake,
    /// Ask for its status.
    Inspect,
    /// Ask what keeps it from sleeping deeper.
    Why,
    /// Ask what its exec probes last came to.
    Probes {
        /// Their commands from now on, if they are to change.
        commands: Option<Vec<Vec<String>>>,
    },
}

impl Action {
    /// As in "cannot put agent to sleep".
    pub fn on(&self, id: &str) -> String {
        match self {
            Action::Sleep { .. } => format!("put {id} to sleep"),
            Action::Wake => format!("wake {id}"),
            Action::Inspect => format!("inspect {id}"),
            Action::Why => format!("tell how deep {id} could sleep"),
            Action::Probes { commands: None } => format!("tell of the exec probes of {id}"),
            Action::Probes { commands: Some(_) } => format!("set the exec probes of {id}"),
        }
    }
}

/// An action on one container that is under way, or could not begin.
pub struct Work {
    requested: String,
    started: Result<(String, JoinHandle<Result<Done, ClientError>>), FindError>,
}

/// Starts an action on every container that these ids mean; on each container once, though it may be named twice.
pub fn start(survey: &Survey, ids: &[String], action: &Action, timeouts: Timeouts) -> Vec<Work> {
    let mut seen = BTreeSet::new();
    let mut works = Vec::new();
    for requested in ids {
        let started = match survey.select(requested) {
            Ok(found) if !seen.insert((&found.container.namespace, &found.container.id)) => continue,
            Ok(found) => {
                let shim = survey.containers.iter().filter(|other| other.endpoint == found.endpoint);
                let memory = memory_of(shim.map(|found| &found.container));
                let task = tokio::spawn(perform(found.clone(), action.clone(), timeouts, memory));
                Ok((found.container.id.clone(), task))
            }
            Err(error) => Err(error),
        };
        works.push(Work { requested: requested.clone(), started });
    }
    works
}

impl Work {
    /// Waits until it is done.
    pub async fn outcome(self) -> Outcome {
        let (id, answer) = match self.started {
            Ok((id, task)) => match task.await {
                Ok(Ok(done)) => (Some(id), Answer::Ok(done)),
                Ok(Err(error)) => (Some(id), Answer::Error(Problem::from(&error))),
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            },
            Err(error) => (None, Answer::Error(Problem::from(&error))),
        };
        Outcome { requested: self.requested, id, answer }
    }
}

/// Memory held, by container.
type Memory = BTreeMap<String, u64>;

fn memory_of<'a>(containers: impl Iterator<Item = &'a control::Container>) -> Memory {
    containers.map(|container| (container.id.clone(), container.memory_bytes)).collect()
}

async fn perform(
    found: Found,
    action: Action,
    timeouts: Timeouts,
    before: Memory,
) -> Result<Done, ClientError> {
    let client = Client::connect_path(&found.endpoint.path, timeouts).await?;
    let id = &found.container.id;
    match action {
        Action::Inspect => {
            let container = client.status(id).await?;
            let socket = found.endpoint.path.display().to_string();
            Ok(Done::Container(Box::new(Container::new(&container, socket))))
        }
        Action::Why => Ok(Done::Why(Why::from(&client.why(id).await?))),
        Action::Probes { commands } => {
            let results = client.probes(id, commands.as_deref()).await?;
            Ok(Done::Probes(results.iter().map(Probe::from).collect()))
        }
        Action::Sleep { depth, or_shallower } => {
            let slept = if or_shallower {
                client.sleep_or_shallower(id, depth).await
            } else {
                client.sleep(id, depth).await
            };
            let transitions = slept?;
            Ok(Done::Slept(with_memory(&transitions, &before, &client).await))
        }
        Action::Wake => {
            let transitions = client.wake(id).await?;
            Ok(Done::Woke(with_memory(&transitions, &before, &client).await))
        }
    }
}

/// The transitions, with the memory held before and after each. It has happened, so a shim that does not tell
/// the memory afterwards is no error.
async fn with_memory(
    transitions: &[control::Transition],
    before: &Memory,
    client: &Client,
) -> Vec<Transition> {
    let after = match client.list().await {
        Ok(containers) => memory_of(containers.iter()),
        Err(_) => Memory::new(),
    };
    transitions
        .iter()
        .map(|transition| Transition {
            memory_before_bytes: before.get(&transition.id).copied(),
            memory_after_bytes: after.get(&transition.id).copied(),
            ..Transition::from(transition)
        })
        .collect()
}
