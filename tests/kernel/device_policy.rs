//! The device policy of cgroup v2, which a hybrid machine can show as well: the program needs no controller.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;
use stillbox::runtime::devices::allowed_devices;
use stillbox::sys::device_policy::restrict;

#[test]
fn processes_of_a_restricted_cgroup_open_the_listed_devices_only() {
    let hierarchy =
        ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].into_iter().find(|path| is_v2(path)).expect("cgroup v2 is mounted somewhere");
    let cgroup = format!("{hierarchy}/stillbox-policy-{}", std::process::id());
    std::fs::create_dir(&cgroup).unwrap();
    restrict(File::open(&cgroup).unwrap().as_fd(), &allowed_devices()).unwrap();
    let inside = |command: &str| {
        let script = format!("echo $$ > {cgroup}/cgroup.procs && {command}");
        Command::new("sh").args(["-c", &script]).output().unwrap()
    };
    let allowed = inside("head -c 1 /dev/zero && : < /dev/null && : < /dev/urandom");
    let denied = inside(": < /dev/loop-control");
    std::fs::remove_dir(&cgroup).unwrap();
    assert!(allowed.status.success(), "{allowed:?}");
    let complaint = String::from_utf8_lossy(&denied.stderr);
    assert!(!denied.status.success() && complaint.contains("Operation not permitted"), "{complaint}");
}

fn is_v2(path: &str) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|found| found.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC)
}
