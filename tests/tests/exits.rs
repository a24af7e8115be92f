//! How agents end, and how their execs do, is told as containerd's own runtime tells it, sleep or no sleep.

#![allow(clippy::unwrap_used)]

mod cycle;
mod events;

use std::thread;
use std::time::{Duration, Instant};

use agentcube_tests::images::Image;
use agentcube_tests::node::{Agent, AgentSpec, Node, Runtime};
use containerd_shim::protos::api::{DeleteRequest, KillRequest, WaitRequest};
use containerd_shim::protos::ttrpc;
use cycle::{
    SOON, agent, agentcube, assert_asleep, counts_on, cycle, inspect, patience, running, script, shim, sleep,
    sleep_at, start, wake, wakes,
};
use events::Events;
use serde_json::Value;

/// Ends with 42 when it is told to, a moment later: whoever tells it has ended by then.
const CRASHES: &str = "while [ ! -e /go ]; do sleep 0.02; done; sleep 0.3; exit 42";

/// Takes its time over SIGTERM, says so, and then has a status of its own.
const HANDLES: &str = "trap 'for i in 1 2 3 4 5 6 7 8; do sleep 0.1; echo cleaning $i; done; exit 7' TERM
echo ready; while :; do sleep 0.02; done";

/// Does nothing about SIGTERM itself: what it runs gets the signal and dies of it, as below any small init.
const PASSES_ON: &str =
    "(while :; do sleep 0.05; done) & trap \"kill -TERM $!\" TERM; echo ready; wait $!; wait $!";

/// What brings a container to its end.
#[derive(Debug, Clone, Copy)]
enum End {
    Crash,
    Signal(&'static str),
}

/// What it has been through when its end comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Past {
    NeverSlept(Runtime),
    Woken,
    Asleep,
}

const PASTS: [Past; 4] =
    [Past::NeverSlept(Runtime::Runc), Past::NeverSlept(Runtime::Agentcube), Past::Woken, Past::Asleep];

/// Ends the script, whatever it has been through; gives back its exit status and what it printed, and how often it woke.
fn end(node: &Node, text: &str, end: End, past: Past) -> (i32, String, u64) {
    let runtime = if let Past::NeverSlept(runtime) = past { runtime } else { Runtime::Agentcube };
    let agent = node.run_agent(&script("x", runtime, &format!("echo begun; {text}"))).unwrap();
    let traps = if text == CRASHES { "begun" } else { "ready" };
    node.wait_until("it to begin", SOON, || Ok(agent.log()?.contains(traps))).unwrap();
    match past {
        Past::NeverSlept(_) => {}
        Past::Woken => cycle(node, &agent),
        Past::Asleep => sleep(node, &agent),
    }
    match end {
        End::Crash => drop(agent.exec(&["touch", "/go"]).unwrap().check().unwrap()),
        End::Signal(signal) => agent.kill(signal).unwrap(),
    }
    node.wait_until("it to end", SOON, || Ok(agent.task()?.unwrap().1 == "STOPPED")).unwrap();
    let woke = if runtime == Runtime::Agentcube { wakes(node, &agent) } else { 0 };
    let status = agent.wait_and_delete(SOON).unwrap();
    let log = agent.log().unwrap();
    node.sh("rm /var/log/agents/default-x.log").unwrap();
    (status, log, woke)
}

#[test]
fn the_status_of_a_crash_is_its_own() {
    let node = start();
    for past in PASTS {
        let (status, log, _) = end(&node, CRASHES, End::Crash, past);
        assert_eq!((status, log.as_str()), (42, "begun\n"), "{past:?}");
    }
}

#[test]
fn sigkill_ends_an_agent_with_137_and_wakes_none() {
    let node = start();
    for past in PASTS {
        let (status, _, woke) = end(&node, HANDLES, End::Signal("SIGKILL"), past);
        assert_eq!((status, woke), (137, u64::from(past == Past::Woken)), "{past:?}");
    }
}

#[test]
fn a_handler_of_sigterm_has_its_whole_grace_period_and_its_own_status() {
    let node = start();
    for past in PASTS {
        let (status, log, _) = end(&node, HANDLES, End::Signal("SIGTERM"), past);
        let cleaned = (1..=8).map(|step| format!("cleaning {step}\n")).collect::<Vec<_>>().concat();
        assert_eq!((status, log), (7, format!("begun\nready\n{cleaned}")), "{past:?}");
    }
}

