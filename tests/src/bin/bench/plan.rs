//! What is measured, in which order, how often and for how long at most.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What an agent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// A shell that counts in memory, and a netcat that answers for it.
    Busybox,
    /// An HTTP server in Python that holds this many MiB of random bytes.
    Python(u32),
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busybox => f.write_str("busybox"),
            Self::Python(mib) => write!(f, "python {mib} MiB"),
        }
    }
}

/// What puts the agent to sleep and wakes it, or starts it anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// This project's shim under containerd.
    Agentcube,
    /// `runc checkpoint` and `runc restore`.
    Runc,
    /// `crun checkpoint` and `crun restore`.
    Crun,
    /// A new container of the same image, by containerd and its own shim for runc.
    ColdStart,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Agentcube => "agentcube",
            Self::Runc => "runc",
            Self::Crun => "crun",
            Self::ColdStart => "cold start",
        })
    }
}

/// Where the image is when the agent is woken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cache {
    /// In the page cache, where the sleep has left it.
    Warm,
    /// On disk alone: synced and dropped from the page cache.
    Cold,
}

/// Sleeps and wakes of one workload, one at a time, each subject in turn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cycles {
    /// The agent.
    pub workload: Workload,
    /// Where its image is.
    pub cache: Cache,
    /// Who sleeps and wakes; each has an agent of its own.
    pub subjects: Vec<Subject>,
    /// Counted cycles of each; one more before them is not counted.
    pub count: u32,
    /// Cold starts among them.
    pub cold_starts: u32,
    /// After this time no further cycle begins, in seconds.
    pub seconds: u64,
}

/// Wakes of several sleeping agents at the same moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtOnce {
    /// The agents.
    pub workload: Workload,
    /// Whose.
    pub subjects: Vec<Subject>,
    /// How many at once, and how many rounds of that.
    pub rounds: Vec<(u32, u32)>,
    /// After this time no further round begins, in seconds.
    pub seconds: u64,
}

/// How deep an agent sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Depth {
    /// Its processes stand still.
    Frozen,
    /// The same, and its memory is in swap.
    Reclaimed,
    /// It is an image on disk.
    Checkpointed,
}

impl Depth {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Frozen, Self::Reclaimed, Self::Checkpointed];
}

impl fmt::Display for Depth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Frozen => "frozen",
            Self::Reclaimed => "reclaimed",
            Self::Checkpointed => "checkpointed",
        })
    }
}

/// What wakes an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Waker {
    /// A call on the shim's control socket.
    Request,
    /// A client that connects to the sleeping agent and asks.
    Client,
}

impl Waker {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Request, Self::Client];
}

impl fmt::Display for Waker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Request => "request",
            Self::Client => "client",
        })
    }
}

/// Sleeps of one agent of this project's at each depth, woken in each way, one at a time and each in turn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Depths {
    /// The agent.
    pub workload: Workload,
    /// Counted cycles of each depth and way; one more of each before them is not counted.
    pub count: u32,
    /// After this time no further cycle begins, in seconds.
    pub seconds: u64,
}

/// The memory of shims with this many agents, awake and asleep.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shims {
    /// How many agents, in rising order.
    pub agents: Vec<u32>,
}

/// Whom an agent has beside it while it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Company {
    /// Nobody.
    Nobody,
    /// So many agents that sleep, checkpointed.
    Asleep(u32),
    /// So many agents that are put to sleep and woken again and again, all of them at the same time.
    Waking(u32),
    /// One that keeps every processor busy.
    EatsCpu,
    /// One that fills more memory than its limit allows, again and again.
    EatsMemory,
    /// One that writes to the disk and syncs, again and again.
    EatsDisk,
    /// One that does all three.
    EatsAll,
}

