//! The figures of containers and pods: those that containerd's own shim gives for the same, at every depth of sleep, and
//! none ever goes back. They need the controllers of cgroup v2, which a virtual node has: `make test-vm` runs them there.

#![allow(clippy::unwrap_used)]

mod ballast;
mod cycle;

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use agentcube_shim::stats;
use agentcube_tests::images::Image;
use agentcube_tests::kubelet::api::{ContainerStats, PodSandboxStats, PsiStats, UInt64Value};
use agentcube_tests::kubelet::{ContainerSpec, Kubelet, NAMESPACE, Pod, PodSpec};
use agentcube_tests::node::{Agent, AgentSpec, Node, Runtime};
use ballast::{has_swap, node, value};
use containerd_shim::protos::api::StatsRequest;
use containerd_shim::protos::cgroups_v2::metrics::Metrics;
use containerd_shim::protos::protobuf::{Message, MessageField};
use cycle::{SOON, cgroup, patience, shim, sleep_in_place, wake};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// Works with everything that is counted, then waits: memory, a file on a disk, and so much CPU that it is throttled.
const WORKER: &str = "import os, time
held = os.urandom(24 << 20)
file = os.open('/data/file', os.O_RDWR | os.O_CREAT)
for _ in range(4):
    os.write(file, held[:1 << 20])
    os.fsync(file)
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
os.pread(file, 4 << 20, 0)
while time.process_time() < 2:
    pass
print('done', flush=True)
time.sleep(1 << 20)";

/// Starts a worker and waits until it has done.
fn worker<'node>(node: &'node Node, id: &str, runtime: Runtime) -> Agent<'node> {
    // On the disk: the container's own files are in memory.
    let data = format!("/var/lib/agentcube/data-{id}");
    node.sh(&format!("mkdir -p {data}")).unwrap();
    let spec = AgentSpec::new(Image::Python, id, runtime)
        .mount(format!("type=bind,src={data},dst=/data,options=rbind:rw"))
        .flag("--cpu-period=100000")
        .flag("--cpu-quota=80000")
        .flag(format!("--memory-limit={}", 256 * MIB))
        .args(&["python3", "-c", WORKER]);
    let agent = node.run_agent(&spec).unwrap();
    node.wait_until("the worker to be done", SOON, || Ok(agent.log()?.contains("done"))).unwrap();
    agent
}

/// A container's figures as its shim gives them.
fn metrics(node: &Node, agent: &Agent) -> Metrics {
    let request = StatsRequest { id: agent.id().to_owned(), ..StatsRequest::default() };
    let told = shim(node, agent, async |client| client.stats(patience(), &request).await).unwrap();
    assert_eq!(told.stats().type_url, stats::TYPE_URL);
    Metrics::parse_from_bytes(&told.stats().value).unwrap()
}

#[test]
fn of_a_cgroup_that_stands_still_every_figure_is_the_one_of_containerds_own_shim() {
    let Some(node) = node() else { return };
    let agent = worker(node, "oracle", Runtime::Runc);
    agent.ctr(&["task", "pause", agent.id()]).unwrap().check().unwrap();
    let cgroup = cgroup(node, &agent);
    let ours = || stats::metrics(&cgroup, || panic!("there is a memory controller"));
    // The kernel writes back and averages pressure for a moment more.
    let mut still = None;
    let stands_still = || {
        let (before, theirs, after) = (ours(), metrics(node, &agent), ours());
        still = (before == after).then_some((after, theirs));
        Ok(still.is_some())
    };
    node.wait_until("figures that stand still", SOON, stands_still).unwrap();
    let (ours, mut theirs) = still.unwrap();
    // It tells them in any order.
    theirs.hugetlb.sort_by(|a, b| a.pagesize.cmp(&b.pagesize));
    // It knows these two by the names that they had before Linux 5.9.
    let memory = theirs.memory.as_mut().unwrap();
    if memory.workingset_refault == 0 {
        memory.workingset_refault = ours.memory.workingset_refault;
    }
    if memory.workingset_activate == 0 {
        memory.workingset_activate = ours.memory.workingset_activate;
    }
    assert_eq!(ours, theirs);
    // None of it is the same for being empty.
    let (cpu, memory) = (&ours.cpu, &ours.memory);
    assert!(cpu.nr_throttled > 0 && cpu.throttled_usec > 0 && cpu.psi.some.total > 0, "{cpu:?}");
    assert!(memory.anon > 24 * MIB && memory.inactive_file > 0 && memory.psi.is_some(), "{memory:?}");
    assert_eq!(memory.usage_limit, 256 * MIB);
    assert!(ours.io.usage.iter().any(|device| device.wbytes >= 4 * MIB && device.rbytes >= 4 * MIB));
    assert!(ours.io.psi.is_some() && ours.pids.current > 0 && !ours.hugetlb.is_empty());
    agent.delete().unwrap();
}

