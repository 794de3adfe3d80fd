//! Recipes: what a built-in template consists of, read from its folder below `templates/`.
//!
//! A recipe is a folder: `recipe.toml`, the files it adds and the hook scripts it runs. The built-in ones are embedded
//! in the binary. The hash over every name and content names what was made of it, so a changed recipe is a new rootfs.
//! Called by bootstrap.rs; never touches the network or the store.

use crate::model::{ByteSize, Resources};
use include_dir::{Dir, include_dir};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Component, Path};

static BUILT_IN: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/templates");

/// A folder's files by their path in it.
pub type RecipeFiles = BTreeMap<String, Vec<u8>>;

/// Why a folder is no recipe.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// No such built-in template.
    #[error("there is no built-in template '{name}'; there are: {known}")]
    Unknown {
        /// As asked.
        name: String,
        /// All that there are.
        known: String,
    },
    /// The folder has no recipe.toml, or it is not text.
    #[error("template '{name}' has no readable recipe.toml")]
    Missing {
        /// The folder's name.
        name: String,
    },
    /// Not TOML, an unknown key, a wrong type.
    #[error("recipe.toml of template '{name}' cannot be read")]
    Syntax {
        /// The folder's name.
        name: String,
        /// Line and reason.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value that cannot be used.
    #[error("recipe.toml of template '{name}': {key} = '{value}' {problem}")]
    Value {
        /// The folder's name.
        name: String,
        /// Path of the key.
        key: &'static str,
        /// The value met.
        value: String,
        /// The rule it breaks.
        problem: &'static str,
    },
}

/// What a template's root file system is made of.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rootfs {
    /// Debian's release name.
    pub suite: String,
    /// Archive areas, `main` first.
    pub components: Vec<String>,
    /// mmdebstrap's word for the set to start from.
    pub variant: String,
    /// Whether `<suite>-updates` and `<suite>-security` are used too.
    pub updates: bool,
    /// Everything beyond the variant.
    pub packages: Vec<String>,
    /// Lines of apt configuration that stay in the image.
    pub apt_options: Vec<String>,
    /// Lines of dpkg configuration that stay in the image.
    pub dpkg_options: Vec<String>,
}

/// What a layer on another template adds to it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// The built-in template below.
    pub from: String,
    /// Debian packages.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Python packages, as requirements without blanks; they come from wherever pip is configured to look.
    #[serde(default)]
    pub pip: Vec<String>,
}

/// Where a template's files come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ground {
    /// A root file system of its own.
    Rootfs(Rootfs),
    /// Another built-in template, with one more layer.
    Layer(Layer),
}

/// A file of the recipe that is put into the rootfs, owned by root.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddedFile {
    /// Where it goes.
    pub path: String,
    /// Where it is in the folder.
    pub source: String,
    /// Its permissions, octal.
    pub mode: String,
}

/// Scripts by the moment they run at.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hooks {
    /// After all packages, inside the rootfs, in this order.
    #[serde(default)]
    pub customize: Vec<String>,
}

/// What a sandbox starts with.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Defaults {
    /// Who commands run as.
    pub user: String,
    /// Where commands run.
    pub workdir: String,
    /// Environment of everything started in it.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

/// What runs before the template is dumped.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// Kept running in the dump; empty = nothing.
    #[serde(default)]
    pub command: String,
    /// Ends with 0 once `command` is ready; empty = at once.
    #[serde(default)]
    pub ready_command: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Limits {
    cpu_count: u32,
    memory: String,
    disk: String,
    pids_max: u32,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecipeToml {
    name: String,
    description: String,
    #[serde(default)]
    aliases: Vec<String>,
    rootfs: Option<Rootfs>,
    layer: Option<Layer>,
    #[serde(default)]
    files: Vec<AddedFile>,
    #[serde(default)]
    hooks: Hooks,
    defaults: Defaults,
    resources: Limits,
    #[serde(default)]
    start: Start,
}

/// A checked recipe: every name in it leads to a file of it, every value can be used as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// The template's alias.
    pub name: String,
    /// One line for people.
    pub description: String,
    /// Other names of the template.
    pub aliases: Vec<String>,
    /// What the files are made of.
    pub ground: Ground,
    /// Files added to it.
    pub added: Vec<AddedFile>,
    /// Scripts run in it.
    pub hooks: Hooks,
    /// What a sandbox starts with.
    pub defaults: Defaults,
    /// Its limits.
    pub resources: Resources,
    /// What runs in it.
    pub start: Start,
    /// SHA-256 (hex) of all of the folder, and of the recipe below.
    pub hash: String,
    /// All of the folder.
    pub files: RecipeFiles,
}

