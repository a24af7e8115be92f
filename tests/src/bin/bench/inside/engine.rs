//! This project's shim, asked over its control socket.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use agentcube_control::{Client, Container, Depth as WireDepth, Timeouts, Transition, socket};
use agentcube_tests::node::Runtime;
use anyhow::{Context as _, Result, ensure};

use super::agent::{self, Place};
use super::sleeper::{Sleeper, Slept};
use crate::plan::{Depth, Workload};

/// How long a shim may take to tell of a wake that is over.
const TOLD: Duration = Duration::from_secs(5);

/// An agent under this project's shim.
pub struct Engine {
    place: Place,
    runtime: tokio::runtime::Runtime,
    client: Client,
}

impl Engine {
    /// Starts an agent and connects to its shim.
    pub fn start(id: &str, workload: Workload, cpu_controller: bool) -> Result<Self> {
        let place = Place::for_ctr(id, workload)?;
        agent::start(&place, Runtime::Agentcube, cpu_controller)?;
        Self::of(place)
    }

    /// Connects to the shim of an agent that has started.
    pub fn of(place: Place) -> Result<Self> {
        let path = socket::path(Path::new(socket::DEFAULT_ROOT), "default", &place.id)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(Client::connect_path(&path, Timeouts::default()))?;
        Ok(Self { place, runtime, client })
    }

    /// All that the shim tells about the agent.
    pub fn status(&self) -> Result<Container> {
        Ok(self.runtime.block_on(self.client.status(&self.place.id))?)
    }

    /// Puts the agent to sleep at this depth and no other.
    pub fn sleep_at(&self, depth: Depth) -> Result<Transition> {
        let slept = only(self.runtime.block_on(self.client.sleep(&self.place.id, wire(depth)))?)?;
        ensure!(is_at(&slept, depth), "it sleeps {:?} where {depth} was asked for", slept.depth);
        Ok(slept)
    }

    /// The one wake that has followed `wakes` others, by whatever it was woken.
    pub fn woke_after(&self, wakes: u64) -> Result<Transition> {
        let begun = Instant::now();
        // A thawed agent can answer before its shim has taken note.
        while self.status()?.wakes == wakes && begun.elapsed() < TOLD {
            thread::sleep(Duration::from_millis(1));
        }
        let status = self.status()?;
        ensure!(status.wakes == wakes + 1, "the shim tells of {} wakes after {wakes}", status.wakes);
        status.last_wake.into_option().context("the shim tells nothing of the last wake")
    }
}

fn wire(depth: Depth) -> WireDepth {
    match depth {
        Depth::Frozen => WireDepth::DEPTH_FROZEN,
        Depth::Reclaimed => WireDepth::DEPTH_RECLAIMED,
        Depth::Checkpointed => WireDepth::DEPTH_CHECKPOINTED,
    }
}

/// Whether a sleep has reached this depth, or a wake left it.
pub fn is_at(transition: &Transition, depth: Depth) -> bool {
    transition.depth == wire(depth).into()
}

/// The only transition of a sandbox of one container, made by the shim's own engine and not by its fallback.
fn only(transitions: Vec<Transition>) -> Result<Transition> {
    let count = transitions.len();
    let transition = transitions.into_iter().next().filter(|_| count == 1);
    let transition =
        transition.with_context(|| format!("the shim tells of {count} transitions where one was due"))?;
    ensure!(transition.engine != "runc", "the shim fell back to runc's own checkpoint");
    Ok(transition)
}

impl Sleeper for Engine {
    fn place(&self) -> &Place {
        &self.place
    }

    fn sleep(&mut self) -> Result<Slept> {
        let slept = self.sleep_at(Depth::Checkpointed)?;
        Ok(Slept { total_us: slept.total_us, stopped_us: Some(slept.stopped_us) })
    }

    fn image(&mut self) -> Result<PathBuf> {
        Ok(self.status()?.image_dir.into())
    }

    fn traces(&mut self) -> Result<PathBuf> {
        self.image()
    }

    fn wakes_for_clients(&self) -> bool {
        true
    }

    fn wake(&mut self) -> Result<()> {
        only(self.runtime.block_on(self.client.wake(&self.place.id))?).map(drop)
    }

    fn tidy(&mut self) -> Result<()> {
        // The shim removes the image itself.
        Ok(())
    }

    fn delete(&mut self) -> Result<()> {
        agent::delete(&self.place)
    }
}