/// The numbers in an answer in JSON, by their paths. What is told of each device and page size is named after it.
fn numbers(value: &Value, path: &str, found: &mut BTreeMap<String, u64>) {
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            numbers(value, &path, found);
        }),
        Value::Array(entries) => entries.iter().for_each(|entry| {
            let name = match &entry["pagesize"] {
                Value::String(size) => size.clone(),
                _ => format!("{}:{}", entry["major"], entry["minor"]),
            };
            numbers(entry, &format!("{path}.{name}"), found);
        }),
        // Averages of pressure are the only fractions.
        number => found.extend(number.as_u64().map(|number| (path.to_owned(), number))),
    }
}

/// A container's figures as containerd gives them to clients.
fn figures(agent: &Agent) -> BTreeMap<String, u64> {
    let told = agent.ctr(&["task", "metrics", "--format", "json", agent.id()]).unwrap().check().unwrap();
    let mut found = BTreeMap::new();
    numbers(&serde_json::from_str(&told).unwrap(), "", &mut found);
    assert!(found.len() > 20, "{told}");
    found
}

/// How far a figure may be from that of another container that did the same, which has `theirs`.
fn noise(path: &str, theirs: u64) -> u64 {
    let any = |names: &[&str]| names.iter().any(|name| path.contains(name));
    if any(&["limit"]) || path.rsplit('.').next() == Some("max") {
        0
    } else if any(&["psi", "throttled", "periods"]) {
        // How long others kept it waiting.
        u64::MAX
    } else if any(&["active", "dirty", "workingset"]) {
        // The kernel's lists, and what it has written back so far.
        8 * MIB
    } else if path.ends_with("usec") {
        theirs / 2 + 1_000_000
    } else if path.starts_with("memory.") && theirs > MIB {
        theirs / 4 + MIB
    } else if path.ends_with("bytes") {
        theirs / 2 + MIB
    } else {
        theirs / 2 + 4096
    }
}

/// Sees to it that each figure that one has is the other's, too, but for noise. A zero is not told.
fn assert_alike(ours: &BTreeMap<String, u64>, theirs: &BTreeMap<String, u64>) {
    for (path, &theirs) in theirs {
        let told = ours.get(path).copied().unwrap_or_default();
        let noise = noise(path, theirs);
        assert!(told.abs_diff(theirs) <= noise, "{path}: {told}, and {theirs} with containerd's own shim");
        let pressure = path.find(".psi.").map(|end| &path[..end]);
        let is_there = |pressure: &str| ours.keys().any(|path| path.starts_with(&format!("{pressure}.psi")));
        assert!(pressure.is_none_or(is_there), "{path} is missing");
    }
}

#[test]
fn the_same_container_has_the_same_figures_as_under_containerds_own_shim() {
    let Some(node) = node() else { return };
    let reference = worker(node, "reference", Runtime::Runc);
    let agent = worker(node, "figures", Runtime::Agentcube);
    let (theirs, ours) = (figures(&reference), figures(&agent));
    println!("{} figures, {} with containerd's own shim", ours.len(), theirs.len());
    assert_alike(&ours, &theirs);
    let time = |agent: &Agent| {
        let asked = || {
            let since = Instant::now();
            metrics(node, agent);
            since.elapsed()
        };
        (0..10).map(|_| asked()).min().unwrap()
    };
    println!("asked in {:?}, containerd's own shim in {:?}", time(&agent), time(&reference));
    reference.delete().unwrap();
    agent.delete().unwrap();
}

