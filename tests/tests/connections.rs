//! What keeps an agent from being checkpointed, and what becomes of its connections when it is.

#![allow(clippy::unwrap_used)]

mod cycle;

use std::fs;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use agentcube_tests::images::Image;
use agentcube_tests::node::{Agent, AgentSpec, Net, Node, NodeOptions};
use cycle::{SOON, agent, agentcube, assert_asleep, host_pids, inspect, sleep, sleep_in_place, start, wakes};
use serde_json::Value;

const PORT: u16 = 8400;

/// A server that speaks first and answers line by line, in a network of its own.
fn talker(id: &str) -> AgentSpec {
    let code = include_str!("../agents/doors.py");
    agent(Image::Python, id).net(Net::Pod).port(PORT).args(&["python3", "-c", code, "blocking"])
}

fn run<'node>(node: &'node Node, spec: &AgentSpec) -> Agent<'node> {
    let agent = node.run_agent(spec).unwrap();
    node.wait_until("the server to listen", SOON, || Ok(agent.log()?.contains("ready"))).unwrap();
    agent
}

/// A connection that the server has accepted.
fn greeted(agent: &Agent) -> BufReader<TcpStream> {
    greeted_by(agent.connect().unwrap(), "blocking")
}

fn greeted_by(stream: TcpStream, name: &str) -> BufReader<TcpStream> {
    stream.set_read_timeout(Some(SOON)).unwrap();
    let mut lines = BufReader::new(stream);
    let mut greeting = String::new();
    lines.read_line(&mut greeting).unwrap();
    assert_eq!(greeting, format!("220 {name}\n"));
    lines
}

fn says(lines: &mut BufReader<TcpStream>, text: &str) {
    answers(lines, "blocking", text);
}

