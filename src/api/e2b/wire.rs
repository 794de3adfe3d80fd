//! E2B's JSON, to the letter and without a rule. Fields that SDKs send and that change nothing here are left out.

pub(super) mod builds;

use serde::{Deserialize, Serialize, Serializer};
use std::collections::BTreeMap;
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

/// The version of envd's protocol that the agent speaks; SDKs switch features by it (contract e2b.md 3.6).
pub(in crate::api) const ENVD_VERSION: &str = "0.6.13";
/// A constant that old clients append to ids.
pub(in crate::api) const CLIENT_ID: &str = "6532622b";

/// A time as every client parses it: UTC, microseconds, `Z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::api) struct Time(pub(in crate::api) OffsetDateTime);

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const FORM: &[BorrowedFormatItem<'_>] = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");
        let text = self.0.to_offset(time::UtcOffset::UTC).format(FORM).map_err(serde::ser::Error::custom)?;
        serializer.serialize_str(&text)
    }
}

/// `POST /sandboxes` and `/v2/sandboxes`; the latter has no `secure`.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api) struct NewSandbox {
    #[serde(rename = "templateID")]
    pub(in crate::api) template_id: String,
    pub(in crate::api) timeout: Option<i64>,
    pub(in crate::api) auto_pause: Option<bool>,
    pub(in crate::api) auto_pause_memory: Option<bool>,
    pub(in crate::api) auto_resume: Option<AutoResume>,
    pub(in crate::api) secure: Option<bool>,
    #[serde(rename = "allow_internet_access")]
    pub(in crate::api) allow_internet_access: Option<bool>,
    pub(in crate::api) network: Option<Network>,
    pub(in crate::api) metadata: Option<BTreeMap<String, String>>,
    pub(in crate::api) env_vars: Option<BTreeMap<String, String>>,
    pub(in crate::api) iam: Option<Iam>,
    pub(in crate::api) volume_mounts: Option<Vec<VolumeMount>>,
}

#[derive(Debug, Default, Deserialize)]
pub(in crate::api) struct AutoResume {
    pub(in crate::api) enabled: bool,
}

#[derive(Debug, Default, Deserialize)]
pub(in crate::api) struct Iam {
    pub(in crate::api) tokens: Option<BTreeMap<String, serde_json::Value>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub(in crate::api) struct VolumeMount {
    pub(in crate::api) name: String,
    pub(in crate::api) path: String,
}

/// `POST /volumes`.
#[derive(Debug, Deserialize)]
pub(in crate::api) struct NewVolume {
    pub(in crate::api) name: String,
}

/// An entry of `GET /volumes`.
#[derive(Debug, Serialize)]
pub(in crate::api) struct Volume {
    #[serde(rename = "volumeID")]
    pub(in crate::api) volume_id: String,
    pub(in crate::api) name: String,
}

/// What `POST /volumes` and `GET /volumes/{id}` answer. Without `domain`: clients compose `api.<domain>` of their own.
#[derive(Debug, Serialize)]
pub(in crate::api) struct VolumeAndToken {
    #[serde(flatten)]
    pub(in crate::api) volume: Volume,
    pub(in crate::api) token: String,
}

/// What the content API tells of an entry. `ctime` is when it was made.
#[derive(Debug, Serialize)]
pub(in crate::api) struct VolumeEntry {
    pub(in crate::api) name: String,
    #[serde(rename = "type")]
    pub(in crate::api) kind: &'static str,
    pub(in crate::api) path: String,
    pub(in crate::api) size: u64,
    pub(in crate::api) mode: u32,
    pub(in crate::api) uid: u32,
    pub(in crate::api) gid: u32,
    pub(in crate::api) atime: Time,
    pub(in crate::api) mtime: Time,
    pub(in crate::api) ctime: Time,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::api) target: Option<String>,
}

/// `PATCH /volumecontent/{id}/path`.
#[derive(Debug, Default, Deserialize)]
pub(in crate::api) struct VolumeEntryUpdate {
    pub(in crate::api) uid: Option<u32>,
    pub(in crate::api) gid: Option<u32>,
    pub(in crate::api) mode: Option<u32>,
}

