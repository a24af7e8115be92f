//! An agent that is asked while others sleep, wake or eat what there is; and what busy agents get of the processors.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use agentcube_tests::images::Image;
use agentcube_tests::node::{AgentSpec, Net, Runtime};
use anyhow::{Context as _, Result, anyhow, ensure};

use super::agent::{self, Place};
use super::engine::Engine;
use super::sleeper::{Awake, Sleeper};
use super::{Run, cpu, probe};
use crate::plan::{Company, Neighbours, Section, Subject, Workload};
use crate::record::{Asked, Record, Share};

/// Between two requests.
const PACE: Duration = Duration::from_millis(20);

/// How long company is there before the agent is asked.
const SETTLE: Duration = Duration::from_secs(2);

/// Small, because it is their number that counts.
const SLEEPERS: Workload = Workload::Busybox;

/// The memory limit of an agent that eats.
const LIMIT: &str = "--memory-limit=268435456";

const EAT_CPU: &str = "for i in 1 2 3 4; do while :; do :; done & done";
/// More than the limit: the rest goes to swap, and comes back.
const EAT_MEMORY: &str =
    "while :; do busybox dd if=/dev/zero of=/dev/null bs=320M count=4 2>/dev/null; done &";
const EAT_DISK: &str =
    "while :; do busybox dd if=/dev/zero of=/eaten bs=1M count=64 conv=fsync 2>/dev/null; done &";

/// Asks the agent in all its company, and measures all shares.
pub fn run(run: &mut Run, plan: &Neighbours) -> Result<()> {
    let section = Section::Neighbours(plan.clone()).to_string();
    if let Err(error) = measure(run, plan) {
        run.fail(Subject::Agentcube, &section, &error)?;
    }
    Ok(())
}

fn measure(run: &mut Run, plan: &Neighbours) -> Result<()> {
    ensure!(run.cpu_controller, "the node's cgroups have no CPU controller: nothing is shared by weights");
    prefer_this_program()?;
    let mut asked = Awake::start(run, Subject::Agentcube, plan.workload)?;
    for &company in &plan.companies {
        run.check_time()?;
        run.say(&format!("  {company}"));
        let (answer_us, wakes) =
            beside(run, company, plan.workload, || ask(asked.sleeper.place(), plan.requests))
                .with_context(|| company.to_string())?;
        run.record(&Record::Asked(Asked { company, answer_us, wakes }))?;
    }
    asked.sleeper.delete()?;
    for &shares in &plan.shares {
        run.check_time()?;
        run.say(&format!("  two busy agents, shares {shares:?}"));
        share(run, shares, Duration::from_secs(plan.share_seconds))?;
    }
    Ok(())
}

