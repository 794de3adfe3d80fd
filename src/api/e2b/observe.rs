//! Metrics and logs.

use super::super::ApiState;
use super::super::error::ApiError;
use super::ask::{Query, SandboxPath, Unit, sandbox_id};
use super::wire;
use crate::model::{LogEntry, LogLevel, MetricPoint, SandboxId};
use crate::sandbox::{LogDirection, LogQuery};
use axum::Json;
use axum::extract::State;
use http::StatusCode;
use std::collections::BTreeMap;
use std::ops::Range;
use time::{Duration, OffsetDateTime};

/// Sandboxes of one batch.
const BATCH_MAX: usize = 100;
const LOG_LINES_MAX: u32 = 1000;
const SEARCH_MAX: usize = 256;

/// `GET /sandboxes/{id}/metrics`.
pub(super) async fn metrics(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    query: Query,
) -> Result<Json<Vec<wire::Metric>>, ApiError> {
    let points = state.registry.metrics(id, window(&query)?).await?;
    Ok(Json(points.into_iter().map(metric).collect()))
}

/// Both ends are in it, and given in whole seconds.
fn window(query: &Query) -> Result<Range<OffsetDateTime>, ApiError> {
    let start = query.moment("start", Unit::Seconds)?;
    let end = query.moment("end", Unit::Seconds)?;
    match (start, end) {
        (Some(start), Some(end)) if start > end => {
            let (start, end) = (start.unix_timestamp(), end.unix_timestamp());
            Err(ApiError::bad_request(format!("start is {start}, which is after end, {end}")))
        }
        (start, end) => {
            let end = end.unwrap_or_else(OffsetDateTime::now_utc).saturating_add(Duration::seconds(1));
            Ok(start.unwrap_or(OffsetDateTime::UNIX_EPOCH)..end)
        }
    }
}

/// `GET /sandboxes/metrics?sandbox_ids=a,b`: the newest point of each; ids without one are left out.
pub(super) async fn latest_metrics(State(state): State<ApiState>, query: Query) -> Result<Json<wire::LatestMetrics>, ApiError> {
    let points = latest(&state, &query).await?;
    Ok(Json(wire::LatestMetrics { sandboxes: points.into_iter().map(|(id, point)| (id.to_string(), metric(point))).collect() }))
}

/// The newest point of each sandbox that `sandbox_ids` names.
pub(in crate::api) async fn latest(state: &ApiState, query: &Query) -> Result<BTreeMap<SandboxId, MetricPoint>, ApiError> {
    let names: Vec<&str> = query.listed("sandbox_ids").collect();
    if names.len() > BATCH_MAX {
        return Err(ApiError::bad_request(format!("sandbox_ids has {} entries; the limit is {BATCH_MAX}", names.len())));
    }
    let ids = names.into_iter().filter_map(known_form).collect::<Result<Vec<SandboxId>, _>>()?;
    Ok(state.registry.latest_metrics(&ids).await?)
}

/// An id of nobody is left out like one that is gone; a malformed one is an error.
fn known_form(name: &str) -> Option<Result<SandboxId, ApiError>> {
    match sandbox_id(name) {
        Err(error) if error.code_and_message().0 == StatusCode::NOT_FOUND.as_u16() => None,
        parsed => Some(parsed),
    }
}

/// A point in E2B's units.
pub(in crate::api) fn metric(point: MetricPoint) -> wire::Metric {
    wire::Metric {
        timestamp: wire::Time(point.at),
        timestamp_unix: point.at.unix_timestamp(),
        cpu_count: point.cpu_count,
        cpu_used_pct: (point.cpu_used_pct * 100.0).round() / 100.0,
        mem_used: point.memory_used.bytes(),
        mem_total: point.memory_total.bytes(),
        mem_cache: point.memory_cache.bytes(),
        disk_used: point.disk_used.bytes(),
        disk_total: point.disk_total.bytes(),
    }
}

/// `GET /sandboxes/{id}/logs`.
pub(super) async fn logs(State(state): State<ApiState>, SandboxPath(id): SandboxPath, query: Query) -> Result<Json<wire::Logs>, ApiError> {
    let asked = LogQuery {
        cursor: query.moment("start", Unit::Milliseconds)?,
        limit: query.limit(LOG_LINES_MAX)?,
        direction: LogDirection::Forward,
        level: None,
        search: None,
    };
    let entries = state.registry.logs(id, asked).await?;
    Ok(Json(wire::Logs { logs: entries.iter().map(line).collect(), log_entries: entries.into_iter().map(entry).collect() }))
}