impl fmt::Display for Company {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nobody => f.write_str("alone"),
            Self::Asleep(agents) => write!(f, "beside {agents} that sleep"),
            Self::Waking(agents) => write!(f, "beside {agents} that wake"),
            Self::EatsCpu => f.write_str("beside one that eats CPU"),
            Self::EatsMemory => f.write_str("beside one that eats memory"),
            Self::EatsDisk => f.write_str("beside one that eats the disk"),
            Self::EatsAll => f.write_str("beside one that eats all three"),
        }
    }
}

/// An agent that is asked in different company, and what busy agents get of the processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbours {
    /// The agent that is asked.
    pub workload: Workload,
    /// Whom it has beside it, in this order.
    pub companies: Vec<Company>,
    /// How often it is asked in each.
    pub requests: u32,
    /// CPU shares of two busy agents, pair by pair, as `ctr` takes them; runc makes weights of them.
    pub shares: Vec<[u32; 2]>,
    /// How long what each pair gets is measured, in seconds.
    pub share_seconds: u64,
}

/// A part of the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Section {
    /// See [`Cycles`].
    Cycles(Cycles),
    /// See [`Depths`].
    Depths(Depths),
    /// See [`AtOnce`].
    AtOnce(AtOnce),
    /// See [`Shims`].
    Shims(Shims),
    /// See [`Neighbours`].
    Neighbours(Neighbours),
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cycles(cycles) => {
                let cache = if cycles.cache == Cache::Cold { ", image not in the page cache" } else { "" };
                write!(f, "{}: {} cycles{cache}", cycles.workload, cycles.count)
            }
            Self::Depths(depths) => write!(f, "{}: depths, {} cycles of each", depths.workload, depths.count),
            Self::AtOnce(at_once) => {
                let most = at_once.rounds.iter().map(|(agents, _)| agents).max();
                write!(f, "{}: up to {} at once", at_once.workload, most.unwrap_or(&0))
            }
            Self::Shims(shims) => {
                write!(f, "memory of shims: up to {} agents", shims.agents.iter().max().unwrap_or(&0))
            }
            Self::Neighbours(plan) => write!(f, "{}: neighbours, {} requests", plan.workload, plan.requests),
        }
    }
}

/// The whole run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Its name, such as `full`.
    pub name: String,
    /// After this time nothing more begins, in seconds: on a machine that has other work to do the report has fewer
    /// figures, but there is one.
    pub seconds: u64,
    /// Whether the node's cgroups have a CPU controller, which `ctr` must know.
    pub cpu_controller: bool,
    /// The parts in their order: what matters most comes first.
    pub sections: Vec<Section>,
}

impl Plan {
    /// All that the report shows, in about twenty minutes on two cores.
    pub fn full() -> Self {
        let all = vec![Subject::Agentcube, Subject::Runc, Subject::Crun, Subject::ColdStart];
        let cycles = |workload, cache, count, cold_starts, seconds| {
            Section::Cycles(Cycles { workload, cache, subjects: all.clone(), count, cold_starts, seconds })
        };
        let python = Workload::Python;
        let mut sections = vec![
            cycles(python(64), Cache::Warm, 30, 20, 60),
            Section::Depths(Depths { workload: python(64), count: 40, seconds: 80 }),
            cycles(python(1024), Cache::Warm, 20, 5, 300),
            cycles(python(256), Cache::Warm, 20, 10, 100),
            cycles(python(16), Cache::Warm, 25, 20, 45),
            cycles(Workload::Busybox, Cache::Warm, 25, 20, 45),
            Section::Depths(Depths { workload: python(256), count: 20, seconds: 70 }),
            Section::Shims(Shims { agents: vec![1, 10, 100] }),
            Section::AtOnce(AtOnce {
                workload: python(16),
                subjects: vec![Subject::Agentcube, Subject::Runc],
                rounds: vec![(1, 5), (10, 3), (50, 2)],
                seconds: 120,
            }),
        ];
        for (mib, count, seconds) in [(64, 20, 45), (256, 20, 90), (16, 20, 45), (1024, 5, 90)] {
            sections.push(Section::Cycles(Cycles {
                workload: python(mib),
                cache: Cache::Cold,
                // A cold start reads the program and not the memory: it has no part in this.
                subjects: vec![Subject::Agentcube, Subject::Runc, Subject::Crun],
                count,
                cold_starts: 0,
                seconds,
            }));
        }
        Self { name: "full".into(), seconds: 20 * 60, cpu_controller: false, sections }
    }

