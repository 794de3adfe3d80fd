//! HTTP/1.1 and Connect's envelopes spoken by hand, so that tests see the bytes and not a library's idea of them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};

/// Longer than anything here takes, so that a hang names its test.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A request that is still being written.
pub(crate) struct Request {
    port: u16,
    head: String,
}

impl Request {
    pub(crate) fn new(port: u16, method: &str, target: &str) -> Request {
        Request { port, head: format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n") }
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.head += &format!("{name}: {value}\r\n");
        self
    }

    pub(crate) fn headers(self, headers: &[(&str, &str)]) -> Self {
        headers.iter().fold(self, |request, (name, value)| request.header(name, value))
    }

    pub(crate) fn send(self, body: impl AsRef<[u8]>) -> Answer {
        self.begin(body).answer()
    }

    /// Sends all of it and reads the head of the reply.
    pub(crate) fn begin(self, body: impl AsRef<[u8]>) -> Reply {
        let body = body.as_ref();
        let mut socket = self.header("Content-Length", &body.len().to_string()).open();
        socket.write_all(body).unwrap();
        Reply::read(socket)
    }

    /// Sends the head alone; the body is the caller's.
    pub(crate) fn open(self) -> TcpStream {
        let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.write_all((self.head + "\r\n").as_bytes()).unwrap();
        socket
    }
}

/// A reply whose head has been read and whose body is still to come.
pub(crate) struct Reply {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    reader: BufReader<TcpStream>,
}

impl Reply {
    pub(crate) fn read(socket: TcpStream) -> Reply {
        let mut reader = BufReader::new(socket);
        let mut lines = std::iter::from_fn(|| {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let line = line.trim_end().to_owned();
            (!line.is_empty()).then_some(line)
        });
        let status = lines.next().expect("a status line").split(' ').nth(1).unwrap().parse().unwrap();
        let headers =
            lines.map(|line| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned())).unwrap()).collect();
        Reply { status, headers, reader }
    }

    /// The first line of that name.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn answer(mut self) -> Answer {
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk() {
            body.extend(chunk);
        }
        Answer { status: self.status, headers: self.headers, body }
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

pub(crate) struct Answer {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The code of a Connect error.
    pub(crate) fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or_default().to_owned()
    }
}

/// One message as a stream carries it.
pub(crate) fn envelope(message: &Value) -> Vec<u8> {
    let message = message.to_string();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[0], &length[..], message.as_bytes()].concat()
}

/// The messages of a server stream. Dropping it hangs up.
pub(crate) struct Stream {
    reply: Reply,
    buffer: Vec<u8>,
}

impl Stream {
    pub(crate) fn new(reply: Reply) -> Stream {
        assert_eq!(reply.status, 200, "errors of a stream come in its last message");
        assert_eq!(reply.header("content-type"), Some("application/connect+json"));
        Stream { reply, buffer: Vec::new() }
    }

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
