//! A sandbox sleeps and wakes as one.
//!
//! Going to sleep, all of its containers are frozen before the first goes deeper, so that none sees another gone. Waking,
//! whatever wakes one wakes the others. The pause container never sleeps, and neither do those that the pod's annotation
//! [`CONTAINERS`] leaves out.

use std::time::{Duration, Instant};

use tracing::{debug, warn};

use crate::{
    container::{Handle, Snapshot, Transition},
    error::TaskError,
    lifecycle::{Depth, Refusal, State},
    runtime::RuntimeError,
    task::Containers,
    wake::WakeCause,
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

/// How long an agent that is at work is asked again whether it can sleep now.
const BUSY: Duration = Duration::from_millis(300);
/// How long it is left at work in between.
const AT_WORK: Duration = Duration::from_millis(10);

/// What a request to sleep asks for.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// None for the deepest.
    pub depth: Option<Depth>,
    /// Where it does not work, a shallower depth will do.
    pub or_shallower: bool,
}

impl Wish {
    fn depth_for(self, handle: &Handle) -> Depth {
        self.depth.unwrap_or_else(|| handle.runtime().deepest())
    }
}

/// A depth that did not work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortfall {
    /// The depth.
    pub depth: Depth,
    /// Why it did not work.
    pub reason: String,
}

/// A container that fell asleep, or deeper asleep.
pub struct Slept {
    /// The container.
    pub handle: Handle,
    /// Its sleep.
    pub transition: Transition,
    /// The deeper depths that did not work, deepest first.
    pub shortfalls: Vec<Shortfall>,
}

/// Whether an error speaks against this moment alone: its agent has something to do.
fn is_busy(error: &TaskError) -> bool {
    matches!(
        error,
        TaskError::Runtime { source: RuntimeError::Busy(_), .. }
            | TaskError::Refused { refusal: Refusal::Probed, .. }
    )
}

/// Whether an error speaks against this depth rather than against any.
fn rules_out_the_depth(error: &TaskError) -> bool {
    match error {
        TaskError::Runtime { source, .. } => !matches!(source, RuntimeError::Vetoed | RuntimeError::Busy(_)),
        _ => false,
    }
}

/// Puts a container to sleep in a moment when it has nothing to do.
async fn sleep_when_idle(handle: &Handle, depth: Depth) -> Result<Transition, TaskError> {
    let begun = Instant::now();
    loop {
        match handle.sleep(depth).await {
            Err(error) if is_busy(&error) && begun.elapsed() < BUSY => {
                // What it waits for may be written in memory that has not come yet since its last wake.
                handle.runtime().settle().await;
                tokio::time::sleep(AT_WORK).await;
            }
            other => return other,
        }
    }
}

/// Puts one container to sleep as it was asked for.
async fn sleep_one(handle: &Handle, wish: Wish) -> Result<Slept, TaskError> {
    let mut shortfalls = Vec::new();
    let mut depth = wish.depth_for(handle);
    loop {
        let transition = match (sleep_when_idle(handle, depth).await, depth.shallower()) {
            (Err(error), Some(shallower)) if wish.or_shallower && rules_out_the_depth(&error) => {
                shortfalls.push(Shortfall { depth, reason: error.to_string() });
                depth = shallower;
                continue;
            }
            // It could not be deepened, and sleeps on.
            (Err(TaskError::Refused { refusal: Refusal::AlreadyAsleep(now), id }), _)
                if !shortfalls.is_empty() && now >= depth =>
            {
                let last = handle.snapshot().last_sleep;
                last.ok_or(TaskError::Refused { id, refusal: Refusal::AlreadyAsleep(now) })?
            }
            (slept, _) => slept?,
        };
        return Ok(Slept { handle: handle.clone(), transition, shortfalls });
    }
}

