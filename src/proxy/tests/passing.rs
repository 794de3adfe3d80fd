//! What passes through: heads, bodies, streams, upgrades.

use super::world::{DOMAIN, Raw, SOON, World, get, mirror, read_head, service, spec, start};
use crate::model::SandboxId;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn host(port: u16, id: SandboxId) -> String {
    format!("{port}-{id}.{DOMAIN}")
}

#[tokio::test]
async fn a_request_reaches_the_port_in_its_host_name_unchanged() {
    let world = World::new();
    let id = world.add(spec());
    world.open_port(id, 8000, mirror().await);
    let server = start(&world).await;
    let host = host(8000, id);
    let (status, _, body) =
        get(&server, &host, "/a%20b?q=1&r", &[("x-one", "1"), ("connection", "x-hop"), ("x-hop", "h"), ("te", "trailers")]).await;
    assert_eq!(status, 200);
    assert_eq!(body, format!("GET /a%20b?q=1&r\nhost: {host}\nx-one: 1\nte: trailers\n\n"));
}

#[tokio::test]
async fn headers_name_sandbox_and_port_on_any_other_host() {
    let world = World::new();
    let id = world.add(spec());
    world.open_port(id, 49983, mirror().await);
    let server = start(&world).await;
    let headers = [("e2b-sandbox-id", id.to_string()), ("e2b-sandbox-port", "49983".to_owned())];
    let headers = [(headers[0].0, headers[0].1.as_str()), (headers[1].0, headers[1].1.as_str())];
    let (status, _, body) = get(&server, "localhost:3000", "/health", &headers).await;
    assert!(status == 200 && body.starts_with("GET /health\nhost: localhost:3000\n"), "{status} {body}");
    let (status, _, body) = get(&server, "localhost:3000", "/health", &headers[..1]).await;
    assert_eq!((status, body.as_str()), (400, "missing header e2b-sandbox-port\n"));
}

#[tokio::test]
async fn what_is_for_no_sandbox_is_the_control_planes() {
    let world = World::new();
    let server = start(&world).await;
    for (host, path) in [("127.0.0.1", "/sandboxes"), ("api.stillbox.localhost:3443", "/health"), ("localhost", "/files")] {
        assert_eq!(get(&server, host, path, &[]).await.2, "control", "{host}{path}");
    }
}

#[tokio::test]
async fn signed_urls_and_tokens_find_their_sandbox_on_a_shared_host() {
    use crate::proxy::Switchboard;
    use base64::Engine as _;
    use sha2::Digest;
    let world = World::new();
    let (id, _other) = (world.add(spec()), world.add(spec()));
    world.open_port(id, 49983, mirror().await);
    let server = start(&world).await;
    let token = world.token(crate::sandbox::TokenKind::EnvdAccess, id);
    let digest = base64::engine::general_purpose::STANDARD_NO_PAD.encode(sha2::Sha256::digest(format!("a.txt:read::{token}")));
    let path = format!("/files?path=a.txt&signature=v1_{}", digest.replace('+', "%2B"));
    assert_eq!(get(&server, "localhost:3000", &path, &[]).await.0, 200);
    assert_eq!(get(&server, "localhost:3000", "/files?path=a.txt&signature=v1_wrong", &[]).await.0, 401);
    let (status, _, body) = get(&server, "localhost:3000", "/process.Process/List", &[("x-access-token", &token)]).await;
    assert!(status == 200 && body.starts_with("GET /process.Process/List\n"), "{status} {body}");
    let (status, _, body) = get(&server, "localhost:3000", "/process.Process/List", &[("x-access-token", "of nobody")]).await;
    assert!(status == 502 && body.contains("was not found"), "{status} {body}");
}

