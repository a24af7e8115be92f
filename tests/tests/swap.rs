//! Agents whose memory is pushed out to swap of each kind, to swap that is too small and to none. The tests change the
//! machine's swap, so they run in a virtual node alone: `make test-vm`.

#![allow(clippy::unwrap_used)]

mod ballast;
mod cycle;

use std::fs;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use agentcube_tests::node::{Agent, Node};
use agentcube_tests::skipped;
use ballast::{BALLAST, agent_with_ballast, limit, value};
use cycle::{SOON, agentcube, inspect, sleep_in_place, wakes};

const MIB: u64 = 1 << 20;

/// The machine's swap while a test has it to itself; then it is as it was.
struct Swap {
    devices: Vec<String>,
    _alone: MutexGuard<'static, ()>,
}

impl Swap {
    /// None on a machine that is not there for these tests alone.
    fn take() -> Option<(&'static Node, Swap)> {
        static ALONE: Mutex<()> = Mutex::new(());
        // The name that a virtual node gives itself.
        if rustix::system::uname().nodename() != c"agentcube-vm" {
            skipped("it changes the machine's swap; make test-vm runs it in a virtual machine");
            return None;
        }
        let node = ballast::node()?;
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let devices = used().into_iter().map(|(device, _)| device).collect();
        Some((node, Swap { devices, _alone: alone }))
    }
}

/// Has the machine use these and no others.
fn only(devices: &[&str]) {
    for device in devices {
        if !used().iter().any(|(used, _)| used == device) {
            run("swapon", &[device]);
        }
    }
    for (device, _) in used() {
        if !devices.contains(&device.as_str()) {
            run("swapoff", &[&device]);
        }
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let devices: Vec<&str> = self.devices.iter().map(String::as_str).collect();
        only(&devices);
    }
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}

/// Each swap of this machine, and the bytes that are used of it.
fn used() -> Vec<(String, u64)> {
    let swaps = fs::read_to_string("/proc/swaps").unwrap();
    let fields = swaps.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    fields.map(|fields| (fields[0].to_owned(), fields[3].parse::<u64>().unwrap() * 1024)).collect()
}

fn held(node: &Node, agent: &Agent) -> u64 {
    value(node, agent, "memory.current", "")
}

fn swapped(node: &Node, agent: &Agent) -> u64 {
    value(node, agent, "memory.swap.current", "")
}

/// Why the last reclaim could push no more out; empty when nothing stood in its way.
fn rest(node: &Node, agent: &Agent) -> String {
    inspect(node, agent)["last_sleep"]["rest_because"].as_str().unwrap_or_default().to_owned()
}

/// Reclaims an agent; gives back how many bytes that freed.
fn reclaim(node: &Node, agent: &Agent) -> u64 {
    let before = held(node, agent);
    sleep_in_place(node, agent, "reclaimed");
    assert_eq!(inspect(node, agent)["depth"], "reclaimed");
    before.saturating_sub(held(node, agent))
}

/// A client of the sleeping agent gets an answer, and all of the agent's memory is what it was.
fn wakes_whole(agent: &Agent, digest: &str) {
    let since = Instant::now();
    agent.turn().unwrap();
    println!("answered {:?} after the client connected", since.elapsed());
    assert_eq!(agent.digest().unwrap(), digest);
}

#[test]
fn memory_goes_to_compressed_memory_and_to_a_file_alike_and_comes_back_whole() {
    let Some((node, swap)) = Swap::take() else { return };
    let (agent, digest) = agent_with_ballast(node, "kinds", 8401);
    let devices = swap.devices.clone();
    assert!(devices.iter().any(|device| device.contains("zram")) && devices.len() > 1, "{devices:?}");
    for device in &devices {
        only(&[device]);
        let freed = reclaim(node, &agent);
        let on_device = used()[0].1;
        println!("{device}: {} MiB given back, {} MiB on it", freed / MIB, on_device / MIB);
        assert!(freed > BALLAST * MIB * 3 / 4, "{freed} bytes given back");
        assert!(on_device > BALLAST * MIB * 3 / 4, "{on_device} bytes on {device}");
        assert_eq!(rest(node, &agent), "");
        wakes_whole(&agent, &digest);
    }
    // What its cgroup allows is used and no more, and the rest stays. Pages that were read back have kept their places.
    only(&[]);
    only(&devices.iter().map(String::as_str).collect::<Vec<_>>());
    limit(node, &agent, "memory.swap.max", &(16 * MIB).to_string());
    let freed = reclaim(node, &agent);
    println!("{} MiB given back with 16 MiB of swap allowed: {}", freed / MIB, rest(node, &agent));
    assert!(rest(node, &agent).contains("memory.swap.max"), "{}", rest(node, &agent));
    assert!(swapped(node, &agent) <= 16 * MIB && freed > 8 * MIB, "{freed} bytes given back");
    wakes_whole(&agent, &digest);
    agent.delete().unwrap();
}

#[test]
fn where_swap_is_full_what_fits_goes_out_and_what_does_not_stays_and_is_told() {
    const SMALL: &str = "/var/small-swap";
    let Some((node, _swap)) = Swap::take() else { return };
    let (first, first_digest) = agent_with_ballast(node, "first", 8402);
    let (second, second_digest) = agent_with_ballast(node, "second", 8403);
    run("fallocate", &["--length", "24M", SMALL]);
    run("chmod", &["600", SMALL]);
    run("mkswap", &[SMALL]);
    only(&[SMALL]);
    let freed = reclaim(node, &first);
    println!("{} MiB given back: {}", freed / MIB, rest(node, &first));
    assert!(freed > 16 * MIB && freed < 40 * MIB, "{freed} bytes given back");
    assert!(rest(node, &first).contains("swap is full"), "{}", rest(node, &first));
    // There is nothing left for the next: it says so, and sleeps frozen where that will do.
    let refused = agentcube(node, &second, &["sleep", "--depth", "reclaimed"]).unwrap_err();
    assert!(refused.contains("swap is full"), "{refused}");
    assert_eq!(inspect(node, &second)["state"], "running");
    let shallower =
        || Ok(agentcube(node, &second, &["sleep", "--depth", "reclaimed", "--or-shallower"]).is_ok());
    node.wait_until("the second to sleep", SOON, shallower).unwrap();
    assert_eq!(inspect(node, &second)["depth"], "frozen");
    assert!(held(node, &second) > BALLAST * MIB);
    assert_eq!((wakes(node, &first), wakes(node, &second)), (0, 0));
    wakes_whole(&second, &second_digest);
    wakes_whole(&first, &first_digest);
    // Without any it says that, too.
    only(&[]);
    let refused = agentcube(node, &first, &["sleep", "--depth", "reclaimed"]).unwrap_err();
    assert!(refused.contains("the node has no swap"), "{refused}");
    assert_eq!(first.digest().unwrap(), first_digest);
    first.delete().unwrap();
    second.delete().unwrap();
}
