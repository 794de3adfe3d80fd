//! Which things of which kinds lie ready, and what is to be made or removed next. Bookkeeping only: pure.
//!
//! The room on the shelf is shared evenly by the kinds that were asked for last; a kind that comes in takes room from
//! the one that was asked for longest ago.

use std::time::{Duration, Instant};

/// Kinds `K` and things `T` of them.
#[derive(Debug)]
pub(super) struct Shelf<K, T> {
    capacity: u32,
    is_closed: bool,
    /// The one that was asked for last comes first; never more than there is room for.
    kinds: Vec<Kind<K, T>>,
    /// Things whose kind had to make room.
    unwanted: Vec<T>,
}

#[derive(Debug)]
struct Kind<K, T> {
    kind: K,
    asked_at: Instant,
    ready: Vec<T>,
    making: u32,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step<K, T> {
    /// Make so many of a kind; [`Shelf::put`] is told what came of it.
    Make {
        /// Which.
        kind: K,
        /// How many, at least one.
        count: u32,
    },
    /// Remove these.
    Remove(Vec<T>),
    /// Wait for a change.
    Nothing,
    /// Nothing, for ever.
    Closed,
}

impl<K: Clone + PartialEq, T> Shelf<K, T> {
    pub(super) fn new(capacity: u32) -> Self {
        Self { capacity, is_closed: false, kinds: Vec::new(), unwanted: Vec::new() }
    }

    /// Takes one; from now on its kind is wanted.
    pub(super) fn take(&mut self, kind: &K, now: Instant) -> Option<T> {
        self.want(kind, now);
        self.kinds.first_mut().filter(|first| first.kind == *kind)?.ready.pop()
    }

    /// Its kind is the one that was asked for last.
    pub(super) fn want(&mut self, kind: &K, now: Instant) {
        if self.is_closed || self.capacity == 0 {
            return;
        }
        let position = self.kinds.iter().position(|known| known.kind == *kind);
        let known = match position {
            Some(position) => Kind { asked_at: now, ..self.kinds.remove(position) },
            None => Kind { kind: kind.clone(), asked_at: now, ready: Vec::new(), making: 0 },
        };
        self.kinds.insert(0, known);
        while self.kinds.len() > self.capacity as usize {
            self.unwanted.extend(self.kinds.pop().into_iter().flat_map(|kind| kind.ready));
        }
    }

    /// The answer to [`Step::Make`]: `count` were asked for. Returns what nobody wants any more.
    pub(super) fn put(&mut self, kind: &K, count: u32, made: Vec<T>) -> Vec<T> {
        match self.kinds.iter_mut().find(|known| known.kind == *kind) {
            Some(known) => {
                known.making = known.making.saturating_sub(count);
                known.ready.extend(made);
                Vec::new()
            }
            None => made,
        }
    }

    /// The kind is of the past; returns what there was of it.
    pub(super) fn forget(&mut self, kind: &K) -> Vec<T> {
        let position = self.kinds.iter().position(|known| known.kind == *kind);
        position.map(|position| self.kinds.remove(position).ready).unwrap_or_default()
    }

    /// Kinds that nobody asked for within `kept` leave their room to the others. The last one asked for stays.
    pub(super) fn forget_idle(&mut self, now: Instant, kept: Duration) -> Vec<T> {
        let is_idle = |kind: &Kind<K, T>| now.saturating_duration_since(kind.asked_at) > kept;
        let first_idle = self.kinds.iter().skip(1).position(is_idle).map(|position| position + 1);
        let idle = first_idle.map(|first| self.kinds.split_off(first)).unwrap_or_default();
        idle.into_iter().flat_map(|kind| kind.ready).collect()
    }

    /// Every kind that is wanted.
    pub(super) fn kinds(&self) -> Vec<K> {
        self.kinds.iter().map(|kind| kind.kind.clone()).collect()
    }

    /// How many lie ready.
    pub(super) fn ready(&self) -> usize {
        self.kinds.iter().map(|kind| kind.ready.len()).sum()
    }

    /// Nothing is wanted any more; returns what is left.
    pub(super) fn close(&mut self) -> Vec<T> {
        self.is_closed = true;
        let kinds = std::mem::take(&mut self.kinds).into_iter().flat_map(|kind| kind.ready);
        std::mem::take(&mut self.unwanted).into_iter().chain(kinds).collect()
    }

