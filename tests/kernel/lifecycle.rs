//! What comes and goes with a sandbox: nothing is left, disks stay, servers change, failures undo.

use crate::guest::{Said, init, run, wait_until_ready};
use crate::machine::{BOOT_ID, Machine, SECRET, chain, on_own_machine};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stillbox::model::{ByteSize, NetworkPolicy, SandboxId};
use stillbox::runtime::config::{DiskDriver, RuntimeConfig, SandboxMounts};
use stillbox::runtime::kernel::Kernel;
use stillbox::runtime::{AfterDump, DiskSource, DumpRequest, Restored, Runtime, RuntimeError, StartFrom, StartRequest};
use stillbox::sys::process;

#[test]
fn nothing_is_left_after_twenty_sandboxes() {
    on_own_machine(async |machine| {
        let kernel = machine.kernel().await;
        for _ in 0..20 {
            let id = machine.sandbox(&kernel).await;
            kernel.destroy(id).await.unwrap();
        }
        assert_eq!(machine.traces(), Vec::<String>::new());
        kernel.close().await;
    });
}

#[test]
fn eight_sandboxes_start_at_once_and_nothing_is_left_of_them() {
    on_own_machine(async |machine| {
        let kernel = machine.kernel().await;
        for _ in 0..3 {
            let ids: Vec<SandboxId> = (0..8).map(|_| SandboxId::random()).collect();
            futures_util::future::join_all(ids.iter().map(|id| machine.start(&kernel, machine.request(*id)))).await;
            futures_util::future::join_all(ids.iter().map(|id| async { kernel.destroy(*id).await.unwrap() })).await;
        }
        assert_eq!(machine.traces(), Vec::<String>::new());
        kernel.close().await;
    });
}

#[test]
fn a_disk_that_is_a_folder_holds_files_and_refuses_dumps() {
    on_own_machine(async |machine| {
        let config = RuntimeConfig { disk_driver: DiskDriver::Folder, ..machine.config() };
        let kernel = Kernel::open(config, machine.instance).await.unwrap();
        let id = machine.sandbox(&kernel).await;
        run(&kernel, id, "echo kept > /root/file; chown 1000 /root/file").await;
        let dump = DumpRequest { id, after: AfterDump::Stop, images: folder(&machine, "images"), disk_copy: None };
        let refused = kernel.dump(dump).await.unwrap_err();
        assert!(chain(&refused).contains("runtime.disk_driver"), "{}", chain(&refused));
        kernel.stop(id).await.unwrap();
        machine.start(&kernel, StartRequest { disk: DiskSource::Own, ..machine.request(id) }).await;
        assert_eq!(run(&kernel, id, "cat /root/file; stat -c %u /root/file").await.text, "kept\n1000\n");
        kernel.destroy(id).await.unwrap();
        assert_eq!(machine.traces(), Vec::<String>::new());
        kernel.close().await;
    });
}

#[test]
fn without_mounts_root_inside_mounts_nothing() {
    on_own_machine(async |machine| {
        let config = RuntimeConfig { mounts: SandboxMounts::None, ..machine.config() };
        let kernel = Kernel::open(config, machine.instance).await.unwrap();
        let id = machine.sandbox(&kernel).await;
        let said = run(&kernel, id, "mkdir /m && mount -t tmpfs none /m").await;
        assert!(said.code != 0 && said.text.contains("permission denied"), "{said:?}");
        assert_eq!(run(&kernel, id, "grep Seccomp: /proc/1/status").await.text, "Seccomp:\t2\n");
        kernel.destroy(id).await.unwrap();
        kernel.close().await;
    });
}

#[test]
fn the_end_of_pid_1_is_reported_with_its_reason() {
    on_own_machine(async |machine| {
        let kernel = machine.kernel().await;
        let id = SandboxId::random();
        let init = kernel.start(machine.request(id)).await.unwrap().init;
        wait_until_ready(&kernel, id).await;
        process::kill(process::open_pidfd(init.pid).unwrap().as_fd()).unwrap();
        let exit = tokio::time::timeout(Duration::from_secs(5), kernel.exited(id)).await.unwrap();
        assert_eq!(exit.detail, "killed by signal 9");
        kernel.destroy(id).await.unwrap();
        kernel.close().await;
    });
}

