//! Kills for want of memory are told as such: to containerd's clients, and to CRI, which calls them OOMKilled.

use std::thread;
use std::time::Duration;

use agentcube_tests::kubelet::api::LinuxContainerResources;
use agentcube_tests::kubelet::{ContainerSpec, Kubelet, NAMESPACE, Pod, PodSpec, RestartPolicy, Seen};
use agentcube_tests::node::{Agent, Node, Runtime};
use serde_json::Value;

use crate::ballast::{has_swap, limit, node};
use crate::cycle::script;
use crate::events::Events;
use crate::{DEPTHS, SOON, asleep_at, depth, run};

/// On USR2 a child needs more memory than there is, on USR1 it itself does.
const GREEDY: &str = "eat='dd if=/dev/zero of=/dev/null bs=256M count=1'
trap '$eat; echo child $?' USR2
trap 'exec $eat' USR1
echo ready
while :; do sleep 100000 & wait $!; done";

/// What was told of a task: the OOM kills, and exits with their status.
fn told(events: &[Value]) -> Vec<String> {
    let words = events.iter().filter_map(|event| match event["topic"].as_str()? {
        "/tasks/oom" => Some("oom".to_owned()),
        "/tasks/exit" => Some(format!("exit {}", event["exit_status"])),
        _ => None,
    });
    words.collect()
}

fn greedy<'node>(node: &'node Node, id: &str, runtime: Runtime) -> Agent<'node> {
    let agent = run(node, &script(id, runtime, GREEDY));
    limit(node, &agent, "memory.max", &(32 << 20).to_string());
    limit(node, &agent, "memory.swap.max", &(8 << 20).to_string());
    agent
}

/// Has a child of it killed, and then the program itself; gives back what was told when.
fn starve(node: &Node, events: &Events, agent: &Agent) -> (Vec<String>, Vec<String>) {
    let runtime = agent.spec().runtime;
    agent.kill("SIGUSR2").unwrap();
    node.wait_until("the child to be killed", SOON, || Ok(agent.log()?.contains("child 137"))).unwrap();
    node.wait_until("that to be told", SOON, || Ok(!told(&events.of(agent.id())).is_empty())).unwrap();
    // Whatever is told too often is told now.
    thread::sleep(Duration::from_millis(300));
    let child = told(&events.of(agent.id()));
    if runtime == Runtime::Agentcube {
        assert_eq!(depth(node, agent), None);
    }
    agent.kill("SIGUSR1").unwrap();
    assert_eq!(agent.wait_and_delete(SOON).unwrap(), 137);
    (child, told(&events.to_the_end(node, agent.id(), runtime)))
}

#[test]
fn oom_kills_are_told_once_each_and_before_the_exit_that_they_cause_whatever_the_agent_slept() {
    let Some(node) = node().filter(|_| has_swap()) else { return };
    let events = Events::listen(node);
    for at in [None].into_iter().chain(DEPTHS.map(Some)) {
        let agent = greedy(node, at.unwrap_or("awake"), Runtime::Agentcube);
        if let Some(at) = at {
            asleep_at(node, &agent, at);
        }
        // The signal wakes it.
        let (child, all) = starve(node, &events, &agent);
        assert_eq!(child, ["oom"], "{at:?}");
        assert_eq!(all, ["oom", "oom", "exit 137"], "{at:?}");
    }
    // containerd's own runtime tells the same, in an order of its own.
    let agent = greedy(node, "runcs", Runtime::Runc);
    let (child, all) = starve(node, &events, &agent);
    println!("runc's shim told {child:?} of the child, {all:?} in all");
}

/// A pod of one greedy container, which may have 32 MiB and 8 MiB of swap.
fn greedy_pod<'node>(kubelet: &'node Kubelet<'node>, name: &str, runtime: Runtime) -> Pod<'node> {
    let agent = ContainerSpec::script("agent", GREEDY);
    let pod =
        kubelet.run(PodSpec::new(name, runtime).restart(RestartPolicy::Never).container(agent)).unwrap();
    let ready = || Ok(pod.log("agent").unwrap().iter().any(|entry| entry.text == "ready"));
    kubelet.node().wait_until("it to be ready", SOON, ready).unwrap();
    let limits = LinuxContainerResources {
        memory_limit_in_bytes: 32 << 20,
        memory_swap_limit_in_bytes: 40 << 20,
        ..Default::default()
    };
    pod.resize("agent", limits).unwrap();
    pod
}

#[test]
fn a_kubelet_is_told_of_oomkilled_at_once_before_and_after_a_sleep() {
    let Some(node) = node().filter(|_| has_swap()) else { return };
    let kubelet = Kubelet::on(node).unwrap();
    let pods = [("reference", Runtime::Runc), ("awake", Runtime::Agentcube), ("slept", Runtime::Agentcube)];
    for (name, runtime) in pods {
        let pod = greedy_pod(&kubelet, name, runtime);
        if name == "slept" {
            let words =
                ["agentcube", "--namespace", NAMESPACE, "sleep", "--depth", "checkpointed", pod.sandbox()];
            node.wait_until("the pod to sleep", SOON, || Ok(node.exec(&words)?.status == 0)).unwrap();
        }
        pod.exec("agent", &["/bin/sh", "-c", "kill -USR1 1"], SOON).unwrap();
        node.wait_until("its end", SOON, || Ok(matches!(pod.seen("agent").unwrap(), Seen::Exited(_))))
            .unwrap();
        let status = pod.status("agent").unwrap();
        match runtime {
            Runtime::Agentcube => {
                assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{name}");
            }
            // Its shim can tell of the kill after the exit, and then a kubelet may have looked already.
            Runtime::Runc => println!("with containerd's own shim: {} {}", status.exit_code, status.reason),
        }
        pod.remove().unwrap();
    }
}

#[test]
fn an_exec_that_is_killed_for_want_of_memory_ends_nothing_else() {
    let Some(node) = node().filter(|_| has_swap()) else { return };
    let kubelet = Kubelet::on(node).unwrap();
    let pod = greedy_pod(&kubelet, "execs", Runtime::Agentcube);
    for _ in 0..2 {
        let words = ["dd", "if=/dev/zero", "of=/dev/null", "bs=256M", "count=1"];
        assert_eq!(pod.exec("agent", &words, SOON).unwrap().exit_code, 137);
        assert_eq!(pod.seen("agent").unwrap(), Seen::Running);
        let words =
            ["agentcube", "--namespace", NAMESPACE, "sleep", "--depth", "checkpointed", pod.sandbox()];
        node.wait_until("the pod to sleep", SOON, || Ok(node.exec(&words)?.status == 0)).unwrap();
    }
    pod.remove().unwrap();
}
