//! A kernel that speaks Jupyter's wire: shell for requests and replies, iopub for what cells put out.
//!
//! A cell has ended when its reply has come **and** iopub has said idle for it: either may be first.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::time::{Instant, sleep, timeout};

use super::kernel::{EnvChange, Event, Randomness, Visibility};
use super::languages::{Language, Wire};
use super::message::{Incoming, Session};
use super::output::{Failure, Output, Printed, Role, Shown};
use super::process::{Folder, KernelProcess, Pipes, StartError};
use super::zmtp::{Endpoint, Socket, SocketType};
use crate::process::spawn::Stdin;
use crate::state::Agent;

/// From fork to the first answer; the heavy package sets on a loaded machine included.
const START_MAX: Duration = Duration::from_secs(60);
const RETRY_EVERY: Duration = Duration::from_millis(5);
/// How long one question for signs of life waits before the next.
const PROBE_MAX: Duration = Duration::from_millis(100);
/// What is kept of what the process itself prints, for the error when it dies.
const TAIL_BYTES: usize = 2 << 10;
const CHANNELS: [&str; 5] = ["shell", "iopub", "stdin", "control", "hb"];

#[derive(Debug)]
pub(super) struct JupyterKernel {
    shell: Socket,
    iopub: Socket,
    session: Session,
    pub(super) process: KernelProcess,
    tail: Tail,
    cell: Option<Cell>,
    /// What has come of the cell and was not asked for yet.
    pending: VecDeque<Event>,
    /// All that it was told since its start: what it has not read yet must not be overwritten.
    told: EnvChange,
    reseeds: u64,
    folder: Folder,
}

/// The request under way.
#[derive(Debug)]
struct Cell {
    id: String,
    visibility: Visibility,
    has_reply: bool,
    is_idle: bool,
    has_failed: bool,
}

/// Where something came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Channel {
    Iopub,
    Shell,
}

type Tail = Arc<Mutex<Vec<u8>>>;

impl JupyterKernel {
    pub(super) async fn start(agent: &Agent, language: &Language, cwd: &str) -> Result<JupyterKernel, StartError> {
        let folder = Folder::new()?;
        let session = Session::new();
        let endpoints = Endpoints::choose(language.wire, folder.path()).map_err(StartError::Connect)?;
        let file = folder.path().join("connection.json");
        std::fs::write(&file, endpoints.connection_file(&session.key).to_string()).map_err(StartError::Connect)?;
        let command: Vec<String> = language.command.iter().map(|word| word.replace("{connection_file}", &file.to_string_lossy())).collect();
        let (mut process, pipes) = KernelProcess::start(agent, &command, cwd, Stdin::Null)?;
        let tail = follow(pipes).map_err(StartError::Connect)?;
        let connected = timeout(START_MAX, connect(&endpoints, &session));
        // Both arms are cancel-safe enough: what has been begun ends with the kernel.
        let sockets = tokio::select! {
            connected = connected => connected.map_err(|_| StartError::Slow(START_MAX))?.map_err(StartError::Connect)?,
            exit = process.ended() => return Err(StartError::Ended { status: exit.status(), said: said(&tail) }),
        };
        let (shell, iopub) = sockets;
        // How to connect to it by hand, which it tells everybody.
        tail.lock().unwrap_or_else(PoisonError::into_inner).clear();
        Ok(JupyterKernel {
            shell,
            iopub,
            session,
            process,
            tail,
            cell: None,
            pending: VecDeque::new(),
            told: EnvChange::default(),
            reseeds: 0,
            folder,
        })
    }

    /// Returns at once. The kernel reads the file when the signal comes, between two instructions of whatever it runs; a
    /// request would wait for the end of the cell, and two forks would go on with the same random numbers.
    pub(super) fn introduce(&mut self, change: &EnvChange, randomness: Randomness) -> io::Result<()> {
        self.told.extend(change);
        self.reseeds += u64::from(randomness == Randomness::New);
        let identity = json!({ "set": self.told.set, "unset": self.told.unset, "reseeds": self.reseeds });
        let (aside, file) = (self.folder.path().join("identity.new"), self.folder.path().join("identity.json"));
        std::fs::write(&aside, identity.to_string())?;
        std::fs::rename(&aside, &file)?;
        self.process.poke();
        Ok(())
    }