#[test]
fn what_does_not_handle_sigterm_dies_of_it_with_143() {
    let node = start();
    for past in PASTS {
        let (status, _, _) = end(&node, PASSES_ON, End::Signal("SIGTERM"), past);
        assert_eq!(status, 143, "{past:?}");
    }
    // A first process dies of it only where it has the process ids of the node, and then sleeps frozen only.
    for asleep in [None, Some(false), Some(true)] {
        let runtime = if asleep.is_none() { Runtime::Runc } else { Runtime::Agentcube };
        let spec = script("x", runtime, "exec sleep 1000").flag("--with-ns=pid:/proc/1/ns/pid");
        let agent = node.run_agent(&spec).unwrap();
        if let Some(asleep) = asleep {
            sleep_at(&node, &agent, "frozen");
            if !asleep {
                wake(&node, &agent);
            }
        }
        agent.kill("SIGTERM").unwrap();
        assert_eq!(agent.wait_and_delete(SOON).unwrap(), 143, "{asleep:?}");
    }
}

#[test]
fn the_kernel_keeps_sigterm_from_a_first_process_without_handler_after_a_wake_too() {
    let node = start();
    for runtime in [Runtime::Runc, Runtime::Agentcube] {
        let text = "n=0; while :; do n=$((n + 1)); echo $n; sleep 0.05; done";
        let agent = node.run_agent(&script("x", runtime, text)).unwrap();
        counts_on(&node, &agent, 1);
        if runtime == Runtime::Agentcube {
            sleep(&node, &agent);
        }
        agent.kill("SIGTERM").unwrap();
        counts_on(&node, &agent, 5);
        agent.delete().unwrap();
        node.sh("rm /var/log/agents/default-x.log").unwrap();
    }
}

#[test]
fn clients_that_wait_get_the_same_status_over_sleeps() {
    let node = start();
    let (agent, attached) = node.run_attached(&script("x", Runtime::Agentcube, CRASHES)).unwrap();
    node.wait_until("the task", SOON, || Ok(agent.task()?.is_some_and(|(_, state)| state == "RUNNING")))
        .unwrap();
    let wait = || {
        let request = WaitRequest { id: "x".into(), ..Default::default() };
        shim(&node, &agent, async |task| task.wait(patience(), &request).await).unwrap().exit_status
    };
    thread::scope(|scope| {
        let early = scope.spawn(wait);
        sleep(&node, &agent);
        // One that begins to wait for a sleeping agent is not what wakes it.
        let late = scope.spawn(wait);
        thread::sleep(Duration::from_millis(500));
        assert_asleep(&node, &agent);
        assert!(!early.is_finished() && !late.is_finished());
        wake(&node, &agent);
        sleep(&node, &agent);
        agent.exec(&["touch", "/go"]).unwrap().check().unwrap();
        assert_eq!((early.join().unwrap(), late.join().unwrap()), (42, 42));
    });
    assert_eq!(attached.wait(SOON).unwrap().status, 42);
}

/// What an event says beside pids and times, in words that can be compared between runtimes.
fn gist(event: &Value) -> String {
    let topic = event["topic"].as_str().unwrap();
    match topic {
        "/tasks/exit" => format!("{topic} {} {}", event["id"], event["exit_status"]),
        "/tasks/exec-added" | "/tasks/exec-started" => format!("{topic} {}", event["exec_id"]),
        "/tasks/delete" => format!("{topic} {}", event["exit_status"]),
        _ => topic.to_owned(),
    }
}

