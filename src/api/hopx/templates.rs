//! Templates: reading and removing them.

use super::super::ApiState;
use super::super::layers::RequestId;
use super::ask::Segment;
use super::error::HopxError;
use super::wire;
use crate::model::{BuildRecord, BuildState, TemplateRecord};
use axum::extract::State;
use axum::{Extension, Json};

/// The tag that a name without one means.
const DEFAULT_TAG: &str = "default";

/// `GET /v1/templates`. Templates have no category and no language here, so these filters are not looked at.
pub(super) async fn all(
    State(state): State<ApiState>,
    Extension(request_id): Extension<RequestId>,
) -> Result<Json<wire::List<wire::Template>>, HopxError> {
    let mut data = Vec::new();
    for template in state.templates.list().await? {
        let (template, builds) = state.templates.get(template.id).await?;
        data.push(shown(&template, &builds));
    }
    Ok(Json(wire::List {
        object: "list",
        data,
        has_more: false,
        next_cursor: None,
        url: "/v1/templates",
        request_id: request_id.as_str().to_owned(),
    }))
}

/// `GET /v1/templates/{name or id}`.
pub(super) async fn details(State(state): State<ApiState>, Segment(name): Segment) -> Result<Json<wire::Template>, HopxError> {
    let (template, builds) = find(&state, &name).await?;
    Ok(Json(shown(&template, &builds)))
}

/// `DELETE /v1/templates/{name or id}`.
pub(super) async fn remove(State(state): State<ApiState>, Segment(name): Segment) -> Result<Json<wire::Deleted>, HopxError> {
    state.templates.remove(&name).await?;
    Ok(Json(wire::Deleted { id: name, deleted: true }))
}

/// By id, also one whose first build is not ready yet.
pub(super) async fn find(state: &ApiState, name: &str) -> Result<(TemplateRecord, Vec<BuildRecord>), HopxError> {
    let id = match name.parse() {
        Ok(id) => id,
        Err(_not_an_id) => state.templates.resolve(name).await?.template.id,
    };
    Ok(state.templates.get(id).await?)
}

fn shown(template: &TemplateRecord, builds: &[BuildRecord]) -> wire::Template {
    let tagged = template.tags.get(DEFAULT_TAG).and_then(|id| builds.iter().find(|build| build.id == *id));
    let build = tagged.or_else(|| builds.first());
    let name = template.aliases.first().cloned().unwrap_or_else(|| template.id.to_string());
    let status = build.map_or("pending", |build| status(build.state));
    wire::Template {
        object: "template",
        id: template.id.to_string(),
        display_name: name.clone(),
        name,
        status,
        is_active: status == "active",
        is_public: template.public,
        build_id: build.map(|build| build.id.to_string()),
        default_resources: build.map(|build| wire::TemplateResources {
            vcpu: build.resources.cpu_count,
            memory_mb: build.resources.memory.whole_mib(),
            disk_gb: build.resources.disk.whole_mib() / 1024,
        }),
        features: Vec::new(),
        tags: template.tags.keys().cloned().collect(),
        created_at: wire::Time(template.created_at),
        updated_at: wire::Time(template.updated_at),
    }
}

/// HopX's word for how far a build is.
pub(super) const fn status(state: BuildState) -> &'static str {
    match state {
        BuildState::Waiting => "pending",
        BuildState::Building => "building",
        BuildState::Ready => "active",
        BuildState::Error => "failed",
    }
}
