//! What is known of images that were pulled or imported: `images/<hash of the name>.json`, one file per name.
//!
//! An imported image answers for its name without a registry. A pulled one does when its registry cannot be reached.

use super::document::Defaults;
use super::reference::{Digest, Reference};
use super::{Context, ImageBase, ImageProblem};
use crate::template::layer;
use crate::template::lease::Lease;
use crate::template::whiteout;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// How an image came here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// From a registry, which may have a newer one of that name by now.
    Pulled,
    /// From a file.
    Imported,
}

/// An image whose layers were complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its name in full.
    pub reference: String,
    /// How it came here.
    pub origin: Origin,
    /// What the name led to.
    pub digest: String,
    /// Layer ids, bottom to top, as the image has them.
    pub layers: Vec<String>,
    env: BTreeMap<String, String>,
    user: String,
    workdir: String,
    entrypoint: Vec<String>,
    cmd: Vec<String>,
}

/// Makes the base of what an image's configuration and layers say. `id` is the image's own: the manifest's digest, or
/// its configuration's.
pub(super) fn base_of(data_dir: &Path, defaults: Defaults, held: Vec<Lease>, id: &Digest) -> Result<ImageBase, ImageProblem> {
    let pairs = defaults.env.unwrap_or_default();
    let user = defaults.user.unwrap_or_default();
    let held = without_hidden(data_dir, held)?;
    Ok(ImageBase {
        layers: held.iter().map(|lease| lease.id().to_owned()).collect(),
        env: pairs.iter().filter_map(|pair| pair.split_once('=')).map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
        user: user.split(':').next().unwrap_or_default().to_owned(),
        workdir: defaults.working_dir.unwrap_or_default(),
        entrypoint: defaults.entrypoint.unwrap_or_default(),
        cmd: defaults.cmd.unwrap_or_default(),
        digest: id.to_string(),
        held: Arc::new(held),
    })
}

/// A layer whose root is opaque leaves nothing of those below it; overlayfs asks folders only.
fn without_hidden(data_dir: &Path, mut held: Vec<Lease>) -> Result<Vec<Lease>, ImageProblem> {
    for position in (1..held.len()).rev() {
        let folder = layer::folder_of(data_dir, held[position].id());
        let is_opaque = whiteout::is_opaque(&folder);
        if is_opaque.map_err(|source| ImageProblem::File { doing: "read the attributes of", path: folder, source })? {
            held.drain(..position);
            break;
        }
    }
    Ok(held)
}

fn folder(data_dir: &Path) -> PathBuf {
    data_dir.join("images")
}

fn file_of(data_dir: &Path, reference: &str) -> PathBuf {
    folder(data_dir).join(format!("{}.json", Digest::of(reference.as_bytes()).hex()))
}

/// Remembers the image under this name.
pub(super) fn remember(context: &Context<'_>, reference: &Reference, origin: Origin, base: &ImageBase) -> Result<(), ImageProblem> {
    let record = Record {
        reference: reference.to_string(),
        origin,
        digest: base.digest.clone(),
        layers: base.layers.clone(),
        env: base.env.clone(),
        user: base.user.clone(),
        workdir: base.workdir.clone(),
        entrypoint: base.entrypoint.clone(),
        cmd: base.cmd.clone(),
    };
    let text = serde_json::to_vec_pretty(&record).map_err(|source| ImageProblem::Document { what: "record", source })?;
    write_aside(&file_of(&context.config.data_dir, &record.reference), &text)
}

/// The image of this name that was imported, if all of it is there.
pub(super) fn imported(context: &Context<'_>, reference: &Reference) -> Result<Option<ImageBase>, ImageProblem> {
    find(context, reference, Origin::Imported)
}

/// The image that this name led to when its registry was last asked, if all of it is there.
pub(super) fn pulled(context: &Context<'_>, reference: &Reference) -> Result<Option<ImageBase>, ImageProblem> {
    find(context, reference, Origin::Pulled)
}

fn find(context: &Context<'_>, reference: &Reference, origin: Origin) -> Result<Option<ImageBase>, ImageProblem> {
    let data_dir = &context.config.data_dir;
    let path = file_of(data_dir, &reference.to_string());
    let Some(record) = read(&path).filter(|record| record.origin == origin) else { return Ok(None) };
    let take = |id: &String| {
        Lease::take(data_dir, id).map_err(|source| ImageProblem::File { doing: "lock", path: layer::folder_of(data_dir, id), source })
    };
    let Some(held) = record.layers.iter().map(take).collect::<Result<Option<Vec<_>>, _>>()? else { return Ok(None) };
    let used = fs::File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
    used.map_err(|source| ImageProblem::File { doing: "touch", path, source })?;
    let Record { digest, layers, env, user, workdir, entrypoint, cmd, .. } = record;
    Ok(Some(ImageBase { layers, env, user, workdir, entrypoint, cmd, digest, held: Arc::new(held) }))
}

/// A record that cannot be read is as good as none: it is written anew with the next pull.
fn read(path: &Path) -> Option<Record> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// All records with the time of their last use.
pub fn records(data_dir: &Path) -> io::Result<Vec<(Record, SystemTime)>> {
    let entries = match fs::read_dir(folder(data_dir)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if let Some(record) = read(&entry.path()) {
            found.push((record, entry.metadata()?.modified()?));
        }
    }
    Ok(found)
}

/// Forgets an image; its layers go when nothing else needs them.
pub fn remove_record(data_dir: &Path, record: &Record) -> io::Result<()> {
    fs::remove_file(file_of(data_dir, &record.reference))
}

/// Writes a file that is either whole or not there.
pub(super) fn write_aside(path: &Path, content: &[u8]) -> Result<(), ImageProblem> {
    let failed = |source| ImageProblem::File { doing: "write", path: path.to_owned(), source };
    let parent = path.parent().unwrap_or(Path::new("/"));
    let aside = parent.join(format!(".incoming-{}", uuid::Uuid::new_v4().simple()));
    let write = || {
        fs::create_dir_all(parent)?;
        let mut file = fs::File::create_new(&aside)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&aside, path)
    };
    write().map_err(failed)
}
