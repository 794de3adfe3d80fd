//! One SQLite file: its writer thread with group commit, and its read connections.

use super::{Db, StoreError, migrate};
use rusqlite::{Connection, OpenFlags};
use std::fs::{self, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Transactions that may share one commit, and so one fsync.
const BATCH_MAX: usize = 128;
/// Read connections kept open; more are opened while more readers are at work, and closed afterwards.
const READERS_KEPT: usize = 4;
/// How long a connection waits for SQLite's locks; only a foreign process (a backup) can hold them.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// What a commit survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Durability {
    /// A power cut: fsync per commit.
    EveryCommit,
    /// A death of the process; a power cut loses what came after the last checkpoint.
    AtCheckpoints,
}

/// A write waiting for its turn: runs inside the batch's transaction, then says what to do at its end.
type Job = Box<dyn FnOnce(&Connection) -> AfterCommit + Send>;
/// Answers the caller, once it is known whether the batch was committed.
type AfterCommit = Box<dyn FnOnce(Result<(), Arc<rusqlite::Error>>) + Send>;

#[derive(Debug)]
pub(super) struct Database {
    file: PathBuf,
    /// `None` only while dropping: closing the channel ends the thread.
    jobs: Option<mpsc::Sender<Job>>,
    writer: Option<JoinHandle<()>>,
    readers: Arc<Mutex<Vec<Connection>>>,
}

impl Database {
    pub(super) fn open(file: PathBuf, migrations: &[&str], durability: Durability) -> Result<Self, StoreError> {
        make_private(&file).map_err(|source| StoreError::File { file: file.clone(), source })?;
        let failed = |source: rusqlite::Error| in_file(&file, source);
        let mut connection = Connection::open(&file).map_err(failed)?;
        prepare(&connection, durability).map_err(failed)?;
        migrate::to_newest(&mut connection, &file, migrations)?;
        let (jobs, queue) = mpsc::channel::<Job>();
        let name = file.file_stem().map_or_else(|| "store".into(), |stem| stem.to_string_lossy().into_owned());
        let writer = std::thread::Builder::new()
            .name(format!("store-{name}"))
            .spawn(move || write_batches(&connection, &queue))
            .map_err(|source| StoreError::File { file: file.clone(), source })?;
        Ok(Self { file, jobs: Some(jobs), writer: Some(writer), readers: Arc::default() })
    }

