//! The name server of a slot: it forwards what its sandbox may ask to the host's resolvers and refuses the rest. Names
//! below the server's own domain it answers itself: they lead to the slot.
//!
//! It listens inside the slot's netns, so it knows whose question it is, and asks from the host's, so that resolvers on
//! the host's loopback work too. Answers are passed on unread: they are between the sandbox and the resolver.

mod message;
mod upstreams;

pub(super) use upstreams::Upstreams;

use super::front::OwnNames;
use super::services::{View, accept_bounded};
use message::{REFUSED, SERVFAIL, address, failure, question_name};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;
use upstreams::{Transport, read_framed, write_framed};

/// A connection without a question is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Questions of one sandbox that are waited for at the same time; over UDP more are dropped, as a busy server would.
const QUESTIONS_MAX: usize = 64;
/// TCP connections of one sandbox at the same time; more wait.
const CONNECTIONS_MAX: usize = 16;
/// Longest question or answer over UDP that is passed on.
const UDP_BYTES_MAX: usize = 8 << 10;

/// What one slot's name server works with.
#[derive(Debug, Clone)]
pub(super) struct Responder {
    pub(super) upstreams: Arc<Upstreams>,
    /// Names that lead to the slot itself.
    pub(super) own: Option<OwnNames>,
    /// What may be asked.
    pub(super) view: watch::Receiver<View>,
}

/// What becomes of a question.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Forward,
    Answer(Vec<u8>),
    /// Not a question; nothing is said.
    Ignore,
}

impl Responder {
    fn judge(&self, message: &[u8]) -> Verdict {
        let Some(name) = question_name(message) else { return Verdict::Ignore };
        if !self.view.borrow().names.allow(&name) {
            return Verdict::Answer(failure(message, REFUSED));
        }
        match &self.own {
            Some(own) if own.front.owns(&name) => Verdict::Answer(address(message, own.gateway)),
            Some(_) | None => Verdict::Forward,
        }
    }

    /// Serves until its task is ended; what it is in the middle of ends with it.
    pub(super) async fn serve_udp(self, socket: UdpSocket) {
        let socket = Arc::new(socket);
        let mut questions = JoinSet::new();
        let mut message = vec![0; UDP_BYTES_MAX];
        loop {
            let Ok((length, asker)) = socket.recv_from(&mut message).await else { continue };
            while questions.try_join_next().is_some() {}
            if questions.len() >= QUESTIONS_MAX {
                continue;
            }
            let question = message.get(..length).unwrap_or_default().to_vec();
            let (responder, socket) = (self.clone(), Arc::clone(&socket));
            questions.spawn(async move {
                if let Some(answer) = responder.answer(&question, Transport::Udp).await
                    && let Err(error) = socket.send_to(&answer, asker).await
                {
                    debug!(error = &error as &dyn std::error::Error, "Could not answer a sandbox's DNS question");
                }
            });
        }
    }

    /// Serves until its task is ended; what it is in the middle of ends with it.
    pub(super) async fn serve_tcp(self, listener: TcpListener) {
        accept_bounded(listener, CONNECTIONS_MAX, |stream| self.clone().converse(stream)).await;
    }

    async fn converse(self, mut stream: TcpStream) -> io::Result<()> {
        while let Some(question) = timeout(IDLE_TIMEOUT, read_framed(&mut stream)).await?? {
            let Some(answer) = self.answer(&question, Transport::Tcp).await else { return Ok(()) };
            write_framed(&mut stream, &answer).await?;
        }
        Ok(())
    }

    async fn answer(&self, question: &[u8], transport: Transport) -> Option<Vec<u8>> {
        match self.judge(question) {
            Verdict::Forward => Some(self.upstreams.ask(question, transport).await.unwrap_or_else(|_| failure(question, SERVFAIL))),
            Verdict::Answer(answer) => Some(answer),
            Verdict::Ignore => None,
        }
    }
}