impl Recipe {
    /// The recipe of a template that comes with the binary.
    pub fn built_in(name: &str) -> Result<Self, RecipeError> {
        match BUILT_IN.get_dir(name) {
            Some(dir) => Self::from_files(name, embedded_files(dir)),
            None => Err(RecipeError::Unknown { name: name.to_owned(), known: built_in_names().join(", ") }),
        }
    }

    /// Reads and checks a recipe from its folder's content. `name` must be the one that it gives itself.
    pub fn from_files(name: &str, files: RecipeFiles) -> Result<Self, RecipeError> {
        let text = files.get("recipe.toml").and_then(|bytes| std::str::from_utf8(bytes).ok());
        let text = text.ok_or_else(|| RecipeError::Missing { name: name.to_owned() })?;
        let parsed: RecipeToml =
            toml::from_str(text).map_err(|source| RecipeError::Syntax { name: name.to_owned(), source: Box::new(source) })?;
        let hash = hash_of(&files);
        check(name, parsed, hash, files)
    }
}

/// Names of the templates that come with the binary.
pub fn built_in_names() -> Vec<String> {
    let mut names: Vec<String> = BUILT_IN.dirs().filter_map(|dir| dir.path().to_str()).map(str::to_owned).collect();
    names.sort();
    names
}

fn embedded_files(dir: &Dir<'_>) -> RecipeFiles {
    let mut files = RecipeFiles::new();
    let mut folders = vec![dir];
    while let Some(folder) = folders.pop() {
        folders.extend(folder.dirs());
        for file in folder.files() {
            let path = file.path().strip_prefix(dir.path()).unwrap_or(file.path());
            files.insert(path.to_string_lossy().into_owned(), file.contents().to_vec());
        }
    }
    files
}

/// A layer is another one when what lies below it is another.
fn hash_on(below: &Recipe, own: &str) -> String {
    hex::encode(Sha256::digest(format!("{}\n{own}", below.hash)))
}

