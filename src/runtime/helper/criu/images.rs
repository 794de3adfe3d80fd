//! The images of one dump as one restore needs them: the same files, with another uid base.
//!
//! A dump is restored many times at once, each time on a uid range of its own, and the range is written in
//! `userns-*.img`. So each restore gets a folder of hard links with its own version of that file; the dump's folder
//! is never written to.

use protobuf::{CodedInputStream, CodedOutputStream};
use std::io;
use std::path::{Path, PathBuf};

/// The two words at the head of a user namespace image.
const MAGIC: [u8; 8] = [0x19, 0x43, 0x56, 0x54, 0x06, 0x49, 0x47, 0x55];

const FIELD_UID_MAP: u32 = 1;
const FIELD_GID_MAP: u32 = 2;

/// Why images cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImagesError {
    /// Reading the dump or writing the view.
    #[error("cannot prepare CRIU images: {}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not what CRIU writes.
    #[error("{} is not a CRIU user namespace image: {detail}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A dump made without a user namespace is not one of ours.
    #[error("the dump in {} has no user namespace image", path.display())]
    NoUserNamespace {
        /// The dump's folder.
        path: PathBuf,
    },
}

/// The folder `images` in the work folder of one restore. Dropped, it is removed, unless [`ImageView::keep`] was
/// called.
#[derive(Debug)]
pub(crate) struct ImageView {
    folder: PathBuf,
    kept: bool,
    has_connections: bool,
}

impl ImageView {
    /// Makes a view of the dump in `images` on the range that starts at `uid_base`; an earlier one is replaced.
    pub(crate) fn make(images: &Path, work: &Path, uid_base: u32) -> Result<ImageView, ImagesError> {
        let mut view = ImageView { folder: folder_in(work), kept: false, has_connections: false };
        let folder = view.folder.clone();
        remove(&folder).and_then(|()| std::fs::create_dir(&folder)).map_err(|source| ImagesError::File { path: folder.clone(), source })?;
        let mut moved = 0;
        for entry in read_dir(images)? {
            let target = folder.join(entry.file_name());
            if is_userns_image(&entry.file_name()) {
                rewrite(&entry.path(), &target, uid_base)?;
                moved += 1;
            } else {
                view.has_connections |= is_of_a_connection(&entry.file_name());
                link(&entry.path(), &target)?;
            }
        }
        match moved {
            0 => Err(ImagesError::NoUserNamespace { path: images.to_owned() }),
            _ => Ok(view),
        }
    }

    /// The one that was made in this work folder before, and kept.
    pub(crate) fn made(work: &Path) -> Result<ImageView, ImagesError> {
        let mut view = ImageView { folder: folder_in(work), kept: false, has_connections: false };
        view.has_connections = read_dir(&view.folder)?.iter().any(|entry| is_of_a_connection(&entry.file_name()));
        Ok(view)
    }

    /// Where the view is.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether a TCP socket with a peer was dumped, be it within the sandbox.
    pub(crate) fn has_connections(&self) -> bool {
        self.has_connections
    }

    /// Leaves the folder in place: it is for a restore to come, or of a lazy one, which reads from it after this process
    /// has ended and whose filler removes it.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for ImageView {
    fn drop(&mut self) {
        if !self.kept {
            // What stays behind lies in the sandbox's own folder and goes with it.
            let _ = remove(&self.folder);
        }
    }
}

/// Where the view of the restore with this work folder is.
pub(super) fn folder_in(work: &Path) -> PathBuf {
    work.join("images")
}

/// Removes a view; the dump behind it stays.
pub(super) fn remove(folder: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn read_dir(images: &Path) -> Result<Vec<std::fs::DirEntry>, ImagesError> {
    std::fs::read_dir(images).and_then(Iterator::collect).map_err(|source| ImagesError::File { path: images.to_owned(), source })
}

fn is_userns_image(name: &std::ffi::OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with("userns-") && name.ends_with(".img"))
}

/// CRIU writes one for each TCP socket that is neither closed nor a listener.
fn is_of_a_connection(name: &std::ffi::OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with("tcp-stream-"))
}

/// A hard link also keeps the pages of a lazy restore alive when the snapshot is deleted meanwhile; across file
/// systems a symbolic one has to do.
fn link(image: &Path, target: &Path) -> Result<(), ImagesError> {
    match std::fs::hard_link(image, target) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => std::os::unix::fs::symlink(image, target),
        other => other,
    }
    .map_err(|source| ImagesError::File { path: target.to_owned(), source })
}

