//! Text for people, made from what shims answered. Pure: the time is an argument.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use agentcube_control::labels;

use super::{
    units::{ago, bytes, micros, printable, short},
    view::{Container, Listing, Probe, Transition, Why},
};

/// An id up to this long is shown whole; containerd's usual ids of 64 characters are cut.
const WHOLE_ID: usize = 24;
const SHORT_ID: usize = 12;
const MAX_NAME: usize = 48;
const MAX_ERROR: usize = 60;

/// The table of `agentcube ps`.
pub fn ps(listing: &Listing, now_ms: i64) -> String {
    if listing.containers.is_empty() && listing.unreachable.is_empty() {
        return "No containers. Start one with the runtime io.containerd.agentcube.v1.\n".to_owned();
    }
    let ids: BTreeSet<&str> = listing.containers.iter().map(|c| c.id.as_str()).collect();
    let mut rows = vec![row([
        "CONTAINER",
        "NAME",
        "NAMESPACE",
        "STATE",
        "MEMORY",
        "IMAGE",
        "SINCE",
        "PID",
        "SLEEPS",
        "LAST ERROR",
    ])];
    for container in &listing.containers {
        rows.push(row([
            short_id(&container.id, &ids),
            &dash(short(&name(container), MAX_NAME)),
            &printable(&container.namespace),
            &state(container),
            &bytes(container.memory_bytes),
            &image(container.image_bytes),
            &ago(container.since_unix_ms, now_ms),
            &container.pid.to_string(),
            &container.sleeps.to_string(),
            &dash(short(&printable(container.last_error.as_deref().unwrap_or_default()), MAX_ERROR)),
        ]));
    }
    for shim in &listing.unreachable {
        let id = cut_id(&shim.name).to_owned();
        let error = short(&printable(&shim.error.message), MAX_ERROR);
        rows.push(row([&id, "-", &shim.namespace, "Unreachable", "-", "-", "-", "-", "-", &error]));
    }
    // Names are CRI's: without them the column says nothing.
    if rows[1..].iter().all(|row| row[1] == "-") {
        for row in &mut rows {
            row.remove(1);
        }
    }
    table(&rows)
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

/// Columns two spaces apart; no spaces at the end of a line.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..columns)
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in rows {
        let line: Vec<String> =
            row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// The shortest start of an id, of 12 characters at least, that means no other of these.
fn short_id<'a>(id: &'a str, all: &BTreeSet<&str>) -> &'a str {
    if id.len() <= WHOLE_ID {
        return id;
    }
    (SHORT_ID..id.len())
        .filter_map(|length| id.get(..length))
        .find(|start| all.iter().filter(|other| other.starts_with(start)).count() == 1)
        .unwrap_or(id)
}

fn cut_id(id: &str) -> &str {
    if id.len() <= WHOLE_ID { id } else { id.get(..SHORT_ID).unwrap_or(id) }
}

/// POD/CONTAINER in Kubernetes, with the pod's namespace in front where it is not `default`.
fn name(container: &Container) -> String {
    let label = |key| container.labels.get(key).map(String::as_str).unwrap_or_default();
    let pod = label(labels::POD);
    if pod.is_empty() {
        return printable(label(labels::CONTAINER));
    }
    let mut name = String::new();
    match label(labels::POD_NAMESPACE) {
        "" | "default" => (),
        namespace => name = format!("{namespace}/"),
    }
    name.push_str(pod);
    match label(labels::CONTAINER) {
        "" if container.is_sandbox => name.push_str(" (sandbox)"),
        "" => (),
        container => name = format!("{name}/{container}"),
    }
    printable(&name)
}

/// What `agentcube why` says of one container.
pub fn why(id: &str, why: &Why) -> String {
    let mut text = format!("{}: can sleep {}\n", printable(id), why.deepest.unwrap_or("not at all"));
    for reason in &why.reasons {
        let _ = writeln!(text, "  not deeper, because {}", printable(&reason.text));
    }
    for doubt in &why.doubts {
        let _ = writeln!(text, "  perhaps not: {}", printable(doubt));
    }
    if why.closing > 0 {
        let _ = writeln!(text, "  idle connections that would be closed: {}", why.closing);
    }
    if let Some(next) = why.next_timer_us {
        let _ = writeln!(text, "  a timer goes off in {}", micros(next));
    }
    text
}

/// What `agentcube probes` says of one container.
pub fn probes(id: &str, probes: &[Probe], now_ms: i64) -> String {
    if probes.is_empty() {
        return format!("{}: no exec probes\n", printable(id));
    }
    let mut text = format!("{}: exec probes\n", printable(id));
    for probe in probes {
        let ended = match (probe.exit_status, probe.at_unix_ms) {
            (Some(status), Some(at)) => format!("ended with status {status} {}", ago(at, now_ms)),
            _ => "has not run yet".to_owned(),
        };
        let _ = writeln!(text, "  {}: {ended}", printable(&format!("{:?}", probe.command)));
    }
    text
}

fn dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

fn image(size: u64) -> String {
    if size == 0 { "-".to_owned() } else { bytes(size) }
}

fn state(container: &Container) -> String {
    let state = match container.state {
        "created" => "Created",
        "running" => "Running",
        "paused" => "Paused",
        "falling-asleep" => "Falling asleep",
        "asleep" => "Asleep",
        "waking" => "Waking",
        "stopped" => "Stopped",
        _ => "Unknown",
    };
    match container.depth {
        Some(depth) if container.state == "asleep" => format!("{state} ({depth})"),
        _ => state.to_owned(),
    }
}

