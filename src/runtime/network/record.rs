//! What is written down of a leased slot, beside its pin, for the next server: whose it is and which rules it has.

use crate::model::{NetworkPolicy, SandboxId};
use crate::sys::netns::{self, Netns};
use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A leased slot's owner and policy. Not synced: it means nothing after a reboot.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub(super) struct Record {
    pub(super) sandbox: SandboxId,
    pub(super) policy: NetworkPolicy,
}

impl Record {
    fn path(pins: &Path, slot: u32) -> PathBuf {
        pins.join(format!("{slot}.json"))
    }

    pub(super) fn read(pins: &Path, slot: u32) -> io::Result<Self> {
        serde_json::from_slice(&std::fs::read(Self::path(pins, slot))?).map_err(io::Error::other)
    }

    /// Whole or not at all, and for root's eyes only: a policy may hold a proxy's password and headers' values.
    pub(super) fn write(&self, pins: &Path, slot: u32) -> io::Result<()> {
        let aside = pins.join(format!("{slot}.json.new"));
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&aside)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        std::fs::rename(aside, Self::path(pins, slot))
    }

    pub(super) fn remove(pins: &Path, slot: u32) -> io::Result<()> {
        match std::fs::remove_file(Self::path(pins, slot)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether its rules are those that every slot has from the start.
    pub(super) fn has_default_rules(&self) -> bool {
        let policy = &self.policy;
        let is_default_egress = policy.deny_out.is_empty() && policy.allow_out.is_empty() && policy.egress_proxy.is_none();
        policy.allow_internet_access != Some(false) && is_default_egress && !policy.changes_requests()
    }
}

/// Numbers of the slots that exist; the folder is made if need be. Pins that lost their namespace (a reboot) are cleared
/// away.
pub(super) fn found_slots(pins: &Path) -> io::Result<Vec<u32>> {
    DirBuilder::new().recursive(true).mode(0o700).create(pins)?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(pins)? {
        let name = entry?.file_name();
        let Some(number) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        match Netns::open(&pins.join(&name)) {
            Ok(_) => found.push(number),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                netns::unpin(&pins.join(&name))?;
                Record::remove(pins, number)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}
