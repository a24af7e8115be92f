//! All shims of a node at once: what runs on it, and which container an id means.

use std::{path::Path, sync::Arc};

use tokio::{sync::Semaphore, task::JoinSet};

use crate::{
    client::{Client, ClientError, Timeouts},
    proto::control::Container,
    socket::{self, Endpoint, SocketError},
};

/// How many shims are asked at the same time: fewer than the usual limit of 1,024 descriptors by far.
const CONCURRENT: usize = 64;

/// A container and the shim that holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The shim's socket.
    pub endpoint: Endpoint,
    /// What the shim says about the container.
    pub container: Container,
}

/// A socket behind which no shim answered.
#[derive(Debug)]
pub struct Unreachable {
    /// The socket.
    pub endpoint: Endpoint,
    /// Why not.
    pub error: ClientError,
}

/// What all shims of a node say.
#[derive(Debug, Default)]
pub struct Survey {
    /// Their containers, ordered by namespace, sandbox and id.
    pub containers: Vec<Found>,
    /// Shims that could not be asked, ordered by namespace and name.
    pub unreachable: Vec<Unreachable>,
}

/// Why an id names no container, or more than one.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// The sockets could not be listed.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// No shim has a container whose id starts so.
    #[error("no container or sandbox {id:?}{}: `agentcube ps` lists them", unasked(*unreachable))]
    NotFound {
        /// What was asked for.
        id: String,
        /// How many shims could not be asked.
        unreachable: usize,
    },
    /// The shim that is named after the id does not answer.
    #[error("{reason}")]
    Unreachable {
        /// What was asked for.
        id: String,
        /// Why the shim could not be asked.
        reason: String,
    },
    /// Several ids start so.
    #[error("{prefix:?} is the start of several ids: {}; give more of it", matches.join(", "))]
    Ambiguous {
        /// What was asked for.
        prefix: String,
        /// The ids that it may mean, as NAMESPACE/ID.
        matches: Vec<String>,
    },
    /// The id exists in several of containerd's namespaces.
    #[error("{id:?} exists in the namespaces {}: choose one with -n", namespaces.join(", "))]
    SeveralNamespaces {
        /// The whole id.
        id: String,
        /// Where it exists.
        namespaces: Vec<String>,
    },
}

fn unasked(unreachable: usize) -> String {
    match unreachable {
        0 => String::new(),
        1 => " (1 shim could not be asked)".to_owned(),
        n => format!(" ({n} shims could not be asked)"),
    }
}

/// Asks every shim below `root`, or of one namespace, for its containers. Takes no longer than the query timeout
/// for each group of 64 shims that do not answer; one that hangs hides none of the others.
///
/// # Errors
/// As [`socket::discover`].
pub async fn survey(root: &Path, namespace: Option<&str>, timeouts: Timeouts) -> Result<Survey, SocketError> {
    let slots = Arc::new(Semaphore::new(CONCURRENT));
    let mut asked = JoinSet::new();
    for endpoint in socket::discover(root, namespace)? {
        let slots = Arc::clone(&slots);
        asked.spawn(async move {
            // Never closed, so acquiring cannot fail.
            let _slot = slots.acquire_owned().await;
            let answer = list(&endpoint, timeouts).await;
            (endpoint, answer)
        });
    }
    let mut survey = Survey::default();
    while let Some(answer) = asked.join_next().await {
        match answer {
            Ok((endpoint, Ok(containers))) => {
                let found =
                    containers.into_iter().map(|container| Found { endpoint: endpoint.clone(), container });
                survey.containers.extend(found);
            }
            Ok((endpoint, Err(error))) => survey.unreachable.push(Unreachable { endpoint, error }),
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }
    survey.containers.sort_by(|a, b| order(&a.container).cmp(&order(&b.container)));
    survey.unreachable.sort_by(|a, b| a.endpoint.cmp(&b.endpoint));
    Ok(survey)
}

async fn list(endpoint: &Endpoint, timeouts: Timeouts) -> Result<Vec<Container>, ClientError> {
    Client::connect_path(&endpoint.path, timeouts).await?.list().await
}

/// A pod's containers stand together, its pause container first.
fn order(container: &Container) -> (&str, &str, bool, &str) {
    let sandbox = if container.sandbox_id.is_empty() { &container.id } else { &container.sandbox_id };
    (&container.namespace, sandbox, !container.is_sandbox, &container.id)
}

impl Survey {
    /// The container that `prefix` means: the one whose id it is, else the only one whose id starts with it.
    /// The pause container stands for its sandbox.
    ///
    /// # Errors
    /// [`FindError`].
    pub fn select(&self, prefix: &str) -> Result<&Found, FindError> {
        let exact: Vec<&Found> = self.matching(|id| id == prefix);
        let matches = if exact.is_empty() { self.matching(|id| id.starts_with(prefix)) } else { exact };
        match matches[..] {
            [] => Err(self.missing(prefix)),
            [one] => Ok(one),
            [first, ..] if matches.iter().all(|found| found.container.id == first.container.id) => {
                Err(FindError::SeveralNamespaces {
                    id: first.container.id.clone(),
                    namespaces: matches.iter().map(|found| found.container.namespace.clone()).collect(),
                })
            }
            _ => Err(FindError::Ambiguous {
                prefix: prefix.to_owned(),
                matches: matches
                    .iter()
                    .map(|found| format!("{}/{}", found.container.namespace, found.container.id))
                    .collect(),
            }),
        }
    }

    /// A socket is named after its sandbox, so a shim that does not answer may still be known by name.
    fn missing(&self, prefix: &str) -> FindError {
        let silent = |shim: &&Unreachable| !prefix.is_empty() && shim.endpoint.name.starts_with(prefix);
        match self.unreachable.iter().find(silent) {
            Some(shim) => FindError::Unreachable { id: prefix.to_owned(), reason: shim.error.to_string() },
            None => FindError::NotFound { id: prefix.to_owned(), unreachable: self.unreachable.len() },
        }
    }

    fn matching(&self, accept: impl Fn(&str) -> bool) -> Vec<&Found> {
        self.containers.iter().filter(|found| accept(&found.container.id)).collect()
    }
}

/// Asks all shims and selects the container that `prefix` means; see [`Survey::select`].
///
/// # Errors
/// [`FindError`].
pub async fn find(
    root: &Path,
    namespace: Option<&str>,
    prefix: &str,
    timeouts: Timeouts,
) -> Result<Found, FindError> {
    survey(root, namespace, timeouts).await?.select(prefix).cloned()
}

#[cfg(test)]
mod tests;
