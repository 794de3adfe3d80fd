//! The host's resolvers, and asking them.
//!
//! A machine whose names our own resolver (resolver.rs) answers names it in /etc/resolv.conf, between two marks, or in
//! systemd-resolved's settings. Neither is asked here: we would ask ourselves.

use super::super::resolver::{BLOCK_BEGIN, BLOCK_END};
use super::UDP_BYTES_MAX;
use super::message::{self, HEADER_BYTES};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

const PORT: u16 = 53;
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Asked where the host names nobody.
const FALLBACK: IpAddr = IpAddr::V4(Ipv4Addr::new(8, 8, 8, 8));
/// As many name servers as glibc uses.
const UPSTREAMS_MAX: usize = 3;
const UPSTREAM_TIMEOUT: Duration = Duration::from_secs(3);

/// Where systemd-resolved writes whom it asks itself, and the address at which it is asked.
const RESOLVED_UPLINKS: &str = "/run/systemd/resolve/resolv.conf";
const RESOLVED_STUB: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53));

/// The name servers of this host, read again when the file changes.
#[derive(Debug)]
pub(in super::super) struct Upstreams {
    configured: Vec<IpAddr>,
    /// Where the machine's own resolver listens, when these are its upstreams.
    own: Vec<IpAddr>,
    read: Mutex<Option<(SystemTime, Vec<IpAddr>)>>,
}

impl Upstreams {
    /// These; if there are none, those of /etc/resolv.conf.
    pub(in super::super) fn new(configured: Vec<IpAddr>) -> Self {
        Self::behind(configured, Vec::new())
    }

    /// Those of the machine's own resolver, which listens at `own`: neither itself, nor systemd-resolved, which asks it.
    pub(in super::super) fn behind(configured: Vec<IpAddr>, own: Vec<IpAddr>) -> Self {
        Self { configured, own, read: Mutex::new(None) }
    }

    /// The first answer of the name servers in their order, under the question's own id.
    pub(super) async fn ask(&self, question: &[u8], transport: Transport) -> io::Result<Vec<u8>> {
        for upstream in self.now() {
            let server = SocketAddr::new(upstream, PORT);
            let asked = async {
                match transport {
                    Transport::Udp => ask_udp(server, question).await,
                    Transport::Tcp => ask_tcp(server, question).await,
                }
            };
            if let Ok(Ok(answer)) = timeout(UPSTREAM_TIMEOUT, asked).await {
                return Ok(answer);
            }
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "no name server of this host answered"))
    }

    /// The IPv4 addresses of a name; empty when it has none.
    pub(in super::super) async fn resolve(&self, name: &str) -> io::Result<Vec<Ipv4Addr>> {
        let question = message::query(name, random_id()?);
        let mut answer = self.ask(&question, Transport::Udp).await?;
        if message::is_truncated(&answer) {
            answer = self.ask(&question, Transport::Tcp).await?;
        }
        message::addresses(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a name server sent a torn answer"))
    }

    fn now(&self) -> Vec<IpAddr> {
        if !self.configured.is_empty() {
            return self.configured.clone();
        }
        let changed = std::fs::metadata(RESOLV_CONF).and_then(|metadata| metadata.modified());
        let Ok(changed) = changed else { return vec![FALLBACK] };
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        match &*read {
            // Whom systemd-resolved asks changes without a change of the file that names it.
            Some((at, servers)) if *at == changed && self.own.is_empty() => servers.clone(),
            _ => {
                let servers = self.servers(|path| std::fs::read_to_string(path).unwrap_or_default());
                *read = Some((changed, servers.clone()));
                servers
            }
        }
    }

    fn servers(&self, read: impl Fn(&str) -> String) -> Vec<IpAddr> {
        let mut servers = parse_resolv_conf(&read(RESOLV_CONF));
        if !self.own.is_empty() && servers.contains(&RESOLVED_STUB) {
            servers = parse_resolv_conf(&read(RESOLVED_UPLINKS));
        }
        servers.retain(|server| !self.own.contains(server));
        servers.truncate(UPSTREAMS_MAX);
        if servers.is_empty() { vec![FALLBACK] } else { servers }
    }
}

