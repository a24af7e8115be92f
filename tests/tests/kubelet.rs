//! Pods as a kubelet runs them through the CRI: what it does must come out the same on this runtime as on containerd's
//! own.

#![allow(clippy::unwrap_used)]

mod pod;

use std::thread;
use std::time::Duration;

use agentcube_tests::images::Image;
use agentcube_tests::kubelet::{
    Code, ContainerSpec, Finished, Kubelet, PodSpec, Probe, RestartPolicy, Seen, Streams, USER_AGENT, lines,
};
use agentcube_tests::node::Runtime;
use agentcube_tests::runtime_tests;
use pod::{SOON, agent, assert_counts, counter, start};

const SHORT: Duration = Duration::from_secs(10);
const SECOND: Duration = Duration::from_secs(1);

runtime_tests!([runc, agentcube]
    a_pod_runs_its_containers_in_order_and_leaves_nothing,
    commands_end_with_their_output_and_status_or_in_time,
    streams_carry_input_output_sizes_and_statuses,
    a_log_goes_on_in_a_new_file_when_it_is_rotated,
    probes_by_http_tcp_grpc_and_command_are_answered,
    what_ends_or_does_not_live_is_replaced_and_counted,
    a_stop_gives_the_grace_and_then_kills,
    pods_outlive_a_restart_of_containerd,
);

fn a_pod_runs_its_containers_in_order_and_leaves_nothing(runtime: Runtime) {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    node.sh("mkdir -p -m 700 /var/lib/agentcube/images").unwrap();
    let before = node.snapshot();
    let spec = PodSpec::new("plain", runtime)
        .init(ContainerSpec::script("first", "echo one; sleep 1; echo two"))
        .init(ContainerSpec::script("sidecar", "echo here; exec sleep 1000").sidecar())
        .container(agent("agent"))
        .container(counter("counter"));
    let pod = kubelet.run(spec).unwrap();
    pod.wait_healthy(8080).unwrap();
    assert_eq!(pod.seen("first").unwrap(), Seen::Exited(0));
    assert_eq!(lines(&pod.log("first").unwrap(), "stdout"), ["one", "two"]);
    let started = |name: &str| pod.status(name).unwrap().started_at;
    assert!(pod.status("first").unwrap().finished_at <= started("sidecar"));
    assert!(started("sidecar") <= started("agent") && started("agent") <= started("counter"));
    assert_eq!(pod.running().unwrap().len(), 3);

    let ((), report) = kubelet.attend(&[&pod], || thread::sleep(3 * SECOND));
    assert!(report.relists >= 2, "{report:?}");
    assert_eq!(report.restarts, 0, "{report:?}");
    assert!(report.errors.is_empty() && report.unknown.is_empty(), "{report:?}");
    assert!(report.missing_stats.is_empty() && report.not_ready.is_empty(), "{report:?}");
    assert!(assert_counts(&lines(&pod.log("counter").unwrap(), "stdout")) > 10);
    pod.remove().unwrap();
    kubelet.collect_garbage().unwrap();
    assert_eq!(kubelet.cri().list_containers().unwrap().len(), 0);
    assert_eq!(kubelet.cri().list_pod_sandboxes().unwrap().len(), 0);
    let tags: Vec<String> =
        kubelet.cri().list_images().unwrap().into_iter().flat_map(|image| image.repo_tags).collect();
    assert_eq!(tags, [Image::Pause.reference()]);
    node.wait_until_clean(&before, SOON).unwrap();
}

