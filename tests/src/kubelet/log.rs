//! The log files of containers: lines of `TIME STREAM TAG TEXT`.

use super::error::{KubeletError, Result};

/// What a container wrote by one write, or a part of it when that was long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// When, in RFC 3339 with nanoseconds.
    pub time: String,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// Whether the line goes on in the stream's next entry.
    pub partial: bool,
    /// What, without the end of the line.
    pub text: String,
}

/// Reads a log file. Its last line may still be being written and is left out then.
///
/// # Errors
/// [`KubeletError::Log`].
pub fn parse(text: &str) -> Result<Vec<Entry>> {
    let Some(end) = text.rfind('\n') else { return Ok(Vec::new()) };
    text[..end]
        .split('\n')
        .map(|line| entry(line).ok_or_else(|| KubeletError::Log(line.to_owned())))
        .collect()
}

fn entry(line: &str) -> Option<Entry> {
    let mut fields = line.splitn(4, ' ');
    let time = fields.next().filter(|time| time.contains('T'))?.to_owned();
    let stream = fields.next().filter(|name| ["stdout", "stderr"].contains(name))?.to_owned();
    let tags = fields.next()?;
    let partial = match tags.split(':').next()? {
        "P" => true,
        "F" => false,
        _ => return None,
    };
    Some(Entry { time, stream, partial, text: fields.next()?.to_owned() })
}

/// The whole lines of one stream, their parts put together.
pub fn lines(entries: &[Entry], stream: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut begun = String::new();
    for entry in entries.iter().filter(|entry| entry.stream == stream) {
        begun.push_str(&entry.text);
        if !entry.partial {
            lines.push(std::mem::take(&mut begun));
        }
    }
    lines
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_line_are_put_together_and_streams_kept_apart() {
        let text = "2026-01-01T00:00:00.000000001Z stdout P one \n\
                    2026-01-01T00:00:00.000000002Z stderr F oh no\n\
                    2026-01-01T00:00:00.000000003Z stdout F line\n\
                    2026-01-01T00:00:00.000000004Z stdout F \n\
                    2026-01-01T00:00:00.00000";
        let entries = parse(text).unwrap();
        assert_eq!(entries.len(), 4);
        assert_eq!(lines(&entries, "stdout"), ["one line", ""]);
        assert_eq!(lines(&entries, "stderr"), ["oh no"]);
        assert!(parse("").unwrap().is_empty());
    }

    #[test]
    fn what_is_no_entry_is_refused() {
        for bad in ["x\n", "2026-01-01T00:00:00Z stdin F x\n", "2026-01-01T00:00:00Z stdout X x\n", "\n"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