    /// Sends code; [`next`](Self::next) tells what comes of it.
    pub(super) async fn begin(&mut self, code: &str, visibility: Visibility) -> io::Result<()> {
        let is_silent = visibility == Visibility::Silent;
        let content = json!({
            "code": code, "silent": is_silent, "store_history": !is_silent, "user_expressions": {}, "allow_stdin": false, "stop_on_error": true,
        });
        let (id, parts) = self.session.request("execute_request", &content);
        self.cell = Some(Cell { id, visibility, has_reply: false, is_idle: false, has_failed: false });
        self.shell.send(&parts).await
    }

    /// Cancel-safe. After the end of a cell it waits for stray messages and the kernel's death.
    pub(super) async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.pending.pop_front() {
                return event;
            }
            let message = tokio::select! {
                biased;
                message = self.iopub.receive() => message.map_err(|error| (error, Channel::Iopub)),
                message = self.shell.receive() => message.map_err(|error| (error, Channel::Shell)),
                exit = self.process.ended() => {
                    let status = exit.status();
                    return self.died(status, None).await;
                }
            };
            match message {
                Ok(message) => {
                    if let Some(message) = self.session.read(&message) {
                        self.take(&message);
                    }
                }
                // The sockets end with the process, a moment before it is reaped.
                Err((error, channel)) => {
                    let status = match timeout(PROBE_MAX, self.process.ended()).await {
                        Ok(exit) => exit.status(),
                        Err(_) => error.to_string(),
                    };
                    return self.died(status, (channel == Channel::Shell).then_some(error)).await;
                }
            }
        }
    }

    /// A socket whose reader ends with something unread in it is reset, and not just closed: the last thing in there is
    /// the latest request. What has come from the kernel on this socket was taken, so that this is told next.
    async fn died(&mut self, status: String, shell_error: Option<io::Error>) -> Event {
        let ending = match shell_error {
            Some(error) => Some(error),
            None => timeout(PROBE_MAX, self.shell.receive()).await.ok().and_then(Result::err),
        };
        let reason = format!("{status}{}", said(&self.tail));
        match ending.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionReset) {
            true => Event::DiedBefore(reason),
            false => Event::Died(reason),
        }
    }

    fn take(&mut self, message: &Incoming) {
        let Some(cell) = self.cell.as_mut().filter(|cell| cell.id == message.parent) else { return };
        match message.kind.as_str() {
            "execute_reply" => cell.has_reply = true,
            "status" if message.content["execution_state"] == "idle" => cell.is_idle = true,
            _ => {}
        }
        if cell.visibility == Visibility::Shown {
            self.pending.extend(output_of(message, cell).map(Event::Output));
        }
        if cell.has_reply && cell.is_idle {
            self.cell = None;
            self.pending.push_back(Event::Done);
        }
    }
}

fn output_of(message: &Incoming, cell: &mut Cell) -> Option<Output> {
    if message.left_out > 0 {
        let text = format!("[an output of {} bytes was left out: it is too large]\n", message.left_out);
        return Some(Output::Printed { to: Printed::Stderr, text, at: message.date.clone() });
    }
    let content = &message.content;
    let text = |key: &str| content[key].as_str().unwrap_or_default().to_owned();
    match message.kind.as_str() {
        "execute_input" => Some(Output::Count(content["execution_count"].as_u64().unwrap_or_default())),
        "stream" => {
            let to = if content["name"] == "stderr" { Printed::Stderr } else { Printed::Stdout };
            Some(Output::Printed { to, text: text("text"), at: message.date.clone() })
        }
        "execute_result" => Some(shown(Role::Value, content)),
        "display_data" => Some(shown(Role::Display, content)),
        "error" => failure(cell, content),
        "execute_reply" if content["status"] == "error" => failure(cell, content),
        "execute_reply" if content["status"] == "abort" || content["status"] == "aborted" => {
            cell.has_failed = true;
            Some(Output::Failed(Failure::new("ExecutionAborted", "Execution was aborted")))
        }
        _ => None,
    }
}

fn shown(role: Role, content: &Value) -> Output {
    let forms = content["data"].as_object().cloned().unwrap_or_default();
    Output::Result(Shown { role, forms })
}

/// Told twice by the kernel, on iopub and in the reply.
fn failure(cell: &mut Cell, content: &Value) -> Option<Output> {
    if std::mem::replace(&mut cell.has_failed, true) {
        return None;
    }
    let text = |key: &str| content[key].as_str().unwrap_or_default().to_owned();
    let lines = content["traceback"].as_array().map(Vec::as_slice).unwrap_or_default();
    let traceback = lines.iter().filter_map(|line| line.as_str().map(str::to_owned)).collect();
    Some(Output::Failed(Failure { name: text("ename"), value: text("evalue"), traceback }))
}

