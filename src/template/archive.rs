//! Template archives: one tar.zst that holds everything a template is made of, for machines without a network.
//!
//! `stillbox.json` first (the [`Manifest`]), then `layers/<id>.tar` for each layer, bottom to top. The layers' tars are
//! those that their ids are the SHA-256 of, so whatever arrives is either what was exported or refused.
//! The cache of finished bootstraps holds such archives too. An archive from elsewhere is hostile input.

use super::layer::{self, Incoming, LayerError};
use super::lease::Lease;
use super::unpack::{HeaderBudget, UnpackError, UnpackLimits, shown, unpack};
use crate::model::Resources;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

pub(super) const FORMAT: u32 = 1;
const MANIFEST: &str = "stillbox.json";
/// A manifest holds a few names and an environment.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;
/// Level 3 halves the size of level 1 at the same speed on these files; higher ones cost minutes for a tenth.
const COMPRESSION_LEVEL: i32 = 3;

/// A template, complete but for its layers' files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this file's form.
    pub format: u32,
    /// The template's alias.
    pub name: String,
    /// Its other aliases.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    /// One line for people.
    pub description: String,
    /// What it was made from: the recipe's hash.
    pub origin: String,
    /// Layer ids, bottom to top.
    pub layers: Vec<String>,
    /// Default user of commands.
    pub user: String,
    /// Default working directory of commands.
    pub workdir: String,
    /// Environment of everything started in it.
    pub env: BTreeMap<String, String>,
    /// Started when the template is built.
    pub start_command: Option<String>,
    /// Ends with 0 once the start command is ready.
    pub ready_command: Option<String>,
    /// Limits of sandboxes made from it.
    pub resources: Resources,
}

impl Manifest {
    /// The manifest of what a recipe became.
    pub fn of_recipe(recipe: &super::Recipe, layers: Vec<String>) -> Self {
        let given = |command: &str| Some(command.to_owned()).filter(|command| !command.is_empty());
        Self {
            format: FORMAT,
            name: recipe.name.clone(),
            aliases: recipe.aliases.clone(),
            description: recipe.description.clone(),
            origin: recipe.hash.clone(),
            layers,
            user: recipe.defaults.user.clone(),
            workdir: recipe.defaults.workdir.clone(),
            env: recipe.defaults.env.clone(),
            start_command: given(&recipe.start.command),
            ready_command: given(&recipe.start.ready_command),
            resources: recipe.resources,
        }
    }
}

