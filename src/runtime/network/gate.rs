//! The way out where a name or a proxy decides: connections that the slot's rules send here instead of outside.
//!
//! The gate reads the name that a connection is for (TLS's SNI, HTTP's Host), as E2B's does, and connects to what the
//! *host* resolves that name to, so that an allowed name on another machine's address gets nowhere. It connects from
//! inside the slot: what the host keeps out of reach stays out of reach. Connections for names whose requests are changed
//! go on in intercept.rs.

use super::dns::Upstreams;
use super::intercept::{self, Intercepted, Interception};
use super::names::Names;
use super::rewrite::Secrets;
use super::rules::NAMED_PORTS;
use super::services::{View, accept_bounded};
use super::{sniff, socks};
use crate::model::EgressProxy;
use crate::sys::netns::{Netns, SocketFactory, SocketKind};
use nix::sys::socket::{getsockopt, sockopt};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;

/// Connections of one sandbox through its gate at the same time; more wait.
pub(super) const CONNECTIONS_MAX: usize = 512;
/// A client that has not said within this time whom it wants is turned away.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// The gate of one slot.
#[derive(Debug, Clone)]
pub(super) struct Gate {
    pub(super) view: watch::Receiver<View>,
    pub(super) upstreams: Arc<Upstreams>,
    pub(super) sockets: SocketFactory,
    pub(super) slot: Netns,
    /// For who may change requests.
    pub(super) interception: Option<Interception>,
    pub(super) secrets: watch::Receiver<Arc<Secrets>>,
    /// Places for connections outwards of requests that share one of the sandbox's: as many as it may have of those.
    pub(super) places: Arc<Semaphore>,
}

/// Whom a connection is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    Name(String, u16),
    Address(SocketAddrV4),
}

impl Gate {
    /// Serves until its task is ended; open connections end with it.
    pub(super) async fn serve(self, listener: TcpListener) {
        accept_bounded(listener, CONNECTIONS_MAX, |stream| self.clone().pass(stream)).await;
    }

    async fn pass(self, mut client: TcpStream) -> io::Result<()> {
        client.set_nodelay(true)?;
        let (view, secrets) = (self.view.borrow().clone(), Arc::clone(&self.secrets.borrow()));
        let mut head = Vec::new();
        let opened = async {
            let wanted = original_destination(&client)?;
            let target = match identify(&view, &secrets, wanted, &mut client, &mut head).await? {
                Passage::To(target) => target,
                Passage::Changed(name) => return Ok(Opened::Changed { name, port: wanted.port() }),
            };
            let mut server = self.connect_in_time(&view, &target).await?;
            server.set_nodelay(true)?;
            server.write_all(&head).await?;
            Ok(Opened::Through(server))
        };
        match (opened.await, &self.interception) {
            (Ok(Opened::Through(mut server)), _) => copy_bidirectional(&mut client, &mut server).await.map(drop),
            (Ok(Opened::Changed { name, port }), Some(interception)) => {
                let interception = interception.clone();
                intercept::serve(self, view, interception, Intercepted { stream: client, head, name, port }).await
            }
            // A client that is turned away sees a reset, not an orderly end of what never was a conversation.
            (Ok(Opened::Changed { .. }), None) => client.set_zero_linger(),
            (Err(error), _) => client.set_zero_linger().and(Err(error)),
        }
    }

    /// Waits for the place of one more connection; it is given back when this is dropped.
    pub(super) async fn place(&self) -> io::Result<OwnedSemaphorePermit> {
        timeout(CONNECT_TIMEOUT, Arc::clone(&self.places).acquire_owned()).await?.map_err(io::Error::other)
    }

    /// Connects to a target as the policy says, by its proxy if it has one.
    pub(super) async fn connect_in_time(&self, view: &View, target: &Target) -> io::Result<TcpStream> {
        timeout(CONNECT_TIMEOUT, self.connect(view, target)).await?
    }

    async fn connect(&self, view: &View, target: &Target) -> io::Result<TcpStream> {
        match &view.proxy {
            Some(proxy) => {
                let mut stream = self.dial_target(&proxy_target(proxy)?, |_| true).await?;
                socks::connect(&mut stream, proxy, target).await?;
                Ok(stream)
            }
            None => self.dial_target(target, |address| view.permits(target, address)).await,
        }
    }