/// Puts containers to sleep, all or none, and gives back those that fell asleep: of several, one that sleeps that deep
/// already is as it should be. Where a shallower depth will do, each goes as deep as it can by itself: whatever wakes
/// one wakes the others, from wherever they are.
///
/// # Errors
/// When one cannot; the others run on then, or run again.
pub async fn sleep(sandbox: &str, targets: Vec<Handle>, wish: Wish) -> Result<Vec<Slept>, TaskError> {
    if let [one] = targets.as_slice() {
        return Ok(vec![sleep_one(one, wish).await?]);
    }
    let begun = Instant::now();
    loop {
        // Those that sleep already are none of its business when it fails.
        let awake: Vec<Handle> =
            targets.iter().filter(|handle| !handle.snapshot().state.sleeps()).cloned().collect();
        let error = match freeze_and_deepen(sandbox, &targets, wish).await {
            Ok(slept) => return Ok(slept),
            Err(error) => error,
        };
        let waking = awake.into_iter().map(|handle| async move { handle.demand(WakeCause::Sandbox).await });
        for woken in of_all(waking).await {
            if let Err(error) = woken {
                warn!(%sandbox, %error, "after a failed sleep of its sandbox");
            }
        }
        if !is_busy(&error) || begun.elapsed() >= BUSY {
            return Err(error);
        }
        tokio::time::sleep(AT_WORK).await;
    }
}

async fn freeze_and_deepen(sandbox: &str, targets: &[Handle], wish: Wish) -> Result<Vec<Slept>, TaskError> {
    let freezing = targets.iter().cloned().map(|handle| async move {
        match sleep_when_idle(&handle, Depth::Frozen).await {
            Err(TaskError::Refused { refusal: Refusal::AlreadyAsleep(_), .. }) => Ok(None),
            slept => slept.map(Some),
        }
    });
    let frozen: Vec<Option<Transition>> = of_all(freezing).await.into_iter().collect::<Result<_, _>>()?;
    all_sleep(sandbox, targets).await?;
    let deepening = targets.iter().cloned().map(move |handle| async move {
        let depth = wish.depth_for(&handle);
        if depth == Depth::Frozen {
            return Ok(None);
        }
        match sleep_one(&handle, wish).await {
            Err(TaskError::Refused { refusal: Refusal::AlreadyAsleep(now), .. }) if now >= depth => Ok(None),
            slept => slept.map(Some),
        }
    });
    let deepened: Vec<Option<Slept>> = of_all(deepening).await.into_iter().collect::<Result<_, _>>()?;
    all_sleep(sandbox, targets).await?;
    let joined = targets.iter().zip(frozen).zip(deepened).filter_map(|((handle, first), second)| {
        let (second, shortfalls) =
            second.map_or((None, Vec::new()), |slept| (Some(slept.transition), slept.shortfalls));
        Some(Slept { handle: handle.clone(), transition: joined(first, second)?, shortfalls })
    });
    Ok(joined.collect())
}

/// Whether all sleep, as they were made to.
///
/// # Errors
/// When one has been woken meanwhile; [`RuntimeError::Busy`] when it has woken by itself.
async fn all_sleep(sandbox: &str, targets: &[Handle]) -> Result<(), TaskError> {
    let woken: Vec<&Handle> = targets.iter().filter(|handle| !handle.snapshot().state.sleeps()).collect();
    // Only when it is awake does it tell what for. Why it cannot be is of no interest here.
    for handle in &woken {
        let _ = handle.demand(WakeCause::Sandbox).await;
    }
    let cause = |handle: &&Handle| handle.snapshot().last_wake.and_then(|woke| woke.cause);
    let by_itself = |cause: WakeCause| matches!(cause, WakeCause::Traffic | WakeCause::Timer);
    let Some(first) = woken.first() else { return Ok(()) };
    let own = woken.iter().find(|handle| cause(handle).is_some_and(by_itself));
    if let Some(own) = own
        && woken
            .iter()
            .all(|handle| cause(handle).is_some_and(|of| by_itself(of) || of == WakeCause::Sandbox))
    {
        return Err(TaskError::Runtime {
            id: own.id().to_owned(),
            what: "was woken while it fell asleep",
            source: RuntimeError::Busy("something that it waits for has come".to_owned()),
        });
    }
    let reason = format!("sandbox {sandbox}: {} was woken while it fell asleep", first.id());
    Err(TaskError::Dependency(reason))
}

