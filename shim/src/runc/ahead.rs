//! A CRIU that waits for the wake of a sleeping agent.

use std::sync::Arc;

use criu_hooks::{
    container::Container,
    engine::{Engine, InheritFd, Kept, Spare},
    image::Image,
};
use tokio::task::JoinHandle;
use tracing::{debug, warn};

/// A CRIU that is being started or waits. Dropping it ends it.
pub(super) struct Ahead(JoinHandle<Option<Spare>>);

impl Ahead {
    /// Starts one beside everything else: a sleep does not wait for it.
    pub(super) fn start(
        engine: Engine,
        container: Container,
        image: Arc<Image>,
        kept: Kept,
        inherit: Vec<InheritFd>,
    ) -> Self {
        Self(tokio::spawn(async move {
            match engine.start_ahead(&container, &image, &kept, inherit).await {
                Ok(spare) => {
                    debug!(id = container.id, ?spare, "CRIU is started ahead");
                    spare
                }
                Err(error) => {
                    warn!(id = container.id, %error, "CRIU is not started ahead: the wake will start it");
                    None
                }
            }
        }))
    }

    /// The one that waits. One that is not ready yet is ended: the wake does not wait for it either.
    pub(super) async fn take(mut self) -> Option<Spare> {
        if !self.0.is_finished() {
            return None;
        }
        (&mut self.0).await.ok().flatten()
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.0.abort();
    }
}
