//! The name servers of this product: a slot's, which its sandbox asks, and the machine's own (resolver.rs), if it is
//! turned on. What becomes of a question is for a [`Judge`] to say; what is forwarded is passed on unread, both ways.
//!
//! A slot's forwards what its sandbox may ask to the host's resolvers and refuses the rest; names below the server's own
//! domain lead to the slot. It listens inside the slot's netns, so it knows whose question it is, and asks from the
//! host's, so that resolvers on the host's loopback work too.

mod message;
mod upstreams;

pub(super) use upstreams::Upstreams;

use super::front::OwnNames;
use super::services::{View, accept_bounded};
use message::{REFUSED, SERVFAIL, failure, question_name};
pub(super) use message::{addresses, addresses_answer, query};
use std::io;
use std::net::IpAddr;
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
/// Questions to one name server that are waited for at the same time; over UDP more are dropped, as a busy server would.
const QUESTIONS_MAX: usize = 64;
/// TCP connections to one name server at the same time; more wait.
const CONNECTIONS_MAX: usize = 16;
/// Longest question or answer over UDP that is passed on.
const UDP_BYTES_MAX: usize = 8 << 10;

/// What becomes of a question.
#[derive(Debug)]
pub(super) enum Verdict {
    /// These name servers are asked.
    Ask(Arc<Upstreams>),
    Answer(Vec<u8>),
}

/// Decides about questions, by the name that is asked for (lower case, no final dot).
pub(super) trait Judge: Clone + Send + Sync + 'static {
    fn judge(&self, name: &str, question: &[u8]) -> Verdict;
}

/// The names that a slot's sandbox may ask for.
#[derive(Debug, Clone)]
pub(super) struct SlotNames {
    pub(super) upstreams: Arc<Upstreams>,
    /// Names that lead to the slot itself.
    pub(super) own: Option<OwnNames>,
    /// What may be asked.
    pub(super) view: watch::Receiver<View>,
}

impl Judge for SlotNames {
    fn judge(&self, name: &str, question: &[u8]) -> Verdict {
        let refuses = |view: &View| view.is_mute || !view.names.allow(name);
        if refuses(&self.view.borrow()) {
            return Verdict::Answer(failure(question, REFUSED));
        }
        match &self.own {
            Some(own) if own.front.owns(name) => Verdict::Answer(addresses_answer(question, &[IpAddr::V4(own.gateway)])),
            Some(_) | None => Verdict::Ask(Arc::clone(&self.upstreams)),
        }
    }
}

/// A name server on sockets that are given to it.
#[derive(Debug, Clone)]
pub(super) struct Responder<J>(pub(super) J);

impl<J: Judge> Responder<J> {
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
                    debug!(error = &error as &dyn std::error::Error, "Could not answer a DNS question");
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

    /// `None` for what is no question: nothing is said.
    async fn answer(&self, question: &[u8], transport: Transport) -> Option<Vec<u8>> {
        match self.0.judge(&question_name(question)?, question) {
            Verdict::Ask(upstreams) => Some(upstreams.ask(question, transport).await.unwrap_or_else(|_| failure(question, SERVFAIL))),
            Verdict::Answer(answer) => Some(answer),
        }
    }
}