#[tokio::test]
async fn a_host_mask_replaces_the_host_of_user_ports_only() {
    let world = World::new();
    let mut masked = spec();
    masked.network.mask_request_host = Some("localhost:${PORT}".into());
    let id = world.add(masked);
    let mirror = mirror().await;
    world.open_port(id, 8000, mirror);
    world.open_port(id, 49983, mirror);
    let server = start(&world).await;
    let body = get(&server, &host(8000, id), "/", &[]).await.2;
    assert!(body.contains("host: localhost:8000\n") && body.contains(&format!("x-forwarded-host: {}\n", host(8000, id))), "{body}");
    let body = get(&server, &host(49983, id), "/", &[]).await.2;
    assert!(body.contains(&format!("host: {}\n", host(49983, id))) && !body.contains("x-forwarded-host"), "{body}");
}

#[tokio::test]
async fn bodies_stream_both_ways_at_the_same_time() {
    let world = World::new();
    let id = world.add(spec());
    let echo = service(|mut stream| async move {
        read_head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
        let mut buffer = [0; 1024];
        loop {
            let count = stream.read(&mut buffer).await.unwrap();
            if count == 0 {
                break;
            }
            stream.write_all(&buffer[..count]).await.unwrap();
        }
    })
    .await;
    world.open_port(id, 8000, echo);
    let server = start(&world).await;
    let mut client = Raw::connect(&server).await;
    client.send(&format!("POST / HTTP/1.1\r\nhost: {}\r\ntransfer-encoding: chunked\r\n\r\n", host(8000, id))).await;
    client.until("\r\n\r\n").await;
    for part in ["first", "other", "third"] {
        client.send(&format!("5\r\n{part}\r\n")).await;
        client.until(part).await;
    }
    client.send("0\r\n\r\n").await;
    client.until("0\r\n\r\n").await;
}

#[tokio::test]
async fn a_large_body_with_a_length_arrives_whole() {
    let world = World::new();
    let id = world.add(spec());
    const SIZE: usize = 64 << 20;
    let counter = service(|mut stream| async move {
        read_head(&mut stream).await;
        let (mut count, mut buffer) = (0, vec![0; 1 << 16]);
        while count < SIZE {
            count += stream.read(&mut buffer).await.unwrap();
        }
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{count}", count.to_string().len());
        stream.write_all(answer.as_bytes()).await.unwrap();
    })
    .await;
    world.open_port(id, 8000, counter);
    let server = start(&world).await;
    let mut client = Raw::connect(&server).await;
    client.send(&format!("PUT / HTTP/1.1\r\nhost: {}\r\ncontent-length: {SIZE}\r\n\r\n", host(8000, id))).await;
    client.0.write_all(&vec![7; SIZE]).await.unwrap();
    client.until(&SIZE.to_string()).await;
}

