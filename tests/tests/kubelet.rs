//! Pods through the CRI, as a kubelet runs them.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use agentcube_tests::images::Image;
use agentcube_tests::kubelet::{ContainerSpec, Kubelet, PodSpec, Streams, lines};
use agentcube_tests::node::{Node, NodeOptions, Runtime};
use agentcube_tests::runtime_tests;

const SHORT: Duration = Duration::from_secs(10);

runtime_tests!([runc, agentcube] a_pod_runs_and_leaves_nothing);

fn a_pod_runs_and_leaves_nothing(runtime: Runtime) {
    let node = Node::start(NodeOptions::default()).unwrap();
    let kubelet = Kubelet::on(&node).unwrap();
    let before = node.snapshot();
    let spec = PodSpec::new("plain", runtime)
        .init(ContainerSpec::script("first", "echo done"))
        .container(ContainerSpec::new("agent", Image::Python))
        .container(ContainerSpec::script("shell", "while read line; do echo got $line; done").stdin());
    let pod = kubelet.run(spec).unwrap();
    pod.wait_healthy(8080).unwrap();
    assert_eq!(lines(&pod.log("first").unwrap(), "stdout"), ["done"]);
    let done = pod.exec("agent", &["sh", "-c", "echo hello; exit 3"], SHORT).unwrap();
    assert_eq!((done.exit_code, done.stdout.as_slice()), (3, b"hello\n".as_slice()));
    let late = pod.exec("agent", &["sleep", "60"], Duration::from_secs(1)).unwrap_err();
    eprintln!("{late}");
    let session = pod.stream("agent", &["cat"], Streams { stdin: true, tty: false });
    let mut session = session.unwrap();
    session.send("abc\n").unwrap();
    session.read_until("abc").unwrap();
    drop(session);
    let finished = pod
        .stream("agent", &["sh", "-c", "echo a; echo b >&2; exit 4"], Streams::default())
        .unwrap()
        .finish()
        .unwrap();
    eprintln!("{finished:?}");
    let mut attached = pod.attach("shell", Streams { stdin: true, tty: false }).unwrap();
    attached.send("one\n").unwrap();
    attached.read_until("got one").unwrap();
    drop(attached);
    let mut forward = pod.forward(8080).unwrap();
    forward.send(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    eprintln!("{}", forward.read_to_end().unwrap());
    let ((), report) = kubelet.attend(&[&pod], || std::thread::sleep(Duration::from_secs(4)));
    eprintln!("{report:#?}");
    pod.remove().unwrap();
    node.wait_until_clean(&before, SHORT).unwrap();
}
