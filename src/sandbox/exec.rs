//! Runs one program in a sandbox over envd's own wire (contract/e2b.md 3.3, 3.4) and follows what it prints.
//!
//! What answers may be hostile: events are bounded, and nothing in them is believed beyond what the caller asked for.
//! A caller that drops the future stops following; the program goes on.

use super::agent::{self, AgentError};
use crate::model::SandboxId;
use crate::runtime::Runtime;
use base64::Engine;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD as BASE64};
use bytes::{Buf, Bytes, BytesMut};
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

const START_PATH: &str = "/process.Process/Start";
/// Bytes of one event.
const EVENT_BYTES_MAX: usize = 128 * 1024;
/// Bytes of an error's text.
const TEXT_MAX: usize = 512;
/// Senders may leave the padding out.
const LENIENT: GeneralPurpose =
    GeneralPurpose::new(&base64::alphabet::STANDARD, GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent));

/// What to run: `/bin/bash -l -c script`, as envd's clients do.
#[derive(Debug, Clone, Copy)]
pub struct Command<'a> {
    /// Who runs it.
    pub user: &'a str,
    /// Where; empty means the user's home.
    pub cwd: &'a str,
    /// Variables beside those that every program in the sandbox has.
    pub env: &'a BTreeMap<String, String>,
    /// Bash's text.
    pub script: &'a str,
}

/// A piece of what it prints, cut anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Printed<'a> {
    /// To its standard output.
    Stdout(&'a [u8]),
    /// To its standard error.
    Stderr(&'a [u8]),
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Its exit code; 0 is success.
    pub code: i64,
    /// In the agent's words: `exit status 1`, `signal: killed`.
    pub status: String,
}

/// Why it did not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The agent refused: an unknown user, a missing folder.
    #[error("{code}: {message}")]
    Refused {
        /// Connect's code, such as `unauthenticated`.
        code: String,
        /// The agent's words.
        message: String,
    },
    /// The agent cannot be talked to.
    #[error("the agent did not run it")]
    Agent(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl From<AgentError> for ExecError {
    fn from(error: AgentError) -> Self {
        Self::Agent(Box::new(error))
    }
}

/// When to stop following it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    /// It was started.
    Started,
    /// It ended.
    Ended,
}

/// Whom to talk to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Agent<'a> {
    pub(super) runtime: &'a Arc<dyn Runtime>,
    pub(super) id: SandboxId,
    /// Its access token, if it wants one.
    pub(super) token: Option<&'a str>,
}

