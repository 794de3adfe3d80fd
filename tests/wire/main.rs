//! E2B's control plane (HopX's: hopx.rs) through the real router, over the real core and store, on a runtime without a kernel.
//!
//! Each call's status, headers and body are compared with a file in `e2b/`, ids, tokens and times replaced by words. A
//! changed file is a decision to be explained in its commit; `UPDATE_GOLDEN=1 cargo test --test wire` writes them anew.

#[cfg(test)]
mod builds;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod hopx;
#[cfg(test)]
mod novita;
#[cfg(test)]
mod secrets;
#[cfg(test)]
mod through_the_proxy;
#[cfg(test)]
mod world;

use serde_json::{Value, json};
use world::World;

#[tokio::test]
async fn health_needs_no_key_and_everything_else_does() {
    let world = World::new().await;
    world.without_key().call("health", "GET", "/health", None).await;
    world.without_key().call("no_key", "GET", "/v2/sandboxes", None).await;
    world.with_key("e2b_wrong").call("wrong_key", "POST", "/sandboxes", Some(json!({"templateID": "base"}))).await;
    world.without_key().call("preflight", "OPTIONS", "/v2/sandboxes", None).await;
}

#[tokio::test]
async fn a_sandbox_is_created_shown_and_killed() {
    let world = World::new().await;
    let minimal =
        json!({"templateID": "base", "timeout": 300, "secure": true, "allow_internet_access": true, "metadata": {}, "envVars": {}});
    let created = world.call("create", "POST", "/sandboxes", Some(minimal)).await;
    let id = created["sandboxID"].as_str().unwrap().to_owned();
    let shown = world.call("info", "GET", &format!("/sandboxes/{id}"), None).await;
    assert_eq!(shown["envdAccessToken"], created["envdAccessToken"]);
    world.call("info", "GET", &format!("/sandboxes/{id}-6532622b"), None).await;
    world.call("kill", "DELETE", &format!("/sandboxes/{id}"), None).await;
    world.call("kill_again", "DELETE", &format!("/sandboxes/{id}"), None).await;
    world.call("info_killed", "GET", &format!("/sandboxes/{id}"), None).await;
}

#[tokio::test]
async fn every_option_of_a_create_request_is_kept() {
    let world = World::new().await;
    let full = json!({
        "templateID": "local/base:default", "timeout": 60, "autoPause": true, "autoResume": {"enabled": true},
        "network": {"allowPublicTraffic": false, "allowOut": ["1.1.1.1", "example.com"], "denyOut": ["0.0.0.0/0"], "maskRequestHost": "localhost:${PORT}"},
        "metadata": {"user": "1"}, "envVars": {"A": "b"}, "mcp": null, "volumeMounts": []
    });
    let created = world.call("create_v2", "POST", "/v2/sandboxes", Some(full)).await;
    let id = created["sandboxID"].as_str().unwrap();
    assert_ne!(created["trafficAccessToken"], created["envdAccessToken"]);
    world.call("info_full", "GET", &format!("/sandboxes/{id}"), None).await;
    let update = json!({"allowOut": ["10.0.0.0/8"], "denyOut": ["0.0.0.0/0"]});
    world.call("network", "PUT", &format!("/sandboxes/{id}/network"), Some(update)).await;
    world.call("info_network", "GET", &format!("/sandboxes/{id}"), None).await;
    world.call("network_cleared", "PUT", &format!("/sandboxes/{id}/network"), Some(json!({}))).await;
    let shown = world.answer("GET", &format!("/sandboxes/{id}"), None).await.body;
    assert_eq!(shown["network"], json!({"allowPublicTraffic": false, "maskRequestHost": "localhost:${PORT}"}));
}

#[tokio::test]
async fn an_insecure_sandbox_has_no_token() {
    let world = World::new().await;
    world.call("create_insecure", "POST", "/sandboxes", Some(json!({"templateID": "base"}))).await;
}

#[tokio::test]
async fn an_idempotency_key_answers_the_same_sandbox_and_never_another_request() {
    let world = World::new().await;
    let keyed = world.with_header("idempotency-key", "0a-Z");
    let first = keyed.answer("POST", "/v2/sandboxes", Some(json!({"templateID": "base"}))).await;
    let again = keyed.answer("POST", "/v2/sandboxes", Some(json!({"templateID": "base"}))).await;
    assert_eq!((first.status, &first.body), (again.status, &again.body));
    keyed.call("idempotency_conflict", "POST", "/v2/sandboxes", Some(json!({"templateID": "base", "timeout": 7}))).await;
    let bad = world.with_header("idempotency-key", "a_b");
    bad.call("idempotency_malformed", "POST", "/v2/sandboxes", Some(json!({"templateID": "base"}))).await;
}