#[tokio::test]
async fn heads_without_bodies_and_old_http_are_answered_properly() {
    let world = World::new();
    let id = world.add(spec());
    let service = service(|mut stream| async move {
        let head = read_head(&mut stream).await;
        let answer: &[u8] = match head.split(' ').next().unwrap() {
            "HEAD" => b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n",
            // HTTP/1.0, as python's http.server speaks it: the body ends with the connection.
            _ => b"HTTP/1.0 200 OK\r\n\r\nhello",
        };
        stream.write_all(answer).await.unwrap();
    })
    .await;
    world.open_port(id, 8000, service);
    let server = start(&world).await;
    let mut client = Raw::connect(&server).await;
    client.send(&format!("HEAD / HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", host(8000, id))).await;
    let head = client.rest().await;
    assert!(head.contains("content-length: 5\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    let mut client = Raw::connect(&server).await;
    client.send(&format!("GET / HTTP/1.0\r\nhost: {}\r\n\r\n", host(8000, id))).await;
    let answer = client.rest().await;
    assert!(answer.ends_with("\r\n\r\nhello") && !answer.contains("transfer-encoding"), "{answer}");
}

#[tokio::test]
async fn a_connection_into_the_sandbox_serves_one_request_after_another() {
    let world = World::new();
    let id = world.add(spec());
    let opened = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&opened);
    let keeps_alive = service(move |mut stream| {
        count.fetch_add(1, Ordering::SeqCst);
        async move {
            loop {
                read_head(&mut stream).await;
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
            }
        }
    })
    .await;
    world.open_port(id, 8000, keeps_alive);
    let server = start(&world).await;
    let mut client = Raw::connect(&server).await;
    for _ in 0..20 {
        client.send(&format!("GET / HTTP/1.1\r\nhost: {}\r\n\r\n", host(8000, id))).await;
        client.until("\r\n\r\nok").await;
    }
    assert_eq!(opened.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_kept_connection_that_the_service_closed_is_replaced() {
    let world = World::new();
    let id = world.add(spec());
    let closes = service(|mut stream| async move {
        read_head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
    })
    .await;
    world.open_port(id, 8000, closes);
    let server = start(&world).await;
    let mut client = Raw::connect(&server).await;
    for _ in 0..50 {
        client.send(&format!("POST / HTTP/1.1\r\nhost: {}\r\ncontent-length: 4\r\n\r\nbody", host(8000, id))).await;
        let answer = client.until("ok").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

#[tokio::test]
async fn an_upgraded_connection_carries_bytes_both_ways_and_ends_with_either_side() {
    let world = World::new();
    let id = world.add(spec());
    let (ended, mut seen_end) = tokio::sync::mpsc::unbounded_channel();
    let socket = service(move |mut stream| {
        let ended = ended.clone();
        async move {
            let head = read_head(&mut stream).await.to_ascii_lowercase();
            assert!(
                head.contains("upgrade: websocket\r\n")
                    && head.contains("connection: upgrade\r\n")
                    && head.contains("sec-websocket-key: k\r\n")
            );
            stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\nhello").await.unwrap();
            let mut buffer = [0; 64];
            while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                if buffer[..count].starts_with(b"bye") {
                    break;
                }
                stream.write_all(&buffer[..count].to_ascii_uppercase()).await.unwrap();
            }
            let _nobody_waits = ended.send(());
        }
    })
    .await;
    world.open_port(id, 8000, socket);
    let server = start(&world).await;
    let request = format!(
        "GET /ws HTTP/1.1\r\nhost: {}\r\nconnection: keep-alive, Upgrade\r\nupgrade: websocket\r\nsec-websocket-key: k\r\n\r\n",
        host(8000, id)
    );

    let mut leaving = Raw::connect(&server).await;
    leaving.send(&request).await;
    let head = leaving.until("hello").await;
    assert!(head.starts_with("HTTP/1.1 101 ") && head.to_ascii_lowercase().contains("upgrade: websocket"), "{head}");
    leaving.send("ping").await;
    leaving.until("PING").await;
    drop(leaving);
    tokio::time::timeout(SOON, seen_end.recv()).await.expect("the service was not told that its client went away");

    let mut left = Raw::connect(&server).await;
    left.send(&request).await;
    left.until("hello").await;
    left.send("bye").await;
    assert_eq!(left.rest().await, "");
}

#[tokio::test]
async fn a_client_that_hangs_up_closes_the_connection_into_the_sandbox() {
    for answer in ["", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n"] {
        let world = World::new();
        let id = world.add(spec());
        let (closed, mut seen_closed) = tokio::sync::mpsc::unbounded_channel();
        let waits = service(move |mut stream| {
            let closed = closed.clone();
            async move {
                read_head(&mut stream).await;
                stream.write_all(answer.as_bytes()).await.unwrap();
                // The service is silent, so only the proxy can tell it.
                let _end_or_reset = stream.read(&mut [0; 1]).await;
                closed.send(Instant::now()).unwrap();
            }
        })
        .await;
        world.open_port(id, 49999, waits);
        let server = start(&world).await;
        let mut client = Raw::connect(&server).await;
        client.send(&format!("POST /execute HTTP/1.1\r\nhost: {}\r\ncontent-length: 2\r\n\r\n{{}}", host(49999, id))).await;
        match answer {
            "" => tokio::time::sleep(Duration::from_millis(100)).await,
            _ => drop(client.until("first").await),
        }
        let hung_up = Instant::now();
        drop(client);
        let closed = tokio::time::timeout(SOON, seen_closed.recv()).await.expect("the service was not told").unwrap();
        assert!(closed - hung_up < Duration::from_millis(500), "it took {:?}", closed - hung_up);
    }
}
