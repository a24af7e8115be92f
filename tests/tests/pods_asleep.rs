//! Pods that sleep and wake while a kubelet does to them all that it does all the time.

#![allow(clippy::unwrap_used)]

mod pod;

use std::thread;
use std::time::{Duration, Instant};

use agentcube_tests::images::Image;
use agentcube_tests::kubelet::api::LinuxContainerResources;
use agentcube_tests::kubelet::{
    ContainerSpec, Kubelet, Pod, PodSpec, Probe, Report, Seen, Streams, lines, parse_log,
};
use agentcube_tests::node::{Node, Runtime};
use agentcube_tests::patience::scaled;
use pod::{
    SOON, agent, agentcube, assert_asleep, assert_awake, assert_counts, assert_running, counter, sleep_at,
    start, state, wake,
};

const SHORT: Duration = Duration::from_secs(10);
const SECOND: Duration = Duration::from_secs(1);
const DEPTHS: [&str; 2] = ["frozen", "checkpointed"];

/// Of a pod with a sidecar, which containers sleep.
const ANNOTATION: &str = "agentcube.volcano.sh/containers";

fn spec(name: &str) -> PodSpec {
    PodSpec::new(name, Runtime::Agentcube)
}

/// Nothing in what a kubelet saw would have made it restart or evict something, or mark a pod as not ready.
fn assert_undisturbed(report: &Report) {
    assert!(report.relists > 0, "{report:#?}");
    assert_eq!(report.restarts, 0, "{report:#?}");
    for odd in [&report.unknown, &report.not_ready, &report.missing_stats, &report.errors] {
        assert!(odd.is_empty(), "{report:#?}");
    }
}

/// Why a pod is not put to sleep while a probe's command runs in it, or begins to, or while one of it is at work.
const BUSY: [&str; 5] = [
    "exec process",
    "woken while it fell asleep",
    "something needs the agent awake",
    "waking already",
    "it is at work",
];

/// How long the soak lasts: `AGENTCUBE_SOAK` in seconds, or else what a test run has time for.
fn soak() -> Duration {
    let seconds = std::env::var("AGENTCUBE_SOAK").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(60))
}

/// What an agent remembers, asked by a command inside of its pod.
fn turn(pod: &Pod) -> u64 {
    let reply = pod.http(8080, "GET", "/turn", "").unwrap().body;
    serde_json::from_str::<serde_json::Value>(&reply).unwrap()["turn"].as_u64().unwrap()
}

#[test]
fn pods_sleep_and_wake_for_minutes_and_a_kubelet_sees_nothing_of_it() {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let begun = Instant::now();
    let healthy = || Probe::http(8080, "/health").every(2 * SECOND);
    let many = spec("many")
        .annotation(ANNOTATION, "agent, counter")
        .init(ContainerSpec::script("first", "echo one"))
        .init(
            agent("proxy")
                .env("PORT", &8081)
                .sidecar()
                .liveness(Probe::http(8081, "/health").every(2 * SECOND)),
        )
        .container(agent("agent").liveness(Probe::exec(&["true"]).every(5 * SECOND)))
        .container(counter("counter"));
    let plain = spec("plain").container(agent("agent")).container(counter("counter"));
    let reference = PodSpec::new("reference", Runtime::Runc)
        .init(ContainerSpec::script("first", "echo one"))
        .init(agent("proxy").env("PORT", &8081).sidecar())
        .container(agent("agent").liveness(healthy()).readiness(Probe::tcp(8080).every(SECOND)))
        .container(counter("counter"));
    let (many, plain, reference) =
        (kubelet.run(many).unwrap(), kubelet.run(plain).unwrap(), kubelet.run(reference).unwrap());
    for pod in [&many, &plain, &reference] {
        pod.wait_healthy(8080).unwrap();
    }
    let (cycles, report) = kubelet.attend(&[&many, &plain, &reference], || {
        thread::scope(|scope| {
            let cycling = [&many, &plain].map(|pod| scope.spawn(|| cycle(&node, pod, begun + soak())));
            cycling.map(|one| one.join().unwrap())
        })
    });
    assert_undisturbed(&report);
    assert!(report.failed_probes.is_empty(), "{report:#?}");
    assert!(report.probes > 10, "{report:#?}");
    assert!(cycles.iter().all(|count| *count > 4), "{cycles:?}");
    for pod in [&many, &plain, &reference] {
        assert!(assert_counts(&lines(&pod.log("counter").unwrap(), "stdout")) > 10);
    }
    eprintln!(
        "{cycles:?} cycles; {} relists, the slowest {:?}; {} probes",
        report.relists, report.slowest, report.probes
    );
    for pod in [many, plain, reference] {
        pod.remove().unwrap();
    }
}

