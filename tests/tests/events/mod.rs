//! What containerd tells its clients of tasks.

#![allow(clippy::unwrap_used)]
#![allow(dead_code, reason = "each test file uses what it needs")]

use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use agentcube_tests::node::{Node, Runtime, Spawned};
use serde_json::Value;

use crate::cycle::SOON;

/// What `ctr events` tells of tasks.
pub struct Events(Spawned);

impl Events {
    /// Listens from now on.
    pub fn listen(node: &Node) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let events = Self(node.spawn(&["ctr", "events"]).unwrap());
        // It does not say when it has begun to listen. Each name is new, whoever else listens on the node.
        node.wait_until("ctr events to listen", SOON, || {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            node.ctr(&["namespaces", "create", &format!("listening-{count}")])?;
            Ok(events.0.stdout().contains("/namespaces/create"))
        })
        .unwrap();
        events
    }

    /// The events of a container's task so far: what happened, to which process, with which pid and exit status.
    pub fn of(&self, id: &str) -> Vec<Value> {
        let text = self.0.stdout();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let parsed = whole.lines().filter_map(|line| {
            let (head, body) = line.split_at(line.find('{')?);
            let topic = head.split_whitespace().find(|word| word.starts_with("/tasks/"))?;
            let mut event: Value = serde_json::from_str(body).unwrap();
            event["topic"] = topic.into();
            (event["container_id"] == id).then_some(event)
        });
        parsed.collect()
    }

    /// Waits for the last event of a container's task, and gives back all. (runc's shim sometimes ends before it has
    /// told of the deletion, which this project's must not.)
    pub fn to_the_end(&self, node: &Node, id: &str, runtime: Runtime) -> Vec<Value> {
        let last = |event: &Value| match runtime {
            Runtime::Agentcube => event["topic"] == "/tasks/delete",
            Runtime::Runc => event["topic"] == "/tasks/exit" && event["id"] == id,
        };
        let over = || self.of(id).iter().any(last);
        node.wait_until("the last event", SOON, || Ok(over())).unwrap();
        // Whatever else comes, comes now.
        thread::sleep(Duration::from_millis(300));
        self.of(id)
    }
}
