//! Metrics and logs: bounded, written without anybody waiting, read after everything asked for before.

use super::value::{from_level, json_in, level_in, micros, parsed_in, signed, time_in, to_json, unsigned_in};
use super::{Db, Store, StoreError};
use crate::model::{ByteSize, LogEntry, LogLevel, MetricPoint, SandboxId};
use rusqlite::{OptionalExtension, Row, named_params, params};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::Ordering;
use time::OffsetDateTime;

/// Bounds of the history; the oldest rows are dropped beyond them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistoryLimits {
    /// Samples per sandbox.
    pub metrics_per_sandbox_max: u32,
    /// Samples in all.
    pub metrics_max: u32,
    /// Log lines per sandbox or build.
    pub logs_per_scope_max: u32,
    /// Log lines in all.
    pub logs_max: u32,
    /// Events in all.
    pub events_max: u32,
}

impl Default for HistoryLimits {
    /// A day of samples every 2 s for one sandbox; about 200 MB in all.
    fn default() -> Self {
        Self { metrics_per_sandbox_max: 43_200, metrics_max: 1_000_000, logs_per_scope_max: 10_000, logs_max: 400_000, events_max: 200_000 }
    }
}

/// Rows beyond a bound are dropped when this many more have gathered: deleting one by one would double the work.
const SLACK: u32 = 64;

/// Which log lines are asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRange {
    /// From here on, or up to here when going backward; both inclusive.
    pub cursor: Option<OffsetDateTime>,
    /// Oldest or newest first.
    pub order: super::sandboxes::Order,
    /// At most this many.
    pub limit: u32,
    /// This level or louder.
    pub level: LogLevel,
    /// Text that the message contains, letter case aside.
    pub search: Option<String>,
}

impl Store {
    /// Keeps a sample. Nobody waits for it; a failure is logged.
    pub fn keep_metric(&self, sandbox: SandboxId, point: MetricPoint) {
        let limits = self.inner.limits;
        let trim = self.is_trim_due(sandbox);
        self.inner.history.write_later(move |db| {
            insert_metric(db, sandbox, &point)?;
            if trim { trim_metrics(db, sandbox, &limits) } else { Ok(()) }
        });
    }

    /// Every [`SLACK`]th sample of a sandbox.
    fn is_trim_due(&self, sandbox: SandboxId) -> bool {
        let mut samples = self.inner.samples.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let count = samples.entry(sandbox).or_insert(0);
        *count = (*count + 1) % SLACK;
        *count == 0
    }

    /// Keeps lines of a sandbox's or build's log; `read_to` is how far the agent's own log has been read with them.
    pub fn keep_logs(&self, scope: String, entries: Vec<LogEntry>, read_to: Option<u64>) {
        let limits = self.inner.limits;
        let trim_all = self.inner.log_batches.fetch_add(1, Ordering::Relaxed).is_multiple_of(SLACK);
        self.inner.history.write_later(move |db| {
            insert_logs(db, &scope, &entries, read_to, &limits)?;
            if trim_all { trim_logs(db, &limits) } else { Ok(()) }
        });
    }

    /// Samples of a sandbox in the range, oldest first.
    pub async fn metrics(&self, sandbox: SandboxId, range: Range<OffsetDateTime>) -> Result<Vec<MetricPoint>, StoreError> {
        self.after_writes(move |db| metrics_of(db, sandbox, &range)).await
    }

    /// The newest sample of each sandbox that has one.
    pub async fn latest_metrics(&self, sandboxes: Vec<SandboxId>) -> Result<BTreeMap<SandboxId, MetricPoint>, StoreError> {
        self.after_writes(move |db| latest_of(db, &sandboxes)).await
    }

    /// Lines of a sandbox's or build's log.
    pub async fn logs(&self, scope: String, range: LogRange) -> Result<Vec<LogEntry>, StoreError> {
        self.after_writes(move |db| logs_of(db, &scope, &range)).await
    }

    /// Lines of a build's log from the `offset`th on, oldest first, this level or louder.
    pub async fn log_page(&self, scope: String, level: LogLevel, offset: u64, limit: u32) -> Result<Vec<LogEntry>, StoreError> {
        self.after_writes(move |db| log_page_of(db, &scope, level, offset, limit)).await
    }

    /// How far an agent's own log has been read; 0 when it never was.
    pub async fn log_cursor(&self, scope: String) -> Result<u64, StoreError> {
        self.after_writes(move |db| cursor_of(db, &scope)).await
    }