/// Lets a pod sleep and wake, by turns on request and because of a command, until a moment; counts the sleeps.
fn cycle(node: &Node, pod: &Pod, end: Instant) -> u64 {
    let mut cycles = 0;
    while Instant::now() < end {
        let depth = DEPTHS[usize::from(cycles % 3 != 0)];
        // A probe's command may run at this moment: then the pod is not idle, and tried again as the node agent would.
        node.wait_until("the pod to fall asleep", SOON, || {
            match agentcube(node, pod.sandbox(), &["sleep", "--depth", depth]) {
                Ok(_) => Ok(true),
                Err(reason) if BUSY.iter().any(|why| reason.contains(why)) => Ok(false),
                Err(reason) => panic!("{reason}"),
            }
        })
        .unwrap();
        thread::sleep(Duration::from_millis(1500));
        if cycles % 2 == 0 {
            let said = pod.exec("counter", &["echo", "hello"], SHORT).unwrap();
            assert_eq!(said.stdout, b"hello\n");
        } else {
            wake(node, pod);
        }
        pod.wait_healthy(8080).unwrap();
        cycles += 1;
        assert_eq!(turn(pod), cycles - 1);
        pod.http(8080, "POST", "/chat", "hello").unwrap();
    }
    cycles
}

#[test]
fn the_containers_of_a_pod_sleep_together_and_whatever_wakes_one_wakes_all() {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let pod = spec("together")
        .annotation(ANNOTATION, "agent,worker")
        .init(ContainerSpec::script("first", "echo one"))
        .init(ContainerSpec::script("sidecar", "exec sleep 1000").sidecar())
        .container(agent("agent"))
        .container(agent("worker").env("PORT", &8081));
    let pod = kubelet.run(pod).unwrap();
    pod.wait_healthy(8080).unwrap();
    let both = ["agent", "worker"];
    for depth in DEPTHS {
        for waker in ["agent", "worker"] {
            sleep_at(&node, &pod, depth);
            assert_asleep(&node, &pod, &both, depth);
            assert_awake(&node, &pod, &["sidecar"]);
            assert_eq!(pod.exec("sidecar", &["true"], SHORT).unwrap().exit_code, 0);
            assert_asleep(&node, &pod, &both, depth);
            assert_eq!(pod.exec(waker, &["true"], SHORT).unwrap().exit_code, 0);
            let awake = || both.iter().all(|name| state(&node, &pod, name).0 == "running");
            node.wait_until("the other to wake as well", SOON, || Ok(awake())).unwrap();
        }
    }
    // A command that lives in one of them keeps all of them awake.
    let input = Streams { stdin: true, tty: false };
    let mut cat = pod.stream("agent", &["cat"], input).unwrap();
    cat.send("here\n").unwrap();
    cat.read_until("here").unwrap();
    let refused = agentcube(&node, pod.sandbox(), &["sleep"]).unwrap_err();
    assert!(refused.contains("exec"), "{refused}");
    assert_awake(&node, &pod, &both);
    drop(cat);
}

#[test]
fn a_pod_whose_annotation_names_none_of_its_containers_stays_awake_and_says_why() {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let pod = kubelet.run(spec("none").annotation(ANNOTATION, "agnet").container(counter("agent"))).unwrap();
    let refused = agentcube(&node, pod.sandbox(), &["sleep"]).unwrap_err();
    assert!(refused.contains("agentcube.volcano.sh/containers=agnet"), "{refused}");
    assert_awake(&node, &pod, &["agent"]);
}

#[test]
fn a_restart_of_containerd_leaves_sleeping_pods_ready_and_a_command_wakes_them() {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let frozen = kubelet.run(spec("frozen").container(agent("agent"))).unwrap();
    let dumped = kubelet.run(spec("dumped").container(agent("agent")).container(counter("counter"))).unwrap();
    for pod in [&frozen, &dumped] {
        pod.wait_healthy(8080).unwrap();
        pod.http(8080, "POST", "/chat", "hello").unwrap();
    }
    sleep_at(&node, &frozen, "frozen");
    sleep_at(&node, &dumped, "checkpointed");
    for _ in 0..2 {
        let (restarted, report) = kubelet.attend(&[&frozen, &dumped], || {
            let restarted = node.restart_containerd();
            thread::sleep(2 * SECOND);
            restarted
        });
        restarted.unwrap();
        // While containerd is down calls fail; that is all.
        assert_undisturbed(&Report { errors: Vec::new(), ..report });
        assert_asleep(&node, &frozen, &["agent"], "frozen");
        assert_asleep(&node, &dumped, &["agent", "counter"], "checkpointed");
    }
    for pod in [&frozen, &dumped] {
        assert_eq!(pod.exec("agent", &["echo", "hello"], SHORT).unwrap().stdout, b"hello\n");
        assert_eq!(turn(pod), 1);
        assert_running(pod, &["agent"]);
    }
    let counted = || assert_counts(&lines(&dumped.log("counter").unwrap(), "stdout"));
    let before = counted();
    node.wait_until("the counter to go on", SOON, || Ok(counted() > before)).unwrap();
}

