//! Volumes: storage that sandboxes share and that outlives them, and the places where sandboxes see it.

use super::{ByteSize, VolumeId};
use std::fmt;
use std::str::FromStr;
use time::OffsetDateTime;

/// Longest name; E2B's own bound is not documented.
const NAME_LENGTH_MAX: usize = 128;
/// Longest mount path; the kernel takes 4096 with everything below it.
const PATH_LENGTH_MAX: usize = 1024;
/// What the kernel and the agent have to themselves; nothing may cover it.
const RESERVED: [&str; 4] = ["/proc", "/sys", "/dev", "/run/stillbox"];

/// What was wrong with a name or a path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseVolumeError {
    /// Not a name.
    #[error("'{text}' is no volume name: 1 to {NAME_LENGTH_MAX} characters of A-Z, a-z, 0-9, '_' and '-'")]
    Name {
        /// The text met, shortened.
        text: String,
    },
    /// Not a path that a volume can be mounted at.
    #[error("the mount path '{text}' {wrong}")]
    Path {
        /// The text met, shortened.
        text: String,
        /// Why.
        wrong: String,
    },
}

/// A volume's name: unique in a data folder, never changed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeName(String);

/// Where a sandbox sees a volume: absolute, clean, below nothing that the kernel or the agent needs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MountPath(String);

/// A volume in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VolumeMount {
    /// Which.
    pub volume: VolumeId,
    /// Its name, for display.
    pub name: VolumeName,
    /// Where.
    pub path: MountPath,
}

/// A volume's row. Its folder is `volumes/<id>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeRecord {
    /// Its id.
    pub id: VolumeId,
    /// Its name.
    pub name: VolumeName,
    /// Its size, as `df` shows it inside; file systems keep some of it to themselves.
    pub size: ByteSize,
    /// Made at.
    pub created_at: OffsetDateTime,
}

impl VolumeName {
    /// The name as it stands in rows and on the wire.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl MountPath {
    /// The path as it stands in rows and on the wire.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VolumeName {
    type Err = ParseVolumeError;
    fn from_str(text: &str) -> Result<Self, ParseVolumeError> {
        let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        match (1..=NAME_LENGTH_MAX).contains(&text.len()) && text.bytes().all(is_letter) {
            true => Ok(Self(text.to_owned())),
            false => Err(ParseVolumeError::Name { text: shortened(text) }),
        }
    }
}

impl FromStr for MountPath {
    type Err = ParseVolumeError;
    fn from_str(text: &str) -> Result<Self, ParseVolumeError> {
        match wrong_with(text) {
            None => Ok(Self(text.to_owned())),
            Some(wrong) => Err(ParseVolumeError::Path { text: shortened(text), wrong }),
        }
    }
}

fn wrong_with(path: &str) -> Option<String> {
    let Some(inner) = path.strip_prefix('/') else { return Some("is not absolute".to_owned()) };
    if inner.is_empty() {
        return Some("is the root of everything".to_owned());
    }
    if path.len() > PATH_LENGTH_MAX {
        return Some(format!("is longer than {PATH_LENGTH_MAX} bytes"));
    }
    // CRIU is told of a mount as `mnt[path]:key`.
    if path.contains("]:") || path.contains(char::is_control) {
        return Some("holds control characters or ']:'".to_owned());
    }
    if inner.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Some("is not clean: it has empty, '.' or '..' parts".to_owned());
    }
    let covers = |reserved: &&&str| {
        let below = |path: &str, of: &str| path == of || path.strip_prefix(of).is_some_and(|rest| rest.starts_with('/'));
        below(path, reserved) || below(reserved, path)
    };
    RESERVED.iter().find(covers).map(|reserved| format!("would cover {reserved}, or lie in it"))
}

fn shortened(text: &str) -> String {
    text.chars().take(64).flat_map(char::escape_debug).collect()
}

macro_rules! text {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl TryFrom<String> for $name {
            type Error = ParseVolumeError;
            fn try_from(text: String) -> Result<Self, ParseVolumeError> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }
    )*};
}
text!(VolumeName, MountPath);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_path_is_absolute_and_clean() {
        for good in ["/data", "/mnt/a b", "/home/user/.cache", "/run/other", "/developer"] {
            assert_eq!(good.parse::<MountPath>().unwrap().as_str(), good);
        }
        let why = |path: &str| path.parse::<MountPath>().unwrap_err().to_string();
        assert!(why("data").ends_with("is not absolute"));
        assert!(why("/").ends_with("is the root of everything"));
        for unclean in ["/a/", "//a", "/a//b", "/a/../b", "/./a"] {
            assert!(why(unclean).contains("not clean"), "{unclean}");
        }
        for reserved in ["/proc", "/proc/1", "/dev/shm", "/sys", "/run", "/run/stillbox/x"] {
            assert!(why(reserved).contains("cover"), "{reserved}");
        }
        assert!(why("/a]:b").contains("]:"));
        assert!(why("/a\nb").contains("'/a\\nb'"));
        assert!(why(&format!("/{}", "x".repeat(1024))).contains("1024"));
    }

    #[test]
    fn a_name_is_of_few_letters() {
        assert_eq!("My_data-1".parse::<VolumeName>().unwrap().as_str(), "My_data-1");
        for bad in ["", "a b", "a/b", "ä", &"x".repeat(129)] {
            assert!(bad.parse::<VolumeName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_a_row_holds_is_checked_when_it_is_read() {
        let mount = r#"{"volume":"6f2b8c1e-6d0a-4f0e-9c57-0d6a4d1e2f3a","name":"v","path":"/v"}"#;
        let read: VolumeMount = serde_json::from_str(mount).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), mount);
        assert!(serde_json::from_str::<VolumeMount>(&mount.replace("/v\"", "v\"")).is_err());
    }
}
