//! Create: admission, idempotency, and nothing left when it fails.

use crate::world::{World, eventually};
use std::time::Duration;
use stillbox::model::{EndReason, SandboxState};
use stillbox::runtime::fake::Verb;
use stillbox::sandbox::{CreateError, TokenKind};
use stillbox::store::templates;

#[tokio::test(flavor = "multi_thread")]
async fn a_created_sandbox_runs_and_its_agent_knows_whose_it_is() {
    let world = World::new().await;
    let record = world.create().await;
    assert_eq!(record.state, SandboxState::Running);
    assert_eq!(world.registry().get(record.id).unwrap(), record);
    assert_eq!(world.row(record.id).await, record);
    let init = world.fake.with_agent(record.id, |agent| agent.inits.last().cloned().unwrap()).unwrap();
    assert_eq!(init["sandboxId"], record.id.as_str());
    assert_eq!(init["accessToken"], world.registry().token(TokenKind::EnvdAccess, record.id));
    assert_eq!(init["envVars"]["GREETING"], "hello");
    assert_eq!(init["templateEnv"]["LANG"], "C.UTF-8");
    assert_eq!(init["resolvConf"], "nameserver 9.9.9.9\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_secret_is_rotated_by_init_and_the_row_has_the_new_one() {
    let world = World::new().await;
    let record = world.create().await;
    let known = world.fake.with_agent(record.id, |agent| agent.control_secret.clone()).unwrap();
    assert_eq!((known.len(), record.next_control_secret), (64, None));
    assert_eq!(known, world.row(record.id).await.control_secret);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_start_leaves_a_row_with_the_reason_and_nothing_else() {
    let world = World::with(|config| config.running_max = 1).await;
    world.fake.fail_next(Verb::Start, "no loop device is free");
    let error = world.registry().create(world.spec(), None).await.unwrap_err();
    let CreateError::Start { id, .. } = error else { panic!("{error}") };
    let row = world.row(id).await;
    assert_eq!(row.state, SandboxState::Failed);
    let Some(EndReason::CreateFailed { detail }) = row.end_reason else { panic!("{:?}", row.end_reason) };
    assert!(detail.contains("no loop device is free"), "{detail}");
    assert!(world.registry().get(id).is_err());
    assert_eq!((world.fake.running(), world.sandbox_folders()), (vec![], 0));
    world.create().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_dies_before_it_is_ready_fails_the_create_with_its_last_word() {
    let world = World::new().await;
    let (registry, spec, fake) = (world.registry(), world.spec(), world.fake.clone());
    fake.start_hanging();
    let created = tokio::spawn(async move { registry.create(spec, None).await });
    eventually("the agent was started", || !fake.running().is_empty()).await;
    let id = fake.running()[0];
    fake.end_agent(id, "exit status 1");
    let error = created.await.unwrap().unwrap_err();
    let CreateError::Start { id: named, source } = error else { panic!("{error}") };
    assert_eq!(named, id);
    assert!(source.to_string().contains("exit status 1"), "{source}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_never_answers_fails_the_create_in_time_and_is_removed() {
    let world = World::with(|config| config.agent_ready_max = Duration::from_millis(50)).await;
    world.fake.start_hanging();
    let begun = std::time::Instant::now();
    let error = world.registry().create(world.spec(), None).await.unwrap_err();
    assert!(matches!(error, CreateError::Start { .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!((world.fake.running(), world.sandbox_folders()), (vec![], 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_goes_on_when_its_caller_vanishes() {
    let world = World::new().await;
    let mut gate = world.fake.hold(Verb::Start);
    let registry = world.registry();
    let spec = world.spec();
    let caller = tokio::spawn(async move { registry.create(spec, None).await });
    gate.reached().await;
    caller.abort();
    drop(gate);
    eventually("the sandbox runs", || world.fake.running().len() == 1).await;
    let id = world.fake.running()[0];
    world.wait_for_state(id, SandboxState::Running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limit_is_named_and_a_kill_makes_room() {
    let world = World::with(|config| config.running_max = 2).await;
    let first = world.create().await;
    world.create().await;
    let error = world.registry().create(world.spec(), None).await.unwrap_err();
    assert!(error.to_string().contains("sandbox.running_max"), "{error}");
    world.registry().kill(first.id).await.unwrap();
    world.create().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_with_one_idempotency_key_make_one_sandbox() {
    let world = World::new().await;
    let creates = (0..8).map(|_| {
        let (registry, spec) = (world.registry(), world.spec());
        async move { registry.create(spec, Some("key-1")).await.unwrap().id }
    });
    let ids = futures_util::future::join_all(creates).await;
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert_eq!(world.fake.running().len(), 1);
    let other = stillbox::model::SandboxSpec { alias: None, ..world.spec() };
    let error = world.registry().create(other, Some("key-1")).await.unwrap_err();
    assert!(matches!(error, CreateError::IdempotencyConflict { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_whose_create_failed_may_be_used_again() {
    let world = World::new().await;
    world.fake.fail_next(Verb::Start, "out of memory");
    world.registry().create(world.spec(), Some("key-1")).await.unwrap_err();
    world.registry().create(world.spec(), Some("key-1")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replayed_key_is_still_known_to_the_next_server() {
    let mut world = World::new().await;
    let first = world.registry().create(world.spec(), Some("key-1")).await.unwrap();
    world.crash_and_reopen().await;
    assert_eq!(world.registry().create(world.spec(), Some("key-1")).await.unwrap().id, first.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_is_not_ready_is_refused() {
    let world = World::new().await;
    let spec = stillbox::model::SandboxSpec { build: stillbox::model::BuildId::random(), ..world.spec() };
    let error = world.registry().create(spec, None).await.unwrap_err();
    assert!(error.to_string().ends_with("is gone; only a ready build can be started"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn creates_are_counted_for_the_template() {
    let world = World::new().await;
    world.create().await;
    world.create().await;
    let id = world.template;
    let template = world.store().read(move |db| templates::by_id(db, id)).await.unwrap().unwrap();
    assert_eq!(template.spawn_count, 2);
    assert!(template.last_spawned_at.is_some());
}
