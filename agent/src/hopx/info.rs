//! What the agent says of itself and of the sandbox: health, versions, use of CPU, memory and disk.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use serde_json::{Value, json};

use super::counters::Counted;
use super::desktop;
use super::error::HopxError;
use crate::logs::rfc3339;
use crate::metrics;
use crate::state::Agent;
use crate::wire::Metrics;

const AGENT: &str = "stillbox-agent";
const VERSION: &str = env!("CARGO_PKG_VERSION");
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

pub(super) async fn health(State(agent): State<Arc<Agent>>) -> Json<Value> {
    let counted = agent.hopx.counters.now();
    Json(json!({
        "status": "healthy",
        "agent": AGENT,
        "version": VERSION,
        "uptime": format!("{}s", counted.uptime.as_secs()),
        "uptime_seconds": counted.uptime.as_secs_f64(),
        "vm_id": agent.identity().sandbox_id,
        "features": features(&agent.identity().path),
    }))
}

pub(super) async fn ping() -> Json<Value> {
    Json(json!({ "message": "pong", "status": "ok", "timestamp": rfc3339(SystemTime::now()) }))
}

/// The contexts of the interpreter, as kernels. HopX's clients share the default one of Python.
pub(super) async fn sessions(State(agent): State<Arc<Agent>>) -> Json<Value> {
    let contexts = agent.interpreter.list();
    let sessions: Vec<Value> = contexts
        .iter()
        .map(|context| json!({ "kernel_id": context.id, "name": context.language, "language": context.language, "path": context.cwd, "is_default": context.is_default }))
        .collect();
    Json(json!({ "count": sessions.len(), "sessions": sessions, "timestamp": rfc3339(SystemTime::now()) }))
}

/// `path` is where programs are looked for: a template without Node.js or Go runs none of theirs.
fn features(path: &str) -> Value {
    const LANGUAGES: [(&str, &str); 4] = [("python", "python3"), ("javascript", "node"), ("bash", "bash"), ("go", "go")];
    let languages: Vec<&str> =
        LANGUAGES.iter().filter(|(_, program)| desktop::is_there(path, program)).map(|(language, _)| *language).collect();
    json!({
        "code_execution": true, "file_operations": true, "terminal_access": true, "websocket_streaming": true,
        "background_jobs": true, "system_metrics": true, "desktop": false,
        "languages": languages,
    })
}

pub(super) async fn info(State(agent): State<Arc<Agent>>) -> Json<Value> {
    let counted = agent.hopx.counters.now();
    Json(json!({
        "vm_id": agent.identity().sandbox_id,
        "agent": AGENT,
        "agent_version": VERSION,
        "os": "linux",
        "arch": std::env::consts::ARCH,
        "start_time": rfc3339(counted.started_at),
        "uptime": counted.uptime.as_secs_f64(),
        "features": features(&agent.identity().path),
        "endpoints": {
            "health": "GET /health", "execute": "POST /execute", "background": "POST /execute/background",
            "commands": "POST /commands/run", "files": "GET /files/list", "env": "GET /env",
            "processes": "GET /processes", "metrics": "GET /metrics/snapshot", "prometheus": "GET /metrics/prometheus",
            "stream": "WS /execute/stream", "terminal": "WS /terminal", "watch": "WS /files/watch",
        },
    }))
}

async fn measured(agent: &Arc<Agent>) -> Result<Metrics, HopxError> {
    Ok(metrics::measure_now(agent).await?)
}

/// The machine as the sandbox sees it.
pub(super) async fn system(State(agent): State<Arc<Agent>>) -> Result<Json<Value>, HopxError> {
    let measured = measured(&agent).await?;
    let mut shown = shown(&measured);
    shown["uptime"] = json!(agent.hopx.counters.now().uptime.as_secs_f64());
    Ok(Json(shown))
}

