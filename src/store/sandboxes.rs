//! Rows of sandboxes.

use super::value::{
    json_in, micros, optional_json_in, optional_parsed_in, optional_time_in, parsed_in, signed, time_in, to_json, unsigned_in,
};
use super::{Db, StoreError};
use crate::model::{SandboxId, SandboxRecord, SandboxState, SnapshotId, TemplateId};
use rusqlite::{OptionalExtension, Row, named_params, params};
use std::collections::BTreeMap;
use time::OffsetDateTime;

/// Which page of live sandboxes is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct PageQuery {
    /// All of these pairs must match exactly.
    pub metadata: BTreeMap<String, String>,
    /// Rows in these states.
    pub states: Vec<SandboxState>,
    /// By (started_at, id).
    pub order: Order,
    /// Started at this moment or later.
    pub started_after: Option<OffsetDateTime>,
    /// Of this template only.
    pub template: Option<TemplateId>,
    /// At most this many rows.
    pub limit: u32,
    /// Rows beyond this one only.
    pub after: Option<(OffsetDateTime, SandboxId)>,
}

/// Direction of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// Newest first.
    #[default]
    Descending,
    /// Oldest first.
    Ascending,
}

const COLUMNS: &str = "id, state, spec_json, created_at, started_at, end_at, kernel_json, control_secret, next_control_secret, \
                       generation, paused_json, snapshot, end_reason_json, ended_at, boot_id";

/// Pairs of metadata in one condition of a page's question: SQLite takes 500 sets in a row, and 1000 conditions.
const TERMS_MAX: usize = 100;
/// Rows with one pair of metadata that are looked at one by one, a search each.
const FEW: u32 = 400;

fn from_row(row: &Row<'_>) -> Result<SandboxRecord, StoreError> {
    let state: String = row.get("state")?;
    Ok(SandboxRecord {
        id: parsed_in(row, "id")?,
        state: SandboxState::from_word(&state).ok_or_else(|| super::value::corrupt("sandboxes.state", &state, "a state"))?,
        spec: json_in(row, "spec_json")?,
        created_at: time_in(row, "created_at")?,
        started_at: time_in(row, "started_at")?,
        end_at: time_in(row, "end_at")?,
        kernel: optional_json_in(row, "kernel_json")?,
        control_secret: row.get("control_secret")?,
        next_control_secret: row.get("next_control_secret")?,
        generation: unsigned_in(row, "generation")?,
        paused: optional_json_in(row, "paused_json")?,
        snapshot: optional_parsed_in(row, "snapshot")?,
        end_reason: optional_json_in(row, "end_reason_json")?,
        ended_at: optional_time_in(row, "ended_at")?,
        boot_id: row.get("boot_id")?,
    })
}

/// A new row with its metadata.
pub fn insert(db: &Db<'_>, record: &SandboxRecord) -> Result<(), StoreError> {
    let sql = "INSERT INTO sandboxes (id, state, template, spec_json, created_at, started_at, end_at, kernel_json, control_secret, \
               next_control_secret, generation, paused_json, snapshot, end_reason_json, ended_at, boot_id) \
               VALUES (:id, :state, :template, :spec, :created_at, :started_at, :end_at, :kernel, :secret, :next_secret, :generation, \
               :paused, :snapshot, :end_reason, :ended_at, :boot_id)";
    write_row(db, sql, record)?;
    let mut statement = db.0.prepare_cached("INSERT INTO sandbox_metadata (sandbox, key, value) VALUES (?1, ?2, ?3)")?;
    for (key, value) in &record.spec.metadata {
        statement.execute(params![record.id.as_str(), key, value])?;
    }
    Ok(())
}

/// Replaces everything but the metadata, which never changes. The row exists: a driver's first act is to insert it.
pub fn update(db: &Db<'_>, record: &SandboxRecord) -> Result<(), StoreError> {
    let sql = "UPDATE sandboxes SET state = :state, template = :template, spec_json = :spec, created_at = :created_at, \
               started_at = :started_at, end_at = :end_at, kernel_json = :kernel, control_secret = :secret, \
               next_control_secret = :next_secret, generation = :generation, paused_json = :paused, snapshot = :snapshot, \
               end_reason_json = :end_reason, ended_at = :ended_at, boot_id = :boot_id WHERE id = :id";
    write_row(db, sql, record)
}

