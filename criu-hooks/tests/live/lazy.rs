//! Lazy restores: the right bytes whatever happens, or the end of the container; never a page of zeros.

use std::{
    fs,
    os::unix::fs::{FileExt, PermissionsExt},
    time::{Duration, Instant},
};

use criu_hooks::{
    criu::{HookError, NoHooks},
    engine::{Engine, Handover, RestoreError, RestoreHooks, RestoreOptions, Restored},
    pager::{self, Eager, Fill, FillError, FillReport, LazyOptions},
    procfs,
    spawn::LocalSpawner,
};
use rustix::{
    net::SocketType,
    process::{Pid, Resource, Rlimit, Signal, getrlimit, setrlimit},
};

use super::{
    agent::{Agent, NAMESPACE, Setup, reap},
    in_node,
};

/// Everything that the memory program can do.
const ALL: [&str; 8] = ["threads", "tasks", "fork", "advise", "unmap", "remap", "shared", "file"];

/// The program that the pagers of these tests are: this one, in a process of its own.
#[test]
fn the_pager_of_the_other_tests() {
    let stdin = std::io::stdin();
    if matches!(rustix::net::sockopt::socket_type(&stdin), Ok(SocketType::SEQPACKET)) {
        let socket = rustix::io::dup(&stdin).unwrap();
        let code = pager::run(socket);
        std::process::exit(i32::from(code != std::process::ExitCode::SUCCESS));
    }
}

const PAGER: &str = "lazy::the_pager_of_the_other_tests";

pub(super) fn lazily() -> LazyOptions {
    let args = ["--exact", PAGER, "--nocapture", "--test-threads", "1"];
    LazyOptions { least_bytes: 0, ..LazyOptions::new("/proc/self/exe", args) }
}

/// A container with the memory program.
fn start(id: &str, args: &[&str]) -> Agent {
    start_python(id, include_str!("memory.py"), args)
}

/// A container with a Python program.
fn start_python(id: &str, program: &str, args: &[&str]) -> Agent {
    let args: Vec<&str> = ["python3", "-c", program].into_iter().chain(args.iter().copied()).collect();
    Agent::start(id, &Setup { args: &args, whole_root: true, ..Setup::default() })
}

async fn restore_with(agent: &mut Agent, lazy: LazyOptions) -> Result<Restored, RestoreError> {
    let image = agent.image();
    let options = RestoreOptions { lazy: Some(lazy), ..agent.restore_options() };
    let handover = Handover { inherit: agent.inherit(&image), spare: agent.spare.take() };
    let restored =
        agent.engine.restore(NAMESPACE, &agent.container, &image, &options, handover, &mut NoHooks).await?;
    agent.pid = restored.pid;
    Ok(restored)
}

async fn restore(agent: &mut Agent) -> Fill {
    restore_with(agent, lazily()).await.unwrap().fill.expect("a lazy restore")
}

async fn sleep_and_wake(agent: &mut Agent) -> Fill {
    agent.dump().await.unwrap();
    restore(agent).await
}

/// The pagers of this node.
fn pagers() -> Vec<Pid> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
    pids.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|arg| arg == PAGER.as_bytes())
    })
    .collect()
}

async fn no_pager_remains() {
    let start = Instant::now();
    while !pagers().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(5), "a pager remains");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The fill is complete, with a report that can be true.
async fn completed(fill: &mut Fill) -> FillReport {
    let report = tokio::time::timeout(Duration::from_mins(1), fill.complete()).await.unwrap().unwrap();
    assert_eq!(fill.complete().await.as_ref(), Ok(&report));
    no_pager_remains().await;
    report
}

on_a_node!(every_byte_is_right_at_each_size, async || {
    for mib in [1, 16, 64, 256] {
        let mut agent = start(&format!("memory-{mib}"), &[&mib.to_string()]);
        let mut last = agent.count_on(0, 1).await;
        for _ in 0..2 {
            let mut fill = sleep_and_wake(&mut agent).await;
            last = agent.count_on(last, 2).await;
            let report = completed(&mut fill).await;
            println!("{mib} MiB: {report:?}");
            assert!(report.bytes >= mib << 20 && report.faults > 0 && report.deaths == 0, "{report:?}");
            last = agent.count_on(last, 2).await;
            agent.image().remove().unwrap();
        }
        agent.delete();
    }
});

/// The memory program with everything that it can do.
fn start_busy(id: &str, mib: &str) -> Agent {
    let args: Vec<&str> = [mib].into_iter().chain(ALL).collect();
    start(id, &args)
}

