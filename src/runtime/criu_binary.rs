//! The CRIU executables below `data_dir/criu/<sha256>/criu`: this build's own, or the one that the configuration
//! names, and those of earlier builds that dumps still need.
//!
//! A dump is restored by the CRIU that wrote it, so each is kept under its hash for as long as a row refers to it,
//! a configured one as well: the package manager may replace that any day.

use sha2::{Digest, Sha256};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

/// Before this, kernels from about 6.16 on make every dump of a socket fail.
const VERSION_MIN: Version = Version { major: 4, minor: 2, patch: 0 };

/// A program inside this binary.
struct Embedded {
    bytes: &'static [u8],
    sha256: &'static str,
}

static EMBEDDED: Option<Embedded> = include!(concat!(env!("OUT_DIR"), "/embedded_criu.rs"));

/// A CRIU that is there, runs, and is new enough.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CriuBinary {
    /// The executable in `data_dir/criu/<sha256>`.
    pub path: PathBuf,
    /// Its content address (hex).
    pub sha256: String,
    /// What it says of itself.
    pub version: Version,
    /// Which of our changes are in it, as in its `GitID`; `None` for one that others built.
    pub changes: Option<String>,
}

/// A CRIU version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 4 of 4.2.1.
    pub major: u32,
    /// 2 of 4.2.1.
    pub minor: u32,
    /// 1 of 4.2.1.
    pub patch: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// Why there is no usable CRIU.
#[derive(Debug, thiserror::Error)]
pub enum CriuBinaryError {
    /// Built without one, and none is configured.
    #[error("this build carries no CRIU; build it in with `make criu build`, or install CRIU >= {VERSION_MIN} and set runtime.criu")]
    NotEmbedded,
    /// The configured one, or the data directory, cannot be read or written.
    #[error("cannot use {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It does not run, or is something else.
    #[error("{} does not tell a CRIU version: {detail}", path.display())]
    NotCriu {
        /// The file.
        path: PathBuf,
        /// What it said instead.
        detail: String,
    },
    /// Older than what works.
    #[error("{} is CRIU {found}; {VERSION_MIN} or newer is needed: leave runtime.criu empty to use the built-in one", path.display())]
    TooOld {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: Version,
    },
}

/// Puts this build's CRIU, or the one at `configured`, into the data directory and tries it. Done once at start;
/// repeated, it finds what is there. Blocks for some milliseconds.
pub fn install(data_dir: &Path, configured: Option<&Path>) -> Result<CriuBinary, CriuBinaryError> {
    let path = match configured {
        Some(path) => {
            let bytes = std::fs::read(path).map_err(|source| file_error(path, source))?;
            // Tried where it is first: the error should name the file that the reader knows.
            ask_version(path)?;
            keep(data_dir, &bytes, &hash_of(&bytes))?
        }
        None => {
            let embedded = EMBEDDED.as_ref().ok_or(CriuBinaryError::NotEmbedded)?;
            keep(data_dir, embedded.bytes, embedded.sha256)?
        }
    };
    let (version, changes) = ask_version(&path)?;
    let sha256 = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
    Ok(CriuBinary { path, sha256, version, changes })
}

/// Where the CRIU with this hash is kept, if it is.
pub fn kept(data_dir: &Path, sha256: &str) -> Option<PathBuf> {
    Some(place(data_dir, sha256)).filter(|path| path.is_file())
}

fn place(data_dir: &Path, sha256: &str) -> PathBuf {
    data_dir.join("criu").join(sha256).join("criu")
}

