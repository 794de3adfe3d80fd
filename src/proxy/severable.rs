//! A client's socket that can end with a reset.
//!
//! A sandbox that is killed takes its open answers with it. A client must not take the rest for a short answer, nor for
//! a server that breaks the protocol: E2B's SDKs ask whether the sandbox is gone when the connection was reset, and
//! report a broken server when it was closed in the middle of a chunk (contract/e2b.md 3.4).

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// A TCP stream that is closed by RST instead of FIN once its [`Reset`] was asked for.
#[derive(Debug)]
pub(super) struct Severable {
    stream: TcpStream,
    reset: Reset,
}

/// Asks for the RST. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Reset(Arc<AtomicBool>);

impl Reset {
    /// From now on, closing means resetting.
    pub(super) fn ask(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Severable {
    pub(super) fn new(stream: TcpStream) -> (Self, Reset) {
        let reset = Reset::default();
        (Self { stream, reset: reset.clone() }, reset)
    }
}

impl Drop for Severable {
    fn drop(&mut self) {
        if self.reset.0.load(Ordering::Acquire) {
            // Lingering for no time is how a socket is told to reset. When it fails, the client has gone already.
            let _client_is_gone = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Severable {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Severable {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffers: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // A FIN that is sent first would win over the RST.
        if self.reset.0.load(Ordering::Acquire) {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn a_stream_whose_reset_was_asked_for_ends_with_one_after_what_was_written() {
        let (mut client, server) = pair().await;
        let (mut server, reset) = Severable::new(server);
        server.write_all(b"half an answ").await.unwrap();
        let mut seen = [0u8; 12];
        client.read_exact(&mut seen).await.unwrap();
        reset.ask();
        drop(server);
        assert_eq!(client.read(&mut seen).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn without_it_the_stream_just_ends() {
        let (mut client, server) = pair().await;
        drop(Severable::new(server));
        assert_eq!(client.read(&mut [0u8; 1]).await.unwrap(), 0);
    }
}
