//! Room on the host's disk. Sandboxes' disks and volumes are sparse: what runs may fill the host's disk, and then the
//! store fails, and every disk tears at what it has not written out yet.
//!
//! ```text
//! below runtime.disk_free_min   nothing is started or dumped, and the disks of all who run are full to those inside
//! a little above it             as before
//! ```
//! A full disk is what programs know: they get ENOSPC and nothing is lost. It is made by a number of ext4's, its reserved
//! blocks, which is not on the disk: neither a pause nor the next server has anything to undo. Space that is freed inside
//! goes back to the host (`discard`), and may be used again.

use super::{Shared, step};
use crate::model::Keep;
use crate::model::{ByteSize, SandboxId};
use crate::runtime::disk::{DiskError, DiskKind, Room, bytes_of_copy};
use crate::runtime::volumes::seen;
use crate::runtime::{DiskSource, Exhausted, RuntimeError, Scarce, Writing};
use crate::sys::mountinfo;
use nix::sys::stat::{major, minor};
use nix::sys::statvfs::statvfs;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// A gigabyte a second is what a sandbox writes at most; the floor should outlast a few looks.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// What is to be free beyond the floor before it is all as before; an eighth of the floor, where that is less.
const MARGIN_MAX: ByteSize = ByteSize::gib(1);
/// How often the log says it again.
const REMIND_EVERY: Duration = Duration::from_secs(60);
/// How many of the largest the log names.
const NAMED_MAX: usize = 5;
/// What a disk that is made full has left: for the agent's own files, and for small things that end a program well.
const LEFT_INSIDE: ByteSize = ByteSize::mib(16);
/// More than this ext4 never reserves by itself (`ext4_calculate_resv_clusters`): the fiftieth part, and at most so many.
const RESERVED_MAX: u64 = 4096;
const LOOP_MAJOR: u64 = 7;

/// A file system whose free space is what it was.
#[derive(Debug, thiserror::Error)]
#[error("the free space of {} cannot be changed", place.display())]
struct Unchanged {
    place: PathBuf,
    #[source]
    source: io::Error,
}

/// Held by a look; afterwards, when the kernel is closed, none begins: it would mount volumes that were just unmounted.
#[derive(Debug, Default)]
pub(super) struct Lookout(Mutex<Stage>);

#[derive(Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Looking,
    Closed,
}

impl Lookout {
    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When this returns, nothing is looked at or changed any more.
    pub(super) fn close(&self) {
        *self.stage() = Stage::Closed;
    }
}

/// What was seen and said last.
#[derive(Debug, Default)]
struct Watch {
    /// `None` before the first look: an earlier server may have left disks full.
    was_low: Option<bool>,
    told_at: Option<Instant>,
}