    /// Removing comes before making, so that there is never more than there is room for but while something is made.
    pub(super) fn next(&mut self) -> Step<K, T> {
        if self.is_closed {
            return Step::Closed;
        }
        let share = self.share();
        for kind in &mut self.kinds {
            let kept = kind.ready.len().min(share as usize);
            self.unwanted.extend(kind.ready.drain(kept..));
        }
        if !self.unwanted.is_empty() {
            return Step::Remove(std::mem::take(&mut self.unwanted));
        }
        for kind in &mut self.kinds {
            let ready = u32::try_from(kind.ready.len()).unwrap_or(u32::MAX);
            let count = share.saturating_sub(ready.saturating_add(kind.making));
            if count > 0 {
                kind.making += count;
                return Step::Make { kind: kind.kind.clone(), count };
            }
        }
        Step::Nothing
    }

    fn share(&self) -> u32 {
        let kinds = u32::try_from(self.kinds.len()).unwrap_or(u32::MAX);
        (self.capacity / kinds.max(1)).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Does what the shelf says until it wants nothing; things are numbers that count up.
    fn settle(shelf: &mut Shelf<u8, u32>, made: &mut u32) {
        for _ in 0..100 {
            match shelf.next() {
                Step::Make { kind, count, .. } => {
                    let things = (*made..*made + count).collect();
                    *made += count;
                    assert_eq!(shelf.put(&kind, count, things), Vec::<u32>::new());
                }
                Step::Remove(_) => {}
                Step::Nothing | Step::Closed => return,
            }
        }
        panic!("the shelf never settles");
    }

    fn now() -> Instant {
        Instant::now()
    }

    #[test]
    fn nothing_is_made_before_somebody_asks_and_then_the_shelf_is_filled() {
        let mut shelf = Shelf::new(4);
        assert_eq!(shelf.next(), Step::Nothing);
        assert_eq!(shelf.take(&b'a', now()), None);
        assert_eq!(shelf.next(), Step::Make { kind: b'a', count: 4 });
        assert_eq!(shelf.next(), Step::Nothing, "they are being made");
        assert_eq!(shelf.put(&b'a', 4, vec![1, 2, 3, 4]), Vec::<u32>::new());
        assert_eq!(shelf.take(&b'a', now()), Some(4));
        assert_eq!(shelf.next(), Step::Make { kind: b'a', count: 1 });
    }

    #[test]
    fn a_second_kind_gets_half_the_room() {
        let (mut shelf, mut made) = (Shelf::new(4), 0);
        shelf.want(&b'a', now());
        settle(&mut shelf, &mut made);
        shelf.want(&b'b', now());
        assert!(matches!(shelf.next(), Step::Remove(things) if things.len() == 2));
        settle(&mut shelf, &mut made);
        assert_eq!((shelf.kinds[0].ready.len(), shelf.kinds[1].ready.len()), (2, 2));
    }

    #[test]
    fn what_was_being_made_when_its_kind_went_comes_back() {
        let mut shelf = Shelf::new(2);
        shelf.want(&b'a', now());
        assert!(matches!(shelf.next(), Step::Make { .. }));
        assert_eq!(shelf.forget(&b'a'), Vec::<u32>::new());
        assert_eq!(shelf.put(&b'a', 2, vec![1, 2]), [1, 2]);
        shelf.want(&b'a', now());
        assert!(matches!(shelf.next(), Step::Make { .. }));
        assert_eq!(shelf.close(), Vec::<u32>::new());
        assert_eq!(shelf.put(&b'a', 2, vec![3, 4]), [3, 4]);
        assert_eq!(shelf.next(), Step::Closed);
    }

    #[test]
    fn a_kind_that_nobody_asks_for_leaves_its_room_to_the_last_one() {
        let (mut shelf, mut made) = (Shelf::new(4), 0);
        shelf.want(&b'a', now());
        shelf.want(&b'b', now());
        settle(&mut shelf, &mut made);
        let later = now() + Duration::from_secs(100);
        assert_eq!(shelf.forget_idle(later, Duration::from_secs(200)), Vec::<u32>::new());
        assert_eq!(shelf.forget_idle(later, Duration::from_secs(50)).len(), 2);
        settle(&mut shelf, &mut made);
        assert_eq!((shelf.kinds(), shelf.ready()), (vec![b'b'], 4));
    }

    #[test]
    fn a_failure_leaves_room_for_the_next_try() {
        let mut shelf: Shelf<u8, u32> = Shelf::new(2);
        shelf.want(&b'a', now());
        assert!(matches!(shelf.next(), Step::Make { count: 2, .. }));
        shelf.put(&b'a', 2, Vec::new());
        assert!(matches!(shelf.next(), Step::Make { count: 2, .. }));
    }

    proptest! {
        #[test]
        fn there_is_never_more_than_there_is_room_for(capacity in 0..6_u32, asked in proptest::collection::vec(0..8_u8, 0..40)) {
            let (mut shelf, mut made) = (Shelf::new(capacity), 0);
            for kind in asked {
                shelf.take(&kind, now());
                settle(&mut shelf, &mut made);
                prop_assert!(shelf.ready() <= capacity as usize);
            }
        }
    }
}
