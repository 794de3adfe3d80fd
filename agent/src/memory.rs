//! Keeps the agent small between bursts: every sandbox has one, and its free memory would be in every dump.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::{blocking, sys};

/// Releasing costs about a millisecond, so a burst is followed by one release and not by one per request.
const AFTER_USE: Duration = Duration::from_secs(2);

static SCHEDULED: AtomicBool = AtomicBool::new(false);

/// Call it when something that took much memory is done; soon after, freed memory goes back to the kernel. Needs the
/// runtime's context, which blocking threads have too.
pub(crate) fn release_later() {
    if SCHEDULED.swap(true, Ordering::Relaxed) {
        return;
    }
    tokio::spawn(async {
        tokio::time::sleep(AFTER_USE).await;
        SCHEDULED.store(false, Ordering::Relaxed);
        blocking::begin(sys::release_free_memory);
    });
}
