//! A container's figures, as `io.containerd.cgroups.v2.Metrics`.
//!
//! Read straight from the cgroup's files. The `containerd-shim` crate has a function for this too
//! (`collect_metrics_v2`), which is not used because it asks the hierarchy which controllers there are, instead of the
//! cgroup, loses memory's figures when one file is odd, leaves out io, rdma, hugetlb and pressure, and knows no
//! node without the memory controller.
//!
//! containerd asks for all tasks' figures one by one, and one answer of another type, or one error, spoils the whole
//! list. So there is always an answer: a file that is missing or odd leaves its own field out. CPU time and memory are
//! at least 1: consumers of these figures take zero for "not running", which a sleeping agent is not.

use std::{collections::HashMap, fs, path::Path};

use containerd_shim::protos::{
    cgroups_v2::metrics::{
        CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats,
        PidsStat, RdmaEntry, RdmaStat,
    },
    protobuf::{Message, MessageField, well_known_types::any::Any},
};

/// The type's name on the wire.
pub const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// Bytes of memory that the processes of `cgroup` and of those below it use, and where the figure comes from:
/// `memory.current`, or the sum of their proportional set sizes (`pss`) where there is no memory controller. At least
/// 1.
pub fn memory_used(cgroup: &Path) -> (u64, &'static str) {
    match single(cgroup, "memory.current") {
        Some(bytes) => (bytes.max(1), "memory.current"),
        None => (pss(cgroup).max(1), "pss"),
    }
}

/// What `cgroup` is charged with, in bytes, by the names that `memory.stat` has for it: all of its kinds, what the largest
/// consist of, and `swap`. What is 0 is left out; all of it is without a memory controller.
pub fn charged(cgroup: &Path) -> HashMap<String, u64> {
    const KINDS: [&str; 9] =
        ["anon", "file", "kernel", "sock", "shmem", "slab", "pagetables", "percpu", "kernel_stack"];
    let text = read(cgroup, "memory.stat").unwrap_or_default();
    let kinds = text.lines().filter_map(|line| line.split_once(' '));
    let kinds =
        kinds.filter(|(name, _)| KINDS.contains(name)).filter_map(|(name, of)| Some((name, number(of)?)));
    let swap = single(cgroup, "memory.swap.current").map(|bytes| ("swap", bytes));
    kinds.chain(swap).filter(|(_, bytes)| *bytes > 0).map(|(name, bytes)| (name.to_owned(), bytes)).collect()
}

/// The figures of `cgroup`. `memory_without_controller` is asked for the bytes used when the cgroup cannot tell
/// ([`pss`] of it, say, or what a sleeping agent keeps staged).
pub fn metrics(cgroup: &Path, memory_without_controller: impl FnOnce() -> u64) -> Metrics {
    let mut metrics = Metrics::new();
    metrics.pids = pids(cgroup).into();
    metrics.cpu = MessageField::some(cpu(cgroup));
    metrics.memory = MessageField::some(memory(cgroup, memory_without_controller));
    metrics.memory_events = memory_events(cgroup).into();
    metrics.io = io(cgroup).into();
    metrics.rdma = rdma(cgroup).into();
    metrics.hugetlb = hugetlb(cgroup);
    metrics
}

/// The figures of `cgroup`, as containerd wants them in a `StatsResponse`.
pub fn metrics_any(cgroup: &Path) -> Any {
    to_any(&metrics(cgroup, || pss(cgroup)))
}

/// The message as containerd wants it in a `StatsResponse`.
pub fn to_any(metrics: &Metrics) -> Any {
    // Encoding fails only for messages with missing required fields, which proto3 has not.
    Any { type_url: TYPE_URL.into(), value: metrics.write_to_bytes().unwrap_or_default(), ..Any::default() }
}

/// The sum of the proportional set sizes of the processes in `cgroup` and below, in bytes.
pub fn pss(cgroup: &Path) -> u64 {
    of_processes(cgroup, &|process| {
        let rollup = read(process, "smaps_rollup")?;
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    })
}

/// The resident memory of the processes in `cgroup` and below it, in bytes; what several share counts for each. Much
/// cheaper than [`pss`].
pub fn resident(cgroup: &Path) -> u64 {
    let page = u64::try_from(rustix::param::page_size()).unwrap_or(4096);
    of_processes(cgroup, &|process| {
        Some(read(process, "statm")?.split(' ').nth(1)?.parse::<u64>().ok()? * page)
    })
}

