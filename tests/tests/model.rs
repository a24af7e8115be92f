//! A real container under random operations, compared with a model of what must be true of it.
//!
//! `AGENTCUBE_MODEL_SECONDS` sets how long (a minute when it is not set), `AGENTCUBE_MODEL_SEED` repeats a run:
//! ```text
//! AGENTCUBE_MODEL_SECONDS=600 cargo test --test model -- --nocapture
//! ```

#![allow(clippy::unwrap_used)]

mod sleeper;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use agentcube_tests::node::{Agent, Node, Output};
use serde_json::Value;
use sleeper::{SOON, agentcube, inspect, python, start};

/// How long it runs when nothing else is said.
const TIME: Duration = Duration::from_mins(1);
/// How many operations there are at least, however slow the machine is.
const LEAST: usize = 20;
/// How many ask at once in a burst.
const BURST: u64 = 8;

/// What is done to the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Sleep(&'static str),
    Deepest,
    Wake,
    Pause,
    Resume,
    Ask,
    Tell,
    /// Several that ask at the same time.
    Burst,
    Exec,
    Signal,
    /// Its end; another one is begun in its place.
    Kill,
    /// containerd ends and begins anew.
    Restart,
    /// A sleep and a request at the same time.
    Race(&'static str),
    /// A sleep and a wake at the same time.
    Quarrel(&'static str),
    /// A sleep and a command at the same time.
    ExecAmid(&'static str),
    /// A sleep and a signal at the same time.
    SignalAmid(&'static str),
    /// A sleep and the end at the same time.
    KillAmid(&'static str),
    /// A sleep, or a wake of one that sleeps, while containerd ends and begins anew.
    RestartAmid(&'static str),
}

const OPERATIONS: [Operation; 35] = [
    Operation::Sleep("frozen"),
    Operation::Sleep("frozen"),
    Operation::Sleep("reclaimed"),
    Operation::Sleep("reclaimed"),
    Operation::Sleep("checkpointed"),
    Operation::Sleep("checkpointed"),
    Operation::Deepest,
    Operation::Wake,
    Operation::Wake,
    Operation::Pause,
    Operation::Resume,
    Operation::Resume,
    Operation::Ask,
    Operation::Tell,
    Operation::Tell,
    Operation::Burst,
    Operation::Exec,
    Operation::Exec,
    Operation::Signal,
    Operation::Kill,
    Operation::Restart,
    Operation::Race("frozen"),
    Operation::Race("reclaimed"),
    Operation::Race("checkpointed"),
    Operation::Quarrel("frozen"),
    Operation::Quarrel("reclaimed"),
    Operation::Quarrel("checkpointed"),
    Operation::ExecAmid("frozen"),
    Operation::ExecAmid("checkpointed"),
    Operation::SignalAmid("frozen"),
    Operation::SignalAmid("checkpointed"),
    Operation::KillAmid("frozen"),
    Operation::KillAmid("checkpointed"),
    Operation::RestartAmid("frozen"),
    Operation::RestartAmid("checkpointed"),
];

/// From the shallowest to the deepest.
const DEPTHS: [&str; 3] = ["frozen", "reclaimed", "checkpointed"];

fn is_deeper(depth: &str, than: &str) -> bool {
    let place = |depth| DEPTHS.iter().position(|known| *known == depth);
    place(depth) > place(than)
}

/// What must be true of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Model {
    Awake,
    Asleep(&'static str),
    Paused,
}

/// Numbers that are the same each time for the same seed (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % below as u64).unwrap()
    }
}

struct Run<'node> {
    node: &'node Node,
    agent: Agent<'node>,
    model: Model,
    turns: u64,
    /// A client has paused it in its sleep: no traffic wakes it until another request does.
    deaf: bool,
    /// Whether there is anything to reclaim to.
    swap: bool,
    history: Vec<Operation>,
}

impl Run<'_> {
    fn sleep(&mut self, depth: &'static str, words: &[&str]) {
        let line: Vec<&str> = ["sleep", "a"].iter().chain(words).copied().collect();
        let slept = agentcube(self.node, &line);
        let possible = self.swap || depth != "reclaimed";
        let falls = match self.model {
            Model::Awake => possible,
            Model::Asleep(now) => possible && is_deeper(depth, now),
            Model::Paused => false,
        };
        self.expect(&slept, falls);
        if falls {
            self.model = Model::Asleep(depth);
        }
    }

    /// Something that needs the agent awake.
    fn needs(&mut self, output: &Output) {
        let paused = self.model == Model::Paused;
        self.expect(output, !paused);
        if !paused {
            self.model = Model::Awake;
        }
    }

    fn expect(&self, output: &Output, success: bool) {
        assert_eq!(output.status == 0, success, "{:?} after {:?}: {output:?}", self.model, self.history);
    }

    fn ctr(&self, words: &[&str]) -> Output {
        self.agent.ctr(words).unwrap()
    }

    fn perform(&mut self, operation: Operation) {
        self.history.push(operation);
        self.deaf &= self.model != Model::Awake;
        match operation {
            Operation::Sleep(depth) => self.sleep(depth, &["--depth", depth]),
            Operation::Deepest => self.sleep("checkpointed", &["--or-shallower"]),
            Operation::Wake => {
                let woke = agentcube(self.node, &["wake", "a"]);
                self.needs(&woke);
            }
            Operation::Pause => {
                self.expect(&self.ctr(&["task", "pause", "a"]), true);
                // A checkpointed agent sleeps on.
                self.deaf = matches!(self.model, Model::Asleep("checkpointed"));
                if !self.deaf {
                    self.model = Model::Paused;
                }
            }
            Operation::Resume => {
                let resumed = self.ctr(&["task", "resume", "a"]);
                self.expect(&resumed, self.model != Model::Awake);
                self.model = Model::Awake;
            }
            // A paused one does not answer.
            Operation::Ask | Operation::Tell | Operation::Burst
                if self.deaf || self.model == Model::Paused => {}
            Operation::Ask => {
                let turn =
                    self.agent.turn().unwrap_or_else(|error| panic!("{error} after {:?}", self.history));
                assert_eq!(turn, self.turns);
                self.model = Model::Awake;
            }
            Operation::Tell => {
                self.turns += 1;
                let told = self.agent.chat("remember this");
                let told = told.unwrap_or_else(|error| panic!("{error} after {:?}", self.history));
                assert_eq!(told.turn, self.turns);
                self.model = Model::Awake;
            }
            Operation::Burst => {
                self.turns += BURST;
                let ask = || self.agent.chat("one of many").unwrap().turn;
                let mut turns: Vec<u64> = std::thread::scope(|scope| {
                    let asked: Vec<_> = (0..BURST).map(|_| scope.spawn(ask)).collect();
                    asked.into_iter().map(|asked| asked.join().unwrap()).collect()
                });
                turns.sort_unstable();
                let expected: Vec<u64> = (self.turns - BURST + 1..=self.turns).collect();
                assert_eq!(turns, expected, "{:?}", self.history);
                self.model = Model::Awake;
            }
            Operation::Exec if self.model == Model::Paused => {}
            Operation::Exec => {
                let done = self.agent.exec(&["true"]).unwrap();
                self.needs(&done);
            }
            Operation::Signal if self.model == Model::Paused => {}
            Operation::Signal => {
                let sent = self.signal();
                self.needs(&sent);
            }
            Operation::Kill => self.kill(),
            Operation::Restart => self.node.restart_containerd().unwrap(),
            Operation::Race(depth) => self.race(depth),
            Operation::Quarrel(depth) => self.quarrel(depth),
            Operation::ExecAmid(depth) => self.exec_amid(depth),
            Operation::SignalAmid(depth) => self.signal_amid(depth),
            Operation::KillAmid(depth) => self.kill_amid(depth),
            Operation::RestartAmid(depth) => self.restart_amid(depth),
        }
    }

    fn kill(&mut self) {
        self.agent.kill("SIGKILL").unwrap();
        self.begin_anew();
    }

    /// Sees to it that the agent has been killed, and begins another.
    fn begin_anew(&mut self) {
        assert_eq!(self.agent.wait_and_delete(SOON).unwrap(), 137, "{:?}", self.history);
        self.agent = self.node.run_agent(&python("a")).unwrap();
        self.agent.wait_healthy().unwrap();
        (self.model, self.turns) = (Model::Awake, 0);
    }

    /// A signal that does nothing to the agent but has to reach it.
    fn signal(&self) -> Output {
        self.ctr(&["task", "kill", "--signal", "SIGCONT", "a"])
    }

    fn signal_amid(&mut self, depth: &'static str) {
        if self.model != Model::Awake {
            return;
        }
        let sent = std::thread::scope(|scope| {
            let sent = scope.spawn(|| self.signal());
            agentcube(self.node, &["sleep", "--depth", depth, "a"]);
            sent.join().unwrap()
        });
        sent.check().unwrap();
        self.follow();
    }

    fn exec_amid(&mut self, depth: &'static str) {
        if self.model != Model::Awake {
            return;
        }
        let done = std::thread::scope(|scope| {
            let done = scope.spawn(|| self.agent.exec(&["echo", "hello"]).unwrap());
            agentcube(self.node, &["sleep", "--depth", depth, "a"]);
            done.join().unwrap()
        });
        assert_eq!(done.check().unwrap(), "hello\n", "{:?}", self.history);
        self.follow();
    }

    fn kill_amid(&mut self, depth: &'static str) {
        std::thread::scope(|scope| {
            let killed = scope.spawn(|| self.agent.kill("SIGKILL").unwrap());
            // Either may be first.
            agentcube(self.node, &["sleep", "--depth", depth, "a"]);
            killed.join().unwrap();
        });
        self.begin_anew();
    }

    fn restart_amid(&mut self, depth: &'static str) {
        std::thread::scope(|scope| {
            let restarted = scope.spawn(|| self.node.restart_containerd().unwrap());
            match self.model {
                Model::Awake => self.sleep(depth, &["--depth", depth]),
                Model::Asleep(_) => {
                    let woke = agentcube(self.node, &["wake", "a"]);
                    self.needs(&woke);
                }
                Model::Paused => {}
            }
            restarted.join().unwrap();
        });
    }

    fn race(&mut self, depth: &'static str) {
        if self.model != Model::Awake {
            return;
        }
        self.turns += 1;
        let (turn, _) = std::thread::scope(|scope| {
            let asked = scope.spawn(|| self.agent.chat("in the middle of it").unwrap().turn);
            let slept = agentcube(self.node, &["sleep", "--depth", depth, "a"]);
            (asked.join().unwrap(), slept)
        });
        assert_eq!(turn, self.turns, "{:?}", self.history);
        self.follow();
    }

    fn quarrel(&mut self, depth: &'static str) {
        if self.model != Model::Awake {
            return;
        }
        std::thread::scope(|scope| {
            let woken = scope.spawn(|| agentcube(self.node, &["wake", "a"]));
            agentcube(self.node, &["sleep", "--depth", depth, "a"]);
            woken.join().unwrap();
        });
        self.follow();
    }

    /// After a race either outcome is right; it must be one of them, and it must stay.
    fn follow(&mut self) {
        let now = self.told();
        self.model = match (now["state"].as_str(), now["depth"].as_str()) {
            (Some("running"), _) => Model::Awake,
            (Some("asleep"), Some(depth)) => {
                Model::Asleep(DEPTHS.into_iter().find(|known| *known == depth).unwrap())
            }
            _ => panic!("after {:?}: {now:#}", self.history),
        };
    }

    fn told(&self) -> Value {
        inspect(self.node, "a")
    }

    fn check(&self) {
        let now = self.told();
        let expected = match self.model {
            Model::Awake => ("running", None),
            Model::Asleep(depth) => ("asleep", Some(depth)),
            Model::Paused => ("paused", None),
        };
        let found = (now["state"].as_str().unwrap(), now["depth"].as_str());
        assert_eq!(found, expected, "after {:?}: {now:#}", self.history);
        let (_, state) = self.agent.task().unwrap().expect("containerd has lost the task");
        let status = if matches!(self.model, Model::Paused) { "PAUSED" } else { "RUNNING" };
        assert_eq!(state, status, "after {:?}", self.history);
    }
}

#[test]
fn whatever_is_done_to_an_agent_in_whatever_order_it_is_as_its_model_and_forgets_nothing() {
    let node = start();
    let agent = node.run_agent(&python("a")).unwrap();
    agent.wait_healthy().unwrap();
    let number = |name| std::env::var(name).ok().and_then(|text: String| text.parse::<u64>().ok());
    let seed = number("AGENTCUBE_MODEL_SEED").unwrap_or_else(|| u64::from(std::process::id()) | 1);
    let time = number("AGENTCUBE_MODEL_SECONDS").map_or(TIME, Duration::from_secs);
    println!("AGENTCUBE_MODEL_SEED={seed}");
    let mut random = Random(seed);
    let swap = node.read_file("/proc/swaps").unwrap().lines().count() > 1;
    let mut run =
        Run { node: &node, agent, model: Model::Awake, turns: 0, deaf: false, swap, history: Vec::new() };
    let begun = Instant::now();
    while begun.elapsed() < time || run.history.len() < LEAST {
        run.perform(OPERATIONS[random.next(OPERATIONS.len())]);
        run.check();
    }
    // In the end it runs, and knows all that it was told.
    if matches!(run.model, Model::Paused) {
        run.perform(Operation::Resume);
    }
    run.perform(Operation::Wake);
    run.perform(Operation::Ask);
    let mut counts = BTreeMap::new();
    for operation in &run.history {
        *counts.entry(format!("{operation:?}")).or_insert(0) += 1;
    }
    println!("{} operations in {:?}: {counts:?}", run.history.len(), begun.elapsed());
}