fn write_row(db: &Db<'_>, sql: &str, record: &SandboxRecord) -> Result<(), StoreError> {
    db.0.prepare_cached(sql)?.execute(named_params! {
        ":id": record.id.as_str(),
        ":state": record.state.as_str(),
        ":template": record.spec.template.as_str(),
        ":spec": to_json(&record.spec),
        ":created_at": micros(record.created_at),
        ":started_at": micros(record.started_at),
        ":end_at": micros(record.end_at),
        ":kernel": record.kernel.as_ref().map(to_json),
        ":secret": record.control_secret,
        ":next_secret": record.next_control_secret,
        ":generation": signed(record.generation),
        ":paused": record.paused.as_ref().map(to_json),
        ":snapshot": record.snapshot.map(|id| id.to_string()),
        ":end_reason": record.end_reason.as_ref().map(to_json),
        ":ended_at": record.ended_at.map(micros),
        ":boot_id": record.boot_id,
    })?;
    Ok(())
}

/// The row, whatever its state.
pub fn by_id(db: &Db<'_>, id: SandboxId) -> Result<Option<SandboxRecord>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM sandboxes WHERE id = ?1");
    let mut statement = db.0.prepare_cached(&sql)?;
    let record = statement.query_row([id.as_str()], |row| Ok(from_row(row))).optional()?;
    record.transpose()
}

/// Rows that a server has to take over: all but the final ones.
pub fn unfinished(db: &Db<'_>) -> Result<Vec<SandboxRecord>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM sandboxes WHERE state NOT IN ('killed', 'failed') ORDER BY created_at");
    let mut statement = db.0.prepare_cached(&sql)?;
    let rows = statement.query_map([], |row| Ok(from_row(row)))?;
    rows.map(|row| row?).collect()
}

/// One page of live sandboxes. Rows that come or go meanwhile neither repeat nor hide others: a page begins strictly
/// beyond the last row of the one before.
///
/// Which rows belong to it is answered by indexes, and only those are fetched. Rows with a rare pair of metadata are
/// looked at one by one; otherwise the live ones are walked in order until the page is full.
pub fn page(db: &Db<'_>, query: &PageQuery) -> Result<Vec<SandboxRecord>, StoreError> {
    let rarest = rarest_pair(db, &query.metadata)?;
    let mut asked = Asked::default();
    let pairs: Vec<Pair<'_>> = query.metadata.iter().collect();
    let is_few = rarest.is_some_and(|(count, _)| count <= FEW);
    for pairs in pairs.chunks(TERMS_MAX) {
        let sets: Vec<String> = pairs.iter().map(|pair| asked.set(*pair)).collect();
        asked.conditions.push(match is_few || pairs.len() == 1 {
            true => sets.iter().map(|set| format!("EXISTS ({set} AND m.sandbox = id)")).collect::<Vec<_>>().join(" AND "),
            // Put together once, since what is common alone may be rare together.
            false => format!("id IN ({})", sets.join(" INTERSECT ")),
        });
    }
    let from = match rarest {
        Some((0, _)) => return Ok(Vec::new()),
        // CROSS keeps the order of the two.
        Some((_, rare)) if is_few => format!("({}) AS rare CROSS JOIN sandboxes ON id = rare.sandbox", asked.set(rare)),
        Some(_) | None => "sandboxes INDEXED BY sandboxes_live".to_owned(),
    };
    asked.filters(query);
    let (order, limit) = (order_by(query.order), asked.place(i64::from(query.limit)));
    let ids = format!("SELECT id FROM {from} WHERE {} {order} LIMIT {limit}", asked.all());
    let sql = format!("SELECT {COLUMNS} FROM sandboxes WHERE id IN ({ids}) {order}");
    let mut statement = db.0.prepare_cached(&sql)?;
    let rows = statement.query_map(rusqlite::params_from_iter(asked.values), |row| Ok(from_row(row)))?;
    rows.map(|row| row?).collect()
}

type Pair<'a> = (&'a String, &'a String);

