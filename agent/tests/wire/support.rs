//! Runs the real agent for black-box tests: in mount and UTS namespaces of its own, over a throw-away /etc, /home and
//! /run, on a free port of the loopback. Needs root, as the agent does. HTTP is spoken by hand, byte by byte.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicU16;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub(crate) const TOKEN: &str = "0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0";
const SECRET: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
/// Longer than anything here takes, so that a hang names its test.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running agent that has been told by /init who it is.
pub(crate) struct Agent {
    child: Child,
    port: u16,
    folder: tempfile::TempDir,
}

impl Agent {
    /// With the token [`TOKEN`], the user `user` (1000) and a 1 MiB file system at /home/full.
    pub(crate) fn start() -> Agent {
        let folder = tempfile::tempdir().unwrap();
        for directory in ["etc", "home/user", "home/full"] {
            fs::create_dir_all(folder.path().join(directory)).unwrap();
        }
        chown(folder.path().join("home/user"), Some(1000), Some(1000)).unwrap();
        let etc = |name: &str, content: &str| fs::write(folder.path().join("etc").join(name), content).unwrap();
        etc("passwd", "root:x:0:0::/root:/bin/bash\nuser:x:1000:1000::/home/user:/bin/bash\n");
        etc("group", "root:x:0:\nuser:x:1000:\n");
        for name in ["hosts", "hostname", "resolv.conf", "machine-id"] {
            etc(name, "");
        }
        let port = free_port();
        let script = r#"set -e
            mount --make-rprivate /
            mount --bind "$1/etc" /etc
            mount --bind "$1/home" /home
            mount -t tmpfs -o mode=755 tmpfs /run
            mount -t tmpfs -o size=1m,mode=777 tmpfs /home/full
            exec "$2" --port "$3""#;
        let mut child = Command::new("unshare")
            .args(["--mount", "--uts", "sh", "-c", script, "sh"])
            .arg(folder.path())
            .arg(env!("CARGO_BIN_EXE_stillbox-agent"))
            .arg(port.to_string())
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        writeln!(child.stdin.take().unwrap(), "{SECRET}").unwrap();
        let agent = Agent { child, port, folder };
        agent.init();
        agent
    }

    fn init(&self) {
        wait_for("the agent to listen", || TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_ok());
        let body = json!({
            "controlSecret": SECRET, "sandboxId": "itest", "templateId": "base", "accessToken": TOKEN,
            "defaultUser": "user", "hostname": "itest", "machineId": "0".repeat(32),
            "bootId": "00000000-0000-4000-8000-000000000000", "hosts": "127.0.0.1 localhost\n", "resolvConf": "",
            "generation": 1, "entropy": "A".repeat(43) + "=",
        });
        let answer = self
            .request("POST", "/init")
            .header("X-Stillbox-Control", SECRET)
            .header("Content-Type", "application/json")
            .send(body.to_string());
        assert_eq!(answer.status, 204, "{}", answer.text());
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A number of /proc/PID/`file`, in KiB.
    pub(crate) fn memory_kib(&self, file: &str, key: &str) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/{file}", self.pid())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Where a path below /home is for the test.
    pub(crate) fn outside(&self, path: &str) -> PathBuf {
        self.folder.path().join(path.strip_prefix('/').unwrap())
    }

    pub(crate) fn request(&self, method: &str, target: &str) -> Request<'_> {
        let head = format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
        Request { agent: self, head }
    }

    /// A request that shows the token.
    pub(crate) fn authorized(&self, method: &str, target: &str) -> Request<'_> {
        self.request(method, target).header("X-Access-Token", TOKEN)
    }

    pub(crate) fn get(&self, target: &str) -> Answer {
        self.authorized("GET", target).send("")
    }

    /// Uploads `content` as it is.
    pub(crate) fn put(&self, path: &str, content: impl AsRef<[u8]>) -> Answer {
        let request = self.authorized("POST", &format!("/files?path={path}"));
        request.header("Content-Type", "application/octet-stream").send(content)
    }

    /// Calls a unary method of the Filesystem service: the HTTP status and the JSON of the answer.
    pub(crate) fn call(&self, method: &str, request: Value) -> (u16, Value) {
        let answer = self.rpc(method).header("Content-Type", "application/json").send(request.to_string());
        (answer.status, answer.json())
    }

    /// As `call`, for what has to succeed.
    pub(crate) fn ok(&self, method: &str, request: Value) -> Value {
        let (status, answer) = self.call(method, request);
        assert_eq!(status, 200, "{answer}");
        answer
    }

    pub(crate) fn rpc(&self, method: &str) -> Request<'_> {
        let request = self.authorized("POST", &format!("/filesystem.Filesystem/{method}"));
        request.header("Connect-Protocol-Version", "1")
    }

    /// Opens a server stream.
    pub(crate) fn stream(&self, request: Request<'_>, message: &Value) -> Stream {
        let message = message.to_string();
        let mut envelope = vec![0];
        envelope.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
        envelope.extend(message.as_bytes());
        let socket = request.header("Content-Type", "application/connect+json").write(&envelope);
        let mut reader = BufReader::new(socket);
        let (status, headers) = read_head(&mut reader);
        assert_eq!(status, 200);
        assert_eq!(header(&headers, "content-type"), Some("application/connect+json"));
        Stream { body: Dechunked { reader, left: 0 } }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

pub(crate) struct Request<'a> {
    agent: &'a Agent,
    head: String,
}

