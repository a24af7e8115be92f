//! Frozen agents wake for whatever would have made them run, and for nothing else; nothing breaks on the way.

#![allow(clippy::unwrap_used)]

mod sleeper;

use std::{
    fs,
    io::{Read, Write},
    net::{TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use agentcube_tests::{
    images::Image,
    memory,
    node::{self, Agent, AgentSpec, Net, Node},
};
use serde_json::Value;
use sleeper::{SOON, agentcube, assert_refused, inspect, python, run_ready, says, spec, start};

/// Long enough for an agent to wake that wakes for nothing.
const QUIET: Duration = Duration::from_millis(600);

/// A python program in a container with a network of its own.
fn program(id: &str, text: &str) -> AgentSpec {
    python(id).args(&["python3", "-u", "-c", text])
}

fn freeze(node: &Node, agent: &Agent) {
    agentcube(node, &["sleep", "--depth", "frozen", agent.id()]).check().unwrap();
}

fn is_asleep(node: &Node, agent: &Agent) -> bool {
    inspect(node, agent.id())["state"] == "asleep"
}

/// Puts it to sleep and sees to it that it stays so.
fn freezes_for_good(node: &Node, agent: &Agent) {
    freeze(node, agent);
    thread::sleep(QUIET);
    let now = inspect(node, agent.id());
    assert_eq!((&now["state"], &now["depth"]), (&"asleep".into(), &"frozen".into()), "{now:#}");
}

fn last_wake(node: &Node, agent: &Agent) -> Value {
    inspect(node, agent.id())["last_wake"].take()
}

/// Sees to it that it is awake, and woke for this.
fn woke_for(node: &Node, agent: &Agent, cause: &str) {
    node.wait_until(&format!("{} to wake", agent.id()), SOON, || Ok(!is_asleep(node, agent))).unwrap();
    let wake = last_wake(node, agent);
    assert_eq!(wake["cause"], cause, "{wake}");
}

/// One request over a connection that stays open; gives back the answer's body.
fn ask(connection: &mut TcpStream, path: &str) -> String {
    node::ask(connection, "GET", path, "").unwrap().body
}

#[test]
fn event_loops_sleep_through_silence_and_wake_for_requests_on_new_and_on_open_connections() {
    let node = start();
    let agent = node.run_agent(&python("asyncio")).unwrap();
    agent.wait_healthy().unwrap();
    let mut open = agent.connect().unwrap();
    assert_eq!(ask(&mut open, "/health"), "ok");
    for _ in 0..3 {
        freezes_for_good(&node, &agent);
        assert_eq!(agent.turn().unwrap(), 0);
        woke_for(&node, &agent, "traffic");
        freeze(&node, &agent);
        assert_eq!(ask(&mut open, "/health"), "ok");
        woke_for(&node, &agent, "traffic");
    }
    assert_eq!(inspect(&node, "asyncio")["wakes"], 6, "it woke for nothing");
}

#[test]
fn a_node_agent_wakes_for_requests_and_for_the_timers_of_its_server() {
    let node = start();
    let agent = node.run_agent(&spec(Image::NodeJs, "nodejs").flag("--seccomp")).unwrap();
    agent.wait_healthy().unwrap();
    // Its server has timers of a second and less after each answer. It sleeps once they are over.
    let quiet = || {
        freeze(&node, &agent);
        thread::sleep(QUIET);
        Ok(is_asleep(&node, &agent))
    };
    for _ in 0..3 {
        node.wait_until("nodejs to be done with its timers", SOON, quiet).unwrap();
        let mut open = agent.connect().unwrap();
        assert_eq!(ask(&mut open, "/health"), "ok");
        woke_for(&node, &agent, "traffic");
        freeze(&node, &agent);
        assert_eq!(ask(&mut open, "/turn"), "{\"turn\":0}");
    }
}

#[test]
fn a_wake_from_frozen_costs_a_client_a_few_milliseconds() {
    let node = start();
    let agent = node.run_agent(&python("a")).unwrap();
    agent.wait_healthy().unwrap();
    let mut open = agent.connect().unwrap();
    let mut timed = |frozen: bool| {
        (0..15)
            .map(|_| {
                if frozen {
                    freeze(&node, &agent);
                }
                let asked = Instant::now();
                assert_eq!(ask(&mut open, "/health"), "ok");
                asked.elapsed()
            })
            .min()
            .unwrap()
    };
    let (awake, asleep) = (timed(false), timed(true));
    println!("first byte: awake {awake:?}, from frozen {asleep:?}");
    assert!(asleep < Duration::from_millis(20), "awake {awake:?}, from frozen {asleep:?}");
}

#[test]
fn a_thread_that_blocks_in_accept_or_in_poll_or_in_recv_wakes_for_its_clients() {
    const ACCEPT: &str = "
import socket, os
s = socket.create_server(('0.0.0.0', 8080))
print('ready')
while True:
    c, _ = s.accept()
    c.recv(1000)
    c.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\nok')
    c.close()
";
    const THREADED: &str = "
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        self.send_response(200)
        self.send_header('Content-Length', '2')
        self.end_headers()
        self.wfile.write(b'ok')
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(('0.0.0.0', 8080), Handler)
print('ready')
server.serve_forever(poll_interval=None)
";
    let node = start();
    let accept = run_ready(&node, &program("accept", ACCEPT));
    for _ in 0..3 {
        freezes_for_good(&node, &accept);
        assert_eq!(accept.http("GET", "/", "").unwrap().body, "ok");
        woke_for(&node, &accept, "traffic");
    }
    let threaded = run_ready(&node, &program("threaded", THREADED));
    let mut open = threaded.connect().unwrap();
    assert_eq!(ask(&mut open, "/"), "ok");
    for _ in 0..3 {
        freezes_for_good(&node, &threaded);
        assert_eq!(ask(&mut open, "/"), "ok", "by the thread in recv");
        woke_for(&node, &threaded, "traffic");
        freeze(&node, &threaded);
        assert_eq!(threaded.http("GET", "/", "").unwrap().body, "ok", "by the thread in poll");
        woke_for(&node, &threaded, "traffic");
    }
}

#[test]
fn timers_wake_an_agent_in_time_however_it_waits_for_them() {
    let node = start();
    let after = |id: &str, wait: &str| {
        let text = format!(
            "import time, select, asyncio, threading, ctypes, signal, os\n\
             begun = time.monotonic()\nprint('ready')\n{wait}\n\
             print('over', int((time.monotonic() - begun) * 1000), flush=True)\ntime.sleep(1000)"
        );
        (id.to_owned(), text)
    };
    let waits = [
        after("absolute", "time.sleep(4)"),
        after("relative", "ctypes.CDLL(None).usleep(4000000)"),
        after("poll", "select.poll().poll(4000)"),
        after("epoll", "select.epoll().poll(4)"),
        after("asyncio", "asyncio.run(asyncio.sleep(4))"),
        after("lock", "threading.Event().wait(4)"),
        after(
            "timerfd",
            "f = os.timerfd_create(time.CLOCK_MONOTONIC); os.timerfd_settime(f, initial=4); os.read(f, 8)",
        ),
        after("alarm", "signal.signal(signal.SIGALRM, lambda *_: None); signal.alarm(4); signal.pause()"),
    ];
    for (id, text) in waits {
        let agent = run_ready(&node, &program(&id, &text));
        // Twice: a wait that was interrupted once goes on under another number.
        freeze(&node, &agent);
        agentcube(&node, &["wake", &id]).check().unwrap();
        thread::sleep(Duration::from_millis(200));
        freeze(&node, &agent);
        thread::sleep(QUIET);
        assert!(is_asleep(&node, &agent), "{id} did not sleep until its time");
        says(&node, &agent, "over");
        let log = agent.log().unwrap();
        let took: u64 = log.split("over").nth(1).unwrap().trim().parse().unwrap();
        let cause = last_wake(&node, &agent)["cause"].as_str().unwrap().to_owned();
        println!("{id}: {took} ms, {cause}");
        assert!((4000..5600).contains(&took), "{id}: after {took} ms");
        let expected = match id.as_str() {
            "alarm" => "signal",
            "timerfd" => "traffic",
            _ => "timer",
        };
        assert_eq!(cause, expected, "{id}");
        agent.delete().unwrap();
    }
}

#[test]
fn a_time_limit_that_the_kernel_begins_anew_is_served_once_it_has_come() {
    let node = start();
    let text = "import select\nprint('ready')\nselect.select([], [], [], 5)\nprint('over')\nselect.select([], [], [])";
    let agent = run_ready(&node, &program("select", text));
    freeze(&node, &agent);
    woke_for(&node, &agent, "timer");
    // The time that it stood still does not count for the kernel. It is not kept from its timer for ever.
    assert_refused(
        &agentcube(&node, &["sleep", "--depth", "frozen", "select"]),
        &["a time that it waits for has come"],
    );
    says(&node, &agent, "over");
    freezes_for_good(&node, &agent);
}

#[test]
fn pipes_files_and_children_wake_an_agent_and_unread_input_does_not() {
    let node = start();
    // Both ends of the pipe are the agent's own: it is written to from outside by way of /proc.
    let reader = run_ready(
        &node,
        &program(
            "pipe",
            "
import os
r, w = os.pipe()
unread, unread_w = os.pipe()
os.write(unread_w, b'nobody reads this')
print('ready')
print('got', os.read(r, 10))
os.read(r, 10)
",
        ),
    );
    freezes_for_good(&node, &reader);
    let pid = inspect(&node, "pipe")["pid"].as_u64().unwrap();
    node.sh(&format!("printf hello > /proc/{pid}/fd/4")).unwrap();
    says(&node, &reader, "got b'hello'");
    woke_for(&node, &reader, "traffic");

    let watcher = run_ready(
        &node,
        &program(
            "inotify",
            "
import ctypes, os
libc = ctypes.CDLL(None)
os.makedirs('/tmp/watched', exist_ok=True)
fd = libc.inotify_init()
libc.inotify_add_watch(fd, b'/tmp/watched', 0x100)
print('ready')
os.read(fd, 1000)
print('changed')
os.read(fd, 1000)
",
        ),
    );
    freezes_for_good(&node, &watcher);
    let pid = inspect(&node, "inotify")["pid"].as_u64().unwrap();
    node.sh(&format!("touch /proc/{pid}/root/tmp/watched/new")).unwrap();
    says(&node, &watcher, "changed");
    woke_for(&node, &watcher, "traffic");

    let parent = run_ready(
        &node,
        &program(
            "child",
            "
import subprocess, sys
child = subprocess.Popen(['/bin/sh', '-c', 'read line; echo \"child $line\"; read more'],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
print('ready', child.pid)
print(child.stdout.readline())
child.wait()
",
        ),
    );
    freezes_for_good(&node, &parent);
    let pid = node.sh("pgrep -n -f '[r]ead line; echo'").unwrap();
    node.sh(&format!("echo hello > /proc/{}/fd/0", pid.trim())).unwrap();
    says(&node, &parent, "child hello");
    woke_for(&node, &parent, "traffic");
}

#[test]
fn an_eventfd_wakes_who_reads_it_when_somebody_outside_of_the_container_writes_to_it() {
    let node = start();
    let text = "
import os
event = os.eventfd(0)
assert event == 3
os.eventfd_write(event, 5)
kept = os.eventfd_read(event)
print('ready')
while True:
    print('got', os.eventfd_read(event), 'kept', kept)
";
    let agent = run_ready(&node, &program("event", text));
    // Numbers of system calls: pidfd_open, pidfd_getfd.
    let write = |number: u64| {
        let pid = inspect(&node, "event")["pid"].as_u64().unwrap();
        let text = format!(
            "import ctypes, os; call = ctypes.CDLL(None).syscall; \
             event = call(438, call(434, {pid}, 0), 3, 0); assert event >= 0; os.eventfd_write(event, {number})"
        );
        node.exec(&["python3", "-c", &text]).unwrap().check().unwrap();
    };
    for number in [7, 1 << 40] {
        freezes_for_good(&node, &agent);
        write(number);
        says(&node, &agent, &format!("got {number} kept 5"));
        woke_for(&node, &agent, "traffic");
    }
    agentcube(&node, &["sleep", "--depth", "checkpointed", "event"]).check().unwrap();
    agentcube(&node, &["wake", "event"]).check().unwrap();
    freezes_for_good(&node, &agent);
    write(9);
    says(&node, &agent, "got 9 kept 5");
    assert_eq!(inspect(&node, "event")["wakes"], 4);
}

#[test]
fn signals_wake_an_agent_whichever_thread_waits_for_them_and_however() {
    let node = start();
    let waits = [
        ("sigwait", "signal.pthread_sigmask(signal.SIG_BLOCK, {10})", "signal.sigwait({10})"),
        (
            "worker",
            "signal.pthread_sigmask(signal.SIG_BLOCK, {10})\n\
             threading.Thread(target=lambda: (signal.sigwait({10}), print('served'))).start()",
            "signal.pthread_sigmask(signal.SIG_BLOCK, {12}); time.sleep(1000)",
        ),
        ("handler", "signal.signal(10, lambda *_: print('served'))", "signal.pause()"),
    ];
    for (id, prepare, wait) in waits {
        let text = format!(
            "import signal, threading, time\n{prepare}\nprint('ready')\n{wait}\nprint('served')\n{wait}"
        );
        let agent = run_ready(&node, &program(id, &text));
        thread::sleep(Duration::from_millis(200));
        freezes_for_good(&node, &agent);
        let pid = inspect(&node, id)["pid"].as_u64().unwrap();
        node.sh(&format!("kill -USR1 {pid}")).unwrap();
        woke_for(&node, &agent, "signal");
        says(&node, &agent, "served");
        agent.delete().unwrap();
    }

    // To one thread only: not to its main thread.
    let text = "import signal, threading, time
signal.pthread_sigmask(signal.SIG_BLOCK, {10})
def serve():
    print('ready', threading.get_native_id())
    signal.sigwait({10})
    print('served')
    time.sleep(1000)
threading.Thread(target=serve).start()
time.sleep(1000)";
    let agent = run_ready(&node, &program("directed", text));
    thread::sleep(Duration::from_millis(200));
    freezes_for_good(&node, &agent);
    let pid = inspect(&node, "directed")["pid"].as_u64().unwrap();
    let send = format!(
        "import ctypes, os; pid = {pid}; \
         worker = max(int(tid) for tid in os.listdir(f'/proc/{{pid}}/task')); \
         assert ctypes.CDLL(None).tgkill(pid, worker, 10) == 0"
    );
    node.sh(&format!("python3 -c \"{send}\"")).unwrap();
    woke_for(&node, &agent, "signal");
    says(&node, &agent, "served");
}

#[test]
fn an_agent_that_waits_for_what_cannot_be_seen_does_not_sleep_frozen() {
    let node = start();
    let signalfd = "
import ctypes, os, select, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {10})
fd = ctypes.CDLL(None).signalfd(-1, (ctypes.c_ulong * 16)(1 << 9), 0)
";
    let waits = [
        ("read", format!("{signalfd}print('ready')\nos.read(fd, 128)"), "signalfd"),
        (
            "epoll",
            format!("{signalfd}e = select.epoll()\ne.register(fd, 1)\nprint('ready')\ne.poll()"),
            "signalfd",
        ),
        (
            "headless",
            "
import ctypes, os, threading
r, w = os.pipe()
threading.Thread(target=lambda: os.read(r, 1)).start()
print('ready')
ctypes.CDLL(None).syscall(60, 0)
"
            .to_owned(),
            "the main thread of its process has ended",
        ),
    ];
    for (id, text, why) in waits {
        let agent = run_ready(&node, &program(id, &text));
        thread::sleep(Duration::from_millis(200));
        assert_refused(&agentcube(&node, &["sleep", "--depth", "frozen", id]), &[why]);
        assert!(!is_asleep(&node, &agent));
        agent.kill("KILL").unwrap();
    }
}

#[test]
fn a_time_limit_of_a_socket_wakes_who_waits_on_it() {
    let node = start();
    let text = "
import socket, struct
a, b = socket.socketpair()
a.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack('ll', 3, 0))
print('ready')
try: a.recv(1)
except BlockingIOError: print('over')
a.recv(1)
";
    let agent = run_ready(&node, &program("limit", text));
    thread::sleep(Duration::from_millis(200));
    freeze(&node, &agent);
    thread::sleep(QUIET);
    assert!(is_asleep(&node, &agent));
    woke_for(&node, &agent, "timer");
}

#[test]
fn an_agent_that_is_at_work_is_not_put_to_sleep() {
    let node = start();
    let busy = run_ready(&node, &program("busy", "print('ready')\nwhile True: pass"));
    let refused = agentcube(&node, &["sleep", "--depth", "frozen", "busy"]);
    assert_refused(&refused, &["at work", "python3"]);
    assert!(!is_asleep(&node, &busy));
}

/// Sends a datagram to somebody else about so often until it is told to stop.
fn chatter(pause: Duration, stop: &AtomicBool) -> usize {
    let [from, to] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        from.send_to(b"not for you", to.local_addr().unwrap()).unwrap();
        to.recv(&mut [0; 16]).unwrap();
        sent += 1;
        thread::sleep(pause);
    }
    sent
}

