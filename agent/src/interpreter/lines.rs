//! A kernel that speaks lines: requests on its stdin, events on a FIFO, and what it prints on stdout and stderr as it is.
//!
//! ```text
//! to it    run <code>            set <name> <value>          unset <name>     reseed
//! from it  ready                 result <type> <form> …      display <type> <form> …
//!          out <text>  err <text>    error <name> <value> <traceback>    done
//! ```
//! Every word after the verb is base64, so that a kernel needs no JSON and no line is broken. A form whose type is not
//! text is JSON. The FIFO's path is the kernel's last argument.
//!
//! Bash gets no such requests but commands: it sources each cell from a file, in its own shell, and says done.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf as _, BytesMut};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Map, Value};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::time::timeout;

use super::kernel::{EnvChange, Event};
use super::languages::{Language, Wire};
use super::output::{Failure, Output, Printed, Role, Shown};
use super::process::{Folder, KernelProcess, Pipes, StartError};
use super::random_hex;
use crate::logs::rfc3339;
use crate::process::spawn::Stdin;
use crate::state::Agent;

const START_MAX: Duration = Duration::from_secs(60);
/// An event's line; an image comes in one.
const LINE_BYTES_MAX: usize = 128 << 20;
/// What is read of a pipe at once, and so the longest piece of text that one output holds.
const CHUNK_BYTES: usize = 64 << 10;
#[derive(Debug)]
pub(super) struct LinesKernel {
    wire: Wire,
    pub(super) process: KernelProcess,
    requests: pipe::Sender,
    events: pipe::Receiver,
    received: BytesMut,
    /// Bytes of `received` without a line's end in them.
    searched: usize,
    printed: [Pipe; 2],
    /// Cells begun, which is the number of the present one.
    count: u64,
    pending: VecDeque<Event>,
    folder: Folder,
}

/// Stdout or stderr of the kernel.
#[derive(Debug)]
struct Pipe {
    to: Printed,
    /// None once nobody can write to it any more.
    fd: Option<pipe::Receiver>,
    /// The first bytes of a character whose rest is still to come.
    cut: Vec<u8>,
}

impl LinesKernel {
    pub(super) async fn start(agent: &Agent, language: &Language, cwd: &str) -> Result<LinesKernel, StartError> {
        let folder = Folder::new()?;
        let fifo = folder.path().join("events");
        let events = open_fifo(&fifo).map_err(StartError::Connect)?;
        let (process, pipes) = KernelProcess::start(agent, &command(language, &fifo), cwd, Stdin::Open)?;
        let mut kernel = LinesKernel::over(language.wire, folder, process, events, pipes).map_err(StartError::Connect)?;
        let ready = async {
            if language.wire == Wire::Bash {
                kernel.requests.write_all(bash_setup(&fifo).as_bytes()).await.map_err(StartError::Connect)?;
            }
            kernel.until_ready().await
        };
        timeout(START_MAX, ready).await.map_err(|_| StartError::Slow(START_MAX))??;
        Ok(kernel)
    }

    fn over(wire: Wire, folder: Folder, process: KernelProcess, events: pipe::Receiver, pipes: Pipes) -> io::Result<LinesKernel> {
        let stdin = pipes.stdin.ok_or_else(|| io::Error::other("the kernel has no stdin"))?;
        let printed = [
            Pipe { to: Printed::Stdout, fd: Some(receiver(pipes.stdout)?), cut: Vec::new() },
            Pipe { to: Printed::Stderr, fd: Some(receiver(pipes.stderr)?), cut: Vec::new() },
        ];
        let requests = pipe::Sender::from_owned_fd(stdin)?;
        Ok(LinesKernel {
            wire,
            process,
            requests,
            events,
            received: BytesMut::new(),
            searched: 0,
            printed,
            count: 0,
            pending: VecDeque::new(),
            folder,
        })
    }

    async fn until_ready(&mut self) -> Result<(), StartError> {
        let mut said = String::new();
        loop {
            match self.next().await {
                Event::Done => return Ok(()),
                Event::Output(Output::Printed { text, .. }) if said.len() < CHUNK_BYTES => said.push_str(&text),
                Event::Output(_) => {}
                Event::Died(status) | Event::DiedBefore(status) => return Err(StartError::Ended { status, said }),
            }
        }
    }

    pub(super) async fn begin(&mut self, code: &str) -> io::Result<()> {
        self.pending.clear();
        self.count += 1;
        self.pending.push_back(Event::Output(Output::Count(self.count)));
        let request = match self.wire {
            Wire::Bash => {
                let cell = self.folder.path().join("cell");
                fs::write(&cell, code)?;
                format!("source '{}' </dev/null; printf 'exit {} %s\\n' \"$?\" >&9\n", cell.display(), self.count)
            }
            Wire::Lines | Wire::JupyterIpc | Wire::JupyterTcp => format!("run {}\n", STANDARD.encode(code)),
        };
        self.requests.write_all(request.as_bytes()).await
    }

