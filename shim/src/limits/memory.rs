//! The memory controller.

use oci_spec::runtime::LinuxMemory;

use super::{InForce, LimitError, Setting, max_or, set};

pub(super) fn settings(
    memory: &LinuxMemory,
    now: InForce<'_>,
    all: &mut Vec<Setting>,
) -> Result<(), LimitError> {
    let limit = memory.limit().filter(|limit| *limit != 0);
    let swap = memory.swap().filter(|swap| *swap != 0);
    // OCI counts memory and swap together, cgroup v2 swap alone.
    match (swap, limit.or_else(|| now.number("memory.max", 0))) {
        (None, _) if limit.is_some_and(|limit| limit < 0) => set(all, "memory.swap.max", "max"),
        (None, _) => {}
        (Some(..0), _) => set(all, "memory.swap.max", "max"),
        (Some(swap), Some(limit)) if limit > 0 && swap < limit => {
            return Err(LimitError::SwapBelowMemory { swap, limit });
        }
        (Some(swap), Some(limit)) if limit > 0 => set(all, "memory.swap.max", (swap - limit).to_string()),
        (Some(swap), _) => set(all, "memory.swap.max", swap.to_string()),
    }
    if let Some(limit) = limit {
        set(all, "memory.max", max_or(limit));
    }
    if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0) {
        set(all, "memory.low", max_or(reservation));
    }
    Ok(())
}
