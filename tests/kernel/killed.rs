//! CRIU or a helper is killed at a bad moment: nothing is left of them, and nobody stands still.
//!
//! Where CRIU is a script, it dies at a moment that the real one is at for some microseconds.

use crate::guest::{init, run, wait_until_ready};
use crate::machine::{BOOT_ID, Machine, SECRET, chain, on_own_machine};
use serde_json::json;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use stillbox::model::{NetworkPolicy, SandboxId};
use stillbox::runtime::cgroup::Cgroups;
use stillbox::runtime::config::RuntimeConfig;
use stillbox::runtime::kernel::Kernel;
use stillbox::runtime::{AfterDump, DumpRequest, Runtime};

/// It reads the request, so that it is the helper's tracee from there on, gives its last answer and comes to its end while
/// the helper hears nothing.
const ENDS_AFTER_ITS_ANSWER: &str = r"#!/bin/bash
read -r -N 1 -u $3 _
helper=$PPID
kill -STOP $helper
printf '\x08\x01\x10\x01' >&$3
{ sleep 0.2; kill -CONT $helper; } &
";

/// It kills the helper as if that had made all stand still and noted that its dump is over.
const TAKES_THE_HELPER_ALONG: &str = r#"#!/bin/bash
[ "$1" = --version ] && { echo 'Version: 4.2.1'; exit; }
read -r switch freeze journal < FOLDER/places
read -r -N 1 -u $3 _
echo $freeze > $switch
rm $journal
kill -KILL $PPID
"#;

/// Of a CRIU that probes the kernel. Less than half of them would leave something.
const KILLS: usize = 20;

/// A CRIU in `place` that does this.
fn criu(place: &Path, does: &str) -> PathBuf {
    let script = place.join("criu");
    std::fs::write(&script, does.replace("FOLDER", &place.to_string_lossy())).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    script
}

/// What lets the tasks of a sandbox stand still: the file, and the word for it.
fn switch(machine: &Machine, id: SandboxId) -> (PathBuf, &'static str) {
    let folders = Cgroups::open(machine.instance).unwrap().of(id).folders();
    let files = folders.iter().flat_map(|folder| [(folder.join("freezer.state"), "FROZEN"), (folder.join("cgroup.freeze"), "1")]);
    files.into_iter().find(|(file, _)| file.exists()).expect("these tests need a freezer")
}

async fn runs_on(machine: &Machine, kernel: Kernel, id: SandboxId) {
    assert_eq!(run(&kernel, id, "echo on").await.text, "on\n");
    kernel.destroy(id).await.unwrap();
    assert_eq!(machine.traces(), Vec::<String>::new());
    kernel.close().await;
}

