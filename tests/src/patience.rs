//! How much longer than usual things may take: on an emulated machine everything does.

use std::sync::OnceLock;
use std::time::Duration;

/// The environment variable that holds the factor, a whole number.
pub const VARIABLE: &str = "AGENTCUBE_TEST_PATIENCE";

/// A time limit as this machine needs it. It is for giving up on what should have happened, never for measuring.
pub fn scaled(limit: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    limit.saturating_mul(*FACTOR.get_or_init(|| factor(std::env::var(VARIABLE).ok().as_deref())))
}

fn factor(text: Option<&str>) -> u32 {
    text.and_then(|text| text.parse().ok()).unwrap_or(1).clamp(1, 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_factor_never_shortens_a_limit() {
        assert_eq!(factor(None), 1);
        assert_eq!(factor(Some("20")), 20);
        for odd in ["0", "-1", "x", ""] {
            assert_eq!(factor(Some(odd)), 1, "{odd:?}");
        }
    }
}
