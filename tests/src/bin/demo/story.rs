//! The story itself, in chapters.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use agentcube_control::{Client, Container, Depth, State, Timeouts, Transition, socket};
use agentcube_tests::{
    images::Image,
    memory::{self, Memory},
    node::{Agent, AgentSpec, Leftovers, Node, NodeOptions, Runtime},
};
use anyhow::{Context as _, Result, anyhow, ensure};

use crate::{
    measure::Spread,
    voice::{self, Voice, size, time},
};

/// The agent's name, and that of its container.
const NAME: &str = "demo";
/// How often a cold start is measured.
const COLD_STARTS: u32 = 3;
/// What an agent may hold beside its ballast, and what may be left of it asleep, in bytes.
const SMALL: u64 = 4 << 20;

/// Tells the story.
///
/// # Errors
/// When the node cannot be had, or a claim does not hold.
pub fn tell(voice: &mut Voice, ballast_mib: u32, cycles: u32) -> Result<()> {
    introduce(voice);
    let start = Instant::now();
    let node = start_node(voice)?;
    let told = Demo { node: &node, ballast_mib }.tell(voice, cycles);
    if told.is_err() {
        eprintln!("\nFrom containerd's log:\n{}", troubles(&node.containerd_log()));
    }
    told?;
    drop(node);
    let claims = voice.claims();
    let took = time(start.elapsed());
    voice.say(&format!("The node is gone again. All {claims} claims held; the whole demo took {took}."));
    Ok(())
}

/// The last lines of containerd's log that tell of trouble or come from the shim.
fn troubles(log: &str) -> String {
    let telling = |line: &&str| {
        let parts = ["level=warn", "level=error", "level=fatal", "agentcube"];
        parts.iter().any(|part| line.contains(part)) && !line.contains("starting cri plugin")
    };
    let lines: Vec<String> =
        log.lines().filter(telling).map(|line| line.chars().take(500).collect()).collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

fn introduce(voice: &mut Voice) {
    voice.title("AgentCube: an agent that is idle costs its machine almost nothing");
    voice.say(
        "An AI agent works in bursts, but it holds its memory all the time. Here one is put to sleep while nobody talks \
         to it: its memory is written to disk and given back, its processes are gone, and still its container counts as \
         running. The next message finds it as if it had never slept. The program in it knows nothing of all this.",
    );
}

fn start_node(voice: &mut Voice) -> Result<Node> {
    voice.chapter("A node");
    voice.say(
        "Starting a container node of its own: containerd and runc as on any server, and CRIU, which can write a running \
         process to disk and bring it back. The first time on a machine this downloads and unpacks a small Debian \
         system, which takes some minutes; after that it takes seconds.",
    );
    let start = Instant::now();
    let node = Node::start(NodeOptions::default())?;
    let took = start.elapsed();
    // Distributions append words of their own to versions.
    let versions = node.sh("(containerd --version | cut -d' ' -f3; runc --version | sed -n '1s/.* //p'; \
         criu --version | sed -n '1s/.* //p'; uname -r) | sed 's/[+-].*//'")?;
    let mut versions = versions.lines();
    let mut next = || versions.next().unwrap_or("?").to_owned();
    let text = format!("containerd {}, runc {}, CRIU {}, Linux {}", next(), next(), next(), next());
    voice.held(&format!("the node answers after {} ({text})", time(took)));
    Ok(node)
}

/// A node, and how large its agents are.
struct Demo<'node> {
    node: &'node Node,
    ballast_mib: u32,
}

/// The times of one sleep and the wake after it.
struct Cycle {
    asleep: Duration,
    stood_still: Duration,
    runs: Duration,
    answers: Duration,
}

