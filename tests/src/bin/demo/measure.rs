//! What the demo measures: times over several runs.

use std::time::Duration;

use anyhow::{Result, bail};

/// How several measurements of the same thing lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spread {
    /// The shortest.
    pub min: Duration,
    /// The middle one; of an even number the upper of the two in the middle.
    pub median: Duration,
    /// The longest.
    pub max: Duration,
    /// How many there were.
    pub runs: usize,
}

impl Spread {
    /// Of at least one measurement.
    ///
    /// # Errors
    /// When there is none.
    pub fn of(mut runs: Vec<Duration>) -> Result<Self> {
        runs.sort_unstable();
        let (Some(&min), Some(&max)) = (runs.first(), runs.last()) else {
            bail!("nothing was measured");
        };
        Ok(Self { min, median: runs[runs.len() / 2], max, runs: runs.len() })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one() {
        let ms = Duration::from_millis;
        let spread = Spread::of(vec![ms(5), ms(1), ms(3)]).unwrap();
        assert_eq!(spread, Spread { min: ms(1), median: ms(3), max: ms(5), runs: 3 });
        assert!(Spread::of(vec![]).is_err());
    }
}
