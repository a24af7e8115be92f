//! Dumps and restores of real containers. They need root and a root file system with runc and CRIU, named by
//! `AGENTCUBE_TEST_ROOTFS`; each runs on a node of its own, made of namespaces.
#![allow(clippy::unwrap_used)]

#[path = "live/agent.rs"]
mod agent;
#[path = "live/node.rs"]
mod node;

use agent::{Agent, Census, Setup};
use node::in_node;

#[test]
fn a_counter_goes_on_over_five_cycles() {
    in_node("a_counter_goes_on_over_five_cycles", async || {
        let mut agent = Agent::start("counter", &Setup::default());
        let mut last = agent.count_on(0, 5).await;
        for cycle in 0..5 {
            let dumped = agent.dump().await.unwrap();
            assert!(!agent.container.cgroup.populated().unwrap());
            assert!(!agent.container.cgroup.is_frozen().unwrap());
            let restored = agent.restore().await.unwrap();
            println!(
                "cycle {cycle}: dump {:?} (stopped {:?}, {} bytes), restore {:?}",
                dumped.total, dumped.stopped, dumped.image_bytes, restored.total
            );
            agent.assert_running();
            last = agent.count_on(last, 10).await;
        }
        agent.delete();
    });
}
