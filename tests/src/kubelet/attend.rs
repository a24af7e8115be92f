//! The loops of a kubelet: relist and stats every second, probes by their own timing, restarts by policy.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::api::{Container, ContainerState, PodSandboxState};
use super::decide::{Seen, Step, backoff, step};
use super::error::Result;
use super::probe::{self, Belief, Judge, Kind, Probe};
use super::spec::ContainerSpec;
use super::{Kubelet, Pod};
use crate::node::Runtime;

/// How often everything is listed.
const RELIST: Duration = Duration::from_secs(1);

/// What a kubelet saw and did.
#[derive(Debug, Default, Clone)]
pub struct Report {
    /// How often everything was listed.
    pub relists: usize,
    /// The longest time that one listing with its stats took.
    pub slowest: Duration,
    /// How many containers were started in the place of others.
    pub restarts: usize,
    /// Containers whose state was unknown.
    pub unknown: Vec<String>,
    /// Pods that were not ready although they had been: their sandbox, a container or a probe.
    pub not_ready: Vec<String>,
    /// Running containers and sandboxes without usable stats.
    pub missing_stats: Vec<String>,
    /// Calls that failed.
    pub errors: Vec<String>,
    /// How many probes were asked.
    pub probes: usize,
    /// Probes that failed, believed or not.
    pub failed_probes: Vec<String>,
}

/// What the loops share.
struct Attendance<'a> {
    kubelet: &'a Kubelet<'a>,
    pods: &'a [&'a Pod<'a>],
    over: AtomicBool,
    report: Mutex<Report>,
    /// By the id of the container.
    beliefs: Mutex<BTreeMap<String, Belief>>,
}

/// Ends the loops when the work is done, even by a panic.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Kubelet<'_> {
    /// Attends to pods while `work` goes on; gives back its result and what was seen.
    pub fn attend<T>(&self, pods: &[&Pod<'_>], work: impl FnOnce() -> T) -> (T, Report) {
        let attendance = Attendance {
            kubelet: self,
            pods,
            over: AtomicBool::new(false),
            report: Mutex::default(),
            beliefs: Mutex::default(),
        };
        let done = thread::scope(|scope| {
            scope.spawn(|| attendance.sync());
            for pod in pods {
                for container in pod.spec().lasting() {
                    let probes = [
                        (&container.startup, Kind::Startup),
                        (&container.liveness, Kind::Liveness),
                        (&container.readiness, Kind::Readiness),
                    ];
                    for (probe, kind) in probes {
                        if let Some(probe) = probe {
                            let attendance = &attendance;
                            scope.spawn(move || attendance.probe(pod, container, probe, kind));
                        }
                    }
                }
            }
            let _over = Over(&attendance.over);
            work()
        });
        let report = attendance.report().clone();
        (done, report)
    }
}

