//! Removing layers that nothing needs any more, while builds, imports and other processes go on.
//!
//! Needed is what a build's row, a cached build step, a built-in template's manifest or an image's record names. Whoever
//! is about to write such a name holds a lease (lease.rs), so a layer is looked at in this order: not named; nobody holds
//! it, and from now on nobody can; still not named; renamed; removed. A death in between leaves a layer or a folder that
//! the next sweep of half-made ones takes.

use super::image::{self, Record};
use super::{Recipe, Templates, layer, lease};
use crate::model::ByteSize;
use crate::store::{StoreError, templates};
use nix::fcntl::Flock;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// How much is given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thoroughness {
    /// What nobody will ask for: images that no template stands on stay for a while, for the next build.
    Usual,
    /// All that no template and no cached build step stands on.
    Everything,
}

/// Why layers were not looked through. Nothing was removed that is needed.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The rows could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A folder could not be read, or something in it not removed.
    #[error("could not look through the layers in {}", path.display())]
    Files {
        /// The data folder.
        path: PathBuf,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// The thread that did it panicked.
    #[error("collecting layers was interrupted")]
    Interrupted(#[source] tokio::task::JoinError),
}

/// A layer that nothing named, and that nobody else can take.
struct Candidate {
    id: String,
    _alone: Flock<File>,
}

impl Templates {
    /// Removes layers that nothing needs, and forgets images that were not used for long. Answers what that gave back.
    pub async fn collect_garbage(&self, how: Thoroughness) -> Result<ByteSize, CollectError> {
        let kept = match how {
            Thoroughness::Usual => self.config.images.kept,
            Thoroughness::Everything => Duration::ZERO,
        };
        let named = self.store.read(templates::layers_in_use).await?;
        let candidates = self.on_files(move |data_dir| {
            forget_images(data_dir, kept, &named)?;
            forget_old_manifests(data_dir)?;
            candidates(data_dir, &named)
        });
        let candidates = candidates.await?;
        if candidates.is_empty() {
            return Ok(ByteSize(0));
        }
        let named = self.store.read(templates::layers_in_use).await?;
        self.on_files(move |data_dir| remove(data_dir, candidates, &named)).await
    }

    async fn on_files<T: Send + 'static>(&self, work: impl FnOnce(&Path) -> io::Result<T> + Send + 'static) -> Result<T, CollectError> {
        let data_dir = self.config.data_dir.clone();
        let failed = |source| CollectError::Files { path: self.config.data_dir.clone(), source };
        let done = tokio::task::spawn_blocking(move || work(&data_dir));
        done.await.map_err(CollectError::Interrupted)?.map_err(failed)
    }
}

/// Images that were not used for `kept` and that no build stands on.
fn forget_images(data_dir: &Path, kept: Duration, named: &BTreeSet<String>) -> io::Result<()> {
    let now = SystemTime::now();
    let is_old = |used: SystemTime| now.duration_since(used).is_ok_and(|since| since >= kept);
    let is_stood_on = |record: &Record| record.layers.iter().all(|id| named.contains(id));
    for (record, used) in image::records(data_dir)? {
        if is_old(used) && !is_stood_on(&record) {
            image::remove_record(data_dir, &record)?;
        }
    }
    Ok(())
}

