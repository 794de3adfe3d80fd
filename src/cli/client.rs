//! A small blocking client of the control plane and of the agents behind the proxy.

use crate::config::Config;
use serde::de::DeserializeOwned;
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use stillbox_agent::wire::AGENT_PORT;

/// Why the server did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No key anywhere.
    #[error("no API key: {path} cannot be read; start the server once, run as its user, or give --api-key")]
    NoKey {
        /// Where the server keeps it.
        path: PathBuf,
        /// Why it could not be read.
        source: io::Error,
    },
    /// Nobody answers at the address.
    #[error("no answer from {url} ({reason}); is `stillbox serve` running there? --listen names another address")]
    Unreachable {
        /// The address.
        url: String,
        /// The transport's word.
        reason: String,
    },
    /// The server said no.
    #[error("{message} ({status})")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The server's message.
        message: String,
    },
    /// The answer is not what this version expects.
    #[error("unexpected answer from {url}: {reason}")]
    Garbled {
        /// What was asked.
        url: String,
        /// What was wrong.
        reason: String,
    },
}

/// A connection to one server.
pub struct Client {
    agent: ureq::Agent,
    base: String,
    key: String,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("base", &self.base).finish_non_exhaustive()
    }
}

/// The longest body that is read whole.
const BODY_BYTES_MAX: u64 = 64 << 20;

impl Client {
    /// For the server that `config` describes: its first plain address, its key or the one in its data folder.
    pub fn new(config: &Config) -> Result<Self, ClientError> {
        let key = match &config.api_key {
            Some(key) => key.0.clone(),
            None => {
                let path = config.data_dir.join("api_key");
                let text = std::fs::read_to_string(&path).map_err(|source| ClientError::NoKey { path, source })?;
                text.trim().to_owned()
            }
        };
        let agent = agent(concat!("stillbox-cli/", env!("CARGO_PKG_VERSION")));
        Ok(Self { agent, base: base_url(config), key })
    }

    /// The same under another user agent, which is how the server tells dialects apart.
    pub fn named(self, user_agent: &str) -> Self {
        Self { agent: agent(user_agent), ..self }
    }

    /// The same for the server at this URL.
    pub fn at(self, url: &str) -> Self {
        Self { base: url.trim_end_matches('/').to_owned(), ..self }
    }

    /// The same server and key, for another thread.
    pub fn another(&self) -> Self {
        Self { agent: self.agent.clone(), base: self.base.clone(), key: self.key.clone() }
    }

    /// `http://ADDRESS:PORT` without a trailing slash.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// GET of the control plane, the body parsed.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let url = format!("{}{path}", self.base);
        let answer = self.agent.get(&url).header("X-API-KEY", &self.key).call();
        self.parsed(&url, self.accepted(&url, answer)?)
    }

    /// GET of a list of the control plane's that comes in pages: all of them. `path` has a query.
    pub fn all<T: DeserializeOwned>(&self, path: &str) -> Result<Vec<T>, ClientError> {
        let (mut items, mut next) = (Vec::new(), String::new());
        loop {
            let url = format!("{}{path}{next}", self.base);
            let answer = self.agent.get(&url).header("X-API-KEY", &self.key).call();
            let token = answer.as_ref().ok().and_then(|answer| answer.headers().get("x-next-token")?.to_str().ok().map(str::to_owned));
            items.extend(self.parsed::<Vec<T>>(&url, self.accepted(&url, answer)?)?);
            match token.filter(|token| !token.is_empty()) {
                Some(token) => next = format!("&nextToken={}", super::sandbox::segment(&token)),
                None => return Ok(items),
            }
        }
    }

    /// POST of the control plane, the body parsed.
    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &serde_json::Value) -> Result<T, ClientError> {
        let url = format!("{}{path}", self.base);
        let answer = self.agent.post(&url).header("X-API-KEY", &self.key).send_json(body);
        self.parsed(&url, self.accepted(&url, answer)?)
    }

    /// POST of the control plane whose answer's body does not matter.
    pub fn post_empty(&self, path: &str, body: &serde_json::Value) -> Result<(), ClientError> {
        let url = format!("{}{path}", self.base);
        self.accepted(&url, self.agent.post(&url).header("X-API-KEY", &self.key).send_json(body)).map(|_| ())
    }

    /// PUT of a stream of unknown length to a link of the server's; no key goes with it.
    pub fn put_stream(&self, url: &str, from: impl io::Read + Send + Sync + 'static) -> Result<(), ClientError> {
        let body = ureq::SendBody::from_owned_reader(from);
        self.accepted(url, self.agent.put(url).content_type("application/gzip").send(body)).map(|_| ())
    }

    /// DELETE of the control plane.
    pub fn delete(&self, path: &str) -> Result<(), ClientError> {
        let url = format!("{}{path}", self.base);
        self.accepted(&url, self.agent.delete(&url).header("X-API-KEY", &self.key).call()).map(|_| ())
    }

    /// POST into a sandbox's agent through the proxy; the body is handed over as it arrives.
    pub fn post_agent(&self, sandbox: &Target, path: &str, content_type: &str, body: &[u8]) -> Result<ureq::Body, ClientError> {
        let url = format!("{}{path}", self.base);
        let request = sandbox.addressed(self.agent.post(&url)).header("Connect-Protocol-Version", "1").content_type(content_type);
        self.accepted(&url, request.send(body))
    }

    /// POST to a port of a sandbox through the proxy.
    pub fn post_port(&self, sandbox: &Target, port: u16, path: &str, body: &serde_json::Value) -> Result<ureq::Body, ClientError> {
        let url = format!("{}{path}", self.base);
        self.accepted(&url, sandbox.addressed_at(port, self.agent.post(&url)).send_json(body))
    }

    /// GET from a sandbox's agent through the proxy.
    pub fn get_agent(&self, sandbox: &Target, path: &str) -> Result<ureq::Body, ClientError> {
        let url = format!("{}{path}", self.base);
        self.accepted(&url, sandbox.addressed(self.agent.get(&url)).call())
    }

    fn accepted(&self, url: &str, answer: Result<http::Response<ureq::Body>, ureq::Error>) -> Result<ureq::Body, ClientError> {
        let answer = answer.map_err(|error| ClientError::Unreachable { url: url.to_owned(), reason: error.to_string() })?;
        let status = answer.status().as_u16();
        let mut body = answer.into_body();
        if (200..300).contains(&status) {
            return Ok(body);
        }
        let text = body.with_config().limit(1 << 20).read_to_string().unwrap_or_default();
        let message = serde_json::from_str::<serde_json::Value>(&text)
            .ok()
            .and_then(|value| Some(value.get("message")?.as_str()?.to_owned()))
            .unwrap_or_else(|| text.chars().take(400).collect());
        Err(ClientError::Refused { status, message })
    }

    fn parsed<T: DeserializeOwned>(&self, url: &str, mut body: ureq::Body) -> Result<T, ClientError> {
        let garbled = |reason: String| ClientError::Garbled { url: url.to_owned(), reason };
        let text = body.with_config().limit(BODY_BYTES_MAX).read_to_string().map_err(|error| garbled(error.to_string()))?;
        serde_json::from_str(&text).map_err(|error| garbled(error.to_string()))
    }
}

