//! Requests that are changed on their way out: a connection for a name with a rule ends here, and another begins.
//!
//! ```text
//!  sandbox ── TLS by our authority, which it trusts ── here: HTTP, headers set ── TLS by the name's own ── the name
//! ```
//! The other end is always what the *host* resolves the name to, and over TLS it has to prove to be that name: a header's
//! value gets nowhere else, whatever address the sandbox dialled. Bodies are streamed both ways and looked at by nobody;
//! a switch of protocols (WebSockets) is passed on. Who speaks HTTP/2 to us is spoken for in HTTP/2 where the other end
//! knows it, else in HTTP/1.1; who speaks HTTP/1.1 always in that. Values of headers are secrets: nothing here logs them.

use super::gate::{Gate, Target};
use super::rewrite::{Channel, RewriteError};
use super::services::View;
use crate::hop;
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri, Version, uri};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper::server::conn as server;
use hyper::service::service_fn;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use std::io::{self, Cursor};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// A TLS handshake, with the sandbox or with the other end.
const HANDSHAKE_MAX: Duration = Duration::from_secs(15);
/// The first byte of a TLS handshake record.
const TLS_HANDSHAKE: u8 = 0x16;
/// Requests of one connection at the same time, where the protocol allows more than one.
const STREAMS_MAX: u32 = 64;
/// What is held of a connection's bodies, and of one request's answer, while the sandbox or the other end takes no more: a
/// sandbox has [`super::gate::CONNECTIONS_MAX`] of them.
const HELD_MAX: u32 = 1 << 20;
const HELD_OF_STREAM_MAX: usize = 16 << 10;
const HTTP_2: &[u8] = b"h2";
const HTTP_1: &[u8] = b"http/1.1";

/// What both ends of an intercepted connection are made with.
#[derive(Clone)]
pub struct Interception {
    server: Arc<rustls::ServerConfig>,
    /// For requests in HTTP/1.1.
    client: Arc<rustls::ClientConfig>,
    /// For requests in HTTP/2, which can be sent in either.
    client_of_either: Arc<rustls::ClientConfig>,
}

impl Interception {
    /// `server` shows the sandbox a leaf for whatever name it asks for. The other end is trusted by the system's
    /// authorities and those of `extra_ca_file`.
    pub fn new(server: Arc<rustls::ServerConfig>, extra_ca_file: Option<&Path>) -> io::Result<Self> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if let Some(path) = extra_ca_file {
            let unreadable = |error| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display()));
            for certificate in CertificateDer::pem_file_iter(path).map_err(unreadable)? {
                roots.add(certificate.map_err(unreadable)?).map_err(io::Error::other)?;
            }
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let mut client = versions.map_err(io::Error::other)?.with_root_certificates(roots).with_no_client_auth();
        client.alpn_protocols = vec![HTTP_1.to_vec()];
        let mut client_of_either = client.clone();
        client_of_either.alpn_protocols = vec![HTTP_2.to_vec(), HTTP_1.to_vec()];
        Ok(Self { server, client: Arc::new(client), client_of_either: Arc::new(client_of_either) })
    }
}

impl PartialEq for Interception {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.server, &other.server) && Arc::ptr_eq(&self.client, &other.client)
    }
}

impl Eq for Interception {}

impl std::fmt::Debug for Interception {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Interception").finish_non_exhaustive()
    }
}

/// A connection that was sent here, as far as it was read.
#[derive(Debug)]
pub(super) struct Intercepted {
    pub(super) stream: TcpStream,
    pub(super) head: Vec<u8>,
    /// Whom it is for, as its head says.
    pub(super) name: String,
    pub(super) port: u16,
}

/// Why a request was answered here and not by whom it was for.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("this connection was made to {0}; requests to other names need one of their own")]
    Misdirected(String),
    #[error(transparent)]
    Rewrite(#[from] RewriteError),
    #[error("{name} cannot be reached: {source}")]
    Unreachable {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("{name} gave no proper answer")]
    BadAnswer {
        name: String,
        #[source]
        source: hyper::Error,
    },
    #[error("{0} switched protocols unasked")]
    Unasked(String),
    #[error("no tunnel is made through a connection whose requests are changed")]
    Tunnel,
}

type Body = BoxBody<Bytes, hyper::Error>;

impl Refusal {
    fn response(&self) -> Response<Body> {
        let status = match self {
            Self::Misdirected(_) => StatusCode::MISDIRECTED_REQUEST,
            Self::Tunnel => StatusCode::NOT_IMPLEMENTED,
            Self::Rewrite(_) | Self::Unreachable { .. } | Self::BadAnswer { .. } | Self::Unasked(_) => StatusCode::BAD_GATEWAY,
        };
        let text = Full::new(Bytes::from(format!("stillbox: {self}\n"))).map_err(|never| match never {}).boxed();
        let mut response = Response::new(text);
        *response.status_mut() = status;
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        response
    }
}

