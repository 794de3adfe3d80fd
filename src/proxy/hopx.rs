//! Requests for HopX's in-sandbox API: who may ask is decided here, by bearer token; the agent answers.
//!
//! HopX's clients repeat a request on 429, 500, 502, 503 and 504, and poll `/health` for as long as its status is not
//! 200: a sandbox that cannot answer is told as a 4xx, and its health as a 200 that says why (contract hopx.md, B1).

use super::address::{ENVD_PORT, Target};
use super::forward::{self, ProxyBody};
use super::refusal::{self, Refusal};
use super::{Proxy, Seen, Sorted};
use crate::model::{Keep, SandboxId, SandboxState};
use crate::sandbox::{BearerError, TokenKind};
use http::header::{self, HeaderName};
use http::uri::PathAndQuery;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri};
use hyper::body::Incoming;
use serde_json::{Value, json};
use stillbox_agent::wire::HOPX_PREFIX;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Comes before every path where the clients' `get_preview_url` has to find a host of HopX's own form in `public_host`.
pub(super) const PREVIEW_PREFIX: &str = "/x.vms.hopx.dev";

/// Its end is told to a URL of the caller's, which is the control plane's to do: a sandbox reaches less, and is not to
/// be trusted with more.
const WITH_CALLBACK: &str = "/execute/async";

const ACCESS_TOKEN: HeaderName = HeaderName::from_static("x-access-token");

/// Why a request is not passed on.
#[derive(Debug, thiserror::Error)]
enum Denied {
    #[error(transparent)]
    Token(#[from] BearerError),
    #[error("the token is another sandbox's than {named}")]
    OtherSandbox { named: String },
    #[error("sandbox {id} not found")]
    Unknown { id: SandboxId },
    #[error("sandbox {id} is {state}; {remedy}")]
    Asleep { id: SandboxId, state: &'static str, remedy: &'static str },
    #[error("{0}")]
    Proxy(Refusal),
}

impl From<Refusal> for Denied {
    fn from(refusal: Refusal) -> Self {
        Self::Proxy(refusal)
    }
}

impl Denied {
    /// Never one that makes the clients repeat the request, but for 429: nothing has run then.
    const fn status_and_code(&self) -> (StatusCode, &'static str) {
        match self {
            Self::Token(BearerError::Invalid) => (StatusCode::UNAUTHORIZED, "INVALID_TOKEN"),
            Self::Token(BearerError::Expired) => (StatusCode::UNAUTHORIZED, "TOKEN_EXPIRED"),
            Self::OtherSandbox { .. } => (StatusCode::FORBIDDEN, "PERMISSION_DENIED"),
            Self::Unknown { .. } => (StatusCode::NOT_FOUND, "SANDBOX_NOT_FOUND"),
            Self::Asleep { .. } => (StatusCode::CONFLICT, "SANDBOX_NOT_RUNNING"),
            Self::Proxy(Refusal::NoPlace(_)) => (StatusCode::TOO_MANY_REQUESTS, "TOO_MANY_SANDBOXES"),
            Self::Proxy(_) => (StatusCode::CONFLICT, "SANDBOX_NOT_REACHABLE"),
        }
    }

    fn into_response(self) -> Response<ProxyBody> {
        let ((status, code), text) = (self.status_and_code(), self.to_string());
        json_response(status, &error_body(code, &text))
    }
}

impl Proxy {
    /// Answers for the sandbox whose token it is, or hands over to the control plane what only that can do.
    pub(super) async fn inside(&self, token: &str, named: Option<&Target>, mut request: Request<Incoming>) -> Sorted {
        let id = match self.whose(token, named) {
            Ok(id) => id,
            Err(denied) => return Sorted::Answered(denied.into_response()),
        };
        let path = without_prefix(request.uri().path()).to_owned();
        if path == WITH_CALLBACK && request.method() == Method::POST {
            *request.uri_mut() = with_path(request.uri(), &format!("/v1/sandboxes/{id}{WITH_CALLBACK}"));
            return Sorted::ControlPlane(request);
        }
        let answered = self.pass_inside(id, &path, request).await;
        Sorted::Answered(answered.unwrap_or_else(Denied::into_response))
    }

    fn whose(&self, token: &str, named: Option<&Target>) -> Result<SandboxId, Denied> {
        let id = self.switchboard.read_bearer(token)?;
        match named {
            Some(target) if target.id != Some(id) => Err(Denied::OtherSandbox { named: target.name.clone() }),
            Some(_) | None => Ok(id),
        }
    }

