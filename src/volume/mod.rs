//! Volumes for their users: names, sizes, tokens, and their files without a sandbox.
//!
//! ```text
//! create   storage ─> row          what has no row is swept by the next server
//! remove   row, unless somebody has it mounted ─> storage
//! ```
//! Who has a volume mounted, rows tell: a create writes its sandbox's row and looks for its volumes in one transaction,
//! a removal looks for such rows in its own. [`files`] is what the content API does below a volume's root.

mod files;

pub use files::{EntryKind, EntryStat, FileError, Force, NewFile, Owner, VolumePath};

use crate::model::{ByteSize, MountPath, ParseVolumeError, SandboxId, TemplateId, VolumeId, VolumeMount, VolumeName, VolumeRecord};
use crate::runtime::volumes::{VolumeError, Volumes as Storage};
use crate::sandbox::InstallKey;
use crate::store::{Store, StoreError, volumes};
use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use time::OffsetDateTime;
use tokio::sync::Mutex;

/// What the tokens of volumes are signatures of, beside the id.
const TOKEN_PURPOSE: &str = "volume-content";
/// Smaller ones would have no room for a journal.
const SIZE_MIN: ByteSize = ByteSize::mib(16);

/// Bounds of volumes. Each has a key in config/stillbox.toml.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VolumeConfig {
    /// Of a volume whose creator names no size.
    pub size: ByteSize,
    /// Of one volume.
    pub size_max: ByteSize,
    /// Volumes of this data folder.
    pub count_max: u32,
}

impl Default for VolumeConfig {
    fn default() -> Self {
        Self { size: ByteSize::gib(10), size_max: ByteSize::gib(1024), count_max: 1000 }
    }
}

/// What the volumes of one server need.
#[derive(Debug)]
pub struct VolumesMeans {
    /// Bounds.
    pub config: VolumeConfig,
    /// Their rows.
    pub store: Store,
    /// Their bytes.
    pub storage: Storage,
    /// Tokens are made of it.
    pub key: InstallKey,
}

/// A volume and how full it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Its row.
    pub record: VolumeRecord,
    /// Bytes of its files.
    pub used: ByteSize,
}

/// Nobody knows this volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("volume {0} does not exist")]
pub struct UnknownVolume(pub VolumeId);