fn agent(user_agent: &str) -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_connect(Some(Duration::from_secs(5)))
        .user_agent(user_agent)
        .build()
        .into()
}

/// Whose agent is spoken to, and as whom.
#[derive(Debug, Clone)]
pub struct Target {
    /// The sandbox.
    pub id: String,
    /// Its envd token, when it is secure.
    pub token: Option<String>,
    /// A user inside; `None` = the template's default.
    pub user: Option<String>,
}

impl Target {
    /// The headers that lead to this sandbox's agent and name who asks.
    fn addressed<B>(&self, request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
        self.addressed_at(AGENT_PORT, request)
    }

    /// As [`Target::addressed`], for another port of the sandbox.
    fn addressed_at<B>(&self, port: u16, mut request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
        request = request.header("E2b-Sandbox-Id", &self.id).header("E2b-Sandbox-Port", port.to_string());
        if let Some(token) = &self.token {
            request = request.header("X-Access-Token", token);
        }
        if let Some(user) = &self.user {
            use base64::Engine as _;
            let value = base64::engine::general_purpose::STANDARD.encode(format!("{user}:"));
            request = request.header("Authorization", format!("Basic {value}"));
        }
        request
    }
}

/// Where the server of `config` is reached from this machine.
pub(super) fn base_url(config: &Config) -> String {
    let address = config.listen.addresses[0];
    match (address.ip().is_loopback(), address.ip().is_unspecified()) {
        (true, _) | (_, true) => format!("http://localhost:{}", address.port()),
        _ => format!("http://{address}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ApiKey, Listen};
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;

    /// Answers one request per page and returns what was asked for.
    fn serve(listener: TcpListener, pages: &[(&str, &str)]) -> Vec<String> {
        let mut asked = Vec::new();
        for (token, body) in pages {
            let (stream, _client) = listener.accept().unwrap();
            let mut lines = BufReader::new(&stream).lines().map(Result::unwrap);
            asked.push(lines.next().unwrap());
            while !lines.next().unwrap().is_empty() {}
            let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\nx-next-token: {token}\r\ncontent-length: {}\r\n\r\n", body.len());
            (&stream).write_all((head + body).as_bytes()).unwrap();
        }
        asked
    }

    #[test]
    fn a_list_of_many_pages_is_read_to_its_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let config = Config {
            listen: Listen { addresses: vec![listener.local_addr().unwrap()] },
            api_key: Some(ApiKey("key".to_owned())),
            ..Config::default()
        };
        let server = std::thread::spawn(|| serve(listener, &[("a=b", "[1, 2]"), ("", "[3]")]));
        assert_eq!(Client::new(&config).unwrap().all::<u32>("/things?limit=2").unwrap(), [1, 2, 3]);
        assert_eq!(server.join().unwrap(), ["GET /things?limit=2 HTTP/1.1", "GET /things?limit=2&nextToken=a%3Db HTTP/1.1"]);
    }
}
