//! Points at which a test can stop the core dead, to see what the next server makes of it.

use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;

/// What happens at an armed point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtFailpoint {
    /// The driver goes no further, as if the process had been killed; the rest of the test goes on.
    Freeze,
    /// The process aborts without unwinding: kill -9 at exactly this point.
    Abort,
}

/// Which point is armed. Off unless a test or the configuration arms one.
#[derive(Debug, Clone)]
pub struct Failpoints {
    armed: Arc<Mutex<Option<(String, AtFailpoint)>>>,
    reached: watch::Sender<Option<&'static str>>,
}

impl Default for Failpoints {
    fn default() -> Self {
        Self { armed: Arc::default(), reached: watch::channel(None).0 }
    }
}

impl Failpoints {
    /// Every point, in the order in which a sandbox meets them.
    pub const ALL: [&str; 14] = [
        "create.intended",
        "create.started",
        "create.initialised",
        "pause.intended",
        "pause.dumped",
        "pause.renamed",
        "resume.intended",
        "resume.started",
        "resume.initialised",
        "copy.dumped",
        "copy.renamed",
        "network.applied",
        "kill.intended",
        "kill.destroyed",
    ];

    /// Arms one point; the one armed before is disarmed.
    pub fn arm(&self, point: &str, then: AtFailpoint) {
        *self.armed.lock().unwrap_or_else(PoisonError::into_inner) = Some((point.to_owned(), then));
    }

    /// Resolves when a driver froze at the armed point.
    pub async fn reached(&self) -> &'static str {
        let mut reached = self.reached.subscribe();
        let point = reached.wait_for(Option::is_some).await;
        point.ok().and_then(|point| *point).unwrap_or_default()
    }

    /// Called by drivers on their way.
    pub(super) async fn pass(&self, point: &'static str) {
        debug_assert!(Self::ALL.contains(&point), "{point} is not listed");
        let armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match armed {
            Some((name, AtFailpoint::Freeze)) if name == point => {
                self.reached.send_replace(Some(point));
                std::future::pending::<()>().await;
            }
            Some((name, AtFailpoint::Abort)) if name == point => std::process::abort(),
            Some(_) | None => {}
        }
    }
}
