//! Sandboxes without a kernel: each port is a server of the test's own, on a loopback port.

use crate::model::{
    AutoResume, BuildId, ByteSize, Keep, Lifecycle, NetworkPolicy, Resources, SandboxId, SandboxSpec, SandboxState, Secure, TemplateId,
};
use crate::proxy::{Door, Listener, Proxy, ProxyConfig, Seen, Switchboard, serve};
use crate::sandbox::{BearerError, InstallKey, RouteError, TokenKind, UnknownSandbox};
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

pub(super) const DOMAIN: &str = "stillbox.localhost:3443";
/// For what should happen at once: long enough for a loaded machine, short enough to notice.
pub(super) const SOON: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Sandbox {
    spec: Arc<SandboxSpec>,
    ports: Arc<Mutex<HashMap<u16, SocketAddr>>>,
    asleep: bool,
    cut: watch::Sender<bool>,
}

#[derive(Debug)]
pub(super) struct World {
    sandboxes: Mutex<HashMap<SandboxId, Sandbox>>,
    /// Whoever wakes a sandbox waits until this is true.
    pub(super) wakes: watch::Sender<bool>,
    key: InstallKey,
}

#[derive(Debug)]
struct FakeDoor {
    id: SandboxId,
    spec: Arc<SandboxSpec>,
    ports: Arc<Mutex<HashMap<u16, SocketAddr>>>,
    cut: watch::Receiver<bool>,
}

#[async_trait::async_trait]
impl Door for FakeDoor {
    fn id(&self) -> SandboxId {
        self.id
    }
    fn spec(&self) -> &SandboxSpec {
        &self.spec
    }
    async fn dial(&self, port: u16) -> io::Result<TcpStream> {
        let address = self.ports.lock().unwrap().get(&port).copied();
        TcpStream::connect(address.ok_or(io::ErrorKind::ConnectionRefused)?).await
    }
    async fn cut(&self) {
        let mut cut = self.cut.clone();
        let _gone_counts_as_cut = cut.wait_for(|cut| *cut).await;
    }
    fn in_use(&self) -> Option<crate::sandbox::InUse> {
        None
    }
}

#[async_trait::async_trait]
impl Switchboard for World {
    fn look(&self, id: SandboxId) -> Option<Seen> {
        let sandboxes = self.sandboxes.lock().unwrap();
        sandboxes.get(&id).map(|sandbox| {
            let (state, kept) = match sandbox.asleep {
                true => (SandboxState::Paused, Some(Keep::Memory)),
                false => (SandboxState::Running, None),
            };
            Seen { spec: Arc::clone(&sandbox.spec), asleep: sandbox.asleep, state, kept }
        })
    }
    async fn route(&self, id: SandboxId) -> Result<Arc<dyn Door>, RouteError> {
        if self.look(id).is_some_and(|seen| seen.asleep) {
            let _opened = self.wakes.subscribe().wait_for(|open| *open).await.map(|_| ());
        }
        let mut sandboxes = self.sandboxes.lock().unwrap();
        let sandbox = sandboxes.get_mut(&id).ok_or(UnknownSandbox(id))?;
        if std::mem::take(&mut sandbox.asleep) && sandbox.spec.lifecycle.auto_resume == AutoResume::Off {
            sandbox.asleep = true;
            return Err(UnknownSandbox(id).into());
        }
        Ok(Arc::new(FakeDoor { id, spec: Arc::clone(&sandbox.spec), ports: Arc::clone(&sandbox.ports), cut: sandbox.cut.subscribe() }))
    }
    fn find_by_envd_token(&self, is_it: &mut dyn FnMut(&str) -> bool) -> Option<SandboxId> {
        let sandboxes = self.sandboxes.lock().unwrap();
        sandboxes.keys().copied().find(|id| is_it(&self.key.token(TokenKind::EnvdAccess, *id)))
    }
    fn token(&self, kind: TokenKind, id: SandboxId) -> String {
        self.key.token(kind, id)
    }
    fn accepts_token(&self, kind: TokenKind, id: SandboxId, given: &str) -> bool {
        self.key.accepts(kind, id, given)
    }
    fn read_bearer(&self, token: &str) -> Result<SandboxId, BearerError> {
        self.key.read_bearer(token, time::OffsetDateTime::now_utc())
    }
}

pub(super) fn spec() -> SandboxSpec {
    SandboxSpec {
        template: TemplateId::random(),
        build: BuildId::random(),
        alias: None,
        lifecycle: Lifecycle::of(Duration::from_secs(300)),
        resources: Resources { cpu_count: 1, memory: ByteSize::mib(512), disk: ByteSize::gib(1), pids_max: 100 },
        network: NetworkPolicy::default(),
        metadata: BTreeMap::new(),
        env: BTreeMap::new(),
        secure: Secure::Token,
        volumes: Vec::new(),
    }
}

