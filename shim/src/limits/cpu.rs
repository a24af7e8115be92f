//! The controllers cpu and cpuset.

use oci_spec::runtime::LinuxCpu;

use super::{InForce, Setting, max_or, set};

pub(super) fn settings(cpu: &LinuxCpu, now: InForce<'_>, all: &mut Vec<Setting>) {
    if let Some(idle) = cpu.idle() {
        set(all, "cpu.idle", idle.to_string());
    }
    if let Some(shares) = cpu.shares().filter(|shares| *shares > 0) {
        set(all, "cpu.weight", weight_of(shares).to_string());
    }
    let period = cpu.period().filter(|period| *period > 0);
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let max = (quota.is_some() || period.is_some()).then(|| {
        let kept = || now.words("cpu.max").first().cloned().unwrap_or_else(|| "max".to_owned());
        let quota = quota.map_or_else(kept, max_or);
        period.map_or(quota.clone(), |period| format!("{quota} {period}"))
    });
    // A burst may never be above the quota, so neither may overtake the other.
    let in_force = now.number("cpu.max", 0);
    let fits =
        |burst: u64| in_force.is_none_or(|quota| i64::try_from(burst).is_ok_and(|burst| burst <= quota));
    let burst = cpu.burst();
    if let Some(burst) = burst.filter(|burst| fits(*burst)) {
        set(all, "cpu.max.burst", burst.to_string());
    }
    if let Some(max) = max {
        set(all, "cpu.max", max);
    }
    if let Some(burst) = burst.filter(|burst| !fits(*burst)) {
        set(all, "cpu.max.burst", burst.to_string());
    }
    for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
            set(all, file, value.as_str());
        }
    }
}

/// cgroup v1's shares (2 to 262144) as v2's weight (1 to 10000), as runc takes them since 1.3.2: the parabola in
/// logarithms through the least, the most and the default of both (1024 is 100). Older ones have a straight line; with them
/// the weight is right from the wake on.
#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "from 2 to 262144, and from 1 to 10000"
)]
fn weight_of(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        shares => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            10_f64.powf(exponent).ceil() as u64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_those_of_runc() {
        let pairs = [(1, 1), (2, 1), (102, 17), (512, 59), (1024, 100), (2048, 174), (262_144, 10_000)];
        for (shares, weight) in pairs {
            assert_eq!(weight_of(shares), weight, "{shares}");
        }
    }

    proptest::proptest! {
        #[test]
        fn more_shares_are_never_less_weight(shares: u32) {
            let (less, more) = (weight_of(shares.into()), weight_of(u64::from(shares) + 1));
            proptest::prop_assert!((1..=10_000).contains(&less) && less <= more);
        }
    }
}
