//! A server in memory: real router, core and store; a runtime whose sandboxes are small agents on loopback.

use super::golden;
use axum::Router;
use axum::body::Body;
use http::Request;
use http_body_util::BodyExt;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use stillbox::api::{ApiConfig, ApiState, router};
use stillbox::model::{BuildId, BuildRecord, BuildSource, BuildState, ByteSize, Resources, SandboxId, TemplateId, TemplateRecord};
use stillbox::runtime::config::DiskDriver;
use stillbox::runtime::disk::Disks;
use stillbox::runtime::fake::{Fake, Verb};
use stillbox::runtime::layout::Layout;
use stillbox::runtime::volumes::Volumes as Storage;
use stillbox::sandbox::{InstallKey, Registry, SandboxConfig, SnapshotSync};
use stillbox::store::{Store, templates};
use stillbox::template::build::{BuildConfig, Builds, BuildsMeans};
use stillbox::template::{TemplateConfig, Templates, UnpackLimits};
use stillbox::volume::{VolumeConfig, Volumes, VolumesMeans};
use tempfile::TempDir;
use time::OffsetDateTime;
use tower::ServiceExt;

const KEY: &str = "e2b_0000000000000000000000000000000000000000";

/// The server, and a client of it.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) router: Router,
    pub(crate) registry: Registry,
    pub(crate) runtime: Fake,
    means: Arc<dyn Fn() -> BuildsMeans + Send + Sync>,
    headers: Vec<(&'static str, String)>,
    _folder: Arc<TempDir>,
}

/// An answer as clients see it.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Map<String, Value>,
    pub(crate) body: Value,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with_places(16).await
    }

    /// A server on which so many sandboxes may run.
    pub(crate) async fn with_places(running_max: u32) -> Self {
        let folder = Arc::new(tempfile::tempdir().unwrap());
        let store = Store::open(folder.path()).unwrap();
        add_base(&store).await;
        let runtime = Fake::new(folder.path());
        let key = InstallKey::random();
        let registry = Registry::open(
            SandboxConfig { running_max, ..core_config(folder.path()) },
            key.clone(),
            store.clone(),
            Arc::new(runtime.clone()),
        )
        .await
        .unwrap();
        let templates = Templates::open(template_config(folder.path()), store.clone());
        let (store_of_volumes, key_of_volumes) = (store.clone(), key.clone());
        let means: Arc<dyn Fn() -> BuildsMeans + Send + Sync> = {
            let (folder, templates, registry) = (folder.path().to_owned(), templates.clone(), registry.clone());
            Arc::new(move || BuildsMeans {
                config: BuildConfig { at_once: 1, waiting_max: 1, upload_bytes_max: ByteSize(1000), ..BuildConfig::default() },
                templates_config: template_config(&folder),
                templates: templates.clone(),
                store: store.clone(),
                registry: registry.clone(),
                key: key.clone(),
                resources: Resources { cpu_count: 2, memory: ByteSize::mib(512), disk: ByteSize::gib(20), pids_max: 1024 },
            })
        };
        let builds = Builds::open(means()).await.unwrap();
        let layout = Layout::new(folder.path()).unwrap();
        let disks = Disks::open(layout.clone(), DiskDriver::Folder, ByteSize(0));
        let volumes = Volumes::open(VolumesMeans {
            config: VolumeConfig { count_max: 3, ..VolumeConfig::default() },
            store: store_of_volumes,
            storage: Storage::new(layout, disks),
            key: key_of_volumes,
        });
        let volumes = volumes.await.unwrap();
        let config = ApiConfig::new(vec![KEY.to_owned()], "stillbox.localhost:3443");
        let router = router(ApiState::new(registry.clone(), templates, builds, volumes, config));
        Self { router, registry, runtime, means, headers: vec![("x-api-key", KEY.to_owned())], _folder: folder }
    }

    /// The builds of a server that starts on what another one left.
    pub(crate) async fn builds_of_the_next_server(&self) -> Builds {
        Builds::open((self.means)()).await.unwrap()
    }

    pub(crate) fn without_key(&self) -> Self {
        Self { headers: Vec::new(), ..self.clone() }
    }

    pub(crate) fn with_key(&self, key: &str) -> Self {
        Self { headers: vec![("x-api-key", key.to_owned())], ..self.clone() }
    }

    pub(crate) fn with_header(&self, name: &'static str, value: &str) -> Self {
        let mut other = self.clone();
        other.headers.push((name, value.to_owned()));
        other
    }

    pub(crate) fn running(&self) -> Vec<SandboxId> {
        self.runtime.running()
    }

    pub(crate) fn fail_next_start(&self, why: &'static str) {
        self.runtime.fail_next(Verb::Start, why);
    }

    /// One call, compared with the golden file `name`; its body.
    pub(crate) async fn call(&self, name: &str, method: &str, path: &str, body: Option<Value>) -> Value {
        self.send(name, method, path, body.map(|body| body.to_string()).unwrap_or_default()).await
    }

    /// As [`World::call`], with a body that need not be JSON.
    pub(crate) async fn send(&self, name: &str, method: &str, path: &str, body: String) -> Value {
        let answer = self.exchange(method, path, body).await;
        let shown: Map<String, Value> = answer
            .headers
            .iter()
            .filter(|(name, _)| name.starts_with("x-") || SHOWN.contains(&name.as_str()))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        golden::check(name, &json!({"status": answer.status, "headers": shown, "body": answer.body}));
        answer.body
    }

    /// One call that no file describes.
    pub(crate) async fn answer(&self, method: &str, path: &str, body: Option<Value>) -> Answer {
        self.exchange(method, path, body.map(|body| body.to_string()).unwrap_or_default()).await
    }

    /// Asks until the answer's body is as wanted.
    pub(crate) async fn until(&self, path: &str, is_wanted: impl Fn(&Value) -> bool) {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        loop {
            let answer = self.answer("GET", path, None).await;
            if is_wanted(&answer.body) {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "{path} still answers {}", answer.body);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn exchange(&self, method: &str, path: &str, body: String) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        if method == "OPTIONS" {
            request =
                request.header("access-control-request-method", "POST").header("access-control-request-headers", "x-api-key,content-type");
        }
        let response = self.router.clone().oneshot(request.body(Body::from(body)).unwrap()).await.unwrap();
        let status = response.status().as_u16();
        let headers = response.headers().iter().map(|(name, value)| (name.to_string(), json!(value.to_str().unwrap()))).collect();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let body = serde_json::from_slice(&bytes).unwrap_or_else(|_| json!(String::from_utf8_lossy(&bytes)));
        Answer { status, headers, body }
    }
}

