//! This server's own questions to the agent of a sandbox. Whatever answers there may be hostile: answers are bounded in
//! size and time, and only passed on.

use crate::model::SandboxId;
use crate::sandbox::{Registry, TokenKind};
use bytes::{Bytes, BytesMut};
use http::{Method, Request, StatusCode, header};
use http_body::Body;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use std::error::Error;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use stillbox_agent::wire::{AGENT_PORT, HOPX_PREFIX};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// An execution's output has 8 MiB of either stream at most; pictures come on top.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// All answers together that are held at a time: a sandbox can make each as large as it likes.
const HELD_BYTES_MAX: usize = 256 << 20;

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

/// Room in memory for answers. Clones are of the same.
#[derive(Debug, Clone)]
pub(super) struct AnswerRoom(Arc<Semaphore>);

impl Default for AnswerRoom {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(HELD_BYTES_MAX)))
    }
}

/// An answer, and its place in memory for as long as this lives.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) body: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

/// One call of HopX's in-sandbox API, on a connection of its own, that waits for room for its answer. Cancel-safe:
/// dropping it closes the connection.
pub(super) async fn call(
    registry: &Registry,
    id: SandboxId,
    room: &AnswerRoom,
    (method, path): (Method, &str),
    body: Bytes,
    time_max: Duration,
) -> Result<Answer, InsideError> {
    let exchange = exchange(registry, id, room, (method, path), body);
    tokio::time::timeout(time_max, exchange).await.map_err(|_| InsideError::Slow(time_max))?.map_err(InsideError::Unreachable)
}

async fn exchange(
    registry: &Registry,
    id: SandboxId,
    room: &AnswerRoom,
    (method, path): (Method, &str),
    body: Bytes,
) -> Result<Answer, Box<dyn Error + Send + Sync>> {
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
        let (body, room) = room.collect(Limited::new(response.into_body(), ANSWER_BYTES_MAX)).await?;
        Ok(Answer { status, body, _room: room })
    };
    // All arms are cancel-safe: the call is over with the first of them.
    tokio::select! {
        biased;
        answer = answer => answer,
        () = route.cut() => Err("the sandbox was paused or ended".into()),
        closed = connection => Err(closed.err().map_or_else(|| "the connection was closed".into(), Into::into)),
    }
}

impl AnswerRoom {
    /// All of a body, which takes room as it comes.
    async fn collect<B>(&self, body: B) -> Result<(Bytes, Option<OwnedSemaphorePermit>), Box<dyn Error + Send + Sync>>
    where
        B: Body<Data = Bytes, Error = Box<dyn Error + Send + Sync>>,
    {
        let mut body = pin!(body);
        let mut collected = BytesMut::new();
        let mut held: Option<OwnedSemaphorePermit> = None;
        while let Some(frame) = body.frame().await {
            let Ok(piece) = frame?.into_data() else { continue };
            let more = Arc::clone(&self.0).acquire_many_owned(u32::try_from(piece.len())?).await?;
            match &mut held {
                Some(held) => held.merge(more),
                None => held = Some(more),
            }
            collected.extend_from_slice(&piece);
        }
        Ok((collected.freeze(), held))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(bytes: usize) -> impl Body<Data = Bytes, Error = Box<dyn Error + Send + Sync>> {
        Limited::new(Full::new(Bytes::from(vec![b'x'; bytes])), bytes)
    }

    #[tokio::test]
    async fn answers_wait_for_room_in_memory_until_others_are_done_with() {
        let room = AnswerRoom(Arc::new(Semaphore::new(100)));
        let (first, held) = room.collect(body(70)).await.unwrap();
        assert_eq!(first.len(), 70);
        let soon = Duration::from_millis(50);
        assert!(tokio::time::timeout(soon, room.collect(body(31))).await.is_err());
        let (small, _held) = room.collect(body(30)).await.unwrap();
        assert_eq!(small.len(), 30);
        drop(held);
        assert_eq!(room.collect(body(31)).await.unwrap().0.len(), 31);
    }
}
