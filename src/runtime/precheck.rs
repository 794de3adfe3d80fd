//! The pre-dump check: what in a sandbox cannot be dumped, or could be dumped but never restored.
//!
//! An explicit allow-list over /proc of the sandbox's processes: what is not known to survive is refused by name,
//! before anything is touched, so that "cannot pause: gdb (pid 42) traces pid 7" reaches the user and the sandbox
//! goes on. The tasks run meanwhile; whatever slips through between check and dump fails in CRIU, which leaves them
//! running too. Two things must never slip through, since CRIU dumps them well and cannot restore them: file systems
//! mounted inside that are not on the list, and memory that a lazy restore has not brought in yet.
//!
//! This file reads /proc; [`judge`] decides and [`parse`] reads text, both without touching the system.

mod judge;
mod parse;

use super::Finding;
use super::fill::Fill;
use super::volumes::seen;
use crate::sys::xattr;
use judge::{FdFacts, SocketFacts};
use nix::sys::stat::{major, minor};
use parse::Status;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// More findings than this help nobody.
const FINDINGS_MAX: usize = 20;

/// Open files looked at; a sandbox with more is refused rather than half checked.
const FDS_MAX: usize = 200_000;

/// Processes of a dump: each costs it some 20 ms, during which all stand still, and a restore some memory of the sandbox's.
const PROCESSES_MAX: usize = 1000;

/// Pieces of shared memory: CRIU writes a file for each, ever more slowly (2000 take 1 s, 8000 take 9, 60,000 minutes).
const SHARED_MEMORY_MAX: usize = 4000;

/// Of one process's table of mappings, which is the sandbox's to fill.
const MAPS_BYTES_MAX: u64 = 32 << 20;

/// Mounts in all mount namespaces: each costs a dump, a restore and the unmounting some 20 ms.
const MOUNTS_MAX: usize = 200;

/// Mount tables are the sandbox's to fill.
const MOUNTINFO_BYTES_MAX: usize = 4 << 20;

/// The namespaces that every process must share with pid 1. The mount namespace may be another one; the two for
/// children differ from the process's own after an unshare.
const SHARED_NAMESPACES: [&str; 9] = ["user", "pid", "net", "ipc", "uts", "cgroup", "time", "pid_for_children", "time_for_children"];

/// Everything that keeps the sandbox whose pid 1 is `init` (as the host sees it) from being dumped. Empty: nothing
/// known does. Volumes are those below `volumes`. Reads some files per process and one link per open file; call it where blocking is allowed.
pub fn findings(init: i32, fill: Fill, volumes: &Path) -> io::Result<Vec<Finding>> {
    let mut check = Check::new(init, volumes)?;
    match fill {
        Fill::Complete => {}
        Fill::GoingOn => check.report(1, "memory", "is still being restored; try again in a moment".to_owned()),
        Fill::Lost => check.report(1, "memory", "was not restored to its end; the sandbox is torn".to_owned()),
    }
    check.walk(init, Check::process)
}

/// What CRIU dumps well and never restores, alone. Quick enough for tasks that stand still: one look per process, one
/// mount table per namespace.
pub(crate) fn never_restored(init: i32, volumes: &Path) -> io::Result<Vec<Finding>> {
    Check::new(init, volumes)?.walk(init, Check::mounts_of)
}

/// A resume mounts the root anew and refuses one that lacks what it needs.
pub fn missing(path: &Path) -> Finding {
    let reason = format!("has no plain /{} any more, which a resume needs; put it back", parse::printable(&path.to_string_lossy()));
    Finding { pid: 1, command: "the sandbox".to_owned(), reason }
}

/// One of its processes keeps us from reading what it has: its memory map is locked for as long as it waits in the kernel
/// for a file system that is served from inside.
pub fn unanswered(time_max: Duration) -> Finding {
    let reason = format!(
        "could not be looked through within {} s: a process in it waits in the kernel, most often for a FUSE mount",
        time_max.as_secs()
    );
    Finding { pid: 1, command: "the sandbox".to_owned(), reason }
}

struct Check {
    /// What `SHARED_NAMESPACES` are for pid 1.
    namespaces: BTreeMap<&'static str, PathBuf>,
    /// Devices of the root file system and of mounted volumes: binds of them are fine anywhere.
    known_devices: BTreeSet<String>,
    /// Mount namespaces that were judged, and the ids of all mounts in them.
    mount_namespaces: BTreeSet<PathBuf>,
    mount_ids: HashSet<u64>,
    fds_left: usize,
    processes_left: usize,
    /// Device and inode of each.
    shared_memory: HashSet<(String, u64)>,
    findings: Vec<Finding>,
}

