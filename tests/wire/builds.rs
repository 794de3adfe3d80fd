//! Template builds over the wire: registered, fed, started, watched, tagged, removed.

use super::world::World;
use serde_json::{Value, json};
use std::time::Duration;
use stillbox::runtime::fake::Verb;

/// Registers a build; its template and its id.
async fn registered(world: &World, name: &str) -> (String, String) {
    let body = world.answer("POST", "/v3/templates", Some(json!({"name": name, "cpuCount": 1, "memoryMB": 512}))).await.body;
    (body["templateID"].as_str().unwrap().to_owned(), body["buildID"].as_str().unwrap().to_owned())
}

fn status_path((template, build): &(String, String)) -> String {
    format!("/templates/{template}/builds/{build}/status")
}

async fn start(world: &World, (template, build): &(String, String), plan: Value) -> u16 {
    world.answer("POST", &format!("/v2/templates/{template}/builds/{build}"), Some(plan)).await.status
}

/// Starts it and waits until it is over; the last status.
async fn built(world: &World, ids: &(String, String), plan: Value) -> Value {
    assert_eq!(start(world, ids, plan).await, 202);
    let path = status_path(ids);
    world.until(&path, |body| body["status"] != "building").await;
    world.answer("GET", &path, None).await.body
}

fn run(script: &str) -> Value {
    json!({"fromTemplate": "base", "steps": [{"type": "RUN", "args": [script]}]})
}

#[tokio::test]
async fn a_build_goes_from_waiting_to_ready_and_sandboxes_come_of_it() {
    let world = World::new().await;
    let asked = json!({"name": "Mine:v1", "tags": ["latest"], "cpuCount": 4, "memoryMB": 512});
    let body = world.call("build_request", "POST", "/v3/templates", Some(asked)).await;
    let ids = (body["templateID"].as_str().unwrap().to_owned(), body["buildID"].as_str().unwrap().to_owned());
    world.call("build_waiting", "GET", &status_path(&ids), None).await;
    world.call("alias_of_waiting", "GET", "/templates/aliases/mine", None).await;
    world.call("create_of_waiting", "POST", "/sandboxes", Some(json!({"templateID": "mine:v1"}))).await;
    let plan = json!({
        "fromTemplate": "base", "startCmd": "serve", "readyCmd": "true",
        "steps": [
            {"type": "RUN", "args": ["true", "root"]},
            {"type": "ENV", "args": ["A", "1", "B", "$A"]},
            {"type": "WORKDIR", "args": ["/srv"]},
            {"type": "USER", "args": ["dev"]},
        ],
    });
    world.call("build_start", "POST", &format!("/v2/templates/{}/builds/{}", ids.0, ids.1), Some(plan.clone())).await;
    world.until(&status_path(&ids), |body| body["status"] == "ready").await;
    world.call("build_ready", "GET", &format!("{}?logsOffset=1&limit=4", status_path(&ids)), None).await;
    world.call("build_start_again", "POST", &format!("/v2/templates/{}/builds/{}", ids.0, ids.1), Some(plan)).await;
    world.call("build_logs", "GET", &format!("/templates/{}/builds/{}/logs?limit=1&level=info", ids.0, ids.1), None).await;
    let created = world.answer("POST", "/sandboxes", Some(json!({"templateID": "mine:latest"}))).await;
    assert_eq!(created.status, 201);
    let id = created.body["sandboxID"].as_str().unwrap().parse().unwrap();
    let init = world.runtime.with_agent(id, |agent| agent.inits.last().cloned().unwrap()).unwrap();
    assert_eq!((&init["defaultUser"], &init["defaultWorkdir"]), (&json!("dev"), &json!("/srv")));
    assert_eq!(init["templateEnv"], json!({"A": "1", "B": "1"}));
    let shown = world.answer("GET", &format!("/sandboxes/{id}"), None).await.body;
    assert_eq!((&shown["cpuCount"], &shown["memoryMB"], &shown["alias"]), (&json!(4), &json!(512), &json!("mine")));
}

