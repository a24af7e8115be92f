//! Entry point of `containerd-shim-agentcube-v1`.

use agentcube_shim::daemon::{self, Daemon};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    containerd_shim::run::<Daemon>("io.containerd.agentcube.v1", Some(daemon::config())).await;
}
