//! Bytes both ways after a protocol switch (WebSocket or any other), until either side is done or the sandbox is cut.

use super::Door;
use super::pool::Connection;
use crate::sandbox::InUse;
use futures_util::future::{Either, select};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// After one side has closed, the other may go on as long as it sends something this often. Few protocols over HTTP use
/// half-open connections; a peer that is gone must not keep the other end busy.
const HALF_OPEN_MAX: Duration = Duration::from_secs(10);
const BUFFER_BYTES: usize = 16 * 1024;

/// Runs until the connection is over. `connection` only keeps its driver alive until the switch is made; until the end the
/// sandbox counts as used.
pub(super) async fn splice(client: OnUpgrade, sandbox: OnUpgrade, connection: Connection, door: Arc<dyn Door>, in_use: Option<InUse>) {
    // Cancel-safe: a cut resolves again, and dropping both streams is what it is for.
    tokio::select! {
        biased;
        () = door.cut() => {}
        _ended = switch_and_copy(client, sandbox, connection) => {}
    }
    drop(in_use);
}

async fn switch_and_copy(client: OnUpgrade, sandbox: OnUpgrade, connection: Connection) -> io::Result<()> {
    let (client, sandbox) = tokio::try_join!(client, sandbox).map_err(io::Error::other)?;
    drop(connection);
    let (client_in, client_out) = tokio::io::split(TokioIo::new(client));
    let (sandbox_in, sandbox_out) = tokio::io::split(TokioIo::new(sandbox));
    let moved = AtomicU64::new(0);
    let up = std::pin::pin!(copy(client_in, sandbox_out, &moved));
    let down = std::pin::pin!(copy(sandbox_in, client_out, &moved));
    match select(up, down).await {
        Either::Left((Ok(()), down)) => linger(down, &moved).await,
        Either::Right((Ok(()), up)) => linger(up, &moved).await,
        Either::Left((Err(broken), _)) | Either::Right((Err(broken), _)) => Err(broken),
    }
}

/// Copies until the end of `from`, then tells `to` that no more will come.
async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, moved: &AtomicU64) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..count]).await?;
        to.flush().await?;
        moved.fetch_add(1, Ordering::Relaxed);
    }
}

async fn linger(mut rest: impl Future<Output = io::Result<()>> + Unpin, moved: &AtomicU64) -> io::Result<()> {
    loop {
        let before = moved.load(Ordering::Relaxed);
        match tokio::time::timeout(HALF_OPEN_MAX, &mut rest).await {
            Ok(ended) => return ended,
            Err(_) if moved.load(Ordering::Relaxed) == before => return Err(io::ErrorKind::TimedOut.into()),
            Err(_) => {}
        }
    }
}
