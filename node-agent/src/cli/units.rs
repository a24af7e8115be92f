//! Sizes and times for people.

/// Bytes in binary units: `0 B`, `12.0 KiB`, `268.4 MiB`.
#[allow(clippy::cast_precision_loss)] // One decimal is shown.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1024.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        // What would be shown as 1024.0 belongs to the next unit.
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// Microseconds: `0.42 ms`, `41.2 ms`, `1.25 s`.
#[allow(clippy::cast_precision_loss)] // Three digits are shown.
pub fn micros(us: u64) -> String {
    let ms = us as f64 / 1000.0;
    if us < 9_995 {
        format!("{ms:.2} ms")
    } else if us < 999_950 {
        format!("{ms:.1} ms")
    } else {
        format!("{:.2} s", ms / 1000.0)
    }
}

/// How long ago: `12s ago`, `3m ago`, `5h ago`, `2d ago`. Both in milliseconds since 1970; 0 means never.
pub fn ago(then_ms: i64, now_ms: i64) -> String {
    if then_ms == 0 {
        return "-".to_owned();
    }
    // Clocks that disagree by a little must not show a time in the future.
    let seconds = now_ms.saturating_sub(then_ms).max(0) / 1000;
    match seconds {
        0..60 => format!("{seconds}s ago"),
        60..3600 => format!("{}m ago", seconds / 60),
        3600..172_800 => format!("{}h ago", seconds / 3600),
        _ => format!("{}d ago", seconds / 86_400),
    }
}

/// A text on one line and without control characters: what a container says must not drive the terminal.
pub fn printable(text: &str) -> String {
    text.trim()
        .chars()
        .map(|c| match c {
            '\n' | '\r' | '\t' => ' ',
            c if c.is_control() => '?',
            c => c,
        })
        .collect()
}

/// A text of at most `max` characters; a longer one ends in `…`.
pub fn short(text: &str, max: usize) -> String {
    if text.chars().count() <= max {
        return text.to_owned();
    }
    let mut cut: String = text.chars().take(max.saturating_sub(1)).collect();
    cut.push('…');
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_in_the_largest_unit_that_fits() {
        let shown = [0, 1023, 1024, 1_048_524, 1_048_525, 281_438_290, 1 << 30, u64::MAX].map(bytes);
        assert_eq!(
            shown,
            ["0 B", "1023 B", "1.0 KiB", "1023.9 KiB", "1.0 MiB", "268.4 MiB", "1.0 GiB", "16777216.0 TiB"]
        );
    }

    #[test]
    fn times_are_shown_with_three_digits() {
        let shown = [0, 420, 9_994, 9_995, 41_230, 999_949, 999_950, 1_250_000, 120_000_000].map(micros);
        assert_eq!(
            shown,
            [
                "0.00 ms", "0.42 ms", "9.99 ms", "10.0 ms", "41.2 ms", "999.9 ms", "1.00 s", "1.25 s",
                "120.00 s"
            ]
        );
    }

    #[test]
    fn ages_are_rounded_down_and_never_negative() {
        let now = 1_800_000_000_000;
        let shown =
            [0, 59, 60, 3599, 3600, 172_799, 172_800, -5].map(|seconds| ago(now - seconds * 1000, now));
        assert_eq!(
            shown,
            ["0s ago", "59s ago", "1m ago", "59m ago", "1h ago", "47h ago", "2d ago", "0s ago"]
        );
        assert_eq!(ago(0, now), "-");
    }

    #[test]
    fn control_characters_are_not_printed() {
        assert_eq!(printable("a\nb\t\x1b[31mc\u{9b}d\r\n"), "a b ?[31mc?d");
    }

    #[test]
    fn long_texts_are_cut() {
        assert_eq!(short("abcdef", 6), "abcdef");
        assert_eq!(short("abcdefg", 6), "abcde…");
        assert_eq!(short("äöüäöüä", 6), "äöüäö…");
    }
}