    async fn pass_inside(&self, id: SandboxId, path: &str, request: Request<Incoming>) -> Result<Response<ProxyBody>, Denied> {
        let seen = self.switchboard.look(id).ok_or(Denied::Unknown { id })?;
        if seen.asleep && path == "/health" {
            return Ok(json_response(StatusCode::OK, &json!({ "status": word(&seen), "vm_id": id.as_str() })));
        }
        let door = match self.holds.route(self.switchboard.as_ref(), id, &seen).await {
            Ok(door) => door,
            // As for every sandbox that traffic does not wake; here its clients are told what to do.
            Err(Refusal::NotFound) => return Err(self.asleep_or_gone(id)),
            Err(other) => return Err(other.into()),
        };
        let in_use = if path == "/health" { None } else { door.in_use() };
        let target = Target::found(id, ENVD_PORT);
        let request = self.for_agent(id, path, request);
        match forward::forward(&self.pool, &door, &target, request, in_use).await {
            Err(Refusal::NotFound) => Err(self.asleep_or_gone(id)),
            other => Ok(other?),
        }
    }

    /// The request as the agent knows it: below its prefix, with the token that the agent itself wants.
    fn for_agent(&self, id: SandboxId, path: &str, mut request: Request<Incoming>) -> Request<Incoming> {
        *request.uri_mut() = with_path(request.uri(), &format!("{HOPX_PREFIX}{path}"));
        let token = HeaderValue::try_from(self.switchboard.token(TokenKind::EnvdAccess, id)).expect("a token is hexadecimal");
        request.headers_mut().insert(ACCESS_TOKEN, token);
        request.headers_mut().remove(header::AUTHORIZATION);
        request
    }

    fn asleep_or_gone(&self, id: SandboxId) -> Denied {
        match self.switchboard.look(id) {
            None => Denied::Unknown { id },
            Some(seen) => Denied::Asleep { id, state: word(&seen), remedy: remedy(&seen) },
        }
    }
}

/// HopX's word for where a sandbox stands.
fn word(seen: &Seen) -> &'static str {
    match (seen.state, seen.kept) {
        (SandboxState::Paused, Some(Keep::FilesOnly)) => "stopped",
        (state, _) => state.as_str(),
    }
}

fn remedy(seen: &Seen) -> &'static str {
    match (seen.state, seen.kept) {
        (SandboxState::Paused, Some(Keep::FilesOnly)) => "start it first (POST /v1/sandboxes/<id>/start)",
        (SandboxState::Paused | SandboxState::Pausing, _) => "resume it first (POST /v1/sandboxes/<id>/resume, or Sandbox.connect)",
        (
            SandboxState::Creating
            | SandboxState::Running
            | SandboxState::Resuming
            | SandboxState::Killing
            | SandboxState::Killed
            | SandboxState::Failed,
            _,
        ) => "try again in a moment",
    }
}

/// The path without [`PREVIEW_PREFIX`].
pub(super) fn without_prefix(path: &str) -> &str {
    match path.strip_prefix(PREVIEW_PREFIX) {
        Some("") => "/",
        Some(rest) if rest.starts_with('/') => rest,
        Some(_) | None => path,
    }
}

/// The same query under another path.
pub(super) fn with_path(uri: &Uri, path: &str) -> Uri {
    let target = match uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    // A path of the request's, or an id of ours before it: what was valid stays so.
    PathAndQuery::try_from(target).map_or_else(|_| uri.clone(), Uri::from)
}

/// What the agent's own errors look like, too.
fn error_body(code: &str, text: &str) -> Value {
    let now = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
    json!({ "error": text, "message": text, "code": code, "details": {}, "timestamp": now })
}

fn json_response(status: StatusCode, body: &Value) -> Response<ProxyBody> {
    refusal::answer(status, "application/json", body.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prefix_that_makes_preview_urls_work_is_taken_off_whole() {
        for (given, wanted) in [
            ("/x.vms.hopx.dev/health", "/health"),
            ("/x.vms.hopx.dev", "/"),
            ("/x.vms.hopx.developer", "/x.vms.hopx.developer"),
            ("/files/read", "/files/read"),
            ("/a/x.vms.hopx.dev/b", "/a/x.vms.hopx.dev/b"),
        ] {
            assert_eq!(without_prefix(given), wanted);
        }
    }

    #[test]
    fn a_query_survives_another_path() {
        let uri = Uri::from_static("/files/read?path=%2Fa%20b");
        assert_eq!(with_path(&uri, "/p/files/read"), "/p/files/read?path=%2Fa%20b");
        assert_eq!(with_path(&Uri::from_static("/a"), "/b"), "/b");
    }
}