#[test]
fn each_process_has_one_exit_event_and_sleeps_have_none() {
    let node = start();
    let events = Events::listen(&node);
    let live = |runtime: Runtime, id: &str| -> Vec<Value> {
        let sleeps = runtime == Runtime::Agentcube;
        let agent = node.run_agent(&script(id, runtime, CRASHES)).unwrap();
        let exec = |exec_id: &str, text: &str| {
            let status =
                agent.ctr(&["task", "exec", "--exec-id", exec_id, id, "sh", "-c", text]).unwrap().status;
            let last = || events.of(id).last().is_some_and(|event| event["topic"] == "/tasks/exit");
            node.wait_until("the exec's exit", SOON, || Ok(last())).unwrap();
            status
        };
        assert_eq!(exec("one", "exit 3"), 3);
        if sleeps {
            cycle(&node, &agent);
            sleep(&node, &agent);
        }
        assert_eq!(exec("two", "exit 0"), 0);
        if sleeps {
            cycle(&node, &agent);
        }
        agent.ctr(&["task", "pause", id]).unwrap().check().unwrap();
        agent.ctr(&["task", "resume", id]).unwrap().check().unwrap();
        if sleeps {
            sleep(&node, &agent);
            wake(&node, &agent);
        }
        let pid = running(&agent);
        assert_eq!(exec("three", "touch /go"), 0);
        assert_eq!(agent.wait_and_delete(SOON).unwrap(), 42);
        let all = events.to_the_end(&node, id, runtime);
        let exit = all.iter().rfind(|event| event["topic"] == "/tasks/exit").unwrap();
        assert_eq!(exit["pid"].as_u64(), Some(pid.into()), "{exit}");
        all
    };
    let normal = |events: Vec<Value>| events.iter().map(gist).collect::<Vec<_>>();
    let mut plain = normal(live(Runtime::Runc, "x"));
    plain.retain(|gist| !gist.starts_with("/tasks/delete"));
    plain.push("/tasks/delete 42".into());
    let slept = normal(live(Runtime::Agentcube, "y"));
    let renamed: Vec<_> = slept.iter().map(|gist| gist.replace("\"y\"", "\"x\"")).collect();
    assert_eq!(renamed, plain);
    // The reference itself is as expected: one exit for each of four processes.
    assert_eq!(plain.iter().filter(|gist| gist.starts_with("/tasks/exit")).count(), 4, "{plain:?}");
}

#[test]
fn an_agent_killed_in_its_sleep_has_one_exit_event() {
    let node = start();
    let events = Events::listen(&node);
    let agent = node.run_agent(&agent(Image::Counter, "x")).unwrap();
    cycle(&node, &agent);
    let pid = running(&agent);
    sleep(&node, &agent);
    agent.kill("SIGKILL").unwrap();
    assert_eq!(agent.wait_and_delete(SOON).unwrap(), 137);
    let all = events.to_the_end(&node, "x", Runtime::Agentcube);
    let gists: Vec<_> = all.iter().map(gist).collect();
    assert_eq!(gists, ["/tasks/create", "/tasks/start", "/tasks/exit \"x\" 137", "/tasks/delete 137"]);
    assert_eq!(all[2]["pid"].as_u64(), Some(pid.into()), "{all:?}");
}

#[test]
fn a_running_task_is_not_deleted_awake_or_asleep() {
    let node = start();
    let counter = node.run_agent(&agent(Image::Counter, "c")).unwrap();
    let refused = || {
        let ctr = counter.ctr(&["task", "delete", "c"]).unwrap();
        assert_ne!(ctr.status, 0);
        assert!(ctr.stderr.contains("must be stopped"), "{ctr:?}");
        // ctr asks for the state first; the shim itself must refuse, too.
        let request = DeleteRequest { id: "c".into(), ..Default::default() };
        let deleted = shim(&node, &counter, async |task| task.delete(patience(), &request).await);
        let Err(ttrpc::Error::RpcStatus(status)) = deleted else { panic!("{deleted:?}") };
        assert_eq!(status.code(), ttrpc::Code::FAILED_PRECONDITION, "{status:?}");
    };
    counts_on(&node, &counter, 1);
    refused();
    counts_on(&node, &counter, 1);
    sleep(&node, &counter);
    refused();
    assert_asleep(&node, &counter);
    wake(&node, &counter);
    counts_on(&node, &counter, 1);
}

#[test]
fn a_signal_of_zero_only_asks_and_wakes_none() {
    let node = start();
    let counter = node.run_agent(&agent(Image::Counter, "c")).unwrap();
    sleep(&node, &counter);
    let request = KillRequest { id: "c".into(), signal: 0, ..Default::default() };
    shim(&node, &counter, async |task| task.kill(patience(), &request).await).unwrap();
    assert_asleep(&node, &counter);
}

