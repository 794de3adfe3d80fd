//! Layers: immutable root file systems in `layers/<id>`, owned by ids 0..65535, ready to be mounted idmapped.
//!
//! A layer's id is the SHA-256 of the tar that [`write_tar`] makes of it: sorted, complete, the same on every machine. So a
//! layer can be checked against its name at any time, and two ways to the same files lead to one folder.
//! [`Incoming`] is a folder being filled: written aside, synced, renamed. Tars are hostile input: [`super::unpack`].
//! What a layer takes away of those below it is overlayfs' on disk and OCI's in the tar: [`super::whiteout`].

use super::lease::Lease;
use super::whiteout;
use crate::model::ByteSize;
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Extended attributes that belong to a file's content: capabilities, ACLs, the user's own.
/// Never `trusted.*`: overlayfs takes orders from those.
pub(super) fn is_kept_attribute(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name == b"security.capability" || name.starts_with(b"user.") || name.starts_with(b"system.posix_acl_")
}

/// The key under which tar's extended headers carry attributes.
pub(super) const ATTRIBUTE_KEY: &str = "SCHILY.xattr.";

/// Why a layer could not be read or stored. What was written aside has been removed.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// A file operation failed.
    #[error("could not {doing} {}", path.display())]
    Io {
        /// The verb: `read`, `create`, `rename`.
        doing: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// A layer must not hold this.
    #[error("{} is a {kind}; a layer holds files, folders, links and pipes only", path.display())]
    Unwanted {
        /// Inside the layer.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Folders within folders without an end in sight.
    #[error("folders are nested deeper than {DEPTH_MAX} below {}", path.display())]
    TooDeep {
        /// Inside the layer, its beginning.
        path: PathBuf,
    },
    /// More than a layer may hold.
    #[error("with {} it goes beyond {bound}", path.display())]
    TooLarge {
        /// What crossed the line.
        path: PathBuf,
        /// The line.
        bound: Bound,
    },
    /// The files are not those that the id names.
    #[error("layer {expected} turned out to be {found}; the archive is damaged or was changed")]
    Mismatch {
        /// The id it was announced with.
        expected: String,
        /// The id of what is there.
        found: String,
    },
}

/// How much one layer may hold, as the configuration says. Small: errors travel through every level of a walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Bound {
    /// Of all files together.
    #[error("{0} (template.import_bytes_max)")]
    Bytes(ByteSize),
    /// Of any kind.
    #[error("{0} entries (template.import_entries_max)")]
    Entries(u64),
}

/// Folders within one another. Layers are walked folder in folder, and a build step that nested them without end would use
/// up the server's stack.
pub(super) const DEPTH_MAX: usize = 256;

/// Refuses a folder of a layer, by its path inside, that lies too deep.
pub(super) fn check_depth(inside: &Path) -> Result<(), LayerError> {
    let head = || inside.components().take(SHOWN_OF_DEEP).collect();
    if inside.components().nth(DEPTH_MAX).is_some() { Err(LayerError::TooDeep { path: head() }) } else { Ok(()) }
}

/// Folders of a path that is too deep that are told.
const SHOWN_OF_DEEP: usize = 8;

pub(super) fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LayerError {
    let path = path.to_owned();
    move |source| LayerError::Io { doing, path, source }
}

/// Whether the text has the form of a layer's id; only then it may become a folder's name.
pub(super) fn is_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Where a layer is, or would be.
pub fn folder_of(data_dir: &Path, id: &str) -> PathBuf {
    data_dir.join("layers").join(id)
}

/// A new folder beside the layers. Dropped before [`Incoming::commit`], it is removed with all that is in it.
#[derive(Debug)]
pub struct Incoming {
    layers: PathBuf,
    /// `<folder>/rootfs` becomes the layer; the rest of the folder is for whoever fills it.
    folder: PathBuf,
    /// Held as long as somebody fills it: a sweep by another process leaves it alone.
    _lock: Flock<fs::File>,
}

impl Incoming {
    /// Makes `layers/incoming-<random>` with an empty `rootfs` in it.
    pub fn new(data_dir: &Path) -> Result<Self, LayerError> {
        let layers = data_dir.join("layers");
        let private = |path: &Path| fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
        private(&layers).map_err(io_error("create", &layers))?;
        let folder = layers.join(format!("incoming-{}", uuid::Uuid::new_v4().simple()));
        private(&folder).map_err(io_error("create", &folder))?;
        let lock = locked(&folder).map_err(io_error("lock", &folder))?;
        let incoming = Self { layers, folder, _lock: lock };
        let rootfs = incoming.rootfs();
        fs::create_dir(&rootfs).map_err(io_error("create", &rootfs))?;
        Ok(incoming)
    }

