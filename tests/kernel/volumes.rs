//! Volumes in sandboxes: one storage, seen by several, over pauses, forks and servers.

use crate::guest::{run, run_as, wait_until_ready};
use crate::machine::{Machine, chain, on_own_machine};
use std::path::{Path, PathBuf};
use stillbox::model::{ByteSize, NetworkPolicy, SandboxId, VolumeId, VolumeMount};
use stillbox::runtime::kernel::Kernel;
use stillbox::runtime::{AfterDump, DiskSource, DumpRequest, Runtime, RuntimeError, StartFrom, StartRequest};
use stillbox::sys::loop_device::holder_of;

fn volume(kernel: &Kernel) -> VolumeId {
    let id = VolumeId::random();
    kernel.volumes().make(id, ByteSize::mib(64)).unwrap_or_else(|error| panic!("{}", chain(&error)));
    id
}

/// Volumes that a restore has mounted with its sandbox's ids where the helpers of other sandboxes work too.
fn staged_for_others_to_meet() -> Vec<String> {
    let read = |process: &std::fs::DirEntry, name: &str| std::fs::read_to_string(process.path().join(name)).unwrap_or_default();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let parent = format!("PPid:\t{}\n", std::process::id());
    let nurseries: Vec<_> =
        processes.filter(|process| read(process, "comm") == "sb-nursery\n" && read(process, "status").contains(&parent)).collect();
    assert!(!nurseries.is_empty(), "no nursery of this test's servers runs");
    let staged = |process| read(process, "mountinfo").lines().filter(|line| line.contains(" /run/volumes/")).map(str::to_owned).collect();
    nurseries.iter().flat_map(|process| -> Vec<String> { staged(process) }).collect()
}

fn at(volume: VolumeId, path: &str) -> VolumeMount {
    VolumeMount { volume, name: "data".parse().unwrap(), path: path.parse().unwrap() }
}

fn with(machine: &Machine, volumes: &[VolumeMount]) -> StartRequest {
    StartRequest { volumes: volumes.to_vec(), ..machine.request(SandboxId::random()) }
}

async fn start(machine: &Machine, kernel: &Kernel, volumes: &[VolumeMount]) -> SandboxId {
    let request = with(machine, volumes);
    let id = request.id;
    machine.start(kernel, request).await;
    id
}

fn folder(machine: &Machine, name: &str) -> PathBuf {
    let folder = machine.data_dir().join(name);
    std::fs::create_dir(&folder).unwrap();
    folder
}

async fn dump(kernel: &Kernel, id: SandboxId, after: AfterDump, images: &Path, disk_copy: Option<PathBuf>) -> StartFrom {
    let findings = kernel.findings(id).await.unwrap();
    assert!(findings.is_empty(), "{findings:?}");
    let dumped = kernel.dump(DumpRequest { id, after, images: images.to_owned(), disk_copy }).await;
    let dumped = dumped.unwrap_or_else(|error| panic!("{}", chain(&error)));
    StartFrom::Dump { images: images.to_owned(), criu: dumped.criu, agent: dumped.agent }
}

async fn restore(kernel: &Kernel, request: StartRequest) -> SandboxId {
    let id = request.id;
    kernel.start(request).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    wait_until_ready(kernel, id).await;
    id
}

/// Volumes of the machine that a loop device has.
fn loops(machine: &Machine) -> usize {
    let volumes = std::fs::read_dir(machine.data_dir().join("volumes")).unwrap().flatten();
    volumes.filter(|entry| holder_of(&entry.path().join("volume.img")).unwrap().is_some()).count()
}