fn rewrite(image: &Path, target: &Path, uid_base: u32) -> Result<(), ImagesError> {
    let bytes = std::fs::read(image).map_err(|source| ImagesError::File { path: image.to_owned(), source })?;
    let moved = move_ids(&bytes, uid_base).map_err(|error| ImagesError::Malformed { path: image.to_owned(), detail: error.to_string() })?;
    std::fs::write(target, moved).map_err(|source| ImagesError::File { path: target.to_owned(), source })
}

#[derive(Debug, thiserror::Error)]
enum FormatError {
    #[error("it has not the magic words of one")]
    Magic,
    #[error("its length field and its length differ")]
    Length,
    #[error("an extent has no lower_first")]
    NoLowerFirst,
    #[error("the ids do not fit above {0}")]
    Range(u32),
    #[error(transparent)]
    Protobuf(#[from] protobuf::Error),
}

/// The image with all its extents moved together, so that the lowest host id of each map becomes `uid_base`.
fn move_ids(image: &[u8], uid_base: u32) -> Result<Vec<u8>, FormatError> {
    let payload = image.strip_prefix(&MAGIC).ok_or(FormatError::Magic)?;
    let (length, payload) = payload.split_first_chunk::<4>().ok_or(FormatError::Length)?;
    if u32::from_le_bytes(*length) as usize != payload.len() {
        return Err(FormatError::Length);
    }
    let mut extents = decode(payload)?;
    for map in [FIELD_UID_MAP, FIELD_GID_MAP] {
        let lowest = extents.iter().filter(|e| e.map == map).map(|e| e.lower_first).min().unwrap_or(0);
        for extent in extents.iter_mut().filter(|e| e.map == map) {
            extent.lower_first = (extent.lower_first - lowest)
                .checked_add(uid_base)
                .filter(|first| first.checked_add(extent.count).is_some())
                .ok_or(FormatError::Range(uid_base))?;
        }
    }
    encode(&extents)
}

/// `uid_gid_extent` of CRIU's userns.proto, and which of the two maps it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Extent {
    map: u32,
    first: u32,
    lower_first: u32,
    count: u32,
}

fn decode(payload: &[u8]) -> Result<Vec<Extent>, FormatError> {
    let mut input = CodedInputStream::from_bytes(payload);
    let mut extents = Vec::new();
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        let map = tag >> 3;
        let fields = input.read_bytes()?;
        let mut extent = Extent { map, first: 0, lower_first: 0, count: 0 };
        let mut has_lower_first = false;
        let mut fields = CodedInputStream::from_bytes(&fields);
        while let Some(tag) = fields.read_raw_tag_or_eof()? {
            let value = fields.read_uint32()?;
            match tag >> 3 {
                1 => extent.first = value,
                2 => {
                    extent.lower_first = value;
                    has_lower_first = true;
                }
                3 => extent.count = value,
                _ => {}
            }
        }
        if !has_lower_first {
            return Err(FormatError::NoLowerFirst);
        }
        extents.push(extent);
    }
    Ok(extents)
}

