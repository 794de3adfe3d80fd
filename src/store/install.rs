//! What a data folder is given once: its instance id and the key that tokens are derived from. Files of their own,
//! because a lost database must not change every token, and because the helper reads the id without SQL.

use super::StoreError;
use crate::model::InstanceId;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The identity of a data folder.
#[derive(Clone)]
pub struct Install {
    /// In the name of everything that outlives a process.
    pub instance: InstanceId,
    /// 32 secret bytes.
    pub key: [u8; 32],
}

impl std::fmt::Debug for Install {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Install").field("instance", &self.instance).finish_non_exhaustive()
    }
}

/// Reads `instance-id` and `install.key` below `data_dir`, making each that is missing. Call it under the folder's
/// lock, that is, after [`super::Store::open`].
pub fn read_or_make(data_dir: &Path) -> Result<Install, StoreError> {
    let instance = read_or_write(&data_dir.join("instance-id"), || InstanceId::random().to_string())?;
    let key = read_or_write(&data_dir.join("install.key"), || hex::encode(random_key()))?;
    let instance = instance.trim().parse().map_err(|_| StoreError::Corrupt {
        column: "file instance-id",
        value: instance.chars().take(64).collect(),
        expected: "5 characters of a-z and 0-9",
    })?;
    let mut bytes = [0u8; 32];
    hex::decode_to_slice(key.trim(), &mut bytes).map_err(|_| StoreError::Corrupt {
        column: "file install.key",
        value: "(not shown)".into(),
        expected: "64 hex characters",
    })?;
    Ok(Install { instance, key: bytes })
}

fn random_key() -> [u8; 32] {
    let mut key = [0u8; 32];
    getrandom::fill(&mut key).expect("the kernel's random generator always answers on Linux >= 5.19");
    key
}

fn read_or_write(path: &Path, make: impl FnOnce() -> String) -> Result<String, StoreError> {
    let failed = |source| StoreError::File { file: path.to_owned(), source };
    match fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let text = make();
            write_aside(path, &text).map_err(failed)?;
            Ok(text)
        }
        Err(error) => Err(failed(error)),
    }
}

/// Written aside, synced and renamed: a power cut leaves the whole file or none.
fn write_aside(path: &Path, text: &str) -> std::io::Result<()> {
    let aside = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&aside, path)?;
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_identity_is_made_once_and_readable_by_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let first = read_or_make(dir.path()).unwrap();
        let second = read_or_make(dir.path()).unwrap();
        assert_eq!((first.instance, first.key), (second.instance, second.key));
        for file in ["instance-id", "install.key"] {
            let mode = fs::metadata(dir.path().join(file)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{file}");
        }
    }

    #[test]
    fn a_damaged_key_is_an_error_and_not_a_new_key() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("install.key"), "abc").unwrap();
        let error = read_or_make(dir.path()).unwrap_err();
        assert!(error.to_string().contains("install.key"), "{error}");
    }
}
