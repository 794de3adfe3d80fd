//! Builds: registered, fed with files, started, watched (contract/e2b.md 5).

use super::super::ApiState;
use super::super::body::{Json as Body, OptionalJson};
use super::super::error::ApiError;
use super::ask::{Query, Segment, Unit};
use super::observe::level;
use super::templates::shown;
use super::wire::{self, builds as build_wire};
use crate::model::{BuildId, LogEntry, LogLevel, TemplateId};
use crate::sandbox::{LogDirection, LogQuery};
use crate::template::build::{Base, Builds, Cache, LogPage, NewBuild, Plan, Step};
use crate::template::image::{Credentials, ImageRequest};
use axum::Json;
use axum::extract::{FromRequestParts, Path, Request, State};
use http::request::Parts;
use http::{HeaderMap, StatusCode};
use http_body_util::BodyExt;
use time::OffsetDateTime;

/// Lines of one answer; clients ask again from there on.
const LOG_LINES_MAX: u32 = 100;
/// Lines that are looked through for those that say why a step failed.
const REASON_LINES_MAX: u32 = 1000;
/// How long a link for an upload can be used, in seconds: as long as the SDKs let an upload take.
const LINK_SECONDS: i64 = 3600;

/// `{id}` and `{build}` of the path.
#[derive(Debug)]
pub(super) struct BuildPath {
    template: String,
    build: BuildId,
}

impl FromRequestParts<ApiState> for BuildPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &ApiState) -> Result<Self, ApiError> {
        let TwoSegments(template, build) = TwoSegments::from_request_parts(parts, state).await?;
        let build = build.parse().map_err(|_| ApiError::bad_request("Invalid build id"))?;
        Ok(Self { template, build })
    }
}

/// Both `{…}` of the path, percent-decoded.
#[derive(Debug)]
pub(super) struct TwoSegments(String, String);

impl FromRequestParts<ApiState> for TwoSegments {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &ApiState) -> Result<Self, ApiError> {
        let found = Path::<(String, String)>::from_request_parts(parts, state).await;
        let Path((first, second)) =
            found.map_err(|error| ApiError::bad_request(format!("the path is malformed: {}", error.body_text())))?;
        Ok(Self(first, second))
    }
}

// ---------------------------------------------------------------- register

/// `POST /v3/templates` and `POST /v2/templates`.
pub(super) async fn request(
    State(state): State<ApiState>,
    Body(asked): Body<build_wire::NewBuild>,
) -> Result<(StatusCode, Json<build_wire::RequestedBuild>), ApiError> {
    let name = asked.name.or(asked.alias).ok_or_else(|| ApiError::bad_request("Name is required"))?;
    register(&state, NewBuild { name, tags: asked.tags.unwrap_or_default(), cpu_count: asked.cpu_count, memory_mib: asked.memory_mb }).await
}

/// `POST /v2/templates/{id}`: a new build of a template that is there, as older clients ask for it.
pub(super) async fn request_again(
    State(state): State<ApiState>,
    Segment(id): Segment,
    OptionalJson(asked): OptionalJson<build_wire::NewBuild>,
) -> Result<(StatusCode, Json<build_wire::RequestedBuild>), ApiError> {
    let template = state.templates.find(&id).await?;
    let name = template.aliases.first().cloned().unwrap_or_else(|| template.id.to_string());
    register(&state, NewBuild { name, tags: Vec::new(), cpu_count: asked.cpu_count, memory_mib: asked.memory_mb }).await
}

async fn register(state: &ApiState, new: NewBuild) -> Result<(StatusCode, Json<build_wire::RequestedBuild>), ApiError> {
    let registered = state.builds.register(new).await?;
    let build = state.templates.build(registered.build).await?;
    let template = shown(&registered.template, &build);
    Ok((StatusCode::ACCEPTED, Json(build_wire::RequestedBuild { template, tags: registered.tags })))
}

// ---------------------------------------------------------------- files

