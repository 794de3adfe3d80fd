//! One layer: from a stream of bytes that nobody has checked to a folder that its digest vouches for.
//!
//! The stream is hashed as it comes and again when it is decompressed; only when both hashes are what the manifest and
//! the configuration said, the unpacked folder becomes a layer. `images/diffs/<diff id>` remembers which, so that a
//! layer that several images share comes once.

use super::reference::Digest;
use super::{Context, ImageProblem};
use crate::model::ByteSize;
use crate::template::layer::{self, Incoming};
use crate::template::lease::Lease;
use crate::template::unpack::{UnpackError, UnpackLimits, unpack};
use sha2::{Digest as _, Sha256};
use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// What one image's layers may still unpack to.
#[derive(Debug)]
pub(super) struct Budget(AtomicU64);

impl Budget {
    pub(super) fn of(context: &Context<'_>) -> Self {
        Self(AtomicU64::new(context.config.limits.bytes_max.bytes()))
    }

    fn left(&self) -> ByteSize {
        ByteSize(self.0.load(Ordering::Relaxed))
    }

    fn spend(&self, bytes: u64) -> io::Result<()> {
        let spent = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes));
        let too_much = || io::Error::other("the image is larger than allowed; if it is to be trusted, raise template.import_bytes_max");
        spent.map(drop).map_err(|_| too_much())
    }
}

/// A layer as its image names it.
#[derive(Debug, Clone)]
pub(super) struct LayerName {
    /// Of the bytes that travel; `None` where an archive names none.
    pub(super) blob: Option<Digest>,
    /// Of the tar in them.
    pub(super) diff_id: Digest,
}

/// The layer if it is there already, from this image or another.
pub(super) fn present(data_dir: &Path, diff_id: &Digest) -> Result<Option<Lease>, ImageProblem> {
    let note = note_of(data_dir, diff_id);
    let id = match fs::read_to_string(&note) {
        Ok(id) => id,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(ImageProblem::File { doing: "read", path: note, source }),
    };
    let folder = layer::folder_of(data_dir, &id);
    Lease::take(data_dir, &id).map_err(|source| ImageProblem::File { doing: "lock", path: folder, source })
}

/// Reads, checks and unpacks the layer.
pub(super) fn bring(context: &Context<'_>, name: &LayerName, blob: impl Read, budget: &Budget) -> Result<Lease, ImageProblem> {
    let data_dir = &context.config.data_dir;
    let incoming = Incoming::new(data_dir)?;
    let broken = |source| ImageProblem::File { doing: "read", path: PathBuf::from(format!("layer {}", name.diff_id)), source };
    let mut packed = Hashed::new(blob, context, None);
    let unpacked = unpack_plain(context, name, &mut packed, &incoming.rootfs(), budget);
    // A blob that was changed on the way is told as that, whatever the unpacker made of it; one that breaks a rule is not
    // read to its end.
    if let Ok(_) | Err(ImageProblem::Unpack { source: UnpackError::Damaged { .. }, .. }) = &unpacked {
        io::copy(&mut packed, &mut io::sink()).map_err(broken)?;
        compare("a layer's blob", name.blob.as_ref(), packed.finish())?;
    }
    compare("a layer's content", Some(&name.diff_id), unpacked?)?;
    let lease = incoming.commit(None)?;
    note(data_dir, &name.diff_id, lease.id())?;
    Ok(lease)
}

/// Decompresses and unpacks; answers the digest of the tar.
fn unpack_plain(
    context: &Context<'_>,
    name: &LayerName,
    packed: impl Read,
    rootfs: &Path,
    budget: &Budget,
) -> Result<Digest, ImageProblem> {
    let refused = |source| ImageProblem::Unpack { layer: name.diff_id.clone(), source };
    let damaged = |source| refused(UnpackError::Damaged { after: "(start)".to_owned(), source });
    let plain = decompress(BufReader::with_capacity(1 << 18, packed)).map_err(damaged)?;
    let mut plain = Hashed::new(plain, context, Some(budget));
    let limits = UnpackLimits { bytes_max: budget.left(), ..context.config.limits };
    let unpacked = unpack(&mut plain, rootfs, limits).map_err(refused)?;
    // A tar ends before its file does.
    io::copy(&mut plain, &mut io::sink()).map_err(damaged)?;
    // Sparse files are more than what the tar says of them.
    budget.spend(unpacked.bytes.saturating_sub(plain.read)).map_err(damaged)?;
    Ok(plain.finish())
}