    /// Of a name's addresses the first that answers; IPv4 only, since nothing else leads out of a slot.
    async fn dial_target(&self, target: &Target, is_permitted: impl Fn(Ipv4Addr) -> bool) -> io::Result<TcpStream> {
        let (name, port) = match target {
            Target::Address(address) => return self.dial(*address).await,
            Target::Name(name, port) => (name, *port),
        };
        let mut outcome = Err(io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no IPv4 address that may be reached"));
        for address in self.upstreams.resolve(name).await?.into_iter().filter(|address| is_permitted(*address)) {
            outcome = self.dial(SocketAddrV4::new(address, port)).await;
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }

    async fn dial(&self, address: SocketAddrV4) -> io::Result<TcpStream> {
        let socket = self.sockets.socket(&self.slot, SocketKind::TcpV4).await?;
        TcpSocket::from_std_stream(socket.into()).connect(address.into()).await
    }
}

fn proxy_target(proxy: &EgressProxy) -> io::Result<Target> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidInput, "the egress proxy's address is not host:port");
    if let Ok(address) = proxy.address.parse() {
        return Ok(Target::Address(address));
    }
    let (host, port) = proxy.address.rsplit_once(':').ok_or_else(wrong)?;
    Ok(Target::Name(host.to_owned(), port.parse().map_err(|_| wrong())?))
}

/// Where the client meant to go before the slot's rules sent it here.
fn original_destination(client: &TcpStream) -> io::Result<SocketAddrV4> {
    let address = getsockopt(client, sockopt::OriginalDst)?;
    Ok(SocketAddrV4::new(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr)), u16::from_be(address.sin_port)))
}

/// How a connection goes on.
#[derive(Debug, PartialEq, Eq)]
enum Passage {
    To(Target),
    /// Its requests are changed; they are for this name.
    Changed(String),
}

/// What became of it.
enum Opened {
    Through(TcpStream),
    Changed { name: String, port: u16 },
}

impl View {
    /// Whether addresses alone let a connection pass that was sent here. Where names decide nothing, the slot's rules
    /// have sent only what they let pass.
    fn lets_pass(&self, wanted: Ipv4Addr) -> bool {
        match &self.names {
            Names::All | Names::None => true,
            Names::Only(_) => self.addresses.admit(wanted),
        }
    }

    /// Whether an address may be connected to on the way to a target: a name that is allowed leads anywhere.
    fn permits(&self, target: &Target, address: Ipv4Addr) -> bool {
        match (target, &self.names) {
            (Target::Name(name, _), Names::Only(_)) if self.names.allow(name) => true,
            (Target::Name(..), _) => self.addresses.admit(address),
            (Target::Address(_), _) => true,
        }
    }
}

/// Whom a connection is for, with what of it was read to find out in `head`; an error when that is not allowed.
async fn identify(view: &View, secrets: &Secrets, wanted: SocketAddrV4, client: &mut TcpStream, head: &mut Vec<u8>) -> io::Result<Passage> {
    let by_address = Passage::To(Target::Address(wanted));
    let passes = view.lets_pass(*wanted.ip());
    if !NAMED_PORTS.contains(&wanted.port()) || (passes && view.rewrites.is_empty()) {
        return Ok(by_address);
    }
    let name = match timeout(HEAD_TIMEOUT, sniff::read_name(client, head)).await {
        Ok(name) => name?,
        // Whoever waits for the other side to speak first speaks no protocol that is changed.
        Err(_) if passes => None,
        Err(late) => return Err(late.into()),
    };
    match name {
        Some(name) if (passes || view.names.allow(&name)) && view.rewrites.concern(&name, secrets) => Ok(Passage::Changed(name)),
        _ if passes => Ok(by_address),
        Some(name) if view.names.allow(&name) => Ok(Passage::To(Target::Name(name, wanted.port()))),
        Some(_) | None => Err(io::Error::new(io::ErrorKind::PermissionDenied, "no allowed name was asked for")),
    }
}