    /// Cancel-safe.
    pub(super) async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.pending.pop_front() {
                return event;
            }
            let LinesKernel { events, received, printed: [stdout, stderr], process, .. } = self;
            received.reserve(CHUNK_BYTES);
            tokio::select! {
                biased;
                text = stdout.read() => self.pending.extend(text.map(Event::Output)),
                text = stderr.read() => self.pending.extend(text.map(Event::Output)),
                read = events.read_buf(received) => {
                    if let Err(error) = read {
                        return Event::Died(error.to_string());
                    }
                    self.take_lines();
                }
                exit = process.ended() => {
                    let status = exit.status();
                    self.drain();
                    self.pending.push_back(Event::Died(status));
                }
            }
        }
    }

    pub(super) async fn interrupt(&mut self) {
        self.process.interrupt();
        if self.wire == Wire::Bash {
            // An interrupted bash drops the line that it was at, and with it the word that the cell has ended.
            let line = format!("printf 'exit {} 130\\n' >&9\n", self.count);
            let _ = self.requests.write_all(line.as_bytes()).await;
        }
    }

    pub(super) async fn change_env(&mut self, change: &EnvChange) -> io::Result<()> {
        let is_bash = self.wire == Wire::Bash;
        let mut lines = String::new();
        for (name, value) in change.set.iter().filter(|(name, _)| !is_bash || is_bash_name(name)) {
            lines += &match is_bash {
                true => format!("export {name}='{}'\n", value.replace('\'', r"'\''")),
                false => format!("set {} {}\n", STANDARD.encode(name), STANDARD.encode(value)),
            };
        }
        for name in change.unset.iter().filter(|name| !is_bash || is_bash_name(name)) {
            lines += &match is_bash {
                true => format!("unset {name}\n"),
                false => format!("unset {}\n", STANDARD.encode(name)),
            };
        }
        self.requests.write_all(lines.as_bytes()).await
    }

    /// New randomness from the next cell on.
    pub(super) async fn reseed(&mut self) -> io::Result<()> {
        let line = match self.wire {
            // Its generator has 32 bits; SRANDOM asks the kernel.
            Wire::Bash => format!("RANDOM=$((16#{}))\n", random_hex(4)),
            Wire::Lines | Wire::JupyterIpc | Wire::JupyterTcp => "reseed\n".to_owned(),
        };
        self.requests.write_all(line.as_bytes()).await
    }

    fn take_lines(&mut self) {
        while let Some(end) = memchr::memchr(b'\n', &self.received[self.searched..]) {
            let line = self.received.split_to(self.searched + end);
            self.received.advance(1);
            self.searched = 0;
            match read_line(&line) {
                Some(LineEvent::Output(output)) => self.pending.push_back(Event::Output(output)),
                Some(LineEvent::Done) => self.end(None),
                // An interrupted cell may say twice that it has ended.
                Some(LineEvent::Exit { cell, code }) if cell == self.count => self.end(code),
                Some(LineEvent::Exit { .. }) | None => {}
            }
        }
        self.searched = self.received.len();
        if self.received.len() > LINE_BYTES_MAX {
            self.received.clear();
            self.searched = 0;
        }
    }

    /// What it printed before it said that the cell has ended is in the pipes.
    fn end(&mut self, failure: Option<Failure>) {
        self.drain();
        self.pending.extend(failure.map(|failure| Event::Output(Output::Failed(failure))));
        self.pending.push_back(Event::Done);
    }

    /// Takes what is in the pipes already.
    fn drain(&mut self) {
        for pipe in &mut self.printed {
            while let Some(output) = pipe.take_present() {
                self.pending.push_back(Event::Output(output));
            }
        }
    }
}

fn command(language: &Language, fifo: &Path) -> Vec<String> {
    let fifo = (language.wire != Wire::Bash).then(|| fifo.to_string_lossy().into_owned());
    language.command.iter().cloned().chain(fifo).collect()
}

/// For an interactive bash, since that alone gives up a whole cell on an interrupt. What it says before it is ready,
/// that it has no terminal, is nobody's business.
fn bash_setup(fifo: &Path) -> String {
    format!("exec 9>'{}'; unset HISTFILE; PS1= PS2=; set +o history; shopt -u checkwinsize; printf 'ready\\n' >&9\n", fifo.display())
}

fn receiver(fd: OwnedFd) -> io::Result<pipe::Receiver> {
    pipe::Receiver::from_owned_fd(fd)
}

/// Held open for writing too, so that it never is at its end.
fn open_fifo(path: &Path) -> io::Result<pipe::Receiver> {
    mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
    pipe::OpenOptions::new().read_write(true).open_receiver(path)
}

fn is_bash_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|first| first.is_ascii_alphabetic() || first == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

impl Pipe {
    /// Cancel-safe: nothing is read until there is something, and then it is returned.
    async fn read(&mut self) -> Option<Output> {
        let Some(fd) = &self.fd else { return std::future::pending().await };
        if fd.readable().await.is_err() {
            self.fd = None;
        }
        self.take_present()
    }

