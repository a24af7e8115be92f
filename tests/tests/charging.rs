//! What a sleeping agent is charged with, and who is charged with its image. That needs the memory controller of cgroup
//! v2, which a virtual node has: `make test-vm` runs the tests there.

#![allow(clippy::unwrap_used)]

mod ballast;
mod cycle;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use agentcube_tests::images::Image;
use agentcube_tests::node::{Agent, AgentSpec, Node};
use ballast::{BALLAST, limit, node, sleep_soon, value};
use cycle::{SOON, agent, agentcube, inspect, wake};

const MIB: u64 = 1 << 20;
/// The most that an agent may be charged with in its sleep: the kernel's own for a cgroup and for mounts, and a share of a
/// file that is in use elsewhere.
const LITTLE: u64 = 4 * MIB;

/// Agents share their shims' cgroup, so one test at a time looks at it.
static ALONE: Mutex<()> = Mutex::new(());

/// Reads and writes 24 MiB of a file, and 4 MiB of shared memory.
const FILES: &str = "import os
file = os.open('/data/file', os.O_RDWR | os.O_CREAT)
os.write(file, os.urandom(24 << 20))
os.fsync(file)
open('/dev/shm/held', 'wb').write(b'held' * (1 << 20))";

/// An agent that has used memory of every kind, and the digest of its ballast.
fn agent_with_files<'node>(node: &'node Node, spec: &AgentSpec) -> (Agent<'node>, String) {
    // On the disk: the container's own files are in memory.
    let data = format!("/var/lib/agentcube/data-{}", spec.id);
    node.sh(&format!("mkdir -p {data}")).unwrap();
    let spec = spec.clone().mount(format!("type=bind,src={data},dst=/data,options=rbind:rw"));
    let agent = node.run_agent(&spec.env("BALLAST_MIB", &BALLAST)).unwrap();
    agent.wait_healthy().unwrap();
    agent.exec(&["python3", "-c", FILES]).unwrap().check().unwrap();
    assert!(value(node, &agent, "memory.stat", "file ") > 24 * MIB);
    let digest = agent.digest().unwrap();
    (agent, digest)
}

/// What the command line says that the agent is charged with.
fn charged(node: &Node, agent: &Agent) -> BTreeMap<String, u64> {
    serde_json::from_value(inspect(node, agent)["charged_bytes"].take()).unwrap()
}

/// Waits until an agent is charged with little, and tells with what.
fn assert_little(node: &Node, agent: &Agent, when: &str) {
    let held = || value(node, agent, "memory.current", "");
    let little = || Ok(held() < LITTLE);
    if let Err(error) = node.wait_until("the agent to be charged with little", SOON, little) {
        panic!("{when}: {error}: {} bytes, {:?}", held(), charged(node, agent));
    }
    println!("{when}: charged with {} KiB: {:?}", held() >> 10, charged(node, agent));
}

/// The memory of files that the cgroup of the agent's shim is charged with.
fn files_of_shim(node: &Node, agent: &Agent) -> u64 {
    let shim = inspect(node, agent)["shim_pid"].as_u64().unwrap();
    let stat = format!("cat /sys/fs/cgroup$(cut -d : -f 3 /proc/{shim}/cgroup)/memory.stat");
    let text = node.sh(&stat).unwrap();
    text.lines().find_map(|line| line.strip_prefix("file ")).unwrap().parse().unwrap()
}

#[test]
fn a_checkpointed_agent_is_charged_with_little_and_its_image_is_charged_to_the_shim() {
    let Some(node) = node() else { return };
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    node.sh("(cat /etc/agentcube/shim.toml; echo file_cache_seconds = 0) >/etc/agentcube/charging.toml")
        .unwrap();
    let spec = agent(Image::Python, "charged").port(8301);
    let spec = spec.flag("--runtime-config-path").flag("/etc/agentcube/charging.toml");
    let (agent, digest) = agent_with_files(node, &spec);
    let before = value(node, &agent, "memory.current", "");
    println!("awake: charged with {} KiB: {:?}", before >> 10, charged(node, &agent));
    assert!(before > (BALLAST + 24 + 4) * MIB);
    let shims = files_of_shim(node, &agent);

    sleep_soon(node, &agent);
    let image = inspect(node, &agent)["image_bytes"].as_u64().unwrap();
    assert!(image > BALLAST * MIB);
    let more = files_of_shim(node, &agent).saturating_sub(shims);
    println!("the image has {} KiB, and the shim is charged with {} KiB more", image >> 10, more >> 10);
    assert!(more > image * 9 / 10, "{more} bytes of an image of {image} are charged to the shim");
    assert_little(node, &agent, "asleep");
    let told = charged(node, &agent);
    assert_eq!(told.get("anon"), None, "{told:?}");
    let kernel = value(node, &agent, "memory.stat", "kernel ");
    assert!(told["kernel"].abs_diff(kernel) < MIB, "{told:?}");

    // A wake that fails has read the image in the agent's cgroup.
    limit(node, &agent, "memory.swap.max", "0");
    limit(node, &agent, "memory.max", &(16 * MIB).to_string());
    agentcube(node, &agent, &["wake"]).unwrap_err();
    assert_little(node, &agent, "after a wake that failed");
    limit(node, &agent, "memory.max", "max");
    limit(node, &agent, "memory.swap.max", "max");

    // Nor is an awake one charged with the image that it came from.
    wake(node, &agent);
    assert_eq!(agent.digest().unwrap(), digest);
    let held = "assert open('/dev/shm/held', 'rb').read() == b'held' * (1 << 20)";
    agent.exec(&["python3", "-c", held]).unwrap().check().unwrap();
    let little_more = || Ok(value(node, &agent, "memory.current", "") < before + 8 * MIB);
    node.wait_until("the image to be gone", SOON, little_more).unwrap();
    agent.delete().unwrap();
}

#[test]
fn files_stay_in_memory_for_a_wake_that_comes_soon() {
    let Some(node) = node() else { return };
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    node.sh("(cat /etc/agentcube/shim.toml; echo file_cache_seconds = 36000) >/etc/agentcube/cached.toml")
        .unwrap();
    let spec = agent(Image::Python, "cached").port(8302);
    let (agent, digest) =
        agent_with_files(node, &spec.flag("--runtime-config-path").flag("/etc/agentcube/cached.toml"));
    sleep_soon(node, &agent);
    std::thread::sleep(std::time::Duration::from_secs(1));
    let file = charged(node, &agent)["file"];
    assert!(file > 24 * MIB, "{file} bytes of files are left");
    wake(node, &agent);
    assert_eq!(agent.digest().unwrap(), digest);
    agent.delete().unwrap();
}
