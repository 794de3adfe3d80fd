//! What the agent owes the kernel, its processes and the host: reaping, no foreign fds, loopback, access.

use std::process::Command;

use serde_json::json;

use crate::support::{Agent, SECRET, TOKEN, wait_for};

#[test]
fn orphans_are_reaped_and_exits_of_started_processes_are_not_stolen() {
    let agent = Agent::start();
    let (_, _, end) = agent.sh("for i in 1 2 3 4 5 6 7 8 9 10; do (sleep 0.05 &) ; done; sleep 0.2; exit 9").collect();
    assert_eq!(end["exitCode"], 9);
    wait_for("the zombies to be reaped", || {
        let left = agent.root_output("cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z ' || true");
        left == "0\n"
    });
}

#[test]
fn it_is_pid_1_and_holds_nothing_of_whoever_started_it() {
    let agent = Agent::start();
    assert_eq!(agent.root_output("cat /proc/1/comm"), "stillbox-agent\n");
    let fds = agent.root_output("cd /proc/1/fd; for fd in *; do target=$(readlink $fd) && echo $fd $target; done; true");
    for line in ["0 /dev/null", "1 /dev/null", "2 /dev/null"] {
        assert!(fds.lines().any(|known| known == line), "{fds}");
    }
    let foreign: Vec<&str> =
        fds.lines().filter(|line| !["/dev/null", "socket:", "pipe:", "anon_inode:"].iter().any(|own| line.contains(own))).collect();
    assert!(foreign.is_empty(), "{fds}");
    assert_eq!(agent.root_output("cut -d ' ' -f 6 /proc/1/stat"), "1\n", "it leads a session");
    let inherited = agent.root_output("ls /proc/self/fd | wc -l");
    assert_eq!(inherited, "4\n", "a process gets stdio alone, and ls opens one");
}

#[test]
fn a_process_inherits_no_ignored_and_no_blocked_signals() {
    let agent = Agent::start();
    assert_eq!(agent.root_output("grep -E 'Sig(Ign|Blk)' /proc/self/status | cut -f 2 | sort -u"), "0000000000000000\n");
}

#[test]
fn loopback_is_up_before_it_listens() {
    let agent = Agent::launch(&["--net"]);
    wait_for("the agent to answer in its own network", || {
        let ask = format!(
            "exec 3<>/dev/tcp/127.0.0.1/{} && printf 'GET /health HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n' >&3 && head -1 <&3",
            agent.port
        );
        let answer = Command::new("nsenter").args(["--net", "-t", &agent.pid().to_string(), "bash", "-c", &ask]).output().unwrap();
        String::from_utf8_lossy(&answer.stdout).starts_with("HTTP/1.1 204")
    });
}

#[test]
fn nobody_gets_in_before_init_and_only_the_token_afterwards() {
    let agent = Agent::generic();
    let status = |target: &str, headers: &[(&str, &str)]| agent.request("GET", target).headers(headers).send("").status;
    assert_eq!(status("/health", &[]), 204);
    assert_eq!(status("/envs", &[("X-Access-Token", TOKEN)]), 401);
    assert_eq!(agent.init(SECRET, &crate::support::identity()).status, 204);
    let refused = agent.request("POST", "/process.Process/List").header("Content-Type", "application/json").send("{}");
    let message = "unauthorized access, please provide a valid access token or method signing if supported";
    assert_eq!((refused.status, refused.json()), (401, json!({ "code": 401, "message": message })));
    assert_eq!(status("/metrics", &[("X-Access-Token", "wrong")]), 401);
    assert_eq!(status("/envs", &[("X-Access-Token", TOKEN)]), 200);
    assert_eq!(status("/health", &[]), 204);
}

#[test]
fn variables_and_metrics_are_the_sandboxs() {
    let agent = Agent::start();
    let envs =
        json!({ "WHO": "sandbox", "WHERE": "template", "E2B_SANDBOX": "true", "E2B_SANDBOX_ID": "itest", "E2B_TEMPLATE_ID": "base" });
    assert_eq!(agent.get("/envs").json(), envs);
    agent.get("/metrics");
    agent.root_output("timeout 0.3 sh -c 'while :; do :; done' || true");
    let metrics = agent.get("/metrics").json();
    assert_eq!((&metrics["cpu_count"], &metrics["mem_total"], &metrics["mem_total_mib"]), (&json!(2), &json!(512 << 20), &json!(512)));
    assert!(metrics["cpu_used_pct"].as_f64().unwrap() > 1.0, "a process that has ended counts too: {metrics}");
    assert!(metrics["mem_used"].as_u64().unwrap() > 500_000 && metrics["disk_total"].as_u64() > metrics["disk_used"].as_u64(), "{metrics}");
}

#[test]
fn a_browser_may_ask_from_anywhere() {
    let agent = Agent::start();
    let headers = [
        ("Origin", "https://app.example"),
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "x-access-token"),
    ];
    let preflight = agent.request("OPTIONS", "/process.Process/Start").headers(&headers).send("");
    assert_eq!((preflight.status, preflight.header("access-control-allow-origin")), (200, Some("*")));
    assert!(preflight.header("access-control-allow-headers").is_some() && preflight.header("access-control-allow-methods").is_some());
    let refused = agent.request("GET", "/envs").headers(&headers[..1]).send("");
    assert_eq!((refused.status, refused.header("access-control-allow-origin")), (401, Some("*")), "so that a script can read the error");
}

#[test]
fn a_bad_secret_or_argument_is_said_in_one_line() {
    let run = |args: &[&str], secret: &str| {
        let mut child = Command::new(crate::support::BINARY)
            .args(args)
            .stdin(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // It may have given up before it reads.
        let _ = std::io::Write::write_all(&mut child.stdin.take().unwrap(), secret.as_bytes());
        let output = child.wait_with_output().unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(run(&[], "short\n"), (false, "stillbox-agent: the control secret on fd 0 is not 64 hex characters\n".into()));
    assert_eq!(run(&["--port", "x"], SECRET), (false, "stillbox-agent: --port x is not a port number\n".into()));
    let usage = "stillbox-agent: usage: stillbox-agent [--port N] < control-secret\n";
    assert_eq!(run(&["--help"], SECRET), (false, usage.into()));
}
