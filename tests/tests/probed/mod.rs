//! What the tests of probes share: an agent on a network that the node is the gateway of, a kubelet's probes, and clients.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]
#![allow(dead_code, reason = "each test file uses what it needs")]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};

use agentcube_tests::images::Image;
use agentcube_tests::node::{Agent, AgentSpec, Net, Node};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::cycle::{SOON, agent, inspect, wakes};

pub const PORT: u16 = 8400;
/// The node on the pod's network, where its kubelet connects from.
pub const GATEWAY: &str = "10.77.0.1";
pub const GATEWAY6: &str = "fd77::1";
/// Another machine on the pod's network.
pub const ELSEWHERE: &str = "10.77.0.9";
pub const ELSEWHERE6: &str = "fd77::9";
pub const POD: &str = "10.77.0.2";
pub const POD6: &str = "fd77::2";

/// Adds the option.
pub fn answering(spec: AgentSpec) -> AgentSpec {
    spec.annotation("agentcube.volcano.sh/probes", "answer")
}

pub fn python(id: &str) -> AgentSpec {
    answering(agent(Image::Python, id).net(Net::Pod).port(PORT))
}

/// Runs an agent on a network that the node is the gateway of.
pub fn run<'node>(node: &'node Node, spec: &AgentSpec) -> Agent<'node> {
    let agent = node.run_agent(spec).unwrap();
    let id = agent.id();
    node.sh(&format!(
        "ip link add pod0 type veth peer name eth0 netns {id}
         sysctl -qw net.ipv6.conf.pod0.accept_dad=0
         ip addr add {GATEWAY}/24 dev pod0; ip addr add {ELSEWHERE}/24 dev pod0
         ip addr add {GATEWAY6}/64 dev pod0 nodad; ip addr add {ELSEWHERE6}/64 dev pod0 nodad
         ip link set pod0 up
         ip -n {id} addr add {POD}/24 dev eth0; ip -n {id} addr add {POD6}/64 dev eth0 nodad
         ip -n {id} link set eth0 up
         ip -n {id} route add default via {GATEWAY}; ip -n {id} route add default via {GATEWAY6}"
    ))
    .unwrap();
    let listens = || Ok(["listening", "ready"].iter().any(|word| agent.log().unwrap().contains(word)));
    node.wait_until("the server to listen", SOON, listens).unwrap();
    agent
}

/// Connects from an address of this thread's machine.
pub fn dial(from: &str, to: &str) -> rustix::io::Result<TcpStream> {
    let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&socket, &SocketAddr::new(from, 0))?;
    rustix::net::connect(&socket, &SocketAddr::new(to, PORT))?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.set_nodelay(true).unwrap();
    Ok(stream)
}

/// An HTTP probe as a kubelet makes it; gives back the body of its answer.
pub fn probe(from: &str, to: &str) -> String {
    let mut stream = dial(from, to).unwrap();
    let host = SocketAddr::new(to.parse().unwrap(), PORT);
    let request = format!(
        "GET /health HTTP/1.1\r\nHost: {host}\r\nUser-Agent: kube-probe/1.33\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer:?}");
    answer.split_once("\r\n\r\n").unwrap().1.to_owned()
}

/// A message to the agent.
pub fn message(body: &str) -> Vec<u8> {
    let length = body.len();
    format!("POST /chat HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}").into_bytes()
}

/// Reads the answer to a message; gives back how many messages the agent has had.
pub fn answered(mut stream: TcpStream, body: &str) -> u64 {
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{:?}", answer.get(..200));
    assert!(answer.contains(body), "{} bytes without the message", answer.len());
    let (_, turn) = answer.split_once("\"turn\": ").unwrap();
    turn.split(',').next().unwrap().parse().unwrap()
}

/// One message over a connection of its own; gives back how many the agent has had.
pub fn ask(from: &str, to: &str, body: &str) -> u64 {
    let mut stream = dial(from, to).unwrap();
    stream.write_all(&message(body)).unwrap();
    answered(stream, body)
}

/// Sees to it that `work` wakes the agent, once.
pub fn wakes_it(node: &Node, agent: &Agent, work: impl FnOnce() + Send) {
    let before = wakes(node, agent);
    assert_eq!(inspect(node, agent)["state"], "asleep");
    node.inside(work).unwrap();
    assert_eq!(wakes(node, agent), before + 1);
    assert_eq!(inspect(node, agent)["last_wake"]["cause"], "traffic");
}
