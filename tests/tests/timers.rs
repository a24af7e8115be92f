//! Timers of checkpointed agents: they wake it in time, and the time asleep counts.

#![allow(clippy::unwrap_used)]

mod sleeper;

use std::{
    thread,
    time::{Duration, Instant},
};

use agentcube_tests::{
    images::Image,
    node::{Agent, AgentSpec, Node},
};
use serde_json::Value;
use sleeper::{SOON, agentcube, assert_refused, inspect, on_node, python, run_ready, says, spec, start_with};

/// What the waits below share: times are told in milliseconds of the wall clock, which no sleep stops.
const PROGRAM: &str = r"
import asyncio, ctypes, os, select, signal, struct, threading, time
libc = ctypes.CDLL(None, use_errno=True)
memory = {str(n): n * n for n in range(1000)}
class spec(ctypes.Structure):
    _fields_ = [('s', ctypes.c_long), ('n', ctypes.c_long)]
def span(t):
    return spec(int(t), int(t % 1 * 1e9))
def timerfd(clock, flags, first, every=0):
    fd = libc.timerfd_create(clock, 0)
    its = struct.pack('4l', int(every), int(every % 1 * 1e9), int(first), int(first % 1 * 1e9))
    assert libc.timerfd_settime(fd, flags, its, None) == 0
    return fd
def expired(fd):
    return struct.unpack('q', os.read(fd, 8))[0]
def posix(clock, first):
    sigevent = struct.pack('qii48x', 0, signal.SIGALRM, 0)
    timer = ctypes.c_void_p()
    assert libc.timer_create(clock, sigevent, ctypes.byref(timer)) == 0
    assert libc.timer_settime(timer, 0, struct.pack('4l', 0, 0, int(first), 0), None) == 0
def rang():
    signal.sigwait([signal.SIGALRM])
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
begun, monotonic = time.time(), time.monotonic()
print('ready', flush=True)
WAIT
took, ran = time.time() - begun, time.monotonic() - monotonic
assert all(memory[str(n)] == n * n for n in range(1000))
os.write(1, f'over {int(took * 1000)} {int(ran * 1000)}\n'.encode())
signal.pause()
";

/// Ways to wait for `$T` seconds, by their names.
const WAITS: [(&str, &str); 22] = [
    // clock_nanosleep, until a time of CLOCK_MONOTONIC.
    ("sleep", "time.sleep($T)"),
    // nanosleep: what is left is told to the caller, or not.
    ("told", "ts = span($T); libc.nanosleep(ctypes.byref(ts), ctypes.byref(ts))"),
    ("untold", "libc.usleep(int($T * 1000000))"),
    ("wall", "libc.clock_nanosleep(0, 1, ctypes.byref(span(time.time() + $T)), None)"),
    ("poll", "select.poll().poll($T * 1000)"),
    ("ppoll", "libc.ppoll(None, 0, ctypes.byref(span($T)), None)"),
    ("select", "select.select([], [], [], $T)"),
    ("epoll", "select.epoll().poll($T)"),
    ("asyncio", "asyncio.run(asyncio.sleep($T))"),
    ("lock", "threading.Event().wait($T)"),
    ("lock2", "t = threading.Thread(target=time.sleep, args=[$T]); t.start(); t.join()"),
    // FUTEX_WAIT may return at any time; whoever uses it looks at the clock.
    (
        "futex",
        "word = ctypes.c_int(0)\nwhile (left := $T - (time.monotonic() - monotonic)) > 0: \
         libc.syscall(202, ctypes.byref(word), 128, 0, ctypes.byref(span(left)))",
    ),
    ("signal", "signal.sigtimedwait([signal.SIGUSR1], $T)"),
    ("timerfd", "assert expired(timerfd(1, 0, $T)) == 1"),
    ("timerfd-boot", "fd = timerfd(7, 0, $T); select.select([fd], [], []); assert expired(fd) == 1"),
    ("timerfd-moment", "assert expired(timerfd(1, 1, monotonic + $T)) == 1"),
    ("timerfd-wall", "assert expired(timerfd(0, 1, begun + $T)) == 1"),
    ("timerfd-often", "fd = timerfd(1, 0, 0.5, 0.5)\nn = 0\nwhile n < 2 * $T: n += expired(fd)"),
    ("alarm", "signal.alarm($T); rang()"),
    ("itimer", "signal.setitimer(signal.ITIMER_REAL, $T, 1); rang()"),
    ("posix", "posix(1, $T); rang()"),
    ("posix-wall", "posix(0, $T); rang()"),
];

