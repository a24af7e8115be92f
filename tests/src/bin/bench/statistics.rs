//! Percentiles.

/// How several measurements of the same thing lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// How many there were.
    pub count: usize,
    /// The smallest.
    pub min: u64,
    /// Half of them are not above this one.
    pub p50: u64,
    /// 95 in 100 are not above this one.
    pub p95: u64,
    /// 99 in 100 are not above this one; with fewer than 100 it is the largest.
    pub p99: u64,
    /// The largest.
    pub max: u64,
}

impl Summary {
    /// Of at least one measurement; nothing without any.
    pub fn of(values: impl IntoIterator<Item = u64>) -> Option<Self> {
        let mut values: Vec<u64> = values.into_iter().collect();
        values.sort_unstable();
        let (&min, &max) = (values.first()?, values.last()?);
        let at = |percent| values[rank(values.len(), percent) - 1];
        Some(Self { count: values.len(), min, p50: at(50), p95: at(95), p99: at(99), max })
    }
}

/// The nearest rank, from 1: the smallest one so that `percent` in 100 of `count` measurements are not above it. Every
/// percentile is thus one of the measurements, never a value in between that was not seen.
fn rank(count: usize, percent: usize) -> usize {
    (count * percent).div_ceil(100).clamp(1, count)
}

/// One part of another.
#[allow(clippy::cast_precision_loss)] // Times below 2^53 µs, sizes below 2^53 bytes.
pub fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measurements_whatever_their_order() {
        let summary = Summary::of((1..=100).rev()).unwrap();
        assert_eq!(summary, Summary { count: 100, min: 1, p50: 50, p95: 95, p99: 99, max: 100 });
        let summary = Summary::of((1..=20).map(|value| value * 10)).unwrap();
        assert_eq!(summary, Summary { count: 20, min: 10, p50: 100, p95: 190, p99: 200, max: 200 });
    }

    #[test]
    fn few_measurements_have_percentiles_too() {
        assert_eq!(Summary::of([]), None);
        assert_eq!(Summary::of([7]), Some(Summary { count: 1, min: 7, p50: 7, p95: 7, p99: 7, max: 7 }));
        let three = Summary::of([9, 1, 5]).unwrap();
        assert_eq!((three.p50, three.p95), (5, 9));
    }

    #[test]
    fn a_ratio_of_nothing_is_none() {
        assert_eq!(ratio(1, 4), Some(0.25));
        assert_eq!(ratio(1, 0), None);
    }
}
