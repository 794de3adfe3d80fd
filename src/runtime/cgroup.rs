//! Limits and accounts of sandboxes: one cgroup each, on v2 or in every v1 hierarchy, below `stillbox-<instance>`.
//!
//! The group lies at the hierarchy's root, not below the server's unit: systemd cannot restart a unit whose own cgroup
//! has children with controllers, and sandboxes outlive the server.

use super::devices::allowed_devices;
use crate::model::{ByteSize, InstanceId, Resources, SandboxId};
use crate::sys::{device_policy, process};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long killed processes may take to leave.
const EMPTY_TIME_MAX: Duration = Duration::from_secs(10);
/// Between two looks at something that ends by itself soon.
const POLL_EVERY: Duration = Duration::from_millis(2);
/// The scheduler's period that CPU limits are shares of.
const CPU_PERIOD_US: u64 = 100_000;

/// What could not be done to a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The machine has no usable hierarchy.
    #[error("no cgroup hierarchy with {0} is mounted; see `stillbox doctor`")]
    Missing(&'static str),
    /// A file or folder said no.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// `make`, `write`, `read`, `remove`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Processes in uninterruptible sleep, most likely.
    #[error("processes {pids:?} in {} are still there {} s after SIGKILL", path.display(), EMPTY_TIME_MAX.as_secs())]
    StillThere {
        /// The cgroup.
        path: PathBuf,
        /// Who.
        pids: Vec<i32>,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io { action, path, source }
}

/// The machine's kind of cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    /// One hierarchy with all controllers.
    V2,
    /// One hierarchy per controller.
    V1,
}

/// The cgroups of one server.
#[derive(Debug, Clone)]
pub struct Cgroups {
    version: Version,
    hierarchies: Vec<Hierarchy>,
    group: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    controllers: Vec<String>,
}

/// What is limited or counted by a controller of v1; the freezer, which holds the tasks of a dump whose CRIU is killed; and
/// systemd's own hierarchy, by which it tells whose processes are whose.
/// Each further one would cost every sandbox its part of a create and a kill (a cpuset's removal 3 ms) and limit nothing.
const WANTED_V1: [&str; 7] = ["memory", "cpu", "cpuacct", "pids", "devices", "freezer", "name=systemd"];

impl Hierarchy {
    fn is_wanted(&self) -> bool {
        WANTED_V1.iter().any(|controller| self.has(controller))
    }

    fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|name| name == controller)
    }
}

