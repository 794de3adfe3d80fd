//! Sandboxes as the guest sees them: what is theirs, what is refused, which limits hold.

use crate::guest::{run, run_as};
use crate::machine::{BOOT_ID, Machine, on_own_machine};
use std::time::{Duration, Instant};
use stillbox::model::{ByteSize, Resources, SandboxId};
use stillbox::runtime::kernel::Kernel;
use stillbox::runtime::{Runtime, StartRequest};

/// Runs `test` in a sandbox, with `change` made to its request, and expects nothing to be left of it afterwards.
fn in_sandbox(change: fn(&mut StartRequest), test: impl AsyncFnOnce(&Kernel, SandboxId) + Send + 'static) {
    on_own_machine(async move |machine: Machine| {
        let kernel = machine.kernel().await;
        let id = SandboxId::random();
        let mut request = machine.request(id);
        change(&mut request);
        machine.start(&kernel, request).await;
        test(&kernel, id).await;
        kernel.destroy(id).await.unwrap();
        assert_eq!(machine.traces(), Vec::<String>::new());
        kernel.close().await;
    });
}

#[test]
fn a_sandbox_has_namespaces_ids_mounts_and_devices_of_its_own() {
    in_sandbox(
        |_| {},
        async |kernel, id| {
            let said = run(kernel, id, "id -u; cat /proc/self/uid_map; cat /proc/sys/kernel/random/boot_id; hostname").await;
            let lines: Vec<&str> = said.text.lines().map(str::trim).collect();
            assert_eq!(lines[0], "0");
            assert!(lines[1].ends_with("65536") && lines[1].starts_with("0 "), "{}", lines[1]);
            assert_eq!(&lines[2..], [BOOT_ID, "guest"]);
            assert_eq!(run_as(kernel, id, "user", "id -u").await.text.trim(), "1000");

            let mounts = run(kernel, id, "cut -d' ' -f2 /proc/mounts").await.text;
            let mounts: Vec<&str> = mounts.lines().collect();
            assert_eq!(mounts, ["/", "/proc", "/dev/pts", "/sys", "/proc/sys/kernel/random/boot_id"]);

            let devices = "cd /dev; ls -l null zero full random urandom tty fuse | cut -c1-10 | sort -u; readlink ptmx";
            assert_eq!(run(kernel, id, devices).await.text, "crw-rw-rw-\npts/ptmx\n");
            let used = run(kernel, id, "echo x > /dev/null && head -c 8 /dev/urandom | wc -c && head -c 3 /dev/zero | wc -c").await;
            assert_eq!(used.text, "8\n3\n");
            let cgroup = run(kernel, id, "cut -d: -f3 /proc/self/cgroup | sort -u").await;
            assert_eq!(cgroup.text, "/\n", "the host's cgroup paths show through");
        },
    );
}

#[test]
fn what_cannot_be_dumped_is_refused_inside() {
    in_sandbox(
        |_| {},
        async |kernel, id| {
            for option in ["-U", "-p", "-n", "-i", "-u"] {
                let said = run(kernel, id, &format!("unshare {option} true")).await;
                assert!(said.code != 0 && said.text.contains("Operation not permitted"), "unshare {option}: {said:?}");
            }
            assert_eq!(run(kernel, id, "unshare -m true").await.code, 0, "mount namespaces are allowed");
            let mounted = run(kernel, id, "mkdir /m && mount -t tmpfs none /m && touch /m/x && umount /m").await;
            assert_eq!(mounted.code, 0, "{mounted:?}");
            for (command, what) in [("mknod /tmp/mem c 1 1", "mknod"), ("dmesg", "klogctl"), ("ip link set lo down", "ip")] {
                let said = run(kernel, id, command).await;
                assert!(said.code != 0 && said.text.contains(what) && said.text.contains("not permitted"), "{command}: {said:?}");
            }
        },
    );
}

#[test]
fn a_layers_own_device_node_cannot_be_opened() {
    on_own_machine(async |machine| {
        let layer = machine.data_dir().join("layers/busybox");
        let node = |name: &str, kind, major, minor| {
            let mode = nix::sys::stat::Mode::from_bits_truncate(0o666);
            nix::sys::stat::mknod(&layer.join(name), kind, mode, nix::sys::stat::makedev(major, minor)).unwrap();
        };
        node("disk", nix::sys::stat::SFlag::S_IFBLK, 7, 0);
        node("mem", nix::sys::stat::SFlag::S_IFCHR, 1, 1);
        let kernel = machine.kernel().await;
        let id = machine.sandbox(&kernel).await;
        run(&kernel, id, "chmod 666 /disk /mem").await;
        for path in ["/disk", "/mem"] {
            let said = run(&kernel, id, &format!("head -c 1 {path}")).await;
            assert!(said.code != 0 && said.text.contains("not permitted"), "{path}: {said:?}");
        }
        kernel.destroy(id).await.unwrap();
        kernel.close().await;
    });
}

