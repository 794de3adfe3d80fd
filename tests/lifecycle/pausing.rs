//! Pause and resume, by request, by timeout and by traffic.

use crate::world::{PATIENCE, World, eventually};
use std::time::Duration;
use stillbox::model::{AutoResume, ByteSize, DumpKey, Keep, OnTimeout, SandboxId, SandboxState};
use stillbox::runtime::Finding;
use stillbox::runtime::Runtime;
use stillbox::runtime::fake::Verb;
use stillbox::sandbox::{Adjust, ConnectError, Connected, Full, PauseError, RouteError, SnapshotSync, TokenKind};
use stillbox::store::snapshots;

const MINUTE: Duration = Duration::from_secs(60);

fn starts(world: &World, id: SandboxId) -> usize {
    world.fake.calls().iter().filter(|call| **call == (Verb::Start, Some(id))).count()
}

async fn wakeable(world: &World) -> SandboxId {
    let mut spec = world.spec();
    spec.lifecycle.auto_resume = AutoResume::On;
    world.registry().create(spec, None).await.unwrap().id
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_and_files_come_back_with_the_same_tokens_and_boot_id() {
    let world = World::new().await;
    let (registry, created) = (world.registry(), world.create().await);
    let id = created.id;
    world.mark(id, "kept");
    let paused = registry.pause(id, Keep::Memory).await.unwrap();
    assert_eq!((paused.state, paused.paused, &paused.kernel), (SandboxState::Paused, Some(Keep::Memory), &None));
    assert!(world.fake.running().is_empty());
    assert_eq!(world.row(id).await, paused);
    let resumed = registry.resume(id, MINUTE, None).await.unwrap();
    assert_eq!(world.marks(id), (Some("kept".into()), "kept".into()));
    assert_eq!((resumed.boot_id, resumed.generation), (created.boot_id, created.generation + 1));
    let init = world.fake.with_agent(id, |agent| agent.inits.last().cloned().unwrap()).unwrap();
    assert_eq!(init["accessToken"], registry.token(TokenKind::EnvdAccess, id));
    eventually("the dump is removed", || world.snapshot_folders().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_can_be_paused_and_resumed_again_and_again() {
    let world = World::new().await;
    let id = world.create().await.id;
    for round in 0..10 {
        world.mark(id, &round.to_string());
        world.registry().pause(id, Keep::Memory).await.unwrap();
        world.registry().resume(id, MINUTE, None).await.unwrap();
        assert_eq!(world.marks(id), (Some(round.to_string()), round.to_string()));
    }
    eventually("the dumps are removed", || world.snapshot_folders().is_empty()).await;
    assert_eq!(world.store().read(snapshots::all).await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_only_is_a_cold_boot_with_the_same_tokens_and_another_boot_id() {
    let world = World::new().await;
    let (registry, created) = (world.registry(), world.create().await);
    let id = created.id;
    world.mark(id, "kept");
    registry.pause(id, Keep::FilesOnly).await.unwrap();
    assert_eq!(world.snapshot_folders(), Vec::<String>::new());
    let resumed = registry.resume(id, MINUTE, None).await.unwrap();
    assert_eq!(world.marks(id), (None, "kept".into()));
    assert_ne!(resumed.boot_id, created.boot_id);
    let init = world.fake.with_agent(id, |agent| agent.inits.last().cloned().unwrap()).unwrap();
    assert_eq!((&init["accessToken"], &init["bootId"]), (&registry.token(TokenKind::EnvdAccess, id).into(), &resumed.boot_id.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_boot_gives_the_memory_up_and_keeps_the_files_and_leaves_a_running_one_alone() {
    let world = World::with(|config| config.running_max = 1).await;
    let created = world.create().await;
    let id = created.id;
    world.mark(id, "kept");
    let running = world.registry().boot(id, MINUTE).await.unwrap();
    assert!(matches!(running, Connected::WasRunning(_)), "{running:?}");
    assert_eq!(world.marks(id), (Some("kept".into()), "kept".into()));
    world.registry().pause(id, Keep::Memory).await.unwrap();
    let other = world.create().await.id;
    let full = world.registry().boot(id, MINUTE).await.unwrap_err();
    assert!(matches!(full, ConnectError::TooMany { .. }), "{full}");
    assert_eq!(world.registry().get(id).unwrap().paused, Some(Keep::Memory), "given up for nothing");
    world.registry().kill(other).await.unwrap();
    let booted = world.registry().boot(id, MINUTE).await.unwrap();
    let Connected::Resumed(record) = booted else { panic!("{booted:?}") };
    assert_eq!(world.marks(id), (None, "kept".into()));
    assert_ne!(record.boot_id, created.boot_id);
    assert_eq!((world.snapshot_folders(), world.row(id).await.snapshot), (vec![], None));
}

#[tokio::test(flavor = "multi_thread")]
async fn pausing_a_paused_sandbox_says_so_and_changes_nothing() {
    let world = World::new().await;
    let id = world.create().await.id;
    let paused = world.registry().pause(id, Keep::Memory).await.unwrap();
    let error = world.registry().pause(id, Keep::Memory).await.unwrap_err();
    assert!(matches!(error, PauseError::AlreadyPaused(_)), "{error}");
    assert_eq!(world.registry().get(id).unwrap(), paused);
}

#[tokio::test(flavor = "multi_thread")]
async fn pauses_at_the_same_time_share_one_dump() {
    let world = World::new().await;
    let id = world.create().await.id;
    let mut gate = world.fake.hold(Verb::Dump);
    let pauses: Vec<_> = (0..4)
        .map(|_| {
            let registry = world.registry();
            tokio::spawn(async move { registry.pause(id, Keep::Memory).await })
        })
        .collect();
    gate.reached().await;
    drop(gate);
    for result in futures_util::future::join_all(pauses).await {
        match result.unwrap() {
            Ok(record) => assert_eq!(record.state, SandboxState::Paused),
            Err(error) => assert!(matches!(error, PauseError::AlreadyPaused(_)), "{error}"),
        }
    }
    assert_eq!(world.fake.calls().iter().filter(|(verb, _)| *verb == Verb::Dump).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_dumped_is_refused_by_name_and_nothing_is_touched() {
    let world = World::new().await;
    let id = world.create().await.id;
    let route = world.registry().route(id).await.unwrap();
    let finding = Finding { pid: 42, command: "qemu".into(), reason: "an io_uring ring is open".into() };
    world.fake.set_findings(id, vec![finding.clone()]);
    let error = world.registry().pause(id, Keep::Memory).await.unwrap_err();
    assert_eq!(error.to_string(), format!("cannot pause sandbox {id}: qemu (pid 42): an io_uring ring is open"));
    assert_eq!(world.registry().explain(id).await.unwrap(), [finding]);
    assert_eq!(world.row(id).await.state, SandboxState::Running);
    assert!(tokio::time::timeout(Duration::from_millis(1), route.cut()).await.is_err(), "connections were cut");
    world.registry().route(id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_dump_leaves_it_running_and_open() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.mark(id, "kept");
    world.fake.fail_next(Verb::Dump, "no space left on device");
    let error = world.registry().pause(id, Keep::Memory).await.unwrap_err();
    assert!(matches!(error, PauseError::Dump { .. }), "{error}");
    assert_eq!(world.row(id).await.state, SandboxState::Running);
    assert_eq!(world.registry().get(id).unwrap().state, SandboxState::Running);
    world.registry().route(id).await.unwrap();
    assert_eq!(world.marks(id).0, Some("kept".into()));
    assert_eq!(world.snapshot_folders(), Vec::<String>::new());
    world.seams.clock.advance(Duration::from_secs(301));
    world.wait_until_gone(id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_after_the_dump_loses_nothing() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.mark(id, "kept");
    world.fake.fail_next(Verb::CleanUp, "device or resource busy");
    world.registry().pause(id, Keep::Memory).await.unwrap();
    world.registry().connect(id, MINUTE).await.unwrap();
    assert_eq!(world.marks(id), (Some("kept".into()), "kept".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_cuts_what_is_routed_into_it() {
    let world = World::new().await;
    let id = world.create().await.id;
    let route = world.registry().route(id).await.unwrap();
    world.registry().pause(id, Keep::Memory).await.unwrap();
    tokio::time::timeout(PATIENCE, route.cut()).await.unwrap();
    assert!(matches!(world.registry().route(id).await, Err(RouteError::Unknown(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connect_during_a_pause_waits_and_resumes_and_all_callers_share_one_restore() {
    let world = World::new().await;
    let id = world.create().await.id;
    let mut gate = world.fake.hold(Verb::Dump);
    let registry = world.registry();
    let pause = tokio::spawn(async move { registry.pause(id, Keep::Memory).await });
    gate.reached().await;
    let connects: Vec<_> = (1..=4)
        .map(|minutes| {
            let registry = world.registry();
            tokio::spawn(async move { registry.connect(id, MINUTE * minutes).await })
        })
        .collect();
    drop(gate);
    pause.await.unwrap().unwrap();
    for connected in futures_util::future::join_all(connects).await {
        connected.unwrap().unwrap();
    }
    assert_eq!(starts(&world, id), 2);
    let record = world.registry().get(id).unwrap();
    assert!(record.end_at - record.started_at >= MINUTE * 4, "the longest wish counts: {record:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn resume_insists_on_a_paused_one_and_may_change_what_happens_at_the_end() {
    let world = World::new().await;
    let id = world.create().await.id;
    let error = world.registry().resume(id, MINUTE, None).await.unwrap_err();
    assert!(matches!(error, ConnectError::AlreadyRunning(_)), "{error}");
    world.registry().pause(id, Keep::Memory).await.unwrap();
    let resumed = world.registry().resume(id, MINUTE, Some(OnTimeout::Pause(Keep::Memory))).await.unwrap();
    assert_eq!(resumed.spec.lifecycle.on_timeout, OnTimeout::Pause(Keep::Memory));
    world.seams.clock.advance(MINUTE + Duration::from_secs(1));
    world.wait_for_state(id, SandboxState::Paused).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_restore_leaves_it_paused_with_its_dump_and_a_retry_works() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.mark(id, "kept");
    let paused = world.registry().pause(id, Keep::Memory).await.unwrap();
    world.fake.fail_next(Verb::Start, "soccr: cannot bind");
    let error = world.registry().connect(id, MINUTE).await.unwrap_err();
    let source = std::error::Error::source(&error).and_then(std::error::Error::source).map(ToString::to_string);
    assert!(matches!(error, ConnectError::Restore { .. }), "{error}");
    assert!(source.unwrap().contains("soccr: cannot bind"));
    let record = world.registry().get(id).unwrap();
    assert_eq!((record.state, record.snapshot, record.end_at), (SandboxState::Paused, paused.snapshot, paused.end_at));
    world.registry().connect(id, MINUTE).await.unwrap();
    assert_eq!(world.marks(id), (Some("kept".into()), "kept".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_refuses_after_a_restore_is_stopped_and_the_sandbox_stays_paused() {
    let world = World::with(|config| config.agent_ready_max = Duration::from_millis(50)).await;
    let id = world.create().await.id;
    world.fake.with_agent(id, |agent| agent.control_secret = "of somebody else".into()).unwrap();
    world.registry().pause(id, Keep::Memory).await.unwrap();
    let error = world.registry().connect(id, MINUTE).await.unwrap_err();
    assert!(matches!(error, ConnectError::Restore { .. }), "{error}");
    assert!(world.fake.running().is_empty());
    assert_eq!(world.row(id).await.state, SandboxState::Paused);
    assert_eq!(world.row(id).await.next_control_secret, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_that_cannot_work_here_is_refused_before_it_is_tried() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.registry().pause(id, Keep::Memory).await.unwrap();
    let here = world.fake.dump_key();
    world.fake.set_dump_key(DumpKey { cpu_flags: "sse2".into(), ..here.clone() });
    world.registry().connect(id, MINUTE).await.unwrap_err();
    assert_eq!(starts(&world, id), 1);
    world.fake.set_dump_key(DumpKey { kernel: "another".into(), ..here });
    world.registry().connect(id, MINUTE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_house_keeps_it_paused() {
    let world = World::with(|config| config.running_max = 1).await;
    let id = world.create().await.id;
    world.registry().pause(id, Keep::Memory).await.unwrap();
    let other = world.create().await.id;
    let error = world.registry().connect(id, MINUTE).await.unwrap_err();
    assert!(matches!(error, ConnectError::TooMany(Full::Sandboxes { running: 1, limit: 1 })), "{error}");
    world.registry().kill(other).await.unwrap();
    world.registry().connect(id, MINUTE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn dumps_beyond_their_space_are_refused_with_the_key_to_raise() {
    let world = World::with(|config| config.snapshots_bytes_max = ByteSize(1)).await;
    let (first, second) = (world.create().await.id, world.create().await.id);
    world.registry().pause(first, Keep::Memory).await.unwrap();
    let error = world.registry().pause(second, Keep::Memory).await.unwrap_err();
    assert!(error.to_string().contains("snapshots.disk_bytes_max"), "{error}");
    assert_eq!(world.registry().get(second).unwrap().state, SandboxState::Running);
    world.registry().kill(first).await.unwrap();
    world.registry().pause(second, Keep::Memory).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn traffic_wakes_one_that_wants_it_once_and_gives_it_time() {
    let world = World::new().await;
    let id = wakeable(&world).await;
    world.registry().pause(id, Keep::Memory).await.unwrap();
    let routes: Vec<_> = (0..5)
        .map(|_| {
            let registry = world.registry();
            tokio::spawn(async move { registry.route(id).await.map(|route| route.id) })
        })
        .collect();
    for route in futures_util::future::join_all(routes).await {
        assert_eq!(route.unwrap().unwrap(), id);
    }
    assert_eq!(starts(&world, id), 2);
    let record = world.registry().get(id).unwrap();
    assert!(record.end_at - record.started_at >= Duration::from_secs(300));
}

#[tokio::test(flavor = "multi_thread")]
async fn traffic_that_meets_a_pause_waits_for_its_end_and_wakes_it() {
    let world = World::new().await;
    let id = wakeable(&world).await;
    let mut gate = world.fake.hold(Verb::Dump);
    let (pauser, router) = (world.registry(), world.registry());
    let pause = tokio::spawn(async move { pauser.pause(id, Keep::Memory).await });
    gate.reached().await;
    let route = tokio::spawn(async move { router.route(id).await });
    drop(gate);
    pause.await.unwrap().unwrap();
    assert_eq!(route.await.unwrap().unwrap().id, id);
}

#[tokio::test(flavor = "multi_thread")]
async fn traffic_waits_no_longer_than_it_may() {
    let world = World::with(|config| config.wake_wait_max = Duration::from_millis(30)).await;
    let id = wakeable(&world).await;
    world.registry().pause(id, Keep::Memory).await.unwrap();
    let gate = world.fake.hold(Verb::Start);
    let error = world.registry().route(id).await.unwrap_err();
    assert!(matches!(error, RouteError::Busy { .. }), "{error}");
    drop(gate);
    world.wait_for_state(id, SandboxState::Running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_files_only_pause_is_not_woken_by_traffic() {
    let world = World::new().await;
    let id = wakeable(&world).await;
    world.registry().pause(id, Keep::FilesOnly).await.unwrap();
    assert!(matches!(world.registry().route(id).await, Err(RouteError::Unknown(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_is_on_stable_storage_before_the_reply_or_soon_after() {
    for sync in [SnapshotSync::BeforeReply, SnapshotSync::Background] {
        let world = World::with(|config| config.snapshot_sync = sync).await;
        let id = world.create().await.id;
        let snapshot = world.registry().pause(id, Keep::Memory).await.unwrap().snapshot.unwrap();
        let synced = async || world.store().read(move |db| snapshots::by_id(db, snapshot)).await.unwrap().unwrap().synced;
        let patience = std::time::Instant::now() + PATIENCE;
        while !synced().await {
            assert_eq!(sync, SnapshotSync::Background, "answered before it was safe");
            assert!(std::time::Instant::now() < patience, "never synced");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_had_no_time_to_put_on_stable_storage_the_next_one_does() {
    let mut world = World::new().await;
    let (paused, copied) = (world.create().await.id, world.create().await.id);
    world.registry().pause(paused, Keep::Memory).await.unwrap();
    world.registry().snapshot(copied, None, Keep::Memory).await.unwrap();
    let unsynced = async |world: &World| world.store().read(snapshots::all).await.unwrap().iter().filter(|dump| !dump.synced).count();
    assert_eq!(unsynced(&world).await, 2, "the background was faster than this test");
    world.close_and_reopen().await;
    let patience = std::time::Instant::now() + PATIENCE;
    while unsynced(&world).await > 0 {
        assert!(std::time::Instant::now() < patience, "never synced");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_a_paused_sandbox_removes_its_dump() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.registry().pause(id, Keep::Memory).await.unwrap();
    assert_eq!(world.snapshot_folders().len(), 1);
    world.registry().kill(id).await.unwrap();
    assert_eq!((world.snapshot_folders(), world.sandbox_folders()), (vec![], 0));
    assert_eq!(world.store().read(snapshots::all).await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_goes_on_after_a_resume_and_starts_anew_after_a_cold_boot() {
    let world = World::new().await;
    let id = world.create().await.id;
    let say = |seq: u64, text: &str| {
        let line = format!(r#"{{"seq":{seq},"timestamp":"2999-01-01T00:00:00Z","level":"warn","message":"{text}"}}"#);
        world.fake.with_agent(id, |agent| agent.log.insert(seq, line)).unwrap();
    };
    say(1, "before");
    world.registry().pause(id, Keep::Memory).await.unwrap();
    world.registry().resume(id, MINUTE, None).await.unwrap();
    say(2, "after");
    world.registry().pause(id, Keep::FilesOnly).await.unwrap();
    world.registry().resume(id, MINUTE, None).await.unwrap();
    say(1, "anew");
    let lines = world.registry().logs(id, crate::watching::everything()).await.unwrap();
    assert_eq!(lines.iter().map(|line| line.message.as_str()).collect::<Vec<_>>(), ["before", "after", "anew"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_in_the_middle_of_a_pause_waits_for_its_end() {
    let world = World::new().await;
    let id = world.create().await.id;
    let mut gate = world.fake.hold(Verb::Dump);
    let pause = tokio::spawn({
        let registry = world.registry();
        async move { registry.pause(id, Keep::Memory).await }
    });
    gate.reached().await;
    let change = Adjust { on_timeout: Some(OnTimeout::Pause(Keep::FilesOnly)), ..Adjust::default() };
    let adjusted = tokio::spawn({
        let registry = world.registry();
        async move { registry.adjust(id, change).await }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!adjusted.is_finished());
    drop(gate);
    pause.await.unwrap().unwrap();
    let record = adjusted.await.unwrap().unwrap();
    assert_eq!((record.state, record.spec.lifecycle.on_timeout), (SandboxState::Paused, OnTimeout::Pause(Keep::FilesOnly)));
}
