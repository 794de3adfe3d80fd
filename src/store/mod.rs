//! The only SQL. One writer thread, read connections, numbered migrations; WAL, synchronous=FULL.
//!
//! One function per question, named after it. Knows no business rule and no HTTP.

use std::path::Path;

/// Why the store could not answer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite's own word, with the file.
    #[error("{0}")]
    Sqlite(String),
}

/// The open database of a data folder. Cheap to clone; the last clone's drop closes it.
#[derive(Debug, Clone)]
pub struct Store {}

#[expect(unused_variables, reason = "signatures first; the store's owner fills them in")]
impl Store {
    /// Opens or makes `stillbox.db` in `data_dir` and brings it to the newest schema.
    pub fn open(data_dir: &Path) -> Result<Self, StoreError> {
        todo!()
    }
}