#[test]
fn a_stopped_sandbox_keeps_its_disk_and_boots_from_it() {
    on_own_machine(async |machine| {
        let kernel = machine.kernel().await;
        let id = machine.sandbox(&kernel).await;
        // What a hostile root leaves for the next boot.
        let traps = "rm -rf /dev/null /dev/tty /dev/shm /run/stillbox; ln -s /etc/passwd /dev/tty; ln -s /etc /run/stillbox";
        run(&kernel, id, &format!("echo kept > /root/file; {traps}")).await;
        kernel.stop(id).await.unwrap();
        let left = machine.traces();
        assert!(left.len() == 1 && left[0].starts_with("folder "), "{left:?}");

        machine.start(&kernel, StartRequest { disk: DiskSource::Own, ..machine.request(id) }).await;
        let said = run(
            &kernel,
            id,
            "cat /root/file; ls -l /dev/null /dev/tty | cut -c1-10; ls -ld /dev/shm | cut -c1-10; cat /proc/sys/kernel/random/boot_id",
        )
        .await;
        assert_eq!(said.text, format!("kept\ncrw-rw-rw-\ncrw-rw-rw-\ndrwxrwxrwt\n{BOOT_ID}\n"));
        kernel.destroy(id).await.unwrap();
        assert_eq!(machine.traces(), Vec::<String>::new());
        kernel.close().await;
    });
}

#[test]
fn the_next_server_takes_running_sandboxes_over_and_sweeps_the_rest() {
    on_own_machine(async |machine| {
        let machine = Arc::new(machine);
        let (kept, dropped) = (SandboxId::random(), SandboxId::random());
        // A server of its own: ending its tasks at once is as near to kill -9 as a test in one process comes.
        let server = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let on_it = Arc::clone(&machine);
        let first = server.spawn(async move {
            let first = on_it.kernel().await;
            on_it.start(&first, on_it.request(dropped)).await;
            let kernel_ref = first.start(on_it.request(kept)).await.unwrap();
            wait_until_ready(&first, kept).await;
            init(&first, kept, SECRET, BOOT_ID).await;
            run(&first, kept, "echo before > /root/file").await;
            kernel_ref
        });
        let kernel_ref = first.await.unwrap();
        tokio::task::spawn_blocking(move || server.shutdown_timeout(Duration::from_secs(1))).await.unwrap();

        let second = machine.kernel().await;
        second.adopt(kept, &kernel_ref, &NetworkPolicy::default()).await.unwrap();
        second.sweep(&[kept]).await.unwrap();
        assert!(machine.traces().iter().all(|line| !line.contains(dropped.as_str())), "{:?}", machine.traces());
        assert_eq!(run(&second, kept, "cat /root/file").await.text, "before\n");
        let wrong = second.adopt(dropped, &kernel_ref_of_nobody(&kernel_ref), &NetworkPolicy::default()).await.unwrap_err();
        assert!(matches!(wrong, RuntimeError::NotRunning { .. }), "{wrong}");
        second.destroy(kept).await.unwrap();
        assert_eq!(machine.traces(), Vec::<String>::new());
        second.close().await;
    });
}

fn kernel_ref_of_nobody(kernel_ref: &stillbox::model::KernelRef) -> stillbox::model::KernelRef {
    let mut other = kernel_ref.clone();
    other.init.start_ticks += 1;
    other
}

#[test]
fn a_start_that_fails_leaves_nothing_and_names_what_was_wrong() {
    on_own_machine(async |machine| {
        let kernel = machine.kernel().await;
        let id = SandboxId::random();
        let request = StartRequest { layers: vec!["missing".to_owned()], ..machine.request(id) };
        let error = kernel.start(request).await.unwrap_err();
        assert!(chain(&error).contains("layers/missing"), "{}", chain(&error));
        assert_eq!(machine.traces(), Vec::<String>::new());

        kernel.close().await;
    });
}

#[test]
fn a_layer_cannot_lead_the_runtime_astray_by_symbolic_links() {
    on_own_machine(async |machine| {
        for name in ["proc", "sys", "dev", "run"] {
            std::os::unix::fs::symlink("/etc", machine.data_dir().join("layers/busybox").join(name)).unwrap();
        }
        let kernel = machine.kernel().await;
        let id = machine.sandbox(&kernel).await;
        assert_eq!(
            run(&kernel, id, "ls -ld /proc /sys /dev /run | cut -c1; test -e /etc/shadow").await,
            Said { text: "d\nd\nd\nd\n".to_owned(), code: 1 }
        );
        kernel.destroy(id).await.unwrap();
        kernel.close().await;
    });
}

