//! The containerd shim `io.containerd.agentcube.v1`.

pub mod bundle;
pub mod container;
pub mod control;
pub mod error;
pub mod events;
pub mod lifecycle;
pub mod runtime;
pub mod task;