fn hash_of(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn file_error(path: &Path, source: io::Error) -> CriuBinaryError {
    CriuBinaryError::File { path: path.to_owned(), source }
}

/// Written aside and renamed; a file that is there is believed only if its content has its name's hash.
fn keep(data_dir: &Path, bytes: &[u8], sha256: &str) -> Result<PathBuf, CriuBinaryError> {
    let path = place(data_dir, sha256);
    if std::fs::read(&path).is_ok_and(|found| hash_of(&found) == sha256) {
        return Ok(path);
    }
    let folder = data_dir.join("criu").join(sha256);
    write_aside(&folder, &path, bytes).map_err(|source| file_error(&path, source))?;
    Ok(path)
}

fn write_aside(folder: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let aside = folder.join(format!("criu.tmp.{}", std::process::id()));
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o700).open(&aside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    drop(file);
    std::fs::rename(&aside, path)
}

fn ask_version(path: &Path) -> Result<(Version, Option<String>), CriuBinaryError> {
    let said = run_version(path).map_err(|source| file_error(path, source))?;
    let text = String::from_utf8_lossy(&said.stdout);
    let Some(told) = parse_version(&text) else {
        let detail = format!("{} {}", text.trim(), String::from_utf8_lossy(&said.stderr).trim());
        return Err(CriuBinaryError::NotCriu { path: path.to_owned(), detail: detail.chars().take(200).collect() });
    };
    match told.0 >= VERSION_MIN {
        true => Ok(told),
        false => Err(CriuBinaryError::TooOld { path: path.to_owned(), found: told.0 }),
    }
}

/// A file that was just written is "busy" for as long as a child, forked meanwhile by another thread, still has the
/// descriptor that it was written through: until that child's exec.
fn run_version(path: &Path) -> io::Result<Output> {
    let mut tries_left = 100;
    loop {
        match Command::new(path).arg("--version").env_clear().output() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && tries_left > 0 => {
                tries_left -= 1;
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// `Version: 4.2.1` and perhaps `GitID: stillbox-0001+0002`.
fn parse_version(text: &str) -> Option<(Version, Option<String>)> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let mut numbers = field("Version:")?.split('.').map(|part| part.parse::<u32>().ok());
    let version = Version { major: numbers.next()??, minor: numbers.next().unwrap_or(Some(0))?, patch: numbers.next().unwrap_or(Some(0))? };
    let changes = field("GitID:").and_then(|id| id.strip_prefix("stillbox-")).map(str::to_owned);
    Some((version, changes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn fake_criu(folder: &Path, says: &str) -> PathBuf {
        let path = folder.join("criu");
        std::fs::write(&path, format!("#!/bin/sh\necho '{says}'\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn versions_are_read_and_ordered() {
        let (version, changes) = parse_version("Version: 4.2.1\nGitID: stillbox-0001+0002\n").unwrap();
        assert_eq!((version.to_string().as_str(), changes.as_deref()), ("4.2.1", Some("0001+0002")));
        assert_eq!(parse_version("Version: 4.2\nGitID: v4.2-12-gabc\n").unwrap().1, None);
        assert!(parse_version("Version: 4.1.1").unwrap().0 < VERSION_MIN);
        assert!(parse_version("Version: 4.10").unwrap().0 > VERSION_MIN);
        assert!(parse_version("Version: many").is_none());
    }

    #[test]
    fn a_configured_criu_is_kept_under_its_hash_and_a_damaged_copy_is_replaced() {
        let (elsewhere, data_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let configured = fake_criu(elsewhere.path(), "Version: 4.3");
        let first = install(data_dir.path(), Some(&configured)).unwrap();
        assert_eq!(kept(data_dir.path(), &first.sha256), Some(first.path.clone()));
        std::fs::write(&first.path, "damaged").unwrap();
        assert_eq!(install(data_dir.path(), Some(&configured)).unwrap(), first);
        assert_eq!(std::fs::read(&first.path).unwrap(), std::fs::read(&configured).unwrap());
        let mode = std::fs::metadata(first.path.parent().unwrap()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn an_old_missing_or_foreign_configured_criu_is_refused_by_name() {
        let (elsewhere, data_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let configured = fake_criu(elsewhere.path(), "Version: 4.1.1");
        let refused = install(data_dir.path(), Some(&configured)).unwrap_err().to_string();
        assert!(refused.contains("is CRIU 4.1.1; 4.2.0 or newer"), "{refused}");
        let configured = fake_criu(elsewhere.path(), "hello");
        assert!(matches!(install(data_dir.path(), Some(&configured)), Err(CriuBinaryError::NotCriu { .. })));
        let nothing = elsewhere.path().join("nothing");
        assert!(matches!(install(data_dir.path(), Some(&nothing)), Err(CriuBinaryError::File { .. })));
    }

    #[test]
    fn the_built_in_criu_is_the_file_whose_hash_it_claims_and_runs() {
        let data_dir = tempfile::tempdir().unwrap();
        match (&EMBEDDED, install(data_dir.path(), None)) {
            (Some(embedded), installed) => {
                assert_eq!(hash_of(embedded.bytes), embedded.sha256);
                assert!(installed.unwrap().version >= VERSION_MIN);
            }
            (None, installed) => assert!(matches!(installed, Err(CriuBinaryError::NotEmbedded))),
        }
    }
}