#[test]
fn no_sandbox_is_started_below_the_free_space_floor() {
    on_own_machine(async |machine| {
        let mut config = machine.config();
        config.disk_free_min = ByteSize(u64::MAX / 2);
        let kernel = Kernel::open(config, machine.instance).await.unwrap();
        let error = kernel.start(machine.request(SandboxId::random())).await.unwrap_err();
        assert!(matches!(&error, RuntimeError::Exhausted(out) if out.remedy.contains("runtime.disk_free_min")), "{error}");
        kernel.close().await;
    });
}

#[test]
fn a_paused_sandbox_goes_on_where_it_was_with_other_ids() {
    on_own_machine(async |machine| {
        let kernel = machine.kernel().await;
        let id = machine.sandbox(&kernel).await;
        run(
            &kernel,
            id,
            "(i=0; while :; do i=$((i+1)); echo $i > /root/new; mv /root/new /root/count; sleep 0.01; done) > /dev/null 2>&1 &",
        )
        .await;
        let map = run(&kernel, id, "cat /proc/self/uid_map").await.text;
        let images = folder(&machine, "images");
        let dumped = kernel.dump(DumpRequest { id, after: AfterDump::Stop, images: images.clone(), disk_copy: None }).await;
        let dumped = dumped.unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert!(images.join(stillbox::runtime::DUMPED_FILE).exists());
        let left = machine.traces();
        assert!(left.len() == 1 && left[0].starts_with("folder "), "{left:?}");

        let from = StartFrom::Dump { images, criu: dumped.criu, agent: dumped.agent };
        let resumed = kernel.start(StartRequest { disk: DiskSource::Own, from, ..machine.request(id) }).await;
        resumed.unwrap_or_else(|error| panic!("{}", chain(&error)));
        wait_until_ready(&kernel, id).await;
        let count = async || run(&kernel, id, "cat /root/count").await.text.trim().parse::<u64>().unwrap_or(0);
        let first = count().await;
        assert!(first > 0);
        let deadline = Instant::now() + Duration::from_secs(5);
        while count().await <= first {
            assert!(Instant::now() < deadline, "the loop stands still at {first}");
        }
        assert_ne!(run(&kernel, id, "cat /proc/self/uid_map").await.text, map);
        let limit = run(&kernel, id, "cat /proc/sys/user/max_inotify_instances").await.text;
        assert_eq!(limit, "128\n");
        kernel.destroy(id).await.unwrap();
        assert_eq!(machine.traces(), Vec::<String>::new());
        kernel.close().await;
    });
}

#[test]
fn a_server_that_did_not_see_a_restore_end_finds_what_runs() {
    on_own_machine(async |machine| {
        let machine = Arc::new(machine);
        let id = SandboxId::random();
        let server = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let on_it = Arc::clone(&machine);
        let first = server.spawn(async move {
            let first = on_it.kernel().await;
            on_it.start(&first, on_it.request(id)).await;
            assert_eq!(first.restored(id).await.unwrap(), Restored::Nothing);
            let images = folder(&on_it, "images");
            let dumped = first.dump(DumpRequest { id, after: AfterDump::Stop, images: images.clone(), disk_copy: None }).await;
            let dumped = dumped.unwrap_or_else(|error| panic!("{}", chain(&error)));
            let from = StartFrom::Dump { images, criu: dumped.criu, agent: dumped.agent };
            first.start(StartRequest { disk: DiskSource::Own, from, ..on_it.request(id) }).await
        });
        let restored = first.await.unwrap().unwrap_or_else(|error| panic!("{}", chain(&error)));
        tokio::task::spawn_blocking(move || server.shutdown_timeout(Duration::from_secs(1))).await.unwrap();

        let next = machine.kernel().await;
        assert_eq!(next.restored(id).await.unwrap(), Restored::Whole(restored.clone()));
        next.adopt(id, &restored, &NetworkPolicy::default()).await.unwrap();
        wait_until_ready(&next, id).await;
        assert_eq!(run(&next, id, "echo on").await.text, "on\n");
        next.stop(id).await.unwrap();
        assert_eq!(next.restored(id).await.unwrap(), Restored::Nothing);
        next.destroy(id).await.unwrap();
        assert_eq!(machine.traces(), Vec::<String>::new());
        next.close().await;
    });
}