on_a_node!(memory_that_changes_while_it_is_filled_stays_right, async || {
    let mut agent = start_busy("busy", "24");
    let mut last = agent.count_on(0, 1).await;
    for cycle in 0..6 {
        let mut fill = sleep_and_wake(&mut agent).await;
        last = agent.count_on(last, 2).await;
        println!("cycle {cycle}: {:?}", completed(&mut fill).await);
        last = agent.count_on(last, 1).await;
        agent.image().remove().unwrap();
    }
    agent.delete();
});

/// Forks, as soon as it was away, a child that stays and has no part of half of the memory; counts on then.
const DONTFORK: &str = "import mmap, os, time
size = 128 << 20
area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
page = lambda at: (at >> 12).to_bytes(8, 'little') * 512
for at in range(0, size, 4096):
    area[at : at + 4096] = page(at)
area.madvise(mmap.MADV_DONTFORK, 0, size // 2)
print(0, flush=True)
before, woken, n = time.time(), False, 0
while True:
    time.sleep(0.002)
    now = time.time()
    if not woken and now - before > 0.3:
        woken = True
        if os.fork() == 0:
            for at in range(size // 2, size, 4096):
                if area[at : at + 4096] != page(at):
                    print('WRONG in the child', flush=True)
            time.sleep(1000)
    before = now
    if woken:
        for at in range(0, size, 1 << 20):
            if area[at : at + 4096] != page(at):
                print('WRONG in the parent', flush=True)
        n += 1
        print(n, flush=True)
        time.sleep(0.02)
";

on_a_node!(a_child_without_a_part_of_the_memory_lives_on, async || {
    let mut agent = start_python("dontfork", DONTFORK, &[]);
    agent.line().await;
    agent.dump().await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut fill = restore(&mut agent).await;
    let report = completed(&mut fill).await;
    println!("{report:?}");
    assert!(report.absent_bytes > 0, "{report:?}");
    agent.count_on(0, 3).await;
    // The init, and the child.
    assert_eq!(agent.container.cgroup.procs().unwrap().len(), 2);
    assert!(!agent.rest().contains("WRONG"));
    agent.delete();
});

/// Forks 600 children that end soon, as soon as it was away.
const FORKS: &str = "import mmap, os, time
size = 256 << 20
area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
page = lambda at: (at >> 12).to_bytes(8, 'little') * 512
for at in range(0, size, 4096):
    area[at : at + 4096] = page(at)
print(0, flush=True)
before, woken, n = time.time(), False, 0
while True:
    time.sleep(0.002)
    now = time.time()
    if not woken and now - before > 0.3:
        woken = True
        for child in range(600):
            if os.fork() == 0:
                at = child * 7 % (size >> 12) << 12
                os._exit(area[at : at + 4096] != page(at))
            if os.wait()[1] != 0:
                print('WRONG in a child', flush=True)
    before = now
    if woken:
        n += 1
        print(n, flush=True)
        time.sleep(0.02)
";

on_a_node!(hundreds_of_short_lived_children_are_let_go_at_once, async || {
    let mut agent = start_python("forks", FORKS, &[]);
    agent.line().await;
    agent.dump().await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    // Fewer than two for each child: enough when those of the dead are closed.
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(512), ..limit }).unwrap();
    let mut fill = restore(&mut agent).await;
    println!("{:?}", completed(&mut fill).await);
    setrlimit(Resource::Nofile, limit).unwrap();
    agent.count_on(0, 3).await;
    assert!(!agent.rest().contains("WRONG"));
    agent.delete();
});

on_a_node!(a_sleep_in_the_middle_of_a_fill_keeps_every_byte, async || {
    let mut agent = start("again", &["64", "threads", "fork", "shared"]);
    let mut last = agent.count_on(0, 1).await;
    for _ in 0..5 {
        let mut fill = sleep_and_wake(&mut agent).await;
        fill.hurry();
        completed(&mut fill).await;
    }
    last = agent.count_on(last, 3).await;
    // A fill that nobody waits for goes on.
    drop(sleep_and_wake(&mut agent).await);
    agent.count_on(last, 3).await;
    no_pager_remains().await;
    agent.delete();
});

/// Kills the pagers of this node; says whether there was one.
fn kill_pagers() -> bool {
    let pagers = pagers();
    for pid in &pagers {
        let _ = rustix::process::kill_process(*pid, Signal::KILL);
    }
    !pagers.is_empty()
}