/// An agent in Python that waits for so many seconds.
fn waiting(id: &str, wait: &str, seconds: u64) -> AgentSpec {
    let wait = wait.replace("$T", &seconds.to_string());
    python(id).args(&["python3", "-u", "-c", &PROGRAM.replace("WAIT\n", &format!("{wait}\n"))])
}

fn sleep(node: &Node, id: &str) {
    agentcube(node, &["sleep", "--depth", "checkpointed", id]).check().unwrap();
}

fn wake(node: &Node, id: &str) {
    agentcube(node, &["wake", id]).check().unwrap();
}

fn is_asleep(node: &Node, id: &str) -> bool {
    inspect(node, id)["state"] == "asleep"
}

/// Waits until it is awake, and sees to it that a timer woke it.
fn woken_by_timer(node: &Node, id: &str) -> Value {
    node.wait_until(&format!("{id} to wake"), SOON, || Ok(inspect(node, id)["state"] == "running")).unwrap();
    let now = inspect(node, id);
    assert_eq!(now["last_wake"]["cause"], "timer", "{now:#}");
    now
}

/// How long an agent has waited, in milliseconds: by the wall clock, and by its own monotonic clock.
fn took(node: &Node, agent: &Agent) -> (u64, u64) {
    says(node, agent, "over");
    let log = agent.log().unwrap();
    let mut times = log.split("over").nth(1).unwrap().split_whitespace();
    let mut next = || times.next().unwrap().parse().unwrap();
    (next(), next())
}

/// Does the same with an agent for each of these ways to wait, of several at a time.
fn each<'w>(waits: &[(&'w str, &'w str)], work: impl Fn(&'w str, &'w str) + Sync) {
    const AT_A_TIME: usize = 6;
    thread::scope(|scope| {
        for first in 0..AT_A_TIME {
            let (work, waits) = (&work, waits.iter().skip(first).step_by(AT_A_TIME));
            scope.spawn(move || waits.for_each(|(id, wait)| work(id, wait)));
        }
    });
}

/// Those with these names.
fn of(names: &[&str]) -> Vec<(&'static str, &'static str)> {
    names.iter().map(|name| *WAITS.iter().find(|(id, _)| id == name).unwrap()).collect()
}

/// How long after its time a timer may come, in milliseconds: the machine may be busy.
const LATE: u64 = 5000;

/// How long before its time a wait may end, in milliseconds: none, but for those of which the kernel tells neither what is
/// left nor when they began. That is known by the clocks of processors, which differ.
fn early(id: &str) -> u64 {
    if ["poll", "untold"].contains(&id) { 500 } else { 0 }
}

fn assert_in_time(id: &str, took: u64, due: u64) {
    println!("{id}: after {took} ms");
    assert!((due - early(id)..due + LATE).contains(&took), "{id}: after {took} ms rather than {due}");
}

#[test]
fn a_timer_of_each_kind_wakes_a_checkpointed_agent_in_time() {
    let node = start_with("timer_horizon_seconds = 2\n");
    let waits: Vec<_> = WAITS.into_iter().filter(|(id, _)| *id != "timerfd-often").collect();
    each(&waits, |id, wait| {
        let agent = run_ready(&node, &waiting(id, wait, 8));
        sleep(&node, id);
        thread::sleep(Duration::from_secs(1));
        let now = inspect(&node, id);
        assert_eq!((&now["state"], &now["depth"]), (&"asleep".into(), &"checkpointed".into()), "{now:#}");
        assert_in_time(id, took(&node, &agent).0, 8000);
        assert_eq!(woken_by_timer(&node, id)["wakes"], 1);
        agent.delete().unwrap();
    });
}