/// `GET /templates/{id}/files/{hash}`: whether the archive is there, and where to put it.
pub(super) async fn file_link(
    State(state): State<ApiState>,
    TwoSegments(template, hash): TwoSegments,
    headers: HeaderMap,
) -> Result<(StatusCode, Json<build_wire::FileUpload>), ApiError> {
    let template = state.templates.find(&template).await?.id;
    let present = state.builds.has_files(template, &hash)?;
    let expires = OffsetDateTime::now_utc().unix_timestamp() + LINK_SECONDS;
    let signature = state.builds.sign_upload(template, &hash, expires);
    let base = own_address(&headers, &state.config.domain);
    let url = format!("{base}/templates/{template}/files/{hash}?expires={expires}&signature={signature}");
    Ok((StatusCode::CREATED, Json(build_wire::FileUpload { present, url })))
}

/// By which address the client has reached us: a link for it must lead the same way.
fn own_address(headers: &HeaderMap, domain: &str) -> String {
    let text = |name: http::HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let host = text(http::header::HOST).filter(|host| !host.is_empty()).unwrap_or("localhost");
    let forwarded = text(http::HeaderName::from_static("x-forwarded-proto")).filter(|scheme| matches!(*scheme, "http" | "https"));
    let is_below_domain = host.to_ascii_lowercase().ends_with(&domain.to_ascii_lowercase());
    let scheme = forwarded.unwrap_or(if is_below_domain { "https" } else { "http" });
    format!("{scheme}://{host}")
}

/// `PUT /templates/{id}/files/{hash}`: needs the link's signature and no key.
pub(super) async fn upload(
    State(state): State<ApiState>,
    TwoSegments(template, hash): TwoSegments,
    query: Query,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let refused = || ApiError::new(StatusCode::FORBIDDEN, "the link is not signed by this server, or its time is up; ask for a new one");
    let template: TemplateId = template.parse().map_err(|_| refused())?;
    let expires: i64 = query.get("expires").and_then(|text| text.parse().ok()).ok_or_else(refused)?;
    let signature = query.get("signature").ok_or_else(refused)?;
    if expires < OffsetDateTime::now_utc().unix_timestamp() || !state.builds.may_upload(template, &hash, expires, signature) {
        return Err(refused());
    }
    let mut upload = state.builds.upload(template, &hash).await?;
    let mut body = request.into_body();
    let time_max = state.config.body_time_max;
    loop {
        let frame = tokio::time::timeout(time_max, body.frame()).await;
        let stalled = |_| ApiError::new(StatusCode::REQUEST_TIMEOUT, format!("nothing of the archive came for {time_max:?}"));
        let Some(frame) = frame.map_err(stalled)? else { break };
        let broken = |_| ApiError::bad_request("the archive ended before it was complete");
        if let Ok(piece) = frame.map_err(broken)?.into_data() {
            upload.write(&piece).await?;
        }
    }
    upload.finish().await?;
    Ok(StatusCode::OK)
}

// ---------------------------------------------------------------- start

/// `POST /v2/templates/{id}/builds/{build}`.
pub(super) async fn start(
    State(state): State<ApiState>,
    path: BuildPath,
    Body(asked): Body<build_wire::StartBuild>,
) -> Result<StatusCode, ApiError> {
    let template = state.templates.find(&path.template).await?.id;
    state.builds.start(template, path.build, plan(asked)?).await?;
    Ok(StatusCode::ACCEPTED)
}

fn plan(asked: build_wire::StartBuild) -> Result<Plan, ApiError> {
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let base = match (given(asked.from_image), given(asked.from_template)) {
        (Some(reference), None) => Base::Image(ImageRequest { reference, credentials: asked.from_image_registry.map(credentials) }),
        (None, Some(name)) => Base::Template(name),
        (None, None) => return Err(ApiError::bad_request("fromImage or fromTemplate is required")),
        (Some(_), Some(_)) => return Err(ApiError::bad_request("fromImage and fromTemplate exclude each other")),
    };
    Ok(Plan {
        base,
        cache: cache(asked.force),
        steps: asked.steps.unwrap_or_default().into_iter().map(step).collect(),
        start_command: given(asked.start_cmd),
        ready_command: given(asked.ready_cmd),
    })
}