/// Serves one connection to its end. Dropping the future ends both sides.
pub(super) async fn serve(gate: Gate, view: View, interception: Interception, connection: Intercepted) -> io::Result<()> {
    let Intercepted { stream, head, name, port } = connection;
    let is_tls = head.first() == Some(&TLS_HANDSHAKE);
    let (rest, write) = stream.into_split();
    let stream = tokio::io::join(Cursor::new(head).chain(rest), write);
    let exchange = |tls, version| {
        let (other, switched) = (Mutex::default(), Mutex::default());
        Arc::new(Exchange { gate, view, name, port, version, tls, other, switched })
    };
    if !is_tls {
        return converse(stream, exchange(None, Version::HTTP_11)).await;
    }
    let acceptor = TlsAcceptor::from(interception.server);
    let stream = timeout(HANDSHAKE_MAX, acceptor.accept(stream)).await??;
    match stream.get_ref().1.alpn_protocol() {
        Some(HTTP_2) => converse_in_streams(stream, exchange(Some(interception.client_of_either), Version::HTTP_2)).await,
        Some(_) | None => converse(stream, exchange(Some(interception.client), Version::HTTP_11)).await,
    }
}

async fn converse(sandbox: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, exchange: Arc<Exchange>) -> io::Result<()> {
    let answer = |request| answer(Arc::clone(&exchange), request);
    let serving = server::http1::Builder::new().serve_connection(TokioIo::new(sandbox), service_fn(answer)).with_upgrades();
    serving.await.map_err(io::Error::other)?;
    let switched = lock(&exchange.switched).take();
    let Some((sandbox, other)) = switched else { return Ok(()) };
    let (sandbox, other): (Upgraded, Upgraded) = tokio::try_join!(sandbox, other).map_err(io::Error::other)?;
    copy_bidirectional(&mut TokioIo::new(sandbox), &mut TokioIo::new(other)).await.map(drop)
}

async fn converse_in_streams(sandbox: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, exchange: Arc<Exchange>) -> io::Result<()> {
    let mut server = server::http2::Builder::new(TokioExecutor::new());
    server.max_concurrent_streams(STREAMS_MAX).max_send_buf_size(HELD_OF_STREAM_MAX);
    server.initial_stream_window_size(HELD_MAX / 4).initial_connection_window_size(HELD_MAX);
    let answer = move |request| answer(Arc::clone(&exchange), request);
    server.serve_connection(TokioIo::new(sandbox), service_fn(answer)).await.map_err(io::Error::other)
}

async fn answer(exchange: Arc<Exchange>, request: Request<Incoming>) -> Result<Response<Body>, std::convert::Infallible> {
    Ok(exchange.answer(request).await)
}

/// A connection to the other end: for one request after the other, or for many at once.
#[derive(Debug)]
enum Other {
    OneByOne(http1::SendRequest<Incoming>),
    InStreams(http2::SendRequest<Incoming>),
}

impl Other {
    const fn version(&self) -> Version {
        match self {
            Self::OneByOne(_) => Version::HTTP_11,
            Self::InStreams(_) => Version::HTTP_2,
        }
    }

    async fn try_send(&mut self, request: Request<Incoming>) -> Result<Response<Incoming>, TrySendError<Request<Incoming>>> {
        match self {
            Self::OneByOne(sender) => sender.try_send_request(request).await,
            Self::InStreams(sender) => sender.try_send_request(request).await,
        }
    }
}

/// One connection of a sandbox's and those that are made for it.
#[derive(Debug)]
struct Exchange {
    gate: Gate,
    view: View,
    name: String,
    port: u16,
    /// What the sandbox speaks.
    version: Version,
    /// For who came with TLS, how the other end is spoken to.
    tls: Option<Arc<rustls::ClientConfig>>,
    /// The connection to the other end that the next request may have.
    other: Mutex<Option<Other>>,
    /// Both ends after a switch of protocols.
    switched: Mutex<Option<(OnUpgrade, OnUpgrade)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Only whole values are put in and taken out.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Exchange {
    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        match self.pass_on(request).await {
            Ok(response) => response,
            Err(refusal) => {
                tracing::debug!(error = &refusal as &dyn std::error::Error, "A request of a sandbox was not passed on");
                refusal.response()
            }
        }
    }

