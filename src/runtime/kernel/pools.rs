//! What the kernel counts for the whole machine, and one sandbox alone could use up.
//!
//! Terminals, asynchronous I/O, process numbers and tracked connections come out of pools that no cgroup and no user
//! namespace divides: root inside mounts one devpts after the other and takes all of the machine's terminals, and any user
//! takes all events of asynchronous I/O. Each of these costs memory, processes or connections too, and of those a sandbox
//! has its own: so the pools are made so large that it meets its own limits first. They are bounds and take nothing.

use std::path::Path;

/// A bound of the kernel's, below /proc/sys, and what it has to be at least.
#[derive(Debug, Clone, Copy)]
struct Pool {
    file: &'static str,
    least: u64,
}

const POOLS: [Pool; 4] = [
    // As large as it can be. systemd sets it likewise; the kernel's own 32768 are eight sandboxes of 4096 processes.
    Pool { file: "kernel/pid_max", least: 4_194_304 },
    // As large as it can be, instead of 4096. A terminal costs a sandbox about 2 KiB of its memory.
    Pool { file: "kernel/pty/max", least: 1 << 20 },
    // Events, instead of 65536. Each is 32 bytes of the memory of who asks for it.
    Pool { file: "fs/aio-max-nr", least: 1 << 32 },
    // Instead of 65536: a hundred sandboxes with all the connections that they may have (network/rules.rs).
    Pool { file: "net/netfilter/nf_conntrack_max", least: 1 << 19 },
];

/// Makes each pool large enough. What cannot be changed (a container's read-only /proc/sys) is told and left.
pub(super) fn widen() {
    for pool in POOLS {
        let path = Path::new("/proc/sys").join(pool.file);
        match widen_one(&path, pool.least) {
            Ok(()) => {}
            // A kernel without the feature has nothing to use up.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                let setting = pool.file.replace('/', ".");
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "One sandbox can use up what {setting} allows to the whole machine; set it to {} on the host",
                    pool.least
                );
            }
        }
    }
}

/// Writes `least` where less is set.
fn widen_one(path: &Path, least: u64) -> std::io::Result<()> {
    let now = std::fs::read_to_string(path)?;
    match now.trim().parse::<u64>() {
        Ok(now) if now >= least => Ok(()),
        Ok(_) | Err(_) => std::fs::write(path, least.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_grows_and_never_shrinks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("max");
        for (now, then) in [("4096\n", "5000"), ("5000\n", "5000\n"), ("9000\n", "9000\n")] {
            std::fs::write(&path, now).unwrap();
            widen_one(&path, 5000).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), then);
        }
        assert_eq!(widen_one(&folder.path().join("none"), 1).unwrap_err().kind(), std::io::ErrorKind::NotFound);
    }
}
