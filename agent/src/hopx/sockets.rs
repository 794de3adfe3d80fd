//! WebSockets: code and commands as they run, a terminal, changes of files. Messages are JSON objects, one per frame.
//!
//! A client that hangs up ends its watch and its terminal; code and commands go on until their timeout, as they do when
//! the client of a plain request is gone.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use axum::routing::any;
use bytes::Bytes;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::commands;
use super::error::{Code, HopxError};
use super::execute;
use super::pieces::{Decoder, Ended, Piece};
use super::run;
use super::{WORKSPACE, files};
use crate::filesystem::watch::{Depth, EventKind, NetworkMounts};
use crate::filesystem::watchers::{Change, Entries, Options, WatcherError};
use crate::logs::rfc3339;
use crate::process::output::OutputEvent;
use crate::process::spawn::{ProcessConfig, Size, Terminal};
use crate::process::{self, Live, Start};
use crate::state::Agent;

/// One message of a client.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// How long a client may take to answer a ping before the next message comes all the same.
const PONG_MAX: Duration = Duration::from_secs(1);
/// Messages of a client that wait to be read.
const UNREAD_MAX: usize = 1024;
/// Until a client says otherwise.
const SIZE_DEFAULT: Size = Size { cols: 80, rows: 24 };

type Upgrade = Result<WebSocketUpgrade, WebSocketUpgradeRejection>;

pub(super) fn routes() -> Router<Arc<Agent>> {
    Router::new()
        .route("/stream", any(executions))
        .route("/stream/ipython", any(executions))
        .route("/execute/stream", any(executions))
        .route("/commands/stream", any(command_runs))
        .route("/terminal", any(terminal))
        .route("/files/watch", any(watch))
}

/// The connection is gone, or its client sent what ends it.
struct Gone;

/// A client's end of a WebSocket, in messages.
///
/// JavaScript's client listens for one message at a time and loses what comes in the same moment as another. So each
/// message is followed by a ping, and the next one waits until the client has answered that.
struct Client {
    socket: WebSocket,
    /// What came while a pong was waited for.
    unread: VecDeque<Message>,
    awaits_pong: bool,
}

impl Client {
    fn new(socket: WebSocket) -> Client {
        Client { socket, unread: VecDeque::new(), awaits_pong: false }
    }

    async fn send(&mut self, message: &Value) -> Result<(), Gone> {
        self.settle().await?;
        self.socket.send(Message::text(message.to_string())).await.map_err(|_| Gone)?;
        self.awaits_pong = true;
        self.socket.send(Message::Ping(Bytes::new())).await.map_err(|_| Gone)
    }

    /// Waits until the client has taken the last message, or is one that answers no pings.
    async fn settle(&mut self) -> Result<(), Gone> {
        let until = Instant::now() + PONG_MAX;
        while self.awaits_pong {
            match timeout_at(until, self.socket.recv()).await {
                Err(_) | Ok(Some(Ok(Message::Pong(_)))) => self.awaits_pong = false,
                Ok(Some(Ok(Message::Close(_)) | Err(_)) | None) => return Err(Gone),
                Ok(Some(Ok(_))) if self.unread.len() >= UNREAD_MAX => return Err(Gone),
                Ok(Some(Ok(message))) => self.unread.push_back(message),
            }
        }
        Ok(())
    }

    /// The next message of this form; one that is malformed is answered with what is wrong. Cancel-safe: a message is
    /// lost only when it is malformed.
    async fn next<T: DeserializeOwned>(&mut self) -> Result<T, Gone> {
        loop {
            let message = match self.unread.pop_front() {
                Some(message) => message,
                None => self.socket.recv().await.ok_or(Gone)?.map_err(|_| Gone)?,
            };
            let text = match message {
                Message::Text(text) => Bytes::from(text),
                Message::Binary(bytes) => bytes,
                Message::Pong(_) => {
                    self.awaits_pong = false;
                    continue;
                }
                Message::Ping(_) => continue,
                Message::Close(_) => return Err(Gone),
            };
            match serde_json::from_slice(&text) {
                Ok(message) => return Ok(message),
                Err(error) => self.send(&HopxError::invalid(format!("the message is malformed: {error}")).message()).await?,
            }
        }
    }

    /// With a closing frame, which tells clients that nothing is missing.
    async fn close(mut self) {
        if self.settle().await.is_ok() {
            drop(self.socket.send(Message::Close(None)).await);
        }
    }
}

/// Takes the connection over. What `serve` does is over with it.
fn upgraded<F, S>(upgrade: Upgrade, agent: Arc<Agent>, serve: S) -> Result<Response, HopxError>
where
    F: Future<Output = Result<Client, Gone>> + Send + 'static,
    S: FnOnce(Arc<Agent>, Client) -> F + Send + 'static,
{
    let upgrade = upgrade.map_err(|rejection| HopxError::invalid(format!("this endpoint is a WebSocket: {}", rejection.body_text())))?;
    Ok(upgrade.max_message_size(MESSAGE_BYTES_MAX).on_upgrade(async move |socket| {
        if let Ok(client) = serve(agent, Client::new(socket)).await {
            client.close().await;
        }
    }))
}

