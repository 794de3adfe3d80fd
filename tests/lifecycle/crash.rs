//! The server dies at every failpoint of every verb; the next one finds running or paused, never lost.

use crate::world::{World, eventually};
use std::time::Duration;
use stillbox::model::{EndReason, Keep, OnTimeout, SandboxId, SandboxState};
use stillbox::runtime::fake::Verb;
use stillbox::sandbox::{AtFailpoint, Failpoints, Fork, Strictness};

const MINUTE: Duration = Duration::from_secs(60);

/// Crashes the server at `point` while it does `what`, and starts the next one.
async fn crash_at<F: Future<Output = ()> + Send + 'static>(world: &mut World, point: &str, what: impl FnOnce(&World) -> F) {
    world.seams.failpoints.arm(point, AtFailpoint::Freeze);
    let failpoints = world.seams.failpoints.clone();
    let doing = tokio::spawn(what(world));
    tokio::time::timeout(crate::world::PATIENCE, failpoints.reached()).await.unwrap_or_else(|_| panic!("{point} was never met"));
    doing.abort();
    let _aborted = doing.await;
    world.crash_and_reopen().await;
}

async fn works(world: &World, id: SandboxId) {
    let registry = world.registry();
    let record = registry.get(id).unwrap_or_else(|_| panic!("{id} is lost"));
    assert!(matches!(record.state, SandboxState::Running | SandboxState::Paused), "{}", record.state);
    registry.connect(id, MINUTE).await.unwrap();
    assert_eq!(world.marks(id), (Some("kept".into()), "kept".into()));
    registry.pause(id, Keep::Memory).await.unwrap();
    registry.connect(id, MINUTE).await.unwrap();
    assert_eq!(world.marks(id), (Some("kept".into()), "kept".into()));
    assert_eq!(world.row(id).await.next_control_secret, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_sandbox_survives_the_death_of_its_server() {
    let mut world = World::new().await;
    let id = world.create().await.id;
    world.mark(id, "kept");
    world.crash_and_reopen().await;
    works(&world, id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_sandbox_survives_a_reboot() {
    let mut world = World::new().await;
    let id = world.create().await.id;
    world.mark(id, "kept");
    world.registry().pause(id, Keep::Memory).await.unwrap();
    world.fake.reboot();
    world.crash_and_reopen().await;
    assert_eq!(world.registry().get(id).unwrap().state, SandboxState::Paused);
    works(&world, id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_sandbox_that_did_not_survive_a_reboot_is_removed_with_the_reason() {
    let mut world = World::new().await;
    let id = world.create().await.id;
    world.fake.reboot();
    world.crash_and_reopen().await;
    assert!(world.registry().get(id).is_err());
    let row = world.row(id).await;
    assert!(matches!((row.state, row.end_reason), (SandboxState::Killed, Some(EndReason::AgentDied { .. }))));
    assert_eq!(world.sandbox_folders(), 0);
    let lines = world.registry().logs(id, crate::watching::everything()).await.unwrap();
    assert!(lines.iter().any(|line| line.message.contains("agent died")), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_in_a_create_leaves_nothing_of_it() {
    for point in Failpoints::ALL.into_iter().filter(|point| point.starts_with("create.")) {
        let mut world = World::new().await;
        crash_at(&mut world, point, |world| {
            let (registry, spec) = (world.registry(), world.spec());
            async move { drop(registry.create(spec, Some("key")).await) }
        })
        .await;
        assert_eq!((world.fake.running(), world.sandbox_folders()), (vec![], 0), "{point}");
        world.registry().create(world.spec(), Some("key")).await.unwrap_or_else(|error| panic!("{point}: {error}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_in_a_pause_loses_nothing() {
    for point in Failpoints::ALL.into_iter().filter(|point| point.starts_with("pause.")) {
        let mut world = World::new().await;
        let id = world.create().await.id;
        world.mark(id, "kept");
        crash_at(&mut world, point, |world| {
            let registry = world.registry();
            async move { drop(registry.pause(id, Keep::Memory).await) }
        })
        .await;
        works(&world, id).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_while_the_dump_is_written_leaves_it_running() {
    let mut world = World::new().await;
    let id = world.create().await.id;
    world.mark(id, "kept");
    let mut gate = world.fake.hold(Verb::Dump);
    let registry = world.registry();
    let pause = tokio::spawn(async move { registry.pause(id, Keep::Memory).await });
    gate.reached().await;
    pause.abort();
    let _aborted = pause.await;
    world.crash_and_reopen().await;
    drop(gate);
    assert_eq!(world.registry().get(id).unwrap().state, SandboxState::Running);
    assert_eq!(world.snapshot_folders(), Vec::<String>::new());
    works(&world, id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_files_only_pause_is_finished_by_the_next_server() {
    for point in ["pause.intended", "pause.dumped"] {
        let mut world = World::new().await;
        let id = world.create().await.id;
        world.mark(id, "kept");
        crash_at(&mut world, point, |world| {
            let registry = world.registry();
            async move { drop(registry.pause(id, Keep::FilesOnly).await) }
        })
        .await;
        world.registry().connect(id, MINUTE).await.unwrap();
        assert_eq!(world.marks(id).1, "kept", "{point}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_in_a_resume_loses_nothing() {
    for point in Failpoints::ALL.into_iter().filter(|point| point.starts_with("resume.")) {
        let mut world = World::new().await;
        let id = world.create().await.id;
        world.mark(id, "kept");
        world.registry().pause(id, Keep::Memory).await.unwrap();
        crash_at(&mut world, point, |world| {
            let registry = world.registry();
            async move { drop(registry.connect(id, MINUTE).await) }
        })
        .await;
        works(&world, id).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reboot_right_after_a_resume_goes_back_to_the_dump() {
    let mut world = World::new().await;
    let id = world.create().await.id;
    world.mark(id, "kept");
    world.registry().pause(id, Keep::Memory).await.unwrap();
    world.seams.failpoints.arm("resume.initialised", AtFailpoint::Freeze);
    let (registry, failpoints) = (world.registry(), world.seams.failpoints.clone());
    let resume = tokio::spawn(async move { registry.connect(id, MINUTE).await });
    failpoints.reached().await;
    resume.abort();
    let _aborted = resume.await;
    world.fake.reboot();
    world.crash_and_reopen().await;
    assert_eq!(world.registry().get(id).unwrap().state, SandboxState::Paused);
    works(&world, id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_in_a_fork_or_snapshot_leaves_the_source_and_no_files() {
    for point in Failpoints::ALL.into_iter().filter(|point| point.starts_with("copy.")) {
        let mut world = World::new().await;
        let id = world.create().await.id;
        world.mark(id, "kept");
        crash_at(&mut world, point, |world| {
            let registry = world.registry();
            let fork = Fork::of(2, MINUTE, Strictness::PerCopy);
            async move { drop(registry.fork(id, fork).await) }
        })
        .await;
        assert_eq!((world.fake.running(), world.snapshot_folders()), (vec![id], vec![]), "{point}");
        works(&world, id).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_in_a_kill_is_followed_by_one_that_finishes_it() {
    for point in Failpoints::ALL.into_iter().filter(|point| point.starts_with("kill.")) {
        let mut world = World::new().await;
        let id = world.create().await.id;
        crash_at(&mut world, point, |world| {
            let registry = world.registry();
            async move { registry.kill(id).await.unwrap_or_default() }
        })
        .await;
        assert!(world.registry().get(id).is_err(), "{point}");
        assert_eq!((world.fake.running(), world.sandbox_folders()), (vec![], 0), "{point}");
        let row = world.row(id).await;
        assert_eq!((row.state, row.end_reason), (SandboxState::Killed, Some(EndReason::Killed)), "{point}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_auto_pause_that_fails_is_tried_again_and_the_sandbox_runs_on() {
    let world = World::new().await;
    let mut spec = world.spec();
    spec.lifecycle.on_timeout = OnTimeout::Pause(Keep::Memory);
    let id = world.registry().create(spec, None).await.unwrap().id;
    world.mark(id, "kept");
    world.fake.fail_next(Verb::Dump, "no space left on device");
    world.seams.clock.advance(Duration::from_secs(301));
    eventually("the dump was tried", || world.fake.calls().contains(&(Verb::Dump, Some(id)))).await;
    world.wait_for_state(id, SandboxState::Running).await;
    assert_eq!(world.marks(id).0, Some("kept".into()));
    let dumps = || world.fake.calls().iter().filter(|call| **call == (Verb::Dump, Some(id))).count();
    eventually("it is tried again once its retry is due", || {
        world.seams.clock.advance(Duration::from_secs(10));
        dumps() == 2
    })
    .await;
    world.wait_for_state(id, SandboxState::Paused).await;
}
