//! Lists of sandboxes: filters, order and pages.

use super::super::ApiState;
use super::super::error::ApiError;
use super::ask::{Query, rfc3339};
use super::cursor::{self, NEXT_TOKEN};
use super::{sandboxes, wire};
use crate::model::{SandboxState, TemplateId};
use crate::sandbox::{ListOrder, ListQuery};
use crate::template::ResolveError;
use axum::Json;
use axum::extract::State;
use http::{HeaderMap, HeaderName, HeaderValue};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Running sandboxes, whatever the filters.
const TOTAL_RUNNING: HeaderName = HeaderName::from_static("x-total-running");
const PAGE_MAX: u32 = 100;
/// Rows that the old call, which knows no pages, reads from the core at once.
const CHUNK: u32 = 1000;

/// A page and, in the headers, where the next one begins.
pub(in crate::api) type Page = (HeaderMap, Json<Vec<wire::ListedSandbox>>);

/// `GET /v2/sandboxes`.
pub(super) async fn page(State(state): State<ApiState>, query: Query) -> Result<Page, ApiError> {
    let limit = query.limit(PAGE_MAX)?;
    page_of(&state, &query, limit).await
}

/// So many of the sandboxes that the query asks for.
pub(in crate::api) async fn page_of(state: &ApiState, query: &Query, limit: u32) -> Result<Page, ApiError> {
    let list = ListQuery { limit, ..parse(query)? };
    let order = list.order;
    let list = match template(state, query).await? {
        Filter::None => list,
        Filter::Only(template) => ListQuery { template: Some(template), ..list },
        Filter::Nothing => return Ok((HeaderMap::new(), Json(Vec::new()))),
    };
    let page = state.registry.list(list).await?;
    let mut headers = HeaderMap::new();
    headers.insert(TOTAL_RUNNING, HeaderValue::from(page.running_total));
    if let Some((at, id)) = page.next {
        headers.insert(NEXT_TOKEN, cursor::token(at, id, order));
    }
    Ok((headers, Json(page.sandboxes.into_iter().map(sandboxes::listed).collect())))
}

/// `GET /sandboxes`: all running ones, of old clients.
pub(super) async fn running(State(state): State<ApiState>, query: Query) -> Result<Json<Vec<wire::ListedSandbox>>, ApiError> {
    let metadata = query.get("metadata").map(metadata).transpose()?.unwrap_or_default();
    let mut list = ListQuery { metadata, states: vec![SandboxState::Running], limit: CHUNK, ..ListQuery::default() };
    let mut rows = Vec::new();
    loop {
        let page = state.registry.list(list.clone()).await?;
        rows.extend(page.sandboxes.into_iter().map(sandboxes::listed));
        match page.next {
            Some(next) => list.after = Some(next),
            None => return Ok(Json(rows)),
        }
    }
}

fn parse(query: &Query) -> Result<ListQuery, ApiError> {
    let order = order(query)?;
    Ok(ListQuery {
        metadata: query.get("metadata").map(metadata).transpose()?.unwrap_or_default(),
        states: query.listed("state").map(state).collect::<Result<_, _>>()?,
        order,
        started_after: query.get("startedAfter").map(|text| rfc3339("startedAfter", text)).transpose()?,
        template: None,
        limit: PAGE_MAX,
        after: query.get("nextToken").map(|token| cursor::row(token, order)).transpose()?,
    })
}

fn order(query: &Query) -> Result<ListOrder, ApiError> {
    match query.get("order") {
        None | Some("desc") => Ok(ListOrder::Descending),
        Some("asc") => Ok(ListOrder::Ascending),
        Some(other) => Err(ApiError::bad_request(format!("order is '{other}'; it must be 'asc' or 'desc'"))),
    }
}

fn state(word: &str) -> Result<SandboxState, ApiError> {
    match word {
        "running" => Ok(SandboxState::Running),
        "paused" => Ok(SandboxState::Paused),
        other => Err(ApiError::bad_request(format!("state is '{other}'; it must be 'running', 'paused' or both, joined by a comma"))),
    }
}

/// What `template` leaves of the list.
enum Filter {
    None,
    Only(TemplateId),
    /// There is no such template.
    Nothing,
}

async fn template(state: &ApiState, query: &Query) -> Result<Filter, ApiError> {
    let Some(name) = query.get("template") else { return Ok(Filter::None) };
    if name.contains(':') {
        return Err(ApiError::bad_request(format!("Invalid template: '{name}' has a tag; a list is filtered by whole templates")));
    }
    match state.templates.resolve(name).await {
        Ok(resolved) => Ok(Filter::Only(resolved.template.id)),
        Err(
            ResolveError::UnknownTemplate(_)
            | ResolveError::UnknownTag { .. }
            | ResolveError::UnknownBuild { .. }
            | ResolveError::Malformed { .. }
            | ResolveError::BadTag { .. },
        ) => Ok(Filter::Nothing),
        Err(failed @ ResolveError::Store(_)) => Err(failed.into()),
    }
}