#[test]
fn time_asleep_counts_after_a_wake_in_the_middle() {
    let node = start_with("timer_horizon_seconds = 60\n");
    each(&WAITS, |id, wait| {
        let agent = run_ready(&node, &waiting(id, wait, 10));
        sleep(&node, id);
        thread::sleep(Duration::from_secs(5));
        assert!(is_asleep(&node, id), "{id} was woken");
        wake(&node, id);
        let (wall, monotonic) = took(&node, &agent);
        assert_in_time(id, wall, 10_000);
        assert!(wall.abs_diff(monotonic) < 2000, "{id}: its own clock shows {monotonic} of {wall} ms");
        agent.delete().unwrap();
    });
}

#[test]
fn what_was_due_in_its_sleep_comes_at_once_after_the_wake() {
    let node = start_with("timer_horizon_seconds = 60\n");
    each(&WAITS, |id, wait| {
        let agent = run_ready(&node, &waiting(id, wait, 4));
        let since = Instant::now();
        sleep(&node, id);
        thread::sleep(Duration::from_secs(6));
        wake(&node, id);
        let slept = u64::try_from(since.elapsed().as_millis()).unwrap();
        let wall = took(&node, &agent).0;
        assert!((5800..slept + LATE).contains(&wall), "{id}: after {wall} ms, of which {slept} asleep");
        agent.delete().unwrap();
    });
}

#[test]
fn a_wait_that_was_interrupted_before_ends_in_time_after_several_sleeps_of_either_depth() {
    let node = start_with("timer_horizon_seconds = 2\n");
    each(
        &of(&["told", "untold", "poll", "ppoll", "select", "lock", "futex", "epoll", "timerfd"]),
        |id, wait| {
            let agent = run_ready(&node, &waiting(id, wait, 14));
            let pause = || thread::sleep(Duration::from_millis(700));
            // The kernel goes on with an interrupted call under another number.
            agentcube(&node, &["sleep", "--depth", "frozen", id]).check().unwrap();
            pause();
            wake(&node, id);
            pause();
            sleep(&node, id);
            pause();
            wake(&node, id);
            pause();
            agentcube(&node, &["sleep", "--depth", "frozen", id]).check().unwrap();
            pause();
            sleep(&node, id);
            // A call that the kernel has begun anew when it was thawed comes later by the time that it was frozen.
            let frozen = if ["ppoll", "select"].contains(&id) { 1500 } else { 0 };
            let wall = took(&node, &agent).0;
            assert_in_time(id, wall.saturating_sub(frozen).max(14_000.min(wall)), 14_000);
            woken_by_timer(&node, id);
            agent.delete().unwrap();
        },
    );
}

#[test]
fn whoever_waits_in_memory_that_comes_after_the_wake_waits_for_what_is_left() {
    let node = start_with("timer_horizon_seconds = 60\n");
    let in_thread = |wait: &str| {
        format!(
            "import hashlib\nballast = os.urandom(48 << 20); sum = hashlib.sha1(ballast).digest()\n\
                 def wait(): {wait}\nbegun, monotonic = time.time(), time.monotonic()\n\
                 t = threading.Thread(target=wait); t.start(); print('waits', flush=True); t.join()\n\
                 assert hashlib.sha1(ballast).digest() == sum"
        )
    };
    each(&of(&["told", "select"]), |id, wait| {
        let agent = run_ready(&node, &waiting(id, &in_thread(wait), 9));
        says(&node, &agent, "waits");
        for _ in 0..2 {
            sleep(&node, id);
            thread::sleep(Duration::from_secs(2));
            wake(&node, id);
        }
        let log = node.containerd_log();
        assert!(log.contains("all memory is there"), "it was not lazy");
        assert_in_time(id, took(&node, &agent).0, 9000);
        agent.delete().unwrap();
    });
}

