//! A sandbox sleeps and wakes as one.
//!
//! Going to sleep, all of its containers are frozen before the first is dumped, so that none sees another gone. Waking,
//! whatever wakes one wakes the others. The pause container never sleeps, and neither do those that the pod's annotation
//! [`CONTAINERS`] leaves out.

use tracing::{debug, warn};

use crate::{
    container::{Handle, Transition},
    error::TaskError,
    lifecycle::{Depth, FrozenBy, Refusal, State},
    task::Containers,
};

/// The pod's annotation with the names of the containers that sleep, separated by commas; the others stay awake.
/// Without it all sleep.
pub const CONTAINERS: &str = "agentcube.volcano.sh/containers";
/// The name of a container in its pod.
const NAME: &str = "io.kubernetes.cri.container-name";

/// Whether the annotation, if there is one, lets the container of this name sleep. One without a name is no part of a
/// pod that Kubernetes made, and sleeps.
fn may_sleep(annotation: Option<&str>, name: Option<&str>) -> bool {
    let (Some(listed), Some(name)) = (annotation, name) else { return true };
    listed.split(',').any(|one| one.trim() == name)
}

/// The container `id`, or the containers of the sandbox `id` that sleep and wake with it: those that have not ended,
/// without the pause container and those that the pod's annotation leaves awake.
///
/// # Errors
/// When there is no such container, or no container of the sandbox can sleep.
pub fn members(containers: &Containers, id: &str) -> Result<Vec<Handle>, TaskError> {
    let all = containers.all();
    let of_pod = |handle: &&Handle| handle.identity().sandbox_id == id;
    let annotation = all
        .iter()
        .filter(of_pod)
        .find(|handle| handle.identity().is_sandbox)
        .and_then(|pause| pause.identity().annotations.get(CONTAINERS));
    let mut others = all.iter().filter(of_pod).filter(|handle| !handle.identity().is_sandbox).peekable();
    if others.peek().is_none() {
        let one = containers.get(id)?;
        if one.identity().is_sandbox {
            let hint = "it is the pause container of a pod without other containers, and never sleeps";
            return Err(TaskError::Unsupported(format!("container {id}: {hint}")));
        }
        return Ok(vec![one]);
    }
    let members: Vec<Handle> = others
        .filter(|handle| {
            let name = handle.identity().annotations.get(NAME);
            may_sleep(annotation.map(String::as_str), name.map(String::as_str))
                && handle.snapshot().state != State::Stopped
        })
        .cloned()
        .collect();
    if members.is_empty() {
        let named =
            annotation.map_or_else(String::new, |named| format!(", or none that {CONTAINERS}={named} names"));
        let reason = format!("sandbox {id}: it has no container that runs{named}");
        return Err(TaskError::Unsupported(reason));
    }
    Ok(members)
}

/// Does several containers' work at the same time and waits for all of it. The work goes on when the client that
/// asked for it has gone away.
async fn of_all<T: Send + 'static>(
    work: impl Iterator<Item = impl Future<Output = Result<T, TaskError>> + Send + 'static>,
) -> Vec<Result<T, TaskError>> {
    let running: Vec<_> = work.map(tokio::spawn).collect();
    let mut done = Vec::with_capacity(running.len());
    for one in running {
        done.push(one.await.unwrap_or_else(|error| Err(TaskError::Dependency(error.to_string()))));
    }
    done
}

/// Puts containers to sleep, all or none, and gives back those that fell asleep: of several, one that sleeps that deep
/// already is as it should be. Without a depth each goes as deep as it can.
///
/// # Errors
/// When one cannot; the others run on then, or run again.
pub async fn sleep(
    sandbox: &str,
    targets: Vec<Handle>,
    asked: Option<Depth>,
) -> Result<Vec<(Handle, Transition)>, TaskError> {
    if let [one] = targets.as_slice() {
        let depth = asked.unwrap_or_else(|| one.runtime().deepest());
        return Ok(vec![(one.clone(), one.sleep(depth).await?)]);
    }
    // Those that sleep already are none of its business when it fails.
    let awake: Vec<Handle> =
        targets.iter().filter(|handle| handle.snapshot().depth().is_none()).cloned().collect();
    let slept = freeze_and_deepen(sandbox, &targets, asked).await;
    if slept.is_err() {
        for woken in of_all(awake.into_iter().map(wake_or_join)).await {
            if let Err(error) = woken {
                warn!(%sandbox, %error, "after a failed sleep of its sandbox");
            }
        }
    }
    slept
}

