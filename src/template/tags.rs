//! Tags: names for builds of a template, given, moved and taken away.

use super::name::{DEFAULT_TAG, Name, TagList};
use super::{ResolveError, Templates, catalog, now};
use crate::model::{BuildId, TemplateId};
use crate::store::{Db, StoreError, templates};
use time::OffsetDateTime;

/// Why tags were not changed. None of them was.
#[derive(Debug, thiserror::Error)]
pub enum TagError {
    /// The template, the build or a tag's form.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// No tag was named.
    #[error("at least one tag is required")]
    NoTag,
    /// It is what a name without a tag means.
    #[error("cannot delete the '{DEFAULT_TAG}' tag")]
    Default,
    /// Tags to be taken away are named apart.
    #[error("template name '{0}' should not contain a tag; use the 'tags' field instead")]
    TaggedName(String),
}

impl From<StoreError> for TagError {
    fn from(error: StoreError) -> Self {
        Self::Resolve(error.into())
    }
}

/// A tag, where it leads and since when.
pub type Tagged = (String, BuildId, OffsetDateTime);

impl Templates {
    /// Lets tags lead to the build that `target` (`name[:tag]`) leads to; the build, and the tags as they are kept.
    pub async fn assign_tags(&self, target: &str, tags: &[String]) -> Result<(BuildId, Vec<String>), TagError> {
        let (target, tags) = (Name::parse(target)?, TagList::of(tags)?.0);
        if tags.is_empty() {
            return Err(TagError::NoTag);
        }
        self.store().write(move |db| Ok(assign(db, &target, tags, now()))).await?
    }

    /// Takes tags away; those that are not there change nothing.
    pub async fn remove_tags(&self, name: &str, tags: &[String]) -> Result<(), TagError> {
        let (name, tags) = (Name::parse(name)?, TagList::of(tags)?.0);
        if name.has_tag {
            return Err(TagError::TaggedName(name.asked));
        }
        if tags.is_empty() {
            return Err(TagError::NoTag);
        }
        if tags.iter().any(|tag| tag == DEFAULT_TAG) {
            return Err(TagError::Default);
        }
        self.store().write(move |db| Ok(remove(db, &name, &tags, now()))).await?
    }

    /// All tags of a template, oldest first.
    pub async fn tags(&self, template: TemplateId) -> Result<Vec<Tagged>, ResolveError> {
        Ok(self.store().read(move |db| templates::tags_with_times(db, template)).await?)
    }
}

fn assign(db: &Db<'_>, target: &Name, tags: Vec<String>, at: OffsetDateTime) -> Result<(BuildId, Vec<String>), TagError> {
    let resolved = catalog::find(db, target)?;
    for tag in &tags {
        templates::set_tag(db, resolved.template.id, tag, resolved.build.id, at)?;
    }
    Ok((resolved.build.id, tags))
}

fn remove(db: &Db<'_>, name: &Name, tags: &[String], at: OffsetDateTime) -> Result<(), TagError> {
    let template = catalog::find_template(db, name)?;
    for tag in tags {
        templates::remove_tag(db, template.id, tag, at)?;
    }
    Ok(())
}
