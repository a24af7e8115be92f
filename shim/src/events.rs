//! Task events on their way to containerd, in the order in which they happened.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use containerd_shim::{
    event::Event,
    protos::{
        protobuf::{MessageDyn, well_known_types::timestamp::Timestamp},
        ttrpc::context::with_duration,
    },
    publisher::RemotePublisher,
};
use tokio::sync::{mpsc, watch};
use tracing::warn;

/// One event with its topic.
pub type TopicAndEvent = (String, Box<dyn MessageDyn>);

/// How long containerd may take to accept one event.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a container's actor puts its events. Never waits.
#[derive(Clone)]
pub struct EventSink {
    sender: mpsc::UnboundedSender<TopicAndEvent>,
    pending: Pending,
}

/// How many events are on their way to containerd.
pub type Pending = Arc<watch::Sender<usize>>;

impl EventSink {
    /// A sink and the end that its events come out of.
    pub fn channel() -> (Self, mpsc::UnboundedReceiver<TopicAndEvent>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self { sender, pending: Pending::default() }, receiver)
    }

    /// Publishes `event`.
    pub fn publish(&self, event: impl Event) {
        // The forwarder lives as long as the shim; when it is gone nobody is left to be told.
        self.pending.send_modify(|pending| *pending += 1);
        let _ = self.sender.send((event.topic(), Box::new(event)));
    }

    /// What [`forward`] counts down.
    pub fn pending(&self) -> Pending {
        self.pending.clone()
    }

    /// Waits until [`forward`] has seen to all events so far, for `limit` at most.
    pub async fn forwarded(&self, limit: Duration) {
        let mut pending = self.pending.subscribe();
        // What could not be told in time is lost with the shim.
        let _ = tokio::time::timeout(limit, pending.wait_for(|pending| *pending == 0)).await;
    }
}

/// Forwards events to containerd until all sinks are gone.
pub async fn forward(
    publisher: RemotePublisher,
    namespace: String,
    mut events: mpsc::UnboundedReceiver<TopicAndEvent>,
    pending: Pending,
) {
    while let Some((topic, event)) = events.recv().await {
        if let Err(error) = publisher.publish(with_duration(PUBLISH_TIMEOUT), &topic, &namespace, event).await
        {
            warn!(%topic, %error, "cannot publish an event to containerd");
        }
        pending.send_modify(|pending| *pending -= 1);
    }
}

/// A time as protobuf has it.
pub fn timestamp(at: SystemTime) -> Timestamp {
    at.into()
}
