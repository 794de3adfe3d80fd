//! E2B's JSON, to the letter and without a rule. Fields that SDKs send and that change nothing here are left out.

use serde::{Deserialize, Serialize, Serializer};
use std::collections::BTreeMap;
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

/// The version of envd's protocol that the agent speaks; SDKs switch features by it (contract e2b.md 3.6).
pub(super) const ENVD_VERSION: &str = "0.6.13";
/// A constant that old clients append to ids.
pub(super) const CLIENT_ID: &str = "6532622b";

/// A time as every client parses it: UTC, microseconds, `Z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Time(pub(super) OffsetDateTime);

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
pub(super) struct NewSandbox {
    #[serde(rename = "templateID")]
    pub(super) template_id: String,
    pub(super) timeout: Option<i64>,
    pub(super) auto_pause: Option<bool>,
    pub(super) auto_pause_memory: Option<bool>,
    pub(super) auto_resume: Option<AutoResume>,
    pub(super) secure: Option<bool>,
    #[serde(rename = "allow_internet_access")]
    pub(super) allow_internet_access: Option<bool>,
    pub(super) network: Option<Network>,
    pub(super) metadata: Option<BTreeMap<String, String>>,
    pub(super) env_vars: Option<BTreeMap<String, String>>,
    pub(super) iam: Option<Iam>,
    pub(super) volume_mounts: Option<Vec<VolumeMount>>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct AutoResume {
    pub(super) enabled: bool,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Iam {
    pub(super) tokens: Option<BTreeMap<String, serde_json::Value>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct VolumeMount {
    pub(super) name: String,
    pub(super) path: String,
}

/// `network` of a create request.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Network {
    pub(super) allow_public_traffic: Option<bool>,
    pub(super) mask_request_host: Option<String>,
    #[serde(flatten)]
    pub(super) egress: Egress,
}

/// `PUT /sandboxes/{id}/network`.
#[derive(Default, Deserialize)]
pub(super) struct NetworkUpdate {
    pub(super) allow_internet_access: Option<bool>,
    #[serde(flatten)]
    pub(super) egress: Egress,
}

/// The half of a network policy that an update replaces.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Egress {
    pub(super) allow_out: Option<Vec<String>>,
    pub(super) deny_out: Option<Vec<String>>,
    pub(super) egress_proxy: Option<EgressProxy>,
    pub(super) rules: Option<BTreeMap<String, Vec<NetworkRule>>>,
    pub(super) dns_servers: Option<Vec<String>>,
    pub(super) https_ports: Option<Vec<u32>>,
}

/// Without `Debug`, since it holds a password.
#[derive(Default, Deserialize)]
pub(super) struct EgressProxy {
    pub(super) address: String,
    pub(super) username: Option<String>,
    pub(super) password: Option<String>,
    pub(super) tls: Option<EgressProxyTls>,
}

#[derive(Default, Deserialize)]
pub(super) struct EgressProxyTls {
    pub(super) enabled: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize)]
pub(super) struct NetworkRule {
    pub(super) transform: Option<NetworkTransform>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize)]
pub(super) struct NetworkTransform {
    pub(super) headers: Option<BTreeMap<String, String>>,
}

/// The answer to create, connect, resume and, per entry, fork.
#[derive(Debug, Serialize)]
pub(super) struct Sandbox {
    #[serde(rename = "templateID")]
    pub(super) template_id: String,
    #[serde(rename = "sandboxID")]
    pub(super) sandbox_id: String,
    #[serde(rename = "clientID")]
    pub(super) client_id: &'static str,
    #[serde(rename = "envdVersion")]
    pub(super) envd_version: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) alias: Option<String>,
    #[serde(rename = "envdAccessToken", skip_serializing_if = "Option::is_none")]
    pub(super) envd_access_token: Option<String>,
    #[serde(rename = "trafficAccessToken", skip_serializing_if = "Option::is_none")]
    pub(super) traffic_access_token: Option<String>,
    pub(super) domain: Option<String>,
}

/// An entry of a list.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ListedSandbox {
    #[serde(rename = "templateID")]
    pub(super) template_id: String,
    #[serde(rename = "sandboxID")]
    pub(super) sandbox_id: String,
    #[serde(rename = "clientID")]
    pub(super) client_id: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) alias: Option<String>,
    pub(super) started_at: Time,
    pub(super) end_at: Time,
    pub(super) cpu_count: u32,
    #[serde(rename = "memoryMB")]
    pub(super) memory_mb: u64,
    #[serde(rename = "diskSizeMB")]
    pub(super) disk_size_mb: u64,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) state: State,
    pub(super) envd_version: &'static str,
    pub(super) volume_mounts: Vec<VolumeMount>,
}

