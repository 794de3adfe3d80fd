//! Runs the agent as pid 1 of pid, mount, UTS and IPC namespaces of its own, over a throw-away /etc, /home, /run and
//! /dev/pts, with signals ignored as below nohup. Needs root, as the agent does. /etc/nsswitch.conf is one that kills a
//! static program which reaches NSS.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::chown;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub(crate) const TOKEN: &str = "0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0";
pub(crate) const SECRET: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
pub(crate) const NEXT_SECRET: &str = "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210";
/// Longer than anything here takes, so that a hang names its test.
const PATIENCE: Duration = Duration::from_secs(20);
/// `make test` names the static binary that the server embeds, which alone can die of NSS.
pub(crate) const BINARY: &str = match option_env!("STILLBOX_AGENT_UNDER_TEST") {
    Some(file) => file,
    None => env!("CARGO_BIN_EXE_stillbox-agent"),
};
/// `root:` in base64.
const AS_ROOT: &str = "Basic cm9vdDo=";

pub(crate) struct Agent {
    child: Child,
    pub(crate) port: u16,
    _folder: tempfile::TempDir,
}

impl Agent {
    /// Knows its control secret and nothing else yet.
    pub(crate) fn generic() -> Agent {
        Agent::launch(&[])
    }

    /// Has been told by /init who it is.
    pub(crate) fn start() -> Agent {
        let agent = Agent::generic();
        let answer = agent.init(SECRET, &identity());
        assert_eq!(answer.status, 204, "{}", answer.body);
        agent
    }