    async fn pass_on(&self, mut request: Request<Incoming>) -> Result<Response<Body>, Refusal> {
        if !is_for(&request, &self.name) {
            return Err(Refusal::Misdirected(self.name.clone()));
        }
        if request.method() == Method::CONNECT {
            return Err(Refusal::Tunnel);
        }
        let protocol = hop::requested_upgrade(request.headers());
        let sandbox = protocol.is_some().then(|| hyper::upgrade::on(&mut request));
        self.rewrite(&mut request, protocol)?;
        let (mut response, other) = self.send(request).await?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            // Otherwise both sides would speak different protocols.
            let sandbox = sandbox.ok_or_else(|| Refusal::Unasked(self.name.clone()))?;
            let other = hyper::upgrade::on(&mut response);
            *lock(&self.switched) = Some((sandbox, other));
            return Ok(response.map(BodyExt::boxed));
        }
        *lock(&self.other) = Some(other);
        end_hop(response.headers_mut());
        // hyper frames the body anew, as the sandbox's version of HTTP wants it.
        response.headers_mut().remove(header::TRANSFER_ENCODING);
        *response.version_mut() = self.version;
        Ok(response.map(BodyExt::boxed))
    }

    fn rewrite(&self, request: &mut Request<Incoming>, protocol: Option<HeaderValue>) -> Result<(), RewriteError> {
        *request.uri_mut() = request.uri().path_and_query().map_or_else(|| Uri::from_static("/"), |path| Uri::from(path.clone()));
        end_hop(request.headers_mut());
        join_cookies(request.headers_mut());
        let secrets = Arc::clone(&self.gate.secrets.borrow());
        let channel = if self.tls.is_some() { Channel::Encrypted } else { Channel::Plain };
        self.view.rewrites.apply(&self.name, channel, &secrets, request)?;
        let headers = request.headers_mut();
        if let Some(protocol) = protocol {
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(header::UPGRADE, protocol);
        }
        Ok(())
    }

    async fn send(&self, mut request: Request<Incoming>) -> Result<(Response<Incoming>, Other), Refusal> {
        let bad = |source| Refusal::BadAnswer { name: self.name.clone(), source };
        if let Some(mut other) = self.kept() {
            self.address(&mut request, other.version())?;
            match other.try_send(request).await {
                Ok(response) => return Ok((response, other)),
                // A kept connection may be closed by the other side just now: what was not sent yet goes through a new one.
                Err(mut failed) => match failed.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(bad(failed.into_error())),
                },
            }
        }
        let mut other = self.connect().await?;
        self.address(&mut request, other.version())?;
        let response = other.try_send(request).await.map_err(|failed| bad(failed.into_error()))?;
        if let Other::InStreams(sender) = &other {
            // Requests beside this one need none of their own.
            *lock(&self.other) = Some(Other::InStreams(sender.clone()));
        }
        Ok((response, other))
    }

    /// One that takes a request now: of those for many at once it stays for others as well.
    fn kept(&self) -> Option<Other> {
        let mut kept = lock(&self.other);
        match &*kept {
            Some(Other::InStreams(sender)) => Some(Other::InStreams(sender.clone())),
            Some(Other::OneByOne(_)) | None => kept.take(),
        }
    }

    /// Says whom the request is for, and nothing else does: an absolute target may come with any Host beside it. Behind one
    /// address many may serve many names, each with a certificate: the other end must not take the request, secrets and
    /// all, for somebody else's.
    fn address(&self, request: &mut Request<Incoming>, version: Version) -> Result<(), RewriteError> {
        let unfit = || RewriteError::Header(header::HOST.to_string());
        *request.version_mut() = version;
        let path = request.uri().path_and_query().cloned();
        if version == Version::HTTP_2 {
            request.headers_mut().remove(header::HOST);
            let target = Uri::builder().scheme(uri::Scheme::HTTPS).authority(self.name.as_str());
            let path = path.unwrap_or_else(|| uri::PathAndQuery::from_static("/"));
            *request.uri_mut() = target.path_and_query(path).build().map_err(|_| unfit())?;
        } else {
            request.headers_mut().insert(header::HOST, HeaderValue::from_str(&self.name).map_err(|_| unfit())?);
            *request.uri_mut() = path.map_or_else(|| Uri::from_static("/"), Uri::from);
        }
        Ok(())
    }

    async fn connect(&self) -> Result<Other, Refusal> {
        let unreachable = |source| Refusal::Unreachable { name: self.name.clone(), source };
        let place = self.gate.place().await.map_err(unreachable)?;
        let target = Target::Name(self.name.clone(), self.port);
        let stream = self.gate.connect_in_time(&self.view, &target).await.map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        let shaken = |source| Refusal::BadAnswer { name: self.name.clone(), source };
        let Some(tls) = &self.tls else { return one_by_one(stream, place).await.map_err(shaken) };
        let name = ServerName::try_from(self.name.clone()).map_err(|error| unreachable(io::Error::other(error)))?;
        let connecting = TlsConnector::from(Arc::clone(tls)).connect(name, stream);
        let stream = timeout(HANDSHAKE_MAX, connecting).await.map_err(|late| unreachable(late.into()))?.map_err(unreachable)?;
        let made = match stream.get_ref().1.alpn_protocol() {
            Some(HTTP_2) => in_streams(stream, place).await,
            Some(_) | None => one_by_one(stream, place).await,
        };
        made.map_err(shaken)
    }
}

