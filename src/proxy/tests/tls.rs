//! HTTPS with our own authority.

use super::world::{DOMAIN, World, get, get_over, mirror, service, spec, start, start_with};
use crate::proxy::ProxyConfig;
use crate::proxy::tls::{Authority, server_config, write_bundle};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use rustls_pki_types::pem::PemObject;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

fn connector(pem: &str) -> TlsConnector {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in rustls_pki_types::CertificateDer::pem_slice_iter(pem.as_bytes()) {
        roots.add(certificate.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    TlsConnector::from(Arc::new(config.with_root_certificates(roots).with_no_client_auth()))
}

#[tokio::test]
async fn clients_that_trust_the_bundle_reach_sandboxes_and_the_api_over_https() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open(folder.path(), "abcde").unwrap();
    let bundle = folder.path().join("tls/bundle.pem");
    write_bundle(&authority, &bundle).unwrap();
    let trusted = std::fs::read_to_string(&bundle).unwrap();
    assert!(trusted.ends_with(authority.pem()));

    let world = World::new();
    let id = world.add(spec());
    world.open_port(id, 8000, mirror().await);
    let server = start_with(&world, Some(server_config(&Arc::new(authority), DOMAIN).unwrap()), ProxyConfig::for_domain(DOMAIN)).await;
    let connector = connector(&trusted);
    let clouds = ["api.sandbox.novita.ai".to_owned(), "api.hopx.dev".to_owned(), format!("8000-{id}.us-1.sandbox.novita.ai")];
    let own = [format!("8000-{id}.stillbox.localhost"), "api.stillbox.localhost".into(), "localhost".into(), "127.0.0.1".into()];
    for name in own.into_iter().chain(clouds) {
        let stream = TcpStream::connect(server.address).await.unwrap();
        let stream = connector.connect(ServerName::try_from(name.clone()).unwrap(), stream).await.unwrap();
        let (status, _, body) = get_over(stream, &name, "/sandboxes", &[]).await;
        let answerer = if name.starts_with("8000-") { "GET /sandboxes" } else { "control" };
        assert!(status == 200 && body.starts_with(answerer), "{name}: {status} {body}");
    }
    let stream = TcpStream::connect(server.address).await.unwrap();
    assert!(connector.connect(ServerName::try_from("example.com").unwrap(), stream).await.is_err(), "the leaf speaks for others");
}

#[test]
fn the_authority_is_made_once_and_its_key_is_the_owners_alone() {
    let folder = tempfile::tempdir().unwrap();
    let first = Authority::open(folder.path(), "abcde").unwrap();
    let again = Authority::open(folder.path(), "abcde").unwrap();
    assert_eq!(first.pem(), again.pem());
    let mode = |name: &str| std::fs::metadata(folder.path().join("tls").join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("ca.key"), mode("ca.pem"), mode("")), (0o600, 0o644, 0o700));
}

#[test]
fn a_certificate_that_is_not_of_our_key_is_made_anew() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = Authority::open(ours.path(), "abcde").unwrap();
    Authority::open(theirs.path(), "fghij").unwrap();
    std::fs::copy(theirs.path().join("tls/ca.pem"), ours.path().join("tls/ca.pem")).unwrap();
    let renewed = Authority::open(ours.path(), "abcde").unwrap();
    assert_ne!(renewed.pem(), first.pem());
    assert_ne!(renewed.pem(), std::fs::read_to_string(theirs.path().join("tls/ca.pem")).unwrap());
    assert_eq!(Authority::open(ours.path(), "abcde").unwrap().pem(), renewed.pem());
}

#[test]
fn damaged_files_are_named_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    Authority::open(folder.path(), "abcde").unwrap();
    std::fs::write(folder.path().join("tls/ca.key"), "nonsense").unwrap();
    let error = Authority::open(folder.path(), "abcde").unwrap_err().to_string();
    assert!(error.contains("ca.key holds no usable key; remove"), "{error}");
}

#[tokio::test]
async fn a_port_that_serves_https_by_itself_is_spoken_to_in_tls_whatever_it_shows() {
    let folder = tempfile::tempdir().unwrap();
    let theirs = Arc::new(Authority::open(folder.path(), "abcde").unwrap());
    let acceptor = tokio_rustls::TlsAcceptor::from(server_config(&theirs, "somebody.else").unwrap());
    let encrypted = service(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            let stream = acceptor.accept(stream).await.unwrap();
            let answer = hyper::service::service_fn(|_request| async {
                Ok::<_, std::convert::Infallible>(hyper::Response::new(http_body_util::Full::new(bytes::Bytes::from("encrypted"))))
            });
            let _client_went_away = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
        }
    })
    .await;
    let world = World::new();
    let mut spec = spec();
    spec.network.https_ports = vec![8443];
    let id = world.add(spec);
    world.open_port(id, 8443, encrypted);
    world.open_port(id, 8000, mirror().await);
    let server = start(&world).await;
    let (status, _, body) = get(&server, &format!("8443-{id}.{DOMAIN}"), "/", &[]).await;
    assert_eq!((status, body.as_str()), (200, "encrypted"));
    assert_eq!(get(&server, &format!("8000-{id}.{DOMAIN}"), "/", &[]).await.0, 200, "others stay plain");
}
