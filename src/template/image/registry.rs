//! The client of registries: manifests and blobs over HTTP, from a mirror or from the registry itself.
//!
//! Own code on the HTTP client that the command line has anyway, not the crate oci-client: that one reads answers of any
//! size into memory, follows redirects and token services wherever they lead, and brings a second HTTP stack (reqwest)
//! for what is a blocking stream into an unpacker. Here every body has a bound, a registry that is spoken to over TLS
//! cannot send us or our credentials to a place without, and a blob that breaks off goes on where it ended.

use super::auth::{Challenge, Login, token};
use super::document::ACCEPT;
use super::reference::{Digest, Reference};
use super::{Context, Credentials, ImageProblem};
use std::collections::HashMap;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// Registries' own bound on documents.
pub(super) const DOCUMENT_BYTES_MAX: u64 = 4 << 20;
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
/// A connection that gives nothing for so long is dead.
const SILENCE_MAX: Duration = Duration::from_secs(60);
const REDIRECTS_MAX: usize = 5;
/// Tries in all, with these waits between.
const WAITS: [Duration; 3] = [Duration::from_millis(300), Duration::from_secs(1), Duration::from_secs(4)];
/// The longest wait that a registry may ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);

/// Why nothing came back.
#[derive(Debug, thiserror::Error)]
#[error("{host}: {reason}")]
pub struct TransportError {
    host: String,
    reason: String,
    /// Whether another try may help: not when there is no such host.
    is_transient: bool,
}

/// Why a registry did not give what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No connection, or it broke too often.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// It wants other credentials.
    #[error("the registry refuses these credentials ({status})")]
    Denied {
        /// HTTP status.
        status: u16,
    },
    /// It has no such thing.
    #[error("the registry does not have it")]
    NotFound,
    /// Any other answer.
    #[error("the registry answers {status} when asked for {what}")]
    Status {
        /// HTTP status.
        status: u16,
        /// What was asked for.
        what: String,
    },
    /// It does not speak as registries do.
    #[error("the registry cannot be understood: {0}")]
    Garbled(String),
    /// A redirect or a token service that would give up TLS.
    #[error("the registry leads to {url}, without TLS; if that is meant, name its host under template.plain_http_registries")]
    Insecure {
        /// Where.
        url: String,
    },
    /// Too large.
    #[error("{what} is larger than {limit} bytes")]
    TooLarge {
        /// What.
        what: String,
        /// The bound.
        limit: u64,
    },
    /// The configured login file is no use.
    #[error("{} (template.registry_auth_file) cannot be used: {reason}", path.display())]
    AuthFile {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// All of the pull takes too long.
    #[error("the pull takes longer than template.pull_time_max")]
    TimeOut,
}

/// HTTP with our rules for time, size and TLS.
pub(super) struct Transport<'a> {
    agent: ureq::Agent,
    plain_http: &'a [String],
    deadline: Instant,
}

/// An answer whose body is still to be read.
pub(super) struct Answer {
    pub(super) status: u16,
    headers: ureq::http::HeaderMap,
    body: ureq::Body,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    pub(super) fn read(&mut self, limit: u64) -> Result<Vec<u8>, RegistryError> {
        let mut bytes = Vec::new();
        let read = self.body.as_reader().take(limit + 1).read_to_end(&mut bytes);
        read.map_err(|error| TransportError { host: "the registry".to_owned(), reason: error.to_string(), is_transient: true })?;
        if bytes.len() as u64 > limit {
            return Err(RegistryError::TooLarge { what: "its answer".to_owned(), limit });
        }
        Ok(bytes)
    }
}

