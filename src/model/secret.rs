//! Stored secrets: values that requests of a sandbox carry and that nothing inside it ever sees.

use super::SecretId;
use std::collections::BTreeMap;
use std::fmt;
use time::OffsetDateTime;

/// One stored secret as it is now; earlier values are not kept.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretRecord {
    /// Its id.
    pub id: SecretId,
    /// Unique.
    pub name: String,
    /// Never returned by any API, never logged.
    pub value: String,
    /// 1 for the first value, one more for each that took its place.
    pub version: u32,
    /// Free text of the user's.
    pub metadata: BTreeMap<String, String>,
    /// Names that its placeholder is replaced for: each exact, or with a leading `*.` everything below. Lower case.
    pub hosts: Vec<String>,
    /// What stands for the value inside a sandbox.
    pub placeholder: String,
    /// Free text of the user's.
    pub description: Option<String>,
    /// When it was first stored.
    pub created_at: OffsetDateTime,
    /// When its value was last replaced.
    pub updated_at: OffsetDateTime,
}

impl fmt::Debug for SecretRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretRecord")
            .field("id", &self.id)
            .field("name", &self.name)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}
