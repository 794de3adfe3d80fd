//! Root file systems made before anybody asks for them.

use crate::guest::{run, wait_until_ready};
use crate::machine::{Machine, chain, on_own_machine};
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use stillbox::model::SandboxId;
use stillbox::runtime::config::RuntimeConfig;
use stillbox::runtime::kernel::Kernel;
use stillbox::runtime::{AfterDump, DiskSource, DumpRequest, Runtime, StartFrom, StartRequest};
use stillbox::sys::loop_device::holder_of;

const POOL: usize = 2;

async fn kernel_with_pool(machine: &Machine) -> Kernel {
    let config = RuntimeConfig { pool_roots: u32::try_from(POOL).unwrap(), ..machine.config() };
    Kernel::open(config, machine.instance).await.unwrap()
}

/// A dump that many sandboxes are to be restored from, as requests for them.
async fn dump(machine: &Machine, kernel: &Kernel) -> impl Fn(SandboxId) -> StartRequest + use<> {
    let source = machine.sandbox(kernel).await;
    run(kernel, source, "echo common > /root/file").await;
    let (images, disk) = (machine.data_dir().join("images"), machine.data_dir().join("disk.img"));
    std::fs::create_dir(&images).unwrap();
    let dump = DumpRequest { id: source, after: AfterDump::KeepRunning, images: images.clone(), disk_copy: Some(disk.clone()) };
    let dumped = kernel.dump(dump).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    kernel.destroy(source).await.unwrap();
    let template = machine.request(source);
    move |id| {
        let from = StartFrom::Dump { images: images.clone(), criu: dumped.criu.clone(), agent: dumped.agent.clone() };
        StartRequest { id, disk: DiskSource::PooledCopyOf(disk.clone()), from, ..template.clone() }
    }
}

fn roots(machine: &Machine) -> BTreeSet<String> {
    let entries = std::fs::read_dir(machine.data_dir().join("roots")).unwrap().flatten();
    entries.filter(|entry| entry.path().is_dir()).map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// What the kernel and the disk hold for roots that are nobody's.
fn traces(machine: &Machine) -> Vec<String> {
    let below = machine.data_dir().join("roots").to_string_lossy().into_owned() + "/";
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mounts = mounts.lines().filter(|line| line.contains(&below)).map(|line| format!("mount {line}"));
    let loops = roots(machine).into_iter().filter_map(|name| {
        let image = machine.data_dir().join("roots").join(name).join("disk.img");
        let number = match holder_of(&image) {
            // It went since its folder was listed.
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            held => held.unwrap(),
        }?;
        Some(format!("loop device {number} of {}", image.display()))
    });
    mounts.chain(loops).chain(roots(machine)).collect()
}

/// The mounts that a restore by this test's servers begins with: of the namespace that their nursery holds open.
fn mounts_of_restores() -> Vec<String> {
    let of = |process: &Path, name: &str| std::fs::read_to_string(process.join(name)).unwrap_or_default();
    let parent = format!("PPid:\t{}\n", std::process::id());
    let processes = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let nurseries = processes.filter(|process| of(process, "comm") == "sb-nursery\n" && of(process, "status").contains(&parent));
    let mut mounts = Vec::new();
    for nursery in nurseries {
        let its_own = std::fs::read_link(nursery.join("ns/mnt")).unwrap();
        let held = std::fs::read_dir(nursery.join("fd")).unwrap().flatten().map(|entry| entry.path()).find(|fd| {
            let kind = std::fs::read_link(fd).unwrap();
            kind != its_own && kind.to_string_lossy().starts_with("mnt:")
        });
        let namespace = format!("--mount={}", held.expect("the nursery holds no namespace for restores").display());
        let table = Command::new("nsenter").args([&namespace, "cat", "/proc/self/mountinfo"]).output().unwrap();
        assert!(table.status.success(), "{}", String::from_utf8_lossy(&table.stderr));
        mounts.extend(String::from_utf8_lossy(&table.stdout).lines().map(str::to_owned));
    }
    mounts
}

/// Loop devices and helpers let go a moment later.
async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn filled(machine: &Machine) {
    let mounted = |name: &String| {
        let root = machine.data_dir().join("roots").join(name).join("root");
        std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&*root.to_string_lossy())
    };
    until("the pool is full", || roots(machine).len() == POOL && roots(machine).iter().all(mounted)).await;
}