#[tokio::test]
async fn a_failure_names_the_part_that_is_to_blame() {
    let world = World::new().await;
    let ids = registered(&world, "failing").await;
    let plan = json!({"fromTemplate": "base", "steps": [{"type": "RUN", "args": ["true"]}, {"type": "RUN", "args": ["exit 3"]}]});
    built(&world, &ids, plan).await;
    world.call("build_failed", "GET", &format!("{}?logsOffset=2", status_path(&ids)), None).await;
    let cases = [
        (json!({"fromTemplate": "nothing"}), "base", "template 'nothing' not found"),
        (json!({"fromTemplate": "base", "startCmd": "exit 4", "readyCmd": "exit 1"}), "finalize", "start command failed: exit status 4"),
        (
            json!({"fromTemplate": "base", "steps": [{"type": "LABEL"}]}),
            "1",
            "step type 'LABEL' is unknown; there are RUN, COPY, ENV, WORKDIR and USER",
        ),
        (
            json!({"fromTemplate": "base", "steps": [{"type": "COPY", "args": ["a", "b"], "filesHash": "ab".repeat(32)}]}),
            "1",
            "the files of COPY a were not uploaded",
        ),
    ];
    for (plan, step, message) in cases {
        let ids = registered(&world, "failing").await;
        let reason = built(&world, &ids, plan).await["reason"].clone();
        assert_eq!(reason["step"], step, "{reason}");
        assert!(reason["message"].as_str().unwrap().starts_with(message), "{reason}");
    }
    assert!(world.running().is_empty(), "a failed build left something running");
}

#[tokio::test]
async fn an_archive_is_uploaded_once_by_a_link_that_needs_no_key() {
    let world = World::new().await;
    let ids = registered(&world, "copied").await;
    let path = format!("/templates/{}/files/{}", ids.0, "ab".repeat(32));
    let absent = world.with_header("host", "localhost:3000").call("files_absent", "GET", &path, None).await;
    let link = absent["url"].as_str().unwrap().strip_prefix("http://localhost:3000").unwrap();
    let stranger = world.without_key();
    stranger.call("upload_unsigned", "PUT", &path, None).await;
    stranger.call("upload_forged", "PUT", &link.replace("signature=", "signature=0"), None).await;
    stranger.call("upload_of_another", "PUT", &link.replace("abab", "baba"), None).await;
    stranger.send("upload_too_large", "PUT", link, "x".repeat(1001)).await;
    stranger.send("upload", "PUT", link, "archive".to_owned()).await;
    world.with_header("host", "api.stillbox.localhost:3443").call("files_present", "GET", &path, None).await;
    world.call("files_bad_hash", "GET", &format!("/templates/{}/files/..%2F..%2Fpasswd", ids.0), None).await;
    let step = json!({"type": "COPY", "args": ["a", "b", "", ""], "filesHash": "ab".repeat(32)});
    assert_eq!(built(&world, &ids, json!({"fromTemplate": "base", "steps": [step]})).await["status"], "ready");
}

#[tokio::test]
async fn tags_and_the_public_flag_are_changed_and_what_cannot_be_is_said() {
    let world = World::new().await;
    built(&world, &registered(&world, "tagged:v1").await, run("true")).await;
    world.call("tags_assigned", "POST", "/templates/tags", Some(json!({"target": "tagged:v1", "tags": ["Stable", "latest"]}))).await;
    world.call("tags_bad", "POST", "/templates/tags", Some(json!({"target": "tagged:v1", "tags": [":x"]}))).await;
    world.call("tags_none", "POST", "/templates/tags", Some(json!({"target": "tagged:v1", "tags": []}))).await;
    world.call("tags_of_unknown", "POST", "/templates/tags", Some(json!({"target": "tagged:v9", "tags": ["x"]}))).await;
    world.call("tags_removed", "DELETE", "/templates/tags", Some(json!({"name": "tagged", "tags": ["latest"]}))).await;
    world.call("tags_default_stays", "DELETE", "/templates/tags", Some(json!({"name": "tagged", "tags": ["default"]}))).await;
    let tags = world.answer("GET", "/templates/tagged/tags", None).await.body;
    let mut names: Vec<_> = tags.as_array().unwrap().iter().map(|tag| tag["tag"].as_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["stable", "v1"]);
    world.call("template_published", "PATCH", "/v2/templates/tagged", Some(json!({"public": true}))).await;
    world.call("template_unpublished", "PATCH", "/templates/tagged", Some(json!({"public": false}))).await;
    let shown = world.answer("GET", "/templates/aliases/tagged", None).await.body;
    assert_eq!(shown["public"], false);
}

