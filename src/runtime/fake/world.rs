//! The fake's sandboxes, and the handles by which a test makes verbs fail or wait.

use super::agent::{FakeAgent, Process};
use crate::model::{ByteSize, DumpKey, KernelRef, NetworkPolicy, ProcessRef, SandboxId, VolumeMount};
use crate::runtime::{
    AfterDump, DUMPED_FILE, DiskSource, DumpRequest, Dumped, Exit, Finding, Restored, Runtime, RuntimeError, StartFrom, StartRequest,
    UnmountHow, Unmounted, Usage, WrittenFiles,
};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::watch;

/// Where agents listen inside, as far as the fake's `dial` knows.
const AGENT_PORT: u16 = 49983;

/// The verbs of [`Runtime`] that can be told to fail or to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verb {
    /// [`Runtime::start`].
    Start,
    /// [`Runtime::adopt`].
    Adopt,
    /// [`Runtime::stop`].
    Stop,
    /// [`Runtime::destroy`].
    Destroy,
    /// [`Runtime::dump`].
    Dump,
    /// [`Runtime::copy_disk`].
    CopyDisk,
    /// [`Runtime::findings`].
    Findings,
    /// [`Runtime::usage`].
    Usage,
    /// [`Runtime::set_network`].
    SetNetwork,
    /// [`Runtime::mount_volume`].
    MountVolume,
    /// [`Runtime::unmount_volume`].
    UnmountVolume,
    /// [`Runtime::sweep`].
    Sweep,
    /// [`Runtime::filled`].
    Filled,
    /// What [`Runtime::dump`] does after the tasks were ended.
    CleanUp,
}

/// Holds a verb until it is dropped.
#[derive(Debug)]
pub struct Gate {
    verb: Verb,
    state: Arc<Mutex<State>>,
    reached: watch::Receiver<u32>,
    _open: watch::Sender<bool>,
}

impl Gate {
    /// Resolves when a call of the verb waits at the gate.
    pub async fn reached(&mut self) {
        let _gone_counts_as_reached = self.reached.wait_for(|calls| *calls > 0).await;
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        lock(&self.state).gates.remove(&self.verb);
    }
}

#[derive(Debug)]
struct Running {
    process: Process,
    exit: watch::Sender<Option<Exit>>,
    network: NetworkPolicy,
    request: StartRequest,
}

#[derive(Debug)]
struct Held {
    calls: watch::Sender<u32>,
    open: watch::Receiver<bool>,
}

#[derive(Debug, Default)]
struct State {
    running: BTreeMap<SandboxId, Running>,
    /// Exits of sandboxes that are no more, for who asks late.
    exits: BTreeMap<SandboxId, Exit>,
    findings: BTreeMap<SandboxId, Vec<Finding>>,
    /// Restored and not stopped since, whether they live or not.
    restored: BTreeSet<SandboxId>,
    failures: BTreeMap<Verb, Vec<&'static str>>,
    gates: BTreeMap<Verb, Held>,
    calls: Vec<(Verb, Option<SandboxId>)>,
    start_hanging: bool,
    key: Option<DumpKey>,
    usage: Option<Usage>,
}

