//! Connections into sandboxes: one dialled per request at most, kept for a moment when it may serve another.
//!
//! Each connection has a task that drives it until it ends or its sandbox is cut. Cutting marks the connection
//! `severed` before it is dropped, so that a request without an answer is told why; a body in flight ends in an error.

use super::Door;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use std::collections::HashMap;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::AbortHandle;

/// Which port of which sandbox.
pub(super) type Key = (crate::model::SandboxId, u16);

/// How long a connection is kept without use. Shorter than the keep-alive of every common server (gunicorn's 2 s is the
/// shortest), so that we are never the one who sends into a connection that the other side is just closing.
const IDLE_MAX: Duration = Duration::from_secs(1);
/// Kept per port: more than that were concurrent for a moment only.
const IDLE_PER_PORT_MAX: usize = 8;

/// A connection in use. Dropped before the exchange is over it closes the connection; [`Connection::done`] keeps it.
#[derive(Debug)]
pub(super) struct Connection {
    /// Where requests are sent.
    pub sender: http1::SendRequest<Incoming>,
    driver: AbortHandle,
    severed: Arc<AtomicBool>,
}

impl Connection {
    /// Speaks HTTP/1.1 over a dialled stream, until `door` is cut.
    pub(super) async fn open(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, door: Arc<dyn Door>) -> io::Result<Self> {
        let handshake = http1::Builder::new().preserve_header_case(true).handshake(TokioIo::new(stream)).await;
        let (sender, connection) = handshake.map_err(io::Error::other)?;
        let severed = Arc::new(AtomicBool::new(false));
        let mark = Arc::clone(&severed);
        let driver = tokio::spawn(async move {
            let mut connection = pin!(connection.with_upgrades());
            // Both arms are cancel-safe: a cut resolves again, and dropping the connection is what a cut is for.
            tokio::select! {
                biased;
                () = door.cut() => mark.store(true, Ordering::Release),
                // How it ended is told to the exchange by hyper; there is nobody else to tell.
                _end = &mut connection => {}
            }
        });
        Ok(Self { sender, driver: driver.abort_handle(), severed })
    }

    /// Set when the sandbox was cut while the connection was open.
    pub(super) fn severed(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.severed)
    }

    /// Gives it back for the next request.
    pub(super) fn done(self, pool: &Arc<Pool>, key: Key) {
        if !self.sender.is_closed() {
            pool.put(key, self);
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Dropping the sender alone would let the driver finish reading an answer that nobody wants.
        self.driver.abort();
    }
}

/// The connections that nobody uses at the moment.
#[derive(Debug, Default)]
pub(super) struct Pool {
    idle: Mutex<Idle>,
}

#[derive(Debug, Default)]
struct Idle {
    by_key: HashMap<Key, Vec<(Instant, Connection)>>,
    /// Whether [`Pool::expire`] runs.
    expiring: bool,
}

impl Pool {
    /// One that is ready for a request, the most recently used first.
    pub(super) fn take(&self, key: Key) -> Option<Connection> {
        let mut idle = self.lock();
        let kept = idle.by_key.get_mut(&key)?;
        let found = std::iter::from_fn(|| kept.pop()).find(|(since, kept)| kept.sender.is_ready() && since.elapsed() < IDLE_MAX);
        if kept.is_empty() {
            idle.by_key.remove(&key);
        }
        found.map(|(_, connection)| connection)
    }

    fn put(self: &Arc<Self>, key: Key, connection: Connection) {
        let mut idle = self.lock();
        let kept = idle.by_key.entry(key).or_default();
        if kept.len() < IDLE_PER_PORT_MAX {
            kept.push((Instant::now(), connection));
        }
        if !std::mem::replace(&mut idle.expiring, true) {
            tokio::spawn(Arc::clone(self).expire());
        }
    }

    /// Closes what was idle for too long, as long as there is anything idle.
    async fn expire(self: Arc<Self>) {
        loop {
            tokio::time::sleep(IDLE_MAX / 2).await;
            let mut idle = self.lock();
            idle.by_key.retain(|_, kept| {
                kept.retain(|(since, connection)| since.elapsed() < IDLE_MAX && !connection.sender.is_closed());
                !kept.is_empty()
            });
            if idle.by_key.is_empty() {
                idle.expiring = false;
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