#[test]
fn sandboxes_share_a_volume_and_nothing_else_of_each_other() {
    on_own_machine(async |machine| {
        let kernel = machine.kernel().await;
        let (shared, other) = (volume(&kernel), volume(&kernel));
        let one = start(&machine, &kernel, &[at(shared, "/mnt/data"), at(other, "/srv/deep/other")]).await;
        let two = start(&machine, &kernel, &[at(shared, "/data")]).await;
        let wrote = run_as(&kernel, one, "user", "echo hello > /mnt/data/file && mkdir /mnt/data/folder && ls -ln /mnt/data/file").await;
        assert!(wrote.code == 0 && wrote.text.contains(" 1000 "), "{wrote:?}");
        assert_eq!(run_as(&kernel, two, "user", "cat /data/file; ls /data; ls /srv/deep 2>/dev/null").await.text, "hello\nfile\nfolder\n");
        let root = kernel.volumes().open(shared).unwrap();
        assert_eq!(std::fs::read_to_string(root.join("file")).unwrap(), "hello\n");
        let size = run(&kernel, two, "df -k /data | tail -1 | awk '{print $2}'").await.text;
        assert!(size.trim().parse::<u64>().is_ok_and(|size| (50 << 10..64 << 10).contains(&size)), "{size}");

        let options = run(&kernel, two, "grep ' /data ' /proc/self/mountinfo").await.text;
        assert!(options.contains("nosuid,nodev") && !options.contains("shared:") && !options.contains("master:"), "{options}");
        let full = run(&kernel, one, "dd if=/dev/zero of=/mnt/data/big bs=1M count=80").await;
        assert!(full.code != 0 && full.text.contains("No space left on device"), "{full:?}");
        assert_eq!(run(&kernel, one, "rm /mnt/data/big; echo mine > /tmp/x && cat /tmp/x").await.text, "mine\n");
        // What is mounted in one is not mounted in the other, nor here.
        let mounted = run(&kernel, one, "mount -t tmpfs none /mnt/data/folder && touch /mnt/data/folder/hidden").await;
        assert_eq!(mounted.code, 0, "{mounted:?}");
        assert_eq!(run(&kernel, two, "ls /data/folder").await.text, "");
        assert_eq!(std::fs::read_dir(root.join("folder")).unwrap().count(), 0);
        // Root inside is nobody here.
        run(&kernel, one, "cp /bin/busybox /mnt/data/su && chmod 4755 /mnt/data/su").await;
        let said = run_as(&kernel, two, "user", "/data/su -c 'id -u'").await.text;
        assert!(said.contains("must be suid"), "a set-user-id program of one works in another: {said}");

        for id in [one, two] {
            kernel.destroy(id).await.unwrap();
        }
        assert_eq!(std::fs::read_to_string(root.join("file")).unwrap(), "hello\n");
        kernel.volumes().remove(other).unwrap();
        assert_eq!(machine.traces(), Vec::<String>::new());
        kernel.close().await;
        assert_eq!(loops(&machine), 0);
    });
}