#[test]
fn memory_cpu_and_pids_end_at_their_limits() {
    let small = |request: &mut StartRequest| {
        request.resources = Resources { cpu_count: 1, memory: ByteSize::mib(128), disk: ByteSize::gib(1), pids_max: 40 };
    };
    in_sandbox(small, async |kernel, id| {
        let eaten = run(kernel, id, "dd if=/dev/zero of=/dev/null bs=300M count=1").await;
        assert_ne!(eaten.code, 0, "300 MB were allocated under a limit of 128: {eaten:?}");
        let forked = run(kernel, id, "for i in $(seq 100); do sleep 5 & done; wait").await;
        assert!(forked.text.contains("can't fork") || forked.text.contains("temporarily unavailable"), "{forked:?}");

        let before = kernel.usage(id).await.unwrap().cpu_ns;
        let began = Instant::now();
        run(kernel, id, "for i in 1 2 3; do timeout 2 sh -c 'while :; do :; done' & done; wait").await;
        let used = Duration::from_nanos(kernel.usage(id).await.unwrap().cpu_ns - before);
        assert!(used < began.elapsed().mul_f64(1.2), "three loops used {used:?} of CPU in {:?}", began.elapsed());
    });
}

#[test]
fn usage_follows_what_is_used() {
    in_sandbox(
        |_| {},
        async |kernel, id| {
            let before = kernel.usage(id).await.unwrap();
            assert!(before.disk_total_bytes > 19 << 30, "{before:?}");
            run(kernel, id, "dd if=/dev/urandom of=/root/file bs=1M count=30 && sync").await;
            let after = kernel.usage(id).await.unwrap();
            assert!(after.disk_used_bytes >= before.disk_used_bytes + (30 << 20), "{before:?} {after:?}");
            assert!(after.cpu_ns > before.cpu_ns);
            assert!(after.memory_used_bytes > 0 && after.memory_used_bytes < 200 << 20, "{after:?}");
            assert!(after.memory_cache_bytes > 20 << 20, "{after:?}");
        },
    );
}

#[test]
fn a_full_disk_is_no_space_left_inside_and_nothing_outside() {
    let small = |request: &mut StartRequest| request.resources.disk = ByteSize::mib(64);
    in_sandbox(small, async |kernel, id| {
        let said = run(kernel, id, "dd if=/dev/zero of=/root/file bs=1M count=100").await;
        assert!(said.code != 0 && said.text.contains("No space left on device"), "{said:?}");
        let again = run(kernel, id, "rm /root/file && echo fine > /root/other && cat /root/other").await;
        assert_eq!(again.text, "fine\n");
        assert!(kernel.usage(id).await.unwrap().disk_total_bytes <= 64 << 20);
    });
}

#[test]
fn two_sandboxes_share_neither_ids_nor_files() {
    on_own_machine(async |machine| {
        let kernel = machine.kernel().await;
        let (one, two) = (machine.sandbox(&kernel).await, machine.sandbox(&kernel).await);
        let map = "awk '{print $2}' /proc/self/uid_map";
        assert_ne!(run(&kernel, one, map).await.text, run(&kernel, two, map).await.text);
        run(&kernel, one, "echo mine > /root/file; echo changed >> /etc/passwd").await;
        assert_ne!(run(&kernel, two, "cat /root/file").await.code, 0);
        assert!(!run(&kernel, two, "cat /etc/passwd").await.text.contains("changed"));
        // An id is half of a public URL: nobody learns a neighbour's from what the kernel tells of its disk.
        let disks = run(&kernel, two, "cat /sys/block/loop*/loop/backing_file").await.text;
        assert!(disks.contains("disk.img") && !disks.contains(one.as_str()), "{disks}");
        for id in [one, two] {
            kernel.destroy(id).await.unwrap();
        }
        kernel.close().await;
    });
}

#[test]
fn programs_of_the_image_may_become_root_and_change_owners() {
    in_sandbox(
        |_| {},
        async |kernel, id| {
            let said = run(kernel, id, "touch /root/x && chown 1000:1000 /root/x && chmod 4755 /root/x && ls -ln /root/x").await;
            assert!(said.text.starts_with("-rwsr-xr-x") && said.text.contains(" 1000 "), "{said:?}");
            run(kernel, id, "sed -i s/root:x:/root::/ /etc/passwd; mkdir /suid; cp /bin/busybox /suid/su; chmod 4755 /suid/su").await;
            let said = run_as(kernel, id, "user", "id -u; /suid/su -c 'id -u' root").await;
            assert_eq!(said.text, "1000\n0\n", "setuid programs do not work");
        },
    );
}
