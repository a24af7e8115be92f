//! Clients reach an agent that is frozen, or whose processes are on the disk, as they would a busy one: nobody is refused,
//! reset or answered wrongly.

#![allow(clippy::unwrap_used)]

mod cycle;

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::ops::RangeInclusive;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix;
use std::thread;
use std::time::{Duration, Instant};

use agentcube_tests::images::Image;
use agentcube_tests::node::{Agent, AgentSpec, Net, Node};
use cycle::{SOON, agent, agentcube, inspect, sleep, sleep_in_place, start, wakes};

/// Ports of agents that share a node, and its network.
const PORT: u16 = 8300;

/// How deep an agent sleeps whose clients are not told of it.
const DEPTHS: [&str; 2] = ["frozen", "checkpointed"];

/// Puts an agent to sleep at one of them.
fn sleep_at(node: &Node, agent: &Agent, depth: &str) {
    match depth {
        "checkpointed" => sleep(node, agent),
        _ => sleep_in_place(node, agent, depth),
    }
}

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

/// Puts a server to sleep, has one client each reach it at these addresses at once, and gives back who answered.
fn wake_by(node: &Node, agent: &Agent, depth: &str, doors: &[(&str, u16)]) -> Vec<String> {
    sleep_at(node, agent, depth);
    let before = wakes(node, agent);
    let answers = agent
        .inside(|| {
            thread::scope(|scope| {
                let clients: Vec<_> = doors
                    .iter()
                    .map(|(address, port)| scope.spawn(|| converse(connect(address, *port).0, "hello")))
                    .collect();
                clients.into_iter().map(|client| client.join().unwrap()).collect()
            })
        })
        .unwrap();
    assert_eq!(wakes(node, agent), before + 1);
    answers
}

#[test]
fn each_of_several_listeners_wakes_an_agent_by_either_protocol_and_on_the_loopback_device_only() {
    let node = start();
    let agent = run(&node, &door("several"));
    let doors = [
        ("127.0.0.1", PORT, "door 0"),
        ("127.0.0.1", PORT + 1, "door 1"),
        ("127.0.0.1", PORT + 2, "door 2"),
        ("::1", PORT + 2, "door 2"),
        ("::1", PORT + 3, "door 3"),
    ];
    let all = doors.map(|(address, port, _)| (address, port));
    for depth in DEPTHS {
        for (address, port, name) in doors {
            assert_eq!(wake_by(&node, &agent, depth, &[(address, port)]), [name]);
        }
        assert_eq!(wake_by(&node, &agent, depth, &all), doors.map(|(_, _, name)| name));
    }
    assert_eq!(inspect(&node, &agent)["last_wake"]["cause"], "traffic");
}

#[test]
fn a_server_that_blocks_in_accept_and_speaks_first_greets_who_woke_it() {
    let node = start();
    let agent = run(&node, &door("blocking"));
    for depth in [DEPTHS; 3].concat() {
        assert_eq!(wake_by(&node, &agent, depth, &[("127.0.0.1", PORT); 3]), ["blocking"; 3]);
    }
}

#[test]
fn workers_that_share_a_listener_serve_who_woke_them() {
    let node = start();
    let agent = run(&node, &door("forked"));
    for depth in [DEPTHS; 3].concat() {
        let answers = wake_by(&node, &agent, depth, &[("127.0.0.1", PORT); 8]);
        assert!(answers.iter().all(|name| name.starts_with("worker ")), "{answers:?}");
    }
}

#[test]
fn a_group_of_listeners_on_one_port_loses_nobody() {
    let node = start();
    let agent = run(&node, &door("group"));
    for depth in [DEPTHS; 3].concat() {
        let answers = wake_by(&node, &agent, depth, &[("127.0.0.1", PORT); 40]);
        assert!(answers.iter().all(|name| name.starts_with("door ")), "{answers:?}");
    }
}

