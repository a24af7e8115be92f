//! The part of README that the benchmark writes.

/// What stands before that part.
pub const BEGIN: &str = "<!-- benchmark: written by make bench -->";
/// What stands after it.
pub const END: &str = "<!-- benchmark: end -->";

/// The text with other figures between its markers; nothing when it does not have exactly one pair of them.
pub fn with_figures(text: &str, figures: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (old, after) = rest.split_once(END)?;
    let more = [before, old, after].iter().any(|part| part.contains(BEGIN) || part.contains(END));
    (!more).then(|| format!("{before}{BEGIN}\n{}\n{END}{after}", figures.trim()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_markers_changes() {
        let text = format!("before\n{BEGIN}\nold\n{END}\nafter\n");
        let new = with_figures(&text, "new\n").unwrap();
        assert_eq!(new, format!("before\n{BEGIN}\nnew\n{END}\nafter\n"));
        assert_eq!(with_figures(&new, "new").unwrap(), new);
    }

    #[test]
    fn a_text_without_one_pair_of_markers_is_left_alone() {
        for text in ["", BEGIN, END, &format!("{END}{BEGIN}"), &format!("{BEGIN}{END}{BEGIN}{END}")] {
            assert_eq!(with_figures(text, "x"), None, "{text}");
        }
    }
}