fn now() -> String {
    rfc3339(SystemTime::now())
}

// ---------------------------------------------------------------- code and commands

async fn executions(State(agent): State<Arc<Agent>>, upgrade: Upgrade) -> Result<Response, HopxError> {
    upgraded(upgrade, agent, async |agent, mut client: Client| {
        loop {
            let request: execute::Request = client.next().await?;
            let begun = match request.checked(&agent).await {
                Ok(execution) => execute::begin(&agent, execution),
                Err(error) => Err(error),
            };
            relay(&mut client, begun).await?;
        }
    })
}

async fn command_runs(State(agent): State<Arc<Agent>>, upgrade: Upgrade) -> Result<Response, HopxError> {
    upgraded(upgrade, agent, async |agent, mut client: Client| {
        loop {
            let request: commands::Request = client.next().await?;
            let begun = match request.program(&agent).await {
                Ok((program, ..)) => run::start(&agent, program).map(|running| running.pieces),
                Err(error) => Err(error),
            };
            relay(&mut client, begun).await?;
        }
    })
}

/// Everything that runs puts out, then `result` and `complete`; the client may then send another request.
async fn relay(client: &mut Client, begun: Result<mpsc::Receiver<Piece>, HopxError>) -> Result<(), Gone> {
    let mut pieces = match begun {
        Ok(pieces) => pieces,
        Err(error) => {
            client.send(&error.message()).await?;
            return client.send(&json!({ "type": "complete", "success": false, "timestamp": now() })).await;
        }
    };
    while let Some(piece) = pieces.recv().await {
        match piece {
            Piece::Stdout(text) | Piece::Stderr(text) if text.is_empty() => {}
            Piece::Stdout(text) => client.send(&json!({ "type": "stdout", "data": text, "timestamp": now() })).await?,
            Piece::Stderr(text) => client.send(&json!({ "type": "stderr", "data": text, "timestamp": now() })).await?,
            Piece::Shown(shown) => {
                client.send(&json!({ "type": "rich_output", "output": execute::rich_output(&shown), "timestamp": now() })).await?;
            }
            Piece::Ended(Ended { outcome, took }) => {
                let (exit_code, success) = (outcome.exit_code(), outcome.is_success());
                let took = took.as_secs_f64();
                client
                    .send(&json!({ "type": "result", "exit_code": exit_code, "success": success, "execution_time": took, "timestamp": now() }))
                    .await?;
                client.send(&json!({ "type": "complete", "success": success, "exit_code": exit_code, "timestamp": now() })).await?;
            }
        }
    }
    Ok(())
}

// ---------------------------------------------------------------- terminal

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Keys {
    Input { data: String },
    Resize { cols: u16, rows: u16 },
    Ping,
}

async fn terminal(State(agent): State<Arc<Agent>>, upgrade: Upgrade) -> Result<Response, HopxError> {
    upgraded(upgrade, agent, async |agent, mut client: Client| {
        if let Err(error) = shell(&agent, &mut client).await? {
            client.send(&error.message()).await?;
        }
        Ok(client)
    })
}

/// A shell of the client's own, which ends with the connection.
async fn shell(agent: &Arc<Agent>, client: &mut Client) -> Result<Result<(), HopxError>, Gone> {
    let started = match run::ensure_workspace(agent).await.and_then(|()| start_shell(agent)) {
        Ok(started) => started,
        Err(error) => return Ok(Err(error)),
    };
    let (process, mut output) = started;
    let mut decoder = Decoder::default();
    let ended = loop {
        // Both arms are cancel-safe: what was not returned comes with the next call.
        tokio::select! {
            event = output.next() => match event {
                Some(OutputEvent::Chunk(chunk)) => {
                    let text = decoder.text_of(&chunk.bytes);
                    if client.send(&json!({ "type": "output", "data": text })).await.is_err() {
                        break Err(Gone);
                    }
                }
                Some(OutputEvent::End(exit)) => break Ok(exit.code()),
                None => break Ok(0),
            },
            keys = client.next::<Keys>() => match (keys, process.live()) {
                (Ok(keys), Some(live)) => {
                    if let Err(error) = press(&live, keys).await
                        && client.send(&error.message()).await.is_err()
                    {
                        break Err(Gone);
                    }
                }
                (Ok(_), None) => {}
                (Err(Gone), _) => break Err(Gone),
            },
        }
    };
    match ended {
        Ok(code) => client.send(&json!({ "type": "exit", "code": code })).await.map(Ok),
        Err(Gone) => {
            run::kill_group(&process);
            Err(Gone)
        }
    }
}

