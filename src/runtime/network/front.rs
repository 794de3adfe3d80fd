//! The server's own HTTPS, as a sandbox reaches it: its own public URLs and others', without leaving the machine.
//!
//! Names below the server's domain lead to the slot's address towards the sandbox (dns.rs answers them), where this
//! listens on the port of those URLs and passes connections on to the server. Whoever may not ask for such a name may
//! not come in either.

use super::services::{View, accept_bounded};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// Connections of one sandbox at the same time; more wait. All sandboxes together have [`Front::connections_max`].
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
    /// Connections of all sandboxes together; beyond them one is reset. Fewer than the server takes, so that sandboxes cannot
    /// keep its clients out.
    pub connections_max: usize,
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
}

/// What the responder answers for the front's names.
#[derive(Debug, Clone)]
pub(super) struct OwnNames {
    pub(super) front: Front,
    /// The slot's address.
    pub(super) gateway: Ipv4Addr,
    /// [`Front::connections_max`], one permit for each.
    pub(super) places: Arc<Semaphore>,
}

impl OwnNames {
    /// Serves until its task is ended; open connections end with it.
    pub(super) async fn serve(self, listener: TcpListener, view: watch::Receiver<View>) {
        accept_bounded(listener, CONNECTIONS_MAX, |stream| {
            let place = self.front.admits(&view.borrow()).then(|| Arc::clone(&self.places).try_acquire_owned().ok()).flatten();
            pass(stream, self.front.server, place)
        })
        .await;
    }
}

/// To the server, or nowhere for who has no place there.
async fn pass(mut sandbox: TcpStream, server: SocketAddr, place: Option<OwnedSemaphorePermit>) -> io::Result<()> {
    sandbox.set_nodelay(true)?;
    // A reset, not an orderly end of what never was a conversation.
    let Some(_place) = place else { return sandbox.set_zero_linger() };
    let mut server = TcpStream::connect(server).await?;
    server.set_nodelay(true)?;
    copy_bidirectional(&mut sandbox, &mut server).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::super::names::Names;
    use super::*;

    fn front() -> Front {
        Front { domain: "box.test".into(), port: 3443, server: "127.0.0.1:3443".parse().unwrap(), connections_max: 1 }
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

    #[tokio::test]
    async fn sandboxes_together_leave_room_for_the_servers_clients() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let slots = [TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap()];
        let addresses = slots.each_ref().map(|slot| slot.local_addr().unwrap());
        let places = Arc::new(Semaphore::new(1));
        let (_say, view) = watch::channel(View { names: Names::All, proxy: None, ..View::default() });
        for slot in slots {
            let front = Front { server: server.local_addr().unwrap(), ..front() };
            tokio::spawn(OwnNames { front, gateway: Ipv4Addr::LOCALHOST, places: Arc::clone(&places) }.serve(slot, view.clone()));
        }
        let first = TcpStream::connect(addresses[0]).await.unwrap();
        let (mut passed, _) = server.accept().await.unwrap();
        let mut second = TcpStream::connect(addresses[1]).await.unwrap();
        assert_eq!(second.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        drop(first);
        assert_eq!(passed.read(&mut [0]).await.unwrap(), 0);
        drop(passed);
        let permit = tokio::time::timeout(std::time::Duration::from_secs(5), places.acquire()).await.unwrap().unwrap();
        drop(permit);
        let mut third = TcpStream::connect(addresses[1]).await.unwrap();
        third.write_all(b"x").await.unwrap();
        server.accept().await.unwrap();
    }
}