impl Cgroups {
    /// Finds the hierarchies and makes this instance's group in each. May be repeated.
    pub fn open(instance: InstanceId) -> Result<Self, CgroupError> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(failed("read", Path::new("/proc/self/mountinfo")))?;
        let (version, hierarchies) = detect(&mounts);
        let cgroups = Self { version, hierarchies, group: format!("stillbox-{instance}") };
        match version {
            Version::V2 => cgroups.prepare_v2()?,
            Version::V1 => cgroups.prepare_v1()?,
        }
        Ok(cgroups)
    }

    fn prepare_v2(&self) -> Result<(), CgroupError> {
        let root = &self.hierarchies.first().ok_or(CgroupError::Missing("cgroup v2"))?.mount;
        match enable_controllers(root) {
            // In a container the root of what we see is a group with processes in it, which may not hand controllers
            // down; they move into a group of their own.
            Err(CgroupError::Io { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => {
                leave_root(root)?;
                enable_controllers(root)?;
            }
            enabled => enabled?,
        }
        let group = root.join(&self.group);
        make(&group)?;
        enable_controllers(&group)
    }

    fn prepare_v1(&self) -> Result<(), CgroupError> {
        for controller in ["memory", "cpu", "pids", "devices"] {
            if !self.hierarchies.iter().any(|hierarchy| hierarchy.has(controller)) {
                return Err(CgroupError::Missing(controller));
            }
        }
        for hierarchy in &self.hierarchies {
            make(&hierarchy.mount.join(&self.group))?;
            inherit_cpuset(hierarchy, &hierarchy.mount, &hierarchy.mount.join(&self.group))?;
        }
        Ok(())
    }

    /// Makes the cgroup of a sandbox with its limits and device policy; nobody is in it yet.
    pub fn make(&self, id: SandboxId, resources: &Resources) -> Result<Cgroup, CgroupError> {
        let cgroup = self.of(id);
        let made = cgroup.folders.iter().try_for_each(|(_, path)| make(path)).and_then(|()| match self.version {
            Version::V2 => cgroup.limit_v2(resources),
            Version::V1 => self.limit_v1(&cgroup, resources),
        });
        if let Err(error) = made {
            // The first failure is the one worth reporting.
            let _ = cgroup.remove();
            return Err(error);
        }
        Ok(cgroup)
    }

    fn limit_v1(&self, cgroup: &Cgroup, resources: &Resources) -> Result<(), CgroupError> {
        for (hierarchy, path) in &cgroup.folders {
            inherit_cpuset(hierarchy, &hierarchy.mount.join(&self.group), path)?;
        }
        let memory = cgroup.folder("memory")?;
        write(&memory.join("memory.limit_in_bytes"), resources.memory.bytes())?;
        // Memory and swap together: no swap. The file is missing where swap accounting is off.
        let with_swap = memory.join("memory.memsw.limit_in_bytes");
        match with_swap.exists() {
            true => write(&with_swap, resources.memory.bytes())?,
            false => write(&memory.join("memory.swappiness"), 0)?,
        }
        let cpu = cgroup.folder("cpu")?;
        write(&cpu.join("cpu.cfs_period_us"), CPU_PERIOD_US)?;
        write(&cpu.join("cpu.cfs_quota_us"), u64::from(resources.cpu_count) * CPU_PERIOD_US)?;
        write(&cgroup.folder("pids")?.join("pids.max"), resources.pids_max)?;
        let devices = cgroup.folder("devices")?;
        write(&devices.join("devices.deny"), "a")?;
        for device in allowed_devices() {
            let minor = device.minor.map_or_else(|| "*".to_owned(), |minor| minor.to_string());
            write(&devices.join("devices.allow"), format!("c {}:{minor} rwm", device.major))?;
        }
        Ok(())
    }

    /// The cgroup of a sandbox, whether it exists or not.
    pub fn of(&self, id: SandboxId) -> Cgroup {
        let path_of = |hierarchy: &Hierarchy| hierarchy.mount.join(&self.group).join(id.as_str());
        let folders = self.hierarchies.iter().map(|hierarchy| (hierarchy.clone(), path_of(hierarchy))).collect();
        Cgroup { version: self.version, folders, path: Path::new("/").join(&self.group).join(id.as_str()) }
    }

    /// The sandboxes that have a cgroup.
    pub fn sandboxes(&self) -> Vec<SandboxId> {
        let mut ids: Vec<SandboxId> = self
            .hierarchies
            .iter()
            .filter_map(|hierarchy| fs::read_dir(hierarchy.mount.join(&self.group)).ok())
            .flat_map(|entries| entries.flatten())
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Removes this instance's group, unless sandboxes are left in it.
    pub fn close(&self) {
        for hierarchy in &self.hierarchies {
            // Running sandboxes keep it, which is right.
            let _ = fs::remove_dir(hierarchy.mount.join(&self.group));
        }
    }
}

/// One sandbox's cgroup.
#[derive(Debug, Clone)]
pub struct Cgroup {
    version: Version,
    folders: Vec<(Hierarchy, PathBuf)>,
    path: PathBuf,
}

/// What a cgroup has used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CgroupUsage {
    /// CPU time since it was made, in nanoseconds.
    pub cpu_ns: u64,
    /// Memory without page cache, in bytes.
    pub memory_used_bytes: u64,
    /// Page cache, in bytes.
    pub memory_cache_bytes: u64,
}

impl Cgroup {
    /// Its folders: one on v2, one per hierarchy on v1.
    pub fn folders(&self) -> Vec<PathBuf> {
        self.folders.iter().map(|(_, path)| path.clone()).collect()
    }

    /// Its path from each hierarchy's root.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn limit_v2(&self, resources: &Resources) -> Result<(), CgroupError> {
        let folder = self.folder("memory")?;
        write(&folder.join("memory.max"), resources.memory.bytes())?;
        // The file is missing where the kernel has no swap.
        let swap = folder.join("memory.swap.max");
        if swap.exists() {
            write(&swap, 0)?;
        }
        write(&folder.join("cpu.max"), format!("{} {CPU_PERIOD_US}", u64::from(resources.cpu_count) * CPU_PERIOD_US))?;
        write(&folder.join("pids.max"), resources.pids_max)?;
        let opened = fs::File::open(folder).map_err(failed("read", folder))?;
        device_policy::restrict(opened.as_fd(), &allowed_devices()).map_err(failed("set the device policy of", folder))
    }

    /// Replaces the memory limit while processes run. v1 keeps memory with swap at least as large as memory alone at every
    /// moment, so one of the two goes first.
    pub fn set_memory(&self, memory: ByteSize) -> Result<(), CgroupError> {
        let folder = self.folder("memory")?;
        let bytes = memory.bytes();
        match self.version {
            Version::V2 => write(&folder.join("memory.max"), bytes),
            Version::V1 => {
                let alone = folder.join("memory.limit_in_bytes");
                let with_swap = Some(folder.join("memory.memsw.limit_in_bytes")).filter(|file| file.exists());
                let now: u64 = read(&alone)?.trim().parse().unwrap_or(0);
                let both = [Some(alone), with_swap];
                let in_order = if bytes > now { [1, 0] } else { [0, 1] };
                in_order.into_iter().filter_map(|place| both[place].as_ref()).try_for_each(|file| write(file, bytes))
            }
        }
    }

    fn folder(&self, controller: &'static str) -> Result<&Path, CgroupError> {
        let found = self.folders.iter().find(|(hierarchy, _)| self.version == Version::V2 || hierarchy.has(controller));
        found.map(|(_, path)| path.as_path()).ok_or(CgroupError::Missing(controller))
    }

    /// What it has used; an error when it does not exist.
    pub fn usage(&self) -> Result<CgroupUsage, CgroupError> {
        let (cpu_ns, total, prefix) = match self.version {
            Version::V2 => {
                let cpu = read(&self.folder("cpu")?.join("cpu.stat"))?;
                (field(&cpu, "usage_usec") * 1000, "memory.current", "")
            }
            Version::V1 => {
                let cpu = read(&self.folder("cpuacct")?.join("cpuacct.usage"))?;
                (cpu.trim().parse().unwrap_or(0), "memory.usage_in_bytes", "total_")
            }
        };
        let memory = self.folder("memory")?;
        let total: u64 = read(&memory.join(total))?.trim().parse().unwrap_or(0);
        let stat = read(&memory.join("memory.stat"))?;
        // Not `cache` or `file`: those count shared memory too, which is the program's own.
        let cache = field(&stat, &format!("{prefix}active_file")) + field(&stat, &format!("{prefix}inactive_file"));
        Ok(CgroupUsage { cpu_ns, memory_used_bytes: total.saturating_sub(cache), memory_cache_bytes: cache })
    }

    /// Processes that the kernel killed because the memory limit was met; 0 when the cgroup is gone.
    pub fn oom_kills(&self) -> u64 {
        let file = match self.version {
            Version::V2 => "memory.events",
            Version::V1 => "memory.oom_control",
        };
        let text = self.folder("memory").ok().and_then(|folder| fs::read_to_string(folder.join(file)).ok());
        text.map_or(0, |text| field(&text, "oom_kill"))
    }

    /// Kills every process in it and waits until none is left. Succeeds when it does not exist.
    pub fn kill_all(&self) -> Result<(), CgroupError> {
        self.thaw();
        let deadline = Instant::now() + EMPTY_TIME_MAX;
        for (_, folder) in &self.folders {
            loop {
                let pids = pids_in(folder);
                if pids.is_empty() {
                    break;
                }
                if Instant::now() > deadline {
                    return Err(CgroupError::StillThere { path: folder.clone(), pids });
                }
                kill_in(folder, &pids);
                std::thread::sleep(POLL_EVERY);
            }
        }
        Ok(())
    }

    /// A helper that was killed may have left it frozen: nobody in it runs then, and on v1 nobody can be killed either.
    /// Succeeds when it does not exist.
    pub fn thaw(&self) {
        for (_, folder) in &self.folders {
            for (file, thawed) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
                let file = folder.join(file);
                if file.exists() {
                    // One that says no shows by its processes staying as they are.
                    let _ = fs::write(file, thawed);
                }
            }
        }
    }

    /// Removes it; nobody may be in it any more. Succeeds when it does not exist.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + EMPTY_TIME_MAX;
        for (_, folder) in &self.folders {
            loop {
                match fs::remove_dir(folder) {
                    Ok(()) => break,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                    // A dead process leaves its groups a moment after its parent knows.
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                        std::thread::sleep(POLL_EVERY);
                    }
                    Err(error) => return Err(failed("remove", folder)(error)),
                }
            }
        }
        Ok(())
    }
}

