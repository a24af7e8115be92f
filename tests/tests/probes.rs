//! Probes of a sleeping agent are answered without waking it, and whatever is no probe reaches the agent whole.

#![allow(clippy::unwrap_used)]

mod cycle;
mod probed;

use std::fs;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use agentcube_tests::images::Image;
use agentcube_tests::node::{Agent, Net, Node};
use cycle::{SOON, agent, agentcube, assert_asleep, inspect, sleep, start, wakes};
use probed::{
    ELSEWHERE, ELSEWHERE6, GATEWAY, GATEWAY6, POD, POD6, PORT, answered, answering, ask, dial, message,
    probe, python, run, wakes_it,
};

/// How many descriptors an agent's shim has open.
fn descriptors(node: &Node, agent: &Agent) -> usize {
    let shim = inspect(node, agent)["shim_pid"].as_u64().unwrap();
    let folder = format!("/proc/{}/root/proc/{shim}/fd", node.entrance().init);
    fs::read_dir(folder).unwrap().count()
}

#[test]
fn a_hundred_probes_do_not_wake_an_agent_and_the_first_client_does() {
    let node = start();
    for (id, from, elsewhere, to, bind) in
        [("v4", GATEWAY, ELSEWHERE, POD, "0.0.0.0"), ("v6", GATEWAY6, ELSEWHERE6, POD6, "::")]
    {
        let agent = run(&node, &python(id).env("BIND", bind));
        assert_eq!(node.inside(|| probe(from, to)).unwrap(), "ok");
        for turn in 1..=2 {
            sleep(&node, &agent);
            let before = descriptors(&node, &agent);
            let mut took: Vec<Duration> = node
                .inside(|| {
                    let ask = |_| {
                        let begun = Instant::now();
                        assert_eq!(probe(from, to), "asleep\n");
                        // A TCP probe.
                        drop(dial(from, to).unwrap());
                        begun.elapsed()
                    };
                    (0..100).map(ask).collect()
                })
                .unwrap();
            took.sort_unstable();
            println!("answered: median {:?}, most {:?}", took[50], took[99]);
            assert_eq!(wakes(&node, &agent), turn - 1);
            assert_asleep(&node, &agent);
            let given_back = || Ok(descriptors(&node, &agent) <= before);
            node.wait_until("the shim to give its descriptors back", SOON, given_back).unwrap();
            wakes_it(&node, &agent, || assert_eq!(ask(elsewhere, to, "good morning"), turn));
        }
        agent.delete().unwrap();
        node.sh("ip link del pod0").unwrap();
    }
}

#[test]
fn without_the_option_a_probe_wakes_an_agent() {
    let node = start();
    let agent = run(&node, &agent(Image::Python, "a").net(Net::Pod).port(PORT));
    sleep(&node, &agent);
    wakes_it(&node, &agent, || assert_eq!(probe(GATEWAY, POD), "ok"));
}

#[test]
fn a_probe_from_another_address_or_from_within_the_pod_wakes_an_agent_and_is_answered_by_it() {
    let node = start();
    let agent = run(&node, &python("a"));
    sleep(&node, &agent);
    wakes_it(&node, &agent, || assert_eq!(probe(ELSEWHERE, POD), "ok"));
    sleep(&node, &agent);
    assert_eq!(agent.inside(|| probe("127.0.0.1", "127.0.0.1")).unwrap(), "ok");
    assert_eq!(wakes(&node, &agent), 2);
}

#[test]
fn what_is_no_probe_reaches_the_agent_whole_from_the_address_of_probes_too() {
    let node = start();
    let agent = run(&node, &python("a"));
    let before = descriptors(&node, &agent);
    let large: String = (0..1 << 20).map(|number: u32| char::from(b'a' + (number % 23) as u8)).collect();

    sleep(&node, &agent);
    wakes_it(&node, &agent, || assert_eq!(ask(GATEWAY, POD, &large), 1));

    sleep(&node, &agent);
    wakes_it(&node, &agent, || {
        let mut stream = dial(GATEWAY, POD).unwrap();
        for piece in message("in pieces").chunks(7) {
            stream.write_all(piece).unwrap();
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(answered(stream, "in pieces"), 2);
    });

    // Looks like a probe at first, and then hesitates.
    sleep(&node, &agent);
    wakes_it(&node, &agent, || {
        let mut stream = dial(GATEWAY, POD).unwrap();
        for piece in ["GET /he", "alth HTTP/1.1\r\nUser-Agent: cu", "rl\r\nConnection: close\r\n\r\n"] {
            stream.write_all(piece.as_bytes()).unwrap();
            thread::sleep(Duration::from_millis(400));
        }
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.ends_with("\r\n\r\nok"), "{answer:?}");
    });

    // Says all it has to say before it reads.
    sleep(&node, &agent);
    wakes_it(&node, &agent, || {
        let mut stream = dial(GATEWAY, POD).unwrap();
        stream.write_all(&message("that was all")).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(answered(stream, "that was all"), 3);
    });

    // Several at once, each with a connection of its own.
    sleep(&node, &agent);
    wakes_it(&node, &agent, || {
        thread::scope(|scope| {
            for number in 0..16 {
                scope.spawn(move || ask(GATEWAY, POD, &format!("client {number}")));
            }
        });
    });
    assert_eq!(agent.turn().unwrap(), 3 + 16);
    let given_back = || Ok(descriptors(&node, &agent) <= before);
    node.wait_until("the shim to give its descriptors back", SOON, given_back).unwrap();
}

