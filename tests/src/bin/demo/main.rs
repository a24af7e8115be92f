//! The demo: an agent falls asleep and wakes on a real node, for somebody who has never heard of CRIU.
//!
//! Every claim that it prints it has checked; the first one that does not hold ends it with an error.

mod measure;
mod story;
mod voice;

use std::process::ExitCode;

use clap::Parser;

use crate::voice::Voice;

/// Shows an agent fall asleep and wake on a real container node, and measures it.
#[derive(Debug, Clone, Copy, Parser)]
#[command(name = "demo", version)]
struct Args {
    /// Memory that the agent holds besides its conversation, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=8192))]
    ballast_mib: u32,

    /// How often the agent falls asleep and wakes for the table of times
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    cycles: u32,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let mut voice = Voice::on_stdout();
    match story::tell(&mut voice, args.ballast_mib, args.cycles) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nThe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}