fn commands_end_with_their_output_and_status_or_in_time(runtime: Runtime) {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let pod = kubelet.run(PodSpec::new("plain", runtime).container(counter("counter"))).unwrap();
    let done = pod.exec("counter", &["sh", "-c", "echo out; echo err >&2; exit 3"], SHORT).unwrap();
    assert_eq!(done.exit_code, 3);
    assert_eq!((done.stdout.as_slice(), done.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    let large = pod.exec("counter", &["sh", "-c", "seq 1 100000"], SHORT).unwrap();
    assert!(large.stdout.ends_with(b"\n100000\n"));

    let late = pod.exec("counter", &["sleep", "60"], SECOND).unwrap_err();
    assert_eq!(late.code(), Some(Code::DeadlineExceeded), "{late}");
    let left = || pod.exec("counter", &["sh", "-c", "ps | grep '[s]leep 60'"], SHORT).unwrap().exit_code;
    node.wait_until("the command to be killed", SOON, || Ok(left() == 1)).unwrap();
    assert!(pod.exec("counter", &["/no/such/program"], SHORT).is_err());
    let side_by_side = |number: usize| {
        let done = pod.exec("counter", &["echo", &number.to_string()], SHORT).unwrap();
        assert_eq!(String::from_utf8(done.stdout).unwrap().trim(), number.to_string());
    };
    thread::scope(|scope| (0..8).for_each(|number| drop(scope.spawn(move || side_by_side(number)))));
}

fn streams_carry_input_output_sizes_and_statuses(runtime: Runtime) {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let input = Streams { stdin: true, tty: false };
    let terminal = Streams { stdin: true, tty: true };
    let echo = "while read line; do echo got $line; done";
    let spec = PodSpec::new("plain", runtime)
        .container(agent("agent"))
        .container(ContainerSpec::script("echo", echo).stdin())
        .container(ContainerSpec::new("shell", Image::Shell).tty());
    let pod = kubelet.run(spec).unwrap();
    pod.wait_healthy(8080).unwrap();

    let both = &["sh", "-c", "echo out; echo err >&2; exit 4"];
    let finished = pod.stream("agent", both, Streams::default()).unwrap().finish().unwrap();
    let wanted = Finished { stdout: "out\n".into(), stderr: "err\n".into(), status: Some(4) };
    assert_eq!(finished, wanted);
    let mut cat = pod.stream("agent", &["cat"], input).unwrap();
    cat.send("hello\n").unwrap();
    cat.read_until("hello").unwrap();
    drop(cat);
    let mut shell = pod.stream("agent", &["sh"], terminal).unwrap();
    shell.resize(123, 45).unwrap();
    shell.send("until stty size | grep 123; do usleep 10000; done; exit 7\n").unwrap();
    shell.read_until("45 123").unwrap();
    assert_eq!(shell.finish().unwrap().status, Some(7));

    for round in ["one", "two"] {
        let mut attached = pod.attach("echo", input).unwrap();
        attached.send(&format!("{round}\n")).unwrap();
        attached.read_until(&format!("got {round}")).unwrap();
    }
    let mut attached = pod.attach("shell", terminal).unwrap();
    attached.send("echo $((6 * 7))\n").unwrap();
    attached.read_until("\n42").unwrap();

    let mut forward = pod.forward(8080).unwrap();
    forward.send(b"GET /turn HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    let answer = forward.read_to_end().unwrap();
    assert!(answer.contains(r#"{"turn": 0}"#), "{answer}");
    let nobody = pod.forward(9).unwrap().read_to_end().unwrap_err();
    assert!(nobody.to_string().contains("refused"), "{nobody}");
}

fn a_log_goes_on_in_a_new_file_when_it_is_rotated(runtime: Runtime) {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let pod = kubelet.run(PodSpec::new("plain", runtime).container(counter("counter"))).unwrap();
    let mut counted = String::new();
    for _ in 0..3 {
        thread::sleep(SECOND);
        let old = pod.rotate_log("counter").unwrap();
        counted.push_str(&node.read_file(&old).unwrap());
    }
    node.wait_until("the new log", SOON, || Ok(pod.log("counter").is_ok_and(|log| log.len() > 3))).unwrap();
    counted.push_str(&node.read_file(&pod.log_path("counter")).unwrap());
    let entries = agentcube_tests::kubelet::parse_log(&counted).unwrap();
    assert!(assert_counts(&lines(&entries, "stdout")) > 20);
}

fn probes_by_http_tcp_grpc_and_command_are_answered(runtime: Runtime) {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let answer = r"printf 'HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n' | nc -l -p 7000";
    let health = ContainerSpec::new("grpc", Image::Python)
        .command(&["/usr/bin/python3", "/grpc_health.py"])
        .readiness(Probe::grpc(9090).every(SECOND));
    let spec = PodSpec::new("probed", runtime)
        .container(
            agent("agent")
                .startup(Probe::http(8080, "/health").every(SECOND).failures(30))
                .liveness(Probe::tcp(8080).every(SECOND))
                .readiness(Probe::exec(&["ls", "/ready"]).every(SECOND)),
        )
        .container(health)
        .container(
            ContainerSpec::script("listener", &format!("while :; do {answer}; done"))
                .liveness(Probe::http(7000, "/probe").every(2 * SECOND)),
        );
    let pod = kubelet.run(spec).unwrap();
    let ((), report) = kubelet.attend(&[&pod], || {
        thread::sleep(4 * SECOND);
        pod.exec("agent", &["touch", "/ready"], SHORT).unwrap();
        thread::sleep(4 * SECOND);
    });
    assert_eq!(report.restarts, 0, "{report:#?}");
    assert!(report.probes > 10 && report.not_ready.is_empty(), "{report:#?}");
    let unready =
        report.failed_probes.iter().filter(|probe| probe.starts_with("probed/agent Readiness")).count();
    assert!(unready >= 1, "{report:#?}");
    let heard = lines(&pod.log("listener").unwrap(), "stdout");
    assert!(heard.iter().any(|line| line.trim_end() == format!("User-Agent: {USER_AGENT}")), "{heard:?}");
}

fn what_ends_or_does_not_live_is_replaced_and_counted(runtime: Runtime) {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let sick = Probe::exec(&["sh", "-c", "! ls /sick"]).every(SECOND).failures(2);
    let ending = PodSpec::new("ending", runtime)
        .container(ContainerSpec::script("brief", "echo run; sleep 1; exit 5"))
        .container(ContainerSpec::script("patient", "exec sleep 1000").liveness(sick));
    let once = PodSpec::new("once", runtime)
        .restart(RestartPolicy::OnFailure)
        .container(ContainerSpec::script("done", "exit 0"));
    let (ending, once) = (kubelet.run(ending).unwrap(), kubelet.run(once).unwrap());
    let ((), report) = kubelet.attend(&[&ending, &once], || {
        ending.exec("patient", &["touch", "/sick"], SHORT).unwrap();
        node.wait_until("both to be replaced", SOON, || {
            Ok(ending.restarts("brief") == 1 && ending.restarts("patient") == 1)
        })
        .unwrap();
        thread::sleep(3 * SECOND);
    });
    assert_eq!(report.restarts, 2, "{report:#?}");
    assert_eq!(once.seen("done").unwrap(), Seen::Exited(0));
    assert_eq!(ending.seen("patient").unwrap(), Seen::Running);
    // It ended again, and waits for its second restart.
    assert_eq!(ending.seen("brief").unwrap(), Seen::Exited(5));
    let count = || kubelet.cri().list_containers().unwrap().len();
    assert_eq!(count(), 5);
    kubelet.collect_garbage().unwrap();
    assert_eq!(count(), 4, "the newest dead one of each name stays");
}

fn a_stop_gives_the_grace_and_then_kills(runtime: Runtime) {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let spec = PodSpec::new("stopping", runtime)
        .container(agent("agent").env("TERM_STATUS", &9))
        .container(ContainerSpec::script("deaf", "trap '' TERM; while :; do sleep 1; done"));
    let pod = kubelet.run(spec).unwrap();
    pod.wait_healthy(8080).unwrap();
    pod.stop().unwrap();
    assert_eq!(pod.seen("agent").unwrap(), Seen::Exited(9));
    assert_eq!(pod.seen("deaf").unwrap(), Seen::Exited(137));
    assert!(!pod.is_ready().unwrap());
    pod.remove().unwrap();
}

fn pods_outlive_a_restart_of_containerd(runtime: Runtime) {
    let node = start();
    let kubelet = Kubelet::on(&node).unwrap();
    let spec = PodSpec::new("lasting", runtime).container(agent("agent")).container(counter("counter"));
    let pod = kubelet.run(spec).unwrap();
    pod.wait_healthy(8080).unwrap();
    let (restarted, report) = kubelet.attend(&[&pod], || {
        let restarted = node.restart_containerd();
        thread::sleep(3 * SECOND);
        restarted
    });
    restarted.unwrap();
    assert_eq!(report.restarts, 0, "{report:#?}");
    assert!(report.unknown.is_empty() && report.not_ready.is_empty(), "{report:#?}");
    assert_eq!(pod.exec("agent", &["true"], SHORT).unwrap().exit_code, 0);
    let lines = || assert_counts(&lines(&pod.log("counter").unwrap(), "stdout"));
    let before = lines();
    node.wait_until("the counter to go on", SOON, || Ok(lines() > before)).unwrap();
    pod.remove().unwrap();
}
