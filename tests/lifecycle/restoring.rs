//! Create as a restore: the dump of a ready build, and what is done when there is none.

use crate::world::{World, eventually};
use std::time::Duration;
use stillbox::model::{ByteSize, DumpKey, Keep, SandboxId, SandboxSpec, SandboxState};
use stillbox::runtime::fake::Verb;
use stillbox::runtime::{DiskSource, Runtime, StartFrom};
use stillbox::sandbox::{CreateBy, Fork, Strictness};
use stillbox::store::templates;

const MINUTE: Duration = Duration::from_secs(60);

async fn world() -> World {
    World::with(|config| config.create_by = CreateBy::Restore).await
}

fn was_restored(world: &World, id: SandboxId) -> bool {
    let request = world.fake.start_request(id).expect("it runs");
    matches!((request.from, request.disk), (StartFrom::Dump { .. }, DiskSource::PooledCopyOf(_)))
}

async fn wait_for_dump(world: &World) {
    let patience = std::time::Instant::now() + crate::world::PATIENCE;
    let id = world.build;
    while world.store().read(move |db| templates::build(db, id)).await.unwrap().unwrap().dump.is_none() {
        assert!(std::time::Instant::now() < patience, "the ready state was never dumped");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_create_starts_cold_and_the_next_ones_restore() {
    let world = world().await;
    let first = world.create().await.id;
    assert!(!was_restored(&world, first));
    wait_for_dump(&world).await;
    let (second, third) = (world.create().await, world.create().await);
    for copy in [&second, &third] {
        assert!(was_restored(&world, copy.id));
        let init = world.fake.with_agent(copy.id, |agent| agent.inits.last().cloned().unwrap()).unwrap();
        assert_eq!(init["sandboxId"], copy.id.as_str());
    }
    assert_ne!(second.boot_id, third.boot_id);
    eventually("only what users asked for runs", || world.fake.running().len() == 3).await;
    assert_eq!(world.snapshot_folders().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_was_made_ready_is_restored_from_the_first_create_on() {
    let world = world().await;
    world.registry().make_ready(world.build).await.unwrap();
    world.registry().make_ready(world.build).await.unwrap();
    assert_eq!(world.fake.calls().iter().filter(|(verb, _)| *verb == Verb::Dump).count(), 1);
    assert!(was_restored(&world, world.create().await.id));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_builds_commands_run_once_before_the_dump() {
    let world = world().await;
    world.change_build(|build| (build.start_command, build.ready_command) = (Some("serve".into()), Some("check".into()))).await;
    world.registry().make_ready(world.build).await.unwrap();
    let id = world.create().await.id;
    let commands = world.fake.with_agent(id, |agent| agent.commands.clone()).unwrap();
    assert_eq!(commands, ["serve", "check"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_create_runs_the_builds_commands_itself() {
    let world = World::new().await;
    world.change_build(|build| (build.start_command, build.ready_command) = (Some("serve".into()), Some("check".into()))).await;
    let id = world.create().await.id;
    let commands = world.fake.with_agent(id, |agent| agent.commands.clone()).unwrap();
    assert_eq!(commands, ["serve", "check"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_of_another_machine_is_not_tried_but_made_again() {
    let world = world().await;
    world.registry().make_ready(world.build).await.unwrap();
    let here = world.fake.dump_key();
    world.fake.set_dump_key(DumpKey { kernel: "another".into(), ..here });
    let cold = world.create().await.id;
    assert!(!was_restored(&world, cold));
    let restored = async || was_restored(&world, world.create().await.id);
    let patience = std::time::Instant::now() + crate::world::PATIENCE;
    while !restored().await {
        assert!(std::time::Instant::now() < patience, "no new dump was made");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_that_cannot_be_restored_falls_back_to_a_cold_start() {
    let world = world().await;
    world.registry().make_ready(world.build).await.unwrap();
    world.fake.fail_next(Verb::Start, "the images are damaged");
    let id = world.create().await.id;
    assert!(!was_restored(&world, id));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_disk_size_than_the_builds_starts_cold() {
    let world = world().await;
    world.registry().make_ready(world.build).await.unwrap();
    let mut spec = world.spec();
    spec.resources.disk = ByteSize::gib(40);
    let id = world.registry().create(spec, None).await.unwrap().id;
    assert!(!was_restored(&world, id));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ready_state_that_cannot_be_dumped_leaves_nothing_and_creates_go_on() {
    let world = world().await;
    world.fake.fail_next(Verb::Dump, "no space left on device");
    let error = world.registry().make_ready(world.build).await.unwrap_err();
    assert!(error.to_string().contains(&world.build.to_string()), "{error}");
    assert_eq!((world.fake.running(), world.snapshot_folders(), world.sandbox_folders()), (vec![], vec![], 0));
    world.create().await;
    world.create().await;
    assert_eq!(world.fake.calls().iter().filter(|(verb, _)| *verb == Verb::Dump).count(), 1, "what failed lately is left alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_stays_until_a_lazy_restore_has_all_its_memory() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.mark(id, "kept");
    world.registry().pause(id, Keep::Memory).await.unwrap();
    let gate = world.fake.hold(Verb::Filled);
    world.registry().connect(id, MINUTE).await.unwrap();
    assert_eq!(world.snapshot_folders().len(), 1);
    world.registry().set_timeout(id, MINUTE).await.unwrap();
    assert_eq!(world.snapshot_folders().len(), 1);
    drop(gate);
    eventually("the dump is removed", || world.snapshot_folders().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_waits_until_a_lazy_restore_has_all_its_memory() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.registry().pause(id, Keep::Memory).await.unwrap();
    let mut gate = world.fake.hold(Verb::Filled);
    world.registry().connect(id, MINUTE).await.unwrap();
    gate.reached().await;
    let registry = world.registry();
    let pause = tokio::spawn(async move { registry.pause(id, Keep::Memory).await });
    world.registry().set_timeout(id, MINUTE).await.unwrap();
    assert_eq!(world.fake.calls().iter().filter(|(verb, _)| *verb == Verb::Dump).count(), 1);
    drop(gate);
    pause.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_whose_memory_was_lost_while_it_was_filled_is_restored_from_its_dump() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.mark(id, "kept");
    world.registry().pause(id, Keep::Memory).await.unwrap();
    let starts = || world.fake.calls().iter().filter(|call| **call == (Verb::Start, Some(id))).count();
    world.fake.fail_next(Verb::Filled, "lazy-pages was killed");
    world.registry().connect(id, MINUTE).await.unwrap();
    eventually("it was restored again", || starts() == 3).await;
    world.wait_for_state(id, SandboxState::Running).await;
    assert_eq!(world.marks(id), (Some("kept".into()), "kept".into()));
    eventually("the dump is removed in the end", || world.snapshot_folders().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lazy_restore_under_way_is_adopted_with_its_dump() {
    let mut world = World::new().await;
    let id = world.create().await.id;
    world.registry().pause(id, Keep::Memory).await.unwrap();
    let gate = world.fake.hold(Verb::Filled);
    world.registry().connect(id, MINUTE).await.unwrap();
    world.registry().set_timeout(id, MINUTE).await.unwrap();
    world.crash_and_reopen().await;
    assert_eq!(world.registry().get(id).unwrap().state, SandboxState::Running);
    assert_eq!(world.snapshot_folders().len(), 1);
    drop(gate);
    eventually("the dump is removed", || world.snapshot_folders().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dump_of_a_fork_stays_until_all_copies_have_their_memory() {
    let world = World::new().await;
    let id = world.create().await.id;
    let gate = world.fake.hold(Verb::Filled);
    // The source itself was never restored, and a fork waits for nothing but its own fill.
    let forking = {
        let registry = world.registry();
        tokio::spawn(async move { registry.fork(id, Fork::of(2, MINUTE, Strictness::PerCopy)).await })
    };
    let mut gate = gate;
    gate.reached().await;
    drop(gate);
    forking.await.unwrap().unwrap();
    eventually("the dump is removed", || world.snapshot_folders().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_does_not_fit_this_machine_is_refused_by_name() {
    let world = World::new().await;
    let id = world.create().await.id;
    let info = world.registry().snapshot(id, None, Keep::Memory).await.unwrap();
    let here = world.fake.dump_key();
    world.fake.set_dump_key(DumpKey { cpu_flags: "sse2".into(), ..here });
    let (template, tag) = (info.template, info.tag);
    let build = world.store().read(move |db| templates::by_id(db, template)).await.unwrap().unwrap().tags[&tag];
    let error = world.registry().create(SandboxSpec { template, build, ..world.spec() }, None).await.unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("this CPU lacks avx"), "{source}");
}
