//! Talking to CRIU: a session with one `criu swrk` process, the hooks it calls back, and its logs.

pub mod hooks;
pub mod log;
pub mod session;

pub use hooks::{Event, HookError, NoHooks, NotifyHooks};
/// The types of CRIU's own protocol.
pub use rust_criu::rust_criu_protobuf::rpc;
pub use session::{Error, Launch, Session};
