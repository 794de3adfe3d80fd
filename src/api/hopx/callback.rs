//! A URL that is told the end of an execution: checked when it is given, checked again where it is used, and never
//! followed to another.

use super::error::HopxError;
use super::reachable;
use crate::model::EgressTarget;
use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Request, StatusCode, Uri};
use http_body_util::Full;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use sha2::Sha256;
use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use time::OffsetDateTime;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsConnector;

/// Names that are looked up at once, for all callbacks together: each takes a thread of the server's, which all else that
/// blocks needs too, for as long as the caller's own name server likes.
const LOOKUPS_MAX: usize = 16;
/// The wait for a place and the lookup.
const LOOKUP_MAX: Duration = Duration::from_secs(10);
/// One attempt, from the name's lookup to the answer's head.
const ATTEMPT_MAX: Duration = Duration::from_secs(30);
/// Between two attempts.
const WAITS: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(25)];
const HEADERS_MAX: usize = 32;
const SIGNATURE: HeaderName = HeaderName::from_static("x-hopx-signature");
const TIMESTAMP: HeaderName = HeaderName::from_static("x-hopx-timestamp");
/// What belongs to the connection or to us.
const RESERVED: [HeaderName; 8] = [
    header::HOST,
    header::CONTENT_LENGTH,
    header::CONTENT_TYPE,
    header::TRANSFER_ENCODING,
    header::CONNECTION,
    header::UPGRADE,
    SIGNATURE,
    TIMESTAMP,
];

/// Where callbacks may go, and the places of their lookups.
#[derive(Debug, Clone)]
pub(super) struct Reach {
    allow: Arc<[EgressTarget]>,
    lookups: Arc<Semaphore>,
}

impl Reach {
    /// The public internet, and these.
    pub(super) fn new(allow: &[EgressTarget]) -> Self {
        Self { allow: allow.into(), lookups: Arc::new(Semaphore::new(LOOKUPS_MAX)) }
    }

    /// A caller that is gone does not end a lookup: its place goes with the lookup.
    async fn look_up(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        let looked_up = async {
            let place = Arc::clone(&self.lookups).acquire_owned().await.map_err(io::Error::other)?;
            let host = host.to_owned();
            let lookup = tokio::task::spawn_blocking(move || {
                let _place = place;
                Ok((host.as_str(), port).to_socket_addrs()?.collect())
            });
            lookup.await.map_err(io::Error::other)?
        };
        tokio::time::timeout(LOOKUP_MAX, looked_up).await?
    }
}

/// Where to, with what, signed with what.
#[derive(Clone)]
pub(super) struct Callback {
    url: Uri,
    headers: HeaderMap,
    secret: Option<String>,
    reach: Reach,
}

impl std::fmt::Debug for Callback {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Callback").field("url", &self.url).finish_non_exhaustive()
    }
}

/// Why nobody was told.
#[derive(Debug, thiserror::Error)]
pub(super) enum DeliveryError {
    /// The name leads nowhere, or only where callbacks must not go.
    #[error("{0}")]
    Address(String),
    /// No connection, or a broken one.
    #[error("the callback's server cannot be reached")]
    Connection(#[source] Box<dyn Error + Send + Sync>),
    /// It took too long.
    #[error("the callback's server did not answer within {ATTEMPT_MAX:?}")]
    Slow,
    /// It answered, and not with a success.
    #[error("the callback's server answered {0}")]
    Status(StatusCode),
}

impl DeliveryError {
    /// Whether another attempt may end otherwise.
    fn is_passing(&self) -> bool {
        match self {
            Self::Connection(_) | Self::Slow => true,
            Self::Address(_) => false,
            Self::Status(status) => {
                status.is_server_error() || matches!(*status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS)
            }
        }
    }
}

impl Callback {
    /// Checks form and destination; the name is looked up, and again for each delivery.
    pub(super) async fn parse(
        url: &str,
        headers: BTreeMap<String, String>,
        secret: Option<String>,
        reach: Reach,
    ) -> Result<Self, HopxError> {
        let malformed = |why: &str| HopxError::invalid(format!("callback_url is '{}'; {why}", url.chars().take(200).collect::<String>()));
        let parsed: Uri = url.parse().map_err(|_| malformed("it must be an absolute http or https URL"))?;
        let is_http = matches!(parsed.scheme_str(), Some("http" | "https"));
        if !is_http || parsed.host().is_none_or(str::is_empty) {
            return Err(malformed("it must be an absolute http or https URL"));
        }
        if parsed.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return Err(malformed("it must not carry a user name; use callback_headers"));
        }
        let callback = Self { url: parsed, headers: header_map(headers)?, secret, reach };
        callback.addresses().await.map_err(|error| malformed(&error.to_string()))?;
        Ok(callback)
    }