/// Whether a figure only ever grows; of the pressure only its totals do.
fn is_counter(path: &str) -> bool {
    let name = path.rsplit('.').next().unwrap_or_default();
    path.contains(".psi.") && name == "total"
        || path.starts_with("cpu.") && !path.contains(".psi.")
        || path.starts_with("memory_events.")
        || path.starts_with("io.") && !path.contains(".psi.") && !["major", "minor"].contains(&name)
        || ["pg", "workingset", "thp_"].iter().any(|start| name.starts_with(start))
        || name == "max_usage"
}

/// Sees to it that nothing that only grows has become less; gives back the figures.
fn not_less(agent: &Agent, before: &BTreeMap<String, u64>, when: &str) -> BTreeMap<String, u64> {
    let now = figures(agent);
    for (path, &before) in before.iter().filter(|(path, _)| is_counter(path)) {
        let now = now.get(path).copied().unwrap_or_default();
        assert!(now >= before, "{path} was {before}, and is {now} {when}");
    }
    now
}

/// Sees to it that a sleeping agent's figures are those of its cgroup, and that it uses no CPU.
fn assert_asleep_and_true(node: &Node, agent: &Agent, told: &BTreeMap<String, u64>, depth: &str) {
    let held = value(node, agent, "memory.current", "");
    let told_held = told["memory.usage"];
    assert!(told_held.abs_diff(held) < MIB, "{depth}: {told_held} bytes told, {held} in the cgroup");
    let processes = told.get("pids.current").copied().unwrap_or_default();
    assert_eq!(processes == 0, depth == "checkpointed", "{depth}: {processes} processes");
    let later = figures(agent);
    assert_eq!(later["memory.usage_limit"], 256 * MIB);
    assert_eq!(later["cpu.usage_usec"], told["cpu.usage_usec"], "{depth}: it used CPU in its sleep");
}

#[test]
fn nothing_that_is_counted_goes_back_over_sleeps_of_every_depth() {
    let Some(node) = node() else { return };
    let agent = worker(node, "counted", Runtime::Agentcube);
    let mut last = figures(&agent);
    let mut depths = vec!["frozen", "checkpointed", "checkpointed"];
    if has_swap() {
        depths.insert(1, "reclaimed");
    }
    for depth in depths {
        sleep_in_place(node, &agent, depth);
        let asleep = not_less(&agent, &last, &format!("asleep {depth}"));
        assert_asleep_and_true(node, &agent, &asleep, depth);
        println!("{depth}: {} MiB", asleep["memory.usage"] / MIB);
        wake(node, &agent);
        last = not_less(&agent, &asleep, &format!("after a wake from {depth}"));
    }
    agent.delete().unwrap();
}

/// What a kubelet learns of a container; what it does not learn is not there.
fn seen(stats: &ContainerStats) -> BTreeMap<&'static str, u64> {
    let (cpu, memory, swap, layer) = (&stats.cpu, &stats.memory, &stats.swap, &stats.writable_layer);
    let wrapped = [
        ("cpu.usage_core_nano_seconds", &cpu.usage_core_nano_seconds),
        ("memory.working_set_bytes", &memory.working_set_bytes),
        ("memory.available_bytes", &memory.available_bytes),
        ("memory.usage_bytes", &memory.usage_bytes),
        ("memory.rss_bytes", &memory.rss_bytes),
        ("memory.page_faults", &memory.page_faults),
        ("memory.major_page_faults", &memory.major_page_faults),
        ("swap.swap_available_bytes", &swap.swap_available_bytes),
        ("swap.swap_usage_bytes", &swap.swap_usage_bytes),
        ("writable_layer.used_bytes", &layer.used_bytes),
        ("writable_layer.inodes_used", &layer.inodes_used),
    ];
    let of = |field: &MessageField<UInt64Value>| field.as_ref().map(|field| field.value);
    let mut seen: BTreeMap<_, _> =
        wrapped.into_iter().filter_map(|(name, field)| Some((name, of(field)?))).collect();
    let mut pressure = |name, psi: &MessageField<PsiStats>| {
        let whole = psi.as_ref().is_some_and(|psi| psi.Some.is_some() && psi.Full.is_some());
        seen.extend(whole.then_some((name, 1)));
    };
    pressure("cpu.psi", &cpu.psi);
    pressure("memory.psi", &memory.psi);
    pressure("io.psi", &stats.io.psi);
    // Needs two looks, with time in between.
    seen.extend(of(&cpu.usage_nano_cores).map(|_| ("cpu.usage_nano_cores", 1)));
    seen
}