impl Demo<'_> {
    fn tell(&self, voice: &mut Voice, cycles: u32) -> Result<()> {
        let before = self.node.snapshot();
        let agent = self.converse(voice)?;
        let digest = self.fall_asleep(voice, &agent)?;
        let shim = self.memory_of(self.control()?.status()?.shim_pid)?;
        self.wake(voice, &agent, &digest)?;
        self.measure_times(voice, &agent, cycles)?;
        self.compare_shims(voice, shim)?;

        voice.chapter("The end");
        agent.delete()?;
        self.wait_until_clean(&before)?;
        voice.held("the agent is deleted and has left nothing: no process, mount, cgroup, socket or image");
        Ok(())
    }

    fn spec(id: &str, runtime: Runtime, port: u16, ballast_mib: u32) -> AgentSpec {
        let spec = AgentSpec::new(Image::Python, id, runtime).port(port).env("BALLAST_MIB", &ballast_mib);
        // ctr always asks for a CPU weight, which runc cannot give where cgroup v2 lacks the controller.
        spec.flag("--cpu-shares=0")
    }

    fn ballast(&self) -> u64 {
        u64::from(self.ballast_mib) << 20
    }

    /// The agent's cgroup, where all of its processes are found.
    fn cgroup(&self) -> PathBuf {
        self.node.cgroup(&format!("/default/{NAME}"))
    }

    /// Waits until nothing is left of the demo's containers.
    fn wait_until_clean(&self, before: &Leftovers) -> Result<()> {
        // containerd, runc and shims keep one folder for each of containerd's namespaces once they have used it.
        let of_a_container = |(name, _): &(&String, &usize)| !name.ends_with("default");
        let start = Instant::now();
        loop {
            let Leftovers { mounts, cgroups, processes, sockets, files } =
                self.node.snapshot().added_since(before);
            let left: Vec<_> = [&mounts, &cgroups, &processes, &sockets, &files]
                .into_iter()
                .flat_map(|things| things.iter().filter(of_a_container).map(|(name, _)| name.as_str()))
                .collect();
            if left.is_empty() {
                return Ok(());
            }
            ensure!(
                start.elapsed() < Duration::from_secs(10),
                "the deleted agents have left behind: {}",
                left.join(", ")
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs the command line `agentcube` on the node, and shows it.
    fn agentcube(&self, voice: &mut Voice, words: &[&str]) -> Result<String> {
        let line: Vec<&str> = std::iter::once("agentcube").chain(words.iter().copied()).collect();
        let output = self.node.exec(&line)?.check()?;
        voice.command(&line.join(" "), &output);
        Ok(output)
    }

    fn control(&self) -> Result<Control> {
        Control::new(self.node)
    }

    fn converse(&self, voice: &mut Voice) -> Result<Agent<'_>> {
        voice.chapter("An agent");
        voice.say(&format!(
            "An HTTP server in Python that remembers a conversation, and holds {} MiB of random bytes besides, as an \
             agent would hold its model's context, caches and libraries. Nothing of it is on disk.",
            self.ballast_mib
        ));
        let agent = self.node.run_agent(&Self::spec(NAME, Runtime::Agentcube, 8080, self.ballast_mib))?;
        agent.wait_healthy()?;
        for (turn, text) in (1..).zip(["My name is Ada.", "I like trains.", "Remember that."]) {
            let answer = agent.chat(text)?;
            voice.dialogue("you", text);
            voice.dialogue("agent", &answer.reply);
            ensure!(answer.turn == turn, "the agent counts turn {} where {turn} was due", answer.turn);
        }
        self.agentcube(voice, &["ps"])?;
        Ok(agent)
    }

    /// Puts it to sleep; returns the digest over all that it held.
    fn fall_asleep(&self, voice: &mut Voice, agent: &Agent<'_>) -> Result<String> {
        voice.chapter("It falls asleep");
        let digest = agent.digest()?;
        let cgroup = self.cgroup();
        let processes = memory::processes(&cgroup)?;
        let before = memory::pss(&cgroup)?;
        voice.claim(
            before >= self.ballast() && before < self.ballast() + (64 << 20),
            &format!("awake it holds {} (proportional set size of its processes)", size(before)),
        )?;

        self.agentcube(voice, &["sleep", NAME])?;

        let gone = processes.iter().all(|pid| !PathBuf::from(format!("/proc/{pid}")).exists());
        voice.claim(gone && memory::processes(&cgroup)?.is_empty(), "its processes are gone")?;
        let after = memory::pss(&cgroup)?;
        voice.claim(
            after < SMALL,
            &format!("its memory is given back: {} before, {} now", size(before), size(after)),
        )?;
        let status = self.control()?.status()?;
        voice.claim(
            status.state.enum_value() == Ok(State::STATE_ASLEEP) && status.image_bytes > self.ballast(),
            &format!("its state is on disk: an image of {}", size(status.image_bytes)),
        )?;
        self.agentcube(voice, &["ps"])?;
        let list = agent.ctr(&["task", "ls"])?.check()?;
        voice.command("ctr task ls", &list);
        let running = agent.task()?.is_some_and(|(_, state)| state == "RUNNING");
        voice.claim(running, "containerd, and with it Kubernetes, still sees a running container")?;
        Ok(digest)
    }

    fn wake(&self, voice: &mut Voice, agent: &Agent<'_>, digest: &str) -> Result<()> {
        voice.chapter("It wakes");
        self.agentcube(voice, &["wake", NAME])?;
        voice.claim(
            agent.digest()? == digest,
            &format!(
                "all of its memory is as before, by a SHA-256 over {} MiB and the conversation",
                self.ballast_mib
            ),
        )?;
        let text = "What did I tell you?";
        let answer = agent.chat(text)?;
        voice.dialogue("you", text);
        voice.dialogue("agent", &answer.reply);
        voice.claim(answer.turn == 4, "the conversation goes on where it was: turn 4")
    }

    /// Measures sleeps and wakes beside cold starts of the same agent.
    fn measure_times(&self, voice: &mut Voice, agent: &Agent<'_>, cycles: u32) -> Result<()> {
        voice.chapter("How long it takes");
        voice.say(&format!(
            "The same {cycles} times over, and each time the next turn of the conversation and the digest are checked. \
             Beside it {COLD_STARTS} cold starts, which is what one would have to do without sleeping: a new container of \
             the same image, which has to fill its memory again, and has forgotten the conversation.",
        ));
        let control = self.control()?;
        let runs = (5..).take(cycles as usize).map(|turn| cycle(&control, agent, turn));
        let runs = runs.collect::<Result<Vec<Cycle>>>()?;
        let of = |time: fn(&Cycle) -> Duration| Spread::of(runs.iter().map(time).collect());
        let cold = self.cold_starts(self.ballast_mib)?;
        let empty = self.cold_starts(0)?;
        let answers = of(|run| run.answers)?;
        let table = [
            ("falling asleep", of(|run| run.asleep)?),
            ("  of this, the agent stands still", of(|run| run.stood_still)?),
            ("waking, until it runs", of(|run| run.runs)?),
            ("waking, until its first answer", answers),
            ("cold start, until its first answer", cold),
            ("  the same with 0 MiB to fill", empty),
        ];
        voice.table(&voice::times(&table));
        voice.say(
            "The image is still in the page cache here, as that of an agent that slept for some minutes would be; from a \
             cold disk a wake takes longer. Times of sleeps and wakes are the shim's own, from the request until it was \
             done; until the first answer is what the one who asked has seen, from asking for the wake to the answer over HTTP.",
        );
        voice.claim(
            answers.median < cold.median,
            &format!(
                "its first answer comes {} after the request where a cold start takes {}, and it has forgotten nothing",
                time(answers.median),
                time(cold.median)
            ),
        )
    }

    /// Times from the start of `ctr run` to the first answer, each of a container of its own.
    fn cold_starts(&self, ballast_mib: u32) -> Result<Spread> {
        let runs = (0..COLD_STARTS).map(|_| {
            let spec = Self::spec("cold", Runtime::Agentcube, 8081, ballast_mib);
            let start = Instant::now();
            let agent = self.node.run_agent(&spec)?;
            // Asked more often than wait_healthy does, whose pauses would count.
            while !agent.http("GET", "/health", "").is_ok_and(|reply| reply.status == 200) {
                ensure!(
                    start.elapsed() < Duration::from_mins(1),
                    "a cold start did not end; its log: {:?}",
                    agent.log()
                );
                std::thread::sleep(Duration::from_millis(1));
            }
            let took = start.elapsed();
            agent.delete()?;
            Ok(took)
        });
        Spread::of(runs.collect::<Result<_>>()?)
    }

    /// Memory of one process of the node.
    fn memory_of(&self, pid: u32) -> Result<Memory> {
        let path = format!("/proc/{pid}/smaps_rollup");
        Memory::parse(&self.node.read_file(&path)?).with_context(|| format!("{path} on the node"))
    }

    /// What stays in memory for each agent: its shim, beside containerd's own.
    fn compare_shims(&self, voice: &mut Voice, asleep: Memory) -> Result<()> {
        voice.chapter("What is left of it in memory");
        voice.say(
            "One process stays for each pod: its shim, which answers containerd while the agent sleeps, and wakes it. \
             Beside it the shim that containerd brings along for runc, with the same agent, which it cannot put to sleep.",
        );
        let agent = self.node.run_agent(&Self::spec("reference", Runtime::Runc, 8082, self.ballast_mib))?;
        agent.wait_healthy()?;
        let pid = self.node.exec(&["pgrep", "-f", "containerd-shim-runc-v2 .*-id reference"])?.check()?;
        let reference =
            self.memory_of(pid.trim().parse().context("the pid of containerd's shim for runc")?)?;
        let held = memory::pss(&self.node.cgroup("/default/reference"))?;
        agent.delete()?;
        let table = [
            ("agentcube, the agent asleep", asleep),
            ("containerd's for runc, the agent running", reference),
        ];
        voice.table(&voice::memory(&table));
        voice.claim(
            asleep.pss < reference.pss + held,
            &format!(
                "shim and agent together (PSS): {} asleep, {} running",
                size(asleep.pss),
                size(reference.pss + held)
            ),
        )
    }
}

/// The control socket of the agent's shim.
struct Control {
    runtime: tokio::runtime::Runtime,
    client: Client,
}

impl Control {
    fn new(node: &Node) -> Result<Self> {
        // Path sockets are reached through the node's root folder, whatever namespaces they were made in.
        let root = PathBuf::from(format!("/proc/{}/root{}", node.entrance().init, socket::DEFAULT_ROOT));
        let path = socket::path(&root, "default", NAME)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(Client::connect_path(&path, Timeouts::default()))?;
        Ok(Self { runtime, client })
    }

    fn status(&self) -> Result<Container> {
        Ok(self.runtime.block_on(self.client.status(NAME))?)
    }

    fn sleep(&self) -> Result<Transition> {
        only(self.runtime.block_on(self.client.sleep(NAME, Depth::DEPTH_CHECKPOINTED))?)
    }

    fn wake(&self) -> Result<Transition> {
        only(self.runtime.block_on(self.client.wake(NAME))?)
    }
}

fn only(transitions: Vec<Transition>) -> Result<Transition> {
    let [transition] = <[Transition; 1]>::try_from(transitions)
        .map_err(|all| anyhow!("the shim tells of {} transitions where one was due", all.len()))?;
    Ok(transition)
}

/// One sleep and the wake after it; the agent's next turn is `turn`.
fn cycle(control: &Control, agent: &Agent<'_>, turn: u64) -> Result<Cycle> {
    let digest = agent.digest()?;
    let slept = control.sleep().with_context(|| format!("falling asleep before turn {turn}"))?;
    let start = Instant::now();
    let woke = control.wake().with_context(|| format!("waking before turn {turn}"))?;
    let before = agent.turn()?;
    let answers = start.elapsed();
    ensure!(before + 1 == turn, "the agent forgot: it has had {before} turns, and {turn} is due");
    ensure!(agent.digest()? == digest, "the agent's memory has changed before turn {turn}");
    let answered = agent.chat(&format!("Turn {turn}?"))?.turn;
    ensure!(answered == turn, "the agent counts turn {answered} where {turn} was due");
    Ok(Cycle {
        asleep: Duration::from_micros(slept.total_us),
        stood_still: Duration::from_micros(slept.stopped_us),
        runs: Duration::from_micros(woke.total_us),
        answers,
    })
}
