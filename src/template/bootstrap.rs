//! Making a built-in template's root file system: from an earlier start, the cache, an archive, or Debian's packages.
//!
//! [`ensure`] is called at start and by `stillbox template build`. What it makes is immutable: a layer named by its
//! content and a manifest named by the recipe's hash. mmdebstrap runs as a child in a mount namespace with a tmpfs
//! (half of its time is fsync otherwise), gives a tar on its standard output, and that is unpacked like any other.
//! Blocking; never touches the store.

use super::archive::{self, ArchiveError, Imported, Manifest};
use super::layer::{self, Incoming, LayerError};
use super::lease::Lease;
use super::mirror::{self, MirrorError, Mirrors};
use super::recipe::{Ground, RecipeError, Rootfs};
use super::unpack::{UnpackError, unpack};
use super::{Recipe, TemplateConfig, layered};
use sha2::{Digest, Sha256};
use std::collections::VecDeque;
use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// What verifies Debian's archive, on Debian and on others alike (package debian-archive-keyring).
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Below this much free memory the work is done on disk.
const TMPFS_MEMORY_MIN_KIB: u64 = 3 << 20;
/// How much of mmdebstrap's output an error shows.
const LOG_LINES_SHOWN: usize = 25;

/// Told what is going on, one line at a time, from any thread.
pub type Progress<'a> = &'a (dyn Fn(&str) + Sync);

/// Why a built-in template could not be made. Nothing half-made is left.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// A program is missing.
    #[error(
        "{program} cannot be started ({source}); install it (apt-get install {package}), or start from an archive made elsewhere (--template-archive FILE)"
    )]
    Program {
        /// Its name.
        program: &'static str,
        /// Debian's package.
        package: &'static str,
        /// The kernel's word.
        source: io::Error,
    },
    /// Debian's keys are missing.
    #[error("{KEYRING} is missing, and nothing is installed unverified; apt-get install debian-archive-keyring")]
    Keyring,
    /// No mirror to take packages from.
    #[error(transparent)]
    Mirror(#[from] MirrorError),
    /// It ended with an error.
    #[error("{program} failed ({status}); its output ends:\n{log}\n{hint}")]
    Failed {
        /// What ran.
        program: &'static str,
        /// Exit code or signal.
        status: String,
        /// The last lines.
        log: String,
        /// The next step.
        hint: &'static str,
    },
    /// What it made could not be unpacked.
    #[error("could not unpack what mmdebstrap made")]
    Unpack(#[from] UnpackError),
    /// A layer could not be stored.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The template below was removed meanwhile.
    #[error("template {name} was removed while another was made on it; run it again")]
    Gone {
        /// Its name.
        name: String,
    },
    /// The recipe below, which is part of this binary, is wrong.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// The manifest could not be written.
    #[error("could not write {}", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
}

/// The template that `recipe` describes, complete in `data_dir` afterwards.
pub fn ensure(recipe: &Recipe, config: &TemplateConfig, progress: Progress<'_>) -> Result<Manifest, BootstrapError> {
    if let Err(error) = layer::sweep_incoming(&config.data_dir) {
        progress(&format!("could not remove half-made layers of an earlier run, which take up space: {error}"));
    }
    if let Some(manifest) = finished(recipe, &config.data_dir) {
        return Ok(manifest);
    }
    let started = Instant::now();
    let Imported { manifest, held } = match from_cache(recipe, config, progress) {
        Some(imported) => imported,
        None => {
            let held = layers(recipe, config, progress)?;
            let manifest = Manifest::of_recipe(recipe, held.iter().map(|layer| layer.id().to_owned()).collect());
            put_in_cache(&manifest, config, progress);
            Imported { manifest, held }
        }
    };
    save(&manifest, &config.data_dir)?;
    drop(held);
    progress(&format!("template {} is ready after {:.1} s", recipe.name, started.elapsed().as_secs_f64()));
    Ok(manifest)
}

/// Makes what the recipe describes, what lies below it included.
fn layers(recipe: &Recipe, config: &TemplateConfig, progress: Progress<'_>) -> Result<Vec<Lease>, BootstrapError> {
    match &recipe.ground {
        Ground::Rootfs(rootfs) => Ok(vec![bootstrap(recipe, rootfs, config, progress)?]),
        Ground::Layer(layer) => {
            let below = ensure(&Recipe::built_in(&layer.from)?, config, progress)?;
            layered::build(recipe, layer, &below, config, progress)
        }
    }
}

// ---------------------------------------------------------------- manifests in the data folder

fn manifest_file(data_dir: &Path, name: &str, origin: &str) -> PathBuf {
    data_dir.join("templates").join(format!("{name}-{origin}.json"))
}

/// What an earlier start or import made of this very recipe, if all of it is there.
pub fn finished(recipe: &Recipe, data_dir: &Path) -> Option<Manifest> {
    let text = fs::read(manifest_file(data_dir, &recipe.name, &recipe.hash)).ok()?;
    let manifest: Manifest = serde_json::from_slice(&text).ok()?;
    let is_whole = manifest.layers.iter().all(|id| layer::folder_of(data_dir, id).is_dir());
    (manifest.origin == recipe.hash && is_whole).then_some(manifest)
}

/// Makes the template of an imported or finished manifest known to later starts: aside, synced, renamed.
pub fn save(manifest: &Manifest, data_dir: &Path) -> Result<(), BootstrapError> {
    let path = manifest_file(data_dir, &manifest.name, &manifest.origin);
    let failed = |source| BootstrapError::Manifest { path: path.clone(), source };
    let folder = data_dir.join("templates");
    let aside = folder.join(format!("incoming-{}", uuid::Uuid::new_v4().simple()));
    let text = serde_json::to_vec_pretty(manifest).map_err(|error| failed(error.into()))?;
    let write = || {
        fs::create_dir_all(&folder)?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700))?;
        fs::write(&aside, &text)?;
        fs::File::open(&aside)?.sync_all()?;
        fs::rename(&aside, &path)?;
        fs::File::open(&folder)?.sync_all()
    };
    write().map_err(failed)
}