#[test]
fn an_exec_of_no_command_fails_as_with_runc_and_leaves_the_agent_alone() {
    let node = start();
    let fails = |agent: &Agent| {
        let failed = agent.exec(&["/no/such/command"]).unwrap();
        assert_ne!(failed.status, 0, "{failed:?}");
        let reason = failed.stderr.find("OCI runtime exec failed");
        failed.stderr[reason.unwrap_or_else(|| panic!("{failed:?}"))..].to_owned()
    };
    let plain = node.run_agent(&script("r", Runtime::Runc, CRASHES)).unwrap();
    let expected = fails(&plain);
    assert!(expected.contains("/no/such/command") && expected.contains("no such file"), "{expected:?}");

    let counter = node.run_agent(&agent(Image::Counter, "c")).unwrap();
    assert_eq!(fails(&counter), expected);
    counts_on(&node, &counter, 1);
    sleep(&node, &counter);
    assert_eq!(fails(&counter), expected);
    counts_on(&node, &counter, 1);
    // What never ran is not in the way of the next sleep.
    cycle(&node, &counter);
    counts_on(&node, &counter, 1);
}

#[test]
fn a_shim_ends_with_its_container_and_the_id_can_be_used_again_at_once() {
    let node = start();
    for round in 0..3 {
        let counter = node.run_agent(&agent(Image::Counter, "c")).unwrap();
        let shim = inspect(&node, &counter)["shim_pid"].as_u64().unwrap();
        sleep(&node, &counter);
        counter.delete().unwrap();
        if round == 2 {
            let gone =
                || node.exec(&["test", "-e", &format!("/proc/{shim}")]).map(|output| output.status == 1);
            node.wait_until("the shim to end", Duration::from_secs(5), gone).unwrap();
        }
    }
}

/// Rounds of the race; the exec starts at another point of the transition each time.
const ROUNDS: u32 = 14;
/// Rounds on a busy machine: as long as no sleep was complete before its exec, the exec starts later and later.
const MOST_ROUNDS: u32 = 5 * ROUNDS;

#[test]
fn an_exec_that_races_with_sleep_and_wake_succeeds_and_the_state_stays_whole() {
    let node = start();
    let spec: AgentSpec = agent(Image::Python, "a").env("BALLAST_MIB", &256);
    let agent = node.run_agent(&spec).unwrap();
    agent.wait_healthy().unwrap();
    assert_eq!(agent.chat("before").unwrap().turn, 1);

    let timed = |act: &dyn Fn()| {
        let begun = Instant::now();
        act();
        begun.elapsed()
    };
    let falling = timed(&|| sleep(&node, &agent));
    let waking = timed(&|| wake(&node, &agent));
    let digest = agent.digest().unwrap();

    let race = |verb: &str, after: Duration, round: u32| {
        let control = node.spawn(&["agentcube", "--json", verb, "a"]).unwrap();
        thread::sleep(after);
        let said = agent.exec(&["echo", &format!("round {round}")]).unwrap();
        assert_eq!((said.status, said.stdout), (0, format!("round {round}\n")), "{verb}: {}", said.stderr);
        control.wait(SOON).unwrap()
    };
    let (mut given_up, mut completed) = (0, 0);
    for round in 0..MOST_ROUNDS {
        if round >= ROUNDS && given_up > 0 && completed > 0 {
            break;
        }
        let slept = race("sleep", falling * round / ROUNDS, round);
        // It was given up for the exec, refused because of it, or complete before it.
        match slept.status {
            0 => completed += 1,
            _ if slept.stdout.contains("exec process(es) live") => {}
            _ => {
                assert!(slept.stdout.contains("aborted"), "{slept:?}");
                given_up += 1;
            }
        }
        assert_eq!(agent.digest().unwrap(), digest);

        node.wait_until("it to sleep", SOON, || Ok(agentcube(&node, &agent, &["sleep"]).is_ok())).unwrap();
        let woke = race("wake", waking * round / ROUNDS, round);
        // Asked for as such, a wake of what an exec is waking already is refused.
        assert!(woke.status == 0 || woke.stdout.contains("waking already"), "{woke:?}");
        assert_eq!(agent.digest().unwrap(), digest);
    }
    assert!(given_up > 0 && completed > 0, "no race: {given_up} sleeps given up, {completed} completed");
    assert!(inspect(&node, &agent)["last_error"].is_null());
    cycle(&node, &agent);
    assert_eq!(agent.digest().unwrap(), digest);
    assert_eq!(agent.chat("after").unwrap().turn, 2);
}
