//! What concerns all sandboxes together: the quota and how much of it is used, events, templates in pages.

use super::super::ApiState;
use super::super::e2b::ask::{Query, Unit, sandbox_id};
use super::super::e2b::{templates as e2b_templates, wire as e2b};
use super::super::error::ApiError;
use super::wire;
use crate::model::{EventKind, EventRecord, FailureKind};
use crate::sandbox::{EventQuery, ListOrder};
use axum::Json;
use axum::extract::State;
use time::{Duration, OffsetDateTime};

const PAGE_MAX: u32 = 100;

/// `GET /v2/templates`: numbered pages, newest first. All templates have one type here.
pub(super) async fn templates(State(state): State<ApiState>, query: Query) -> Result<Json<wire::Templates>, ApiError> {
    let limit = query.limit(PAGE_MAX)?;
    let page = match query.get("page") {
        None => 1,
        Some(text) => text
            .parse()
            .ok()
            .filter(|page| *page >= 1)
            .ok_or_else(|| ApiError::bad_request(format!("page is '{text}'; it must be a number from 1 on")))?,
    };
    let mut all: Vec<e2b::Template> = e2b_templates::newest_first(&state).await?;
    let total = all.len();
    let rows = usize::try_from(limit).unwrap_or(usize::MAX);
    let skipped = usize::try_from(page - 1_u32).unwrap_or(usize::MAX).saturating_mul(rows);
    let templates = all.drain(skipped.min(total)..skipped.saturating_add(rows).min(total)).map(with_a_last_start).collect();
    let total_pages = u32::try_from(total.div_ceil(rows)).unwrap_or(u32::MAX);
    Ok(Json(wire::Templates { templates, total, page, limit, total_pages }))
}

/// The clients of 1.x take no null for the time of the last start: until the first one it is the time that it was made.
pub(super) fn with_a_last_start(template: e2b::Template) -> e2b::Template {
    let last_spawned_at = template.last_spawned_at.or(Some(template.created_at));
    e2b::Template { last_spawned_at, ..template }
}

/// The template whose disk every sandbox has unless its own template says otherwise.
const BASE: &str = "base";

/// `GET /sandboxes/quota`. One sandbox may have all that all may have together.
pub(super) async fn quota(State(state): State<ApiState>) -> Result<Json<wire::Quota>, ApiError> {
    let (taken, max) = state.registry.places();
    let base = state.templates.resolve(BASE).await?;
    Ok(Json(wire::Quota {
        limit: wire::QuotaLimit {
            concurrent_instances: max.running,
            concurrent_vcpu: max.cpus,
            concurrent_ram_mb: max.memory.whole_mib(),
            max_length_hours: state.config.novita.run_max.as_secs().div_ceil(3600),
            disk_mb: base.build.resources.disk.whole_mib(),
            max_vcpu: max.cpus,
            max_ram_mb: max.memory.whole_mib(),
        },
        usage: wire::QuotaUsage {
            concurrent_instances: taken.running,
            concurrent_vcpu: taken.cpus,
            concurrent_ram_mb: taken.memory.whole_mib(),
        },
    }))
}

/// What is asked for when no start is named.
const EVENTS_PERIOD: Duration = Duration::days(30);
const EVENTS: u32 = 100;
const EVENTS_MAX: u32 = 1000;

/// `GET /sandboxes/events`: of every client's calls and of what happened by itself, the newest first.
pub(super) async fn events(State(state): State<ApiState>, query: Query) -> Result<Json<wire::Events>, ApiError> {
    let query = parse_events(&query)?;
    let seen = query.offset;
    let page = state.registry.events(query).await?;
    let has_more = page.total > seen.saturating_add(u64::try_from(page.events.len()).unwrap_or(u64::MAX));
    Ok(Json(wire::Events { items: page.events.into_iter().map(event).collect(), total: page.total, has_more }))
}

fn parse_events(query: &Query) -> Result<EventQuery, ApiError> {
    let end = query.moment("endTime", Unit::Seconds)?.unwrap_or_else(OffsetDateTime::now_utc).saturating_add(Duration::seconds(1));
    let start = query.moment("startTime", Unit::Seconds)?.unwrap_or_else(|| end.saturating_sub(EVENTS_PERIOD));
    let number = |name: &str| {
        let wrong = |text: &str| ApiError::bad_request(format!("{name} is '{text}'; it must be a number from 0 on"));
        query.get(name).map(|text| text.parse::<u64>().map_err(|_| wrong(text))).transpose()
    };
    let is_ascending = query.get("orderAsc").is_some_and(|text| text.eq_ignore_ascii_case("true") || text == "1");
    Ok(EventQuery {
        start,
        end,
        sandbox: query.get("sandboxID").map(sandbox_id).transpose()?,
        template: query.get("templateID").map(template_id).transpose()?,
        kinds: query.listed("events").map(kind).collect::<Result<_, _>>()?,
        failed: query.get("state").map(failed).transpose()?,
        order: if is_ascending { ListOrder::Ascending } else { ListOrder::Descending },
        offset: number("offset")?.unwrap_or(0),
        limit: number("limit")?.map_or(EVENTS, |limit| u32::try_from(limit).unwrap_or(u32::MAX).clamp(1, EVENTS_MAX)),
    })
}

fn template_id(text: &str) -> Result<crate::model::TemplateId, ApiError> {
    text.parse().map_err(|error: crate::model::ParseIdError| ApiError::bad_request(error.to_string()))
}

const SUCCESS: &str = "success";
const FAILED: &str = "failed";

fn failed(word: &str) -> Result<bool, ApiError> {
    match word {
        SUCCESS => Ok(false),
        FAILED | "failure" | "error" => Ok(true),
        other => Err(ApiError::bad_request(format!("state is '{other}'; it must be '{SUCCESS}' or '{FAILED}'"))),
    }
}