/// Says something to a server of this name, which answers.
fn answers(lines: &mut BufReader<TcpStream>, name: &str, text: &str) {
    lines.get_mut().write_all(format!("{text}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    lines.read_line(&mut answer).unwrap();
    assert_eq!(answer, format!("{name}: {text}\n"));
}

fn why(node: &Node, agent: &Agent) -> Value {
    agentcube(node, agent, &["why"]).unwrap()["why"].take()
}

fn kinds(why: &Value) -> Vec<&str> {
    why["reasons"].as_array().unwrap().iter().map(|reason| reason["kind"].as_str().unwrap()).collect()
}

#[test]
fn an_idle_connection_is_closed_by_a_checkpoint_and_a_busy_one_keeps_the_agent_awake() {
    let mut options = NodeOptions::default();
    options.shim_toml.push_str("\nconnection_idle_seconds = 3\n");
    let node = Node::start(options).unwrap();
    let agent = run(&node, &talker("a"));
    let mut busy = greeted(&agent);
    let mut idle = greeted(&agent);
    let told = why(&node, &agent);
    assert_eq!(kinds(&told), ["connection", "connection"]);
    assert_eq!(told["deepest"], "frozen");
    let refused = agentcube(&node, &agent, &["sleep", "--depth", "checkpointed"]).unwrap_err();
    assert!(refused.contains("which was used 0.") || refused.contains("which was used 1."), "{refused}");
    // Both are as they were.
    says(&mut busy, "still there");
    thread::sleep(Duration::from_secs(2));
    says(&mut busy, "and still");
    thread::sleep(Duration::from_millis(1500));
    let told = why(&node, &agent);
    assert_eq!((kinds(&told), told["closing"].as_u64()), (vec!["connection"], Some(1)));

    drop(busy);
    node.wait_until("the busy one to go", SOON, || Ok(kinds(&why(&node, &agent)).is_empty())).unwrap();
    sleep(&node, &agent);
    let begun = Instant::now();
    assert_eq!(idle.read(&mut [0; 1]).unwrap(), 0, "an end in good order");
    assert!(begun.elapsed() < Duration::from_secs(1));
    // The agent goes on, without the connection.
    says(&mut greeted(&agent), "again");
    assert_eq!(wakes(&node, &agent), 1);
    sleep_when_idle(&node, &agent);
}

#[test]
fn a_request_on_an_idle_connection_in_the_middle_of_a_dump_is_answered() {
    let mut options = NodeOptions::default();
    options.shim_toml.push_str("\nconnection_idle_seconds = 1\n");
    let node = Node::start(options).unwrap();
    // So much memory that there is a middle.
    let ballast = format!("ballast = b'x' * (512 << 20)\n{}", include_str!("../agents/doors.py"));
    let spec = agent(Image::Python, "a").net(Net::Pod).port(PORT);
    let agent = run(&node, &spec.args(&["python3", "-c", &ballast, "blocking"]));
    let mut idle = greeted(&agent);
    thread::sleep(Duration::from_millis(1500));
    // Whoever sends before CRIU writes is seen by the look at the frozen agent.
    let begun = "until ls /var/lib/agentcube/images/*/a/*/img/pages-*.img 2>&-; do sleep 0.01; done; agentcube --json inspect a";
    let refused = thread::scope(|scope| {
        let asleep = scope.spawn(|| agentcube(&node, &agent, &["sleep", "--depth", "checkpointed"]));
        let told = node.exec(&["timeout", "30", "sh", "-c", begun]).unwrap().check().unwrap();
        assert!(told.contains("falling-asleep"), "{told}");
        says(&mut idle, "in the middle");
        asleep.join().unwrap().unwrap_err()
    });
    println!("{refused}");
    assert_eq!(wakes(&node, &agent), 0);
    says(&mut idle, "after it");
}

/// Connections to the agent that are closed, and linger in its kernel so that no stray packet is taken for one of another.
fn lingering(agent: &Agent) -> usize {
    const TIME_WAIT: &str = "06";
    let tables =
        || ["tcp", "tcp6"].map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap());
    let tables = agent.inside(tables).unwrap().concat();
    let (port, state) =
        (format!(":{PORT:04X}"), |line: &str| line.split_whitespace().nth(3) == Some(TIME_WAIT));
    let local = |line: &str| line.split_whitespace().nth(1).is_some_and(|address| address.ends_with(&port));
    tables.lines().filter(|line| local(line) && state(line)).count()
}

#[test]
fn what_lingers_of_closed_connections_does_not_keep_an_agent_from_its_port() {
    let node = start();
    let spec = talker("strict").annotation("agentcube.volcano.sh/connections", "close");
    let agent = run(&node, &spec.args(&["python3", "-c", include_str!("../agents/doors.py"), "strict"]));
    let doors = [(Ipv4Addr::LOCALHOST.into(), "door 0"), (Ipv6Addr::LOCALHOST.into(), "door 1")];
    let connect = |(address, name): (IpAddr, &str)| {
        let stream = agent.inside(|| TcpStream::connect((address, PORT)).unwrap()).unwrap();
        greeted_by(stream, name)
    };
    for turn in 1..=3 {
        // The agent closes one first, and it lingers. Of those that the sleep closes one client closes in turn.
        for door in doors {
            let mut closed = connect(door);
            answers(&mut closed, door.1, "bye");
            assert_eq!(closed.read(&mut [0; 1]).unwrap(), 0);
        }
        let linger = || Ok(lingering(&agent) >= doors.len());
        node.wait_until("the closed connections to linger", SOON, linger).unwrap();
        let (closes, stays) = (doors.map(connect), doors.map(connect));
        sleep(&node, &agent);
        drop(closes);
        let begun = Instant::now();
        for door in doors {
            answers(&mut connect(door), door.1, "again");
        }
        println!("answered after {:?}, {} linger", begun.elapsed(), lingering(&agent));
        let told = inspect(&node, &agent);
        assert_eq!((told["wakes"].as_u64(), &told["last_error"]), (Some(turn), &Value::Null), "{told}");
        drop(stays);
    }
}

/// Closed connections take a moment to go.
fn sleep_when_idle(node: &Node, agent: &Agent) {
    node.wait_until("the agent to be idle", SOON, || Ok(kinds(&why(node, agent)).is_empty())).unwrap();
    sleep(node, agent);
}

#[test]
fn the_options_keep_and_close_and_the_annotation_decide_about_every_connection() {
    let node = start();
    let annotation = "agentcube.volcano.sh/connections";
    let keeping = run(&node, &talker("keeping").annotation(annotation, "keep"));
    let mut kept = greeted(&keeping);
    let refused = agentcube(&node, &keeping, &["sleep"]).unwrap_err();
    assert!(refused.contains("connections are to be kept"), "{refused}");
    says(&mut kept, "kept");

    let closing = run(&node, &talker("closing").annotation(annotation, "close"));
    for turn in 1..=3 {
        let mut closed = greeted(&closing);
        says(&mut closed, "a moment ago");
        sleep(&node, &closing);
        match closed.read(&mut [0; 1]) {
            Ok(length) => assert_eq!(length, 0),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
        says(&mut greeted(&closing), "again");
        assert_eq!(wakes(&node, &closing), turn);
    }
    let wrong = node.run_agent(&talker("wrong").annotation(annotation, "drop")).unwrap_err().to_string();
    assert!(wrong.contains(annotation) && wrong.contains("keep"), "{wrong}");
}

#[test]
fn a_connection_whose_bytes_the_agent_has_not_read_keeps_it_awake() {
    let node = start();
    let code = "import socket, time
server = socket.create_server(('0.0.0.0', 8400))
print('ready', flush=True)
connection, _ = server.accept()
time.sleep(1000)";
    let spec = agent(Image::Python, "a").net(Net::Pod).port(PORT).args(&["python3", "-c", code]);
    let agent = run(&node, &spec);
    let mut client = agent.connect().unwrap();
    client.write_all(b"unread").unwrap();
    let found = || Ok(why(&node, &agent)["reasons"].to_string().contains("6 bytes that it has not read"));
    node.wait_until("the bytes to be seen", SOON, found).unwrap();
    // One that nobody accepts is somebody who waits.
    let waiting = agent.connect().unwrap();
    assert_eq!(kinds(&why(&node, &agent)), ["connection", "queue"]);
    drop(waiting);
}

#[test]
fn what_keeps_an_agent_from_being_checkpointed_is_told_without_disturbing_it() {
    let node = start();
    let cases = [
        ("inside", "a, b = socket.socketpair()", &[][..]),
        ("timer", "t = os.timerfd_create(1); os.timerfd_settime(t, initial=500)", &[]),
        (
            "uring",
            "import ctypes; assert ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(120)) > 0",
            &["io-uring"],
        ),
        ("fault", "import ctypes; assert ctypes.CDLL(None).syscall(323, 1) > 0", &["userfaultfd"]),
        ("family", "s = socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)", &["socket"]),
        ("mptcp", "s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)", &["socket"]),
        // With FAN_REPORT_FID it is for everybody.
        ("fanotify", "import ctypes; assert ctypes.CDLL(None).syscall(300, 0x200, 0) > 0", &["fanotify"]),
        ("userns", "if not os.fork(): os.unshare(os.CLONE_NEWUSER); time.sleep(1000)", &["namespace"]),
        ("device", "f = open('/dev/loop-control')", &["device"]),
        ("peer", "s = socket.socket(socket.AF_UNIX); s.connect('\\0outside')", &["unix-peer"]),
        ("door", "s = socket.socket(socket.AF_UNIX); s.bind('/volume/door'); s.listen()", &["unix-listener"]),
        (
            "mailbox",
            "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.bind('\\0mailbox')",
            &["unix-datagram"],
        ),
        (
            "letters",
            "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.bind('\\0letters'); s.connect('\\0letters')",
            &[],
        ),
        ("hidden", "s = socket.socket(socket.AF_UNIX); s.bind('/tmp/door'); s.listen()", &[]),
    ];
    node.sh("mkdir /run/volume").unwrap();
    let name = SocketAddr::from_abstract_name("outside").unwrap();
    let outside = node.inside(|| UnixListener::bind_addr(&name).unwrap()).unwrap();
    for (id, code, expected) in cases {
        let code = format!(
            "import os, socket, time\ntry:\n  {code}\n  print('ready', flush=True)\nexcept Exception as e:\n  print('ready, but', e, flush=True)\ntime.sleep(1000)"
        );
        let spec = agent(Image::Python, id)
            .mount("type=bind,src=/run/volume,dst=/volume,options=rbind:rw")
            .flag("--device=/dev/loop-control")
            .args(&["python3", "-c", &code]);
        let agent = run(&node, &spec);
        let _accepted = (id == "peer").then(|| outside.accept().unwrap());
        let log = agent.log().unwrap();
        if log.contains("but") {
            eprintln!("{id} cannot be tried on this machine: {log}");
            continue;
        }
        let told = why(&node, &agent);
        assert_eq!(kinds(&told), expected, "{id}: {told}");
        let deepest = if expected.is_empty() { "checkpointed" } else { "frozen" };
        assert_eq!(told["deepest"], deepest);
        if id == "timer" {
            let next = told["next_timer_us"].as_u64().unwrap();
            assert!((400_000_000..=500_000_000).contains(&next), "{next}");
        }
        let text = node.exec(&["agentcube", "why", id]).unwrap().check().unwrap();
        assert!(text.contains(&format!("{id}: can sleep {deepest}")), "{text}");
        if expected.is_empty() {
            sleep(&node, &agent);
            let asleep = agentcube(&node, &agent, &["why"]).unwrap_err();
            assert!(asleep.contains("asleep already"), "{asleep}");
            assert_asleep(&node, &agent);
        } else {
            let refused = agentcube(&node, &agent, &["sleep", "--depth", "checkpointed"]).unwrap_err();
            assert!(refused.contains(told["reasons"][0]["text"].as_str().unwrap()), "{refused}");
            assert_eq!(inspect(&node, &agent)["state"], "running");
        }
        agent.delete().unwrap();
    }
}

/// Connects to a unix listener by its path inside of an agent's container, from outside of it.
fn enters(node: &Node, agent: &Agent, path: &str) -> std::io::Result<UnixStream> {
    let [pid] = host_pids(node, agent)[..] else { panic!("{} has not one process", agent.id()) };
    let stream = UnixStream::connect(format!("/proc/{pid}/root{path}"))?;
    stream.set_read_timeout(Some(SOON))?;
    Ok(stream)
}

#[test]
fn a_unix_listener_with_a_path_is_reached_from_outside_unless_its_agent_is_checkpointed() {
    let node = start();
    let code = include_str!("../agents/doors.py");
    node.sh("mkdir /run/volume").unwrap();
    let spec = |id: &str, path: &str| {
        agent(Image::Python, id)
            .mount("type=bind,src=/run/volume,dst=/volume,options=rbind:rw")
            .args(&["python3", "-c", code, "path", path])
    };
    let hidden = run(&node, &spec("hidden", "/tmp/door"));
    let shared = run(&node, &spec("shared", "/volume/door"));
    for (agent, path) in [(&hidden, "/tmp/door"), (&shared, "/volume/door")] {
        for turn in 1..=2 {
            sleep_in_place(&node, agent, "frozen");
            let mut client = BufReader::new(enters(&node, agent, path).unwrap());
            let mut greeting = String::new();
            client.read_line(&mut greeting).unwrap();
            assert_eq!(greeting, "220 path\n");
            let told = inspect(&node, agent);
            assert_eq!(
                (&told["wakes"], &told["last_wake"]["cause"]),
                (&turn.into(), &"traffic".into()),
                "{told}"
            );
            // As long as it stays.
            assert!(kinds(&why(&node, agent)).contains(&"unix-peer"));
        }
    }
    // From the volume anybody could come at any time; to the other nothing leads once its processes are gone.
    let client =
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/volume/door'); print(s.recv(99))";
    let slept = agentcube(&node, &shared, &["sleep", "--or-shallower"]).unwrap();
    assert_eq!(slept["slept"][0]["depth"], "frozen", "{slept}");
    assert!(slept.to_string().contains("lies on a volume"), "{slept}");
    assert!(node.exec(&["python3", "-c", client]).unwrap().check().unwrap().contains("220 path"));
    let idle = || Ok(kinds(&why(&node, &hidden)).is_empty());
    node.wait_until("the clients to be gone", SOON, idle).unwrap();
    sleep(&node, &hidden);
    let bundle = inspect(&node, &hidden)["bundle"].as_str().unwrap().to_owned();
    let client = format!(
        "import socket; s = socket.socket(socket.AF_UNIX); print(s.connect_ex('{bundle}/rootfs/tmp/door'))"
    );
    let refused = node.exec(&["python3", "-c", &client]).unwrap().check().unwrap();
    assert_eq!(
        refused.trim(),
        "111",
        "whoever goes through the mounts of containerd is told that nobody listens"
    );
    assert_asleep(&node, &hidden);
    agentcube(&node, &hidden, &["wake"]).unwrap();
    let mut greeting = String::new();
    BufReader::new(enters(&node, &hidden, "/tmp/door").unwrap()).read_line(&mut greeting).unwrap();
    assert_eq!(greeting, "220 path\n");
}

#[test]
fn a_client_that_waits_at_a_unix_listener_keeps_its_agent_from_being_checkpointed() {
    let node = start();
    let code = "import signal, socket
listener = socket.socket(socket.AF_UNIX)
listener.bind('/tmp/door')
listener.listen()
print('ready', flush=True)
signal.sigwait([signal.SIGUSR1])
listener.accept()[0].sendall(b'at last')
signal.pause()";
    let code = format!("import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n{code}");
    let agent = run(&node, &agent(Image::Python, "a").args(&["python3", "-c", &code]));
    let mut client = enters(&node, &agent, "/tmp/door").unwrap();
    assert_eq!(kinds(&why(&node, &agent)), ["queue"]);
    let refused = agentcube(&node, &agent, &["sleep", "--depth", "checkpointed"]).unwrap_err();
    println!("{refused}");
    let told = inspect(&node, &agent);
    assert_eq!((&told["state"], &told["sleeps"]), (&"running".into(), &0.into()), "{told}");
    // The agent does not wait for clients, so that one who waits is no demand of its frozen sleep.
    sleep_in_place(&node, &agent, "frozen");
    agent.kill("SIGUSR1").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "at last");
    drop(client);
    sleep(&node, &agent);
}

#[test]
fn what_criu_could_not_dump_is_remembered_until_it_changes() {
    let node = start();
    let code = "import ctypes, os, signal, time
libc = ctypes.CDLL(None)
fd = libc.inotify_init1(0o2000000)
assert libc.inotify_add_watch(fd, b'/agent.py', 2) >= 0
signal.signal(signal.SIGUSR1, lambda *_: os.close(fd))
print('ready', flush=True)
while True: time.sleep(1)";
    let agent = run(&node, &agent(Image::Python, "a").args(&["python3", "-c", code]));
    assert_eq!(why(&node, &agent)["doubts"].as_array().unwrap().len(), 1);
    let first = agentcube(&node, &agent, &["sleep"]).unwrap_err();
    assert!(first.contains("watches files") && !first.contains("ago"), "{first}");
    let begun = Instant::now();
    let second = agentcube(&node, &agent, &["sleep"]).unwrap_err();
    assert!(second.contains("watches files") && second.contains("s ago; tried again in"), "{second}");
    println!("refused from memory in {:?}", begun.elapsed());
    assert_eq!(kinds(&why(&node, &agent)), ["criu"]);
    agent.kill("SIGUSR1").unwrap();
    node.wait_until("the watch to go", SOON, || Ok(kinds(&why(&node, &agent)).is_empty())).unwrap();
    sleep(&node, &agent);
}
