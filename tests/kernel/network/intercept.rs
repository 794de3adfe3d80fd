//! Requests whose headers are set on the way out, with a real TLS server of the test's in the internet.

use super::world::{HOST, NINE, ONE, SECURE, Sandbox, World, in_own_world};
use super::{open, policy};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;
use stillbox::model::{HeaderRule, NetworkPolicy};
use stillbox::proxy::tls::{Authority, interception_config, server_config};
use stillbox::runtime::network::{Interception, Network, NetworkConfig};

const PATIENCE: Duration = Duration::from_secs(5);

/// Both ends of a connection that can be read and written.
trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// A server that changes requests, with the authority that its sandboxes trust, and a TLS server in the internet.
pub(super) struct Between {
    pub(super) network: Network,
    pub(super) ours: Arc<Authority>,
    theirs: Arc<Authority>,
}

impl Between {
    pub(super) async fn open(world: &World) -> Self {
        Self::open_beside(world, serve).await
    }

    /// With another server at [`SECURE`], which is started in the netns of the internet.
    pub(super) async fn open_beside(world: &World, serve: impl FnOnce(Arc<rustls::ServerConfig>) -> io::Result<()> + Send) -> Self {
        let authority = |name: &str| Arc::new(Authority::open(&world.data_dir(name), name).unwrap());
        let (ours, theirs) = (authority("ours1"), authority("their"));
        let tls = server_config(&theirs, "secure.example").unwrap();
        world.internet().run(|| serve(tls)).unwrap();
        let interception = Interception::new(interception_config(&ours).unwrap(), Some(theirs.path())).unwrap();
        let (pool_slots, dns_upstreams) = (1, vec![super::world::EIGHT.into()]);
        let config = NetworkConfig { pool_slots, dns_upstreams, interception: Some(interception), ..NetworkConfig::default() };
        Self { network: world.network_with("aaaaa", config).await, ours, theirs }
    }
}

/// Answers HTTP at [`SECURE`], encrypted and not, in the netns of the calling thread.
fn serve(tls: Arc<rustls::ServerConfig>) -> io::Result<()> {
    for (port, tls) in [(80, None), (443, Some(tls))] {
        let listener = TcpListener::bind((SECURE, port))?;
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, tls) = (stream.unwrap(), tls.clone());
                std::thread::spawn(move || match tls {
                    Some(tls) => converse(rustls::StreamOwned::new(rustls::ServerConnection::new(tls).unwrap(), stream)),
                    None => converse(stream),
                });
            }
        });
    }
    Ok(())
}

/// Answers each request with its own head; `/chunks` repeats the body, chunk by chunk, and an upgrade every byte.
fn converse(stream: impl Stream) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if stream.read_line(&mut head)? == 0 {
                return Ok(());
            }
        }
        if head.to_lowercase().contains("upgrade: echo") {
            stream.get_mut().write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")?;
            return repeat(stream);
        }
        if head.contains("/chunks") {
            stream.get_mut().write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
            while let Some(chunk) = read_chunk(&mut stream)? {
                write_chunk(stream.get_mut(), &chunk)?;
            }
            stream.get_mut().write_all(b"0\r\n\r\n")?;
        } else {
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{head}", head.len());
            stream.get_mut().write_all(answer.as_bytes())?;
        }
    }
}

fn repeat(mut stream: BufReader<impl Stream>) -> io::Result<()> {
    let mut bytes = [0; 64];
    loop {
        match stream.read(&mut bytes)? {
            0 => return Ok(()),
            count => stream.get_mut().write_all(&bytes[..count])?,
        }
    }
}

fn read_chunk(stream: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut size = String::new();
    stream.read_line(&mut size)?;
    let mut chunk = vec![0; usize::from_str_radix(size.trim(), 16).map_err(io::Error::other)? + 2];
    stream.read_exact(&mut chunk)?;
    chunk.truncate(chunk.len() - 2);
    Ok((!chunk.is_empty()).then(|| String::from_utf8(chunk).unwrap()))
}

fn write_chunk(stream: &mut impl Write, chunk: &str) -> io::Result<()> {
    stream.write_all(format!("{:x}\r\n{chunk}\r\n", chunk.len()).as_bytes())
}