/// The sum of what `measure` finds in the `/proc` directory of each process in `cgroup` and below it.
fn of_processes(cgroup: &Path, measure: &impl Fn(&Path) -> Option<u64>) -> u64 {
    let pids = read(cgroup, "cgroup.procs").unwrap_or_default();
    let own: u64 = pids.lines().filter_map(|pid| measure(&Path::new("/proc").join(pid))).sum();
    let below = fs::read_dir(cgroup).into_iter().flatten().flatten();
    let below: u64 = below
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| of_processes(&entry.path(), measure))
        .sum();
    own + below
}

fn read(directory: &Path, name: &str) -> Option<String> {
    fs::read_to_string(directory.join(name)).ok()
}

/// A number, or `max`, which containerd knows as the largest.
fn number(text: &str) -> Option<u64> {
    match text.trim() {
        "max" => Some(u64::MAX),
        digits => digits.parse().ok(),
    }
}

fn single(cgroup: &Path, name: &str) -> Option<u64> {
    number(&read(cgroup, name)?)
}

/// Where a line of a flat-keyed file goes.
type Setter<T> = fn(&mut T, u64);

/// Puts the lines of a flat-keyed file where they belong.
fn fill<T>(to: &mut T, text: &str, fields: &[(&str, Setter<T>)]) {
    for (key, value) in text.lines().filter_map(|line| line.split_once(' ')) {
        if let (Some((_, set)), Some(value)) = (fields.iter().find(|(name, _)| *name == key), number(value)) {
            set(to, value);
        }
    }
}

fn pids(cgroup: &Path) -> Option<PidsStat> {
    let current = single(cgroup, "pids.current")?;
    let limit = single(cgroup, "pids.max").unwrap_or(u64::MAX);
    Some(PidsStat { current, limit, ..PidsStat::default() })
}

fn cpu(cgroup: &Path) -> CPUStat {
    const FIELDS: [(&str, Setter<CPUStat>); 8] = [
        ("usage_usec", CPUStat::set_usage_usec),
        ("user_usec", CPUStat::set_user_usec),
        ("system_usec", CPUStat::set_system_usec),
        ("nr_periods", CPUStat::set_nr_periods),
        ("nr_throttled", CPUStat::set_nr_throttled),
        ("throttled_usec", CPUStat::set_throttled_usec),
        ("nr_bursts", CPUStat::set_nr_bursts),
        ("burst_usec", CPUStat::set_burst_usec),
    ];
    let mut cpu = CPUStat::new();
    fill(&mut cpu, &read(cgroup, "cpu.stat").unwrap_or_default(), &FIELDS);
    cpu.usage_usec = cpu.usage_usec.max(1);
    cpu.psi = pressure(cgroup, "cpu.pressure").into();
    cpu
}

fn memory(cgroup: &Path, without_controller: impl FnOnce() -> u64) -> MemoryStat {
    const FIELDS: [(&str, Setter<MemoryStat>); 35] = [
        ("anon", MemoryStat::set_anon),
        ("file", MemoryStat::set_file),
        ("kernel_stack", MemoryStat::set_kernel_stack),
        ("slab", MemoryStat::set_slab),
        ("sock", MemoryStat::set_sock),
        ("shmem", MemoryStat::set_shmem),
        ("file_mapped", MemoryStat::set_file_mapped),
        ("file_dirty", MemoryStat::set_file_dirty),
        ("file_writeback", MemoryStat::set_file_writeback),
        ("anon_thp", MemoryStat::set_anon_thp),
        ("inactive_anon", MemoryStat::set_inactive_anon),
        ("active_anon", MemoryStat::set_active_anon),
        ("inactive_file", MemoryStat::set_inactive_file),
        ("active_file", MemoryStat::set_active_file),
        ("unevictable", MemoryStat::set_unevictable),
        ("slab_reclaimable", MemoryStat::set_slab_reclaimable),
        ("slab_unreclaimable", MemoryStat::set_slab_unreclaimable),
        ("pgfault", MemoryStat::set_pgfault),
        ("pgmajfault", MemoryStat::set_pgmajfault),
        // Linux 5.9 split these two by what is refaulted; the message has the sum.
        ("workingset_refault", |memory, value| {
            memory.workingset_refault += value;
        }),
        ("workingset_refault_anon", |memory, value| {
            memory.workingset_refault += value;
        }),
        ("workingset_refault_file", |memory, value| {
            memory.workingset_refault += value;
        }),
        ("workingset_activate", |memory, value| {
            memory.workingset_activate += value;
        }),
        ("workingset_activate_anon", |memory, value| {
            memory.workingset_activate += value;
        }),
        ("workingset_activate_file", |memory, value| {
            memory.workingset_activate += value;
        }),
        ("workingset_nodereclaim", MemoryStat::set_workingset_nodereclaim),
        ("pgrefill", MemoryStat::set_pgrefill),
        ("pgscan", MemoryStat::set_pgscan),
        ("pgsteal", MemoryStat::set_pgsteal),
        ("pgactivate", MemoryStat::set_pgactivate),
        ("pgdeactivate", MemoryStat::set_pgdeactivate),
        ("pglazyfree", MemoryStat::set_pglazyfree),
        ("pglazyfreed", MemoryStat::set_pglazyfreed),
        ("thp_fault_alloc", MemoryStat::set_thp_fault_alloc),
        ("thp_collapse_alloc", MemoryStat::set_thp_collapse_alloc),
    ];
    let mut memory = MemoryStat::new();
    fill(&mut memory, &read(cgroup, "memory.stat").unwrap_or_default(), &FIELDS);
    memory.usage = single(cgroup, "memory.current").unwrap_or_else(without_controller).max(1);
    memory.usage_limit = single(cgroup, "memory.max").unwrap_or(u64::MAX);
    memory.max_usage = single(cgroup, "memory.peak").unwrap_or(0);
    memory.swap_usage = single(cgroup, "memory.swap.current").unwrap_or(0);
    memory.swap_limit = single(cgroup, "memory.swap.max").unwrap_or(0);
    memory.swap_max_usage = single(cgroup, "memory.swap.peak").unwrap_or(0);
    memory.psi = pressure(cgroup, "memory.pressure").into();
    memory
}

