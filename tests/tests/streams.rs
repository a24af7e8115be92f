//! What an agent prints, reads and shows on its terminal goes on over sleeps: nothing is lost, nothing comes twice.

#![allow(clippy::unwrap_used)]

mod cycle;

use std::thread;
use std::time::Duration;

use agentcube_tests::images::Image;
use agentcube_tests::node::{AgentSpec, Node, Runtime, Spawned};
use cycle::{
    SOON, agent, agentcube, assert_asleep, counted, counts_on, cycle, inspect, running, script, sleep,
    sleep_at, sleep_in_place, start, wake, wakes,
};
use rustix::process::Signal;

/// Prints the numbers up to one, several megabytes of them, as fast as they are taken.
const FLOOD: u32 = 1_000_000;

fn flood(id: &str) -> AgentSpec {
    script(id, Runtime::Agentcube, &format!("seq 1 {FLOOD}; while [ ! -e /go ]; do sleep 0.05; done"))
}

#[test]
fn a_log_has_no_gap_and_no_double_line_over_many_cycles() {
    let node = start();
    let counter = node.run_agent(&agent(Image::Counter, "c")).unwrap();
    for round in 0..12 {
        // At another point of the counter's 100 ms each time.
        thread::sleep(Duration::from_millis(round * 17));
        match round % 3 {
            2 => sleep_in_place(&node, &counter, "frozen"),
            _ => sleep_at(&node, &counter, "checkpointed"),
        }
        // A frozen counter may have woken for its timer.
        agentcube(&node, &counter, &["wake"]).unwrap();
    }
    counts_on(&node, &counter, 3);
}

#[test]
fn an_attached_reader_misses_nothing_and_sees_nothing_twice_over_many_cycles() {
    let node = start();
    let (counter, output) = node.run_attached(&agent(Image::Counter, "c")).unwrap();
    output.wait_for_output("a line", SOON, |text| text.contains('\n')).unwrap();
    for round in 0..12 {
        thread::sleep(Duration::from_millis(round * 17));
        cycle(&node, &counter);
    }
    let far = counted(&output.stdout());
    output.wait_for_output("more lines", SOON, |text| text.lines().count() > far + 3).unwrap();
    counted(&output.stdout());
}

#[test]
fn megabytes_in_flight_arrive_whole_in_a_log() {
    let node = start();
    // Timers that count would have it given time to come to a wait before each sleep.
    let spec = flood("f").annotation("agentcube.volcano.sh/timers", "resume");
    let agent = node.run_agent(&spec).unwrap();
    let mut cycles = 0;
    while counted(&agent.log().unwrap()) < FLOOD as usize {
        cycle(&node, &agent);
        cycles += 1;
        assert!(cycles < 500, "it does not get on: {} lines", agent.log().unwrap().lines().count());
    }
    assert!(cycles > 1, "it was over before it slept");
    assert_eq!(counted(&agent.log().unwrap()), FLOOD as usize);
}

#[test]
fn megabytes_in_flight_arrive_whole_at_a_slow_reader() {
    let node = start();
    let (agent, output) = node.run_attached(&flood("f")).unwrap();
    output.wait_for_output("the beginning", SOON, |text| text.lines().count() > 10).unwrap();
    for round in 1..=5 {
        // While the reader stands still the pipes fill up, and the agent stands in the middle of a write.
        output.signal(Signal::STOP).unwrap();
        let taken = output.stdout().len();
        thread::sleep(Duration::from_millis(150));
        sleep(&node, &agent);
        assert!(output.stdout().len() < taken + (1 << 20), "the reader did not stop");
        // ctr passes this signal on, which wakes the agent; but not in the first moments of its run.
        output.signal(Signal::CONT).unwrap();
        node.wait_until("it to wake", SOON, || {
            // Refused while it wakes, and nothing to do when it has.
            let _ = agentcube(&node, &agent, &["wake"]);
            Ok(wakes(&node, &agent) == round)
        })
        .unwrap();
    }
    output.wait_for_output("the end", SOON, |text| text.ends_with(&format!("\n{FLOOD}\n"))).unwrap();
    assert_eq!(counted(&output.stdout()), FLOOD as usize);
    agent.exec(&["touch", "/go"]).unwrap().check().unwrap();
    assert_eq!(output.wait(SOON).unwrap().status, 0);
}

