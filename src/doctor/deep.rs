//! A real sandbox from `base`: started cold, dumped while it runs, restored on the second copy of its disk, removed.
//!
//! In a data folder of its own below the configured one, with an instance id of its own, so that a running server's
//! sandboxes are not touched. What create-as-restore, pause and fork build on either holds here or is named.

use crate::config::Config;
use crate::model::{InstanceId, NetworkPolicy, SandboxId};
use crate::runtime::kernel::{self, Kernel};
use crate::runtime::{AfterDump, DiskSource, DumpRequest, Runtime, RuntimeError, StartFrom, StartRequest};
use crate::template::{BuiltInError, Manifest, Recipe, bootstrap};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// What failed on the way.
#[derive(Debug, thiserror::Error)]
pub enum DeepError {
    /// There is no base template and none can be made.
    #[error("the base template cannot be made")]
    Template(#[from] BuiltInError),
    /// The kernel side cannot be opened.
    #[error(transparent)]
    Open(#[from] kernel::OpenError),
    /// A start, a dump or a restore failed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The agent inside did not answer.
    #[error("the agent did not answer within {0:?} after the {1}")]
    Silent(Duration, &'static str),
    /// Files of the trial cannot be made.
    #[error("{path} cannot be used")]
    Files {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The async runtime cannot be set up.
    #[error("no async runtime")]
    Setup(#[source] io::Error),
}

/// How long each step took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeepReport {
    cold_start: Duration,
    dump: Duration,
    standstill: Duration,
    restore: Duration,
}

impl fmt::Display for DeepReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "ok    {:<12} cold start {:.1} ms, dump {:.1} ms (stood still {:.1} ms), restore on a copy of the disk {:.1} ms",
            "deep",
            ms(self.cold_start),
            ms(self.dump),
            ms(self.standstill),
            ms(self.restore)
        )
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// The agent's port inside (contract/e2b.md 3).
const AGENT_PORT: u16 = stillbox_agent::wire::AGENT_PORT;
const ANSWER_MAX: Duration = Duration::from_secs(20);

/// Runs the trial and removes all of it again, also when it failed.
pub(super) fn run(config: &Config) -> Result<DeepReport, DeepError> {
    let recipe = Recipe::built_in("base").map_err(BuiltInError::from)?;
    let manifest = bootstrap::ensure(&recipe, &config.template, &|line: &str| println!("      {:<12} {line}", "template"))
        .map_err(BuiltInError::from)?;
    let folder = TrialFolder::make(&config.data_dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(DeepError::Setup)?;
    runtime.block_on(async {
        let settings = crate::runtime::config::RuntimeConfig { data_dir: folder.path.clone(), ..config.runtime.clone() };
        let kernel = Kernel::open(settings, InstanceId::random()).await?;
        let (source, copy) = (SandboxId::random(), SandboxId::random());
        let outcome = trial(&kernel, config, &manifest, &folder, source, copy).await;
        let gone = [kernel.destroy(source).await, kernel.destroy(copy).await];
        kernel.close().await;
        let report = outcome?;
        gone.into_iter().collect::<Result<(), _>>()?;
        Ok(report)
    })
}

async fn trial(
    kernel: &Kernel,
    config: &Config,
    manifest: &Manifest,
    folder: &TrialFolder,
    source: SandboxId,
    copy: SandboxId,
) -> Result<DeepReport, DeepError> {
    let request = |id, disk, from| StartRequest {
        id,
        layers: manifest.layers.clone(),
        disk,
        resources: config.resources,
        network: NetworkPolicy::default(),
        volumes: Vec::new(),
        from,
    };
    let started = Instant::now();
    let cold = StartFrom::Cold { control_secret: "0".repeat(stillbox_agent::wire::CONTROL_SECRET_LEN) };
    kernel.start(request(source, DiskSource::Fresh, cold)).await?;
    answer(kernel, source, "cold start").await?;
    let cold_start = started.elapsed();

    let images = folder.subfolder("images")?;
    let disk = folder.path.join("disk-copy.img");
    let started = Instant::now();
    let dumped = kernel
        .dump(DumpRequest { id: source, after: AfterDump::KeepRunning, images: images.clone(), disk_copy: Some(disk.clone()) })
        .await?;
    let dump = started.elapsed();
    answer(kernel, source, "dump").await?;

    let started = Instant::now();
    let from = StartFrom::Dump { images, criu: dumped.criu, agent: dumped.agent };
    kernel.start(request(copy, DiskSource::CopyOf(disk), from)).await?;
    answer(kernel, copy, "restore").await?;
    Ok(DeepReport { cold_start, dump, standstill: dumped.standstill, restore: started.elapsed() })
}

/// Waits until the agent's /health says 204.
async fn answer(kernel: &Kernel, id: SandboxId, after: &'static str) -> Result<(), DeepError> {
    let asked = Instant::now();
    while asked.elapsed() < ANSWER_MAX {
        if health(kernel, id).await.is_ok_and(|is_well| is_well) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Err(DeepError::Silent(ANSWER_MAX, after))
}

async fn health(kernel: &Kernel, id: SandboxId) -> io::Result<bool> {
    let mut stream = kernel.dial(id, AGENT_PORT).await?;
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
    let mut head = [0u8; 12];
    stream.read_exact(&mut head).await?;
    Ok(&head == b"HTTP/1.1 204")
}

/// A data folder for the trial: the real one's layers, everything else its own. Removed when dropped.
#[derive(Debug)]
struct TrialFolder {
    path: PathBuf,
}

impl TrialFolder {
    fn make(data_dir: &Path) -> Result<Self, DeepError> {
        let path = data_dir.join(format!("doctor-{}", InstanceId::random()));
        let failed = |source| DeepError::Files { path: path.clone(), source };
        std::fs::create_dir_all(&path).map_err(failed)?;
        std::os::unix::fs::symlink(data_dir.join("layers"), path.join("layers")).map_err(failed)?;
        Ok(Self { path })
    }

    fn subfolder(&self, name: &str) -> Result<PathBuf, DeepError> {
        let path = self.path.join(name);
        std::fs::create_dir(&path).map_err(|source| DeepError::Files { path: path.clone(), source })?;
        Ok(path)
    }
}

impl Drop for TrialFolder {
    fn drop(&mut self) {
        // Kernel::open has made it a mount point of its own.
        let _not_mounted = nix::mount::umount2(&self.path, nix::mount::MntFlags::MNT_DETACH);
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            eprintln!("stillbox: {} could not be removed: {error}", self.path.display());
        }
    }
}
