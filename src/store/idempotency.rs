//! Keys by which a create request that is sent twice makes one sandbox.

use super::value::{micros, parsed_in};
use super::{Db, StoreError};
use crate::model::SandboxId;
use rusqlite::{OptionalExtension, params};
use time::OffsetDateTime;

/// What an earlier request with the same key was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Hash of that request.
    pub request_hash: String,
    /// The sandbox that it made.
    pub sandbox: SandboxId,
}

/// The request that used this key first, if its sandbox's row is still there.
pub fn seen(db: &Db<'_>, key: &str) -> Result<Option<Seen>, StoreError> {
    let mut statement = db.0.prepare_cached("SELECT request_hash, sandbox FROM idempotency_keys WHERE key = ?1")?;
    let seen = statement.query_row([key], |row| Ok((row.get("request_hash")?, parsed_in(row, "sandbox")))).optional()?;
    seen.map(|(request_hash, sandbox)| Ok(Seen { request_hash, sandbox: sandbox? })).transpose()
}

/// Remembers a key that was not seen; in the same transaction as the sandbox's row.
pub fn remember(db: &Db<'_>, key: &str, request_hash: &str, sandbox: SandboxId, at: OffsetDateTime) -> Result<(), StoreError> {
    let sql = "INSERT INTO idempotency_keys (key, request_hash, sandbox, created_at) VALUES (?1, ?2, ?3, ?4)";
    db.0.prepare_cached(sql)?.execute(params![key, request_hash, sandbox.as_str(), micros(at)])?;
    Ok(())
}

/// Frees the keys of a sandbox that never came to be, so that the request may be tried again.
pub fn forget(db: &Db<'_>, sandbox: SandboxId) -> Result<(), StoreError> {
    db.0.prepare_cached("DELETE FROM idempotency_keys WHERE sandbox = ?1")?.execute([sandbox.as_str()])?;
    Ok(())
}
