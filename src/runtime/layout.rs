//! Where the runtime keeps what: paths below the data folder, in one place.

use crate::model::{SandboxId, VolumeId};
use std::path::{Path, PathBuf};

/// The data folder's paths. Absolute, without symbolic links.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    data_dir: PathBuf,
}

impl Layout {
    /// The paths below `data_dir`, which exists.
    pub fn new(data_dir: &Path) -> std::io::Result<Self> {
        Ok(Self { data_dir: data_dir.canonicalize()? })
    }

    /// The data folder itself: a shared mount, so that helpers follow what is mounted below it.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// An unpacked layer.
    pub fn layer(&self, id: &str) -> PathBuf {
        self.data_dir.join("layers").join(id)
    }

    /// The layer that holds the agent with this SHA-256.
    pub fn agent_layer(&self, sha256: &str) -> PathBuf {
        self.data_dir.join("agents").join(sha256)
    }

    /// Formatted, empty disk images, one per size.
    pub fn empty_disks(&self) -> PathBuf {
        self.data_dir.join("disks")
    }

    /// All volumes' folders.
    pub fn volumes(&self) -> PathBuf {
        self.data_dir.join("volumes")
    }

    /// One volume's folder.
    pub fn volume(&self, id: VolumeId) -> VolumeFolder {
        VolumeFolder { path: self.volumes().join(id.to_string()) }
    }

    /// All sandboxes' folders.
    pub fn sandboxes(&self) -> PathBuf {
        self.data_dir.join("sandboxes")
    }

    /// The folder of root file systems that are made before they are anybody's.
    pub fn roots(&self) -> SandboxFolder {
        SandboxFolder::at(self.data_dir.join("roots"))
    }

    /// One of them.
    pub fn root(&self, name: &str) -> SandboxFolder {
        SandboxFolder::at(self.data_dir.join("roots").join(name))
    }

    /// One sandbox's folder.
    pub fn sandbox(&self, id: SandboxId) -> SandboxFolder {
        SandboxFolder { path: self.sandboxes().join(id.as_str()) }
    }
}

/// `sandboxes/<id>`, or, before it is anybody's, `roots/<name>`.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct SandboxFolder {
    path: PathBuf,
}

impl SandboxFolder {
    /// The one at this path.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its disk as an image file.
    pub fn disk_image(&self) -> PathBuf {
        self.path.join("disk.img")
    }

    /// Its disk as a folder, where the machine has no loop devices.
    pub fn disk_folder(&self) -> PathBuf {
        self.path.join("disk.dir")
    }

    /// Where the disk is mounted, ids mapped.
    pub fn disk_mount(&self) -> PathBuf {
        self.path.join("disk")
    }

    /// Where the root file system is mounted.
    pub fn root_mount(&self) -> PathBuf {
        self.path.join("root")
    }

    /// What the agent printed before it reopened its outputs.
    pub fn agent_log(&self) -> PathBuf {
        self.path.join("agent.log")
    }

    /// CRIU's logs and sockets.
    pub fn work(&self) -> PathBuf {
        self.path.join("work")
    }
}

/// What a volume's image is called: not as sandboxes' disks are, so that the two are told apart by it.
pub(crate) const VOLUME_IMAGE: &str = "volume.img";

/// `volumes/<id>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeFolder {
    path: PathBuf,
}

impl VolumeFolder {
    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its storage as an image file.
    pub fn image(&self) -> PathBuf {
        self.path.join(VOLUME_IMAGE)
    }

    /// Where that is mounted; without loop devices, the storage itself.
    pub fn files(&self) -> PathBuf {
        self.path.join("files")
    }
}