async fn freeze_and_deepen(
    sandbox: &str,
    targets: &[Handle],
    asked: Option<Depth>,
) -> Result<Vec<(Handle, Transition)>, TaskError> {
    let frozen = sleep_each(targets, |_| Depth::Frozen).await?;
    let deepest = |handle: &Handle| asked.unwrap_or_else(|| handle.runtime().deepest());
    let deepening: Vec<Handle> =
        targets.iter().filter(|handle| deepest(handle) > Depth::Frozen).cloned().collect();
    if let Some(woken) = deepening.iter().find(|handle| handle.snapshot().depth().is_none()) {
        let reason = format!("sandbox {sandbox}: {} was woken while it fell asleep", woken.id());
        return Err(TaskError::Dependency(reason));
    }
    let dumped = sleep_each(&deepening, deepest).await?;
    Ok(targets
        .iter()
        .zip(frozen.into_iter().map(|(_, slept)| slept))
        .filter_map(|(handle, first)| {
            let second = dumped.iter().find(|(dumped, _)| dumped.same_as(handle));
            let both = joined(first, second.and_then(|(_, slept)| slept.clone()))?;
            Some((handle.clone(), both))
        })
        .collect())
}

/// Puts each to sleep at the same time; nothing for one that sleeps that deep already.
async fn sleep_each(
    targets: &[Handle],
    depth: impl Fn(&Handle) -> Depth,
) -> Result<Vec<(Handle, Option<Transition>)>, TaskError> {
    let work = targets.iter().map(|handle| {
        let (handle, depth) = (handle.clone(), depth(handle));
        async move {
            match handle.sleep(depth).await {
                Err(TaskError::Refused { refusal: Refusal::AlreadyAsleep(now), .. }) if now >= depth => {
                    Ok((handle, None))
                }
                other => other.map(|slept| (handle, Some(slept))),
            }
        }
    });
    of_all(work).await.into_iter().collect()
}

/// A freeze and the dump that followed it as one sleep: the agent has stood still since the freeze.
fn joined(first: Option<Transition>, second: Option<Transition>) -> Option<Transition> {
    match (first, second) {
        (Some(frozen), Some(dumped)) => {
            let before = dumped.at.duration_since(frozen.at).unwrap_or_default();
            let total = (frozen.total + before).max(dumped.total);
            Some(Transition { total, stopped: before.max(dumped.stopped), ..dumped })
        }
        (first, second) => second.or(first),
    }
}

/// Wakes containers side by side; gives back those that slept.
///
/// # Errors
/// When one cannot be woken. One alone that is waking already is an error as well; of several it is as it should be.
pub async fn wake(targets: Vec<Handle>) -> Result<Vec<(Handle, Transition)>, TaskError> {
    let several = targets.len() > 1;
    let work = targets.into_iter().map(|handle| async move {
        let woke = if several { wake_or_join(handle.clone()).await? } else { handle.wake().await? };
        Ok(woke.map(|woke| (handle, woke)))
    });
    let woken: Result<Vec<_>, TaskError> = of_all(work).await.into_iter().collect();
    Ok(woken?.into_iter().flatten().collect())
}