impl Request<'_> {
    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.head.push_str(&format!("{name}: {value}\r\n"));
        self
    }

    pub(crate) fn send(self, body: impl AsRef<[u8]>) -> Answer {
        Answer::read(self.write(body.as_ref()))
    }

    fn write(self, body: &[u8]) -> TcpStream {
        let mut socket = self.header("Content-Length", &body.len().to_string()).open();
        socket.write_all(body).unwrap();
        socket
    }

    /// Sends the head alone; the body is the caller's.
    pub(crate) fn open(self) -> TcpStream {
        let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, self.agent.port)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.write_all(format!("{}\r\n", self.head).as_bytes()).unwrap();
        socket
    }
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn read(socket: TcpStream) -> Answer {
        let mut reader = BufReader::new(socket);
        let (status, headers) = read_head(&mut reader);
        let mut body = Vec::new();
        if header(&headers, "transfer-encoding") == Some("chunked") {
            Dechunked { reader, left: 0 }.read_to_end(&mut body).unwrap();
        } else {
            reader.read_to_end(&mut body).unwrap();
        }
        Answer { status, headers, body }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }
}

/// The first line of that name.
fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
}

fn read_head(reader: &mut impl BufRead) -> (u16, Vec<(String, String)>) {
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    };
    let status = line().split(' ').nth(1).expect("a status line").parse().unwrap();
    let split = |line: String| {
        let (name, value) = line.split_once(':').unwrap();
        (name.to_ascii_lowercase(), value.trim().to_owned())
    };
    let headers = std::iter::from_fn(|| Some(line()).filter(|line| !line.is_empty()).map(split)).collect();
    (status, headers)
}

struct Dechunked {
    reader: BufReader<TcpStream>,
    left: usize,
}

impl Read for Dechunked {
    fn read(&mut self, target: &mut [u8]) -> std::io::Result<usize> {
        if self.left == 0 {
            let mut size = String::new();
            self.reader.read_line(&mut size)?;
            self.left = usize::from_str_radix(size.trim(), 16).map_err(std::io::Error::other)?;
            if self.left == 0 {
                return Ok(0);
            }
        }
        let most = self.left.min(target.len());
        let read = self.reader.read(&mut target[..most])?;
        self.left -= read;
        if self.left == 0 {
            self.reader.read_line(&mut String::new())?;
        }
        Ok(read)
    }
}

/// A server stream of Connect messages.
pub(crate) struct Stream {
    body: Dechunked,
}

impl Stream {
    /// The next message, or the end-stream message as the error.
    pub(crate) fn next(&mut self) -> Result<Value, Value> {
        let mut head = [0; 5];
        self.body.read_exact(&mut head).unwrap();
        let length = u32::from_be_bytes(head[1..].try_into().unwrap());
        let mut payload = vec![0; length as usize];
        self.body.read_exact(&mut payload).unwrap();
        let message = serde_json::from_slice(&payload).unwrap();
        match head[0] {
            0 => Ok(message),
            2 => Err(message),
            flags => panic!("an envelope with flags {flags}"),
        }
    }
}

/// A port that nobody listens on and that no other test of this run gets. Below the range that the kernel hands out
/// itself, so that no connection takes it before the agent does.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = u16::try_from(std::process::id() % 10_000).unwrap();
    let mut ports = std::iter::repeat_with(|| 20_000 + (start + NEXT.fetch_add(1, Relaxed)) % 10_000);
    ports.find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok()).unwrap()
}

pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
