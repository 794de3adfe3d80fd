//! Metrics: in both families of units, and for ranges in seconds (2.x) as well as in milliseconds (1.x).

use super::super::ApiState;
use super::super::e2b::ask::{Query, SandboxPath, Unit};
use super::super::e2b::observe::{latest, metric};
use super::super::error::ApiError;
use super::wire;
use crate::model::MetricPoint;
use axum::Json;
use axum::extract::State;
use std::ops::Range;
use time::{Duration, OffsetDateTime};

/// As seconds, a moment in the year 5138; as milliseconds, one in 1973. So a number tells its own unit.
const MILLISECONDS_FROM: i64 = 100_000_000_000;

/// `GET /sandboxes/{id}/metrics`.
pub(super) async fn metrics(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    query: Query,
) -> Result<Json<Vec<wire::Metric>>, ApiError> {
    let points = state.registry.metrics(id, window(&query)?).await?;
    Ok(Json(points.into_iter().map(shown).collect()))
}

/// `GET /sandboxes/metrics?sandbox_ids=a,b`.
pub(super) async fn latest_metrics(State(state): State<ApiState>, query: Query) -> Result<Json<wire::LatestMetrics>, ApiError> {
    let points = latest(&state, &query).await?;
    Ok(Json(wire::LatestMetrics { sandboxes: points.into_iter().map(|(id, point)| (id.to_string(), shown(point))).collect() }))
}

fn shown(point: MetricPoint) -> wire::Metric {
    // A quiet sandbox uses less than one MiB, and yet not nothing.
    let (mem_total_mib, mem_used_mib) = (point.memory_total.whole_mib(), point.memory_used.bytes().div_ceil(1 << 20));
    wire::Metric { common: metric(point), mem_total_mib, mem_used_mib }
}

/// Both ends are in it.
fn window(query: &Query) -> Result<Range<OffsetDateTime>, ApiError> {
    let (start, end) = (moment(query, "start")?, moment(query, "end")?);
    let end = end.unwrap_or_else(OffsetDateTime::now_utc).saturating_add(Duration::seconds(1));
    let start = start.unwrap_or(OffsetDateTime::UNIX_EPOCH);
    match start < end {
        true => Ok(start..end),
        false => Err(ApiError::bad_request("start is after end")),
    }
}

fn moment(query: &Query, name: &str) -> Result<Option<OffsetDateTime>, ApiError> {
    let is_long = query.get(name).and_then(|text| text.parse::<i64>().ok()).is_some_and(|number| number >= MILLISECONDS_FROM);
    query.moment(name, if is_long { Unit::Milliseconds } else { Unit::Seconds })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_and_milliseconds_mean_the_same_window() {
        let window = |query: &str| super::window(&Query::of(query)).unwrap();
        assert_eq!(window("start=1700000000&end=1700000010"), window("start=1700000000000&end=1700000010000"));
        assert_eq!(super::window(&Query::of("start=20&end=10")).unwrap_err().code_and_message(), (400, "start is after end"));
    }
}