/// Why a template was not written to or read from an archive.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The file could not be read or written.
    #[error("could not {doing} {}", path.display())]
    File {
        /// The verb.
        doing: &'static str,
        /// The archive.
        path: PathBuf,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// Not an archive of ours.
    #[error("{} is no template archive: {problem}", path.display())]
    Form {
        /// The archive.
        path: PathBuf,
        /// What was expected where.
        problem: String,
    },
    /// A layer in it was refused.
    #[error("layer {layer} in {}: {source}", path.display())]
    Unpack {
        /// The archive.
        path: PathBuf,
        /// The layer's id.
        layer: String,
        /// Names the entry.
        source: UnpackError,
    },
    /// A layer could not be read, stored, or is not what its id says.
    #[error(transparent)]
    Layer(#[from] LayerError),
}

/// Writes the template to `file`: aside, synced, renamed. Its layers are read from `data_dir`.
pub fn export(manifest: &Manifest, data_dir: &Path, file: &Path) -> Result<(), ArchiveError> {
    let failed = |doing| move |source| ArchiveError::File { doing, path: file.to_owned(), source };
    let mut aside_name = file.as_os_str().to_owned();
    aside_name.push(format!(".{}.incoming", uuid::Uuid::new_v4().simple()));
    let aside = PathBuf::from(aside_name);
    let written = fs::File::create_new(&aside).map_err(failed("create")).and_then(|target| {
        let target = write_archive(manifest, data_dir, target, file)?;
        target.sync_all().map_err(failed("sync"))?;
        fs::rename(&aside, file).map_err(failed("rename"))
    });
    if written.is_err() {
        // What went wrong before this is the error worth telling.
        let _ = fs::remove_file(&aside);
    }
    written
}

fn write_archive(manifest: &Manifest, data_dir: &Path, target: fs::File, file: &Path) -> Result<fs::File, ArchiveError> {
    let failed = |source| ArchiveError::File { doing: "write", path: file.to_owned(), source };
    let compressor = zstd::Encoder::new(io::BufWriter::new(target), COMPRESSION_LEVEL).map_err(failed)?;
    let mut tar = tar::Builder::new(compressor);
    let text = serde_json::to_vec_pretty(manifest).map_err(|error| failed(error.into()))?;
    let mut header = plain_header(text.len() as u64);
    tar.append_data(&mut header, MANIFEST, text.as_slice()).map_err(failed)?;
    for id in &manifest.layers {
        let rootfs = layer::folder_of(data_dir, id);
        let mut counter = Counter(0);
        layer::write_tar(&rootfs, &mut counter)?;
        let header = plain_header(counter.0);
        append_layer(&mut tar, header, id, &rootfs, file)?;
    }
    let compressor = tar.into_inner().map_err(failed)?;
    let buffered = compressor.finish().map_err(failed)?;
    buffered.into_inner().map_err(|error| failed(error.into_error()))
}

/// The header goes out first, then the layer's tar straight into the archive: it is never whole in memory or on disk.
fn append_layer<W: Write>(
    tar: &mut tar::Builder<W>,
    mut header: tar::Header,
    id: &str,
    rootfs: &Path,
    file: &Path,
) -> Result<(), ArchiveError> {
    let failed = |source| ArchiveError::File { doing: "write", path: file.to_owned(), source };
    let size = header.size().map_err(failed)?;
    header.set_path(format!("layers/{id}.tar")).map_err(failed)?;
    header.set_cksum();
    let out = tar.get_mut();
    out.write_all(header.as_bytes()).map_err(failed)?;
    layer::write_tar(rootfs, out)?;
    let padding = size.next_multiple_of(512) - size;
    io::copy(&mut io::repeat(0).take(padding), out).map_err(failed)?;
    Ok(())
}

fn plain_header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_entry_type(tar::EntryType::Regular);
    header
}

struct Counter(u64);

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A template whose layers are all there.
#[derive(Debug)]
pub struct Imported {
    /// What the archive holds.
    pub manifest: Manifest,
    /// Keeps the layers until something names them.
    pub held: Vec<Lease>,
}

/// Brings an archive's layers into `data_dir` and answers what it holds. Layers that are there already are not unpacked
/// again. On failure nothing is left of the layer that failed; those before it stay, as good as any.
pub fn import(file: &Path, data_dir: &Path, limits: UnpackLimits) -> Result<Imported, ArchiveError> {
    let opened = fs::File::open(file).map_err(|source| ArchiveError::File { doing: "open", path: file.to_owned(), source })?;
    import_from(opened, file, data_dir, limits)
}