/// The runtime of tests. Clones share one world, as two servers share one kernel.
#[derive(Debug, Clone)]
pub struct Fake {
    data_dir: PathBuf,
    state: Arc<Mutex<State>>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fake {
    /// A kernel without sandboxes; disks go below `data_dir`.
    pub fn new(data_dir: &Path) -> Self {
        Self { data_dir: data_dir.to_owned(), state: Arc::default() }
    }

    /// The next call of the verb fails with this text.
    pub fn fail_next(&self, verb: Verb, why: &'static str) {
        lock(&self.state).failures.entry(verb).or_default().push(why);
    }

    /// Calls of the verb wait until the gate is dropped.
    pub fn hold(&self, verb: Verb) -> Gate {
        let ((calls, reached), (hold, open)) = (watch::channel(0), watch::channel(false));
        lock(&self.state).gates.insert(verb, Held { calls, open });
        Gate { verb, state: Arc::clone(&self.state), reached, _open: hold }
    }

    /// Agents that are started cold from now on answer nothing.
    pub fn start_hanging(&self) {
        lock(&self.state).start_hanging = true;
    }

    /// What [`Runtime::findings`] answers for this sandbox from now on.
    pub fn set_findings(&self, id: SandboxId, findings: Vec<Finding>) {
        lock(&self.state).findings.insert(id, findings);
    }

    /// What [`Runtime::dump_key`] answers from now on.
    pub fn set_dump_key(&self, key: DumpKey) {
        lock(&self.state).key = Some(key);
    }

    /// What [`Runtime::usage`] answers from now on.
    pub fn set_usage(&self, usage: Usage) {
        lock(&self.state).usage = Some(usage);
    }

    /// Ends the agent of a sandbox, as the kernel's out-of-memory killer would.
    pub fn end_agent(&self, id: SandboxId, detail: &str) {
        lock(&self.state).end(id, detail);
    }

    /// Ends all agents, as a reboot of the host would. Disks and dumps stay.
    pub fn reboot(&self) {
        let mut state = lock(&self.state);
        let ids: Vec<SandboxId> = state.running.keys().copied().collect();
        for id in ids {
            state.end(id, "unknown");
        }
    }

    /// Looks at or changes what a running agent knows; `None` when it does not run.
    pub fn with_agent<T>(&self, id: SandboxId, look: impl FnOnce(&mut FakeAgent) -> T) -> Option<T> {
        lock(&self.state).running.get(&id).map(|running| look(&mut running.process.state()))
    }

    /// Sandboxes with processes.
    pub fn running(&self) -> Vec<SandboxId> {
        lock(&self.state).running.keys().copied().collect()
    }

    /// The egress rules of a running sandbox.
    pub fn network(&self, id: SandboxId) -> Option<NetworkPolicy> {
        lock(&self.state).running.get(&id).map(|running| running.network.clone())
    }

    /// How a running sandbox was started.
    pub fn start_request(&self, id: SandboxId) -> Option<StartRequest> {
        lock(&self.state).running.get(&id).map(|running| running.request.clone())
    }

    /// All calls so far, oldest first.
    pub fn calls(&self) -> Vec<(Verb, Option<SandboxId>)> {
        lock(&self.state).calls.clone()
    }

    /// The sandbox's disk: a file whose content stands for what is on it.
    pub fn disk(&self, id: SandboxId) -> PathBuf {
        self.data_dir.join("sandboxes").join(id.as_str()).join("disk.img")
    }

    /// What the sandbox wrote over its layers: a test puts files there.
    pub fn upper(&self, id: SandboxId) -> PathBuf {
        self.data_dir.join("sandboxes").join(id.as_str()).join("upper")
    }

    async fn pass(&self, verb: Verb, id: Option<SandboxId>) -> Result<(), RuntimeError> {
        let gate = {
            let mut state = lock(&self.state);
            state.calls.push((verb, id));
            state.gates.get(&verb).map(|held| {
                held.calls.send_modify(|calls| *calls += 1);
                held.open.clone()
            })
        };
        if let Some(mut open) = gate {
            let _dropped_is_open = open.wait_for(|open| *open).await;
        }
        let mut state = lock(&self.state);
        match state.failures.get_mut(&verb).and_then(Vec::pop) {
            Some(why) => Err(failure(id.unwrap_or_else(SandboxId::random), why)),
            None => Ok(()),
        }
    }

    fn make_disk(&self, id: SandboxId, source: &DiskSource) -> io::Result<()> {
        let disk = self.disk(id);
        std::fs::create_dir_all(disk.parent().unwrap_or(&self.data_dir))?;
        match source {
            DiskSource::Fresh => std::fs::write(disk, b""),
            DiskSource::Own => disk.metadata().map(drop),
            DiskSource::CopyOf(from) | DiskSource::PooledCopyOf(from) => std::fs::copy(from, disk).map(drop),
        }
    }
}

fn failure(id: SandboxId, why: &'static str) -> RuntimeError {
    RuntimeError::Step { id, step: "a fake step", source: why.into() }
}

fn from_io(id: SandboxId, step: &'static str) -> impl FnOnce(io::Error) -> RuntimeError {
    move |source| RuntimeError::Step { id, step, source: source.into() }
}

impl State {
    /// [`State::end`], as a verb of the runtime: nothing is noted of it any more.
    fn stop(&mut self, id: SandboxId, detail: &str) {
        self.restored.remove(&id);
        self.end(id, detail);
    }