    /// Forgets everything of these sandboxes or builds.
    pub fn forget_history(&self, scopes: Vec<String>) {
        let mut samples = self.inner.samples.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for id in scopes.iter().filter_map(|scope| scope.parse().ok()) {
            samples.remove::<SandboxId>(&id);
        }
        drop(samples);
        self.inner.history.write_later(move |db| {
            for scope in &scopes {
                db.0.prepare_cached("DELETE FROM metrics WHERE sandbox = ?1")?.execute([scope])?;
                db.0.prepare_cached("DELETE FROM logs WHERE scope = ?1")?.execute([scope])?;
                db.0.prepare_cached("DELETE FROM log_cursors WHERE scope = ?1")?.execute([scope])?;
            }
            Ok(())
        });
    }

    /// A read that sees every write asked for before it.
    pub(super) async fn after_writes<T, F>(&self, question: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&Db<'_>) -> Result<T, StoreError> + Send + 'static,
    {
        self.inner.history.write(|_| Ok(())).await?;
        self.inner.history.read(question).await
    }
}

fn insert_metric(db: &Db<'_>, sandbox: SandboxId, point: &MetricPoint) -> Result<(), StoreError> {
    let sql = "INSERT INTO metrics (sandbox, at, cpu_count, cpu_used_pct, memory_used, memory_total, memory_cache, disk_used, disk_total) \
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)";
    db.0.prepare_cached(sql)?.execute(params![
        sandbox.as_str(),
        micros(point.at),
        point.cpu_count,
        point.cpu_used_pct,
        signed(point.memory_used.bytes()),
        signed(point.memory_total.bytes()),
        signed(point.memory_cache.bytes()),
        signed(point.disk_used.bytes()),
        signed(point.disk_total.bytes()),
    ])?;
    Ok(())
}

fn trim_metrics(db: &Db<'_>, sandbox: SandboxId, limits: &HistoryLimits) -> Result<(), StoreError> {
    let of_one =
        "DELETE FROM metrics WHERE sandbox = ?1 AND at < (SELECT at FROM metrics WHERE sandbox = ?1 ORDER BY at DESC LIMIT 1 OFFSET ?2)";
    db.0.prepare_cached(of_one)?.execute(params![sandbox.as_str(), limits.metrics_per_sandbox_max.saturating_sub(1)])?;
    let of_all = "DELETE FROM metrics WHERE rowid <= (SELECT max(rowid) FROM metrics) - ?1";
    db.0.prepare_cached(of_all)?.execute([limits.metrics_max])?;
    Ok(())
}

fn insert_logs(db: &Db<'_>, scope: &str, entries: &[LogEntry], read_to: Option<u64>, limits: &HistoryLimits) -> Result<(), StoreError> {
    let mut statement = db.0.prepare_cached("INSERT INTO logs (scope, at, level, message, fields_json) VALUES (?1, ?2, ?3, ?4, ?5)")?;
    for entry in entries {
        statement.execute(params![scope, micros(entry.at), from_level(entry.level), entry.message, to_json(&entry.fields)])?;
    }
    if let Some(seq) = read_to {
        db.0.prepare_cached("INSERT OR REPLACE INTO log_cursors (scope, seq) VALUES (?1, ?2)")?.execute(params![scope, signed(seq)])?;
    }
    if !entries.is_empty() {
        // By these rows and no others: the moments are the sandbox's to choose, in whatever order.
        let of_one =
            "DELETE FROM logs WHERE rowid IN (SELECT rowid FROM logs WHERE scope = ?1 ORDER BY at DESC, rowid DESC LIMIT -1 OFFSET ?2)";
        db.0.prepare_cached(of_one)?.execute(params![scope, limits.logs_per_scope_max])?;
    }
    Ok(())
}

/// Counts rows, not row ids: who writes much has most of its own dropped again, and is not to drop the others' by it.
fn trim_logs(db: &Db<'_>, limits: &HistoryLimits) -> Result<(), StoreError> {
    let sql = "DELETE FROM logs WHERE rowid IN (SELECT rowid FROM logs ORDER BY rowid LIMIT max(0, (SELECT count(*) FROM logs) - ?1))";
    db.0.prepare_cached(sql)?.execute([limits.logs_max])?;
    Ok(())
}

fn metric_from_row(row: &Row<'_>) -> Result<MetricPoint, StoreError> {
    Ok(MetricPoint {
        at: time_in(row, "at")?,
        cpu_count: row.get("cpu_count")?,
        cpu_used_pct: row.get("cpu_used_pct")?,
        memory_used: ByteSize(unsigned_in(row, "memory_used")?),
        memory_total: ByteSize(unsigned_in(row, "memory_total")?),
        memory_cache: ByteSize(unsigned_in(row, "memory_cache")?),
        disk_used: ByteSize(unsigned_in(row, "disk_used")?),
        disk_total: ByteSize(unsigned_in(row, "disk_total")?),
    })
}

fn metrics_of(db: &Db<'_>, sandbox: SandboxId, range: &Range<OffsetDateTime>) -> Result<Vec<MetricPoint>, StoreError> {
    let mut statement = db.0.prepare_cached("SELECT * FROM metrics WHERE sandbox = ?1 AND at >= ?2 AND at < ?3 ORDER BY at")?;
    let rows = statement.query_map(params![sandbox.as_str(), micros(range.start), micros(range.end)], |row| Ok(metric_from_row(row)))?;
    rows.map(|row| row?).collect()
}

fn latest_of(db: &Db<'_>, sandboxes: &[SandboxId]) -> Result<BTreeMap<SandboxId, MetricPoint>, StoreError> {
    let mut statement = db.0.prepare_cached("SELECT * FROM metrics WHERE sandbox = ?1 ORDER BY at DESC LIMIT 1")?;
    let mut latest = BTreeMap::new();
    for id in sandboxes {
        let point = statement.query_row([id.as_str()], |row| Ok((parsed_in(row, "sandbox"), metric_from_row(row)))).optional()?;
        if let Some((id, point)) = point {
            latest.insert(id?, point?);
        }
    }
    Ok(latest)
}

fn cursor_of(db: &Db<'_>, scope: &str) -> Result<u64, StoreError> {
    let mut statement = db.0.prepare_cached("SELECT seq FROM log_cursors WHERE scope = ?1")?;
    Ok(statement.query_row([scope], |row| Ok(unsigned_in(row, "seq"))).optional()?.transpose()?.unwrap_or(0))
}

fn logs_of(db: &Db<'_>, scope: &str, range: &LogRange) -> Result<Vec<LogEntry>, StoreError> {
    let (beyond, direction) = match range.order {
        super::sandboxes::Order::Ascending => (">=", "ASC"),
        super::sandboxes::Order::Descending => ("<=", "DESC"),
    };
    let sql = format!(
        "SELECT at, level, message, fields_json FROM logs WHERE scope = :scope AND level >= :level \
         AND (:at IS NULL OR at {beyond} :at) AND (:search IS NULL OR instr(lower(message), lower(:search)) > 0) \
         ORDER BY at {direction}, rowid {direction} LIMIT :limit"
    );
    let mut statement = db.0.prepare_cached(&sql)?;
    let rows = statement.query_map(
        named_params! {
            ":scope": scope,
            ":level": from_level(range.level),
            ":at": range.cursor.map(micros),
            ":search": range.search,
            ":limit": range.limit,
        },
        |row| Ok(log_from_row(row)),
    )?;
    rows.map(|row| row?).collect()
}

fn log_page_of(db: &Db<'_>, scope: &str, level: LogLevel, offset: u64, limit: u32) -> Result<Vec<LogEntry>, StoreError> {
    let sql = "SELECT at, level, message, fields_json FROM logs WHERE scope = ?1 AND level >= ?2 ORDER BY rowid LIMIT ?3 OFFSET ?4";
    let mut statement = db.0.prepare_cached(sql)?;
    let rows = statement.query_map(params![scope, from_level(level), limit, signed(offset)], |row| Ok(log_from_row(row)))?;
    rows.map(|row| row?).collect()
}

fn log_from_row(row: &Row<'_>) -> Result<LogEntry, StoreError> {
    Ok(LogEntry {
        at: time_in(row, "at")?,
        level: level_in(row, "level")?,
        message: row.get("message")?,
        fields: json_in(row, "fields_json")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sandboxes::Order;

    fn at(seconds: i64) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(1_700_000_000 + seconds).unwrap()
    }

    fn point(seconds: i64) -> MetricPoint {
        MetricPoint {
            at: at(seconds),
            cpu_count: 2,
            cpu_used_pct: 12.5,
            memory_used: ByteSize(1),
            memory_total: ByteSize(2),
            memory_cache: ByteSize(3),
            disk_used: ByteSize(4),
            disk_total: ByteSize(5),
        }
    }

    fn line(seconds: i64, level: LogLevel, message: &str) -> LogEntry {
        LogEntry { at: at(seconds), level, message: message.into(), fields: BTreeMap::from([("k".into(), "v".into())]) }
    }

    fn open(limits: HistoryLimits) -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_with(dir.path(), limits).unwrap();
        (dir, store)
    }

    #[tokio::test]
    async fn a_sample_is_read_back_by_its_window_and_as_the_newest() {
        let (_dir, store) = open(HistoryLimits::default());
        let id = SandboxId::random();
        for seconds in 0..10 {
            store.keep_metric(id, point(seconds));
        }
        let window = store.metrics(id, at(3)..at(6)).await.unwrap();
        assert_eq!(window, [point(3), point(4), point(5)]);
        assert_eq!(store.metrics(id, at(-10)..at(-1)).await.unwrap(), []);
        let latest = store.latest_metrics(vec![SandboxId::random(), id]).await.unwrap();
        assert_eq!(latest, BTreeMap::from([(id, point(9))]));
    }

    #[tokio::test]
    async fn samples_and_lines_beyond_a_bound_drop_the_oldest() {
        let limits = HistoryLimits {
            metrics_per_sandbox_max: 10,
            metrics_max: 1000,
            logs_per_scope_max: 10,
            logs_max: 1000,
            ..HistoryLimits::default()
        };
        let (_dir, store) = open(limits);
        let id = SandboxId::random();
        for seconds in 0..640 {
            store.keep_metric(id, point(seconds));
            store.keep_logs(id.to_string(), vec![line(seconds, LogLevel::Info, "x")], None);
        }
        let kept = store.metrics(id, at(0)..at(10_000)).await.unwrap();
        assert_eq!((kept.len(), kept.last().copied()), (10, Some(point(639))));
        let all = LogRange { cursor: None, order: Order::Ascending, limit: 1000, level: LogLevel::Debug, search: None };
        let kept = store.logs(id.to_string(), all).await.unwrap();
        assert_eq!((kept.len(), kept.last().map(|line| line.at)), (10, Some(at(639))));
    }

    #[tokio::test]
    async fn one_scope_drops_its_own_lines_and_nobody_elses() {
        let limits = HistoryLimits { logs_per_scope_max: 10, logs_max: 50, ..HistoryLimits::default() };
        let (_dir, store) = open(limits);
        let count = async |scope: &str| {
            let all = LogRange { cursor: None, order: Order::Ascending, limit: 1000, level: LogLevel::Debug, search: None };
            store.logs(scope.to_owned(), all).await.unwrap().len()
        };
        store.keep_logs("quiet".into(), (0..5).map(|second| line(second, LogLevel::Info, "x")).collect(), None);
        for round in 0..i64::from(2 * SLACK) {
            // Backwards in time, as no honest clock goes.
            let lines = (0..30).map(|nth| line(-round * 30 - nth, LogLevel::Info, "x")).collect();
            store.keep_logs("noisy".into(), lines, None);
        }
        assert_eq!((count("quiet").await, count("noisy").await), (5, 10));
        for scope in 0..i64::from(2 * SLACK) {
            store.keep_logs(format!("scope {scope}"), vec![line(scope, LogLevel::Info, "x")], None);
        }
        assert_eq!((count("quiet").await, count("scope 127").await), (0, 1), "the bound of all holds for the oldest");
    }

    #[tokio::test]
    async fn lines_are_filtered_by_cursor_level_and_text_from_either_end() {
        let (_dir, store) = open(HistoryLimits::default());
        let lines = vec![line(1, LogLevel::Debug, "one"), line(2, LogLevel::Warn, "Two"), line(3, LogLevel::Error, "three")];
        store.keep_logs("scope".into(), lines.clone(), Some(3));
        assert_eq!(store.log_cursor("scope".into()).await.unwrap(), 3);
        let ask = |cursor: Option<i64>, order, level, search: Option<&str>| {
            let range = LogRange { cursor: cursor.map(at), order, limit: 10, level, search: search.map(Into::into) };
            store.logs("scope".into(), range)
        };
        assert_eq!(ask(Some(2), Order::Ascending, LogLevel::Debug, None).await.unwrap(), lines[1..]);
        assert_eq!(ask(Some(2), Order::Descending, LogLevel::Debug, None).await.unwrap(), [lines[1].clone(), lines[0].clone()]);
        assert_eq!(ask(None, Order::Ascending, LogLevel::Warn, Some("two")).await.unwrap(), lines[1..2]);
    }

    #[tokio::test]
    async fn a_forgotten_sandbox_leaves_nothing() {
        let (_dir, store) = open(HistoryLimits::default());
        let id = SandboxId::random();
        store.keep_metric(id, point(1));
        store.forget_history(vec![id.to_string()]);
        assert_eq!(store.metrics(id, at(0)..at(9)).await.unwrap(), []);
    }
}
