//! Kill, timeouts, and sandboxes that end by themselves.

use crate::world::{PATIENCE, World};
use std::time::Duration;
use stillbox::model::{EndReason, Keep, OnTimeout, SandboxState};
use stillbox::runtime::fake::Verb;
use stillbox::sandbox::{Connected, CreateError, PauseError, TimeoutError};

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_sandbox_is_unknown_at_once_and_leaves_nothing() {
    let world = World::new().await;
    let id = world.create().await.id;
    let route = world.registry().route(id).await.unwrap();
    let mut gate = world.fake.hold(Verb::Destroy);
    let registry = world.registry();
    let kill = tokio::spawn(async move { registry.kill(id).await });
    gate.reached().await;
    assert!(world.registry().get(id).is_err());
    assert!(world.registry().route(id).await.is_err());
    route.cut().await;
    assert!(!kill.is_finished(), "kill returned before the processes were gone");
    drop(gate);
    kill.await.unwrap().unwrap();
    assert_eq!((world.fake.running(), world.sandbox_folders()), (vec![], 0));
    let row = world.row(id).await;
    assert_eq!((row.state, row.end_reason), (SandboxState::Killed, Some(EndReason::Killed)));
    assert!(world.registry().kill(id).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_that_fails_in_the_kernel_is_tried_again() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.fake.fail_next(Verb::Destroy, "device or resource busy");
    world.registry().kill(id).await.unwrap();
    assert_eq!(world.row(id).await.state, SandboxState::Killed);
    assert_eq!(world.sandbox_folders(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_closes_finishes_the_create_under_way_and_refuses_the_next() {
    let world = World::new().await;
    let mut gate = world.fake.hold(Verb::Start);
    let (registry, spec) = (world.registry(), world.spec());
    let created = tokio::spawn(async move { registry.create(spec, None).await });
    gate.reached().await;
    let registry = world.registry();
    let closing = tokio::spawn(async move { registry.close().await });
    drop(gate);
    closing.await.unwrap();
    let refused = world.registry().create(world.spec(), None).await.unwrap_err();
    assert!(matches!(refused, CreateError::ShuttingDown), "{refused}");
    let record = created.await.unwrap().unwrap();
    assert_eq!(world.row(record.id).await.state, SandboxState::Running);
    assert_eq!(world.fake.running(), [record.id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_during_a_pause_wins_and_the_pauser_is_told() {
    let world = World::new().await;
    let id = world.create().await.id;
    let mut gate = world.fake.hold(Verb::Dump);
    let (pauser, killer) = (world.registry(), world.registry());
    let pause = tokio::spawn(async move { pauser.pause(id, Keep::Memory).await });
    gate.reached().await;
    let kill = tokio::spawn(async move { killer.kill(id).await });
    let registry = world.registry();
    crate::world::eventually("it is gone for its users", || registry.get(id).is_err()).await;
    drop(gate);
    kill.await.unwrap().unwrap();
    assert!(!matches!(pause.await.unwrap(), Err(PauseError::Dump { .. })));
    assert_eq!(world.row(id).await.state, SandboxState::Killed);
    assert_eq!((world.fake.running(), world.snapshot_folders()), (vec![], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_is_killed_when_its_time_is_up() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.seams.clock.advance(Duration::from_secs(299));
    assert_eq!(world.registry().get(id).unwrap().state, SandboxState::Running);
    world.seams.clock.advance(Duration::from_secs(1));
    world.wait_until_gone(id).await;
    assert_eq!(world.row(id).await.end_reason, Some(EndReason::TimedOut));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_may_shorten_and_an_extension_never_does() {
    let world = World::new().await;
    let (registry, id) = (world.registry(), world.create().await.id);
    let created_end = registry.get(id).unwrap().end_at;
    let extended = registry.extend(id, Duration::from_secs(10)).await.unwrap();
    assert_eq!(extended.end_at, created_end);
    let connected = registry.connect(id, Duration::from_secs(10)).await.unwrap();
    let Connected::WasRunning(record) = connected else { panic!("{connected:?}") };
    assert_eq!(record.end_at, created_end);
    let shortened = registry.set_timeout(id, Duration::from_secs(10)).await.unwrap();
    assert!(shortened.end_at < created_end);
    assert_eq!(world.row(id).await.end_at, shortened.end_at);
    let longer = registry.connect(id, Duration::from_secs(600)).await.unwrap();
    assert!(matches!(longer, Connected::WasRunning(record) if record.end_at > created_end));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_of_zero_ends_it_now() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.registry().set_timeout(id, Duration::ZERO).await.unwrap();
    world.wait_until_gone(id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_beyond_the_limit_names_it_and_a_paused_one_has_none() {
    let world = World::new().await;
    let id = world.create().await.id;
    let error = world.registry().set_timeout(id, Duration::from_secs(25 * 3600)).await.unwrap_err();
    assert!(error.to_string().contains("sandbox.timeout_max"), "{error}");
    world.registry().pause(id, Keep::Memory).await.unwrap();
    let error = world.registry().set_timeout(id, Duration::from_secs(1)).await.unwrap_err();
    assert!(matches!(error, TimeoutError::NotRunning { state: SandboxState::Paused, .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_goes_on_under_the_next_server() {
    let mut world = World::new().await;
    let id = world.create().await.id;
    world.crash_and_reopen().await;
    assert_eq!(world.registry().get(id).unwrap().state, SandboxState::Running);
    world.seams.clock.advance(Duration::from_secs(301));
    world.wait_until_gone(id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn auto_pause_keeps_what_it_was_told_and_connect_brings_it_back() {
    let world = World::new().await;
    for keep in [Keep::Memory, Keep::FilesOnly] {
        let mut spec = world.spec();
        spec.lifecycle.on_timeout = OnTimeout::Pause(keep);
        let id = world.registry().create(spec, None).await.unwrap().id;
        world.seams.clock.advance(Duration::from_secs(301));
        world.wait_for_state(id, SandboxState::Paused).await;
        assert_eq!(world.registry().get(id).unwrap().paused, Some(keep));
        let connected = world.registry().connect(id, Duration::from_secs(60)).await.unwrap();
        assert!(matches!(connected, Connected::Resumed(_)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_whose_agent_dies_is_gone_with_the_reason_in_its_log() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.fake.end_agent(id, "out of memory");
    world.wait_until_gone(id).await;
    crate::world::eventually("its disk is removed", || world.sandbox_folders() == 0).await;
    let lines = world.registry().logs(id, crate::watching::everything()).await.unwrap();
    assert!(lines.iter().any(|line| line.message.contains("out of memory")), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_does_not_wait_for_a_look_at_the_sandbox() {
    let world = World::new().await;
    for verb in [Verb::Findings, Verb::Filled] {
        let id = world.create().await.id;
        let mut gate = world.fake.hold(verb);
        let registry = world.registry();
        let pause = tokio::spawn(async move { registry.pause(id, Keep::Memory).await });
        gate.reached().await;
        // It stays shut: a process inside can keep whoever looks waiting.
        tokio::time::timeout(PATIENCE, world.registry().kill(id)).await.expect("the kill waits for the look").unwrap();
        assert!(matches!(pause.await.unwrap(), Err(PauseError::Unknown(_))));
        assert_eq!((world.fake.running(), world.sandbox_folders()), (vec![], 0));
        drop(gate);
    }
}