    fn end(&mut self, id: SandboxId, detail: &str) {
        if let Some(running) = self.running.remove(&id) {
            let exit = Exit { detail: detail.to_owned() };
            running.exit.send_replace(Some(exit.clone()));
            self.exits.insert(id, exit);
        }
    }
}

fn kernel_of(id: SandboxId) -> KernelRef {
    KernelRef {
        init: ProcessRef { pid: i32::from(id.as_str().as_bytes()[1]), start_ticks: 1 },
        slot: 1,
        uid_base: 65_536,
        host_boot_id: "fake".into(),
        agent: "fake-agent".into(),
    }
}

#[async_trait::async_trait]
impl Runtime for Fake {
    async fn start(&self, request: StartRequest) -> Result<KernelRef, RuntimeError> {
        let id = request.id;
        self.pass(Verb::Start, Some(id)).await?;
        self.make_disk(id, &request.disk).map_err(from_io(id, "making the disk"))?;
        let agent = match &request.from {
            StartFrom::Cold { control_secret } => {
                let hangs = lock(&self.state).start_hanging;
                FakeAgent { control_secret: control_secret.clone(), hangs, ..FakeAgent::default() }
            }
            StartFrom::Dump { images, .. } => {
                let memory = std::fs::read(images.join("memory.json")).map_err(from_io(id, "reading the images"))?;
                serde_json::from_slice(&memory).map_err(|_| failure(id, "the images are damaged"))?
            }
        };
        let process = Process::start(agent).await.map_err(from_io(id, "starting the agent"))?;
        let mut state = lock(&self.state);
        state.exits.remove(&id);
        match &request.from {
            StartFrom::Cold { .. } => {}
            StartFrom::Dump { .. } => drop(state.restored.insert(id)),
        }
        let network = request.network.clone();
        state.running.insert(id, Running { process, exit: watch::channel(None).0, network, request });
        Ok(kernel_of(id))
    }

    async fn adopt(&self, id: SandboxId, _kernel: &KernelRef, network: &NetworkPolicy) -> Result<(), RuntimeError> {
        self.pass(Verb::Adopt, Some(id)).await?;
        match lock(&self.state).running.get_mut(&id) {
            Some(running) => running.network = network.clone(),
            None => return Err(RuntimeError::NotRunning { id }),
        }
        Ok(())
    }

    async fn restored(&self, id: SandboxId) -> Result<Restored, RuntimeError> {
        let is_restored = lock(&self.state).restored.contains(&id);
        Ok(if is_restored { Restored::Whole(kernel_of(id)) } else { Restored::Nothing })
    }

    async fn exited(&self, id: SandboxId) -> Exit {
        let ended = lock(&self.state).running.get(&id).map(|running| running.exit.subscribe());
        if let Some(mut ended) = ended
            && let Ok(exit) = ended.wait_for(Option::is_some).await
            && let Some(exit) = exit.clone()
        {
            return exit;
        }
        let known = lock(&self.state).exits.get(&id).cloned();
        known.unwrap_or_else(|| Exit { detail: "unknown".into() })
    }

    async fn written(&self, id: SandboxId) -> Result<WrittenFiles, RuntimeError> {
        lock(&self.state).end(id, "stopped");
        let upper = self.upper(id);
        std::fs::create_dir_all(&upper).map_err(from_io(id, "making the upper folder"))?;
        Ok(WrittenFiles::in_folder(upper))
    }

    async fn stop(&self, id: SandboxId) -> Result<(), RuntimeError> {
        self.pass(Verb::Stop, Some(id)).await?;
        lock(&self.state).stop(id, "stopped");
        Ok(())
    }