/// Wakes a container, or waits for the end of a wake under way.
async fn wake_or_join(handle: Handle) -> Result<Option<Transition>, TaskError> {
    match handle.wake().await {
        Err(TaskError::Refused { refusal: Refusal::Waking, .. }) => {
            let mut changes = handle.changes();
            let ended = changes.wait_for(|now| !matches!(now.state, State::Restoring { .. })).await;
            match ended.map(|now| (now.state, now.last_error.clone())) {
                Ok((State::Running, _)) => Ok(None),
                Ok((_, reason)) => Err(TaskError::Dependency(format!(
                    "container {}: it did not wake: {}",
                    handle.id(),
                    reason.unwrap_or_else(|| "it has ended".to_owned())
                ))),
                Err(_) => Err(TaskError::Gone(handle.id().to_owned())),
            }
        }
        other => other,
    }
}

/// Whether a container that was in one state is now on its way out of a sleep.
fn has_been_woken(before: State, now: State) -> bool {
    let slept =
        matches!(before, State::Frozen { by: FrozenBy::Sleep } | State::Dumping { .. } | State::Checkpointed);
    let wakes = matches!(now, State::Running | State::Restoring { .. } | State::Dumping { woken: true, .. });
    // A dump that begins, fails or is woken once more is told by the first of its changes.
    slept && wakes && !matches!((before, now), (State::Dumping { woken: true, .. }, _))
}

/// Wakes the others of a container's sandbox whenever it is woken, until it is deleted.
pub async fn keep_company(containers: Containers, handle: Handle) {
    let sandbox = handle.identity().sandbox_id.clone();
    let mut changes = handle.changes();
    let mut before = changes.borrow_and_update().state;
    while changes.changed().await.is_ok() {
        let now = changes.borrow_and_update().state;
        if has_been_woken(before, now) {
            let Ok(members) = members(&containers, &sandbox) else { continue };
            let asleep = members.into_iter().filter(|other| {
                let state = other.snapshot().state;
                let sleeps = matches!(
                    state,
                    State::Frozen { by: FrozenBy::Sleep } | State::Dumping { .. } | State::Checkpointed
                );
                sleeps && !other.same_as(&handle)
            });
            for other in asleep {
                debug!(id = %handle.id(), other = %other.id(), "awake: it wakes the other");
                tokio::spawn(wake_for_company(other));
            }
        }
        before = now;
    }
}

async fn wake_for_company(other: Handle) {
    match other.wake().await {
        // Something else was faster.
        Ok(_) | Err(TaskError::Refused { .. } | TaskError::Gone(_)) => {}
        Err(error) => warn!(id = %other.id(), %error, "it sleeps on although its sandbox is awake"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_annotation_names_those_that_sleep() {
        assert!(may_sleep(None, Some("agent")));
        assert!(may_sleep(Some("agent, worker"), Some("worker")));
        assert!(!may_sleep(Some("agent,worker"), Some("proxy")));
        assert!(!may_sleep(Some(""), Some("agent")));
        assert!(!may_sleep(Some("agent2"), Some("agent")));
        assert!(may_sleep(Some("agent"), None), "a container without a name is no part of a pod");
    }

    #[test]
    fn only_the_end_of_a_sleep_wakes_the_others() {
        let asleep = State::Frozen { by: FrozenBy::Sleep };
        let dumping = |woken| State::Dumping { woken, killed: false, exited: false };
        let restoring = State::Restoring { killed: false };
        for (before, now) in [
            (asleep, State::Running),
            (State::Checkpointed, restoring),
            (State::Checkpointed, State::Running),
            (dumping(false), dumping(true)),
            (dumping(false), State::Running),
        ] {
            assert!(has_been_woken(before, now), "{before:?} {now:?}");
        }
        for (before, now) in [
            (State::Running, State::Running),
            (asleep, dumping(false)),
            (dumping(true), State::Running),
            (dumping(false), State::Checkpointed),
            (restoring, State::Running),
            (State::Frozen { by: FrozenBy::Client }, State::Running),
            (State::Checkpointed, State::Stopped),
            (State::Created, State::Running),
        ] {
            assert!(!has_been_woken(before, now), "{before:?} {now:?}");
        }
    }
}