/// Looks after the room until the kernel is dropped.
pub(super) async fn watch_forever(shared: Weak<Shared>) {
    let mut watch = Watch::default();
    loop {
        let Some(shared) = shared.upgrade() else { return };
        let looked = tokio::task::spawn_blocking(move || {
            watch.look(&shared);
            watch
        });
        watch = looked.await.unwrap_or_default();
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

impl Watch {
    fn look(&mut self, shared: &Shared) {
        let stage = shared.lookout.stage();
        if *stage == Stage::Closed {
            return;
        }
        let Ok(room) = shared.disks.room() else { return };
        let margin = ByteSize(match self.was_low {
            Some(true) => MARGIN_MAX.bytes().min(room.floor.bytes() / 8),
            Some(false) | None => 0,
        });
        let is_low = room.is_short_of(margin);
        match (is_low, self.was_low) {
            (true, _) => {
                // Each time: others may have been mounted meanwhile.
                let failed = shared.disks_of_all(make_full);
                self.tell(shared, &room, failed);
            }
            (false, Some(false)) => {}
            (false, Some(true)) => {
                shared.open_disks();
                self.told_at = None;
                tracing::info!(free = %room.free, "{} are free again below {}: sandboxes start, pause and write as before", room.free, room.path.display());
            }
            (false, None) => shared.open_disks(),
        }
        self.was_low = Some(is_low);
    }

    fn tell(&mut self, shared: &Shared, room: &Room, failed: Option<Unchanged>) {
        if self.told_at.is_some_and(|at| at.elapsed() < REMIND_EVERY) {
            return;
        }
        self.told_at = Some(Instant::now());
        let Room { path, free, floor, .. } = room;
        let happens = match shared.disks.kind() {
            DiskKind::Image => "nothing is started, resumed or dumped, and the disks of running sandboxes are full",
            DiskKind::Folder => "nothing is started or resumed; what runs is not kept from filling the rest",
        };
        if let Some(failed) = failed {
            tracing::error!(error = &failed as &dyn std::error::Error, "A disk can still be filled");
        }
        let largest = shared.largest();
        tracing::error!(%free, %floor, "{free} are free below {}, {floor} are kept free (runtime.disk_free_min): {happens}; largest: {largest}", path.display());
    }
}

impl Shared {
    /// Whether a start may make this disk.
    pub(super) fn require_room_for(&self, disk: &DiskSource) -> Result<(), DiskError> {
        let need = match disk {
            DiskSource::CopyOf(image) | DiskSource::PooledCopyOf(image) => bytes_of_copy(image)?,
            DiskSource::Fresh | DiskSource::Own => ByteSize(0),
        };
        self.disks.require(need)
    }

    pub(super) fn require_room(&self, id: SandboxId, writing: Writing) -> Result<(), RuntimeError> {
        let memory = || self.cgroups.of(id).usage().map(|used| used.memory_used_bytes).map_err(step(id, "reading its memory's size"));
        let disk = || bytes_of_copy(&self.layout.sandbox(id).disk_image()).map_err(step(id, "reading its disk's size"));
        let need = match (self.disks.kind(), writing) {
            // Nothing is dumped or copied then, which is said elsewhere.
            (DiskKind::Folder, _) => return Ok(()),
            (DiskKind::Image, Writing::Pause) => ByteSize(memory()?),
            (DiskKind::Image, Writing::Copy(Keep::Memory)) => ByteSize(memory()?.saturating_add(disk()?.bytes())),
            (DiskKind::Image, Writing::Copy(Keep::FilesOnly)) => disk()?,
        };
        match self.disks.require(need) {
            Err(DiskError::Full { room, need }) => Err(no_room(&room, need).into()),
            other => other.map_err(step(id, "looking for room on the disk")),
        }
    }

    fn open_disks(&self) {
        if let Some(failed) = self.disks_of_all(make_roomy) {
            tracing::error!(error = &failed as &dyn std::error::Error, "A disk stays full");
        }
    }

    /// Does this to the file system of every disk and volume that is mounted below the data folder, and tells of one that
    /// could not be changed.
    fn disks_of_all(&self, change: impl Fn(u64, &Path) -> io::Result<()>) -> Option<Unchanged> {
        let mut failed = None;
        for volume in seen::devices(&self.layout.volumes()).unwrap_or_default().into_values() {
            // Sandboxes that an earlier server left may have it mounted where this one has not.
            if let Err(error) = self.volumes.open(volume) {
                failed = Some(Unchanged { place: self.layout.volume(volume).files(), source: io::Error::other(error) });
            }
        }
        let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
        for (device, place) in loop_mounts(&table, self.layout.data_dir()) {
            match change(minor(device), &place) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => failed = Some(Unchanged { place, source }),
                // Unmounted meanwhile, or done.
                Ok(()) | Err(_) => {}
            }
        }
        failed
    }

    /// The sandboxes and volumes that take most of the disk, for people.
    fn largest(&self) -> String {
        let images = |place: PathBuf, name: &'static str| {
            let entries = fs::read_dir(place).into_iter().flatten().flatten();
            entries.filter_map(move |entry| Some((bytes_of_copy(&entry.path().join(name)).ok()?, entry.file_name())))
        };
        let sandboxes = images(self.layout.sandboxes(), "disk.img").map(|(bytes, name)| (bytes, "sandbox", name));
        let volumes = images(self.layout.volumes(), "volume.img").map(|(bytes, name)| (bytes, "volume", name));
        let mut all: Vec<_> = sandboxes.chain(volumes).collect();
        all.sort_by_key(|(bytes, ..)| std::cmp::Reverse(bytes.bytes()));
        let named = all.iter().take(NAMED_MAX).map(|(bytes, kind, name)| format!("{kind} {} {bytes}", name.to_string_lossy()));
        named.collect::<Vec<_>>().join(", ")
    }
}

