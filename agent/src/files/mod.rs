//! GET and POST /files, POST /files/compose.

use std::sync::Arc;

use axum::Router;

use crate::state::Agent;

pub(crate) fn routes() -> Router<Arc<Agent>> {
    Router::new()
}
