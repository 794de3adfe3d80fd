//! Requests to a sandbox that sleeps: who may wake it, and how many may wait while it wakes.
//!
//! How long one waits is the core's `wake_wait_max`; how many wait at once is [`Holds`]' bound. A request that waits
//! has its body unread in its socket, so a waiting request costs a connection and nothing more.

use super::address::{ENVD_PORT, Target};
use super::refusal::{Refusal, TRAFFIC_TOKEN_HEADER};
use super::signature::Signature;
use super::{Door, Seen, Switchboard};
use crate::model::{PublicTraffic, SandboxId, Secure};
use crate::sandbox::{ConnectError, RouteError, TokenKind};
use http::{HeaderMap, Method, Uri};
use std::error::Error;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// The places for waiting requests.
#[derive(Debug)]
pub(super) struct Holds {
    places: Semaphore,
    limit: usize,
}

impl Holds {
    /// So many may wait at once.
    pub(super) fn new(limit: usize) -> Self {
        Self { places: Semaphore::new(limit), limit }
    }

    /// A way into the sandbox, waking it if it sleeps. Cancel-safe: a wake that began goes on.
    pub(super) async fn route(&self, switchboard: &dyn Switchboard, id: SandboxId, seen: &Seen) -> Result<Arc<dyn Door>, Refusal> {
        let _place = match seen.asleep {
            true => Some(self.places.try_acquire().map_err(|_| self.crowded())?),
            false => None,
        };
        switchboard.route(id).await.map_err(refuse)
    }

    fn crowded(&self) -> Refusal {
        Refusal::NoPlace(format!("{} requests wait for sandboxes to wake up, the limit is proxy.waiting_max; try again later", self.limit))
    }
}

/// Whether traffic without the traffic token may pass. envd has a token of its own.
pub(super) fn check_traffic_token(
    switchboard: &dyn Switchboard,
    id: SandboxId,
    port: u16,
    seen: &Seen,
    headers: &HeaderMap,
) -> Result<(), Refusal> {
    match seen.spec.network.public_traffic {
        PublicTraffic::Allowed => Ok(()),
        PublicTraffic::TokenOnly if port == ENVD_PORT => Ok(()),
        PublicTraffic::TokenOnly => match headers.get(TRAFFIC_TOKEN_HEADER).and_then(|value| value.to_str().ok()) {
            None | Some("") => Err(Refusal::TrafficTokenMissing),
            Some(given) => switchboard.accepts_token(TokenKind::TrafficAccess, id, given).then_some(()).ok_or(Refusal::TrafficTokenInvalid),
        },
    }
}

/// Whether a request may wake a sandbox. On user ports the traffic token has been checked; envd's port wants what envd
/// would want, so that nobody wakes a sandbox only to be told 401 by it.
pub(super) fn check_may_wake(
    switchboard: &dyn Switchboard,
    target: &Target,
    id: SandboxId,
    seen: &Seen,
    request: (&Method, &Uri, &HeaderMap),
) -> Result<(), Refusal> {
    let is_open = !seen.asleep || target.port != ENVD_PORT || seen.spec.secure == Secure::Open;
    (is_open || has_envd_credentials(switchboard, id, request)).then_some(()).ok_or(Refusal::WakeDenied)
}

fn has_envd_credentials(switchboard: &dyn Switchboard, id: SandboxId, (method, uri, headers): (&Method, &Uri, &HeaderMap)) -> bool {
    match headers.get("x-access-token").and_then(|value| value.to_str().ok()) {
        Some(token) => switchboard.accepts_token(TokenKind::EnvdAccess, id, token),
        None => {
            let token = switchboard.token(TokenKind::EnvdAccess, id);
            let is_good = |signature: Signature| signature.is_made_with(&token) && !signature.is_expired(time::OffsetDateTime::now_utc());
            uri.path() == "/files" && Signature::of(method, uri.query().unwrap_or_default()).is_some_and(is_good)
        }
    }
}

fn refuse(error: RouteError) -> Refusal {
    match error {
        RouteError::Unknown(_) | RouteError::Wake(ConnectError::Unknown(_)) => Refusal::NotFound,
        RouteError::Busy { .. } | RouteError::Wake(ConnectError::AlreadyRunning(_) | ConnectError::InTransition { .. }) => {
            Refusal::Transitioning
        }
        RouteError::Wake(ConnectError::TooMany(full)) => Refusal::NoPlace(format!("the paused sandbox cannot be woken now: {full}")),
        RouteError::Wake(ConnectError::Exhausted { exhausted, .. }) => {
            Refusal::NoPlace(format!("the paused sandbox cannot be woken now: {exhausted}"))
        }
        RouteError::Wake(
            failed @ (ConnectError::TooLong { .. }
            | ConnectError::BadMountPath { .. }
            | ConnectError::VolumeFile { .. }
            | ConnectError::Restore { .. }
            | ConnectError::Store(_)),
        ) => {
            // The core has logged it; how often clients try is theirs to choose.
            tracing::debug!(error = &failed as &dyn Error, "A request could not wake its sandbox");
            Refusal::WakeFailed
        }
    }
}
