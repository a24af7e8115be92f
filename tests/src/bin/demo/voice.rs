//! How the demo speaks: plain text of at most 100 columns, with a little colour on a terminal.

use std::{
    fmt::Write as _,
    io::{IsTerminal as _, Write},
    time::Duration,
};

use anyhow::{Result, bail};

use agentcube_tests::memory::Memory;

use crate::measure::Spread;

const WIDTH: usize = 100;
const INDENT: usize = 3;
/// The first column of tables.
const LABEL: usize = 44;

/// Prints, and counts the claims that held.
pub struct Voice {
    out: Box<dyn Write>,
    colours: bool,
    chapters: u32,
    claims: u32,
    /// The last line was an empty one.
    gap: bool,
}

impl Voice {
    /// Speaks on standard output.
    pub fn on_stdout() -> Self {
        let stdout = std::io::stdout();
        let colours = stdout.is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { out: Box::new(stdout), colours, chapters: 0, claims: 0, gap: false }
    }

    /// How many claims held.
    pub fn claims(&self) -> u32 {
        self.claims
    }

    /// The title.
    pub fn title(&mut self, text: &str) {
        let line = "=".repeat(text.chars().count());
        let text = self.paint("1", text);
        self.gap();
        self.print(&format!("{text}\n{line}\n"));
        self.gap();
    }

    /// Begins a chapter.
    pub fn chapter(&mut self, text: &str) {
        self.chapters += 1;
        let text = self.paint("1;36", &format!("{}. {text}", self.chapters));
        self.gap();
        self.print(&format!("{text}\n"));
    }

    /// A paragraph.
    pub fn say(&mut self, text: &str) {
        self.print(&wrap(text, INDENT));
    }

    /// A command as one would type it, and what it printed.
    pub fn command(&mut self, line: &str, output: &str) {
        let line = self.paint("1", &format!("$ {line}"));
        self.gap();
        self.print(&(indented(&line) + &indented(output)));
        self.gap();
    }

    /// A table.
    pub fn table(&mut self, text: &str) {
        self.gap();
        self.print(&indented(text));
        self.gap();
    }

    /// Something somebody said.
    pub fn dialogue(&mut self, who: &str, text: &str) {
        self.print(&indented(&format!("{who:>5}: {text}")));
    }

    /// A claim that has been checked.
    ///
    /// # Errors
    /// When it does not hold.
    pub fn claim(&mut self, holds: bool, text: &str) -> Result<()> {
        if !holds {
            bail!("this does not hold: {text}");
        }
        self.held(text);
        Ok(())
    }

    /// A claim that held, because what comes before would have failed otherwise.
    pub fn held(&mut self, text: &str) {
        self.claims += 1;
        let text = wrap(text, INDENT + 4);
        let ok = self.paint("32", "ok");
        self.print(&format!("{:INDENT$}{ok}  {}\n", "", text.trim()));
    }

    /// One empty line, however often it is asked for.
    fn gap(&mut self) {
        if !self.gap {
            self.print("\n");
            self.gap = true;
        }
    }

    /// Whoever closes the other end of a pipe wants no more text; the demo still goes on to its end and cleans up.
    fn print(&mut self, text: &str) {
        self.gap = false;
        let _ = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

fn indented(text: &str) -> String {
    text.lines()
        .fold(String::new(), |indented, line| indented + format!("{:INDENT$}{line}", "").trim_end() + "\n")
}

/// Breaks a paragraph into lines of at most [`WIDTH`] columns.
fn wrap(text: &str, indent: usize) -> String {
    let mut wrapped = String::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        let longer = line.chars().count() + 1 + word.chars().count();
        if !line.is_empty() && indent + longer > WIDTH {
            let _ = writeln!(wrapped, "{:indent$}{line}", "");
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    let _ = writeln!(wrapped, "{:indent$}{line}", "");
    wrapped
}

/// A size in binary units.
#[allow(clippy::cast_precision_loss)] // One decimal is shown.
pub fn size(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if bytes == 0 { "0 MiB".to_owned() } else { format!("{mib:.1} MiB") }
}

/// A time.
pub fn time(duration: Duration) -> String {
    let ms = duration.as_secs_f64() * 1000.0;
    if ms < 9.995 {
        format!("{ms:.2} ms")
    } else if ms < 999.95 {
        format!("{ms:.1} ms")
    } else {
        format!("{:.2} s", ms / 1000.0)
    }
}

/// A table of times.
pub fn times(rows: &[(&str, Spread)]) -> String {
    let mut text = format!("{:LABEL$}{:>11}{:>11}{:>11}{:>7}\n", "", "min", "median", "max", "runs");
    for (label, spread) in rows {
        let _ = writeln!(
            text,
            "{label:LABEL$}{:>11}{:>11}{:>11}{:>7}",
            time(spread.min),
            time(spread.median),
            time(spread.max),
            spread.runs
        );
    }
    text
}

/// A table of memory.
pub fn memory(rows: &[(&str, Memory)]) -> String {
    let mut text = format!("{:LABEL$}{:>11}{:>11}{:>11}\n", "", "RSS", "PSS", "private");
    for (label, memory) in rows {
        let _ = writeln!(
            text,
            "{label:LABEL$}{:>11}{:>11}{:>11}",
            size(memory.rss),
            size(memory.pss),
            size(memory.private)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_are_broken_before_column_100() {
        let text = "word ".repeat(60);
        let wrapped = wrap(&text, 3);
        assert!(wrapped.lines().all(|line| line.chars().count() <= WIDTH && line.starts_with("   word")));
        assert_eq!(wrapped.split_whitespace().count(), 60);
        assert_eq!(wrap("short", 2), "  short\n");
    }

    #[test]
    fn tables_stand_in_columns() {
        let ms = Duration::from_millis;
        let spread = Spread { min: ms(9), median: ms(41), max: ms(1250), runs: 10 };
        assert_eq!(
            times(&[("waking", spread)]),
            "                                                    min     median        max   runs\n\
             waking                                          9.00 ms    41.0 ms     1.25 s     10\n"
        );
        let memory_of = Memory { rss: 7 << 20, pss: 5 << 19, private: 0 };
        assert_eq!(
            memory(&[("the shim", memory_of)]),
            "                                                    RSS        PSS    private\n\
             the shim                                        7.0 MiB    2.5 MiB      0 MiB\n"
        );
    }
}
