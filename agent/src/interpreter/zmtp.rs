//! The client side of ZMTP 3.0, ZeroMQ's wire, as far as a Jupyter kernel needs it: the NULL mechanism, DEALER and SUB
//! sockets, over a unix or loopback TCP stream.
//!
//! Own code and not the crate `zeromq`: that brings 57 crates (regex and two random generators among them) and a task and
//! a reconnecting backend per socket into pid 1 of every sandbox, where one stream that ends when the kernel ends is all
//! that is wanted.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::net::{TcpStream, UnixStream};

/// A frame above this is left out, and the message says so: it would have to fit into the sandbox's memory three times.
const FRAME_BYTES_MAX: u64 = 128 << 20;
const GREETING_BYTES: usize = 64;

const MORE: u8 = 0x01;
const LONG: u8 = 0x02;
const COMMAND: u8 = 0x04;

/// Where a socket of a kernel is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Endpoint {
    Ipc(PathBuf),
    Loopback(u16),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SocketType {
    Dealer,
    /// Subscribed to everything.
    Subscriber,
}

/// One multipart message.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) parts: Vec<Bytes>,
    /// Bytes of parts that were too large; those parts are empty.
    pub(super) left_out: u64,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A connected socket.
pub(super) struct Socket {
    reader: ReadHalf<Box<dyn Stream>>,
    writer: WriteHalf<Box<dyn Stream>>,
    received: BytesMut,
    decoder: Decoder,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Socket").field("received", &self.received.len()).finish_non_exhaustive()
    }
}

impl Socket {
    /// Fails at once when nobody listens yet.
    pub(super) async fn connect(endpoint: &Endpoint, kind: SocketType) -> io::Result<Socket> {
        let stream: Box<dyn Stream> = match endpoint {
            Endpoint::Ipc(path) => Box::new(UnixStream::connect(path).await?),
            Endpoint::Loopback(port) => {
                let stream = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, *port))).await?;
                stream.set_nodelay(true)?;
                Box::new(stream)
            }
        };
        let (reader, writer) = tokio::io::split(stream);
        let mut socket = Socket { reader, writer, received: BytesMut::new(), decoder: Decoder::default() };
        socket.shake_hands(kind).await?;
        Ok(socket)
    }

    async fn shake_hands(&mut self, kind: SocketType) -> io::Result<()> {
        self.writer.write_all(&greeting()).await?;
        while self.received.len() < GREETING_BYTES {
            self.fill().await?;
        }
        let theirs = self.received.split_to(GREETING_BYTES);
        if theirs[0] != 0xff || theirs[9] & 1 != 1 || theirs[10] < 3 || !theirs[12..].starts_with(b"NULL\0") {
            return Err(invalid("the peer does not speak ZMTP 3 without a security mechanism"));
        }
        let name = match kind {
            SocketType::Dealer => "DEALER",
            SocketType::Subscriber => "SUB",
        };
        let mut ready = BytesMut::new();
        put_frame(&mut ready, COMMAND, &ready_command(name));
        if kind == SocketType::Subscriber {
            // In 3.0 a subscription is a message: a one, then the prefix, which is empty.
            put_frame(&mut ready, 0, &[1]);
        }
        self.writer.write_all(&ready).await
    }

    /// Not cancel-safe: dropped half-way, the stream is of no use any more.
    pub(super) async fn send(&mut self, parts: &[Bytes]) -> io::Result<()> {
        let mut frames = BytesMut::new();
        for (at, part) in parts.iter().enumerate() {
            put_frame(&mut frames, if at + 1 < parts.len() { MORE } else { 0 }, part);
        }
        self.writer.write_all(&frames).await
    }

    /// The next message. Cancel-safe: what has been read stays here.
    pub(super) async fn receive(&mut self) -> io::Result<Message> {
        loop {
            if let Some(message) = self.decoder.next(&mut self.received)? {
                return Ok(message);
            }
            self.fill().await?;
        }
    }

    async fn fill(&mut self) -> io::Result<()> {
        self.received.reserve(16 << 10);
        match self.reader.read_buf(&mut self.received).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

/// What follows a frame in its message.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum After {
    #[default]
    Nothing,
    More,
}

impl After {
    fn of(flags: u8) -> After {
        if flags & MORE != 0 { After::More } else { After::Nothing }
    }
}

/// Frames to messages; keeps what a message still lacks.
#[derive(Debug, Default)]
struct Decoder {
    whole: VecDeque<Message>,
    partial: Message,
    /// Bytes of a frame that is being left out.
    skip: u64,
    after_skipped: After,
}