#[test]
fn nobody_stands_still_for_a_criu_that_has_answered_before_its_end() {
    let place = tempfile::tempdir().unwrap();
    let folder = |name: &str| {
        let folder = place.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        folder
    };
    let (images, volumes, cgroup) = (folder("images"), folder("volumes"), folder("cgroup"));
    folder("work");
    // A plain file keeps what was written to it last.
    std::fs::write(cgroup.join("freezer.state"), "untouched").unwrap();
    let mut init = Command::new("sleep").arg("60").spawn().unwrap();
    let request = json!({
        "folder": place.path(), "init": init.id(), "images": images, "volumes": volumes, "disk_copy": null, "after": "keep_running",
        "cgroup_folders": [&cgroup], "criu": criu(place.path(), ENDS_AFTER_ITS_ANSWER), "criu_sha256": "", "agent_sha256": "",
        "deadline": Duration::from_secs(20),
    });
    let helper =
        Command::new(env!("CARGO_BIN_EXE_stillbox")).args(["runtime", "dump"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut helper = helper.unwrap();
    helper.stdin.take().unwrap().write_all(request.to_string().as_bytes()).unwrap();
    let said = String::from_utf8(helper.wait_with_output().unwrap().stdout).unwrap();
    init.kill().unwrap();
    init.wait().unwrap();
    // It heard the answer, and misses what comes before it.
    assert!(said.contains("CRIU did not stop for the disk"), "{said}");
    assert_eq!(std::fs::read_to_string(cgroup.join("freezer.state")).unwrap(), "untouched");
}

#[test]
fn a_helper_that_is_killed_while_all_stand_still_leaves_nobody_standing() {
    on_own_machine(async |machine| {
        let place = tempfile::tempdir().unwrap();
        let config = RuntimeConfig { criu: Some(criu(place.path(), TAKES_THE_HELPER_ALONG)), ..machine.config() };
        let kernel = Kernel::open(config, machine.instance).await.unwrap();
        let id = machine.sandbox(&kernel).await;
        let (switch, freeze) = switch(&machine, id);
        let journal = machine.data_dir().join("sandboxes").join(id.as_str()).join("work/cure.journal");
        std::fs::write(place.path().join("places"), format!("{} {freeze} {}\n", switch.display(), journal.display())).unwrap();
        let images = machine.data_dir().join("images");
        std::fs::create_dir(&images).unwrap();
        let failed = kernel.dump(DumpRequest { id, after: AfterDump::KeepRunning, images, disk_copy: None }).await.unwrap_err();
        assert!(chain(&failed).contains("signal 9"), "{}", chain(&failed));
        runs_on(&machine, kernel, id).await;
    });
}

#[test]
fn a_sandbox_that_stands_still_goes_on_with_the_next_server() {
    on_own_machine(async |machine| {
        let first = machine.kernel().await;
        let id = SandboxId::random();
        let kernel_ref = first.start(machine.request(id)).await.unwrap();
        wait_until_ready(&first, id).await;
        init(&first, id, SECRET, BOOT_ID).await;
        first.close().await;
        // What a helper leaves that is killed with its server.
        let (switch, freeze) = switch(&machine, id);
        std::fs::write(switch, freeze).unwrap();
        let second = machine.kernel().await;
        second.adopt(id, &kernel_ref, &NetworkPolicy::default()).await.unwrap();
        runs_on(&machine, second, id).await;
    });
}

#[test]
fn what_criu_forks_to_look_at_dies_with_it() {
    on_own_machine(async |machine| {
        let kernel = machine.kernel().await;
        let kept = std::fs::read_dir(machine.data_dir().join("criu")).unwrap().next().expect("these tests need target/criu").unwrap();
        let children = (0..KILLS).flat_map(|_| kill_with_a_child(&kept.path().join("criu"))).collect::<Vec<i32>>();
        assert!(!children.is_empty(), "CRIU forked nothing that could be seen");
        let deadline = Instant::now() + Duration::from_secs(5);
        while let Some(pid) = children.iter().find(|pid| !["", "Z"].contains(&state(**pid).as_str())) {
            assert!(Instant::now() < deadline, "process {pid} outlives its CRIU");
            std::thread::sleep(Duration::from_millis(5));
        }
        kernel.close().await;
    });
}

/// Kills a CRIU that probes the kernel while it has a child that waits. Its children then.
fn kill_with_a_child(criu: &Path) -> Vec<i32> {
    let mut probing =
        Command::new(criu).args(["--no-default-config", "check"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let list = format!("/proc/{0}/task/{0}/children", probing.id());
    let children = || -> Vec<i32> {
        let listed = std::fs::read_to_string(&list).unwrap_or_default();
        listed.split(' ').filter_map(|pid| pid.parse().ok()).collect()
    };
    let waits = |pid: &i32| ["S", "T", "t"].contains(&state(*pid).as_str());
    while probing.try_wait().unwrap().is_none() && !children().iter().any(waits) {}
    let left = children();
    // It may have come to its end by itself.
    let _ = probing.kill();
    probing.wait().unwrap();
    left
}

/// Of a process that CRIU forked; nothing when it is gone.
fn state(pid: i32) -> String {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.split_once("(criu) ").map(|(_, rest)| rest.chars().take(1).collect()).unwrap_or_default()
}
