//! What grows is cut from time to time: rows and history of ended sandboxes, sandboxes paused for too long, dumps that
//! nothing needs any more.

use super::core::Core;
use super::error::chain;
use crate::model::{EndReason, SandboxState};
use crate::store::sandboxes;
use std::sync::Arc;
use std::time::Duration;

/// How often.
const EVERY: Duration = Duration::from_secs(60);

/// The task. Runs until it is aborted.
pub(super) async fn run(core: Arc<Core>) {
    loop {
        tokio::time::sleep(EVERY).await;
        once(&core).await;
    }
}

/// One round.
pub(super) async fn once(core: &Core) {
    forget_ended(core).await;
    remove_long_paused(core).await;
    super::snapshot::remove_unused(core).await;
}

async fn forget_ended(core: &Core) {
    let limit = core.clock.now() - core.config.history_kept;
    match core.store.write(move |db| sandboxes::remove_ended_before(db, limit)).await {
        Ok(forgotten) if forgotten.is_empty() => {}
        Ok(forgotten) => core.store.forget_history(forgotten.iter().map(ToString::to_string).collect()),
        Err(error) => tracing::warn!(error = chain(&error), "Could not forget ended sandboxes"),
    }
}

async fn remove_long_paused(core: &Core) {
    let limit = core.clock.now() - core.config.paused_kept;
    for handle in core.handles() {
        let record = Arc::clone(&handle.view.borrow().record);
        if record.state == SandboxState::Paused && record.end_at < limit {
            tracing::info!(sandbox.id = %record.id, "Removing sandbox {}: paused for longer than it is kept", record.id);
            super::registry::kill(core, record.id, EndReason::TimedOut).await;
        }
    }
}