#[tokio::test]
async fn bad_requests_name_field_value_and_rule() {
    let world = World::new().await;
    let ids = registered(&world, "bad").await;
    let start = format!("/v2/templates/{}/builds/{}", ids.0, ids.1);
    for (name, method, path, body) in [
        ("build_no_name", "POST", "/v3/templates", json!({})),
        ("build_bad_name", "POST", "/v3/templates", json!({"name": "a b"})),
        ("build_bad_memory", "POST", "/v3/templates", json!({"name": "a", "memoryMB": 127})),
        ("build_no_base", "POST", start.as_str(), json!({"steps": []})),
        ("build_unknown", "POST", "/v2/templates/bad/builds/01234567-89ab-4def-8123-456789abcdef", json!({"fromTemplate": "base"})),
        ("build_bad_id", "POST", "/v2/templates/bad/builds/7", json!({"fromTemplate": "base"})),
    ] {
        world.call(name, method, path, Some(body)).await;
    }
}

#[tokio::test]
async fn a_template_in_use_is_not_deleted_and_a_deleted_one_stops_its_builds() {
    let world = World::new().await;
    let ids = registered(&world, "used").await;
    built(&world, &ids, run("true")).await;
    let sandbox = world.answer("POST", "/sandboxes", Some(json!({"templateID": "used"}))).await.body["sandboxID"].clone();
    world.call("template_in_use", "DELETE", "/templates/used", None).await;
    world.answer("DELETE", &format!("/sandboxes/{}", sandbox.as_str().unwrap()), None).await;
    let gate = world.runtime.hold(Verb::Start);
    let again = registered(&world, "used").await;
    assert_eq!(start(&world, &again, run(": other")).await, 202);
    assert_eq!(world.answer("DELETE", "/templates/used", None).await.status, 204);
    drop(gate);
    assert_eq!(world.answer("GET", &status_path(&again), None).await.status, 404);
    wait_until_nothing_runs(&world).await;
}

#[tokio::test]
async fn builds_wait_for_their_turn_within_a_bound_and_can_be_cancelled() {
    let world = World::new().await;
    let mut gate = world.runtime.hold(Verb::Start);
    let (first, second, third) = (registered(&world, "a").await, registered(&world, "b").await, registered(&world, "c").await);
    assert_eq!(start(&world, &first, run(": 1")).await, 202);
    gate.reached().await;
    assert_eq!(start(&world, &second, run(": 2")).await, 202);
    world
        .until(&status_path(&second), |body| {
            body["logEntries"][0]["message"].as_str().is_some_and(|line| line.starts_with("Waiting for others"))
        })
        .await;
    world.call("build_too_many", "POST", &format!("/v2/templates/{}/builds/{}", third.0, third.1), Some(run(": 3"))).await;
    assert_eq!(world.answer("POST", &format!("/stillbox/builds/{}/cancel", first.1), None).await.status, 204);
    world.until(&status_path(&first), |body| body["reason"]["message"] == "build was cancelled").await;
    drop(gate);
    world.until(&status_path(&second), |body| body["status"] == "ready").await;
    assert_eq!(world.answer("POST", &format!("/stillbox/builds/{}/cancel", second.1), None).await.status, 404);
    assert_eq!(built(&world, &third, run(": 3")).await["status"], "ready");
    wait_until_nothing_runs(&world).await;
}

#[tokio::test]
async fn a_build_that_its_server_did_not_see_through_says_so_and_one_that_waits_can_still_be_started() {
    let world = World::new().await;
    let (begun, waiting) = (registered(&world, "begun").await, registered(&world, "waiting").await);
    let mut gate = world.runtime.hold(Verb::Start);
    assert_eq!(start(&world, &begun, run("true")).await, 202);
    gate.reached().await;
    let next = world.builds_of_the_next_server().await;
    world.call("build_of_a_dead_server", "GET", &format!("{}?limit=0", status_path(&begun)), None).await;
    let status = next.status(waiting.0.parse().unwrap(), waiting.1.parse().unwrap()).await.unwrap();
    assert_eq!(status.build.state, stillbox::model::BuildState::Waiting);
    drop(gate);
    assert_eq!(built(&world, &waiting, run("true")).await["status"], "ready");
    // What the first server thinks of it comes too late.
    let status = world.answer("GET", &status_path(&begun), None).await.body;
    assert_eq!(status["status"], "error");
}

async fn wait_until_nothing_runs(world: &World) {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while !world.running().is_empty() {
        assert!(std::time::Instant::now() < deadline, "{:?} still run", world.running());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
