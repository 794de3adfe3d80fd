//! Stored secrets: kept in the store, told to the runtime after every change, so that requests carry the value of now.

use super::core::Core;
use super::error::StoreFailure;
use crate::model::{SecretId, SecretRecord};
use crate::store::{Db, StoreError, secrets};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Secrets of one server; each is in its memory.
const SECRETS_MAX: usize = 1000;
/// Bytes of a value: what a header of a request may hold.
const VALUE_BYTES_MAX: usize = 8 << 10;

/// What a new secret is made from.
#[derive(Debug, Clone)]
pub struct NewSecret {
    /// Its name; must not be another's.
    pub name: String,
    /// What is kept.
    pub content: SecretContent,
}

/// A value and what goes with it.
#[derive(Clone)]
pub struct SecretContent {
    /// The secret itself.
    pub value: String,
    /// `None` leaves what there is.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Names that its placeholder is replaced for; `None` leaves what there is.
    pub hosts: Option<Vec<String>>,
    /// `None` leaves what there is.
    pub description: Option<String>,
}

impl std::fmt::Debug for SecretContent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SecretContent").field("hosts", &self.hosts).finish_non_exhaustive()
    }
}

/// Why a secret was not stored, found or removed.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// There is one of this name.
    #[error("secret '{0}' exists already; update it, or delete it first")]
    Taken(String),
    /// There is none of this id or name.
    #[error("secret '{0}' does not exist")]
    Unknown(String),
    /// The value has no bytes, too many, or some that no header can carry.
    #[error("the secret's value has {0} bytes; it must have 1 to {VALUE_BYTES_MAX}, all of them printable")]
    Value(usize),
    /// There are as many as there may be.
    #[error("there are {SECRETS_MAX} secrets already; delete some")]
    TooMany,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreFailure),
}

/// Tells the runtime what there is.
pub(super) async fn publish(core: &Core) -> Result<(), StoreFailure> {
    core.runtime.set_secrets(core.store.read(secrets::all).await?);
    Ok(())
}

/// Stores a new one.
pub(super) async fn create(core: &Core, new: NewSecret) -> Result<SecretRecord, SecretError> {
    check(&new.content.value)?;
    let now = core.clock.now();
    let record = SecretRecord {
        id: SecretId::random(),
        name: new.name,
        value: new.content.value,
        version: 1,
        metadata: new.content.metadata.unwrap_or_default(),
        hosts: new.content.hosts.unwrap_or_default(),
        placeholder: format!("secret_placeholder_{}", &SecretId::random().as_str()["sec_".len()..]),
        description: new.content.description,
        created_at: now,
        updated_at: now,
    };
    change(core, move |db| {
        if secrets::find(db, &record.name)?.is_some() {
            return Ok(Err(SecretError::Taken(record.name)));
        }
        if secrets::all(db)?.len() >= SECRETS_MAX {
            return Ok(Err(SecretError::TooMany));
        }
        secrets::put(db, &record)?;
        Ok(Ok(record))
    })
    .await
}

/// Replaces the value of one by its id or name.
pub(super) async fn update(core: &Core, key: String, content: SecretContent) -> Result<SecretRecord, SecretError> {
    check(&content.value)?;
    let now = core.clock.now();
    change(core, move |db| {
        let Some(before) = secrets::find(db, &key)? else { return Ok(Err(SecretError::Unknown(key))) };
        let record = SecretRecord {
            value: content.value,
            version: before.version.saturating_add(1),
            metadata: content.metadata.unwrap_or(before.metadata),
            hosts: content.hosts.unwrap_or(before.hosts),
            description: content.description.or(before.description),
            updated_at: now,
            ..before
        };
        secrets::put(db, &record)?;
        Ok(Ok(record))
    })
    .await
}

/// Removes one by its id or name.
pub(super) async fn remove(core: &Core, key: String) -> Result<SecretRecord, SecretError> {
    change(core, move |db| Ok(secrets::remove(db, &key)?.ok_or(SecretError::Unknown(key)))).await
}

/// One by its id or name.
pub(super) async fn find(core: &Core, key: String) -> Result<SecretRecord, SecretError> {
    let asked = key.clone();
    let found = core.store.read(move |db| secrets::find(db, &asked)).await.map_err(StoreFailure::from)?;
    found.ok_or(SecretError::Unknown(key))
}

/// All of them, oldest first.
pub(super) async fn all(core: &Core) -> Result<Vec<SecretRecord>, StoreFailure> {
    Ok(core.store.read(secrets::all).await?)
}

/// Writes, then tells the runtime. One at a time: the last to tell has read what was written last.
async fn change<F>(core: &Core, write: F) -> Result<SecretRecord, SecretError>
where
    F: FnOnce(&Db<'_>) -> Result<Result<SecretRecord, SecretError>, StoreError> + Send + 'static,
{
    let telling = Arc::clone(&core.telling_secrets).lock_owned().await;
    let outcome = core.store.write(write).await.map_err(StoreFailure::from)?;
    publish(core).await?;
    drop(telling);
    outcome
}

/// A value goes into headers: what none can carry would be found out too late.
fn check(value: &str) -> Result<(), SecretError> {
    let is_fit = (1..=VALUE_BYTES_MAX).contains(&value.len()) && !value.chars().any(char::is_control);
    is_fit.then_some(()).ok_or(SecretError::Value(value.len()))
}