fn memory_events(cgroup: &Path) -> Option<MemoryEvents> {
    const FIELDS: [(&str, Setter<MemoryEvents>); 6] = [
        ("low", MemoryEvents::set_low),
        ("high", MemoryEvents::set_high),
        ("max", MemoryEvents::set_max),
        ("oom", MemoryEvents::set_oom),
        ("oom_kill", MemoryEvents::set_oom_kill),
        ("oom_group_kill", MemoryEvents::set_oom_group_kill),
    ];
    let mut events = MemoryEvents::new();
    fill(&mut events, &read(cgroup, "memory.events")?, &FIELDS);
    Some(events)
}

/// `NAME key=value key=value …`: the name and the pairs.
fn nested(line: &str) -> Option<(&str, impl Iterator<Item = (&str, &str)>)> {
    let mut words = line.split_ascii_whitespace();
    let name = words.next()?;
    Some((name, words.filter_map(|word| word.split_once('='))))
}

fn io(cgroup: &Path) -> Option<IOStat> {
    let mut stat = IOStat::new();
    for line in read(cgroup, "io.stat")?.lines() {
        let Some((device, pairs)) = nested(line) else {
            continue;
        };
        let Some((major, minor)) = device.split_once(':') else {
            continue;
        };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else {
            continue;
        };
        let mut entry = IOEntry { major, minor, ..IOEntry::default() };
        for (key, value) in pairs {
            let Some(value) = number(value) else { continue };
            match key {
                "rbytes" => entry.rbytes = value,
                "wbytes" => entry.wbytes = value,
                "rios" => entry.rios = value,
                "wios" => entry.wios = value,
                _ => {}
            }
        }
        stat.usage.push(entry);
    }
    stat.psi = pressure(cgroup, "io.pressure").into();
    Some(stat)
}

fn rdma(cgroup: &Path) -> Option<RdmaStat> {
    let entries = |name| -> Option<Vec<RdmaEntry>> {
        let text = read(cgroup, name)?;
        let entry = |line| {
            let (device, pairs) = nested(line)?;
            let mut entry = RdmaEntry { device: device.into(), ..RdmaEntry::default() };
            for (key, value) in pairs {
                let value = number(value).map_or(0, |value| u32::try_from(value).unwrap_or(u32::MAX));
                match key {
                    "hca_handle" => entry.hca_handles = value,
                    "hca_object" => entry.hca_objects = value,
                    _ => {}
                }
            }
            Some(entry)
        };
        Some(text.lines().filter_map(entry).collect())
    };
    let (current, limit) = (entries("rdma.current")?, entries("rdma.max").unwrap_or_default());
    Some(RdmaStat { current, limit, ..RdmaStat::default() })
}

