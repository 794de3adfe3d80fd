//! HopX's in-sandbox API, below [`crate::wire::HOPX_PREFIX`]: plain JSON over HTTP, and WebSockets, over the same
//! processes, files and watches that envd's wire has (contract hopx.md B3).
//!
//! ```text
//! host (bearer token -> this sandbox) ─> routes ─┬─ info, desktop, env, files
//!                                               ├─ commands, jobs ─> run ─> crate::process
//!                                               └─ sockets (WebSocket)
//! ```
//! Its clients send a request again when they have no answer in time, so everything that runs code answers by the
//! request's own timeout, and what was started goes on without its client until then.

mod commands;
mod counters;
mod desktop;
mod env;
mod error;
mod execute;
mod files;
mod info;
mod jobs;
mod languages;
mod pieces;
mod results;
mod run;
mod sockets;

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::Uri;
use axum::http::header::HeaderName;
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{any, get, post};
use tokio::time::Instant;

use self::counters::Counters;
use self::error::{Code, HopxError};
use self::jobs::Jobs;
use self::results::Results;
use crate::state::Agent;

/// One JSON body: files travel in them. Uploads have no limit, they are streamed.
const BODY_BYTES_MAX: usize = 64 << 20;
/// Where clients run everything unless they say otherwise.
const WORKSPACE: &str = "/workspace";

/// What this API remembers between requests.
#[derive(Debug, Default)]
pub(crate) struct Hopx {
    counters: Counters,
    jobs: Jobs,
    results: Results,
}

impl Hopx {
    /// From now on it counts for another sandbox: the dump that this agent comes from was somebody else's. Jobs stay,
    /// since their processes do.
    pub(crate) fn begin(&self) {
        self.counters.reset();
    }
}

pub(crate) fn routes(agent: &Arc<Agent>) -> Router<Arc<Agent>> {
    Router::new()
        .route("/", get(info::info))
        .route("/health", get(info::health))
        .route("/ping", get(info::ping))
        .route("/info", get(info::info))
        .route("/system", get(info::system))
        .route("/metrics", get(info::metrics))
        .route("/metrics/snapshot", get(info::metrics))
        .route("/metrics/prometheus", get(info::prometheus))
        .route("/commands/run", post(commands::run))
        .route("/commands/background", post(commands::background))
        .route("/processes", get(jobs::list_all))
        .route("/processes/{id}/kill", post(jobs::kill))
        .route("/execute", post(execute::execute))
        .route("/execute/rich", post(execute::execute))
        .route("/execute/ipython", post(execute::execute))
        .route("/jupyter/sessions", get(info::sessions))
        .route("/execute/processes", get(jobs::list))
        .route("/execute/kill/{id}", post(jobs::kill))
        .route("/execute/kill", any(jobs::kill_by_query))
        .route("/execute/background", post(jobs::start))
        .route("/executions", post(results::start))
        .route("/executions/{id}", get(results::get))
        .route("/env", get(env::all).put(env::replace).patch(env::merge).delete(env::clear))
        .route("/cache/stats", get(info::cache))
        .route("/cache/clear", post(info::clear_cache))
        .merge(files::routes())
        .merge(sockets::routes())
        .route("/desktop/{*path}", any(desktop::unavailable))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn_with_state(Arc::clone(agent), count))
}

/// Counts the request, times it, and gives its answer an id that errors repeat.
async fn count(State(agent): State<Arc<Agent>>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let id = error::new_request_id();
    let response = next.run(request).await;
    let mut response = error::word(response, &id);
    if let Ok(id) = id.parse() {
        response.headers_mut().insert(HeaderName::from_static("x-request-id"), id);
    }
    let has_failed = response.status().is_client_error() || response.status().is_server_error();
    agent.hopx.counters.request(begun.elapsed(), if has_failed { counters::Ended::Badly } else { counters::Ended::Well });
    response
}

async fn unknown(uri: Uri) -> HopxError {
    HopxError::new(Code::NotFound, format!("{} is not an endpoint of this API", uri.path()))
}

async fn wrong_method(uri: Uri) -> HopxError {
    HopxError::new(Code::MethodNotAllowed, format!("{} does not take this method", uri.path()))
}