/// Reads the hierarchies out of /proc/self/mountinfo; the first mount of each counts.
fn detect(mountinfo: &str) -> (Version, Vec<Hierarchy>) {
    let mut legacy: Vec<Hierarchy> = Vec::new();
    let mut unified: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let Some(mount) = before.split(' ').nth(4).map(PathBuf::from) else { continue };
        let mut after = after.split(' ');
        match (after.next(), after.nth(1)) {
            (Some("cgroup"), Some(options)) => {
                let is_controller = |option: &&str| !matches!(*option, "rw" | "ro" | "xattr" | "clone_children");
                let controllers: Vec<String> = options.split(',').filter(is_controller).map(str::to_owned).collect();
                if !legacy.iter().any(|known| known.controllers == controllers) {
                    legacy.push(Hierarchy { mount, controllers });
                }
            }
            (Some("cgroup2"), _) if unified.is_empty() => unified.push(Hierarchy { mount, controllers: Vec::new() }),
            _ => {}
        }
    }
    let has_v1_memory = legacy.iter().any(|hierarchy| hierarchy.has("memory"));
    match has_v1_memory {
        // The v2 hierarchy of a hybrid machine has no controllers, and moving there costs an RCU grace period.
        true => (Version::V1, legacy.into_iter().filter(Hierarchy::is_wanted).collect()),
        false => (Version::V2, unified),
    }
}