fn hugetlb(cgroup: &Path) -> Vec<HugeTlbStat> {
    let Ok(entries) = fs::read_dir(cgroup) else {
        return Vec::new();
    };
    let mut stats: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let size = name.to_str()?.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
            // hugetlb.SIZE.rsvd.current counts reservations.
            if size.contains('.') {
                return None;
            }
            let mut stat = HugeTlbStat { pagesize: size.into(), ..HugeTlbStat::default() };
            stat.current = single(cgroup, &format!("hugetlb.{size}.current"))?;
            stat.max = single(cgroup, &format!("hugetlb.{size}.max")).unwrap_or(u64::MAX);
            let events = read(cgroup, &format!("hugetlb.{size}.events")).unwrap_or_default();
            fill(&mut stat, &events, &[("max", HugeTlbStat::set_failcnt)]);
            Some(stat)
        })
        .collect();
    stats.sort_by(|a, b| a.pagesize.cmp(&b.pagesize));
    stats
}

/// Pressure stall information; absent where the kernel was built or started without it.
fn pressure(cgroup: &Path, name: &str) -> Option<PSIStats> {
    let mut stats = PSIStats::new();
    for line in read(cgroup, name)?.lines() {
        let Some((kind, pairs)) = nested(line) else {
            continue;
        };
        let mut data = PSIData::new();
        for (key, value) in pairs {
            match key {
                "avg10" => data.avg10 = value.parse().unwrap_or_default(),
                "avg60" => data.avg60 = value.parse().unwrap_or_default(),
                "avg300" => data.avg300 = value.parse().unwrap_or_default(),
                "total" => data.total = value.parse().unwrap_or_default(),
                _ => {}
            }
        }
        match kind {
            "some" => stats.some = MessageField::some(data),
            "full" => stats.full = MessageField::some(data),
            _ => {}
        }
    }
    (stats.some.is_some() || stats.full.is_some()).then_some(stats)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use containerd_shim::util::convert_to_any;
    use proptest::prelude::*;

    use super::*;

    fn cgroup(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        directory
    }

    #[test]
    #[allow(clippy::too_many_lines)]
    fn every_file_of_a_cgroup_is_read() {
        let cgroup = cgroup(&[
            (
                "cpu.stat",
                "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 3\nnr_throttled 2\nthrottled_usec 77\nnr_bursts 1\nburst_usec 5\nfuture_key 1\n",
            ),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=0.25 avg300=0.00 total=12345\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=9\n",
            ),
            ("memory.current", "104857600\n"),
            ("memory.max", "209715200\n"),
            ("memory.peak", "150000000\n"),
            ("memory.swap.current", "4096\n"),
            ("memory.swap.max", "max\n"),
            ("memory.swap.peak", "8192\n"),
            (
                "memory.stat",
                "anon 1000\nfile 2000\ninactive_file 700\nworkingset_refault_anon 3\nworkingset_refault_file 4\nworkingset_activate_file 5\nthp_collapse_alloc 6\nshmem 0\n",
            ),
            ("memory.events", "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 5\n"),
            ("memory.pressure", "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\n"),
            ("pids.current", "7\n"),
            ("pids.max", "max\n"),
            ("io.stat", "8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\nodd line\n253:16 rbytes=1\n"),
            ("rdma.current", "mlx4_0 hca_handle=2 hca_object=2000\n"),
            ("rdma.max", "mlx4_0 hca_handle=max hca_object=3000\n"),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.events", "max 9\n"),
            ("hugetlb.2MB.rsvd.current", "1\n"),
        ]);
        let metrics = metrics(cgroup.path(), || panic!("the controller is there"));
        assert_eq!((metrics.pids.current, metrics.pids.limit), (7, u64::MAX));
        let cpu = &metrics.cpu;
        assert_eq!((cpu.usage_usec, cpu.user_usec, cpu.system_usec), (1500, 1000, 500));
        assert_eq!(
            (cpu.nr_periods, cpu.nr_throttled, cpu.throttled_usec, cpu.nr_bursts, cpu.burst_usec),
            (3, 2, 77, 1, 5)
        );
        assert_eq!((cpu.psi.some.total, cpu.psi.full.total), (12345, 9));
        assert!((cpu.psi.some.avg10 - 1.5).abs() < 1e-9);
        let memory = &metrics.memory;
        assert_eq!(
            (memory.usage, memory.usage_limit, memory.max_usage),
            (104_857_600, 209_715_200, 150_000_000)
        );
        assert_eq!((memory.swap_usage, memory.swap_limit, memory.swap_max_usage), (4096, u64::MAX, 8192));
        assert_eq!((memory.anon, memory.file, memory.inactive_file), (1000, 2000, 700));
        assert_eq!(
            (memory.workingset_refault, memory.workingset_activate, memory.thp_collapse_alloc),
            (7, 5, 6)
        );
        assert_eq!(memory.psi.some.total, 1);
        let events = &metrics.memory_events;
        assert_eq!(
            (events.low, events.high, events.max, events.oom, events.oom_kill, events.oom_group_kill),
            (0, 1, 2, 3, 4, 5)
        );
        let usage = &metrics.io.usage;
        assert_eq!(usage.len(), 2);
        assert_eq!(
            (usage[0].major, usage[0].rbytes, usage[0].wbytes, usage[0].rios, usage[0].wios),
            (8, 10, 20, 1, 2)
        );
        assert_eq!((usage[1].major, usage[1].minor), (253, 16));
        assert_eq!(
            (metrics.rdma.current[0].hca_objects, metrics.rdma.limit[0].hca_handles),
            (2000, u32::MAX)
        );
        assert_eq!(metrics.hugetlb.len(), 1);
        let huge = &metrics.hugetlb[0];
        assert_eq!(
            (huge.pagesize.as_str(), huge.current, huge.max, huge.failcnt),
            ("2MB", 2_097_152, u64::MAX, 9)
        );
    }

    #[test]
    fn what_is_charged_has_the_kernels_names_and_what_is_nothing_has_none() {
        let files = [
            ("memory.stat", "anon 0\nfile 4096\nkernel 300\nshmem 4096\npgfault 7\nslab odd\n"),
            ("memory.swap.current", "8192\n"),
        ];
        let mut charged: Vec<_> = charged(cgroup(&files).path()).into_iter().collect();
        charged.sort();
        let wanted = [("file", 4096), ("kernel", 300), ("shmem", 4096), ("swap", 8192)];
        assert_eq!(charged, wanted.map(|(name, bytes)| (name.to_owned(), bytes)));
        assert!(super::charged(cgroup(&[]).path()).is_empty());
    }

    #[test]
    fn an_empty_cgroup_still_has_figures_and_they_are_not_zero() {
        let cgroup = cgroup(&[]);
        let metrics = metrics(cgroup.path(), || 0);
        assert_eq!((metrics.cpu.usage_usec, metrics.memory.usage), (1, 1));
        assert!(metrics.pids.is_none() && metrics.io.is_none() && metrics.rdma.is_none());
        assert!(metrics.memory_events.is_none() && metrics.cpu.psi.is_none());
        assert_eq!(memory_used(cgroup.path()), (1, "pss"));
        assert_eq!(memory_used(Path::new("/nonexistent")), (1, "pss"));
    }

    #[test]
    fn without_a_memory_controller_the_processes_are_added_up() {
        let cgroup = cgroup(&[("cgroup.procs", &format!("{}\n999999999\n", std::process::id()))]);
        let below = cgroup.path().join("below");
        let alone = pss(cgroup.path());
        assert!(alone > 100_000, "{alone}");
        assert_eq!(memory_used(cgroup.path()).1, "pss");
        fs::create_dir(&below).unwrap();
        fs::write(below.join("cgroup.procs"), format!("{}\n", std::process::id())).unwrap();
        assert!(pss(cgroup.path()) > alone + alone / 2, "the cgroup below is not counted");
        assert_eq!(metrics(cgroup.path(), || 4711).memory.usage, 4711);
        fs::write(cgroup.path().join("memory.current"), "5\n").unwrap();
        assert_eq!(memory_used(cgroup.path()), (5, "memory.current"));
    }

    #[test]
    fn the_answer_has_the_name_that_containerd_knows() {
        let metrics = metrics(cgroup(&[("memory.current", "5")]).path(), || 0);
        let any = to_any(&metrics);
        assert_eq!(any, convert_to_any(Box::new(metrics.clone())).unwrap());
        assert_eq!(Metrics::parse_from_bytes(&any.value).unwrap(), metrics);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn no_content_of_any_file_spoils_the_others(text in "\\PC*|([a-z_]{0,8}[ =:]?[0-9]{0,25}\n){0,5}") {
            let names = ["cpu.stat", "memory.stat", "memory.current", "io.stat", "rdma.current", "cpu.pressure", "hugetlb.2MB.current", "pids.current", "cgroup.procs", "memory.events"];
            for odd in names {
                let cgroup = cgroup(&[("pids.current", "3"), ("cpu.stat", "usage_usec 9\n"), ("memory.current", "8"), (odd, &text)]);
                let metrics = metrics(cgroup.path(), || 0);
                prop_assert!(metrics.cpu.usage_usec > 0 && metrics.memory.usage > 0);
                prop_assert!(odd == "pids.current" || metrics.pids.current == 3);
                prop_assert!(odd == "memory.current" || metrics.memory.usage == 8);
            }
        }
    }
}
