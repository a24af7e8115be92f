//! All that a run has brought, and questions to it.

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::plan::{Cache, Depth, Plan, Section, Subject, Waker, Workload};
use crate::record::{Asked, AtOnce, Cycle, DepthCycle, Failure, Machine, Record, Refused, Share, Shims};
use crate::statistics::Summary;

/// The raw results of a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Results {
    /// The day of the run.
    pub date: String,
    /// The commit that was measured.
    pub commit: String,
    /// The profile it was built with.
    pub build: String,
    /// What was to be measured.
    pub plan: Plan,
    /// What was.
    pub records: Vec<Record>,
}

impl Results {
    /// Reads the records, one a line.
    ///
    /// # Errors
    /// When a line is no record. A last line that is cut off is left out: the run was ended in the middle of it.
    pub fn read(plan: Plan, date: String, commit: String, build: String, lines: &str) -> Result<Self> {
        let whole = lines.rfind('\n').map_or("", |end| &lines[..end]);
        let records =
            whole.lines().map(|line| serde_json::from_str(line).with_context(|| format!("a record: {line}")));
        Ok(Self { date, commit, build, plan, records: records.collect::<Result<_>>()? })
    }

    /// The results as JSON with one record a line.
    ///
    /// # Errors
    /// When a figure has no form in JSON.
    pub fn to_json(&self) -> Result<String> {
        let lines: Result<Vec<String>> = self.records.iter().map(json).collect();
        Ok(format!(
            "{{\n\"date\": {},\n\"commit\": {},\n\"build\": {},\n\"plan\": {},\n\"records\": [\n{}\n]\n}}\n",
            json(&self.date)?,
            json(&self.commit)?,
            json(&self.build)?,
            json(&self.plan)?,
            lines?.join(",\n")
        ))
    }

    /// Whether the run came to its end.
    pub fn done(&self) -> bool {
        self.records.contains(&Record::Done)
    }

    /// What it ran on.
    pub fn machine(&self) -> Machine {
        let machine = self.records.iter().find_map(|record| match record {
            Record::Machine(machine) => Some(machine.clone()),
            _ => None,
        });
        machine.unwrap_or_default()
    }

    /// All cycles.
    pub fn cycles(&self) -> impl Iterator<Item = &Cycle> {
        self.records.iter().filter_map(|record| match record {
            Record::Cycle(it) => Some(it),
            _ => None,
        })
    }

    /// All sleeps at a depth of their own.
    pub fn depths(&self) -> impl Iterator<Item = &DepthCycle> {
        self.records.iter().filter_map(|record| match record {
            Record::Depth(it) => Some(it),
            _ => None,
        })
    }

    /// All depths that the shim does not offer there.
    pub fn refused(&self) -> impl Iterator<Item = &Refused> {
        self.records.iter().filter_map(|record| match record {
            Record::Refused(it) => Some(it),
            _ => None,
        })
    }

    /// All that could not be measured.
    pub fn failures(&self) -> impl Iterator<Item = &Failure> {
        self.records.iter().filter_map(|record| match record {
            Record::Failure(it) => Some(it),
            _ => None,
        })
    }

    /// All wakes at the same moment.
    pub fn at_once(&self) -> impl Iterator<Item = &AtOnce> {
        self.records.iter().filter_map(|record| match record {
            Record::AtOnce(it) => Some(it),
            _ => None,
        })
    }

    /// The memory of shims.
    pub fn shims(&self) -> impl Iterator<Item = &Shims> {
        self.records.iter().filter_map(|record| match record {
            Record::Shims(it) => Some(it),
            _ => None,
        })
    }

    /// All requests to an agent in company.
    pub fn asked(&self) -> impl Iterator<Item = &Asked> {
        self.records.iter().filter_map(|record| match record {
            Record::Asked(it) => Some(it),
            _ => None,
        })
    }

    /// What busy agents got of the processors.
    pub fn shares(&self) -> impl Iterator<Item = &Share> {
        self.records.iter().filter_map(|record| match record {
            Record::Share(it) => Some(it),
            _ => None,
        })
    }

