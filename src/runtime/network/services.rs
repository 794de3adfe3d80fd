//! What a slot serves to its sandbox, inside the slot's netns: names, the gate where names decide, and the server's own
//! public URLs.
//!
//! The daemon serves it, on sockets made in that netns: so nothing of the host has to be reachable, and each socket
//! knows whose it is. When the daemon is gone, names do not resolve until the next one has adopted the slot.

use super::dns::{Responder, SlotNames, Upstreams};
use super::front::OwnNames;
use super::gate::{CONNECTIONS_MAX, Gate};
use super::intercept::Interception;
use super::names::Names;
use super::rewrite::{Rewrites, Secrets};
use super::rules::{Addresses, DNS_PORT, GATE_PORT, has_domains};
use crate::model::{EgressProxy, NetworkPolicy};
use crate::sys::netns::{Netns, SocketFactory, SocketKind};
use nix::sys::socket::{SockaddrIn, bind, setsockopt, sockopt};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::try_join;
use tracing::debug;

const BACKLOG: u32 = 128;

/// A policy, as far as the services look at it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct View {
    pub(super) names: Names,
    pub(super) proxy: Option<EgressProxy>,
    pub(super) addresses: Addresses,
    pub(super) rewrites: Rewrites,
    /// Names may be reached and not asked for: the policy allows no name server.
    pub(super) is_mute: bool,
}

impl View {
    pub(super) fn of(policy: &NetworkPolicy) -> Self {
        Self {
            names: Names::of(policy),
            proxy: policy.egress_proxy.clone(),
            addresses: Addresses::of(policy),
            rewrites: Rewrites::of(policy),
            is_mute: has_domains(policy) && policy.dns_servers.as_ref().is_some_and(Vec::is_empty),
        }
    }
}

/// What the services of all slots have in common.
#[derive(Debug, Clone, Copy)]
pub(super) struct Means<'a> {
    pub(super) sockets: &'a SocketFactory,
    pub(super) interception: Option<&'a Interception>,
    pub(super) secrets: &'a watch::Sender<Arc<Secrets>>,
}

/// The services of one leased slot; dropping them ends them.
#[derive(Debug)]
pub(super) struct Services {
    view: watch::Sender<View>,
    tasks: JoinSet<()>,
}

impl Services {
    /// Opens their sockets in `slot` and starts to serve.
    pub(super) async fn start(
        slot: &Netns,
        policy: &NetworkPolicy,
        upstreams: Arc<Upstreams>,
        own: Option<OwnNames>,
        means: Means<'_>,
    ) -> io::Result<Self> {
        let sockets = means.sockets;
        let (view, seen) = watch::channel(View::of(policy));
        let socket = |kind| sockets.socket(slot, kind);
        let (questions, long_questions, connections) =
            try_join!(socket(SocketKind::UdpV4), socket(SocketKind::TcpV4), socket(SocketKind::TcpV4))?;
        let questions = udp(questions, DNS_PORT)?;
        let long_questions = listener(long_questions, DNS_PORT)?;
        let connections = listener(connections, GATE_PORT)?;
        let mut tasks = JoinSet::new();
        if let Some(own) = &own {
            let listener = listener(socket(SocketKind::TcpV4).await?, own.front.port)?;
            tasks.spawn(own.clone().serve(listener, seen.clone()));
        }
        let responder = Responder(SlotNames { upstreams: Arc::clone(&upstreams), own, view: seen.clone() });
        let gate = Gate {
            view: seen,
            upstreams,
            sockets: sockets.clone(),
            slot: slot.clone(),
            interception: means.interception.cloned(),
            secrets: means.secrets.subscribe(),
            places: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        };
        tasks.spawn(responder.clone().serve_udp(questions));
        tasks.spawn(responder.serve_tcp(long_questions));
        tasks.spawn(gate.serve(connections));
        Ok(Self { view, tasks })
    }

    /// Where a new policy is told.
    pub(super) fn view(&self) -> watch::Sender<View> {
        self.view.clone()
    }

    /// Ends them and closes their sockets.
    pub(super) async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

/// On any address of the slot: the one towards the sandbox comes and goes with it.
fn listener(socket: OwnedFd, port: u16) -> io::Result<TcpListener> {
    let socket = TcpSocket::from_std_stream(socket.into());
    socket.set_reuseaddr(true)?;
    socket.bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))?;
    socket.listen(BACKLOG)
}

fn udp(socket: OwnedFd, port: u16) -> io::Result<UdpSocket> {
    // A question of the last sandbox that is still waited for may hold the port a moment longer.
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    bind(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port)))?;
    UdpSocket::from_std(socket.into())
}

/// Serves connections, at most `limit` at a time, until its task is ended; they end with it.
pub(super) async fn accept_bounded<F>(listener: TcpListener, limit: usize, serve: impl Fn(TcpStream) -> F)
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        if connections.len() >= limit {
            connections.join_next().await;
        }
        let Ok((stream, _)) = listener.accept().await else { continue };
        let served = serve(stream);
        connections.spawn(async move {
            if let Err(error) = served.await {
                debug!(error = &error as &dyn std::error::Error, "A connection of a sandbox to its slot ended early");
            }
        });
    }
}
