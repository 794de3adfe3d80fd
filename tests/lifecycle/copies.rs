//! Forks and snapshots: one dump, many sandboxes.

use crate::world::{World, eventually};
use std::collections::BTreeSet;
use std::time::Duration;
use stillbox::model::{DumpKey, Keep, SandboxSpec, SandboxState};
use stillbox::runtime::fake::Verb;
use stillbox::runtime::{DiskSource, Finding, Runtime, StartFrom};
use stillbox::sandbox::{CreateError, Fork, ForkError, PauseError, SnapshotQuery, Strictness, TokenKind};
use stillbox::store::templates;

fn fork(count: u32, strictness: Strictness) -> Fork {
    Fork::of(count, Duration::from_secs(60), strictness)
}

#[tokio::test(flavor = "multi_thread")]
async fn forks_have_the_sources_memory_and_files_and_names_of_their_own() {
    let world = World::new().await;
    let source = world.create().await;
    world.mark(source.id, "kept");
    let copies = world.registry().fork(source.id, fork(8, Strictness::PerCopy)).await.unwrap();
    let copies: Vec<_> = copies.into_iter().map(Result::unwrap).collect();
    let ids: BTreeSet<_> = copies.iter().map(|copy| copy.id).chain([source.id]).collect();
    assert_eq!(ids.len(), 9);
    for copy in &copies {
        assert_eq!((copy.state, copy.generation, &copy.boot_id), (SandboxState::Running, source.generation + 1, &source.boot_id));
        assert_eq!(world.marks(copy.id), (Some("kept".into()), "kept".into()));
        let init = world.fake.with_agent(copy.id, |agent| agent.inits.last().cloned().unwrap()).unwrap();
        assert_eq!(init["accessToken"], world.registry().token(TokenKind::EnvdAccess, copy.id));
        assert_eq!(init["hostname"], copy.id.as_str());
    }
    let entropies: BTreeSet<_> = copies
        .iter()
        .map(|copy| world.fake.with_agent(copy.id, |agent| agent.inits.last().unwrap()["entropy"].to_string()).unwrap())
        .collect();
    assert_eq!(entropies.len(), 8);
    world.mark(copies[0].id, "changed");
    assert_eq!(world.marks(source.id), (Some("kept".into()), "kept".into()));
    assert_eq!(world.registry().get(source.id).unwrap(), source);
    eventually("the dump is removed", || world.snapshot_folders().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_leaves_connections_into_its_source_open() {
    let world = World::new().await;
    let id = world.create().await.id;
    let route = world.registry().route(id).await.unwrap();
    world.registry().fork(id, fork(1, Strictness::PerCopy)).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(1), route.cut()).await.is_err(), "connections were cut");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_source_is_forked_from_its_own_dump_and_stays_paused() {
    let world = World::new().await;
    for keep in [Keep::Memory, Keep::FilesOnly] {
        let id = world.create().await.id;
        world.mark(id, "kept");
        let paused = world.registry().pause(id, keep).await.unwrap();
        let copies = world.registry().fork(id, fork(3, Strictness::AllOrNone)).await.unwrap();
        for copy in copies {
            let memory = (keep == Keep::Memory).then(|| "kept".to_owned());
            assert_eq!(world.marks(copy.unwrap().id), (memory, "kept".into()));
        }
        assert_eq!(world.registry().get(id).unwrap(), paused);
        world.registry().resume(id, Duration::from_secs(60), None).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_copy_that_fails_is_named_and_the_others_stay() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.fake.fail_next(Verb::Start, "no slot is free");
    let copies = world.registry().fork(id, fork(4, Strictness::PerCopy)).await.unwrap();
    assert_eq!(copies.iter().filter(|copy| copy.is_ok()).count(), 3);
    let failed = copies.into_iter().find_map(Result::err).unwrap();
    assert!(matches!(failed, CreateError::Start { .. }), "{failed}");
    assert_eq!(world.fake.running().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_or_none_removes_the_copies_that_succeeded() {
    let world = World::with(|config| config.running_max = 4).await;
    let source = world.create().await;
    let error = world.registry().fork(source.id, fork(4, Strictness::AllOrNone)).await.unwrap_err();
    assert!(matches!(error, ForkError::Copy(CreateError::TooMany(_))), "{error}");
    assert_eq!(world.fake.running(), [source.id]);
    world.registry().fork(source.id, fork(3, Strictness::AllOrNone)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_cannot_be_dumped_is_refused_by_name_and_goes_on() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.fake.set_findings(id, vec![Finding { pid: 7, command: "strace".into(), reason: "traces pid 8".into() }]);
    let error = world.registry().fork(id, fork(2, Strictness::PerCopy)).await.unwrap_err();
    assert!(matches!(error, ForkError::Source(PauseError::NotDumpable { .. })), "{error}");
    assert_eq!(world.fake.running(), [id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_during_a_pause_is_denied_and_one_goes_on_when_its_caller_vanishes() {
    let world = World::new().await;
    let id = world.create().await.id;
    let mut gate = world.fake.hold(Verb::Dump);
    let registry = world.registry();
    let pause = tokio::spawn(async move { registry.pause(id, Keep::Memory).await });
    gate.reached().await;
    let error = world.registry().fork(id, fork(1, Strictness::PerCopy)).await.unwrap_err();
    assert!(matches!(error, ForkError::Source(PauseError::InTransition { .. })), "{error}");
    drop(gate);
    pause.await.unwrap().unwrap();
    let mut gate = world.fake.hold(Verb::Start);
    let registry = world.registry();
    let caller = tokio::spawn(async move { registry.fork(id, fork(2, Strictness::AllOrNone)).await });
    gate.reached().await;
    caller.abort();
    drop(gate);
    eventually("both copies run", || world.fake.running().len() == 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_a_template_of_its_own_that_many_can_be_created_from() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.mark(id, "kept");
    let info = world.registry().snapshot(id, None, Keep::Memory).await.unwrap();
    assert_eq!((info.sandbox, info.name.as_deref(), info.tag.as_str()), (id, None, "default"));
    world.mark(id, "changed");
    world.registry().kill(id).await.unwrap();
    let (template, tag) = (info.template, info.tag.clone());
    let build = world.store().read(move |db| templates::by_id(db, template)).await.unwrap().unwrap().tags[&tag];
    for _ in 0..3 {
        let spec = SandboxSpec { template, build, ..world.spec() };
        let copy = world.registry().create(spec, None).await.unwrap();
        assert_eq!(world.marks(copy.id), (Some("kept".into()), "kept".into()));
    }
    assert_eq!(world.snapshot_folders(), [info.snapshot.to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_are_listed_newest_first_by_source_name_and_page() {
    let world = World::new().await;
    let (one, two) = (world.create().await.id, world.create().await.id);
    let first = world.registry().snapshot(one, Some("work"), Keep::Memory).await.unwrap();
    let second = world.registry().snapshot(two, None, Keep::Memory).await.unwrap();
    let third = world.registry().snapshot(one, Some("work:v2"), Keep::Memory).await.unwrap();
    assert_eq!((first.template, third.tag.as_str()), (third.template, "v2"));
    let ask = |query: SnapshotQuery| {
        let registry = world.registry();
        async move { registry.snapshots(query).await.unwrap() }
    };
    let all = ask(SnapshotQuery { limit: 10, ..SnapshotQuery::default() }).await;
    assert_eq!((all.snapshots, all.next), (vec![third.clone(), second.clone(), first.clone()], None));
    let of_one = ask(SnapshotQuery { sandbox: Some(one), limit: 10, ..SnapshotQuery::default() }).await;
    assert_eq!(of_one.snapshots, [third.clone(), first.clone()]);
    let named = ask(SnapshotQuery { name: Some("work".into()), limit: 10, ..SnapshotQuery::default() }).await;
    assert_eq!(named.snapshots, [third.clone(), first.clone()]);
    assert_eq!(ask(SnapshotQuery { name: Some("other".into()), limit: 10, ..SnapshotQuery::default() }).await.snapshots, []);
    let mut seen = Vec::new();
    let mut query = SnapshotQuery { limit: 1, ..SnapshotQuery::default() };
    loop {
        let page = ask(query.clone()).await;
        seen.extend(page.snapshots);
        match page.next {
            Some(next) => query.after = Some(next),
            None => break,
        }
    }
    assert_eq!(seen, [third, second, first]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_a_paused_sandbox_is_denied() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.registry().pause(id, Keep::Memory).await.unwrap();
    let error = world.registry().snapshot(id, None, Keep::Memory).await.unwrap_err();
    assert!(matches!(error, ForkError::Source(PauseError::InTransition { .. })), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_files_asks_nothing_of_the_processes_and_is_started_cold_anywhere() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.mark(id, "kept");
    world.fake.set_findings(id, vec![Finding { pid: 7, command: "gdb".into(), reason: "traces pid 8".into() }]);
    let dumps = || world.fake.calls().iter().filter(|(verb, _)| *verb == Verb::Dump).count();
    let before = dumps();
    let info = world.registry().snapshot(id, None, Keep::FilesOnly).await.unwrap();
    assert_eq!(dumps(), before);
    world.mark(id, "changed");
    let here = world.fake.dump_key();
    world.fake.set_dump_key(DumpKey { cpu_flags: "sse2".into(), ..here });
    let (template, tag) = (info.template, info.tag.clone());
    let build = world.store().read(move |db| templates::by_id(db, template)).await.unwrap().unwrap().tags[&tag];
    let copy = world.registry().create(SandboxSpec { template, build, ..world.spec() }, None).await.unwrap();
    assert_eq!(world.marks(copy.id), (None, "kept".into()));
    let start = world.fake.start_request(copy.id).unwrap();
    assert!(matches!((start.disk, start.from), (DiskSource::CopyOf(_), StartFrom::Cold { .. })));
    let listed = world.registry().snapshots(SnapshotQuery { limit: 5, ..SnapshotQuery::default() }).await.unwrap();
    assert_eq!(listed.snapshots, [info]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_files_that_cannot_be_copied_leaves_nothing() {
    let world = World::new().await;
    let id = world.create().await.id;
    let before = world.snapshot_folders();
    world.fake.fail_next(Verb::CopyDisk, "the disk is full");
    let error = world.registry().snapshot(id, None, Keep::FilesOnly).await.unwrap_err();
    assert!(matches!(error, ForkError::Source(PauseError::Dump { .. })), "{error}");
    assert_eq!(world.snapshot_folders(), before);
}
