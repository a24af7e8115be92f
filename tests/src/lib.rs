//! The node harness: a whole container node (containerd, runc, CRIU) in namespaces of its own, for tests, the demo and the benchmark.
//!
//! ```no_run
//! use agentcube_tests::images::Image;
//! use agentcube_tests::node::{AgentSpec, Node, NodeOptions, Result, Runtime};
//!
//! fn talk() -> Result<()> {
//!     let node = Node::start(NodeOptions::default())?;
//!     let agent = node.run_agent(&AgentSpec::new(Image::Python, "a", Runtime::Agentcube).env("BALLAST_MIB", &16))?;
//!     agent.wait_healthy()?;
//!     println!("{}", agent.chat("Good morning")?.reply);
//!     agent.delete()
//! }
//! ```

pub mod cache;
pub mod cgroup;
mod debian;
pub mod host;
pub mod images;
pub mod kubelet;
pub mod memory;
pub mod node;
pub mod old_runc;
pub mod patience;
pub mod rootfs;
pub mod vm;

mod suite;

pub use suite::skipped;