#[test]
fn what_is_mounted_between_the_check_and_the_dump_is_refused_by_the_dump() {
    on_own_machine(async |machine| {
        let kernel = machine.kernel().await;
        let id = machine.sandbox(&kernel).await;
        let overlay = "mkdir /m && mount -t tmpfs none /m && cd /m && mkdir l u w o && \
                       mount -t overlay none -o lowerdir=/m/l,upperdir=/m/u,workdir=/m/w /m/o";
        let mounted = run(&kernel, id, overlay).await;
        assert_eq!(mounted.code, 0, "{mounted:?}");
        assert_eq!(kernel.findings(id).await.unwrap().len(), 1);
        let dump = DumpRequest { id, after: AfterDump::Stop, images: folder(&machine, "images"), disk_copy: None };
        let refused = chain(&kernel.dump(dump).await.unwrap_err());
        assert!(refused.contains("has a file system of type overlay mounted on /m/o"), "{refused}");
        assert_eq!(run(&kernel, id, "umount /m/o && echo on").await.text, "on\n");
        kernel.destroy(id).await.unwrap();
        assert_eq!(machine.traces(), Vec::<String>::new());
        kernel.close().await;
    });
}

#[test]
fn forks_of_a_running_sandbox_have_its_files_and_go_their_own_ways() {
    on_own_machine(async |machine| {
        let kernel = machine.kernel().await;
        let id = machine.sandbox(&kernel).await;
        run(&kernel, id, "echo common > /root/file; touch /dev/shm/memory").await;
        let (images, disk) = (folder(&machine, "images"), machine.data_dir().join("disk.img"));
        let dump = DumpRequest { id, after: AfterDump::KeepRunning, images: images.clone(), disk_copy: Some(disk.clone()) };
        let dumped = kernel.dump(dump).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
        run(&kernel, id, "echo later >> /root/file").await;
        let mut forks = Vec::new();
        for number in 0..3 {
            let fork = SandboxId::random();
            let from = StartFrom::Dump { images: images.clone(), criu: dumped.criu.clone(), agent: dumped.agent.clone() };
            let started = kernel.start(StartRequest { disk: DiskSource::CopyOf(disk.clone()), from, ..machine.request(fork) }).await;
            started.unwrap_or_else(|error| panic!("{}", chain(&error)));
            wait_until_ready(&kernel, fork).await;
            run(&kernel, fork, &format!("echo {number} >> /root/file")).await;
            forks.push(fork);
        }
        for (number, fork) in forks.iter().enumerate() {
            assert_eq!(run(&kernel, *fork, "cat /root/file; ls /dev/shm").await.text, format!("common\n{number}\nmemory\n"));
        }
        assert_eq!(run(&kernel, id, "cat /root/file").await.text, "common\nlater\n");
        for fork in forks.into_iter().chain([id]) {
            kernel.destroy(fork).await.unwrap();
        }
        assert_eq!(machine.traces(), Vec::<String>::new());
        kernel.close().await;
    });
}

#[test]
fn a_foreign_copy_of_the_mount_table_keeps_no_disk() {
    on_own_machine(async |machine| {
        let kernel = machine.kernel().await;
        let (paused, killed) = (machine.sandbox(&kernel).await, machine.sandbox(&kernel).await);
        run(&kernel, paused, "echo kept > /root/file").await;
        let mut foreign =
            std::process::Command::new("unshare").args(["--mount", "--propagation", "private", "sleep", "60"]).spawn().unwrap();
        let copied = format!("/proc/{}/mountinfo", foreign.id());
        let deadline = Instant::now() + Duration::from_secs(10);
        let shows = |id: SandboxId| std::fs::read_to_string(&copied).unwrap().contains(&id.to_string());
        while std::fs::read_link(format!("/proc/{}/ns/mnt", foreign.id())).unwrap() == std::fs::read_link("/proc/self/ns/mnt").unwrap() {
            assert!(Instant::now() < deadline, "unshare did not unshare");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(shows(paused) && shows(killed));

        kernel.stop(paused).await.unwrap();
        kernel.destroy(killed).await.unwrap();
        assert!(!shows(paused) && !shows(killed), "{}", std::fs::read_to_string(&copied).unwrap());
        let again = StartRequest { disk: DiskSource::Own, ..machine.request(paused) };
        machine.start(&kernel, again).await;
        assert_eq!(run(&kernel, paused, "cat /root/file").await.text, "kept\n");
        kernel.destroy(paused).await.unwrap();
        assert_eq!(machine.traces(), Vec::<String>::new());
        foreign.kill().unwrap();
        foreign.wait().unwrap();
        kernel.close().await;
    });
}

fn folder(machine: &Machine, name: &str) -> std::path::PathBuf {
    let path = machine.data_dir().join(name);
    std::fs::create_dir(&path).unwrap();
    path
}
