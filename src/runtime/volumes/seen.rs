//! Which volumes a sandbox has mounted, as its mount table tells.
//!
//! A volume is told by its file system's device: a loop device with an image below `volumes/`. A sandbox can move such a
//! mount, bind it elsewhere or unmount it, and cannot make one.

use crate::model::VolumeId;
use crate::runtime::layout::VOLUME_IMAGE;
use crate::sys::loop_device;
use crate::sys::mountinfo;
use nix::sys::stat::makedev;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Major number of loop devices.
const LOOP_MAJOR: u64 = 7;

/// A mount of a volume in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SeenVolume {
    /// Which.
    pub(crate) volume: VolumeId,
    /// The kernel's number of the mount.
    pub(crate) mount: u32,
    /// Where it is, inside.
    pub(crate) point: PathBuf,
    /// All of the volume, not a folder in it.
    pub(crate) is_whole: bool,
}

/// The file systems of the volumes below `volumes` that are in use: device number and volume.
pub(crate) fn devices(volumes: &Path) -> io::Result<BTreeMap<u64, VolumeId>> {
    let image_of = |entry: fs::DirEntry| {
        let image = fs::metadata(entry.path().join(VOLUME_IMAGE)).ok()?;
        Some(((image.dev(), image.ino()), entry.file_name().to_str()?.parse().ok()?))
    };
    let images: BTreeMap<loop_device::FileKey, VolumeId> =
        fs::read_dir(volumes).into_iter().flatten().flatten().filter_map(image_of).collect();
    if images.is_empty() {
        // Every dump asks, while its tasks stand still, and there may be hundreds of loop devices.
        return Ok(BTreeMap::new());
    }
    let holders = loop_device::holders_of_files_called(Path::new(VOLUME_IMAGE))?;
    let device_of = |(number, file)| Some((makedev(LOOP_MAJOR, u64::from(number)), *images.get(&file)?));
    Ok(holders.into_iter().filter_map(device_of).collect())
}

/// The volumes that `process` has mounted in its mount namespace.
pub(crate) fn mounted_by(process: i32, volumes: &Path) -> io::Result<Vec<SeenVolume>> {
    let devices = devices(volumes)?;
    match devices.is_empty() {
        true => Ok(Vec::new()),
        false => Ok(in_table(&fs::read(format!("/proc/{process}/mountinfo"))?, &devices)),
    }
}

fn in_table(table: &[u8], devices: &BTreeMap<u64, VolumeId>) -> Vec<SeenVolume> {
    let seen = |line: &[u8]| {
        Some(SeenVolume {
            volume: *devices.get(&mountinfo::device(line)?)?,
            mount: mountinfo::id(line)?,
            point: mountinfo::mount_point(line)?,
            is_whole: mountinfo::root(line)? == Path::new("/"),
        })
    };
    table.split(|byte| *byte == b'\n').filter_map(seen).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_told_by_its_device_wherever_it_is_mounted() {
        let id = VolumeId::random();
        let devices = BTreeMap::from([(makedev(7, 3), id)]);
        let table = b"40 30 0:52 / / rw - overlay overlay rw\n\
            41 40 7:3 / /mnt/a\\040b rw,nosuid,nodev - ext4 /dev/loop3 rw\n\
            42 40 7:3 /sub /other rw - ext4 /dev/loop3 rw\n43 40 7:4 / /c rw - ext4 /dev/loop4 rw\n";
        let seen = in_table(table, &devices);
        let mount = |mount, point: &str, is_whole| SeenVolume { volume: id, mount, point: point.into(), is_whole };
        assert_eq!(seen, [mount(41, "/mnt/a b", true), mount(42, "/other", false)]);
    }
}