    /// The root file system to fill.
    pub fn rootfs(&self) -> PathBuf {
        self.folder.join("rootfs")
    }

    /// Room for files that are needed while filling it.
    pub fn scratch(&self) -> &Path {
        &self.folder
    }

    /// Names it after its content, brings it to stable storage, puts it in place and holds it for the caller. With
    /// `expected`, content of another id is refused. A layer that is there already stays; this copy is removed.
    pub fn commit(self, expected: Option<&str>) -> Result<Lease, LayerError> {
        let rootfs = self.rootfs();
        let id = id_of(&rootfs)?;
        if let Some(expected) = expected.filter(|expected| **expected != id) {
            return Err(LayerError::Mismatch { expected: expected.to_owned(), found: id });
        }
        let place = self.layers.join(&id);
        let handle = fs::File::open(&rootfs).map_err(io_error("open", &rootfs))?;
        let new = Lease::of_new(&handle, &id).map_err(io_error("lock", &rootfs))?;
        let present = || Lease::take_in(&self.layers, &id).map_err(io_error("lock", &place));
        if let Some(held) = present()? {
            return Ok(held);
        }
        sync_file_system(&handle).map_err(io_error("sync", &rootfs))?;
        match fs::rename(&rootfs, &place) {
            Ok(()) => {}
            // Another one with the same content was quicker.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                return present()?.ok_or(LayerError::Io { doing: "rename", path: rootfs, source: error });
            }
            Err(error) => return Err(io_error("rename", &rootfs)(error)),
        }
        fs::File::open(&self.layers).and_then(|folder| folder.sync_all()).map_err(io_error("sync", &self.layers))?;
        Ok(new)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            tracing::warn!(folder = %self.folder.display(), %error, "Could not remove a half-made layer; the next start tries again");
        }
    }
}

fn sync_file_system(handle: &fs::File) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    nix::unistd::syncfs(handle.as_raw_fd()).map_err(io::Error::from)
}

fn locked(folder: &Path) -> io::Result<Flock<fs::File>> {
    Flock::lock(fs::File::open(folder)?, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error.into())
}

/// Removes what processes that are gone left half-made.
pub fn sweep_incoming(data_dir: &Path) -> io::Result<usize> {
    let mut removed = 0;
    let entries = match fs::read_dir(data_dir.join("layers")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let is_abandoned = || locked(&entry.path()).is_ok();
        if entry.file_name().as_bytes().starts_with(b"incoming-") && is_abandoned() {
            fs::remove_dir_all(entry.path())?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// The id of the files below `rootfs`.
pub fn id_of(rootfs: &Path) -> Result<String, LayerError> {
    let mut hasher = HashingSink(Sha256::new());
    write_tar(rootfs, &mut hasher)?;
    Ok(hex::encode(hasher.0.finalize()))
}

struct HashingSink(Sha256);

impl Write for HashingSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes the tar of everything below `rootfs`: sorted by path, numeric owners, whole seconds, kept attributes, hard
/// links to the first of their names.
pub fn write_tar(rootfs: &Path, out: &mut dyn Write) -> Result<(), LayerError> {
    let mut tar = tar::Builder::new(out);
    pack_entry(rootfs, Path::new(""), &mut FirstNames::new(), &mut tar)?;
    tar.finish().map_err(io_error("pack", rootfs))
}

/// The path by which an inode with several names was packed first.
type FirstNames = HashMap<(u64, u64), PathBuf>;

fn pack_entry<W: Write>(rootfs: &Path, inside: &Path, first_names: &mut FirstNames, tar: &mut tar::Builder<W>) -> Result<(), LayerError> {
    let on_disk = below(rootfs, inside);
    let metadata = fs::symlink_metadata(&on_disk).map_err(io_error("read", &on_disk))?;
    let name = below(Path::new("."), inside);
    if whiteout::is_gone(&metadata) {
        return append_mark(&whiteout::name_of_gone(&name), tar).map_err(io_error("pack", &on_disk));
    }
    if inside.file_name().is_some_and(whiteout::is_reserved) {
        return Err(LayerError::Unwanted { path: inside.to_owned(), kind: "reserved name" });
    }
    let mut header = header_of(&metadata);
    let kind = metadata.file_type();
    let failed = io_error("pack", &on_disk);
    if kind.is_dir() {
        check_depth(inside)?;
        append_records(attributes_of(&on_disk)?, tar).map_err(io_error("pack", &on_disk))?;
        header.set_entry_type(tar::EntryType::Directory);
        tar.append_data(&mut header, &name, io::empty()).map_err(failed)?;
        if whiteout::is_opaque(&on_disk).map_err(io_error("read the attributes of", &on_disk))? {
            append_mark(&whiteout::name_of_opaque(&name), tar).map_err(io_error("pack", &on_disk))?;
        }
        let mut children: Vec<_> = fs::read_dir(&on_disk)
            .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.file_name())).collect())
            .map_err(io_error("list", &on_disk))?;
        children.sort();
        return children.iter().try_for_each(|child| pack_entry(rootfs, &inside.join(child), first_names, tar));
    }
    if metadata.nlink() > 1 {
        if let Some(first) = first_names.get(&(metadata.dev(), metadata.ino())) {
            return append_link(tar::EntryType::Link, header, &name, first, tar).map_err(failed);
        }
        first_names.insert((metadata.dev(), metadata.ino()), inside.to_owned());
    }
    if kind.is_symlink() {
        let target = fs::read_link(&on_disk).map_err(io_error("read", &on_disk))?;
        append_link(tar::EntryType::Symlink, header, &name, &target, tar).map_err(failed)
    } else if kind.is_file() {
        append_records(attributes_of(&on_disk)?, tar).map_err(io_error("pack", &on_disk))?;
        let mut file = fs::File::open(&on_disk).map_err(io_error("open", &on_disk))?;
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(metadata.len());
        tar.append_data(&mut header, &name, &mut file).map_err(failed)
    } else if kind.is_fifo() {
        header.set_entry_type(tar::EntryType::Fifo);
        tar.append_data(&mut header, &name, io::empty()).map_err(failed)
    } else {
        let kind = if kind.is_socket() { "socket" } else { "device node" };
        Err(LayerError::Unwanted { path: inside.to_owned(), kind })
    }
}

