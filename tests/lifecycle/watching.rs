//! Metrics and logs.

use crate::world::{World, eventually};
use std::collections::BTreeMap;
use stillbox::model::{LogLevel, SandboxId};
use stillbox::runtime::fake::Verb;
use stillbox::sandbox::{LogDirection, LogQuery, MetricsError};
use time::OffsetDateTime;
use time::macros::datetime;

pub(crate) fn everything() -> LogQuery {
    LogQuery { cursor: None, limit: 1000, direction: LogDirection::Forward, level: None, search: None }
}

fn always() -> std::ops::Range<OffsetDateTime> {
    datetime!(2000-01-01 00:00 UTC)..datetime!(3000-01-01 00:00 UTC)
}

fn say(world: &World, id: SandboxId, seq: u64, message: &str) {
    let line = format!(r#"{{"seq":{seq},"timestamp":"2999-01-01T00:00:00Z","level":"warn","message":"{message}"}}"#);
    world.fake.with_agent(id, |agent| agent.log.insert(seq, line)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_sample_comes_with_the_start_the_last_before_the_end_and_both_outlive_it() {
    let world = World::new().await;
    let id = world.create().await.id;
    let first = world.registry().metrics(id, always()).await.unwrap();
    assert!(!first.is_empty());
    assert!(first[0].cpu_count == 2 && first[0].disk_total.bytes() > 0 && first[0].memory_total.bytes() > 0);
    let samples = || world.fake.calls().iter().filter(|call| **call == (Verb::Usage, Some(id))).count();
    eventually("it is sampled regularly", || samples() >= 3).await;
    world.registry().kill(id).await.unwrap();
    let all = world.registry().metrics(id, always()).await.unwrap();
    assert_eq!(all.len(), samples());
    assert_eq!(world.registry().latest_metrics(&[id, SandboxId::random()]).await.unwrap(), BTreeMap::from([(id, all[all.len() - 1])]));
    let before = world.registry().metrics(id, datetime!(2000-01-01 00:00 UTC)..first[0].at).await.unwrap();
    assert_eq!(before, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sample_that_fails_leaves_a_gap_and_nothing_worse() {
    let world = World::new().await;
    world.fake.fail_next(Verb::Usage, "cgroup is gone");
    let id = world.create().await.id;
    let samples = || world.fake.calls().iter().filter(|call| **call == (Verb::Usage, Some(id))).count();
    eventually("it is sampled again", || samples() >= 2).await;
    assert!(world.registry().get(id).is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agents_log_is_read_once_line_by_line_and_outlives_the_sandbox() {
    let world = World::new().await;
    let id = world.create().await.id;
    say(&world, id, 1, "one");
    assert_eq!(world.registry().logs(id, everything()).await.unwrap().len(), 1);
    say(&world, id, 2, "two");
    world.registry().kill(id).await.unwrap();
    let lines = world.registry().logs(id, everything()).await.unwrap();
    let from_agent: Vec<_> = lines.iter().filter(|line| line.level == LogLevel::Warn).map(|line| line.message.as_str()).collect();
    assert_eq!(from_agent, ["one", "two"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_read_by_one_server_are_not_read_again_by_the_next() {
    let mut world = World::new().await;
    let id = world.create().await.id;
    say(&world, id, 1, "one");
    world.registry().logs(id, everything()).await.unwrap();
    world.close_and_reopen().await;
    say(&world, id, 2, "two");
    let lines = world.registry().logs(id, everything()).await.unwrap();
    assert_eq!(lines.iter().map(|line| line.message.as_str()).collect::<Vec<_>>(), ["one", "two"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_hangs_delays_neither_log_nor_kill_for_long() {
    let world = World::new().await;
    let id = world.create().await.id;
    world.fake.with_agent(id, |agent| agent.hangs = true).unwrap();
    let begun = std::time::Instant::now();
    world.registry().logs(id, everything()).await.unwrap();
    world.registry().kill(id).await.unwrap();
    assert!(begun.elapsed() < std::time::Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_never_there_has_no_history() {
    let world = World::new().await;
    let id = SandboxId::random();
    assert!(matches!(world.registry().logs(id, everything()).await, Err(MetricsError::Unknown(_))));
    assert!(matches!(world.registry().metrics(id, always()).await, Err(MetricsError::Unknown(_))));
}