/// Lets `agentcube` do something to a pod, and after a while something else happens beside it.
fn in_the_middle<T>(node: &Node, pod: &Pod, verb: &str, after: Duration, other: impl FnOnce() -> T) -> T {
    thread::scope(|scope| {
        let doing = scope.spawn(|| agentcube(node, pod.sandbox(), &[verb]));
        thread::sleep(after);
        let done = other();
        // It may have succeeded or been given up: the tests look at what came out.
        drop(doing.join().unwrap());
        done
    })
}

#[test]
fn a_restart_of_containerd_in_the_middle_of_a_sleep_or_a_wake_costs_nothing() {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let spec =
        spec("restarted").container(agent("agent").env("BALLAST_MIB", &96)).container(counter("counter"));
    let pod = kubelet.run(spec).unwrap();
    pod.wait_healthy(8080).unwrap();
    pod.http(8080, "POST", "/chat", "hello").unwrap();
    let both = ["agent", "counter"];
    for (verb, after) in [("sleep", 20), ("wake", 20), ("sleep", 120), ("wake", 120)] {
        let after = Duration::from_millis(after);
        in_the_middle(&node, &pod, verb, after, || node.restart_containerd()).unwrap();
        match verb {
            "sleep" => assert_asleep(&node, &pod, &both, "checkpointed"),
            _ => assert_awake(&node, &pod, &both),
        }
        let ((), report) = kubelet.attend(&[&pod], || thread::sleep(SECOND));
        assert_undisturbed(&report);
    }
    assert_eq!(turn(&pod), 1);
    assert_counts(&lines(&pod.log("counter").unwrap(), "stdout"));
}

#[test]
fn commands_in_the_middle_of_a_sleep_or_a_wake_are_served() {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let spec = spec("wanted").container(agent("agent").env("BALLAST_MIB", &96)).container(counter("counter"));
    let pod = kubelet.run(spec).unwrap();
    pod.wait_healthy(8080).unwrap();
    pod.http(8080, "POST", "/chat", "hello").unwrap();
    let ((), report) = kubelet.attend(&[&pod], || {
        for after in [5, 30, 60, 100, 160, 250] {
            for verb in ["sleep", "wake"] {
                let command = || pod.exec("agent", &["echo", "hello"], SHORT);
                let done = in_the_middle(&node, &pod, verb, Duration::from_millis(after), command).unwrap();
                assert_eq!(done.stdout, b"hello\n");
            }
        }
    });
    assert_undisturbed(&report);
    wake(&node, &pod);
    pod.wait_healthy(8080).unwrap();
    assert_eq!(turn(&pod), 1);
    assert_counts(&lines(&pod.log("counter").unwrap(), "stdout"));
}

#[test]
fn a_pod_that_is_removed_in_the_middle_of_a_sleep_or_a_wake_leaves_nothing() {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    node.sh("mkdir -p -m 700 /var/lib/agentcube/images").unwrap();
    let before = node.snapshot();
    for (verb, after) in [("sleep", 10), ("sleep", 60), ("sleep", 150), ("wake", 10), ("wake", 60)] {
        let spec =
            spec("unwanted").container(agent("agent").env("BALLAST_MIB", &96)).container(counter("counter"));
        let pod = kubelet.run(spec).unwrap();
        pod.wait_healthy(8080).unwrap();
        if verb == "wake" {
            sleep_at(&node, &pod, "checkpointed");
        }
        let sweep = || kubelet.cri().stop_pod_sandbox(pod.sandbox());
        in_the_middle(&node, &pod, verb, Duration::from_millis(after), sweep).unwrap();
        for name in ["agent", "counter"] {
            assert_eq!(pod.seen(name).unwrap(), Seen::Exited(137), "{verb} {after}");
        }
        pod.remove().unwrap();
    }
    node.wait_until_clean(&before, SOON).unwrap();
}

