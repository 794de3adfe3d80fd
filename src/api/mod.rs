//! The dialects of the control plane.
//!
//! [`router`] is all that the composition root needs: a service for what the proxy does not send into a sandbox. Each
//! dialect has its own folder: `wire.rs` (its JSON, to the letter), `error.rs` (the core's errors in its words), and a
//! file per resource. Handlers parse, ask the core and answer; they own no state and do no lifecycle work.

mod auth;
mod body;
mod e2b;
mod error;
mod hopx;
mod layers;
mod native;
mod novita;

pub use novita::NovitaConfig;

use crate::model::{ByteSize, EgressTarget};
use crate::sandbox::Registry;
use crate::template::Templates;
use crate::template::build::Builds;
use crate::volume::Volumes;
use auth::Keys;
use axum::Router;
use axum::extract::Request;
use std::sync::Arc;
use std::time::Duration;
use tower::ServiceExt;

/// The control plane's knobs. Each has a key in config/stillbox.toml.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiConfig {
    /// Whoever knows one of these may do everything.
    pub keys: Vec<String>,
    /// Told to clients in create, connect and info: they compose `<port>-<id>.<domain>` of it. With the port of the
    /// HTTPS listener unless that is 443.
    pub domain: String,
    /// Longest time to live that may be asked for; the core's `timeout_max`.
    pub timeout_max: Duration,
    /// Largest request body of the control plane. Files go through the proxy, which has no such limit.
    pub body_bytes_max: ByteSize,
    /// How long a request body may take to arrive.
    pub body_time_max: Duration,
    /// Private blocks that callbacks may go to, beside the public internet.
    pub callback_allow: Vec<EgressTarget>,
    /// What only Novita's dialect knows.
    pub novita: NovitaConfig,
}

impl std::fmt::Debug for ApiConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiConfig").field("domain", &self.domain).field("timeout_max", &self.timeout_max).finish_non_exhaustive()
    }
}

impl ApiConfig {
    /// The documented defaults for these keys and this domain.
    pub fn new(keys: Vec<String>, domain: impl Into<String>) -> Self {
        Self {
            keys,
            domain: domain.into(),
            timeout_max: Duration::from_secs(24 * 3600),
            body_bytes_max: ByteSize::mib(8),
            body_time_max: Duration::from_secs(60),
            callback_allow: Vec::new(),
            novita: NovitaConfig::default(),
        }
    }
}

/// What handlers ask.
#[derive(Debug, Clone)]
pub struct ApiState {
    registry: Registry,
    templates: Templates,
    builds: Builds,
    volumes: Volumes,
    config: Arc<ApiConfig>,
    keys: Arc<Keys>,
    callbacks: hopx::Callbacks,
}

impl ApiState {
    /// The state of one server.
    pub fn new(registry: Registry, templates: Templates, builds: Builds, volumes: Volumes, config: ApiConfig) -> Self {
        let keys = Arc::new(Keys::of(&config.keys));
        let callbacks = hopx::Callbacks::new(&config.callback_allow);
        Self { registry, templates, builds, volumes, config: Arc::new(config), keys, callbacks }
    }
}

/// All dialects on one router. Where E2B's and Novita's paths are the same, the headers say whose a call is.
pub fn router(state: ApiState) -> Router {
    let routes = e2b::routes(&state).merge(hopx::routes(&state)).merge(native::routes(&state)).merge(novita::own(&state));
    let common = layers::closed(routes).with_state(state.clone());
    let novita = novita::over(&state, common.clone());
    let by_caller = move |request: Request| {
        let router = if novita::is_spoken_in(request.headers()) { novita.clone() } else { common.clone() };
        router.oneshot(request)
    };
    layers::around(Router::new().fallback(by_caller))
}
