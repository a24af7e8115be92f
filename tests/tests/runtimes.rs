//! Sleep and wake with each runc that Debian has, and with one that nobody has seen before.

#![allow(clippy::unwrap_used)]

mod cycle;

use agentcube_tests::images::Image;
use agentcube_tests::node::{Node, NodeOptions};
use agentcube_tests::old_runc;
use agentcube_tests::skipped;
use cycle::{agent, inspect, sleep, wake};

/// Cycles for each runc.
const CYCLES: u64 = 3;
/// Where a node has the runc that a test brings along.
const RUNC: &str = "/usr/local/bin/another-runc";

fn node_with_own_runc() -> Node {
    let shim_toml = format!("ignore_missing_controllers = true\nrunc_binary = \"{RUNC}\"\n");
    Node::start(NodeOptions { shim_toml, ..NodeOptions::default() }).unwrap()
}

/// Lets an agent fall asleep and wake again and again, with an exec after each wake.
fn goes_on_over_cycles(node: &Node, id: &str, engine: &str) {
    let before = node.snapshot();
    let agent = node.run_agent(&agent(Image::Python, id).env("BALLAST_MIB", "8")).unwrap();
    agent.wait_healthy().unwrap();
    let digest_of_nothing_said = agent.digest().unwrap();
    for cycle in 1..=CYCLES {
        sleep(node, &agent);
        assert_eq!(inspect(node, &agent)["last_sleep"]["engine"], engine);
        wake(node, &agent);
        assert_eq!(inspect(node, &agent)["last_wake"]["engine"], engine);
        assert_eq!(agent.turn().unwrap(), cycle - 1);
        let said =
            agent.exec(&["/bin/sh", "-c", "echo from within"]).or_else(|_| agent.exec(&["python3", "-V"]));
        assert_eq!(said.unwrap().status, 0, "an exec after wake {cycle}");
        if cycle == 1 {
            assert_eq!(agent.digest().unwrap(), digest_of_nothing_said);
        }
        agent.chat("go on").unwrap();
    }
    sleep(node, &agent);
    agent.delete().unwrap();
    node.wait_until_clean(&before, cycle::SOON).unwrap();
}

#[test]
fn agents_sleep_and_wake_with_the_runc_of_each_debian_release() {
    for release in old_runc::RELEASES {
        let runc = match old_runc::ensure(release) {
            Ok(runc) => runc,
            Err(why) => {
                skipped(&why);
                continue;
            }
        };
        let node = node_with_own_runc();
        node.copy_in(&runc, RUNC).unwrap();
        goes_on_over_cycles(&node, release, "direct");
    }
}

#[test]
fn a_runc_with_a_state_of_an_unknown_kind_dumps_and_restores_by_itself() {
    let node = node_with_own_runc();
    // It does what runc does, and keeps something in its state that no runc so far has kept there.
    let script = "#!/bin/sh\n/usr/sbin/runc \"$@\"; status=$?\n\
                  for state in /run/containerd/runc/default/*/state.json; do\n\
                  \t[ -e \"$state\" ] || continue\n\
                  \tjq -c '. + {novelty: 1}' \"$state\" > \"$state.new\" && mv \"$state.new\" \"$state\"\n\
                  done\nexit $status\n";
    node.write_file(RUNC, script).unwrap();
    node.exec(&["chmod", "755", RUNC]).unwrap().check().unwrap();
    goes_on_over_cycles(&node, "novel", "runc");
    assert!(node.containerd_log().contains("runc is of an unknown kind"), "{}", node.containerd_log());
}