fn cache(force: Option<bool>) -> Cache {
    if force == Some(true) { Cache::Skip } else { Cache::Use }
}

fn step(step: build_wire::Step) -> Step {
    Step {
        kind: step.kind,
        arguments: step.args.unwrap_or_default(),
        files_hash: step.files_hash.filter(|hash| !hash.is_empty()),
        cache: cache(step.force),
    }
}

fn credentials(registry: build_wire::ImageRegistry) -> Credentials {
    match registry {
        build_wire::ImageRegistry::Registry { username, password } => Credentials::Basic { username, password },
        build_wire::ImageRegistry::Aws { aws_access_key_id, aws_secret_access_key, aws_region } => {
            Credentials::Aws { access_key_id: aws_access_key_id, secret_access_key: aws_secret_access_key, region: aws_region }
        }
        build_wire::ImageRegistry::Gcp { service_account_json } => Credentials::Gcp { service_account_json },
    }
}

// ---------------------------------------------------------------- watch

/// `GET /templates/{id}/builds/{build}/status`.
pub(super) async fn status(State(state): State<ApiState>, path: BuildPath, query: Query) -> Result<Json<build_wire::BuildInfo>, ApiError> {
    let template = state.templates.find(&path.template).await?.id;
    // Before the log, so that a build is not said to be over while lines of it are still to come.
    let status = state.builds.status(template, path.build).await?;
    let entries = state.builds.log(path.build, log_page(&query)?).await?;
    let reason = match status.failure {
        None => None,
        Some(failure) => Some(build_wire::BuildReason {
            log_entries: loud_lines_of(&state, path.build, failure.step.as_deref()).await?,
            message: failure.message,
            step: failure.step,
        }),
    };
    Ok(Json(build_wire::BuildInfo {
        template_id: template.to_string(),
        build_id: path.build.to_string(),
        status: status.build.state,
        logs: [],
        log_entries: entries.into_iter().map(entry).collect(),
        reason,
    }))
}

fn log_page(query: &Query) -> Result<LogPage, ApiError> {
    let offset = match query.get("logsOffset") {
        None => 0,
        Some(text) => text.parse().map_err(|_| ApiError::bad_request(format!("logsOffset is '{text}'; it must be a number from 0 on")))?,
    };
    let limit = match query.get("limit") {
        None => LOG_LINES_MAX,
        Some(text) => text.parse().map_err(|_| ApiError::bad_request(format!("limit is '{text}'; it must be a number from 0 to 100")))?,
    };
    let level = query.get("level").map(level).transpose()?.unwrap_or(LogLevel::Debug);
    Ok(LogPage { level, offset, limit: limit.min(LOG_LINES_MAX) })
}

/// What a failed part of the build said louder than the rest.
async fn loud_lines_of(state: &ApiState, build: BuildId, step: Option<&str>) -> Result<Vec<build_wire::BuildLogEntry>, ApiError> {
    let Some(step) = step else { return Ok(Vec::new()) };
    let lines = state.builds.log(build, LogPage { level: LogLevel::Warn, offset: 0, limit: REASON_LINES_MAX }).await?;
    Ok(lines.into_iter().filter(|line| Builds::step_of(line) == Some(step)).map(entry).collect())
}

/// `GET /templates/{id}/builds/{build}/logs`.
pub(super) async fn logs(State(state): State<ApiState>, path: BuildPath, query: Query) -> Result<Json<build_wire::BuildLogs>, ApiError> {
    let template = state.templates.find(&path.template).await?.id;
    state.builds.status(template, path.build).await?;
    let direction = match query.get("direction") {
        None | Some("forward") => LogDirection::Forward,
        Some("backward") => LogDirection::Backward,
        Some(other) => return Err(ApiError::bad_request(format!("direction is '{other}'; it must be 'forward' or 'backward'"))),
    };
    let asked = LogQuery {
        cursor: query.moment("cursor", Unit::Milliseconds)?,
        limit: query.limit(LOG_LINES_MAX)?,
        direction,
        level: query.get("level").map(level).transpose()?,
        search: None,
    };
    let entries = state.builds.log_from(path.build, asked).await?;
    Ok(Json(build_wire::BuildLogs { logs: entries.into_iter().map(entry).collect() }))
}

