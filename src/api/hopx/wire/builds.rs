//! HopX's JSON of builds. Its Python client takes no field in answers that it does not know.

use super::Time;
use serde::{Deserialize, Serialize};

/// `POST /v1/templates/files/upload-link`.
#[derive(Debug, Deserialize)]
pub(in super::super) struct UploadLink {
    pub(in super::super) files_hash: String,
}

/// Where to put an archive, unless it is there.
#[derive(Debug, Serialize)]
pub(in super::super) struct UploadPlace {
    pub(in super::super) present: bool,
    pub(in super::super) upload_url: Option<String>,
    pub(in super::super) expires_at: Time,
    pub(in super::super) files_hash: String,
}

/// `POST /v1/templates/build`.
#[derive(Debug, Default, Deserialize)]
pub(in super::super) struct NewBuild {
    pub(in super::super) name: Option<String>,
    pub(in super::super) from_image: Option<String>,
    pub(in super::super) steps: Option<Vec<Step>>,
    #[serde(rename = "startCmd")]
    pub(in super::super) start_cmd: Option<String>,
    #[serde(rename = "readyCmd")]
    pub(in super::super) ready_cmd: Option<ReadyCheck>,
    pub(in super::super) cpu: Option<u32>,
    pub(in super::super) memory: Option<u64>,
    #[serde(rename = "skipCache")]
    pub(in super::super) skip_cache: Option<bool>,
    pub(in super::super) update: Option<bool>,
    pub(in super::super) registry_credentials: Option<RegistryCredentials>,
}

/// One step of a build.
#[derive(Debug, Deserialize)]
pub(in super::super) struct Step {
    #[serde(rename = "type")]
    pub(in super::super) kind: String,
    pub(in super::super) args: Option<Vec<String>>,
    #[serde(rename = "filesHash")]
    pub(in super::super) files_hash: Option<String>,
    #[serde(rename = "skipCache")]
    pub(in super::super) skip_cache: Option<bool>,
}

/// When a start command counts as ready.
#[derive(Debug, Deserialize)]
pub(in super::super) struct ReadyCheck {
    #[serde(rename = "type")]
    pub(in super::super) kind: String,
    pub(in super::super) port: Option<u16>,
    pub(in super::super) url: Option<String>,
    pub(in super::super) path: Option<String>,
    #[serde(rename = "processName")]
    pub(in super::super) process_name: Option<String>,
    pub(in super::super) command: Option<String>,
}

/// For a private registry; all kinds of them come as a name and a password.
#[derive(Deserialize)]
pub(in super::super) struct RegistryCredentials {
    pub(in super::super) username: String,
    pub(in super::super) password: String,
}

impl std::fmt::Debug for RegistryCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryCredentials").field("username", &self.username).finish_non_exhaustive()
    }
}

/// What a start answers.
#[derive(Debug, Serialize)]
pub(in super::super) struct StartedBuild {
    pub(in super::super) build_id: String,
    pub(in super::super) template_id: String,
    pub(in super::super) status: &'static str,
    pub(in super::super) logs_url: String,
}

/// How far a build is.
#[derive(Debug, Serialize)]
pub(in super::super) struct BuildStatus {
    pub(in super::super) build_id: String,
    pub(in super::super) template_id: String,
    pub(in super::super) status: &'static str,
    pub(in super::super) progress: u8,
    pub(in super::super) started_at: Time,
    pub(in super::super) current_step: Option<String>,
    pub(in super::super) completed_at: Option<Time>,
    pub(in super::super) error_message: Option<String>,
    pub(in super::super) build_duration_ms: Option<u64>,
}