/// What `agentcube sleep` says about one container.
pub fn slept(transition: &Transition) -> String {
    let mut line = format!(
        "{}: asleep ({}) in {}, stood still for {}",
        printable(&transition.id),
        transition.depth.unwrap_or("unknown depth"),
        micros(transition.total_us),
        micros(transition.stopped_us),
    );
    if let (Some(before), Some(after)) = (transition.memory_before_bytes, transition.memory_after_bytes) {
        let _ = write!(line, "; freed {}", bytes(before.saturating_sub(after)));
    }
    if transition.image_bytes > 0 {
        let _ = write!(line, "; image {}", bytes(transition.image_bytes));
    }
    line.push('\n');
    for shortfall in &transition.shortfalls {
        let depth = shortfall.depth.unwrap_or("deeper");
        let _ = writeln!(line, "  not {depth}: {}", printable(&shortfall.reason));
    }
    line
}

/// What `agentcube wake` says about one container.
pub fn woke(transition: &Transition) -> String {
    let mut line = format!(
        "{}: awake in {} (was {})",
        printable(&transition.id),
        micros(transition.total_us),
        transition.depth.unwrap_or("asleep"),
    );
    if transition.image_bytes > 0 {
        let _ = write!(line, "; image {}", bytes(transition.image_bytes));
    }
    if let Some(after) = transition.memory_after_bytes {
        let _ = write!(line, "; holds {}", bytes(after));
    }
    line.push('\n');
    line
}

/// What `agentcube wake` says when there was nothing to do.
pub fn was_awake(id: &str) -> String {
    format!("{id}: was awake already\n")
}

/// The block of `agentcube inspect`.
pub fn inspect(container: &Container, now_ms: i64) -> String {
    let asleep = container.state == "asleep";
    let label = |key| container.labels.get(key).map(|value| printable(value));
    let pid = match container.pid {
        0 => "-".to_owned(),
        pid if asleep && container.depth == Some("checkpointed") => format!("{pid} (before it slept)"),
        pid => pid.to_string(),
    };
    let image = match &container.image_dir {
        Some(dir) => format!("{} in {}", bytes(container.image_bytes), printable(dir)),
        None => "-".to_owned(),
    };
    let last = |transition: &Option<Transition>| transition.as_ref().map(|t| happened(t, now_ms));
    let sandbox = if container.is_sandbox {
        Some("this is the pause container".to_owned())
    } else {
        container.sandbox_id.clone()
    };
    let fields = [
        ("Container", Some(printable(&container.id))),
        ("Name", Some(name(container)).filter(|name| !name.is_empty())),
        ("Runs", label(labels::IMAGE)),
        ("Namespace", Some(printable(&container.namespace))),
        ("Sandbox", sandbox),
        ("State", Some(format!("{}, {}", state(container), since(container.since_unix_ms, now_ms)))),
        ("PID", Some(pid)),
        (
            "Memory",
            Some(format!("{} ({})", bytes(container.memory_bytes), printable(&container.memory_source))),
        ),
        ("Charged", Some(charged(&container.charged_bytes)).filter(|kinds| !kinds.is_empty())),
        ("Image", Some(image)),
        ("Sleeps", Some(container.sleeps.to_string())),
        ("Wakes", Some(container.wakes.to_string())),
        ("Last sleep", last(&container.last_sleep)),
        ("Last wake", last(&container.last_wake)),
        ("Last error", container.last_error.as_deref().map(printable)),
        ("Shim PID", Some(container.shim_pid.to_string())),
        ("Socket", Some(printable(&container.socket))),
        ("Bundle", Some(printable(&container.bundle))),
    ];
    let mut text = String::new();
    for (key, value) in fields {
        if let Some(value) = value {
            let _ = writeln!(text, "{:<12} {value}", format!("{key}:"));
        }
    }
    text
}

/// The largest first.
fn charged(kinds: &BTreeMap<String, u64>) -> String {
    let mut kinds: Vec<_> = kinds.iter().collect();
    kinds.sort_by_key(|(_, held)| Reverse(**held));
    let kinds = kinds.into_iter().map(|(name, held)| format!("{} {}", printable(name), bytes(*held)));
    kinds.collect::<Vec<_>>().join(", ")
}

fn since(then_ms: i64, now_ms: i64) -> String {
    match then_ms {
        0 => "since an unknown time".to_owned(),
        then => format!("since {}", ago(then, now_ms)),
    }
}

fn happened(transition: &Transition, now_ms: i64) -> String {
    let mut text =
        format!("{}, {} in all", transition.depth.unwrap_or("unknown depth"), micros(transition.total_us));
    if transition.stopped_us > 0 {
        let _ = write!(text, ", stood still for {}", micros(transition.stopped_us));
    }
    if !transition.engine.is_empty() {
        let _ = write!(text, ", engine {}", printable(&transition.engine));
    }
    if !transition.classic_because.is_empty() {
        let _ = write!(text, " in classic mode ({})", printable(&transition.classic_because));
    }
    if !transition.whole_because.is_empty() {
        let _ = write!(text, ", nothing written in advance ({})", printable(&transition.whole_because));
    }
    if transition.memory_bytes > 0 {
        let _ = write!(text, ", {} stayed in memory", bytes(transition.memory_bytes));
    }
    if !transition.rest_because.is_empty() {
        let _ = write!(text, ", the rest stays ({})", printable(&transition.rest_because));
    }
    if let Some(cause) = &transition.cause {
        let _ = write!(text, ", for {}", printable(cause));
    }
    let _ = write!(text, ", {}", ago(transition.at_unix_ms, now_ms));
    text
}

#[cfg(test)]
mod tests;
