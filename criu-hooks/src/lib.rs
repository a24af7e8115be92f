//! The checkpoint engine: CRIU sessions and hooks, images on disk, preflight.
//!
//! Knows CRIU, OCI specs and cgroup v2; knows neither containerd nor Kubernetes.

pub mod cgroup;
pub mod container;
pub mod criu;
pub mod descriptors;
pub mod engine;
pub mod image;
pub mod inspect;
pub mod netns;
pub mod pager;
pub mod preflight;
pub mod procfs;
pub mod readiness;
pub mod spawn;
pub mod waits;
