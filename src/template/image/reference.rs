//! Names of images, as people write them: `ubuntu:22.04`, `ghcr.io/owner/name@sha256:…`, `localhost:5000/base`.

use std::fmt;
use std::str::FromStr;

/// The registry that is meant when a name has none.
const DEFAULT_REGISTRY: &str = "docker.io";
/// The tag that is meant when a name has neither tag nor digest.
const DEFAULT_TAG: &str = "latest";
/// Registries' own bound on a repository's name.
const NAME_LENGTH_MAX: usize = 255;

/// Why a text is no image's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{name}' is no image's name: {problem}")]
pub struct ReferenceError {
    /// The text, shortened.
    name: String,
    /// The rule it breaks.
    problem: &'static str,
}

/// A SHA-256 in the spelling of registries, checked.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// `sha256:` and the hex digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The hex digits.
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }

    /// Enough of it for a progress line.
    pub fn short(&self) -> &str {
        &self.hex()[..12]
    }

    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self::from_hash(sha2::Sha256::digest(bytes).as_slice())
    }

    /// From a finished hash of 32 bytes.
    pub(super) fn from_hash(hash: &[u8]) -> Self {
        Self(format!("sha256:{}", hex::encode(hash)))
    }
}

impl TryFrom<String> for Digest {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Self, &'static str> {
        let is_hex = |hex: &str| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        match text.strip_prefix("sha256:") {
            Some(hex) if is_hex(hex) => Ok(Self(text)),
            _ => Err("a digest is 'sha256:' and 64 hex digits"),
        }
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An image's name in full. Shown with registry and tag: `docker.io/library/ubuntu:22.04`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    /// Host, with its port if there is one.
    pub registry: String,
    /// Path below the registry.
    pub repository: String,
    /// Tag and digest; with a digest the tag is for people only.
    pub tag: Option<String>,
    /// Content asked for by its digest.
    pub digest: Option<Digest>,
}

impl Reference {
    /// What registries are asked for: the digest, else the tag.
    pub fn target(&self) -> &str {
        match &self.digest {
            Some(digest) => digest.as_str(),
            None => self.tag.as_deref().unwrap_or(DEFAULT_TAG),
        }
    }

    /// Registry and repository without tag and digest.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The name as its author would write it: what everybody leaves out is left out.
    pub fn familiar(&self) -> String {
        let full = self.to_string();
        let short = full.strip_prefix("docker.io/").unwrap_or(&full);
        short.strip_prefix("library/").unwrap_or(short).to_owned()
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let wrong = |problem| ReferenceError { name: text.chars().take(NAME_LENGTH_MAX).collect(), problem };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(Digest::try_from(digest.to_owned()).map_err(wrong)?)),
            None => (text, None),
        };
        let (path, tag) = match rest.rsplit_once(':') {
            // A colon before a slash is a port's.
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
            _ => (rest, None),
        };
        let (registry, repository) = match path.split_once('/') {
            Some((host, repository)) if is_host(host) => (host, repository.to_owned()),
            Some(_) => (DEFAULT_REGISTRY, path.to_owned()),
            None => (DEFAULT_REGISTRY, format!("library/{path}")),
        };
        let registry = match registry {
            "index.docker.io" | "registry-1.docker.io" => DEFAULT_REGISTRY,
            other => other,
        };
        let is_host_byte = |b: u8| b.is_ascii_alphanumeric() || b"-.:[]".contains(&b);
        if registry.starts_with(['.', '-', ':']) || registry.contains("..") || !registry.bytes().all(is_host_byte) {
            return Err(wrong("its registry is no host name"));
        }
        if repository.len() > NAME_LENGTH_MAX || !repository.split('/').all(is_path_part) {
            return Err(wrong("a repository has parts of lower-case letters, digits, '.', '_' and '-', joined by '/'"));
        }
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(wrong("a tag has up to 128 letters, digits, '_', '.' and '-', and does not begin with '.' or '-'"));
        }
        let tag = tag.map(str::to_owned).or_else(|| digest.is_none().then(|| DEFAULT_TAG.to_owned()));
        Ok(Self { registry: registry.to_ascii_lowercase(), repository, tag, digest })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

/// Docker's rule for telling a registry from a first folder.
fn is_host(part: &str) -> bool {
    part == "localhost" || part.contains(['.', ':'])
}

fn is_path_part(part: &str) -> bool {
    let is_inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
    let is_edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let bytes = part.as_bytes();
    is_edge(bytes.first()) && is_edge(bytes.last()) && bytes.iter().all(|b| is_inner(*b))
}

fn is_tag(tag: &str) -> bool {
    let is_inner = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
    !tag.is_empty() && tag.len() <= 128 && !tag.starts_with(['.', '-']) && tag.bytes().all(is_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(text: &str) -> String {
        text.parse::<Reference>().unwrap().to_string()
    }

    #[test]
    fn what_people_leave_out_is_filled_in_as_docker_does() {
        let digest = format!("sha256:{}", "a".repeat(64));
        assert_eq!(full("ubuntu:22.04"), "docker.io/library/ubuntu:22.04");
        assert_eq!(full("e2bdev/base"), "docker.io/e2bdev/base:latest");
        assert_eq!(full("localhost:5000/a/b"), "localhost:5000/a/b:latest");
        assert_eq!(full("index.docker.io/library/ubuntu"), "docker.io/library/ubuntu:latest");
        assert_eq!(full(&format!("ghcr.io/o/n@{digest}")), format!("ghcr.io/o/n@{digest}"));
        assert_eq!(full(&format!("python:3.12@{digest}")), format!("docker.io/library/python:3.12@{digest}"));
        for familiar in ["ubuntu:22.04", "e2bdev/base:latest", "ghcr.io/o/n:v1"] {
            assert_eq!(familiar.parse::<Reference>().unwrap().familiar(), familiar);
        }
    }

    #[test]
    fn what_could_become_another_request_is_no_name() {
        for text in
            ["", ":", "a b", "../etc", "a/../b", "a//b", "Ubuntu", "ubuntu:", "ubuntu:-x", "a?b", "evil.example\\x/y", "u@sha256:12"]
        {
            assert!(text.parse::<Reference>().is_err(), "{text:?}");
        }
    }
}
