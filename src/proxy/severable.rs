//! A client's socket that ends as the client has to understand it: with a reset, or with an end that lets it read the answer.
//!
//! A sandbox that is killed takes its open answers with it. A client must not take the rest for a short answer, nor for
//! a server that breaks the protocol: E2B's SDKs ask whether the sandbox is gone when the connection was reset, and
//! report a broken server when it was closed in the middle of a chunk (contract/e2b.md 3.4).
//!
//! An answer may come before the request's body was read: the sandbox is gone, the path a folder. The kernel resets a
//! connection that is closed with bytes unread or on their way, and a client that still sends then sees a broken pipe and
//! never the answer. So what is left of an upload is read away after the answer, for a while.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

/// How long the rest of an upload is read away. Who sends for longer is cut off, as everybody would be without this.
const LINGER_MAX: Duration = Duration::from_secs(10);

/// A TCP stream that is closed by RST instead of FIN once its [`Ending`] was asked for that.
#[derive(Debug)]
pub(super) struct Severable {
    stream: TcpStream,
    ending: Ending,
    /// Since our side was closed while the client may still be sending.
    lingering: Option<Pin<Box<Sleep>>>,
}

/// How the stream is to end. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Ending(Arc<Wishes>);

/// What a client may still be sending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unread {
    Nothing,
    Upload,
}

#[derive(Debug, Default)]
struct Wishes {
    reset: AtomicBool,
    upload: AtomicBool,
}

impl Ending {
    /// From now on, closing means resetting.
    pub(super) fn reset(&self) {
        self.0.reset.store(true, Ordering::Release);
    }

    /// What of the request that was taken last may be unread when the stream ends.
    pub(super) fn expect(&self, unread: Unread) {
        self.0.upload.store(unread == Unread::Upload, Ordering::Release);
    }

    fn is_reset(&self) -> bool {
        self.0.reset.load(Ordering::Acquire)
    }
}

impl Severable {
    pub(super) fn new(stream: TcpStream) -> (Self, Ending) {
        let ending = Ending::default();
        (Self { stream, ending: ending.clone(), lingering: None }, ending)
    }

    /// Reads away what the client still sends, until it closes or [`LINGER_MAX`] is over.
    fn poll_linger(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let deadline = self.lingering.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER_MAX)));
        if deadline.as_mut().poll(context).is_ready() {
            return Poll::Ready(());
        }
        let mut rest = [0u8; 16 * 1024];
        loop {
            let mut buffer = ReadBuf::new(&mut rest);
            let read = ready!(Pin::new(&mut self.stream).poll_read(context, &mut buffer));
            if read.is_err() || buffer.filled().is_empty() {
                return Poll::Ready(());
            }
        }
    }
}

impl Drop for Severable {
    fn drop(&mut self) {
        if self.ending.is_reset() {
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
        if self.ending.is_reset() {
            return Poll::Ready(Ok(()));
        }
        ready!(Pin::new(&mut self.stream).poll_shutdown(context))?;
        if self.ending.0.upload.load(Ordering::Acquire) {
            ready!(self.poll_linger(context));
        }
        Poll::Ready(Ok(()))
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
        let (mut server, ending) = Severable::new(server);
        server.write_all(b"half an answ").await.unwrap();
        let mut seen = [0u8; 12];
        client.read_exact(&mut seen).await.unwrap();
        ending.reset();
        drop(server);
        assert_eq!(client.read(&mut seen).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn without_it_the_stream_just_ends() {
        let (mut client, server) = pair().await;
        drop(Severable::new(server));
        assert_eq!(client.read(&mut [0u8; 1]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn what_is_left_of_an_upload_is_read_away_so_that_the_client_reads_the_answer() {
        let (mut client, server) = pair().await;
        let (mut server, ending) = Severable::new(server);
        ending.expect(Unread::Upload);
        let serving = tokio::spawn(async move {
            server.read_exact(&mut [0u8; 4]).await.unwrap();
            server.write_all(b"no such sandbox").await.unwrap();
            server.shutdown().await.unwrap();
        });
        client.write_all(b"POST").await.unwrap();
        // More than the buffers of both sockets take.
        let body = vec![0u8; 32 * 1024 * 1024];
        client.write_all(&body).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "no such sandbox");
        drop(client);
        serving.await.unwrap();
    }

    #[tokio::test]
    async fn a_stream_without_an_upload_ends_at_once_though_its_client_stays() {
        let (client, server) = pair().await;
        let (mut server, ending) = Severable::new(server);
        ending.expect(Unread::Upload);
        ending.expect(Unread::Nothing);
        tokio::time::timeout(Duration::from_secs(5), server.shutdown()).await.unwrap().unwrap();
        drop(client);
    }
}