impl<'a> Transport<'a> {
    pub(super) fn new(context: &'a Context<'_>) -> Self {
        let settings = &context.config.images;
        let mut agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(CONNECT_TIME_MAX))
            .timeout_recv_response(Some(SILENCE_MAX))
            .timeout_per_read(Some(SILENCE_MAX))
            .user_agent(concat!("stillbox/", env!("CARGO_PKG_VERSION")));
        if let Some(roots) = machine_roots() {
            agent = agent.tls_config(TlsConfig::builder().root_certs(roots).build());
        }
        Self { agent: agent.build().into(), plain_http: &settings.plain_http, deadline: Instant::now() + settings.pull_time_max }
    }

    fn scheme_of(&self, host: &str) -> &'static str {
        if self.is_plain(host) { "http" } else { "https" }
    }

    fn is_plain(&self, authority: &str) -> bool {
        let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
        self.plain_http.iter().any(|plain| plain == authority || plain == host)
    }

    fn time_left(&self) -> Result<Duration, RegistryError> {
        Some(self.deadline.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero()).ok_or(RegistryError::TimeOut)
    }

    pub(super) fn get(&self, url: &str, headers: &[(&str, &str)], authorization: Option<&str>) -> Result<Answer, RegistryError> {
        let mut url = url.to_owned();
        let mut authorization = authorization;
        for _ in 0..=REDIRECTS_MAX {
            let answer = self.get_once(&url, headers, authorization)?;
            if !matches!(answer.status, 301 | 302 | 303 | 307 | 308) {
                return Ok(answer);
            }
            let next = answer.header("location").and_then(|to| joined(&url, to));
            let next = next.ok_or_else(|| RegistryError::Garbled("it redirects to nowhere".to_owned()))?;
            // Storage behind a registry has its own signatures in the address; our credentials are not for it.
            if authority_of(&next) != authority_of(&url) {
                authorization = None;
            }
            url = next;
        }
        Err(RegistryError::Garbled(format!("it redirects more than {REDIRECTS_MAX} times")))
    }

    fn get_once(&self, url: &str, headers: &[(&str, &str)], authorization: Option<&str>) -> Result<Answer, RegistryError> {
        self.check_tls(url)?;
        let mut request = self.agent.get(url).config().timeout_global(Some(self.time_left()?)).build();
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        answered(url, request.call())
    }

    /// A POST to a service that is known by name; never redirected.
    pub(super) fn post(&self, url: &str, headers: &[(&str, &str)], authorization: &str, body: &[u8]) -> Result<Answer, RegistryError> {
        self.check_tls(url)?;
        let mut request = self.agent.post(url).config().timeout_global(Some(self.time_left()?)).build();
        for (name, value) in headers.iter().filter(|(name, _)| *name != "host") {
            request = request.header(*name, *value);
        }
        answered(url, request.header("authorization", authorization).send(body))
    }

    fn check_tls(&self, url: &str) -> Result<(), RegistryError> {
        let is_allowed = url.starts_with("https://") || (url.starts_with("http://") && self.is_plain(authority_of(url)));
        if is_allowed { Ok(()) } else { Err(RegistryError::Insecure { url: url.chars().take(200).collect() }) }
    }
}

fn answered(url: &str, outcome: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Answer, RegistryError> {
    let response = outcome.map_err(|error| {
        let is_transient = match &error {
            // Nobody is there, or no way leads there: waiting for it helps a machine without a network little.
            ureq::Error::Io(error) => !matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable
            ),
            ureq::Error::Timeout(_) | ureq::Error::ConnectionFailed | ureq::Error::Protocol(_) => true,
            _ => false,
        };
        TransportError { host: authority_of(url).to_owned(), reason: error.to_string(), is_transient }
    })?;
    let (parts, body) = response.into_parts();
    Ok(Answer { status: parts.status.as_u16(), headers: parts.headers, body })
}

/// The CAs that this machine trusts, so that a company's own registry works; none found = the built-in ones.
fn machine_roots() -> Option<RootCerts> {
    static ROOTS: OnceLock<Vec<Certificate<'static>>> = OnceLock::new();
    let roots = ROOTS.get_or_init(|| {
        let found = rustls_native_certs::load_native_certs();
        found.certs.iter().map(|der| Certificate::from_der(der.as_ref()).to_owned()).collect()
    });
    (!roots.is_empty()).then(|| RootCerts::new_with_certs(roots))
}

fn authority_of(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    authority.rsplit_once('@').map_or(authority, |(_, host)| host)
}

/// A redirect's target: absolute, or a path on the same host.
fn joined(from: &str, to: &str) -> Option<String> {
    if to.starts_with("https://") || to.starts_with("http://") {
        return Some(to.to_owned());
    }
    let (scheme, _) = from.split_once("://")?;
    match to.strip_prefix("//") {
        Some(rest) => Some(format!("{scheme}://{rest}")),
        None => to.starts_with('/').then(|| format!("{scheme}://{}{to}", authority_of(from))),
    }
}

/// One place that may have the image.
struct Endpoint {
    /// Without a trailing slash.
    base: String,
    /// Mirrors are told whose image is meant.
    query: String,
    login: Option<Login>,
}

/// One repository, at its mirrors and at home.
pub(super) struct Registry<'a> {
    transport: Transport<'a>,
    context: &'a Context<'a>,
    reference: &'a Reference,
    endpoints: Vec<Endpoint>,
    /// Authorization headers that worked, by endpoint.
    tokens: Mutex<HashMap<usize, String>>,
}