/// [`import`] from anything that can be read; `file` is its name in errors.
pub(super) fn import_from(from: impl Read, file: &Path, data_dir: &Path, limits: UnpackLimits) -> Result<Imported, ArchiveError> {
    let failed = |source| ArchiveError::File { doing: "read", path: file.to_owned(), source };
    let wrong = |problem: String| ArchiveError::Form { path: file.to_owned(), problem };
    let reader = zstd::Decoder::new(from).map_err(failed)?;
    let budget = HeaderBudget::default();
    let mut archive = tar::Archive::new(budget.limit(reader));
    let mut entries = archive.entries().map_err(failed)?;
    budget.expect_header();
    let first = entries.next().ok_or_else(|| wrong("it is empty".into()))?;
    let mut first = first.map_err(|error| wrong(format!("it is not a tar.zst ({error})")))?;
    budget.lift();
    if &*first.path_bytes() != MANIFEST.as_bytes() {
        return Err(wrong(format!("its first entry is '{}', not {MANIFEST}", shown(&first.path_bytes()))));
    }
    let manifest = read_manifest(&mut first, file)?;
    drop(first);
    if let Some(held) = hold_all(data_dir, &manifest.layers)? {
        return Ok(Imported { manifest, held });
    }
    let mut held = Vec::new();
    for id in &manifest.layers {
        budget.expect_header();
        let entry = entries.next().ok_or_else(|| wrong(format!("layer {id} is missing")))?.map_err(failed)?;
        budget.lift();
        if *entry.path_bytes() != *format!("layers/{id}.tar").as_bytes() {
            return Err(wrong(format!("entry '{}' stands where layer {id} belongs", shown(&entry.path_bytes()))));
        }
        if let Some(lease) = hold(data_dir, id)? {
            held.push(lease);
            continue;
        }
        let incoming = Incoming::new(data_dir)?;
        let unpacked = unpack(entry, &incoming.rootfs(), limits);
        unpacked.map_err(|source| ArchiveError::Unpack { path: file.to_owned(), layer: id.clone(), source })?;
        held.push(incoming.commit(Some(id))?);
    }
    Ok(Imported { manifest, held })
}

fn hold(data_dir: &Path, id: &str) -> Result<Option<Lease>, LayerError> {
    Lease::take(data_dir, id).map_err(layer::io_error("lock", &layer::folder_of(data_dir, id)))
}

/// All of them, or `None` when one is missing.
pub(super) fn hold_all(data_dir: &Path, ids: &[String]) -> Result<Option<Vec<Lease>>, LayerError> {
    ids.iter().map(|id| hold(data_dir, id)).collect()
}

