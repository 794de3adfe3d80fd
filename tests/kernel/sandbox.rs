//! Sandboxes as the guest sees them, and what is left of them on the host.

use crate::guest::{run, run_as};
use crate::machine::on_own_machine;
use stillbox::runtime::Runtime;

#[test]
fn a_sandbox_has_namespaces_ids_mounts_and_devices_of_its_own() {
    on_own_machine(async |machine| {
        let kernel = machine.kernel().await;
        let id = machine.sandbox(&kernel).await;
        let said = run(&kernel, id, "id -u; cat /proc/self/uid_map; cat /proc/sys/kernel/random/boot_id; hostname").await;
        let lines: Vec<&str> = said.text.lines().map(str::trim).collect();
        assert_eq!(lines[0], "0");
        assert!(lines[1].ends_with("65536") && lines[1].starts_with("0 "), "{}", lines[1]);
        assert_eq!(&lines[2..], [crate::machine::BOOT_ID, "guest"]);
        assert_eq!(run_as(&kernel, id, "user", "id -u").await.text.trim(), "1000");

        let mounts = run(&kernel, id, "cut -d' ' -f2 /proc/mounts").await.text;
        let mounts: Vec<&str> = mounts.lines().collect();
        assert_eq!(mounts, ["/", "/proc", "/dev/pts", "/sys", "/proc/sys/kernel/random/boot_id"]);

        let devices = run(&kernel, id, "cd /dev; ls -l null zero full random urandom tty fuse | cut -c1-10 | sort -u; readlink ptmx").await.text;
        assert_eq!(devices, "crw-rw-rw-\npts/ptmx\n");
        let used = run(&kernel, id, "echo x > /dev/null && head -c 8 /dev/urandom | wc -c && head -c 3 /dev/zero | wc -c").await.text;
        assert_eq!(used, "8\n3\n");

        kernel.destroy(id).await.unwrap();
        assert_eq!(machine.traces(), Vec::<String>::new());
        kernel.close().await;
    });
}