    fn take_present(&mut self) -> Option<Output> {
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            let read = match self.fd.as_ref()?.try_read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Ok(0) | Err(_) => {
                    self.fd = None;
                    return None;
                }
                Ok(read) => read,
            };
            self.cut.extend_from_slice(&buffer[..read]);
            let text = take_text(&mut self.cut);
            if !text.is_empty() {
                return Some(printed(self.to, text));
            }
        }
    }
}

/// All whole characters; the first bytes of one that is not whole yet stay.
fn take_text(bytes: &mut Vec<u8>) -> String {
    let whole = match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        // Bytes that are no UTF-8 at all become replacement characters.
        Ok(_) | Err(_) => bytes.len(),
    };
    let rest = bytes.split_off(whole);
    let text = String::from_utf8_lossy(bytes).into_owned();
    *bytes = rest;
    text
}

fn printed(to: Printed, text: String) -> Output {
    Output::Printed { to, text, at: rfc3339(SystemTime::now()) }
}

#[derive(Debug, PartialEq)]
enum LineEvent {
    Output(Output),
    /// The kernel is ready, or its cell has ended.
    Done,
    /// A bash's cell has ended.
    Exit {
        cell: u64,
        code: Option<Failure>,
    },
}

/// None for a line that is not of this wire: a program of the cell has written to the FIFO.
fn read_line(line: &[u8]) -> Option<LineEvent> {
    let line = std::str::from_utf8(line).ok()?;
    let mut words = line.split(' ');
    let verb = words.next()?;
    if verb == "exit" {
        let (cell, code) = (words.next()?.parse().ok()?, words.next()?);
        // E2B's bash names no error; the value is the exit code.
        return Some(LineEvent::Exit { cell, code: (code != "0").then(|| Failure::new("", code)) });
    }
    let decoded: Option<Vec<String>> = words.map(|word| String::from_utf8(STANDARD.decode(word).ok()?).ok()).collect();
    let decoded = decoded?;
    let output = match (verb, decoded.as_slice()) {
        ("ready" | "done", _) => return Some(LineEvent::Done),
        ("out", [text]) => printed(Printed::Stdout, text.clone()),
        ("err", [text]) => printed(Printed::Stderr, text.clone()),
        ("result", forms) => Output::Result(Shown { role: Role::Value, forms: forms_of(forms) }),
        ("display", forms) => Output::Result(Shown { role: Role::Display, forms: forms_of(forms) }),
        ("error", [name, value, traceback]) => {
            Output::Failed(Failure { name: name.clone(), value: value.clone(), traceback: vec![traceback.clone()] })
        }
        _ => return None,
    };
    Some(LineEvent::Output(output))
}

fn forms_of(words: &[String]) -> Map<String, Value> {
    let pairs = words.chunks_exact(2);
    pairs
        .map(|pair| {
            let is_json = pair[0].ends_with("json") || pair[0].starts_with("e2b/");
            let form = if is_json { serde_json::from_str(&pair[1]).unwrap_or_default() } else { Value::from(pair[1].clone()) };
            (pair[0].clone(), form)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(words: &[&str]) -> String {
        let encoded = words[1..].iter().map(|word| STANDARD.encode(word));
        [words[0].to_owned()].into_iter().chain(encoded).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn lines_become_outputs() {
        let read = |words: &[&str]| read_line(line(words).as_bytes());
        let Some(LineEvent::Output(Output::Result(shown))) = read(&["result", "text/plain", "'a b'", "application/json", "[1]"]) else {
            unreachable!("a result is an output")
        };
        assert_eq!((shown.role, shown.plain_text(), &shown.forms["application/json"]), (Role::Value, Some("a b"), &serde_json::json!([1])));
        let failure = Failure { name: "E".into(), value: "v".into(), traceback: vec!["E: v".into()] };
        assert_eq!(read(&["error", "E", "v", "E: v"]), Some(LineEvent::Output(Output::Failed(failure))));
        assert_eq!(read(&["done"]), Some(LineEvent::Done));
        assert_eq!(read(&["nonsense", "x"]), None);
        assert_eq!(read_line(b"out not-base64!"), None);
        assert_eq!(read_line(b"exit 7 0"), Some(LineEvent::Exit { cell: 7, code: None }));
        assert_eq!(read_line(b"exit 7 3"), Some(LineEvent::Exit { cell: 7, code: Some(Failure::new("", "3")) }));
    }

    #[test]
    fn a_character_is_not_cut_in_two() {
        let mut bytes = "aü".as_bytes()[..2].to_vec();
        assert_eq!((take_text(&mut bytes).as_str(), bytes.len()), ("a", 1));
        bytes.push("ü".as_bytes()[1]);
        assert_eq!((take_text(&mut bytes).as_str(), bytes.len()), ("ü", 0));
        bytes.extend_from_slice(b"\xff!");
        assert_eq!(take_text(&mut bytes), "\u{fffd}!");
    }

    #[test]
    fn bash_is_given_names_that_it_can_hold() {
        assert!(is_bash_name("_A1") && !is_bash_name("1A") && !is_bash_name("A-B") && !is_bash_name("") && !is_bash_name("A;B"));
    }
}
