//! Clients with connections of their own kind: websockets and gRPC, at each depth of sleep that this machine has.

#![allow(clippy::unwrap_used)]

mod calls;
mod cycle;

use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use agentcube_tests::images::Image;
use agentcube_tests::node::{Agent, AgentSpec, Net, Node, NodeOptions};
use calls::{channel, check};
use cycle::{SOON, agent, agentcube, assert_asleep, inspect, sleep, sleep_in_place, start, wakes};
use tungstenite::{Message, WebSocket};

const PORT: u16 = 8500;
const CLIENT: &str = "grpc-go/1.72";
/// Long enough for an agent to wake that wakes for nothing.
const QUIET: Duration = Duration::from_millis(600);

/// A server of websockets in a network of its own.
fn websockets(id: &str) -> AgentSpec {
    let code = include_str!("../agents/websocket.py");
    agent(Image::Python, id).net(Net::Pod).port(PORT).args(&["python3", "-c", code])
}

fn run<'node>(node: &'node Node, spec: &AgentSpec) -> Agent<'node> {
    let agent = node.run_agent(spec).unwrap();
    node.wait_until("the server to listen", SOON, || Ok(agent.log()?.contains("listening"))).unwrap();
    agent
}

/// A client whose handshake is done.
fn upgraded(agent: &Agent) -> WebSocket<TcpStream> {
    let (socket, answer) = tungstenite::client("ws://agent/talk", agent.connect().unwrap()).unwrap();
    assert_eq!(answer.status(), 101);
    socket
}

/// The next text that comes.
fn hears(socket: &mut WebSocket<TcpStream>) -> String {
    loop {
        match socket.read().unwrap() {
            Message::Text(text) => return text.to_string(),
            Message::Pong(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Says something; the answer has its number on this connection.
fn says(socket: &mut WebSocket<TcpStream>, number: usize, text: &str) {
    socket.send(text.into()).unwrap();
    assert_eq!(hears(socket), format!("{number}: {text}"));
}

/// The depths at which processes stay that this machine has.
fn depths_in_place(node: &Node) -> &'static [&'static str] {
    let swaps = node.read_file("/proc/swaps").unwrap();
    if swaps.lines().count() > 1 { &["frozen", "reclaimed"] } else { &["frozen"] }
}

#[test]
fn a_websocket_stays_established_while_its_agent_sleeps_and_frames_wake_it() {
    let node = start();
    let agent = run(&node, &websockets("a"));
    let mut socket = upgraded(&agent);
    let mut silent = upgraded(&agent);
    let large = "all of it, ".repeat(6000);
    let mut number = 0;
    for depth in depths_in_place(&node) {
        for _ in 0..2 {
            sleep_in_place(&node, &agent, depth);
            thread::sleep(QUIET);
            let before = inspect(&node, &agent);
            assert_eq!((&before["state"], &before["depth"]), (&"asleep".into(), &(*depth).into()));
            for text in ["good morning", &large] {
                number += 1;
                says(&mut socket, number, text);
            }
            // A ping wakes it as well, and is answered by the agent.
            sleep_in_place(&node, &agent, depth);
            socket.send(Message::Ping(b"there?".as_slice().into())).unwrap();
            assert_eq!(socket.read().unwrap(), Message::Pong(b"there?".as_slice().into()));
            // What the agent itself says first, because of another client, reaches both.
            sleep_in_place(&node, &agent, depth);
            assert_eq!(agent.http("POST", "/push", "to all").unwrap().status, 200);
            assert_eq!([hears(&mut socket), hears(&mut silent)], ["to all", "to all"]);
            let woke = inspect(&node, &agent);
            assert_eq!(woke["wakes"].as_u64(), before["wakes"].as_u64().map(|wakes| wakes + 3));
            assert_eq!(woke["last_wake"]["cause"], "traffic");
        }
    }
    says(&mut silent, 1, "the first from here");
    socket.close(None).unwrap();
    while let Ok(message) = socket.read() {
        assert!(message.is_close(), "{message:?}");
    }
}

#[test]
fn a_websocket_keeps_its_agent_from_a_checkpoint_as_long_as_bytes_flow() {
    let mut options = NodeOptions::default();
    options.shim_toml.push_str("\nconnection_idle_seconds = 3\n");
    let node = Node::start(options).unwrap();
    let agent = run(&node, &websockets("a"));
    let mut socket = upgraded(&agent);
    let stop = AtomicBool::new(false);
    let (mut unexpected, mut checkpointed) = (None, false);
    let said = thread::scope(|scope| {
        let client = scope.spawn(|| {
            let mut number = 0;
            while !stop.load(Ordering::Relaxed) {
                number += 1;
                says(&mut socket, number, "still here");
                thread::sleep(Duration::from_millis(200));
            }
            number
        });
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(5) {
            // The bytes may flow at this very moment: then the agent is at work, or woken, which are reasons too.
            let asked = agentcube(&node, &agent, &["sleep", "--depth", "checkpointed"]);
            let refused = ["TCP connection", "at work", "needs the agent awake"];
            let is_refused = |error: &String| refused.iter().any(|reason| error.contains(reason));
            // The client goes on until it is told to stop, so nothing may panic before.
            if !asked.as_ref().is_err_and(is_refused) {
                unexpected = Some(asked);
                break;
            }
            let _ = agentcube(&node, &agent, &["sleep", "--or-shallower"]);
            checkpointed |= inspect(&node, &agent)["depth"] == "checkpointed";
        }
        stop.store(true, Ordering::Relaxed);
        client.join().unwrap()
    });
    assert!(unexpected.is_none() && !checkpointed, "{unexpected:?}");
    assert!(said > 10, "{said} messages");
    assert!(wakes(&node, &agent) > 0, "it did not sleep at all");
    // Once it has been idle for the time of the option it may be closed, which the client learns at once.
    let idle = || Ok(agentcube(&node, &agent, &["sleep", "--depth", "checkpointed"]).is_ok());
    node.wait_until("the connection to be idle", SOON, idle).unwrap();
    assert_asleep(&node, &agent);
    assert!(socket.read().is_err(), "the connection has not ended");
    says(&mut upgraded(&agent), 1, "again");
}

#[test]
fn calls_of_grpc_wake_an_agent_on_open_and_on_new_channels() {
    let node = start();
    let spec = agent(Image::Python, "a").net(Net::Pod).port(PORT);
    let agent = run(&node, &spec.args(&["python3", "/grpc_health.py"]));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut open = channel(agent.connect().unwrap()).await;
        check(&mut open, CLIENT).await;
        for depth in depths_in_place(&node) {
            for _ in 0..2 {
                sleep_in_place(&node, &agent, depth);
                check(&mut open, CLIENT).await;
                sleep_in_place(&node, &agent, depth);
                check(&mut channel(agent.connect().unwrap()).await, CLIENT).await;
            }
        }
        drop(open);
        for _ in 0..3 {
            // The connections of before are closed here, while this thread does nothing else.
            tokio::time::sleep(QUIET).await;
            sleep(&node, &agent);
            let begun = Instant::now();
            let mut new = channel(agent.connect().unwrap()).await;
            check(&mut new, CLIENT).await;
            println!("answered {:?} after the connect", begun.elapsed());
            // The channel that has woken it goes on.
            check(&mut new, CLIENT).await;
        }
    });
    let told = inspect(&node, &agent);
    assert_eq!(told["last_wake"]["cause"], "traffic", "{told}");
}