/// `network` of a create request.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api) struct Network {
    pub(in crate::api) allow_public_traffic: Option<bool>,
    pub(in crate::api) mask_request_host: Option<String>,
    #[serde(flatten)]
    pub(in crate::api) egress: Egress,
}

/// `PUT /sandboxes/{id}/network`.
#[derive(Default, Deserialize)]
pub(in crate::api) struct NetworkUpdate {
    pub(in crate::api) allow_internet_access: Option<bool>,
    #[serde(flatten)]
    pub(in crate::api) egress: Egress,
}

/// The half of a network policy that an update replaces.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api) struct Egress {
    pub(in crate::api) allow_out: Option<Vec<String>>,
    pub(in crate::api) deny_out: Option<Vec<String>>,
    pub(in crate::api) egress_proxy: Option<EgressProxy>,
    pub(in crate::api) rules: Option<BTreeMap<String, Vec<NetworkRule>>>,
    pub(in crate::api) dns_servers: Option<Vec<String>>,
    pub(in crate::api) https_ports: Option<Vec<u32>>,
}

/// Without `Debug`, since it holds a password.
#[derive(Default, Deserialize)]
pub(in crate::api) struct EgressProxy {
    pub(in crate::api) address: String,
    pub(in crate::api) username: Option<String>,
    pub(in crate::api) password: Option<String>,
    pub(in crate::api) tls: Option<EgressProxyTls>,
}

#[derive(Default, Deserialize)]
pub(in crate::api) struct EgressProxyTls {
    pub(in crate::api) enabled: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize)]
pub(in crate::api) struct NetworkRule {
    pub(in crate::api) transform: Option<NetworkTransform>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize)]
pub(in crate::api) struct NetworkTransform {
    pub(in crate::api) headers: Option<BTreeMap<String, String>>,
}

/// `POST /secrets`.
#[derive(Deserialize)]
pub(in crate::api) struct NewSecret {
    pub(in crate::api) name: String,
    pub(in crate::api) value: String,
    pub(in crate::api) metadata: Option<BTreeMap<String, String>>,
}

/// `POST /secrets/{id}`.
#[derive(Deserialize)]
pub(in crate::api) struct SecretUpdate {
    pub(in crate::api) value: String,
    pub(in crate::api) metadata: Option<BTreeMap<String, String>>,
}

/// A stored secret; the wire has no place for its value.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api) struct Secret {
    #[serde(rename = "secretID")]
    pub(in crate::api) secret_id: String,
    pub(in crate::api) name: String,
    pub(in crate::api) current_version: u32,
    pub(in crate::api) metadata: BTreeMap<String, String>,
    pub(in crate::api) created_at: Time,
    pub(in crate::api) updated_at: Time,
}

/// The answer to create, connect, resume and, per entry, fork.
#[derive(Debug, Serialize)]
pub(in crate::api) struct Sandbox {
    #[serde(rename = "templateID")]
    pub(in crate::api) template_id: String,
    #[serde(rename = "sandboxID")]
    pub(in crate::api) sandbox_id: String,
    #[serde(rename = "clientID")]
    pub(in crate::api) client_id: &'static str,
    #[serde(rename = "envdVersion")]
    pub(in crate::api) envd_version: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::api) alias: Option<String>,
    #[serde(rename = "envdAccessToken", skip_serializing_if = "Option::is_none")]
    pub(in crate::api) envd_access_token: Option<String>,
    #[serde(rename = "trafficAccessToken", skip_serializing_if = "Option::is_none")]
    pub(in crate::api) traffic_access_token: Option<String>,
    pub(in crate::api) domain: Option<String>,
}

