//! Entry point of `containerd-shim-agentcube-v1`.

use std::{os::fd::AsFd, process::ExitCode};

use agentcube_shim::daemon::{self, Daemon};
use criu_hooks::pager;

fn main() -> ExitCode {
    // The pager is this program too, but neither an action of containerd's nor in need of a runtime.
    if std::env::args_os().nth(1).is_some_and(|action| action == daemon::PAGER) {
        return match std::io::stdin().as_fd().try_clone_to_owned() {
            Ok(shim) => pager::run(shim),
            Err(_) => ExitCode::FAILURE,
        };
    }
    serve();
    ExitCode::SUCCESS
}

#[tokio::main(flavor = "current_thread")]
async fn serve() {
    containerd_shim::run::<Daemon>("io.containerd.agentcube.v1", Some(daemon::config())).await;
}
