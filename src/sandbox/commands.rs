//! Start and ready commands of a build, run by its agent over envd's own wire (contract/e2b.md 3.3, 3.4, 5).

use super::agent::{self, AgentError};
use super::core::Core;
use crate::model::{BuildRecord, SandboxId};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::{Buf, Bytes, BytesMut};
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::Instant;

const START_PATH: &str = "/process.Process/Start";
/// How long a process may take to start.
const START_MAX: Duration = Duration::from_secs(10);
/// How long one run of the ready command may take.
const CHECK_MAX: Duration = Duration::from_secs(60);
/// Pause between two runs of the ready command.
const CHECK_EVERY: Duration = Duration::from_millis(500);
/// How long a start command may take until its ready command succeeds.
const READY_MAX: Duration = Duration::from_secs(600);
/// Bytes of one event, and of all that a ready command may print.
const EVENT_BYTES_MAX: usize = 64 * 1024;
const OUTPUT_BYTES_MAX: usize = 1024 * 1024;

/// Why a build's commands did not lead to its ready state.
#[derive(Debug, thiserror::Error)]
pub(super) enum CommandError {
    /// The agent did not run it.
    #[error("could not run '{command}'")]
    Run {
        /// The command.
        command: String,
        /// Why.
        #[source]
        source: AgentError,
    },
    /// The ready command went on failing.
    #[error("'{command}' did not succeed within {READY_MAX:?}")]
    NeverReady {
        /// The ready command.
        command: String,
    },
}

/// When to stop reading what a process tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Until {
    Started,
    Ended,
}

/// Whether the build has anything to run after its start.
pub(super) fn has_any(build: &BuildRecord) -> bool {
    wanted(build.start_command.as_deref()).is_some() || wanted(build.ready_command.as_deref()).is_some()
}

fn wanted(command: Option<&str>) -> Option<&str> {
    command.filter(|command| !command.trim().is_empty())
}

/// Starts the start command and waits until the ready command succeeds. The agent is initialised.
pub(super) async fn run(core: &Core, id: SandboxId, build: &BuildRecord, token: Option<&str>) -> Result<(), CommandError> {
    if let Some(command) = wanted(build.start_command.as_deref()) {
        one(core, id, build, token, command, Until::Started).await?;
    }
    let Some(command) = wanted(build.ready_command.as_deref()) else { return Ok(()) };
    let deadline = Instant::now() + READY_MAX;
    while one(core, id, build, token, command, Until::Ended).await? != Some(0) {
        if Instant::now() >= deadline {
            return Err(CommandError::NeverReady { command: command.to_owned() });
        }
        tokio::time::sleep(CHECK_EVERY).await;
    }
    Ok(())
}

async fn one(
    core: &Core,
    id: SandboxId,
    build: &BuildRecord,
    token: Option<&str>,
    command: &str,
    until: Until,
) -> Result<Option<i64>, CommandError> {
    let limit = match until {
        Until::Started => START_MAX,
        Until::Ended => CHECK_MAX,
    };
    let told = tokio::time::timeout(limit, exchange(core, id, build, token, command, until)).await;
    let result = told.unwrap_or(Err(AgentError::Slow(limit)));
    result.map_err(|source| CommandError::Run { command: command.to_owned(), source })
}

/// The exit code, once it ended.
async fn exchange(
    core: &Core,
    id: SandboxId,
    build: &BuildRecord,
    token: Option<&str>,
    command: &str,
    until: Until,
) -> Result<Option<i64>, AgentError> {
    let (mut sender, connection) = agent::connect::<http_body_util::Full<Bytes>>(&core.runtime, id).await?;
    let request = start_request(build, token, command)?;
    let told = async {
        let mut response = sender.send_request(request).await.map_err(|error| AgentError::Protocol(error.into()))?;
        if response.status() != StatusCode::OK {
            return Err(AgentError::Status { status: response.status(), path: START_PATH });
        }
        let (mut buffer, mut read) = (BytesMut::new(), 0);
        while let Some(frame) = response.body_mut().frame().await {
            let Ok(data) = frame.map_err(|error| AgentError::Protocol(error.into()))?.into_data() else { continue };
            read += data.len();
            if read > OUTPUT_BYTES_MAX {
                return Err(AgentError::Protocol(format!("more than {OUTPUT_BYTES_MAX} bytes of output").into()));
            }
            buffer.extend_from_slice(&data);
            while let Some(event) = next_event(&mut buffer)? {
                match read_event(&event, until)? {
                    Told::More => {}
                    Told::Enough(code) => return Ok(code),
                }
            }
        }
        Err(AgentError::Protocol("the stream ended early".into()))
    };
    agent::drive(connection, told).await
}