impl Check {
    fn new(init: i32, volumes: &Path) -> io::Result<Check> {
        let mut namespaces = BTreeMap::new();
        for name in SHARED_NAMESPACES {
            // Kernels without time namespaces lack some of them.
            if let Ok(link) = fs::read_link(format!("/proc/{init}/ns/{name}")) {
                namespaces.insert(name, link);
            }
        }
        let mounts = parse::mountinfo(&read_mountinfo(init)?);
        // The last one mounted there is the one that is seen.
        let root = mounts.iter().rfind(|mount| mount.point == "/");
        let root_device = root.ok_or(io::ErrorKind::NotFound)?.device.clone();
        let volumes = seen::devices(volumes)?;
        let volumes = volumes.keys().map(|device| format!("{}:{}", major(*device), minor(*device)));
        Ok(Check {
            namespaces,
            known_devices: volumes.chain([root_device]).collect(),
            mount_namespaces: BTreeSet::new(),
            mount_ids: HashSet::new(),
            fds_left: FDS_MAX,
            processes_left: PROCESSES_MAX,
            shared_memory: HashSet::new(),
            findings: Vec::new(),
        })
    }

    /// Looks at all processes of the tree; `look` judges one and returns its children.
    fn walk(mut self, init: i32, look: fn(&mut Self, i32) -> io::Result<Vec<i32>>) -> io::Result<Vec<Finding>> {
        let mut waiting = vec![init];
        while let Some(pid) = waiting.pop() {
            if self.is_full() {
                break;
            }
            match look(&mut self, pid) {
                Ok(children) => waiting.extend(children),
                // It ended meanwhile, which pid 1 must not.
                Err(_) if pid != init => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.findings)
    }

    /// [`Check::process`], but for everything that a dump would refuse by itself.
    fn mounts_of(&mut self, pid: i32) -> io::Result<Vec<i32>> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let status = read_status(&proc)?;
        if status.is_zombie {
            return Ok(Vec::new());
        }
        let mut reasons = Vec::new();
        self.mounts(pid, &proc, &mut reasons)?;
        for reason in reasons {
            self.report(status.inner_pid, &status.command, reason);
        }
        Ok(fs::read_dir(proc.join("task"))?.flatten().flat_map(|task| children(&task.path())).collect())
    }

    fn is_full(&self) -> bool {
        self.findings.len() >= FINDINGS_MAX
    }

    fn report(&mut self, pid: i32, command: &str, reason: String) {
        let finding = Finding { pid, command: parse::printable(command), reason };
        if !self.is_full() && !self.findings.contains(&finding) {
            self.findings.push(finding);
        }
    }

