//! Lists of sandboxes: filters and pages.
//!
//! HopX tells stopped sandboxes from paused ones where the core's list does not, so a page is picked out of as many of
//! the core's as it takes.

use super::super::ApiState;
use super::super::layers::RequestId;
use super::ask::Query;
use super::error::HopxError;
use super::public_host::REGION;
use super::{sandboxes, wire};
use crate::model::{SandboxId, SandboxRecord, SandboxState};
use crate::sandbox::ListQuery;
use axum::extract::State;
use axum::{Extension, Json};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{HeaderMap, Uri};
use time::OffsetDateTime;

const PAGE_MAX: usize = 100;
/// Rows that are read from the core at once.
const CHUNK: u32 = 200;

/// Where the page before ended.
type Row = (OffsetDateTime, SandboxId);

/// What a filter leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Filter {
    All,
    /// Those that are shown with this word.
    Only(&'static str),
    /// No sandbox of this server is ever so.
    Nothing,
}

/// `GET /v1/sandboxes`.
pub(super) async fn page(
    State(state): State<ApiState>,
    Extension(request_id): Extension<RequestId>,
    uri: Uri,
    headers: HeaderMap,
    query: Query,
) -> Result<Json<wire::List<wire::Sandbox>>, HopxError> {
    let limit = query.limit(PAGE_MAX)?;
    let after = query.get("cursor").map(read_cursor).transpose()?;
    let elsewhere = query.get("region").is_some_and(|region| region != REGION);
    let (rows, next) = match status_filter(query.get("status"))? {
        Filter::Nothing => (Vec::new(), None),
        _ if elsewhere => (Vec::new(), None),
        filter => pick(&state, filter, after, limit).await?,
    };
    Ok(Json(wire::List {
        object: "list",
        data: rows.into_iter().map(|record| sandboxes::shown(&state, &uri, &headers, record)).collect(),
        has_more: next.is_some(),
        next_cursor: next.map(cursor),
        url: "/v1/sandboxes",
        request_id: request_id.as_str().to_owned(),
    }))
}

fn status_filter(asked: Option<&str>) -> Result<Filter, HopxError> {
    match asked {
        None => Ok(Filter::All),
        Some("running" | "active") => Ok(Filter::Only("running")),
        Some("paused") => Ok(Filter::Only("paused")),
        Some("stopped") => Ok(Filter::Only("stopped")),
        Some("creating" | "error" | "deleted") => Ok(Filter::Nothing),
        Some(other) => {
            Err(HopxError::invalid(format!("status is '{other}'; it must be running, paused, stopped, creating, error or deleted")))
        }
    }
}

/// The next `limit` rows, newest first, and where they end if there are more.
async fn pick(state: &ApiState, filter: Filter, after: Option<Row>, limit: usize) -> Result<(Vec<SandboxRecord>, Option<Row>), HopxError> {
    let states = match filter {
        Filter::All | Filter::Nothing => Vec::new(),
        Filter::Only("running") => vec![SandboxState::Running],
        Filter::Only(_) => vec![SandboxState::Paused],
    };
    let mut list = ListQuery { states, limit: CHUNK, after, ..ListQuery::default() };
    let mut rows: Vec<SandboxRecord> = Vec::new();
    loop {
        let chunk = state.registry.list(list.clone()).await?;
        rows.extend(chunk.sandboxes.into_iter().filter(|record| match filter {
            Filter::Only(word) => sandboxes::status(record) == word,
            Filter::All | Filter::Nothing => true,
        }));
        if rows.len() > limit || chunk.next.is_none() {
            break;
        }
        list.after = chunk.next;
    }
    let more = rows.len() > limit;
    rows.truncate(limit);
    let next = rows.last().filter(|_| more).map(|last| (last.started_at, last.id));
    Ok((rows, next))
}

fn cursor((at, id): Row) -> String {
    URL_SAFE_NO_PAD.encode(format!("{}.{id}", at.unix_timestamp_nanos()))
}

fn read_cursor(text: &str) -> Result<Row, HopxError> {
    let read = || {
        let row = String::from_utf8(URL_SAFE_NO_PAD.decode(text).ok()?).ok()?;
        let (at, id) = row.split_once('.')?;
        Some((OffsetDateTime::from_unix_timestamp_nanos(at.parse().ok()?).ok()?, id.parse().ok()?))
    };
    read().ok_or_else(|| HopxError::invalid("cursor is malformed; it must be the next_cursor of the page before"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_leads_back_to_its_row_and_nonsense_to_none() {
        let row = (OffsetDateTime::from_unix_timestamp_nanos(1_767_323_045_678_901_000).unwrap(), SandboxId::random());
        assert_eq!(read_cursor(&cursor(row)).unwrap(), row);
        for text in ["", "x", "AAAA", &cursor(row)[1..]] {
            assert_eq!(read_cursor(text).unwrap_err().status_and_message().0, 400, "{text}");
        }
    }

    #[test]
    fn unknown_states_are_named() {
        assert_eq!(status_filter(Some("stopped")).unwrap(), Filter::Only("stopped"));
        assert_eq!(status_filter(Some("error")).unwrap(), Filter::Nothing);
        assert!(status_filter(Some("asleep")).unwrap_err().status_and_message().1.starts_with("status is 'asleep'"));
    }
}
