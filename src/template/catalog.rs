//! [`Templates`]: which template and build a name leads to, and the rows of the built-in ones.
//!
//! Called by the API for names and lists, and at start for the built-in templates. Rows are the store's; files are made
//! by bootstrap.rs and archive.rs before a row names them.

use super::bootstrap::{self, BootstrapError};
use super::name::{DEFAULT_TAG, Name};
use super::{Manifest, Recipe, TemplateConfig, archive, now, recipe};
use crate::model::{BuildId, BuildRecord, BuildSource, BuildState, TemplateId, TemplateRecord};
use crate::store::{Db, Store, StoreError, sandboxes, templates};
use std::sync::Arc;
use time::OffsetDateTime;

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
    /// The template has no build with this id.
    #[error("Build '{build}' not found")]
    UnknownBuild {
        /// The template.
        template: String,
        /// As asked.
        build: BuildId,
    },
    /// Not of the form of a tag.
    #[error("tag '{tag}' is malformed: {reason}")]
    BadTag {
        /// As asked, shortened.
        tag: String,
        /// The rule it breaks.
        reason: &'static str,
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

impl From<StoreError> for ResolveError {
    fn from(error: StoreError) -> Self {
        Self::Store(Box::new(error))
    }
}

/// Why a template was not removed. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// The name leads nowhere, or the store failed.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// Sandboxes stand on its layers.
    #[error("cannot delete template '{template}' because {sandboxes} running or paused sandboxes use it; kill them first")]
    InUse {
        /// As asked.
        template: String,
        /// How many.
        sandboxes: u64,
    },
}

impl From<StoreError> for RemoveError {
    fn from(error: StoreError) -> Self {
        Self::Resolve(error.into())
    }
}

