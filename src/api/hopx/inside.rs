//! This server's own questions to the agent of a sandbox. Whatever answers there may be hostile: answers are bounded in
//! size and time, and only passed on.

use crate::model::SandboxId;
use crate::sandbox::{Registry, TokenKind};
use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use std::error::Error;
use std::time::Duration;
use stillbox_agent::wire::{AGENT_PORT, HOPX_PREFIX};

/// An execution's output has 8 MiB of either stream at most; pictures come on top.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum InsideError {
    /// It is gone, paused, or its agent does not answer.
    #[error("the sandbox does not answer")]
    Unreachable(#[source] Box<dyn Error + Send + Sync>),
    /// It took too long.
    #[error("the sandbox did not answer within {0:?}")]
    Slow(Duration),
}

/// One call of HopX's in-sandbox API, on a connection of its own. Cancel-safe: dropping it closes the connection.
pub(super) async fn call(
    registry: &Registry,
    id: SandboxId,
    (method, path): (Method, &str),
    body: Bytes,
    time_max: Duration,
) -> Result<(StatusCode, Bytes), InsideError> {
    let exchange = exchange(registry, id, method, path, body);
    tokio::time::timeout(time_max, exchange).await.map_err(|_| InsideError::Slow(time_max))?.map_err(InsideError::Unreachable)
}

async fn exchange(
    registry: &Registry,
    id: SandboxId,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<(StatusCode, Bytes), Box<dyn Error + Send + Sync>> {
    let route = registry.route(id).await?;
    let _in_use = route.in_use();
    let stream = route.dial(AGENT_PORT).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::builder()
        .method(method)
        .uri(format!("{HOPX_PREFIX}{path}"))
        .header(header::HOST, "localhost")
        .header(header::CONTENT_TYPE, "application/json")
        .header("x-access-token", registry.token(TokenKind::EnvdAccess, id))
        .body(Full::new(body))?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await?.to_bytes();
        Ok((status, body))
    };
    // All arms are cancel-safe: the call is over with the first of them.
    tokio::select! {
        biased;
        answer = answer => answer,
        () = route.cut() => Err("the sandbox was paused or ended".into()),
        closed = connection => Err(closed.err().map_or_else(|| "the connection was closed".into(), Into::into)),
    }
}
