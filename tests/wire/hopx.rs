//! HopX's control plane through the same router (files in `hopx/`).

use super::world::World;
use serde_json::{Value, json};

async fn world() -> World {
    World::new().await.with_header("host", "127.0.0.1:3000")
}

async fn create(world: &World, more: Value) -> String {
    let mut new = json!({"template_name": "base", "timeout_seconds": 600});
    new.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    world.answer("POST", "/v1/sandboxes", Some(new)).await.body["id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_sandbox_is_created_shown_and_deleted() {
    let world = world().await;
    let new = json!({"template_name": "base", "timeout_seconds": 600, "internet_access": false, "env_vars": {"A": "1"}});
    let created = world.call("hopx/create", "POST", "/v1/sandboxes", Some(new)).await;
    let path = format!("/v1/sandboxes/{}", created["id"].as_str().unwrap());
    world.call("hopx/info", "GET", &path, None).await;
    world.call("hopx/token", "POST", &format!("{path}/token/refresh"), None).await;
    world.call("hopx/timeout", "PUT", &format!("{path}/timeout"), Some(json!({"timeout_seconds": 900}))).await;
    world.call("hopx/delete", "DELETE", &path, None).await;
    world.call("hopx/delete_again", "DELETE", &path, None).await;
}

#[tokio::test]
async fn clients_are_told_where_the_way_they_came_leads() {
    let world = World::new().await;
    for (host, wanted) in [
        ("localhost:3000", "http://localhost:3000".to_owned()),
        ("api.stillbox.localhost:3443", "https://7777-<id>.stillbox.localhost:3443/x.vms.hopx.dev".to_owned()),
        ("api.hopx.dev", "https://7777-<id>.local.vms.hopx.dev".to_owned()),
    ] {
        let there = world.with_header("host", host);
        let id = create(&there, json!({})).await;
        let shown = there.answer("GET", &format!("/v1/sandboxes/{id}"), None).await.body;
        assert_eq!(shown["public_host"], wanted.replace("<id>", &id));
    }
}

#[tokio::test]
async fn a_pause_keeps_memory_and_a_stop_does_not() {
    let world = world().await;
    let id = create(&world, json!({})).await;
    let path = |verb: &str| format!("/v1/sandboxes/{id}/{verb}");
    world.call("hopx/pause", "POST", &path("pause"), None).await;
    world.call("hopx/pause", "POST", &path("pause"), None).await;
    world.call("hopx/stop_paused", "POST", &path("stop"), None).await;
    world.call("hopx/start_paused", "POST", &path("start"), None).await;
    world.call("hopx/timeout_paused", "PUT", &path("timeout"), Some(json!({"timeout_seconds": 9}))).await;
    world.call("hopx/resume", "POST", &path("resume"), None).await;
    world.call("hopx/resume", "POST", &path("resume"), None).await;
    world.call("hopx/stop", "POST", &path("stop"), None).await;
    world.call("hopx/stop", "POST", &path("stop"), None).await;
    world.call("hopx/resume_stopped", "POST", &path("resume"), None).await;
    world.call("hopx/resume", "POST", &path("start"), None).await;
}

#[tokio::test]
async fn lists_have_filters_and_pages() {
    let world = world().await;
    let (first, second) = (create(&world, json!({})).await, create(&world, json!({})).await);
    world.answer("POST", &format!("/v1/sandboxes/{first}/stop"), None).await;
    world.call("hopx/list_stopped", "GET", "/v1/sandboxes?status=stopped", None).await;
    let page = world.call("hopx/list_page", "GET", "/v1/sandboxes?limit=1", None).await;
    let cursor = page["next_cursor"].as_str().unwrap();
    let last = world.answer("GET", &format!("/v1/sandboxes?limit=1&cursor={cursor}"), None).await.body;
    let mut ids: Vec<&str> = [&page, &last].iter().map(|page| page["data"][0]["id"].as_str().unwrap()).collect();
    ids.sort_unstable();
    let mut made = [first.as_str(), second.as_str()];
    made.sort_unstable();
    assert_eq!((ids.as_slice(), &last["has_more"], &last["next_cursor"]), (&made[..], &json!(false), &Value::Null));
    for (query, count) in [("status=running", 1), ("status=paused", 0), ("status=error", 0), ("region=mars", 0), ("region=local", 2)] {
        let found = world.answer("GET", &format!("/v1/sandboxes?{query}"), None).await.body;
        assert_eq!(found["data"].as_array().map(Vec::len), Some(count), "{query}");
    }
}

#[tokio::test]
async fn templates_are_listed_shown_and_kept_while_used() {
    let world = world().await;
    world.call("hopx/templates", "GET", "/v1/templates?category=x", None).await;
    world.call("hopx/template", "GET", "/v1/templates/base", None).await;
    world.call("hopx/template_unknown", "GET", "/v1/templates/nothing", None).await;
    create(&world, json!({})).await;
    world.call("hopx/template_in_use", "DELETE", "/v1/templates/base", None).await;
}

#[tokio::test]
async fn builds_ask_for_files_first_and_refuse_what_exists() {
    let world = world().await;
    let hash = "ab".repeat(32);
    let link = world.answer("POST", "/v1/templates/files/upload-link", Some(json!({"files_hash": hash, "content_length": 5}))).await.body;
    let url = link["upload_url"].as_str().unwrap().strip_prefix("http://127.0.0.1:3000").unwrap();
    assert_eq!(world.without_key().with_header("host", "x").answer("PUT", url, Some(json!(1))).await.status, 200);
    let forged = url.replace("signature=", "signature=0");
    world.without_key().call("hopx/upload_forged", "PUT", &forged, Some(json!(1))).await;
    world.call("hopx/upload_link_present", "POST", "/v1/templates/files/upload-link", Some(json!({"files_hash": hash}))).await;
    world.call("hopx/upload_link_bad", "POST", "/v1/templates/files/upload-link", Some(json!({"files_hash": "../x"}))).await;
    world.call("hopx/build_exists", "POST", "/v1/templates/build", Some(json!({"name": "base", "from_image": "x"}))).await;
    world.call("hopx/build_bad", "POST", "/v1/templates/build", Some(json!({"name": "new"}))).await;
    world.call("hopx/build_unknown", "GET", "/v1/templates/build/nothing/status", None).await;
}

#[tokio::test]
async fn bad_requests_are_told_what_is_wrong_with_them() {
    let world = world().await;
    world.without_key().call("hopx/no_key", "GET", "/v1/sandboxes", None).await;
    world.with_key("hopx_live_wrong").call("hopx/wrong_key", "GET", "/v1/sandboxes", None).await;
    world.call("hopx/unknown_template", "POST", "/v1/sandboxes", Some(json!({"template_name": "nothing"}))).await;
    world.call("hopx/no_template", "POST", "/v1/sandboxes", Some(json!({}))).await;
    world.call("hopx/bad_timeout", "POST", "/v1/sandboxes", Some(json!({"template_name": "base", "timeout_seconds": -1}))).await;
    world.call("hopx/bad_field", "POST", "/v1/sandboxes", Some(json!({"template_name": "base", "env_vars": {"A": 1}}))).await;
    world.send("hopx/bad_json", "POST", "/v1/sandboxes", "{".to_owned()).await;
    world.call("hopx/bad_id", "GET", "/v1/sandboxes/nonsense", None).await;
    world.call("hopx/bad_status", "GET", "/v1/sandboxes?status=asleep", None).await;
    world.call("hopx/unknown_path", "GET", "/v1/nothing", None).await;
    world.call("hopx/wrong_method", "PATCH", "/v1/sandboxes", None).await;
}

#[tokio::test]
async fn a_full_server_is_a_limit_that_nobody_retries() {
    let world = World::with_places(1).await.with_header("host", "127.0.0.1:3000");
    create(&world, json!({})).await;
    world.call("hopx/full", "POST", "/v1/sandboxes", Some(json!({"template_name": "base"}))).await;
}

#[tokio::test]
async fn an_internal_failure_tells_its_request_id_alone() {
    let world = world().await;
    world.fail_next_start("the disk is on fire");
    world.call("hopx/internal", "POST", "/v1/sandboxes", Some(json!({"template_name": "base"}))).await;
}
