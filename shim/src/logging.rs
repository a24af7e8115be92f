//! The shim's log, on its way to containerd's: logfmt lines into the FIFO `log` in the bundle.
//!
//! Nothing here ever waits or fails the shim. Both ends of the FIFO are held, so that containerd may go and come back;
//! while nobody reads and the FIFO is full, lines are dropped and counted.

use std::{
    fmt::Write as _,
    fs::{File, OpenOptions},
    io::Write as _,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    Layer,
    filter::{LevelFilter, Targets},
    layer::{Context, SubscriberExt},
    util::SubscriberInitExt,
};

/// Crates that say more than an operator wants to know, and how much of it is passed on.
const QUIET: [(&str, LevelFilter); 3] =
    [("ttrpc", LevelFilter::WARN), ("containerd_shim", LevelFilter::INFO), ("runc", LevelFilter::INFO)];

/// Sends all that the shim and its libraries log to the FIFO `log` in `bundle`, from `level` up. Without the FIFO
/// nothing is logged.
pub fn init(bundle: &Path, level: &str, namespace: &str, id: &str) {
    let Ok(pipe) = open(&bundle.join("log")) else { return };
    let level: LevelFilter = level.parse().unwrap_or(LevelFilter::INFO);
    let filter =
        Targets::new().with_default(level).with_targets(QUIET.map(|(name, most)| (name, most.min(level))));
    let lines = LogPipe { pipe, dropped: AtomicU64::new(0), shim: format!("{namespace}/{id}") };
    // Both fail only when a logger is set already.
    let _ = tracing_subscriber::registry().with(lines.with_filter(filter)).try_init();
    let _ = tracing_log::LogTracer::init();
}

fn open(path: &Path) -> std::io::Result<File> {
    // Opened for reading as well, a FIFO neither blocks the open nor breaks when its reader goes.
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    OpenOptions::new().read(true).write(true).custom_flags(nonblock).open(path)
}

struct LogPipe {
    pipe: File,
    dropped: AtomicU64,
    shim: String,
}

impl<S: Subscriber> Layer<S> for LogPipe {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let at = SystemTime::now();
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        let line = line(at, *event.metadata().level(), &self.shim, &fields, dropped);
        // One write of less than PIPE_BUF is whole or not at all.
        if (&self.pipe).write_all(line.as_bytes()).is_err() {
            self.dropped.fetch_add(dropped + 1, Ordering::Relaxed);
        }
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: String,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let value = format!("{value:?}");
        match field.name() {
            "message" => self.message = value,
            // Where a record of the crate `log` came from: of no use to an operator.
            name if name.starts_with("log.") => {}
            name => {
                let _ = write!(self.others, " {name}={}", quoted(&value));
            }
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

/// The longest line; a longer one is cut, because only short writes to a pipe are whole.
const MAX_LINE: usize = 4000;

fn line(at: SystemTime, level: Level, shim: &str, fields: &Fields, dropped: u64) -> String {
    let time = OffsetDateTime::from(at).format(&Rfc3339).unwrap_or_default();
    let level = match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    };
    let mut line =
        format!("time=\"{time}\" level={level} msg={}{}", quoted_always(&fields.message), fields.others);
    let _ = write!(line, " shim={}", quoted(shim));
    if dropped > 0 {
        let _ = write!(line, " dropped={dropped}");
    }
    if line.len() > MAX_LINE {
        let end = (0..=MAX_LINE).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
        line.truncate(end);
        line.push_str("…\"");
    }
    line.push('\n');
    line
}

fn quoted(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._/@^+:".contains(c);
    if !value.is_empty() && value.chars().all(plain) { value.to_owned() } else { quoted_always(value) }
}

fn quoted_always(value: &str) -> String {
    format!("{value:?}")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn fields(message: &str, others: &str) -> Fields {
        Fields { message: message.to_owned(), others: others.to_owned() }
    }

    #[test]
    fn a_line_is_what_containerds_own_shims_write() {
        let text =
            line(SystemTime::UNIX_EPOCH, Level::WARN, "k8s.io/abc", &fields("it \"fails\"", " id=c"), 0);
        assert_eq!(
            text,
            "time=\"1970-01-01T00:00:00Z\" level=warning msg=\"it \\\"fails\\\"\" id=c shim=k8s.io/abc\n"
        );
    }

    #[test]
    fn lines_stay_short_and_whole() {
        let text = line(SystemTime::UNIX_EPOCH, Level::INFO, "s", &fields(&"ä".repeat(5000), ""), 3);
        assert!(text.len() < 4096 && text.ends_with("…\"\n"), "{}", text.len());
        let injected = line(SystemTime::UNIX_EPOCH, Level::INFO, "s", &fields("a\nlevel=error", ""), 3);
        assert_eq!(injected.lines().count(), 1);
        assert!(injected.contains("dropped=3"));
    }

    #[test]
    fn a_full_pipe_drops_lines_and_never_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let pipe = LogPipe { pipe: open(&path).unwrap(), dropped: AtomicU64::new(0), shim: "s".into() };
        let subscriber = tracing_subscriber::registry().with(pipe);
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..10_000 {
                tracing::info!(id = "c", "a line");
            }
        });
    }
}
