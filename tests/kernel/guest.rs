//! What runs inside: a busybox layer, and a client of the agent that runs commands in it and reads what they say.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};
use stillbox::model::SandboxId;
use stillbox::runtime::Runtime;
use stillbox::runtime::kernel::Kernel;
use stillbox_agent::wire::{AGENT_PORT, CONTROL_HEADER, INIT_PATH};

const PATIENCE: Duration = Duration::from_secs(20);
/// The statically linked busybox of Debian's busybox-static.
const BUSYBOX: &str = "/bin/busybox";

/// How a command inside ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Said {
    /// Standard output and standard error.
    pub(crate) text: String,
    /// Exit code; signals as the agent counts them.
    pub(crate) code: i64,
}

/// Makes `layers/<name>` with a shell and the usual tools.
pub(crate) fn make_layer(data_dir: &Path, name: &str) {
    let layer = data_dir.join("layers").join(name);
    for folder in ["bin", "etc", "root", "home/user", "usr/lib"] {
        std::fs::create_dir_all(layer.join(folder)).unwrap();
    }
    std::fs::copy(BUSYBOX, layer.join("bin/busybox")).expect("these tests need Debian's busybox-static");
    let tools = std::process::Command::new(BUSYBOX).arg("--list").output().unwrap();
    for tool in String::from_utf8(tools.stdout).unwrap().lines().filter(|tool| *tool != "busybox") {
        std::os::unix::fs::symlink("busybox", layer.join("bin").join(tool)).unwrap();
    }
    std::fs::write(layer.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n").unwrap();
    std::fs::write(layer.join("etc/group"), "root:x:0:\nuser:x:1000:\n").unwrap();
    std::os::unix::fs::chown(layer.join("home/user"), Some(1000), Some(1000)).unwrap();
}

/// Waits until the agent answers /health.
pub(crate) async fn wait_until_ready(kernel: &Kernel, id: SandboxId) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let request = Request::get("/health").body(Full::default()).unwrap();
        match send(kernel, id, request).await {
            Ok((status, _)) if status < 300 => return,
            other if Instant::now() > deadline => panic!("the agent of {id} does not answer: {other:?}"),
            _ => tokio::time::sleep(Duration::from_millis(2)).await,
        }
    }
}

/// Gives the sandbox its name, as the core does after every start.
pub(crate) async fn init(kernel: &Kernel, id: SandboxId, control_secret: &str, boot_id: &str) {
    let body = json!({
        "controlSecret": control_secret, "sandboxId": id, "templateId": "test", "defaultUser": "root", "hostname": "guest",
        "machineId": "0123456789abcdef0123456789abcdef", "bootId": boot_id, "hosts": "127.0.0.1 localhost guest\n",
        "resolvConf": "", "generation": 1, "entropy": BASE64.encode([7; 32])
    });
    let request = Request::post(INIT_PATH)
        .header("content-type", "application/json")
        .header(CONTROL_HEADER, control_secret)
        .body(Full::from(body.to_string()))
        .unwrap();
    let (status, body) = send(kernel, id, request).await.unwrap();
    assert_eq!(status, 204, "{}", String::from_utf8_lossy(&body));
}

/// Runs a shell command as root.
pub(crate) async fn run(kernel: &Kernel, id: SandboxId, command: &str) -> Said {
    run_as(kernel, id, "root", command).await
}

/// Runs a shell command as a user of the layer's.
pub(crate) async fn run_as(kernel: &Kernel, id: SandboxId, user: &str, command: &str) -> Said {
    let start =
        json!({ "process": { "cmd": "/bin/sh", "args": ["-c", format!("exec 2>&1; {command}")], "envs": {}, "cwd": "/" }, "stdin": false });
    let request = Request::post("/process.Process/Start")
        .header("content-type", "application/connect+json")
        .header("connect-protocol-version", "1")
        .header("authorization", format!("Basic {}", BASE64.encode(format!("{user}:"))))
        .body(Full::from(envelope(&start)))
        .unwrap();
    let (status, body) = tokio::time::timeout(Duration::from_secs(60), send(kernel, id, request))
        .await
        .unwrap_or_else(|_| panic!("`{command}` goes on and on"))
        .unwrap();
    assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
    read_events(&body)
}

fn envelope(message: &Value) -> Vec<u8> {
    let text = message.to_string();
    let mut framed = vec![0];
    framed.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
    framed.extend(text.as_bytes());
    framed
}

fn read_events(mut body: &[u8]) -> Said {
    let mut said = Said { text: String::new(), code: -1 };
    let mut ended = false;
    while let Some((head, rest)) = body.split_at_checked(5) {
        let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize;
        let (message, rest) = rest.split_at(length);
        body = rest;
        let message: Value = serde_json::from_slice(message).unwrap();
        if let Some(error) = message.get("error") {
            panic!("the agent says {error}");
        }
        let event = &message["event"];
        for stream in ["stdout", "stderr"] {
            if let Some(data) = event["data"][stream].as_str() {
                said.text.push_str(&String::from_utf8_lossy(&BASE64.decode(data).unwrap()));
            }
        }
        if event["end"].is_object() {
            said.code = event["end"]["exitCode"].as_i64().unwrap_or(0);
            ended = true;
        }
    }
    assert!(ended, "the command's end was not reported; it said {}", said.text);
    said
}

async fn send(
    kernel: &Kernel,
    id: SandboxId,
    mut request: Request<Full<bytes::Bytes>>,
) -> Result<(u16, bytes::Bytes), Box<dyn std::error::Error + Send + Sync>> {
    request.headers_mut().insert("host", "localhost".parse()?);
    let stream = kernel.dial(id, AGENT_PORT).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driving = tokio::spawn(connection);
    let response = sender.send_request(request).await?;
    let status = response.status().as_u16();
    let body = response.into_body().collect().await?.to_bytes();
    driving.abort();
    Ok((status, body))
}
