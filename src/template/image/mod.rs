//! Bases from images: out of registries, OCI layouts and `docker save` archives, into layers of ours.
//!
//! ```text
//! name ─> alias? ─> template, archive, other image          (template.image_aliases)
//!      └> imported earlier? ─> its record                    (records.rs)
//!      └> registry: mirrors, itself ─> manifest ─> configuration, layers    (registry.rs, pull.rs)
//! layer's blob ─> digest ─> decompress ─> diff id ─> unpack ─> layers/<id>  (blob.rs)
//! ```
//!
//! The build driver (build/) calls [`resolve`] once per build and knows nothing of registries. Layers come out in the form
//! of layer.rs: unpacked in `layers/<id>`, whiteouts as overlayfs has them, ids from 0. Whatever a registry or an archive
//! says is hostile: every size is bounded, every digest is compared, nothing is used before.

mod auth;
mod aws;
mod blob;
mod document;
mod local;
mod pull;
mod records;
mod reference;
mod registry;

pub use auth::Credentials;
pub(super) use blob::sweep_notes;
pub use local::import;
pub use records::{Record, records, remove_record};
pub use reference::{Digest, Reference, ReferenceError};
pub use registry::{RegistryError, TransportError};

use super::TemplateConfig;
use super::layer::LayerError;
use super::lease::Lease;
use super::unpack::UnpackError;
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Where images come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSettings {
    /// What is meant by an image's name on this machine. A name without a tag stands for all of its tags.
    pub aliases: BTreeMap<String, Alias>,
    /// Registry (as in names) to the base addresses that are asked before it.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// Registries that are spoken to without TLS: `host` or `host:port`.
    pub plain_http: Vec<String>,
    /// A `config.json` of docker's, podman's or skopeo's login, for pulls that bring no credentials of their own.
    pub auth_file: Option<PathBuf>,
    /// How long all of one pull may take.
    pub pull_time_max: Duration,
    /// How long a pulled image that no template stands on is kept for the next build.
    pub kept: Duration,
}

impl Default for ImageSettings {
    /// E2B's base image is what our base template stands in for.
    fn default() -> Self {
        Self {
            aliases: BTreeMap::from([("e2bdev/base".to_owned(), Alias::Template("base".to_owned()))]),
            mirrors: BTreeMap::new(),
            plain_http: Vec::new(),
            auth_file: None,
            pull_time_max: Duration::from_secs(30 * 60),
            kept: Duration::from_secs(7 * 24 * 3600),
        }
    }
}

/// What an image's name leads to on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Alias {
    /// A template of this server, by `name[:tag]`.
    Template(String),
    /// An OCI layout (folder or tar) or a `docker save` archive.
    Archive(PathBuf),
    /// Another image.
    Image(Reference),
}

/// An image that a build stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRequest {
    /// As the user wrote it: `ubuntu:22.04`, `ghcr.io/a/b@sha256:…`.
    pub reference: String,
    /// Given with the build, for its registry and no other; `None` = what the login file has for it.
    pub credentials: Option<Credentials>,
}

/// What an image turned out to be. All its layers are in `layers/` and complete.
#[derive(Debug, Clone)]
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
    /// Keep the layers until a row names them.
    pub held: Arc<Vec<Lease>>,
}

/// Why there is no base. Layers that were complete stay for the next try.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A template stands in for it on this machine ([`template_for`]).
    #[error("image {image} is template {template} on this machine; build from that (fromTemplate)")]
    IsTemplate {
        /// As asked.
        image: String,
        /// The template's name.
        template: String,
    },
    /// The name is none.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// Nobody answers.
    #[error(
        "cannot get image {image}: registry {registry} cannot be reached from this machine; without a network, name an archive or \
         a template for it under template.image_aliases, or bring it with `stillbox template import`"
    )]
    Unreachable {
        /// As asked.
        image: String,
        /// Its registry.
        registry: String,
        /// The transport's word.
        #[source]
        source: TransportError,
    },
    /// The registry says no.
    #[error("registry {registry} does not give image {image} to these credentials ({status}): it does not exist or needs others")]
    Denied {
        /// As asked.
        image: String,
        /// Its registry.
        registry: String,
        /// HTTP status.
        status: u16,
    },
    /// The registry has no such image.
    #[error("registry {registry} has no image {image}")]
    NotFound {
        /// As asked.
        image: String,
        /// Its registry.
        registry: String,
    },
    /// It is there and cannot be used.
    #[error("image {image} cannot be used")]
    Unusable {
        /// As asked.
        image: String,
        /// Why.
        #[source]
        problem: ImageProblem,
    },
    /// The caller does not want it any more, or the thread that pulled it is gone.
    #[error("the pull of image {image} was cancelled")]
    Cancelled {
        /// As asked.
        image: String,
    },
}