    async fn destroy(&self, id: SandboxId) -> Result<(), RuntimeError> {
        self.pass(Verb::Destroy, Some(id)).await?;
        lock(&self.state).end(id, "destroyed");
        match std::fs::remove_dir_all(self.data_dir.join("sandboxes").join(id.as_str())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(from_io(id, "removing the disk")(error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    async fn dump(&self, request: DumpRequest) -> Result<Dumped, RuntimeError> {
        let id = request.id;
        self.pass(Verb::Dump, Some(id)).await?;
        let memory = self.with_agent(id, |agent| agent.clone()).ok_or(RuntimeError::NotRunning { id })?;
        let text = serde_json::to_vec(&memory).map_err(|_| failure(id, "the agent cannot be written"))?;
        let key = self.dump_key();
        let dumped = Dumped { criu: key.criu, agent: key.agent, images_bytes: text.len() as u64, standstill: Duration::from_millis(1) };
        std::fs::write(request.images.join("memory.json"), text).map_err(from_io(id, "writing the images"))?;
        if let Some(copy) = &request.disk_copy {
            std::fs::copy(self.disk(id), copy).map_err(from_io(id, "copying the disk"))?;
        }
        let mark = serde_json::to_vec(&dumped).map_err(|_| failure(id, "the mark cannot be written"))?;
        std::fs::write(request.images.join(DUMPED_FILE), mark).map_err(from_io(id, "marking the images"))?;
        match request.after {
            AfterDump::Stop => {
                lock(&self.state).stop(id, "dumped");
                self.pass(Verb::CleanUp, Some(id)).await?;
            }
            AfterDump::KeepRunning => {}
        }
        Ok(dumped)
    }

    async fn copy_disk(&self, id: SandboxId, to: PathBuf) -> Result<(), RuntimeError> {
        self.pass(Verb::CopyDisk, Some(id)).await?;
        std::fs::copy(self.disk(id), to).map(drop).map_err(from_io(id, "copying the disk"))
    }

    async fn findings(&self, id: SandboxId) -> Result<Vec<Finding>, RuntimeError> {
        self.pass(Verb::Findings, Some(id)).await?;
        Ok(lock(&self.state).findings.get(&id).cloned().unwrap_or_default())
    }

    async fn dial(&self, id: SandboxId, port: u16) -> io::Result<TcpStream> {
        let address = lock(&self.state).running.get(&id).map(|running| running.process.address);
        match address {
            Some(address) if port == AGENT_PORT => TcpStream::connect(address).await,
            Some(_) | None => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    }

    async fn usage(&self, id: SandboxId) -> Result<Usage, RuntimeError> {
        self.pass(Verb::Usage, Some(id)).await?;
        let usage = Usage {
            cpu_ns: 1_000_000,
            memory_used_bytes: 10 << 20,
            memory_cache_bytes: 1 << 20,
            disk_used_bytes: 4 << 20,
            disk_total_bytes: 20 << 30,
        };
        Ok(lock(&self.state).usage.unwrap_or(usage))
    }

    fn dump_key(&self) -> DumpKey {
        lock(&self.state).key.clone().unwrap_or_else(|| DumpKey {
            kernel: "6.18.0-fake".into(),
            cpu_flags: "avx sse2".into(),
            criu: "fake-criu".into(),
            agent: "fake-agent".into(),
            inner_address: "10.0.0.2".into(),
            confinement: "fake".into(),
        })
    }

    async fn filled(&self, id: SandboxId) -> Result<(), RuntimeError> {
        self.pass(Verb::Filled, Some(id)).await
    }

    async fn set_network(&self, id: SandboxId, policy: &NetworkPolicy) -> Result<(), RuntimeError> {
        self.pass(Verb::SetNetwork, Some(id)).await?;
        match lock(&self.state).running.get_mut(&id) {
            Some(running) => running.network = policy.clone(),
            None => return Err(RuntimeError::NotRunning { id }),
        }
        Ok(())
    }

    async fn set_memory(&self, id: SandboxId, _memory: ByteSize) -> Result<(), RuntimeError> {
        match lock(&self.state).running.contains_key(&id) {
            true => Ok(()),
            false => Err(RuntimeError::NotRunning { id }),
        }
    }

    async fn mount_volume(&self, id: SandboxId, _mount: &VolumeMount) -> Result<(), RuntimeError> {
        self.pass(Verb::MountVolume, Some(id)).await
    }

    async fn unmount_volume(&self, id: SandboxId, _mount: &VolumeMount, _how: UnmountHow) -> Result<Unmounted, RuntimeError> {
        self.pass(Verb::UnmountVolume, Some(id)).await?;
        Ok(Unmounted::Done)
    }

    async fn sweep(&self, keep: &[SandboxId]) -> Result<(), RuntimeError> {
        self.pass(Verb::Sweep, None).await?;
        for id in self.running().into_iter().filter(|id| !keep.contains(id)) {
            lock(&self.state).end(id, "swept");
        }
        let folder = self.data_dir.join("sandboxes");
        let Ok(entries) = std::fs::read_dir(&folder) else { return Ok(()) };
        for entry in entries.flatten() {
            let id = entry.file_name().to_string_lossy().parse::<SandboxId>();
            if id.is_ok_and(|id| !keep.contains(&id)) {
                let _swept_next_time = std::fs::remove_dir_all(entry.path());
            }
        }
        Ok(())
    }

    async fn close(&self) {}
}