#[test]
fn packets_for_others_on_its_network_neither_keep_an_agent_awake_nor_wake_it() {
    // It takes what it waits for with the very call in which it waits.
    const ACCEPT: &str = "
import socket
s = socket.create_server(('0.0.0.0', 8080))
print('ready')
while True:
    c, _ = s.accept()
    c.sendall(b'hello')
    c.close()
";
    let node = start();
    let agent = run_ready(&node, &program("a", ACCEPT).net(Net::Host));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let others = scope.spawn(|| node.inside(|| chatter(Duration::from_millis(4), &stop)).unwrap());
        for _ in 0..10 {
            let frozen = || Ok(agentcube(&node, &["sleep", "--depth", "frozen", "a"]).status == 0);
            node.wait_until("it to sleep", SOON, frozen).unwrap();
            thread::sleep(QUIET);
            assert!(is_asleep(&node, &agent), "{}", last_wake(&node, &agent));
            let mut greeting = String::new();
            agent.connect().unwrap().read_to_string(&mut greeting).unwrap();
            assert_eq!(greeting, "hello");
        }
        stop.store(true, Ordering::Relaxed);
        assert!(others.join().unwrap() > 200);
    });
    woke_for(&node, &agent, "traffic");
}

#[test]
fn nothing_wakes_an_agent_that_a_client_has_paused() {
    let node = start();
    let agent = node.run_agent(&python("a")).unwrap();
    agent.wait_healthy().unwrap();
    freeze(&node, &agent);
    agent.ctr(&["task", "pause", "a"]).unwrap().check().unwrap();
    let mut connection = agent.connect().unwrap();
    connection.write_all(b"GET /turn HTTP/1.1\r\n\r\n").unwrap();
    thread::sleep(QUIET);
    assert_eq!(inspect(&node, "a")["state"], "paused");
    agent.ctr(&["task", "resume", "a"]).unwrap().check().unwrap();
    assert_eq!(agent.turn().unwrap(), 0);
}

