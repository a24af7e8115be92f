use agentcube_control::labels;

use super::*;
use crate::cli::view::{Problem, Reason, Silent};

const NOW: i64 = 1_800_000_000_000;
const LONG_ID: &str = "4f0c6f6f7b8b2f7ab2c1e0cf2a5f4f0c6f6f7b8b2f7ab2c1e0cf2a5f4f0c6f6f";

fn agent() -> Container {
    Container {
        id: "demo".to_owned(),
        namespace: "default".to_owned(),
        state: "running",
        pid: 4711,
        memory_bytes: 281_438_290,
        memory_source: "pss".to_owned(),
        since_unix_ms: NOW - 12_000,
        shim_pid: 4700,
        bundle: "/run/containerd/io.containerd.runtime.v2.task/default/demo".to_owned(),
        socket: "/run/agentcube/default/demo.sock".to_owned(),
        ..Container::default()
    }
}

fn sleeping() -> Container {
    Container {
        state: "asleep",
        depth: Some("checkpointed"),
        memory_bytes: 0,
        image_bytes: 279_000_000,
        image_dir: Some("/var/lib/agentcube/default/demo/1".to_owned()),
        since_unix_ms: NOW - 200_000,
        sleeps: 3,
        wakes: 2,
        last_sleep: Some(transition()),
        last_wake: Some(Transition {
            total_us: 30_500,
            stopped_us: 0,
            at_unix_ms: NOW - 400_000,
            cause: Some("traffic".to_owned()),
            ..transition()
        }),
        ..agent()
    }
}

fn transition() -> Transition {
    Transition {
        id: "demo".to_owned(),
        depth: Some("checkpointed"),
        total_us: 141_230,
        stopped_us: 133_900,
        image_bytes: 279_000_000,
        engine: "direct".to_owned(),
        mode: "pod-namespaces".to_owned(),
        classic_because: String::new(),
        whole_because: String::new(),
        memory_bytes: 0,
        rest_because: String::new(),
        cause: None,
        shortfalls: Vec::new(),
        at_unix_ms: NOW - 200_000,
        memory_before_bytes: None,
        memory_after_bytes: None,
    }
}

fn in_pod(id: &str, pod: &str, container: Option<&str>) -> Container {
    let mut labels = vec![(labels::POD, pod), (labels::POD_NAMESPACE, "team-a")];
    labels.extend(container.map(|name| (labels::CONTAINER, name)));
    Container {
        id: id.to_owned(),
        namespace: "k8s.io".to_owned(),
        is_sandbox: container.is_none(),
        labels: labels.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        ..agent()
    }
}

fn listing(containers: Vec<Container>, unreachable: Vec<Silent>) -> Listing {
    Listing { containers, unreachable }
}

fn silent(name: &str) -> Silent {
    Silent {
        name: name.to_owned(),
        namespace: "k8s.io".to_owned(),
        socket: format!("/run/agentcube/k8s.io/{name}.sock"),
        error: Problem {
            kind: "timeout",
            message:
                "the shim on /run/agentcube/k8s.io/x.sock did not answer List within 2.0 s: look at its log"
                    .to_owned(),
        },
    }
}

#[test]
fn ps_without_names() {
    let text = ps(&listing(vec![agent(), sleeping()], vec![]), NOW);
    assert_eq!(
        text,
        "\
CONTAINER  NAMESPACE  STATE                  MEMORY     IMAGE      SINCE    PID   SLEEPS  LAST ERROR
demo       default    Running                268.4 MiB  -          12s ago  4711  0       -
demo       default    Asleep (checkpointed)  0 B        266.1 MiB  3m ago   4711  3       -
"
    );
}