/// A TLS connection out of a sandbox that trusts `authority` alone and asks for `name`, wherever it leads.
fn connect(sandbox: &Sandbox, authority: &Authority, address: Ipv4Addr, name: &str) -> impl Stream + use<> {
    let config = Arc::new(trusting(authority));
    let client = rustls::ClientConnection::new(config, name.to_owned().try_into().unwrap()).unwrap();
    rustls::StreamOwned::new(client, plain(sandbox, address, 443))
}

pub(super) fn trusting(authority: &Authority) -> rustls::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    config.with_root_certificates(roots).with_no_client_auth()
}

pub(super) fn plain(sandbox: &Sandbox, address: Ipv4Addr, port: u16) -> TcpStream {
    let stream = sandbox.netns.run(|| TcpStream::connect_timeout(&(address, port).into(), PATIENCE)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// All that is answered to one request.
fn request(mut stream: impl Stream, host: &str, headers: &str) -> io::Result<String> {
    stream.write_all(format!("GET /asked HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n").as_bytes())?;
    let mut answer = Vec::new();
    let outcome = stream.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).unwrap();
    outcome.map(|_| answer.clone()).or(if answer.is_empty() { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(answer) })
}

pub(super) fn rules(policy: NetworkPolicy, rules: &[(&str, &[(&str, &str)])]) -> NetworkPolicy {
    let pairs = |headers: &[(&str, &str)]| headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let rules = rules.iter().map(|(domain, headers)| ((*domain).to_owned(), HeaderRule { headers: pairs(headers) })).collect();
    NetworkPolicy { rules, ..policy }
}

#[test]
fn a_host_beside_an_absolute_target_leads_no_secret_elsewhere() {
    in_own_world(async |world| {
        let between = Between::open(&world).await;
        let sandbox = world.sandbox(&between.network, &rules(open(), &[("secure.example", &[("X-Token", "s3cret")])])).await;
        let mut stream = connect(&sandbox, &between.ours, SECURE, "secure.example");
        let head = "GET https://secure.example/asked HTTP/1.1\r\nHost: attacker.example\r\nConnection: close\r\n\r\n";
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = Vec::new();
        // The end of TLS is not always told.
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8(answer).unwrap().to_lowercase();
        assert!(answer.starts_with("http/1.1 421 ") && !answer.contains("s3cret"), "{answer}");
    });
}

#[test]
fn headers_are_set_on_https_and_http_to_the_rules_domain_and_nowhere_else() {
    in_own_world(async |world| {
        let between = Between::open(&world).await;
        let rule: &[(&str, &str)] = &[("X-Token", "s3cret"), ("User-Agent", "ours")];
        let sandbox = world.sandbox(&between.network, &rules(open(), &[("secure.example", rule)])).await;
        let sent = "User-Agent: theirs\r\nX-Token: guess\r\nX-Own: kept\r\n";
        // Where it dials does not matter: the name decides.
        for address in [SECURE, NINE] {
            let encrypted = request(connect(&sandbox, &between.ours, address, "secure.example"), "secure.example", sent).unwrap();
            let unencrypted = request(plain(&sandbox, address, 80), "Secure.Example:80", sent).unwrap();
            for answer in [encrypted, unencrypted] {
                assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains("GET /asked HTTP/1.1"), "{answer}");
                for (header, count) in [("x-token: s3cret", 1), ("user-agent: ours", 1), ("x-own: kept", 1), ("guess", 0), ("theirs", 0)] {
                    assert_eq!(answer.matches(header).count(), count, "{header} in {answer}");
                }
            }
        }
        let other = request(connect(&sandbox, &between.theirs, SECURE, "api.secure.example"), "api.secure.example", "").unwrap();
        assert!(other.contains("GET /asked") && !other.contains("s3cret"), "another name meets its own certificate: {other}");
        assert_eq!(sandbox.ask(ONE).unwrap(), HOST, "what names nobody goes where it was sent");
    });
}

