//! The part of the benchmark that runs on this machine: it starts the node, and makes reports of what comes back.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use agentcube_tests::images::Image;
use agentcube_tests::node::{Node, NodeOptions};
use anyhow::{Context as _, Result, bail};

use crate::goals::{self, Goal};
use crate::inside;
use crate::plan::{Plan, Subject};
use crate::results::Results;
use crate::{guest, plot, plot_company, readme, report};

/// Where this program goes on the node.
const PROGRAM: &str = "/usr/local/bin/agentcube-bench";

/// Where it is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// On a node of this machine.
    Here,
    /// On a node in a virtual machine.
    Guest,
}

/// What becomes of the results.
#[derive(Debug)]
pub struct Report {
    /// The folder for the report.
    pub out: Option<PathBuf>,
    /// The text whose marked part is replaced.
    pub readme: Option<PathBuf>,
    /// Raw results of an earlier run, in place of a new one.
    pub from: Option<PathBuf>,
    /// Where they come from.
    pub on: On,
}

/// How a run ended.
#[derive(Debug, Clone, Copy)]
pub struct Verdict {
    /// Whether everything of this project's was measured, with the right state after each wake.
    pub complete: bool,
    /// Whether all goals were reached.
    pub held: bool,
}

/// Runs a plan, or reads the results of an earlier run, and reports.
///
/// # Errors
/// When the node can't be had or the report can't be written.
pub fn run(plan: Plan, report: &Report) -> Result<Verdict> {
    let results = match &report.from {
        Some(path) => {
            let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
            serde_json::from_str(&text)
                .with_context(|| format!("{} is no result of a run", path.display()))?
        }
        None => Results {
            date: date(),
            commit: commit(),
            ..match report.on {
                On::Here => measure(plan)?,
                On::Guest => guest::run(&plan)?,
            }
        },
    };
    let goals = if results.plan.is_of_neighbours() { Vec::new() } else { goals::of(&results) };
    let text = report::markdown(&results, &goals);
    match &report.out {
        Some(folder) => write(&results, &goals, &text, folder, report.readme.as_deref())?,
        None => println!("{text}"),
    }
    for goal in &goals {
        println!("{goal}");
    }
    let failures: Vec<_> =
        results.failures().filter(|failure| failure.subject == Subject::Agentcube).collect();
    for failure in &failures {
        eprintln!("{} failed ({}): {}", failure.subject, failure.section, failure.why);
    }
    Ok(Verdict { complete: failures.is_empty() && results.done(), held: goals.iter().all(Goal::held) })
}

/// Runs a plan on a node of this machine. The results have no date, and of no commit.
///
/// # Errors
/// When the node can't be had, or nothing was measured.
pub fn measure(mut plan: Plan) -> Result<Results> {
    let program = std::env::current_exe().context("finding this program")?;
    // The images of sleeping agents are on disk, as on a real node.
    let options = NodeOptions { images_on_disk: true, ..NodeOptions::default() };
    let node = Node::start(NodeOptions { files: vec![(program, PROGRAM.into())], ..options })?;
    for image in [Image::Python, Image::Counter] {
        node.import(image, "default")?;
    }
    plan.cpu_controller = node.has_controller("cpu");
    eprintln!(
        "Measuring takes at most {} minutes. Other work on this machine makes the figures worse.",
        plan.seconds.div_ceil(60)
    );
    let text = serde_json::to_string(&plan).context("the plan")?;
    let status = node.command([PROGRAM, "inside", &text]).run_here()?;
    let records = node.read_file(inside::RECORDS)?;
    let results = Results::read(plan, String::new(), String::new(), build(), &records)?;
    if status != 0 {
        eprintln!("The run broke off with status {status}; what it has measured is in the report.");
    }
    if results.records.is_empty() {
        bail!("nothing was measured; the end of containerd's log:\n{}", node.containerd_log());
    }
    Ok(results)
}

fn date() -> String {
    time::OffsetDateTime::now_utc().date().to_string()
}

/// The commit of the source that was measured, as far as git knows it.
fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output =
            Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".into() };
    // Reports are written by the run itself and say nothing about what ran.
    let changed = git(&["status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs", ":!README.md"]);
    if changed.is_some_and(|changed| changed.is_empty()) { commit } else { format!("{commit}, with changes") }
}

/// The profile that this program, and with it the shim beside it, was built with.
fn build() -> String {
    if cfg!(debug_assertions) { "debug".into() } else { "release".into() }
}

fn write(results: &Results, goals: &[Goal], text: &str, folder: &Path, readme: Option<&Path>) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let put = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    };
    let name = if results.plan.is_of_neighbours() { "neighbours" } else { "results" };
    put(&format!("{name}.md"), text)?;
    put(&format!("{name}.json"), &results.to_json()?)?;
    for plot in plot::all(results) {
        put(plot.file, &plot.svg()?)?;
    }
    if let Some(svg) = plot_company::svg(results)? {
        put(plot_company::FILE, &svg)?;
    }
    if let Some(path) = readme {
        let old = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let new = readme::with_figures(&old, &report::summary(results, goals))
            .with_context(|| format!("{} has no markers of the benchmark", path.display()))?;
        fs::write(path, new).with_context(|| format!("writing {}", path.display()))?;
    }
    println!("The report is in {}.", folder.join(format!("{name}.md")).display());
    Ok(())
}