impl<'a> Registry<'a> {
    /// Credentials go to the registry itself; mirrors are opened by the login file.
    pub(super) fn open(
        context: &'a Context<'a>,
        reference: &'a Reference,
        credentials: Option<&Credentials>,
    ) -> Result<Self, RegistryError> {
        let transport = Transport::new(context);
        let settings = &context.config.images;
        let from_file = |host: &str| match &settings.auth_file {
            Some(path) => Login::from_file(path, host),
            None => Ok(None),
        };
        let mut endpoints = Vec::new();
        for mirror in settings.mirrors.get(&reference.registry).into_iter().flatten() {
            let base = mirror.trim_end_matches('/').to_owned();
            let login = from_file(authority_of(&base))?;
            endpoints.push(Endpoint { base, query: format!("?ns={}", reference.registry), login });
        }
        let login = match credentials {
            Some(credentials) => Some(Login::of(credentials, &transport)?),
            None => from_file(&reference.registry)?,
        };
        let host = match reference.registry.as_str() {
            "docker.io" => "registry-1.docker.io",
            other => other,
        };
        endpoints.push(Endpoint { base: format!("{}://{host}", transport.scheme_of(host)), query: String::new(), login });
        Ok(Self { transport, context, reference, endpoints, tokens: Mutex::default() })
    }

    /// The document that `target` (tag or digest) names, with its digest.
    pub(super) fn manifest(&self, target: &str) -> Result<(Vec<u8>, Digest), ImageProblem> {
        let path = format!("manifests/{target}");
        let (bytes, announced) = self.retried(|endpoint| {
            let mut answer = self.ask(endpoint, &path, &[("accept", ACCEPT)])?;
            let announced = answer.header("docker-content-digest").and_then(|digest| Digest::try_from(digest.to_owned()).ok());
            Ok((answer.read(DOCUMENT_BYTES_MAX)?, announced))
        })?;
        let found = Digest::of(&bytes);
        let expected = Digest::try_from(target.to_owned()).ok().or(announced);
        match expected {
            Some(expected) if expected != found => Err(ImageProblem::Mismatch { what: "its manifest".to_owned(), expected, found }),
            _ => Ok((bytes, found)),
        }
    }

    /// A small blob, compared with its digest.
    pub(super) fn document(&self, digest: &Digest) -> Result<Vec<u8>, ImageProblem> {
        let path = format!("blobs/{digest}");
        let bytes = self.retried(|endpoint| self.ask(endpoint, &path, &[])?.read(DOCUMENT_BYTES_MAX))?;
        let found = Digest::of(&bytes);
        match found == *digest {
            true => Ok(bytes),
            false => Err(ImageProblem::Mismatch { what: "its configuration".to_owned(), expected: digest.clone(), found }),
        }
    }

    /// A blob of `size` bytes as a stream that survives broken connections. Its reader compares the digest.
    pub(super) fn blob(&'a self, digest: &Digest, size: u64) -> Blob<'a> {
        Blob { registry: self, path: format!("blobs/{digest}"), size, offset: 0, body: None, failures: 0, failed_at: 0 }
    }

    /// Endpoint by endpoint, each with patience; the answer of the last one counts. Mirrors may fail in any way.
    fn retried<T>(&self, ask: impl Fn(usize) -> Result<T, RegistryError>) -> Result<T, ImageProblem> {
        let mut last = RegistryError::NotFound;
        for endpoint in 0..self.endpoints.len() {
            match self.with_patience(|| ask(endpoint))? {
                Ok(value) => return Ok(value),
                Err(error) => {
                    if endpoint + 1 < self.endpoints.len() {
                        (self.context.progress)(&format!("mirror {} does not help: {error}", self.endpoints[endpoint].base));
                    }
                    last = error;
                }
            }
        }
        Err(last.into())
    }

    fn with_patience<T>(&self, ask: impl Fn() -> Result<T, RegistryError>) -> Result<Result<T, RegistryError>, ImageProblem> {
        for wait in WAITS {
            self.context.check()?;
            match ask() {
                Err(error) if is_transient(&error) => {
                    (self.context.progress)(&format!("{error}; trying again"));
                    std::thread::sleep(wait);
                }
                outcome => return Ok(outcome),
            }
        }
        self.context.check()?;
        Ok(ask())
    }

    /// One request with whatever credentials it takes; answers below 300 only.
    fn ask(&self, endpoint: usize, path: &str, headers: &[(&str, &str)]) -> Result<Answer, RegistryError> {
        let Endpoint { base, query, login } = &self.endpoints[endpoint];
        let url = format!("{base}/v2/{}/{path}{query}", self.reference.repository);
        let known = self.tokens.lock().unwrap_or_else(PoisonError::into_inner).get(&endpoint).cloned();
        let mut answer = self.transport.get(&url, headers, known.as_deref())?;
        if answer.status == 401 {
            let challenges = answer.headers.get_all("www-authenticate").iter().filter_map(|value| value.to_str().ok());
            let challenge = challenges.filter_map(Challenge::parse).next().ok_or(RegistryError::Denied { status: 401 })?;
            let authorization = token(&self.transport, &challenge, self.reference, login.as_ref())?;
            answer = self.transport.get(&url, headers, Some(&authorization))?;
            self.tokens.lock().unwrap_or_else(PoisonError::into_inner).insert(endpoint, authorization);
        }
        match answer.status {
            200 | 206 => Ok(answer),
            status @ (401 | 403) => Err(RegistryError::Denied { status }),
            404 => Err(RegistryError::NotFound),
            status => {
                if let Some(seconds) = answer.header("retry-after").and_then(|seconds| seconds.parse().ok()) {
                    std::thread::sleep(Duration::from_secs(seconds).min(RETRY_AFTER_MAX));
                }
                Err(RegistryError::Status { status, what: path.to_owned() })
            }
        }
    }
}

fn is_transient(error: &RegistryError) -> bool {
    match error {
        RegistryError::Transport(error) => error.is_transient,
        RegistryError::Status { status, .. } => matches!(status, 408 | 429 | 500 | 502 | 503 | 504),
        RegistryError::Denied { .. }
        | RegistryError::NotFound
        | RegistryError::Garbled(_)
        | RegistryError::Insecure { .. }
        | RegistryError::TooLarge { .. }
        | RegistryError::AuthFile { .. }
        | RegistryError::TimeOut => false,
    }
}

/// A blob on its way. Ends after as many bytes as were announced, or with an error.
pub(super) struct Blob<'a> {
    registry: &'a Registry<'a>,
    path: String,
    size: u64,
    offset: u64,
    body: Option<Box<dyn Read + Send>>,
    failures: usize,
    /// Where the last failure was: one that comes further starts to count anew.
    failed_at: u64,
}