#[test]
fn ps_of_pods_and_of_a_shim_that_does_not_answer() {
    let other = LONG_ID.replacen("4f0c6f6f7b8b", "4f0c6f6f7b8c", 1);
    let failed = Container {
        last_error: Some(
            "CRIU could not dump:\n\x1b[31manon_inode:[io_uring] is in use by process 4711 (python3)"
                .to_owned(),
        ),
        ..in_pod(&other, "web-0", Some("agent"))
    };
    let text =
        ps(&listing(vec![in_pod(LONG_ID, "web-0", None), failed], vec![silent(&"ab".repeat(32))]), NOW);
    assert_eq!(
        text,
        "\
CONTAINER     NAME                    NAMESPACE  STATE        MEMORY     IMAGE  SINCE    PID   SLEEPS  LAST ERROR
4f0c6f6f7b8b  team-a/web-0 (sandbox)  k8s.io     Running      268.4 MiB  -      12s ago  4711  0       -
4f0c6f6f7b8c  team-a/web-0/agent      k8s.io     Running      268.4 MiB  -      12s ago  4711  0       CRIU could not dump: ?[31manon_inode:[io_uring] is in use b…
abababababab  -                       k8s.io     Unreachable  -          -      -        -     -       the shim on /run/agentcube/k8s.io/x.sock did not answer Lis…
"
    );
}

#[test]
fn ps_of_nothing_says_how_to_start_something() {
    assert_eq!(
        ps(&listing(vec![], vec![]), NOW),
        "No containers. Start one with the runtime io.containerd.agentcube.v1.\n"
    );
}

#[test]
fn ids_that_start_alike_are_shown_longer() {
    let mut other = LONG_ID.to_owned();
    other.replace_range(15..16, "0");
    let ids = [LONG_ID, &other].into();
    assert_eq!(short_id(LONG_ID, &ids), "4f0c6f6f7b8b2f7a");
    assert_eq!(short_id(&other, &ids), "4f0c6f6f7b8b2f70");
    assert_eq!(short_id(LONG_ID, &[LONG_ID].into()), "4f0c6f6f7b8b");
}

#[test]
fn every_state_has_its_words() {
    let shown = ["created", "running", "paused", "falling-asleep", "asleep", "waking", "stopped", "unknown"]
        .map(|state_name| state(&Container { state: state_name, depth: Some("frozen"), ..agent() }));
    assert_eq!(
        shown,
        ["Created", "Running", "Paused", "Falling asleep", "Asleep (frozen)", "Waking", "Stopped", "Unknown"]
    );
}

#[test]
fn a_sleep_is_told_with_its_times_and_what_it_gave_back() {
    let with_memory =
        Transition { memory_before_bytes: Some(281_438_290), memory_after_bytes: Some(0), ..transition() };
    assert_eq!(
        slept(&with_memory),
        "demo: asleep (checkpointed) in 141.2 ms, stood still for 133.9 ms; freed 268.4 MiB; image 266.1 MiB\n"
    );
    let frozen =
        Transition { depth: Some("frozen"), total_us: 900, stopped_us: 800, image_bytes: 0, ..transition() };
    assert_eq!(slept(&frozen), "demo: asleep (frozen) in 0.90 ms, stood still for 0.80 ms\n");
}

#[test]
fn a_wake_is_told_with_its_time_and_what_it_holds() {
    let with_memory = Transition {
        total_us: 30_500,
        memory_before_bytes: Some(0),
        memory_after_bytes: Some(281_438_290),
        ..transition()
    };
    assert_eq!(
        woke(&with_memory),
        "demo: awake in 30.5 ms (was checkpointed); image 266.1 MiB; holds 268.4 MiB\n"
    );
    assert_eq!(was_awake("demo"), "demo: was awake already\n");
}

#[test]
fn inspect_tells_all_about_a_sleeping_agent() {
    let container = Container {
        sandbox_id: Some("pod".to_owned()),
        last_error: Some("the wake before failed: disk full".to_owned()),
        ..sleeping()
    };
    assert_eq!(
        inspect(&container, NOW),
        "\
Container:   demo
Namespace:   default
Sandbox:     pod
State:       Asleep (checkpointed), since 3m ago
PID:         4711 (before it slept)
Memory:      0 B (pss)
Image:       266.1 MiB in /var/lib/agentcube/default/demo/1
Sleeps:      3
Wakes:       2
Last sleep:  checkpointed, 141.2 ms in all, stood still for 133.9 ms, engine direct, 3m ago
Last wake:   checkpointed, 30.5 ms in all, engine direct, for traffic, 6m ago
Last error:  the wake before failed: disk full
Shim PID:    4700
Socket:      /run/agentcube/default/demo.sock
Bundle:      /run/containerd/io.containerd.runtime.v2.task/default/demo
"
    );
}

#[test]
fn inspect_of_a_pause_container_that_never_slept_leaves_out_what_it_has_not() {
    assert_eq!(
        inspect(&in_pod("pod", "web-0", None), NOW),
        "\
Container:   pod
Name:        team-a/web-0 (sandbox)
Namespace:   k8s.io
Sandbox:     this is the pause container
State:       Running, since 12s ago
PID:         4711
Memory:      268.4 MiB (pss)
Image:       -
Sleeps:      0
Wakes:       0
Shim PID:    4700
Socket:      /run/agentcube/default/demo.sock
Bundle:      /run/containerd/io.containerd.runtime.v2.task/default/demo
"
    );
}

#[test]
fn why_tells_reasons_line_by_line() {
    let reason = Reason { kind: "io-uring".to_owned(), text: "process 7 uses io_uring\u{1b}".to_owned() };
    let told = Why {
        deepest: Some("frozen"),
        reasons: vec![reason],
        doubts: vec!["process 8 watches files".to_owned()],
        closing: 2,
        next_timer_us: Some(1_500_000),
    };
    let text = why("a", &told);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "a: can sleep frozen");
    assert!(lines[1].starts_with("  not deeper, because process 7 uses io_uring"), "{text}");
    assert!(!text.contains('\u{1b}'));
    assert_eq!(
        lines[2..],
        [
            "  perhaps not: process 8 watches files",
            "  idle connections that would be closed: 2",
            "  a timer goes off in 1.50 s",
        ]
    );
    let nothing = Why {
        deepest: Some("checkpointed"),
        reasons: vec![],
        doubts: vec![],
        closing: 0,
        next_timer_us: None,
    };
    assert_eq!(why("a", &nothing), "a: can sleep checkpointed\n");
}

#[test]
fn probes_are_told_with_what_they_last_came_to() {
    let probe = |words: &[&str], exit_status, at_unix_ms| Probe {
        command: words.iter().map(ToString::to_string).collect(),
        exit_status,
        at_unix_ms,
    };
    let told = [probe(&["cat", "/a b"], Some(0), Some(NOW - 60_000)), probe(&["true\u{1b}"], None, None)];
    let text = probes("a", &told, NOW);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "a: exec probes");
    assert!(lines[1].starts_with("  [\"cat\", \"/a b\"]: ended with status 0 "), "{text}");
    assert!(lines[2].ends_with(": has not run yet") && !text.contains('\u{1b}'), "{text}");
    assert_eq!(probes("a", &[], NOW), "a: no exec probes\n");
}
