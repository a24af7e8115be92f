//! The text around the tables: what ran on what, and what each figure covers.

use std::fmt::Write as _;

use super::size;
use crate::plot_company;
use crate::results::Results;

pub const WAKING: &str = "\
The image is in the page cache, where the sleep before has left it. `first byte` is from asking for the wake to the first byte of \
the answer over HTTP; `call` until the call (agentcube) or the command (runc, crun, ctr) came back; `resident` until the agent had \
answered and held 99 % of the anonymous memory that it held before (what takes longer than 10 s counts as 10 s); `CPU` is what the \
whole node used from asking until all of that. A cold start begins with `ctr run` and has to fill its memory again. `n` is the number \
of cycles.";

pub const SLEEPING: &str = "\
`total` is from asking until the agent slept: for agentcube as its shim reports it, for runc and crun from the start of the command to \
its end. `stands still` is the part of it from the freeze until the processes were gone, which the commands do not tell. `on disk` \
counts the blocks that the image's files occupy.";

pub const PARTS: &str = "\
Medians, by what CRIU tells in its statistics of each dump. `CRIU's other work` is the rest of the time in which it had the processes \
stopped: descriptors, namespaces, mounts, code put into processes. `before and after CRIU` is everything else: its start, the freeze, \
the runtime's own work and the end of the processes.";

pub const COLD: &str = "\
Before each wake the image's files are synced and dropped from the page cache; that they are gone is verified by samples. What lies \
below (the disk's own cache, that of a virtual machine's host) and the programs (CRIU, the runtime) are left as they are.";

pub const DEPTHS: &str = "\
One agent of this project's sleeps at each [depth](../depths.md) in turn and is woken in two ways. By a `request`: `call` is from asking on the \
control socket until the call came back; a client that connects after that has the `first byte`, counted from asking for the wake, too. By a `client` that nobody \
has announced: `connect` is its handshake with the sleeping agent, `first byte` that of the answer, both counted from its call of `connect`; a \
client that is refused or reset ends the run with an error. `falling asleep` is from asking until the call came back; `holds` is the proportional set size \
of the agent's processes while it sleeps.";

pub const AT_ONCE: &str = "\
All agents sleep; then each is woken by a thread of its own, all at the same moment. `all of them` is until the last one had answered.";

pub const SHIMS: &str = "\
The mean of one shim, with busybox agents, after a sleep and a wake of each for agentcube. A page that several processes map counts in part for \
each in PSS.";

pub const COMPANY: &str = "\
One agent of this project's answers over HTTP again and again, every 20 ms a client that connects anew, in different company on the same node. `first byte` \
is from connecting to the first byte of the answer. Every agent has the same CPU weight. Those that sleep are checkpointed; those that wake are put to sleep \
and woken again and again, each by a thread of its own, and each is checked after every wake; one that eats CPU has four busy loops, one that eats memory \
fills 320 MiB with a limit of 256 MiB again and again and so swaps without end, one that eats the disk writes 64 MiB and syncs again and again. The client \
itself has the largest CPU weight, so that its own waiting does not count.";

pub const BUSY: &str = "\
Two agents with four busy loops each share the processors by their weights: what the first one is promised and what it gets, before a sleep of both as images and after it.";

pub const NEIGHBOURS_TAIL: &str = "\
## How to measure it on real hardware

Without KVM the virtual machine is emulated: every time above is some ten to fifty times what the same machine takes itself, and says something beside the row \
`alone` only. On a node with every controller of cgroup v2 and swap, and no other work on it:

```
target/release/bench --plan neighbours --out docs/benchmarks
```

runs the same there, without a virtual machine. The weights of a real node stand in the cgroups of its pods; an agent's share follows from its CPU request. Disks share \
by weight only with the scheduler bfq or io.cost; `io.max` is what limits a neighbour on all others.
";

pub const TAIL: &str = "\
## What is compared

