//! This project's shim, asked over its control socket.

use std::path::{Path, PathBuf};

use agentcube_control::{Client, Container, Depth, Timeouts, Transition, socket};
use agentcube_tests::node::Runtime;
use anyhow::{Context as _, Result, ensure};

use super::agent::{self, Place};
use super::sleeper::{Sleeper, Slept};
use crate::plan::Workload;

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
        let path = socket::path(Path::new(socket::DEFAULT_ROOT), "default", id)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(Client::connect_path(&path, Timeouts::default()))?;
        Ok(Self { place, runtime, client })
    }

    /// All that the shim tells about the agent.
    pub fn status(&self) -> Result<Container> {
        Ok(self.runtime.block_on(self.client.status(&self.place.id))?)
    }
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
        let slept = self.client.sleep(&self.place.id, Depth::DEPTH_CHECKPOINTED);
        let slept = only(self.runtime.block_on(slept)?)?;
        Ok(Slept { total_us: slept.total_us, stopped_us: Some(slept.stopped_us) })
    }

    fn image(&mut self) -> Result<PathBuf> {
        Ok(self.status()?.image_dir.into())
    }

    fn traces(&mut self) -> Result<PathBuf> {
        self.image()
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
