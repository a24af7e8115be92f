//! The agents: what they run, how they are started, and whether they still know what they knew.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use agentcube_tests::images::Image;
use agentcube_tests::node::{self, AgentSpec, Net, Runtime};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{command, probe};
use crate::plan::Workload;

/// Where each agent listens, in a network namespace of its own.
pub const ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

/// A shell counts in memory, and a netcat waits with the next number for whoever asks.
const COUNTING: &str = "i=0; while :; do i=$((i+1)); \
     printf 'HTTP/1.1 200 OK\\r\\n\\r\\n{\"turn\": %s}' $i | busybox nc -l -p 8080; done";

/// How long an agent may take to answer.
const ANSWER: Duration = Duration::from_mins(1);

/// An agent to be started with `ctr`, in a pod's network namespace.
pub fn spec(workload: Workload, id: &str, runtime: Runtime) -> AgentSpec {
    let spec = match workload {
        Workload::Python(mib) => AgentSpec::new(Image::Python, id, runtime).env("BALLAST_MIB", &mib),
        Workload::Busybox => AgentSpec::new(Image::Counter, id, runtime).args(&["/bin/sh", "-c", COUNTING]),
    };
    // ctr always asks for a CPU weight, which runc cannot give where cgroup v2 lacks the controller.
    spec.net(Net::Pod).flag("--cpu-shares=0")
}

/// Where an agent is, whatever runs it.
#[derive(Debug)]
pub struct Place {
    /// The container's id.
    pub id: String,
    /// What it is.
    pub workload: Workload,
    /// Its network namespace.
    pub network: OwnedFd,
    /// Its cgroup.
    pub cgroup: PathBuf,
}

impl Place {
    /// Makes the network namespace; `cgroup` is the path in the OCI spec.
    pub fn prepare(id: &str, workload: Workload, cgroup: &str) -> Result<Self> {
        command::output(&["ip", "netns", "add", id])?;
        command::output(&["ip", "-n", id, "link", "set", "lo", "up"])?;
        let path = format!("/run/netns/{id}");
        let network = fs::File::open(&path).with_context(|| format!("opening {path}"))?.into();
        let cgroup = PathBuf::from(format!("/sys/fs/cgroup{cgroup}"));
        Ok(Self { id: id.to_owned(), workload, network, cgroup })
    }

    /// Makes the network namespace for a container that `ctr` starts.
    pub fn for_ctr(id: &str, workload: Workload) -> Result<Self> {
        Self::prepare(id, workload, &format!("/default/{id}"))
    }

    /// Removes the network namespace.
    pub fn remove(&self) -> Result<()> {
        command::output(&["ip", "netns", "delete", &self.id]).map(drop)
    }

    /// Asks for something and gives the body of the answer.
    pub fn ask(&self, method: &str, path: &str, body: &str) -> Result<String> {
        let stream = node::connect(&self.network, ADDRESS, ANSWER)?;
        let reply = node::request(stream, method, path, body)?;
        ensure!(reply.status == 200, "{} answers {method} {path} with {}", self.id, reply.status);
        Ok(reply.body)
    }
}

/// Starts a container with `ctr run`.
pub fn start(place: &Place, runtime: Runtime, cpu_controller: bool) -> Result<()> {
    start_as(&spec(place.workload, &place.id, runtime), cpu_controller)
}

/// Starts a container with `ctr run`, other than the workloads.
pub fn start_as(spec: &AgentSpec, cpu_controller: bool) -> Result<()> {
    if let Some((folder, _)) = spec.log().rsplit_once('/') {
        fs::create_dir_all(folder).with_context(|| format!("making {folder}"))?;
    }
    command::run(&spec.command_line(true, cpu_controller))
}

/// Deletes what [`start`] has started.
pub fn delete(place: &Place) -> Result<()> {
    command::output(&["ctr", "task", "delete", "--force", &place.id])?;
    command::output(&["ctr", "container", "delete", &place.id])?;
    place.remove()
}

/// What an agent must know after a wake.
#[derive(Debug, Default)]
pub struct Memory {
    turn: u64,
    /// Over all that a Python agent holds.
    digest: String,
}

impl Memory {
    /// Waits for an agent that has just started, and lets it say what it knows.
    pub fn of_new(place: &Place) -> Result<Self> {
        let answer = probe::first_answer(place, Duration::from_micros(200), Instant::now())?;
        let mut memory = Self { turn: turn(&answer.body)?, digest: String::new() };
        memory.go_on(place)?;
        Ok(memory)
    }

    /// Checks the first answer after a wake and then all else that the agent must know, and gives it something new to
    /// remember: with the image of an earlier sleep it would fail the next time.
    pub fn check(&mut self, place: &Place, first_answer: &str) -> Result<()> {
        let due = match place.workload {
            Workload::Busybox => self.turn + 1,
            Workload::Python(_) => self.turn,
        };
        let turn = turn(first_answer)?;
        ensure!(turn == due, "{} has lost its state: it answers turn {turn} where {due} was due", place.id);
        self.turn = turn;
        if let Workload::Python(_) = place.workload {
            let digest = place.ask("GET", "/digest", "")?;
            ensure!(digest == self.digest, "{} has lost its state: its memory has changed", place.id);
        }
        self.go_on(place)
    }

    fn go_on(&mut self, place: &Place) -> Result<()> {
        if let Workload::Python(_) = place.workload {
            let answer = place.ask("POST", "/chat", &format!("after turn {}", self.turn))?;
            let turn = turn(&answer)?;
            ensure!(turn == self.turn + 1, "{} counts turn {turn} after turn {}", place.id, self.turn);
            self.turn = turn;
            self.digest = place.ask("GET", "/digest", "")?;
        }
        Ok(())
    }
}

fn turn(answer: &str) -> Result<u64> {
    let value: Option<Value> = serde_json::from_str(answer).ok();
    value
        .and_then(|value| value["turn"].as_u64())
        .with_context(|| format!("an answer without a turn: {answer:?}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_turn_is_read_from_an_answer_and_nothing_else() {
        assert_eq!(turn(r#"{"turn": 7}"#).unwrap(), 7);
        for other in ["", "{}", "7", r#"{"turn": "7"}"#] {
            assert!(turn(other).is_err(), "{other}");
        }
    }
}
