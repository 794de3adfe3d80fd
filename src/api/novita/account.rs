//! What concerns all sandboxes together: the quota and how much of it is used, events, templates in pages.

use super::super::ApiState;
use super::super::e2b::ask::Query;
use super::super::e2b::{templates as e2b_templates, wire as e2b};
use super::super::error::ApiError;
use super::wire;
use axum::Json;
use axum::extract::State;

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
    let templates = all.drain(skipped.min(total)..skipped.saturating_add(rows).min(total)).collect();
    let total_pages = u32::try_from(total.div_ceil(rows)).unwrap_or(u32::MAX);
    Ok(Json(wire::Templates { templates, total, page, limit, total_pages }))
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