    /// What the goals need and no more, in less than three minutes.
    pub fn quick() -> Self {
        let cycles = |mib, count, seconds| {
            Section::Cycles(Cycles {
                workload: Workload::Python(mib),
                cache: Cache::Warm,
                subjects: vec![Subject::Agentcube, Subject::Runc, Subject::ColdStart],
                count,
                cold_starts: 1,
                seconds,
            })
        };
        Self {
            name: "quick".into(),
            seconds: 170,
            cpu_controller: false,
            sections: vec![
                cycles(64, 10, 30),
                Section::Depths(Depths { workload: Workload::Python(64), count: 5, seconds: 15 }),
                cycles(1024, 4, 40),
                cycles(256, 5, 30),
                Section::Shims(Shims { agents: vec![10] }),
            ],
        }
    }

    /// What neighbours do to an agent. It needs every controller of cgroup v2.
    pub fn neighbours() -> Self {
        let neighbours = Neighbours {
            workload: Workload::Python(16),
            companies: vec![
                Company::Nobody,
                Company::Asleep(50),
                Company::Waking(10),
                Company::EatsCpu,
                Company::EatsMemory,
                Company::EatsDisk,
                Company::EatsAll,
            ],
            requests: 300,
            shares: vec![[1024, 1024], [1024, 3072], [1024, 10240]],
            share_seconds: 10,
        };
        Self {
            name: "neighbours".into(),
            seconds: 30 * 60,
            cpu_controller: false,
            sections: vec![Section::Neighbours(neighbours)],
        }
    }

    /// One cycle of everything with small agents: whether the benchmark itself works.
    pub fn tiny() -> Self {
        let all = vec![Subject::Agentcube, Subject::Runc, Subject::Crun, Subject::ColdStart];
        let cycles = |workload, cache| {
            let subjects = all.clone();
            Section::Cycles(Cycles { workload, cache, subjects, count: 1, cold_starts: 1, seconds: 20 })
        };
        let python = Workload::Python(16);
        Self {
            name: "tiny".into(),
            seconds: 120,
            cpu_controller: false,
            sections: vec![
                cycles(python, Cache::Warm),
                cycles(python, Cache::Cold),
                cycles(Workload::Busybox, Cache::Warm),
                Section::Depths(Depths { workload: python, count: 1, seconds: 10 }),
                Section::AtOnce(AtOnce {
                    workload: python,
                    subjects: vec![Subject::Agentcube, Subject::Runc],
                    rounds: vec![(2, 1)],
                    seconds: 10,
                }),
                Section::Shims(Shims { agents: vec![1, 2] }),
            ],
        }
    }

    /// Whether it is about neighbours, and has a report of its own.
    pub fn is_of_neighbours(&self) -> bool {
        self.sections.iter().any(|section| matches!(section, Section::Neighbours(_)))
    }

    /// The same with at most this many cycles and rounds of everything, for a first look.
    #[must_use]
    pub fn with_at_most(mut self, cycles: u32) -> Self {
        for section in &mut self.sections {
            match section {
                Section::Cycles(plan) => {
                    plan.count = plan.count.min(cycles);
                    plan.cold_starts = plan.cold_starts.min(cycles);
                }
                Section::Depths(plan) => plan.count = plan.count.min(cycles),
                Section::AtOnce(plan) => {
                    for (_, rounds) in &mut plan.rounds {
                        *rounds = cycles.min(*rounds);
                    }
                }
                Section::Shims(_) => {}
                Section::Neighbours(plan) => plan.requests = plan.requests.min(cycles),
            }
        }
        self.name = format!("{}, at most {cycles} cycles", self.name);
        self
    }

