//! The host's client of the agent: /init and the agent's log, over [`Runtime::dial`].
//!
//! Whatever answers inside a sandbox may be hostile: every answer is bounded in size and time, nothing in it is
//! believed beyond its status, and its log lines are cut to fixed lengths before they are stored. Connections are
//! closed after each call, because a dump must not meet one of ours.

use crate::model::{LogEntry, LogLevel, SandboxId};
use crate::runtime::Runtime;
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use stillbox_agent::wire;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::Instant;

/// One answer of the agent's, at most.
const CALL_MAX: Duration = Duration::from_secs(5);
/// Pause between two attempts to connect while the agent comes up.
const RETRY_EVERY: Duration = Duration::from_millis(1);
/// Bytes of headers that are read of an answer (hyper's smallest buffer is 8 KiB).
const HEADER_BYTES_MAX: usize = 16 * 1024;
/// Where files are put.
const FILES_PATH: &str = "/files";
/// How much of a file is read at once.
const CHUNK_BYTES: usize = 256 * 1024;
/// Bytes of an answer to /init.
const INIT_BYTES_MAX: usize = 4 * 1024;
/// Bytes of one poll of the log.
const LOG_BYTES_MAX: usize = 1024 * 1024;
/// Lines of one poll: each becomes a row, and all sandboxes share the thread that writes them.
const LOG_LINES_MAX: usize = 1000;
/// Bytes of one log message, and of a line's fields together: a sandbox's log is bounded in lines, 10,000 of them.
const LOG_TEXT_MAX: usize = 8 * 1024;

