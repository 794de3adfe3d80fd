//! Sandboxes that are not there, wake up, and go away; and a server that stops.

use super::world::{DOMAIN, Raw, SOON, World, get, mirror, read_head, service, spec, start, start_with};
use crate::model::{AutoResume, PublicTraffic, SandboxId, Secure};
use crate::proxy::{ProxyConfig, Switchboard};
use crate::sandbox::TokenKind;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;

fn host(port: u16, id: SandboxId) -> String {
    format!("{port}-{id}.{DOMAIN}")
}

#[tokio::test]
async fn nobody_answers_502_in_the_words_that_sdks_look_for() {
    let world = World::new();
    let server = start(&world).await;
    let id = SandboxId::random();
    let (status, kind, body) = get(&server, &host(49983, id), "/health", &[]).await;
    assert_eq!((status, kind.as_str()), (502, "application/json; charset=utf-8"));
    assert_eq!(body, format!(r#"{{"code":502,"message":"The sandbox was not found","sandboxId":"{id}"}}"#));
    let page = [("user-agent", "Mozilla/5.0"), ("accept", "text/html")];
    assert_eq!(get(&server, &host(8000, id), "/", &page).await.1, "text/html; charset=utf-8");
}

#[tokio::test]
async fn a_closed_port_is_reported_after_a_second_and_one_that_opens_meanwhile_is_served() {
    let world = World::new();
    let id = world.add(spec());
    let server = start(&world).await;
    let asked = Instant::now();
    let (status, _, body) = get(&server, &host(8000, id), "/", &[]).await;
    assert_eq!(
        (status, body),
        (502, format!(r#"{{"code":502,"message":"The sandbox is running but port is not open","port":8000,"sandboxId":"{id}"}}"#))
    );
    assert!(asked.elapsed() >= Duration::from_secs(1), "it was given up after {:?}", asked.elapsed());

    let mirror = mirror().await;
    let opens_late = async {
        tokio::time::sleep(Duration::from_millis(400)).await;
        world.open_port(id, 8001, mirror);
    };
    let host = host(8001, id);
    let ((status, ..), ()) = tokio::join!(get(&server, &host, "/", &[]), opens_late);
    assert_eq!(status, 200);
}

#[tokio::test]
async fn a_service_that_speaks_no_http_is_a_502_of_its_own() {
    let world = World::new();
    let id = world.add(spec());
    let rude = service(|mut stream| async move {
        read_head(&mut stream).await;
        let _it_may_be_gone = stream.write_all(b"SSH-2.0-what\r\n").await;
    })
    .await;
    world.open_port(id, 22, rude);
    let server = start(&world).await;
    let (status, _, body) = get(&server, &host(22, id), "/", &[]).await;
    assert!(status == 502 && body.contains("without a valid HTTP answer"), "{status} {body}");
}

#[tokio::test]
async fn routes_of_the_agent_that_are_the_servers_alone_are_404() {
    let world = World::new();
    let id = world.add(spec());
    let mirror = mirror().await;
    world.open_port(id, 49983, mirror);
    world.open_port(id, 8000, mirror);
    let server = start(&world).await;
    for path in ["/init", "/freeze", "/stillbox/seed", "//fsthaw", "/%69nit", "/x.vms.hopx.dev/init", "/x.vms.hopx.dev//stillbox/seed"] {
        let (status, _, body) = get(&server, &host(49983, id), path, &[]).await;
        assert!(status == 404 && body.contains(r#""code":404"#) && body.contains(r#""path":""#), "{path}: {status} {body}");
        assert_eq!(get(&server, &host(8000, id), path, &[]).await.0, 200, "{path} of a user's own server");
    }
}

#[tokio::test]
async fn private_user_ports_want_the_traffic_token_and_envd_does_not() {
    let world = World::new();
    let mut private = spec();
    private.network.public_traffic = PublicTraffic::TokenOnly;
    let id = world.add(private);
    let mirror = mirror().await;
    world.open_port(id, 49983, mirror);
    world.open_port(id, 8000, mirror);
    let server = start(&world).await;
    let (host, token) = (host(8000, id), world.token(TokenKind::TrafficAccess, id));
    let (status, _, body) = get(&server, &host, "/", &[]).await;
    assert!(status == 403 && body.contains("Token header 'e2b-traffic-access-token' is missing"), "{status} {body}");
    let (status, _, body) = get(&server, &host, "/", &[("e2b-traffic-access-token", "x")]).await;
    assert!(status == 403 && body.contains("Provided token in header 'e2b-traffic-access-token' is invalid"), "{status} {body}");
    assert_eq!(get(&server, &host, "/", &[("e2b-traffic-access-token", &token)]).await.0, 200);
    assert_eq!(get(&server, &format!("49983-{id}.{DOMAIN}"), "/health", &[]).await.0, 200);
}

#[tokio::test]
async fn traffic_wakes_a_sandbox_only_when_it_may_and_with_the_right_token() {
    let world = World::new();
    let mut wakes = spec();
    wakes.lifecycle.auto_resume = AutoResume::On;
    let (id, sleeps_on) = (world.add(wakes.clone()), world.add(spec()));
    wakes.secure = Secure::Open;
    let open = world.add(wakes);
    let mirror = mirror().await;
    for id in [id, sleeps_on, open] {
        world.open_port(id, 49983, mirror);
        world.open_port(id, 8000, mirror);
        world.put_to_sleep(id);
    }
    let server = start(&world).await;
    let token = world.token(TokenKind::EnvdAccess, id);

    let (status, _, body) = get(&server, &host(49983, id), "/health", &[]).await;
    assert!(status == 403 && body.contains("can't be resumed with the credentials"), "{status} {body}");
    assert_eq!(get(&server, &host(49983, id), "/health", &[("x-access-token", "x")]).await.0, 403);
    assert_eq!(get(&server, &host(49983, id), "/health", &[("x-access-token", &token)]).await.0, 200);
    assert_eq!(get(&server, &host(49983, id), "/health", &[]).await.0, 200, "awake, envd itself decides");
    world.put_to_sleep(id);
    assert_eq!(get(&server, &host(8000, id), "/", &[]).await.0, 200);

    assert_eq!(get(&server, &host(49983, open), "/health", &[]).await.0, 200);
    let (status, _, body) = get(&server, &host(8000, sleeps_on), "/", &[]).await;
    assert!(status == 502 && body.contains("was not found"), "{status} {body}");
}

#[tokio::test]
async fn requests_wait_for_a_wake_and_only_so_many_at_once() {
    let world = World::new();
    let mut wakes = spec();
    wakes.lifecycle.auto_resume = AutoResume::On;
    let id = world.add(wakes);
    world.open_port(id, 8000, mirror().await);
    world.put_to_sleep(id);
    world.wakes.send_replace(false);
    let server = start_with(&world, None, ProxyConfig { waiting_max: 1, ..ProxyConfig::for_domain(DOMAIN) }).await;
    let host = host(8000, id);
    let second_then_wake = async {
        while world.wakes.receiver_count() == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let refused = get(&server, &host, "/", &[]).await;
        world.wakes.send_replace(true);
        refused
    };
    let (first, (status, _, body)) = tokio::join!(get(&server, &host, "/", &[]), second_then_wake);
    assert_eq!(first.0, 200);
    assert!(status == 429 && body.contains("1 requests wait for sandboxes to wake up, the limit is proxy.waiting_max"), "{status} {body}");
}

#[tokio::test]
async fn a_kill_aborts_answers_in_flight_and_the_next_request_finds_nobody() {
    for framing in ["transfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n", "content-length: 100\r\n\r\nfirst", "\r\nfirst"] {
        let world = World::new();
        let id = world.add(spec());
        let streams = service(move |mut stream| async move {
            read_head(&mut stream).await;
            stream.write_all(format!("HTTP/1.1 200 OK\r\n{framing}").as_bytes()).await.unwrap();
            std::future::pending::<()>().await;
        })
        .await;
        world.open_port(id, 49983, streams);
        let server = start(&world).await;
        let mut client = Raw::connect(&server).await;
        client.send(&format!("GET / HTTP/1.1\r\nhost: {}\r\n\r\n", host(49983, id))).await;
        client.until("first").await;
        world.kill(id);
        let rest = client.rest().await;
        assert!(!rest.contains("0\r\n\r\n"), "a cut answer looked complete: {rest}");
        assert_eq!(get(&server, &host(49983, id), "/health", &[]).await.0, 502);
    }
}

#[tokio::test]
async fn a_kill_ends_requests_without_an_answer_and_upgraded_connections() {
    let world = World::new();
    let id = world.add(spec());
    let silent = service(|mut stream| async move {
        let head = read_head(&mut stream).await;
        if head.contains("upgrade") {
            stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n").await.unwrap();
        }
        std::future::pending::<()>().await;
    })
    .await;
    world.open_port(id, 8000, silent);
    let server = start(&world).await;
    let (mut waiting, mut upgraded) = (Raw::connect(&server).await, Raw::connect(&server).await);
    waiting.send(&format!("GET / HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", host(8000, id))).await;
    upgraded.send(&format!("GET / HTTP/1.1\r\nhost: {}\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n", host(8000, id))).await;
    upgraded.until("\r\n\r\n").await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    world.kill(id);
    let answer = waiting.rest().await;
    assert!(answer.starts_with("HTTP/1.1 502") && answer.contains("was not found"), "{answer}");
    assert_eq!(upgraded.rest().await, "");
}

#[tokio::test]
async fn connections_kept_from_before_a_pause_are_not_used_after_it() {
    let world = World::new();
    let mut wakes = spec();
    wakes.lifecycle.auto_resume = AutoResume::On;
    let id = world.add(wakes);
    world.open_port(id, 8000, mirror().await);
    let server = start(&world).await;
    for _ in 0..10 {
        assert_eq!(get(&server, &host(8000, id), "/", &[]).await.0, 200);
        world.put_to_sleep(id);
    }
}

#[tokio::test]
async fn a_server_that_stops_lets_answers_finish_and_takes_no_new_connections() {
    let world = World::new();
    let id = world.add(spec());
    let slow = service(|mut stream| async move {
        read_head(&mut stream).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone").await.unwrap();
    })
    .await;
    world.open_port(id, 8000, slow);
    let server = start(&world).await;
    let mut client = Raw::connect(&server).await;
    client.send(&format!("GET / HTTP/1.1\r\nhost: {}\r\n\r\n", host(8000, id))).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    server.stop.send_replace(true);
    client.until("done").await;
    assert_eq!(client.rest().await, "");
    tokio::time::timeout(SOON, server.task).await.expect("the server did not stop").unwrap();
    assert!(tokio::net::TcpStream::connect(server.address).await.is_err());
}
