//! Archives for COPY steps: uploaded once per template and content, named by the hash that the client computed.
//!
//! `data_dir/uploads/<template>/<hash>`; written aside and renamed, so that what has its name is whole. The hash is the
//! client's own sum over names and contents, not the archive's: it names, it proves nothing. What is in an archive is
//! only looked at inside a build's sandbox.

use super::super::allowance::HostRoom;
use super::plan::is_files_hash;
use crate::model::{ByteSize, TemplateId};
use std::io;
use std::path::{Path, PathBuf};
use tokio::fs::{self, File};
use tokio::io::AsyncWriteExt;

/// Why an archive was not taken. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// Not a hash.
    #[error("'{0}' is no files hash: it has 16 to 128 hexadecimal digits")]
    Hash(String),
    /// More than allowed.
    #[error("the archive is larger than {limit} (build.upload_bytes_max)")]
    TooLarge {
        /// The bound.
        limit: ByteSize,
    },
    /// The disk said no.
    #[error("the archive could not be stored")]
    Io(#[from] io::Error),
}

/// All archives of one data folder.
#[derive(Debug, Clone)]
pub(super) struct Uploads {
    folder: PathBuf,
    bytes_max: ByteSize,
    /// Of the host's disk: `runtime.disk_free_min`.
    free_min: ByteSize,
}

impl Uploads {
    pub(super) fn of(data_dir: &Path, bytes_max: ByteSize, free_min: ByteSize) -> Self {
        Self { folder: data_dir.join("uploads"), bytes_max, free_min }
    }

    /// Where the archive is, or would be.
    pub(super) fn place(&self, template: TemplateId, hash: &str) -> Result<PathBuf, UploadError> {
        if !is_files_hash(hash) {
            return Err(UploadError::Hash(hash.chars().take(64).collect()));
        }
        Ok(self.folder.join(template.as_str()).join(hash.to_ascii_lowercase()))
    }

    /// Begins to take an archive; one that is there already is replaced at the end.
    pub(super) async fn begin(&self, template: TemplateId, hash: &str) -> Result<Upload, UploadError> {
        let place = self.place(template, hash)?;
        let folder = self.folder.join(template.as_str());
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).await?;
        let aside = Aside(folder.join(format!("{}.part", uuid::Uuid::new_v4().simple())));
        let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside.0).await?;
        let room = HostRoom::of(&folder, self.free_min);
        Ok(Upload { file, aside, place, left: self.bytes_max.bytes(), limit: self.bytes_max, room })
    }

    /// Links an archive of one template to another, unless that has it or the first has not.
    pub(super) async fn share(&self, from: TemplateId, to: TemplateId, hash: &str) -> Result<(), UploadError> {
        let (there, here) = (self.place(from, hash)?, self.place(to, hash)?);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(self.folder.join(to.as_str())).await?;
        match fs::hard_link(there, here).await {
            Err(error) if !matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) => Err(error.into()),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Removes all archives of a template.
    pub(super) async fn forget(&self, template: TemplateId) -> io::Result<()> {
        match fs::remove_dir_all(self.folder.join(template.as_str())).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Templates that have a folder here.
    pub(super) async fn templates(&self) -> io::Result<Vec<TemplateId>> {
        let mut entries = match fs::read_dir(&self.folder).await {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut found = Vec::new();
        while let Some(entry) = entries.next_entry().await? {
            found.extend(entry.file_name().to_str().and_then(|name| name.parse::<TemplateId>().ok()));
        }
        Ok(found)
    }
}

/// An archive that is coming in. Dropped before [`Upload::finish`], it leaves nothing.
#[derive(Debug)]
pub struct Upload {
    file: File,
    aside: Aside,
    place: PathBuf,
    left: u64,
    limit: ByteSize,
    room: HostRoom,
}

impl Upload {
    /// The next piece.
    pub async fn write(&mut self, piece: &[u8]) -> Result<(), UploadError> {
        let left = self.left.checked_sub(piece.len() as u64);
        self.left = left.ok_or(UploadError::TooLarge { limit: self.limit })?;
        self.room.take(piece.len() as u64)?;
        Ok(self.file.write_all(piece).await?)
    }

    /// All of it is there.
    pub async fn finish(mut self) -> Result<(), UploadError> {
        self.file.flush().await?;
        self.file.sync_all().await?;
        Ok(fs::rename(&self.aside.0, &self.place).await?)
    }
}

/// A file that goes unless it was renamed.
#[derive(Debug)]
struct Aside(PathBuf);

impl Drop for Aside {
    fn drop(&mut self) {
        // Renamed, it is not there any more.
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_archive_is_there_when_all_of_it_came_and_not_before() {
        let folder = tempfile::tempdir().unwrap();
        let (uploads, template, hash) = (Uploads::of(folder.path(), ByteSize(10), ByteSize(0)), TemplateId::random(), "AB".repeat(32));
        let place = uploads.place(template, &hash).unwrap();
        let mut upload = uploads.begin(template, &hash).await.unwrap();
        upload.write(b"12345").await.unwrap();
        assert!(!place.exists());
        upload.finish().await.unwrap();
        assert_eq!(std::fs::read(&place).unwrap(), b"12345");
        assert_eq!(uploads.templates().await.unwrap(), [template]);
        uploads.forget(template).await.unwrap();
        assert!(!place.exists());
    }

    #[tokio::test]
    async fn what_is_too_large_or_breaks_off_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (uploads, template, hash) = (Uploads::of(folder.path(), ByteSize(10), ByteSize(0)), TemplateId::random(), "ab".repeat(32));
        let mut upload = uploads.begin(template, &hash).await.unwrap();
        upload.write(b"12345").await.unwrap();
        assert!(matches!(upload.write(b"123456").await, Err(UploadError::TooLarge { .. })));
        drop(upload);
        let left = std::fs::read_dir(folder.path().join("uploads").join(template.as_str())).unwrap().count();
        assert_eq!(left, 0);
    }

    #[tokio::test]
    async fn what_is_kept_free_of_the_hosts_disk_is_for_no_archive() {
        let folder = tempfile::tempdir().unwrap();
        let uploads = Uploads::of(folder.path(), ByteSize(10), ByteSize(u64::MAX));
        let mut upload = uploads.begin(TemplateId::random(), &"ab".repeat(32)).await.unwrap();
        let refused = upload.write(b"1").await.unwrap_err();
        assert!(matches!(refused, UploadError::Io(cause) if cause.kind() == io::ErrorKind::StorageFull));
    }

    #[test]
    fn a_hash_leads_nowhere_else() {
        let uploads = Uploads::of(Path::new("/data"), ByteSize(1), ByteSize(0));
        for hash in ["", "..", "../../etc/passwd", "0123456789abcde/", "0123456789abcdef0g"] {
            assert!(matches!(uploads.place(TemplateId::random(), hash), Err(UploadError::Hash(_))), "{hash}");
        }
    }
}
