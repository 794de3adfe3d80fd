//! Errors that several verbs share.

use crate::model::SandboxId;
use crate::store::StoreError;
use std::sync::Arc;

/// No live sandbox has this id: never made, killed, or its time was up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("sandbox {0} does not exist")]
pub struct UnknownSandbox(pub SandboxId);

/// The store could not answer: disk full, I/O error.
#[derive(Debug, thiserror::Error)]
#[error("the store failed")]
pub struct StoreFailure(#[source] pub Box<dyn std::error::Error + Send + Sync>);

impl From<StoreError> for StoreFailure {
    fn from(error: StoreError) -> Self {
        Self(Box::new(error))
    }
}

/// A cause that answers several callers of one verb.
pub(super) type Cause = Arc<dyn std::error::Error + Send + Sync>;

/// An error and its causes in one line, for rows and logs of sandboxes.
pub(super) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
