//! `stillbox sandbox exec`: the agent's `process.Process/Start` over Connect's JSON framing (contract/e2b.md 3.3, 3.4).

use super::Outcome;
use super::client::{Client, ClientError, Target};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use serde_json::{Value, json};
use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::sync::Arc;

#[derive(Debug, Args)]
pub(super) struct ExecArguments {
    /// The sandbox
    pub(super) id: String,
    /// Run as this user inside
    #[arg(short, long)]
    pub(super) user: Option<String>,
    /// Working directory
    #[arg(short = 'w', long)]
    workdir: Option<String>,
    /// Environment, e.g. --env A=1
    #[arg(short, long = "env", value_name = "NAME=VALUE", value_parser = super::key_and_value)]
    env: Vec<(String, String)>,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// The largest message that is accepted from an agent; its output chunks are 32 KiB.
const MESSAGE_BYTES_MAX: usize = 4 << 20;

pub(super) fn run(client: &Client, target: &Target, arguments: &ExecArguments) -> Outcome {
    let environment: serde_json::Map<String, Value> =
        arguments.env.iter().map(|(name, value)| (name.clone(), Value::String(value.clone()))).collect();
    let mut process = json!({ "cmd": arguments.command[0], "args": arguments.command[1..], "envs": environment });
    if let Some(workdir) = &arguments.workdir {
        process["cwd"] = json!(workdir);
    }
    let request = json!({ "process": process, "stdin": arguments.interactive });
    let input = arguments.interactive.then(|| Arc::new(target.clone()));
    follow(client, target, &request, |event| {
        if let (Some(pid), Some(target)) = (event["start"]["pid"].as_u64(), &input) {
            forward_stdin(client, target, pid);
        }
        handle(event)
    })
}

/// Starts a process and hands its events over until one of them is the answer.
fn follow<T>(
    client: &Client,
    target: &Target,
    request: &Value,
    mut on_event: impl FnMut(&Value) -> io::Result<Option<T>>,
) -> Result<T, Box<dyn std::error::Error>> {
    let body = client.post_agent(target, "/process.Process/Start", "application/connect+json", &envelope(request))?;
    let mut messages = body.into_reader();
    while let Some((flags, message)) = next_message(&mut messages)? {
        if flags & END_OF_STREAM != 0 {
            return match message.get("error") {
                Some(error) => Err(refused(error).into()),
                None => Err("the sandbox closed the stream before the command ended".into()),
            };
        }
        if let Some(answer) = on_event(&message["event"])? {
            return Ok(answer);
        }
    }
    Err("the connection to the sandbox was cut; was it killed or paused?".into())
}

/// Runs a shell command to its end and answers its standard output; its standard error is in the error if it fails.
pub(super) fn capture(client: &Client, target: &Target, command: &str) -> Result<String, Box<dyn std::error::Error>> {
    let request = json!({ "process": { "cmd": "/bin/bash", "args": ["-l", "-c", command] }, "stdin": false });
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let code = follow(client, target, &request, |event| {
        for (name, bytes) in [("stdout", &mut out), ("stderr", &mut err)] {
            if let Some(text) = event["data"][name].as_str() {
                bytes.extend(STANDARD.decode(text).map_err(io::Error::other)?);
            }
        }
        Ok(event.get("end").map(|end| end["exitCode"].as_i64().unwrap_or(0)))
    })?;
    match code {
        0 => Ok(String::from_utf8_lossy(&out).into_owned()),
        _ => Err(format!("'{command}' ended with {code}: {}", super::output::harmless(&String::from_utf8_lossy(&err))).into()),
    }
}

const END_OF_STREAM: u8 = 2;

/// Flags byte, big-endian length, JSON.
fn envelope(message: &Value) -> Vec<u8> {
    let payload = message.to_string().into_bytes();
    let length = u32::try_from(payload.len()).expect("a command line is far below 4 GiB");
    [&[0u8][..], &length.to_be_bytes(), &payload].concat()
}

fn next_message(reader: &mut impl Read) -> Result<Option<(u8, Value)>, io::Error> {
    let mut head = [0u8; 5];
    match reader.read_exact(&mut head) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if length > MESSAGE_BYTES_MAX {
        return Err(io::Error::other(format!("the agent sent a message of {length} bytes, the limit is {MESSAGE_BYTES_MAX}")));
    }
    let mut payload = vec![0u8; length];
    reader.read_exact(&mut payload)?;
    Ok(Some((head[0], serde_json::from_slice(&payload)?)))
}

/// Prints output; the exit code when it was the end.
fn handle(event: &Value) -> io::Result<Option<ExitCode>> {
    if let Some(data) = event.get("data") {
        for (name, is_error) in [("stdout", false), ("pty", false), ("stderr", true)] {
            if let Some(text) = data[name].as_str() {
                let bytes = STANDARD.decode(text).map_err(io::Error::other)?;
                if is_error {
                    io::stderr().write_all(&bytes)?;
                } else {
                    let mut stdout = io::stdout().lock();
                    stdout.write_all(&bytes)?;
                    stdout.flush()?;
                }
            }
        }
    }
    let Some(end) = event.get("end") else { return Ok(None) };
    let code = end["exitCode"].as_i64().unwrap_or(0);
    if let (true, Some(status)) = (code != 0, end["error"].as_str().filter(|_| end["exited"] != json!(true))) {
        eprintln!("stillbox: {}", super::output::harmless(status));
    }
    Ok(Some(ExitCode::from(u8::try_from(code).unwrap_or(128))))
}

fn refused(error: &Value) -> ClientError {
    ClientError::Refused {
        status: 200,
        message: format!(
            "{}: {}",
            error["code"].as_str().unwrap_or("unknown"),
            super::output::harmless(error["message"].as_str().unwrap_or(""))
        ),
    }
}

/// Copies our standard input into the process until it ends, on a thread that ends with the program.
fn forward_stdin(client: &Client, target: &Arc<Target>, pid: u64) {
    let (client, target) = (client.another(), Arc::clone(target));
    std::thread::spawn(move || {
        let mut chunk = vec![0u8; 32 << 10];
        let select = json!({ "pid": pid });
        while let Ok(count) = io::stdin().read(&mut chunk) {
            let (path, body) = match count {
                0 => ("/process.Process/CloseStdin", json!({ "process": select })),
                _ => ("/process.Process/SendInput", json!({ "process": select, "input": { "stdin": STANDARD.encode(&chunk[..count]) } })),
            };
            let sent = client.post_agent(&target, path, "application/json", body.to_string().as_bytes());
            if sent.is_err() || count == 0 {
                // The process has ended, or has its end of file: nothing more to send.
                return;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_read_back_as_framed() {
        let message = json!({ "event": { "start": { "pid": 7 } } });
        let bytes = [envelope(&message), envelope(&json!({}))].concat();
        let mut reader = bytes.as_slice();
        assert_eq!(next_message(&mut reader).unwrap(), Some((0, message)));
        assert_eq!(next_message(&mut reader).unwrap(), Some((0, json!({}))));
        assert_eq!(next_message(&mut reader).unwrap(), None);
    }

    #[test]
    fn an_absurd_length_is_refused_before_it_is_allocated() {
        let error = next_message(&mut [0u8, 255, 255, 255, 255].as_slice()).unwrap_err();
        assert!(error.to_string().contains("4294967295 bytes"), "{error}");
    }
}
