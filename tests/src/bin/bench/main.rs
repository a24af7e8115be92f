//! The benchmark: how fast an agent falls asleep and wakes, against what one would do without this project.
//!
//! It starts a node, runs itself there ([`inside`]), and makes a report of what that has measured.

mod goals;
mod guest;
mod inside;
mod outside;
mod plan;
mod plot;
mod plot_company;
mod readme;
mod record;
mod report;
mod results;
mod statistics;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

use crate::plan::Plan;

/// Measures sleeps and wakes on a container node of its own.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
struct Args {
    /// How much is measured
    #[arg(long, value_enum, default_value_t = Size::Full)]
    plan: Size,

    /// The folder for the report, the plots and the raw results; without it the report goes to the terminal alone
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// A text whose part between the markers of the benchmark is replaced by the main figures
    #[arg(long, value_name = "FILE", requires = "out")]
    readme: Option<PathBuf>,

    /// Makes the report again from raw results, without measuring
    #[arg(long, value_name = "JSON", requires = "out")]
    from: Option<PathBuf>,

    /// Fails when a goal is missed
    #[arg(long)]
    check: bool,

    /// At most so many cycles of everything, for a first look
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    cycles: Option<u32>,

    /// The parts of the run alone whose names contain this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,

    /// Measure in a virtual machine, which has every controller of cgroup v2
    #[arg(long = "virtual")]
    in_virtual_machine: bool,

    #[command(subcommand)]
    inside: Option<Inside>,
}

/// How much is measured.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Size {
    /// All that the report shows, in about twenty minutes
    Full,
    /// What the goals need, in less than three minutes
    Quick,
    /// One cycle of everything: whether the benchmark itself works
    Tiny,
    /// What neighbours do to an agent, where every controller of cgroup v2 is there
    Neighbours,
}

#[derive(Debug, Subcommand)]
enum Inside {
    /// On the node
    #[command(hide = true)]
    Inside { plan: String },
    /// In the virtual machine
    #[command(hide = true)]
    Guest { plan: String },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match args.inside {
        Some(Inside::Inside { plan }) => inside::run(&plan).map(|()| true),
        Some(Inside::Guest { plan }) => guest::measure(&plan).map(|()| true),
        None => {
            let plan = match args.plan {
                Size::Full => Plan::full(),
                Size::Quick => Plan::quick(),
                Size::Tiny => Plan::tiny(),
                Size::Neighbours => Plan::neighbours(),
            };
            let plan = if let Some(cycles) = args.cycles { plan.with_at_most(cycles) } else { plan };
            let plan = if let Some(text) = &args.only { plan.with_only(text) } else { plan };
            let on = if args.in_virtual_machine { outside::On::Guest } else { outside::On::Here };
            let report = outside::Report { out: args.out, readme: args.readme, from: args.from, on };
            outside::run(plan, &report).map(|verdict| verdict.complete && (verdict.held || !args.check))
        }
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