fn entry(entry: LogEntry) -> build_wire::BuildLogEntry {
    let step = Builds::step_of(&entry).map(ToOwned::to_owned);
    build_wire::BuildLogEntry { timestamp: wire::Time(entry.at), level: entry.level, message: entry.message, step }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(json: &str) -> Result<Plan, ApiError> {
        plan(serde_json::from_str(json).unwrap())
    }

    #[test]
    fn a_build_has_one_base() {
        assert_eq!(asked(r#"{"fromTemplate": "base"}"#).unwrap().base, Base::Template("base".into()));
        for json in ["{}", r#"{"fromImage": ""}"#, r#"{"fromImage": "a", "fromTemplate": "b"}"#] {
            assert_eq!(asked(json).unwrap_err().code_and_message().0, 400, "{json}");
        }
    }

    #[test]
    fn credentials_are_read_by_their_kind_and_never_shown() {
        let basic = r#"{"fromImage": "a", "fromImageRegistry": {"type": "registry", "username": "u", "password": "hidden"}}"#;
        let aws = r#"{"fromImage": "a", "fromImageRegistry": {"type": "aws", "awsAccessKeyId": "k", "awsSecretAccessKey": "hidden", "awsRegion": "r"}}"#;
        let gcp = r#"{"fromImage": "a", "fromImageRegistry": {"type": "gcp", "serviceAccountJson": "hidden"}}"#;
        for json in [basic, aws, gcp] {
            let plan = asked(json).unwrap();
            let Base::Image(ImageRequest { credentials: Some(_), .. }) = &plan.base else { panic!("{json}") };
            assert!(!format!("{plan:?}").contains("hidden"), "{json}");
        }
    }

    #[test]
    fn steps_keep_what_they_were_sent_with() {
        let plan = asked(
            r#"{"fromImage": "a", "force": true, "startCmd": "", "steps": [{"type": "COPY", "args": ["a", "b", "", ""], "filesHash": "ff", "force": true}, {"type": "RUN", "filesHash": ""}]}"#,
        );
        let plan = plan.unwrap();
        assert_eq!((plan.cache, plan.start_command, plan.steps.len()), (Cache::Skip, None, 2));
        assert_eq!((plan.steps[0].files_hash.as_deref(), plan.steps[0].cache), (Some("ff"), Cache::Skip));
        assert_eq!((plan.steps[1].files_hash.as_deref(), plan.steps[1].cache, plan.steps[1].arguments.len()), (None, Cache::Use, 0));
    }

    #[test]
    fn links_lead_the_way_that_the_client_came() {
        let address = |host: &str, forwarded: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert("host", host.parse().unwrap());
            if let Some(scheme) = forwarded {
                headers.insert("x-forwarded-proto", scheme.parse().unwrap());
            }
            own_address(&headers, "stillbox.localhost:3443")
        };
        assert_eq!(address("localhost:3000", None), "http://localhost:3000");
        assert_eq!(address("api.Stillbox.localhost:3443", None), "https://api.Stillbox.localhost:3443");
        assert_eq!(address("boxes.example", Some("https")), "https://boxes.example");
        assert_eq!(address("boxes.example", Some("gopher")), "http://boxes.example");
    }

    #[test]
    fn a_log_page_has_at_most_a_hundred_lines() {
        let page = log_page(&Query::of("logsOffset=7&limit=1000&level=warn")).unwrap();
        assert_eq!((page.offset, page.limit, page.level), (7, 100, LogLevel::Warn));
        assert!(log_page(&Query::of("logsOffset=-1")).is_err());
    }
}
