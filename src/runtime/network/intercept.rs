//! Requests that are changed on their way out: a connection for a name with a rule ends here, and another begins.
//!
//! ```text
//!  sandbox ── TLS by our authority, which it trusts ── here: HTTP/1.1, headers set ── TLS by the name's own ── the name
//! ```
//! The other end is always what the *host* resolves the name to, and over TLS it has to prove to be that name: a header's
//! value gets nowhere else, whatever address the sandbox dialled. Bodies are streamed both ways and looked at by nobody;
//! a switch of protocols (WebSockets) is passed on. Values of headers are secrets: nothing here logs them.

use super::gate::{Gate, Target};
use super::rewrite::{Channel, RewriteError};
use super::services::View;
use crate::hop;
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Request, Response, StatusCode, Uri, Version};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self as client, SendRequest};
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use std::io::{self, Cursor};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// A TLS handshake, with the sandbox or with the other end.
const HANDSHAKE_MAX: Duration = Duration::from_secs(15);
/// The first byte of a TLS handshake record.
const TLS_HANDSHAKE: u8 = 0x16;
/// What both ends of an intercepted connection are made with.
#[derive(Clone)]
pub struct Interception {
    server: Arc<rustls::ServerConfig>,
    client: Arc<rustls::ClientConfig>,
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
        client.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { server, client: Arc::new(client) })
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
}

type Body = BoxBody<Bytes, hyper::Error>;

impl Refusal {
    fn response(&self) -> Response<Body> {
        let status = match self {
            Self::Misdirected(_) => StatusCode::MISDIRECTED_REQUEST,
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
    let acceptor = TlsAcceptor::from(Arc::clone(&interception.server));
    let exchange = Exchange {
        gate,
        view,
        name,
        port,
        tls: is_tls.then_some(interception.client),
        other: Mutex::default(),
        switched: Mutex::default(),
    };
    if is_tls {
        converse(timeout(HANDSHAKE_MAX, acceptor.accept(stream)).await??, exchange).await
    } else {
        converse(stream, exchange).await
    }
}

async fn converse(sandbox: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, exchange: Exchange) -> io::Result<()> {
    let exchange = Arc::new(exchange);
    let answer = |request| {
        let exchange = Arc::clone(&exchange);
        async move { Ok::<_, std::convert::Infallible>(exchange.answer(request).await) }
    };
    let serving = server::Builder::new().serve_connection(TokioIo::new(sandbox), service_fn(answer)).with_upgrades();
    serving.await.map_err(io::Error::other)?;
    let switched = lock(&exchange.switched).take();
    let Some((sandbox, other)) = switched else { return Ok(()) };
    let (sandbox, other): (Upgraded, Upgraded) = tokio::try_join!(sandbox, other).map_err(io::Error::other)?;
    copy_bidirectional(&mut TokioIo::new(sandbox), &mut TokioIo::new(other)).await.map(drop)
}

/// One connection of a sandbox's and the one that is made for it; requests follow each other.
#[derive(Debug)]
struct Exchange {
    gate: Gate,
    view: View,
    name: String,
    port: u16,
    /// For who came with TLS, how the other end is spoken to.
    tls: Option<Arc<rustls::ClientConfig>>,
    /// The connection to the other end, between two requests.
    other: Mutex<Option<SendRequest<Incoming>>>,
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
        let protocol = hop::requested_upgrade(request.headers());
        let sandbox = protocol.is_some().then(|| hyper::upgrade::on(&mut request));
        self.rewrite(&mut request, protocol)?;
        let (mut response, sender) = self.send(request).await?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            // Otherwise both sides would speak different protocols.
            let sandbox = sandbox.ok_or_else(|| Refusal::Unasked(self.name.clone()))?;
            let other = hyper::upgrade::on(&mut response);
            *lock(&self.switched) = Some((sandbox, other));
            return Ok(response.map(BodyExt::boxed));
        }
        *lock(&self.other) = Some(sender);
        end_hop(response.headers_mut());
        // hyper frames the body anew, as the sandbox's version of HTTP wants it.
        response.headers_mut().remove(header::TRANSFER_ENCODING);
        *response.version_mut() = Version::HTTP_11;
        Ok(response.map(BodyExt::boxed))
    }

    fn rewrite(&self, request: &mut Request<Incoming>, protocol: Option<HeaderValue>) -> Result<(), RewriteError> {
        *request.uri_mut() = request.uri().path_and_query().map_or_else(|| Uri::from_static("/"), |path| Uri::from(path.clone()));
        *request.version_mut() = Version::HTTP_11;
        end_hop(request.headers_mut());
        // An absolute target may come with any Host beside it. Behind one address many may serve many names, each with a
        // certificate: the other end must not take the request, secrets and all, for somebody else's.
        let host = HeaderValue::from_str(&self.name).map_err(|_| RewriteError::Header(header::HOST.to_string()))?;
        request.headers_mut().insert(header::HOST, host);
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

    async fn send(&self, mut request: Request<Incoming>) -> Result<(Response<Incoming>, SendRequest<Incoming>), Refusal> {
        let bad = |source| Refusal::BadAnswer { name: self.name.clone(), source };
        let kept = lock(&self.other).take();
        if let Some(mut sender) = kept {
            match sender.try_send_request(request).await {
                Ok(response) => return Ok((response, sender)),
                // A kept connection may be closed by the other side just now: what was not sent yet goes through a new one.
                Err(mut failed) => match failed.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(bad(failed.into_error())),
                },
            }
        }
        let mut sender = self.connect().await?;
        let response = sender.send_request(request).await.map_err(bad)?;
        Ok((response, sender))
    }

    async fn connect(&self) -> Result<SendRequest<Incoming>, Refusal> {
        let unreachable = |source| Refusal::Unreachable { name: self.name.clone(), source };
        let target = Target::Name(self.name.clone(), self.port);
        let stream = self.gate.connect_in_time(&self.view, &target).await.map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        let Some(tls) = &self.tls else { return self.shake_hands(stream).await };
        let name = ServerName::try_from(self.name.clone()).map_err(|error| unreachable(io::Error::other(error)))?;
        let connecting = TlsConnector::from(Arc::clone(tls)).connect(name, stream);
        let stream = timeout(HANDSHAKE_MAX, connecting).await.map_err(|late| unreachable(late.into()))?.map_err(unreachable)?;
        self.shake_hands(stream).await
    }

    async fn shake_hands(&self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<SendRequest<Incoming>, Refusal> {
        let shaken = client::handshake(TokioIo::new(stream)).await;
        let (sender, connection) = shaken.map_err(|source| Refusal::BadAnswer { name: self.name.clone(), source })?;
        // Ends by itself once the exchange, or what it switched to, lets go of it.
        tokio::spawn(connection.with_upgrades());
        Ok(sender)
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
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return false };
    host.to_str().is_ok_and(is_name) && request.uri().host().is_none_or(is_name)
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
    }
}
