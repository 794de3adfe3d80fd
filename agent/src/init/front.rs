//! The way from the sandbox's loopback to the server's HTTPS, for programs that take `*.localhost` to be this machine.
//!
//! The listeners are part of every dump made after the first /init, and go on after a restore; a later /init changes them
//! only when it names another port or another address.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use crate::serve::listening_socket;
use crate::wire::Front;

/// Connections at a time; more wait in the backlog.
const CONNECTIONS_MAX: usize = 256;

/// What is listened on at the moment.
#[derive(Debug, Default)]
pub(crate) struct FrontDoor(Mutex<Option<Open>>);

#[derive(Debug)]
struct Open {
    front: Front,
    tasks: Vec<AbortHandle>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl FrontDoor {
    /// Opens it as wanted, or closes it. An error leaves it closed: a program of the tenant's has the port.
    pub(super) fn set(&self, wanted: Option<Front>) -> io::Result<()> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if open.as_ref().map(|open| open.front) == wanted {
            return Ok(());
        }
        *open = None;
        if let Some(front) = wanted {
            *open = Some(Open { front, tasks: serve(front)? });
        }
        Ok(())
    }
}

/// On both loopbacks, or on IPv4's alone where there is no IPv6.
fn serve(front: Front) -> io::Result<Vec<AbortHandle>> {
    let ipv4 = listening_socket(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), front.port))?;
    let ipv6 = listening_socket(SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), front.port));
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let task = |listener: TcpListener| {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        Ok(tokio::spawn(accept(listener, front.to, Arc::clone(&places))).abort_handle())
    };
    [Ok(ipv4), ipv6].into_iter().flatten().map(task).collect()
}

async fn accept(listener: tokio::net::TcpListener, to: SocketAddr, places: Arc<Semaphore>) {
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        // Only a sandbox that has used up its files or memory fails here; it may have some again later.
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            continue;
        };
        tokio::spawn(async move {
            // Either side's end ends both; there is nobody to tell.
            drop(pass(stream, to).await);
            drop(place);
        });
    }
}

async fn pass(mut inside: TcpStream, to: SocketAddr) -> io::Result<()> {
    let mut outside = TcpStream::connect(to).await?;
    inside.set_nodelay(true)?;
    outside.set_nodelay(true)?;
    tokio::io::copy_bidirectional(&mut inside, &mut outside).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[test]
    fn loopback_leads_on_until_it_is_told_otherwise() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let to = server.local_addr().unwrap();
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let echo = std::thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            let mut word = [0; 5];
            stream.read_exact(&mut word).unwrap();
            stream.write_all(&word).unwrap();
        });
        let door = FrontDoor::default();
        runtime.block_on(async {
            door.set(Some(Front { port, to })).unwrap();
            door.set(Some(Front { port, to })).unwrap();
            let client = tokio::task::spawn_blocking(move || {
                let mut stream = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
                stream.write_all(b"hello").unwrap();
                let mut word = [0; 5];
                stream.read_exact(&mut word).unwrap();
                word
            });
            assert_eq!(&client.await.unwrap(), b"hello");
            door.set(None).unwrap();
            tokio::task::yield_now().await;
        });
        echo.join().unwrap();
        drop(runtime);
        assert!(std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err());
    }
}