#[test]
fn a_sleeping_pod_that_is_removed_leaves_nothing() {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    node.sh("mkdir -p -m 700 /var/lib/agentcube/images").unwrap();
    let before = node.snapshot();
    for depth in DEPTHS {
        let run = |name: &str| {
            let containers = spec(name).container(agent("agent").env("TERM_STATUS", &9));
            let pod = kubelet.run(containers.container(counter("counter"))).unwrap();
            pod.wait_healthy(8080).unwrap();
            sleep_at(&node, &pod, depth);
            pod
        };
        // As a kubelet does it: each container has its grace, and ends in its own way.
        let pod = run("stopped");
        pod.stop().unwrap();
        assert_eq!(pod.seen("agent").unwrap(), Seen::Exited(9));
        assert_eq!(pod.seen("counter").unwrap(), Seen::Exited(0));
        pod.remove().unwrap();
        // Without more ado: the sandbox goes, and takes all with it.
        let pod = run("swept");
        kubelet.cri().stop_pod_sandbox(pod.sandbox()).unwrap();
        kubelet.cri().remove_pod_sandbox(pod.sandbox()).unwrap();
        pod.remove().unwrap();
        assert_eq!(kubelet.cri().list_containers().unwrap().len(), 0);
    }
    node.wait_until_clean(&before, SOON).unwrap();
}

#[test]
fn a_log_goes_on_after_a_wake_without_a_gap_or_a_double_line_and_may_be_rotated_meanwhile() {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let pod = kubelet.run(spec("writing").container(counter("counter"))).unwrap();
    let mut counted = String::new();
    for round in 0..8 {
        let rotate = |counted: &mut String| {
            counted.push_str(&node.read_file(&pod.rotate_log("counter").unwrap()).unwrap());
        };
        thread::sleep(Duration::from_millis(400));
        sleep_at(&node, &pod, DEPTHS[usize::from(round % 4 > 0)]);
        if round % 2 == 0 {
            rotate(&mut counted);
        }
        wake(&node, &pod);
        if round % 3 == 0 {
            rotate(&mut counted);
        }
    }
    node.wait_until("the new log", SOON, || Ok(pod.log("counter").is_ok_and(|log| log.len() > 3))).unwrap();
    counted.push_str(&node.read_file(&pod.log_path("counter")).unwrap());
    let entries = parse_log(&counted).unwrap();
    assert!(assert_counts(&lines(&entries, "stdout")) > 20);
}

