//! The command line `agentcube`: asks the shims of this node, over their control sockets.

mod act;
pub mod args;
mod render;
mod units;
mod view;

use std::{
    io::{self, Write},
    slice,
    time::{SystemTime, UNIX_EPOCH},
};

use agentcube_control::{Timeouts, find, socket::SocketError};
use serde::Serialize;

use self::{
    act::Action,
    args::{Args, Command, DepthArg},
    view::{Answer, Listing, Outcome, Outcomes, Problem, Result as Done},
};

/// Exit code: all was done.
pub const DONE: u8 = 0;
/// Exit code: something failed.
pub const FAILED: u8 = 1;
/// Exit code: no such container, and nothing else failed.
pub const NOT_FOUND: u8 = 3;

/// Runs a command; results go to `out`, errors to `err`. Returns the exit code.
pub async fn run(args: Args, out: &mut dyn Write, err: &mut dyn Write) -> u8 {
    match dispatch(&args, out, err).await {
        Ok(code) => code,
        // Who reads has seen enough: `agentcube ps | head -1`.
        Err(Fatal::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => DONE,
        Err(fatal) => {
            let _ = writeln!(err, "agentcube: {fatal}");
            FAILED
        }
    }
}

/// What ends the whole command.
#[derive(Debug, thiserror::Error)]
enum Fatal {
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

async fn dispatch(args: &Args, out: &mut dyn Write, err: &mut dyn Write) -> Result<u8, Fatal> {
    let (ids, action, timeouts): (&[String], _, _) = match &args.command {
        Command::Ps => return ps(args, out).await,
        Command::Inspect { ids } => (ids, Action::Inspect, Timeouts::default()),
        Command::Why { ids } => (ids, Action::Why, Timeouts::default()),
        Command::Sleep { ids, depth, or_shallower, patience } => {
            let action = Action::Sleep { depth: DepthArg::wanted(*depth), or_shallower: *or_shallower };
            (ids, action, patience.timeouts())
        }
        Command::Probes { id, commands, none } => {
            let all = commands.iter().map(|command| command.0.clone()).collect::<Vec<_>>();
            let commands = (*none || !all.is_empty()).then_some(all);
            (slice::from_ref(id), Action::Probes { commands }, Timeouts::default())
        }
        Command::Wake { ids, patience } => (ids, Action::Wake, patience.timeouts()),
    };
    each(args, ids, &action, timeouts, out, err).await
}

async fn ps(args: &Args, out: &mut dyn Write) -> Result<u8, Fatal> {
    let survey = find::survey(&args.socket_root, args.namespace.as_deref(), Timeouts::default()).await?;
    let listing = Listing::from(&survey);
    if args.json {
        write_json(out, &listing)?;
    } else {
        out.write_all(render::ps(&listing, now_ms()).as_bytes())?;
    }
    Ok(DONE)
}

/// Does something to each container asked for, to all at the same time, and tells of them in order.
async fn each(
    args: &Args,
    ids: &[String],
    action: &Action,
    timeouts: Timeouts,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<u8, Fatal> {
    let survey = find::survey(&args.socket_root, args.namespace.as_deref(), timeouts).await?;
    let mut outcomes = Vec::new();
    let mut problems = Vec::new();
    for work in act::start(&survey, ids, action, timeouts) {
        let outcome = work.outcome().await;
        match &outcome.answer {
            Answer::Ok(done) if !args.json => {
                let id = outcome.id.as_deref().unwrap_or(&outcome.requested);
                out.write_all(text(done, id).as_bytes())?;
                out.flush()?;
            }
            Answer::Ok(_) => (),
            Answer::Error(problem) => {
                writeln!(err, "agentcube: {}", complaint(action, &outcome, problem))?;
                problems.push(problem.kind);
            }
        }
        outcomes.push(outcome);
    }
    if args.json {
        write_json(out, &Outcomes { results: outcomes })?;
    }
    Ok(exit_code(&problems))
}

fn text(done: &Done, id: &str) -> String {
    match done {
        Done::Container(container) => render::inspect(container, now_ms()),
        Done::Slept(transitions) => transitions.iter().map(render::slept).collect(),
        Done::Woke(transitions) if transitions.is_empty() => render::was_awake(id),
        Done::Why(why) => render::why(id, why),
        Done::Probes(probes) => render::probes(id, probes, now_ms()),
        Done::Woke(transitions) => transitions.iter().map(render::woke).collect(),
    }
}

/// An error on one line: what failed, on what, why.
fn complaint(action: &Action, outcome: &Outcome, problem: &Problem) -> String {
    let id = units::printable(outcome.id.as_deref().unwrap_or(&outcome.requested));
    format!("cannot {}: {}", action.on(&id), units::printable(&problem.message))
}

fn exit_code(problems: &[&str]) -> u8 {
    match problems {
        [] => DONE,
        kinds if kinds.iter().all(|kind| *kind == "not-found") => NOT_FOUND,
        _ => FAILED,
    }
}

fn write_json(out: &mut dyn Write, value: &impl Serialize) -> Result<(), Fatal> {
    serde_json::to_writer_pretty(&mut *out, value).map_err(io::Error::from)?;
    out.write_all(b"\n")?;
    out.flush()?;
    Ok(())
}

/// Milliseconds since 1970; 0 on a machine whose clock is before that.
fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|elapsed| i64::try_from(elapsed.as_millis()).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_is_not_found_only_when_nothing_else_failed() {
        assert_eq!(exit_code(&[]), DONE);
        assert_eq!(exit_code(&["not-found", "not-found"]), NOT_FOUND);
        assert_eq!(exit_code(&["not-found", "timeout"]), FAILED);
        assert_eq!(exit_code(&["failed-precondition"]), FAILED);
    }
}
