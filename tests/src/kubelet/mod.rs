//! A kubelet in miniature: it runs pods through the CRI of a node's containerd, and does to them all that a kubelet does
//! all the time.
//!
//! ```no_run
//! use agentcube_tests::images::Image;
//! use agentcube_tests::kubelet::{ContainerSpec, Kubelet, PodSpec, Probe, Result};
//! use agentcube_tests::node::{Node, NodeOptions, Runtime};
//!
//! fn run() -> Result<()> {
//!     let node = Node::start(NodeOptions::default())?;
//!     let kubelet = Kubelet::on(&node)?;
//!     let agent = ContainerSpec::new("agent", Image::Python).liveness(Probe::http(8080, "/health"));
//!     let pod = kubelet.run(PodSpec::new("assistant", Runtime::Agentcube).container(agent))?;
//!     let (_, report) = kubelet.attend(&[&pod], || std::thread::sleep(std::time::Duration::from_secs(30)));
//!     assert_eq!(report.restarts, 0);
//!     pod.remove()
//! }
//! ```

mod attend;
mod cri;
mod decide;
mod error;
mod grpc;
mod log;
mod pod;
mod probe;
mod spec;
mod stream;

use std::fs;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::images::Image;
use crate::node::{Node, Runtime};

pub use attend::Report;
pub use cri::{Cri, Streams};
pub use decide::{Seen, Step, backoff, garbage, step};
pub use error::{KubeletError, Result};
pub use grpc::Code;
pub use log::{Entry, lines, parse as parse_log};
pub use pod::Pod;
pub use probe::{Ask, Belief, Judge, Kind, Probe, USER_AGENT};
pub use spec::{ContainerSpec, PodSpec, RestartPolicy};
pub use stream::{Finished, Forward, Session};

/// The messages of the CRI, as its `.proto` file describes them.
#[allow(warnings, clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod api {
    include!(concat!(env!("OUT_DIR"), "/cri.rs"));
}

#[allow(warnings, clippy::all, clippy::pedantic, clippy::unwrap_used)]
mod health {
    include!(concat!(env!("OUT_DIR"), "/health.rs"));
}

/// containerd's namespace for all that comes through the CRI.
pub const NAMESPACE: &str = "k8s.io";

/// How long the runtime and the network may take to be ready.
const READY: Duration = Duration::from_secs(30);

/// A kubelet for one node.
#[derive(Debug)]
pub struct Kubelet<'node> {
    node: &'node Node,
    cri: Cri,
}

impl<'node> Kubelet<'node> {
    /// Prepares a node for pods and waits until its runtime is ready.
    ///
    /// # Errors
    /// When it does not become ready; the error says what is missing.
    pub fn on(node: &'node Node) -> Result<Self> {
        node.import(Image::Pause, NAMESPACE)?;
        // The bridge that the first pod would make, and the parent of the pods' cgroups: neither is ever removed.
        node.sh("ip link show cni0 >/dev/null 2>&1 || ip link add cni0 type bridge; mkdir -p /run/netns")?;
        make_cgroup(node, "/kubepods")?;
        let cri = Cri::of(node);
        let mut unready = Vec::new();
        node.wait_until("the runtime and its network to be ready", READY, || {
            unready = cri.unready().unwrap_or_else(|error| vec![error.to_string()]);
            Ok(unready.is_empty())
        })
        .map_err(|error| KubeletError::Pod {
            pod: "any".into(),
            reason: format!("{error}: {}", unready.join("; ")),
        })?;
        Ok(Self { node, cri })
    }

    /// The calls that it makes.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// Its node.
    pub fn node(&self) -> &'node Node {
        self.node
    }

    /// Runs a pod: its sandbox, its init containers one after the other, then all others.
    ///
    /// # Errors
    /// When something does not start, or an init container fails; what has begun is removed then.
    pub fn run(&self, spec: PodSpec) -> Result<Pod<'_>> {
        for container in spec.init.iter().chain(&spec.containers) {
            self.node.import(container.image, NAMESPACE)?;
        }
        let pod = Pod::begin(self, spec, uid())?;
        match pod.start_all() {
            Ok(()) => Ok(pod),
            Err(error) => {
                // What went wrong first is what the caller should read.
                let _ = pod.remove();
                Err(error)
            }
        }
    }

    /// Removes what garbage collection removes: containers that have been replaced, and images that none uses.
    ///
    /// # Errors
    /// When the runtime refuses.
    pub fn collect_garbage(&self) -> Result<()> {
        for id in garbage(&self.cri.list_containers()?) {
            self.cri.remove_container(&id)?;
        }
        let used: Vec<String> =
            self.cri.list_containers()?.into_iter().map(|container| container.image_id).collect();
        let mut unused = self.cri.list_images()?.into_iter().filter(|image| {
            !used.contains(&image.id) && !image.pinned && !image.repo_tags.iter().any(|tag| tag == PAUSE)
        });
        unused.try_for_each(|image| self.cri.remove_image(&image.id))?;
        self.node.forget_images(NAMESPACE);
        Ok(())
    }
}

/// The image of sandboxes, which none of the containers in a kubelet's list uses.
const PAUSE: &str = "localhost/pause:1";

/// The name by which a runtime is known in containerd's configuration.
fn handler(runtime: Runtime) -> &'static str {
    match runtime {
        Runtime::Runc => "runc",
        Runtime::Agentcube => "agentcube",
    }
}

/// An identity that no other pod of this process has.
fn uid() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(1);
    format!("00000000-0000-4000-8000-{:012}", COUNT.fetch_add(1, Ordering::Relaxed))
}

fn make_cgroup(node: &Node, path: &str) -> Result<()> {
    transport(fs::create_dir_all(node.cgroup(path)))
}

/// Gives failures of this machine the form of this module.
fn transport<T>(result: io::Result<T>) -> Result<T> {
    result.map_err(|error| KubeletError::transport("a call of this machine", &error))
}
