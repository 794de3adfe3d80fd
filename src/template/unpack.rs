//! Unpacking tars that nobody has read: an imported template, an image from a registry.
//!
//! Nothing an archive says can reach outside the folder it is unpacked into. That folder is new and private, so what
//! this unpacker made itself is all that is there: an entry whose parent is anything but a folder made before, is
//! refused, and with it every way through a link. Device nodes are refused wherever they are; everything below /dev is
//! left out, since the runtime makes that itself, and so is what the agent keeps below /run/stillbox. Files with reserved
//! names take away what layers below have (whiteout.rs). Every refusal names the entry.

use super::allowance::{Held, HostRoom};
use super::layer::{ATTRIBUTE_KEY, is_kept_attribute};
use super::whiteout::{self, Mark};
use crate::model::ByteSize;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

/// Names, link targets and attributes of one entry together; PATH_MAX and the kernel's 64 KiB per attribute fit in.
const HEADER_BYTES_MAX: u64 = 1 << 20;

/// What an archive may grow to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnpackLimits {
    /// Bytes of all files together.
    pub bytes_max: ByteSize,
    /// Entries of any kind.
    pub entries_max: u64,
    /// What is kept free of the disk that it is unpacked to: `runtime.disk_free_min`.
    pub free_min: ByteSize,
}

impl Default for UnpackLimits {
    /// Room for the largest images in use (CUDA with its libraries: 20 GiB, half a million files), and an end.
    fn default() -> Self {
        Self { bytes_max: ByteSize::gib(64), entries_max: 4_000_000, free_min: ByteSize(0) }
    }
}

/// Why an archive was not unpacked. What came before stays in the folder, which its owner removes.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The entry breaks a rule.
    #[error("archive entry '{entry}' is refused: {problem}")]
    Refused {
        /// Its name, as the archive says it.
        entry: String,
        /// The rule.
        problem: String,
    },
    /// The archive is larger than allowed.
    #[error("archive entry '{entry}' goes beyond {limit}; if the archive is to be trusted, raise {key}")]
    TooLarge {
        /// The entry that crossed the line.
        entry: String,
        /// The line.
        limit: String,
        /// The bound's name.
        key: &'static str,
    },
    /// Not a tar, or one that ends early.
    #[error("the archive is damaged after entry '{after}'")]
    Damaged {
        /// The last whole entry.
        after: String,
        /// What was met.
        #[source]
        source: io::Error,
    },
    /// The entry could not be written.
    #[error("could not unpack archive entry '{entry}'")]
    Write {
        /// Its name.
        entry: String,
        /// The kernel's word: disk full, mostly.
        #[source]
        source: io::Error,
    },
}

/// What was unpacked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Entries written.
    pub entries: u64,
    /// Bytes of all files together.
    pub bytes: u64,
    /// Entries below /dev and /run/stillbox that were left out.
    pub left_out: u64,
}

/// Unpacks a tar into `rootfs`, an existing, empty folder that nobody else writes to. Blocking; reads `tar` to its end.
pub fn unpack(tar: impl Read, rootfs: &Path, limits: UnpackLimits) -> Result<Unpacked, UnpackError> {
    let budget = HeaderBudget::default();
    let mut archive = tar::Archive::new(budget.limit(tar));
    let mut target = Target::new(rootfs, limits);
    let damaged = |after: &str| {
        let after = after.to_owned();
        move |source| UnpackError::Damaged { after, source }
    };
    let mut last = String::from("(start)");
    let mut entries = archive.entries().map_err(damaged(&last))?;
    loop {
        budget.expect_header();
        let Some(entry) = entries.next() else { break };
        let mut entry = entry.map_err(damaged(&last))?;
        budget.lift();
        last = shown(&entry.path_bytes());
        target.place(&mut entry)?;
    }
    target.finish()
}

/// An entry's name for a message: bounded, without control characters.
pub(super) fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).chars().take(256).map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// How much may be read before the next entry's content begins: the tar crate reads long names and attributes into
/// memory, whatever size the archive claims for them.
#[derive(Debug, Clone)]
pub(super) struct HeaderBudget(Rc<Cell<u64>>);

