//! The machine's own small name server, for clients that cannot be told where this server is: whatever is below the
//! server's domain leads to this machine, and what else it is asked for the machine's other name servers answer.
//!
//! Off unless `dns.listen` names an address of the loopback. `stillbox hosts --install --resolver` makes it the one that
//! the machine's programs ask; without that it answers whoever asks it by its address.

use super::dns::{Judge, Responder, Upstreams, Verdict, addresses, addresses_answer, query};
use super::names::matches;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// The lines around what `stillbox hosts` writes into files of the machine's.
pub const BLOCK_BEGIN: &str = "# stillbox: begin";
/// See [`BLOCK_BEGIN`].
pub const BLOCK_END: &str = "# stillbox: end";

/// What a listening resolver answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolverConfig {
    /// Names that lead here: each exact, or with a leading `*.` everything below. Lower case.
    pub names: Vec<String>,
    /// Where they lead.
    pub addresses: Vec<IpAddr>,
    /// Who is asked for all other names; empty: those of /etc/resolv.conf.
    pub upstreams: Vec<IpAddr>,
}

/// The names of a server's own domain (without a port), as [`ResolverConfig::names`] has them.
pub fn names_of_domain(domain: &str) -> [String; 2] {
    [domain.to_owned(), format!("*.{domain}")]
}

/// The sockets of a resolver, bound before anything else happens.
#[derive(Debug)]
pub struct ResolverSockets {
    udp: Vec<UdpSocket>,
    tcp: Vec<TcpListener>,
}

impl ResolverSockets {
    /// Takes an address for both transports; the error names it.
    pub fn bind(listen: &[SocketAddr]) -> Result<Self, (SocketAddr, io::Error)> {
        let mut bound = Self { udp: Vec::new(), tcp: Vec::new() };
        for &address in listen {
            let failed = |error| (address, error);
            let udp = UdpSocket::bind(address).map_err(failed)?;
            let tcp = TcpListener::bind(address).map_err(failed)?;
            udp.set_nonblocking(true).and_then(|()| tcp.set_nonblocking(true)).map_err(failed)?;
            bound.udp.push(udp);
            bound.tcp.push(tcp);
        }
        Ok(bound)
    }
}

/// A resolver that serves; dropping it ends it.
#[derive(Debug)]
pub struct Resolver {
    _tasks: JoinSet<()>,
}

impl Resolver {
    /// Starts to serve. Needs tokio's context.
    pub fn start(config: ResolverConfig, sockets: ResolverSockets) -> io::Result<Self> {
        let own = sockets.udp.iter().filter_map(|socket| Some(socket.local_addr().ok()?.ip())).collect();
        let upstreams = Arc::new(Upstreams::behind(config.upstreams, own));
        let responder = Responder(HostNames { names: config.names.into(), addresses: config.addresses.into(), upstreams });
        let mut tasks = JoinSet::new();
        for socket in sockets.udp {
            tasks.spawn(responder.clone().serve_udp(tokio::net::UdpSocket::from_std(socket)?));
        }
        for listener in sockets.tcp {
            tasks.spawn(responder.clone().serve_tcp(tokio::net::TcpListener::from_std(listener)?));
        }
        Ok(Self { _tasks: tasks })
    }
}

#[derive(Debug, Clone)]
struct HostNames {
    names: Arc<[String]>,
    addresses: Arc<[IpAddr]>,
    upstreams: Arc<Upstreams>,
}

impl Judge for HostNames {
    fn judge(&self, name: &str, question: &[u8]) -> Verdict {
        match self.names.iter().any(|pattern| matches(pattern, name)) {
            true => Verdict::Answer(addresses_answer(question, &self.addresses)),
            false => Verdict::Ask(Arc::clone(&self.upstreams)),
        }
    }
}

/// What the resolver at `server` says the IPv4 addresses of `name` are, within `patience`. Blocks.
pub fn ask(server: SocketAddr, name: &str, patience: Duration) -> io::Result<Vec<Ipv4Addr>> {
    const ID: [u8; 2] = *b"sb";
    const ANSWER_BYTES_MAX: usize = 4096;
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(patience))?;
    socket.connect(server)?;
    socket.send(&query(name, ID))?;
    let mut answer = [0; ANSWER_BYTES_MAX];
    let length = socket.recv(&mut answer)?;
    let torn = || io::Error::new(io::ErrorKind::InvalidData, "it sent a torn answer");
    answer.get(..length).and_then(addresses).ok_or_else(torn)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn loopback() -> Vec<SocketAddr> {
        // UDP and TCP ports are taken apart from each other: an address of our own makes both free.
        let mut bytes = [0; 2];
        getrandom::fill(&mut bytes).unwrap();
        vec![SocketAddr::from(([127, 91, bytes[0], bytes[1].max(1)], 5353))]
    }

    /// A resolver behind which nobody but `upstream` is asked, which answers on port 53.
    fn start(listen: &[SocketAddr], upstream: Ipv4Addr) -> Resolver {
        let config = ResolverConfig {
            names: [names_of_domain("box.test").to_vec(), vec!["api.cloud.test".to_owned()]].concat(),
            addresses: vec![Ipv4Addr::LOCALHOST.into(), "::1".parse().unwrap()],
            upstreams: vec![upstream.into()],
        };
        Resolver::start(config, ResolverSockets::bind(listen).unwrap()).unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn names_below_the_domain_lead_here_and_others_are_asked_for_elsewhere() {
        let (listen, upstream) = (loopback(), loopback());
        let IpAddr::V4(upstream_ip) = upstream[0].ip() else { panic!("an IPv4 address") };
        let elsewhere = UdpSocket::bind((upstream_ip, 53)).unwrap();
        std::thread::spawn(move || {
            let mut question = [0; 512];
            while let Ok((length, asker)) = elsewhere.recv_from(&mut question) {
                let answer = addresses_answer(&question[..length], &["192.0.2.9".parse().unwrap()]);
                elsewhere.send_to(&answer, asker).unwrap();
            }
        });
        let _resolver = start(&listen, upstream_ip);
        let asked = |name: &'static str| {
            let server = listen[0];
            async move { tokio::task::spawn_blocking(move || ask(server, name, PATIENCE)).await.unwrap().unwrap() }
        };
        for name in ["box.test", "API.Box.Test", "49983-i0.box.test", "api.cloud.test"] {
            assert_eq!(asked(name).await, [Ipv4Addr::LOCALHOST], "{name}");
        }
        for name in ["cloud.test", "notbox.test", "www.api.cloud.test"] {
            assert_eq!(asked(name).await, [Ipv4Addr::new(192, 0, 2, 9)], "{name}");
        }
    }

    #[test]
    fn a_taken_address_is_named() {
        let listen = loopback();
        let _taken = UdpSocket::bind(listen[0]).unwrap();
        let (address, error) = ResolverSockets::bind(&listen).unwrap_err();
        assert_eq!((address, error.kind()), (listen[0], io::ErrorKind::AddrInUse));
    }
}
