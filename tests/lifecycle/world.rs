//! One data folder, one fake kernel, one server at a time on top of them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stillbox::model::{
    BuildId, BuildRecord, BuildSource, BuildState, ByteSize, Lifecycle, NetworkPolicy, Resources, SandboxId, SandboxRecord, SandboxSpec,
    SandboxState, Secure, TemplateId, TemplateRecord,
};
use stillbox::runtime::fake::Fake;
use stillbox::sandbox::{CreateBy, InstallKey, Registry, SandboxConfig, Seams, SnapshotSync};
use stillbox::store::{Store, sandboxes, templates};
use time::OffsetDateTime;

/// Longer than anything here takes; a test that needs it has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) struct World {
    pub(crate) fake: Fake,
    pub(crate) seams: Seams,
    pub(crate) config: SandboxConfig,
    pub(crate) template: TemplateId,
    pub(crate) build: BuildId,
    server: Option<(Store, Registry)>,
    dir: tempfile::TempDir,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub(crate) async fn with(change: impl FnOnce(&mut SandboxConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path().to_owned());
        change(&mut config);
        let fake = Fake::new(dir.path());
        let (template, build) = (TemplateId::random(), BuildId::random());
        let mut world = Self { fake, seams: Seams::default(), config, template, build, server: None, dir };
        world.open().await;
        let template = template_row(template);
        let build = build_row(&template, build);
        world
            .store()
            .write(move |db| {
                templates::insert(db, &template)?;
                templates::insert_build(db, &build)
            })
            .await
            .unwrap();
        world
    }

    /// Starts a server; waits until the one before has let go of the folder.
    pub(crate) async fn open(&mut self) {
        let patience = Instant::now() + PATIENCE;
        let store = loop {
            match Store::open(self.dir.path()) {
                Ok(store) => break store,
                Err(error) if Instant::now() > patience => panic!("the folder is still held: {error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        let key = InstallKey::from_bytes([7; 32]);
        let runtime = Arc::new(self.fake.clone());
        let registry = Registry::open_with(self.config.clone(), key, store.clone(), runtime, self.seams.clone()).await.unwrap();
        self.server = Some((store, registry));
    }

    /// The server ends as by kill -9: no task takes another step. The kernel and the disk stay.
    pub(crate) async fn crash_and_reopen(&mut self) {
        self.server = None;
        self.seams = Seams { clock: self.seams.clock.clone(), ..Seams::default() };
        self.open().await;
    }

    pub(crate) async fn close_and_reopen(&mut self) {
        self.registry().close().await;
        self.crash_and_reopen().await;
    }

    pub(crate) fn registry(&self) -> Registry {
        self.server.as_ref().expect("a server is open").1.clone()
    }

    pub(crate) fn store(&self) -> &Store {
        &self.server.as_ref().expect("a server is open").0
    }

    pub(crate) fn spec(&self) -> SandboxSpec {
        SandboxSpec {
            template: self.template,
            build: self.build,
            alias: Some("base".into()),
            lifecycle: Lifecycle::of(Duration::from_secs(300)),
            resources: resources(),
            network: NetworkPolicy::default(),
            metadata: BTreeMap::from([("owner".into(), "test".into())]),
            env: BTreeMap::from([("GREETING".into(), "hello".into())]),
            secure: Secure::Token,
            volumes: Vec::new(),
        }
    }

    /// Changes the row of the build that everything here is created from.
    pub(crate) async fn change_build(&self, change: impl FnOnce(&mut BuildRecord)) {
        let id = self.build;
        let mut build = self.store().read(move |db| templates::build(db, id)).await.unwrap().unwrap();
        change(&mut build);
        self.store().write(move |db| templates::update_build(db, &build)).await.unwrap();
    }

    pub(crate) async fn create(&self) -> SandboxRecord {
        self.registry().create(self.spec(), None).await.unwrap()
    }

    pub(crate) async fn row(&self, id: SandboxId) -> SandboxRecord {
        self.store().read(move |db| sandboxes::by_id(db, id)).await.unwrap().expect("the row is there")
    }

    /// Puts something into the agent's memory and on the sandbox's disk.
    pub(crate) fn mark(&self, id: SandboxId, mark: &str) {
        self.fake.with_agent(id, |agent| agent.memory.insert("mark".into(), mark.into())).expect("it runs");
        std::fs::write(self.fake.disk(id), mark).unwrap();
    }

    /// What is in memory and on disk of a running sandbox.
    pub(crate) fn marks(&self, id: SandboxId) -> (Option<String>, String) {
        let memory = self.fake.with_agent(id, |agent| agent.memory.get("mark").cloned()).expect("it runs");
        (memory, std::fs::read_to_string(self.fake.disk(id)).unwrap())
    }

    pub(crate) fn snapshot_folders(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.dir.path().join("snapshots")) else { return Vec::new() };
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }

    pub(crate) fn sandbox_folders(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("sandboxes")).map_or(0, Iterator::count)
    }

    pub(crate) async fn wait_for_state(&self, id: SandboxId, state: SandboxState) {
        let registry = self.registry();
        eventually(&format!("{id} is {state}"), || registry.get(id).is_ok_and(|record| record.state == state)).await;
    }

    pub(crate) async fn wait_until_gone(&self, id: SandboxId) {
        let registry = self.registry();
        eventually(&format!("{id} is gone"), || registry.get(id).is_err() && !self.fake.running().contains(&id)).await;
    }
}

pub(crate) async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let patience = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < patience, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

pub(crate) fn resources() -> Resources {
    Resources { cpu_count: 2, memory: ByteSize::mib(512), disk: ByteSize::gib(20), pids_max: 1024 }
}

fn config(data_dir: PathBuf) -> SandboxConfig {
    SandboxConfig {
        data_dir,
        nameservers: vec!["9.9.9.9".parse().unwrap()],
        ca_pem: None,
        localhost_port: None,
        timeout_max: Duration::from_secs(24 * 3600),
        running_max: 20,
        cpus_max: 1000,
        memory_max: ByteSize::gib(1024),
        metrics_every: Duration::from_millis(50),
        history_kept: Duration::from_secs(3600),
        wake_wait_max: Duration::from_secs(5),
        wake_timeout_min: Duration::from_secs(300),
        agent_ready_max: Duration::from_secs(2),
        snapshots_bytes_max: ByteSize::gib(1),
        paused_kept: Duration::from_secs(30 * 24 * 3600),
        create_by: CreateBy::ColdStart,
        snapshot_sync: SnapshotSync::Background,
        unmount_fuse: false,
    }
}

fn template_row(id: TemplateId) -> TemplateRecord {
    TemplateRecord { public: true, ..TemplateRecord::new(id, vec!["base".into()], OffsetDateTime::now_utc()) }
}

fn build_row(template: &TemplateRecord, id: BuildId) -> BuildRecord {
    BuildRecord {
        id,
        template: template.id,
        state: BuildState::Ready,
        layers: vec!["layer".into()],
        env: BTreeMap::from([("LANG".into(), "C.UTF-8".into())]),
        user: "user".into(),
        workdir: "/home/user".into(),
        start_command: None,
        ready_command: None,
        resources: resources(),
        source: BuildSource::Recipe,
        origin: "test".into(),
        dump: None,
        created_at: OffsetDateTime::now_utc(),
        finished_at: None,
    }
}