/// Nothing is left of a container that was killed, and it never saw a wrong byte.
async fn ended_without_a_wrong_byte(agent: &mut Agent) {
    agent.container.cgroup.wait_unpopulated(Duration::from_secs(5)).await.unwrap();
    reap(agent.pid);
    let said = agent.rest();
    assert!(!said.contains("WRONG"), "{said}");
}

on_a_node!(whenever_a_pager_is_killed_another_finishes_or_the_container_ends, async || {
    let (mut taken_over, mut ended) = (0, 0);
    for round in 0..10_u64 {
        let id = format!("killed-{round}");
        let mut agent = start_busy(&id, "8");
        let last = agent.count_on(0, 1).await;
        let mut fill = sleep_and_wake(&mut agent).await;
        tokio::time::sleep(Duration::from_millis(round * 5)).await;
        for _ in 0..=round % 3 {
            kill_pagers();
            tokio::time::sleep(Duration::from_millis(round % 4)).await;
        }
        match tokio::time::timeout(Duration::from_mins(1), fill.complete()).await.unwrap() {
            Ok(report) => {
                taken_over += report.deaths;
                agent.count_on(last, 3).await;
            }
            Err(error) => {
                println!("round {round}: {error}");
                ended += 1;
                ended_without_a_wrong_byte(&mut agent).await;
            }
        }
        no_pager_remains().await;
        agent.delete();
    }
    println!("{taken_over} pagers replaced, {ended} containers ended");
    assert!(taken_over >= 5, "{taken_over}");
    // Only between a fork and the word of it can a death leave a doubt.
    assert!(ended <= 2, "{ended}");
});

/// Kills pagers while CRIU works.
struct KillMeanwhile;

#[async_trait::async_trait]
impl RestoreHooks for KillMeanwhile {
    async fn created(&mut self, _: Pid) -> Result<(), HookError> {
        assert!(kill_pagers());
        Ok(())
    }

    async fn before_resume(&mut self, _: Pid) -> Result<(), HookError> {
        kill_pagers();
        Ok(())
    }
}

on_a_node!(a_pager_killed_before_the_agent_runs_is_replaced, async || {
    let mut agent = start_busy("early", "16");
    let last = agent.count_on(0, 1).await;
    agent.dump().await.unwrap();
    let image = agent.image();
    let options = RestoreOptions { lazy: Some(lazily()), ..agent.restore_options() };
    let (inherit, mut hooks) = (agent.inherit(&image), KillMeanwhile);
    let restore =
        agent.engine.restore(NAMESPACE, &agent.container, &image, &options, inherit.into(), &mut hooks);
    let restored = restore.await.unwrap();
    agent.pid = restored.pid;
    let report = completed(&mut restored.fill.unwrap()).await;
    assert!(report.deaths >= 1, "{report:?}");
    agent.count_on(last, 3).await;
    agent.delete();
});

on_a_node!(pagers_that_cannot_start_are_no_reason_to_stay_asleep, async || {
    let mut agent = start("pagerless", &["16"]);
    let last = agent.count_on(0, 1).await;
    agent.dump().await.unwrap();
    let lazy = LazyOptions { least_bytes: 0, ..LazyOptions::new("/bin/sleep", ["0.01"]) };
    let error = restore_with(&mut agent, lazy).await.unwrap_err();
    assert!(matches!(&error, RestoreError::Fill(FillError::Died { deaths: 4 })), "{error}");
    assert!(error.is_lazy_refused());
    agent.restore().await.unwrap();
    agent.count_on(last, 2).await;
    agent.delete();
});

on_a_node!(pagers_that_die_again_and_again_end_the_container, async || {
    let mut agent = start("dying", &["256"]);
    agent.count_on(0, 1).await;
    let mut fill = sleep_and_wake(&mut agent).await;
    let killer = async {
        loop {
            kill_pagers();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let outcome = tokio::select! { outcome = fill.complete() => outcome, () = killer => unreachable!() };
    assert_eq!(outcome, Err(FillError::Died { deaths: 4 }));
    ended_without_a_wrong_byte(&mut agent).await;
    no_pager_remains().await;
    // The image is as it was.
    let mut fill = restore(&mut agent).await;
    completed(&mut fill).await;
    agent.line().await;
    agent.delete();
});

on_a_node!(a_pager_whose_shim_has_died_finishes_alone, async || {
    let mut agent = start("orphan", &["128", "fork"]);
    let last = agent.count_on(0, 1).await;
    agent.dump().await.unwrap();
    // The holder goes with the runtime that it was made on.
    let mut agent = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let fill = runtime.block_on(restore(&mut agent));
        assert!(!fill.is_complete());
        agent
    })
    .join()
    .unwrap();
    assert!(!pagers().is_empty());
    agent.count_on(last, 2).await;
    no_pager_remains().await;
    agent.delete();
});

