//! One request into a sandbox and its answer back, streamed both ways, and nothing of either looked at.
//!
//! Whichever side goes away first takes the other with it: a client that hangs up closes the connection into the
//! sandbox (the code interpreter interrupts its kernel on that), and a sandbox that is cut aborts the answer, so that
//! a body in flight never looks complete.

use super::Door;
use super::address::{ENVD_PORT, Target};
use super::hopx;
use super::inner_tls;
use super::pool::{Connection, Key, Pool};
use super::refusal::Refusal;
use super::splice::splice;
use crate::hop;
use crate::sandbox::InUse;
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Request, Response, StatusCode, Uri, Version};
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;
use hyper::body::Incoming;
use std::error::Error;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::net::TcpStream;

/// A server that was just started may need a moment before it listens: E2B's waits between attempts.
const DIAL_WAITS: [Duration; 4] =
    [Duration::from_millis(100), Duration::from_millis(200), Duration::from_millis(300), Duration::from_millis(400)];
/// One attempt. Inside one machine only a full backlog is slow.
const DIAL_MAX: Duration = Duration::from_secs(5);

/// An answer's body: a sandbox's, or a text of the proxy's own.
#[derive(Debug)]
pub struct ProxyBody(Source);

#[derive(Debug)]
enum Source {
    Own(Full<Bytes>),
    Sandbox(Box<Exchange>),
}

/// What is left of an exchange while its answer's body flows.
#[derive(Debug)]
struct Exchange {
    body: Incoming,
    /// Until the body is over; then the connection goes back to the pool. Dropped earlier it closes.
    connection: Option<(Connection, Arc<Pool>, Key)>,
    in_use: Option<InUse>,
}

impl Exchange {
    fn settle(&mut self) {
        if let Some((connection, pool, key)) = self.connection.take() {
            connection.done(&pool, key);
        }
        self.in_use = None;
    }
}

impl ProxyBody {
    /// A text of our own.
    pub(super) fn text(text: String) -> Self {
        Self(Source::Own(Full::new(Bytes::from(text))))
    }

    fn empty() -> Self {
        Self(Source::Own(Full::new(Bytes::new())))
    }
}