/// Lengths go in with the bytes, so that no two folders read as the same sequence.
fn hash_of(files: &RecipeFiles) -> String {
    let mut hasher = Sha256::new();
    for (path, content) in files {
        for part in [path.as_bytes(), content.as_slice()] {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
    }
    hex::encode(hasher.finalize())
}

fn check(folder: &str, parsed: RecipeToml, hash: String, files: RecipeFiles) -> Result<Recipe, RecipeError> {
    let wrong = |key: &'static str, value: &str, problem: &'static str| RecipeError::Value {
        name: folder.to_owned(),
        key,
        value: value.to_owned(),
        problem,
    };
    let RecipeToml { name, description, aliases, rootfs, layer, files: added, hooks, defaults, resources, start } = parsed;
    if name != folder {
        return Err(wrong("name", &name, "is not the name of its folder"));
    }
    if let Some(alias) =
        aliases.iter().find(|alias| !alias.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-'))
    {
        return Err(wrong("aliases", alias, "is not a name of small letters, digits and '-'"));
    }
    let (ground, hash) = match (rootfs, layer) {
        (Some(rootfs), None) => {
            check_rootfs(&rootfs, &wrong)?;
            (Ground::Rootfs(rootfs), hash)
        }
        (None, Some(layer)) => {
            check_layer(&layer, &wrong)?;
            let hash = hash_on(&Recipe::built_in(&layer.from)?, &hash);
            (Ground::Layer(layer), hash)
        }
        (Some(_), Some(_)) | (None, None) => return Err(wrong("rootfs or layer", "", "has to be given, one of the two")),
    };
    for file in &added {
        if !is_clean_absolute(&file.path) || !file.path.bytes().all(is_file_name_byte) {
            return Err(wrong("files.path", &file.path, "is not an absolute path of plain names without '..'"));
        }
        if u32::from_str_radix(&file.mode, 8).map_or(true, |mode| mode > 0o7777) {
            return Err(wrong("files.mode", &file.mode, "is not an octal mode such as 0644"));
        }
    }
    for source in added.iter().map(|file| &file.source).chain(&hooks.customize) {
        if !files.contains_key(source) || !source.bytes().all(is_file_name_byte) {
            return Err(wrong("files.source or hooks", source, "is not a file of the recipe's folder with a plain name"));
        }
    }
    if !is_clean_absolute(&defaults.workdir) {
        return Err(wrong("defaults.workdir", &defaults.workdir, "is not an absolute path without '..'"));
    }
    let size = |key, text: &str| text.parse::<ByteSize>().map_err(|_| wrong(key, text, "is not a size such as '20 GiB'"));
    let resources = Resources {
        cpu_count: resources.cpu_count,
        memory: size("resources.memory", &resources.memory)?,
        disk: size("resources.disk", &resources.disk)?,
        pids_max: resources.pids_max,
    };
    Ok(Recipe { name, description, aliases, ground, added, hooks, defaults, resources, start, hash, files })
}

/// These words become arguments of mmdebstrap; none may be mistaken for an option or hold more than one word.
fn check_rootfs(rootfs: &Rootfs, wrong: &dyn Fn(&'static str, &str, &'static str) -> RecipeError) -> Result<(), RecipeError> {
    let words = [("rootfs.suite", &rootfs.suite), ("rootfs.variant", &rootfs.variant)];
    let components = rootfs.components.iter().map(|word| ("rootfs.components", word));
    let packages = rootfs.packages.iter().map(|word| ("rootfs.packages", word));
    for (key, word) in words.into_iter().chain(components).chain(packages) {
        if !is_word(word) {
            return Err(wrong(key, word, "is not one word of letters, digits, '+', '-' and '.'"));
        }
    }
    Ok(())
}

/// These become arguments of apt-get and pip.
fn check_layer(layer: &Layer, wrong: &dyn Fn(&'static str, &str, &'static str) -> RecipeError) -> Result<(), RecipeError> {
    if let Some(word) = layer.packages.iter().find(|word| !is_word(word)) {
        return Err(wrong("layer.packages", word, "is not one word of letters, digits, '+', '-' and '.'"));
    }
    let is_requirement = |text: &str| {
        text.starts_with(|first: char| first.is_ascii_alphanumeric())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-._=<>~![],".contains(&byte))
    };
    match layer.pip.iter().find(|text| !is_requirement(text)) {
        Some(text) => Err(wrong("layer.pip", text, "is not a requirement without blanks")),
        None => Ok(()),
    }
}

fn is_word(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
}

fn is_clean_absolute(path: &str) -> bool {
    path.starts_with('/') && Path::new(path).components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}

fn is_file_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._-/".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base_with(change: impl Fn(&str) -> String) -> Result<Recipe, RecipeError> {
        let mut files = Recipe::built_in("base").unwrap().files;
        let text = String::from_utf8(files["recipe.toml"].clone()).unwrap();
        let changed = change(&text);
        assert_ne!(text, changed, "the sample changes nothing");
        files.insert("recipe.toml".into(), changed.into_bytes());
        Recipe::from_files("base", files)
    }

    #[test]
    fn base_is_trixie_with_the_user_that_everybody_expects() {
        let base = Recipe::built_in("base").unwrap();
        let Ground::Rootfs(rootfs) = &base.ground else { unreachable!("base stands on nothing") };
        assert_eq!((rootfs.suite.as_str(), base.defaults.user.as_str()), ("trixie", "user"));
        assert_eq!(base.defaults.workdir, "/home/user");
        assert_eq!(base.resources.disk, ByteSize::gib(20));
        for package in ["python3", "nodejs", "npm", "git", "curl", "sudo", "ca-certificates", "fuse3", "ncurses-bin", "iproute2"] {
            assert!(rootfs.packages.iter().any(|listed| listed == package), "{package} is missing");
        }
        assert!(rootfs.dpkg_options.iter().any(|option| option == "force-unsafe-io"));
    }

    #[test]
    fn any_change_of_any_file_is_another_recipe() {
        let base = Recipe::built_in("base").unwrap();
        for name in base.files.keys().filter(|name| *name != "recipe.toml") {
            let mut files = base.files.clone();
            files.get_mut(name).unwrap().push(b'\n');
            assert_ne!(Recipe::from_files("base", files).unwrap().hash, base.hash, "{name} is not part of the hash");
        }
        assert_ne!(base_with(|text| text.replace("\"less\", ", "")).unwrap().hash, base.hash);
    }

    #[test]
    fn every_built_in_template_can_be_read_and_a_layer_is_another_on_another_ground() {
        for name in built_in_names() {
            let recipe = Recipe::built_in(&name).unwrap();
            let Ground::Layer(layer) = &recipe.ground else { continue };
            let below = Recipe::built_in(&layer.from).unwrap();
            assert_eq!(recipe.hash, hash_on(&below, &hash_of(&recipe.files)));
            assert_ne!(hash_on(&Recipe { hash: String::new(), ..below }, &hash_of(&recipe.files)), recipe.hash);
        }
    }

    #[test]
    fn what_a_layer_installs_cannot_be_an_option() {
        let layer = "name = 'on'\ndescription = ''\n[layer]\nfrom = 'base'\nPIP\n[defaults]\nuser = 'user'\nworkdir = '/'\n\
                     [resources]\ncpu_count = 1\nmemory = '1 GiB'\ndisk = '1 GiB'\npids_max = 10\n";
        let read =
            |line: &str| Recipe::from_files("on", RecipeFiles::from([("recipe.toml".into(), layer.replace("PIP", line).into_bytes())]));
        assert!(read("pip = ['numpy>=2,<3', 'a[b]==1.0']\npackages = ['g++']").is_ok());
        for line in ["pip = ['--pre']", "pip = ['a b']", "packages = ['-y']", "packages = ['a;b']"] {
            assert!(matches!(read(line), Err(RecipeError::Value { .. })), "{line}");
        }
    }

    #[test]
    fn an_unknown_template_is_answered_with_the_known_ones() {
        let message = Recipe::built_in("bsae").unwrap_err().to_string();
        assert!(message.contains("'bsae'") && message.contains("base"), "{message}");
    }

    #[test]
    fn bad_values_are_refused_by_key_and_value() {
        let message = |change: &dyn Fn(&str) -> String| base_with(change).unwrap_err().to_string();
        let package = message(&|text| text.replace("\"less\"", "\"--hook=x\""));
        assert!(package.contains("rootfs.packages = '--hook=x'"), "{package}");
        let path = message(&|text| text.replace("\"/etc/hosts\"", "\"/etc/../../hosts\""));
        assert!(path.contains("files.path = '/etc/../../hosts'"), "{path}");
        let source = message(&|text| text.replace("files/hosts", "files/absent"));
        assert!(source.contains("files/absent"), "{source}");
        let size = message(&|text| text.replace("20 GiB", "20 GB"));
        assert!(size.contains("resources.disk = '20 GB'"), "{size}");
    }

    #[test]
    fn an_unknown_key_is_an_error() {
        let error = base_with(|text| text.replace("[start]", "[start]\nspeed = 3")).unwrap_err();
        let RecipeError::Syntax { source, .. } = error else { panic!("{error}") };
        assert!(source.to_string().contains("speed"), "{source}");
    }
}
