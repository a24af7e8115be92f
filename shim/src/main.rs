//! Entry point of `containerd-shim-agentcube-v1`.

use std::{io::Read, os::fd::AsFd, process::ExitCode};

use agentcube_shim::daemon::{self, Daemon};
use criu_hooks::pager;

fn main() -> ExitCode {
    // Neither of these is an action of containerd's nor in need of a runtime.
    match std::env::args_os().nth(1) {
        Some(action) if action == daemon::PAGER => match std::io::stdin().as_fd().try_clone_to_owned() {
            Ok(shim) => pager::run(shim),
            Err(_) => ExitCode::FAILURE,
        },
        Some(action) if action == daemon::PLACEHOLDER => {
            // Nothing is ever written there.
            let _ = std::io::stdin().read(&mut [0]);
            ExitCode::SUCCESS
        }
        _ => {
            serve();
            ExitCode::SUCCESS
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn serve() {
    containerd_shim::run::<Daemon>("io.containerd.agentcube.v1", Some(daemon::config())).await;
}