#[test]
fn limits_may_be_changed_and_streams_attached_while_a_pod_sleeps() {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let echo = "while read line; do echo got $line; done";
    let pod = spec("changed")
        .container(agent("agent"))
        .container(ContainerSpec::script("echo", echo).stdin())
        .container(ContainerSpec::new("shell", Image::Shell).tty());
    let pod = kubelet.run(pod).unwrap();
    pod.wait_healthy(8080).unwrap();
    let names = ["agent", "echo", "shell"];
    for depth in DEPTHS {
        sleep_at(&node, &pod, depth);
        let resources = LinuxContainerResources {
            cpu_shares: 512,
            memory_limit_in_bytes: 256 << 20,
            ..Default::default()
        };
        pod.resize("agent", resources).unwrap();
        // What is written while nobody types is nothing: an attachment alone wakes nobody.
        let mut attached = pod.attach("echo", Streams { stdin: true, tty: false }).unwrap();
        assert_asleep(&node, &pod, &names, depth);
        attached.send("hello\n").unwrap();
        attached.read_until("got hello").unwrap();
        node.wait_until("all to wake", SOON, || {
            Ok(names.iter().all(|name| state(&node, &pod, name).0 == "running"))
        })
        .unwrap();
        let mut shell = pod.attach("shell", Streams { stdin: true, tty: true }).unwrap();
        shell.send("echo $((6 * 7))\n").unwrap();
        shell.read_until("42").unwrap();
        // Through the loopback interface of the pod, as `kubectl port-forward` does.
        let mut forward = pod.forward(8080).unwrap();
        forward.send(b"GET /turn HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
        assert!(forward.read_to_end().unwrap().contains(r#"{"turn": 0}"#));
        drop((attached, shell));
    }
    assert_running(&pod, &names);
}

#[test]
fn requests_wake_a_sleeping_pod_from_outside_and_through_a_forwarded_port() {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let pod = kubelet.run(spec("called").container(agent("agent")).container(counter("counter"))).unwrap();
    pod.wait_healthy(8080).unwrap();
    for round in 0..3 {
        sleep_at(&node, &pod, "checkpointed");
        assert_asleep(&node, &pod, &["agent", "counter"], "checkpointed");
        assert_eq!(turn(&pod), round);
        node.wait_until("all to wake", SOON, || Ok(state(&node, &pod, "counter").0 == "running")).unwrap();
        pod.http(8080, "POST", "/chat", "hello").unwrap();
        sleep_at(&node, &pod, "checkpointed");
        // On the loopback interface of the pod.
        let mut forward = pod.forward(8080).unwrap();
        forward.send(b"GET /turn HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
        let answer = forward.read_to_end().unwrap();
        assert!(answer.contains(&format!(r#"{{"turn": {}}}"#, round + 1)), "{answer}");
        node.wait_until("all to wake", SOON, || Ok(state(&node, &pod, "counter").0 == "running")).unwrap();
    }
}

#[test]
fn probes_of_a_sleeping_pod_are_answered() {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    // Those that wake the pod take as long as that, on a machine that is busy longer than a kubelet waits by default.
    let every = |probe: Probe| probe.every(2 * SECOND).timeout(scaled(SECOND));
    let health = ContainerSpec::new("grpc", Image::Python)
        .command(&["/usr/bin/python3", "/grpc_health.py"])
        .startup(Probe::grpc(9090).every(SECOND).failures(30))
        .readiness(every(Probe::grpc(9090)));
    let pod = spec("probed")
        .container(
            agent("agent").liveness(every(Probe::http(8080, "/health"))).readiness(every(Probe::tcp(8080))),
        )
        .container(health);
    let pod = kubelet.run(pod).unwrap();
    pod.wait_healthy(8080).unwrap();
    let (slept, report) = kubelet.attend(&[&pod], || {
        let tries = 0..8;
        let slept = tries.filter(|_| {
            thread::sleep(Duration::from_millis(2500));
            // A probe may come at this moment: then the pod is not idle.
            agentcube(&node, pod.sandbox(), &["sleep"]).is_ok()
        });
        slept.count()
    });
    assert!(slept > 0, "{report:#?}");
    assert_undisturbed(&report);
    let failed = report.failed_probes.iter().filter(|probe| !probe.contains("Startup"));
    assert_eq!(failed.count(), 0, "{report:#?}");
}

#[test]
fn a_pod_that_cannot_sleep_as_deep_as_asked_stays_awake_or_sleeps_as_deep_as_it_can() {
    let node = start();
    if node.read_file("/proc/swaps").unwrap().lines().count() > 1 {
        return agentcube_tests::skipped("this machine has swap");
    }
    let kubelet = Kubelet::on(&node).unwrap();
    let pod = spec("shallow").container(agent("agent")).container(agent("worker").env("PORT", &8081));
    let pod = kubelet.run(pod).unwrap();
    pod.wait_healthy(8080).unwrap();
    pod.wait_healthy(8081).unwrap();
    let both = ["agent", "worker"];
    let sleeps = || {
        both.map(|name| {
            agentcube(&node, &pod.id(name).unwrap(), &["inspect"]).unwrap()["container"]["sleeps"].as_u64()
        })
    };
    // One of them may still be at work. Gives back how often they had slept before, too.
    let reclaim = |more: &[&str]| {
        let words = [&["sleep", "--depth", "reclaimed"], more].concat();
        let mut outcome = None;
        node.wait_until("nothing of the pod to be at work", SOON, || {
            let before = sleeps();
            let answer = agentcube(&node, pod.sandbox(), &words);
            let at_work = answer.as_ref().is_err_and(|error| error.contains("at work"));
            outcome = Some((before, answer));
            Ok(!at_work)
        })
        .unwrap();
        outcome.unwrap()
    };
    let refused = reclaim(&[]).1.unwrap_err();
    assert!(refused.contains("nothing to reclaim to"), "{refused}");
    assert_awake(&node, &pod, &both);
    let (before, slept) = reclaim(&["--or-shallower"]);
    slept.unwrap();
    assert_asleep(&node, &pod, &both, "frozen");
    // From there it is deepened without a wake, and asked again it is as it should be.
    sleep_at(&node, &pod, "checkpointed");
    assert_asleep(&node, &pod, &both, "checkpointed");
    sleep_at(&node, &pod, "checkpointed");
    assert_eq!(
        sleeps(),
        before.map(|count| count.map(|count| count + 1)),
        "to deepen a sleep is no other sleep"
    );
    assert_eq!(turn(&pod), 0);
}