on_a_node!(pages_that_are_gone_end_the_container, async || {
    let mut agent = start("truncated", &["256"]);
    agent.count_on(0, 1).await;
    let mut fill = sleep_and_wake(&mut agent).await;
    for entry in fs::read_dir(agent.image().path().join("img")).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("pages-") {
            fs::OpenOptions::new().write(true).open(entry.path()).unwrap().set_len(4096).unwrap();
        }
    }
    match fill.complete().await {
        Err(FillError::Failed(why)) => assert!(why.contains("ends before its page"), "{why}"),
        other => panic!("{other:?}"),
    }
    ended_without_a_wrong_byte(&mut agent).await;
    no_pager_remains().await;
    agent.delete();
});

on_a_node!(a_page_that_was_altered_never_reaches_the_agent, async || {
    let mut agent = start("altered", &["64"]);
    let last = agent.count_on(0, 1).await;
    agent.dump().await.unwrap();
    let image = agent.image();
    assert!(image.finish_in_background(None).unwrap().await.unwrap().summed);
    let pages = image.path().join("img/pages-1.img");
    let flip = || {
        let file = fs::OpenOptions::new().read(true).write(true).open(&pages).unwrap();
        let (mut byte, at) = ([0], file.metadata().unwrap().len() / 2 / 4096 * 4096 + 99);
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    };
    flip();
    let mut fill = restore(&mut agent).await;
    match fill.complete().await {
        Err(FillError::Failed(why)) => {
            assert!(why.contains("pages-1.img") && why.contains("altered at byte"), "{why}");
        }
        other => panic!("{other:?}"),
    }
    ended_without_a_wrong_byte(&mut agent).await;
    no_pager_remains().await;
    flip();
    completed(&mut restore(&mut agent).await).await;
    agent.count_on(last, 2).await;
    agent.delete();
});

/// A CRIU to which the kernel refuses userfaultfd.
const REFUSED: &str = r#"#!/usr/bin/python3
import ctypes, os, struct, sys
filter = b"".join(struct.pack("HBBI", *part) for part in [(0x20, 0, 0, 0), (0x15, 0, 1, 323), (6, 0, 0, 0x50001), (6, 0, 0, 0x7fff0000)])
program = struct.pack("HxxxxxxP", 4, ctypes.addressof(buffer := ctypes.create_string_buffer(filter)))
assert ctypes.CDLL(None).prctl(22, 2, program, 0, 0) == 0
os.execv("/usr/sbin/criu", ["criu"] + sys.argv[1:])
"#;

on_a_node!(where_userfaultfd_is_refused_an_eager_restore_works, async || {
    let mut agent = start("refused", &["16"]);
    let last = agent.count_on(0, 1).await;
    agent.dump().await.unwrap();
    fs::write("/run/criu-refused", REFUSED).unwrap();
    fs::set_permissions("/run/criu-refused", fs::Permissions::from_mode(0o755)).unwrap();
    let able = std::mem::replace(
        &mut agent.engine,
        Engine::new("/run/criu-refused", std::sync::Arc::new(LocalSpawner)),
    );
    let error = restore_with(&mut agent, lazily()).await.unwrap_err();
    assert!(error.is_lazy_refused(), "{error}");
    no_pager_remains().await;
    agent.engine = able;
    agent.restore().await.unwrap();
    agent.count_on(last, 2).await;
    agent.delete();
});

on_a_node!(little_memory_is_restored_eagerly_and_says_so, async || {
    let mut agent = start("little", &["1"]);
    let last = agent.count_on(0, 1).await;
    agent.dump().await.unwrap();
    let lazy = LazyOptions { least_bytes: 1 << 30, ..lazily() };
    let eager = restore_with(&mut agent, lazy).await.unwrap().fill.unwrap_err();
    assert!(matches!(eager, Eager::Small { bytes, .. } if bytes > 1 << 20), "{eager}");
    assert!(pagers().is_empty());
    agent.count_on(last, 2).await;
    agent.delete();
});