fn enable_controllers(folder: &Path) -> Result<(), CgroupError> {
    write(&folder.join("cgroup.subtree_control"), "+cpu +memory +pids")
}

fn leave_root(root: &Path) -> Result<(), CgroupError> {
    let leaf = root.join("stillbox-host");
    make(&leaf)?;
    for pid in pids_in(root) {
        // A process may end while we look at it.
        let _ = fs::write(leaf.join("cgroup.procs"), pid.to_string());
    }
    Ok(())
}

/// A v1 cpuset takes nobody in before it has CPUs and memory nodes.
fn inherit_cpuset(hierarchy: &Hierarchy, parent: &Path, child: &Path) -> Result<(), CgroupError> {
    if hierarchy.has("cpuset") {
        for file in ["cpuset.cpus", "cpuset.mems"] {
            write(&child.join(file), read(&parent.join(file))?.trim())?;
        }
    }
    Ok(())
}

fn make(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed("make", path)(error)),
        _ => Ok(()),
    }
}

fn write(path: &Path, value: impl ToString) -> Result<(), CgroupError> {
    fs::write(path, value.to_string()).map_err(failed("write", path))
}

fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(failed("read", path))
}

/// The number behind `name` in a file of `name number` lines.
fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok());
    value.unwrap_or(0)
}

fn pids_in(folder: &Path) -> Vec<i32> {
    let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).collect()
}

/// Kills what is in `folder`. A pid that was reused between two looks must not hit a stranger: descriptors are
/// opened first, and only those whose pids are still listed afterwards are killed.
fn kill_in(folder: &Path, pids: &[i32]) {
    if fs::write(folder.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    let opened: Vec<_> = pids.iter().filter_map(|pid| Some((*pid, process::open_pidfd(*pid).ok()?))).collect();
    let listed = pids_in(folder);
    for (pid, pidfd) in opened {
        if listed.contains(&pid) {
            // It may have ended meanwhile.
            let _ = process::kill(pidfd.as_fd());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hybrid_machine_is_v1_and_its_empty_v2_hierarchy_is_left_alone() {
        let mountinfo = "\
30 20 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 30 0:31 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
36 30 0:32 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset
32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
34 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";
        let (version, hierarchies) = detect(mountinfo);
        assert_eq!(version, Version::V1);
        assert_eq!(hierarchies.len(), 4);
        assert!(hierarchies[0].has("cpu") && hierarchies[0].has("cpuacct") && !hierarchies[0].has("memory"));
    }

    #[test]
    fn a_machine_with_one_hierarchy_is_v2() {
        let (version, hierarchies) = detect("25 20 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate");
        assert_eq!((version, hierarchies.len()), (Version::V2, 1));
        assert_eq!(hierarchies[0].mount, Path::new("/sys/fs/cgroup"));
    }

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "oom 1\noom_kill 3\noom_group_kill 0\n";
        assert_eq!(field(text, "oom_kill"), 3);
        assert_eq!(field(text, "kill"), 0);
    }
}