#[test]
fn a_listener_is_after_a_wake_what_it_was_before() {
    let node = start();
    for kind in ["owned", "group"] {
        let agent = run(&node, &door(kind));
        let describe = |line: usize| {
            agent.kill("SIGUSR1").unwrap();
            let lines = || Ok(agent.log()?.lines().filter(|line| line.contains("owner=")).count());
            let lines = || lines().map(|lines| lines >= line);
            node.wait_until("the server to describe itself", SOON, lines).unwrap();
            agent.log().unwrap().lines().last().unwrap().to_owned()
        };
        let each = if kind == "group" { 4 } else { 1 };
        let before = describe(each);
        let expected = if kind == "owned" {
            "reuseport=0 reuseaddr=1 backlog=7 owner=1234"
        } else {
            "reuseport=1 reuseaddr=1 backlog=16 owner=0"
        };
        assert_eq!(before, expected);
        for turn in 2..=4 {
            wake_by(&node, &agent, "checkpointed", &[("127.0.0.1", PORT); 2]);
            assert_eq!(describe(turn * each), before);
        }
    }
}

#[test]
fn a_client_that_comes_and_goes_while_the_agent_sleeps_does_no_harm() {
    let node = start();
    let agent = run(&node, &door("blocking"));
    let ends = [None, Some(Duration::ZERO)];
    for (depth, linger) in DEPTHS.iter().flat_map(|depth| ends.map(|linger| (depth, linger))) {
        sleep_at(&node, &agent, depth);
        agent
            .inside(|| {
                let (stream, took) = connect("127.0.0.1", PORT);
                assert!(took < Duration::from_millis(200));
                // Without lingering the end is a reset.
                rustix::net::sockopt::set_socket_linger(&stream, linger).unwrap();
                drop(stream);
                assert_eq!(converse(connect("127.0.0.1", PORT).0, "after"), "blocking");
            })
            .unwrap();
    }
}

/// Sends so many messages before it reads the first answer; gives back all answers.
fn send_at_once(numbers: RangeInclusive<usize>) -> String {
    let (mut stream, _) = connect("127.0.0.1", PORT);
    let last = *numbers.end();
    let mut text = String::new();
    for number in numbers {
        let end = if number == last { "close" } else { "keep-alive" };
        let body = format!("message {number}");
        let length = body.len();
        write!(text, "POST /chat HTTP/1.1\r\nConnection: {end}\r\nContent-Length: {length}\r\n\r\n{body}")
            .unwrap();
    }
    stream.write_all(text.as_bytes()).unwrap();
    let mut answers = String::new();
    stream.read_to_string(&mut answers).unwrap();
    answers
}

#[test]
fn requests_sent_in_one_go_are_answered_in_order_by_an_agent_that_slept() {
    let node = start();
    let agent = node.run_agent(&agent(Image::Python, "a").net(Net::Pod).port(PORT)).unwrap();
    agent.wait_healthy().unwrap();
    for (depth, first) in DEPTHS.into_iter().zip([1, 21]) {
        sleep_at(&node, &agent, depth);
        let last = first + 19;
        let answers = agent.inside(|| send_at_once(first..=last)).unwrap();
        let turns: Vec<usize> = answers
            .split("\"turn\": ")
            .skip(1)
            .map(|text| text.split(',').next().unwrap().parse().unwrap())
            .collect();
        assert_eq!(turns, (first..=last).collect::<Vec<_>>(), "{answers}");
    }
}

