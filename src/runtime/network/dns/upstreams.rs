//! The host's resolvers, and asking them.

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

/// The name servers of this host, read again when the file changes.
#[derive(Debug)]
pub(in super::super) struct Upstreams {
    configured: Vec<IpAddr>,
    read: Mutex<Option<(SystemTime, Vec<IpAddr>)>>,
}

impl Upstreams {
    /// These; if there are none, those of /etc/resolv.conf.
    pub(in super::super) fn new(configured: Vec<IpAddr>) -> Self {
        Self { configured, read: Mutex::new(None) }
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
            Some((at, servers)) if *at == changed => servers.clone(),
            _ => {
                let servers = parse_resolv_conf(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default());
                *read = Some((changed, servers.clone()));
                servers
            }
        }
    }
}

/// A scoped address (fe80::1%eth0) does not parse and is left out, as rare as it is.
fn parse_resolv_conf(text: &str) -> Vec<IpAddr> {
    let named = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok()).flatten()
    });
    let servers: Vec<IpAddr> = named.take(UPSTREAMS_MAX).collect();
    if servers.is_empty() { vec![FALLBACK] } else { servers }
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

    #[test]
    fn the_hosts_resolvers_are_read_and_somebody_is_always_asked() {
        let text = "# by hand\nsearch lan\nnameserver 127.0.0.53\noptions edns0\nnameserver fd00::1\nnameserver fe80::1%eth0\n";
        assert_eq!(parse_resolv_conf(text), ["127.0.0.53".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
        assert_eq!(parse_resolv_conf(""), [FALLBACK]);
    }
}
