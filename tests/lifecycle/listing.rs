//! Lists, pages and filters.

use crate::world::World;
use std::collections::BTreeMap;
use stillbox::model::{Keep, SandboxId, SandboxSpec, SandboxState, TemplateId};
use stillbox::sandbox::{ListOrder, ListPage, ListQuery};

fn ids(page: &ListPage) -> Vec<SandboxId> {
    page.sandboxes.iter().map(|record| record.id).collect()
}

fn all() -> ListQuery {
    ListQuery { limit: 100, ..ListQuery::default() }
}

async fn create_with(world: &World, key: &str, value: &str) -> SandboxId {
    let spec = SandboxSpec { metadata: BTreeMap::from([(key.into(), value.into())]), ..world.spec() };
    world.registry().create(spec, None).await.unwrap().id
}

#[tokio::test(flavor = "multi_thread")]
async fn live_sandboxes_are_listed_newest_first_and_the_running_ones_counted() {
    let world = World::new().await;
    let (one, two, three) = (world.create().await.id, world.create().await.id, world.create().await.id);
    world.registry().pause(two, Keep::Memory).await.unwrap();
    let killed = world.create().await.id;
    world.registry().kill(killed).await.unwrap();
    let page = world.registry().list(all()).await.unwrap();
    assert_eq!((ids(&page), page.next, page.running_total), (vec![three, two, one], None, 2));
    let ascending = world.registry().list(ListQuery { order: ListOrder::Ascending, ..all() }).await.unwrap();
    assert_eq!(ids(&ascending), [one, two, three]);
    let running = world.registry().list(ListQuery { states: vec![SandboxState::Running], ..all() }).await.unwrap();
    assert_eq!(ids(&running), [three, one]);
    let paused = world.registry().list(ListQuery { states: vec![SandboxState::Paused], ..all() }).await.unwrap();
    assert_eq!(ids(&paused), [two]);
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_must_all_match() {
    let world = World::new().await;
    let one = create_with(&world, "team", "a").await;
    let _other = create_with(&world, "team", "b").await;
    let of_team = ListQuery { metadata: BTreeMap::from([("team".into(), "a".into())]), ..all() };
    assert_eq!(ids(&world.registry().list(of_team.clone()).await.unwrap()), [one]);
    let mut impossible = of_team;
    impossible.metadata.insert("missing".into(), String::new());
    assert_eq!(ids(&world.registry().list(impossible).await.unwrap()), []);
    let elsewhere = ListQuery { template: Some(TemplateId::random()), ..all() };
    assert_eq!(ids(&world.registry().list(elsewhere).await.unwrap()), []);
    let started_at = world.registry().get(one).unwrap().started_at;
    let since = world.registry().list(ListQuery { started_after: Some(started_at), ..all() }).await.unwrap();
    assert!(ids(&since).contains(&one), "the moment itself belongs to the range");
    let later = ListQuery { started_after: Some(started_at + std::time::Duration::from_micros(1)), ..all() };
    assert!(!ids(&world.registry().list(later).await.unwrap()).contains(&one));
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_neither_repeat_nor_hide_while_sandboxes_come_and_go() {
    let world = World::new().await;
    let mut wanted = Vec::new();
    for _ in 0..6 {
        wanted.insert(0, world.create().await.id);
    }
    let (mut query, mut seen) = (ListQuery { limit: 2, ..all() }, Vec::new());
    loop {
        let page = world.registry().list(query.clone()).await.unwrap();
        seen.extend(ids(&page));
        // A new one belongs before the first page, a killed one was seen: neither moves what is to come.
        world.create().await;
        world.registry().kill(seen[0]).await.ok();
        match page.next {
            Some(next) => query.after = Some(next),
            None => break,
        }
    }
    assert_eq!(seen, wanted);
}
