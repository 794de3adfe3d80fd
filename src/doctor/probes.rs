//! The probes, in the order in which their failures would be met.

use super::Verdict::{self, Fine, Fix, Note};
use super::names;
use crate::config::{Config, Listen};
use crate::model::ByteSize;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

/// One thing that the server needs.
pub(super) struct Probe {
    pub(super) name: &'static str,
    pub(super) run: fn(&Config) -> Verdict,
}

pub(super) const ALL: &[Probe] = &[
    Probe { name: "root", run: root },
    Probe { name: "kernel", run: kernel },
    Probe { name: "namespaces", run: namespaces },
    Probe { name: "overlay", run: overlay },
    Probe { name: "loop", run: loop_devices },
    Probe { name: "cgroups", run: cgroups },
    Probe { name: "network", run: network },
    Probe { name: "forward", run: forward_chain },
    Probe { name: "mkfs", run: mkfs },
    Probe { name: "listen", run: |config| port(&config.listen, "listen", config) },
    Probe { name: "tls listen", run: |config| port(&config.tls_listen, "tls_listen", config) },
    Probe { name: "disk", run: disk },
    Probe { name: "inotify", run: inotify },
    Probe { name: "domain", run: names::domain },
];

fn root(_: &Config) -> Verdict {
    if nix::unistd::geteuid().is_root() {
        Fine("running as root".into())
    } else {
        Fix("namespaces, mounts and CRIU need root: run with sudo".into())
    }
}

/// Idmapped overlay layers came with 5.19.
const KERNEL_MIN: (u32, u32) = (5, 19);

fn kernel(_: &Config) -> Verdict {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    match version_of(release) {
        Some(version) if version >= KERNEL_MIN => Fine(format!("Linux {release}")),
        Some(_) => Fix(format!("Linux {release} is older than 5.19, which brought idmapped overlay layers: boot a newer kernel")),
        None => Note(format!("the release '{release}' is not understood; 5.19 or newer is needed")),
    }
}

fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Makes all seven namespaces of a sandbox once, in a process of its own.
fn namespaces(_: &Config) -> Verdict {
    let made =
        Command::new("unshare").args(["--user", "--pid", "--mount", "--uts", "--ipc", "--cgroup", "--net", "--fork", "true"]).output();
    match made {
        Ok(output) if output.status.success() => Fine("user, pid, mount, uts, ipc, cgroup and net can be made".into()),
        Ok(output) => Fix(format!(
            "a user namespace with all others cannot be made ({}): set user.max_user_namespaces above 0, lift AppArmor's \
             kernel.apparmor_restrict_unprivileged_userns, or start the outer container privileged",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Err(error) => Note(format!("not probed: unshare from util-linux cannot be run ({error})")),
    }
}

fn overlay(_: &Config) -> Verdict {
    let known = || fs::read_to_string("/proc/filesystems").unwrap_or_default().lines().any(|line| line.ends_with("overlay"));
    if known() || (Command::new("modprobe").arg("overlay").status().is_ok_and(|status| status.success()) && known()) {
        Fine("overlay is there".into())
    } else {
        Fix("the kernel knows no overlay file system: modprobe overlay, or boot a kernel with CONFIG_OVERLAY_FS".into())
    }
}

fn loop_devices(_: &Config) -> Verdict {
    match fs::OpenOptions::new().read(true).write(true).open("/dev/loop-control") {
        Ok(_) => Fine("/dev/loop-control opens".into()),
        Err(error) => Fix(format!(
            "/dev/loop-control cannot be opened ({error}): modprobe loop; in a container, pass --privileged or --device /dev/loop-control. \
             Without it disks are plain folders: no size limit, no pause"
        )),
    }
}

/// What limits a sandbox: v2 lists controllers in a file, v1 in /proc/cgroups with its hierarchy.
fn cgroups(_: &Config) -> Verdict {
    let unified = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").ok();
    let wanted: &[&str] = if unified.is_some() { &["memory", "cpu", "pids"] } else { &["memory", "cpu", "pids", "devices"] };
    let has = |name: &str| match &unified {
        Some(list) => list.split_whitespace().any(|each| each == name),
        None => v1_controller(name).is_some(),
    };
    let missing: Vec<&str> = wanted.iter().copied().filter(|name| !has(name)).collect();
    let version = if unified.is_some() { "v2" } else { "v1" };
    if missing.is_empty() {
        Fine(format!("{version} with {}", wanted.join(", ")))
    } else {
        Fix(format!(
            "{version} lacks {}: on v2 add them to cgroup.subtree_control above the server (systemd: Delegate=yes), on v1 mount \
             them below /sys/fs/cgroup",
            missing.join(", ")
        ))
    }
}

fn v1_controller(name: &str) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let is_it = right.starts_with("cgroup ") && right.split([' ', ',']).any(|word| word == name);
        is_it.then(|| PathBuf::from(left.split(' ').nth(4).unwrap_or_default()))
    })
}