/// The pairs of a metadata filter. SDKs escape each key and value, then the pairs, then the query: the query's own
/// decoding has been done when this sees it, the two inner ones have not.
pub(super) fn metadata(value: &str) -> Result<BTreeMap<String, String>, ApiError> {
    let wrong = |problem: &str| {
        ApiError::bad_request(format!("Error parsing metadata: {problem} (metadata must be escaped pairs such as user=1&app=x)"))
    };
    let pairs = unescape(value).ok_or_else(|| wrong("bad percent-encoding"))?;
    let split = |pair: &str| {
        let (key, value) = pair.split_once('=').ok_or_else(|| wrong(&format!("'{pair}' has no '='")))?;
        let unescaped = |text: &str| unescape(text).map(Cow::into_owned).ok_or_else(|| wrong(&format!("bad percent-encoding in '{text}'")));
        Ok((unescaped(key)?, unescaped(value)?))
    };
    pairs.split('&').filter(|pair| !pair.is_empty()).map(split).collect()
}

/// As Go's `QueryUnescape`: `+` is a space, and what is no escape sequence or no UTF-8 is an error.
fn unescape(text: &str) -> Option<Cow<'_, str>> {
    let is_hex = |at: usize| text.as_bytes().get(at).is_some_and(u8::is_ascii_hexdigit);
    let is_whole = text.bytes().enumerate().filter(|(_, byte)| *byte == b'%').all(|(at, _)| is_hex(at + 1) && is_hex(at + 2));
    let spaced = text.replace('+', " ");
    let decoded = percent_encoding::percent_decode_str(&spaced).decode_utf8().ok()?.into_owned();
    is_whole.then_some(Cow::Owned(decoded))
}

#[cfg(test)]
mod tests {
    use super::*;
    use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
    use proptest::prelude::*;

    fn pairs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn message(error: ApiError) -> (u16, String) {
        let (code, message) = error.code_and_message();
        (code, message.to_owned())
    }

    #[test]
    fn the_contracts_examples_are_decoded() {
        let e2b = Query::of("metadata=a%252520b%3Dc%252526d%25253D%2525C3%2525A9%26x%3Dy");
        assert_eq!(metadata(e2b.get("metadata").unwrap()).unwrap(), pairs(&[("a b", "c&d=é"), ("x", "y")]));
        let novita = pairs(&[("userId", "123"), ("sp ace/é", "a&b=c")]);
        let python = Query::of("metadata=userId%3D123%26sp%252520ace%252F%2525C3%2525A9%3Da%252526b%25253Dc&limit=1");
        assert_eq!(metadata(python.get("metadata").unwrap()).unwrap(), novita);
        let js = Query::of("metadata=userId%3D123%26sp%252520ace%25252F%2525C3%2525A9%3Da%252526b%25253Dc");
        assert_eq!(metadata(js.get("metadata").unwrap()).unwrap(), novita);
    }

    #[test]
    fn a_filter_that_is_no_list_of_pairs_is_refused() {
        for bad in ["a", "a=1&b", "a=%ZZ", "a=%", "%FF=1"] {
            let (code, message) = message(metadata(bad).unwrap_err());
            assert!(code == 400 && message.starts_with("Error parsing metadata"), "{bad}: {message}");
        }
        assert_eq!(metadata("").unwrap(), BTreeMap::new());
    }

    #[test]
    fn the_query_is_read_in_full() {
        let list = parse(&Query::of("state=running,paused&order=asc&startedAfter=2026-01-02T03:04:05.000006Z")).unwrap();
        assert_eq!(list.states, [SandboxState::Running, SandboxState::Paused]);
        assert_eq!(list.order, ListOrder::Ascending);
        assert_eq!(list.started_after, Some(time::macros::datetime!(2026-01-02 03:04:05.000006 UTC)));
        let default = parse(&Query::of("state=&metadata=")).unwrap();
        assert_eq!((default.states.len(), default.order, default.limit), (0, ListOrder::Descending, 100));
    }

    #[test]
    fn bad_parameters_are_refused_by_name_and_value() {
        let refused = |query: &str| message(parse(&Query::of(query)).unwrap_err()).1;
        assert_eq!(refused("state=stopped"), "state is 'stopped'; it must be 'running', 'paused' or both, joined by a comma");
        assert_eq!(refused("order=up"), "order is 'up'; it must be 'asc' or 'desc'");
        assert!(refused("nextToken=x").starts_with("Invalid next token"));
        assert!(refused("startedAfter=now").starts_with("startedAfter is 'now'"));
    }

    proptest! {
        #[test]
        fn every_filter_is_read_back_as_the_sdk_meant_it(wanted in proptest::collection::btree_map("\\PC{0,12}", "\\PC{0,12}", 1..4)) {
            let escape = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
            let form = wanted.iter().map(|(key, value)| format!("{}={}", escape(&escape(key)), escape(&escape(value)))).collect::<Vec<_>>().join("&");
            let query = Query::of(&format!("metadata={}", escape(&form)));
            prop_assert_eq!(metadata(query.get("metadata").unwrap()).unwrap(), wanted);
        }

        #[test]
        fn no_filter_panics(text in "[ -~]{0,40}") {
            let _any_answer = metadata(&text);
        }
    }
}