#[tokio::test]
async fn bad_requests_name_field_value_and_limit() {
    let world = World::new().await;
    let refused = [
        ("bad_json", "{\"templateID\": \"base\",\n oops}"),
        ("bad_type", r#"{"templateID": "base", "metadata": {"a": 1}}"#),
        ("bad_no_template", "{}"),
        ("bad_timeout", r#"{"templateID": "base", "timeout": 0}"#),
        ("bad_timeout_long", r#"{"templateID": "base", "timeout": 86401}"#),
        ("bad_template", r#"{"templateID": "nothing"}"#),
        ("bad_tag", r#"{"templateID": "base:v9"}"#),
        ("bad_template_name", r#"{"templateID": "a b"}"#),
        ("bad_network", r#"{"templateID": "base", "network": {"denyOut": ["example.com"]}}"#),
        ("bad_volume", r#"{"templateID": "base", "volumeMounts": [{"name": "v", "path": "/v"}]}"#),
        ("bad_env", r#"{"templateID": "base", "envVars": {"A=B": "c"}}"#),
    ];
    for (name, body) in refused {
        world.send(name, "POST", "/sandboxes", body.to_owned()).await;
    }
    let large = format!("{{\"templateID\": \"{}\"}}", "x".repeat(9 << 20));
    world.send("bad_size", "POST", "/sandboxes", large).await;
    world.call("bad_id", "GET", "/sandboxes/A_B", None).await;
    world.call("bad_id_client", "DELETE", "/sandboxes/a-b-c", None).await;
    world.call("unknown_id", "GET", "/sandboxes/nobody", None).await;
    assert!(world.running().is_empty(), "a refused request left something running");
}

#[tokio::test]
async fn a_full_server_says_so_and_that_trying_again_at_once_is_no_use() {
    let world = World::with_places(1).await;
    world.answer("POST", "/sandboxes", Some(json!({"templateID": "base", "timeout": 60}))).await;
    world.call("too_many", "POST", "/sandboxes", Some(json!({"templateID": "base", "timeout": 60}))).await;
}

#[tokio::test]
async fn unknown_paths_and_methods_are_json_and_unserved_calls_say_so() {
    let world = World::new().await;
    world.call("no_such_path", "GET", "/nothing", None).await;
    world.call("no_such_method", "PUT", "/snapshots", None).await;
    world.call("unserved_build", "POST", "/templates", None).await;
}

#[tokio::test]
async fn a_list_is_paged_filtered_and_ordered() {
    let world = World::new().await;
    let mut ids = Vec::new();
    for (index, user) in ["1", "2", "1"].into_iter().enumerate() {
        let new =
            json!({"templateID": "base", "timeout": 300, "metadata": {"user": user, "a b": "c&d=é"}, "envVars": {"N": index.to_string()}});
        ids.push(world.answer("POST", "/sandboxes", Some(new)).await.body["sandboxID"].as_str().unwrap().to_owned());
    }
    let listed = |body: &Value| -> Vec<String> {
        body.as_array().unwrap().iter().map(|row| row["sandboxID"].as_str().unwrap().to_owned()).collect()
    };

    let first = world.call("list_page", "GET", "/v2/sandboxes?limit=2&state=running%2Cpaused", None).await;
    assert_eq!(listed(&first), [ids[2].clone(), ids[1].clone()]);
    let token = world.answer("GET", "/v2/sandboxes?limit=2", None).await.headers["x-next-token"].as_str().unwrap().to_owned();
    // What comes after the page was read does not move the next one.
    world.answer("POST", "/sandboxes", Some(json!({"templateID": "base", "timeout": 300}))).await;
    let second = world.call("list_last_page", "GET", &format!("/v2/sandboxes?limit=2&nextToken={token}"), None).await;
    assert_eq!(listed(&second), [ids[0].clone()]);

    let filtered = world.answer("GET", "/v2/sandboxes?metadata=user%3D1%26a%252520b%3Dc%252526d%25253D%2525C3%2525A9", None).await.body;
    assert_eq!(listed(&filtered), [ids[2].clone(), ids[0].clone()]);
    let ascending = world.answer("GET", "/v2/sandboxes?metadata=user%3D1&order=asc", None).await.body;
    assert_eq!(listed(&ascending), [ids[0].clone(), ids[2].clone()]);
    let started = ascending[1]["startedAt"].as_str().unwrap();
    let later = world.answer("GET", &format!("/v2/sandboxes?metadata=user%3D1&startedAfter={started}"), None).await.body;
    assert_eq!(listed(&later), [ids[2].clone()]);
    assert_eq!(listed(&world.answer("GET", "/v2/sandboxes?template=base", None).await.body).len(), 4);
    assert_eq!(world.answer("GET", "/v2/sandboxes?template=nothing", None).await.body, json!([]));
    assert_eq!(listed(&world.answer("GET", "/sandboxes", None).await.body).len(), 4);

    world.call("list_bad_limit", "GET", "/v2/sandboxes?limit=101", None).await;
    world.call("list_bad_state", "GET", "/v2/sandboxes?state=stopped", None).await;
    world.call("list_bad_token", "GET", "/v2/sandboxes?nextToken=x", None).await;
    world.call("list_bad_template", "GET", "/v2/sandboxes?template=base%3Av1", None).await;
    world.call("list_bad_metadata", "GET", "/v2/sandboxes?metadata=user", None).await;
}

#[tokio::test]
async fn timeouts_pause_and_resume_follow_the_contracts_table() {
    let world = World::new().await;
    let created = world.answer("POST", "/sandboxes", Some(json!({"templateID": "base", "timeout": 300, "secure": true}))).await.body;
    let path = |call: &str| format!("/sandboxes/{}/{call}", created["sandboxID"].as_str().unwrap());
    world.call("timeout", "POST", &path("timeout"), Some(json!({"timeout": 120}))).await;
    world.call("timeout_bad", "POST", &path("timeout"), Some(json!({"timeout": -1}))).await;
    world.call("refresh", "POST", &path("refreshes"), Some(json!({"duration": 60}))).await;
    world.call("refresh_bad", "POST", &path("refreshes"), Some(json!({"duration": 3601}))).await;
    let connected = world.call("connect_running", "POST", &path("connect"), Some(json!({"timeout": 60}))).await;
    assert_eq!(connected, created);
    world.call("resume_running", "POST", &path("resume"), Some(json!({"timeout": 60}))).await;

    world.call("pause", "POST", &path("pause"), None).await;
    world.call("pause_paused", "POST", &path("pause"), None).await;
    world.call("timeout_paused", "POST", &path("timeout"), Some(json!({"timeout": 120}))).await;
    world.call("fork_paused", "POST", &path("fork"), Some(json!({"count": 1}))).await;
    world.call("network_paused", "PUT", &path("network"), Some(json!({}))).await;
    let paused = world.call("info_paused", "GET", &format!("/sandboxes/{}", created["sandboxID"].as_str().unwrap()), None).await;
    assert_eq!(paused["envdAccessToken"], created["envdAccessToken"]);
    let resumed = world.call("connect_paused", "POST", &path("connect"), Some(json!({"timeout": 60}))).await;
    assert_eq!(resumed, created);
    world.call("pause_files", "POST", &path("pause"), Some(json!({"memory": false}))).await;
    world.call("resume", "POST", &path("resume"), Some(json!({"timeout": 60, "autoPause": true}))).await;
    for call in ["timeout", "pause", "connect", "resume", "fork", "snapshots"] {
        let gone = world.answer("POST", &format!("/sandboxes/i00000000000000000000/{call}"), Some(json!({"timeout": 60}))).await;
        assert_eq!((gone.status, &gone.body["code"]), (404, &json!(404)), "{call}");
    }
}

#[tokio::test]
async fn forks_and_snapshots_are_copies_with_ids_of_their_own() {
    let world = World::new().await;
    let created = world.answer("POST", "/sandboxes", Some(json!({"templateID": "base", "timeout": 300, "secure": true}))).await.body;
    let source = created["sandboxID"].as_str().unwrap();
    let forks = world.call("fork", "POST", &format!("/sandboxes/{source}/fork"), Some(json!({"count": 2, "timeout": 60}))).await;
    let (one, other) = (&forks[0]["sandbox"], &forks[1]["sandbox"]);
    assert!(one["sandboxID"] != other["sandboxID"] && one["envdAccessToken"] != created["envdAccessToken"]);
    world.call("fork_bad", "POST", &format!("/sandboxes/{source}/fork"), Some(json!({"count": 101}))).await;

    let unnamed = world.call("snapshot", "POST", &format!("/sandboxes/{source}/snapshots"), Some(json!({}))).await;
    world.call("snapshot_named", "POST", &format!("/sandboxes/{source}/snapshots"), Some(json!({"name": "Nightly:v2"}))).await;
    world.call("snapshot_bad", "POST", &format!("/sandboxes/{source}/snapshots"), Some(json!({"name": "a b"}))).await;
    world.call("snapshots", "GET", "/snapshots", None).await;
    world.call("snapshots_page", "GET", "/snapshots?limit=1", None).await;
    let named = world.answer("GET", "/snapshots?name=nightly", None).await.body;
    assert_eq!(named.as_array().unwrap().len(), 1);
    assert_eq!(world.answer("GET", "/snapshots?name=unknown", None).await.body, json!([]));
    for id in [unnamed["snapshotID"].as_str().unwrap(), "local/nightly:v2"] {
        let copy = world.answer("POST", "/v2/sandboxes", Some(json!({"templateID": id}))).await;
        assert_eq!(copy.status, 201, "{}", copy.body);
        let path = format!("/templates/{}", id.replace('/', "%2F").replace(':', "%3A"));
        let used = world.answer("DELETE", &path, None).await;
        let message = format!("cannot delete template '{id}' because 1 running or paused sandboxes use it; kill them first");
        assert_eq!((used.status, used.body), (400, json!({"code": 400, "message": message})));
        world.answer("DELETE", &format!("/sandboxes/{}", copy.body["sandboxID"].as_str().unwrap()), None).await;
        assert_eq!(world.answer("DELETE", &path, None).await.status, 204);
        assert_eq!(world.answer("DELETE", &path, None).await.status, 404);
    }
    assert_eq!(world.answer("GET", "/snapshots", None).await.body, json!([]));
}

#[tokio::test]
async fn metrics_and_logs_are_read_back() {
    let world = World::new().await;
    let created = world.answer("POST", "/sandboxes", Some(json!({"templateID": "base", "timeout": 300}))).await.body;
    let id = created["sandboxID"].as_str().unwrap();
    world.until(&format!("/sandboxes/{id}/metrics"), |points| points.as_array().is_some_and(|points| !points.is_empty())).await;
    let first = world.call("metrics_latest", "GET", &format!("/sandboxes/metrics?sandbox_ids={id},nobody"), None).await;
    assert!(first["sandboxes"][id]["cpuCount"].as_u64().unwrap() > 0);
    world.call("metrics_before", "GET", &format!("/sandboxes/{id}/metrics?start=0&end=10"), None).await;
    world.call("metrics_unknown", "GET", "/sandboxes/i00000000000000000000/metrics", None).await;
    world.call("metrics_bad", "GET", &format!("/sandboxes/{id}/metrics?start=x"), None).await;
    for path in [format!("/sandboxes/{id}/logs"), format!("/v2/sandboxes/{id}/logs?direction=forward&limit=10")] {
        let logs = world.answer("GET", &path, None).await;
        assert!(logs.status == 200 && logs.body["logs"].is_array(), "{path}: {}", logs.body);
    }
    world.call("logs_bad", "GET", &format!("/v2/sandboxes/{id}/logs?level=loud"), None).await;
}

#[tokio::test]
async fn templates_are_read_by_id_alias_and_encoded_name() {
    let world = World::new().await;
    let all = world.call("templates", "GET", "/templates?teamID=x", None).await;
    let id = all[0]["templateID"].as_str().unwrap().to_owned();
    world.call("templates_v2", "GET", "/v2/templates?limit=1", None).await;
    world.call("template", "GET", &format!("/templates/{id}"), None).await;
    world.call("template", "GET", "/templates/local%2Fbase%3Adefault", None).await;
    world.call("template_unknown", "GET", "/templates/nothing", None).await;
    world.call("alias", "GET", "/templates/aliases/base", None).await;
    world.call("alias_unknown", "GET", "/templates/aliases/nothing", None).await;
    world.call("tags", "GET", &format!("/templates/{id}/tags"), None).await;
    world.call("teams", "GET", "/teams", None).await;
}

#[tokio::test]
async fn a_failure_of_ours_tells_its_request_id_and_nothing_else() {
    let world = World::new().await;
    world.fail_next_start("the disk is on fire");
    let failed = world.call("internal", "POST", "/sandboxes", Some(json!({"templateID": "base"}))).await;
    assert!(!failed.to_string().contains("fire"), "{failed}");
}

/// A small server's volumes are folders: what needs a kernel is tests/kernel's.
#[tokio::test]
async fn volumes_are_made_listed_mounted_and_removed() {
    let world = World::new().await;
    let made = world.call("volume_create", "POST", "/volumes", Some(json!({"name": "data_1"}))).await;
    let id = made["volumeID"].as_str().unwrap().to_owned();
    world.call("volume_taken", "POST", "/volumes", Some(json!({"name": "data_1"}))).await;
    world.call("volume_bad_name", "POST", "/volumes", Some(json!({"name": "a b"}))).await;
    world.call("volumes", "GET", "/volumes", None).await;
    world.call("volume", "GET", &format!("/volumes/{id}"), None).await;
    world.call("volume_bad_id", "GET", "/volumes/data_1", None).await;
    world.call("volume_unknown", "GET", "/volumes/6f2b8c1e-6d0a-4f0e-9c57-0d6a4d1e2f3a", None).await;
    let new = json!({"templateID": "base", "timeout": 60, "volumeMounts": [{"name": "data_1", "path": "/mnt/data"}]});
    let created = world.answer("POST", "/sandboxes", Some(new)).await;
    assert_eq!(created.status, 201, "{}", created.body);
    let sandbox = created.body["sandboxID"].as_str().unwrap();
    let shown = world.answer("GET", &format!("/sandboxes/{sandbox}"), None).await.body;
    assert_eq!(shown["volumeMounts"], json!([{"name": "data_1", "path": "/mnt/data"}]));
    world.call("volume_in_use", "DELETE", &format!("/volumes/{id}"), None).await;
    world
        .call(
            "volume_path_twice",
            "POST",
            "/sandboxes",
            Some(json!({"templateID": "base", "volumeMounts": [
        {"name": "data_1", "path": "/a"}, {"name": "data_1", "path": "/a"}]})),
        )
        .await;
    world
        .call(
            "volume_path_unclean",
            "POST",
            "/sandboxes",
            Some(json!({"templateID": "base", "volumeMounts": [
        {"name": "data_1", "path": "/a/../b"}]})),
        )
        .await;
    assert_eq!(world.answer("DELETE", &format!("/sandboxes/{sandbox}"), None).await.status, 204);
    assert_eq!(world.answer("DELETE", &format!("/volumes/{id}"), None).await.status, 204);
    assert_eq!(world.answer("DELETE", &format!("/volumes/{id}"), None).await.status, 404);
    assert_eq!(world.answer("GET", "/volumes", None).await.body, json!([]));
    for name in ["one", "two", "three"] {
        assert_eq!(world.answer("POST", "/volumes", Some(json!({"name": name}))).await.status, 201);
    }
    world.call("volume_too_many", "POST", "/volumes", Some(json!({"name": "four"}))).await;
}

#[tokio::test]
async fn the_files_of_a_volume_are_its_tokens_alone() {
    let world = World::new().await;
    let one = world.answer("POST", "/volumes", Some(json!({"name": "one"}))).await.body;
    let two = world.answer("POST", "/volumes", Some(json!({"name": "two"}))).await.body;
    let (id, token) = (one["volumeID"].as_str().unwrap(), one["token"].as_str().unwrap());
    let with = |token: &str| world.without_key().with_header("authorization", &format!("Bearer {token}"));
    let owner = with(token);
    let at = |call: &str| format!("/volumecontent/{id}/{call}");
    owner.call("content_make_dir", "POST", &at("dir?path=/folder&uid=1001&mode=493"), None).await;
    owner.send("content_write", "PUT", &at("file?path=/folder/file"), "text".to_owned()).await;
    owner.send("content_exists", "PUT", &at("file?path=/folder/file"), "text".to_owned()).await;
    owner.call("content_list", "GET", &at("dir?path=%2F&depth=2"), None).await;
    owner.call("content_update", "PATCH", &at("path?path=/folder/file"), Some(json!({"uid": 7, "mode": 384}))).await;
    owner.call("content_unknown", "GET", &at("path?path=/nothing"), None).await;
    owner.call("content_bad_uid", "POST", &at("dir?path=/x&uid=70000"), None).await;
    owner.call("content_bad_depth", "GET", &at("dir?path=/&depth=11"), None).await;
    assert_eq!(owner.answer("DELETE", &at("path?path=/"), None).await.status, 404);
    assert_eq!(owner.answer("DELETE", &at("path?path=/folder"), None).await.status, 204);
    for stranger in [with(two["token"].as_str().unwrap()), with(""), world.without_key(), world.clone()] {
        assert_eq!(stranger.answer("GET", &at("dir?path=/"), None).await.status, 401);
    }
    with("x").call("content_wrong_token", "GET", &at("dir?path=/"), None).await;
}
