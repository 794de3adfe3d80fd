//! How many sandboxes may have processes at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// All places of this server.
#[derive(Debug, Clone)]
pub(super) struct Places {
    taken: Arc<AtomicU32>,
    limit: u32,
}

/// One sandbox's place; given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    taken: Arc<AtomicU32>,
}

/// All places are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Full {
    /// Sandboxes with processes.
    pub(super) running: u32,
    /// `running_max`.
    pub(super) limit: u32,
}

impl Places {
    pub(super) fn new(limit: u32) -> Self {
        Self { taken: Arc::default(), limit }
    }

    /// A place, if one is free.
    pub(super) fn take(&self) -> Result<Place, Full> {
        let add = |taken: u32| (taken < self.limit).then_some(taken + 1);
        match self.taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, add) {
            Ok(_) => Ok(Place { taken: Arc::clone(&self.taken) }),
            Err(running) => Err(Full { running, limit: self.limit }),
        }
    }

    /// A place for a sandbox that runs already, even beyond the limit: it was lowered since.
    pub(super) fn take_anyway(&self) -> Place {
        self.taken.fetch_add(1, Ordering::AcqRel);
        Place { taken: Arc::clone(&self.taken) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.taken.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_free_again_when_its_holder_is_gone() {
        let places = Places::new(1);
        let place = places.take().unwrap();
        assert_eq!(places.take().unwrap_err(), Full { running: 1, limit: 1 });
        drop(place);
        places.take().unwrap();
    }

    #[test]
    fn adopted_sandboxes_count_against_the_limit() {
        let places = Places::new(1);
        let _adopted = (places.take_anyway(), places.take_anyway());
        assert_eq!(places.take().unwrap_err(), Full { running: 2, limit: 1 });
    }
}
