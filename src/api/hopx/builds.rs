//! Builds of templates: HopX's one request registers and starts; files come before, when no template is known yet.
//!
//! The core keeps archives per template. Those that come before any are put under [`UPLOADS`], an id that no template has,
//! and are linked to the template when its build starts.

use super::super::ApiState;
use super::ask::{Body, Query, Segment};
use super::error::HopxError;
use super::public_host::own_address;
use super::templates::{find, status as shown_status};
use super::wire::{Time, builds as wire};
use crate::model::{BuildId, BuildState, LogLevel, TemplateId};
use crate::template::ResolveError;
use crate::template::build::{Base, Builds, Cache, LogPage, NewBuild, Plan, Step};
use crate::template::image::{Credentials, ImageRequest};
use axum::Json;
use axum::extract::{Request, State};
use http::{HeaderMap, StatusCode, Uri};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use time::OffsetDateTime;

/// Where archives wait that no template has asked for yet.
const UPLOADS: &str = "hopxuploads000000000";
/// How long a link for an upload can be used.
const LINK_SECONDS: i64 = 3600;
/// HopX's builds know images only; under this name a template of ours is one.
const OWN_TEMPLATES: &str = "stillbox/";
/// Lines of one answer.
const LOG_LINES_MAX: u32 = 1000;
/// The kinds of checks that a start command can have.
const CHECKS: &str = "port, url, file, process or command";

fn uploads() -> TemplateId {
    UPLOADS.parse().expect("20 characters of a-z and 0-9")
}

// ---------------------------------------------------------------- files

/// `POST /v1/templates/files/upload-link`.
pub(super) async fn upload_link(
    State(state): State<ApiState>,
    uri: Uri,
    headers: HeaderMap,
    Body(asked): Body<wire::UploadLink>,
) -> Result<Json<wire::UploadPlace>, HopxError> {
    let (hash, expires_at) = (asked.files_hash, OffsetDateTime::now_utc() + time::Duration::seconds(LINK_SECONDS));
    let expires = expires_at.unix_timestamp();
    let present = state.builds.has_files(uploads(), &hash)?;
    let signature = state.builds.sign_upload(uploads(), &hash, expires);
    let base = own_address(&state.config.domain, &uri, &headers);
    let url = format!("{base}/v1/templates/files/{hash}?expires={expires}&signature={signature}");
    Ok(Json(wire::UploadPlace { present, upload_url: (!present).then_some(url), expires_at: Time(expires_at), files_hash: hash }))
}

/// `PUT /v1/templates/files/{hash}`: needs the link's signature and no key.
pub(super) async fn upload(
    State(state): State<ApiState>,
    Segment(hash): Segment,
    query: Query,
    request: Request,
) -> Result<Json<Value>, HopxError> {
    let refused = || HopxError::forbidden("the link is not signed by this server, or its time is up; ask for a new one");
    let expires: i64 = query.get("expires").and_then(|text| text.parse().ok()).ok_or_else(refused)?;
    let signature = query.get("signature").ok_or_else(refused)?;
    if expires < OffsetDateTime::now_utc().unix_timestamp() || !state.builds.may_upload(uploads(), &hash, expires, signature) {
        return Err(refused());
    }
    let mut upload = state.builds.upload(uploads(), &hash).await?;
    let (mut body, time_max) = (request.into_body(), state.config.body_time_max);
    loop {
        let stalled = |_| HopxError::invalid(format!("nothing of the archive came for {time_max:?}"));
        let Some(frame) = tokio::time::timeout(time_max, body.frame()).await.map_err(stalled)? else { break };
        let frame = frame.map_err(|_| HopxError::invalid("the archive ended before it was complete"))?;
        if let Ok(piece) = frame.into_data() {
            upload.write(&piece).await?;
        }
    }
    upload.finish().await?;
    Ok(Json(json!({ "files_hash": hash, "present": true })))
}

// ---------------------------------------------------------------- start

/// `POST /v1/templates/build`.
pub(super) async fn start(
    State(state): State<ApiState>,
    uri: Uri,
    headers: HeaderMap,
    Body(asked): Body<wire::NewBuild>,
) -> Result<(StatusCode, Json<wire::StartedBuild>), HopxError> {
    let name = asked.name.clone().filter(|name| !name.is_empty()).ok_or_else(|| HopxError::invalid("name is required"))?;
    refuse_known(&state, &name, asked.update).await?;
    let new = NewBuild { name, tags: Vec::new(), cpu_count: asked.cpu, memory_mib: asked.memory };
    let plan = plan(asked)?;
    let registered = state.builds.register(new).await?;
    let (template, build) = (registered.template.id, registered.build);
    for hash in plan.steps.iter().filter_map(|step| step.files_hash.as_deref()) {
        state.builds.share_files(uploads(), template, hash).await?;
    }
    state.builds.start(template, build, plan).await?;
    let base = own_address(&state.config.domain, &uri, &headers);
    let answer = wire::StartedBuild {
        build_id: build.to_string(),
        template_id: template.to_string(),
        status: shown_status(BuildState::Building),
        logs_url: format!("{base}/v1/templates/build/{template}/logs"),
    };
    Ok((StatusCode::ACCEPTED, Json(answer)))
}