/// Types a line at a shell, and waits for what it makes of it.
fn ask(shell: &Spawned, line: &str, answer: &str) {
    let before = shell.stdout().len();
    shell.write(format!("{line}\n")).unwrap();
    let shown = |text: &str| text.get(before..).is_some_and(|new| new.contains(answer));
    shell.wait_for_output(answer, SOON, shown).unwrap();
}

/// Asks a shell for the size of its terminal until it is this one.
fn has_size(node: &Node, shell: &Spawned, size: &str) {
    node.wait_until(&format!("the size {size}"), SOON, || {
        let before = shell.stdout().len();
        shell.write("stty size; echo as$((1))ked\n")?;
        let text = shell.wait_for_output("a size", SOON, |text| text[before..].contains("as1ked\r"))?;
        Ok(text[before..].contains(&format!("{size}\r")))
    })
    .unwrap();
}

#[test]
fn a_shell_keeps_its_terminal_its_history_and_its_variables() {
    let node = start();
    let (agent, shell) = node.run_attached(&agent(Image::Shell, "s").tty()).unwrap();
    shell.wait_for_output("a prompt", SOON, |text| text.contains("agent$ ")).unwrap();
    ask(&shell, "remembered=$((6 * 7))", "agent$ ");
    // ctr passes sizes on from some time after the prompt.
    node.wait_until("the size to be passed on", SOON, || {
        shell.resize(34, 99)?;
        shell.resize(33, 99)?;
        shell.write("stty size\n")?;
        thread::sleep(Duration::from_millis(200));
        Ok(shell.stdout().contains("33 99\r"))
    })
    .unwrap();

    cycle(&node, &agent);
    ask(&shell, "echo is=$remembered", "is=42\r");
    has_size(&node, &shell, "33 99");
    ask(&shell, "history", "remembered=$((6 * 7))\r");
    ask(&shell, "tty; jobs; echo still $-", "/dev/pts/0\r");

    // What is resized in its sleep has its size after the wake, and what is typed wakes it.
    sleep(&node, &agent);
    shell.resize(50, 120).unwrap();
    thread::sleep(Duration::from_millis(300));
    assert_asleep(&node, &agent);
    ask(&shell, "echo woken $((1 + 1))", "woken 2\r");
    assert_eq!(inspect(&node, &agent)["state"], "running");
    assert_eq!(wakes(&node, &agent), 2);
    has_size(&node, &shell, "50 120");
    // Ctrl-C reaches what runs in the foreground of the new terminal.
    shell.write("sleep 1000; echo interrupted=$?\n").unwrap();
    node.wait_until("the command", SOON, || Ok(agent.exec(&["ps"])?.stdout.contains("sleep 1000"))).unwrap();
    shell.write("\x03").unwrap();
    ask(&shell, "echo status=$?", "status=130\r");
    shell.write("exit 3\n").unwrap();
    assert_eq!(shell.wait(SOON).unwrap().status, 3);
}

#[test]
fn input_for_a_sleeping_agent_wakes_it_and_arrives_whole() {
    let node = start();
    // It says how many bytes it got, and the last of them, when its input has ended.
    let text = "echo ready; cat > /got; wc -c /got; tail -c 7 /got; exit 5";
    let (agent, mut client) = node.run_attached(&script("i", Runtime::Agentcube, text)).unwrap();
    client.wait_for_output("it to begin", SOON, |text| text.contains("ready")).unwrap();
    let mut input = String::new();
    for round in 1..=4 {
        match round {
            3 => sleep_in_place(&node, &agent, "frozen"),
            _ => sleep_at(&node, &agent, "checkpointed"),
        }
        // More than pipes hold.
        let part = format!("round {round} ").repeat(60_000);
        client.write(&part).unwrap();
        input.push_str(&part);
        node.wait_until("it to wake", SOON, || Ok(wakes(&node, &agent) == round)).unwrap();
        let all = input.len().to_string();
        node.wait_until("all input", SOON, || {
            Ok(agent.exec(&["wc", "-c", "/got"])?.stdout.starts_with(&all))
        })
        .unwrap();
    }
    assert_eq!(agent.exec(&["cat", "/got"]).unwrap().check().unwrap(), input);
    // The end of its input is input.
    sleep(&node, &agent);
    client.close_stdin();
    let ended = client.wait(SOON).unwrap();
    assert_eq!((ended.status, ended.stdout), (5, format!("ready\n{} /got\nound 4 ", input.len())));
}

