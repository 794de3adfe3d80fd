//! Templates: reading, tagging and removing them. Building them is builds.rs.

use super::super::ApiState;
use super::super::body::{Json as Body, OptionalJson};
use super::super::error::ApiError;
use super::ask::{Query, Segment};
use super::cursor::{self, NEXT_TOKEN};
use super::wire::builds as build_wire;
use super::{teams, wire};
use crate::model::{BuildRecord, TemplateId, TemplateRecord};
use crate::sandbox::ListOrder;
use crate::template::Visibility;
use axum::Json;
use axum::extract::State;
use http::{HeaderMap, StatusCode};
use std::cmp::Reverse;
use time::OffsetDateTime;

const PAGE_MAX: u32 = 100;
/// The tag that a name without one means.
const DEFAULT_TAG: &str = "default";

/// `GET /templates`.
pub(super) async fn all(State(state): State<ApiState>) -> Result<Json<Vec<wire::Template>>, ApiError> {
    let templates = state.templates.list().await?;
    Ok(Json(shown_all(&state, &templates).await?))
}

/// `GET /v2/templates`.
pub(super) async fn page(State(state): State<ApiState>, query: Query) -> Result<(HeaderMap, Json<Vec<wire::Template>>), ApiError> {
    let limit = usize::try_from(query.limit(PAGE_MAX)?).expect("at most 100");
    let after = query.get("nextToken").map(|token| cursor::row::<TemplateId>(token, ListOrder::Descending)).transpose()?;
    let (rows, next) = slice(state.templates.list().await?, after, limit);
    let mut headers = HeaderMap::new();
    if let Some((at, id)) = next {
        headers.insert(NEXT_TOKEN, cursor::token(at, id, ListOrder::Descending));
    }
    Ok((headers, Json(shown_all(&state, &rows).await?)))
}

type Row = (OffsetDateTime, TemplateId);

/// The rows after `after`, newest first, and where the next page begins.
fn slice(mut templates: Vec<TemplateRecord>, after: Option<Row>, limit: usize) -> (Vec<TemplateRecord>, Option<Row>) {
    templates.sort_by_key(|template| (Reverse(template.created_at), template.id));
    templates.retain(|template| after.is_none_or(|(at, id)| (Reverse(template.created_at), template.id) > (Reverse(at), id)));
    let more = templates.len() > limit;
    templates.truncate(limit);
    let next = templates.last().filter(|_| more).map(|last| (last.created_at, last.id));
    (templates, next)
}

/// `GET /templates/{id}`, by id or name.
pub(super) async fn details(State(state): State<ApiState>, Segment(name): Segment) -> Result<Json<wire::TemplateWithBuilds>, ApiError> {
    let (template, builds) = find(&state, &name).await?;
    let newest = newest_ready(&template, &builds).ok_or_else(|| ApiError::not_found(format!("template '{name}' has no build")))?;
    let shown = shown(&template, newest);
    Ok(Json(wire::TemplateWithBuilds { template: shown, builds: builds.iter().map(shown_build).collect() }))
}

/// `DELETE /templates/{id}`, of templates and snapshots, by id or name.
pub(super) async fn remove(State(state): State<ApiState>, Segment(name): Segment) -> Result<StatusCode, ApiError> {
    let (template, builds) = find(&state, &name).await?;
    state.templates.remove(&name).await?;
    state.builds.forget(template.id, &builds).await;
    Ok(StatusCode::NO_CONTENT)
}

/// `PATCH /templates/{id}`.
pub(super) async fn update(
    State(state): State<ApiState>,
    Segment(name): Segment,
    OptionalJson(asked): OptionalJson<build_wire::UpdateTemplate>,
) -> Result<Json<serde_json::Value>, ApiError> {
    change(&state, &name, asked).await?;
    Ok(Json(serde_json::json!({})))
}

/// `PATCH /v2/templates/{id}`.
pub(super) async fn update_v2(
    State(state): State<ApiState>,
    Segment(name): Segment,
    OptionalJson(asked): OptionalJson<build_wire::UpdateTemplate>,
) -> Result<Json<build_wire::UpdatedTemplate>, ApiError> {
    let template = change(&state, &name, asked).await?;
    Ok(Json(build_wire::UpdatedTemplate { names: full_names(&template) }))
}

async fn change(state: &ApiState, name: &str, asked: build_wire::UpdateTemplate) -> Result<TemplateRecord, ApiError> {
    let Some(public) = asked.public else { return Ok(state.templates.find(name).await?) };
    let visibility = if public { Visibility::Public } else { Visibility::Private };
    Ok(state.templates.set_public(name, visibility).await?)
}

fn full_names(template: &TemplateRecord) -> Vec<String> {
    template.aliases.iter().map(|alias| format!("{}/{alias}", teams::SLUG)).collect()
}

/// `GET /templates/{id}/tags`.
pub(super) async fn tags(State(state): State<ApiState>, Segment(name): Segment) -> Result<Json<Vec<wire::Tag>>, ApiError> {
    let template = state.templates.find(&name).await?;
    let tags = state.templates.tags(template.id).await?;
    let shown = tags.into_iter().map(|(tag, build, at)| wire::Tag { tag, build_id: build.to_string(), created_at: wire::Time(at) });
    Ok(Json(shown.collect()))
}