on_a_node!(what_a_wake_needed_comes_first_at_the_next, async || {
    let mut agent = start("learning", &["32"]);
    let mut last = agent.count_on(0, 1).await;
    let mut prefetched = Vec::new();
    for cycle in 0..4 {
        let mut fill = sleep_and_wake(&mut agent).await;
        let report = completed(&mut fill).await;
        prefetched.push(report.prefetched_bytes);
        last = agent.count_on(last, 1).await;
        let kept = agent.image().path().parent().unwrap().join("working-set.json");
        assert!(kept.exists());
        if cycle == 1 {
            fs::write(&kept, b"{\"version\":1").unwrap();
        }
        agent.image().remove().unwrap();
    }
    assert_eq!((prefetched[0], prefetched[2]), (0, 0), "{prefetched:?}");
    assert!(prefetched[1] > 0 && prefetched[3] > 0, "{prefetched:?}");
    agent.store.remove_all(NAMESPACE, "learning").unwrap();
    assert!(!std::path::Path::new("/run/images/test").exists());
    agent.delete();
});

on_a_node!(a_criu_that_was_started_ahead_restores_lazily_too, async || {
    let mut agent = start("ahead", &["64"]);
    let mut last = agent.count_on(0, 1).await;
    for _ in 0..2 {
        agent.dump().await.unwrap();
        agent.start_ahead().await;
        let mut fill = restore(&mut agent).await;
        last = agent.count_on(last, 2).await;
        completed(&mut fill).await;
        agent.image().remove().unwrap();
    }
    agent.delete();
});

on_a_node!(ten_wakes_at_once, async || {
    let mut agents = Vec::new();
    for number in 0..10 {
        let mut agent = start(&format!("storm-{number}"), &["24", "fork", "advise"]);
        let last = agent.count_on(0, 1).await;
        agent.dump().await.unwrap();
        agents.push((agent, last));
    }
    let mut storm = tokio::task::JoinSet::new();
    for (mut agent, last) in agents {
        storm.spawn(async move {
            let fill = restore(&mut agent).await;
            (agent, last, fill)
        });
    }
    while let Some(woken) = storm.join_next().await {
        let (mut agent, last, mut fill) = woken.unwrap();
        agent.count_on(last, 2).await;
        tokio::time::timeout(Duration::from_mins(1), fill.complete()).await.unwrap().unwrap();
        assert!(procfs::alive(agent.pid));
        agent.delete();
    }
    no_pager_remains().await;
});

/// Fills memory, and after each wake measures how long touches take: of each page in turn, 97 pages apart.
const TOUCH: &str = "import mmap, os, sys, time
size = int(sys.argv[1]) << 20
area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, size, 1 << 20):
    area[at : at + (1 << 20)] = os.urandom(1 << 20)
print('ready', flush=True)
before, pages = time.time(), size >> 12
while True:
    time.sleep(0.001)
    now = time.time()
    if now - before > 0.03:
        taken = []
        for i in range(400):
            start = time.perf_counter_ns()
            area[(i * 97 * 31 % pages) << 12]
            taken.append(time.perf_counter_ns() - start)
        taken.sort()
        print(f'p50 {taken[200] // 1000} p99 {taken[396] // 1000} us', flush=True)
        now = time.time()
    before = now
";

on_a_node!(measurements, async || {
    if std::env::var_os("AGENTCUBE_MEASURE").is_none() {
        eprintln!("skipped: measurements are made when AGENTCUBE_MEASURE is set, best by an optimised build");
        return;
    }
    for mib in [8, 16, 64, 256, 1024] {
        let (id, size) = (format!("measured-{mib}"), mib.to_string());
        let mut agent = start_python(&id, TOUCH, &[&size]);
        agent.line().await;
        let (mut lazy, mut resident, mut eager, mut touches) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..4 {
            agent.dump().await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            let restored = restore_with(&mut agent, lazily()).await.unwrap();
            lazy.push(restored.total);
            resident.push(completed(&mut restored.fill.unwrap()).await.resident);
            touches.push(agent.line().await);
            agent.image().remove().unwrap();
            agent.dump().await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            eager.push(agent.restore().await.unwrap().total);
            agent.line().await;
            agent.image().remove().unwrap();
        }
        let least = |times: &[Duration]| times.iter().min().copied().unwrap_or_default();
        let (running, filled, all) = (least(&lazy), least(&resident), least(&eager));
        println!(
            "{mib} MiB: lazy, running {running:.1?}, resident {filled:.1?} later; eager {all:.1?}; {touches:?}"
        );
        agent.delete();
    }
});
