//! The way out where a name or a proxy decides: connections that the slot's rules send here instead of outside.
//!
//! The gate reads the name that a connection is for (TLS's SNI, HTTP's Host), as E2B's does, and connects to what the
//! *host* resolves that name to, so that an allowed name on another machine's address gets nowhere. It connects from
//! inside the slot: what the host keeps out of reach stays out of reach.

use super::dns::Upstreams;
use super::names::Names;
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
use tokio::sync::watch;
use tokio::time::timeout;

/// Connections of one sandbox through its gate at the same time; more wait.
const CONNECTIONS_MAX: usize = 512;
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
        // A client that is turned away sees a reset, not an orderly end of what never was a conversation.
        client.set_zero_linger()?;
        client.set_nodelay(true)?;
        let wanted = original_destination(&client)?;
        let view = self.view.borrow().clone();
        let (target, head) = identify(&view.names, wanted, &mut client).await?;
        let mut server = timeout(CONNECT_TIMEOUT, self.connect(&view, &target)).await??;
        server.set_nodelay(true)?;
        server.write_all(&head).await?;
        copy_bidirectional(&mut client, &mut server).await.map(|_| ())
    }

    async fn connect(&self, view: &View, target: &Target) -> io::Result<TcpStream> {
        match &view.proxy {
            Some(proxy) => {
                let mut stream = self.dial_target(&proxy_target(proxy)?).await?;
                socks::connect(&mut stream, proxy, target).await?;
                Ok(stream)
            }
            None => self.dial_target(target).await,
        }
    }

    /// Of a name's addresses the first that answers; IPv4 only, since nothing else leads out of a slot.
    async fn dial_target(&self, target: &Target) -> io::Result<TcpStream> {
        let (name, port) = match target {
            Target::Address(address) => return self.dial(*address).await,
            Target::Name(name, port) => (name, *port),
        };
        let mut outcome = Err(io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no IPv4 address"));
        for address in self.upstreams.resolve(name).await? {
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

/// Whom a connection is for and what of it was read to find out; an error when that is not allowed.
async fn identify(names: &Names, wanted: SocketAddrV4, client: &mut TcpStream) -> io::Result<(Target, Vec<u8>)> {
    let Names::Only(_) = names else { return Ok((Target::Address(wanted), Vec::new())) };
    if !NAMED_PORTS.contains(&wanted.port()) {
        return Ok((Target::Address(wanted), Vec::new()));
    }
    let head = timeout(HEAD_TIMEOUT, sniff::read_head(client)).await??;
    let name = head.name.filter(|name| names.allow(name));
    let name = name.ok_or_else(|| io::Error::new(io::ErrorKind::PermissionDenied, "no allowed name was asked for"))?;
    Ok((Target::Name(name, wanted.port()), head.bytes))
}
