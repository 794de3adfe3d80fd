//! HopX's JSON, to the letter: field names and absences are its own, rules are elsewhere.

pub(super) mod builds;

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use time::OffsetDateTime;

/// A moment as RFC 3339 in UTC; Python's parser takes no more than microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Time(pub(super) OffsetDateTime);

impl Serialize for Time {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let utc = self.0.to_offset(time::UtcOffset::UTC);
        let whole = utc.replace_microsecond(utc.microsecond()).unwrap_or(utc);
        let text = whole.format(&time::format_description::well_known::Rfc3339).map_err(serde::ser::Error::custom)?;
        serializer.serialize_str(&text)
    }
}

/// `POST /v1/sandboxes`. Fields that are not named here mean nothing to this server.
#[derive(Debug, Default, Deserialize)]
pub(super) struct NewSandbox {
    pub(super) template_name: Option<String>,
    pub(super) template_id: Option<String>,
    pub(super) timeout_seconds: Option<i64>,
    pub(super) internet_access: Option<bool>,
    pub(super) env_vars: Option<BTreeMap<String, String>>,
}

/// `PUT /v1/sandboxes/{id}/timeout`.
#[derive(Debug, Deserialize)]
pub(super) struct SetTimeout {
    pub(super) timeout_seconds: i64,
}

/// What the clients want all three of, if any.
#[derive(Debug, Serialize)]
pub(super) struct Resources {
    pub(super) vcpu: u32,
    pub(super) memory_mb: u64,
    pub(super) disk_mb: u64,
}

/// A sandbox.
#[derive(Debug, Serialize)]
pub(super) struct Sandbox {
    pub(super) object: &'static str,
    pub(super) id: String,
    pub(super) status: &'static str,
    pub(super) organization_id: u32,
    pub(super) template_id: String,
    pub(super) template_name: Option<String>,
    pub(super) node_id: &'static str,
    pub(super) region: &'static str,
    pub(super) public_host: String,
    pub(super) direct_url: String,
    pub(super) resources: Resources,
    pub(super) internet_access: bool,
    pub(super) live_mode: bool,
    pub(super) timeout_seconds: u64,
    pub(super) expires_at: Time,
    pub(super) created_at: Time,
}

/// What create answers.
#[derive(Debug, Serialize)]
pub(super) struct NewSandboxAnswer {
    #[serde(flatten)]
    pub(super) sandbox: Sandbox,
    #[serde(flatten)]
    pub(super) token: Token,
}

/// A token for the API inside.
#[derive(Debug, Serialize)]
pub(super) struct Token {
    pub(super) auth_token: String,
    pub(super) token_expires_at: Time,
}

/// What pause, resume, stop and start answer.
#[derive(Debug, Serialize)]
pub(super) struct Status {
    pub(super) id: String,
    pub(super) status: &'static str,
}

/// What `PUT …/timeout` answers.
#[derive(Debug, Serialize)]
pub(super) struct NewTimeout {
    pub(super) id: String,
    pub(super) timeout_seconds: i64,
    pub(super) expires_at: Time,
}

/// What a removal answers.
#[derive(Debug, Serialize)]
pub(super) struct Deleted {
    pub(super) id: String,
    pub(super) deleted: bool,
}

/// A page of anything.
#[derive(Debug, Serialize)]
pub(super) struct List<T> {
    pub(super) object: &'static str,
    pub(super) data: Vec<T>,
    pub(super) has_more: bool,
    pub(super) next_cursor: Option<String>,
    pub(super) url: &'static str,
    pub(super) request_id: String,
}

/// A template's sizes, in the units that templates have.
#[derive(Debug, Serialize)]
pub(super) struct TemplateResources {
    pub(super) vcpu: u32,
    pub(super) memory_mb: u64,
    pub(super) disk_gb: u64,
}

/// A template. Python refuses `organization_id` unless it is a text, so it is left out.
#[derive(Debug, Serialize)]
pub(super) struct Template {
    pub(super) object: &'static str,
    pub(super) id: String,
    pub(super) name: String,
    pub(super) display_name: String,
    pub(super) status: &'static str,
    pub(super) is_active: bool,
    pub(super) is_public: bool,
    pub(super) build_id: Option<String>,
    pub(super) default_resources: Option<TemplateResources>,
    pub(super) features: Vec<String>,
    pub(super) tags: Vec<String>,
    pub(super) created_at: Time,
    pub(super) updated_at: Time,
}