/// A name that leads somewhere is built again only on request.
async fn refuse_known(state: &ApiState, name: &str, update: Option<bool>) -> Result<(), HopxError> {
    match state.templates.resolve(name).await {
        Ok(_) if update != Some(true) => {
            Err(HopxError::wrong_state(format!("template '{name}' exists already; build it with update = true, or choose another name")))
        }
        Ok(_) | Err(ResolveError::UnknownTemplate(_) | ResolveError::UnknownTag { .. } | ResolveError::UnknownBuild { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn plan(asked: wire::NewBuild) -> Result<Plan, HopxError> {
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let reference = given(asked.from_image).ok_or_else(|| HopxError::invalid("from_image is required"))?;
    let base = match reference.strip_prefix(OWN_TEMPLATES) {
        Some(name) => Base::Template(name.to_owned()),
        None => Base::Image(ImageRequest { reference, credentials: asked.registry_credentials.map(credentials) }),
    };
    let skips = asked.skip_cache == Some(true);
    Ok(Plan {
        base,
        cache: if skips { Cache::Skip } else { Cache::Use },
        steps: asked.steps.unwrap_or_default().into_iter().flat_map(steps).collect(),
        start_command: given(asked.start_cmd),
        ready_command: asked.ready_cmd.map(ready_command).transpose()?,
    })
}

fn credentials(held: wire::RegistryCredentials) -> Credentials {
    Credentials::Basic { username: held.username, password: held.password }
}

/// A COPY of several sources is one of each; its archive has them all.
fn steps(step: wire::Step) -> Vec<Step> {
    let cache = if step.skip_cache == Some(true) { Cache::Skip } else { Cache::Use };
    let arguments = step.args.unwrap_or_default();
    let copies = step.kind.eq_ignore_ascii_case("copy");
    let sources = arguments.first().filter(|sources| copies && sources.contains(','));
    let Some(sources) = sources else {
        return vec![Step { kind: step.kind, arguments, files_hash: step.files_hash, cache }];
    };
    let target = arguments.get(1).map(|target| format!("{}/", target.trim_end_matches('/'))).unwrap_or_default();
    let one = |source: &str| Step {
        kind: step.kind.clone(),
        arguments: vec![source.to_owned(), target.clone()],
        files_hash: step.files_hash.clone(),
        cache,
    };
    sources.split(',').map(str::trim).filter(|source| !source.is_empty()).map(one).collect()
}

/// The check as a command that succeeds once it holds; the core repeats it.
fn ready_command(check: wire::ReadyCheck) -> Result<String, HopxError> {
    let lacks = |field: &str| HopxError::invalid(format!("readyCmd of type '{}' needs {field}", check.kind));
    let text = |field: &Option<String>, name: &str| field.clone().filter(|text| !text.is_empty()).ok_or_else(|| lacks(name));
    match check.kind.as_str() {
        "port" => Ok(format!("bash -c 'exec 3<>/dev/tcp/127.0.0.1/{}'", check.port.ok_or_else(|| lacks("port"))?)),
        "url" => Ok(format!("curl --silent --fail --output /dev/null {}", quoted(&text(&check.url, "url")?))),
        "file" => Ok(format!("test -e {}", quoted(&text(&check.path, "path")?))),
        "process" => Ok(format!("pgrep -x {}", quoted(&text(&check.process_name, "processName")?))),
        "command" => text(&check.command, "command"),
        other => Err(HopxError::invalid(format!("readyCmd has the type '{other}'; it must be {CHECKS}"))),
    }
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

// ---------------------------------------------------------------- watch

/// `GET /v1/templates/build/{build}/status`.
pub(super) async fn status(State(state): State<ApiState>, Segment(build): Segment) -> Result<Json<wire::BuildStatus>, HopxError> {
    let unknown = || HopxError::not_found("BUILD_NOT_FOUND", format!("build '{build}' not found"));
    let id: BuildId = build.parse().map_err(|_| unknown())?;
    let record = state.templates.build(id).await.map_err(|error| match error {
        ResolveError::UnknownTemplate(_) | ResolveError::UnknownBuild { .. } => unknown(),
        other => other.into(),
    })?;
    let found = state.builds.status(record.template, id).await?;
    let log = state.builds.log(id, LogPage { level: LogLevel::Debug, offset: 0, limit: LOG_LINES_MAX }).await?;
    let took = found.build.finished_at.map(|end| end - found.build.created_at);
    Ok(Json(wire::BuildStatus {
        build_id: id.to_string(),
        template_id: record.template.to_string(),
        status: shown_status(found.build.state),
        progress: progress(found.build.state),
        started_at: Time(found.build.created_at),
        current_step: log.iter().rev().find_map(|line| Builds::step_of(line)).map(ToOwned::to_owned),
        completed_at: found.build.finished_at.map(Time),
        error_message: found.failure.map(|failure| failure.message),
        build_duration_ms: took.and_then(|took| u64::try_from(took.whole_milliseconds()).ok()),
    }))
}

/// Of a hundred. The core does not know how long the rest takes, so half-way is all that can be said before the end.
const fn progress(state: BuildState) -> u8 {
    match state {
        BuildState::Waiting => 0,
        BuildState::Building => 50,
        BuildState::Ready | BuildState::Error => 100,
    }
}

/// `GET /v1/templates/build/{template}/logs?offset`: the lines of its newest build from there on.
pub(super) async fn logs(State(state): State<ApiState>, Segment(template): Segment, query: Query) -> Result<Json<Value>, HopxError> {
    let offset: u64 = match query.get("offset") {
        None => 0,
        Some(text) => text.parse().map_err(|_| HopxError::invalid(format!("offset is '{text}'; it must be a number from 0 on")))?,
    };
    let (_, builds) = find(&state, &template).await?;
    let newest = builds.first().ok_or_else(|| HopxError::not_found("BUILD_NOT_FOUND", format!("template '{template}' has no build")))?;
    // Before the log, so that a build is not said to be over while lines of it are still to come.
    let found = state.builds.status(newest.template, newest.id).await?;
    let lines = state.builds.log(newest.id, LogPage { level: LogLevel::Debug, offset, limit: LOG_LINES_MAX }).await?;
    let is_over = matches!(found.build.state, BuildState::Ready | BuildState::Error);
    let count = u64::try_from(lines.len()).unwrap_or(u64::MAX);
    let is_whole = count < u64::from(LOG_LINES_MAX);
    let text: Vec<String> = lines
        .into_iter()
        .map(|line| if line.level == LogLevel::Error { format!("ERROR {}", line.message) } else { line.message })
        .collect();
    Ok(Json(json!({
        "logs": text.join("\n"),
        "offset": offset.saturating_add(count),
        // Clients stop at a final word, so it waits for the last line.
        "status": if is_over && !is_whole { shown_status(BuildState::Building) } else { shown_status(found.build.state) },
        "complete": is_over && is_whole,
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(json: Value) -> wire::NewBuild {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_build_is_read_as_the_clients_send_it() {
        let hash = "ab".repeat(32);
        let plan = plan(asked(json!({
            "name": "mine", "from_image": "python:3.11", "startCmd": "python3 -m http.server", "skipCache": false, "update": false,
            "cpu": 2, "memory": 2048, "diskGB": 10,
            "steps": [{"type": "COPY", "args": ["a.py,src/", "/app"], "filesHash": hash}, {"type": "RUN", "args": ["ls"], "skipCache": true}],
            "readyCmd": {"type": "port", "port": 8000, "timeout": 30000, "interval": 2000},
        })))
        .unwrap();
        let copies: Vec<_> = plan.steps.iter().filter(|step| step.kind == "COPY").map(|step| step.arguments.clone()).collect();
        assert_eq!(copies, [["a.py", "/app/"], ["src/", "/app/"]]);
        assert_eq!((plan.steps[2].cache, plan.cache), (Cache::Skip, Cache::Use));
        assert_eq!(plan.ready_command.as_deref(), Some("bash -c 'exec 3<>/dev/tcp/127.0.0.1/8000'"));
    }

    #[test]
    fn a_template_of_ours_is_an_image_under_our_name() {
        let base = |image: &str| plan(asked(json!({"name": "a", "from_image": image}))).unwrap().base;
        assert_eq!(base("stillbox/base"), Base::Template("base".into()));
        assert!(matches!(base("ubuntu:24.04"), Base::Image(_)));
    }

    #[test]
    fn what_is_missing_is_named() {
        let refused = |json| plan(asked(json)).unwrap_err().status_and_message().1.to_owned();
        assert_eq!(refused(json!({"name": "a"})), "from_image is required");
        assert_eq!(refused(json!({"from_image": "a", "readyCmd": {"type": "url"}})), "readyCmd of type 'url' needs url");
        assert!(refused(json!({"from_image": "a", "readyCmd": {"type": "moon"}})).contains("'moon'"));
    }

    #[test]
    fn words_of_a_check_stay_words() {
        let check = serde_json::from_value(json!({"type": "file", "path": "/a b'; rm -rf /"})).unwrap();
        assert_eq!(ready_command(check).unwrap(), r"test -e '/a b'\''; rm -rf /'");
    }
}