/// `join`, but joining nothing adds no slash: lstat follows a link that ends in one.
fn below(folder: &Path, inside: &Path) -> PathBuf {
    if inside.as_os_str().is_empty() { folder.to_owned() } else { folder.join(inside) }
}

/// The target goes in byte for byte; the tar crate would tidy it. Longer than the header's 100 bytes it becomes a record.
fn append_link<W: Write>(
    kind: tar::EntryType,
    mut header: tar::Header,
    name: &Path,
    target: &Path,
    tar: &mut tar::Builder<W>,
) -> io::Result<()> {
    let target = target.as_os_str().as_bytes();
    header.set_entry_type(kind);
    if target.len() > 100 {
        append_records(vec![("linkpath".to_owned(), target.to_owned())], tar)?;
    } else {
        header.set_link_name_literal(target)?;
    }
    tar.append_data(&mut header, name, io::empty())
}

/// An empty file of a reserved name.
fn append_mark<W: Write>(name: &Path, tar: &mut tar::Builder<W>) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    for set in [tar::Header::set_uid, tar::Header::set_gid, tar::Header::set_mtime, tar::Header::set_size] {
        set(&mut header, 0);
    }
    header.set_mode(0);
    header.set_entry_type(tar::EntryType::Regular);
    tar.append_data(&mut header, name, io::empty())
}

fn header_of(metadata: &fs::Metadata) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(metadata.mode() & 0o7777);
    header.set_uid(u64::from(metadata.uid()));
    header.set_gid(u64::from(metadata.gid()));
    header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
    header.set_size(0);
    header
}

/// Keys and values of an extended header.
type Records = Vec<(String, Vec<u8>)>;

fn attributes_of(on_disk: &Path) -> Result<Records, LayerError> {
    let names = match xattr::list(on_disk) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(Records::new()),
        names => names.map_err(io_error("read the attributes of", on_disk))?,
    };
    let mut kept: Vec<_> = names.filter(|name| is_kept_attribute(name)).collect();
    kept.sort();
    let mut records = Records::new();
    for name in kept {
        if let Some(value) = xattr::get(on_disk, &name).map_err(io_error("read the attributes of", on_disk))? {
            records.push((format!("{ATTRIBUTE_KEY}{}", name.to_string_lossy()), value));
        }
    }
    Ok(records)
}

fn append_records<W: Write>(records: Records, tar: &mut tar::Builder<W>) -> io::Result<()> {
    tar.append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), value.as_slice())))
}