    /// The same with the sections alone whose names contain this text.
    #[must_use]
    pub fn with_only(mut self, text: &str) -> Self {
        self.sections.retain(|section| section.to_string().contains(text));
        self.name = format!("{}, only {text}", self.name);
        self
    }
}

/// `items` beginning with another one at each turn, so that what comes first is not always the same.
pub fn rotated<T: Copy>(items: &[T], turn: usize) -> Vec<T> {
    let mut rotated = items.to_vec();
    if !items.is_empty() {
        rotated.rotate_left(turn % items.len());
    }
    rotated
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_subject_comes_first_as_often_as_the_others() {
        let subjects = [1, 2, 3];
        let first: Vec<_> = (0..6).map(|turn| rotated(&subjects, turn)[0]).collect();
        assert_eq!(first, [1, 2, 3, 1, 2, 3]);
        assert_eq!(rotated(&subjects, 4), [2, 3, 1]);
        assert!(rotated::<u8>(&[], 3).is_empty());
    }

    #[test]
    fn plans_are_bounded_and_survive_being_written_down() {
        for plan in [Plan::full(), Plan::quick()] {
            let seconds = |section: &Section| match section {
                Section::Cycles(plan) => plan.seconds,
                Section::Depths(plan) => plan.seconds,
                Section::AtOnce(plan) => plan.seconds,
                Section::Shims(plan) => u64::from(*plan.agents.iter().max().unwrap()),
                Section::Neighbours(_) => panic!("it has a plan of its own"),
            };
            let sum: u64 = plan.sections.iter().map(seconds).sum();
            assert!(sum < plan.seconds, "{}: {sum} s", plan.name);
        }
        for plan in [Plan::full(), Plan::quick(), Plan::tiny(), Plan::neighbours()] {
            let text = serde_json::to_string(&plan).unwrap();
            assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
        }
    }

    #[test]
    fn a_plan_can_be_made_shorter_but_not_longer() {
        let only = Plan::full().with_only("at once").sections;
        assert!(matches!(&only[..], [Section::AtOnce(_)]), "{only:?}");
        let plan = Plan::full().with_at_most(3);
        for section in &plan.sections {
            match section {
                Section::Cycles(plan) => assert!(plan.count == 3 && plan.cold_starts <= 3),
                Section::Depths(plan) => assert_eq!(plan.count, 3),
                Section::AtOnce(plan) => assert_eq!(plan.rounds, [(1, 3), (10, 3), (50, 2)]),
                Section::Shims(plan) => assert_eq!(plan.agents, [1, 10, 100]),
                Section::Neighbours(_) => panic!("it has a plan of its own"),
            }
        }
    }

    #[test]
    fn depths_are_measured_beside_the_cycles_that_they_are_compared_with() {
        for plan in [Plan::full(), Plan::quick()] {
            let sections = plan.with_only("python 64 MiB").sections;
            let has = |wanted: fn(&Section) -> bool| sections.iter().any(wanted);
            assert!(has(|section| matches!(section, Section::Depths(_))), "{sections:?}");
            assert!(has(|section| matches!(section, Section::Cycles(_))), "{sections:?}");
        }
    }

    #[test]
    fn the_full_plan_has_every_size_warm_and_cold_at_least_twenty_times_when_warm() {
        let plan = Plan::full();
        for workload in [16, 64, 256, 1024].map(Workload::Python) {
            for cache in [Cache::Warm, Cache::Cold] {
                let found = plan.sections.iter().find_map(|section| match section {
                    Section::Cycles(cycles) if cycles.workload == workload && cycles.cache == cache => {
                        Some(cycles)
                    }
                    _ => None,
                });
                assert!(found.is_some_and(|cycles| cache == Cache::Cold || cycles.count >= 20), "{workload}");
            }
        }
    }
}