#[test]
fn execs_have_terminals_and_input_before_and_after_a_sleep() {
    let node = start();
    let counter = node.run_agent(&agent(Image::Counter, "c")).unwrap();
    let execs = |round: u32| {
        let cat = counter.ctr_command(&[
            "task",
            "exec",
            "--exec-id",
            &format!("cat-{round}"),
            "c",
            "sh",
            "-c",
            "wc -c; exit 4",
        ]);
        let mut cat = cat.spawn().unwrap();
        cat.write("x".repeat(300_000)).unwrap();
        cat.close_stdin();
        let output = cat.wait(SOON).unwrap();
        assert_eq!((output.status, output.stdout.trim()), (4, "300000"), "{}", output.stderr);

        let line = ["task", "exec", "--tty", "--exec-id", &format!("tty-{round}"), "c", "/bin/sh"];
        let shell = counter.ctr_command(&line).terminal(31, 91).spawn().unwrap();
        has_size(&node, &shell, "31 91");
        ask(&shell, "tty", "/dev/pts/");
        // An exec that lives keeps the agent awake.
        let refused = agentcube(&node, &counter, &["sleep"]).unwrap_err();
        assert!(refused.contains("exec"), "{refused}");
        shell.write("exit 6\n").unwrap();
        assert_eq!(shell.wait(SOON).unwrap().status, 6);
    };
    execs(1);
    sleep(&node, &counter);
    execs(2);
    sleep(&node, &counter);
    wake(&node, &counter);
    execs(3);
    counts_on(&node, &counter, 1);
}

#[test]
fn logs_outlive_a_sigkill_of_containerd_awake_and_asleep() {
    let node = start();
    let counter = node.run_agent(&agent(Image::Counter, "c")).unwrap();
    counts_on(&node, &counter, 2);
    node.kill_containerd().unwrap();
    counts_on(&node, &counter, 4);
    node.start_containerd().unwrap();
    counts_on(&node, &counter, 2);

    let pid = running(&counter);
    sleep(&node, &counter);
    node.restart_containerd().unwrap();
    assert_eq!(running(&counter), pid);
    assert_asleep(&node, &counter);
    let asleep = counted(&counter.log().unwrap());
    wake(&node, &counter);
    assert!(counts_on(&node, &counter, 2) > asleep);
    // And while it has no containerd to tell, it can sleep and wake.
    node.kill_containerd().unwrap();
    cycle(&node, &counter);
    counts_on(&node, &counter, 2);
    node.start_containerd().unwrap();
    assert_eq!(counter.exec(&["echo", "hello"]).unwrap().stdout, "hello\n");
}

#[test]
fn a_reader_that_comes_after_a_restart_of_containerd_goes_on_where_the_last_one_ended() {
    let node = start();
    let (counter, first) = node.run_attached(&agent(Image::Counter, "c")).unwrap();
    first.wait_for_output("some lines", SOON, |text| text.lines().count() > 3).unwrap();
    for asleep in [false, true] {
        if asleep {
            sleep(&node, &counter);
        }
        node.restart_containerd().unwrap();
    }
    // The client has lost its containerd, and goes.
    let mut text = first.wait(SOON).unwrap().stdout;
    wake(&node, &counter);
    let second = counter.ctr_command(&["task", "attach", "c"]).spawn().unwrap();
    second.wait_for_output("some lines", SOON, |text| text.lines().count() > 5).unwrap();
    text.push_str(&second.stdout());
    assert!(counted(&text) > 8);
}