impl Default for HeaderBudget {
    fn default() -> Self {
        Self(Rc::new(Cell::new(HEADER_BYTES_MAX)))
    }
}

impl HeaderBudget {
    /// Reads through to `inner`, as far as the budget goes.
    pub(super) fn limit<R: Read>(&self, inner: R) -> BudgetReader<R> {
        BudgetReader { inner, left: Rc::clone(&self.0) }
    }
    /// A header comes next.
    pub(super) fn expect_header(&self) {
        self.0.set(HEADER_BYTES_MAX);
    }
    /// An entry's content comes next, which its reader bounds.
    pub(super) fn lift(&self) {
        self.0.set(u64::MAX);
    }
}

/// What [`HeaderBudget::limit`] makes. Passing over content by seeking costs nothing.
pub(super) struct BudgetReader<R> {
    inner: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for BudgetReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        let left = self.left.get().checked_sub(read as u64);
        self.left.set(left.ok_or_else(|| io::Error::other("the next entry's names and attributes are larger than 1 MiB"))?);
        Ok(read)
    }
}

impl<R: Seek> Seek for BudgetReader<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Made {
    Folder,
    File,
    Link,
    /// A whiteout.
    Gone,
}

/// Owner, permissions, time and attributes of an entry.
struct Facts {
    uid: u32,
    gid: u32,
    mode: u32,
    mtime: i64,
    attributes: Vec<(String, Vec<u8>)>,
}

/// The folder being filled, and what is known to be in it.
struct Target<'a> {
    rootfs: &'a Path,
    limits: UnpackLimits,
    made: HashMap<PathBuf, Made>,
    /// Set last, deepest first: writing into a folder changes its time, and its mode may forbid it.
    folders: BTreeMap<PathBuf, Facts>,
    /// Folders that hide what is below them.
    opaque: BTreeSet<PathBuf>,
    done: Unpacked,
    /// Bytes of what is left out: they are no file's, and have an end as well.
    passed_over: u64,
    held: Held,
    room: HostRoom,
}

impl<'a> Target<'a> {
    fn new(rootfs: &'a Path, limits: UnpackLimits) -> Self {
        let made = HashMap::from([(PathBuf::new(), Made::Folder)]);
        Self {
            rootfs,
            limits,
            made,
            folders: BTreeMap::new(),
            opaque: BTreeSet::new(),
            done: Unpacked::default(),
            passed_over: 0,
            held: Held::default(),
            room: HostRoom::of(rootfs, limits.free_min),
        }
    }