    pub(crate) fn launch(unshare_args: &[&str]) -> Agent {
        let folder = tempfile::tempdir().unwrap();
        let etc = folder.path().join("etc");
        fs::create_dir_all(&etc).unwrap();
        fs::create_dir_all(folder.path().join("home/user")).unwrap();
        chown(folder.path().join("home/user"), Some(1000), Some(1000)).unwrap();
        let files = [
            ("passwd", "root:x:0:0::/root:/bin/bash\nuser:x:1000:1000::/home/user:/bin/bash\n"),
            ("group", "root:x:0:\nuser:x:1000:\nextra:x:2000:user\n"),
            ("nsswitch.conf", "passwd: files systemd\ngroup: files systemd\nhosts: files resolve dns\n"),
            ("hosts", "of the template\n"),
        ];
        for (name, content) in files {
            fs::write(etc.join(name), content).unwrap();
        }
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let script = r#"set -e
            mount --make-rprivate /
            mount --bind "$1/etc" /etc
            mount --bind "$1/home" /home
            mount -t tmpfs -o mode=755 tmpfs /run
            mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts /dev/pts
            mount --bind /dev/pts/ptmx /dev/ptmx
            trap '' HUP INT QUIT TERM
            exec "$2" --port "$3""#;
        let mut child = Command::new("unshare")
            .args(["--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(unshare_args)
            .args(["sh", "-c", script, "sh"])
            .arg(folder.path())
            .arg(BINARY)
            .arg(port.to_string())
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        writeln!(child.stdin.take().unwrap(), "{SECRET}").unwrap();
        let agent = Agent { child, port, _folder: folder };
        if !unshare_args.contains(&"--net") {
            wait_for("the agent to listen", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
        }
        agent
    }

    /// Of the unshare that waits for it.
    pub(crate) fn parent_pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn init(&self, secret: &str, request: &Value) -> Answer {
        self.request("POST", "/init", &[("X-Stillbox-Control", secret)], request.to_string().as_bytes()).answer()
    }

    /// The agent's log after `cursor`.
    pub(crate) fn logs(&self, secret: &str, cursor: u64) -> Answer {
        self.request("GET", &format!("/stillbox/logs?cursor={cursor}"), &[("X-Stillbox-Control", secret)], b"").answer()
    }

    pub(crate) fn get(&self, target: &str) -> Answer {
        self.request("GET", target, &[("X-Access-Token", TOKEN)], b"").answer()
    }

    /// Calls a unary method of the Process service.
    pub(crate) fn call(&self, method: &str, message: &Value) -> Answer {
        let headers = [("X-Access-Token", TOKEN), ("Content-Type", "application/json"), ("Connect-Protocol-Version", "1")];
        self.request("POST", &format!("/process.Process/{method}"), &headers, message.to_string().as_bytes()).answer()
    }

    /// As `call`, for what has to succeed.
    pub(crate) fn ok(&self, method: &str, message: &Value) -> Value {
        let answer = self.call(method, message);
        assert_eq!(answer.status, 200, "{method}: {}", answer.body);
        answer.json()
    }

    /// Opens a server stream, or sends a whole client stream, of the Process service.
    pub(crate) fn stream(&self, method: &str, headers: &[(&str, &str)], messages: &[Value]) -> Stream {
        let mut all = vec![("X-Access-Token", TOKEN), ("Content-Type", "application/connect+json"), ("Connect-Protocol-Version", "1")];
        all.extend(headers);
        let body: Vec<u8> = messages.iter().flat_map(envelope).collect();
        let reply = self.request("POST", &format!("/process.Process/{method}"), &all, &body);
        assert_eq!(reply.status, 200, "errors of a stream come in its last message");
        assert_eq!(reply.header("content-type"), Some("application/connect+json"));
        Stream { reply, buffer: Vec::new() }
    }

    /// Starts `sh -c script` without stdin.
    pub(crate) fn sh(&self, script: &str) -> Stream {
        self.stream("Start", &[], &[shell(script)])
    }

    /// What `sh -c script` printed as root, once it has ended well.
    pub(crate) fn root_output(&self, script: &str) -> String {
        let (stdout, stderr, end) = self.stream("Start", &[("Authorization", AS_ROOT)], &[shell(script)]).collect();
        assert_eq!(end["status"], "exit status 0", "{script}: {stderr}");
        stdout
    }

    pub(crate) fn request(&self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut head = format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        socket.write_all((head + "\r\n").as_bytes()).unwrap();
        socket.write_all(body).unwrap();
        Reply::read(socket)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

pub(crate) fn identity() -> Value {
    json!({
        "controlSecret": SECRET, "sandboxId": "itest", "templateId": "base", "accessToken": TOKEN,
        "envVars": { "WHO": "sandbox" }, "templateEnv": { "WHO": "template", "WHERE": "template" },
        "defaultUser": "user", "defaultWorkdir": "/home/user", "hostname": "itest", "machineId": "0".repeat(32),
        "bootId": "00000000-0000-4000-8000-000000000000", "hosts": "127.0.0.1 localhost itest\n",
        "resolvConf": "nameserver 192.0.2.1\n", "generation": 1, "entropy": "A".repeat(43) + "=",
        "cpuCount": 2, "memoryBytes": 512 << 20, "a field of a newer host": true,
    })
}

pub(crate) fn shell(script: &str) -> Value {
    json!({ "process": { "cmd": "/bin/sh", "args": ["-c", script] }, "stdin": false })
}

fn envelope(message: &Value) -> Vec<u8> {
    let message = message.to_string();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[0], &length[..], message.as_bytes()].concat()
}

pub(crate) fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A reply whose head has been read and whose body is still to come.
pub(crate) struct Reply {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    reader: BufReader<TcpStream>,
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

impl Reply {
    fn read(socket: TcpStream) -> Reply {
        let mut reader = BufReader::new(socket);
        let mut lines = std::iter::from_fn(|| {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let line = line.trim_end().to_owned();
            (!line.is_empty()).then_some(line)
        });
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers =
            lines.map(|line| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned())).unwrap()).collect();
        Reply { status, headers, reader }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn answer(mut self) -> Answer {
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk() {
            body.extend(chunk);
        }
        Answer { status: self.status, body: String::from_utf8(body).unwrap() }
    }

    /// The next piece of the body, however it is framed; None at its end.
    fn chunk(&mut self) -> Option<Vec<u8>> {
        if self.header("transfer-encoding") != Some("chunked") {
            let mut rest = Vec::new();
            self.reader.read_to_end(&mut rest).unwrap();
            return (!rest.is_empty()).then_some(rest);
        }
        let mut size = String::new();
        self.reader.read_line(&mut size).unwrap();
        let size = usize::from_str_radix(size.trim(), 16).unwrap();
        let mut chunk = vec![0; size + 2];
        self.reader.read_exact(&mut chunk).unwrap();
        chunk.truncate(size);
        (size > 0).then_some(chunk)
    }
}

/// The messages of a stream. Dropping it hangs up.
pub(crate) struct Stream {
    reply: Reply,
    buffer: Vec<u8>,
}

impl Stream {
    /// The next message, or the content of the end-stream message as an error.
    pub(crate) fn next(&mut self) -> Result<Value, Value> {
        let head: [u8; 5] = self.take(5).try_into().unwrap();
        let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize;
        let message = serde_json::from_slice(&self.take(length)).unwrap();
        match head[0] {
            0 => Ok(message),
            2 => Err(message),
            flags => panic!("flags {flags}: nothing is ever compressed"),
        }
    }

    pub(crate) fn event(&mut self) -> Value {
        self.next().unwrap()["event"].take()
    }

    /// Reads the start event.
    pub(crate) fn pid(&mut self) -> u64 {
        self.event()["start"]["pid"].as_u64().unwrap()
    }

    /// Reads output until it holds `text`.
    pub(crate) fn read_until(&mut self, text: &str) -> String {
        let mut output = String::new();
        while !output.contains(text) {
            let event = self.event();
            for source in ["stdout", "stderr", "pty"] {
                output += &decoded(&event["data"][source]);
            }
        }
        output
    }

    /// Reads all of it: stdout or PTY, stderr, and the end event.
    pub(crate) fn collect(mut self) -> (String, String, Value) {
        let (mut stdout, mut stderr, mut end) = (String::new(), String::new(), Value::Null);
        loop {
            match self.next() {
                Ok(mut message) => {
                    let event = &mut message["event"];
                    stdout += &decoded(&event["data"]["stdout"]);
                    stdout += &decoded(&event["data"]["pty"]);
                    stderr += &decoded(&event["data"]["stderr"]);
                    if !event["end"].is_null() {
                        end = event["end"].take();
                    }
                }
                Err(last) => {
                    assert_eq!(last, json!({}), "after {stdout}{stderr}");
                    return (stdout, stderr, end);
                }
            }
        }
    }

    fn take(&mut self, length: usize) -> Vec<u8> {
        while self.buffer.len() < length {
            let chunk = self.reply.chunk().expect("the stream was cut");
            self.buffer.extend(chunk);
        }
        self.buffer.drain(..length).collect()
    }
}

fn decoded(data: &Value) -> String {
    let text = data.as_str().unwrap_or_default();
    String::from_utf8_lossy(&base64(text)).into_owned()
}

/// Decodes standard base64.
fn base64(text: &str) -> Vec<u8> {
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bits = 0u32;
    let mut bytes = Vec::new();
    for (count, byte) in text.bytes().take_while(|byte| *byte != b'=').enumerate() {
        bits = bits << 6 | u32::try_from(alphabet.iter().position(|letter| *letter == byte).unwrap()).unwrap();
        if count % 4 != 0 {
            bytes.push((bits >> (6 - count % 4 * 2)).to_le_bytes()[0]);
        }
    }
    bytes
}