/// Starts it and follows it; `None` after `Started`.
pub(super) async fn run(
    agent: Agent<'_>,
    command: Command<'_>,
    until: Until,
    on_print: &mut (dyn FnMut(Printed<'_>) + Send),
) -> Result<Option<Ended>, ExecError> {
    let (mut sender, connection) = agent::connect::<http_body_util::Full<Bytes>>(agent.runtime, agent.id).await?;
    let request = request(agent.token, command)?;
    let told = async {
        let mut response = sender.send_request(request).await.map_err(|error| AgentError::Protocol(error.into()))?;
        if response.status() != StatusCode::OK {
            return Err(AgentError::Status { status: response.status(), path: START_PATH });
        }
        let mut buffer = BytesMut::new();
        while let Some(frame) = response.body_mut().frame().await {
            let Ok(data) = frame.map_err(|error| AgentError::Protocol(error.into()))?.into_data() else { continue };
            buffer.extend_from_slice(&data);
            while let Some(event) = next_event(&mut buffer)? {
                match read_event(&event, until, on_print) {
                    Told::More => {}
                    Told::Enough(answer) => return Ok(answer),
                }
            }
        }
        Err(AgentError::Protocol("the stream ended early".into()))
    };
    agent::drive(connection, told).await?
}

fn request(token: Option<&str>, command: Command<'_>) -> Result<Request<http_body_util::Full<Bytes>>, AgentError> {
    let mut process = json!({ "cmd": "/bin/bash", "args": ["-l", "-c", command.script], "envs": command.env });
    if !command.cwd.is_empty() {
        process["cwd"] = command.cwd.into();
    }
    let message = json!({ "process": process, "stdin": false }).to_string();
    let length = u32::try_from(message.len()).map_err(|error| AgentError::Protocol(error.into()))?;
    let envelope: Vec<u8> = [&[0], length.to_be_bytes().as_slice(), message.as_bytes()].concat();
    let mut request = Request::builder()
        .method(Method::POST)
        .uri(START_PATH)
        .header(http::header::HOST, "localhost")
        .header(http::header::CONTENT_TYPE, "application/connect+json")
        .header(http::header::AUTHORIZATION, format!("Basic {}", BASE64.encode(format!("{}:", command.user))))
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
    Enough(Result<Option<Ended>, ExecError>),
}

fn read_event((flag, message): &(u8, Value), until: Until, on_print: &mut (dyn FnMut(Printed<'_>) + Send)) -> Told {
    if flag & 2 != 0 {
        let word = |name: &str, absent: &str| message["error"][name].as_str().unwrap_or(absent).chars().take(TEXT_MAX).collect();
        return Told::Enough(Err(ExecError::Refused { code: word("code", "unknown"), message: word("message", "the stream ended early") }));
    }
    let event = &message["event"];
    if let Some(data) = event.get("data") {
        let piece = |name: &str| data[name].as_str().and_then(|text| LENIENT.decode(text).ok());
        if let Some(bytes) = piece("stdout") {
            on_print(Printed::Stdout(&bytes));
        }
        if let Some(bytes) = piece("stderr") {
            on_print(Printed::Stderr(&bytes));
        }
    }
    match until {
        Until::Started if event.get("start").is_some() => Told::Enough(Ok(None)),
        Until::Ended => event.get("end").map_or(Told::More, |end| Told::Enough(Ok(Some(ended(end))))),
        Until::Started => Told::More,
    }
}

/// Fields that are zero are left out.
fn ended(end: &Value) -> Ended {
    let code = end["exitCode"].as_i64().unwrap_or(0);
    let status = end["status"].as_str().map(|status| status.chars().take(TEXT_MAX).collect());
    Ended { code, status: status.unwrap_or_else(|| format!("exit status {code}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope(flag: u8, message: &str) -> Vec<u8> {
        [&[flag], u32::try_from(message.len()).unwrap().to_be_bytes().as_slice(), message.as_bytes()].concat()
    }

    fn told(event: &(u8, Value), until: Until) -> (Told, String) {
        let mut printed = String::new();
        let told = read_event(event, until, &mut |piece| {
            let (Printed::Stdout(bytes) | Printed::Stderr(bytes)) = piece;
            printed.push_str(&String::from_utf8_lossy(bytes));
        });
        (told, printed)
    }

    #[test]
    fn events_are_read_however_they_were_cut() {
        let bytes = [
            envelope(0, r#"{"event":{"start":{"pid":7}}}"#),
            envelope(0, r#"{"event":{"data":{"stdout":"aGk"}}}"#),
            envelope(0, r#"{"event":{"end":{"exitCode":3,"status":"exit status 3"}}}"#),
        ]
        .concat();
        for cut in 0..bytes.len() {
            let mut buffer = BytesMut::from(&bytes[..cut]);
            let mut events = Vec::new();
            for rest in [&[][..], &bytes[cut..]] {
                buffer.extend_from_slice(rest);
                while let Some(event) = next_event(&mut buffer).unwrap() {
                    events.push(event);
                }
            }
            assert_eq!(events.len(), 3);
            assert!(matches!(told(&events[0], Until::Started).0, Told::Enough(Ok(None))));
            assert!(matches!(told(&events[1], Until::Ended), (Told::More, printed) if printed == "hi"));
            let Told::Enough(Ok(Some(end))) = told(&events[2], Until::Ended).0 else { panic!("it ended") };
            assert_eq!((end.code, end.status.as_str()), (3, "exit status 3"));
        }
    }

    #[test]
    fn an_exit_code_of_zero_is_left_out_and_an_error_is_told() {
        let zero = (0, json!({ "event": { "end": { "exited": true } } }));
        assert!(matches!(told(&zero, Until::Ended).0, Told::Enough(Ok(Some(Ended { code: 0, .. })))));
        let error = (2, json!({ "error": { "code": "unauthenticated", "message": "invalid username: 'x'" } }));
        let Told::Enough(Err(error)) = told(&error, Until::Ended).0 else { panic!("it is an error") };
        assert_eq!(error.to_string(), "unauthenticated: invalid username: 'x'");
    }

    #[test]
    fn an_event_without_end_is_refused() {
        let mut buffer = BytesMut::from(&[0, 255, 255, 255, 255][..]);
        assert!(next_event(&mut buffer).is_err());
    }
}