impl Body for ProxyBody {
    type Data = Bytes;
    type Error = Box<dyn Error + Send + Sync>;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let exchange = match &mut self.0 {
            Source::Own(text) => return Pin::new(text).poll_frame(context).map_err(|never| match never {}),
            Source::Sandbox(exchange) => exchange,
        };
        match ready!(Pin::new(&mut exchange.body).poll_frame(context)) {
            Some(Ok(frame)) => {
                if exchange.body.is_end_stream() {
                    exchange.settle();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            // A connection that was cut ends here too: hyper tells its body that it is incomplete.
            Some(Err(error)) => Poll::Ready(Some(Err(error.into()))),
            None => {
                exchange.settle();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Source::Own(text) => text.is_end_stream(),
            Source::Sandbox(exchange) => exchange.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Source::Own(text) => text.size_hint(),
            Source::Sandbox(exchange) => exchange.body.size_hint(),
        }
    }
}

/// Sends the request to `target` through `door` and answers with the head of the sandbox's answer, its body to follow.
/// Dropping the future closes the connection into the sandbox.
pub(super) async fn forward(
    pool: &Arc<Pool>,
    door: &Arc<dyn Door>,
    target: &Target,
    request: Request<Incoming>,
    in_use: Option<InUse>,
) -> Result<Response<ProxyBody>, Refusal> {
    let key = (door.id(), target.port);
    let upgrade = hop::requested_upgrade(request.headers());
    let mut request = rewritten(request, door.as_ref(), target.port);
    let client = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
    if let Some(protocol) = upgrade {
        request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        request.headers_mut().insert(header::UPGRADE, protocol);
    }
    let (mut response, connection) = send(pool, door, key, request).await?;
    match client {
        Some(client) if response.status() == StatusCode::SWITCHING_PROTOCOLS => {
            let sandbox = hyper::upgrade::on(&mut response);
            tokio::spawn(splice(client, sandbox, connection, Arc::clone(door), in_use));
            Ok(response.map(|_no_body| ProxyBody::empty()))
        }
        // A switch that nobody asked for would leave both sides speaking different protocols.
        None if response.status() == StatusCode::SWITCHING_PROTOCOLS => Err(Refusal::BadAnswer),
        Some(_) | None => Ok(answered(response, connection, (pool, key), in_use)),
    }
}

async fn send(
    pool: &Arc<Pool>,
    door: &Arc<dyn Door>,
    key: Key,
    mut request: Request<Incoming>,
) -> Result<(Response<Incoming>, Connection), Refusal> {
    if let Some(mut connection) = pool.take(key) {
        let severed = connection.severed();
        match connection.sender.try_send_request(request).await {
            Ok(response) => return Ok((response, connection)),
            // A kept connection may be closed by the other side just now. What was not sent yet goes through a new one.
            Err(mut failed) => request = failed.take_message().ok_or_else(|| lost(&severed))?,
        }
    }
    let mut connection = dial(door, key.1).await?;
    let severed = connection.severed();
    match connection.sender.send_request(request).await {
        Ok(response) => Ok((response, connection)),
        Err(error) => {
            tracing::debug!(sandbox.id = %key.0, port = key.1, error = &error as &dyn Error, "A service gave no valid answer");
            Err(lost(&severed))
        }
    }
}

fn lost(severed: &AtomicBool) -> Refusal {
    match severed.load(Ordering::Acquire) {
        true => Refusal::NotFound,
        false => Refusal::BadAnswer,
    }
}

async fn dial(door: &Arc<dyn Door>, port: u16) -> Result<Connection, Refusal> {
    // Cancel-safe: a cut resolves again, and a half-made connection is closed by being dropped.
    tokio::select! {
        biased;
        () = door.cut() => Err(Refusal::NotFound),
        opened = dial_patiently(door, port) => opened.ok_or(Refusal::PortClosed),
    }
}

async fn dial_patiently(door: &Arc<dyn Door>, port: u16) -> Option<Connection> {
    let mut waits = DIAL_WAITS.into_iter();
    loop {
        match dial_once(door, port).await {
            Ok(connection) => return Some(connection),
            Err(error) => tracing::trace!(sandbox.id = %door.id(), port, error = &error as &dyn Error, "Could not connect"),
        }
        tokio::time::sleep(waits.next()?).await;
    }
}

async fn dial_once(door: &Arc<dyn Door>, port: u16) -> io::Result<Connection> {
    let stream: TcpStream = tokio::time::timeout(DIAL_MAX, door.dial(port)).await??;
    stream.set_nodelay(true)?;
    if door.spec().network.https_ports.contains(&port) {
        let encrypted = tokio::time::timeout(DIAL_MAX, inner_tls::connect(stream)).await??;
        return Connection::open(encrypted, Arc::clone(door)).await;
    }
    Connection::open(stream, Arc::clone(door)).await
}

fn answered(
    mut response: Response<Incoming>,
    connection: Connection,
    (pool, key): (&Arc<Pool>, Key),
    in_use: Option<InUse>,
) -> Response<ProxyBody> {
    hop::remove(response.headers_mut());
    // hyper frames the body anew, as the client's version of HTTP wants it.
    response.headers_mut().remove(header::TRANSFER_ENCODING);
    *response.version_mut() = Version::HTTP_11;
    response.map(|body| {
        let mut exchange = Exchange { body, connection: Some((connection, Arc::clone(pool), key)), in_use };
        if exchange.body.is_end_stream() {
            exchange.settle();
        }
        ProxyBody(Source::Sandbox(Box::new(exchange)))
    })
}

/// The request as the sandbox sees it: addressed to itself, without the headers of the hop to us.
fn rewritten(mut request: Request<Incoming>, door: &dyn Door, port: u16) -> Request<Incoming> {
    // RFC 9112, 3.2.2: the authority of an absolute target is what counts, whatever Host says.
    let authority = request.uri().authority().and_then(|authority| authority.as_str().rsplit('@').next());
    let host = authority.and_then(|host| HeaderValue::try_from(host).ok());
    *request.uri_mut() = origin_form(request.uri());
    *request.version_mut() = Version::HTTP_11;
    let headers = request.headers_mut();
    if let Some(host) = host {
        headers.insert(header::HOST, host);
    }
    hop::remove(headers);
    // hyper has answered it towards the client as soon as the body is read.
    headers.remove(header::EXPECT);
    if port != ENVD_PORT {
        mask_host(headers, door.spec().network.mask_request_host.as_deref(), port);
    }
    request
}

fn origin_form(uri: &Uri) -> Uri {
    match hopx::without_prefix(uri.path()) {
        path if path.len() != uri.path().len() => hopx::with_path(uri, path),
        _ => uri.path_and_query().map_or_else(|| Uri::from_static("/"), |target| Uri::from(target.clone())),
    }
}

fn mask_host(headers: &mut HeaderMap, mask: Option<&str>, port: u16) {
    let Some(mask) = mask else { return };
    // A mask was checked when it was set; one that is no header value cannot be applied.
    let Ok(masked) = HeaderValue::try_from(mask.replace("${PORT}", &port.to_string())) else { return };
    if let Some(original) = headers.insert(header::HOST, masked) {
        headers.insert(HeaderName::from_static("x-forwarded-host"), original);
    }
}
