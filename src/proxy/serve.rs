//! One HTTP/1.1 server per listener, with or without TLS, that sorts each request to a sandbox or the control plane.

use super::severable::{Ending, Severable, Unread};
use super::{Proxy, ProxyBody, Sorted};
use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::Either;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tower::{Service, ServiceExt};

/// From the first byte of a TLS connection to its end.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Pause after accept failed: out of file descriptors, most often, and trying again at once would only burn the CPU.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A bound port.
#[derive(Debug)]
pub struct Listener {
    /// Where connections come from.
    pub tcp: TcpListener,
    /// How to decrypt them; `None` for plain HTTP.
    pub tls: Option<Arc<rustls::ServerConfig>>,
}

/// Serves `listener` until `stop` turns true (or its sender is gone), then lets requests under way finish for at most
/// `drain_max` and cuts the rest. `control` answers what is for no sandbox.
pub async fn serve<C, B>(listener: Listener, proxy: Arc<Proxy>, control: C, mut stop: watch::Receiver<bool>)
where
    C: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + Sync + 'static,
    C::Future: Send,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let tls = listener.tls.map(TlsAcceptor::from);
    let places = Arc::new(Semaphore::new(proxy.config.connections_max));
    let mut connections = JoinSet::new();
    loop {
        // All arms are cancel-safe: no connection is taken, no place lost, no finished task forgotten.
        let accepted = tokio::select! {
            biased;
            () = stopped(&mut stop) => break,
            Some(_ended) = connections.join_next() => continue,
            accepted = accept(&listener.tcp, &places) => accepted,
        };
        match accepted {
            Ok((stream, place)) => {
                let (proxy, control, tls, stop) = (Arc::clone(&proxy), control.clone(), tls.clone(), stop.clone());
                connections.spawn(async move {
                    let _place = place;
                    serve_stream(stream, tls, proxy, control, stop).await;
                });
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn Error, "Could not accept a connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(proxy.config.drain_max, drained).await.is_err() {
        tracing::info!(connections = connections.len(), "Cut connections that were still busy when the server stopped");
    }
}

/// Resolves once the server is to stop. Cancel-safe.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // A sender that is gone means the same.
    drop(stop.wait_for(|stop| *stop).await);
}

async fn accept(tcp: &TcpListener, places: &Arc<Semaphore>) -> io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _peer) = tcp.accept().await?;
    Ok((stream, place))
}

async fn serve_stream<C, B>(stream: TcpStream, tls: Option<TlsAcceptor>, proxy: Arc<Proxy>, control: C, stop: watch::Receiver<bool>)
where
    C: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + Sync + 'static,
    C::Future: Send,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    // Without it every small frame of a terminal would wait for the client's delayed acknowledgement.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(error = &error as &dyn Error, "A client was gone before it was served");
        return;
    }
    let (stream, ending) = Severable::new(stream);
    match tls {
        None => serve_connection(stream, ending, proxy, control, stop).await,
        Some(acceptor) => match tokio::time::timeout(HANDSHAKE_MAX, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => serve_connection(stream, ending, proxy, control, stop).await,
            Ok(Err(error)) => tracing::debug!(error = &error as &dyn Error, "A TLS handshake failed"),
            Err(_too_slow) => tracing::debug!("A TLS handshake took longer than {HANDSHAKE_MAX:?}"),
        },
    }
}

async fn serve_connection<S, C, B>(stream: S, ending: Ending, proxy: Arc<Proxy>, control: C, mut stop: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    C: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + Sync + 'static,
    C::Future: Send,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let idle_max = proxy.config.client_idle_max;
    let asked = ending.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        asked.expect(if request.body().is_end_stream() { Unread::Nothing } else { Unread::Upload });
        answer(Arc::clone(&proxy), control.clone(), request)
    });
    let mut http = http1::Builder::new();
    // hyper's timer for request heads runs between requests too, which makes it the limit for idle connections.
    http.timer(TokioTimer::new()).header_read_timeout(idle_max).preserve_header_case(true);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service).with_upgrades());
    // Cancel-safe: the connection is only polled by reference, and stopping stays stopped.
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stopped(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            // Clients that keep a connection do not look whether it was closed: nobody waits for them to close it too.
            ending.expect(Unread::Nothing);
            connection.await
        }
    };
    if let Err(error) = ended {
        // An answer broke off, most often because its sandbox was killed or paused: the client has to notice.
        ending.reset();
        tracing::trace!(error = &error as &dyn Error, "A client connection broke");
    }
}

async fn answer<C, B>(proxy: Arc<Proxy>, control: C, request: Request<Incoming>) -> Result<Response<Either<ProxyBody, B>>, Infallible>
where
    C: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
{
    match proxy.sort(request).await {
        Sorted::Answered(response) => Ok(response.map(Either::Left)),
        Sorted::ControlPlane(request) => Ok(control.oneshot(request).await?.map(Either::Right)),
    }
}