Every subject runs the same agents, with the OCI specification that containerd makes, on the same node, with images on the same file \
system, in network namespaces of their own that exist beforehand. One cycle of each subject follows another, and the order changes \
with each turn, so that what else happens on the machine meets all alike. One cycle of each before the first one is not counted.

- **agentcube**: containerd with this project's shim. The benchmark asks on the shim's control socket, as the node agent would, over \
a connection that exists. Taking the image away after a wake is part of the shim's work.
- **runc**, **crun**: `checkpoint` and `restore --detach` with `--image-path` and `--work-path`, with the same CRIU and a bundle made once; its root \
file system is an overlay as containerd's. Logs and bundles are in memory. The image is removed after the wake, off the clock.
- **cold start**: `ctr run --detach` with containerd's shim for runc, and a network namespace that is there already.

`python N MiB` is an HTTP server that remembers a conversation and holds N MiB of random bytes. `busybox` is a shell that counts in \
memory, and a netcat with the next number for whoever asks.

After every wake the first answer must have the right number of turns, and a SHA-256 over all that a Python agent holds must be the \
one from before the sleep; then the agent is told something new. A cycle in which that does not hold counts as a failure, not as a \
figure, and ends the run with an error.

- A client wakes an agent of this project's by itself. So that it is the request that is measured, the client of a wake by request begins when the call has \
come back; that of all others begins with the wake.
- The first byte is asked for over a new connection, again 0.2 ms after each refusal (with N agents at once: N times that). An \
attempt to connect is given up after 2 ms, because CRIU under runc drops packets for a while, and the kernel's own next attempt would come a second later.
- Memory is looked at every millisecond in `/proc/PID/statm`: resident without shared pages, because those of files come back when \
they are used, whoever restores them. Asking and looking take some hundredths of one CPU, from all subjects alike.
- CPU time is that of the node's cgroup (containerd, shims, CRIU, runc, agents) without the benchmark's own.
- Percentiles are the nearest rank, thus always a time that was measured; with n below 100, p99 is the largest.

## Again

`make bench` runs all of this (about twenty minutes on two cores) and writes this page, the plots and `results.json`, which has every \
single measurement. `make bench-quick` takes less than three minutes, writes nothing, and fails when a goal is missed.
";

/// The load, in hundredths, above which other work has had its part in the figures.
const BUSY_PERCENT: u64 = 100;

/// The title, what ran on what, and the plots.
pub fn head(results: &Results) -> String {
    let machine = results.machine();
    let of_neighbours = results.plan.is_of_neighbours();
    let title = if of_neighbours {
        "What neighbours do to an agent"
    } else {
        "How long agents take to fall asleep and wake"
    };
    let mut text = format!("# {title}\n\n");
    let programs: Vec<String> =
        machine.programs.iter().map(|(name, version)| format!("{name} {version}")).collect();
    // Writing to a string can't fail.
    let _ = write!(
        text,
        "{}, commit {}, {} build. {}, {} cores, {} of memory, Linux {}, {}; {}.\n\n",
        results.date,
        results.commit,
        results.build,
        machine.cpu,
        machine.cores,
        size(machine.memory),
        machine.kernel,
        machine.disk,
        programs.join(", ")
    );
    if machine.load_percent > BUSY_PERCENT {
        let _ = write!(
            text,
            "**The machine was busy with other work: {}.{:02} processes wanted a CPU in the minute before the run. Times say \
             little; CPU time, memory and what is on disk hold.**\n\n",
            machine.load_percent / 100,
            machine.load_percent % 100
        );
    }
    if !results.done() {
        text.push_str("**The run was ended before it had measured everything.**\n\n");
    }
    if of_neighbours {
        let _ = write!(
            text,
            "![The first byte of an agent's answer in different company]({})\n\n",
            plot_company::FILE
        );
        return text;
    }
    for (file, title) in [
        ("wake.svg", "From asking for a wake to the first byte of the answer"),
        ("resident.svg", "From asking for a wake until all memory is back"),
        ("sleep.svg", "Falling asleep"),
    ] {
        let _ = write!(text, "![{title}, by memory of the agent]({file})\n\n");
    }
    text
}