#[test]
fn clients_of_an_agent_that_is_deleted_in_its_sleep_are_told_and_nothing_is_left() {
    let node = start();
    let before = node.snapshot();
    let spec = agent(Image::Python, "a").port(PORT);
    let agent = node.run_agent(&spec).unwrap();
    agent.wait_healthy().unwrap();
    sleep(&node, &agent);
    // The image is not there any more, so the wake fails, and who waits goes on waiting.
    let image = inspect(&node, &agent)["image_dir"].as_str().unwrap().to_owned();
    node.sh(&format!("mv {image}/img/inventory.img {image}/")).unwrap();
    let mut waiting = agent.connect().unwrap();
    waiting.write_all(b"GET /health HTTP/1.1\r\n\r\n").unwrap();
    node.wait_until("the wake to fail", SOON, || Ok(!inspect(&node, &agent)["last_error"].is_null()))
        .unwrap();
    cycle::assert_asleep(&node, &agent);
    let mut more = agent.connect().unwrap();
    more.write_all(b"GET /health HTTP/1.1\r\n\r\n").unwrap();
    // Put back, the agent can be woken, and nobody has been lost.
    node.sh(&format!("mv {image}/inventory.img {image}/img/")).unwrap();
    agentcube(&node, &agent, &["wake"]).unwrap();
    for stream in [&mut waiting, &mut more] {
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
    }
    drop((waiting, more));
    thread::sleep(Duration::from_millis(200));

    sleep(&node, &agent);
    let image = inspect(&node, &agent)["image_dir"].as_str().unwrap().to_owned();
    node.sh(&format!("mv {image}/img/inventory.img {image}/")).unwrap();
    let mut waiting = agent.connect().unwrap();
    node.wait_until("the wake to fail", SOON, || Ok(!inspect(&node, &agent)["last_error"].is_null()))
        .unwrap();
    agent.delete().unwrap();
    let ended = waiting.read(&mut [0; 1]);
    assert!(matches!(&ended, Ok(0)) || ended.is_err(), "{ended:?}");
    assert!(agent.connect().is_err(), "somebody still listens");
    node.wait_until_clean(&before, SOON).unwrap();
}

/// Sends these datagrams to a server, all before the first answer; gives back the answers, sorted.
fn echo(address: &str, count: usize) -> Vec<String> {
    let any = if address.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
    let socket = UdpSocket::bind(any).unwrap();
    // A connected socket hears only who it has spoken to.
    socket.connect(SocketAddr::new(address.parse().unwrap(), PORT)).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    for number in 0..count {
        socket.send(format!("{number:02}").as_bytes()).unwrap();
    }
    let mut answers: Vec<_> = (0..count)
        .map(|_| {
            let mut buffer = [0; 64];
            let length = socket.recv(&mut buffer).unwrap();
            String::from_utf8_lossy(&buffer[..length]).into_owned()
        })
        .collect();
    answers.sort();
    answers
}

#[test]
fn datagrams_wake_an_agent_and_each_is_answered_from_where_it_was_sent_to() {
    let node = start();
    for (kind, addresses) in [("udp", &["127.0.0.1"][..]), ("udp6", &["::1", "127.0.0.1"])] {
        let agent = run(&node, &door(kind));
        for address in addresses {
            for depth in [DEPTHS; 3].concat() {
                sleep_at(&node, &agent, depth);
                let answers = agent.inside(|| echo(address, 50)).unwrap();
                assert_eq!(answers, (0..50).map(|number| format!("echo: {number:02}")).collect::<Vec<_>>());
            }
        }
        assert_eq!(wakes(&node, &agent), 6 * addresses.len() as u64);
    }
}

#[test]
fn a_datagram_socket_has_after_a_wake_the_owner_that_it_had_before() {
    let node = start();
    let agent = run(&node, &door("udp-owned"));
    let owner = || {
        agent
            .inside(|| {
                let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
                socket.set_read_timeout(Some(SOON)).unwrap();
                socket.send_to(b"owner", ("127.0.0.1", PORT)).unwrap();
                let mut buffer = [0; 16];
                let length = socket.recv(&mut buffer).unwrap();
                String::from_utf8_lossy(&buffer[..length]).into_owned()
            })
            .unwrap()
    };
    assert_eq!(owner(), "1234");
    sleep(&node, &agent);
    agentcube(&node, &agent, &["wake"]).unwrap();
    assert_eq!(owner(), "1234");
}

