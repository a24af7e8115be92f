//! Task events on their way to containerd, in the order in which they happened.

use std::time::{Duration, SystemTime};

use containerd_shim::{
    event::Event,
    protos::{
        protobuf::{MessageDyn, well_known_types::timestamp::Timestamp},
        ttrpc::context::with_duration,
    },
    publisher::RemotePublisher,
};
use tokio::sync::mpsc;
use tracing::warn;

/// One event with its topic.
pub type TopicAndEvent = (String, Box<dyn MessageDyn>);

/// How long containerd may take to accept one event.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a container's actor puts its events. Never waits.
#[derive(Clone)]
pub struct EventSink(mpsc::UnboundedSender<TopicAndEvent>);

impl EventSink {
    /// A sink and the end that its events come out of.
    pub fn channel() -> (Self, mpsc::UnboundedReceiver<TopicAndEvent>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }

    /// Publishes `event`.
    pub fn publish(&self, event: impl Event) {
        // The forwarder lives as long as the shim; when it is gone nobody is left to be told.
        let _ = self.0.send((event.topic(), Box::new(event)));
    }
}

/// Forwards events to containerd until all sinks are gone.
pub async fn forward(
    publisher: RemotePublisher,
    namespace: String,
    mut events: mpsc::UnboundedReceiver<TopicAndEvent>,
) {
    while let Some((topic, event)) = events.recv().await {
        if let Err(error) = publisher.publish(with_duration(PUBLISH_TIMEOUT), &topic, &namespace, event).await
        {
            warn!(%topic, %error, "cannot publish an event to containerd");
        }
    }
}

/// A time as protobuf has it.
pub fn timestamp(at: SystemTime) -> Timestamp {
    at.into()
}