/// Sees to it that whoever measures gets the processors when there is something to do: the time for which a request waits
/// for this program is none of the agent's.
fn prefer_this_program() -> Result<()> {
    let own = fs::read_to_string("/proc/self/cgroup").context("reading /proc/self/cgroup")?;
    let own =
        own.lines().find_map(|line| line.strip_prefix("0::/")).context("this program has no cgroup v2")?;
    let root = Path::new("/sys/fs/cgroup");
    for cgroup in root.join(own).ancestors().take_while(|cgroup| *cgroup != root) {
        let path = cgroup.join("cpu.weight");
        fs::write(&path, "10000").with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn ask(place: &Place, requests: u32) -> Result<Vec<u64>> {
    let answers = (0..requests).map(|_| {
        thread::sleep(PACE);
        let first_byte = probe::visit(place)?.first_byte;
        Ok(u64::try_from(first_byte.as_micros()).unwrap_or(u64::MAX))
    });
    answers.collect()
}

/// Does something in company; gives back, beside what it gave, the number of wakes meanwhile.
fn beside<T>(
    run: &mut Run,
    company: Company,
    workload: Workload,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, u32)> {
    let eaters = match company {
        Company::Nobody => return Ok((work()?, 0)),
        Company::Asleep(agents) => {
            let mut group = start(run, agents, SLEEPERS)?;
            group.iter_mut().try_for_each(|awake| awake.sleeper.sleep().map(drop))?;
            let done = work();
            group.iter_mut().try_for_each(Awake::wake_and_check)?;
            delete(group)?;
            return Ok((done?, 0));
        }
        Company::Waking(agents) => {
            let mut group = start(run, agents, workload)?;
            let done = beside_wakes(&mut group, work);
            delete(group)?;
            return done;
        }
        Company::EatsCpu => vec![EAT_CPU],
        Company::EatsMemory => vec![EAT_MEMORY],
        Company::EatsDisk => vec![EAT_DISK],
        Company::EatsAll => vec![EAT_CPU, EAT_MEMORY, EAT_DISK],
    };
    let eater = start_eater(run, &eaters.join("\n"), 1024)?;
    thread::sleep(SETTLE);
    let done = work();
    agent::delete(&eater)?;
    Ok((done?, 0))
}

fn start(run: &mut Run, agents: u32, workload: Workload) -> Result<Vec<Awake>> {
    (0..agents).map(|_| Awake::start(run, Subject::Agentcube, workload)).collect()
}

fn delete(mut group: Vec<Awake>) -> Result<()> {
    group.iter_mut().try_for_each(|awake| awake.sleeper.delete())
}

/// Every agent of the group is put to sleep and woken again and again, by a thread of its own; at the end each must still
/// know what it knew.
fn beside_wakes<T>(group: &mut [Awake], work: impl FnOnce() -> Result<T>) -> Result<(T, u32)> {
    let (over, wakes) = (AtomicBool::new(false), AtomicU32::new(0));
    let done = thread::scope(|scope| {
        let waking: Vec<_> = group
            .iter_mut()
            .map(|awake| {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        awake.sleeper.sleep()?;
                        awake.wake_and_check()?;
                        wakes.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        let done = work();
        over.store(true, Ordering::Relaxed);
        let woken = waking.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|_| Err(anyhow!("a thread that wakes an agent panicked")))
        });
        woken.and(done)
    })?;
    Ok((done, wakes.into_inner()))
}

fn start_eater(run: &mut Run, script: &str, shares: u32) -> Result<Place> {
    let place = Place::for_ctr(&run.name(Subject::Agentcube), Workload::Busybox)?;
    let script = format!("{script}\nwait");
    let spec = AgentSpec::new(Image::Counter, &place.id, Runtime::Agentcube)
        .args(&["/bin/sh", "-c", &script])
        .net(Net::Pod)
        .flag(format!("--cpu-shares={shares}"))
        .flag(LIMIT);
    agent::start_as(&spec, run.cpu_controller)?;
    Ok(place)
}

/// What two busy agents get, before a sleep of both and after it.
fn share(run: &mut Run, shares: [u32; 2], during: Duration) -> Result<()> {
    let busy = shares.map(|shares| start_eater(run, EAT_CPU, shares).and_then(Engine::of));
    let [one, other] = busy;
    let mut busy = [one?, other?];
    for slept in [false, true] {
        if slept {
            for agent in &mut busy {
                agent.sleep()?;
            }
            for agent in &mut busy {
                agent.wake()?;
            }
        }
        let record = measure_share(&busy, slept, during)?;
        run.record(&Record::Share(record))?;
    }
    busy.iter_mut().try_for_each(Sleeper::delete)
}

fn measure_share(busy: &[Engine; 2], slept: bool, during: Duration) -> Result<Share> {
    let weight = |agent: &Engine| {
        let path = agent.place().cgroup.join("cpu.weight");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        text.trim().parse::<u32>().with_context(|| format!("{} says {text:?}", path.display()))
    };
    let used = || -> Result<[u64; 2]> {
        Ok([cpu::used_by(&busy[0].place().cgroup)?, cpu::used_by(&busy[1].place().cgroup)?])
    };
    let weights = [weight(&busy[0])?, weight(&busy[1])?];
    thread::sleep(SETTLE);
    let before = used()?;
    thread::sleep(during);
    let after = used()?;
    Ok(Share { weights, slept, used_us: [after[0] - before[0], after[1] - before[1]] })
}
