//! A pull: the manifest for this platform, its configuration, and its layers, three at a time.

use super::blob::{self, Budget, LayerName};
use super::document::{self, Configuration, Descriptor, Document, Manifest};
use super::records::{self, Origin, base_of};
use super::reference::{Digest, Reference};
use super::registry::{DOCUMENT_BYTES_MAX, Registry, RegistryError};
use super::{Context, ImageBase, ImageProblem, ImageRequest};
use crate::model::ByteSize;
use crate::template::lease::Lease;
use std::io::{self, Read};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Layers on their way at once: enough for one slow connection each, few enough for two cores.
const LAYERS_AT_ONCE: usize = 3;
/// How often a long layer tells how far it is.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// Pulls the image; without a network, what an earlier pull brought has to do.
pub(super) fn pull(context: &Context<'_>, reference: &Reference, request: &ImageRequest) -> Result<ImageBase, ImageProblem> {
    let pulled = from_registry(context, reference, request);
    let Err(ImageProblem::Registry(RegistryError::Transport(error))) = pulled else { return pulled };
    match records::pulled(context, reference)? {
        Some(base) => {
            (context.progress)(&format!("{error}; using the {} that was pulled before", reference.familiar()));
            Ok(base)
        }
        None => Err(RegistryError::Transport(error).into()),
    }
}

fn from_registry(context: &Context<'_>, reference: &Reference, request: &ImageRequest) -> Result<ImageBase, ImageProblem> {
    (context.progress)(&format!("Pulling {} from {}", reference.familiar(), reference.registry));
    let registry = Registry::open(context, reference, request.credentials.as_ref())?;
    let (manifest, digest) = manifest_of(&registry, reference)?;
    if let Some(known) = unchanged(context, reference, &digest)? {
        (context.progress)(&format!("{} is up to date ({})", reference.familiar(), digest.short()));
        return Ok(known);
    }
    if manifest.config.size > DOCUMENT_BYTES_MAX {
        return Err(RegistryError::TooLarge { what: "its configuration".to_owned(), limit: DOCUMENT_BYTES_MAX }.into());
    }
    let configuration = Configuration::parse(&registry.document(&manifest.config.digest)?)?;
    let diff_ids = configuration.layers(manifest.layers.len())?;
    manifest.layers.iter().try_for_each(document::check_layer)?;
    let held = bring_all(context, &registry, &manifest.layers, diff_ids)?;
    let base = base_of(&context.config.data_dir, configuration.config.unwrap_or_default(), held, &digest)?;
    records::remember(context, reference, Origin::Pulled, &base)?;
    (context.progress)(&format!("{} is complete ({} layers, {})", reference.familiar(), manifest.layers.len(), digest.short()));
    Ok(base)
}

/// The image for this platform, with the digest of its own manifest.
fn manifest_of(registry: &Registry<'_>, reference: &Reference) -> Result<(Manifest, Digest), ImageProblem> {
    let (bytes, digest) = registry.manifest(reference.target())?;
    let chosen = match Document::parse(&bytes)? {
        Document::Manifest(manifest) => return Ok((manifest, digest)),
        Document::Index(manifests) => document::choose(&manifests)?.digest.clone(),
    };
    let (bytes, digest) = registry.manifest(chosen.as_str())?;
    match Document::parse(&bytes)? {
        Document::Manifest(manifest) => Ok((manifest, digest)),
        Document::Index(_) => Err(ImageProblem::Unsupported("its index names another index for this platform".to_owned())),
    }
}

fn unchanged(context: &Context<'_>, reference: &Reference, digest: &Digest) -> Result<Option<ImageBase>, ImageProblem> {
    Ok(records::pulled(context, reference)?.filter(|base| base.digest == digest.as_str()))
}

/// Workers take the layers in order; the first failure ends them all.
fn bring_all(
    context: &Context<'_>,
    registry: &Registry<'_>,
    blobs: &[Descriptor],
    diff_ids: &[Digest],
) -> Result<Vec<Lease>, ImageProblem> {
    let budget = Budget::of(context);
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<Option<Lease>>> = Mutex::new(diff_ids.iter().map(|_| None).collect());
    let failed: Mutex<Option<ImageProblem>> = Mutex::new(None);
    let work = || {
        loop {
            let position = next.fetch_add(1, Ordering::Relaxed);
            let (Some(blob), Some(diff_id)) = (blobs.get(position), diff_ids.get(position)) else { return };
            let place = format!("layer {}/{} {}", position + 1, blobs.len(), blob.digest.short());
            match context.check().and_then(|()| bring_one(context, registry, blob, diff_id, &budget, &place)) {
                Ok(lease) => done.lock().unwrap_or_else(PoisonError::into_inner)[position] = Some(lease),
                Err(problem) => {
                    next.store(blobs.len(), Ordering::Relaxed);
                    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(problem);
                    return;
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..LAYERS_AT_ONCE.min(blobs.len()) {
            scope.spawn(work);
        }
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(problem) => Err(problem),
        None => Ok(done.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().flatten().collect()),
    }
}

fn bring_one(
    context: &Context<'_>,
    registry: &Registry<'_>,
    blob: &Descriptor,
    diff_id: &Digest,
    budget: &Budget,
    place: &str,
) -> Result<Lease, ImageProblem> {
    if let Some(lease) = blob::present(&context.config.data_dir, diff_id)? {
        (context.progress)(&format!("{place}: already here"));
        return Ok(lease);
    }
    let name = LayerName { blob: Some(blob.digest.clone()), diff_id: diff_id.clone() };
    let told = Told { inner: registry.blob(&blob.digest, blob.size), context, place, size: blob.size, read: 0, at: Instant::now() };
    let lease = blob::bring(context, &name, told, budget)?;
    (context.progress)(&format!("{place}: {}", ByteSize(blob.size)));
    Ok(lease)
}

/// Tells how far it is, now and then.
struct Told<'a, R> {
    inner: R,
    context: &'a Context<'a>,
    place: &'a str,
    size: u64,
    read: u64,
    at: Instant,
}

impl<R: Read> Read for Told<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.read += read as u64;
        if self.at.elapsed() >= TELL_EVERY {
            self.at = Instant::now();
            (self.context.progress)(&format!("{}: {} of {}", self.place, ByteSize(self.read), ByteSize(self.size)));
        }
        Ok(read)
    }
}