impl Blob<'_> {
    fn open(&self) -> Result<Box<dyn Read + Send>, ImageProblem> {
        let range = format!("bytes={}-", self.offset);
        let headers: &[(&str, &str)] = if self.offset == 0 { &[] } else { &[("range", &range)] };
        let answer = self.registry.retried(|endpoint| self.registry.ask(endpoint, &self.path, headers))?;
        let is_whole = answer.status == 200;
        let mut body = answer.body.into_reader();
        if is_whole && self.offset > 0 {
            let skipped = io::copy(&mut Read::by_ref(&mut body).take(self.offset), &mut io::sink());
            skipped.map_err(|error| RegistryError::Garbled(error.to_string()))?;
        }
        Ok(Box::new(body))
    }

    /// What came, or the reason to try again.
    fn read_some(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let body = match self.body.take() {
            Some(body) => self.body.insert(body),
            None => {
                let opened = self.open().map_err(|problem| io::Error::new(io::ErrorKind::ConnectionRefused, problem))?;
                self.body.insert(opened)
            }
        };
        let left = usize::try_from(self.size - self.offset).unwrap_or(usize::MAX);
        let room = buffer.len().min(left);
        match body.read(&mut buffer[..room])? {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("it ended after {} of {} bytes", self.offset, self.size))),
            read => Ok(read),
        }
    }
}

impl Read for Blob<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.offset < self.size && !buffer.is_empty() {
            match self.read_some(buffer) {
                Ok(read) => {
                    self.offset += read as u64;
                    return Ok(read);
                }
                // The registry had its chances when the body was asked for.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && self.body.is_none() => return Err(error),
                Err(error) => {
                    self.body = None;
                    self.failures = if self.offset > self.failed_at { 1 } else { self.failures + 1 };
                    self.failed_at = self.offset;
                    if self.failures > WAITS.len() || self.registry.context.stop.load(Ordering::Relaxed) {
                        return Err(error);
                    }
                    (self.registry.context.progress)(&format!("the connection broke ({error}); going on at byte {}", self.offset));
                    std::thread::sleep(WAITS[self.failures - 1]);
                }
            }
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_joined_to_where_they_come_from() {
        let from = "https://r.example:5000/v2/a/blobs/x";
        assert_eq!(joined(from, "/y?z").as_deref(), Some("https://r.example:5000/y?z"));
        assert_eq!(joined(from, "//cdn.example/y").as_deref(), Some("https://cdn.example/y"));
        assert_eq!(joined(from, "http://cdn.example/y").as_deref(), Some("http://cdn.example/y"));
        assert_eq!(joined(from, "file:///etc/passwd"), None);
        assert_eq!(authority_of("https://me:pw@r.example:5000/x"), "r.example:5000");
    }
}
