//! The server dies at every failpoint of every verb; the next one finds running or paused, never lost.

use crate::world::{World, eventually};
use std::time::Duration;
use stillbox::model::{EndReason, Keep, NetworkPolicy, OnTimeout, SandboxId, SandboxState};
use stillbox::runtime::Finding;
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

/// Lets a resume go as far as `point`, does `then` with the sandbox that runs there, and starts the next server.
async fn crash_in_resume_after(point: &str, then: impl FnOnce(&World, SandboxId)) -> (World, SandboxId) {
    let mut world = World::new().await;
    let id = world.create().await.id;
    world.mark(id, "kept");
    world.registry().pause(id, Keep::Memory).await.unwrap();
    world.seams.failpoints.arm(point, AtFailpoint::Freeze);
    let (registry, failpoints) = (world.registry(), world.seams.failpoints.clone());
    let resume = tokio::spawn(async move { registry.connect(id, MINUTE).await });
    failpoints.reached().await;
    then(&world, id);
    resume.abort();
    let _aborted = resume.await;
    world.crash_and_reopen().await;
    (world, id)
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_that_ran_on_before_their_row_was_written_are_taken_over_with_their_files() {
    for point in ["resume.started", "resume.initialised"] {
        let (world, id) = crash_in_resume_after(point, |world, id| world.mark(id, "later")).await;
        assert_eq!(world.registry().get(id).unwrap().state, SandboxState::Running, "{point}");
        assert_eq!(world.marks(id), (Some("later".into()), "later".into()), "{point}: memory and files are of two moments");
        world.registry().pause(id, Keep::Memory).await.unwrap();
        world.registry().connect(id, MINUTE).await.unwrap();
        assert_eq!(world.marks(id), (Some("later".into()), "later".into()), "{point}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_that_ran_and_died_before_their_row_was_written_leave_it_paused_and_that_is_told() {
    let (world, id) = crash_in_resume_after("resume.started", |world, id| world.fake.end_agent(id, "killed by signal 9")).await;
    assert_eq!(world.registry().get(id).unwrap().state, SandboxState::Paused);
    let lines = world.registry().logs(id, crate::watching::everything()).await.unwrap();
    assert!(lines.iter().any(|line| line.message.contains("files are newer than its memory")), "{lines:?}");
    works(&world, id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resume_of_which_nothing_ran_says_nothing_of_files() {
    let (world, id) = crash_in_resume_after("resume.intended", |_, _| {}).await;
    assert_eq!(world.registry().get(id).unwrap().state, SandboxState::Paused);
    let lines = world.registry().logs(id, crate::watching::everything()).await.unwrap();
    assert!(!lines.iter().any(|line| line.message.contains("files")), "{lines:?}");
    works(&world, id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_that_nobody_was_told_of_are_replaced_by_the_next_server() {
    let mut world = World::new().await;
    let id = world.create().await.id;
    let before = world.fake.network(id).unwrap();
    let asked = NetworkPolicy { deny_out: vec!["192.0.2.0/24".parse().unwrap()], ..NetworkPolicy::default() };
    crash_at(&mut world, "network.applied", |world| {
        let registry = world.registry();
        async move { drop(registry.set_network(id, asked).await) }
    })
    .await;
    assert_eq!((world.fake.network(id), world.row(id).await.spec.network), (Some(before.clone()), before));
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
    // Longer than the timers look away: its end is past, and yet it is left alone for now.
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(dumps(), 1);
    eventually("it is tried again once its retry is due", || {
        world.seams.clock.advance(Duration::from_secs(10));
        dumps() == 2
    })
    .await;
    world.wait_for_state(id, SandboxState::Paused).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_can_never_be_auto_paused_keeps_its_files_in_the_end_and_says_why() {
    let world = World::new().await;
    let mut spec = world.spec();
    spec.lifecycle.on_timeout = OnTimeout::Pause(Keep::Memory);
    let created = world.registry().create(spec, None).await.unwrap();
    let id = created.id;
    world.mark(id, "kept");
    world.fake.set_findings(id, vec![Finding { pid: 42, command: "gdb".into(), reason: "is being traced".into() }]);
    world.seams.clock.advance(Duration::from_secs(301));
    let looks = || world.fake.calls().iter().filter(|call| **call == (Verb::Findings, Some(id))).count();
    eventually("the pause was tried", || looks() == 1).await;
    eventually("only its files are kept", || {
        world.seams.clock.advance(Duration::from_secs(5));
        world.registry().get(id).is_ok_and(|record| record.state == SandboxState::Paused)
    })
    .await;
    let record = world.registry().get(id).unwrap();
    assert_eq!((looks(), record.paused), (5, Some(Keep::FilesOnly)));
    assert!(record.end_at - created.end_at >= Duration::from_secs(30 + 60 + 120 + 240), "{}", record.end_at - created.end_at);
    let lines = world.registry().logs(id, crate::watching::everything()).await.unwrap();
    let told: Vec<&str> =
        lines.iter().map(|line| line.message.as_str()).filter(|line| line.contains("gdb (pid 42): is being traced")).collect();
    assert!(told.len() == 2 && told[0].contains("tried again in 30 s") && told[1].contains("only its files are kept"), "{told:?}");
    world.registry().connect(id, MINUTE).await.unwrap();
    assert_eq!(world.marks(id), (None, "kept".into()));
}
