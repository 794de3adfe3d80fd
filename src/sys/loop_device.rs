//! Loop devices: a file as a block device, given back by the kernel when the last user has gone.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_SET_CAPACITY: libc::c_ulong = 0x4C07;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LOOP_MAJOR: u64 = 7;
/// How often a free device may be taken by somebody else between our looking and our taking.
const RACES_MAX: u32 = 64;

#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// An attached loop device. It detaches by itself when the last descriptor and the last mount of it are gone.
#[derive(Debug)]
pub struct LoopDevice {
    /// N of /dev/loopN.
    pub number: u32,
    /// Keeps it attached until something is mounted from it.
    pub node: File,
}

impl LoopDevice {
    /// Attaches `image`, through the page cache (direct I/O off: a copy of the image must see what was written).
    pub fn attach(image: &File) -> io::Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        // SAFETY: all zeroes is a valid loop_config, which is plain integers and arrays.
        let mut config: LoopConfig = unsafe { std::mem::zeroed() };
        config.fd = u32::try_from(image.as_raw_fd()).map_err(io::Error::other)?;
        config.info.flags = LO_FLAGS_AUTOCLEAR;
        for _ in 0..RACES_MAX {
            // SAFETY: takes no argument and returns a number or an error.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            let number = u32::try_from(nix::errno::Errno::result(number)?).map_err(io::Error::other)?;
            let node = match open_node(number) {
                // Somebody is just giving it back.
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => continue,
                opened => opened?,
            };
            // SAFETY: `config` has the kernel's layout and outlives the call, which only reads it.
            let outcome = unsafe { libc::ioctl(node.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
            match nix::errno::Errno::result(outcome) {
                Ok(_) => return Ok(Self { number, node }),
                Err(nix::errno::Errno::EBUSY) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Err(io::Error::other(format!("lost the race for a free loop device {RACES_MAX} times")))
    }

    /// The device that has `image` behind it already; held by this, it does not let go of it.
    pub fn of_image(image: &Path) -> io::Result<Option<Self>> {
        let Some(number) = holder_of(image)? else { return Ok(None) };
        let node = open_node(number)?;
        Ok(is_attached(number, image)?.then_some(Self { number, node }))
    }

    /// Makes it as large as its file has become.
    pub fn take_size_of_file(&self) -> io::Result<()> {
        // SAFETY: an open descriptor; the argument is ignored.
        nix::errno::Errno::result(unsafe { libc::ioctl(self.node.as_raw_fd(), LOOP_SET_CAPACITY, 0) }).map(drop).map_err(Into::into)
    }

    /// Where the device can be mounted from.
    pub fn path(&self) -> PathBuf {
        node_path(self.number)
    }
}

/// A file, whatever it is called: device and inode.
pub type FileKey = (u64, u64);

/// Whether loop device `number` still has `image` behind it.
pub fn is_attached(number: u32, image: &Path) -> io::Result<bool> {
    let image = std::fs::metadata(image)?;
    Ok(file_of(number)? == Some((image.dev(), image.ino())))
}

/// What loop device `number` has behind it.
fn file_of(number: u32) -> io::Result<Option<FileKey>> {
    let node = match File::open(node_path(number)) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENOENT)) => return Ok(None),
        opened => opened?,
    };
    // SAFETY: all zeroes is a valid loop_info64, which is plain integers and arrays.
    let mut info: LoopInfo64 = unsafe { std::mem::zeroed() };
    // SAFETY: `info` has the kernel's layout, is writable and outlives the call.
    let outcome = unsafe { libc::ioctl(node.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) };
    match nix::errno::Errno::result(outcome) {
        Ok(_) => Ok(Some((info.device, info.inode))),
        Err(nix::errno::Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// The loop devices that have a file of this name behind them, wherever it is: number and file.
pub fn holders_of_files_called(name: &Path) -> io::Result<Vec<(u32, FileKey)>> {
    let mut found = Vec::new();
    for number in with_file_called(name)? {
        found.extend(file_of(number)?.map(|file| (number, file)));
    }
    Ok(found)
}

/// N of a loop device that has `image` behind it; `None` when there is none or the image does not exist.
pub fn holder_of(image: &Path) -> io::Result<Option<u32>> {
    let Some(name) = image.file_name().filter(|_| image.exists()) else { return Ok(None) };
    for number in with_file_called(Path::new(name))? {
        if is_attached(number, image)? {
            return Ok(Some(number));
        }
    }
    Ok(None)
}

/// The loop devices whose file has this name, wherever it is: sysfs shows the path within the mount that the file was
/// opened through, which may be one of its folder alone.
fn with_file_called(name: &Path) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/sys/block")?.flatten() {
        let device = entry.file_name();
        let Some(number) = device.to_str().and_then(|device| device.strip_prefix("loop")).and_then(|n| n.parse().ok()) else {
            continue;
        };
        let Ok(file) = std::fs::read_to_string(entry.path().join("loop/backing_file")) else { continue };
        if Path::new(file.trim_end_matches('\n')).ends_with(name) {
            found.push(number);
        }
    }
    Ok(found)
}

/// Whether this machine can attach loop devices at all.
pub fn available() -> bool {
    Path::new("/dev/loop-control").exists()
}

fn node_path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

/// A container's /dev is often a plain tmpfs in which new loop devices do not show up by themselves.
fn open_node(number: u32) -> io::Result<File> {
    let path = node_path(number);
    if !path.exists() {
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o660);
        let device = nix::sys::stat::makedev(LOOP_MAJOR, u64::from(number));
        match nix::sys::stat::mknod(&path, nix::sys::stat::SFlag::S_IFBLK, mode, device) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    OpenOptions::new().read(true).write(true).open(path)
}
