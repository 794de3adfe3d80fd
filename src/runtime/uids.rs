//! The pool of host id ranges: each sandbox with processes has one of its own.

use super::config::UidRanges;
use crate::model::InstanceId;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

/// Ids that one user namespace maps: 0..65536 inside.
pub const IDS_PER_SANDBOX: u32 = 1 << 16;

/// Gives out ranges, first to last and round again, so that a range just given back rests for a while.
#[derive(Debug, Clone)]
pub struct UidPool(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    ranges: UidRanges,
    next: u32,
    taken: BTreeSet<u32>,
}

/// A range in use; dropped, it is free again.
#[derive(Debug)]
pub struct UidLease {
    base: u32,
    pool: UidPool,
}

/// All ranges are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("all {0} host id ranges are in use")]
pub struct NoRangeLeft(pub u32);

impl UidPool {
    /// A pool of `ranges`. Servers of other data folders begin elsewhere, so that two rarely meet in one range;
    /// where they do, the sandboxes share nothing but the kernel's per-user counters.
    pub fn new(ranges: UidRanges, instance: InstanceId) -> Self {
        // Ids end at 2^32 - 2.
        let ranges = UidRanges { count: ranges.count.min((u32::MAX - ranges.first) / IDS_PER_SANDBOX), ..ranges };
        let seed = instance.as_str().bytes().fold(0u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(u32::from(byte)));
        let next = seed.checked_rem(ranges.count).unwrap_or(0);
        Self(Arc::new(Mutex::new(State { ranges, next, taken: BTreeSet::new() })))
    }

    /// Takes any free range.
    pub fn lease(&self) -> Result<UidLease, NoRangeLeft> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = state.ranges.count;
        for step in 0..count {
            let index = (state.next + step) % count;
            if state.taken.insert(index) {
                state.next = (index + 1) % count;
                let base = state.ranges.first + index * IDS_PER_SANDBOX;
                return Ok(UidLease { base, pool: self.clone() });
            }
        }
        Err(NoRangeLeft(count))
    }

    /// Takes the range of a sandbox that runs already. A base outside the configured ranges (they may have been
    /// changed since) is accepted: nobody else will be given it.
    pub fn adopt(&self, base: u32) -> UidLease {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = state.index(base) {
            state.taken.insert(index);
        }
        UidLease { base, pool: self.clone() }
    }
}

impl State {
    fn index(&self, base: u32) -> Option<u32> {
        let index = base.checked_sub(self.ranges.first)? / IDS_PER_SANDBOX;
        (index < self.ranges.count).then_some(index)
    }
}

impl UidLease {
    /// First host id of the range.
    pub fn base(&self) -> u32 {
        self.base
    }
}

impl Drop for UidLease {
    fn drop(&mut self) {
        let mut state = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = state.index(self.base) {
            state.taken.remove(&index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(count: u32) -> UidPool {
        UidPool::new(UidRanges { first: 1 << 20, count }, "abcde".parse().unwrap())
    }

    #[test]
    fn ranges_do_not_overlap_and_come_back() {
        let pool = pool(2);
        let (first, second) = (pool.lease().unwrap(), pool.lease().unwrap());
        assert_eq!(first.base().abs_diff(second.base()), IDS_PER_SANDBOX);
        assert_eq!(pool.lease().unwrap_err(), NoRangeLeft(2));
        let freed = first.base();
        drop(first);
        assert_eq!(pool.lease().unwrap().base(), freed);
    }

    #[test]
    fn ranges_end_where_ids_end() {
        let pool = UidPool::new(UidRanges { first: 0xfffd_0000, count: 4096 }, "abcde".parse().unwrap());
        let leases = [pool.lease().unwrap(), pool.lease().unwrap()];
        assert!(leases.iter().all(|lease| lease.base().checked_add(IDS_PER_SANDBOX).is_some()));
        assert_eq!(pool.lease().unwrap_err(), NoRangeLeft(2));
    }

    #[test]
    fn an_adopted_range_is_not_given_to_anybody_else() {
        let pool = pool(2);
        let adopted = pool.adopt(1 << 20);
        assert_eq!(pool.lease().map(|lease| lease.base()), Ok((1 << 20) + IDS_PER_SANDBOX));
        drop(adopted);
        let outside = pool.adopt(7);
        assert_eq!(outside.base(), 7);
    }
}
