//! What a server does once: folders, the shared mount, programs, pools.

use super::room::Lookout;
use super::roots::Roots;
use super::{Kernel, Shared, orphans, pools, room};
use crate::model::{DumpKey, InstanceId};
use crate::runtime::agent::{self, AgentLayerError};
use crate::runtime::cgroup::{CgroupError, Cgroups};
use crate::runtime::config::RuntimeConfig;
use crate::runtime::criu_binary::{self, CriuBinary};
use crate::runtime::disk::{DiskKind, Disks, make_private};
use crate::runtime::helper::bundle::fingerprint;
use crate::runtime::helper::client::Helpers;
use crate::runtime::layout::Layout;
use crate::runtime::network::{Network, NetworkError};
use crate::runtime::uids::UidPool;
use crate::runtime::volumes::Volumes;
use crate::sys::mountinfo::mount_point;
use nix::mount::{MsFlags, mount};
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Why the runtime cannot work on this machine.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The data folder.
    #[error("cannot {action} {}", path.display())]
    DataDir {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Limits cannot be set.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// No way out for sandboxes.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Nothing to start in sandboxes.
    #[error(transparent)]
    Agent(#[from] AgentLayerError),
}

impl Kernel {
    /// Takes the data folder into use; its lock is the caller's business. Call [`super::Runtime::adopt`] for what runs,
    /// then [`super::Runtime::sweep`].
    ///
    /// `instance` is the folder's mark in the names of kernel objects.
    pub async fn open(config: RuntimeConfig, instance: InstanceId) -> Result<Self, OpenError> {
        let data_dir = config.data_dir.clone();
        let layout = blocking(move || open_data_dir(&data_dir)).await?;
        // Only now: its pins are mounts below the data folder, which the new mount of that would hide.
        let network = Network::open(config.network.clone(), instance, layout.data_dir()).await?;
        let shared = blocking(move || open_rest(config, instance, layout, network)).await?;
        tokio::spawn(orphans::reap_forever());
        let kernel = Self(Arc::new(shared));
        if let Err(error) = kernel.blocking(Shared::sweep_roots).await {
            tracing::error!(
                error = &*error as &dyn std::error::Error,
                "Root file systems that an earlier server made ahead cannot be removed"
            );
        }
        tokio::spawn(room::watch_forever(Arc::downgrade(&kernel.0)));
        kernel.keep_roots();
        kernel.0.helpers.start();
        Ok(kernel)
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, OpenError> + Send + 'static) -> Result<T, OpenError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()))
}

fn wrong(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::DataDir { action, path, source }
}

fn open_data_dir(data_dir: &Path) -> Result<Layout, OpenError> {
    let layout = Layout::new(data_dir).map_err(wrong("use", data_dir))?;
    share(layout.data_dir()).map_err(wrong("make a shared mount of", layout.data_dir()))?;
    make_private(&layout.sandboxes()).map_err(wrong("make", &layout.sandboxes()))?;
    Ok(layout)
}

fn open_rest(config: RuntimeConfig, instance: InstanceId, layout: Layout, network: Network) -> Result<Shared, OpenError> {
    // Sandboxes' first processes become ours when their helper ends, so that their exit status reaches us.
    nix::sys::prctl::set_child_subreaper(true).map_err(|errno| wrong("become the subreaper for", layout.data_dir())(errno.into()))?;
    pools::widen();
    let disks = Disks::open(layout.clone(), config.disk_driver, config.disk_free_min);
    if disks.kind() == DiskKind::Folder {
        tracing::warn!(
            "Disks are plain folders, without loop devices (modprobe loop; runtime.disk_driver): they have no size limit, and nothing can be paused"
        );
    }
    let agent = agent::install(&layout)?;
    let criu = usable_criu(&layout, config.criu.as_deref());
    let dump_key = DumpKey {
        kernel: read_line("/proc/sys/kernel/osrelease"),
        cpu_flags: cpu_flags(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
        criu: criu.as_ref().map(|criu| criu.sha256.clone()).unwrap_or_default(),
        agent: agent.clone(),
        inner_address: network.inner_address().to_string(),
        confinement: fingerprint(config.mounts, config.ptys_max)
            .map_err(|error| wrong("describe sandboxes of", layout.data_dir())(error.into()))?,
    };
    Ok(Shared {
        volumes: Volumes::new(layout.clone(), disks.clone()),
        disks,
        cgroups: Cgroups::open(instance)?,
        uids: UidPool::new(config.uid_ranges, instance),
        network,
        roots: Roots::new(config.pool_roots),
        lookout: Lookout::default(),
        helpers: Helpers::new(&config.helper, criu.as_ref().map(|criu| criu.path.as_path()), layout.data_dir(), config.helper_time_max),
        agent,
        criu,
        host_boot_id: read_line("/proc/sys/kernel/random/boot_id"),
        dump_key,
        live: Mutex::new(HashMap::new()),
        layout,
        config,
    })
}

/// A server without CRIU still starts sandboxes; it cannot pause them.
fn usable_criu(layout: &Layout, configured: Option<&Path>) -> Option<CriuBinary> {
    match criu_binary::install(layout.data_dir(), configured) {
        Ok(criu) => Some(criu),
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "No usable CRIU: nothing can be paused, every start is a cold one");
            None
        }
    }
}

/// Makes the data folder a shared mount: helpers and sandboxes that copy the mount table then follow our unmounts, and
/// no copy of theirs keeps a disk busy that we believe free. May be repeated.
fn share(data_dir: &Path) -> io::Result<()> {
    let none: Option<&str> = None;
    if !is_mount_point(data_dir)? {
        mount(Some(data_dir), data_dir, none, MsFlags::MS_BIND, none)?;
    }
    mount(none, data_dir, none, MsFlags::MS_SHARED, none)?;
    Ok(())
}

fn is_mount_point(path: &Path) -> io::Result<bool> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table.lines().filter_map(|line| mount_point(line.as_bytes())).any(|point| point == path))
}

fn read_line(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// The flags of the first CPU, sorted.
fn cpu_flags(cpuinfo: &str) -> String {
    let line = cpuinfo.lines().find(|line| line.starts_with("flags"));
    let flags: BTreeSet<&str> =
        line.and_then(|line| line.split_once(':')).map(|(_, flags)| flags.split_whitespace().collect()).unwrap_or_default();
    flags.into_iter().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_flags_are_sorted_and_taken_once() {
        assert_eq!(cpu_flags("processor: 0\nflags\t\t: sse2 fpu avx\n\nprocessor: 1\nflags\t\t: x\n"), "avx fpu sse2");
    }
}
