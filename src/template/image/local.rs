//! Images out of files: an OCI layout (folder or tar) or what `docker save` wrote, plain or compressed.
//!
//! Archives are read by an index of their entries, since their documents stand anywhere in them; nothing of an archive
//! is written to disk but its layers. Whatever the documents say, only entries of the archive itself are opened.

use super::blob::{self, Budget, LayerName};
use super::document::{self, Configuration, Descriptor, Document, Manifest};
use super::records::{self, Origin, base_of};
use super::reference::{Digest, Reference};
use super::registry::DOCUMENT_BYTES_MAX;
use super::{Context, ImageBase, ImageProblem, Progress};
use crate::model::ByteSize;
use crate::template::TemplateConfig;
use crate::template::unpack::HeaderBudget;
use serde::Deserialize;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// `docker save` of many images has some hundred entries.
const ENTRIES_MAX: usize = 100_000;
/// Bytes of an entry's name, the kernel's bound: all names are held, and a tar's may have a mebibyte each.
const NAME_BYTES_MAX: usize = 4096;
/// Links to links to layers.
const LINKS_FOLLOWED_MAX: usize = 8;
/// A registry that cannot be: where images without a name of their own live.
const NAMELESS: &str = "imported.invalid";
/// Where OCI layouts, and docker's and containerd's, put an image's name.
const NAME_ANNOTATIONS: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];

/// Brings the image in `path` into the data folder under `name`, or under the name that the file gives it. Answers the
/// name under which builds may ask for it from now on.
pub fn import(config: &TemplateConfig, path: &Path, name: Option<&Reference>, progress: Progress<'_>) -> Result<Reference, ImageProblem> {
    let stop = AtomicBool::new(false);
    let context = Context { config, progress, stop: &stop };
    let opened = Opened::open(&context, path)?;
    let image = opened.choose(name)?;
    let reference = match name.or(image.name.as_ref()) {
        Some(reference) => reference.clone(),
        None => nameless(path)?,
    };
    let base = opened.bring(&context, &image)?;
    records::remember(&context, &reference, Origin::Imported, &base)?;
    progress(&format!("{} is here ({} layers, {})", reference.familiar(), base.layers.len(), image.digest.short()));
    Ok(reference)
}

/// The image in `path`, its layers in the data folder. A file with several images has to have one called `wanted`.
pub(super) fn open(context: &Context<'_>, path: &Path, wanted: Option<&Reference>) -> Result<ImageBase, ImageProblem> {
    let opened = Opened::open(context, path)?;
    let image = opened.choose(wanted)?;
    opened.bring(context, &image)
}

/// A name from the file's own.
fn nameless(path: &Path) -> Result<Reference, ImageProblem> {
    let stem = path.file_name().map(|name| name.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    let stem = stem.split(".tar").next().unwrap_or_default();
    let name: String = stem.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let name = name.trim_matches('-');
    let problem =
        |error: super::ReferenceError| ImageProblem::Form { path: path.to_owned(), problem: format!("it has no name ({error}); give one") };
    format!("{NAMELESS}/{name}").parse().map_err(problem)
}

/// One image of a file.
struct Image {
    name: Option<Reference>,
    /// What it is called by: the manifest's digest, or its configuration's.
    digest: Digest,
    configuration: Entry,
    layers: Vec<Entry>,
}

/// A file in the layout or archive, with the digest that it has to have, if its documents name one.
struct Entry {
    path: String,
    digest: Option<Digest>,
}

impl Entry {
    fn of_blob(digest: &Digest) -> Self {
        Self { path: format!("blobs/sha256/{}", digest.hex()), digest: Some(digest.clone()) }
    }
}

struct Opened<'a> {
    path: &'a Path,
    files: Files,
}

impl<'a> Opened<'a> {
    fn open(context: &Context<'_>, path: &'a Path) -> Result<Self, ImageProblem> {
        let failed = |source| ImageProblem::File { doing: "open", path: path.to_owned(), source };
        let files = match std::fs::metadata(path).map_err(failed)?.is_dir() {
            true => Files::Folder(path.to_owned()),
            false => Files::index(blob::plain_file(path, context)?, path)?,
        };
        Ok(Self { path, files })
    }

    fn wrong(&self, problem: impl Into<String>) -> ImageProblem {
        ImageProblem::Form { path: self.path.to_owned(), problem: problem.into() }
    }

    /// The only image, or the one called `wanted`.
    fn choose(&self, wanted: Option<&Reference>) -> Result<Image, ImageProblem> {
        let mut images = match self.optional("index.json")? {
            Some(index) => self.images_of_layout(&index)?,
            None => match self.optional("manifest.json")? {
                Some(list) => self.images_of_docker(&list)?,
                None => return Err(self.wrong("it has neither index.json nor manifest.json")),
            },
        };
        let is_wanted = |image: &Image| image.name.as_ref().is_some_and(|name| Some(name) == wanted);
        if let Some(position) = images.iter().position(is_wanted) {
            return Ok(images.swap_remove(position));
        }
        match images.pop() {
            Some(only) if images.is_empty() => Ok(only),
            None => Err(self.wrong("it holds no image")),
            Some(last) => {
                images.push(last);
                let names: Vec<String> = images.iter().filter_map(|image| image.name.as_ref()).map(Reference::familiar).collect();
                Err(self.wrong(format!("it holds {} images ({}); name one of them", images.len(), names.join(", "))))
            }
        }
    }

