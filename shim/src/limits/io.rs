//! The io controller.

use oci_spec::runtime::{LinuxBlockIo, LinuxThrottleDevice};

use super::{InForce, Setting, set};

/// Where the scheduler BFQ is in use it has a file of its own for weights, in OCI's range.
const BFQ: &str = "io.bfq.weight";

pub(super) fn settings(block_io: &LinuxBlockIo, now: InForce<'_>, all: &mut Vec<Setting>) {
    let bfq = !now.words(BFQ).is_empty();
    if let Some(weight) = block_io.weight().filter(|weight| *weight != 0) {
        let (file, weight) = if bfq { (BFQ, weight.into()) } else { ("io.weight", weight_of(weight)) };
        set(all, file, weight.to_string());
    }
    for device in block_io.weight_device().iter().flatten().filter(|_| bfq) {
        if let Some(weight) = device.weight() {
            set(all, BFQ, format!("{}:{} {weight}", device.major(), device.minor()));
        }
    }
    throttle(block_io.throttle_read_bps_device().as_ref(), "rbps", all);
    throttle(block_io.throttle_write_bps_device().as_ref(), "wbps", all);
    throttle(block_io.throttle_read_iops_device().as_ref(), "riops", all);
    throttle(block_io.throttle_write_iops_device().as_ref(), "wiops", all);
}

fn throttle(devices: Option<&Vec<LinuxThrottleDevice>>, key: &str, all: &mut Vec<Setting>) {
    for device in devices.into_iter().flatten() {
        // runc writes a rate of zero as it is, and the kernel refuses it.
        set(all, "io.max", format!("{}:{} {key}={}", device.major(), device.minor(), device.rate()));
    }
}

/// From 10..=1000 to 1..=10000, as runc does.
fn weight_of(weight: u16) -> u64 {
    1 + (u64::from(weight).saturating_sub(10)) * 9999 / 990
}