fn read_manifest(entry: &mut impl Read, file: &Path) -> Result<Manifest, ArchiveError> {
    let wrong = |problem: String| ArchiveError::Form { path: file.to_owned(), problem };
    let mut text = Vec::new();
    let read = entry.take(MANIFEST_BYTES_MAX).read_to_end(&mut text);
    read.map_err(|source| ArchiveError::File { doing: "read", path: file.to_owned(), source })?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| wrong(format!("{MANIFEST}: {error}")))?;
    if manifest.format != FORMAT {
        return Err(wrong(format!("it has format {}; this version of stillbox reads format {FORMAT}", manifest.format)));
    }
    // Ids become folder names.
    match manifest.layers.iter().find(|id| !layer::is_id(id)) {
        Some(id) => Err(wrong(format!("'{}' is not a layer id", shown(id.as_bytes())))),
        None if manifest.layers.is_empty() => Err(wrong("it names no layer".into())),
        None => Ok(manifest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A template of one small layer in a data folder of its own.
    fn template() -> (tempfile::TempDir, Manifest) {
        let data_dir = tempfile::tempdir().unwrap();
        let incoming = Incoming::new(data_dir.path()).unwrap();
        fs::create_dir(incoming.rootfs().join("etc")).unwrap();
        fs::write(incoming.rootfs().join("etc/motd"), "hello\n").unwrap();
        let layer = incoming.commit(None).unwrap().id().to_owned();
        (data_dir, Manifest::of_recipe(&super::super::Recipe::built_in("base").unwrap(), vec![layer]))
    }

    fn exported() -> (tempfile::TempDir, Manifest, PathBuf) {
        let (data_dir, manifest) = template();
        let file = data_dir.path().join("base.tar.zst");
        export(&manifest, data_dir.path(), &file).unwrap();
        (data_dir, manifest, file)
    }

    /// An archive of these entries, whatever they are.
    fn archive_of(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(zstd::Encoder::new(Vec::new(), 1).unwrap());
        for (name, content) in entries {
            tar.append_data(&mut plain_header(content.len() as u64), name, *content).unwrap();
        }
        tar.into_inner().unwrap().finish().unwrap()
    }

    fn refusal(archive: &[u8]) -> String {
        let data_dir = tempfile::tempdir().unwrap();
        let error = import_from(archive, Path::new("x.tar.zst"), data_dir.path(), UnpackLimits::default()).unwrap_err();
        let left = fs::read_dir(data_dir.path().join("layers")).map_or(0, Iterator::count);
        assert_eq!(left, 0, "something was left behind");
        error.to_string()
    }

    #[test]
    fn an_exported_template_arrives_whole_on_another_machine() {
        let (_from, manifest, file) = exported();
        let to = tempfile::tempdir().unwrap();
        let arrived = import(&file, to.path(), UnpackLimits::default()).unwrap();
        assert_eq!(arrived.manifest, manifest);
        let motd = layer::folder_of(to.path(), &manifest.layers[0]).join("etc/motd");
        assert_eq!(fs::read_to_string(motd).unwrap(), "hello\n");
        assert_eq!(import(&file, to.path(), UnpackLimits::default()).unwrap().manifest, manifest, "a second import changes nothing");
    }

    #[test]
    fn two_exports_are_the_same_file() {
        let (data_dir, manifest, file) = exported();
        let again = data_dir.path().join("again.tar.zst");
        export(&manifest, data_dir.path(), &again).unwrap();
        assert_eq!(fs::read(file).unwrap(), fs::read(again).unwrap());
    }

    #[test]
    fn a_layer_that_was_changed_on_the_way_is_refused() {
        let (_data_dir, manifest, _file) = exported();
        let other = tar_with("etc/motd", b"hacked\n");
        let text = serde_json::to_vec(&manifest).unwrap();
        let name = format!("layers/{}.tar", manifest.layers[0]);
        let message = refusal(&archive_of(&[(MANIFEST, &text), (&name, &other)]));
        assert!(message.contains("turned out to be"), "{message}");
    }

    fn tar_with(path: &str, content: &[u8]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        tar.append_data(&mut plain_header(content.len() as u64), path, content).unwrap();
        tar.into_inner().unwrap()
    }

    #[test]
    fn a_refused_entry_is_named_with_its_layer_and_file() {
        let (_data_dir, manifest, _file) = exported();
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = plain_header(0);
        header.set_entry_type(tar::EntryType::Block);
        tar.append_data(&mut header, "srv/disk", io::empty()).unwrap();
        let text = serde_json::to_vec(&manifest).unwrap();
        let name = format!("layers/{}.tar", manifest.layers[0]);
        let message = refusal(&archive_of(&[(MANIFEST, &text), (&name, &tar.into_inner().unwrap())]));
        assert!(message.contains("x.tar.zst") && message.contains("'srv/disk' is refused: it is a device node"), "{message}");
    }

    #[test]
    fn what_is_no_archive_of_ours_is_told_so() {
        assert!(
            refusal(b"not zstd at all").contains("could not read x.tar.zst") || refusal(b"not zstd at all").contains("no template archive")
        );
        assert!(refusal(&archive_of(&[("etc/motd", b"x")])).contains("its first entry is 'etc/motd', not stillbox.json"));
        assert!(refusal(&archive_of(&[(MANIFEST, b"{}")])).contains("stillbox.json: missing field"));
        let (_data_dir, mut manifest, _file) = exported();
        let text = serde_json::to_vec(&manifest).unwrap();
        assert!(refusal(&archive_of(&[(MANIFEST, &text)])).contains("is missing"));
        manifest.layers = vec!["../../etc".into()];
        let text = serde_json::to_vec(&manifest).unwrap();
        assert!(refusal(&archive_of(&[(MANIFEST, &text)])).contains("'../../etc' is not a layer id"));
    }

    #[test]
    fn a_failed_export_leaves_no_file() {
        let (data_dir, mut manifest) = template();
        manifest.layers = vec!["0".repeat(64)];
        let folder = tempfile::tempdir().unwrap();
        assert!(export(&manifest, data_dir.path(), &folder.path().join("x.tar.zst")).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