/// The name servers of a file, without those of our block. A scoped address (fe80::1%eth0) does not parse and is left
/// out, as rare as it is.
fn parse_resolv_conf(text: &str) -> Vec<IpAddr> {
    let mut is_ours = false;
    let mut servers = Vec::new();
    for line in text.lines() {
        is_ours = (is_ours || line == BLOCK_BEGIN) && line != BLOCK_END;
        let mut words = line.split_whitespace();
        if !is_ours && words.next() == Some("nameserver") {
            servers.extend(words.next().and_then(|word| word.parse::<IpAddr>().ok()));
        }
    }
    servers
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

/// From a port of the kernel's choice and under an id of ours, so that an answer cannot be guessed from outside.
async fn ask_udp(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    let id = random_id()?;
    socket.send(&with_id(question, id)).await?;
    let mut answer = vec![0; UDP_BYTES_MAX];
    loop {
        let length = socket.recv(&mut answer).await?;
        if answer.get(..2) == Some(&id[..]) && length >= HEADER_BYTES {
            answer.truncate(length);
            return Ok(with_id(&answer, id_of(question)));
        }
    }
}

async fn ask_tcp(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    write_framed(&mut stream, question).await?;
    read_framed(&mut stream).await?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// A message with its length before it; `None` at the end of the stream.
pub(super) async fn read_framed(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        length => length?,
    };
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

pub(super) async fn write_framed(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat()).await
}

fn random_id() -> io::Result<[u8; 2]> {
    let mut id = [0; 2];
    getrandom::fill(&mut id).map_err(io::Error::other)?;
    Ok(id)
}

fn id_of(message: &[u8]) -> [u8; 2] {
    message.get(..2).and_then(|id| id.try_into().ok()).unwrap_or_default()
}

fn with_id(message: &[u8], id: [u8; 2]) -> Vec<u8> {
    let mut message = message.to_vec();
    if let Some(place) = message.get_mut(..2) {
        place.copy_from_slice(&id);
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn servers(own: &[&str], files: &[(&str, &str)]) -> Vec<String> {
        let own = own.iter().map(|address| address.parse().unwrap()).collect();
        let read = |path: &str| files.iter().find(|(name, _)| *name == path).map_or_else(String::new, |(_, text)| (*text).to_owned());
        Upstreams::behind(Vec::new(), own).servers(read).iter().map(IpAddr::to_string).collect()
    }

    #[test]
    fn the_hosts_resolvers_are_read_and_somebody_is_always_asked() {
        let text = "# by hand\nsearch lan\nnameserver 127.0.0.53\noptions edns0\nnameserver fd00::1\nnameserver fe80::1%eth0\n";
        assert_eq!(servers(&[], &[(RESOLV_CONF, text)]), ["127.0.0.53", "fd00::1"]);
        assert_eq!(servers(&[], &[]), [FALLBACK.to_string()]);
    }

    #[test]
    fn our_own_resolver_is_never_asked() {
        let installed = format!("{BLOCK_BEGIN}\nnameserver 127.0.53.53\n{BLOCK_END}\nnameserver 192.0.2.1\n");
        assert_eq!(servers(&[], &[(RESOLV_CONF, &installed)]), ["192.0.2.1"], "nor by a slot");
        let by_hand = "nameserver 127.0.53.53\nnameserver 192.0.2.1\n";
        assert_eq!(servers(&["127.0.53.53"], &[(RESOLV_CONF, by_hand)]), ["192.0.2.1"]);
        let uplinks = "nameserver 127.0.53.53\nnameserver 192.0.2.7\n";
        let resolved = [(RESOLV_CONF, "nameserver 127.0.0.53\n"), (RESOLVED_UPLINKS, uplinks)];
        assert_eq!(servers(&["127.0.53.53"], &resolved), ["192.0.2.7"], "systemd-resolved asks us");
        assert_eq!(servers(&["127.0.53.53"], &resolved[..1]), [FALLBACK.to_string()]);
    }
}