    /// Queued when this returns; the future only waits for the commit.
    pub(super) fn write<T, F>(&self, question: F) -> impl Future<Output = Result<T, StoreError>> + Send + 'static + use<T, F>
    where
        T: Send + 'static,
        F: FnOnce(&Db<'_>) -> Result<T, StoreError> + Send + 'static,
    {
        let (answer, answered) = tokio::sync::oneshot::channel();
        let file = self.file.clone();
        self.enqueue(Box::new(move |connection| {
            let result = in_savepoint(connection, question);
            Box::new(move |commit| {
                let result = match commit {
                    Ok(()) => result.map_err(|error| named(error, &file)),
                    Err(source) => Err(StoreError::Database { file, source }),
                };
                let _caller_may_be_gone = answer.send(result);
            })
        }));
        async { answered.await.map_err(|_| StoreError::Closed)? }
    }

    /// A write that nobody waits for; its failure is logged.
    pub(super) fn write_later<F>(&self, question: F)
    where
        F: FnOnce(&Db<'_>) -> Result<(), StoreError> + Send + 'static,
    {
        let file = self.file.clone();
        self.enqueue(Box::new(move |connection| {
            let result = in_savepoint(connection, question);
            Box::new(move |commit| {
                let result = match commit {
                    Ok(()) => result.map_err(|error| named(error, &file)),
                    Err(source) => Err(StoreError::Database { file, source }),
                };
                if let Err(error) = result {
                    tracing::warn!(error = &error as &dyn std::error::Error, "Lost a write that nobody waits for");
                }
            })
        }));
    }

    /// A caller whose job is dropped sees its channel close: that is its answer.
    fn enqueue(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            let _closed_is_answered_by_drop = jobs.send(job);
        }
    }

    pub(super) async fn read<T, F>(&self, question: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&Db<'_>) -> Result<T, StoreError> + Send + 'static,
    {
        let (file, readers) = (self.file.clone(), Arc::clone(&self.readers));
        let done = tokio::task::spawn_blocking(move || {
            let kept = lock(&readers).pop();
            let connection = match kept {
                Some(connection) => connection,
                None => open_reader(&file).map_err(|source| in_file(&file, source))?,
            };
            let result = in_snapshot(&connection, question).map_err(|error| named(error, &file));
            let mut kept = lock(&readers);
            if kept.len() < READERS_KEPT {
                kept.push(connection);
            }
            result
        });
        done.await.map_err(|_| StoreError::Closed)?
    }
}

impl Drop for Database {
    /// Waits for the writes that were asked for: a clean stop loses nothing.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(writer) = self.writer.take()
            && writer.thread().id() != std::thread::current().id()
            && writer.join().is_err()
        {
            tracing::error!(file = %self.file.display(), "The store's writer thread panicked");
        }
    }
}

fn lock(readers: &Mutex<Vec<Connection>>) -> std::sync::MutexGuard<'_, Vec<Connection>> {
    readers.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Rows hold the values of secrets, and the data folder may be one that others may enter. SQLite gives the files beside
/// a database the database's own mode; those that a server left when it was killed may be of before that.
fn make_private(file: &Path) -> io::Result<()> {
    let private = || Permissions::from_mode(0o600);
    let database = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(file)?;
    database.set_permissions(private())?;
    for suffix in ["-wal", "-shm"] {
        let mut beside = file.as_os_str().to_owned();
        beside.push(suffix);
        match fs::set_permissions(beside, private()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

fn prepare(connection: &Connection, durability: Durability) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    let synchronous = match durability {
        Durability::EveryCommit => "FULL",
        Durability::AtCheckpoints => "NORMAL",
    };
    connection.pragma_update(None, "synchronous", synchronous)?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // Secrets and snapshots' rows are deleted for good.
    connection.pragma_update(None, "secure_delete", "FAST")?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(())
}

fn open_reader(file: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

/// The writer thread: takes whatever is queued, runs it in one transaction, commits, answers. A failed job undoes
/// itself alone; a failed commit fails all jobs of the batch.
fn write_batches(connection: &Connection, queue: &mpsc::Receiver<Job>) {
    while let Ok(first) = queue.recv() {
        let mut batch = vec![first];
        while batch.len() < BATCH_MAX
            && let Ok(next) = queue.try_recv()
        {
            batch.push(next);
        }
        let (answers, committed) = run_batch(connection, batch);
        for answer in answers {
            answer(committed.clone());
        }
    }
}

fn run_batch(connection: &Connection, batch: Vec<Job>) -> (Vec<AfterCommit>, Result<(), Arc<rusqlite::Error>>) {
    let begun = connection.execute_batch("BEGIN IMMEDIATE");
    // Jobs run even when there is no transaction, so that each has an answer to give; the error overrides it.
    let answers: Vec<AfterCommit> = batch.into_iter().map(|job| job(connection)).collect();
    let committed = begun.and_then(|()| connection.execute_batch("COMMIT")).map_err(Arc::new);
    if committed.is_err() && !connection.is_autocommit() {
        let _nothing_left_to_try = connection.execute_batch("ROLLBACK");
    }
    (answers, committed)
}

fn in_savepoint<T, F>(connection: &Connection, question: F) -> Result<T, StoreError>
where
    F: FnOnce(&Db<'_>) -> Result<T, StoreError>,
{
    if connection.is_autocommit() {
        return Err(StoreError::Closed);
    }
    connection.execute_batch("SAVEPOINT job")?;
    let result = question(&Db(connection));
    connection.execute_batch(if result.is_ok() { "RELEASE job" } else { "ROLLBACK TO job; RELEASE job" })?;
    result
}

/// All statements of one question see the same moment.
fn in_snapshot<T, F>(connection: &Connection, question: F) -> Result<T, StoreError>
where
    F: FnOnce(&Db<'_>) -> Result<T, StoreError>,
{
    connection.execute_batch("BEGIN")?;
    let result = question(&Db(connection));
    connection.execute_batch("ROLLBACK")?;
    result
}

fn in_file(file: &Path, source: rusqlite::Error) -> StoreError {
    StoreError::Database { file: file.to_owned(), source: Arc::new(source) }
}

fn named(error: StoreError, file: &Path) -> StoreError {
    match error {
        StoreError::Statement(source) => StoreError::Database { file: file.to_owned(), source: Arc::from(source) },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NUMBERS: &[&str] = &["CREATE TABLE numbers (n INTEGER NOT NULL UNIQUE) STRICT;"];

    fn open(dir: &tempfile::TempDir) -> Database {
        Database::open(dir.path().join("test.db"), NUMBERS, Durability::EveryCommit).unwrap()
    }

    fn insert(n: i64) -> impl FnOnce(&Db<'_>) -> Result<(), StoreError> + Send + 'static {
        move |db| {
            db.0.execute("INSERT INTO numbers VALUES (?1)", [n])?;
            Ok(())
        }
    }

    async fn count(database: &Database) -> i64 {
        database.read(|db| Ok(db.0.query_row("SELECT count(*) FROM numbers", [], |row| row.get(0))?)).await.unwrap()
    }

    #[tokio::test]
    async fn a_database_is_its_owners_alone_also_one_of_before_that() {
        let dir = tempfile::tempdir().unwrap();
        let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777;
        for _ in 0..2 {
            let database = open(&dir);
            database.write(insert(1)).await.ok();
            for name in ["test.db", "test.db-wal", "test.db-shm"] {
                assert_eq!(mode(name), 0o600, "{name}");
            }
            drop(database);
            fs::set_permissions(dir.path().join("test.db"), Permissions::from_mode(0o644)).unwrap();
        }
    }

    #[tokio::test]
    async fn a_failed_write_undoes_itself_and_not_its_neighbours() {
        let dir = tempfile::tempdir().unwrap();
        let database = open(&dir);
        let writes = (0..50).map(|n| database.write(insert(n % 25)));
        let results = futures_util::future::join_all(writes).await;
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 25);
        assert_eq!(count(&database).await, 25);
    }

    #[tokio::test]
    async fn what_was_asked_for_is_written_before_the_drop_returns() {
        let dir = tempfile::tempdir().unwrap();
        let database = open(&dir);
        for n in 0..1000 {
            database.write_later(insert(n));
        }
        drop(database);
        assert_eq!(count(&open(&dir)).await, 1000);
    }

    #[tokio::test]
    async fn a_reader_cannot_write() {
        let dir = tempfile::tempdir().unwrap();
        let database = open(&dir);
        let error = database.read(insert(1)).await.unwrap_err();
        assert!(error.to_string().contains("test.db"), "{error}");
    }
}