/// `GET /sandboxes/{id}`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SandboxDetail {
    #[serde(flatten)]
    pub(super) listed: ListedSandbox,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) envd_access_token: Option<String>,
    pub(super) domain: Option<String>,
    pub(super) allow_internet_access: Option<bool>,
    pub(super) network: ShownNetwork,
    pub(super) lifecycle: ShownLifecycle,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pause_mode: Option<PauseMode>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    Running,
    Paused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum PauseMode {
    Full,
    Filesystem,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ShownLifecycle {
    pub(super) auto_resume: bool,
    pub(super) on_timeout: &'static str,
}

/// A network policy as it was set, without the proxy's password.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ShownNetwork {
    pub(super) allow_public_traffic: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) allow_out: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) deny_out: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) egress_proxy: Option<ShownEgressProxy>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) mask_request_host: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) rules: BTreeMap<String, Vec<NetworkRule>>,
}

#[derive(Debug, Serialize)]
pub(super) struct ShownEgressProxy {
    pub(super) address: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) username: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct SetTimeout {
    pub(super) timeout: i64,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Refresh {
    pub(super) duration: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Connect {
    pub(super) timeout: Option<i64>,
    pub(super) memory: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Resume {
    pub(super) timeout: Option<i64>,
    pub(super) auto_pause: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Pause {
    pub(super) memory: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Fork {
    pub(super) timeout: Option<i64>,
    pub(super) count: Option<i64>,
}

/// One copy, or why there is none.
#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ForkResult {
    Sandbox(Box<Sandbox>),
    Error { code: u16, message: String },
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct NewSnapshot {
    pub(super) name: Option<String>,
    pub(super) memory: Option<bool>,
}

#[derive(Debug, Serialize)]
pub(super) struct Snapshot {
    #[serde(rename = "snapshotID")]
    pub(super) snapshot_id: String,
    pub(super) names: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Metric {
    pub(super) timestamp: Time,
    pub(super) timestamp_unix: i64,
    pub(super) cpu_count: u32,
    pub(super) cpu_used_pct: f64,
    pub(super) mem_used: u64,
    pub(super) mem_total: u64,
    pub(super) mem_cache: u64,
    pub(super) disk_used: u64,
    pub(super) disk_total: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct LatestMetrics {
    pub(super) sandboxes: BTreeMap<String, Metric>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Logs {
    pub(super) logs: Vec<LogLine>,
    pub(super) log_entries: Vec<LogEntry>,
}

#[derive(Debug, Serialize)]
pub(super) struct LogLine {
    pub(super) timestamp: Time,
    pub(super) line: String,
}

#[derive(Debug, Serialize)]
pub(super) struct LogsV2 {
    pub(super) logs: Vec<LogEntry>,
}

#[derive(Debug, Serialize)]
pub(super) struct LogEntry {
    pub(super) timestamp: Time,
    pub(super) message: String,
    pub(super) level: crate::model::LogLevel,
    pub(super) fields: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Template {
    #[serde(rename = "templateID")]
    pub(super) template_id: String,
    #[serde(rename = "buildID")]
    pub(super) build_id: String,
    pub(super) cpu_count: u32,
    #[serde(rename = "memoryMB")]
    pub(super) memory_mb: u64,
    #[serde(rename = "diskSizeMB")]
    pub(super) disk_size_mb: u64,
    pub(super) public: bool,
    pub(super) aliases: Vec<String>,
    pub(super) names: Vec<String>,
    pub(super) created_at: Time,
    pub(super) updated_at: Time,
    pub(super) created_by: Option<()>,
    pub(super) last_spawned_at: Option<Time>,
    pub(super) spawn_count: u64,
    pub(super) build_count: u64,
    pub(super) envd_version: &'static str,
    pub(super) build_status: crate::model::BuildState,
}

#[derive(Debug, Serialize)]
pub(super) struct TemplateWithBuilds {
    #[serde(flatten)]
    pub(super) template: Template,
    pub(super) builds: Vec<Build>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Build {
    #[serde(rename = "buildID")]
    pub(super) build_id: String,
    pub(super) status: crate::model::BuildState,
    pub(super) created_at: Time,
    pub(super) updated_at: Time,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) finished_at: Option<Time>,
    pub(super) cpu_count: u32,
    #[serde(rename = "memoryMB")]
    pub(super) memory_mb: u64,
    #[serde(rename = "diskSizeMB")]
    pub(super) disk_size_mb: u64,
    pub(super) envd_version: &'static str,
}

#[derive(Debug, Serialize)]
pub(super) struct AliasOwner {
    #[serde(rename = "templateID")]
    pub(super) template_id: String,
    pub(super) public: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct Tag {
    pub(super) tag: String,
    #[serde(rename = "buildID")]
    pub(super) build_id: String,
    #[serde(rename = "createdAt")]
    pub(super) created_at: Time,
}

#[derive(Debug, Serialize)]
pub(super) struct Team {
    #[serde(rename = "teamID")]
    pub(super) team_id: &'static str,
    pub(super) name: &'static str,
    #[serde(rename = "apiKey")]
    pub(super) api_key: String,
    #[serde(rename = "isDefault")]
    pub(super) is_default: bool,
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