// ---------------------------------------------------------------- the cache

fn cache_files(config: &TemplateConfig, name: &str, origin: &str) -> Option<(PathBuf, PathBuf)> {
    let folder = config.cache_dir.as_ref()?.join(name);
    Some((folder.join(format!("{origin}.tar.zst")), folder.join(format!("{origin}.tar.zst.sha256"))))
}

/// The cache saves time and is never trusted: a wrong sum or a bad archive means making it anew.
fn from_cache(recipe: &Recipe, config: &TemplateConfig, progress: Progress<'_>) -> Option<Imported> {
    let (file, sum_file) = cache_files(config, &recipe.name, &recipe.hash)?;
    let wanted = fs::read_to_string(&sum_file).ok()?;
    let problem = match sum_of(&file) {
        Ok(sum) if sum == wanted.trim() => match archive::import(&file, &config.data_dir, config.limits) {
            Ok(imported) if imported.manifest.origin == recipe.hash && imported.manifest.name == recipe.name => {
                progress(&format!("template {} unpacked from {}", recipe.name, file.display()));
                return Some(imported);
            }
            Ok(_) => "it holds another template".to_owned(),
            Err(error) => with_causes(&error),
        },
        Ok(_) => "its checksum is wrong".to_owned(),
        Err(error) => error.to_string(),
    };
    progress(&format!("{} is not used: {problem}; making the template anew", file.display()));
    None
}

fn put_in_cache(manifest: &Manifest, config: &TemplateConfig, progress: Progress<'_>) {
    let Some((file, sum_file)) = cache_files(config, &manifest.name, &manifest.origin) else { return };
    let write = || -> Result<(), ArchiveError> {
        let failed = |source| ArchiveError::File { doing: "write", path: file.clone(), source };
        fs::create_dir_all(file.parent().unwrap_or(Path::new("/"))).map_err(failed)?;
        archive::export(manifest, &config.data_dir, &file)?;
        fs::write(&sum_file, sum_of(&file).map_err(failed)?).map_err(failed)
    };
    if let Err(error) = write() {
        progress(&format!("the cache was not written, which costs the next fresh start its time: {}", with_causes(&error)));
    }
}