impl World {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { sandboxes: Mutex::default(), wakes: watch::Sender::new(true), key: InstallKey::random() })
    }

    pub(super) fn add(&self, spec: SandboxSpec) -> SandboxId {
        let id = SandboxId::random();
        let sandbox = Sandbox { spec: Arc::new(spec), ports: Arc::default(), asleep: false, cut: watch::Sender::new(false) };
        self.sandboxes.lock().unwrap().insert(id, sandbox);
        id
    }

    pub(super) fn open_port(&self, id: SandboxId, port: u16, server: SocketAddr) {
        let ports = Arc::clone(&self.sandboxes.lock().unwrap()[&id].ports);
        ports.lock().unwrap().insert(port, server);
    }

    /// As the core does: first nobody finds it any more, then what is open is cut.
    pub(super) fn kill(&self, id: SandboxId) {
        let killed = self.sandboxes.lock().unwrap().remove(&id).unwrap();
        killed.cut.send_replace(true);
    }

    pub(super) fn put_to_sleep(&self, id: SandboxId) {
        let mut sandboxes = self.sandboxes.lock().unwrap();
        let sandbox = sandboxes.get_mut(&id).unwrap();
        sandbox.asleep = true;
        std::mem::replace(&mut sandbox.cut, watch::Sender::new(false)).send_replace(true);
    }
}

/// A proxy on a loopback port, whose control plane answers `control` to everything.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) address: SocketAddr,
    pub(super) stop: watch::Sender<bool>,
    pub(super) task: tokio::task::JoinHandle<()>,
}

pub(super) async fn start(world: &Arc<World>) -> Server {
    start_with(world, None, ProxyConfig::for_domain(DOMAIN)).await
}

pub(super) async fn start_with(world: &Arc<World>, tls: Option<Arc<rustls::ServerConfig>>, config: ProxyConfig) -> Server {
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = tcp.local_addr().unwrap();
    let proxy = Proxy::new(config, Arc::clone(world) as Arc<dyn Switchboard>);
    let (stop, stopped) = watch::channel(false);
    let control =
        tower::service_fn(|_request: Request<Incoming>| async { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("control")))) });
    let task = tokio::spawn(serve(Listener { tcp, tls }, proxy, control, stopped));
    Server { address, stop, task }
}

/// A server that does `what` with each connection.
pub(super) async fn service<F, W>(what: W) -> SocketAddr
where
    W: Fn(TcpStream) -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = tcp.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = tcp.accept().await {
            tokio::spawn(what(stream));
        }
    });
    address
}

/// A server that answers each request with its head, one `name: value` per line, and its body.
pub(super) async fn mirror() -> SocketAddr {
    service(|stream| async {
        let answer = hyper::service::service_fn(|request: Request<Incoming>| async move {
            let mut text = format!("{} {}\n", request.method(), request.uri());
            for (name, value) in request.headers() {
                text.push_str(&format!("{name}: {}\n", value.to_str().unwrap()));
            }
            let body = request.into_body().collect().await.unwrap().to_bytes();
            text.push_str(&format!("\n{}", String::from_utf8_lossy(&body)));
            Ok::<_, Infallible>(Response::builder().header("x-from", "the sandbox").body(Full::new(Bytes::from(text))).unwrap())
        });
        let _client_went_away = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
    })
    .await
}

/// One GET over a connection of its own: status, content type, body.
pub(super) async fn get(server: &Server, host: &str, path: &str, headers: &[(&str, &str)]) -> (u16, String, String) {
    let stream = TcpStream::connect(server.address).await.unwrap();
    get_over(stream, host, path, headers).await
}

pub(super) async fn get_over<S>(stream: S, host: &str, path: &str, headers: &[(&str, &str)]) -> (u16, String, String)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    let driver = tokio::spawn(connection);
    let mut request = Request::get(path).header("host", host);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = sender.send_request(request.body(Empty::<Bytes>::new()).unwrap()).await.unwrap();
    let status = response.status().as_u16();
    let kind = response.headers().get("content-type").map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    driver.abort();
    (status, kind, String::from_utf8(body.to_vec()).unwrap())
}

/// A connection on which bytes are written and awaited by hand.
#[derive(Debug)]
pub(super) struct Raw(pub(super) TcpStream);

impl Raw {
    pub(super) async fn connect(server: &Server) -> Self {
        Self(TcpStream::connect(server.address).await.unwrap())
    }

    pub(super) async fn send(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).await.unwrap();
    }

    /// What has come once `wanted` is in it.
    pub(super) async fn until(&mut self, wanted: &str) -> String {
        let mut text = String::new();
        let mut buffer = [0; 4096];
        while !text.contains(wanted) {
            let read = tokio::time::timeout(SOON, self.0.read(&mut buffer)).await;
            let count = read.unwrap_or_else(|_| panic!("'{wanted}' did not come, only: {text}")).unwrap();
            assert!(count > 0, "closed before '{wanted}' came, after: {text}");
            text.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
        text
    }

    /// What still comes until the other side closes or resets.
    pub(super) async fn rest(&mut self) -> String {
        let mut bytes = Vec::new();
        let ended = tokio::time::timeout(SOON, self.0.read_to_end(&mut bytes)).await;
        let _closed_or_reset = ended.expect("the connection was not closed");
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Reads a request's head from a connection into a sandbox.
pub(super) async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}