/// An entry of a list.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api) struct ListedSandbox {
    #[serde(rename = "templateID")]
    pub(in crate::api) template_id: String,
    #[serde(rename = "sandboxID")]
    pub(in crate::api) sandbox_id: String,
    #[serde(rename = "clientID")]
    pub(in crate::api) client_id: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::api) alias: Option<String>,
    pub(in crate::api) started_at: Time,
    pub(in crate::api) end_at: Time,
    pub(in crate::api) cpu_count: u32,
    #[serde(rename = "memoryMB")]
    pub(in crate::api) memory_mb: u64,
    #[serde(rename = "diskSizeMB")]
    pub(in crate::api) disk_size_mb: u64,
    pub(in crate::api) metadata: BTreeMap<String, String>,
    pub(in crate::api) state: State,
    pub(in crate::api) envd_version: &'static str,
    pub(in crate::api) volume_mounts: Vec<VolumeMount>,
}

/// `GET /sandboxes/{id}`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api) struct SandboxDetail {
    #[serde(flatten)]
    pub(in crate::api) listed: ListedSandbox,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::api) envd_access_token: Option<String>,
    pub(in crate::api) domain: Option<String>,
    pub(in crate::api) allow_internet_access: Option<bool>,
    pub(in crate::api) network: ShownNetwork,
    pub(in crate::api) lifecycle: ShownLifecycle,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::api) pause_mode: Option<PauseMode>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::api) enum State {
    Running,
    Paused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::api) enum PauseMode {
    Full,
    Filesystem,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api) struct ShownLifecycle {
    pub(in crate::api) auto_resume: bool,
    pub(in crate::api) on_timeout: &'static str,
}

/// A network policy as it was set, without the proxy's password.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api) struct ShownNetwork {
    pub(in crate::api) allow_public_traffic: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(in crate::api) allow_out: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(in crate::api) deny_out: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::api) egress_proxy: Option<ShownEgressProxy>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::api) mask_request_host: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(in crate::api) rules: BTreeMap<String, Vec<NetworkRule>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::api) dns_servers: Option<Vec<std::net::Ipv4Addr>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(in crate::api) https_ports: Vec<u16>,
}

#[derive(Debug, Serialize)]
pub(in crate::api) struct ShownEgressProxy {
    pub(in crate::api) address: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::api) username: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(in crate::api) struct SetTimeout {
    pub(in crate::api) timeout: i64,
}