    /// How one figure of the cycles of a workload lies; nothing when it was never measured.
    pub fn summary(
        &self,
        workload: Workload,
        cache: Cache,
        subject: Subject,
        figure: impl Fn(&Cycle) -> Option<u64>,
    ) -> Option<Summary> {
        let wanted =
            |cycle: &&Cycle| cycle.workload == workload && cycle.cache == cache && cycle.subject == subject;
        Summary::of(self.cycles().filter(wanted).filter_map(figure))
    }

    /// How one figure of the sleeps at a depth lies, of one waker or of all.
    pub fn depth_summary(
        &self,
        workload: Workload,
        depth: Depth,
        waker: Option<Waker>,
        figure: impl Fn(&DepthCycle) -> u64,
    ) -> Option<Summary> {
        let wanted = |cycle: &&DepthCycle| {
            cycle.workload == workload
                && cycle.depth == depth
                && waker.is_none_or(|waker| cycle.waker == waker)
        };
        Summary::of(self.depths().filter(wanted).map(figure))
    }

    /// The workloads that the plan puts to sleep at each depth, small ones first.
    pub fn workloads_at_depths(&self) -> Vec<Workload> {
        let workload = |section: &Section| match section {
            Section::Depths(depths) => Some(depths.workload),
            _ => None,
        };
        let mut workloads: Vec<Workload> = self.plan.sections.iter().filter_map(workload).collect();
        workloads.sort();
        workloads.dedup();
        workloads
    }

    /// The workloads that the plan has for an image in this place, small ones first.
    pub fn workloads(&self, cache: Cache) -> Vec<Workload> {
        let workload = |section: &Section| match section {
            Section::Cycles(cycles) if cycles.cache == cache => Some(cycles.workload),
            _ => None,
        };
        let mut workloads: Vec<Workload> = self.plan.sections.iter().filter_map(workload).collect();
        workloads.sort();
        workloads.dedup();
        workloads
    }

