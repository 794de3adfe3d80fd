//! Novita's control plane: what its SDKs are answered otherwise than E2B's, and what only they ask.

use super::world::World;
use serde_json::{Value, json};

const SDK: &str = "novita-sandbox-python-sdk/2.1.1";

async fn world() -> World {
    World::new().await.with_header("user-agent", SDK)
}

fn id(created: &Value) -> String {
    created["sandboxID"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn creates_of_both_protocols_are_understood() {
    let world = world().await;
    let modern = json!({"templateID": "base", "allow_internet_access": false, "autoPause": true, "envVars": {}, "metadata": {"auto_resume": "true"},
                        "secure": true, "timeout": 60, "nodeID": null});
    let created = world.call("novita/create", "POST", "/sandboxes", Some(modern)).await;
    world.call("novita/info", "GET", &format!("/sandboxes/{}", id(&created)), None).await;
    let legacy = json!({"templateID": "base", "allowInternetAccess": false, "autoPause": false, "metadata": {}, "secure": false});
    let created = world.call("novita/create_legacy", "POST", "/sandboxes", Some(legacy)).await;
    // What can be nobody's id is nobody's id here, where E2B's clients are told that it is malformed.
    for (method, path) in [("DELETE", "/sandboxes/non-existing-sandbox"), ("POST", "/sandboxes/A_B/commit"), ("GET", "/sandboxes/A_B")] {
        assert_eq!(world.answer(method, path, None).await.status, 404, "{method} {path}");
    }
    let shown = world.answer("GET", &format!("/sandboxes/{}-{}", id(&created), created["clientID"].as_str().unwrap()), None).await.body;
    assert_eq!(shown["allowInternetAccess"], json!(false));
}

#[tokio::test]
async fn bad_requests_name_field_value_and_limit() {
    let world = world().await;
    let refused = [
        ("novita/bad_timeout", json!({"templateID": "base", "timeout": 3601})),
        ("novita/bad_idle", json!({"templateID": "base", "metadata": {"idle_timeout": "59"}})),
        ("novita/bad_idle_word", json!({"templateID": "base", "metadata": {"idle_timeout": "soon"}})),
        ("novita/bad_node", json!({"templateID": "base", "nodeID": "elsewhere"})),
        ("novita/bad_secret", json!({"templateID": "base", "secrets": {"TOKEN": "stored"}})),
        ("novita/bad_volume", json!({"templateID": "base", "volumeMounts": [{"name": "v", "path": "/v"}]})),
    ];
    for (name, body) in refused {
        world.call(name, "POST", "/sandboxes", Some(body)).await;
    }
    assert!(world.running().is_empty(), "a refused request left something running");
    // The same metadata is free text to everybody else.
    let e2b = World::new().await.with_header("user-agent", "e2b-python-sdk/2.63.0");
    let free = json!({"templateID": "base", "timeout": 7200, "metadata": {"idle_timeout": "soon"}});
    assert_eq!(e2b.answer("POST", "/sandboxes", Some(free)).await.status, 201);
}

#[tokio::test]
async fn pause_connect_and_resume_take_the_bodies_of_every_version() {
    let world = world().await;
    let created = world.answer("POST", "/sandboxes", Some(json!({"templateID": "base", "timeout": 300}))).await.body;
    let path = |call: &str| format!("/sandboxes/{}/{call}", id(&created));
    for body in [None, Some(json!({"sync": null})), Some(json!({"sync": true})), Some(json!({"sync": false}))] {
        assert_eq!(world.answer("POST", &path("pause"), body.clone()).await.status, 204, "{body:?}");
        assert_eq!(world.answer("POST", &path("pause"), body).await.status, 409);
        assert_eq!(world.answer("POST", &path("timeout"), Some(json!({"timeout": 60}))).await.status, 404);
        world.answer("POST", &path("connect"), Some(json!({"timeout": 300, "autoPause": false}))).await;
    }
    world.call("novita/connect_running", "POST", &path("connect"), Some(json!({"timeout": 60}))).await;
    world.call("novita/resume_running", "POST", &path("resume"), Some(json!({"timeout": 60, "autoPause": false}))).await;
    world.answer("POST", &path("pause"), None).await;
    world.call("novita/resume", "POST", &path("resume"), Some(json!({"timeout": 60, "autoPause": false}))).await;
    world.call("novita/connect_private", "POST", &path("connect"), Some(json!({"allowPublicTraffic": false}))).await;
    world.call("novita/connect_secure", "POST", &path("connect"), Some(json!({"secure": true}))).await;
    world.answer("POST", &path("pause"), None).await;
    let secured = world.answer("POST", &path("connect"), Some(json!({"secure": true, "network": {"allowPublicTraffic": false}}))).await;
    assert_eq!(secured.status, 201);
    assert!(secured.body["envdAccessToken"].is_string() && secured.body["trafficAccessToken"].is_string(), "{}", secured.body);
    world.call("novita/connect_gone", "POST", "/sandboxes/i00000000000000000000/connect", Some(json!({"timeout": 60}))).await;
}

#[tokio::test]
async fn auto_pause_set_at_create_outlasts_every_resume() {
    let world = world().await;
    let created = world.answer("POST", "/sandboxes", Some(json!({"templateID": "base", "autoPause": true}))).await.body;
    let path = |call: &str| format!("/sandboxes/{}/{call}", id(&created));
    for resume in ["connect", "resume"] {
        world.answer("POST", &path("pause"), None).await;
        world.answer("POST", &path(resume), Some(json!({"timeout": 60, "autoPause": false}))).await;
        let shown = world.answer("GET", &format!("/sandboxes/{}", id(&created)), None).await.body;
        assert_eq!(shown["lifecycle"]["onTimeout"], "pause", "{resume}");
    }
}

#[tokio::test]
async fn clones_come_with_their_template_or_not_at_all() {
    let world = World::with_places(4).await.with_header("user-agent", SDK);
    let created = world.answer("POST", "/sandboxes", Some(json!({"templateID": "base", "autoPause": true, "secure": true}))).await.body;
    let path = format!("/sandboxes/{}/clone", id(&created));
    let cloned = world.call("novita/clone", "POST", &path, Some(json!({"count": 2, "strict": false, "nodeID": null}))).await;
    world.call("novita/clone_strict_full", "POST", &path, Some(json!({"count": 2, "strict": true}))).await;
    let partly = world.answer("POST", &path, Some(json!({"count": 3, "strict": false}))).await.body;
    assert_eq!(partly["sandboxes"].as_array().unwrap().len(), 1);
    world.call("novita/clone_full", "POST", &path, Some(json!({"count": 1}))).await;
    world.call("novita/clone_none", "POST", &path, Some(json!({"count": 0}))).await;
    world.call("novita/clone_many", "POST", &path, Some(json!({"count": 5}))).await;
    world.call("novita/clone_gone", "POST", "/sandboxes/i00000000000000000000/clone", Some(json!({"count": 1}))).await;
    let template = cloned["snapshotTemplateId"].as_str().unwrap();
    assert_eq!(world.answer("DELETE", &format!("/templates/{template}"), None).await.status, 204);
    for clone in cloned["sandboxes"].as_array().unwrap() {
        assert_eq!(world.answer("DELETE", &format!("/sandboxes/{}", id(clone)), None).await.status, 204);
    }
}

#[tokio::test]
async fn a_strict_clone_whose_start_fails_leaves_nothing() {
    let world = world().await;
    let created = world.answer("POST", "/sandboxes", Some(json!({"templateID": "base"}))).await.body;
    world.fail_next_start("no room");
    let failed = world.answer("POST", &format!("/sandboxes/{}/clone", id(&created)), Some(json!({"count": 3, "strict": true}))).await;
    assert_eq!(failed.status, 500, "{}", failed.body);
    assert_eq!(world.running().len(), 1, "only the parent is left");
    assert_eq!(world.answer("GET", "/snapshots", None).await.body, json!([]));
}

#[tokio::test]
async fn a_reset_is_told_with_a_token_only_when_there_is_one() {
    let world = world().await;
    let created = world.answer("POST", "/sandboxes", Some(json!({"templateID": "base", "secure": true}))).await.body;
    let path = format!("/sandboxes/{}/reset", id(&created));
    world.call("novita/reset", "POST", &path, Some(json!({"resume": true, "timeout": 60}))).await;
    world.call("novita/reset_private", "POST", &path, Some(json!({"resume": false, "allowPublicTraffic": false}))).await;
    let shown = world.answer("GET", &format!("/sandboxes/{}", id(&created)), None).await.body;
    assert_eq!(shown["state"], "paused");
    world.call("novita/reset_gone", "POST", "/sandboxes/i00000000000000000000/reset", Some(json!({"resume": true}))).await;
}

#[tokio::test]
async fn quota_events_templates_and_commits() {
    let world = world().await;
    let never_started = world.answer("GET", "/v2/templates", None).await.body;
    assert!(never_started["templates"][0]["lastSpawnedAt"].is_string(), "1.x reads no null: {never_started}");
    let created = world.answer("POST", "/sandboxes", Some(json!({"templateID": "base", "timeout": 300}))).await.body;
    world.call("novita/quota", "GET", "/sandboxes/quota", None).await;
    world.answer("POST", &format!("/sandboxes/{}/timeout", id(&created)), Some(json!({"timeout": 60}))).await;
    world.call("novita/events", "GET", &format!("/sandboxes/events?sandboxID={}&orderAsc=true", id(&created)), None).await;
    for (name, query) in
        [("novita/events_bad_name", "events=reboot"), ("novita/events_bad_state", "state=maybe"), ("novita/events_bad_offset", "offset=-1")]
    {
        world.call(name, "GET", &format!("/sandboxes/events?{query}"), None).await;
    }
    world.call("novita/templates", "GET", "/v2/templates?page=1&limit=10", None).await;
    world.call("novita/commit", "POST", &format!("/sandboxes/{}/commit", id(&created)), Some(json!({"alias": "Kept"}))).await;
    world.call("novita/commit_bad", "POST", &format!("/sandboxes/{}/commit", id(&created)), Some(json!({"alias": "a b"}))).await;
    let hotplug = format!("/sandboxes/{}/hotplug-memory", id(&created));
    let memory = async || world.answer("GET", &format!("/sandboxes/{}", id(&created)), None).await.body["memoryMB"].as_u64().unwrap();
    for (beyond, after) in [(256, 768), (512, 1024), (0, 512)] {
        assert_eq!(world.answer("POST", &hotplug, Some(json!({"requested_size_mib": beyond}))).await.status, 204);
        assert_eq!(memory().await, after);
    }
    world.call("novita/hotplug_bad", "POST", &hotplug, Some(json!({"requested_size_mib": -1}))).await;
    world.call("novita/hotplug_full", "POST", &hotplug, Some(json!({"requested_size_mib": 1 << 24}))).await;
    assert_eq!(memory().await, 512);
}

#[tokio::test]
async fn metrics_come_in_both_families_of_units() {
    let world = world().await;
    let created = world.answer("POST", "/sandboxes", Some(json!({"templateID": "base", "timeout": 300}))).await.body;
    let path = format!("/sandboxes/{}/metrics", id(&created));
    world.until(&path, |points| points.as_array().is_some_and(|points| !points.is_empty())).await;
    let point = &world.answer("GET", &path, None).await.body[0];
    assert_eq!(point["memTotal"].as_u64().unwrap() >> 20, point["memTotalMiB"].as_u64().unwrap());
    assert!(point["memUsedMiB"].as_u64().unwrap() > 0 && point["diskTotal"].is_u64(), "{point}");
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    for unit in [1, 1000] {
        let range = |from: i64, to: i64| format!("{path}?start={}&end={}", (now + from) * unit, (now + to) * unit);
        assert!(!world.answer("GET", &range(-60, 60), None).await.body.as_array().unwrap().is_empty());
        assert_eq!(world.answer("GET", &range(-120, -60), None).await.body, json!([]));
    }
    assert_eq!(world.answer("GET", "/v2/sandboxes?limit=1000", None).await.status, 200);
    assert_eq!(world.answer("GET", "/v2/sandboxes?limit=0", None).await.status, 400);
}

#[tokio::test]
async fn both_dialects_race_pause_clone_and_kill_on_one_sandbox() {
    let novita = world().await;
    let e2b = novita.with_header("x-other", "e2b");
    for round in 0..8 {
        let created = novita.answer("POST", "/sandboxes", Some(json!({"templateID": "base"}))).await.body;
        let path = |call: &str| format!("/sandboxes/{}{call}", id(&created));
        let (pause, fork, clone, kill) = (path("/pause"), path("/fork"), path("/clone"), path(""));
        let answers = tokio::join!(
            novita.answer("POST", &pause, None),
            e2b.answer("POST", &fork, Some(json!({"count": 1, "timeout": 60}))),
            novita.answer("POST", &clone, Some(json!({"count": 1, "strict": true}))),
            e2b.answer("DELETE", &kill, None),
        );
        let statuses = [answers.0.status, answers.1.status, answers.2.status, answers.3.status];
        assert!(statuses.iter().all(|status| [200, 201, 204, 404, 409].contains(status)), "round {round}: {statuses:?}");
        assert_eq!(answers.3.status, 204, "a kill wins");
        assert_eq!(novita.answer("GET", &kill, None).await.status, 404);
        for row in novita.answer("GET", "/v2/sandboxes", None).await.body.as_array().unwrap() {
            novita.answer("DELETE", &format!("/sandboxes/{}", id(row)), None).await;
        }
    }
    assert!(novita.running().is_empty());
}

#[tokio::test]
async fn volumes_have_a_quota_and_come_to_running_sandboxes() {
    let world = world().await;
    let new = json!({"name": "data", "quotaSizeGiB": 2, "quotaInodes": 2000});
    let made = world.call("novita/volume_create", "POST", "/volumes", Some(new)).await;
    let path = format!("/volumes/{}", made["volumeID"].as_str().unwrap());
    world.call("novita/volumes", "GET", "/volumes", None).await;
    world.call("novita/volume_grown", "PATCH", &path, Some(json!({"quotaSizeGiB": 5, "quotaInodes": 5000}))).await;
    world.call("novita/volume_shrinks", "PATCH", &path, Some(json!({"quotaSizeGiB": 1}))).await;
    world.call("novita/volume_bad_quota", "PATCH", &path, Some(json!({"quotaSizeGiB": 0}))).await;
    let created = world.answer("POST", "/sandboxes", Some(json!({"templateID": "base", "timeout": 300}))).await.body;
    let mounts = format!("/sandboxes/{}/volume-mounts", id(&created));
    world.call("novita/volume_mounted", "POST", &mounts, Some(json!({"name": "data", "path": "/mnt/data"}))).await;
    world.call("novita/volume_mounted_twice", "POST", &mounts, Some(json!({"name": "data", "path": "/mnt/data"}))).await;
    assert_eq!(world.answer("DELETE", &path, None).await.status, 409);
    world.call("novita/volume_unmounted", "DELETE", &format!("{mounts}?path=%2Fmnt%2Fdata"), None).await;
    world.call("novita/volume_not_mounted", "DELETE", &format!("{mounts}?path=%2Fmnt%2Fdata&force=true"), None).await;
    assert_eq!(world.answer("DELETE", &path, None).await.status, 204);
    let gone = world.answer("POST", "/sandboxes/i00000000000000000000/volume-mounts", Some(json!({"name": "data", "path": "/x"}))).await;
    assert_eq!(gone.status, 404);
}