    /// Judges one process and returns its children.
    fn process(&mut self, pid: i32) -> io::Result<Vec<i32>> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let status = read_status(&proc)?;
        if status.is_zombie {
            return Ok(Vec::new());
        }
        let mut reasons: Vec<String> = judge::tracer(&status).into_iter().collect();
        if self.processes_left == 0 {
            self.report(1, "the sandbox", format!("has more than {PROCESSES_MAX} processes; end some first"));
            return Ok(Vec::new());
        }
        self.processes_left -= 1;
        self.namespaces(&proc, &mut reasons);
        self.mounts(pid, &proc, &mut reasons)?;
        self.fds(&proc, &mut reasons)?;
        self.mappings(&proc, &mut reasons)?;
        let mut found = Vec::new();
        for task in fs::read_dir(proc.join("task"))?.flatten() {
            if let Ok(thread) = read_status(&task.path()) {
                reasons.extend(judge::tracer(&thread).filter(|reason| !reasons.contains(reason)));
            }
            found.extend(children(&task.path()));
        }
        for reason in reasons {
            self.report(status.inner_pid, &status.command, reason);
        }
        Ok(found)
    }

    fn namespaces(&self, proc: &Path, reasons: &mut Vec<String>) {
        for (name, expected) in &self.namespaces {
            let found = fs::read_link(proc.join("ns").join(name));
            reasons.extend(found.ok().and_then(|found| judge::namespace(name, &found, expected)));
        }
    }

    /// Each mount namespace is judged once, in the name of the first process found in it.
    fn mounts(&mut self, pid: i32, proc: &Path, reasons: &mut Vec<String>) -> io::Result<()> {
        if !self.mount_namespaces.insert(fs::read_link(proc.join("ns/mnt"))?) {
            return Ok(());
        }
        for mount in parse::mountinfo(&read_mountinfo(pid)?) {
            self.mount_ids.insert(mount.id);
            reasons.extend(judge::mount(&mount, &self.known_devices));
        }
        if self.mount_ids.len() > MOUNTS_MAX {
            reasons.push(format!("brings the mounts in the sandbox to more than {MOUNTS_MAX}; unmount some first"));
        }
        Ok(())
    }

    fn fds(&mut self, proc: &Path, reasons: &mut Vec<String>) -> io::Result<()> {
        for entry in fs::read_dir(proc.join("fd"))?.flatten() {
            if self.fds_left == 0 {
                reasons.push(format!("the sandbox has more than {FDS_MAX} open files"));
                return Ok(());
            }
            self.fds_left -= 1;
            let Some(facts) = read_fd(proc, &entry.path()) else { continue };
            let reason = judge::fd(&facts, &self.mount_ids, self.namespaces.values());
            reasons.extend(reason.filter(|reason| !reasons.contains(reason)));
        }
        Ok(())
    }

    /// Counts shared memory over all processes.
    fn mappings(&mut self, proc: &Path, reasons: &mut Vec<String>) -> io::Result<()> {
        use io::{BufRead, Read};
        let maps = io::BufReader::new(fs::File::open(proc.join("maps"))?.take(MAPS_BYTES_MAX));
        for line in maps.split(b'\n') {
            let line = line?;
            self.shared_memory.extend(parse::shared_memory(&String::from_utf8_lossy(&line)));
            if self.shared_memory.len() > SHARED_MEMORY_MAX {
                reasons.push(format!("brings the pieces of shared memory in the sandbox to more than {SHARED_MEMORY_MAX}"));
                return Ok(());
            }
        }
        Ok(())
    }
}

fn read_status(proc: &Path) -> io::Result<Status> {
    let bytes = fs::read(proc.join("status"))?;
    parse::status(&String::from_utf8_lossy(&bytes)).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The processes that one thread has forked.
fn children(task: &Path) -> Vec<i32> {
    let listed = fs::read_to_string(task.join("children")).unwrap_or_default();
    listed.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn read_mountinfo(pid: i32) -> io::Result<String> {
    use io::Read;
    let mut bytes = Vec::new();
    let limit = MOUNTINFO_BYTES_MAX as u64 + 1;
    fs::File::open(format!("/proc/{pid}/mountinfo"))?.take(limit).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// `None` for a descriptor that was closed meanwhile.
fn read_fd(proc: &Path, fd: &Path) -> Option<FdFacts> {
    let link = fs::read_link(fd).ok()?.to_string_lossy().into_owned();
    if link.starts_with("socket:") {
        let protocol = xattr::get(fd, c"system.sockprotoname").ok()?;
        let protocol = String::from_utf8_lossy(&protocol).trim_end_matches('\0').to_owned();
        return Some(FdFacts::Socket(SocketFacts { protocol }));
    }
    if !link.starts_with('/') {
        return Some(FdFacts::Kernel { link });
    }
    let metadata = fs::metadata(fd).ok()?;
    let info = fs::read_to_string(proc.join("fdinfo").join(fd.file_name()?)).ok()?;
    Some(FdFacts::File(judge::FileFacts {
        link,
        mode: metadata.mode(),
        device_number: metadata.rdev(),
        links: metadata.nlink(),
        bytes_on_disk: metadata.blocks().saturating_mul(512),
        mount_id: parse::mount_id(&info)?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_judged_against_itself() {
        // Not a sandbox, but it has a root file system and open files; what matters is that it is read at all.
        let own = i32::try_from(std::process::id()).unwrap();
        let mut check = Check::new(own, Path::new("/nowhere")).unwrap();
        assert!(check.namespaces.contains_key("user"));
        check.process(own).unwrap();
        assert!(!check.mount_ids.is_empty());
        assert!(!check.findings.iter().any(|finding| finding.reason.contains("namespace")), "{:?}", check.findings);
    }

    #[test]
    fn memory_that_is_still_coming_in_is_a_finding() {
        let own = i32::try_from(std::process::id()).unwrap();
        let found = findings(own, Fill::GoingOn, Path::new("/nowhere")).unwrap();
        assert_eq!((found[0].pid, found[0].command.as_str()), (1, "memory"));
    }

    #[test]
    fn a_process_that_does_not_exist_is_an_error() {
        assert!(findings(i32::MAX, Fill::Complete, Path::new("/nowhere")).is_err());
    }
}