/// `POST /templates/tags`.
pub(super) async fn assign_tags(
    State(state): State<ApiState>,
    Body(asked): Body<build_wire::AssignTags>,
) -> Result<(StatusCode, Json<build_wire::AssignedTags>), ApiError> {
    let (build, tags) = state.templates.assign_tags(&asked.target, &asked.tags).await?;
    Ok((StatusCode::CREATED, Json(build_wire::AssignedTags { tags, build_id: build.to_string() })))
}

/// `DELETE /templates/tags`.
pub(super) async fn remove_tags(State(state): State<ApiState>, Body(asked): Body<build_wire::RemoveTags>) -> Result<StatusCode, ApiError> {
    state.templates.remove_tags(&asked.name, &asked.tags).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `GET /templates/aliases/{alias}`.
pub(super) async fn alias(State(state): State<ApiState>, Segment(name): Segment) -> Result<Json<wire::AliasOwner>, ApiError> {
    let template = state.templates.find(&name).await?;
    Ok(Json(wire::AliasOwner { template_id: template.id.to_string(), public: template.public }))
}

/// All templates as they are shown, the newest first.
pub(in crate::api) async fn newest_first(state: &ApiState) -> Result<Vec<wire::Template>, ApiError> {
    let (rows, _no_more) = slice(state.templates.list().await?, None, usize::MAX);
    shown_all(state, &rows).await
}

async fn find(state: &ApiState, name: &str) -> Result<(TemplateRecord, Vec<BuildRecord>), ApiError> {
    let id = state.templates.find(name).await?.id;
    Ok(state.templates.get(id).await?)
}

async fn shown_all(state: &ApiState, templates: &[TemplateRecord]) -> Result<Vec<wire::Template>, ApiError> {
    let mut rows = Vec::with_capacity(templates.len());
    for template in templates {
        let (template, builds) = state.templates.get(template.id).await?;
        // Between registering a template and its first build there is a moment without one.
        rows.extend(newest_ready(&template, &builds).map(|build| shown(&template, build)));
    }
    Ok(rows)
}

/// How a template is shown, with the build that it stands for.
pub(in crate::api) async fn one(state: &ApiState, id: TemplateId) -> Result<wire::Template, ApiError> {
    let (template, builds) = state.templates.get(id).await?;
    let newest = newest_ready(&template, &builds).ok_or_else(|| ApiError::not_found(format!("template '{id}' has no build")))?;
    Ok(shown(&template, newest))
}

/// The build that the template stands for: what `default` names, else the newest.
fn newest_ready<'b>(template: &TemplateRecord, builds: &'b [BuildRecord]) -> Option<&'b BuildRecord> {
    let tagged = template.tags.get(DEFAULT_TAG).and_then(|id| builds.iter().find(|build| build.id == *id));
    tagged.or_else(|| builds.first())
}

pub(super) fn shown(template: &TemplateRecord, build: &BuildRecord) -> wire::Template {
    wire::Template {
        template_id: template.id.to_string(),
        build_id: build.id.to_string(),
        cpu_count: build.resources.cpu_count,
        memory_mb: build.resources.memory.whole_mib(),
        disk_size_mb: build.resources.disk.whole_mib(),
        public: template.public,
        aliases: template.aliases.clone(),
        names: full_names(template),
        created_at: wire::Time(template.created_at),
        updated_at: wire::Time(template.updated_at),
        created_by: None,
        last_spawned_at: template.last_spawned_at.map(wire::Time),
        spawn_count: template.spawn_count,
        build_count: template.build_count,
        envd_version: wire::ENVD_VERSION,
        build_status: build.state,
    }
}

fn shown_build(build: &BuildRecord) -> wire::Build {
    wire::Build {
        build_id: build.id.to_string(),
        status: build.state,
        created_at: wire::Time(build.created_at),
        updated_at: wire::Time(build.finished_at.unwrap_or(build.created_at)),
        finished_at: build.finished_at.map(wire::Time),
        cpu_count: build.resources.cpu_count,
        memory_mb: build.resources.memory.whole_mib(),
        disk_size_mb: build.resources.disk.whole_mib(),
        envd_version: wire::ENVD_VERSION,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(second: i64) -> TemplateRecord {
        let at = OffsetDateTime::from_unix_timestamp(second).unwrap();
        TemplateRecord::new(TemplateId::random(), Vec::new(), at)
    }

    #[test]
    fn pages_cover_every_template_once_even_when_several_are_equally_old() {
        let all: Vec<TemplateRecord> = [1, 2, 2, 2, 3].map(template).into();
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let (rows, next) = slice(all.clone(), after, 2);
            assert!(rows.len() <= 2);
            seen.extend(rows.into_iter().map(|row| row.id));
            match next {
                Some(row) => after = Some(row),
                None => break,
            }
        }
        let mut expected: Vec<TemplateId> = all.iter().map(|row| row.id).collect();
        assert_eq!(seen.first(), expected.last());
        seen.sort();
        expected.sort();
        assert_eq!(seen, expected);
    }
}
