//! Stored secrets, in both dialects: what goes in comes out of no answer.

use super::world::World;
use serde_json::{Value, json};

const VALUE: &str = "s3cret-value";

/// Every answer of a test, so that none of them tells a value.
async fn call(world: &World, name: &str, method: &str, path: &str, body: Option<Value>) -> Value {
    let answer = world.call(name, method, path, body).await;
    assert!(!answer.to_string().contains(VALUE), "{name} tells the value: {answer}");
    answer
}

#[tokio::test]
async fn e2bs_secrets_have_versions_and_no_value() {
    let world = World::new().await;
    let new = json!({"name": "Open-Key", "value": VALUE, "metadata": {"team": "a"}});
    let made = call(&world, "secret_create", "POST", "/secrets", Some(new.clone())).await;
    call(&world, "secret_taken", "POST", "/secrets", Some(new)).await;
    let path = format!("/secrets/{}", made["secretID"].as_str().unwrap());
    call(&world, "secret_update", "POST", &path, Some(json!({"value": VALUE}))).await;
    call(&world, "secret_update", "GET", "/secrets/OPEN-key", None).await;
    call(&world, "secret_unknown", "GET", "/secrets/nobody", None).await;
    call(&world, "secret_bad_name", "POST", "/secrets", Some(json!({"name": "a b", "value": VALUE}))).await;
    call(&world, "secret_bad_value", "POST", "/secrets", Some(json!({"name": "a", "value": "a\nb"}))).await;
    let metadata: Value = (0..33).map(|n| (n.to_string(), json!("v"))).collect::<serde_json::Map<_, _>>().into();
    let many = world.answer("POST", "/secrets", Some(json!({"name": "a", "value": VALUE, "metadata": metadata}))).await;
    assert_eq!((many.status, &many.body["message"]), (400, &json!("metadata has 33 entries; the limit is 32")));

    world.answer("POST", "/secrets", Some(json!({"name": "second", "value": VALUE}))).await;
    let names =
        |body: &Value| body.as_array().unwrap().iter().map(|secret| secret["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    let page = world.answer("GET", "/secrets?limit=1", None).await;
    assert_eq!(names(&page.body), ["open-key"]);
    let next = format!("/secrets?limit=1&nextToken={}", page.headers["x-next-token"].as_str().unwrap());
    let page = world.answer("GET", &next, None).await;
    assert!(names(&page.body) == ["second"] && page.headers.get("x-next-token").is_none(), "{:?}", page.body);
    assert_eq!(world.answer("DELETE", &path, None).await.status, 204);
    assert_eq!(world.answer("DELETE", &path, None).await.status, 404);
}

#[tokio::test]
async fn novitas_secrets_have_hosts_and_a_placeholder_that_stays() {
    let world = World::new().await.with_header("user-agent", "novita-sandbox-python-sdk/2.1.1");
    let new = json!({"name": "vendor.Key", "value": VALUE, "hosts": ["api.example.com", "*.example.org", "API.example.com"], "description": "of the vendor"});
    let made = call(&world, "novita/secret_create", "POST", "/secrets", Some(new)).await;
    let changed = json!({"value": VALUE, "hosts": ["api.example.com"], "description": "another"});
    let updated = call(&world, "novita/secret_update", "PUT", "/secrets/vendor.Key", Some(changed)).await;
    assert_eq!(updated["placeholder"], made["placeholder"]);
    call(&world, "novita/secret_list", "GET", "/secrets", None).await;
    call(&world, "novita/secret_bad_host", "POST", "/secrets", Some(json!({"name": "a", "value": VALUE, "hosts": ["https://a.com"]})))
        .await;
    let bound = json!({"templateID": "base", "secrets": {"TOKEN": "vendor.Key"}});
    assert_eq!(world.answer("POST", "/sandboxes", Some(bound)).await.status, 201);
    let twice = json!({"templateID": "base", "envVars": {"TOKEN": "x"}, "secrets": {"TOKEN": "vendor.Key"}});
    assert_eq!(world.answer("POST", "/sandboxes", Some(twice)).await.body["message"], "envVars and secrets both define 'TOKEN'");
    call(&world, "novita/secret_deleted", "DELETE", "/secrets/vendor.Key", None).await;
    assert_eq!(world.answer("GET", "/secrets/vendor.Key", None).await.status, 404);
}
