//! Newtypes for every identifier, so that a build id cannot be paused.

use std::fmt;
use std::str::FromStr;

const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";

/// What was wrong with the text of an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} '{text}' is malformed: {expected}")]
pub struct ParseIdError {
    /// Which identifier was expected, e.g. `sandbox id`.
    pub kind: &'static str,
    /// The text met, shortened to 64 characters.
    pub text: String,
    /// The form that would have been accepted.
    pub expected: &'static str,
}

impl ParseIdError {
    fn new(kind: &'static str, text: &str, expected: &'static str) -> Self {
        Self { kind, text: text.chars().take(64).collect(), expected }
    }
}

/// Maps uniform random bytes to `[a-z0-9]`; bytes that would bias the result are rejected (252 = 7 × 36).
fn random_word<const N: usize>() -> [u8; N] {
    let mut word = [0u8; N];
    let mut filled = 0;
    let mut pool = [0u8; 64];
    while filled < N {
        getrandom::fill(&mut pool).expect("the kernel's random generator always answers on Linux >= 5.19");
        for byte in pool.iter().filter(|byte| **byte < 252) {
            if filled < N {
                word[filled] = ALPHABET[usize::from(byte % 36)];
                filled += 1;
            }
        }
    }
    word
}

fn is_word(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
}

/// A sandbox: `i` and 20 of `[a-z0-9]`, E2B's form (contract/e2b.md 6.1). Unique for the life of the data folder.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SandboxId([u8; 21]);

impl SandboxId {
    /// A new id from the kernel's random generator.
    pub fn random() -> Self {
        let mut id = [b'i'; 21];
        id[1..].copy_from_slice(&random_word::<20>());
        Self(id)
    }

    /// The id as it stands in URLs, cgroup names and rows.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("a sandbox id is ASCII by construction")
    }
}

impl FromStr for SandboxId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let wrong = || ParseIdError::new("sandbox id", text, "'i' and 20 characters of a-z and 0-9");
        let bytes: [u8; 21] = text.as_bytes().try_into().map_err(|_| wrong())?;
        (bytes[0] == b'i' && is_word(text)).then_some(Self(bytes)).ok_or_else(wrong)
    }
}

/// A template, or a snapshot seen as one: 20 of `[a-z0-9]`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TemplateId([u8; 20]);

impl TemplateId {
    /// A new id from the kernel's random generator.
    pub fn random() -> Self {
        Self(random_word())
    }

    /// The id as it stands in URLs and rows.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("a template id is ASCII by construction")
    }
}

impl FromStr for TemplateId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let wrong = || ParseIdError::new("template id", text, "20 characters of a-z and 0-9");
        let bytes: [u8; 20] = text.as_bytes().try_into().map_err(|_| wrong())?;
        is_word(text).then_some(Self(bytes)).ok_or_else(wrong)
    }
}

/// One build of a template: a UUID, as E2B's wire wants it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BuildId(uuid::Uuid);

impl BuildId {
    /// A new id (UUID version 4).
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4())
    }
}

impl FromStr for BuildId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        text.parse().map(Self).map_err(|_| ParseIdError::new("build id", text, "a UUID"))
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A volume: a UUID, as E2B's wire wants it; names the folder `volumes/<id>`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VolumeId(uuid::Uuid);

impl VolumeId {
    /// A new id (UUID version 4).
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4())
    }
}

impl FromStr for VolumeId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        text.parse().map(Self).map_err(|_| ParseIdError::new("volume id", text, "a UUID"))
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A dump on disk: `s` and 20 of `[a-z0-9]`; names the folder `snapshots/<id>`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SnapshotId([u8; 21]);

impl SnapshotId {
    /// A new id from the kernel's random generator.
    pub fn random() -> Self {
        let mut id = [b's'; 21];
        id[1..].copy_from_slice(&random_word::<20>());
        Self(id)
    }

    /// The id as it stands in folders and rows.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("a snapshot id is ASCII by construction")
    }
}