fn network(_: &Config) -> Verdict {
    match Command::new("nft").args(["list", "tables"]).output() {
        Ok(output) if output.status.success() => match fs::read_to_string("/proc/sys/net/ipv4/ip_forward") {
            Ok(text) if text.trim() == "1" => Fine("nft works, IPv4 forwarding is on".into()),
            Ok(_) => Fine("nft works; IPv4 forwarding is off and will be turned on while sandboxes need it".into()),
            Err(error) => Fix(format!("/proc/sys/net/ipv4/ip_forward cannot be read ({error}): is /proc masked?")),
        },
        Ok(output) => Fix(format!("nft list tables fails ({}): modprobe nf_tables", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Fix(format!("nft cannot be run ({error}): apt-get install nftables")),
    }
}

/// Docker and ufw set the policy of iptables' FORWARD chain to drop; sandboxes then need an exception, which we make.
fn forward_chain(_: &Config) -> Verdict {
    let Ok(output) = Command::new("nft").args(["list", "chain", "ip", "filter", "FORWARD"]).output() else {
        return Note("not probed: nft cannot be run".into());
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if text.contains("policy drop") {
        Fine("the FORWARD chain drops by default (Docker, ufw); the server adds its own accept and takes it out at its end".into())
    } else {
        Fine("nothing drops forwarded packets by default".into())
    }
}

fn mkfs(_: &Config) -> Verdict {
    match Command::new("mkfs.ext4").arg("-V").output() {
        Ok(_) => Fine("mkfs.ext4 is there".into()),
        Err(error) => Fix(format!("mkfs.ext4 cannot be run ({error}): apt-get install e2fsprogs")),
    }
}

fn port(listen: &Listen, key: &str, config: &Config) -> Verdict {
    for address in &listen.addresses {
        match TcpListener::bind(address) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AddrNotAvailable && address.is_ipv6() => {
                return Note(format!(
                    "{address}: this machine has no IPv6 loopback; clients that resolve to ::1 first will retry on 127.0.0.1"
                ));
            }
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                return match holder(&config.data_dir) {
                    Some(pid) => Fine(format!("{address} is taken by the server of this data folder (pid {pid})")),
                    None => Fix(format!("{address} is taken by another program: end it, or set {key} to another port")),
                };
            }
            Err(error) => return Fix(format!("{address} cannot be listened on ({error}): set {key}")),
        }
    }
    Fine(format!("{listen} can be listened on"))
}

/// The pid in the lock file of a data folder whose lock is held.
fn holder(data_dir: &Path) -> Option<u32> {
    let pid: u32 = fs::read_to_string(data_dir.join("lock")).ok()?.trim().parse().ok()?;
    Path::new(&format!("/proc/{pid}")).exists().then_some(pid)
}

/// What a template, a few disks and a few dumps need.
const DISK_FREE_MIN: ByteSize = ByteSize::gib(4);

fn disk(config: &Config) -> Verdict {
    let existing = config.data_dir.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
    let Ok(stat) = nix::sys::statvfs::statvfs(existing) else {
        return Fix(format!("{} cannot be examined", existing.display()));
    };
    let free = ByteSize(stat.blocks_available().saturating_mul(stat.fragment_size()));
    let (place, floor) = (existing.display(), config.runtime.disk_free_min);
    if free < floor {
        Fix(format!("{free} free at {place}, {floor} are kept free (runtime.disk_free_min): nothing is started or paused; free some"))
    } else if free < DISK_FREE_MIN {
        Fix(format!("{free} free at {place}, at least {DISK_FREE_MIN} are needed: free some or set data_dir"))
    } else {
        Fine(format!("{free} free at {place}"))
    }
}

fn inotify(_: &Config) -> Verdict {
    let read = |name: &str| fs::read_to_string(format!("/proc/sys/fs/inotify/{name}")).ok()?.trim().parse::<u64>().ok();
    match (read("max_user_instances"), read("max_user_watches")) {
        (Some(instances), Some(watches)) if instances < 128 || watches < 8192 => Fix(format!(
            "{instances} inotify instances and {watches} watches per user are few: sysctl fs.inotify.max_user_instances=512 fs.inotify.max_user_watches=65536"
        )),
        (Some(instances), Some(watches)) => Fine(format!("{instances} instances, {watches} watches per user")),
        _ => Note("the limits cannot be read".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_of_distributions_are_understood() {
        assert_eq!(version_of("6.1.0-37-cloud-amd64"), Some((6, 1)));
        assert_eq!(version_of("5.19.17"), Some((5, 19)));
        assert_eq!(version_of("rolling"), None);
    }

    #[test]
    fn a_taken_port_names_the_setting_to_change() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let listen = Listen { addresses: vec![taken.local_addr().unwrap()] };
        let config = Config { data_dir: PathBuf::from("/nonexistent"), ..Config::default() };
        let Fix(step) = port(&listen, "listen", &config) else { panic!("a taken port was fine") };
        assert!(step.contains("set listen to another port"), "{step}");
    }
}
