//! Composition root: listens and serves until the process is killed.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::Arc;

use axum::serve::ListenerExt as _;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};

use crate::blocking;
use crate::http;
use crate::interpreter;
use crate::process::reaper::Reaper;
use crate::state::Agent;

const BACKLOG: i32 = 1024;

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("could not start the async runtime")]
    Runtime(#[source] io::Error),
    #[error("could not listen on port {port}")]
    Listen {
        port: u16,
        #[source]
        source: io::Error,
    },
    #[error("could not go on accepting connections")]
    Accept(#[source] io::Error),
}

/// One socket for both families, or IPv4 alone where the sandbox has no IPv6.
pub fn listen(port: u16) -> Result<TcpListener, ServeError> {
    let both = listening_socket(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
    let listener = both.or_else(|_| listening_socket(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))));
    listener.map_err(|source| ServeError::Listen { port, source })
}

/// Serves on `listener`; `path` is the PATH of processes that are given none. Returns only on failure.
pub fn serve(control_secret: String, path: String, listener: TcpListener) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ServeError::Runtime)?;
    blocking::start().map_err(ServeError::Runtime)?;
    runtime.block_on(async {
        let agent = Agent::new(control_secret, path);
        let child_died = Reaper::listen().map_err(ServeError::Runtime)?;
        tokio::spawn(Arc::clone(&agent.reaper).run(child_died));
        interpreter::enable(&agent);
        let listener = tokio::net::TcpListener::from_std(listener).map_err(ServeError::Runtime)?;
        // Without TCP_NODELAY a short stream waits 40 ms for the peer's delayed acknowledgement.
        let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
        axum::serve(listener, http::router(agent)).await.map_err(ServeError::Accept)
    })
}

/// A socket that listens there, for tokio to take. One on IPv6's unspecified address takes IPv4 as well.
pub(crate) fn listening_socket(address: SocketAddr) -> io::Result<TcpListener> {
    let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if family == AddressFamily::INET6 {
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(TcpListener::from(socket))
}