impl FromStr for SnapshotId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let wrong = || ParseIdError::new("snapshot id", text, "'s' and 20 characters of a-z and 0-9");
        let bytes: [u8; 21] = text.as_bytes().try_into().map_err(|_| wrong())?;
        (bytes[0] == b's' && is_word(text)).then_some(Self(bytes)).ok_or_else(wrong)
    }
}

/// A stored secret: `sec_` and 20 of `[a-z0-9]`, E2B's form.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SecretId([u8; 24]);

impl SecretId {
    /// A new id from the kernel's random generator.
    pub fn random() -> Self {
        let mut id = *b"sec_....................";
        id[4..].copy_from_slice(&random_word::<20>());
        Self(id)
    }

    /// The id as it stands in URLs and rows.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("a secret's id is ASCII by construction")
    }
}

impl FromStr for SecretId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let wrong = || ParseIdError::new("secret id", text, "'sec_' and 20 characters of a-z and 0-9");
        let bytes: [u8; 24] = text.as_bytes().try_into().map_err(|_| wrong())?;
        text.strip_prefix("sec_").is_some_and(is_word).then_some(Self(bytes)).ok_or_else(wrong)
    }
}

/// One data folder's mark, 5 of `[a-z0-9]`, in the name of everything that outlives a process: cgroups, nft tables,
/// links, netns pins. Several servers on one machine are told apart by it.
///
/// Five characters, because a link's name (`sb<instance><slot><end>`) must fit in IFNAMSIZ - 1 = 15.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId([u8; 5]);

impl InstanceId {
    /// A new id from the kernel's random generator.
    pub fn random() -> Self {
        Self(random_word())
    }

    /// The mark as it stands in kernel objects' names.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("an instance id is ASCII by construction")
    }
}

impl FromStr for InstanceId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let wrong = || ParseIdError::new("instance id", text, "5 characters of a-z and 0-9");
        let bytes: [u8; 5] = text.as_bytes().try_into().map_err(|_| wrong())?;
        is_word(text).then_some(Self(bytes)).ok_or_else(wrong)
    }
}

macro_rules! text_of_word {
    ($($id:ident),*) => {$(
        impl fmt::Display for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    )*};
}
text_of_word!(SecretId, SandboxId, TemplateId, SnapshotId, InstanceId);

macro_rules! id_everywhere {
    ($($id:ident),*) => {$(
        impl fmt::Debug for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl serde::Serialize for $id {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> serde::Deserialize<'de> for $id {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
id_everywhere!(SecretId, SandboxId, TemplateId, BuildId, VolumeId, SnapshotId, InstanceId);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_random_id_reads_back_as_itself() {
        let id = SandboxId::random();
        assert_eq!(id.to_string().parse(), Ok(id));
        let id = TemplateId::random();
        assert_eq!(id.to_string().parse(), Ok(id));
        let id = SnapshotId::random();
        assert_eq!(id.to_string().parse(), Ok(id));
        let id = InstanceId::random();
        assert_eq!(id.to_string().parse(), Ok(id));
        let id = SecretId::random();
        assert_eq!(id.to_string().parse(), Ok(id));
        let id = BuildId::random();
        assert_eq!(id.to_string().parse(), Ok(id));
        let id = VolumeId::random();
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn a_bad_id_is_named_in_its_error() {
        let error = "I_NOT_AN_ID".parse::<SandboxId>().unwrap_err();
        assert_eq!(error.to_string(), "sandbox id 'I_NOT_AN_ID' is malformed: 'i' and 20 characters of a-z and 0-9");
    }

    proptest! {
        #[test]
        fn only_the_documented_form_is_a_sandbox_id(text in "\\PC{0,30}") {
            let wanted = text.len() == 21 && text.starts_with('i') && is_word(&text);
            prop_assert_eq!(text.parse::<SandboxId>().is_ok(), wanted);
        }
    }
}