/// What whoever needs room is told.
pub(super) fn no_room(room: &Room, need: ByteSize) -> Exhausted {
    let place = room.path.display();
    Exhausted {
        scarce: Scarce::Disk,
        what: match need.bytes() {
            0 => format!("disk space below {place}"),
            _ => format!("disk space below {place} for another {need}"),
        },
        used: room.used.to_string(),
        limit: ByteSize((room.used.bytes() + room.free.bytes()).saturating_sub(room.floor.bytes())).to_string(),
        remedy: format!("remove sandboxes, snapshots or other files, or lower runtime.disk_free_min ({} are kept free)", room.floor),
    }
}

/// Device and a place of each file system on a loop device below `data_dir`.
fn loop_mounts(table: &[u8], data_dir: &Path) -> BTreeMap<u64, PathBuf> {
    let lines = table.split(|byte| *byte == b'\n');
    let mount = |line| Some((mountinfo::device(line)?, mountinfo::mount_point(line)?));
    lines.filter_map(mount).filter(|(device, place)| major(*device) == LOOP_MAJOR && place.starts_with(data_dir)).collect()
}

fn reserved_file(number: u64) -> PathBuf {
    PathBuf::from(format!("/sys/fs/ext4/loop{number}/reserved_clusters"))
}

fn reserved(number: u64) -> io::Result<u64> {
    fs::read_to_string(reserved_file(number))?.trim().parse().map_err(io::Error::other)
}

/// Only what is deleted can be written anew from now on, and a little more.
fn make_full(number: u64, place: &Path) -> io::Result<()> {
    if reserved(number)? > RESERVED_MAX {
        return Ok(());
    }
    let space = statvfs(place)?;
    let left = space.blocks_free().saturating_sub(LEFT_INSIDE.bytes() / space.fragment_size());
    match left > RESERVED_MAX {
        true => fs::write(reserved_file(number), left.to_string()),
        // It cannot grow by more than that anyway.
        false => Ok(()),
    }
}

/// What ext4 reserves by itself.
fn make_roomy(number: u64, place: &Path) -> io::Result<()> {
    if reserved(number)? <= RESERVED_MAX {
        return Ok(());
    }
    let own = RESERVED_MAX.min(statvfs(place)?.blocks() / 50);
    fs::write(reserved_file(number), own.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::makedev;

    #[test]
    fn each_file_system_on_a_loop_device_below_the_data_folder_is_met_once() {
        let table = b"40 30 7:3 / /data/sandboxes/i1/disk rw shared:1 - ext4 /dev/loop3 rw\n\
            41 30 0:52 / /data/sandboxes/i1/root rw - overlay overlay rw\n42 30 7:4 / /elsewhere rw - ext4 /dev/loop4 rw\n\
            43 30 7:5 / /data/volumes/v/files rw - ext4 /dev/loop5 rw\n44 30 7:5 / /data/volumes/v/files rw - ext4 /dev/loop5 rw\n";
        let found: Vec<u64> = loop_mounts(table, Path::new("/data")).into_keys().collect();
        assert_eq!(found, [makedev(7, 3), makedev(7, 5)]);
    }
}