fn sum_of(file: &Path) -> io::Result<String> {
    let mut file = fs::File::open(file)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hex::encode(hasher.finalize()));
        }
        hasher.update(&buffer[..read]);
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

// ---------------------------------------------------------------- mmdebstrap

/// Makes the recipe's root file system from packages and answers the layer.
fn bootstrap(recipe: &Recipe, rootfs: &Rootfs, config: &TemplateConfig, progress: Progress<'_>) -> Result<Lease, BootstrapError> {
    if !Path::new(KEYRING).exists() {
        return Err(BootstrapError::Keyring);
    }
    let mirrors = mirror::find(config)?;
    progress(&format!("making template {} from {} of {} (about a minute, once)", recipe.name, rootfs.suite, mirrors.main));
    let incoming = Incoming::new(&config.data_dir)?;
    let work = incoming.scratch();
    write_recipe(recipe, &work.join("recipe")).map_err(|source| BootstrapError::Manifest { path: work.join("recipe"), source })?;
    let mut child = start(recipe, rootfs, &mirrors, work)?;
    let log = Log::default();
    let unpacked = std::thread::scope(|scope| {
        let stderr = child.0.stderr.take();
        scope.spawn(|| stderr.map(|stderr| log.follow(stderr, progress)));
        let stdout = child.0.stdout.take().expect("standard output is piped by start()");
        let unpacked = unpack(stdout, &incoming.rootfs(), config.limits);
        if unpacked.is_err() {
            child.stop();
        }
        unpacked
    });
    let status = child.0.wait().map_err(|source| BootstrapError::Program { program: "mmdebstrap", package: "mmdebstrap", source })?;
    // When it failed, its own words say more than the tar that ended early.
    if !status.success() && !child.1 {
        let log = log.end();
        return Err(BootstrapError::Failed { program: "mmdebstrap", status: status.to_string(), hint: hint_for(&log), log });
    }
    let unpacked = unpacked?;
    progress(&format!("unpacked {} files, {} MiB", unpacked.entries, unpacked.bytes >> 20));
    Ok(incoming.commit(None)?)
}

pub(super) fn write_recipe(recipe: &Recipe, folder: &Path) -> io::Result<()> {
    for (name, content) in &recipe.files {
        let file = folder.join(name);
        fs::create_dir_all(file.parent().unwrap_or(folder))?;
        fs::write(file, content)?;
    }
    Ok(())
}

/// The child, and whether it was stopped by us. Dropped while running, it is stopped.
pub(super) struct Running(pub(super) Child, bool);

impl Running {
    pub(super) fn of(child: Child) -> Self {
        Self(child, false)
    }

    /// SIGTERM, on which mmdebstrap removes what it has made.
    fn stop(&mut self) {
        self.1 = true;
        if let Ok(pid) = i32::try_from(self.0.id()) {
            // Already gone is as good.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            self.stop();
            let _ = self.0.wait();
        }
    }
}

fn start(recipe: &Recipe, rootfs: &Rootfs, mirrors: &Mirrors, work: &Path) -> Result<Running, BootstrapError> {
    let missing = |program, package| move |source| BootstrapError::Program { program, package, source };
    // unshare would only report exit code 127 for it.
    Command::new("mmdebstrap")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .map_err(missing("mmdebstrap", "mmdebstrap"))?;
    let rootfs_work = work.join("mmdebstrap");
    fs::create_dir(&rootfs_work).map_err(|source| BootstrapError::Manifest { path: rootfs_work.clone(), source })?;
    let script = match tmpfs_kib() {
        Some(kib) => format!("mount -t tmpfs -o size={kib}k,mode=0755 stillbox \"$TMPDIR\" && exec \"$@\""),
        None => "exec \"$@\"".to_owned(),
    };
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script, "sh", "mmdebstrap"]);
    command.args(arguments(recipe, rootfs, mirrors));
    command.env("TMPDIR", &rootfs_work).env("STILLBOX_RECIPE", work.join("recipe")).env("LC_ALL", "C.UTF-8");
    command.env("SOURCE_DATE_EPOCH", start_of_today().to_string());
    command.envs(mirror::proxies());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(Running::of(command.spawn().map_err(missing("unshare", "util-linux"))?))
}