    fn place<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>) -> Result<(), UnpackError> {
        let name = shown(&entry.path_bytes());
        let refused = |problem: &str| UnpackError::Refused { entry: name.clone(), problem: problem.to_owned() };
        let path = clean(&entry.path_bytes()).map_err(refused)?;
        let kind = entry.header().entry_type();
        if matches!(kind, tar::EntryType::XGlobalHeader) {
            return Ok(());
        }
        if is_left_out(&path) {
            self.done.left_out += 1;
            return self.pass_over(entry, &name);
        }
        self.done.entries += 1;
        if self.done.entries > self.limits.entries_max {
            let limit = format!("{} entries", self.limits.entries_max);
            return Err(UnpackError::TooLarge { entry: name, limit, key: "template.import_entries_max" });
        }
        if let Some(mark) = Mark::of(&path).map_err(refused)? {
            self.check_parents(&path).map_err(refused)?;
            self.held.add(path.as_os_str().len()).map_err(refused)?;
            self.place_mark(&mark).map_err(|source| UnpackError::Write { entry: name.clone(), source })?;
            return self.pass_over(entry, &name);
        }
        self.check_place(&path, kind).map_err(refused)?;
        let facts = facts_of(entry).map_err(|problem| refused(&problem))?;
        self.held.add(path.as_os_str().len() + facts.bytes()).map_err(refused)?;
        let unwritten = |source| UnpackError::Write { entry: name.clone(), source };
        self.room.take(0).map_err(unwritten)?;
        self.make_room(&path, kind).and_then(|()| self.make_parents(&path)).map_err(unwritten)?;
        let on_disk = self.on_disk(&path);
        let written = match kind {
            tar::EntryType::Directory => self.make_folder(&path, facts),
            tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => {
                self.write_file(entry, &name, &path, &facts)?
            }
            tar::EntryType::Symlink => {
                let target = entry.link_name_bytes().ok_or_else(|| refused("it is a link without a target"))?;
                self.made.insert(path, Made::Link);
                symlink(OsStr::from_bytes(&target), &on_disk).and_then(|()| facts.apply_to_link(&on_disk))
            }
            tar::EntryType::Link => {
                let target = entry.link_name_bytes().ok_or_else(|| refused("it is a link without a target"))?;
                let target = self.link_target(&target).map_err(|problem| refused(&problem))?;
                self.made.insert(path, Made::File);
                fs::hard_link(self.on_disk(&target), &on_disk)
            }
            tar::EntryType::Fifo => {
                self.made.insert(path, Made::File);
                nix::unistd::mkfifo(&on_disk, nix::sys::stat::Mode::S_IRUSR)
                    .map_err(io::Error::from)
                    .and_then(|()| facts.apply_to(&on_disk))
            }
            tar::EntryType::Char | tar::EntryType::Block => return Err(refused("it is a device node; the runtime makes those itself")),
            other => return Err(refused(&format!("entries of type '{}' are not known", char::from(other.as_byte()).escape_default()))),
        };
        written.map_err(|source| UnpackError::Write { entry: name, source })
    }

    /// Reads the content of an entry that becomes no file: it must not count as the next one's header.
    fn pass_over<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>, name: &str) -> Result<(), UnpackError> {
        let room = self.limits.bytes_max.bytes().saturating_sub(self.passed_over);
        let passed = io::copy(&mut entry.by_ref().take(room.saturating_add(1)), &mut io::sink());
        let passed = passed.map_err(|source| UnpackError::Damaged { after: name.to_owned(), source })?;
        if passed > room {
            let limit = self.limits.bytes_max.to_string();
            return Err(UnpackError::TooLarge { entry: name.to_owned(), limit, key: "template.import_bytes_max" });
        }
        self.passed_over += passed;
        Ok(())
    }

    fn on_disk(&self, path: &Path) -> PathBuf {
        if path.as_os_str().is_empty() { self.rootfs.to_owned() } else { self.rootfs.join(path) }
    }

    fn check_parents(&self, path: &Path) -> Result<(), &'static str> {
        for parent in path.ancestors().skip(1) {
            match self.made.get(parent) {
                None | Some(Made::Folder | Made::Gone) => {}
                Some(Made::Link) => return Err("its path leads through a link"),
                Some(Made::File) => return Err("its path leads through a file"),
            }
        }
        Ok(())
    }

    /// Folders may come twice (their facts are then the later ones); anything else only once.
    fn check_place(&self, path: &Path, kind: tar::EntryType) -> Result<(), &'static str> {
        self.check_parents(path)?;
        match self.made.get(path) {
            None | Some(Made::Gone) => Ok(()),
            Some(Made::Folder) if kind == tar::EntryType::Directory => Ok(()),
            Some(_) => Err("the archive has an earlier entry of this name"),
        }
    }

    /// A hard link's target: a file of this archive that was unpacked before.
    fn link_target(&self, target: &[u8]) -> Result<PathBuf, String> {
        let path = clean(target).map_err(|problem| format!("it links to '{}', and there {problem}", shown(target)))?;
        match self.made.get(&path) {
            Some(Made::File) => Ok(path),
            Some(Made::Link) => Ok(path),
            Some(Made::Folder) => Err(format!("it links to '{}', which is a folder", shown(target))),
            None | Some(Made::Gone) => Err(format!("it links to '{}', which the archive does not have before it", shown(target))),
        }
    }

    /// What a layer takes away and has itself is new: a file simply lies over the one below, a folder hides it.
    fn place_mark(&mut self, mark: &Mark) -> io::Result<()> {
        match mark {
            Mark::Note => Ok(()),
            Mark::Opaque(folder) => {
                let inside = folder.join("x");
                self.make_room(&inside, tar::EntryType::Regular)?;
                self.make_parents(&inside)?;
                self.opaque.insert(folder.clone());
                Ok(())
            }
            Mark::Gone(path) => match self.made.get(path) {
                Some(Made::Folder) => {
                    self.opaque.insert(path.clone());
                    Ok(())
                }
                Some(Made::File | Made::Link | Made::Gone) => Ok(()),
                None => {
                    self.make_room(path, tar::EntryType::Regular)?;
                    self.make_parents(path)?;
                    self.made.insert(path.clone(), Made::Gone);
                    whiteout::make_gone(&self.on_disk(path))
                }
            },
        }
    }

    /// Whiteouts where something new comes give way to it.
    fn make_room(&mut self, path: &Path, kind: tar::EntryType) -> io::Result<()> {
        for place in path.ancestors() {
            if self.made.get(place) != Some(&Made::Gone) {
                continue;
            }
            fs::remove_file(self.on_disk(place))?;
            self.made.remove(place);
            if place != path || kind == tar::EntryType::Directory {
                self.opaque.insert(place.to_owned());
            }
        }
        Ok(())
    }

    /// Folders that the archive uses and never names belong to root.
    fn make_parents(&mut self, path: &Path) -> io::Result<()> {
        let missing: Vec<_> = path.ancestors().skip(1).take_while(|parent| !self.made.contains_key(*parent)).collect();
        for parent in missing.into_iter().rev() {
            self.make_folder(parent, Facts { uid: 0, gid: 0, mode: 0o755, mtime: 0, attributes: Vec::new() })?;
        }
        Ok(())
    }

    fn make_folder(&mut self, path: &Path, facts: Facts) -> io::Result<()> {
        if self.made.insert(path.to_owned(), Made::Folder).is_none() {
            fs::create_dir(self.on_disk(path))?;
        }
        self.folders.insert(path.to_owned(), facts);
        Ok(())
    }

    fn write_file<R: Read>(
        &mut self,
        entry: &mut tar::Entry<'_, R>,
        name: &str,
        path: &Path,
        facts: &Facts,
    ) -> Result<io::Result<()>, UnpackError> {
        let on_disk = self.on_disk(path);
        let room = self.limits.bytes_max.bytes() - self.done.bytes;
        self.made.insert(path.to_owned(), Made::File);
        let file = match fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&on_disk) {
            Ok(file) => file,
            Err(error) => return Ok(Err(error)),
        };
        let mut file = Watched { file, room: &mut self.room };
        // One byte more than there is room for tells a full archive from one that goes on.
        let written = match io::copy(&mut entry.by_ref().take(room.saturating_add(1)), &mut file) {
            Ok(written) => written,
            Err(error) => return Ok(Err(error)),
        };
        if written > room {
            let limit = self.limits.bytes_max.to_string();
            return Err(UnpackError::TooLarge { entry: name.to_owned(), limit, key: "template.import_bytes_max" });
        }
        if written < entry.size() {
            return Ok(Err(io::Error::from(io::ErrorKind::UnexpectedEof)));
        }
        self.done.bytes += written;
        Ok(facts.apply_to(&on_disk))
    }

    fn finish(self) -> Result<Unpacked, UnpackError> {
        for (path, facts) in self.folders.iter().rev() {
            let applied = facts.apply_to(&self.on_disk(path));
            applied.map_err(|source| UnpackError::Write { entry: shown(path.as_os_str().as_bytes()), source })?;
        }
        for path in &self.opaque {
            let marked = whiteout::make_opaque(&self.on_disk(path));
            marked.map_err(|source| UnpackError::Write { entry: shown(path.as_os_str().as_bytes()), source })?;
        }
        Ok(self.done)
    }
}

