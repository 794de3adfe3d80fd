//! How many sandboxes may have processes at once, and how much they may have together.

use crate::model::{ByteSize, Resources};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What all sandboxes with processes may have together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlacesMax {
    /// Sandboxes; setting `sandbox.running_max`.
    pub running: u32,
    /// The sum of their CPU limits; setting `sandbox.cpus_max`.
    pub cpus: u64,
    /// The sum of their memory limits; setting `sandbox.memory_max`.
    pub memory: ByteSize,
}

/// What sandboxes with processes have together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PlacesTaken {
    /// Sandboxes.
    pub running: u32,
    /// The sum of their CPU limits.
    pub cpus: u64,
    /// The sum of their memory limits.
    pub memory: ByteSize,
}

/// No place for another sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// Too many.
    #[error("{running} sandboxes are running, the limit is {limit}; kill some or raise sandbox.running_max")]
    Sandboxes {
        /// Running now.
        running: u32,
        /// The bound.
        limit: u32,
    },
    /// Their CPUs are too many.
    #[error("running sandboxes have {taken} CPUs and this one has {wanted}, the limit is {limit}; kill some or raise sandbox.cpus_max")]
    Cpus {
        /// Of those that run.
        taken: u64,
        /// Of the one that does not fit.
        wanted: u32,
        /// The bound.
        limit: u64,
    },
    /// Their memory is too much.
    #[error(
        "running sandboxes have {taken} of memory and this one has {wanted}, the limit is {limit}; kill some or raise sandbox.memory_max"
    )]
    Memory {
        /// Of those that run.
        taken: ByteSize,
        /// Of the one that does not fit.
        wanted: ByteSize,
        /// The bound.
        limit: ByteSize,
    },
}

/// All places of this server.
#[derive(Debug, Clone)]
pub(super) struct Places {
    taken: Arc<Mutex<PlacesTaken>>,
    max: PlacesMax,
}

/// One sandbox's place; given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    taken: Arc<Mutex<PlacesTaken>>,
    resources: Resources,
}

impl PlacesTaken {
    fn with(self, resources: &Resources) -> Self {
        let (cpus, memory) = (u64::from(resources.cpu_count), resources.memory.bytes());
        Self { running: self.running + 1, cpus: self.cpus + cpus, memory: ByteSize(self.memory.bytes().saturating_add(memory)) }
    }

    fn without(self, resources: &Resources) -> Self {
        let (cpus, memory) = (u64::from(resources.cpu_count), resources.memory.bytes());
        Self { running: self.running - 1, cpus: self.cpus - cpus, memory: ByteSize(self.memory.bytes().saturating_sub(memory)) }
    }
}

fn lock(taken: &Mutex<PlacesTaken>) -> MutexGuard<'_, PlacesTaken> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Places {
    pub(super) fn new(max: PlacesMax) -> Self {
        Self { taken: Arc::default(), max }
    }

    /// What is taken, and of what.
    pub(super) fn in_use(&self) -> (PlacesTaken, PlacesMax) {
        (*lock(&self.taken), self.max)
    }

    /// A place for a sandbox with these limits, if there is one.
    pub(super) fn take(&self, resources: Resources) -> Result<Place, Full> {
        let mut taken = lock(&self.taken);
        let after = taken.with(&resources);
        if after.running > self.max.running {
            return Err(Full::Sandboxes { running: taken.running, limit: self.max.running });
        }
        if after.cpus > self.max.cpus {
            return Err(Full::Cpus { taken: taken.cpus, wanted: resources.cpu_count, limit: self.max.cpus });
        }
        if after.memory > self.max.memory {
            return Err(Full::Memory { taken: taken.memory, wanted: resources.memory, limit: self.max.memory });
        }
        *taken = after;
        Ok(Place { taken: Arc::clone(&self.taken), resources })
    }

    /// A place for a sandbox that runs already, even beyond the limits: they were lowered since.
    pub(super) fn take_anyway(&self, resources: Resources) -> Place {
        let mut taken = lock(&self.taken);
        *taken = taken.with(&resources);
        Place { taken: Arc::clone(&self.taken), resources }
    }
}

impl Place {
    /// Makes it as large as these limits, if there is room; otherwise it stays as it was.
    pub(super) fn resize(&mut self, places: &Places, resources: Resources) -> Result<(), Full> {
        let mut taken = lock(&self.taken);
        let before = taken.without(&self.resources);
        let after = before.with(&resources);
        if after.memory > places.max.memory {
            return Err(Full::Memory { taken: before.memory, wanted: resources.memory, limit: places.max.memory });
        }
        *taken = after;
        self.resources = resources;
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = lock(&self.taken);
        *taken = taken.without(&self.resources);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Resources = Resources { cpu_count: 2, memory: ByteSize::mib(512), disk: ByteSize::gib(1), pids_max: 64 };

    fn places(running: u32, cpus: u64, memory: ByteSize) -> Places {
        Places::new(PlacesMax { running, cpus, memory })
    }

    #[test]
    fn a_place_is_free_again_when_its_holder_is_gone() {
        let places = places(1, 100, ByteSize::gib(100));
        let place = places.take(ONE).unwrap();
        assert_eq!(places.take(ONE).unwrap_err(), Full::Sandboxes { running: 1, limit: 1 });
        drop(place);
        assert_eq!(places.in_use().0, PlacesTaken::default());
        places.take(ONE).unwrap();
    }

    #[test]
    fn cpus_and_memory_are_counted_together() {
        let few_cpus = places(9, 3, ByteSize::gib(100));
        let _one = few_cpus.take(ONE).unwrap();
        assert_eq!(few_cpus.take(ONE).unwrap_err(), Full::Cpus { taken: 2, wanted: 2, limit: 3 });
        let little_memory = places(9, 100, ByteSize::mib(600));
        let _one = little_memory.take(ONE).unwrap();
        let error = little_memory.take(ONE).unwrap_err().to_string();
        assert!(error.contains("512 MiB") && error.contains("sandbox.memory_max"), "{error}");
    }

    #[test]
    fn a_place_grows_as_far_as_there_is_room_and_shrinks_again() {
        let places = places(9, 100, ByteSize::gib(1));
        let mut place = places.take(ONE).unwrap();
        let with = |memory| Resources { memory, ..ONE };
        place.resize(&places, with(ByteSize::gib(1))).unwrap();
        assert!(matches!(place.resize(&places, with(ByteSize::gib(2))).unwrap_err(), Full::Memory { .. }));
        assert_eq!(places.in_use().0.memory, ByteSize::gib(1));
        drop(place);
        assert_eq!(places.in_use().0, PlacesTaken::default());
    }

    #[test]
    fn adopted_sandboxes_count_against_the_limit() {
        let places = places(1, 100, ByteSize::gib(100));
        let _adopted = (places.take_anyway(ONE), places.take_anyway(ONE));
        assert_eq!(places.take(ONE).unwrap_err(), Full::Sandboxes { running: 2, limit: 1 });
    }
}