/// Times are clamped to the day's start: two builds on a day are alike, and no file is older than the compiled Python
/// that was made of it.
fn start_of_today() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    now - now % 86_400
}

/// Size for a tmpfs, or `None` where memory is short.
fn tmpfs_kib() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let available: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    (available >= TMPFS_MEMORY_MIN_KIB).then_some(available / 10 * 6)
}

/// Hooks get the recipe's folder by $STILLBOX_RECIPE; names in it are plain (recipe.rs), so they need no quotes.
fn arguments(recipe: &Recipe, rootfs: &Rootfs, mirrors: &Mirrors) -> Vec<String> {
    let mut arguments = vec![
        "--mode=root".to_owned(),
        "--format=tar".to_owned(),
        format!("--variant={}", rootfs.variant),
        format!("--include={}", rootfs.packages.join(",")),
        format!("--keyring={KEYRING}"),
    ];
    arguments.extend(rootfs.apt_options.iter().map(|option| format!("--aptopt={option}")));
    arguments.extend(rootfs.dpkg_options.iter().map(|option| format!("--dpkgopt={option}")));
    arguments.extend(finishing(recipe).iter().map(|line| format!("--customize-hook={line}")));
    arguments.push(rootfs.suite.clone());
    arguments.push("-".to_owned());
    arguments.extend(mirrors.source_lines(rootfs));
    arguments
}

/// Shell lines that put the recipe's files in place and run its scripts; `$1` is the root file system.
pub(super) fn finishing(recipe: &Recipe) -> Vec<String> {
    let files = recipe.added.iter().map(|file| {
        let (mode, source, path) = (&file.mode, &file.source, &file.path);
        format!("install -D -o 0 -g 0 -m {mode} \"$STILLBOX_RECIPE\"/{source} \"$1\"{path}")
    });
    let scripts = recipe.hooks.customize.iter().map(|script| format!("chroot \"$1\" /bin/sh -eu < \"$STILLBOX_RECIPE\"/{script}"));
    files.chain(scripts).collect()
}

/// The last lines of the child's standard error.
#[derive(Default)]
pub(super) struct Log(std::sync::Mutex<VecDeque<String>>);

impl Log {
    pub(super) fn follow(&self, stderr: impl Read, progress: Progress<'_>) {
        for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
            let line: String = String::from_utf8_lossy(&line).chars().filter(|c| !c.is_control()).take(500).collect();
            if let Some(step) = line.strip_prefix("I: ").filter(|step| is_step(step)) {
                progress(step.trim_end_matches('.'));
            }
            let mut lines = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            lines.push_back(line);
            if lines.len() > LOG_LINES_SHOWN {
                lines.pop_front();
            }
        }
    }

    pub(super) fn end(&self) -> String {
        let lines = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        lines.iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
    }
}

/// What takes time, of what mmdebstrap says.
fn is_step(line: &str) -> bool {
    ["running apt-get update", "downloading", "extracting", "installing", "compiling", "finishing", "creating tarball"]
        .iter()
        .any(|step| line.starts_with(step))
}

/// The next step for what most often goes wrong.
pub(super) fn hint_for(log: &str) -> &'static str {
    if log.contains("NO_PUBKEY") || log.contains("not signed") {
        "this machine's debian-archive-keyring is older than the release; apt-get update && apt-get install debian-archive-keyring"
    } else if log.contains("Could not resolve") || log.contains("Could not connect") || log.contains("Failed to fetch") {
        "the mirror cannot be reached; check the network, name another one (template.debian_mirror), or start from an archive made elsewhere (--template-archive FILE)"
    } else if log.contains("No space left") {
        "free some space in data_dir, or memory"
    } else {
        "run it again; if it stays, start from an archive made elsewhere (--template-archive FILE)"
    }
}