#[test]
fn a_restore_costs_the_same_however_many_sandboxes_there_are() {
    on_own_machine(async |machine| {
        let kernel = kernel_with_pool(&machine).await;
        let from_dump = dump(&machine, &kernel).await;
        let ids = [(); 3].map(|()| SandboxId::random());
        for id in ids {
            kernel.start(from_dump(id)).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
            wait_until_ready(&kernel, id).await;
        }
        // CRIU copies every mount that it finds, and takes it away again.
        let mounts = mounts_of_restores();
        let below = format!("{}/", machine.data_dir().display());
        for id in ids {
            kernel.destroy(id).await.unwrap();
        }
        kernel.close().await;
        assert!(!mounts.is_empty() && mounts.iter().all(|line| !line.contains(&below)), "{mounts:#?}");
    });
}

#[test]
fn a_start_takes_a_root_made_ahead_and_the_next_is_made() {
    on_own_machine(async |machine| {
        let kernel = kernel_with_pool(&machine).await;
        let request = dump(&machine, &kernel).await;
        kernel.expect(&request(SandboxId::random()));
        filled(&machine).await;
        let (mut ids, mut is_one_taken) = (Vec::new(), false);
        // More than were made ahead: those that find none make their own. So may the first: what is mounted is ready only
        // when the helper that made it has ended.
        for number in 0..POOL + 2 {
            let before = roots(&machine);
            let id = SandboxId::random();
            kernel.start(request(id)).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
            wait_until_ready(&kernel, id).await;
            is_one_taken |= !before.is_subset(&roots(&machine));
            // The restore's own view of the images goes after its answer, and with it what would pin a dump.
            let view = machine.data_dir().join("sandboxes").join(id.as_str()).join("work/images");
            until("the view of the images is gone", || !view.exists()).await;
            let said =
                run(&kernel, id, &format!("echo {number} >> /root/file; cat /root/file; cut -d' ' -f2 /proc/mounts | head -1")).await;
            assert_eq!(said.text, format!("common\n{number}\n/\n"));
            ids.push(id);
        }
        assert!(is_one_taken, "no start took what was ready");
        let maps: BTreeSet<String> = {
            let mut maps = BTreeSet::new();
            for id in &ids {
                maps.insert(run(&kernel, *id, "cat /proc/self/uid_map").await.text);
            }
            maps
        };
        assert_eq!(maps.len(), ids.len(), "two sandboxes share a range of ids");
        for id in ids {
            kernel.destroy(id).await.unwrap();
        }
        assert_eq!(machine.traces(), Vec::<String>::new());
        filled(&machine).await;
        kernel.close().await;
        until("nothing is left after close", || traces(&machine).is_empty()).await;
    });
}

#[test]
fn a_pause_of_a_sandbox_with_a_root_made_ahead_is_resumed_on_its_own_disk() {
    on_own_machine(async |machine| {
        let kernel = kernel_with_pool(&machine).await;
        let request = dump(&machine, &kernel).await;
        kernel.expect(&request(SandboxId::random()));
        filled(&machine).await;
        let id = SandboxId::random();
        kernel.start(request(id)).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
        wait_until_ready(&kernel, id).await;
        run(&kernel, id, "echo mine >> /root/file").await;
        let images: PathBuf = machine.data_dir().join("paused");
        std::fs::create_dir(&images).unwrap();
        let pause = DumpRequest { id, after: AfterDump::Stop, images: images.clone(), disk_copy: None };
        let dumped = kernel.dump(pause).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
        let from = StartFrom::Dump { images, criu: dumped.criu, agent: dumped.agent };
        kernel.start(StartRequest { disk: DiskSource::Own, from, ..request(id) }).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
        wait_until_ready(&kernel, id).await;
        assert_eq!(run(&kernel, id, "cat /root/file").await.text, "common\nmine\n");
        kernel.destroy(id).await.unwrap();
        kernel.close().await;
    });
}

#[test]
fn the_next_server_removes_the_roots_of_one_that_was_killed() {
    on_own_machine(async |machine| {
        let killed = kernel_with_pool(&machine).await;
        let request = dump(&machine, &killed).await;
        killed.expect(&request(SandboxId::random()));
        filled(&machine).await;
        let next = machine.kernel().await;
        until("the roots are gone", || traces(&machine).is_empty()).await;
        next.close().await;
    });
}

#[test]
fn roots_of_a_dump_that_is_gone_are_removed() {
    on_own_machine(async |machine| {
        let kernel = kernel_with_pool(&machine).await;
        let request = dump(&machine, &kernel).await;
        kernel.expect(&request(SandboxId::random()));
        filled(&machine).await;
        std::fs::remove_file(machine.data_dir().join("disk.img")).unwrap();
        until("the roots are gone", || traces(&machine).is_empty()).await;
        kernel.close().await;
    });
}