/// Manifests of built-in templates as an older version of this program made them. Rows keep what sandboxes stand on.
fn forget_old_manifests(data_dir: &Path) -> io::Result<()> {
    for (path, manifest) in manifests(data_dir)? {
        let is_outdated = Recipe::built_in(&manifest.name).is_ok_and(|recipe| recipe.hash != manifest.origin);
        if is_outdated {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

fn manifests(data_dir: &Path) -> io::Result<Vec<(PathBuf, super::Manifest)>> {
    let mut found = Vec::new();
    for path in listed(&data_dir.join("templates"))? {
        // What cannot be read names nothing: a start would make it anew.
        if let Some(manifest) = fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok()) {
            found.push((path, manifest));
        }
    }
    Ok(found)
}

/// Everything that files in the data folder name.
fn named_by_files(data_dir: &Path) -> io::Result<BTreeSet<String>> {
    let images = image::records(data_dir)?.into_iter().flat_map(|(record, _)| record.layers);
    let built_in = manifests(data_dir)?.into_iter().flat_map(|(_, manifest)| manifest.layers);
    Ok(images.chain(built_in).collect())
}

fn candidates(data_dir: &Path, named: &BTreeSet<String>) -> io::Result<Vec<Candidate>> {
    let by_files = named_by_files(data_dir)?;
    let mut found = Vec::new();
    for path in listed(&data_dir.join("layers"))? {
        let Some(id) = path.file_name().and_then(|name| name.to_str()).filter(|name| layer::is_id(name)) else { continue };
        if named.contains(id) || by_files.contains(id) {
            continue;
        }
        if let Some(alone) = lease::take_alone(&path)? {
            found.push(Candidate { id: id.to_owned(), _alone: alone });
        }
    }
    Ok(found)
}

fn remove(data_dir: &Path, candidates: Vec<Candidate>, named: &BTreeSet<String>) -> io::Result<ByteSize> {
    let by_files = named_by_files(data_dir)?;
    let mut gone = Vec::new();
    // Out of the way at once: a build that wants one of them waits for its lock.
    for candidate in candidates {
        if named.contains(&candidate.id) || by_files.contains(&candidate.id) {
            continue;
        }
        let folder = layer::folder_of(data_dir, &candidate.id);
        let aside = folder.with_file_name(format!("incoming-gone-{}", candidate.id));
        fs::rename(&folder, &aside)?;
        gone.push((aside, candidate));
    }
    let mut freed = 0;
    for (aside, candidate) in gone {
        freed += bytes_below(&aside)?;
        fs::remove_dir_all(&aside)?;
        tracing::info!("Removed layer {}: nothing needs it", candidate.id);
    }
    image::sweep_notes(data_dir)?;
    Ok(ByteSize(freed))
}

/// Disk space of all files, each counted once.
fn bytes_below(folder: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        for path in listed(&folder)? {
            let metadata = fs::symlink_metadata(&path)?;
            bytes += metadata.blocks() * 512 / metadata.nlink().max(1);
            if metadata.is_dir() {
                open.push(path);
            }
        }
    }
    Ok(bytes)
}

fn listed(folder: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.map(|entry| Ok(entry?.path())).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalog::tests::{manifest, opened};
    use super::super::layer::Incoming;
    use super::super::lease::Lease;
    use super::*;

    /// A layer that holds one file of this content.
    fn layer_of(data_dir: &Path, content: &str) -> Lease {
        let incoming = Incoming::new(data_dir).unwrap();
        fs::write(incoming.rootfs().join("file"), content).unwrap();
        incoming.commit(None).unwrap()
    }

    #[tokio::test]
    async fn only_layers_that_nothing_names_and_nobody_holds_are_removed() {
        let (data_dir, templates) = opened().await;
        let data_dir = data_dir.path();
        let [held, unused, built] = ["held", "unused", "built"].map(|content| layer_of(data_dir, content));
        let built_id = built.id().to_owned();
        templates.register(manifest(&built_id)).await;
        let unused_id = unused.id().to_owned();
        drop((unused, built));
        let freed = templates.collect_garbage(Thoroughness::Everything).await.unwrap();
        assert!(freed.bytes() > 0);
        let is_there = |id: &str| layer::folder_of(data_dir, id).is_dir();
        assert_eq!([is_there(held.id()), is_there(&unused_id), is_there(&built_id)], [true, false, true]);
        assert!(Lease::take(data_dir, &unused_id).unwrap().is_none());
        let held_id = held.id().to_owned();
        drop(held);
        templates.collect_garbage(Thoroughness::Everything).await.unwrap();
        assert!(!is_there(&held_id) && is_there(&built_id));
        assert_eq!(listed(&data_dir.join("layers")).unwrap().len(), 1, "something was left aside");
    }

    #[tokio::test]
    async fn builds_and_collections_at_once_lose_no_layer() {
        let (data_dir, templates) = opened().await;
        let data_dir = data_dir.path().to_owned();
        let collector = {
            let templates = templates.clone();
            tokio::spawn(async move {
                for _ in 0..60 {
                    templates.collect_garbage(Thoroughness::Everything).await.unwrap();
                    tokio::task::yield_now().await;
                }
            })
        };
        for round in 0..40 {
            // The same few contents again and again: taken over from the last round, or made anew.
            let content = format!("content {}", round % 3);
            let folder = data_dir.clone();
            let lease = tokio::task::spawn_blocking(move || layer_of(&folder, &content)).await.unwrap();
            let registered = templates.register(manifest(lease.id())).await;
            drop(lease);
            tokio::task::yield_now().await;
            assert!(layer::folder_of(&data_dir, &registered.build.layers[0]).join("file").is_file(), "round {round}");
            templates.remove("base").await.unwrap();
        }
        collector.await.unwrap();
    }
}