fn start_shell(agent: &Arc<Agent>) -> Result<(Arc<process::Process>, process::output::Subscription), HopxError> {
    let envs = BTreeMap::from([("TERM".to_owned(), "xterm-256color".to_owned())]);
    let config =
        ProcessConfig { cmd: "bash".to_owned(), args: vec!["-i".to_owned(), "-l".to_owned()], envs, cwd: Some(WORKSPACE.to_owned()) };
    let start = Start { config, terminal: Terminal::Pty(SIZE_DEFAULT), tag: None, deadline: None };
    Ok(process::start(agent, &agent.identity(), &run::user(agent)?, start)?)
}

async fn press(live: &Live, keys: Keys) -> Result<(), HopxError> {
    let done = match keys {
        Keys::Input { data } => live.input.write_pty(data.as_bytes()).await,
        Keys::Resize { cols, rows } => live.input.resize(Size { cols, rows }),
        Keys::Ping => Ok(()),
    };
    done.map_err(|error| HopxError::new(Code::CommandFailed, error.to_string()))
}

// ---------------------------------------------------------------- files

#[derive(Debug, Deserialize)]
struct Watch {
    #[serde(default)]
    action: Option<String>,
    path: Option<String>,
}

async fn watch(State(agent): State<Arc<Agent>>, upgrade: Upgrade) -> Result<Response, HopxError> {
    upgraded(upgrade, agent, async |agent, mut client: Client| {
        loop {
            let asked: Watch = client.next().await?;
            if let Err(error) = watched(&agent, &mut client, asked).await? {
                client.send(&error.message()).await?;
            }
        }
    })
}

/// Tells of changes in a tree, until the client asks for another one or goes.
async fn watched(agent: &Agent, client: &mut Client, asked: Watch) -> Result<Result<(), HopxError>, Gone> {
    let mut next = Some(asked);
    while let Some(Watch { action, path }) = next.take() {
        match action.as_deref() {
            None | Some("watch") => {}
            Some("unwatch" | "stop") => return Ok(Ok(())),
            Some(other) => return Ok(Err(HopxError::invalid(format!("action is '{other}'; it must be watch or unwatch")))),
        }
        let root = match root_of(agent, path).await {
            Ok(root) => root,
            Err(error) => return Ok(Err(error)),
        };
        let options = Options { depth: Depth::Tree, entries: Entries::Omit, mounts: NetworkMounts::Allow };
        let watching = match agent.watchers.subscribe(&root, options).await {
            Ok(watching) => watching,
            Err(error) => return Ok(Err(watch_error(&error, &root))),
        };
        client.send(&json!({ "type": "watching", "path": root.to_string_lossy(), "timestamp": now() })).await?;
        while next.is_none() {
            // Both arms are cancel-safe: changes stay queued in the watch, messages in the connection.
            tokio::select! {
                changes = watching.next() => match changes {
                    Ok(changes) => {
                        for change in changes {
                            client.send(&told(&root, &change)).await?;
                        }
                    }
                    Err(error) => return Ok(Err(watch_error(&error, &root))),
                },
                asked = client.next::<Watch>() => next = Some(asked?),
            }
        }
    }
    Ok(Ok(()))
}

async fn root_of(agent: &Agent, path: Option<String>) -> Result<std::path::PathBuf, HopxError> {
    let root = files::resolve(path.as_deref().unwrap_or(WORKSPACE))?;
    if root == Path::new(WORKSPACE) {
        run::ensure_workspace(agent).await?;
    }
    Ok(root)
}

fn told(root: &Path, change: &Change) -> Value {
    let path = if change.name == "." { root.to_owned() } else { root.join(&change.name) };
    let event = match change.kind {
        EventKind::Create => "created",
        EventKind::Write | EventKind::Chmod => "modified",
        EventKind::Remove => "deleted",
        EventKind::Rename => "renamed",
    };
    json!({ "type": "change", "path": path.to_string_lossy(), "event": event, "timestamp": now() })
}

fn watch_error(error: &WatcherError, root: &Path) -> HopxError {
    use crate::filesystem::watch::WatchError;
    let code = match error {
        WatcherError::Watch(watch) => match watch.as_ref() {
            WatchError::NotFound { .. } => Code::FileNotFound,
            WatchError::NotDirectory { .. } | WatchError::NetworkMount { .. } => Code::InvalidPath,
            WatchError::TooManyWatches { .. } | WatchError::TooManyInstances | WatchError::Overflow | WatchError::Io { .. } => {
                Code::Internal
            }
        },
        WatcherError::Overflow | WatcherError::TooMany | WatcherError::Unknown { .. } | WatcherError::Lost(_) | WatcherError::Random(_) => {
            Code::Internal
        }
    };
    HopxError::new(code, crate::files::describe(error)).at(root.to_string_lossy())
}