/// Where the kernel is to listen.
#[derive(Debug)]
enum Endpoints {
    /// The path that sockets' names begin with.
    Ipc(String),
    Loopback([u16; CHANNELS.len()]),
}

impl Endpoints {
    fn choose(wire: Wire, folder: &Path) -> io::Result<Endpoints> {
        match wire {
            Wire::JupyterTcp => Ok(Endpoints::Loopback(free_ports()?)),
            Wire::JupyterIpc | Wire::Lines | Wire::Bash => Ok(Endpoints::Ipc(folder.join("k").to_string_lossy().into_owned())),
        }
    }

    fn of(&self, channel: usize) -> Endpoint {
        match self {
            Endpoints::Ipc(prefix) => Endpoint::Ipc(format!("{prefix}-{}", channel + 1).into()),
            Endpoints::Loopback(ports) => Endpoint::Loopback(ports[channel]),
        }
    }

    fn connection_file(&self, key: &str) -> Value {
        let (transport, ip) = match self {
            Endpoints::Ipc(prefix) => ("ipc", prefix.as_str()),
            Endpoints::Loopback(_) => ("tcp", "127.0.0.1"),
        };
        let mut file = json!({ "transport": transport, "ip": ip, "key": key, "signature_scheme": "hmac-sha256", "kernel_name": "" });
        for (channel, name) in CHANNELS.iter().enumerate() {
            let port = match self {
                Endpoints::Ipc(_) => channel + 1,
                Endpoints::Loopback(ports) => usize::from(ports[channel]),
            };
            file[format!("{name}_port")] = port.into();
        }
        file
    }
}

/// Ports that are free now; all are held until the last is chosen.
fn free_ports() -> io::Result<[u16; CHANNELS.len()]> {
    let listeners: Vec<TcpListener> = CHANNELS.iter().map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<io::Result<_>>()?;
    let mut ports = [0; CHANNELS.len()];
    for (port, listener) in ports.iter_mut().zip(&listeners) {
        *port = listener.local_addr()?.port();
    }
    Ok(ports)
}

/// Connects as soon as the kernel listens, and waits until it answers and its outputs arrive: a subscription that is
/// not in place yet loses what is published.
async fn connect(endpoints: &Endpoints, session: &Session) -> io::Result<(Socket, Socket)> {
    let mut shell = connect_when_there(&endpoints.of(0), SocketType::Dealer).await?;
    let mut iopub = connect_when_there(&endpoints.of(1), SocketType::Subscriber).await?;
    let (mut answers, mut is_heard) = (false, false);
    while !(answers && is_heard) {
        let (_, parts) = session.request("kernel_info_request", &json!({}));
        shell.send(&parts).await?;
        let until = Instant::now() + PROBE_MAX;
        while !(answers && is_heard) && Instant::now() < until {
            tokio::select! {
                message = shell.receive() => answers |= session.read(&message?).is_some(),
                message = iopub.receive() => is_heard |= session.read(&message?).is_some(),
                () = tokio::time::sleep_until(until) => {}
            }
        }
    }
    Ok((shell, iopub))
}

async fn connect_when_there(endpoint: &Endpoint, kind: SocketType) -> io::Result<Socket> {
    loop {
        match Socket::connect(endpoint, kind).await {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => sleep(RETRY_EVERY).await,
            outcome => return outcome,
        }
    }
}

/// Reads what the process itself prints, so that its pipes never fill, and keeps the end of it.
fn follow(pipes: Pipes) -> io::Result<Tail> {
    let tail = Tail::default();
    for fd in [pipes.stdout, pipes.stderr] {
        let mut pipe = pipe::Receiver::from_owned_fd(fd)?;
        let tail = Arc::clone(&tail);
        tokio::spawn(async move {
            let mut buffer = vec![0; TAIL_BYTES];
            while let Ok(read @ 1..) = pipe.read(&mut buffer).await {
                let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
                tail.extend_from_slice(&buffer[..read]);
                let surplus = tail.len().saturating_sub(TAIL_BYTES);
                tail.drain(..surplus);
            }
        });
    }
    Ok(tail)
}

fn said(tail: &Tail) -> String {
    let tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
    let text = String::from_utf8_lossy(&tail);
    let text = text.trim();
    if text.is_empty() { String::new() } else { format!("; it said: {text}") }
}