#[test]
fn a_wake_that_fails_is_tried_again_and_no_time_counts_twice() {
    let node = start_with("timer_horizon_seconds = 2\n");
    each(&of(&["told", "timerfd"]), |id, wait| {
        let agent = run_ready(&node, &waiting(id, wait, 9));
        sleep(&node, id);
        let image = on_node(&node, inspect(&node, id)["image_dir"].as_str().unwrap()).join("img");
        let (here, away) = (image.join("fs-1.img"), image.join("../fs-1.away"));
        std::fs::rename(&here, &away).unwrap();
        assert_refused(&agentcube(&node, &["wake", id]), &["fs-1.img"]);
        assert!(is_asleep(&node, id));
        std::fs::rename(&away, &here).unwrap();
        // Longer than a failed wake is left alone, and not yet due.
        wake(&node, id);
        sleep(&node, id);
        let image = on_node(&node, inspect(&node, id)["image_dir"].as_str().unwrap()).join("img");
        let (here, away) = (image.join("fs-1.img"), image.join("../fs-1.away"));
        std::fs::rename(&here, &away).unwrap();
        node.wait_until("its timer to be due", SOON, || {
            Ok(inspect(&node, id)["last_error"].as_str().is_some_and(|error| error.contains("fs-1.img")))
        })
        .unwrap();
        thread::sleep(Duration::from_secs(3));
        assert!(is_asleep(&node, id));
        let tries = node.containerd_log().matches("a sleeping agent is needed").count();
        assert!(tries <= 2, "{tries} tries of two agents in three seconds");
        std::fs::rename(&away, &here).unwrap();
        // Tried again ten seconds after the first time.
        let wall = took(&node, &agent).0;
        assert_in_time(id, wall, 19_000);
        woken_by_timer(&node, id);
        agent.delete().unwrap();
    });
}

/// Works for 50 ms whenever its child says so, each 200 ms, and waits in between until a moment five seconds after the last.
const BURSTS: &str = r"
import os, select, time
tick, say = os.pipe()
if os.fork() == 0:
    while True:
        time.sleep(0.2)
        os.write(say, b'.')
epoll = select.epoll()
epoll.register(tick, select.EPOLLIN)
due = time.monotonic() + 5
print('ready', flush=True)
while True:
    if epoll.poll(max(due - time.monotonic(), 0)):
        os.read(tick, 4096)
        begun = time.monotonic()
        while time.monotonic() < begun + 0.05:
            pass
        if time.monotonic() > begun + 0.08:
            os.write(1, b'slow\n')
    if time.monotonic() >= due:
        due = time.monotonic() + 5
        os.write(1, b'due\n')
";

#[test]
fn an_agent_that_works_in_bursts_is_woken_for_the_timer_that_it_waits_for_in_between() {
    let node = start_with("timer_horizon_seconds = 1\n");
    let agent = run_ready(&node, &python("bursts").args(&["python3", "-u", "-c", BURSTS]));
    let told = |word: &str| agent.log().unwrap().matches(word).count();
    let comes = |before: usize| {
        node.wait_until("the timer to come", SOON, || Ok(told("due") > before)).unwrap();
    };
    // On a machine that is busy it may be at work all the time that it is given, or be asleep too late: that does not count.
    let (mut woken, mut tries) = (0, 0);
    while woken < 5 && tries < 12 {
        tries += 1;
        comes(told("due"));
        // Wherever it is in its burst.
        thread::sleep(Duration::from_millis(40 * tries));
        let (before, slow, begun) = (told("due"), told("slow"), Instant::now());
        sleep(&node, "bursts");
        let late = begun.elapsed() > Duration::from_secs(2);
        let awake = || Ok(inspect(&node, "bursts")["state"] == "running");
        if node.wait_until("the timer to wake it", Duration::from_secs(10), awake).is_ok() {
            assert_eq!(inspect(&node, "bursts")["last_wake"]["cause"], "timer");
            woken += 1;
        } else {
            wake(&node, "bursts");
            assert!(late || told("slow") > slow, "it waited, and was not woken: {}", node.containerd_log());
        }
        comes(before);
    }
    assert!(woken > 0, "the machine is too busy for this");
}

