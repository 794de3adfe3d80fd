//! Templates: recipes, layers, builds, names and tags.
//!
//! A template is a name for builds; a build is a list of layers and how to start them. Built-in templates come from a
//! recipe ([`bootstrap`]) or an [`archive`]; both end as layers below `data_dir` and rows that [`Templates`] answers from.

mod adopt;
mod allowance;
pub mod archive;
pub mod bootstrap;
pub mod build;
mod catalog;
mod collect;
pub mod dockerfile;
pub mod image;
pub mod layer;
mod layered;
pub mod lease;
mod mirror;
mod name;
pub mod recipe;
mod tags;
pub mod unpack;
mod whiteout;

pub use adopt::{AdoptError, ManifestError};
pub use archive::Manifest;
pub use catalog::{BuiltInError, RemoveError, ResolveError, Resolved, Templates, Visibility};
pub use collect::{CollectError, Thoroughness};
pub use image::ImageSettings;
pub use lease::Lease;
pub use mirror::MirrorError;
pub use recipe::Recipe;
pub use tags::{TagError, Tagged};
pub use unpack::UnpackLimits;

use std::path::PathBuf;

/// Where templates live and come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateConfig {
    /// `data_dir`: layers in `layers/<id>`, manifests in `templates/`.
    pub data_dir: PathBuf,
    /// An archive to take the built-in template that it names from; no network is used then.
    pub archive: Option<PathBuf>,
    /// A Debian mirror for hosts whose apt has none; `None` = the one apt is configured with.
    pub debian_mirror: Option<String>,
    /// A mirror of Debian's security updates; `None` = apt's, where it has one.
    pub debian_security_mirror: Option<String>,
    /// Where finished built-in templates are kept for the next data folder; `None` = nowhere.
    pub cache_dir: Option<PathBuf>,
    /// What an archive or image may unpack to.
    pub limits: UnpackLimits,
    /// Where images come from.
    pub images: ImageSettings,
}

/// In whole microseconds, as the store keeps it: a row reads back as it was written.
fn now() -> time::OffsetDateTime {
    let now = time::OffsetDateTime::now_utc();
    now.replace_microsecond(now.microsecond()).unwrap_or(now)
}
