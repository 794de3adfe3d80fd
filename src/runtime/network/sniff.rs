//! Reading the first bytes of a connection until they say whom it is for.

use std::io;
use tokio::io::{AsyncRead, AsyncReadExt};

/// More than any ClientHello and any sensible request head.
const HEAD_BYTES_MAX: usize = 32 << 10;
const HEADERS_MAX: usize = 128;
/// The first byte of a TLS handshake record; no HTTP method begins with it.
const TLS_HANDSHAKE: u8 = 0x16;

/// Reads into `bytes` until the name in them is known (in lower case without port and final dot), or it is clear that
/// none will come: it names nobody or is neither TLS nor HTTP/1. Waits as long as the client does.
///
/// Cancel-safe: what was read is in `bytes`.
pub(super) async fn read_name(client: &mut (impl AsyncRead + Unpin), bytes: &mut Vec<u8>) -> io::Result<Option<String>> {
    loop {
        if client.read_buf(bytes).await? == 0 {
            return Ok(None);
        }
        if let Search::Over(name) = search(bytes) {
            return Ok(name);
        }
        if bytes.len() > HEAD_BYTES_MAX {
            return Ok(None);
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Search {
    NeedsMore,
    Over(Option<String>),
}

fn search(bytes: &[u8]) -> Search {
    let found = if bytes.first() == Some(&TLS_HANDSHAKE) { search_tls(bytes) } else { search_http(bytes) };
    match found {
        Search::Over(name) => Search::Over(name.map(|name| name.trim_end_matches('.').to_ascii_lowercase())),
        Search::NeedsMore => Search::NeedsMore,
    }
}

fn search_tls(mut bytes: &[u8]) -> Search {
    let mut acceptor = rustls::server::Acceptor::default();
    while !bytes.is_empty() {
        if acceptor.read_tls(&mut bytes).is_err() {
            return Search::Over(None);
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => return Search::Over(accepted.client_hello().server_name().map(str::to_owned)),
            Ok(None) => {}
            Err(_) => return Search::Over(None),
        }
    }
    Search::NeedsMore
}

fn search_http(bytes: &[u8]) -> Search {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Partial) => Search::NeedsMore,
        Ok(httparse::Status::Complete(_)) => Search::Over(host_of(&request)),
        Err(_) => Search::Over(None),
    }
}

/// The only Host header, without its port. Two of them are an attempt to be two at once.
fn host_of(request: &httparse::Request<'_, '_>) -> Option<String> {
    let mut hosts = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("host"));
    let (host, None) = (hosts.next()?, hosts.next()) else { return None };
    let host = std::str::from_utf8(host.value).ok()?.trim();
    Some(host.rsplit_once(':').map_or(host, |(name, _port)| name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn client_hello(name: &str) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
        let mut client = rustls::ClientConnection::new(Arc::new(config), name.to_owned().try_into().unwrap()).unwrap();
        let mut hello = Vec::new();
        client.write_tls(&mut hello).unwrap();
        hello
    }

    #[test]
    fn the_name_in_a_client_hello_is_found_as_soon_as_it_is_whole() {
        let hello = client_hello("Files.Example.COM");
        assert_eq!(search(&hello), Search::Over(Some("files.example.com".to_owned())));
        assert_eq!(search(&hello[..hello.len() - 1]), Search::NeedsMore);
        assert_eq!(search(&client_hello("192.0.2.1")), Search::Over(None), "an address is no name");
    }

    #[test]
    fn the_host_of_a_request_is_found_without_its_port() {
        let request = b"GET / HTTP/1.1\r\nAccept: */*\r\nhost: Example.com.:80\r\n\r\n";
        assert_eq!(search(request), Search::Over(Some("example.com".to_owned())));
        assert_eq!(search(&request[..20]), Search::NeedsMore);
    }

    #[test]
    fn what_names_nobody_or_two_is_told_so() {
        let two = b"GET / HTTP/1.1\r\nHost: a.com\r\nHost: b.com\r\n\r\n";
        let none = b"GET / HTTP/1.0\r\n\r\n";
        let http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        for bytes in [&two[..], none, http2, b"\x16\x03\x01\x00\x04\xff\x00\x00\x00", b"SSH-2.0-OpenSSH_9.2\r\n"] {
            assert_eq!(search(bytes), Search::Over(None), "{}", String::from_utf8_lossy(bytes));
        }
    }

    #[tokio::test]
    async fn a_head_comes_back_whole_however_it_arrived() {
        let (mut near, mut far) = tokio::io::duplex(7);
        let hello = client_hello("a.example");
        let sent = hello.clone();
        let sender = tokio::spawn(async move { tokio::io::AsyncWriteExt::write_all(&mut far, &sent).await });
        let mut bytes = Vec::new();
        let name = read_name(&mut near, &mut bytes).await.unwrap();
        sender.await.unwrap().unwrap();
        assert_eq!((name.as_deref(), bytes), (Some("a.example"), hello));
    }
}
