//! Requests in HTTP/2 whose headers are set on the way out: what gRPC's clients speak, and nothing else.

use super::intercept::{Between, plain, rules, trusting};
use super::open;
use super::world::{SECURE, Sandbox, in_own_world};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Version};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use stillbox::proxy::tls::Authority;
use tokio_rustls::{TlsAcceptor, TlsConnector};

const RULE: &[(&str, &str)] = &[("X-Token", "s3cret")];

type Body = BoxBody<Bytes, hyper::Error>;

/// Serves HTTP/2 alone at [`SECURE`], in the netns of the calling thread; counts connections.
fn serve(tls: &rustls::ServerConfig, connections: Arc<AtomicUsize>) -> io::Result<()> {
    let listener = TcpListener::bind((SECURE, 443))?;
    listener.set_nonblocking(true)?;
    let mut tls = tls.clone();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            loop {
                let stream = listener.accept().await.unwrap().0;
                connections.fetch_add(1, Ordering::Relaxed);
                let stream = TokioIo::new(acceptor.accept(stream).await.unwrap());
                let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                tokio::spawn(server.serve_connection(stream, service_fn(repeat)));
            }
        });
    });
    Ok(())
}

/// Body and trailers go back as they came; headers tell what arrived.
async fn repeat(request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let seen = |name: &str| request.headers().get(name).cloned().unwrap_or_else(|| "none".parse().unwrap());
    let response = Response::builder().header("saw-token", seen("x-token")).header("saw-te", seen("te")).header("saw-host", seen("host"));
    let response = response.header("saw-target", request.uri().to_string());
    Ok(response.body(request.into_body().boxed()).unwrap())
}

/// A client inside that speaks nothing but HTTP/2.
async fn connect(sandbox: &Sandbox, authority: &Authority) -> SendRequest<Body> {
    let mut config = trusting(authority);
    config.alpn_protocols = vec![b"h2".to_vec()];
    let stream = plain(sandbox, SECURE, 443);
    stream.set_nonblocking(true).unwrap();
    let stream = tokio::net::TcpStream::from_std(stream).unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect("secure.example".try_into().unwrap(), stream).await.unwrap();
    let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn asking(host: &str) -> http::request::Builder {
    Request::post(format!("https://{host}/asked?a=b")).version(Version::HTTP_2)
}

fn with_trailers(text: &'static str) -> Body {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    Full::new(Bytes::from(text)).with_trailers(async move { Some(Ok(trailers)) }).map_err(|never: Infallible| match never {}).boxed()
}

#[test]
fn requests_in_streams_of_one_connection_have_the_rules_headers_and_keep_their_trailers() {
    in_own_world(async |world| {
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&connections);
        let between = Between::open_beside(&world, move |tls| serve(&tls, counted)).await;
        let sandbox = world.sandbox(&between.network, &rules(open(), &[("secure.example", RULE)])).await;
        let client = connect(&sandbox, &between.ours).await;
        let ask = async |host: &str, text| {
            let request = asking(host).header("te", "trailers").header("x-token", "guess").body(with_trailers(text)).unwrap();
            let (head, body) = client.clone().send_request(request).await.unwrap().into_parts();
            let body = body.collect().await.unwrap();
            let trailers = body.trailers().cloned();
            (head, trailers, String::from_utf8(body.to_bytes().to_vec()).unwrap())
        };
        ask("secure.example", "first").await;
        let (one, other) = tokio::join!(ask("secure.example", "one"), ask("secure.example", "other"));
        for ((head, trailers, body), sent) in [(one, "one"), (other, "other")] {
            assert_eq!((head.status, head.version, body.as_str()), (StatusCode::OK, Version::HTTP_2, sent));
            let header = |name: &str| head.headers[name].to_str().unwrap().to_owned();
            assert_eq!((header("saw-token"), header("saw-te"), header("saw-host")), ("s3cret".into(), "trailers".into(), "none".into()));
            assert_eq!(header("saw-target"), "https://secure.example/asked?a=b");
            assert_eq!(trailers.unwrap()["grpc-status"], "0");
        }
        assert_eq!(connections.load(Ordering::Relaxed), 1, "one connection for one connection");
        let (head, _, body) = ask("attacker.example", "x").await;
        assert!(head.status == StatusCode::MISDIRECTED_REQUEST && !body.contains("s3cret"), "{head:?} {body}");
    });
}

#[test]
fn a_client_that_speaks_http_2_alone_reaches_a_server_that_does_not() {
    in_own_world(async |world| {
        let between = Between::open(&world).await;
        let sandbox = world.sandbox(&between.network, &rules(open(), &[("secure.example", RULE)])).await;
        let mut client = connect(&sandbox, &between.ours).await;
        let request = asking("secure.example").header("cookie", "a=1").header("cookie", "b=2").header("content-length", "0");
        let none = Full::new(Bytes::new()).map_err(|never: Infallible| match never {}).boxed();
        let response = client.send_request(request.body(none).unwrap()).await.unwrap();
        assert_eq!((response.status(), response.version()), (StatusCode::OK, Version::HTTP_2));
        let head = String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap();
        assert!(head.starts_with("POST /asked?a=b HTTP/1.1\r\n"), "{head}");
        for header in ["host: secure.example\r\n", "x-token: s3cret\r\n", "cookie: a=1; b=2\r\n"] {
            assert_eq!(head.matches(header).count(), 1, "{header:?} in {head}");
        }
    });
}