fn encode(extents: &[Extent]) -> Result<Vec<u8>, FormatError> {
    let mut payload = Vec::new();
    let mut output = CodedOutputStream::vec(&mut payload);
    for extent in extents {
        let mut fields = Vec::new();
        let mut inner = CodedOutputStream::vec(&mut fields);
        inner.write_uint32(1, extent.first)?;
        inner.write_uint32(2, extent.lower_first)?;
        inner.write_uint32(3, extent.count)?;
        inner.flush()?;
        drop(inner);
        output.write_bytes(extent.map, &fields)?;
    }
    output.flush()?;
    drop(output);
    let length = u32::try_from(payload.len()).map_err(|_| FormatError::Length)?;
    Ok([&MAGIC[..], &length.to_le_bytes(), &payload].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `userns-11.img` as CRIU 4.2.1 wrote it: 0 → 1048576 for 65536 ids, in both maps.
    const REAL: [u8; 36] = [
        0x19, 0x43, 0x56, 0x54, 0x06, 0x49, 0x47, 0x55, 0x18, 0, 0, 0, 0x0a, 0x0a, 0x08, 0, 0x10, 0x80, 0x80, 0x40, 0x18, 0x80, 0x80, 0x04,
        0x12, 0x0a, 0x08, 0, 0x10, 0x80, 0x80, 0x40, 0x18, 0x80, 0x80, 0x04,
    ];

    fn extents_of(image: &[u8]) -> Vec<Extent> {
        decode(&image[12..]).unwrap()
    }

    fn whole_range(map: u32, lower_first: u32) -> Extent {
        Extent { map, first: 0, lower_first, count: 65536 }
    }

    #[test]
    fn a_real_image_moves_to_another_base_and_back_byte_for_byte() {
        let moved = move_ids(&REAL, 1 << 24).unwrap();
        assert_eq!(extents_of(&moved), [whole_range(1, 1 << 24), whole_range(2, 1 << 24)]);
        assert_eq!(move_ids(&moved, 1 << 20).unwrap(), REAL);
    }

    #[test]
    fn a_cut_or_foreign_image_is_refused() {
        assert!(matches!(move_ids(&REAL[..34], 0), Err(FormatError::Length)));
        assert!(matches!(move_ids(b"something else", 0), Err(FormatError::Magic)));
    }

    #[test]
    fn a_view_has_every_image_and_only_the_ids_differ() {
        let (dump, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(dump.path().join("userns-11.img"), REAL).unwrap();
        std::fs::write(dump.path().join("pages-1.img"), b"memory").unwrap();
        ImageView::make(dump.path(), work.path(), 1 << 21).unwrap().keep();
        let view = ImageView::made(work.path()).unwrap();
        assert!(!view.has_connections());
        let folder = view.folder().to_owned();
        assert_eq!(std::fs::read(folder.join("pages-1.img")).unwrap(), b"memory");
        let moved = std::fs::read(folder.join("userns-11.img")).unwrap();
        assert_eq!(extents_of(&moved), [whole_range(1, 1 << 21), whole_range(2, 1 << 21)]);
        assert_eq!(std::fs::read(dump.path().join("userns-11.img")).unwrap(), REAL);
        drop(view);
        assert!(!folder.exists());
        assert_eq!(std::fs::read(dump.path().join("pages-1.img")).unwrap(), b"memory");
    }

    #[test]
    fn a_dump_without_a_user_namespace_is_refused() {
        let (dump, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(dump.path().join("pages-1.img"), b"memory").unwrap();
        let made = ImageView::make(dump.path(), work.path(), 1 << 20);
        assert!(matches!(made, Err(ImagesError::NoUserNamespace { .. })));
        assert!(!folder_in(work.path()).exists());
    }

    prop_compose! {
        fn any_extent()(map in 1..=2_u32, first: u32, lower_first in 0..1_u32 << 30, count in 0..1_u32 << 20) -> Extent {
            Extent { map, first, lower_first, count }
        }
    }

    /// What must not change: everything but the lowest host id of each map.
    fn shape(extents: &[Extent], map: u32) -> Vec<(u32, u32, u32)> {
        let of_map = || extents.iter().filter(|e| e.map == map);
        let lowest = of_map().map(|e| e.lower_first).min().unwrap_or(0);
        of_map().map(|e| (e.first, e.lower_first - lowest, e.count)).collect()
    }

    proptest! {
        #[test]
        fn moving_ids_changes_the_base_and_nothing_else(
            extents in proptest::collection::vec(any_extent(), 0..6),
            base in 0..1_u32 << 30,
        ) {
            let moved = extents_of(&move_ids(&encode(&extents).unwrap(), base).unwrap());
            for map in [FIELD_UID_MAP, FIELD_GID_MAP] {
                prop_assert_eq!(shape(&moved, map), shape(&extents, map));
                let lowest = moved.iter().filter(|e| e.map == map).map(|e| e.lower_first).min();
                prop_assert!(lowest.is_none_or(|lowest| lowest == base));
            }
        }

        #[test]
        fn hostile_bytes_never_panic(bytes: Vec<u8>) {
            let length = u32::try_from(bytes.len()).unwrap().to_le_bytes();
            let _ = move_ids(&[&MAGIC[..], &length, &bytes].concat(), 1 << 20);
        }

        #[test]
        fn ids_beyond_the_last_one_are_refused(count in 1..=u32::MAX) {
            let image = encode(&[Extent { map: FIELD_UID_MAP, first: 0, lower_first: 0, count }]).unwrap();
            prop_assert!(matches!(move_ids(&image, u32::MAX), Err(FormatError::Range(_))));
        }
    }
}