/// A freeze and what followed it as one sleep: the agent has stood still since the freeze.
fn joined(first: Option<Transition>, second: Option<Transition>) -> Option<Transition> {
    match (first, second) {
        (Some(frozen), Some(deeper)) => {
            let before = deeper.at.duration_since(frozen.at).unwrap_or_default();
            let total = (frozen.total + before).max(deeper.total);
            // Of a sleep with its processes in place there is no moment when they were gone.
            let stopped =
                if deeper.depth == Depth::Checkpointed { before.max(deeper.stopped) } else { deeper.stopped };
            Some(Transition { total, stopped, ..deeper })
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

/// What a companion has seen of its container.
#[derive(Debug, Clone, Copy)]
struct Seen {
    state: State,
    wakes: u64,
}

impl Seen {
    fn of(snapshot: &Snapshot) -> Self {
        Self { state: snapshot.state, wakes: snapshot.wakes }
    }
}

/// Whether a container is now on its way out of a sleep, and was not before.
fn has_been_woken(before: Seen, now: Seen) -> bool {
    match (before.state, now.state) {
        // Told when that began.
        (State::Restoring { .. } | State::Dumping { woken: true, .. }, _) => false,
        (State::Checkpointed, State::Running | State::Restoring { .. })
        | (State::Dumping { .. }, State::Running | State::Restoring { .. }) => true,
        (from, State::Dumping { woken: true, .. }) => from.sleeps(),
        // One that could not be frozen, because it is at work, has not slept.
        _ => now.wakes > before.wakes,
    }
}

/// Wakes the others of a container's sandbox whenever it is woken, until it is deleted.
pub async fn keep_company(containers: Containers, handle: Handle) {
    let sandbox = handle.identity().sandbox_id.clone();
    let mut changes = handle.changes();
    let mut before = Seen::of(&changes.borrow_and_update());
    while changes.changed().await.is_ok() {
        let now = Seen::of(&changes.borrow_and_update());
        if has_been_woken(before, now) {
            let members = members(&containers, &sandbox).unwrap_or_default();
            let asleep = members
                .into_iter()
                .filter(|other| other.snapshot().state.sleeps() && !other.same_as(&handle));
            for other in asleep {
                debug!(id = %handle.id(), other = %other.id(), "awake: it wakes the other");
                tokio::spawn(wake_for_company(other));
            }
        }
        before = now;
    }
}

async fn wake_for_company(other: Handle) {
    match other.demand(WakeCause::Sandbox).await {
        // Something else was faster.
        Ok(()) | Err(TaskError::Refused { .. } | TaskError::Gone(_)) => {}
        Err(error) => warn!(id = %other.id(), %error, "it sleeps on although its sandbox is awake"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::FrozenBy;

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
        let frozen = |by| State::Frozen { by };
        let asleep = frozen(FrozenBy::Sleep);
        let dumping = |woken| State::Dumping { asleep: false, woken, killed: false, exited: false };
        let deepening = |woken| State::Dumping { asleep: true, woken, killed: false, exited: false };
        let restoring = State::Restoring { killed: false };
        let woken = |(before, now): (State, State), more: u64| {
            has_been_woken(Seen { state: before, wakes: 1 }, Seen { state: now, wakes: 1 + more })
        };
        for change in [
            (State::Checkpointed, restoring),
            (State::Checkpointed, State::Running),
            (dumping(false), dumping(true)),
            (dumping(false), State::Running),
            (deepening(false), deepening(true)),
            (asleep, deepening(true)),
        ] {
            assert!(woken(change, 0), "{change:?}");
        }
        // What is thawed is awake when it says so: one that was at work, and could not be frozen, does not.
        for change in [
            (asleep, State::Running),
            (State::Reclaiming, State::Running),
            (State::Reclaimed, State::Running),
            (State::Running, State::Running),
        ] {
            assert!(woken(change, 1), "{change:?}");
            assert!(!woken(change, 0), "{change:?}");
        }
        for change in [
            (asleep, dumping(false)),
            (deepening(false), asleep),
            (asleep, State::Reclaiming),
            (State::Reclaiming, State::Reclaimed),
            (State::Reclaimed, deepening(false)),
            (State::Reclaimed, frozen(FrozenBy::Client)),
            (dumping(false), State::Checkpointed),
            (frozen(FrozenBy::Client), State::Running),
            (State::Checkpointed, State::Stopped),
            (State::Created, State::Running),
        ] {
            assert!(!woken(change, 0), "{change:?}");
        }
        for told in [(dumping(true), State::Running), (restoring, State::Running)] {
            assert!(!woken(told, 1), "{told:?}");
        }
    }
}