/// Why a volume was not made, changed or removed.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// Not there.
    #[error(transparent)]
    Unknown(#[from] UnknownVolume),
    /// The name is taken.
    #[error("a volume named '{0}' exists already")]
    NameTaken(VolumeName),
    /// There are enough.
    #[error("there are {limit} volumes, which is the limit (volumes.count_max); remove some or raise it")]
    TooMany {
        /// The bound.
        limit: u32,
    },
    /// Too small, or too large.
    #[error("a volume of {asked} is not possible here: at least {SIZE_MIN}, at most {limit} (volumes.size_max)")]
    Size {
        /// What was asked for.
        asked: ByteSize,
        /// The bound.
        limit: ByteSize,
    },
    /// Volumes grow only.
    #[error("volume '{name}' has {size} and cannot shrink to {asked}")]
    Shrinks {
        /// Which.
        name: VolumeName,
        /// What it has.
        size: ByteSize,
        /// What was asked for.
        asked: ByteSize,
    },
    /// Somebody has it mounted.
    #[error("volume '{name}' is mounted in {}; kill or delete them first", users(sandboxes, snapshots))]
    InUse {
        /// Which.
        name: VolumeName,
        /// In these sandboxes.
        sandboxes: Vec<SandboxId>,
        /// In these stored snapshots, clones' included.
        snapshots: Vec<TemplateId>,
    },
    /// Not while a sandbox has it mounted.
    #[error("volume '{name}' is mounted in a sandbox, and this machine grows only what is not; pause or kill it first")]
    CannotGrowNow {
        /// Which.
        name: VolumeName,
    },
    /// The machine's disk is full.
    #[error(transparent)]
    NoRoom(VolumeError),
    /// The disk said no.
    #[error(transparent)]
    Storage(VolumeError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<VolumeError> for ChangeError {
    fn from(error: VolumeError) -> Self {
        match error {
            VolumeError::Disk(_) => Self::NoRoom(error),
            VolumeError::Tool { .. } | VolumeError::Mounted | VolumeError::Io { .. } => Self::Storage(error),
        }
    }
}

fn users(sandboxes: &[SandboxId], snapshots: &[TemplateId]) -> String {
    let sandboxes = sandboxes.iter().map(|id| format!("sandbox {id}"));
    let snapshots = snapshots.iter().map(|id| format!("snapshot {id}"));
    sandboxes.chain(snapshots).collect::<Vec<_>>().join(", ")
}

/// Why a sandbox cannot have the mounts that it asks for.
#[derive(Debug, thiserror::Error)]
pub enum MountsError {
    /// No such volume.
    #[error("invalid mounts: volumeMounts names the volume '{0}', which does not exist")]
    Unknown(String),
    /// Not a path that a volume can be mounted at.
    #[error("invalid mounts: {0}")]
    Path(ParseVolumeError),
    /// One path for two volumes.
    #[error("invalid mounts: the path '{0}' is named twice")]
    Twice(MountPath),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// All volumes of this data folder. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Volumes(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    means: VolumesMeans,
    /// Held by whoever makes, grows or removes one: names and sizes do not change meanwhile.
    changing: Mutex<()>,
}

impl Volumes {
    /// Removes what an earlier server left half made or half removed.
    pub async fn open(means: VolumesMeans) -> Result<Self, ChangeError> {
        let opened = Self(Arc::new(Shared { means, changing: Mutex::default() }));
        let keep: BTreeSet<VolumeId> = opened.records().await?.into_iter().map(|record| record.id).collect();
        opened.blocking(move |storage| storage.sweep(&keep)).await?;
        Ok(opened)
    }

    /// A new, empty volume. Goes on when the caller vanishes.
    pub async fn create(&self, name: VolumeName, size: Option<ByteSize>) -> Result<VolumeInfo, ChangeError> {
        let volumes = self.clone();
        to_its_end(async move { volumes.create_to_end(name, size).await }).await
    }

    async fn create_to_end(&self, name: VolumeName, size: Option<ByteSize>) -> Result<VolumeInfo, ChangeError> {
        let _changing = self.0.changing.lock().await;
        let config = self.0.means.config;
        let size = self.checked_size(size.unwrap_or(config.size))?;
        let records = self.records().await?;
        if records.iter().any(|record| record.name == name) {
            return Err(ChangeError::NameTaken(name));
        }
        if records.len() >= usize::try_from(config.count_max).unwrap_or(usize::MAX) {
            return Err(ChangeError::TooMany { limit: config.count_max });
        }
        let record = VolumeRecord { id: VolumeId::random(), name, size, created_at: OffsetDateTime::now_utc() };
        let (id, row) = (record.id, record.clone());
        let made = self.blocking(move |storage| storage.make(id, size)).await;
        let written = match made {
            Ok(()) => self.0.means.store.write(move |db| volumes::insert(db, &row)).await.map_err(ChangeError::from),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = written {
            self.remove_storage(id).await;
            return Err(error);
        }
        tracing::info!(volume = %id, "Created volume {id} ({})", record.name);
        self.info(record).await
    }

    /// All of them, oldest first.
    pub async fn list(&self) -> Result<Vec<VolumeInfo>, ChangeError> {
        let mut infos = Vec::new();
        for record in self.records().await? {
            infos.push(self.info(record).await?);
        }
        Ok(infos)
    }

    /// One of them.
    pub async fn get(&self, id: VolumeId) -> Result<VolumeInfo, ChangeError> {
        let record = self.record(id).await?;
        self.info(record).await
    }

    /// Gives it more room. Goes on when the caller vanishes.
    pub async fn grow(&self, id: VolumeId, size: ByteSize) -> Result<VolumeInfo, ChangeError> {
        let volumes = self.clone();
        to_its_end(async move { volumes.grow_to_end(id, size).await }).await
    }

    async fn grow_to_end(&self, id: VolumeId, size: ByteSize) -> Result<VolumeInfo, ChangeError> {
        let _changing = self.0.changing.lock().await;
        let record = self.record(id).await?;
        let size = self.checked_size(size)?;
        if size < record.size {
            return Err(ChangeError::Shrinks { name: record.name, size: record.size, asked: size });
        }
        if size > record.size {
            match self.blocking(move |storage| storage.grow(id, size)).await {
                Err(VolumeError::Mounted) => return Err(ChangeError::CannotGrowNow { name: record.name }),
                other => other?,
            }
            self.0.means.store.write(move |db| volumes::set_size(db, id, size)).await?;
        }
        self.info(VolumeRecord { size, ..record }).await
    }

    /// Removes it and its files, unless somebody has it mounted. Goes on when the caller vanishes.
    pub async fn remove(&self, id: VolumeId) -> Result<(), ChangeError> {
        let volumes = self.clone();
        to_its_end(async move { volumes.remove_to_end(id).await }).await
    }

    async fn remove_to_end(&self, id: VolumeId) -> Result<(), ChangeError> {
        let _changing = self.0.changing.lock().await;
        let name = self.record(id).await?.name;
        let users = self.0.means.store.write(move |db| {
            let users = volumes::users(db, id)?;
            if users.is_empty() {
                volumes::remove(db, id)?;
            }
            Ok(users)
        });
        let users = users.await?;
        if !users.is_empty() {
            return Err(ChangeError::InUse { name, sandboxes: users.sandboxes, snapshots: users.snapshots });
        }
        self.remove_storage(id).await;
        tracing::info!(volume = %id, "Removed volume {id} ({name})");
        Ok(())
    }

    /// The next server tries again.
    async fn remove_storage(&self, id: VolumeId) {
        if let Err(error) = self.blocking(move |storage| storage.remove(id)).await {
            tracing::error!(volume = %id, error = &error as &dyn std::error::Error, "What volume {id} held cannot be removed");
        }
    }

    /// The mounts that a sandbox asks for: volumes by name or id, each at a path of its own.
    pub async fn mounts(&self, asked: &[(String, String)]) -> Result<Vec<VolumeMount>, MountsError> {
        if asked.is_empty() {
            return Ok(Vec::new());
        }
        let records = self.records().await?;
        let mut mounts: Vec<VolumeMount> = Vec::new();
        for (volume, path) in asked {
            let path: MountPath = path.parse().map_err(MountsError::Path)?;
            if mounts.iter().any(|mount| mount.path == path) {
                return Err(MountsError::Twice(path));
            }
            let is_it = |record: &&VolumeRecord| record.name.as_str() == volume || record.id.to_string() == *volume;
            let record = records.iter().find(is_it).ok_or_else(|| MountsError::Unknown(volume.chars().take(64).collect()))?;
            mounts.push(VolumeMount { volume: record.id, name: record.name.clone(), path });
        }
        Ok(mounts)
    }

    /// What opens the files of a volume, whether it exists or not.
    pub fn token(&self, id: VolumeId) -> String {
        self.0.means.key.sign(TOKEN_PURPOSE, &id.to_string())
    }

    /// Whether `given` is that token, in constant time.
    pub fn accepts_token(&self, id: VolumeId, given: &str) -> bool {
        self.0.means.key.is_signed(TOKEN_PURPOSE, &id.to_string(), given)
    }

    /// Does something with the files of a volume, on a thread that may block.
    pub async fn with_files<T: Send + 'static>(
        &self,
        id: VolumeId,
        work: impl FnOnce(&files::Root) -> Result<T, FileError> + Send + 'static,
    ) -> Result<T, FileError> {
        match self.record(id).await {
            Ok(_) => {}
            Err(ChangeError::Unknown(unknown)) => return Err(FileError::NoVolume(unknown)),
            Err(error) => return Err(FileError::Storage(io::Error::other(error))),
        }
        let storage = self.0.means.storage.clone();
        let worked = tokio::task::spawn_blocking(move || {
            let root = storage.open(id).map_err(|error| FileError::Storage(io::Error::other(error)))?;
            work(&files::Root::open(&root)?)
        });
        worked.await.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()))
    }

    fn checked_size(&self, asked: ByteSize) -> Result<ByteSize, ChangeError> {
        let limit = self.0.means.config.size_max;
        match (SIZE_MIN..=limit).contains(&asked) {
            true => Ok(asked),
            false => Err(ChangeError::Size { asked, limit }),
        }
    }

    async fn info(&self, record: VolumeRecord) -> Result<VolumeInfo, ChangeError> {
        let id = record.id;
        let used = self.blocking(move |storage| storage.used(id)).await?;
        Ok(VolumeInfo { record, used })
    }

    async fn record(&self, id: VolumeId) -> Result<VolumeRecord, ChangeError> {
        let record = self.0.means.store.read(move |db| volumes::by_id(db, id)).await?;
        record.ok_or(ChangeError::Unknown(UnknownVolume(id)))
    }

    async fn records(&self) -> Result<Vec<VolumeRecord>, StoreError> {
        self.0.means.store.read(volumes::all).await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Storage) -> Result<T, VolumeError> + Send + 'static,
    ) -> Result<T, VolumeError> {
        let storage = self.0.means.storage.clone();
        let worked = tokio::task::spawn_blocking(move || work(&storage));
        worked.await.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()))
    }
}

/// In a task of its own: it goes on when the caller vanishes.
async fn to_its_end<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    tokio::spawn(work).await.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()))
}
