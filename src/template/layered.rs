//! A layer on another built-in template: Debian packages, Python packages, files and hooks of its recipe.
//!
//! Called by bootstrap.rs. The work is done in a chroot, in mount and pid namespaces of its own, by layered.sh: as with
//! mmdebstrap, recipes are ours, and running them takes no sandbox. What comes out is the upper of an overlay; of
//! overlayfs's marks it keeps those that a layer has (whiteout.rs).

use super::archive::{self, Manifest};
use super::bootstrap::{BootstrapError, Log, Progress, Running, hint_for};
use super::layer::{self, Incoming};
use super::lease::Lease;
use super::mirror;
use super::recipe::{Layer, Recipe};
use super::{TemplateConfig, bootstrap};
use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

const SCRIPT: &str = include_str!("layered.sh");
/// Overlayfs's own attributes, which mean something to the mount that set them and to no other.
const OVERLAY_ATTRIBUTES: &str = "trusted.overlay.";
/// The one that a layer keeps: nothing of the folder below shows.
const OPAQUE: &str = "trusted.overlay.opaque";

/// Makes the layer on `below`, which is complete, and holds all layers, bottom to top.
pub(super) fn build(
    recipe: &Recipe,
    layer: &Layer,
    below: &Manifest,
    config: &TemplateConfig,
    progress: Progress<'_>,
) -> Result<Vec<Lease>, BootstrapError> {
    let incoming = Incoming::new(&config.data_dir)?;
    let scratch = incoming.scratch();
    prepare(recipe, layer, below, config, scratch).map_err(|source| BootstrapError::Manifest { path: scratch.to_owned(), source })?;
    progress(&format!("making template {} on {} (about a minute, once)", recipe.name, below.name));
    run(below, config, &incoming, progress)?;
    let kept = clean(&incoming.rootfs()).map_err(|source| BootstrapError::Manifest { path: incoming.rootfs(), source })?;
    progress(&format!("the layer has {} files, {} MiB", kept.files, kept.bytes >> 20));
    let gone = || BootstrapError::Gone { name: below.name.clone() };
    let mut held = archive::hold_all(&config.data_dir, &below.layers)?.ok_or_else(gone)?;
    held.push(incoming.commit(None)?);
    Ok(held)
}

/// Everything that the script reads.
fn prepare(recipe: &Recipe, layer: &Layer, below: &Manifest, config: &TemplateConfig, scratch: &Path) -> io::Result<()> {
    let sources = match layer.packages.is_empty() {
        true => String::new(),
        false => sources(below, config).map_err(io::Error::other)?,
    };
    bootstrap::write_recipe(recipe, &scratch.join("recipe"))?;
    fs::write(scratch.join("sources.list"), sources)?;
    fs::write(scratch.join("packages"), lines(&layer.packages))?;
    fs::write(scratch.join("pip"), lines(&layer.pip))?;
    fs::write(scratch.join("finish.sh"), lines(&bootstrap::finishing(recipe)))?;
    fs::write(scratch.join("layered.sh"), SCRIPT)
}

fn lines(words: &[String]) -> String {
    words.iter().map(|word| format!("{word}\n")).collect()
}

/// The mirrors of today, and not those of the day when the template below was made, perhaps on another machine.
fn sources(below: &Manifest, config: &TemplateConfig) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
    let mirrors = mirror::find(config)?;
    let rootfs = rootfs_below(&below.name)?;
    Ok(lines(&mirrors.source_lines(&rootfs)))
}

fn rootfs_below(name: &str) -> Result<super::recipe::Rootfs, super::recipe::RecipeError> {
    match Recipe::built_in(name)?.ground {
        super::recipe::Ground::Rootfs(rootfs) => Ok(rootfs),
        super::recipe::Ground::Layer(layer) => rootfs_below(&layer.from),
    }
}

fn run(below: &Manifest, config: &TemplateConfig, incoming: &Incoming, progress: Progress<'_>) -> Result<(), BootstrapError> {
    let scratch = incoming.scratch();
    let folders: Vec<String> =
        below.layers.iter().rev().map(|id| layer::folder_of(&config.data_dir, id).to_string_lossy().into_owned()).collect();
    let cache = config.cache_dir.as_ref().map(|folder| folder.join("downloads")).unwrap_or_default();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "sh"]);
    command.arg(scratch.join("layered.sh")).arg(folders.join(":")).arg(incoming.rootfs()).arg(scratch).arg(cache);
    command.envs(mirror::proxies()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let missing = |source| BootstrapError::Program { program: "unshare", package: "util-linux", source };
    let mut child = Running::of(command.spawn().map_err(missing)?);
    let log = Log::default();
    if let Some(stderr) = child.0.stderr.take() {
        log.follow(stderr, progress);
    }
    let status = child.0.wait().map_err(missing)?;
    if status.success() {
        return Ok(());
    }
    let log = log.end();
    Err(BootstrapError::Failed { program: "making the layer", status: status.to_string(), hint: hint_for(&log), log })
}

/// What a layer holds.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Kept {
    files: u64,
    bytes: u64,
}

/// Removes overlayfs's attributes from an upper that is no longer mounted.
fn clean(folder: &Path) -> io::Result<Kept> {
    let mut kept = Kept::default();
    unmark(folder)?;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let metadata = fs::symlink_metadata(&path)?;
        if metadata.is_dir() {
            let inside = clean(&path)?;
            kept = Kept { files: kept.files + inside.files, bytes: kept.bytes + inside.bytes };
        } else {
            if metadata.is_file() {
                unmark(&path)?;
            }
            kept = Kept { files: kept.files + 1, bytes: kept.bytes + metadata.len() };
        }
    }
    Ok(kept)
}

fn unmark(path: &Path) -> io::Result<()> {
    let is_mark = |name: &str| name.starts_with(OVERLAY_ATTRIBUTES) && name != OPAQUE;
    let names: Vec<_> = xattr::list(path)?.filter(|name| is_mark(&name.to_string_lossy())).collect();
    names.iter().try_for_each(|name| xattr::remove(path, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_overlayfs_marks_a_layer_keeps_what_hides_those_below() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("etc");
        fs::create_dir(&inside).unwrap();
        fs::write(inside.join("kept"), "four").unwrap();
        // Needs root, as making a template does; without it there is nothing to remove.
        let marks = [OPAQUE, "trusted.overlay.origin"].map(|mark| xattr::set(&inside, mark, b"y").is_ok());
        assert_eq!(clean(folder.path()).unwrap(), Kept { files: 1, bytes: 4 });
        let left: Vec<_> = xattr::list(&inside).unwrap().collect();
        assert_eq!(left, if marks == [true, true] { vec![OPAQUE] } else { Vec::new() });
    }

    #[test]
    fn the_mirrors_are_those_of_the_release_at_the_bottom() {
        assert_eq!(rootfs_below("base").unwrap().suite, rootfs_below("code-interpreter").unwrap().suite);
    }
}
