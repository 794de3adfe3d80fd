//! Control plane and proxy on one port, as SDKs use them: a sandbox is reachable while it runs and 502 when it does not.

use super::world::World;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use stillbox::proxy::{Listener, Proxy, ProxyConfig, serve};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// A server's port, which closes when this is dropped.
struct Port {
    address: SocketAddr,
    _stop: watch::Sender<bool>,
}

async fn open(world: &World) -> Port {
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, (stop, stopped)) = (tcp.local_addr().unwrap(), watch::channel(false));
    let proxy = Proxy::new(ProxyConfig::for_domain("stillbox.localhost:3443"), Arc::new(world.registry.clone()));
    tokio::spawn(serve(Listener { tcp, tls: None }, proxy, world.router.clone(), stopped));
    Port { address, _stop: stop }
}

impl Port {
    /// What the SDK's `is_running` asks.
    async fn health(&self, sandbox: &Value, token: &Value) -> (u16, String) {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let driver = tokio::spawn(connection);
        let request = Request::get("/health")
            .header("host", "localhost:3000")
            .header("e2b-sandbox-id", sandbox.as_str().unwrap())
            .header("e2b-sandbox-port", "49983")
            .header("x-access-token", token.as_str().unwrap())
            .body(Empty::<Bytes>::new())
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        driver.abort();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }
}

async fn create(world: &World, auto_resume: Value) -> Value {
    let new = json!({"templateID": "base", "timeout": 300, "autoPause": true, "autoResume": auto_resume});
    world.answer("POST", "/v2/sandboxes", Some(new)).await.body
}

#[tokio::test]
async fn a_sandbox_answers_while_it_runs_and_is_not_found_when_paused_or_killed() {
    let world = World::new().await;
    let port = open(&world).await;
    let sandbox = create(&world, json!({"enabled": false})).await;
    let (id, token) = (&sandbox["sandboxID"], &sandbox["envdAccessToken"]);
    assert_eq!(port.health(id, token).await, (204, String::new()));
    let path = format!("/sandboxes/{}", id.as_str().unwrap());
    world.answer("POST", &format!("{path}/pause"), None).await;
    let (status, body) = port.health(id, token).await;
    assert!(status == 502 && body.contains("The sandbox was not found"), "{status} {body}");
    world.answer("POST", &format!("{path}/connect"), Some(json!({"timeout": 60}))).await;
    assert_eq!(port.health(id, token).await.0, 204);
    world.answer("DELETE", &path, None).await;
    assert_eq!(port.health(id, token).await.0, 502);
}

#[tokio::test]
async fn traffic_wakes_a_paused_sandbox_once_and_for_everybody_who_waits() {
    let world = World::new().await;
    let port = open(&world).await;
    let sandbox = create(&world, json!({"enabled": true})).await;
    let (id, token) = (&sandbox["sandboxID"], &sandbox["envdAccessToken"]);
    let path = format!("/sandboxes/{}", id.as_str().unwrap());
    world.answer("POST", &format!("{path}/pause"), None).await;
    assert_eq!(port.health(id, &json!("not the token")).await.0, 403);
    assert_eq!(world.answer("GET", &path, None).await.body["state"], "paused");
    let all = futures_util::future::join_all((0..8).map(|_| port.health(id, token)));
    for (status, body) in tokio::time::timeout(Duration::from_secs(10), all).await.unwrap() {
        assert_eq!(status, 204, "{body}");
    }
    assert_eq!(world.answer("GET", &path, None).await.body["state"], "running");
}