/// Why the agent did not do as asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum AgentError {
    /// It does not take connections, or drops them.
    #[error("the agent cannot be reached")]
    Unreachable(#[source] std::io::Error),
    /// It speaks no proper HTTP.
    #[error("the agent gave no proper answer")]
    Protocol(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It refused.
    #[error("the agent answered {status} to {path}")]
    Status {
        /// What it answered.
        status: StatusCode,
        /// To what.
        path: &'static str,
    },
    /// A file that it was to be sent.
    #[error("a file of the host's could not be read")]
    HostFile(#[source] std::io::Error),
    /// It took too long.
    #[error("the agent did not answer within {0:?}")]
    Slow(Duration),
}

/// One call's answer: complete and within its bounds.
struct Answer {
    status: StatusCode,
    body: Bytes,
}

/// Sends /init until it holds, connecting anew while the agent comes up. `secrets` are those that the agent may know:
/// the present one first, then the one that an earlier, unconfirmed init may have brought.
///
/// Cancel-safe in that a repetition with both secrets still succeeds.
pub(super) async fn init(
    runtime: &Arc<dyn Runtime>,
    id: SandboxId,
    secrets: [&str; 2],
    request: &wire::InitRequest,
    ready_max: Duration,
) -> Result<(), AgentError> {
    let body = Bytes::from(serde_json::to_vec(request).map_err(|error| AgentError::Protocol(error.into()))?);
    let tries = keep_trying_init(runtime, id, secrets, body, Instant::now() + ready_max);
    tokio::time::timeout(ready_max, tries).await.map_err(|_| AgentError::Slow(ready_max))?
}

async fn keep_trying_init(
    runtime: &Arc<dyn Runtime>,
    id: SandboxId,
    secrets: [&str; 2],
    body: Bytes,
    deadline: Instant,
) -> Result<(), AgentError> {
    let mut which = 0;
    loop {
        let secret = secrets[which];
        let error = match call(runtime, id, Method::POST, wire::INIT_PATH, secret, body.clone(), INIT_BYTES_MAX).await {
            Ok(answer) if answer.status == StatusCode::NO_CONTENT => return Ok(()),
            // A reply that was lost on the way leaves the agent with the next secret.
            Ok(answer) if answer.status == StatusCode::UNAUTHORIZED && which == 0 => {
                which = 1;
                continue;
            }
            Ok(answer) => return Err(AgentError::Status { status: answer.status, path: wire::INIT_PATH }),
            Err(error) => error,
        };
        if Instant::now() >= deadline {
            return Err(error);
        }
        tokio::time::sleep(RETRY_EVERY).await;
    }
}

/// Waits until the agent answers at all, without telling it anything. For the dump of a template's ready state.
pub(super) async fn wait_until_up(runtime: &Arc<dyn Runtime>, id: SandboxId, ready_max: Duration) -> Result<(), AgentError> {
    let deadline = Instant::now() + ready_max;
    loop {
        let error = match call(runtime, id, Method::GET, "/health", "", Bytes::new(), INIT_BYTES_MAX).await {
            Ok(answer) if answer.status.is_success() => return Ok(()),
            Ok(answer) => AgentError::Status { status: answer.status, path: "/health" },
            Err(error) => error,
        };
        if Instant::now() >= deadline {
            return Err(error);
        }
        tokio::time::sleep(RETRY_EVERY).await;
    }
}

/// What one poll of the agent's log brought.
#[derive(Debug, Default, PartialEq)]
pub(super) struct LogPage {
    /// Lines, in the agent's order.
    pub(super) entries: Vec<LogEntry>,
    /// The cursor of the next poll.
    pub(super) read_to: u64,
}

/// The lines of the agent's log beyond `cursor`. Lines that cannot be read are left out; their numbers are used up.
pub(super) async fn log_since(
    runtime: &Arc<dyn Runtime>,
    id: SandboxId,
    secret: &str,
    cursor: u64,
    now: OffsetDateTime,
) -> Result<LogPage, AgentError> {
    let path = format!("{}?cursor={cursor}", wire::LOGS_PATH);
    let answer = call(runtime, id, Method::GET, &path, secret, Bytes::new(), LOG_BYTES_MAX).await?;
    if answer.status != StatusCode::OK {
        return Err(AgentError::Status { status: answer.status, path: wire::LOGS_PATH });
    }
    Ok(read_log(&answer.body, cursor, now))
}

fn read_log(body: &[u8], cursor: u64, now: OffsetDateTime) -> LogPage {
    let mut page = LogPage { entries: Vec::new(), read_to: cursor };
    for line in body.split(|byte| *byte == b'\n') {
        let Ok(entry) = serde_json::from_slice::<wire::LogEntry>(line) else { continue };
        // Numbers only count up; anything else would make us store a line twice.
        if entry.seq <= page.read_to {
            continue;
        }
        page.read_to = entry.seq;
        page.entries.push(accepted(entry, now));
        if page.entries.len() == LOG_LINES_MAX {
            // The next poll begins with the rest.
            break;
        }
    }
    page
}

fn accepted(entry: wire::LogEntry, now: OffsetDateTime) -> LogEntry {
    // A clock inside that runs ahead would put lines where no reader looks.
    let at = OffsetDateTime::parse(&entry.timestamp, &Rfc3339).map_or(now, |at| at.min(now));
    LogEntry {
        at,
        level: match entry.level {
            wire::LogLevel::Debug => LogLevel::Debug,
            wire::LogLevel::Info => LogLevel::Info,
            wire::LogLevel::Warn => LogLevel::Warn,
            wire::LogLevel::Error => LogLevel::Error,
        },
        message: cut(entry.message),
        fields: fitting(entry.fields),
    }
}

/// As many fields as fit.
fn fitting(fields: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut bytes = 0;
    let fits = |(key, value): &(String, String)| {
        bytes += key.len() + value.len();
        bytes <= LOG_TEXT_MAX
    };
    fields.into_iter().take_while(fits).collect()
}

fn cut(mut text: String) -> String {
    if text.len() > LOG_TEXT_MAX {
        let end = (0..=LOG_TEXT_MAX).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

async fn call(
    runtime: &Arc<dyn Runtime>,
    id: SandboxId,
    method: Method,
    path: &str,
    secret: &str,
    body: Bytes,
    bytes_max: usize,
) -> Result<Answer, AgentError> {
    let exchange = exchange(runtime, id, method, path, secret, body, bytes_max);
    tokio::time::timeout(CALL_MAX, exchange).await.map_err(|_| AgentError::Slow(CALL_MAX))?
}

async fn exchange(
    runtime: &Arc<dyn Runtime>,
    id: SandboxId,
    method: Method,
    path: &str,
    secret: &str,
    body: Bytes,
    bytes_max: usize,
) -> Result<Answer, AgentError> {
    let (mut sender, connection) = connect(runtime, id).await?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(http::header::HOST, "localhost")
        .header(http::header::CONNECTION, "close")
        .header(http::header::CONTENT_TYPE, "application/json")
        .header(wire::CONTROL_HEADER, secret)
        .body(Full::new(body))
        .map_err(|error| AgentError::Protocol(error.into()))?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(protocol)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), bytes_max).collect().await.map_err(AgentError::Protocol)?.to_bytes();
        Ok(Answer { status, body })
    };
    drive(connection, answer).await
}

/// Streams a file of the host's to `path` inside, owned by root. As slow as it is large: callers bound it.
pub(super) async fn put_file(runtime: &Arc<dyn Runtime>, id: SandboxId, host_file: &Path, path: &str) -> Result<(), AgentError> {
    let file = tokio::fs::File::open(host_file).await.map_err(AgentError::HostFile)?;
    let length = file.metadata().await.map_err(AgentError::HostFile)?.len();
    let (mut sender, connection) = connect(runtime, id).await?;
    let query: String = form_urlencoded::Serializer::new(String::new()).append_pair("path", path).append_pair("username", "root").finish();
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("{FILES_PATH}?{query}"))
        .header(http::header::HOST, "localhost")
        .header(http::header::CONNECTION, "close")
        .header(http::header::CONTENT_TYPE, "application/octet-stream")
        .header(http::header::CONTENT_LENGTH, length)
        .body(StreamBody::new(Box::pin(frames_of(file))))
        .map_err(|error| AgentError::Protocol(error.into()))?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(protocol)?;
        match response.status() {
            StatusCode::OK => Ok(()),
            status => Err(AgentError::Status { status, path: FILES_PATH }),
        }
    };
    drive(connection, answer).await
}