/// Headers that are part of the wire beside those that begin with `x-`.
const SHOWN: [&str; 6] = [
    "content-type",
    "should-retry",
    "retry-after",
    "access-control-allow-origin",
    "access-control-allow-methods",
    "access-control-allow-headers",
];

async fn add_base(store: &Store) {
    let at = OffsetDateTime::from_unix_timestamp(1_767_225_600).unwrap();
    let (template, build) = (TemplateId::random(), BuildId::random());
    let record = TemplateRecord { public: true, ..TemplateRecord::new(template, vec!["base".to_owned()], at) };
    let built = BuildRecord {
        id: build,
        template,
        state: BuildState::Ready,
        layers: Vec::new(),
        env: BTreeMap::new(),
        user: "user".to_owned(),
        workdir: "/home/user".to_owned(),
        start_command: None,
        ready_command: None,
        resources: Resources { cpu_count: 2, memory: ByteSize::mib(512), disk: ByteSize::gib(20), pids_max: 1024 },
        source: BuildSource::Recipe,
        dump: None,
        origin: "test".to_owned(),
        created_at: at,
        finished_at: Some(at),
    };
    let write = store.write(move |db| {
        templates::insert(db, &record)?;
        templates::insert_build(db, &built)?;
        templates::set_tag(db, template, "default", build, at)
    });
    write.await.unwrap();
}

fn core_config(data_dir: &std::path::Path) -> SandboxConfig {
    SandboxConfig {
        data_dir: data_dir.to_owned(),
        nameservers: Vec::new(),
        ca_pem: None,
        localhost_port: None,
        timeout_max: Duration::from_secs(86400),
        running_max: 16,
        cpus_max: 1000,
        memory_max: ByteSize::gib(1024),
        metrics_every: Duration::from_millis(100),
        history_kept: Duration::from_secs(3600),
        wake_wait_max: Duration::from_secs(10),
        wake_timeout_min: Duration::from_secs(300),
        agent_ready_max: Duration::from_secs(10),
        snapshots_bytes_max: ByteSize::gib(1),
        paused_kept: Duration::from_secs(86400),
        create_by: stillbox::sandbox::CreateBy::ColdStart,
        snapshot_sync: SnapshotSync::Background,
        unmount_fuse: false,
    }
}

fn template_config(data_dir: &std::path::Path) -> TemplateConfig {
    TemplateConfig {
        data_dir: data_dir.to_owned(),
        archive: None,
        debian_mirror: None,
        debian_security_mirror: None,
        cache_dir: None,
        images: stillbox::template::ImageSettings::default(),
        limits: UnpackLimits::default(),
    }
}