/// The pair that the fewest rows have, ended ones included, and how many those are, as far as [`FEW`] and one.
fn rarest_pair<'a>(db: &Db<'_>, metadata: &'a BTreeMap<String, String>) -> Result<Option<(u32, Pair<'a>)>, StoreError> {
    let sql = "SELECT count(*) FROM (SELECT 1 FROM sandbox_metadata WHERE key = ?1 AND value = ?2 LIMIT ?3)";
    let mut statement = db.0.prepare_cached(sql)?;
    let mut rarest: Option<(u32, Pair<'a>)> = None;
    for (key, value) in metadata {
        let count = statement.query_row(params![key, value, FEW + 1], |row| row.get(0))?;
        if rarest.is_none_or(|(fewest, _)| count < fewest) {
            rarest = Some((count, (key, value)));
        }
        if count == 0 {
            break;
        }
    }
    Ok(rarest)
}

fn order_by(order: Order) -> &'static str {
    match order {
        Order::Descending => "ORDER BY started_at DESC, id DESC",
        Order::Ascending => "ORDER BY started_at ASC, id ASC",
    }
}

/// The conditions of a page, and the values that they speak of.
#[derive(Debug, Default)]
struct Asked {
    conditions: Vec<String>,
    values: Vec<rusqlite::types::Value>,
}

impl Asked {
    /// Keeps a value and names its place.
    fn place(&mut self, value: impl Into<rusqlite::types::Value>) -> String {
        self.values.push(value.into());
        format!("?{}", self.values.len())
    }

    /// The sandboxes that have this pair.
    fn set(&mut self, (key, value): Pair<'_>) -> String {
        let (key, value) = (self.place(key.clone()), self.place(value.clone()));
        format!("SELECT m.sandbox FROM sandbox_metadata m WHERE m.key = {key} AND m.value = {value}")
    }

    /// In brackets each: SQLite bounds how many may stand in one row.
    fn all(&self) -> String {
        self.conditions.iter().map(|condition| format!("({condition})")).collect::<Vec<_>>().join(" AND ")
    }

    fn filters(&mut self, query: &PageQuery) {
        // To the letter what the index says of itself, else it may not be used.
        self.conditions.push("state IN ('running', 'pausing', 'paused', 'resuming')".to_owned());
        let states: Vec<String> = query.states.iter().map(|state| self.place(state.as_str().to_owned())).collect();
        self.conditions.push(format!("state IN ({})", states.join(", ")));
        if let Some(at) = query.started_after {
            let at = self.place(micros(at));
            self.conditions.push(format!("started_at >= {at}"));
        }
        if let Some(template) = query.template {
            let template = self.place(template.to_string());
            self.conditions.push(format!("template = {template}"));
        }
        if let Some((at, id)) = query.after {
            let beyond = match query.order {
                Order::Descending => "<",
                Order::Ascending => ">",
            };
            let (at, id) = (self.place(micros(at)), self.place(id.to_string()));
            self.conditions.push(format!("(started_at, id) {beyond} ({at}, {id})"));
        }
    }
}

/// How many rows are in this state.
pub fn count_in(db: &Db<'_>, state: SandboxState) -> Result<u64, StoreError> {
    let count: i64 =
        db.0.prepare_cached("SELECT count(*) FROM sandboxes WHERE state = ?1")?.query_row([state.as_str()], |row| row.get(0))?;
    Ok(count.unsigned_abs())
}

/// How many live sandboxes were made from this template.
pub fn count_live_of(db: &Db<'_>, template: TemplateId) -> Result<u64, StoreError> {
    let sql = "SELECT count(*) FROM sandboxes WHERE template = ?1 AND state NOT IN ('killed', 'failed', 'killing')";
    let count: i64 = db.0.prepare_cached(sql)?.query_row([template.as_str()], |row| row.get(0))?;
    Ok(count.unsigned_abs())
}

/// Which of the dumps in `candidates` a sandbox still needs.
pub fn uses_snapshot(db: &Db<'_>, snapshot: SnapshotId) -> Result<bool, StoreError> {
    let sql = "SELECT EXISTS (SELECT 1 FROM sandboxes WHERE snapshot = ?1 AND state NOT IN ('killed', 'failed'))";
    Ok(db.0.prepare_cached(sql)?.query_row([snapshot.as_str()], |row| row.get(0))?)
}

