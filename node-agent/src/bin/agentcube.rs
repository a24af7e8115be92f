//! The command line `agentcube`.

use std::process::ExitCode;

use agentcube_node::cli::{self, args::Args};
use clap::Parser as _;

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("agentcube: cannot start: {e}");
            return ExitCode::from(cli::FAILED);
        }
    };
    let status = runtime.block_on(cli::run(args, &mut std::io::stdout(), &mut std::io::stderr()));
    ExitCode::from(status)
}