/// A file that is written as long as the host's disk has room.
struct Watched<'r> {
    file: fs::File,
    room: &'r mut HostRoom,
}

impl Write for Watched<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.room.take(bytes.len() as u64)?;
        self.file.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// The runtime makes these itself.
fn is_left_out(path: &Path) -> bool {
    (path.starts_with("dev") && path != Path::new("dev")) || path.starts_with("run/stillbox")
}

/// Labels that a kernel's security modules gave the file where it was packed: of no use here, and no harm.
fn is_dropped_attribute(name: &[u8]) -> bool {
    [b"security.selinux".as_slice(), b"security.ima", b"security.evm", b"security.SMACK64"].contains(&name)
}

/// The path without `./` and double slashes; the archive's own root is the empty path.
fn clean(path: &[u8]) -> Result<PathBuf, &'static str> {
    if path.contains(&0) {
        return Err("its name has a zero byte");
    }
    let mut cleaned = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(path)).components() {
        match component {
            Component::Normal(part) => cleaned.push(part),
            Component::CurDir => {}
            Component::ParentDir => return Err("its path has '..'"),
            Component::RootDir | Component::Prefix(_) => return Err("its path is absolute"),
        }
    }
    Ok(cleaned)
}

fn facts_of<R: Read>(entry: &mut tar::Entry<'_, R>) -> Result<Facts, String> {
    let mut attributes = Vec::new();
    if let Some(records) = entry.pax_extensions().map_err(|error| format!("its extended header cannot be read: {error}"))? {
        for record in records {
            let record = record.map_err(|error| format!("its extended header cannot be read: {error}"))?;
            if record.key_bytes().starts_with(b"GNU.sparse.") {
                return Err("it is a sparse file in pax form, which is not read; pack it without --sparse".to_owned());
            }
            let Some(name) = record.key_bytes().strip_prefix(ATTRIBUTE_KEY.as_bytes()) else { continue };
            if is_dropped_attribute(name) {
                continue;
            }
            if !is_kept_attribute(OsStr::from_bytes(name)) {
                return Err(format!("it carries the attribute '{}'", shown(name)));
            }
            let name = String::from_utf8(name.to_owned()).map_err(|_| "it carries an attribute whose name is no text".to_owned())?;
            attributes.push((name, record.value_bytes().to_owned()));
        }
    }
    let header = entry.header();
    let id = |id: io::Result<u64>| {
        let id = id.map_err(|error| format!("its owner cannot be read: {error}"))?;
        u32::try_from(id).ok().filter(|id| *id < 65536).ok_or_else(|| format!("its owner {id} is beyond 65535"))
    };
    Ok(Facts {
        uid: id(header.uid())?,
        gid: id(header.gid())?,
        mode: header.mode().map_err(|error| format!("its mode cannot be read: {error}"))? & 0o7777,
        mtime: header.mtime().ok().and_then(|seconds| i64::try_from(seconds).ok()).unwrap_or(0),
        attributes,
    })
}

impl Facts {
    /// What is held of it, if it is a folder's.
    fn bytes(&self) -> usize {
        self.attributes.iter().map(|(name, value)| name.len() + value.len()).sum()
    }

    /// The owner first: changing it drops set-user-ID bits and capabilities.
    fn apply_to(&self, path: &Path) -> io::Result<()> {
        lchown(path, Some(self.uid), Some(self.gid))?;
        fs::set_permissions(path, fs::Permissions::from_mode(self.mode))?;
        for (name, value) in &self.attributes {
            xattr::set(path, name, value)?;
        }
        self.set_time(path)
    }

    fn apply_to_link(&self, path: &Path) -> io::Result<()> {
        lchown(path, Some(self.uid), Some(self.gid))?;
        self.set_time(path)
    }

    fn set_time(&self, path: &Path) -> io::Result<()> {
        use nix::sys::{stat, time::TimeSpec};
        let time = TimeSpec::new(self.mtime, 0);
        stat::utimensat(None, path, &time, &time, stat::UtimensatFlags::NoFollowSymlink).map_err(io::Error::from)
    }
}

#[cfg(test)]
mod tests;
