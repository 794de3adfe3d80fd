//! What libcontainer is told: one description for all sandboxes, but for where root and cgroup are.
//!
//! Everything in it is chosen so that CRIU can dump what comes of it; checkpoint.md section 1 has the reasons.

use super::super::agent::{AGENT_PATH, BOOT_ID_PATH};
use super::super::config::SandboxMounts;
use super::super::devices::DEVICE_NODES;
use super::container::OPEN_FILES_MAX;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::path::Path;

/// System calls that cannot be dumped or that nobody needs: config/seccomp.json, an OCI profile.
const SECCOMP: &str = include_str!("../../../config/seccomp.json");

/// What root inside may do. Not among them: NET_ADMIN (the egress rules' neighbourhood), SYS_RESOURCE, MKNOD, and all
/// that reaches the host from any user namespace.
const CAPABILITIES: [&str; 18] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
];

/// Where things are for one container.
#[derive(Debug)]
pub(super) struct Places<'a> {
    /// The root file system.
    pub(super) root: &'a Path,
    /// The cgroup, from each hierarchy's root.
    pub(super) cgroup: &'a Path,
    /// The user namespace to join, as a path that libcontainer's children can open.
    pub(super) userns: &'a Path,
    /// What root inside may mount.
    pub(super) mounts: SandboxMounts,
    /// Terminals at once.
    pub(super) ptys_max: u32,
}

/// The container's description, `config.json` of an OCI bundle.
pub(super) fn describe(places: &Places<'_>) -> Result<Value, serde_json::Error> {
    let mut capabilities = CAPABILITIES.to_vec();
    match places.mounts {
        SandboxMounts::User => capabilities.push("CAP_SYS_ADMIN"),
        SandboxMounts::None => {}
    }
    let seccomp: Value = serde_json::from_str(SECCOMP)?;
    Ok(json!({
        "ociVersion": "1.0.2",
        "root": { "path": places.root, "readonly": false },
        "hostname": "sandbox",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": [AGENT_PATH],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"],
            "cwd": "/",
            // No noNewPrivileges key: sudo works, and the filter is loaded before capabilities are dropped.
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
                "inheritable": [], "ambient": []
            }
        },
        "mounts": mounts(places),
        "linux": {
            "cgroupsPath": places.cgroup,
            // The network namespace is made inside the user one: only then can CRIU repair TCP connections in it.
            "namespaces": [
                { "type": "user", "path": places.userns }, { "type": "pid" }, { "type": "mount" }, { "type": "uts" },
                { "type": "ipc" }, { "type": "cgroup" }, { "type": "network" }
            ],
            "seccomp": seccomp
        }
    }))
}

/// What a sandbox lives within, as one value: all that a cold start says of it and no restore changes. A dump of before it
/// changed would bring the old one back.
pub(in crate::runtime) fn fingerprint(mounts: SandboxMounts, ptys_max: u32) -> Result<String, serde_json::Error> {
    let anywhere = Path::new("/");
    let described = describe(&Places { root: anywhere, cgroup: anywhere, userns: anywhere, mounts, ptys_max })?;
    let baked = format!("{described} {DEVICE_NODES:?} {OPEN_FILES_MAX}");
    Ok(hex::encode(Sha256::digest(baked)))
}

/// No tmpfs: each costs a tar|gzip chain at every dump. No cgroup mount: it dumps and then fails to restore.
fn mounts(places: &Places<'_>) -> Value {
    let terminals = format!("max={}", places.ptys_max);
    let boot_id = places.root.join(BOOT_ID_PATH.trim_start_matches('/'));
    json!([
        { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "nodev", "noexec"] },
        { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
          "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5", terminals] },
        { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "nodev", "noexec", "ro"] },
        { "destination": "/proc/sys/kernel/random/boot_id", "type": "bind", "source": boot_id, "options": ["bind", "ro"] }
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_of_what_is_described_and_of_nothing_else() {
        let usual = fingerprint(SandboxMounts::User, 64).unwrap();
        assert_eq!(usual, fingerprint(SandboxMounts::User, 64).unwrap());
        assert_ne!(usual, fingerprint(SandboxMounts::None, 64).unwrap());
        assert_ne!(usual, fingerprint(SandboxMounts::User, 65).unwrap());
    }
}
