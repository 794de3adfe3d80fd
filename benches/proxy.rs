//! What the proxy adds to a GET: the same server asked directly and through the proxy, in turns, on one connection each.
//!
//! `cargo bench --bench proxy` prints medians and fails when the proxy adds more than [`ADDED_MAX`].

use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stillbox::model::{BuildId, ByteSize, Lifecycle, NetworkPolicy, Resources, SandboxId, SandboxSpec, SandboxState, Secure, TemplateId};
use stillbox::proxy::{Door, Listener, Proxy, ProxyConfig, Seen, Switchboard, serve};
use stillbox::sandbox::{BearerError, RouteError, TokenKind};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// docs/SPECIFICATION.md.
const ADDED_MAX: Duration = Duration::from_micros(100);
const WARM_UP: usize = 500;
const ROUNDS: usize = 5000;

/// One sandbox whose every port is the same server.
#[derive(Debug)]
struct OneSandbox {
    id: SandboxId,
    spec: Arc<SandboxSpec>,
    server: SocketAddr,
}

#[async_trait::async_trait]
impl Door for OneSandbox {
    fn id(&self) -> SandboxId {
        self.id
    }
    fn spec(&self) -> &SandboxSpec {
        &self.spec
    }
    async fn dial(&self, _port: u16) -> io::Result<TcpStream> {
        TcpStream::connect(self.server).await
    }
    async fn cut(&self) {
        std::future::pending().await
    }
    fn in_use(&self) -> Option<stillbox::sandbox::InUse> {
        None
    }
}

#[async_trait::async_trait]
impl Switchboard for OneSandbox {
    fn look(&self, _id: SandboxId) -> Option<Seen> {
        // The core hands out a copy of its record; so does this.
        Some(Seen { spec: Arc::new(SandboxSpec::clone(&self.spec)), asleep: false, state: SandboxState::Running, kept: None })
    }
    async fn route(&self, id: SandboxId) -> Result<Arc<dyn Door>, RouteError> {
        Ok(Arc::new(Self { id, spec: Arc::clone(&self.spec), server: self.server }))
    }
    fn find_by_envd_token(&self, _is_it: &mut dyn FnMut(&str) -> bool) -> Option<SandboxId> {
        None
    }
    fn token(&self, _kind: TokenKind, _id: SandboxId) -> String {
        String::new()
    }
    fn accepts_token(&self, _kind: TokenKind, _id: SandboxId, _given: &str) -> bool {
        false
    }
    fn read_bearer(&self, _token: &str) -> Result<SandboxId, BearerError> {
        Err(BearerError::Invalid)
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let server = small_server().await;
    let id = SandboxId::random();
    let proxy = proxy_to(OneSandbox { id, spec: Arc::new(spec()), server }).await;
    let (mut direct, mut proxied) = (connect(server).await, connect(proxy).await);
    let host = format!("8000-{id}.stillbox.localhost");
    for _ in 0..WARM_UP {
        ask(&mut direct, &host).await;
        ask(&mut proxied, &host).await;
    }
    let (mut direct_times, mut proxied_times) = (Vec::with_capacity(ROUNDS), Vec::with_capacity(ROUNDS));
    for _ in 0..ROUNDS {
        direct_times.push(ask(&mut direct, &host).await);
        proxied_times.push(ask(&mut proxied, &host).await);
    }
    report(direct_times, proxied_times)
}

fn report(mut direct: Vec<Duration>, mut proxied: Vec<Duration>) -> ExitCode {
    direct.sort();
    proxied.sort();
    let added = proxied[ROUNDS / 2].saturating_sub(direct[ROUNDS / 2]);
    for (name, times) in [("direct", &direct), ("proxied", &proxied)] {
        println!("{name:8} median {:?}  p99 {:?}", times[ROUNDS / 2], times[ROUNDS * 99 / 100]);
    }
    println!("added    median {added:?}, at most {ADDED_MAX:?}");
    if added <= ADDED_MAX { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn small_server() -> SocketAddr {
    let tcp = TcpListener::bind("127.0.0.1:0").await.expect("a loopback port is free");
    let address = tcp.local_addr().expect("it is bound");
    tokio::spawn(async move {
        while let Ok((stream, _)) = tcp.accept().await {
            stream.set_nodelay(true).expect("a new connection takes options");
            let answer = hyper::service::service_fn(|_request: Request<Incoming>| async {
                Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"hello"))))
            });
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer));
        }
    });
    address
}

async fn proxy_to(sandbox: OneSandbox) -> SocketAddr {
    let tcp = TcpListener::bind("127.0.0.1:0").await.expect("a loopback port is free");
    let address = tcp.local_addr().expect("it is bound");
    let proxy = Proxy::new(ProxyConfig::for_domain("stillbox.localhost"), Arc::new(sandbox));
    let control = tower::service_fn(|_request: Request<Incoming>| async { Ok::<_, Infallible>(Response::new(Full::new(Bytes::new()))) });
    tokio::spawn(async move {
        let (_never, stop) = watch::channel(false);
        serve(Listener { tcp, tls: None }, proxy, control, stop).await;
    });
    address
}

async fn connect(address: SocketAddr) -> SendRequest<Empty<Bytes>> {
    let stream = TcpStream::connect(address).await.expect("it listens");
    stream.set_nodelay(true).expect("a new connection takes options");
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("it speaks HTTP");
    tokio::spawn(connection);
    sender
}

async fn ask(sender: &mut SendRequest<Empty<Bytes>>, host: &str) -> Duration {
    let request = Request::get("/").header("host", host).body(Empty::new()).expect("the request is well formed");
    let asked = Instant::now();
    sender.ready().await.expect("the connection is kept");
    let response = sender.send_request(request).await.expect("it answers");
    let status = response.status();
    let body = response.into_body().collect().await.expect("the body is whole").to_bytes();
    assert!(status.is_success() && &body[..] == b"hello", "{status}");
    asked.elapsed()
}

fn spec() -> SandboxSpec {
    SandboxSpec {
        template: TemplateId::random(),
        build: BuildId::random(),
        alias: Some("base".to_owned()),
        lifecycle: Lifecycle::of(Duration::from_secs(300)),
        resources: Resources { cpu_count: 2, memory: ByteSize::mib(512), disk: ByteSize::gib(20), pids_max: 1024 },
        network: NetworkPolicy::default(),
        metadata: BTreeMap::from([("user".to_owned(), "1".to_owned())]),
        env: BTreeMap::from([("A".to_owned(), "b".to_owned())]),
        secure: Secure::Token,
        volumes: Vec::new(),
    }
}
