//! A machine of one's own for a test: a host in a netns, a data folder, a server that can be killed.

use crate::guest;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Command;
use stillbox::model::{ByteSize, InstanceId, NetworkPolicy, Resources, SandboxId};
use stillbox::runtime::cgroup::Cgroups;
use stillbox::runtime::config::RuntimeConfig;
use stillbox::runtime::kernel::Kernel;
use stillbox::runtime::network::NetworkConfig;
use stillbox::runtime::{DiskSource, Runtime, StartFrom, StartRequest};
use stillbox::sys::loop_device::holder_of;

/// The layer that sandboxes of these tests have.
const LAYER: &str = "busybox";
/// What a cold start's agent is told.
pub(crate) const SECRET: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
pub(crate) const BOOT_ID: &str = "11111111-2222-4333-8444-555555555555";

/// A data folder and what is needed to serve from it.
#[derive(Debug)]
pub(crate) struct Machine {
    folder: tempfile::TempDir,
    pub(crate) instance: InstanceId,
}

/// Runs `test` on threads that live in a network namespace of their own, with this binary's helper and real agent.
pub(crate) fn on_own_machine<F: Future<Output = ()>>(test: impl FnOnce(Machine) -> F + Send + 'static) {
    let host = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("these tests need root");
        ip("link set lo up");
        // A way out, for the server to find: it leads nowhere.
        ip("link add wan type veth peer name nowhere");
        ip("addr add 198.51.100.2/24 dev wan");
        ip("link set wan up");
        ip("route add default via 198.51.100.1");
        let folder = tempfile::Builder::new().prefix("stillbox-kernel-").tempdir().unwrap();
        guest::make_layer(folder.path(), LAYER);
        let machine = Machine { folder, instance: InstanceId::random() };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(test(machine));
    });
    if let Err(panic) = host.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

impl Machine {
    pub(crate) fn data_dir(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn config(&self) -> RuntimeConfig {
        RuntimeConfig {
            helper: PathBuf::from(env!("CARGO_BIN_EXE_stillbox")),
            network: NetworkConfig { pool_slots: 1, ..NetworkConfig::default() },
            ..RuntimeConfig::new(self.data_dir().to_owned())
        }
    }

    pub(crate) async fn kernel(&self) -> Kernel {
        Kernel::open(self.config(), self.instance).await.unwrap()
    }

    /// A cold start of a small sandbox.
    pub(crate) fn request(&self, id: SandboxId) -> StartRequest {
        StartRequest {
            id,
            layers: vec![LAYER.to_owned()],
            disk: DiskSource::Fresh,
            resources: Resources { cpu_count: 1, memory: ByteSize::mib(256), disk: ByteSize::gib(20), pids_max: 128 },
            network: NetworkPolicy::default(),
            volumes: Vec::new(),
            from: StartFrom::Cold { control_secret: SECRET.to_owned() },
        }
    }

    /// Starts a sandbox and waits until it can run commands.
    pub(crate) async fn sandbox(&self, kernel: &Kernel) -> SandboxId {
        let id = SandboxId::random();
        self.start(kernel, self.request(id)).await;
        id
    }

    pub(crate) async fn start(&self, kernel: &Kernel, request: StartRequest) {
        let id = request.id;
        kernel.start(request).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
        guest::wait_until_ready(kernel, id).await;
        guest::init(kernel, id, SECRET, BOOT_ID).await;
    }

    /// Everything in the kernel and on disk that carries this machine's marks; each a line.
    pub(crate) fn traces(&self) -> Vec<String> {
        let mut traces = Vec::new();
        let sandboxes = self.data_dir().join("sandboxes");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let below = sandboxes.to_string_lossy().into_owned() + "/";
        traces.extend(mounts.lines().filter(|line| line.contains(&below)).map(|line| format!("mount {line}")));
        for entry in std::fs::read_dir(&sandboxes).into_iter().flatten().flatten() {
            let number = holder_of(&entry.path().join("disk.img")).unwrap();
            traces.extend(number.map(|number| format!("loop device {number} of {}", entry.path().display())));
        }
        let cgroups = Command::new("find")
            .args(["/sys/fs/cgroup", "-type", "d", "-path", &format!("*stillbox-{}/*", self.instance)])
            .output()
            .unwrap();
        traces.extend(String::from_utf8_lossy(&cgroups.stdout).lines().map(|line| format!("cgroup {line}")));
        for entry in std::fs::read_dir(&sandboxes).into_iter().flatten().flatten() {
            traces.push(format!("folder {}", entry.path().display()));
        }
        traces.extend(agents_of(&self.data_dir().join("agents")));
        traces
    }
}

impl Drop for Machine {
    /// A test that failed leaves its sandboxes behind; they end as the server would end them, by cgroup and pidfd.
    fn drop(&mut self) {
        if let Ok(cgroups) = Cgroups::open(self.instance) {
            for id in cgroups.sandboxes() {
                let cgroup = cgroups.of(id);
                if let Err(error) = cgroup.kill_all().and_then(|()| cgroup.remove()) {
                    eprintln!("sandbox {id} of a failed test is still there: {error}");
                }
            }
            cgroups.close();
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points =
            mounts.lines().filter_map(|line| line.split(' ').nth(4)).filter(|point| Path::new(point).starts_with(self.folder.path()));
        // The deepest first.
        for point in points.collect::<Vec<_>>().into_iter().rev() {
            // It may have gone with another one.
            let _ = nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// Processes whose program lies in this machine's agent layers. Seen from outside, a program in a sandbox has the path
/// that it has inside, so they are told by its inode.
fn agents_of(agents: &Path) -> Vec<String> {
    use std::os::unix::fs::MetadataExt;
    let ours: Vec<u64> = std::fs::read_dir(agents)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some(std::fs::metadata(entry.path().join(".stillbox/agent")).ok()?.ino()))
        .collect();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let is_ours = |path: PathBuf| std::fs::metadata(path.join("exe")).is_ok_and(|exe| ours.contains(&exe.ino()));
    processes.map(|entry| entry.path()).filter(|path| is_ours(path.clone())).map(|path| format!("process {}", path.display())).collect()
}

/// An error with its causes, for a failed test's reader.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