impl Decoder {
    fn next(&mut self, bytes: &mut BytesMut) -> io::Result<Option<Message>> {
        while self.whole.is_empty() {
            if self.skip > 0 {
                let now = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
                bytes.advance(now);
                self.skip -= now as u64;
                if self.skip > 0 {
                    return Ok(None);
                }
                self.part(Bytes::new(), self.after_skipped);
                continue;
            }
            let Some((flags, length, header)) = frame_header(bytes)? else { return Ok(None) };
            if length > FRAME_BYTES_MAX {
                bytes.advance(header);
                self.partial.left_out += length;
                (self.skip, self.after_skipped) = (length, After::of(flags));
                continue;
            }
            let length = usize::try_from(length).map_err(|_| invalid("a frame is too large"))?;
            if bytes.len() < header + length {
                bytes.reserve(header + length - bytes.len());
                return Ok(None);
            }
            bytes.advance(header);
            let body = bytes.split_to(length).freeze();
            // READY, and an ERROR, which is followed by the end of the stream.
            if flags & COMMAND == 0 {
                self.part(body, After::of(flags));
            }
        }
        Ok(self.whole.pop_front())
    }

    fn part(&mut self, body: Bytes, after: After) {
        self.partial.parts.push(body);
        if after == After::Nothing {
            self.whole.push_back(std::mem::take(&mut self.partial));
        }
    }
}

/// Flags, length of the body, length of the header.
fn frame_header(bytes: &[u8]) -> io::Result<Option<(u8, u64, usize)>> {
    let Some(&flags) = bytes.first() else { return Ok(None) };
    if flags & !(MORE | LONG | COMMAND) != 0 {
        return Err(invalid("a frame has unknown flags"));
    }
    if flags & LONG == 0 {
        return Ok(bytes.get(1).map(|length| (flags, u64::from(*length), 2)));
    }
    let length = bytes.get(1..9).and_then(|length| <[u8; 8]>::try_from(length).ok());
    Ok(length.map(|length| (flags, u64::from_be_bytes(length), 9)))
}

fn put_frame(out: &mut BytesMut, flags: u8, body: &[u8]) {
    match u8::try_from(body.len()) {
        Ok(length) => out.extend_from_slice(&[flags, length]),
        Err(_) => {
            out.extend_from_slice(&[flags | LONG]);
            out.extend_from_slice(&(body.len() as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(body);
}

/// Signature, version 3.0, mechanism NULL, no server, filler.
fn greeting() -> [u8; GREETING_BYTES] {
    let mut greeting = [0; GREETING_BYTES];
    (greeting[0], greeting[9], greeting[10]) = (0xff, 0x7f, 3);
    greeting[12..16].copy_from_slice(b"NULL");
    greeting
}

fn ready_command(socket_type: &str) -> Vec<u8> {
    let mut command = b"\x05READY".to_vec();
    for (name, value) in [("Socket-Type", socket_type), ("Identity", "")] {
        command.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
        command.extend_from_slice(name.as_bytes());
        command.extend_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_be_bytes());
        command.extend_from_slice(value.as_bytes());
    }
    command
}

fn invalid(problem: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(parts: &[&[u8]]) -> BytesMut {
        let mut bytes = BytesMut::new();
        for (at, part) in parts.iter().enumerate() {
            put_frame(&mut bytes, if at + 1 < parts.len() { MORE } else { 0 }, part);
        }
        bytes
    }

    #[test]
    fn a_message_is_the_same_however_its_bytes_arrive() {
        let long = [7u8; 300];
        let mut whole = encoded(&[b"topic", b"", &long]);
        put_frame(&mut whole, COMMAND, b"\x05READY");
        whole.extend_from_slice(&encoded(&[b"next"]));
        for step in [1, 2, 7, 1000] {
            let (mut decoder, mut bytes, mut messages) = (Decoder::default(), BytesMut::new(), Vec::new());
            for chunk in whole.chunks(step) {
                bytes.extend_from_slice(chunk);
                while let Some(message) = decoder.next(&mut bytes).unwrap() {
                    messages.push(message.parts);
                }
            }
            assert_eq!(messages, [vec![Bytes::from_static(b"topic"), Bytes::new(), Bytes::copy_from_slice(&long)], vec!["next".into()]]);
        }
    }

    #[test]
    fn a_frame_without_end_is_left_out_and_counted() {
        let mut bytes = BytesMut::from(&[MORE, 1, b'a', LONG][..]);
        bytes.extend_from_slice(&(FRAME_BYTES_MAX + 1).to_be_bytes());
        let mut decoder = Decoder::default();
        let mut left = FRAME_BYTES_MAX + 1;
        let message = loop {
            if let Some(message) = decoder.next(&mut bytes).unwrap() {
                break message;
            }
            let now = left.min(1 << 20);
            left -= now;
            bytes.resize(usize::try_from(now).unwrap(), 0);
        };
        assert_eq!((message.parts, message.left_out), (vec!["a".into(), Bytes::new()], FRAME_BYTES_MAX + 1));
        bytes.extend_from_slice(&encoded(&[b"b"]));
        assert_eq!(decoder.next(&mut bytes).unwrap().unwrap().parts, ["b"]);
    }

    #[test]
    fn what_is_no_frame_is_an_error() {
        assert!(Decoder::default().next(&mut BytesMut::from(&[0xff, 0][..])).is_err());
    }
}