fn shown(metrics: &Metrics) -> Value {
    let part = |total: u64, used: u64| {
        let percent = if total == 0 { 0.0 } else { (used as f64 / total as f64 * 10_000.0).round() / 100.0 };
        json!({ "total": total, "used": used, "free": total.saturating_sub(used), "usage_percent": percent })
    };
    json!({
        "cpu": { "usage_percent": metrics.cpu_used_pct, "cores": metrics.cpu_count },
        "memory": part(metrics.mem_total, metrics.mem_used),
        "disk": part(metrics.disk_total, metrics.disk_used),
    })
}

/// `/metrics` and `/metrics/snapshot`: the names of both clients' models.
pub(super) async fn metrics(State(agent): State<Arc<Agent>>) -> Result<Json<Value>, HopxError> {
    let measured = measured(&agent).await?;
    let Counted { uptime, requests, errors, executions, active_executions, average, p95, .. } = agent.hopx.counters.now();
    let running = agent.processes.running().len();
    Ok(Json(json!({
        "uptime_seconds": uptime.as_secs_f64(),
        "total_requests": requests,
        "requests_total": requests,
        "total_errors": errors,
        "error_count": errors,
        "total_executions": executions,
        "active_executions": active_executions,
        "avg_duration_ms": average.as_secs_f64() * 1000.0,
        "p95_duration_ms": p95.as_secs_f64() * 1000.0,
        "system": shown(&measured),
        "process": { "count": running, "running": running },
        "cache": empty_cache(),
        "timestamp": rfc3339(SystemTime::now()),
    })))
}

pub(super) async fn prometheus(State(agent): State<Arc<Agent>>) -> Result<impl IntoResponse, HopxError> {
    let measured = measured(&agent).await?;
    let counted = agent.hopx.counters.now();
    let rows: [(&str, &str, &str, f64); 11] = [
        ("hopx_agent_uptime_seconds", "gauge", "Time since the sandbox began.", counted.uptime.as_secs_f64()),
        ("hopx_agent_requests_total", "counter", "Requests answered.", counted.requests as f64),
        ("hopx_agent_errors_total", "counter", "Requests answered with an error.", counted.errors as f64),
        ("hopx_agent_executions_total", "counter", "Programs and code run.", counted.executions as f64),
        ("hopx_agent_executions_active", "gauge", "Programs and code running.", counted.active_executions as f64),
        ("hopx_system_cpu_cores", "gauge", "CPUs of the sandbox.", f64::from(measured.cpu_count)),
        ("hopx_system_cpu_usage_percent", "gauge", "Share of all CPUs in use.", measured.cpu_used_pct),
        ("hopx_system_memory_total_bytes", "gauge", "Memory limit.", measured.mem_total as f64),
        ("hopx_system_memory_used_bytes", "gauge", "Memory in use.", measured.mem_used as f64),
        ("hopx_system_disk_total_bytes", "gauge", "Disk size.", measured.disk_total as f64),
        ("hopx_system_disk_used_bytes", "gauge", "Disk in use.", measured.disk_used as f64),
    ];
    let text: String =
        rows.iter().map(|(name, kind, help, value)| format!("# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n")).collect();
    Ok(([(CONTENT_TYPE, PROMETHEUS)], text))
}

/// No result is ever answered from a cache, so there is none to fill.
fn empty_cache() -> Value {
    json!({ "size": 0, "max_size": 0, "count": 0, "hits": 0, "misses": 0, "total_hits": 0, "hit_rate": 0.0, "ttl": "0s" })
}

pub(super) async fn cache() -> Json<Value> {
    let mut stats = empty_cache();
    stats["cache"] = empty_cache();
    stats["timestamp"] = json!(rfc3339(SystemTime::now()));
    Json(stats)
}

pub(super) async fn clear_cache() -> Json<Value> {
    Json(json!({ "success": true, "message": "nothing is cached: every execution runs", "entries_removed": 0 }))
}
