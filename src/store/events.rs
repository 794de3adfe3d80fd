//! What was done with sandboxes: kept in the history, bounded, written without anybody waiting.

use super::history::HistoryLimits;
use super::sandboxes::Order;
use super::value::{micros, parsed_in, signed, time_in, unsigned_in};
use super::{Db, Store, StoreError};
use crate::model::{EventKind, EventRecord, FailureKind, SandboxId, TemplateId};
use rusqlite::{Row, named_params, params};
use time::OffsetDateTime;

/// Which events are asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventQuery {
    /// From here on, inclusive.
    pub start: OffsetDateTime,
    /// Up to here, exclusive.
    pub end: OffsetDateTime,
    /// Of this sandbox only.
    pub sandbox: Option<SandboxId>,
    /// Of sandboxes of this template only.
    pub template: Option<TemplateId>,
    /// Of these kinds only; empty = all.
    pub kinds: Vec<EventKind>,
    /// Only what failed, or only what did not.
    pub failed: Option<bool>,
    /// Oldest or newest first.
    pub order: Order,
    /// Events to leave out at the beginning.
    pub offset: u64,
    /// At most this many.
    pub limit: u32,
}

/// A page of events, and how many there are in all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventPage {
    /// At most `limit`.
    pub events: Vec<EventRecord>,
    /// Without offset and limit.
    pub total: u64,
}

impl Store {
    /// Keeps an event. Nobody waits for it; a failure is logged.
    pub fn keep_event(&self, event: EventRecord) {
        let limits = self.inner.limits;
        self.inner.history.write_later(move |db| insert(db, &event, &limits));
    }

    /// Events that fit the query, those asked to be kept before it included.
    pub async fn events(&self, query: EventQuery) -> Result<EventPage, StoreError> {
        self.after_writes(move |db| page(db, &query)).await
    }
}

fn insert(db: &Db<'_>, event: &EventRecord, limits: &HistoryLimits) -> Result<(), StoreError> {
    let sql = "INSERT INTO events (at, sandbox, template, template_name, kind, error, failure) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
    db.0.prepare_cached(sql)?.execute(params![
        micros(event.at),
        event.sandbox.as_str(),
        event.template.as_str(),
        event.template_name,
        event.kind.as_str(),
        event.error,
        event.failure.map(FailureKind::as_str),
    ])?;
    db.0.prepare_cached("DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?1")?.execute([limits.events_max])?;
    Ok(())
}

fn page(db: &Db<'_>, query: &EventQuery) -> Result<EventPage, StoreError> {
    // Words of ours, never of a client's.
    let kinds = query.kinds.iter().map(|kind| format!("'{}'", kind.as_str())).collect::<Vec<_>>().join(", ");
    let of_kinds = if kinds.is_empty() { String::new() } else { format!(" AND kind IN ({kinds})") };
    let filter = format!(
        "FROM events WHERE at >= :start AND at < :end AND (:sandbox IS NULL OR sandbox = :sandbox) \
         AND (:template IS NULL OR template = :template) AND (:failed IS NULL OR (error IS NOT NULL AND kind <> 'kill') = :failed){of_kinds}"
    );
    let direction = match query.order {
        Order::Ascending => "ASC",
        Order::Descending => "DESC",
    };
    let sandbox = query.sandbox.map(|id| id.to_string());
    let template = query.template.map(|id| id.to_string());
    let (start, end) = (micros(query.start), micros(query.end));
    let count = named_params! { ":start": start, ":end": end, ":sandbox": sandbox, ":template": template, ":failed": query.failed };
    let total: i64 = db.0.prepare_cached(&format!("SELECT count(*) {filter}"))?.query_row(count, |row| row.get(0))?;
    let sql = format!("SELECT * {filter} ORDER BY at {direction}, id {direction} LIMIT :limit OFFSET :offset");
    let mut statement = db.0.prepare_cached(&sql)?;
    let asked = named_params! {
        ":start": start, ":end": end, ":sandbox": sandbox, ":template": template, ":failed": query.failed,
        ":limit": query.limit, ":offset": signed(query.offset),
    };
    let rows = statement.query_map(asked, |row| Ok(from_row(row)))?;
    Ok(EventPage { events: rows.map(|row| row?).collect::<Result<_, StoreError>>()?, total: total.unsigned_abs() })
}

fn from_row(row: &Row<'_>) -> Result<EventRecord, StoreError> {
    let kind: String = row.get("kind")?;
    let failure: Option<String> = row.get("failure")?;
    Ok(EventRecord {
        id: unsigned_in(row, "id")?,
        at: time_in(row, "at")?,
        sandbox: parsed_in(row, "sandbox")?,
        template: parsed_in(row, "template")?,
        template_name: row.get("template_name")?,
        kind: EventKind::from_word(&kind).ok_or_else(|| super::value::corrupt("events.kind", &kind, "a kind of event"))?,
        error: row.get("error")?,
        // A word of a newer server's is a failure all the same.
        failure: failure.map(|word| FailureKind::from_word(&word).unwrap_or(FailureKind::Internal)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(1_700_000_000 + seconds).unwrap()
    }

    fn all() -> EventQuery {
        EventQuery {
            start: at(0),
            end: at(1000),
            sandbox: None,
            template: None,
            kinds: Vec::new(),
            failed: None,
            order: Order::Descending,
            offset: 0,
            limit: 100,
        }
    }

    fn event(sandbox: SandboxId, seconds: i64, kind: EventKind, error: Option<&str>) -> EventRecord {
        let template = TemplateId::random();
        let failure = error.map(|_| FailureKind::Full);
        EventRecord { id: 0, at: at(seconds), sandbox, template, template_name: None, kind, error: error.map(Into::into), failure }
    }

    #[tokio::test]
    async fn events_are_filtered_ordered_and_paged() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (one, other) = (SandboxId::random(), SandboxId::random());
        for (sandbox, seconds, kind, error) in
            [(one, 1, EventKind::Create, None), (other, 2, EventKind::Create, Some("full")), (one, 3, EventKind::Pause, None)]
        {
            store.keep_event(event(sandbox, seconds, kind, error));
        }
        let seconds = |page: &EventPage| -> Vec<i64> { page.events.iter().map(|e| (e.at - at(0)).whole_seconds()).collect() };
        let page = store.events(all()).await.unwrap();
        assert_eq!((seconds(&page), page.total), (vec![3, 2, 1], 3));
        let page = store.events(EventQuery { order: Order::Ascending, limit: 1, offset: 1, ..all() }).await.unwrap();
        assert_eq!((seconds(&page), page.total), (vec![2], 3));
        let page = store.events(EventQuery { sandbox: Some(one), kinds: vec![EventKind::Pause], ..all() }).await.unwrap();
        assert_eq!(seconds(&page), [3]);
        let failed = store.events(EventQuery { failed: Some(true), ..all() }).await.unwrap();
        assert_eq!((seconds(&failed), failed.events[0].failure), (vec![2], Some(FailureKind::Full)));
        assert_eq!(seconds(&store.events(EventQuery { failed: Some(false), start: at(2), ..all() }).await.unwrap()), [3]);
    }

    #[tokio::test]
    async fn events_beyond_the_bound_drop_the_oldest() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_with(dir.path(), HistoryLimits { events_max: 5, ..HistoryLimits::default() }).unwrap();
        for seconds in 0..20 {
            store.keep_event(event(SandboxId::random(), seconds, EventKind::Create, None));
        }
        let page = store.events(all()).await.unwrap();
        assert_eq!((page.total, page.events[0].at), (5, at(19)));
    }
}