    /// The mean memory of shims with this many agents, by a figure of each.
    pub fn mean_of_shims(
        &self,
        subject: Subject,
        asleep: bool,
        agents: usize,
        figure: impl Fn(&agentcube_tests::memory::Memory) -> u64,
    ) -> Option<u64> {
        let wanted = |shims: &&Shims| {
            shims.subject == subject && shims.asleep == asleep && shims.memory.len() == agents
        };
        let found = self.shims().find(wanted)?;
        let sum: u64 = found.memory.iter().map(figure).sum();
        sum.checked_div(agents as u64)
    }
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).context("results as JSON")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub mod tests {
    use agentcube_tests::memory::Memory;

    use super::*;
    use crate::record::Sleep;

    /// A cycle whose wake to the first byte took this many milliseconds, and everything else a part or a multiple of it.
    pub fn cycle(subject: Subject, workload: Workload, ms: u64) -> Record {
        let us = ms * 1000;
        let sleep = Sleep {
            total_us: us * 2,
            stopped_us: (subject == Subject::Agentcube).then_some(us),
            cpu_us: us,
            image_bytes: 67 << 20,
            cached: None,
            dump: None,
        };
        Record::Cycle(Cycle {
            workload,
            cache: Cache::Warm,
            subject,
            sleep: (subject != Subject::ColdStart).then_some(sleep),
            wake_us: us / 2,
            first_byte_us: us,
            resident_us: Some(us * 3),
            wake_cpu_us: us,
        })
    }

    /// The results of a short plan in which this project takes 10 ms, runc 100, and a cold start 300.
    pub fn results() -> Results {
        let mut records =
            vec![Record::Machine(Machine { cpu: "A CPU".into(), cores: 2, ..Machine::default() })];
        for mib in [64, 256, 1024] {
            for (subject, ms) in [(Subject::Agentcube, 10), (Subject::Runc, 100), (Subject::ColdStart, 300)] {
                records.extend((0..3).map(|more| cycle(subject, Workload::Python(mib), ms + more)));
            }
        }
        for (depth, us, mib) in [(Depth::Frozen, 2_000, 70), (Depth::Checkpointed, 10_000, 0)] {
            records.extend(Waker::ALL.map(|waker| {
                Record::Depth(DepthCycle {
                    workload: Workload::Python(64),
                    depth,
                    waker,
                    sleep_us: us * 2,
                    held_bytes: mib << 20,
                    reached_us: if waker == Waker::Client { 90 } else { us / 2 },
                    first_byte_us: us,
                })
            }));
        }
        records.push(Record::Refused(Refused {
            workload: Workload::Python(64),
            depth: Depth::Reclaimed,
            why: "no swap".into(),
        }));
        let shim = |mib: u64| Memory { rss: mib << 21, pss: mib << 20, private: mib << 20 };
        for (subject, asleep, mib) in
            [(Subject::Agentcube, false, 5), (Subject::Agentcube, true, 4), (Subject::Runc, false, 16)]
        {
            records.push(Record::Shims(Shims { subject, asleep, memory: vec![shim(mib); 10] }));
        }
        records.push(Record::AtOnce(AtOnce {
            workload: Workload::Python(16),
            subject: Subject::Agentcube,
            first_byte_us: vec![5000, 6000],
            wall_us: 6000,
        }));
        records.push(Record::Failure(Failure {
            subject: Subject::Crun,
            section: "python".into(),
            why: "no | such program".into(),
        }));
        records.push(Record::Done);
        let text = |text: &str| text.to_owned();
        Results {
            date: text("2026-01-01"),
            commit: text("abc"),
            build: text("release"),
            plan: Plan::quick(),
            records,
        }
    }

    #[test]
    fn results_survive_being_written_down() {
        let results = results();
        let again: Results = serde_json::from_str(&results.to_json().unwrap()).unwrap();
        assert_eq!(again.records, results.records);
        assert_eq!(again.plan, results.plan);
        assert!(again.done());
    }

    #[test]
    fn a_line_that_is_cut_off_is_left_out_and_nonsense_is_refused() {
        let line = serde_json::to_string(&cycle(Subject::Runc, Workload::Busybox, 1)).unwrap();
        let read =
            |text: &str| Results::read(Plan::tiny(), String::new(), String::new(), String::new(), text);
        let results = read(&format!("{line}\n{line}\n{}", &line[..20])).unwrap();
        assert_eq!(results.records.len(), 2);
        assert!(!results.done());
        assert!(read("nonsense\n").is_err());
        assert!(read("").unwrap().records.is_empty());
    }

    #[test]
    fn figures_are_those_of_one_subject_and_one_workload() {
        let results = results();
        let first = |subject| {
            results
                .summary(Workload::Python(64), Cache::Warm, subject, |cycle| Some(cycle.first_byte_us))
                .unwrap()
        };
        assert_eq!((first(Subject::Agentcube).p50, first(Subject::Runc).max), (11_000, 102_000));
        assert_eq!(results.summary(Workload::Busybox, Cache::Warm, Subject::Runc, |_| Some(1)), None);
        assert_eq!(results.mean_of_shims(Subject::Agentcube, true, 10, |shim| shim.pss), Some(4 << 20));
        assert_eq!(results.mean_of_shims(Subject::Agentcube, true, 1, |shim| shim.pss), None);
        assert_eq!(results.workloads(Cache::Warm), [64, 256, 1024].map(Workload::Python));
        let asleep = |depth, waker| {
            let summary = results.depth_summary(Workload::Python(64), depth, waker, |cycle| cycle.reached_us);
            summary.map(|summary| (summary.count, summary.max))
        };
        assert_eq!(asleep(Depth::Frozen, Some(Waker::Client)), Some((1, 90)));
        assert_eq!(asleep(Depth::Checkpointed, None), Some((2, 5_000)));
        assert_eq!(asleep(Depth::Reclaimed, None), None);
        assert_eq!(results.workloads_at_depths(), [Workload::Python(64)]);
    }
}
