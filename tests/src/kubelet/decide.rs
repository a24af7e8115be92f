//! What a kubelet decides, as pure functions over what it sees.

use std::collections::BTreeMap;
use std::time::Duration;

use super::api::{Container, ContainerState, ContainerStatus};
use super::spec::{CONTAINER, RestartPolicy, UID};

/// How a container looks to a kubelet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// The runtime does not know it.
    Missing,
    /// Created, and not started.
    Created,
    /// It runs.
    Running,
    /// It has ended with this status.
    Exited(i32),
    /// The runtime has lost track of it.
    Unknown,
}

impl Seen {
    /// What the runtime says of a container.
    pub fn of(status: &ContainerStatus) -> Self {
        match status.state.enum_value() {
            Ok(ContainerState::CONTAINER_CREATED) => Self::Created,
            Ok(ContainerState::CONTAINER_RUNNING) => Self::Running,
            Ok(ContainerState::CONTAINER_EXITED) => Self::Exited(status.exit_code),
            _ => Self::Unknown,
        }
    }
}

/// What is to be done about a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Leave,
    /// Start a new one in its place.
    Start,
    /// Kill it, and start a new one in its place.
    Replace,
}

/// What a kubelet does about a container that is to last, by what it sees and what the liveness probe says.
pub fn step(policy: RestartPolicy, seen: Seen, alive: bool) -> Step {
    match (seen, policy) {
        (Seen::Running | Seen::Created, _) if alive => Step::Leave,
        (Seen::Running | Seen::Created | Seen::Unknown, RestartPolicy::Never) => Step::Leave,
        (Seen::Running | Seen::Created | Seen::Unknown, _) => Step::Replace,
        (Seen::Missing, _) => Step::Start,
        (Seen::Exited(_), RestartPolicy::Never) | (Seen::Exited(0), RestartPolicy::OnFailure) => Step::Leave,
        (Seen::Exited(_), _) => Step::Start,
    }
}

/// How long a container that has been restarted `restarts` times waits for the next restart.
pub fn backoff(restarts: u32) -> Duration {
    const FIRST: Duration = Duration::from_secs(10);
    const LONGEST: Duration = Duration::from_mins(5);
    match restarts {
        0 => Duration::ZERO,
        more => FIRST.saturating_mul(1 << (more - 1).min(10)).min(LONGEST),
    }
}

/// The containers that garbage collection removes: of those that have ended, all but the newest of each name and pod.
pub fn garbage(containers: &[Container]) -> Vec<String> {
    let mut ended: BTreeMap<(&str, &str), Vec<&Container>> = BTreeMap::new();
    for container in containers {
        if container.state.enum_value() == Ok(ContainerState::CONTAINER_EXITED) {
            let label = |name: &str| container.labels.get(name).map_or("", String::as_str);
            ended.entry((label(UID), label(CONTAINER))).or_default().push(container);
        }
    }
    let superseded = ended.into_values().flat_map(|mut same| {
        same.sort_by_key(|container| container.created_at);
        same.pop();
        same
    });
    superseded.map(|container| container.id.clone()).collect()
}

#[cfg(test)]
mod tests {
    use protobuf::EnumOrUnknown;

    use super::*;

    #[test]
    fn a_container_is_replaced_when_it_is_dead_or_lost_and_its_policy_says_so() {
        use RestartPolicy::{Always, Never, OnFailure};
        for (policy, seen, alive, wanted) in [
            (Always, Seen::Running, true, Step::Leave),
            (Always, Seen::Created, true, Step::Leave),
            (Always, Seen::Running, false, Step::Replace),
            (Never, Seen::Running, false, Step::Leave),
            (Always, Seen::Unknown, true, Step::Replace),
            (OnFailure, Seen::Unknown, true, Step::Replace),
            (Always, Seen::Exited(0), true, Step::Start),
            (OnFailure, Seen::Exited(0), true, Step::Leave),
            (OnFailure, Seen::Exited(137), true, Step::Start),
            (Never, Seen::Exited(1), true, Step::Leave),
            (Never, Seen::Missing, true, Step::Start),
        ] {
            assert_eq!(step(policy, seen, alive), wanted, "{policy:?} {seen:?} {alive}");
        }
    }

    #[test]
    fn restarts_come_slower_and_slower() {
        let seconds: Vec<u64> = [0, 1, 2, 3, 6, 40].map(|restarts| backoff(restarts).as_secs()).into();
        assert_eq!(seconds, [0, 10, 20, 40, 300, 300]);
    }

    #[test]
    fn the_newest_dead_container_of_each_name_is_kept() {
        let container = |id: &str, name: &str, state, created_at| Container {
            id: id.into(),
            state: EnumOrUnknown::new(state),
            created_at,
            labels: [(UID.to_owned(), "u".to_owned()), (CONTAINER.to_owned(), name.to_owned())].into(),
            ..Default::default()
        };
        let all = [
            container("a2", "a", ContainerState::CONTAINER_EXITED, 2),
            container("a1", "a", ContainerState::CONTAINER_EXITED, 1),
            container("a3", "a", ContainerState::CONTAINER_RUNNING, 3),
            container("b1", "b", ContainerState::CONTAINER_EXITED, 1),
        ];
        assert_eq!(garbage(&all), ["a1"]);
    }
}
