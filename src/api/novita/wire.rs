//! What Novita's JSON has beyond E2B's, to the letter and without a rule.

use super::super::e2b::wire as e2b;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `POST /sandboxes`. The fields of 1.x and 2.x together.
#[derive(Default, Deserialize)]
pub(super) struct NewSandbox {
    #[serde(flatten)]
    pub(super) common: e2b::NewSandbox,
    /// How 1.x spells `allow_internet_access`.
    #[serde(rename = "allowInternetAccess")]
    pub(super) allow_internet_access: Option<bool>,
    #[serde(rename = "nodeID")]
    pub(super) node_id: Option<String>,
    pub(super) secrets: Option<BTreeMap<String, String>>,
}

/// `POST /secrets`.
#[derive(Deserialize)]
pub(super) struct NewSecret {
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) content: SecretContent,
}

/// `PUT /secrets/{name}`.
#[derive(Deserialize)]
pub(super) struct SecretContent {
    pub(super) value: String,
    pub(super) hosts: Vec<String>,
    pub(super) description: Option<String>,
}

/// A stored secret; the wire has no place for its value.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SecretBinding {
    pub(super) name: String,
    pub(super) hosts: Vec<String>,
    pub(super) placeholder: String,
    pub(super) has_secret: bool,
    pub(super) status: &'static str,
    pub(super) description: Option<String>,
    pub(super) updated_at: e2b::Time,
}

/// The answer to `GET /secrets`.
#[derive(Debug, Serialize)]
pub(super) struct Secrets {
    pub(super) secrets: Vec<SecretBinding>,
}

/// The answer to `DELETE /secrets/{name}`.
#[derive(Debug, Serialize)]
pub(super) struct DeletedSecret {
    pub(super) deleted: String,
}

/// `POST /sandboxes/{id}/connect` and `/resume`, of all versions.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Connect {
    pub(super) timeout: Option<i64>,
    pub(super) auto_pause: Option<bool>,
    #[serde(flatten)]
    pub(super) access: Access,
}

/// Who may reach the sandbox from now on.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Access {
    pub(super) secure: Option<bool>,
    pub(super) allow_public_traffic: Option<bool>,
    pub(super) network: Option<AccessNetwork>,
}

/// The older way to say `allowPublicTraffic`.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct AccessNetwork {
    pub(super) allow_public_traffic: Option<bool>,
}

/// `POST /sandboxes/{id}/reset`.
#[derive(Default, Deserialize)]
pub(super) struct Reset {
    pub(super) resume: Option<bool>,
    pub(super) timeout: Option<i64>,
    #[serde(flatten)]
    pub(super) access: Access,
}

/// The answer to a reset; only with a token.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct WasReset {
    pub(super) traffic_access_token: String,
}

/// `POST /sandboxes/{id}/hotplug-memory`.
#[derive(Default, Deserialize)]
pub(super) struct HotplugMemory {
    #[serde(default)]
    pub(super) requested_size_mib: i64,
}

/// `POST /volumes`.
#[derive(Debug, Deserialize)]
pub(super) struct NewVolume {
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) quota: VolumeQuota,
}

/// `PATCH /volumes/{id}`. Clients send a number of files too, a thousand for each GiB.
#[derive(Debug, Default, Deserialize)]
pub(super) struct VolumeQuota {
    #[serde(rename = "quotaSizeGiB")]
    pub(super) quota_size_gib: Option<i64>,
}

/// What a volume may hold, and what it holds.
#[derive(Debug, Serialize)]
pub(super) struct VolumeUsage {
    #[serde(rename = "quotaSizeGiB")]
    pub(super) quota_size_gib: u64,
    #[serde(rename = "usedSizeBytes")]
    pub(super) used_size_bytes: u64,
}

/// An entry of `GET /volumes`.
#[derive(Debug, Serialize)]
pub(super) struct ListedVolume {
    #[serde(flatten)]
    pub(super) volume: e2b::Volume,
    #[serde(flatten)]
    pub(super) usage: VolumeUsage,
}

/// What the other calls of `/volumes` answer.
#[derive(Debug, Serialize)]
pub(super) struct VolumeWithQuota {
    #[serde(flatten)]
    pub(super) volume: e2b::VolumeAndToken,
    #[serde(flatten)]
    pub(super) usage: VolumeUsage,
}

/// What a sandbox has mounted now.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct VolumeMounts {
    pub(super) volume_mounts: Vec<e2b::VolumeMount>,
}

/// `POST /sandboxes/{id}/pause`; whether it waits for the image makes no difference here: it always does.
#[derive(Default, Deserialize)]
pub(super) struct Pause {
    #[serde(rename = "sync")]
    pub(super) _sync: Option<bool>,
}

/// `POST /sandboxes/{id}/clone`.
#[derive(Default, Deserialize)]
pub(super) struct Clone {
    pub(super) count: Option<i64>,
    pub(super) strict: Option<bool>,
    pub(super) timeout: Option<i64>,
    #[serde(rename = "nodeID")]
    pub(super) node_id: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Cloned {
    pub(super) sandboxes: Vec<e2b::Sandbox>,
    pub(super) snapshot_template_id: Option<String>,
}

/// `POST /sandboxes/{id}/commit`.
#[derive(Default, Deserialize)]
pub(super) struct Commit {
    pub(super) alias: Option<String>,
}

/// A point in both families of units: bytes for 2.x, MiB for 1.x.
#[derive(Debug, Serialize)]
pub(super) struct Metric {
    #[serde(flatten)]
    pub(super) common: e2b::Metric,
    #[serde(rename = "memTotalMiB")]
    pub(super) mem_total_mib: u64,
    #[serde(rename = "memUsedMiB")]
    pub(super) mem_used_mib: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct LatestMetrics {
    pub(super) sandboxes: BTreeMap<String, Metric>,
}

/// `GET /v2/templates`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Templates {
    pub(super) templates: Vec<e2b::Template>,
    pub(super) total: usize,
    pub(super) page: u32,
    pub(super) limit: u32,
    pub(super) total_pages: u32,
}

/// `GET /sandboxes/quota`.
#[derive(Debug, Serialize)]
pub(super) struct Quota {
    pub(super) limit: QuotaLimit,
    pub(super) usage: QuotaUsage,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct QuotaLimit {
    pub(super) concurrent_instances: u32,
    pub(super) concurrent_vcpu: u64,
    pub(super) concurrent_ram_mb: u64,
    pub(super) max_length_hours: u64,
    pub(super) disk_mb: u64,
    pub(super) max_vcpu: u64,
    pub(super) max_ram_mb: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct QuotaUsage {
    pub(super) concurrent_instances: u32,
    pub(super) concurrent_vcpu: u64,
    pub(super) concurrent_ram_mb: u64,
}

/// `GET /sandboxes/events`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Events {
    pub(super) items: Vec<Event>,
    pub(super) total: u64,
    pub(super) has_more: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct Event {
    #[serde(rename = "eventID")]
    pub(super) event_id: String,
    /// Unix seconds.
    #[serde(rename = "recordAt")]
    pub(super) record_at: i64,
    #[serde(rename = "templateID")]
    pub(super) template_id: String,
    #[serde(rename = "templateName")]
    pub(super) template_name: String,
    #[serde(rename = "sandboxID")]
    pub(super) sandbox_id: String,
    #[serde(rename = "eventName")]
    pub(super) event_name: &'static str,
    pub(super) state: &'static str,
    #[serde(rename = "errorMsg")]
    pub(super) error_msg: String,
    #[serde(rename = "statusCode")]
    pub(super) status_code: u16,
}
