//! Runs the agent as pid 1 of pid, mount, UTS and IPC namespaces of its own, over a throw-away /etc, /home, /run and
//! /dev/pts, with signals ignored as below nohup. Needs root, as the agent does. /etc/nsswitch.conf is one that kills a
//! static program which reaches NSS.

use std::fs;
use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicU16;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::http::{Answer, PATIENCE, Request, Stream, envelope};

pub(crate) const TOKEN: &str = "0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0";
pub(crate) const SECRET: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
pub(crate) const NEXT_SECRET: &str = "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210";
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
    folder: tempfile::TempDir,
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
        assert_eq!(answer.status, 204, "{}", answer.text());
        agent
    }

    /// With the user `user` (1000) and a file system of 1 MiB at /home/full.
    pub(crate) fn launch(unshare_args: &[&str]) -> Agent {
        let folder = tempfile::tempdir().unwrap();
        for directory in ["etc", "home/user", "home/full"] {
            fs::create_dir_all(folder.path().join(directory)).unwrap();
        }
        chown(folder.path().join("home/user"), Some(1000), Some(1000)).unwrap();
        let files = [
            ("passwd", "root:x:0:0::/root:/bin/bash\nuser:x:1000:1000::/home/user:/bin/bash\n"),
            ("group", "root:x:0:\nuser:x:1000:\nextra:x:2000:user\n"),
            ("nsswitch.conf", "passwd: files systemd\ngroup: files systemd\nhosts: files resolve dns\n"),
            ("hosts", "of the template\n"),
        ];
        for (name, content) in files {
            fs::write(folder.path().join("etc").join(name), content).unwrap();
        }
        let port = free_port();
        let script = r#"set -e
            trap '' HUP INT QUIT TERM
            mount --make-rprivate /
            mount --bind "$1/etc" /etc
            mount --bind "$1/home" /home
            mount -t tmpfs -o size=1m,mode=777 tmpfs /home/full
            mount -t tmpfs -o mode=755 tmpfs /run
            mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts /dev/pts
            mount --bind /dev/pts/ptmx /dev/ptmx
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
        let agent = Agent { child, port, folder };
        if !unshare_args.contains(&"--net") {
            wait_for("the agent to listen", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
        }
        agent
    }

    /// As the test sees it: the child of the unshare that waits for it, once there is one.
    pub(crate) fn pid(&self) -> u32 {
        let parent = self.child.id();
        let mut pid = String::new();
        wait_for("unshare to fork", || {
            pid = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
            !pid.is_empty()
        });
        pid.trim().parse().unwrap()
    }

    /// Where a path below /home is for the test.
    pub(crate) fn outside(&self, path: &str) -> PathBuf {
        self.folder.path().join(path.strip_prefix('/').unwrap())
    }

    /// A number of /proc/PID/`file`, in KiB.
    pub(crate) fn memory_kib(&self, file: &str, key: &str) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/{file}", self.pid())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    pub(crate) fn request(&self, method: &str, target: &str) -> Request {
        Request::new(self.port, method, target)
    }

    /// A request that shows the token.
    pub(crate) fn authorized(&self, method: &str, target: &str) -> Request {
        self.request(method, target).header("X-Access-Token", TOKEN)
    }

    pub(crate) fn init(&self, secret: &str, request: &Value) -> Answer {
        self.request("POST", "/init").header("X-Stillbox-Control", secret).send(request.to_string())
    }

    /// The agent's log after `cursor`.
    pub(crate) fn logs(&self, secret: &str, cursor: u64) -> Answer {
        self.request("GET", &format!("/stillbox/logs?cursor={cursor}")).header("X-Stillbox-Control", secret).send("")
    }

    pub(crate) fn get(&self, target: &str) -> Answer {
        self.authorized("GET", target).send("")
    }

    /// Uploads `content` as it is.
    pub(crate) fn put(&self, path: &str, content: impl AsRef<[u8]>) -> Answer {
        let request = self.authorized("POST", &format!("/files?path={path}"));
        request.header("Content-Type", "application/octet-stream").send(content)
    }

    /// A call of `package.Service/Method`.
    pub(crate) fn rpc(&self, procedure: &str) -> Request {
        self.authorized("POST", &format!("/{procedure}")).header("Connect-Protocol-Version", "1")
    }

    /// Calls a unary method.
    pub(crate) fn call(&self, procedure: &str, message: &Value) -> Answer {
        self.rpc(procedure).header("Content-Type", "application/json").send(message.to_string())
    }

    /// As `call`, for what has to succeed.
    pub(crate) fn ok(&self, procedure: &str, message: &Value) -> Value {
        let answer = self.call(procedure, message);
        assert_eq!(answer.status, 200, "{procedure}: {}", answer.text());
        answer.json()
    }

    /// Opens a server stream, or sends a whole client stream.
    pub(crate) fn stream(&self, procedure: &str, headers: &[(&str, &str)], messages: &[Value]) -> Stream {
        let body: Vec<u8> = messages.iter().flat_map(envelope).collect();
        Stream::new(self.rpc(procedure).header("Content-Type", "application/connect+json").headers(headers).begin(body))
    }

    /// Starts `sh -c script` without stdin.
    pub(crate) fn sh(&self, script: &str) -> Stream {
        self.stream("process.Process/Start", &[], &[shell(script)])
    }

    /// What `sh -c script` printed as root, once it has ended well.
    pub(crate) fn root_output(&self, script: &str) -> String {
        let as_root = [("Authorization", AS_ROOT)];
        let (stdout, stderr, end) = self.stream("process.Process/Start", &as_root, &[shell(script)]).collect();
        assert_eq!(end["status"], "exit status 0", "{script}: {stderr}");
        stdout
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

/// A port that nobody listens on and that no other test of this run gets. Below the range that the kernel hands out
/// itself, so that no connection takes it before the agent does.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = u16::try_from(std::process::id() % 10_000).unwrap();
    let mut ports = std::iter::repeat_with(|| 20_000 + (start + NEXT.fetch_add(1, Relaxed)) % 10_000);
    ports.find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok()).unwrap()
}

pub(crate) fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