impl Attendance<'_> {
    fn report(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn beliefs(&self) -> MutexGuard<'_, BTreeMap<String, Belief>> {
        self.beliefs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Waits, but not beyond the end.
    fn pause(&self, time: Duration) {
        let end = Instant::now() + time;
        while !self.is_over() && Instant::now() < end {
            thread::sleep(Duration::from_millis(20).min(end.saturating_duration_since(Instant::now())));
        }
    }

    fn sync(&self) {
        // When each container was last replaced, by pod and name.
        let mut replaced = BTreeMap::new();
        // The pods that have been ready.
        let mut were_ready = vec![false; self.pods.len()];
        while !self.is_over() {
            let begun = Instant::now();
            if let Err(error) = self.relist(&mut replaced, &mut were_ready) {
                self.report().errors.push(error.to_string());
            }
            let took = begun.elapsed();
            {
                let mut report = self.report();
                report.relists += 1;
                report.slowest = report.slowest.max(took);
            }
            self.pause(RELIST.saturating_sub(took));
        }
    }

    fn relist(
        &self,
        replaced: &mut BTreeMap<(String, String), Instant>,
        were_ready: &mut [bool],
    ) -> Result<()> {
        let sandboxes = self.kubelet.cri.list_pod_sandboxes()?;
        let containers = self.kubelet.cri.list_containers()?;
        self.check_stats(&containers)?;
        for (pod, was_ready) in self.pods.iter().zip(were_ready) {
            let sandbox_ready = sandboxes.iter().any(|sandbox| {
                sandbox.id == pod.sandbox()
                    && sandbox.state.enum_value() == Ok(PodSandboxState::SANDBOX_READY)
            });
            let mut why = (!sandbox_ready).then(|| "its sandbox".to_owned());
            for container in pod.spec().lasting() {
                let (seen, ready) = self.look_after(pod, container, replaced)?;
                if seen != Seen::Running || !ready {
                    why.get_or_insert_with(|| format!("{}, {seen:?}", container.name));
                }
            }
            match why {
                None => *was_ready = true,
                Some(why) if *was_ready => {
                    self.report().not_ready.push(format!("{}: {why}", pod.spec().name));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Looks at one container, and does what is to be done. Gives back how it is and whether its probes find it ready.
    fn look_after(
        &self,
        pod: &Pod<'_>,
        container: &ContainerSpec,
        replaced: &mut BTreeMap<(String, String), Instant>,
    ) -> Result<(Seen, bool)> {
        let seen = pod.seen(&container.name)?;
        let name = format!("{}/{}", pod.spec().name, container.name);
        if seen == Seen::Unknown {
            self.report().unknown.push(name.clone());
        }
        let belief = self.belief(&pod.id(&container.name)?, container);
        let restarts = pod.restarts(&container.name);
        let key = (pod.spec().name.clone(), container.name.clone());
        let due = replaced.get(&key).is_none_or(|at| at.elapsed() >= backoff(restarts));
        let done = match step(pod.spec().restart, seen, belief.alive) {
            Step::Start | Step::Replace if !due => Ok(false),
            Step::Start => pod.start(container).map(|()| true),
            Step::Replace => pod.replace(container).map(|()| true),
            Step::Leave => Ok(false),
        };
        if done? {
            replaced.insert(key, Instant::now());
            self.report().restarts += 1;
        }
        Ok((seen, belief.ready && belief.started))
    }

    /// What is believed of a container.
    fn belief(&self, id: &str, container: &ContainerSpec) -> Belief {
        let fresh = Belief::fresh(container.startup.is_some(), container.readiness.is_some());
        *self.beliefs().entry(id.to_owned()).or_insert(fresh)
    }

    /// Each running container has stats, and so has each ready sandbox for itself and for those containers.
    fn check_stats(&self, containers: &[Container]) -> Result<()> {
        let single = self.kubelet.cri.list_container_stats()?;
        let pods = self.kubelet.cri.list_pod_sandbox_stats()?;
        let id = |stats: &super::api::ContainerStats| stats.attributes.as_ref().map(|it| it.id.clone());
        let mut missing = Vec::new();
        for container in containers {
            let Some(pod) = self.pods.iter().find(|pod| pod.sandbox() == container.pod_sandbox_id) else {
                continue;
            };
            let running = |state| state == Ok(ContainerState::CONTAINER_RUNNING);
            // One that ended meanwhile needs none.
            let lasts = || self.kubelet.cri.container_status(&container.id).map(|now| now.state.enum_value());
            if !running(container.state.enum_value()) || !lasts().is_ok_and(running) {
                continue;
            }
            let stats = single.iter().find(|stats| id(stats).as_deref() == Some(&container.id));
            let used = stats.is_some_and(|stats| usage(stats, pod.spec().runtime));
            let of_pod = pods.iter().find(|stats| {
                stats.attributes.as_ref().is_some_and(|attributes| attributes.id == pod.sandbox())
            });
            let in_pod = of_pod.and_then(|stats| stats.linux.as_ref()).is_some_and(|linux| {
                linux.containers.iter().any(|one| id(one).as_ref() == Some(&container.id))
            });
            if !used || !in_pod {
                missing.push(format!("{}: alone {stats:?}, in its pod {in_pod}", container.id));
            }
        }
        self.report().missing_stats.append(&mut missing);
        Ok(())
    }

    fn probe(&self, pod: &Pod<'_>, container: &ContainerSpec, probe: &Probe, kind: Kind) {
        let mut judge = Judge::new(probe, kind);
        // After its verdict a liveness or startup probe waits for the next container.
        let (mut asked, mut settled) = (String::new(), false);
        self.pause(probe.initial_delay);
        while !self.is_over() {
            let Ok(id) = pod.id(&container.name) else { return };
            if id != asked {
                (judge, asked, settled) = (Judge::new(probe, kind), id, false);
            }
            let started = self.belief(&asked, container).started;
            let waits = kind != Kind::Startup && !started;
            if !waits && !settled {
                settled = self.ask(pod, &container.name, probe, kind, (&mut judge, &asked));
            }
            self.pause(probe.period);
        }
    }

    /// Asks one probe once; gives back whether there is nothing more to ask of this container.
    fn ask(
        &self,
        pod: &Pod<'_>,
        name: &str,
        probe: &Probe,
        kind: Kind,
        (judge, id): (&mut Judge, &str),
    ) -> bool {
        let kubelet = self.kubelet;
        let outcome = probe::ask(kubelet.node, &kubelet.cri, id, pod.ip(), probe);
        let Some(outcome) = outcome else { return false };
        {
            let mut report = self.report();
            report.probes += 1;
            if let Err(why) = &outcome.answer {
                let (pod, took) = (&pod.spec().name, outcome.took);
                report.failed_probes.push(format!("{pod}/{name} {kind:?} after {took:?}: {why}"));
            }
        }
        let believed = judge.note(outcome.answer.is_ok());
        self.beliefs().get_mut(id).is_some_and(|belief| belief.learn(kind, believed))
    }
}

/// Whether stats say that something is used. metrics-server leaves a container out whose usage is zero; for the
/// reference, which has nothing to read where a controller is missing, that there are stats is enough.
fn usage(stats: &super::api::ContainerStats, runtime: Runtime) -> bool {
    let some = |value: Option<u64>| value.is_some_and(|value| value > 0);
    let cpu = stats.cpu.as_ref().and_then(|cpu| cpu.usage_core_nano_seconds.as_ref()).map(|it| it.value);
    let memory =
        stats.memory.as_ref().and_then(|memory| memory.working_set_bytes.as_ref()).map(|it| it.value);
    runtime == Runtime::Runc || (some(cpu) && some(memory))
}