#[test]
fn an_agent_that_polls_is_left_asleep_unless_each_timer_is_to_wake_it() {
    let node = start_with("");
    let ticking = |id: &str, every: &str, policy: &str| {
        let text = format!("import time\nprint('ready', flush=True)\nwhile True: time.sleep({every})");
        run_ready(
            &node,
            &python(id).annotation("agentcube.volcano.sh/timers", policy).args(&["python3", "-c", &text]),
        )
    };
    let auto = ticking("auto", "1", "auto");
    let resume = ticking("resume", "1", "resume");
    let quick = ticking("quick", "0.5", "wake");
    let slow = ticking("slow", "3", "wake");
    sleep(&node, "auto");
    sleep(&node, "resume");
    let due = |id: &str| agentcube(&node, &["why", id]).stdout;
    assert_refused(
        &agentcube(&node, &["sleep", "--depth", "checkpointed", "quick"]),
        &["a timer of it is due in 0.", "each is to wake it"],
    );
    assert!(!is_asleep(&node, "quick"));
    let told = due("quick");
    assert!(told.contains("a timer of it is due"), "{told}");
    // It may be refused just before a tick.
    node.wait_until("slow to sleep", SOON, || {
        Ok(agentcube(&node, &["sleep", "--depth", "checkpointed", "slow"]).status == 0)
    })
    .unwrap();
    woken_by_timer(&node, "slow");
    thread::sleep(Duration::from_secs(2));
    assert!(is_asleep(&node, "auto") && is_asleep(&node, "resume"));
    for agent in [auto, resume, quick, slow] {
        agent.delete().unwrap();
    }
}

#[test]
fn timers_that_are_to_resume_go_on_with_what_remained() {
    let node = start_with("timers = \"resume\"\n");
    each(&of(&["sleep", "told", "select", "asyncio", "timerfd", "alarm", "posix"]), |id, wait| {
        let agent = run_ready(&node, &waiting(id, wait, 4));
        sleep(&node, id);
        thread::sleep(Duration::from_secs(6));
        assert!(is_asleep(&node, id), "{id} was woken");
        wake(&node, id);
        let (wall, monotonic) = took(&node, &agent);
        assert!(wall > 9000 && (3900..4000 + LATE).contains(&monotonic), "{id}: {wall} and {monotonic} ms");
        agent.delete().unwrap();
    });
}

#[test]
fn a_timer_comes_in_time_though_containerd_is_restarted() {
    let node = start_with("timer_horizon_seconds = 2\n");
    let agent = run_ready(&node, &waiting("a", "time.sleep(12)", 12));
    let told: Value =
        serde_json::from_str(&agentcube(&node, &["why", "--json", "a"]).check().unwrap()).unwrap();
    let next = told["results"][0]["ok"]["why"]["next_timer_us"].as_u64().unwrap();
    assert!((2_000_000..=12_000_000).contains(&next), "{told:#}");
    sleep(&node, "a");
    node.restart_containerd().unwrap();
    assert!(is_asleep(&node, "a"));
    assert_in_time("a", took(&node, &agent).0, 12_000);
    woken_by_timer(&node, "a");
}

#[test]
fn a_shell_that_sleeps_again_and_again_is_woken_for_each() {
    let node = start_with("timer_horizon_seconds = 2\n");
    let script = "echo ready; while sleep 5; do n=$((n + 1)); echo tick $n; done";
    let agent = run_ready(&node, &spec(Image::Counter, "sh").args(&["sh", "-c", script]));
    let since = Instant::now();
    for tick in 1..=3 {
        sleep(&node, "sh");
        says(&node, &agent, &format!("tick {tick}"));
        woken_by_timer(&node, "sh");
    }
    let took = since.elapsed();
    assert!(took >= Duration::from_millis(14_500) && took < Duration::from_secs(25), "{took:?}");
    assert_eq!(inspect(&node, "sh")["wakes"], 3);
}
