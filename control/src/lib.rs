//! The protocol between a node's tools and its shims: messages, client, and where sockets live.
//!
//! A shim serves [`Control`] on a path socket of its own, see [`socket`] and [`server::serve`]. Tools find the
//! sockets with [`socket::discover`] and talk to one shim with a [`Client`], or to all of a node with
//! [`survey`](find::survey).

pub mod client;
pub mod error;
pub mod find;
pub mod labels;
pub mod server;
pub mod socket;

pub use client::{Client, ClientError, Timeouts};
pub use error::{Failure, Kind};
pub use proto::{
    control::{
        Container, Depth, ListRequest, ListResponse, ProbeCommand, ProbeCommands, ProbeResult, ProbesRequest,
        ProbesResponse, Reason, Shortfall, SleepRequest, SleepResponse, State, StatusRequest, StatusResponse,
        Transition, WakeRequest, WakeResponse, WhyRequest, WhyResponse,
    },
    control_ttrpc::{Control, create_control},
};

/// Messages, client and server, generated from `proto/control.proto`.
#[allow(
    missing_docs,
    warnings,
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks,
    clippy::unwrap_used
)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
}
