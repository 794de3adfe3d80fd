//! From a request to a port inside a sandbox, and back.
//!
//! `serve` runs one HTTP server per listener. [`address`] decides per request who must answer: a sandbox's port or the
//! control plane. For a sandbox: [`hold`] checks tokens and wakes it when it sleeps, [`forward`] passes the request and
//! streams the answer, [`splice`] goes on after a protocol switch, [`refusal`] is what the proxy says itself.
//! Bodies are never looked at, never kept, and have no size limit.

mod address;
mod forward;
mod hold;
mod hopx;
mod inner_tls;
mod pool;
mod refusal;
mod serve;
mod severable;
mod signature;
mod splice;
pub mod tls;

pub use address::{Domain, ENVD_PORT, HOPX_PORT, INTERPRETER_PORT};
pub use forward::ProxyBody;
pub use serve::{Listener, serve};

use crate::model::{Keep, SandboxId, SandboxSpec, SandboxState};
use crate::sandbox::{BearerError, InUse, Registry, Route, RouteError, TokenKind};
use address::{Destination, Target};
use http::{Method, Request, Response};
use hyper::body::Incoming;
use refusal::Refusal;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;

/// The proxy's knobs. Each has a key in config/stillbox.toml.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyConfig {
    /// Sandboxes are `<port>-<id>.<domain>`; may carry `:port`, which only clients care for.
    pub domain: String,
    /// Client connections at once, per listener; more wait in the backlog. Each costs about 20 KiB.
    pub connections_max: usize,
    /// A client connection without a request for so long is closed. Longer than the SDKs keep theirs (300 s), so that
    /// they are the ones who close.
    pub client_idle_max: Duration,
    /// Requests that wait for sandboxes to wake up, at once.
    pub waiting_max: usize,
    /// How long requests under way may go on after the server was told to stop.
    pub drain_max: Duration,
}

impl ProxyConfig {
    /// The documented defaults for this domain.
    pub fn for_domain(domain: impl Into<String>) -> Self {
        Self {
            domain: domain.into(),
            connections_max: 4096,
            client_idle_max: Duration::from_secs(620),
            waiting_max: 256,
            drain_max: Duration::from_secs(5),
        }
    }
}

/// What the proxy sees of a sandbox before it decides anything.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Its rules as of now.
    pub spec: Arc<SandboxSpec>,
    /// Whether it has no processes at the moment, or is about to have none.
    pub asleep: bool,
    /// Where it stands.
    pub state: SandboxState,
    /// What its last pause kept; `None` for one that runs.
    pub kept: Option<Keep>,
}

/// A way into one running sandbox.
#[async_trait::async_trait]
pub trait Door: Send + Sync + std::fmt::Debug + 'static {
    /// Whose.
    fn id(&self) -> SandboxId;
    /// Its rules at the moment of routing.
    fn spec(&self) -> &SandboxSpec;
    /// One attempt to connect to a port on its loopback.
    async fn dial(&self, port: u16) -> io::Result<TcpStream>;
    /// Resolves, and does so again, when everything open must be closed. Cancel-safe.
    async fn cut(&self);
    /// Held for as long as a request and its answer are under way.
    fn in_use(&self) -> Option<InUse>;
}

/// What the proxy asks of the core; a trait so that the proxy is tested and measured without a sandbox.
#[async_trait::async_trait]
pub trait Switchboard: Send + Sync + std::fmt::Debug + 'static {
    /// A live sandbox.
    fn look(&self, id: SandboxId) -> Option<Seen>;
    /// The way in, after waking it if it may be woken. Cancel-safe.
    async fn route(&self, id: SandboxId) -> Result<Arc<dyn Door>, RouteError>;
    /// The live sandbox with such an envd token.
    fn find_by_envd_token(&self, is_it: &mut dyn FnMut(&str) -> bool) -> Option<SandboxId>;
    /// A sandbox's token.
    fn token(&self, kind: TokenKind, id: SandboxId) -> String;
    /// Whether that is its token, in constant time.
    fn accepts_token(&self, kind: TokenKind, id: SandboxId, given: &str) -> bool;
    /// Whose bearer token it is.
    fn read_bearer(&self, token: &str) -> Result<SandboxId, BearerError>;
}

#[async_trait::async_trait]
impl Door for Route {
    fn id(&self) -> SandboxId {
        self.id
    }
    fn spec(&self) -> &SandboxSpec {
        &self.spec
    }
    async fn dial(&self, port: u16) -> io::Result<TcpStream> {
        Self::dial(self, port).await
    }
    async fn cut(&self) {
        Self::cut(self).await;
    }
    fn in_use(&self) -> Option<InUse> {
        Some(Self::in_use(self))
    }
}