    fn images_of_layout(&self, index: &[u8]) -> Result<Vec<Image>, ImageProblem> {
        let Document::Index(manifests) = Document::parse(index)? else { return Err(self.wrong("its index.json is no index")) };
        let is_ours = |descriptor: &&Descriptor| {
            descriptor.platform.as_ref().is_none_or(|p| (p.os.as_str(), p.architecture.as_str()) == document::PLATFORM)
        };
        let ours: Vec<&Descriptor> = manifests.iter().filter(is_ours).collect();
        if ours.is_empty() && !manifests.is_empty() {
            document::choose(&manifests)?;
        }
        ours.into_iter().map(|descriptor| self.image_of(descriptor)).collect()
    }

    fn image_of(&self, descriptor: &Descriptor) -> Result<Image, ImageProblem> {
        let name = NAME_ANNOTATIONS.iter().find_map(|key| descriptor.annotations.get(*key)?.parse().ok());
        let (manifest, digest) = match self.manifest(&descriptor.digest)? {
            Document::Manifest(manifest) => (manifest, descriptor.digest.clone()),
            Document::Index(inner) => {
                let chosen = document::choose(&inner)?.digest.clone();
                match self.manifest(&chosen)? {
                    Document::Manifest(manifest) => (manifest, chosen),
                    Document::Index(_) => return Err(self.wrong("its index names an index that names an index")),
                }
            }
        };
        let Manifest { config, layers } = manifest;
        layers.iter().try_for_each(document::check_layer)?;
        let layers = layers.iter().map(|layer| Entry::of_blob(&layer.digest)).collect();
        Ok(Image { name, digest, configuration: Entry::of_blob(&config.digest), layers })
    }

    fn manifest(&self, digest: &Digest) -> Result<Document, ImageProblem> {
        Document::parse(&self.document(&Entry::of_blob(digest), "its manifest")?)
    }

    fn images_of_docker(&self, list: &[u8]) -> Result<Vec<Image>, ImageProblem> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Saved {
            config: String,
            #[serde(default)]
            repo_tags: Option<Vec<String>>,
            layers: Vec<String>,
        }
        let list: Vec<Saved> = serde_json::from_slice(list).map_err(|source| ImageProblem::Document { what: "manifest.json", source })?;
        let image_of = |saved: Saved| {
            let configuration = Entry { path: saved.config, digest: None };
            let digest = Digest::of(&self.document(&configuration, "its configuration")?);
            let name = saved.repo_tags.unwrap_or_default().iter().find_map(|tag| tag.parse().ok());
            Ok(Image { name, digest, configuration, layers: saved.layers.into_iter().map(|path| Entry { path, digest: None }).collect() })
        };
        list.into_iter().map(image_of).collect()
    }

    /// The layers, checked by the configuration, and what it says.
    fn bring(&self, context: &Context<'_>, image: &Image) -> Result<ImageBase, ImageProblem> {
        let configuration = Configuration::parse(&self.document(&image.configuration, "its configuration")?)?;
        let diff_ids = configuration.layers(image.layers.len())?;
        let budget = Budget::of(context);
        let mut held = Vec::new();
        for (position, (entry, diff_id)) in image.layers.iter().zip(diff_ids).enumerate() {
            context.check()?;
            let place = format!("layer {}/{} {}", position + 1, diff_ids.len(), diff_id.short());
            if let Some(lease) = blob::present(&context.config.data_dir, diff_id)? {
                (context.progress)(&format!("{place}: already here"));
                held.push(lease);
                continue;
            }
            let (content, size) = self.required(&entry.path)?;
            let name = LayerName { blob: entry.digest.clone(), diff_id: diff_id.clone() };
            held.push(blob::bring(context, &name, content, &budget)?);
            (context.progress)(&format!("{place}: {}", ByteSize(size)));
        }
        base_of(&context.config.data_dir, configuration.config.unwrap_or_default(), held, &image.digest)
    }

    fn document(&self, entry: &Entry, what: &str) -> Result<Vec<u8>, ImageProblem> {
        let (content, _size) = self.required(&entry.path)?;
        let bytes = self.read(content, &entry.path)?;
        let found = Digest::of(&bytes);
        match &entry.digest {
            Some(expected) if *expected != found => {
                Err(ImageProblem::Mismatch { what: what.to_owned(), expected: expected.clone(), found })
            }
            _ => Ok(bytes),
        }
    }

    fn optional(&self, name: &str) -> Result<Option<Vec<u8>>, ImageProblem> {
        let opened = self.files.open(name).map_err(|source| self.unreadable(name, source))?;
        opened.map(|(content, _size)| self.read(content, name)).transpose()
    }

    fn required(&self, name: &str) -> Result<(Box<dyn Read + '_>, u64), ImageProblem> {
        let opened = self.files.open(name).map_err(|source| self.unreadable(name, source))?;
        opened.ok_or_else(|| self.wrong(format!("it lacks {}", shown(name))))
    }

    fn read(&self, content: Box<dyn Read + '_>, name: &str) -> Result<Vec<u8>, ImageProblem> {
        let mut bytes = Vec::new();
        content.take(DOCUMENT_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|source| self.unreadable(name, source))?;
        match bytes.len() as u64 > DOCUMENT_BYTES_MAX {
            true => Err(self.wrong(format!("{} is larger than {}", shown(name), ByteSize(DOCUMENT_BYTES_MAX)))),
            false => Ok(bytes),
        }
    }

    fn unreadable(&self, name: &str, source: io::Error) -> ImageProblem {
        ImageProblem::File { doing: "read", path: self.path.join(shown(name)), source }
    }
}