/// The status of an answer that tells of such a failure of a call; what the dialect's errors become.
fn status_of(call: EventKind, failure: FailureKind) -> u16 {
    match failure {
        FailureKind::NotDumpable if call == EventKind::Pause => 422,
        FailureKind::NotDumpable => 409,
        FailureKind::NotFound => 404,
        FailureKind::Wrong => 400,
        FailureKind::NotNow => 409,
        FailureKind::Full => 429,
        FailureKind::NoRoom => 507,
        FailureKind::Closing => 503,
        FailureKind::Internal => 500,
    }
}

/// Novita's words for what was done, and the status that such a call answers.
const KINDS: [(&str, EventKind, u16); 8] = [
    ("create", EventKind::Create, 201),
    ("pause", EventKind::Pause, 204),
    ("resume", EventKind::Resume, 201),
    ("connect", EventKind::Connect, 200),
    ("timeout", EventKind::Timeout, 204),
    ("clone", EventKind::Fork, 201),
    ("snapshot", EventKind::Snapshot, 201),
    ("delete", EventKind::Kill, 204),
];

fn kind(word: &str) -> Result<EventKind, ApiError> {
    let known = KINDS.iter().find(|(name, ..)| *name == word).map(|(_, kind, _)| *kind);
    known.ok_or_else(|| {
        let names = KINDS.map(|(name, ..)| name).join(", ");
        ApiError::bad_request(format!("events names '{word}'; there are {names}"))
    })
}

fn event(event: EventRecord) -> wire::Event {
    let (name, status) = KINDS.iter().find(|(_, kind, _)| *kind == event.kind).map_or(("", 0), |(name, _, status)| (*name, *status));
    // An end has a reason and is none the less an end.
    let has_failed = event.error.is_some() && event.kind != EventKind::Kill;
    wire::Event {
        event_id: format!("evt_{}", event.id),
        record_at: event.at.unix_timestamp(),
        template_id: event.template.to_string(),
        template_name: event.template_name.unwrap_or_default(),
        sandbox_id: event.sandbox.to_string(),
        event_name: name,
        state: if has_failed { FAILED } else { SUCCESS },
        error_msg: event.error.unwrap_or_default(),
        status_code: if has_failed { status_of(event.kind, event.failure.unwrap_or(FailureKind::Internal)) } else { status },
    }
}

#[cfg(test)]
mod tests {
    use super::super::lifecycle::not_paused;
    use super::*;
    use crate::model::{SandboxId, SandboxState};
    use crate::sandbox::{ConnectError, CreateError, Exhausted, Failure, ForkError, PauseError, Scarce, TimeoutError, UnknownSandbox};
    use std::time::Duration;

    fn require_same<E: Failure + Into<ApiError>>(error: E) {
        require(EventKind::Connect, error, Into::into);
    }

    fn require<E: Failure>(call: EventKind, error: E, answer: impl FnOnce(E) -> ApiError) {
        let (told, status) = (error.to_string(), status_of(call, error.kind()));
        assert_eq!(answer(error).code_and_message().0, status, "{told}");
    }

    #[test]
    fn an_event_tells_the_status_that_was_answered() {
        let (id, state) = (SandboxId::random(), SandboxState::Pausing);
        let exhausted = |scarce| Exhausted { scarce, what: "x".into(), used: "1".into(), limit: "1".into(), remedy: "y".into() };
        let broken = || Box::new(std::io::Error::other("x"));
        let (path, why): (crate::model::MountPath, String) = ("/v".parse().unwrap(), "gone".into());
        require_same(PauseError::Unknown(UnknownSandbox(id)));
        require_same(PauseError::AlreadyPaused(id));
        require(EventKind::Pause, PauseError::NotDumpable { id, findings: Vec::new() }, not_paused);
        require(EventKind::Pause, PauseError::AlreadyPaused(id), not_paused);
        require_same(ForkError::Source(PauseError::NotDumpable { id, findings: Vec::new() }));
        require_same(PauseError::SnapshotSpace { used: crate::model::ByteSize(1), limit: crate::model::ByteSize(1) });
        require_same(PauseError::Exhausted { id, exhausted: exhausted(Scarce::Disk) });
        require_same(PauseError::Dump { id, source: broken() });
        require_same(ConnectError::AlreadyRunning(id));
        require_same(ConnectError::InTransition { id, state });
        require_same(ConnectError::TooLong { asked: Duration::ZERO, limit: Duration::ZERO });
        require_same(ConnectError::Exhausted { id, exhausted: exhausted(Scarce::Disk) });
        require_same(ConnectError::Exhausted { id, exhausted: exhausted(Scarce::Places) });
        require_same(ConnectError::BadMountPath { id, path: path.clone(), wrong: why.clone() });
        require_same(ConnectError::VolumeFile { id, path: "/v/f".into(), why: why.clone() });
        require_same(ConnectError::Restore { id, source: broken() });
        require_same(TimeoutError::NotRunning { id, state });
        require_same(TimeoutError::TooLong { asked: Duration::ZERO, limit: Duration::ZERO });
        require_same(CreateError::ShuttingDown);
        require_same(CreateError::Killed(id));
        require_same(CreateError::NoVolume("v".parse().unwrap()));
        require_same(CreateError::BadMountPath { path, wrong: why.clone() });
        require_same(CreateError::VolumeFile { path: "/v/f".into(), why });
        require_same(CreateError::Start { id, source: broken() });
        require_same(ForkError::Source(PauseError::InTransition { id, state }));
        require_same(ForkError::Copy(CreateError::Exhausted(exhausted(Scarce::Disk))));
    }
}
