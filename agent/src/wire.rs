//! What the host and the agent say to each other besides envd's public wire: serde types and names, no behaviour.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Reported as `envdVersion`: the newest behaviour gate of the SDKs that the agent fulfils.
pub const ENVD_VERSION: &str = "0.6.13";
/// Where the agent listens inside the sandbox.
pub const AGENT_PORT: u16 = 49983;
/// Where the agent serves the code interpreter, in templates that have one.
pub const INTERPRETER_PORT: u16 = 49999;
/// Carries the control secret on [`INIT_PATH`] and [`LOGS_PATH`].
pub const CONTROL_HEADER: &str = "x-stillbox-control";
/// POST [`InitRequest`] as JSON; 204 when all of it holds, 400 or 401 when nothing has changed.
pub const INIT_PATH: &str = "/init";
/// GET with `?cursor=<seq>`: one [`LogEntry`] per line, those with a larger `seq`.
pub const LOGS_PATH: &str = "/stillbox/logs";
/// Before every path of HopX's in-sandbox API. The host takes no request below it but those that it lets through itself.
pub const HOPX_PREFIX: &str = "/stillbox/hopx";
/// The folder of the agent's own small files; part of the agent's layer.
pub const RUN_DIR: &str = "/run/stillbox";
/// Written in place by /init: the runtime binds this file over /proc/sys/kernel/random/boot_id.
pub const BOOT_ID_PATH: &str = "/run/stillbox/boot_id";
/// Written by /init: changes with every create, fork and resume.
pub const GENERATION_PATH: &str = "/run/stillbox/generation";
/// Length of a control secret in hex characters. At start the agent reads one from fd 0, ended by a newline or EOF.
pub const CONTROL_SECRET_LEN: usize = 64;

/// Everything that names one sandbox. It may come again at any time, since create and fork restore one dump many times.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InitRequest {
    /// The secret that the next /init has to present: 64 hex characters.
    pub control_secret: String,
    pub sandbox_id: String,
    pub template_id: String,
    /// None leaves envd's wire open (a sandbox created with `secure: false`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// The sandbox's own variables; they win over the template's.
    #[serde(default)]
    pub env_vars: BTreeMap<String, String>,
    #[serde(default)]
    pub template_env: BTreeMap<String, String>,
    pub default_user: String,
    /// Empty means the default user's home.
    #[serde(default)]
    pub default_workdir: String,
    pub hostname: String,
    /// 32 hex characters.
    pub machine_id: String,
    /// A UUID. A memory resume repeats the old one, a cold boot brings a new one.
    pub boot_id: String,
    /// The whole content of /etc/hosts.
    pub hosts: String,
    /// The whole content of /etc/resolv.conf.
    pub resolv_conf: String,
    /// CAs that the sandbox trusts beside the image's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_bundle_pem: Option<String>,
    /// Where programs inside look for `*.localhost`, and where it really is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub front: Option<Front>,
    pub generation: u64,
    /// Base64 of 32 random bytes, mixed into the kernel's pool.
    pub entropy: String,
    /// The sandbox's limits, for GET /metrics; without them the machine's own numbers are reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_count: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Value of E2B_EVENTS_ADDRESS; the variable is absent without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub events_address: Option<String>,
}

/// The server's HTTPS as the sandbox sees it. Names below `.localhost` lead programs to their own loopback, by RFC 6761
/// and without asking anybody: the agent listens there and passes everything on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Front {
    /// The port on loopback that the agent takes.
    pub port: u16,
    /// Where its connections go: the slot's address, which serves the same port.
    pub to: SocketAddr,
}

/// Level of a [`LogEntry`], as E2B's log API spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Debug,
    Info,
    Warn,
    Error,
}

/// One line of [`LOGS_PATH`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// Counts up by one; a gap means that the ring overflowed between two polls.
    pub seq: u64,
    /// RFC 3339, UTC, of the wall clock inside.
    pub timestamp: String,
    pub level: LogLevel,
    pub message: String,
    #[serde(default)]
    pub fields: BTreeMap<String, String>,
}

/// GET /metrics.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Unix seconds.
    pub ts: i64,
    pub cpu_count: u32,
    /// Share of all CPUs together, 0 to 100, since the last call.
    pub cpu_used_pct: f64,
    pub mem_total: u64,
    pub mem_used: u64,
    pub mem_cache: u64,
    pub mem_total_mib: u64,
    pub mem_used_mib: u64,
    pub disk_used: u64,
    pub disk_total: u64,
}