    pub(super) fn url(&self) -> String {
        self.url.to_string()
    }

    /// Tells it, trying again for a while when that may help.
    pub(super) async fn deliver(&self, body: Bytes) -> Result<(), DeliveryError> {
        let mut waits = WAITS.into_iter();
        loop {
            let attempt = tokio::time::timeout(ATTEMPT_MAX, self.post(body.clone())).await.unwrap_or(Err(DeliveryError::Slow));
            match (attempt, waits.next()) {
                (Err(error), Some(wait)) if error.is_passing() => tokio::time::sleep(wait).await,
                (ended, _) => return ended,
            }
        }
    }

    async fn post(&self, body: Bytes) -> Result<(), DeliveryError> {
        let stream =
            TcpStream::connect(self.addresses().await?.as_slice()).await.map_err(|error| DeliveryError::Connection(error.into()))?;
        let status = match self.url.scheme_str() {
            Some("https") => {
                let host = self.url.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
                let name = rustls_pki_types::ServerName::try_from(host).map_err(|error| DeliveryError::Connection(error.into()))?;
                let connector = TlsConnector::from(tls_config()?);
                let stream = connector.connect(name, stream).await.map_err(|error| DeliveryError::Connection(error.into()))?;
                self.exchange(TokioIo::new(stream), body).await?
            }
            _ => self.exchange(TokioIo::new(stream), body).await?,
        };
        // A redirect would lead past the check of the address.
        status.is_success().then_some(()).ok_or(DeliveryError::Status(status))
    }

    async fn exchange<S>(&self, stream: S, body: Bytes) -> Result<StatusCode, DeliveryError>
    where
        S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    {
        let broken = |error: hyper::Error| DeliveryError::Connection(error.into());
        let (mut sender, connection) = http1::handshake(stream).await.map_err(broken)?;
        let driver = tokio::spawn(connection);
        let answer = sender.send_request(self.request(body)?).await;
        driver.abort();
        Ok(answer.map_err(broken)?.status())
    }

    fn request(&self, body: Bytes) -> Result<Request<Full<Bytes>>, DeliveryError> {
        let timestamp = OffsetDateTime::now_utc().unix_timestamp();
        let target = self.url.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        let host = self.url.authority().map_or("", http::uri::Authority::as_str);
        let mut request = Request::post(target)
            .header(header::HOST, host)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::USER_AGENT, "stillbox")
            .header(TIMESTAMP, timestamp);
        if let Some(secret) = &self.secret {
            request = request.header(SIGNATURE, signature(secret, &body));
        }
        let mut request = request.body(Full::new(body)).map_err(|error| DeliveryError::Connection(error.into()))?;
        request.headers_mut().extend(self.headers.clone());
        Ok(request)
    }

    /// Where its name leads now, without what is not allowed.
    async fn addresses(&self) -> Result<Vec<SocketAddr>, DeliveryError> {
        let port = self.url.port_u16().unwrap_or(if self.url.scheme_str() == Some("https") { 443 } else { 80 });
        let host = self.url.host().unwrap_or_default().trim_matches(['[', ']']);
        let found = self
            .reach
            .look_up(host, port)
            .await
            .map_err(|error| DeliveryError::Address(format!("its host cannot be looked up: {error}")))?;
        let (allowed, refused): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|found| reachable::is_allowed(found.ip(), &self.reach.allow));
        match (allowed.is_empty(), refused.first()) {
            (false, _) => Ok(allowed),
            (true, Some(address)) => Err(DeliveryError::Address(format!(
                "its host leads to {}, which is no public address (api.callback_allow lists the private ones that may be called)",
                address.ip()
            ))),
            (true, None) => Err(DeliveryError::Address("its host has no address".to_owned())),
        }
    }
}

