//! Unpacking tars that nobody has read: an imported template, an image from a registry.
//!
//! Nothing an archive says can reach outside the folder it is unpacked into. That folder is new and private, so what
//! this unpacker made itself is all that is there: an entry whose parent is anything but a folder made before, is
//! refused, and with it every way through a link. Device nodes are refused wherever they are; everything below /dev is
//! left out, since the runtime makes that itself. Every refusal names the entry.

use super::layer::{ATTRIBUTE_KEY, is_kept_attribute};
use crate::model::ByteSize;
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
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
}

impl Default for UnpackLimits {
    /// Room for the largest images in use (CUDA with its libraries: 20 GiB, half a million files), and an end.
    fn default() -> Self {
        Self { bytes_max: ByteSize::gib(64), entries_max: 4_000_000 }
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
    /// Entries below /dev that were left out.
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
    pub(super) fn limit<R: Read>(&self, inner: R) -> impl Read + use<R> {
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

struct BudgetReader<R> {
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Made {
    Folder,
    File,
    Link,
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
    done: Unpacked,
}

impl<'a> Target<'a> {
    fn new(rootfs: &'a Path, limits: UnpackLimits) -> Self {
        let made = HashMap::from([(PathBuf::new(), Made::Folder)]);
        Self { rootfs, limits, made, folders: BTreeMap::new(), done: Unpacked::default() }
    }

    fn place<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>) -> Result<(), UnpackError> {
        let name = shown(&entry.path_bytes());
        let refused = |problem: &str| UnpackError::Refused { entry: name.clone(), problem: problem.to_owned() };
        let path = clean(&entry.path_bytes()).map_err(refused)?;
        let kind = entry.header().entry_type();
        if matches!(kind, tar::EntryType::XGlobalHeader) {
            return Ok(());
        }
        if path.starts_with("dev") && path != Path::new("dev") {
            self.done.left_out += 1;
            return Ok(());
        }
        self.done.entries += 1;
        if self.done.entries > self.limits.entries_max {
            let limit = format!("{} entries", self.limits.entries_max);
            return Err(UnpackError::TooLarge { entry: name, limit, key: "template.import_entries_max" });
        }
        self.check_place(&path, kind).map_err(refused)?;
        let facts = facts_of(entry).map_err(|problem| refused(&problem))?;
        self.make_parents(&path).map_err(|source| UnpackError::Write { entry: name.clone(), source })?;
        let on_disk = self.on_disk(&path);
        let written = match kind {
            tar::EntryType::Directory => self.make_folder(&path, facts),
            tar::EntryType::Regular | tar::EntryType::Continuous => self.write_file(entry, &name, &path, &facts)?,
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

    fn on_disk(&self, path: &Path) -> PathBuf {
        if path.as_os_str().is_empty() { self.rootfs.to_owned() } else { self.rootfs.join(path) }
    }

    /// Folders may come twice (their facts are then the later ones); anything else only once.
    fn check_place(&self, path: &Path, kind: tar::EntryType) -> Result<(), &'static str> {
        for parent in path.ancestors().skip(1) {
            match self.made.get(parent) {
                None | Some(Made::Folder) => {}
                Some(Made::Link) => return Err("its path leads through a link"),
                Some(Made::File) => return Err("its path leads through a file"),
            }
        }
        match self.made.get(path) {
            None => Ok(()),
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
            None => Err(format!("it links to '{}', which the archive does not have before it", shown(target))),
        }
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
        let mut file = match fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&on_disk) {
            Ok(file) => file,
            Err(error) => return Ok(Err(error)),
        };
        // One byte more than there is room for tells a full archive from one that goes on.
        let written = match io::copy(&mut entry.by_ref().take(room.saturating_add(1)), &mut file) {
            Ok(written) => written,
            Err(error) => return Ok(Err(error)),
        };
        if written > room {
            let limit = self.limits.bytes_max.to_string();
            return Err(UnpackError::TooLarge { entry: name.to_owned(), limit, key: "template.import_bytes_max" });
        }
        if written < entry.header().entry_size().unwrap_or(written) {
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
        Ok(self.done)
    }
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
            let Some(name) = record.key_bytes().strip_prefix(ATTRIBUTE_KEY.as_bytes()) else { continue };
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
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use tar::EntryType;

    /// One entry of an archive under test, written without the tar crate's own checks of names.
    struct Sample<'a> {
        kind: EntryType,
        path: &'a str,
        link: &'a str,
        content: &'a [u8],
    }

    fn file(path: &str) -> Sample<'_> {
        Sample { kind: EntryType::Regular, path, link: "", content: b"x" }
    }

    fn special<'a>(kind: EntryType, path: &'a str, link: &'a str) -> Sample<'a> {
        Sample { kind, path, link, content: b"" }
    }

    fn tar_of(samples: &[Sample<'_>]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for sample in samples {
            let mut header = tar::Header::new_gnu();
            header.as_gnu_mut().unwrap().name[..sample.path.len()].copy_from_slice(sample.path.as_bytes());
            header.as_gnu_mut().unwrap().linkname[..sample.link.len()].copy_from_slice(sample.link.as_bytes());
            header.set_entry_type(sample.kind);
            header.set_size(sample.content.len() as u64);
            header.set_mode(0o640);
            let me = fs::metadata(".").unwrap();
            header.set_uid(u64::from(me.uid()));
            header.set_gid(u64::from(me.gid()));
            header.set_mtime(1_700_000_000);
            header.set_cksum();
            tar.append(&header, sample.content).unwrap();
        }
        tar.into_inner().unwrap()
    }

    fn unpacked(tar: &[u8], limits: UnpackLimits) -> (tempfile::TempDir, Result<Unpacked, UnpackError>) {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("rootfs")).unwrap();
        let outcome = unpack(tar, &folder.path().join("rootfs"), limits);
        (folder, outcome)
    }

    fn refusal(samples: &[Sample<'_>]) -> String {
        let (folder, outcome) = unpacked(&tar_of(samples), UnpackLimits::default());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something was written outside");
        outcome.unwrap_err().to_string()
    }

    #[test]
    fn a_path_that_leads_out_is_refused_by_name() {
        assert_eq!(refusal(&[file("../escaped")]), "archive entry '../escaped' is refused: its path has '..'");
        assert_eq!(refusal(&[file("a/../../escaped")]), "archive entry 'a/../../escaped' is refused: its path has '..'");
        assert_eq!(refusal(&[file("/etc/escaped")]), "archive entry '/etc/escaped' is refused: its path is absolute");
    }

    #[test]
    fn nothing_is_written_through_a_link() {
        let through = [special(EntryType::Symlink, "out", "/tmp"), file("out/escaped")];
        assert_eq!(refusal(&through), "archive entry 'out/escaped' is refused: its path leads through a link");
        let onto = [special(EntryType::Symlink, "out", "../escaped"), file("out")];
        assert_eq!(refusal(&onto), "archive entry 'out' is refused: the archive has an earlier entry of this name");
        let folder_onto = [special(EntryType::Symlink, "out", ".."), special(EntryType::Directory, "out", "")];
        assert_eq!(refusal(&folder_onto), "archive entry 'out' is refused: the archive has an earlier entry of this name");
    }

    #[test]
    fn a_hard_link_reaches_only_files_of_the_archive() {
        let out = refusal(&[special(EntryType::Link, "stolen", "/etc/passwd")]);
        assert!(out.contains("it links to '/etc/passwd', and there its path is absolute"), "{out}");
        let up = refusal(&[special(EntryType::Link, "stolen", "../../etc/passwd")]);
        assert!(up.contains("its path has '..'"), "{up}");
        let absent = refusal(&[special(EntryType::Link, "stolen", "etc/passwd")]);
        assert!(absent.contains("'stolen' is refused: it links to 'etc/passwd', which the archive does not have before it"), "{absent}");
    }

    #[test]
    fn device_nodes_are_refused_and_those_below_dev_left_out() {
        for kind in [EntryType::Block, EntryType::Char] {
            let message = refusal(&[special(kind, "srv/disk", "")]);
            assert!(message.starts_with("archive entry 'srv/disk' is refused: it is a device node"), "{message}");
        }
        let harmless = tar_of(&[special(EntryType::Char, "./dev/console", ""), file("dev/x"), file("device"), file("./dev/pts/0")]);
        let (folder, outcome) = unpacked(&harmless, UnpackLimits::default());
        assert_eq!(outcome.unwrap(), Unpacked { entries: 1, bytes: 1, left_out: 3 });
        assert!(folder.path().join("rootfs/device").exists() && !folder.path().join("rootfs/dev").exists());
    }

    #[test]
    fn a_bomb_is_named_and_stopped_at_the_limit() {
        let two = tar_of(&[file("first"), Sample { content: &[0; 5000], ..file("large") }]);
        let limits = UnpackLimits { bytes_max: ByteSize(4096), entries_max: 10 };
        let (folder, outcome) = unpacked(&two, limits);
        assert_eq!(
            outcome.unwrap_err().to_string(),
            "archive entry 'large' goes beyond 4 KiB; if the archive is to be trusted, raise template.import_bytes_max"
        );
        assert!(fs::metadata(folder.path().join("rootfs/large")).unwrap().len() <= 4096);
        let limits = UnpackLimits { bytes_max: ByteSize::mib(1), entries_max: 1 };
        let (_folder, outcome) = unpacked(&two, limits);
        assert!(outcome.unwrap_err().to_string().contains("'large' goes beyond 1 entries"));
    }

    #[test]
    fn a_name_of_many_megabytes_is_not_read_into_memory() {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(EntryType::GNULongName);
        header.set_size(1 << 40);
        header.set_cksum();
        let endless = header.as_bytes().chain(io::repeat(b'a'));
        let folder = tempfile::tempdir().unwrap();
        let error = unpack(endless, folder.path(), UnpackLimits::default()).unwrap_err();
        let UnpackError::Damaged { after, source } = error else { panic!("{error}") };
        assert_eq!((after.as_str(), source.to_string().contains("larger than 1 MiB")), ("(start)", true), "{source}");
    }

    #[test]
    fn overlayfs_orders_are_refused() {
        let mut tar = tar::Builder::new(Vec::new());
        tar.append_pax_extensions([("SCHILY.xattr.trusted.overlay.redirect", b"/etc".as_slice())]).unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_entry_type(EntryType::Directory);
        tar.append_data(&mut header, "sneaky", io::empty()).unwrap();
        let (_folder, outcome) = unpacked(&tar.into_inner().unwrap(), UnpackLimits::default());
        let message = outcome.unwrap_err().to_string();
        assert_eq!(message, "archive entry 'sneaky' is refused: it carries the attribute 'trusted.overlay.redirect'");
    }

    #[test]
    fn an_archive_that_ends_early_is_damaged() {
        let whole = tar_of(&[file("first"), Sample { content: &[7; 3000], ..file("second") }]);
        let (_folder, outcome) = unpacked(&whole[..whole.len() - 3000], UnpackLimits::default());
        assert!(outcome.is_err(), "{outcome:?}");
        let (_folder, outcome) = unpacked(b"this is no tar, but it is long enough", UnpackLimits::default());
        assert!(outcome.is_err(), "{outcome:?}");
    }

    #[test]
    fn files_keep_their_mode_and_time_and_folders_get_theirs_last() {
        let tar =
            tar_of(&[special(EntryType::Directory, "closed", ""), file("closed/within"), special(EntryType::Symlink, "etc", "/closed")]);
        let (folder, outcome) = unpacked(&tar, UnpackLimits::default());
        outcome.unwrap();
        for name in ["closed", "closed/within"] {
            let metadata = fs::metadata(folder.path().join("rootfs").join(name)).unwrap();
            assert_eq!((metadata.mode() & 0o7777, metadata.mtime()), (0o640, 1_700_000_000), "{name}");
        }
        assert_eq!(fs::read_link(folder.path().join("rootfs/etc")).unwrap(), Path::new("/closed"));
    }
}