/// `GET /v2/sandboxes/{id}/logs`.
pub(super) async fn logs_v2(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    query: Query,
) -> Result<Json<wire::LogsV2>, ApiError> {
    let entries = state.registry.logs(id, log_query(&query)?).await?;
    Ok(Json(wire::LogsV2 { logs: entries.into_iter().map(entry).collect() }))
}

fn log_query(query: &Query) -> Result<LogQuery, ApiError> {
    let direction = match query.get("direction") {
        None | Some("backward") => LogDirection::Backward,
        Some("forward") => LogDirection::Forward,
        Some(other) => return Err(ApiError::bad_request(format!("direction is '{other}'; it must be 'forward' or 'backward'"))),
    };
    let search = query.get("search").map(str::to_owned);
    if let Some(length) = search.as_ref().map(|search| search.chars().count()).filter(|length| *length > SEARCH_MAX) {
        return Err(ApiError::bad_request(format!("search has {length} characters; the limit is {SEARCH_MAX}")));
    }
    Ok(LogQuery {
        cursor: query.moment("cursor", Unit::Milliseconds)?,
        limit: query.limit(LOG_LINES_MAX)?,
        direction,
        level: query.get("level").map(level).transpose()?,
        search,
    })
}

pub(super) fn level(word: &str) -> Result<LogLevel, ApiError> {
    match word {
        "debug" => Ok(LogLevel::Debug),
        "info" => Ok(LogLevel::Info),
        "warn" => Ok(LogLevel::Warn),
        "error" => Ok(LogLevel::Error),
        other => Err(ApiError::bad_request(format!("level is '{other}'; it must be 'debug', 'info', 'warn' or 'error'"))),
    }
}

fn entry(entry: LogEntry) -> wire::LogEntry {
    wire::LogEntry { timestamp: wire::Time(entry.at), message: entry.message, level: entry.level, fields: entry.fields }
}

/// The old form: everything as JSON in one text, which the CLI parses.
fn line(entry: &LogEntry) -> wire::LogLine {
    let mut fields: serde_json::Map<String, serde_json::Value> =
        entry.fields.iter().map(|(name, value)| (name.clone(), value.as_str().into())).collect();
    fields.insert("level".to_owned(), serde_json::json!(entry.level));
    fields.insert("message".to_owned(), entry.message.as_str().into());
    fields.entry("logger").or_insert_with(|| "sandbox".into());
    wire::LogLine { timestamp: wire::Time(entry.at), line: serde_json::Value::Object(fields).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_has_both_its_ends_and_defaults_to_everything() {
        let window = |query: &str| super::window(&Query::of(query));
        let asked = window("start=10&end=20").unwrap();
        assert_eq!((asked.start.unix_timestamp(), asked.end.unix_timestamp()), (10, 21));
        let all = window("").unwrap();
        assert!(all.start == OffsetDateTime::UNIX_EPOCH && all.end > OffsetDateTime::now_utc());
        assert_eq!(window("start=20&end=10").unwrap_err().code_and_message(), (400, "start is 20, which is after end, 10"));
    }

    #[test]
    fn a_log_line_is_json_with_level_logger_and_message() {
        let entry = LogEntry {
            at: OffsetDateTime::UNIX_EPOCH,
            level: LogLevel::Warn,
            message: "m".into(),
            fields: [("pid".to_owned(), "7".to_owned())].into(),
        };
        assert_eq!(line(&entry).line, r#"{"level":"warn","logger":"sandbox","message":"m","pid":"7"}"#);
    }

    #[test]
    fn log_queries_are_checked_by_field() {
        let asked = log_query(&Query::of("cursor=1500&limit=5&direction=forward&level=warn&search=x")).unwrap();
        assert_eq!((asked.limit, asked.direction, asked.level), (5, LogDirection::Forward, Some(LogLevel::Warn)));
        for bad in ["direction=up", "level=loud", "limit=1001", "cursor=x", &format!("search={}", "x".repeat(257))] {
            assert_eq!(log_query(&Query::of(bad)).unwrap_err().code_and_message().0, 400, "{bad}");
        }
    }
}
