//! Whiteouts: how a layer says that something of the layers below it is gone.
//!
//! In a tar they are empty files with reserved names: `.wh.NAME` takes NAME away, `.wh..wh..opq` all that its folder had
//! below. On disk they have overlayfs' own forms: a character device 0:0, and an attribute of the folder.

use std::ffi::OsStr;
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What every reserved name begins with.
const PREFIX: &str = ".wh.";
/// In a tar: the folder's content of the layers below is gone.
const OPAQUE_NAME: &str = ".wh..wh..opq";
const OPAQUE_ATTRIBUTE: &str = "trusted.overlay.opaque";

/// What a reserved name in a tar says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Mark {
    /// This path of the layers below is gone.
    Gone(PathBuf),
    /// All that this folder has in the layers below is gone.
    Opaque(PathBuf),
    /// aufs' own notes, without a meaning here.
    Note,
}

impl Mark {
    /// What the path says, if its name is a reserved one. A mark that would lead out of its folder is an error.
    pub(super) fn of(path: &Path) -> Result<Option<Self>, &'static str> {
        let Some(name) = path.file_name().map(OsStr::as_bytes) else { return Ok(None) };
        let Some(gone) = name.strip_prefix(PREFIX.as_bytes()) else { return Ok(None) };
        let folder = path.parent().unwrap_or(Path::new(""));
        match gone {
            _ if name == OPAQUE_NAME.as_bytes() => Ok(Some(Self::Opaque(folder.to_owned()))),
            b"" | b"." | b".." => Err("it takes away what has no name"),
            _ if gone.starts_with(PREFIX.as_bytes()) => Ok(Some(Self::Note)),
            _ => Ok(Some(Self::Gone(folder.join(OsStr::from_bytes(gone))))),
        }
    }
}

/// Whether a file of this name could be mistaken for a mark.
pub(super) fn is_reserved(name: &OsStr) -> bool {
    name.as_bytes().starts_with(PREFIX.as_bytes())
}

/// The name under which a tar says that `path` is gone.
pub(super) fn name_of_gone(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(PREFIX);
    name.push(path.file_name().unwrap_or_default());
    path.with_file_name(name)
}

/// The name under which a tar says that `folder` is opaque.
pub(super) fn name_of_opaque(folder: &Path) -> PathBuf {
    folder.join(OPAQUE_NAME)
}

/// Puts a whiteout at `path`, where nothing is.
pub(super) fn make_gone(path: &Path) -> io::Result<()> {
    use nix::sys::stat::{Mode, SFlag, mknod};
    mknod(path, SFlag::S_IFCHR, Mode::empty(), 0).map_err(io::Error::from)
}

/// Hides what the folder has in the layers below.
pub(super) fn make_opaque(folder: &Path) -> io::Result<()> {
    xattr::set(folder, OPAQUE_ATTRIBUTE, b"y")
}

/// Whether this is a whiteout on disk.
pub(super) fn is_gone(metadata: &Metadata) -> bool {
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

/// Whether the folder hides what is below it.
pub(super) fn is_opaque(folder: &Path) -> io::Result<bool> {
    match xattr::get(folder, OPAQUE_ATTRIBUTE) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(false),
        value => Ok(value?.is_some_and(|value| value == b"y")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(path: &str) -> Result<Option<Mark>, &'static str> {
        Mark::of(Path::new(path))
    }

    #[test]
    fn reserved_names_are_read_as_what_they_take_away() {
        assert_eq!(mark("etc/.wh.motd"), Ok(Some(Mark::Gone("etc/motd".into()))));
        assert_eq!(mark(".wh.opt"), Ok(Some(Mark::Gone("opt".into()))));
        assert_eq!(mark("var/.wh..wh..opq"), Ok(Some(Mark::Opaque("var".into()))));
        assert_eq!(mark("var/.wh..wh.plnk"), Ok(Some(Mark::Note)));
        assert_eq!(mark("etc/motd"), Ok(None));
        assert_eq!(name_of_gone(Path::new("etc/motd")), Path::new("etc/.wh.motd"));
        assert_eq!(name_of_opaque(Path::new("")), Path::new(".wh..wh..opq"));
    }

    #[test]
    fn a_mark_cannot_lead_out_of_its_folder() {
        for path in ["etc/.wh.", "etc/.wh..", "etc/.wh..."] {
            assert_eq!(mark(path), Err("it takes away what has no name"), "{path}");
        }
    }
}