/// Sends datagrams of two bytes each in one go, as QUIC does; the kernel may leave them together (UDP_SEGMENT). Gives back
/// the answers.
fn echo_of_segments(node: &Node, agent: &Agent, numbers: usize) -> Vec<String> {
    let client = format!(
        "import socket
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout({seconds})
client.setsockopt(socket.IPPROTO_UDP, 103, 2)
client.sendto(b''.join(b'%02d' % number for number in range({numbers})), ('127.0.0.1', {PORT}))
answered = 0
while answered < {numbers}:
    answer = client.recv(1000)
    answered += (len(answer) - len('echo: ')) // 2
    print(answer.decode())",
        seconds = SOON.as_secs()
    );
    let answers =
        node.exec(&["ip", "netns", "exec", agent.id(), "python3", "-c", &client]).unwrap().check().unwrap();
    answers.lines().map(str::to_owned).collect()
}

#[test]
fn datagrams_that_the_kernel_may_put_together_keep_their_borders_in_a_sleep() {
    let node = start();
    let agent = run(&node, &door("udp-together"));
    let together = ["echo: 0001020304"];
    assert_eq!(echo_of_segments(&node, &agent, 5), together, "the agent has UDP_GRO");
    for turn in 1..=3 {
        sleep(&node, &agent);
        let mut answers = echo_of_segments(&node, &agent, 5);
        answers.sort();
        assert_eq!(answers, (0..5).map(|number| format!("echo: {number:02}")).collect::<Vec<_>>());
        assert_eq!(wakes(&node, &agent), turn);
        let has_it_back = || Ok(echo_of_segments(&node, &agent, 5) == together);
        node.wait_until("the agent to have UDP_GRO again", SOON, has_it_back).unwrap();
    }
}

#[test]
fn datagrams_of_another_machine_are_answered_by_the_address_of_the_pod() {
    let node = start();
    let agent = run(&node, &door("udp"));
    node.sh("ip link add pod0 type veth peer name eth0 netns udp
         ip addr add 10.77.0.1/24 dev pod0; ip link set pod0 up
         ip -n udp addr add 10.77.0.2/24 dev eth0; ip -n udp link set eth0 up")
        .unwrap();
    for depth in [DEPTHS; 3].concat() {
        sleep_at(&node, &agent, depth);
        let answers = node.inside(|| echo("10.77.0.2", 20)).unwrap();
        assert_eq!(answers, (0..20).map(|number| format!("echo: {number:02}")).collect::<Vec<_>>());
    }
    assert_eq!(wakes(&node, &agent), 6);
}

#[test]
fn a_listener_with_an_abstract_unix_address_keeps_its_clients_and_wakes_for_new_ones() {
    let node = start();
    let agent = run(&node, &door("abstract"));
    let inner = |pings: usize| {
        let seen = || Ok(agent.log()?.matches("inner abstract: ping").count() == pings);
        node.wait_until("the inner client to have an answer", SOON, seen).unwrap();
    };
    for turn in 1..=4 {
        sleep(&node, &agent);
        let answers: Vec<String> = agent
            .inside(|| {
                let clients: Vec<_> = (0..10)
                    .map(|_| {
                        let address = unix::net::SocketAddr::from_abstract_name("door").unwrap();
                        let mut stream = unix::net::UnixStream::connect_addr(&address).unwrap();
                        stream.set_read_timeout(Some(SOON)).unwrap();
                        stream.write_all(b"hello\n").unwrap();
                        stream.shutdown(Shutdown::Write).unwrap();
                        stream
                    })
                    .collect();
                let read = |mut stream: unix::net::UnixStream| {
                    let mut answer = String::new();
                    stream.read_to_string(&mut answer).unwrap();
                    answer
                };
                clients.into_iter().map(read).collect()
            })
            .unwrap();
        assert_eq!(answers, vec!["220 abstract\nabstract: hello\n"; 10]);
        assert_eq!(wakes(&node, &agent), turn);
        agent.ctr(&["task", "kill", "--all", "--signal", "SIGUSR2", "abstract"]).unwrap().check().unwrap();
        inner(usize::try_from(turn).unwrap());
    }
}
