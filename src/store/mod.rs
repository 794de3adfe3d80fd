//! The only SQL: one writer thread per database, a few read connections, numbered migrations.
//!
//! Two databases below `data_dir`: `stillbox.db` is the truth (sandboxes, templates, snapshots; WAL, synchronous=FULL:
//! what was answered survives a power cut), `history.db` holds metrics and logs (synchronous=NORMAL, bounded; the last
//! seconds may be lost). Callers pass a closure of this room's functions, which names the question:
//!
//! ```ignore
//! let record = store.read(move |db| sandboxes::by_id(db, id)).await?;
//! store.write(move |db| sandboxes::update(db, &record)).await?;
//! ```
//! One closure is one transaction. Knows no business rule and no HTTP.

pub mod builds;
mod database;
pub mod events;
pub mod history;
pub mod idempotency;
pub mod install;
mod lock;
mod migrate;
pub mod sandboxes;
pub mod secrets;
pub mod snapshots;
pub mod templates;
mod value;
pub mod volumes;

use crate::model::SandboxId;
use database::Database;
pub use history::HistoryLimits;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex};

/// Why the store could not answer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another server works on this data folder.
    #[error("data folder {} is in use by the server with pid {holder}; stop it or choose another data_dir", dir.display())]
    Locked {
        /// The folder.
        dir: PathBuf,
        /// What its lock file says.
        holder: String,
    },
    /// SQLite's own word.
    #[error("database {} failed", file.display())]
    Database {
        /// The file.
        file: PathBuf,
        /// Shared, because one failed commit answers several callers.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// Migrations only go forward.
    #[error("database {} has schema {found}, this stillbox knows {known}; use the newer stillbox that wrote it", file.display())]
    TooNew {
        /// The file.
        file: PathBuf,
        /// Its schema.
        found: usize,
        /// The newest that this binary knows.
        known: usize,
    },
    /// A column holds what this program never writes.
    #[error("{column} holds '{value}', which is not {expected}")]
    Corrupt {
        /// `table.column`.
        column: &'static str,
        /// What was met, shortened.
        value: String,
        /// What belongs there.
        expected: &'static str,
    },
    /// A file beside the databases.
    #[error("could not use {}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The writer or a reader is gone.
    #[error("the store is closed")]
    Closed,
    /// SQLite's word on one statement; becomes [`StoreError::Database`] where the file is known.
    #[error("statement failed")]
    Statement(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// An open transaction, or a reader's snapshot of the database: what this room's functions ask.
#[derive(Debug)]
pub struct Db<'a>(&'a rusqlite::Connection);

/// The open databases of a data folder, and the lock on it. Cheap to clone; the last clone's drop closes them.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

/// Fields drop in this order: the lock goes last.
#[derive(Debug)]
struct Inner {
    truth: Database,
    history: Database,
    limits: HistoryLimits,
    /// Samples of each sandbox since its oldest were last dropped.
    samples: Mutex<BTreeMap<SandboxId, u32>>,
    /// Batches of log lines.
    log_batches: AtomicU32,
    _lock: lock::DataDirLock,
}

impl Store {
    /// Locks `data_dir`, opens or makes its databases and brings them to the newest schema.
    pub fn open(data_dir: &Path) -> Result<Self, StoreError> {
        Self::open_with(data_dir, HistoryLimits::default())
    }

    /// [`Store::open`] with other bounds for metrics and logs.
    pub fn open_with(data_dir: &Path, limits: HistoryLimits) -> Result<Self, StoreError> {
        let lock = lock::DataDirLock::acquire(data_dir)?;
        let truth = Database::open(data_dir.join("stillbox.db"), migrate::TRUTH, database::Durability::EveryCommit)?;
        let history = Database::open(data_dir.join("history.db"), migrate::HISTORY, database::Durability::AtCheckpoints)?;
        Ok(Self {
            inner: Arc::new(Inner { truth, history, limits, samples: Mutex::default(), log_batches: AtomicU32::default(), _lock: lock }),
        })
    }

    /// Runs `question` in a write transaction of its own; an error undoes it. When this returns `Ok`, the change
    /// survives a power cut. Writes happen in the order of the calls; dropping the future does not stop the write.
    pub fn write<T, F>(&self, question: F) -> impl Future<Output = Result<T, StoreError>> + Send + 'static + use<T, F>
    where
        T: Send + 'static,
        F: FnOnce(&Db<'_>) -> Result<T, StoreError> + Send + 'static,
    {
        self.inner.truth.write(question)
    }

    /// Runs `question` on a read connection, on a snapshot that holds all writes answered before.
    pub async fn read<T, F>(&self, question: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&Db<'_>) -> Result<T, StoreError> + Send + 'static,
    {
        self.inner.truth.read(question).await
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(source: rusqlite::Error) -> Self {
        Self::Statement(Box::new(source))
    }
}
