//! The protocol between a node's tools and its shims: messages, client, and where sockets live.

/// Messages, client and server, generated from `proto/control.proto`.
#[allow(
    warnings,
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks,
    clippy::unwrap_used
)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
}