/// What is wrong with an image, or with getting it.
#[derive(Debug, thiserror::Error)]
pub enum ImageProblem {
    /// A document is no JSON, or lacks a field.
    #[error("its {what} cannot be read")]
    Document {
        /// Which.
        what: &'static str,
        /// Where.
        #[source]
        source: serde_json::Error,
    },
    /// Well-formed, and not for us.
    #[error("{0}")]
    Unsupported(String),
    /// Content is not what its name says.
    #[error("{what} should be {expected} and is {found}; it is damaged or was changed")]
    Mismatch {
        /// Which content.
        what: String,
        /// What names it.
        expected: Digest,
        /// What it is.
        found: Digest,
    },
    /// A layer's tar was refused.
    #[error("layer {layer} is refused")]
    Unpack {
        /// Its digest.
        layer: Digest,
        /// Names the entry.
        source: UnpackError,
    },
    /// A layer could not be stored.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// A file of this machine could not be read or written.
    #[error("could not {doing} {}", path.display())]
    File {
        /// The verb.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// A file that holds no image.
    #[error("{} is neither an OCI layout nor a docker save archive: {problem}", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// What was expected.
        problem: String,
    },
    /// The registry could not be asked, or said no.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The caller does not want it any more.
    #[error("it was cancelled")]
    Cancelled,
}

/// Told what is going on, a line at a time, from any thread: it goes into the build's log.
pub type Progress<'a> = &'a (dyn Fn(&str) + Send + Sync);

/// Everything that a pull needs besides the image's name.
pub(super) struct Context<'a> {
    pub(super) config: &'a TemplateConfig,
    pub(super) progress: Progress<'a>,
    /// Set when nobody waits any more.
    pub(super) stop: &'a AtomicBool,
}

impl Context<'_> {
    fn check(&self) -> Result<(), ImageProblem> {
        if self.stop.load(Ordering::Relaxed) { Err(ImageProblem::Cancelled) } else { Ok(()) }
    }
}

/// The template that stands in for the image on this machine, if one does.
pub fn template_for(config: &TemplateConfig, request: &ImageRequest) -> Option<String> {
    let reference: Reference = request.reference.trim().parse().ok()?;
    match config.images.alias_of(&reference)? {
        Alias::Template(name) => Some(name.clone()),
        Alias::Archive(_) | Alias::Image(_) => None,
    }
}

/// The image as layers on this machine, pulled unless they are there. Dropping the future stops what is under way; what
/// is complete stays for the next call.
pub async fn resolve(request: &ImageRequest, config: &TemplateConfig, progress: Progress<'_>) -> Result<ImageBase, ImageError> {
    let (request, config) = (request.clone(), config.clone());
    let image = request.reference.clone();
    let stop = StopOnDrop(Arc::new(AtomicBool::new(false)));
    let (say, mut said) = tokio::sync::mpsc::unbounded_channel::<String>();
    let stopped = Arc::clone(&stop.0);
    let work = tokio::task::spawn_blocking(move || {
        // Nobody listens any more when the caller is gone.
        let progress = |line: &str| drop(say.send(line.to_owned()));
        resolve_now(&config, &request, &progress, &stopped)
    });
    while let Some(line) = said.recv().await {
        progress(&line);
    }
    work.await.unwrap_or(Err(ImageError::Cancelled { image }))
}

/// Tells the pulling thread that nobody waits.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// [`resolve`], blocking.
fn resolve_now(
    config: &TemplateConfig,
    request: &ImageRequest,
    progress: Progress<'_>,
    stop: &AtomicBool,
) -> Result<ImageBase, ImageError> {
    let context = Context { config, progress, stop };
    let asked: Reference = request.reference.trim().parse()?;
    let image = asked.familiar();
    let reference = match config.images.alias_of(&asked) {
        Some(Alias::Template(template)) => return Err(ImageError::IsTemplate { image, template: template.clone() }),
        Some(Alias::Archive(path)) => {
            progress(&format!("{image} is {} on this machine", path.display()));
            return local::open(&context, path, Some(&asked)).map_err(|problem| explained(problem, &asked));
        }
        Some(Alias::Image(other)) => {
            progress(&format!("{image} is {} on this machine", other.familiar()));
            other.clone()
        }
        None => asked,
    };
    let base = match records::imported(&context, &reference) {
        Ok(Some(base)) => Ok(base),
        Ok(None) => pull::pull(&context, &reference, request),
        Err(problem) => Err(problem),
    };
    base.map_err(|problem| explained(problem, &reference))
}

impl ImageSettings {
    /// The name itself first, then the name for all tags.
    fn alias_of(&self, reference: &Reference) -> Option<&Alias> {
        let spelled = |text: &str, wanted: &str| text.parse::<Reference>().is_ok_and(|alias| alias.to_string() == wanted);
        let names_tag = |text: &str| text.rsplit('/').next().is_some_and(|last| last.contains([':', '@']));
        let exact = self.aliases.iter().find(|(text, _)| spelled(text, &reference.to_string()));
        let general = || {
            let name = reference.name();
            self.aliases.iter().find(|(text, _)| !names_tag(text) && text.parse::<Reference>().is_ok_and(|alias| alias.name() == name))
        };
        exact.or_else(general).map(|(_, alias)| alias)
    }
}

fn explained(problem: ImageProblem, reference: &Reference) -> ImageError {
    let (image, registry) = (reference.familiar(), reference.registry.clone());
    match problem {
        ImageProblem::Registry(RegistryError::Transport(source)) => ImageError::Unreachable { image, registry, source },
        ImageProblem::Registry(RegistryError::Denied { status }) => ImageError::Denied { image, registry, status },
        ImageProblem::Registry(RegistryError::NotFound) => ImageError::NotFound { image, registry },
        ImageProblem::Cancelled => ImageError::Cancelled { image },
        problem => ImageError::Unusable { image, problem },
    }
}

#[cfg(test)]
mod tests;
