//! process.Process, as Connect clients see it.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Agent, shell, wait_for};

fn error_of(agent: &Agent, headers: &[(&str, &str)], start: Value) -> Value {
    agent.stream("process.Process/Start", headers, &[start]).next().expect_err("an error and no start event")["error"].take()
}

fn is_alive(agent: &Agent, pid: u64) -> bool {
    agent.root_output(&format!("kill -0 {pid} 2>/dev/null && echo yes || echo no")) == "yes\n"
}

fn pid(pid: u64) -> Value {
    json!({ "process": { "pid": pid } })
}

#[test]
fn a_command_runs_as_the_default_user_in_the_workdir() {
    let agent = Agent::start();
    let (stdout, stderr, _) = agent.sh("id -u; id -g; id -G; pwd; umask; ulimit -c >/dev/null; cat /proc/self/oom_score_adj").collect();
    assert_eq!((stdout.as_str(), stderr.as_str()), ("1000\n1000\n1000 2000\n/home/user\n0022\n100\n", ""));
    assert_eq!(agent.root_output("id -u; id -G; echo ~; pwd"), "0\n0\n/root\n/home/user\n");
}

#[test]
fn variables_come_from_user_template_sandbox_and_request_in_rising_order() {
    let agent = Agent::start();
    let envs = json!({ "MORE": "request", "E2B_SANDBOX_ID": "forged", "PATH": "/usr/bin:/bin" });
    let start = json!({ "process": { "cmd": "env", "envs": envs } });
    let (stdout, ..) = agent.stream("process.Process/Start", &[], &[start]).collect();
    let mut lines: Vec<&str> = stdout.lines().collect();
    lines.sort_unstable();
    let expected = [
        "E2B_SANDBOX=true",
        "E2B_SANDBOX_ID=itest",
        "E2B_TEMPLATE_ID=base",
        "HOME=/home/user",
        "LOGNAME=user",
        "MORE=request",
        "PATH=/usr/bin:/bin",
        "USER=user",
        "WHERE=template",
        "WHO=sandbox",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn events_are_written_as_envd_writes_them() {
    let agent = Agent::start();
    let mut stream = agent.sh("echo out; exit 0");
    let start = stream.next().unwrap();
    assert_eq!(start, json!({ "event": { "start": { "pid": start["event"]["start"]["pid"].as_u64().unwrap() } } }));
    assert_eq!(stream.next().unwrap(), json!({ "event": { "data": { "stdout": "b3V0Cg==" } } }));
    assert_eq!(stream.next().unwrap(), json!({ "event": { "end": { "exited": true, "status": "exit status 0" } } }));
    assert_eq!(stream.next().unwrap_err(), json!({}));

    let (_, stderr, end) = agent.sh("echo err >&2; exit 3").collect();
    assert_eq!(stderr, "err\n");
    assert_eq!(end, json!({ "exitCode": 3, "exited": true, "status": "exit status 3", "error": "exit status 3" }));

    let (.., end) = agent.sh("kill -SEGV $$").collect();
    assert_eq!((&end["exitCode"], &end["exited"]), (&json!(-1), &Value::Null));
    assert!(end["status"].as_str().unwrap().starts_with("signal: segmentation fault"), "{end}");
}

#[test]
fn what_cannot_start_is_an_error_that_names_it() {
    let agent = Agent::start();
    let with = |cmd: &str, cwd: &str| json!({ "process": { "cmd": cmd, "cwd": cwd } });
    for (start, message) in [
        (with("true", "/nope"), "cwd '/nope' does not exist"),
        (with("true", "nope"), "cwd '/home/user/nope' does not exist"),
        (with("true", "/etc/passwd"), "cwd '/etc/passwd' is not a directory"),
        (with("no-such-program", ""), "exec: \"no-such-program\": executable file not found in $PATH"),
        (with("/no/such", ""), "fork/exec /no/such: No such file or directory (os error 2)"),
        (with("/etc/passwd", ""), "fork/exec /etc/passwd: Permission denied (os error 13)"),
        (with("", ""), "command is empty"),
        (json!({}), "command is empty"),
    ] {
        assert_eq!(error_of(&agent, &[], start), json!({ "code": "invalid_argument", "message": message }));
    }
    // `ghost:`, with an nsswitch.conf that would send a static program to its death.
    let error = error_of(&agent, &[("Authorization", "Basic Z2hvc3Q6")], with("true", ""));
    assert_eq!(error, json!({ "code": "unauthenticated", "message": "invalid username: 'ghost'" }));
    assert_eq!(agent.ok("process.Process/List", &json!({})), json!({}), "nothing was started");
}

#[test]
fn input_reaches_stdin_until_it_is_closed() {
    let agent = Agent::start();
    let mut stream = agent.stream("process.Process/Start", &[], &[json!({ "process": { "cmd": "cat" } })]);
    let selector = pid(stream.pid());
    let input = |text: &str| json!({ "process": selector["process"], "input": { "stdin": text } });
    // `one `, `two `, with and without padding; an empty input changes nothing.
    for text in ["b25lIA==", "", "dHdvIA"] {
        agent.ok("process.Process/SendInput", &input(text));
    }
    let start = json!({ "start": selector });
    let data = json!({ "data": { "input": { "stdin": "dGhyZWU=" } } });
    let answer = agent.stream("process.Process/StreamInput", &[], &[start, json!({ "keepalive": {} }), data]).next().unwrap();
    assert_eq!(answer, json!({}));
    agent.ok("process.Process/CloseStdin", &selector);
    let (stdout, _, end) = stream.collect();
    assert_eq!((stdout.as_str(), &end["status"]), ("one two three", &json!("exit status 0")));
    assert_eq!(agent.call("process.Process/SendInput", &input("eA==")).status, 404, "it has ended");
}

#[test]
fn without_stdin_a_process_reads_an_end_and_input_is_refused() {
    let agent = Agent::start();
    let mut stream = agent.sh("cat; echo read; exec sleep 100");
    let pid = stream.pid();
    stream.read_until("read");
    agent.ok("process.Process/CloseStdin", &json!({ "process": { "pid": pid } }));
    let refused = agent.call("process.Process/SendInput", &json!({ "process": { "pid": pid }, "input": { "stdin": "eA==" } }));
    assert_eq!((refused.status, refused.json()["code"].as_str()), (500, Some("internal")));
    let terminal = agent.call("process.Process/SendInput", &json!({ "process": { "pid": pid }, "input": { "pty": "eA==" } }));
    assert_eq!((terminal.status, terminal.json()["code"].as_str()), (500, Some("internal")));
}

#[test]
fn a_process_is_killed_at_its_deadline_though_its_client_is_gone() {
    let agent = Agent::start();
    let begun = Instant::now();
    let mut stream = agent.stream("process.Process/Start", &[("Connect-Timeout-Ms", "400")], &[shell("exec sleep 100")]);
    let watched = stream.pid();
    let error = stream.next().unwrap_err()["error"].take();
    assert_eq!(error["code"], "deadline_exceeded");
    assert!((400..3000).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
    let mut stream = agent.stream("process.Process/Start", &[("Connect-Timeout-Ms", "400")], &[shell("exec sleep 100")]);
    let left = stream.pid();
    drop(stream);
    for pid in [watched, left] {
        wait_for("the process to be killed", || !is_alive(&agent, pid));
    }
}

#[test]
fn a_process_outlives_its_client_and_output_that_nobody_saw_is_kept() {
    let agent = Agent::start();
    let mut stream =
        agent.sh("echo seen; while [ ! -e go ]; do sleep 0.02; done; echo unseen; while [ ! -e stop ]; do sleep 0.02; done; echo last");
    let selector = pid(stream.pid());
    stream.read_until("seen\n");
    drop(stream);
    agent.root_output("sleep 0.1; touch /home/user/go; sleep 0.2");
    let mut stream = agent.stream("process.Process/Connect", &[], std::slice::from_ref(&selector));
    assert_eq!(stream.pid(), selector["process"]["pid"]);
    assert_eq!(stream.read_until("\n"), "unseen\n", "and what was seen does not come again");
    let second = agent.stream("process.Process/Connect", &[], std::slice::from_ref(&selector));
    agent.root_output("touch /home/user/stop");
    for client in [stream, second] {
        let (stdout, _, end) = client.collect();
        assert_eq!((stdout.as_str(), &end["status"]), ("last\n", &json!("exit status 0")));
    }
    let (stdout, _, end) = agent.stream("process.Process/Connect", &[], std::slice::from_ref(&selector)).collect();
    assert_eq!((stdout.as_str(), &end["status"]), ("", &json!("exit status 0")), "its end is kept for late joiners");
    assert_eq!(agent.ok("process.Process/List", &json!({})), json!({}), "but it does not run any more");
}

#[test]
fn a_process_that_nobody_watches_is_not_blocked_by_its_own_output() {
    let agent = Agent::start();
    let mut stream = agent.sh("sleep 0.1; head -c 3000000 /dev/zero; echo tail; touch done; exec sleep 100");
    let selector = pid(stream.pid());
    drop(stream);
    wait_for("the output to be drained", || agent.root_output("ls /home/user") == "done\n");
    let kept = agent.stream("process.Process/Connect", &[], &[selector]).read_until("tail\n");
    assert!((60_000..=65_536).contains(&kept.len()), "{}", kept.len());
}

#[test]
fn a_slow_client_slows_the_process_and_loses_nothing() {
    let agent = Agent::start();
    let stream = agent.sh("head -c 20000000 /dev/zero | tr '\\0' x");
    std::thread::sleep(Duration::from_millis(300));
    let (stdout, _, end) = stream.collect();
    assert_eq!((stdout.len(), &end["status"]), (20_000_000, &json!("exit status 0")));
}

#[test]
fn a_signal_hits_one_process_and_its_end_waits_for_nobody() {
    let agent = Agent::start();
    let mut stream = agent.sh("sleep 100 & echo $!; wait");
    let parent = stream.pid();
    let child: u64 = stream.read_until("\n").trim().parse().unwrap();
    let begun = Instant::now();
    agent.ok("process.Process/SendSignal", &json!({ "process": { "pid": parent }, "signal": "SIGNAL_SIGKILL" }));
    let (.., end) = stream.collect();
    assert_eq!(end, json!({ "exitCode": -1, "status": "signal: killed", "error": "signal: killed" }));
    assert!(begun.elapsed() < Duration::from_secs(2), "the grandchild holds the pipes, {:?}", begun.elapsed());
    assert!(is_alive(&agent, child) && !is_alive(&agent, parent));
    let gone = agent.call("process.Process/SendSignal", &json!({ "process": { "pid": parent }, "signal": 15 }));
    let message = format!("process with pid {parent} not found");
    assert_eq!((gone.status, gone.json()), (404, json!({ "code": "not_found", "message": message })));

    let mut stream = agent.sh("trap 'echo asked; exit 4' TERM; echo ready; while :; do sleep 0.02; done");
    let asked = stream.pid();
    stream.read_until("ready\n");
    agent.ok("process.Process/SendSignal", &json!({ "process": { "pid": asked }, "signal": "SIGNAL_SIGTERM" }));
    let (stdout, _, end) = stream.collect();
    assert_eq!((stdout.as_str(), &end["status"]), ("asked\n", &json!("exit status 4")));
}

#[test]
fn an_end_without_a_signal_waits_for_the_last_output() {
    let agent = Agent::start();
    let (stdout, _, end) = agent.sh("(sleep 0.3; echo late) & echo early; exit 5").collect();
    assert_eq!((stdout.as_str(), &end["status"]), ("early\nlate\n", &json!("exit status 5")));
}

#[test]
fn silence_is_filled_with_keepalives() {
    let agent = Agent::start();
    let begun = Instant::now();
    let mut stream = agent.stream("process.Process/Start", &[("Keepalive-Ping-Interval", "1")], &[shell("exec sleep 100")]);
    stream.pid();
    assert_eq!(stream.next().unwrap(), json!({ "event": { "keepalive": {} } }));
    assert!(begun.elapsed() >= Duration::from_millis(950));
    assert_eq!(stream.event(), json!({ "keepalive": {} }));
}

#[test]
fn running_processes_are_listed_as_they_were_asked_for() {
    let agent = Agent::start();
    let config = json!({ "cmd": "sleep", "args": ["100"], "envs": { "A": "1" }, "cwd": "/tmp" });
    // In snake_case, and with a field of a newer client.
    let start = json!({ "process": config, "tag": "mine", "newer_field": { "x": 1 } });
    let pid = agent.stream("process.Process/Start", &[], &[start]).pid();
    assert_eq!(agent.ok("process.Process/List", &json!({})), json!({ "processes": [{ "config": config, "pid": pid, "tag": "mine" }] }));
    agent.ok("process.Process/SendSignal", &json!({ "process": { "tag": "mine" }, "signal": "SIGNAL_SIGKILL" }));
    wait_for("the list to be empty", || agent.ok("process.Process/List", &json!({})) == json!({}));
    let gone = agent.call("process.Process/SendSignal", &json!({ "process": { "tag": "other" }, "signal": "SIGNAL_SIGKILL" }));
    assert_eq!(gone.json(), json!({ "code": "not_found", "message": "process with tag other not found" }));
}

#[test]
fn malformed_calls_have_connects_codes() {
    let agent = Agent::start();
    for (method, message, status, code) in [
        ("SendSignal", json!({ "process": { "pid": 1 } }), 404, "not_found"),
        ("SendInput", json!({}), 400, "invalid_argument"),
        ("SendInput", json!({ "process": { "pid": "seven" } }), 400, "invalid_argument"),
        ("NoSuchMethod", json!({}), 404, "unimplemented"),
    ] {
        let answer = agent.call(&format!("process.Process/{method}"), &message);
        assert_eq!((answer.status, answer.json()["code"].as_str()), (status, Some(code)), "{method} {message}");
    }
    let early = json!({ "data": { "input": { "stdin": "eA==" } } });
    let error = agent.stream("process.Process/StreamInput", &[], &[early]).next().unwrap_err()["error"].take();
    assert_eq!(error["code"], "invalid_argument");
}

#[test]
fn binary_messages_are_understood_too() {
    let agent = Agent::start();
    let headers = [("X-Access-Token", crate::support::TOKEN), ("Content-Type", "application/proto")];
    let reply = agent.request("POST", "/process.Process/List").headers(&headers).send("");
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/proto")));
    assert_eq!(reply.text(), "");
}
