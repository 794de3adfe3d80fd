//! E2B's JSON of template builds, to the letter and without a rule.

use super::{Template, Time};
use serde::{Deserialize, Serialize};

/// `POST /v3/templates` and, without tags, `/v2/templates`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api::e2b) struct NewBuild {
    pub(in crate::api::e2b) name: Option<String>,
    pub(in crate::api::e2b) alias: Option<String>,
    pub(in crate::api::e2b) tags: Option<Vec<String>>,
    pub(in crate::api::e2b) cpu_count: Option<u32>,
    #[serde(rename = "memoryMB")]
    pub(in crate::api::e2b) memory_mb: Option<u64>,
}

/// The answer to both: newer clients read names and tags, older ones a whole template.
#[derive(Debug, Serialize)]
pub(in crate::api::e2b) struct RequestedBuild {
    #[serde(flatten)]
    pub(in crate::api::e2b) template: Template,
    pub(in crate::api::e2b) tags: Vec<String>,
}

/// `POST /v2/templates/{id}/builds/{build}`.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api::e2b) struct StartBuild {
    pub(in crate::api::e2b) from_image: Option<String>,
    pub(in crate::api::e2b) from_template: Option<String>,
    pub(in crate::api::e2b) from_image_registry: Option<ImageRegistry>,
    pub(in crate::api::e2b) force: Option<bool>,
    pub(in crate::api::e2b) steps: Option<Vec<Step>>,
    pub(in crate::api::e2b) start_cmd: Option<String>,
    pub(in crate::api::e2b) ready_cmd: Option<String>,
}

/// Without `Debug`, since it holds secrets.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", rename_all_fields = "camelCase")]
pub(in crate::api::e2b) enum ImageRegistry {
    Registry { username: String, password: String },
    Aws { aws_access_key_id: String, aws_secret_access_key: String, aws_region: String },
    Gcp { service_account_json: String },
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api::e2b) struct Step {
    #[serde(rename = "type")]
    pub(in crate::api::e2b) kind: String,
    pub(in crate::api::e2b) args: Option<Vec<String>>,
    pub(in crate::api::e2b) files_hash: Option<String>,
    pub(in crate::api::e2b) force: Option<bool>,
}

/// `GET /templates/{id}/builds/{build}/status`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api::e2b) struct BuildInfo {
    #[serde(rename = "templateID")]
    pub(in crate::api::e2b) template_id: String,
    #[serde(rename = "buildID")]
    pub(in crate::api::e2b) build_id: String,
    pub(in crate::api::e2b) status: crate::model::BuildState,
    /// Texts of builds that this server does not do.
    pub(in crate::api::e2b) logs: [String; 0],
    pub(in crate::api::e2b) log_entries: Vec<BuildLogEntry>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::api::e2b) reason: Option<BuildReason>,
}

#[derive(Debug, Serialize)]
pub(in crate::api::e2b) struct BuildLogEntry {
    pub(in crate::api::e2b) timestamp: Time,
    pub(in crate::api::e2b) level: crate::model::LogLevel,
    pub(in crate::api::e2b) message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::api::e2b) step: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::api::e2b) struct BuildReason {
    pub(in crate::api::e2b) message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::api::e2b) step: Option<String>,
    pub(in crate::api::e2b) log_entries: Vec<BuildLogEntry>,
}

/// `GET /templates/{id}/builds/{build}/logs`.
#[derive(Debug, Serialize)]
pub(in crate::api::e2b) struct BuildLogs {
    pub(in crate::api::e2b) logs: Vec<BuildLogEntry>,
}

/// `GET /templates/{id}/files/{hash}`.
#[derive(Debug, Serialize)]
pub(in crate::api::e2b) struct FileUpload {
    pub(in crate::api::e2b) present: bool,
    pub(in crate::api::e2b) url: String,
}

#[derive(Debug, Deserialize)]
pub(in crate::api::e2b) struct AssignTags {
    pub(in crate::api::e2b) target: String,
    pub(in crate::api::e2b) tags: Vec<String>,
}

#[derive(Debug, Serialize)]
pub(in crate::api::e2b) struct AssignedTags {
    pub(in crate::api::e2b) tags: Vec<String>,
    #[serde(rename = "buildID")]
    pub(in crate::api::e2b) build_id: String,
}

#[derive(Debug, Deserialize)]
pub(in crate::api::e2b) struct RemoveTags {
    pub(in crate::api::e2b) name: String,
    pub(in crate::api::e2b) tags: Vec<String>,
}

/// `PATCH /templates/{id}` and `/v2/templates/{id}`.
#[derive(Debug, Default, Deserialize)]
pub(in crate::api::e2b) struct UpdateTemplate {
    pub(in crate::api::e2b) public: Option<bool>,
}

#[derive(Debug, Serialize)]
pub(in crate::api::e2b) struct UpdatedTemplate {
    pub(in crate::api::e2b) names: Vec<String>,
}
