//! Templates: recipes, layers, builds, names and tags.

use crate::model::{BuildId, BuildRecord, TemplateId, TemplateRecord};
use crate::store::Store;
use std::path::PathBuf;

/// Where templates live and come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateConfig {
    /// `data_dir`: layers in `layers/<id>`.
    pub data_dir: PathBuf,
    /// A Debian mirror for hosts whose apt has none; `None` = the one apt is configured with.
    pub debian_mirror: Option<String>,
}

/// Why a template's name leads nowhere.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// No such id or alias.
    #[error("template '{0}' not found")]
    UnknownTemplate(String),
    /// The template is there, the tag is not.
    #[error("tag '{tag}' does not exist for template '{template}'")]
    UnknownTag {
        /// As asked.
        template: String,
        /// As asked.
        tag: String,
    },
    /// Not of the form `name`, `name:tag`, `team/name[:tag]`.
    #[error("template name '{name}' is malformed: {reason}")]
    Malformed {
        /// As asked, shortened.
        name: String,
        /// The rule it breaks.
        reason: &'static str,
    },
    /// The store failed.
    #[error("the store failed")]
    Store(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A template with the build that a name led to.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// The template.
    pub template: TemplateRecord,
    /// The build.
    pub build: BuildRecord,
}

/// All templates of this data folder. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Templates {}

#[expect(unused_variables, clippy::unused_async, reason = "signatures first; the template room's owner fills them in")]
impl Templates {
    /// Reads what is there; makes nothing.
    pub fn open(config: TemplateConfig, store: Store) -> Self {
        todo!()
    }

    /// The template and build that `name[:tag]`, `team/name[:tag]` or an id names.
    pub async fn resolve(&self, name: &str) -> Result<Resolved, ResolveError> {
        todo!()
    }

    /// All templates, newest first.
    pub async fn list(&self) -> Result<Vec<TemplateRecord>, ResolveError> {
        todo!()
    }

    /// A template with its builds, newest first.
    pub async fn get(&self, id: TemplateId) -> Result<(TemplateRecord, Vec<BuildRecord>), ResolveError> {
        todo!()
    }

    /// One build.
    pub async fn build(&self, id: BuildId) -> Result<BuildRecord, ResolveError> {
        todo!()
    }
}
