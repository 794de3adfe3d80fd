//! The server's own HTTPS, as a sandbox reaches it: its own public URLs and others', without leaving the machine.
//!
//! Names below the server's domain lead to the slot's address towards the sandbox (dns.rs answers them), where this
//! listens on the port of those URLs and passes connections on to the server. Whoever may not ask for such a name may
//! not come in either.

use super::services::{View, accept_bounded};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Connections of one sandbox at the same time; more wait.
const CONNECTIONS_MAX: usize = 256;

/// Where a server's public URLs are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Front {
    /// What stands behind `<port>-<id>.`, without a port.
    pub domain: String,
    /// The port of `https://<port>-<id>.<domain>:<port>`.
    pub port: u16,
    /// Where the server listens for it, as seen from the host.
    pub server: SocketAddr,
}

impl Front {
    /// Whether a name, in lower case and without a final dot, is the domain or below it.
    pub(super) fn owns(&self, name: &str) -> bool {
        name.strip_suffix(self.domain.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }

    /// Whether a sandbox may come in.
    fn admits(&self, view: &View) -> bool {
        view.names.allow(&format!("sandbox.{}", self.domain))
    }

    /// Serves until its task is ended; open connections end with it.
    pub(super) async fn serve(self, listener: TcpListener, view: watch::Receiver<View>) {
        accept_bounded(listener, CONNECTIONS_MAX, |stream| {
            let server = self.admits(&view.borrow()).then_some(self.server);
            pass(stream, server)
        })
        .await;
    }
}

/// What the responder answers for the front's names.
#[derive(Debug, Clone)]
pub(super) struct OwnNames {
    pub(super) front: Front,
    /// The slot's address.
    pub(super) gateway: Ipv4Addr,
}

/// To the server, or nowhere for who is not admitted.
async fn pass(mut sandbox: TcpStream, server: Option<SocketAddr>) -> io::Result<()> {
    sandbox.set_nodelay(true)?;
    // A reset, not an orderly end of what never was a conversation.
    let Some(server) = server else { return sandbox.set_zero_linger() };
    let mut server = TcpStream::connect(server).await?;
    server.set_nodelay(true)?;
    copy_bidirectional(&mut sandbox, &mut server).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::super::names::Names;
    use super::*;

    fn front() -> Front {
        Front { domain: "box.test".into(), port: 3443, server: "127.0.0.1:3443".parse().unwrap() }
    }

    #[test]
    fn the_domain_and_what_is_below_it_are_the_servers() {
        for name in ["box.test", "3000-i.box.test", "api.box.test"] {
            assert!(front().owns(name), "{name}");
        }
        for name in ["otherbox.test", "box.test.org", "test", ""] {
            assert!(!front().owns(name), "{name}");
        }
    }

    #[test]
    fn who_may_ask_for_no_name_may_not_come_in() {
        let admits = |names| front().admits(&View { names, ..View::default() });
        assert!(admits(Names::All) && admits(Names::Only(vec!["*.box.test".into()])));
        assert!(!admits(Names::None) && !admits(Names::Only(vec!["example.com".into()])));
    }
}