/// What a kubelet learns of the one container of a pod.
fn container(kubelet: &Kubelet, pod: &Pod) -> BTreeMap<&'static str, u64> {
    let id = pod.id("agent").unwrap();
    let all = kubelet.cri().list_container_stats().unwrap();
    seen(all.iter().find(|stats| stats.attributes.id == id).unwrap())
}

/// What it learns of the pod itself, the kinds of it: all of what is told of one that is well.
fn sandbox(kubelet: &Kubelet, pod: &Pod) -> [bool; 6] {
    let all: Vec<PodSandboxStats> = kubelet.cri().list_pod_sandbox_stats().unwrap();
    let stats = all.into_iter().find(|stats| stats.attributes.id == pod.sandbox()).unwrap();
    let linux = &stats.linux;
    [
        linux.cpu.usage_core_nano_seconds.value > 0,
        linux.memory.working_set_bytes.value > 0,
        linux.network.default_interface.is_some(),
        linux.process.process_count.value > 0,
        linux.containers.len() == 1,
        linux.io.psi.is_some(),
    ]
}

/// Holds memory in a way that a shell can.
fn pod<'node>(kubelet: &'node Kubelet<'node>, name: &str, runtime: Runtime) -> Pod<'node> {
    let script = "dd if=/dev/zero of=/dev/shm/held bs=1M count=8 && echo held && exec sleep 1000000";
    let spec = PodSpec::new(name, runtime).container(ContainerSpec::script("agent", script));
    kubelet.run(spec).unwrap()
}

#[test]
fn a_kubelet_sees_of_a_pod_what_it_sees_with_containerds_own_shim_and_asleep_as_well() {
    let Some(node) = node() else { return };
    let kubelet = Kubelet::on(node).unwrap();
    let (reference, agent) =
        (pod(&kubelet, "reference", Runtime::Runc), pod(&kubelet, "agent", Runtime::Agentcube));
    let held = |pod: &Pod| container(&kubelet, pod)["memory.usage_bytes"] > 8 * MIB;
    for pod in [&reference, &agent] {
        node.wait_until("the pod to hold its memory", SOON, || Ok(held(pod))).unwrap();
    }
    let rate = || Ok(container(&kubelet, &reference).contains_key("cpu.usage_nano_cores"));
    node.wait_until("a rate of CPU", SOON, rate).unwrap();
    let (theirs, ours) = (container(&kubelet, &reference), container(&kubelet, &agent));
    assert!(theirs.keys().all(|name| ours.contains_key(name)), "{ours:?}, and {theirs:?}");
    assert_eq!(sandbox(&kubelet, &agent), sandbox(&kubelet, &reference));
    for name in ["memory.usage_bytes", "memory.working_set_bytes", "memory.rss_bytes"] {
        assert!(ours[name].abs_diff(theirs[name]) < 2 * MIB, "{name}: {} and {}", ours[name], theirs[name]);
    }
    let mut cpu = ours["cpu.usage_core_nano_seconds"];
    for depth in ["frozen", "checkpointed"] {
        let words = ["agentcube", "--namespace", NAMESPACE, "sleep", "--depth", depth, agent.sandbox()];
        let asleep = || Ok(node.exec(&words)?.status == 0);
        node.wait_until("the pod to sleep", SOON, asleep).unwrap();
        for _ in 0..2 {
            let now = container(&kubelet, &agent);
            assert!(theirs.keys().all(|name| now.contains_key(name)), "{depth}: {now:?}");
            assert!(now["cpu.usage_core_nano_seconds"] >= cpu, "{depth}: {now:?} after {cpu}");
            cpu = now["cpu.usage_core_nano_seconds"];
            thread::sleep(Duration::from_millis(100));
        }
        assert!(sandbox(&kubelet, &agent)[..2].iter().all(|told| *told), "{depth}");
        node.exec(&["agentcube", "--namespace", NAMESPACE, "wake", agent.sandbox()])
            .unwrap()
            .check()
            .unwrap();
    }
    assert!(container(&kubelet, &agent)["cpu.usage_core_nano_seconds"] >= cpu);
    agent.remove().unwrap();
    reference.remove().unwrap();
}