#[test]
fn a_client_from_the_address_of_probes_that_resets_its_connection_does_no_harm() {
    let node = start();
    let agent = run(&node, &python("a"));
    sleep(&node, &agent);
    wakes_it(&node, &agent, || {
        for _ in 0..5 {
            let mut stream = dial(GATEWAY, POD).unwrap();
            stream.write_all(b"POST /ch").unwrap();
            rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
            drop(stream);
        }
        assert_eq!(ask(ELSEWHERE, POD, "after"), 1);
    });
}

#[test]
fn a_client_that_the_shim_has_connected_to_the_agent_learns_of_its_sleep_and_of_its_end() {
    let node = start();
    let before = node.snapshot();
    let agent = run(&node, &python("a").annotation("agentcube.volcano.sh/connections", "close"));
    sleep(&node, &agent);
    for end in ["sleep", "kill"] {
        let mut stream = node
            .inside(|| {
                let mut stream = dial(GATEWAY, POD).unwrap();
                let text = "POST /chat HTTP/1.1\r\nContent-Length: 4\r\n\r\nstay";
                stream.write_all(text.as_bytes()).unwrap();
                stream.read_exact(&mut [0; 12]).unwrap();
                stream
            })
            .unwrap();
        // The rest of the answer has come by then.
        thread::sleep(Duration::from_millis(100));
        stream.set_nonblocking(true).unwrap();
        let _ = stream.read(&mut [0; 4096]).unwrap();
        stream.set_nonblocking(false).unwrap();
        match end {
            "sleep" => sleep(&node, &agent),
            _ => agent.kill("SIGKILL").unwrap(),
        }
        let ended = stream.read(&mut [0; 1]);
        let reset = ended.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset);
        assert!(reset || matches!(ended, Ok(0)), "{ended:?}");
    }
    agent.delete().unwrap();
    node.sh("ip link del pod0").unwrap();
    node.wait_until_clean(&before, SOON).unwrap();
}

#[test]
fn a_server_that_speaks_first_greets_a_client_from_the_address_of_probes() {
    let node = start();
    let code = include_str!("../agents/doors.py");
    // The other one has a listener of both families at its third port.
    for (kind, port, name) in [("blocking", PORT, "blocking"), ("several", PORT - 2, "door 2")] {
        let spec = answering(agent(Image::Python, kind).net(Net::Pod).port(port));
        let agent = run(&node, &spec.args(&["python3", "-c", code, kind]));
        for (from, to) in [(GATEWAY, POD), (GATEWAY6, POD6)] {
            if kind == "blocking" && to == POD6 {
                continue;
            }
            sleep(&node, &agent);
            let begun = Instant::now();
            wakes_it(&node, &agent, || {
                let mut lines = BufReader::new(dial(from, to).unwrap());
                let mut line = String::new();
                lines.read_line(&mut line).unwrap();
                assert_eq!(line, format!("220 {name}\n"));
                lines.get_mut().write_all(b"hello\n").unwrap();
                line.clear();
                lines.read_line(&mut line).unwrap();
                assert_eq!(line, format!("{name}: hello\n"));
            });
            println!("greeted and answered after {:?}", begun.elapsed());
        }
        agent.delete().unwrap();
        node.sh("ip link del pod0").unwrap();
    }
}

#[test]
fn probes_and_clients_in_one_burst_are_all_answered_over_twenty_sleeps() {
    const CYCLES: u64 = 20;
    const CLIENTS: u64 = 4;
    let node = start();
    let agent = run(&node, &python("a"));
    for cycle in 0..CYCLES {
        // One that comes in the very moment of a sleep keeps the agent awake.
        let slept = || Ok(agentcube(&node, &agent, &["sleep", "--depth", "checkpointed"]).is_ok());
        node.wait_until("the agent to sleep", SOON, slept).unwrap();
        let begun = wakes(&node, &agent);
        node.inside(|| {
            thread::scope(|scope| {
                for number in 0..CLIENTS {
                    scope.spawn(move || ask(ELSEWHERE, POD, &format!("client {cycle}.{number}")));
                    // These come before the wake, in it and after it.
                    scope.spawn(move || {
                        for _ in 0..10 {
                            let body = probe(GATEWAY, POD);
                            assert!(body == "ok" || body == "asleep\n", "{body:?}");
                            drop(dial(GATEWAY, POD).unwrap());
                        }
                    });
                }
            });
        })
        .unwrap();
        assert_eq!(wakes(&node, &agent), begun + 1);
        assert_eq!(agent.turn().unwrap(), (cycle + 1) * CLIENTS);
    }
    // None of the clients from elsewhere was accepted by anybody but the agent.
    assert!(!node.containerd_log().contains("it is connected to the agent"), "{}", node.containerd_log());
}