fn compare(what: &str, expected: Option<&Digest>, found: Digest) -> Result<(), ImageProblem> {
    match expected {
        Some(expected) if *expected != found => Err(ImageProblem::Mismatch { what: what.to_owned(), expected: expected.clone(), found }),
        _ => Ok(()),
    }
}

fn diffs(data_dir: &Path) -> PathBuf {
    data_dir.join("images/diffs")
}

fn note_of(data_dir: &Path, diff_id: &Digest) -> PathBuf {
    diffs(data_dir).join(diff_id.hex())
}

fn note(data_dir: &Path, diff_id: &Digest, id: &str) -> Result<(), ImageProblem> {
    super::records::write_aside(&note_of(data_dir, diff_id), id.as_bytes())
}

/// Forgets notes whose layers are gone.
pub(in crate::template) fn sweep_notes(data_dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(diffs(data_dir)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        // Unreadable is as good as gone: the layer would be brought again.
        let is_there = fs::read_to_string(&path).is_ok_and(|id| layer::folder_of(data_dir, &id).is_dir());
        if !is_there {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// By the first bytes: media types are wrong often enough.
fn decompress<'a>(mut packed: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let start = packed.fill_buf()?;
    if start.starts_with(&[0x1f, 0x8b]) {
        Ok(Box::new(flate2::bufread::MultiGzDecoder::new(packed)))
    } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        Ok(Box::new(zstd::Decoder::with_buffer(packed)?))
    } else {
        Ok(Box::new(packed))
    }
}

/// Counts, hashes, and ends when nobody waits any more.
struct Hashed<'a, R> {
    inner: R,
    hasher: Sha256,
    context: &'a Context<'a>,
    budget: Option<&'a Budget>,
    read: u64,
}

impl<'a, R> Hashed<'a, R> {
    fn new(inner: R, context: &'a Context<'a>, budget: Option<&'a Budget>) -> Self {
        Self { inner, hasher: Sha256::new(), context, budget, read: 0 }
    }

    fn finish(self) -> Digest {
        Digest::from_hash(self.hasher.finalize().as_slice())
    }
}

impl<R: Read> Read for Hashed<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.context.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("the pull was cancelled"));
        }
        let read = self.inner.read(buffer)?;
        if let Some(budget) = self.budget {
            budget.spend(read as u64)?;
        }
        self.read += read as u64;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

/// The file, decompressed if need be, in an unnamed file below `data_dir`: archives are read here and there.
pub(super) fn plain_file(path: &Path, context: &Context<'_>) -> Result<fs::File, ImageProblem> {
    let failed = |doing| move |source| ImageProblem::File { doing, path: path.to_owned(), source };
    let mut opened = fs::File::open(path).map_err(failed("open"))?;
    let mut start = [0; 4];
    let read = io::Read::by_ref(&mut opened).take(4).read(&mut start).map_err(failed("read"))?;
    io::Seek::rewind(&mut opened).map_err(failed("read"))?;
    let is_packed = start[..read].starts_with(&[0x1f, 0x8b]) || start[..read] == [0x28, 0xb5, 0x2f, 0xfd];
    if !is_packed {
        return Ok(opened);
    }
    let budget = Budget::of(context);
    let incoming = Incoming::new(&context.config.data_dir)?;
    let aside = incoming.scratch().join("archive.tar");
    let mut target = fs::File::create_new(&aside).map_err(failed("unpack"))?;
    let mut plain = Hashed::new(decompress(BufReader::new(opened)).map_err(failed("unpack"))?, context, Some(&budget));
    io::copy(&mut plain, &mut target).map_err(failed("unpack"))?;
    // The folder goes with `incoming`; who holds the file can still read it.
    fs::File::open(&aside).map_err(failed("open"))
}
