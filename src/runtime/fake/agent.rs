//! A stand-in for the agent: /health, /init with its control secret, and the log, over HTTP/1.1 by hand, because this
//! room knows no HTTP.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Bytes of a request's head that are read.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// What the agent of one fake sandbox knows: dumped and restored as its "memory".
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FakeAgent {
    /// What the next /init has to present.
    pub control_secret: String,
    /// Bodies of all inits that held, oldest first.
    pub inits: Vec<serde_json::Value>,
    /// Lines of its log as JSON, by number.
    pub log: BTreeMap<u64, String>,
    /// Test programs "in memory".
    pub memory: BTreeMap<String, String>,
    /// Commands that it was asked to run, oldest first.
    pub commands: Vec<String>,
    /// How the next commands end; when there is none left, as `exit N` says, else 0.
    pub exit_codes: Vec<i64>,
    /// Request lines of files that were put into it, oldest first.
    pub files: Vec<String>,
    /// Answers nothing while true: an agent that hangs.
    pub hangs: bool,
}

/// A running agent; stops when dropped.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) address: SocketAddr,
    pub(super) state: Arc<Mutex<FakeAgent>>,
    serving: tokio::task::JoinHandle<()>,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Process {
    pub(super) async fn start(state: FakeAgent) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (address, state) = (listener.local_addr()?, Arc::new(Mutex::new(state)));
        let serving = tokio::spawn(serve(listener, Arc::clone(&state)));
        Ok(Self { address, state, serving })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, FakeAgent> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn serve(listener: TcpListener, state: Arc<Mutex<FakeAgent>>) {
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let state = Arc::clone(&state);
        connections.spawn(async move {
            let _a_client_that_left = answer(stream, &state).await;
        });
    }
}

async fn answer(mut stream: TcpStream, state: &Mutex<FakeAgent>) -> std::io::Result<()> {
    let Some(request) = read_request(&mut stream).await? else { return Ok(()) };
    if state.lock().unwrap_or_else(PoisonError::into_inner).hangs {
        return std::future::pending().await;
    }
    let (status, body) = state.lock().unwrap_or_else(PoisonError::into_inner).handle(&request);
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    // No content has no length either.
    let head = if status.starts_with("204") { format!("HTTP/1.1 {status}\r\nConnection: close\r\n\r\n") } else { head };
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

struct Request {
    line: String,
    secret: String,
    body: Vec<u8>,
}

async fn read_request(stream: &mut TcpStream) -> std::io::Result<Option<Request>> {
    let mut read = Vec::new();
    let end = loop {
        if let Some(end) = read.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        if read.len() > HEAD_BYTES_MAX || stream.read_buf(&mut read).await? == 0 {
            return Ok(None);
        }
    };
    let head = String::from_utf8_lossy(&read[..end]).into_owned();
    let mut lines = head.lines();
    let line = lines.next().unwrap_or_default().to_owned();
    let headers: BTreeMap<String, String> =
        lines.filter_map(|line| line.split_once(':')).map(|(key, value)| (key.to_ascii_lowercase(), value.trim().to_owned())).collect();
    let length: usize = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = read[end + 4..].to_vec();
    while body.len() < length {
        if stream.read_buf(&mut body).await? == 0 {
            return Ok(None);
        }
    }
    let secret = headers.get("x-stillbox-control").cloned().unwrap_or_default();
    Ok(Some(Request { line, secret, body }))
}

impl FakeAgent {
    fn handle(&mut self, request: &Request) -> (&'static str, String) {
        if request.line.starts_with("GET /health ") {
            return ("204 No Content", String::new());
        }
        if request.line.starts_with("POST /process.Process/Start ") {
            return self.run(&request.body);
        }
        if request.line.starts_with("POST /files?") {
            self.files.push(request.line.clone());
            return ("200 OK", "[]".to_owned());
        }
        if request.secret != self.control_secret {
            return ("401 Unauthorized", String::new());
        }
        if request.line.starts_with("POST /init ") {
            return self.init(&request.body);
        }
        match request.line.strip_prefix("GET /stillbox/logs?cursor=").and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok()) {
            Some(cursor) => ("200 OK", self.log.range(cursor + 1..).map(|(_, line)| format!("{line}\n")).collect()),
            None => ("404 Not Found", String::new()),
        }
    }

    /// Two events of Connect's stream: it started, and it ended.
    fn run(&mut self, body: &[u8]) -> (&'static str, String) {
        let message = body.get(5..).and_then(|message| serde_json::from_slice::<serde_json::Value>(message).ok()).unwrap_or_default();
        let script = message["process"]["args"][2].as_str().unwrap_or_default().to_owned();
        let by_script = script.strip_prefix("exit ").and_then(|code| code.parse().ok()).unwrap_or(0);
        let code = self.exit_codes.pop().unwrap_or(by_script);
        self.commands.push(script);
        let events = [r#"{"event":{"start":{"pid":7}}}"#.to_owned(), format!(r#"{{"event":{{"end":{{"exitCode":{code}}}}}}}"#)];
        let length = |event: &str| String::from_utf8(vec![0, 0, 0, 0, event.len().try_into().unwrap_or(0)]).unwrap_or_default();
        ("200 OK", events.iter().map(|event| length(event) + event).collect())
    }

    fn init(&mut self, body: &[u8]) -> (&'static str, String) {
        let Ok(body) = serde_json::from_slice::<serde_json::Value>(body) else { return ("400 Bad Request", String::new()) };
        let Some(next) = body["controlSecret"].as_str() else { return ("400 Bad Request", String::new()) };
        self.control_secret = next.to_owned();
        self.inits.push(body);
        ("204 No Content", String::new())
    }
}
