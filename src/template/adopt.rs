//! Templates that travel: what a finished one is made of, and taking over one that came from elsewhere.

use super::catalog::{ResolveError, Resolved, Templates, register};
use super::lease::Lease;
use super::name::Name;
use super::{Manifest, layer, now};
use crate::model::{BuildRecord, BuildSource, BuildState};
use crate::store::StoreError;
use std::io;

/// Why a template was not taken over. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// Its name is none.
    #[error(transparent)]
    Name(#[from] ResolveError),
    /// A layer is not in this data folder.
    #[error("layer {0} is not in this server's data folder; import the archive with the same --data-dir")]
    NoLayer(String),
    /// A layer cannot be held.
    #[error("layer {id} cannot be held")]
    Hold {
        /// Its id.
        id: String,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The thread that looked for the layers panicked.
    #[error("looking for the layers was interrupted")]
    Interrupted(#[source] tokio::task::JoinError),
}

/// Why a template cannot be written to an archive.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The name leads nowhere.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// There is nothing to write yet.
    #[error("template '{0}' has no finished build")]
    Unfinished(String),
    /// Its memory belongs to this machine.
    #[error("'{0}' is a snapshot of a sandbox, which cannot leave its machine")]
    Snapshot(String),
}

impl Templates {
    /// All of a template but its layers' files.
    pub async fn manifest_of(&self, name: &str) -> Result<Manifest, ManifestError> {
        let Resolved { template, build } = self.resolve(name).await?;
        match (build.source, build.state) {
            (BuildSource::Sandbox(_), _) => Err(ManifestError::Snapshot(name.to_owned())),
            (BuildSource::Recipe, BuildState::Ready) => {
                let mut names = template.aliases.into_iter();
                let name = names.next().unwrap_or_else(|| template.id.to_string());
                Ok(Manifest::of_build(name, names.collect(), build))
            }
            (BuildSource::Recipe, BuildState::Waiting | BuildState::Building | BuildState::Error) => {
                Err(ManifestError::Unfinished(name.to_owned()))
            }
        }
    }

    /// Makes a template of layers that are there: a build per origin, the name, its default tag.
    pub async fn adopt(&self, manifest: Manifest) -> Result<Resolved, AdoptError> {
        Name::parse(&manifest.name)?;
        let (data_dir, layers) = (self.config.data_dir.clone(), manifest.layers.clone());
        let hold = move || -> Result<Vec<Lease>, AdoptError> {
            let held = |id: &String| {
                // An id becomes a folder's name.
                let known = Some(id).filter(|id| layer::is_id(id)).map(|id| Lease::take(&data_dir, id)).transpose();
                let known = known.map_err(|source| AdoptError::Hold { id: id.clone(), source })?.flatten();
                known.ok_or_else(|| AdoptError::NoLayer(id.chars().take(64).collect()))
            };
            layers.iter().map(held).collect()
        };
        let held = tokio::task::spawn_blocking(hold).await.map_err(AdoptError::Interrupted)??;
        let registered = self.store.write(move |db| register(db, &manifest, now())).await?;
        drop(held);
        Ok(registered)
    }
}

impl Manifest {
    fn of_build(name: String, aliases: Vec<String>, build: BuildRecord) -> Self {
        Self {
            format: super::archive::FORMAT,
            description: format!("exported from build {}", build.id),
            name,
            aliases,
            origin: build.origin,
            layers: build.layers,
            user: build.user,
            workdir: build.workdir,
            env: build.env,
            start_command: build.start_command,
            ready_command: build.ready_command,
            resources: build.resources,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalog::tests::{manifest, opened};
    use super::super::layer::Incoming;
    use super::*;

    #[tokio::test]
    async fn a_template_is_taken_over_when_its_layers_are_there() {
        let (data_dir, templates) = opened().await;
        let unknown = templates.adopt(manifest(&"0".repeat(64))).await.unwrap_err().to_string();
        assert!(unknown.contains("is not in this server's data folder"), "{unknown}");
        assert!(templates.adopt(manifest("../../etc")).await.unwrap_err().to_string().contains("layer ../../etc"));
        let lease = Incoming::new(data_dir.path()).unwrap().commit(None).unwrap();
        let arrived = Manifest { name: "travelled".into(), ..manifest(lease.id()) };
        templates.adopt(arrived.clone()).await.unwrap();
        let again = templates.manifest_of("travelled").await.unwrap();
        assert_eq!(Manifest { description: arrived.description.clone(), ..again }, arrived);
        let bad_name = Manifest { name: "a/b/c".into(), ..arrived };
        assert!(templates.adopt(bad_name).await.unwrap_err().to_string().contains("malformed"));
    }
}