#[test]
fn a_cold_start_is_refused_where_a_file_lies_in_the_way_of_a_volume() {
    on_own_machine(async |machine| {
        let kernel = machine.kernel().await;
        let request = with(&machine, &[at(volume(&kernel), "/bin/busybox/data")]);
        match kernel.start(request).await {
            Err(RuntimeError::BadMountPath { path, wrong }) => {
                assert_eq!((path.as_str(), wrong.as_str()), ("/bin/busybox/data", "'/bin/busybox' is not a folder"));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(machine.traces(), Vec::<String>::new());
        kernel.close().await;
    });
}

#[test]
fn open_files_on_a_volume_survive_a_pause_in_which_others_write_them() {
    on_own_machine(async |machine| {
        let kernel = machine.kernel().await;
        let shared = volume(&kernel);
        let mounts = [at(shared, "/mnt/data")];
        let id = start(&machine, &kernel, &mounts).await;
        let begun = run(
            &kernel,
            id,
            "cd /mnt/data && (exec 3<>log 4>>tail; echo $$ > pid; for n in $(seq 1000); do echo $n >&3; echo $n >&4; sleep 0.05; done) \
             > /dev/null 2>&1 & sleep 0.3; cd /mnt/data; echo before > read; (exec 5<read; sleep 3600) > /dev/null 2>&1 & sleep 0.1; \
             mkdir /elsewhere /part; mount --bind /mnt/data /elsewhere; mkdir /mnt/data/sub; mount --bind /mnt/data/sub /part; mount | grep -c ext4",
        )
        .await;
        assert_eq!((begun.code, begun.text.trim()), (0, "3"), "{begun:?}");
        let from = dump(&kernel, id, AfterDump::Stop, &folder(&machine, "images"), None).await;
        assert_eq!(machine.traces().iter().filter(|trace| !trace.starts_with("folder")).collect::<Vec<_>>(), Vec::<&String>::new());
        let root = kernel.volumes().open(shared).unwrap();
        let seen = std::fs::read_to_string(root.join("log")).unwrap();
        let mut grown = seen.clone().into_bytes();
        grown.extend(b"somebody else\n".repeat(100));
        for name in ["log", "read", "tail"] {
            std::fs::write(root.join(name), &grown).unwrap();
        }

        let request = StartRequest { disk: DiskSource::Own, from, volumes: mounts.to_vec(), ..machine.request(id) };
        restore(&kernel, request).await;
        assert_eq!(staged_for_others_to_meet(), Vec::<String>::new());
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        let after = run(&kernel, id, "tail -n 1 /mnt/data/tail; cat /elsewhere/pid > /dev/null && touch /part/x && ls /mnt/data/sub").await;
        let (last, rest) = after.text.split_once('\n').unwrap();
        let before: u32 = seen.lines().last().unwrap().parse().unwrap();
        assert!(last.parse::<u32>().is_ok_and(|last| last > before), "{last} after {before}");
        assert_eq!((after.code, rest), (0, "x\n"), "{after:?}");
        // The mount is of the new id range, and nothing is mounted twice.
        assert_eq!(
            run(&kernel, id, "ls -ln /mnt/data/pid | awk '{print $3}'; grep -c ' /mnt/data ' /proc/self/mounts").await.text,
            "0\n1\n"
        );
        let again = dump(&kernel, id, AfterDump::KeepRunning, &folder(&machine, "again"), Some(machine.data_dir().join("copy.img"))).await;
        let fork = SandboxId::random();
        let disk = DiskSource::CopyOf(machine.data_dir().join("copy.img"));
        let added = volume(&kernel);
        let volumes = vec![mounts[0].clone(), at(added, "/added")];
        restore(&kernel, StartRequest { disk, from: again, volumes, ..machine.request(fork) }).await;
        assert_eq!(run(&kernel, fork, "echo fork > /mnt/data/fork; echo more > /added/more; cat /added/more").await.text, "more\n");
        assert_eq!(run(&kernel, id, "cat /mnt/data/fork; ls /added 2>/dev/null").await.text, "fork\n");
        for id in [id, fork] {
            kernel.destroy(id).await.unwrap();
        }
        assert_eq!(machine.traces(), Vec::<String>::new());
        kernel.close().await;
        assert_eq!(loops(&machine), 0);
    });
}

#[test]
fn a_volume_goes_on_under_the_next_server() {
    on_own_machine(async |machine| {
        let first = machine.kernel().await;
        let shared = volume(&first);
        let request = with(&machine, &[at(shared, "/mnt/data")]);
        let id = request.id;
        let kernel_ref = first.start(request).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
        wait_until_ready(&first, id).await;
        crate::guest::init(&first, id, crate::machine::SECRET, crate::machine::BOOT_ID).await;
        run(&first, id, "echo kept > /mnt/data/file").await;
        // One that ends as it should unmounts here, one that is killed does not: both leave the sandbox its mount.
        first.close().await;
        let next = machine.kernel().await;
        next.adopt(id, &kernel_ref, &NetworkPolicy::default()).await.unwrap();
        assert_eq!(run(&next, id, "echo on >> /mnt/data/file; cat /mnt/data/file").await.text, "kept\non\n");
        let root = next.volumes().open(shared).unwrap();
        assert_eq!(std::fs::read_to_string(root.join("file")).unwrap(), "kept\non\n");
        let volumes = loops(&machine);
        let third = machine.kernel().await;
        assert_eq!(std::fs::read_to_string(third.volumes().open(shared).unwrap().join("file")).unwrap(), "kept\non\n");
        assert_eq!(loops(&machine), volumes, "a second file system on the same bytes");
        next.destroy(id).await.unwrap();
        third.volumes().remove(shared).unwrap();
        assert_eq!(loops(&machine), 0);
        assert_eq!(machine.traces(), Vec::<String>::new());
        next.close().await;
        third.close().await;
    });
}