fn start_request(build: &BuildRecord, token: Option<&str>, command: &str) -> Result<Request<http_body_util::Full<Bytes>>, AgentError> {
    let mut process = json!({ "cmd": "/bin/bash", "args": ["-l", "-c", command] });
    if !build.workdir.is_empty() {
        process["cwd"] = build.workdir.as_str().into();
    }
    let message = json!({ "process": process, "stdin": false }).to_string();
    let length = u32::try_from(message.len()).map_err(|error| AgentError::Protocol(error.into()))?;
    let envelope: Vec<u8> = [&[0], length.to_be_bytes().as_slice(), message.as_bytes()].concat();
    let mut request = Request::builder()
        .method(Method::POST)
        .uri(START_PATH)
        .header(http::header::HOST, "localhost")
        .header(http::header::CONTENT_TYPE, "application/connect+json")
        .header(http::header::AUTHORIZATION, format!("Basic {}", BASE64.encode(format!("{}:", build.user))))
        .header("connect-protocol-version", "1");
    if let Some(token) = token {
        request = request.header("x-access-token", token);
    }
    request.body(http_body_util::Full::new(envelope.into())).map_err(|error| AgentError::Protocol(error.into()))
}

/// One message of the stream, with its flag, once all of it is there.
fn next_event(buffer: &mut BytesMut) -> Result<Option<(u8, Value)>, AgentError> {
    let Some((flag, length)) = buffer.first_chunk::<5>().map(|head| (head[0], u32::from_be_bytes([head[1], head[2], head[3], head[4]])))
    else {
        return Ok(None);
    };
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > EVENT_BYTES_MAX {
        return Err(AgentError::Protocol(format!("an event of {length} bytes").into()));
    }
    if buffer.len() < 5 + length {
        return Ok(None);
    }
    buffer.advance(5);
    let message = buffer.split_to(length);
    serde_json::from_slice(&message).map(|value| Some((flag, value))).map_err(|error| AgentError::Protocol(error.into()))
}

enum Told {
    More,
    Enough(Option<i64>),
}

fn read_event((flag, message): &(u8, Value), until: Until) -> Result<Told, AgentError> {
    if flag & 2 != 0 {
        let error = message["error"]["message"].as_str().unwrap_or("the stream ended early");
        return Err(AgentError::Protocol(error.chars().take(512).collect::<String>().into()));
    }
    let event = &message["event"];
    match until {
        Until::Started if event.get("start").is_some() => Ok(Told::Enough(None)),
        Until::Ended => match event.get("end") {
            // Fields that are zero are left out.
            Some(end) => Ok(Told::Enough(Some(end["exitCode"].as_i64().unwrap_or(0)))),
            None => Ok(Told::More),
        },
        Until::Started => Ok(Told::More),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope(flag: u8, message: &str) -> Vec<u8> {
        [&[flag], u32::try_from(message.len()).unwrap().to_be_bytes().as_slice(), message.as_bytes()].concat()
    }

    #[test]
    fn events_are_read_however_they_were_cut() {
        let bytes = [envelope(0, r#"{"event":{"start":{"pid":7}}}"#), envelope(0, r#"{"event":{"end":{"exitCode":3}}}"#)].concat();
        for cut in 0..bytes.len() {
            let mut buffer = BytesMut::from(&bytes[..cut]);
            let mut events = Vec::new();
            for rest in [&[][..], &bytes[cut..]] {
                buffer.extend_from_slice(rest);
                while let Some(event) = next_event(&mut buffer).unwrap() {
                    events.push(event);
                }
            }
            assert_eq!(events.len(), 2);
            assert!(matches!(read_event(&events[0], Until::Started).unwrap(), Told::Enough(None)));
            assert!(matches!(read_event(&events[1], Until::Ended).unwrap(), Told::Enough(Some(3))));
        }
    }

    #[test]
    fn an_exit_code_of_zero_is_left_out_and_an_error_is_told() {
        let zero = (0, json!({ "event": { "end": { "exited": true } } }));
        assert!(matches!(read_event(&zero, Until::Ended).unwrap(), Told::Enough(Some(0))));
        let error = (2, json!({ "error": { "code": "not_found", "message": "no such user" } }));
        assert!(super::super::error::chain(&read_event(&error, Until::Started).err().unwrap()).contains("no such user"));
    }

    #[test]
    fn an_event_without_end_is_refused() {
        let mut buffer = BytesMut::from(&[0, 255, 255, 255, 255][..]);
        assert!(next_event(&mut buffer).is_err());
    }
}
