//! The agent's own layer, the bottom of every root file system: `agents/<sha256>`.
//!
//! A layer of its own and not a bind mount, because CRIU cannot dump a file that is bound in from the host. CRIU checks
//! mapped programs by build id, so an agent stays for as long as a sandbox or a snapshot has it.

use super::layout::Layout;
use crate::sys::disk::sync_filesystem;
use sha2::{Digest, Sha256};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

pub use stillbox_agent::wire::BOOT_ID_PATH;
/// The agent's path inside.
pub const AGENT_PATH: &str = "/.stillbox/agent";

/// What a boot id is before /init has brought the sandbox's own.
pub const BOOT_ID_UNSET: &str = "00000000-0000-4000-8000-000000000000\n";

/// A program inside this binary.
struct Embedded {
    bytes: &'static [u8],
    sha256: &'static str,
}

static EMBEDDED: Option<Embedded> = include!(concat!(env!("OUT_DIR"), "/embedded_agent.rs"));

/// Why there is no agent to start.
#[derive(Debug, thiserror::Error)]
pub enum AgentLayerError {
    /// STILLBOX_AGENT_BIN was empty at build time.
    #[error("this build carries no agent; build it without STILLBOX_AGENT_BIN= in the environment")]
    NotEmbedded,
    /// The data folder cannot be written.
    #[error("cannot unpack the agent to {}", path.display())]
    Unpack {
        /// The layer.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Unpacks this build's agent, unless it is there already, and returns its SHA-256 (hex).
pub fn install(layout: &Layout) -> Result<String, AgentLayerError> {
    let embedded = EMBEDDED.as_ref().ok_or(AgentLayerError::NotEmbedded)?;
    let layer = layout.agent_layer(embedded.sha256);
    let agent = layer.join(AGENT_PATH.trim_start_matches('/'));
    if !fs::read(&agent).is_ok_and(|found| hex::encode(Sha256::digest(&found)) == embedded.sha256) {
        unpack(&layer, embedded.bytes).map_err(|source| AgentLayerError::Unpack { path: layer, source })?;
    }
    Ok(embedded.sha256.to_owned())
}

/// Written aside and renamed, so that a layer is whole or not there. A damaged one is replaced: no sandbox can be
/// running from it.
fn unpack(layer: &Path, agent: &[u8]) -> io::Result<()> {
    let aside = layer.with_extension(format!("new.{}", std::process::id()));
    super::disk::make_private(layer.parent().unwrap_or(layer))?;
    fs::create_dir(&aside)?;
    fill(&aside, agent)?;
    match fs::remove_dir_all(layer) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    sync_filesystem(File::open(&aside)?.as_fd())?;
    fs::rename(&aside, layer)
}

/// The folders are what the runtime mounts on; templates lie above and usually have them as well.
fn fill(root: &Path, agent: &[u8]) -> io::Result<()> {
    let inside = |path: &str| root.join(path.trim_start_matches('/'));
    fs::set_permissions(root, fs::Permissions::from_mode(0o755))?;
    for path in ["proc", "sys", "dev", "run", "run/stillbox", ".stillbox"] {
        DirBuilder::new().mode(0o755).create(inside(path))?;
    }
    fs::create_dir(inside("tmp"))?;
    fs::set_permissions(inside("tmp"), fs::Permissions::from_mode(0o1777))?;
    fs::write(inside(AGENT_PATH), agent)?;
    fs::set_permissions(inside(AGENT_PATH), fs::Permissions::from_mode(0o755))?;
    fs::write(inside(BOOT_ID_PATH), BOOT_ID_UNSET)
}
