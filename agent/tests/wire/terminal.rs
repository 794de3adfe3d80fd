//! Processes on a PTY.

use serde_json::{Value, json};

use crate::http::Stream;
use crate::support::Agent;

fn start(agent: &Agent, script: &str) -> Stream {
    let process = json!({ "cmd": "/bin/bash", "args": ["--norc", "--noprofile", "-c", script] });
    agent.stream("process.Process/Start", &[], &[json!({ "process": process, "pty": { "size": { "cols": 90, "rows": 30 } } })])
}

/// Sends `line` and a newline.
fn send(agent: &Agent, pid: u64, line: &str) {
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits: String = format!("{line}\n")
        .as_bytes()
        .chunks(3)
        .flat_map(|chunk| {
            let bits = chunk.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
            (0..=chunk.len()).map(move |at| char::from(alphabet[(bits >> (18 - 6 * at) & 63) as usize]))
        })
        .collect();
    agent.ok("process.Process/SendInput", &json!({ "process": { "pid": pid }, "input": { "pty": digits } }));
}

#[test]
fn a_terminal_has_the_size_asked_for_and_can_be_resized() {
    let agent = Agent::start();
    let mut stream = start(&agent, "stty size; read -r line; stty size; test \"$line\" = go");
    let pid = stream.pid();
    stream.read_until("30 90\r\n");
    agent.ok("process.Process/Update", &json!({ "process": { "pid": pid }, "pty": { "size": { "cols": 100, "rows": 40 } } }));
    send(&agent, pid, "go");
    let (output, _, end) = stream.collect();
    assert!(output.contains("40 100\r\n"), "{output}");
    assert_eq!(end, json!({ "exited": true, "status": "exit status 0" }));
}

#[test]
fn a_terminal_is_the_users_own_and_controls_its_session() {
    let agent = Agent::start();
    let (output, _, end) = start(&agent, "tty; stat -c %U $(tty); echo hello > /dev/tty; ps -o pid=,sid=,tpgid= -p $$").collect();
    assert_eq!(end["status"], "exit status 0", "{output}");
    let lines: Vec<&str> = output.lines().collect();
    assert!(lines[0].starts_with("/dev/pts/") && lines[1] == "user" && lines[2] == "hello", "{output}");
    let ids: Vec<&str> = lines[3].split_whitespace().collect();
    assert_eq!(ids[0], ids[1], "it leads its session: {output}");
}

#[test]
fn an_interactive_shell_has_job_control_and_takes_interrupts() {
    let agent = Agent::start();
    let process = json!({ "cmd": "/bin/bash", "args": ["--norc", "-i"], "envs": { "PS1": "> " } });
    let mut stream = agent.stream("process.Process/Start", &[], &[json!({ "process": process, "pty": {} })]);
    let pid = stream.pid();
    let greeting = stream.read_until("> ");
    assert!(!greeting.contains("no job control"), "{greeting}");
    send(&agent, pid, "sh -c 'echo $((40 + 2)); exec sleep 100'");
    stream.read_until("42\r\n");
    send(&agent, pid, "\u{3}");
    stream.read_until("> ");
    send(&agent, pid, "exit 7");
    let (_, _, end) = stream.collect();
    assert_eq!(end["exitCode"], 7);
}

#[test]
fn stdin_and_terminal_are_not_confused() {
    let agent = Agent::start();
    let mut stream = start(&agent, "read -r line");
    let pid = stream.pid();
    let code = |method: &str, request: Value| agent.call(&format!("process.Process/{method}"), &request).code();
    assert_eq!(code("SendInput", json!({ "process": { "pid": pid }, "input": { "stdin": "eA==" } })), "internal");
    assert_eq!(code("CloseStdin", json!({ "process": { "pid": pid } })), "failed_precondition");
    assert_eq!(code("Update", json!({ "process": { "pid": pid }, "pty": { "size": { "cols": 70000, "rows": 1 } } })), "invalid_argument");
    let mut pipes = agent.sh("exec sleep 100");
    let pipes_pid = pipes.pid();
    assert_eq!(code("Update", json!({ "process": { "pid": pipes_pid }, "pty": { "size": { "cols": 1, "rows": 1 } } })), "internal");
}