/// Removes rows that ended before `limit`; answers whose, so that their history can go as well.
pub fn remove_ended_before(db: &Db<'_>, limit: OffsetDateTime) -> Result<Vec<SandboxId>, StoreError> {
    let sql = "DELETE FROM sandboxes WHERE ended_at IS NOT NULL AND ended_at < ?1 RETURNING id";
    let mut statement = db.0.prepare_cached(sql)?;
    let rows = statement.query_map([micros(limit)], |row| Ok(parsed_in(row, "id")))?;
    rows.map(|row| row?).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{BuildId, ByteSize, Lifecycle, NetworkPolicy, Resources, SandboxSpec, Secure};
    use crate::store::Store;
    use proptest::prelude::*;
    use std::time::{Duration, Instant};

    const START: OffsetDateTime = time::macros::datetime!(2026-01-02 03:04:05 UTC);

    fn record(seconds: i64, state: SandboxState, metadata: &[(&str, &str)]) -> SandboxRecord {
        let at = START + time::Duration::seconds(seconds);
        SandboxRecord {
            id: SandboxId::random(),
            state,
            spec: SandboxSpec {
                template: TemplateId::random(),
                build: BuildId::random(),
                alias: None,
                lifecycle: Lifecycle::of(Duration::from_secs(300)),
                resources: Resources { cpu_count: 2, memory: ByteSize::gib(1), disk: ByteSize::gib(20), pids_max: 100 },
                network: NetworkPolicy::default(),
                metadata: metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
                env: BTreeMap::new(),
                secure: Secure::Token,
                volumes: Vec::new(),
            },
            created_at: at,
            started_at: at,
            end_at: at + Duration::from_secs(300),
            kernel: None,
            control_secret: "secret".into(),
            next_control_secret: None,
            generation: 1,
            paused: None,
            snapshot: None,
            end_reason: None,
            ended_at: None,
            boot_id: "boot".into(),
        }
    }

    fn all(limit: u32, order: Order) -> PageQuery {
        let states = vec![SandboxState::Running, SandboxState::Pausing, SandboxState::Paused, SandboxState::Resuming];
        PageQuery { metadata: BTreeMap::new(), states, order, started_after: None, template: None, limit, after: None }
    }

    async fn store_with(records: Vec<SandboxRecord>) -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.write(move |db| records.iter().try_for_each(|record| insert(db, record))).await.unwrap();
        (dir, store)
    }

    #[tokio::test]
    async fn a_row_reads_back_as_it_was_written_and_updated() {
        let mut record = record(0, SandboxState::Creating, &[("a", "b")]);
        let (_dir, store) = store_with(vec![record.clone()]).await;
        let id = record.id;
        assert_eq!(store.read(move |db| by_id(db, id)).await.unwrap(), Some(record.clone()));
        record.state = SandboxState::Paused;
        record.paused = Some(crate::model::Keep::Memory);
        record.snapshot = Some(SnapshotId::random());
        record.next_control_secret = Some("next".into());
        let changed = record.clone();
        store.write(move |db| update(db, &changed)).await.unwrap();
        assert_eq!(store.read(move |db| by_id(db, id)).await.unwrap(), Some(record));
    }

    /// 10,000 live rows; `group` is one of 100 numbers, `even` and `odd` are never true together, `owner` is always the same.
    async fn ten_thousand() -> (tempfile::TempDir, Store) {
        let states = [SandboxState::Running, SandboxState::Paused];
        let rows = (0..10_000i64).map(|n| {
            let (group, odd, even) = ((n % 100).to_string(), (n % 2 == 1).to_string(), (n % 2 == 0).to_string());
            let state = states[usize::try_from(n % 2).unwrap()];
            record(n, state, &[("group", &group), ("owner", "me"), ("odd", &odd), ("even", &even)])
        });
        store_with(rows.collect()).await
    }

    fn with(pairs: &[(&str, &str)]) -> PageQuery {
        let metadata = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        PageQuery { metadata, ..all(100, Order::Descending) }
    }

    #[tokio::test]
    async fn a_page_of_ten_thousand_rows_takes_at_most_20_ms_whatever_the_filter() {
        let (_dir, store) = ten_thousand().await;
        let questions = [
            ("everything", 100, all(100, Order::Descending)),
            ("a hundredth", 100, with(&[("group", "7")])),
            ("a value that nothing has", 0, with(&[("group", "none")])),
            ("what all have and what none has", 0, with(&[("owner", "me"), ("group", "none")])),
            ("two halves without a match", 0, with(&[("odd", "true"), ("even", "true")])),
            ("what all have", 100, with(&[("owner", "me")])),
            ("what all have, and half of them", 100, with(&[("owner", "me"), ("odd", "true")])),
            ("a template without sandboxes", 0, PageQuery { template: Some(TemplateId::random()), ..all(100, Order::Descending) }),
            ("a state that none is in", 0, PageQuery { states: vec![SandboxState::Pausing], ..all(100, Order::Ascending) }),
            ("a moment to come", 0, PageQuery { started_after: Some(START + time::Duration::days(1)), ..all(100, Order::Ascending) }),
        ];
        let mut report = Vec::new();
        for (what, found, query) in questions {
            let mut took = Vec::new();
            for _ in 0..9 {
                let (begun, query) = (Instant::now(), query.clone());
                let rows = store.read(move |db| page(db, &query)).await.unwrap();
                took.push(begun.elapsed());
                assert_eq!(rows.len(), found, "{what}");
            }
            took.sort();
            report.push((what, took[4]));
        }
        println!("medians: {report:?}");
        assert!(report.iter().all(|(_, median)| *median <= Duration::from_millis(20)), "{report:?}");
    }

    #[tokio::test]
    async fn a_filter_may_have_as_many_pairs_as_a_sandbox() {
        let pairs: Vec<(String, String)> = (0..1024).map(|n| (format!("key-{n}"), n.to_string())).collect();
        let pairs: Vec<(&str, &str)> = pairs.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let (has_all, lacks_one) = (record(0, SandboxState::Running, &pairs), record(1, SandboxState::Running, &pairs[1..]));
        let id = has_all.id;
        let (_dir, store) = store_with(vec![has_all, lacks_one]).await;
        let found = store.read(move |db| page(db, &with(&[]))).await.unwrap();
        assert_eq!(found.len(), 2);
        let query = with(&pairs);
        let found = store.read(move |db| page(db, &query)).await.unwrap();
        assert_eq!(found.iter().map(|record| record.id).collect::<Vec<_>>(), [id]);
    }

    #[tokio::test]
    async fn ended_rows_are_forgotten_with_their_metadata_and_keys() {
        let mut ended = record(0, SandboxState::Killed, &[("a", "b")]);
        ended.ended_at = Some(START);
        let (id, live) = (ended.id, record(0, SandboxState::Running, &[]));
        let (_dir, store) = store_with(vec![ended, live]).await;
        store.write(move |db| crate::store::idempotency::remember(db, "key", "hash", id, START)).await.unwrap();
        let later = START + Duration::from_secs(1);
        assert_eq!(store.write(move |db| remove_ended_before(db, START)).await.unwrap(), []);
        assert_eq!(store.write(move |db| remove_ended_before(db, later)).await.unwrap(), [id]);
        assert_eq!(store.read(move |db| crate::store::idempotency::seen(db, "key")).await.unwrap(), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn pages_put_together_are_the_whole_list_in_order(
            seconds in proptest::collection::vec(0i64..8, 0..40),
            limit in 1u32..9,
            ascending: bool,
        ) {
            let order = if ascending { Order::Ascending } else { Order::Descending };
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (seen, wanted) = runtime.block_on(async {
                let records: Vec<_> = seconds.iter().map(|seconds| record(*seconds, SandboxState::Running, &[])).collect();
                let mut wanted: Vec<_> = records.iter().map(|record| (record.started_at, record.id)).collect();
                wanted.sort();
                if !ascending {
                    wanted.reverse();
                }
                let (_dir, store) = store_with(records).await;
                let (mut seen, mut query) = (Vec::new(), all(limit, order));
                loop {
                    let ask = query.clone();
                    let rows = store.read(move |db| page(db, &ask)).await.unwrap();
                    let Some(last) = rows.last() else { break };
                    query.after = Some((last.started_at, last.id));
                    seen.extend(rows.iter().map(|record| (record.started_at, record.id)));
                }
                (seen, wanted)
            });
            prop_assert_eq!(seen, wanted);
        }
    }
}