/// Why a built-in template is not there.
#[derive(Debug, thiserror::Error)]
pub enum BuiltInError {
    /// The recipe, which is part of this binary, is wrong.
    #[error(transparent)]
    Recipe(#[from] super::recipe::RecipeError),
    /// It could not be made.
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    /// The archive could not be used.
    #[error(transparent)]
    Archive(#[from] archive::ArchiveError),
    /// The archive is a good one of another template.
    #[error("the template archive holds '{found}', not '{wanted}'")]
    OtherTemplate {
        /// What it holds.
        found: String,
        /// What is needed.
        wanted: String,
    },
    /// The store failed.
    #[error("the store failed")]
    Store(#[from] StoreError),
    /// The thread that made it panicked.
    #[error("making the template was interrupted")]
    Interrupted(#[source] tokio::task::JoinError),
}

/// Who may use a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visibility {
    /// Everybody.
    Public,
    /// Its team; there is one here.
    Private,
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
pub struct Templates {
    pub(super) config: Arc<TemplateConfig>,
    pub(super) store: Store,
}

impl Templates {
    /// Reads nothing yet and makes nothing.
    pub fn open(config: TemplateConfig, store: Store) -> Self {
        Self { config: Arc::new(config), store }
    }

    /// The built-in template `name`, made if it is not there, with its rows. Takes about a minute on a fresh machine
    /// with a network; `progress` is told what is going on. Dropping the future does not stop what it began.
    pub async fn ensure_built_in(&self, name: &str, progress: fn(&str)) -> Result<Resolved, BuiltInError> {
        let recipe = Recipe::built_in(name)?;
        let config = Arc::clone(&self.config);
        let made = tokio::task::spawn_blocking(move || make(&recipe, &config, progress));
        let manifest = made.await.map_err(BuiltInError::Interrupted)??;
        Ok(self.store.write(move |db| register(db, &manifest, now())).await?)
    }

    /// Every built-in template that is on disk already, with its rows: made by `stillbox template build`, imported, or
    /// made by an earlier server. Makes nothing.
    pub async fn adopt_built_ins(&self) -> Result<Vec<Resolved>, BuiltInError> {
        let mut adopted = Vec::new();
        for name in recipe::built_in_names() {
            let recipe = Recipe::built_in(&name)?;
            let Some(manifest) = bootstrap::finished(&recipe, &self.config.data_dir) else { continue };
            adopted.push(self.store.write(move |db| register(db, &manifest, now())).await?);
        }
        Ok(adopted)
    }

    /// The template and build that `name[:tag]`, `team/name[:tag]` or an id names. There is one team here, so its name
    /// is not looked at.
    pub async fn resolve(&self, name: &str) -> Result<Resolved, ResolveError> {
        let asked = Name::parse(name)?;
        let wanted = asked.clone();
        match self.store.read(move |db| Ok(find(db, &wanted))).await? {
            Err(ResolveError::UnknownTemplate(name)) => self.resolve_new(asked, name).await,
            found => found,
        }
    }

    /// A built-in template that `stillbox template build` has made while this server runs.
    async fn resolve_new(&self, asked: Name, unknown: String) -> Result<Resolved, ResolveError> {
        let recipes = recipe::built_in_names().into_iter().filter_map(|name| Recipe::built_in(&name).ok());
        let mut named = recipes.filter(|recipe| recipe.name == asked.template || recipe.aliases.contains(&asked.template));
        let manifest = named.find_map(|recipe| bootstrap::finished(&recipe, &self.config.data_dir));
        let Some(manifest) = manifest else { return Err(ResolveError::UnknownTemplate(unknown)) };
        self.store.write(move |db| register(db, &manifest, now())).await?;
        self.store.read(move |db| Ok(find(db, &asked))).await?
    }

    /// The template that a name or an id leads to, whether it has a build or not.
    pub async fn find(&self, name: &str) -> Result<TemplateRecord, ResolveError> {
        let asked = Name::parse(name)?;
        self.store.read(move |db| Ok(find_template(db, &asked))).await?
    }

    /// Says whether others may use it; the template as it is then.
    pub async fn set_public(&self, name: &str, public: Visibility) -> Result<TemplateRecord, ResolveError> {
        let asked = Name::parse(name)?;
        self.store.write(move |db| Ok(set_public(db, &asked, public))).await?
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    /// All templates, newest first.
    pub async fn list(&self) -> Result<Vec<TemplateRecord>, ResolveError> {
        Ok(self.store.read(templates::built).await?)
    }

    /// A template with its builds, newest first.
    pub async fn get(&self, id: TemplateId) -> Result<(TemplateRecord, Vec<BuildRecord>), ResolveError> {
        let found = self.store.read(move |db| Ok((templates::by_id(db, id)?, templates::builds_of(db, id)?))).await?;
        match found {
            (Some(template), builds) => Ok((template, builds)),
            (None, _) => Err(ResolveError::UnknownTemplate(id.to_string())),
        }
    }

    /// Removes a template, or a snapshot seen as one, with all its names, tags and builds, whichever tag the name has.
    /// Dumps and layers that nothing else needs are swept later.
    pub async fn remove(&self, name: &str) -> Result<(), RemoveError> {
        let asked = Name::parse(name)?;
        self.store.write(move |db| Ok(remove(db, &asked))).await?
    }

    /// One build.
    pub async fn build(&self, id: BuildId) -> Result<BuildRecord, ResolveError> {
        let found = self.store.read(move |db| templates::build(db, id)).await?;
        found.ok_or_else(|| ResolveError::UnknownTemplate(id.to_string()))
    }
}

/// From the archive where one is given, else from wherever [`bootstrap::ensure`] finds it.
fn make(recipe: &Recipe, config: &TemplateConfig, progress: fn(&str)) -> Result<Manifest, BuiltInError> {
    let Some(file) = &config.archive else { return Ok(bootstrap::ensure(recipe, config, &progress)?) };
    let archive::Imported { manifest, held } = archive::import(file, &config.data_dir, config.limits)?;
    if manifest.name != recipe.name {
        return Err(BuiltInError::OtherTemplate { found: manifest.name, wanted: recipe.name.clone() });
    }
    bootstrap::save(&manifest, &config.data_dir)?;
    drop(held);
    Ok(manifest)
}

/// Rows for what is on disk: a build per origin, the template's name, its default tag. Doing it again changes nothing.
pub(super) fn register(db: &Db<'_>, manifest: &Manifest, now: OffsetDateTime) -> Result<Resolved, StoreError> {
    let existing = templates::id_of_alias(db, &manifest.name)?.map(|id| templates::by_id(db, id)).transpose()?.flatten();
    let template = match existing {
        Some(template) => template,
        None => new_template(db, manifest, now)?,
    };
    add_aliases(db, &template, manifest)?;
    let builds = templates::builds_of(db, template.id)?;
    let build = match builds.into_iter().find(|build| is_of(build, manifest)) {
        Some(build) => build,
        None => new_build(db, template.id, manifest, now)?,
    };
    if template.tags.get(DEFAULT_TAG) != Some(&build.id) {
        templates::set_tag(db, template.id, DEFAULT_TAG, build.id, now)?;
    }
    let template = templates::by_id(db, template.id)?.unwrap_or(template);
    Ok(Resolved { template, build })
}

fn is_of(build: &BuildRecord, manifest: &Manifest) -> bool {
    build.state == BuildState::Ready && build.origin == manifest.origin && build.layers == manifest.layers
}

fn new_template(db: &Db<'_>, manifest: &Manifest, now: OffsetDateTime) -> Result<TemplateRecord, StoreError> {
    let template = TemplateRecord { public: true, ..TemplateRecord::new(TemplateId::random(), vec![manifest.name.clone()], now) };
    templates::insert(db, &template)?;
    Ok(template)
}

/// Names that nobody else's template has.
fn add_aliases(db: &Db<'_>, template: &TemplateRecord, manifest: &Manifest) -> Result<(), StoreError> {
    for alias in &manifest.aliases {
        if templates::id_of_alias(db, alias)?.is_none() {
            templates::add_alias(db, template.id, alias)?;
        }
    }
    Ok(())
}

fn new_build(db: &Db<'_>, template: TemplateId, manifest: &Manifest, now: OffsetDateTime) -> Result<BuildRecord, StoreError> {
    let build = BuildRecord {
        id: BuildId::random(),
        template,
        state: BuildState::Ready,
        layers: manifest.layers.clone(),
        env: manifest.env.clone(),
        user: manifest.user.clone(),
        workdir: manifest.workdir.clone(),
        start_command: manifest.start_command.clone(),
        ready_command: manifest.ready_command.clone(),
        resources: manifest.resources,
        source: BuildSource::Recipe,
        origin: manifest.origin.clone(),
        dump: None,
        created_at: now,
        finished_at: Some(now),
    };
    templates::insert_build(db, &build)?;
    Ok(build)
}

pub(super) fn find_template(db: &Db<'_>, name: &Name) -> Result<TemplateRecord, ResolveError> {
    let by_alias = templates::id_of_alias(db, &name.template)?;
    let id = by_alias.or_else(|| name.template.parse().ok());
    let template = id.map(|id| templates::by_id(db, id)).transpose()?.flatten();
    template.ok_or_else(|| ResolveError::UnknownTemplate(name.asked.clone()))
}

fn set_public(db: &Db<'_>, name: &Name, public: Visibility) -> Result<TemplateRecord, ResolveError> {
    let template = find_template(db, name)?;
    templates::set_public(db, template.id, public == Visibility::Public, now())?;
    find_template(db, name)
}

fn remove(db: &Db<'_>, name: &Name) -> Result<(), RemoveError> {
    let template = find_template(db, name)?;
    match sandboxes::count_live_of(db, template.id)? {
        0 => drop(templates::remove(db, template.id)?),
        sandboxes => return Err(RemoveError::InUse { template: name.asked.clone(), sandboxes }),
    }
    Ok(())
}

pub(super) fn find(db: &Db<'_>, name: &Name) -> Result<Resolved, ResolveError> {
    let template = find_template(db, name)?;
    let unknown_tag = || ResolveError::UnknownTag { template: name.template.clone(), tag: name.tag.clone() };
    // A tag may also be a build's id: E2B's clients name a build that way.
    let tagged = template.tags.get(&name.tag).copied().or_else(|| name.tag.parse().ok());
    let build = templates::build(db, tagged.ok_or_else(unknown_tag)?)?;
    let build = build.filter(|build| build.template == template.id).ok_or_else(unknown_tag)?;
    Ok(Resolved { template, build })
}

#[cfg(test)]
pub(super) mod tests;