fn shown(name: &str) -> String {
    crate::template::unpack::shown(name.as_bytes())
}

/// The files that documents may name.
enum Files {
    Folder(PathBuf),
    Tar { file: Arc<File>, entries: HashMap<PathBuf, Place> },
}

/// Where an entry's content is.
enum Place {
    At { offset: u64, size: u64 },
    Link(PathBuf),
}

impl Files {
    fn index(file: File, path: &Path) -> Result<Self, ImageProblem> {
        let entries = places_in(&file, path)?;
        Ok(Self::Tar { file: Arc::new(file), entries })
    }

    /// The content of a file and its size; `None` when there is none of this name.
    fn open(&self, name: &str) -> io::Result<Option<(Box<dyn Read + '_>, u64)>> {
        let Some(name) = clean(name.as_bytes()) else { return Ok(None) };
        match self {
            Self::Folder(folder) => match File::open(folder.join(name)) {
                Ok(file) => {
                    let size = file.metadata()?.len();
                    Ok(Some((Box::new(file), size)))
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            },
            Self::Tar { file, entries } => {
                let mut name = name;
                for _ in 0..LINKS_FOLLOWED_MAX {
                    match entries.get(&name) {
                        Some(Place::At { offset, size }) => {
                            let window = Window { file: Arc::clone(file), at: *offset, end: offset.saturating_add(*size) };
                            return Ok(Some((Box::new(window), *size)));
                        }
                        Some(Place::Link(target)) => name.clone_from(target),
                        None => return Ok(None),
                    }
                }
                Ok(None)
            }
        }
    }
}

/// Where each entry of the archive has its content.
fn places_in(file: &File, path: &Path) -> Result<HashMap<PathBuf, Place>, ImageProblem> {
    let wrong = |problem: String| ImageProblem::Form { path: path.to_owned(), problem };
    let budget = HeaderBudget::default();
    let mut archive = tar::Archive::new(budget.limit(file));
    let mut entries = HashMap::new();
    let mut listed = archive.entries_with_seek().map_err(|error| wrong(error.to_string()))?;
    loop {
        budget.expect_header();
        let Some(entry) = listed.next() else { break };
        let entry = entry.map_err(|error| wrong(format!("it is no tar ({error})")))?;
        budget.lift();
        if entries.len() >= ENTRIES_MAX {
            return Err(wrong(format!("it has more than {ENTRIES_MAX} entries")));
        }
        if let Some((name, place)) = place_of(&entry) {
            entries.insert(name, place);
        }
    }
    Ok(entries)
}

/// `None` for what no document can mean: folders, and names or links that lead out.
fn place_of<R: Read>(entry: &tar::Entry<'_, R>) -> Option<(PathBuf, Place)> {
    let name = clean(&entry.path_bytes())?;
    let place = match entry.header().entry_type() {
        tar::EntryType::Regular | tar::EntryType::Continuous => Place::At { offset: entry.raw_file_position(), size: entry.size() },
        tar::EntryType::Link => Place::Link(clean(&entry.link_name_bytes()?)?),
        tar::EntryType::Symlink => Place::Link(resolved(name.parent().unwrap_or(Path::new("")), &entry.link_name_bytes()?)?),
        _ => return None,
    };
    Some((name, place))
}

/// A path inside the archive, or `None` for one that leads out.
fn clean(path: &[u8]) -> Option<PathBuf> {
    if path.len() > NAME_BYTES_MAX {
        return None;
    }
    let mut cleaned = PathBuf::new();
    for component in Path::new(std::str::from_utf8(path).ok()?).components() {
        match component {
            Component::Normal(part) => cleaned.push(part),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(cleaned)
}

/// A symbolic link's target, which may go up as far as the archive's root.
fn resolved(folder: &Path, target: &[u8]) -> Option<PathBuf> {
    if target.len() > NAME_BYTES_MAX {
        return None;
    }
    let mut path = folder.to_owned();
    for component in Path::new(std::str::from_utf8(target).ok()?).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            Component::ParentDir => path.pop().then_some(())?,
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(path)
}

/// A part of a file, read without moving the file's own position.
struct Window {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for Window {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let room = buffer.len().min(left);
        let read = self.file.read_at(&mut buffer[..room], self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}