fn frames_of(file: tokio::fs::File) -> impl futures_util::Stream<Item = std::io::Result<http_body::Frame<Bytes>>> + Send {
    futures_util::stream::try_unfold(file, |mut file| async move {
        let mut chunk = bytes::BytesMut::with_capacity(CHUNK_BYTES);
        let read = file.read_buf(&mut chunk).await?;
        Ok((read > 0).then(|| (http_body::Frame::data(chunk.freeze()), file)))
    })
}

/// One connection to the agent's port, with bounded buffers.
pub(super) async fn connect<B>(
    runtime: &Arc<dyn Runtime>,
    id: SandboxId,
) -> Result<(http1::SendRequest<B>, http1::Connection<TokioIo<TcpStream>, B>), AgentError>
where
    B: http_body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let stream = runtime.dial(id, wire::AGENT_PORT).await.map_err(AgentError::Unreachable)?;
    http1::Builder::new().max_buf_size(HEADER_BYTES_MAX).handshake(TokioIo::new(stream)).await.map_err(protocol)
}

/// Drives a connection for as long as `answer` needs it. In the caller's future and not in a task of its own, so that
/// the connection is closed when that future is dropped.
pub(super) async fn drive<T>(
    connection: impl Future<Output = hyper::Result<()>>,
    answer: impl Future<Output = Result<T, AgentError>>,
) -> Result<T, AgentError> {
    let mut connection = std::pin::pin!(connection);
    let mut answer = std::pin::pin!(answer);
    tokio::select! {
        biased;
        // Cancel-safe: the call is over.
        answer = &mut answer => answer,
        closed = &mut connection => match closed {
            // All bytes are in; what is left of the answer is in hyper's buffers.
            Ok(()) => answer.await,
            Err(error) => Err(protocol(error)),
        },
    }
}

fn protocol(error: hyper::Error) -> AgentError {
    AgentError::Protocol(error.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: OffsetDateTime = time::macros::datetime!(2026-01-02 03:04:05 UTC);

    fn line(seq: u64, timestamp: &str, message: &str) -> String {
        let fields = BTreeMap::new();
        let entry = wire::LogEntry { seq, timestamp: timestamp.into(), level: wire::LogLevel::Info, message: message.into(), fields };
        serde_json::to_string(&entry).unwrap()
    }

    #[test]
    fn lines_are_read_once_and_nonsense_is_left_out() {
        let body = [
            line(4, "2026-01-02T03:00:00Z", "old"),
            line(5, "2026-01-02T03:00:01Z", "a"),
            "{nonsense".into(),
            line(5, "x", "again"),
            line(9, "x", "b"),
        ];
        let page = read_log(body.join("\n").as_bytes(), 4, NOW);
        assert_eq!(page.read_to, 9);
        let seen: Vec<_> = page.entries.iter().map(|entry| (entry.message.as_str(), entry.at)).collect();
        assert_eq!(seen, [("a", time::macros::datetime!(2026-01-02 03:00:01 UTC)), ("b", NOW)]);
    }

    #[test]
    fn a_poll_takes_so_many_lines_and_the_next_one_the_rest() {
        let lines: Vec<String> = (1..=1500).map(|seq| line(seq, "2026-01-01T00:00:00Z", "x")).collect();
        let body = lines.join("\n");
        let first = read_log(body.as_bytes(), 0, NOW);
        assert_eq!((first.entries.len(), first.read_to), (LOG_LINES_MAX, 1000));
        let second = read_log(body.as_bytes(), first.read_to, NOW);
        assert_eq!((second.entries.len(), second.read_to), (500, 1500));
    }

    #[test]
    fn the_fields_of_a_line_are_bounded_together() {
        let fields = (0..100).map(|number| (format!("{number:02}"), "x".repeat(1000))).collect();
        let kept = fitting(fields);
        assert_eq!(kept.len(), 8);
        assert!(kept.contains_key("00") && kept.contains_key("07"));
    }

    #[test]
    fn a_clock_that_runs_ahead_and_a_message_without_end_are_cut() {
        let page = read_log(line(1, "2999-01-01T00:00:00Z", &"ä".repeat(LOG_TEXT_MAX)).as_bytes(), 0, NOW);
        assert_eq!(page.entries[0].at, NOW);
        assert!(page.entries[0].message.len() <= LOG_TEXT_MAX);
    }
}