#[async_trait::async_trait]
impl Switchboard for Registry {
    fn look(&self, id: SandboxId) -> Option<Seen> {
        let record = self.get(id).ok()?;
        let asleep = record.state != SandboxState::Running;
        Some(Seen { spec: Arc::new(record.spec), asleep, state: record.state, kept: record.paused })
    }
    async fn route(&self, id: SandboxId) -> Result<Arc<dyn Door>, RouteError> {
        Ok(Arc::new(Self::route(self, id).await?))
    }
    fn find_by_envd_token(&self, is_it: &mut dyn FnMut(&str) -> bool) -> Option<SandboxId> {
        Self::find_by_envd_token(self, is_it)
    }
    fn token(&self, kind: TokenKind, id: SandboxId) -> String {
        Self::token(self, kind, id)
    }
    fn accepts_token(&self, kind: TokenKind, id: SandboxId, given: &str) -> bool {
        Self::accepts_token(self, kind, id, given)
    }
    fn read_bearer(&self, token: &str) -> Result<SandboxId, BearerError> {
        Self::read_bearer(self, token)
    }
}

/// Everything that requests share. One per server.
#[derive(Debug)]
pub struct Proxy {
    config: ProxyConfig,
    domain: Domain,
    switchboard: Arc<dyn Switchboard>,
    holds: hold::Holds,
    pool: Arc<pool::Pool>,
}

/// What became of a request at the proxy's door.
enum Sorted {
    /// It is for a control plane.
    ControlPlane(Request<Incoming>),
    /// The proxy has the answer.
    Answered(Response<ProxyBody>),
}

impl Proxy {
    /// A proxy into the sandboxes that `switchboard` knows.
    pub fn new(config: ProxyConfig, switchboard: Arc<dyn Switchboard>) -> Arc<Self> {
        let (domain, holds) = (Domain::of(&config.domain), hold::Holds::new(config.waiting_max));
        Arc::new(Self { config, domain, switchboard, holds, pool: Arc::default() })
    }

    async fn sort(&self, request: Request<Incoming>) -> Sorted {
        let target = match address::destination(&self.domain, request.method(), request.uri(), request.headers()) {
            Ok(Destination::ControlPlane) => return Sorted::ControlPlane(request),
            Ok(Destination::Sandbox(target)) => target,
            Ok(Destination::Signed(signature)) => match self.switchboard.find_by_envd_token(&mut |token| signature.is_made_with(token)) {
                Some(id) => Target::found(id, ENVD_PORT),
                None => return Sorted::Answered(refusal::unsigned()),
            },
            // An unknown token on a data-plane path belongs to a sandbox that is gone.
            Ok(Destination::TokenHolder { token, port }) => match self.switchboard.find_by_envd_token(&mut |held| same(held, &token)) {
                Some(id) => Target::found(id, port),
                None => Target { name: String::new(), id: None, port },
            },
            Ok(Destination::Hopx { token, named }) => return self.inside(&token, named.as_ref(), request).await,
            Err(error) => return Sorted::Answered(refusal::bad_address(error)),
        };
        Sorted::Answered(self.pass(&target, request).await)
    }

    async fn pass(&self, target: &Target, request: Request<Incoming>) -> Response<ProxyBody> {
        let page_or_json = refusal::Form::wanted_by(request.headers());
        self.try_pass(target, request).await.unwrap_or_else(|refusal| refusal.into_response(target, page_or_json))
    }

    async fn try_pass(&self, target: &Target, request: Request<Incoming>) -> Result<Response<ProxyBody>, Refusal> {
        if request.method() == Method::CONNECT {
            return Err(Refusal::Tunnel);
        }
        // As the sandbox will see it.
        let path = hopx::without_prefix(request.uri().path());
        if target.port == ENVD_PORT && is_internal(path) {
            return Err(Refusal::InternalRoute { path: path.to_owned() });
        }
        let id = target.id.ok_or(Refusal::NotFound)?;
        let seen = self.switchboard.look(id).ok_or(Refusal::NotFound)?;
        hold::check_traffic_token(self.switchboard.as_ref(), id, target.port, &seen, request.headers())?;
        let credentials = (request.method(), request.uri(), request.headers());
        hold::check_may_wake(self.switchboard.as_ref(), target, id, &seen, credentials)?;
        let door = self.holds.route(self.switchboard.as_ref(), id, &seen).await?;
        let in_use = if is_look(target.port, path) { None } else { door.in_use() };
        forward::forward(&self.pool, &door, target, request, in_use).await
    }
}

/// Whether a request only looks whether the sandbox is there (the SDKs' `is_running`), which keeps nothing from being idle.
fn is_look(port: u16, path: &str) -> bool {
    port == ENVD_PORT && path == "/health"
}

/// Paths of envd that only this server may use, however they are spelled.
fn is_internal(path: &str) -> bool {
    const INTERNAL: [&str; 8] = ["init", "freeze", "unfreeze", "collapse", "fsfreeze", "fsthaw", "upgrade", "stillbox"];
    let decoded = percent_encoding::percent_decode_str(path).decode_utf8_lossy();
    let mut kept: Vec<&str> = Vec::new();
    for segment in decoded.split(['/', '\\']) {
        match segment {
            "" | "." => {}
            ".." => drop(kept.pop()),
            name => kept.push(name),
        }
    }
    kept.first().is_some_and(|first| INTERNAL.iter().any(|internal| first.eq_ignore_ascii_case(internal)))
}

/// Equality in time that does not depend on where two texts differ.
fn same(held: &str, given: &str) -> bool {
    held.len() == given.len() && held.bytes().zip(given.bytes()).fold(0, |differing, (a, b)| differing | (a ^ b)) == 0
}

#[cfg(test)]
mod tests;