/// Connections end by themselves once the exchange, or what it switched to, lets go of them.
async fn one_by_one(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, place: OwnedSemaphorePermit) -> hyper::Result<Other> {
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(in_place(connection.with_upgrades(), place));
    Ok(Other::OneByOne(sender))
}

async fn in_streams(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, place: OwnedSemaphorePermit) -> hyper::Result<Other> {
    let mut client = http2::Builder::new(TokioExecutor::new());
    client.max_send_buf_size(HELD_OF_STREAM_MAX).initial_stream_window_size(HELD_MAX).initial_connection_window_size(HELD_MAX);
    let (sender, connection) = client.handshake(TokioIo::new(stream)).await?;
    tokio::spawn(in_place(connection, place));
    Ok(Other::InStreams(sender))
}

/// What a connection ends with, its requests are told.
async fn in_place(connection: impl Future<Output = hyper::Result<()>>, place: OwnedSemaphorePermit) {
    let _its_requests_know = connection.await;
    drop(place);
}

/// HTTP/2 may carry cookies one by one; in HTTP/1.1 they are one header (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if cookies.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..]))
    {
        headers.insert(header::COOKIE, joined);
    }
}

/// Whether a request says in every place that it is for a name (lower case, no final dot). Behind the name's address may be
/// other people's servers, told apart by what a request says: none of them is to see a value.
fn is_for<B>(request: &Request<B>, name: &str) -> bool {
    let is_name = |host: &str| {
        let host = host.rsplit_once(':').map_or(host, |(host, _port)| host);
        host.trim_end_matches('.').eq_ignore_ascii_case(name)
    };
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let says_so = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().is_ok_and(is_name),
        // There it is the target that says so.
        (None, _) => request.version() == Version::HTTP_2 && request.uri().host().is_some(),
        (Some(_), Some(_)) => false,
    };
    says_so && request.uri().host().is_none_or(is_name)
}

/// Without what belongs to the hop to us. `Expect` does too: hyper answers it as soon as the body is read.
fn end_hop(headers: &mut HeaderMap) {
    hop::remove(headers);
    headers.remove(header::EXPECT);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_for_a_name_when_nothing_in_it_says_otherwise() {
        let is_for_it = |uri: &str, hosts: &[&str]| {
            let mut request = Request::builder().uri(uri);
            for host in hosts {
                request = request.header(header::HOST, *host);
            }
            is_for(&request.body(()).unwrap(), "api.example.com")
        };
        for (uri, host) in [("/", "api.example.com"), ("/", "API.example.com.:443"), ("http://api.example.com/", "api.example.com")] {
            assert!(is_for_it(uri, &[host]), "{uri} {host}");
        }
        assert!(!is_for_it("/", &["other.example.com"]));
        assert!(!is_for_it("http://api.example.com/", &["other.example.com"]), "a shared address would pass it on by this");
        assert!(!is_for_it("http://other.example.com/", &["api.example.com"]));
        assert!(!is_for_it("/", &["api.example.com", "other.example.com"]) && !is_for_it("/", &[]));
        let in_http_2 = |uri: &str, host: Option<&str>| {
            let request = host.into_iter().fold(Request::builder().uri(uri), |request, host| request.header(header::HOST, host));
            is_for(&request.version(Version::HTTP_2).body(()).unwrap(), "api.example.com")
        };
        assert!(in_http_2("https://api.example.com/", None) && in_http_2("https://api.example.com/", Some("api.example.com")));
        assert!(!in_http_2("https://other.example.com/", None) && !in_http_2("/", None));
        assert!(!in_http_2("https://api.example.com/", Some("other.example.com")));
    }

    #[test]
    fn cookies_that_came_one_by_one_are_one_header() {
        let mut headers = HeaderMap::new();
        for cookie in ["a=1", "b=2"] {
            headers.append(header::COOKIE, HeaderValue::from_static(cookie));
        }
        join_cookies(&mut headers);
        assert_eq!(headers.get_all(header::COOKIE).iter().collect::<Vec<_>>(), ["a=1; b=2"]);
    }
}
