//! The containerd shim `io.containerd.agentcube.v1`.

pub mod bundle;
pub mod container;
pub mod control;
pub mod controllers;
pub mod daemon;
pub mod error;
pub mod events;
pub mod files;
pub mod info;
pub mod io;
pub mod lifecycle;
pub mod limits;
pub mod logging;
pub mod oom;
pub mod options;
pub mod reaper;
pub mod reclaim;
pub mod rootfs;
pub mod runc;
pub mod runtime;
pub mod sandbox;
pub mod stats;
pub mod task;
pub mod traffic;
pub mod wake;
pub mod watch;
