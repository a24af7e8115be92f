//! Clients reach an agent whose processes are on the disk as they would a busy one: nobody is refused, reset or answered
//! wrongly.

#![allow(clippy::unwrap_used)]

mod cycle;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use agentcube_tests::images::Image;
use agentcube_tests::node::{Agent, AgentSpec, Net, Node};
use cycle::{SOON, agent, agentcube, inspect, sleep, start, wakes};

/// Ports of agents that share a node, and its network.
const PORT: u16 = 8300;

/// A server of `kind`, in a network of its own.
fn door(kind: &str) -> AgentSpec {
    let code = include_str!("../agents/doors.py");
    agent(Image::Python, kind).net(Net::Pod).port(PORT).args(&["python3", "-c", code, kind])
}

fn run<'node>(node: &'node Node, spec: &AgentSpec) -> Agent<'node> {
    let agent = node.run_agent(spec).unwrap();
    node.wait_until("the server to listen", SOON, || Ok(agent.log()?.contains("ready"))).unwrap();
    agent
}

/// Connects, from where this thread is.
fn connect(address: &str, port: u16) -> (TcpStream, Duration) {
    let address = SocketAddr::new(address.parse().unwrap(), port);
    let begun = Instant::now();
    let stream = TcpStream::connect_timeout(&address, SOON).unwrap();
    let took = begun.elapsed();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.set_nodelay(true).unwrap();
    (stream, took)
}

/// A client of a server that speaks first: gives back the server's name.
fn converse(stream: TcpStream, text: &str) -> String {
    let mut lines = BufReader::new(stream);
    let mut greeting = String::new();
    lines.read_line(&mut greeting).unwrap();
    let name = greeting.trim_end().strip_prefix("220 ").unwrap_or_else(|| panic!("{greeting:?}")).to_owned();
    lines.get_mut().write_all(format!("{text}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    lines.read_line(&mut answer).unwrap();
    assert_eq!(answer, format!("{name}: {text}\n"));
    name
}

/// One request over a connection of its own, whose answer must be whole.
fn ask(port: u16, turn: usize) -> Duration {
    let (mut stream, took) = connect("127.0.0.1", port);
    let body = format!("client {turn}");
    let request = format!(
        "POST /chat HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains(&body), "{answer:?}");
    took
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() - 1) * percent / 100]
}

#[test]
fn two_hundred_clients_at_once_wake_an_agent_and_are_all_served_over_fifty_cycles() {
    const CLIENTS: usize = 200;
    const CYCLES: usize = 50;
    let node = start();
    let agent = node.run_agent(&agent(Image::Python, "a").net(Net::Pod).port(PORT)).unwrap();
    agent.wait_healthy().unwrap();
    let mut connects = Vec::new();
    let mut first = Vec::new();
    for cycle in 0..CYCLES {
        sleep(&node, &agent);
        let begun = Instant::now();
        let took: Vec<(Duration, Duration)> = agent
            .inside(|| {
                thread::scope(|scope| {
                    let clients: Vec<_> = (0..CLIENTS)
                        .map(|number| {
                            scope.spawn(move || (ask(PORT, cycle * CLIENTS + number), begun.elapsed()))
                        })
                        .collect();
                    clients.into_iter().map(|client| client.join().unwrap()).collect()
                })
            })
            .unwrap();
        connects.extend(took.iter().map(|(connect, _)| *connect));
        first.push(took.iter().map(|(_, answered)| *answered).min().unwrap());
        // The agent has heard each of them once.
        assert_eq!(agent.turn().unwrap(), u64::try_from((cycle + 1) * CLIENTS).unwrap());
    }
    assert_eq!(wakes(&node, &agent), CYCLES as u64);
    connects.sort_unstable();
    first.sort_unstable();
    println!(
        "connect while asleep: median {:?}, p99 {:?}, most {:?}; first answer: least {:?}, median {:?}",
        percentile(&connects, 50),
        percentile(&connects, 99),
        connects.last().unwrap(),
        first[0],
        percentile(&first, 50),
    );
}

#[test]
fn one_client_wakes_an_agent_that_waits_in_epoll() {
    let node = start();
    let agent = node.run_agent(&agent(Image::Python, "a").net(Net::Pod).port(PORT)).unwrap();
    agent.wait_healthy().unwrap();
    for turn in 0..5 {
        sleep(&node, &agent);
        let begun = Instant::now();
        let connected = agent.inside(|| ask(PORT, turn)).unwrap();
        println!("connected in {connected:?}, answered after {:?}", begun.elapsed());
    }
    assert_eq!(wakes(&node, &agent), 5);
}
