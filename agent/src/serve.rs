//! Composition root: listens and serves until the process is killed.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use axum::serve::ListenerExt as _;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use tokio::net::TcpListener;

use crate::http;
use crate::state::Agent;

const BACKLOG: i32 = 1024;

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("could not start the async runtime")]
    Runtime(#[source] io::Error),
    #[error("could not listen on port {port}")]
    Listen { port: u16, #[source] source: io::Error },
    #[error("could not go on accepting connections")]
    Accept(#[source] io::Error),
}

/// Serves on `port` of all addresses. Returns only on failure.
pub fn serve(control_secret: String, port: u16) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ServeError::Runtime)?;
    runtime.block_on(async {
        let agent = Agent::new(control_secret);
        let listener = listen_on(port).map_err(|source| ServeError::Listen { port, source })?;
        // Without TCP_NODELAY a short stream waits 40 ms for the peer's delayed acknowledgement.
        let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
        axum::serve(listener, http::router(agent)).await.map_err(ServeError::Accept)
    })
}

/// One socket for both families, or IPv4 alone where the sandbox has no IPv6.
fn listen_on(port: u16) -> io::Result<TcpListener> {
    let both = listening_socket(AddressFamily::INET6, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
    let listener = both.or_else(|_| listening_socket(AddressFamily::INET, SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))))?;
    TcpListener::from_std(listener)
}

fn listening_socket(family: AddressFamily, address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if family == AddressFamily::INET6 {
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    bind(&socket, &address)?;
    listen(&socket, BACKLOG)?;
    Ok(std::net::TcpListener::from(socket))
}