#[test]
fn without_swap_it_says_so_and_sleeps_frozen_if_that_will_do() {
    let node = start();
    let agent = node.run_agent(&python("a")).unwrap();
    agent.wait_healthy().unwrap();
    if node.read_file("/proc/swaps").unwrap().lines().count() > 1 {
        return agentcube_tests::skipped("this machine has swap");
    }
    assert_refused(
        &agentcube(&node, &["sleep", "--depth", "reclaimed", "a"]),
        &["nothing to reclaim to", "swap"],
    );
    assert!(!is_asleep(&node, &agent));
    let slept = agentcube(&node, &["sleep", "--depth", "reclaimed", "--or-shallower", "a"]).check().unwrap();
    assert!(slept.contains("asleep (frozen)") && slept.contains("not reclaimed:"), "{slept}");
    assert_eq!(inspect(&node, "a")["depth"], "frozen");
    // Deeper works from there, without a wake.
    agentcube(&node, &["sleep", "--or-shallower", "a"]).check().unwrap();
    let now = inspect(&node, "a");
    assert_eq!((&now["depth"], &now["wakes"]), (&"checkpointed".into(), &0.into()), "{now:#}");
}

/// Clients that ask one after the other over connections of their own, each for something of its own, about so often.
fn storm(agent: &Agent, clients: u64, pause: Duration, stop: &AtomicBool) -> u64 {
    thread::scope(|scope| {
        let client = |number: u64| {
            let mut asked = 0;
            while !stop.load(Ordering::Relaxed) {
                let text = format!("client {number}, question {asked}");
                let turn = agent.chat(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
                assert!(turn.reply.contains(&text), "{text}: answered {:?}", turn.reply);
                asked += 1;
                thread::sleep(pause + Duration::from_millis(number * 7 + asked * 13 % 40));
            }
            asked
        };
        let running: Vec<_> = (0..clients).map(|number| scope.spawn(move || client(number))).collect();
        running.into_iter().map(|client| client.join().unwrap()).sum()
    })
}

/// Puts an agent to sleep again and again in a storm; all that is asked is answered, and nothing is forgotten.
fn sleeps_in_a_storm(depth: &str, sleeps: u64, clients: u64, pause: Duration) {
    let node = start();
    let agent = node.run_agent(&python("a")).unwrap();
    agent.wait_healthy().unwrap();
    let stop = AtomicBool::new(false);
    let (asked, slept, tried) = thread::scope(|scope| {
        let clients = scope.spawn(|| storm(&agent, clients, pause, &stop));
        let begun = Instant::now();
        let (mut slept, mut tried) = (0, 0);
        while slept < sleeps && begun.elapsed() < 10 * SOON {
            // Refused while it is at work, and given up when somebody comes in its middle.
            slept += u64::from(agentcube(&node, &["sleep", "--depth", depth, "a"]).status == 0);
            tried += 1;
        }
        stop.store(true, Ordering::Relaxed);
        (clients.join().unwrap(), slept, tried)
    });
    let wakes = inspect(&node, "a")["wakes"].as_u64().unwrap();
    println!("{asked} questions in {slept} sleeps of {tried}, {wakes} wakes");
    assert!(asked >= 2 * sleeps && slept == sleeps, "{asked} questions in {slept} sleeps");
    assert_eq!(agent.turn().unwrap(), asked);
}

#[test]
fn requests_in_the_middle_of_freezes_and_wakes_are_all_answered() {
    sleeps_in_a_storm("frozen", 50, 8, Duration::from_millis(20));
}

#[test]
fn requests_in_the_middle_of_dumps_and_restores_are_all_answered() {
    sleeps_in_a_storm("checkpointed", 30, 2, Duration::from_millis(120));
}

#[test]
fn two_hundred_connections_in_fifty_sleeps_are_neither_refused_nor_reset() {
    let node = start();
    let agent = node.run_agent(&python("a")).unwrap();
    agent.wait_healthy().unwrap();
    for round in 0..50 {
        // It is at work while the connections of the round before are closed.
        let freeze = || Ok(agentcube(&node, &["sleep", "--depth", "frozen", "a"]).status == 0);
        node.wait_until("it to have nothing to do", SOON, freeze).unwrap();
        let mut open: Vec<TcpStream> = (0..200).map(|_| agent.connect().unwrap()).collect();
        for (number, connection) in open.iter_mut().enumerate() {
            let path = if number % 2 == 0 { "/health" } else { "/turn" };
            let expected = if number % 2 == 0 { "ok" } else { "{\"turn\": 0}" };
            assert_eq!(ask(connection, path), expected, "connection {number} in round {round}");
        }
    }
    assert_eq!(inspect(&node, "a")["wakes"], 50);
}

#[test]
fn the_shim_holds_no_descriptor_more_after_a_hundred_sleeps_nor_for_ten_thousand_of_the_agent() {
    let node = start();
    // A process may have 1024 open here, so there are several.
    let many = "
import asyncio, os, socket
for _ in range(10):
    if os.fork() == 0: break
async def main():
    loop = asyncio.get_running_loop()
    for _ in range(480):
        for end in socket.socketpair():
            loop.add_reader(end.detach(), print)
    server = await asyncio.start_server(lambda r, w: w.close(), '0.0.0.0', 8080, reuse_port=True)
    print('ready')
    await server.serve_forever()
asyncio.run(main())
";
    let agent = node.run_agent(&program("many", many)).unwrap();
    node.wait_until("all to be ready", SOON, || Ok(agent.log()?.lines().count() == 11)).unwrap();
    let processes = memory::processes(&node.cgroup("/default/many")).unwrap();
    let open = |pid: &u32| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let open: usize = processes.iter().map(open).sum();
    assert!(open > 10_000, "{open} descriptors in {} processes", processes.len());
    let shim = inspect(&node, "many")["shim_pid"].as_u64().unwrap();
    let held = || node.sh(&format!("ls /proc/{shim}/fd | wc -l")).unwrap().trim().parse::<u64>().unwrap();
    freeze(&node, &agent);
    agentcube(&node, &["wake", "many"]).check().unwrap();
    let before = held();
    let mut least = u64::MAX;
    for _ in 0..100 {
        freeze(&node, &agent);
        assert!(held() < before + 40, "{} duplicates for eleven epolls", held() - before);
        let total = inspect(&node, "many")["last_sleep"]["total_us"].as_u64().unwrap();
        least = least.min(total);
        agentcube(&node, &["wake", "many"]).check().unwrap();
    }
    println!("{open} descriptors: asleep in {least} us");
    assert_eq!(held(), before);
    assert!(least < 200_000, "it took {least} us");
}

#[test]
fn what_cannot_be_checkpointed_sleeps_frozen_and_says_why() {
    let node = start();
    let ring = "
import ctypes, os, socket
libc = ctypes.CDLL(None)
params = (ctypes.c_char * 120)()
ring = libc.syscall(425, 8, params)
print('ready' if ring >= 0 else 'none')
s = socket.create_server(('0.0.0.0', 8080))
while True:
    c, _ = s.accept()
    c.recv(1000)
    c.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\nok')
    c.close()
";
    let user = node.run_agent(&program("ring", ring)).unwrap();
    node.wait_until("it to speak", SOON, || Ok(!user.log()?.is_empty())).unwrap();
    if user.log().unwrap().contains("none") {
        return agentcube_tests::skipped("this machine has no io_uring");
    }
    let slept = agentcube(&node, &["sleep", "--or-shallower", "ring"]).check().unwrap();
    assert!(slept.contains("asleep (frozen)") && slept.contains("io_uring"), "{slept}");
    assert_eq!(user.http("GET", "/", "").unwrap().body, "ok");
    woke_for(&node, &user, "traffic");
}

#[test]
fn an_agent_under_a_debugger_sleeps_frozen_and_is_still_under_it_after_the_wake() {
    let node = start();
    let debugged = "
import ctypes, os, time, signal
libc = ctypes.CDLL(None, use_errno=True)
child = os.fork()
if child == 0:
    while True: time.sleep(100)
time.sleep(0.5)
PTRACE_SEIZE = 0x4206
assert libc.ptrace(PTRACE_SEIZE, child, None, None) == 0, os.strerror(ctypes.get_errno())
print('ready')
os.waitpid(child, 0)
print('told')
time.sleep(1000)
";
    let agent = run_ready(&node, &program("debugged", debugged));
    assert_refused(&agentcube(&node, &["sleep", "debugged"]), &["debugger"]);
    freezes_for_good(&node, &agent);
    agentcube(&node, &["wake", "debugged"]).check().unwrap();
    let child = node.sh("grep -l '^TracerPid:.[1-9]' /proc/[0-9]*/status").unwrap();
    assert_eq!(child.lines().count(), 1, "{child}");
    let child = child.trim().trim_start_matches("/proc/").trim_end_matches("/status").to_owned();
    freezes_for_good(&node, &agent);
    node.sh(&format!("kill -TERM {child}")).unwrap();
    woke_for(&node, &agent, "signal");
    says(&node, &agent, "told");
}