#[derive(Debug, Default, Deserialize)]
pub(in crate::api) struct Refresh {
    pub(in crate::api) duration: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
pub(in crate::api) struct Connect {
    pub(in crate::api) timeout: Option<i64>,
    pub(in crate::api) memory: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api) struct Resume {
    pub(in crate::api) timeout: Option<i64>,
    pub(in crate::api) auto_pause: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
pub(in crate::api) struct Pause {
    pub(in crate::api) memory: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
pub(in crate::api) struct Fork {
    pub(in crate::api) timeout: Option<i64>,
    pub(in crate::api) count: Option<i64>,
}

/// One copy, or why there is none.
#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::api) enum ForkResult {
    Sandbox(Box<Sandbox>),
    Error { code: u16, message: String },
}

#[derive(Debug, Default, Deserialize)]
pub(in crate::api) struct NewSnapshot {
    pub(in crate::api) name: Option<String>,
    pub(in crate::api) memory: Option<bool>,
}

#[derive(Debug, Serialize)]
pub(in crate::api) struct Snapshot {
    #[serde(rename = "snapshotID")]
    pub(in crate::api) snapshot_id: String,
    pub(in crate::api) names: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api) struct Metric {
    pub(in crate::api) timestamp: Time,
    pub(in crate::api) timestamp_unix: i64,
    pub(in crate::api) cpu_count: u32,
    pub(in crate::api) cpu_used_pct: f64,
    pub(in crate::api) mem_used: u64,
    pub(in crate::api) mem_total: u64,
    pub(in crate::api) mem_cache: u64,
    pub(in crate::api) disk_used: u64,
    pub(in crate::api) disk_total: u64,
}

#[derive(Debug, Serialize)]
pub(in crate::api) struct LatestMetrics {
    pub(in crate::api) sandboxes: BTreeMap<String, Metric>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api) struct Logs {
    pub(in crate::api) logs: Vec<LogLine>,
    pub(in crate::api) log_entries: Vec<LogEntry>,
}

#[derive(Debug, Serialize)]
pub(in crate::api) struct LogLine {
    pub(in crate::api) timestamp: Time,
    pub(in crate::api) line: String,
}

#[derive(Debug, Serialize)]
pub(in crate::api) struct LogsV2 {
    pub(in crate::api) logs: Vec<LogEntry>,
}

#[derive(Debug, Serialize)]
pub(in crate::api) struct LogEntry {
    pub(in crate::api) timestamp: Time,
    pub(in crate::api) message: String,
    pub(in crate::api) level: crate::model::LogLevel,
    pub(in crate::api) fields: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api) struct Template {
    #[serde(rename = "templateID")]
    pub(in crate::api) template_id: String,
    #[serde(rename = "buildID")]
    pub(in crate::api) build_id: String,
    pub(in crate::api) cpu_count: u32,
    #[serde(rename = "memoryMB")]
    pub(in crate::api) memory_mb: u64,
    #[serde(rename = "diskSizeMB")]
    pub(in crate::api) disk_size_mb: u64,
    pub(in crate::api) public: bool,
    pub(in crate::api) aliases: Vec<String>,
    pub(in crate::api) names: Vec<String>,
    pub(in crate::api) created_at: Time,
    pub(in crate::api) updated_at: Time,
    pub(in crate::api) created_by: Option<()>,
    pub(in crate::api) last_spawned_at: Option<Time>,
    pub(in crate::api) spawn_count: u64,
    pub(in crate::api) build_count: u64,
    pub(in crate::api) envd_version: &'static str,
    pub(in crate::api) build_status: crate::model::BuildState,
}

#[derive(Debug, Serialize)]
pub(in crate::api) struct TemplateWithBuilds {
    #[serde(flatten)]
    pub(in crate::api) template: Template,
    pub(in crate::api) builds: Vec<Build>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api) struct Build {
    #[serde(rename = "buildID")]
    pub(in crate::api) build_id: String,
    pub(in crate::api) status: crate::model::BuildState,
    pub(in crate::api) created_at: Time,
    pub(in crate::api) updated_at: Time,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::api) finished_at: Option<Time>,
    pub(in crate::api) cpu_count: u32,
    #[serde(rename = "memoryMB")]
    pub(in crate::api) memory_mb: u64,
    #[serde(rename = "diskSizeMB")]
    pub(in crate::api) disk_size_mb: u64,
    pub(in crate::api) envd_version: &'static str,
}

#[derive(Debug, Serialize)]
pub(in crate::api) struct AliasOwner {
    #[serde(rename = "templateID")]
    pub(in crate::api) template_id: String,
    pub(in crate::api) public: bool,
}

#[derive(Debug, Serialize)]
pub(in crate::api) struct Tag {
    pub(in crate::api) tag: String,
    #[serde(rename = "buildID")]
    pub(in crate::api) build_id: String,
    #[serde(rename = "createdAt")]
    pub(in crate::api) created_at: Time,
}

#[derive(Debug, Serialize)]
pub(in crate::api) struct Team {
    #[serde(rename = "teamID")]
    pub(in crate::api) team_id: &'static str,
    pub(in crate::api) name: &'static str,
    #[serde(rename = "apiKey")]
    pub(in crate::api) api_key: String,
    #[serde(rename = "isDefault")]
    pub(in crate::api) is_default: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_utc_with_microseconds() {
        let time = time::macros::datetime!(2026-01-02 03:04:05.000_006_999 +1);
        assert_eq!(serde_json::to_string(&Time(time)).unwrap(), "\"2026-01-02T02:04:05.000006Z\"");
    }

    #[test]
    fn a_fork_that_failed_is_an_error_entry() {
        let failed = ForkResult::Error { code: 429, message: "too many".into() };
        assert_eq!(serde_json::to_string(&failed).unwrap(), r#"{"error":{"code":429,"message":"too many"}}"#);
    }
}