#[test]
fn a_new_rule_holds_for_new_connections_at_once() {
    in_own_world(async |world| {
        let between = Between::open(&world).await;
        let sandbox = world.sandbox(&between.network, &open()).await;
        let direct = request(connect(&sandbox, &between.theirs, SECURE, "secure.example"), "secure.example", "").unwrap();
        assert!(!direct.to_lowercase().contains("x-token"), "{direct}");
        for value in ["one", "two"] {
            let policy = rules(open(), &[("*.example", &[("x-token", value)])]);
            between.network.set_policy(sandbox.lease.slot, &policy).await.unwrap();
            let answer = request(connect(&sandbox, &between.ours, SECURE, "secure.example"), "secure.example", "").unwrap();
            assert!(answer.contains(&format!("x-token: {value}\r\n")), "{answer}");
        }
        between.network.set_policy(sandbox.lease.slot, &open()).await.unwrap();
        let direct = request(connect(&sandbox, &between.theirs, SECURE, "secure.example"), "secure.example", "").unwrap();
        assert!(direct.contains("GET /asked"), "their own certificate again: {direct}");
    });
}

#[test]
fn bodies_stream_both_ways_and_upgrades_pass() {
    in_own_world(async |world| {
        let between = Between::open(&world).await;
        let sandbox = world.sandbox(&between.network, &rules(open(), &[("secure.example", &[("x-token", "s")])])).await;
        let mut stream = BufReader::new(connect(&sandbox, &between.ours, SECURE, "secure.example"));
        stream.get_mut().write_all(b"POST /chunks HTTP/1.1\r\nHost: secure.example\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
        write_chunk(stream.get_mut(), "first").unwrap();
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            assert_ne!(stream.read_line(&mut line).unwrap(), 0);
        }
        assert_eq!(read_chunk(&mut stream).unwrap().as_deref(), Some("first"), "before the body is over");
        write_chunk(stream.get_mut(), "second").unwrap();
        stream.get_mut().write_all(b"0\r\n\r\n").unwrap();
        assert_eq!((read_chunk(&mut stream).unwrap().as_deref(), read_chunk(&mut stream).unwrap()), (Some("second"), None));
        let again = request(stream.into_inner(), "secure.example", "").unwrap();
        assert!(again.contains("x-token: s\r\n"), "the connection is kept: {again}");

        let mut stream = connect(&sandbox, &between.ours, SECURE, "secure.example");
        stream.write_all(b"GET / HTTP/1.1\r\nHost: secure.example\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n").unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
        for words in ["ping", "pong"] {
            stream.write_all(words.as_bytes()).unwrap();
            let mut said = [0; 4];
            stream.read_exact(&mut said).unwrap();
            assert_eq!(said, words.as_bytes());
        }
    });
}

#[test]
fn a_rule_opens_no_way_and_its_values_go_to_nobody_else() {
    in_own_world(async |world| {
        let between = Between::open(&world).await;
        let secret: &[(&str, &str)] = &[("x-token", "s3cret")];
        let named = |base: NetworkPolicy| rules(base, &["secure.example", "impostor.example", "lan.example"].map(|name| (name, secret)));
        let sandbox = world.sandbox(&between.network, &named(open())).await;
        let asked = |address: Ipv4Addr, name: &str, host: &str| {
            request(connect(&sandbox, &between.ours, address, name), host, "").unwrap_or_else(|error| error.to_string())
        };
        for (answer, status) in [
            // It answers at the address, and cannot prove the name.
            (asked(SECURE, "impostor.example", "impostor.example"), "502"),
            (asked(SECURE, "lan.example", "lan.example"), "502"),
            (asked(SECURE, "secure.example", "one.example"), "421"),
        ] {
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")) && !answer.contains("s3cret"), "{answer}");
        }
        // An address of the sandbox's choice never sees a value, though nothing is encrypted.
        let own = request(plain(&sandbox, ONE, 80), "secure.example", "").unwrap();
        assert!(own.contains("x-token: s3cret") && own.contains("GET /asked"), "answered by the name itself: {own}");

        let denied = named(policy(&[], &["203.0.113.0/24"]));
        between.network.set_policy(sandbox.lease.slot, &denied).await.unwrap();
        assert!(asked(NINE, "secure.example", "secure.example").starts_with("HTTP/1.1 502"), "a name that leads to what is denied");
        let closed = named(policy(&["one.example"], &["0.0.0.0/0"]));
        between.network.set_policy(sandbox.lease.slot, &closed).await.unwrap();
        assert!(!asked(SECURE, "secure.example", "secure.example").starts_with("HTTP"), "a name that is not allowed");
        let allowed = named(policy(&["secure.example"], &["0.0.0.0/0"]));
        between.network.set_policy(sandbox.lease.slot, &allowed).await.unwrap();
        assert!(asked(NINE, "secure.example", "secure.example").contains("x-token: s3cret"));
    });
}