#[cfg(test)]
mod tests {
    use super::super::unpack::{UnpackLimits, unpack};
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// A small tree with everything that a rootfs has and that packing could lose.
    fn furnish(rootfs: &Path) {
        let long = "a-rather-long-name-".repeat(8);
        fs::create_dir_all(rootfs.join("etc/empty")).unwrap();
        fs::write(rootfs.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n").unwrap();
        fs::set_permissions(rootfs.join("etc/passwd"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::hard_link(rootfs.join("etc/passwd"), rootfs.join("again")).unwrap();
        fs::write(rootfs.join(&long), "long").unwrap();
        symlink("../x//y/./", rootfs.join("untidy")).unwrap();
        symlink("/".to_owned() + &long.repeat(2), rootfs.join("far")).unwrap();
        nix::unistd::mkfifo(&rootfs.join("pipe"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        // Not every file system that tests run on has user attributes.
        let _ = xattr::set(rootfs.join("etc/passwd"), "user.note", b"kept\0whole");
    }

    #[test]
    fn a_layer_unpacked_from_its_tar_has_its_id() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("first"), folder.path().join("second"));
        fs::create_dir(&first).unwrap();
        fs::create_dir(&second).unwrap();
        furnish(&first);
        let mut tar = Vec::new();
        write_tar(&first, &mut tar).unwrap();
        unpack(tar.as_slice(), &second, UnpackLimits::default()).unwrap();
        assert_eq!(id_of(&first).unwrap(), id_of(&second).unwrap());
        assert_eq!(id_of(&first).unwrap(), hex::encode(Sha256::digest(&tar)));
        assert_eq!(fs::metadata(second.join("again")).unwrap().nlink(), 2);
        assert_eq!(fs::metadata(second.join("etc/passwd")).unwrap().mode() & 0o7777, 0o4751);
        assert_eq!(fs::read_link(second.join("untidy")).unwrap().as_os_str(), "../x//y/./");
        fs::write(second.join("etc/passwd"), "root:x:0:0::/root:/bin/bash\n").unwrap();
        assert_ne!(id_of(&first).unwrap(), id_of(&second).unwrap());
    }

    #[test]
    fn a_committed_layer_is_in_place_and_an_abandoned_one_is_gone() {
        let data_dir = tempfile::tempdir().unwrap();
        let incoming = Incoming::new(data_dir.path()).unwrap();
        furnish(&incoming.rootfs());
        let layer = incoming.commit(None).unwrap();
        assert!(folder_of(data_dir.path(), layer.id()).join("etc/passwd").exists());
        drop(Incoming::new(data_dir.path()).unwrap());
        let again = Incoming::new(data_dir.path()).unwrap();
        furnish(&again.rootfs());
        assert_eq!(again.commit(None).unwrap().id(), layer.id());
        let names: Vec<_> = fs::read_dir(data_dir.path().join("layers")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, [layer.id()]);
    }

    #[test]
    fn a_layer_that_is_not_what_it_says_is_refused() {
        let data_dir = tempfile::tempdir().unwrap();
        let incoming = Incoming::new(data_dir.path()).unwrap();
        furnish(&incoming.rootfs());
        let error = incoming.commit(Some(&"0".repeat(64))).unwrap_err();
        assert!(matches!(error, LayerError::Mismatch { .. }), "{error}");
        assert_eq!(fs::read_dir(data_dir.path().join("layers")).unwrap().count(), 0);
    }

    #[test]
    fn folders_without_end_are_refused_and_removed() {
        let data_dir = tempfile::tempdir().unwrap();
        let incoming = Incoming::new(data_dir.path()).unwrap();
        // As deep as a path can name.
        let levels = (4096 - incoming.rootfs().as_os_str().len() - 2) / 2;
        fs::create_dir_all(incoming.rootfs().join("a/".repeat(levels))).unwrap();
        let error = incoming.commit(None).unwrap_err();
        assert!(matches!(error, LayerError::TooDeep { .. }), "{error}");
        assert_eq!(error.to_string(), "folders are nested deeper than 256 below a/a/a/a/a/a/a/a");
        assert_eq!(fs::read_dir(data_dir.path().join("layers")).unwrap().count(), 0);

        let incoming = Incoming::new(data_dir.path()).unwrap();
        fs::create_dir_all(incoming.rootfs().join("a/".repeat(DEPTH_MAX))).unwrap();
        incoming.commit(None).unwrap();
    }

    #[test]
    fn what_an_earlier_server_left_half_made_is_swept() {
        let data_dir = tempfile::tempdir().unwrap();
        assert_eq!(sweep_incoming(data_dir.path()).unwrap(), 0);
        let being_filled = Incoming::new(data_dir.path()).unwrap();
        fs::create_dir_all(data_dir.path().join("layers/incoming-of-the-dead/rootfs")).unwrap();
        assert_eq!(sweep_incoming(data_dir.path()).unwrap(), 1);
        assert!(being_filled.rootfs().exists());
        drop(being_filled);
        assert_eq!(fs::read_dir(data_dir.path().join("layers")).unwrap().count(), 0);
    }
}