fn header_map(headers: BTreeMap<String, String>) -> Result<HeaderMap, HopxError> {
    if headers.len() > HEADERS_MAX {
        return Err(HopxError::invalid(format!("callback_headers has {} entries; the limit is {HEADERS_MAX}", headers.len())));
    }
    let pair = |(name, value): (String, String)| {
        let refused = |why: &str| HopxError::invalid(format!("callback_headers has '{}', {why}", name.escape_debug()));
        let parsed: HeaderName = name.parse().map_err(|_| refused("which is no header name"))?;
        if RESERVED.contains(&parsed) {
            return Err(refused("which is this server's to set"));
        }
        Ok((parsed, HeaderValue::try_from(value).map_err(|_| refused("whose value is no header value"))?))
    };
    headers.into_iter().map(pair).collect()
}

/// As HopX's clients are told to check it: over the body as it is sent.
fn signature(secret: &str, body: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("HMAC takes keys of any length");
    mac.update(body);
    format!("sha256={}", hex::encode(mac.finalize().into_bytes()))
}

/// The system's authorities, read once.
fn tls_config() -> Result<Arc<rustls::ClientConfig>, DeliveryError> {
    static CONFIG: OnceLock<Arc<rustls::ClientConfig>> = OnceLock::new();
    if let Some(config) = CONFIG.get() {
        return Ok(Arc::clone(config));
    }
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| DeliveryError::Connection(error.into()))?;
    let config = Arc::new(versions.with_root_certificates(roots).with_no_client_auth());
    Ok(Arc::clone(CONFIG.get_or_init(|| config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn refused(url: &str, headers: &[(&str, &str)]) -> String {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let error = Callback::parse(url, headers, None, Reach::new(&[])).await.unwrap_err();
        assert_eq!(error.status_and_message().0, 400);
        error.status_and_message().1.to_owned()
    }

    #[tokio::test]
    async fn private_addresses_and_other_schemes_are_refused() {
        for url in [
            "http://127.0.0.1:1/x",
            "http://[::1]/",
            "https://169.254.169.254/latest",
            "http://10.0.0.1",
            "http://localhost:80/",
            "http://0x7f.1/",
        ] {
            let message = refused(url, &[]).await;
            assert!(message.contains("no public address") || message.contains("cannot be looked up"), "{message}");
        }
        for url in ["ftp://example.com/", "/relative", "example.com", "file:///etc/passwd", ""] {
            assert!(refused(url, &[]).await.contains("absolute http or https URL"), "{url}");
        }
        assert!(refused("http://user:password@1.1.1.1/", &[]).await.contains("user name"));
    }

    #[tokio::test]
    async fn slow_name_servers_keep_a_few_threads_of_the_server_and_no_more() {
        let reach = Reach::new(&[]);
        let slow = Arc::clone(&reach.lookups).acquire_many_owned(16).await.unwrap();
        let parse = || Callback::parse("http://1.1.1.1/", BTreeMap::new(), None, reach.clone());
        assert!(tokio::time::timeout(Duration::from_millis(50), parse()).await.is_err());
        drop(slow);
        parse().await.unwrap();
    }

    #[tokio::test]
    async fn headers_of_the_connection_are_refused() {
        for (name, word) in [("Host", "this server's"), ("X-HOPX-Signature", "this server's"), ("a b", "no header name")] {
            assert!(refused("http://1.1.1.1/", &[(name, "x")]).await.contains(word), "{name}");
        }
        assert!(refused("http://1.1.1.1/", &[("X-A", "a\nb")]).await.contains("value"));
    }

    #[test]
    fn the_signature_is_that_of_the_body() {
        // hmac.new(b"secret", b"{}", "sha256").hexdigest()
        assert_eq!(signature("secret", b"{}"), "sha256=77325902caca812dc259733aacd046b73817372c777b8d95b402647474516e13");
    }
}
