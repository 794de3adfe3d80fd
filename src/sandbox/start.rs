//! Giving a sandbox processes: the chain that create, resume and fork share.
//!
//! [`Prepared`] (everything decided) -> [`Started`] (pid 1 exists) -> [`Ready`] (the agent knows whose it is). Each
//! consumes the one before; what a failure leaves is said at each step.

use super::agent::{self, AgentError};
use super::commands::CommandError;
use super::copy::CopySource;
use super::core::Core;
use super::dump_folder::DumpFolder;
use super::tokens::TokenKind;
use crate::model::{BuildRecord, BuildSource, Fit, KernelRef, SandboxId, SandboxRecord, Secure, SnapshotRecord};
use crate::runtime::{DiskSource, RuntimeError, StartFrom, StartRequest};
use base64::Engine;
use sha2::{Digest, Sha256};
use std::net::SocketAddr;
use std::sync::Arc;
use stillbox_agent::wire;

/// What a new sandbox is made from.
#[derive(Debug)]
pub(super) enum Origin {
    /// A build: its dump, or a cold start.
    Build(Box<BuildRecord>),
    /// Another sandbox, dumped or held still.
    Copy(Arc<CopySource>),
}

/// Why a sandbox has no processes.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    /// The kernel side failed; nothing is left but an `Own` disk.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// It has processes, but the agent was not initialised; the caller stops them.
    #[error("the agent did not become ready")]
    Agent(#[from] AgentError),
    /// Its build's start or ready command failed; the caller stops what runs.
    #[error(transparent)]
    Commands(#[from] CommandError),
    /// Its pid 1 ended before it was ready; the caller stops what is left.
    #[error("the agent ended before it was ready: {0}")]
    Ended(String),
    /// The dump cannot be restored on this machine.
    #[error("its dump cannot be restored here: {0}")]
    Misfit(String),
    /// A kill was accepted meanwhile; the caller stops what is left.
    #[error("it was killed meanwhile")]
    Killed,
}

/// Everything decided, nothing done.
#[derive(Debug)]
pub(super) struct Prepared {
    request: StartRequest,
    init: wire::InitRequest,
    /// What the agent knows when it comes up.
    secret: String,
}

/// Pid 1 exists; nobody has told it whose it is.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) kernel: KernelRef,
    init: wire::InitRequest,
    secret: String,
}

/// The agent knows whose it is, and `control_secret` is the one it will want next.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) control_secret: String,
}

/// 64 hex characters from the kernel's generator.
pub(super) fn random_secret() -> String {
    hex::encode(random_bytes::<{ wire::CONTROL_SECRET_LEN / 2 }>())
}

/// A boot id as the kernel would make one.
pub(super) fn random_boot_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0u8; N];
    getrandom::fill(&mut bytes).expect("the kernel's random generator always answers on Linux >= 5.19");
    bytes
}

/// Whether creating from this build begins with a dump: one that fits, or the only thing that a stored snapshot is.
pub(super) fn usable_dump(
    core: &Core,
    record: &SandboxRecord,
    build: &BuildRecord,
    dump: Option<SnapshotRecord>,
) -> Result<Option<SnapshotRecord>, StartError> {
    let Some(dump) = dump else { return Ok(None) };
    // Files fit everywhere.
    if !dump.has_memory() {
        return Ok(Some(dump));
    }
    // A dump holds mounts of a disk of this size; another size is a fresh disk and a cold start.
    if build.source == BuildSource::Recipe && record.spec.resources.disk != build.resources.disk {
        return Ok(None);
    }
    match (dump.key.fit(&core.runtime.dump_key()), build.source) {
        (Fit::Same, _) | (Fit::Likely { .. }, BuildSource::Sandbox(_)) => Ok(Some(dump)),
        (Fit::Likely { .. } | Fit::Impossible { .. }, BuildSource::Recipe) => Ok(None),
        (Fit::Impossible { reason }, BuildSource::Sandbox(_)) => Err(StartError::Misfit(reason)),
    }
}

impl Prepared {
    /// libcontainer starts the agent; `record.control_secret` is the secret that it is given.
    pub(super) fn cold(core: &Core, record: &SandboxRecord, build: &BuildRecord, disk: DiskSource) -> Self {
        let from = StartFrom::Cold { control_secret: record.control_secret.clone() };
        Self::new(core, record, build, disk, from, record.control_secret.clone())
    }

    /// CRIU restores the dump.
    pub(super) fn from_dump(core: &Core, record: &SandboxRecord, build: &BuildRecord, disk: DiskSource, dump: &SnapshotRecord) -> Self {
        let images = DumpFolder::of(core, dump.id).images();
        let from = StartFrom::Dump { images, criu: dump.key.criu.clone(), agent: dump.key.agent.clone() };
        Self::new(core, record, build, disk, from, dump.control_secret.clone())
    }

    /// A new sandbox from the dump of a build.
    pub(super) fn from_build_dump(core: &Core, record: &SandboxRecord, build: &BuildRecord, dump: &SnapshotRecord) -> Self {
        let disk = DumpFolder::of(core, dump.id).disk();
        match dump.has_memory() {
            true => Self::from_dump(core, record, build, DiskSource::PooledCopyOf(disk), dump),
            false => Self::cold(core, record, build, DiskSource::CopyOf(disk)),
        }
    }

    /// A new sandbox as the copy of another.
    pub(super) fn from_copy(core: &Core, record: &SandboxRecord, source: &CopySource) -> Self {
        let disk = DiskSource::CopyOf(source.disk.clone());
        match &source.dump {
            Some(dump) if dump.has_memory() => Self::from_dump(core, record, &source.build, disk, dump),
            Some(_) | None => Self::cold(core, record, &source.build, disk),
        }
    }

    fn new(core: &Core, record: &SandboxRecord, build: &BuildRecord, disk: DiskSource, from: StartFrom, secret: String) -> Self {
        let request = StartRequest {
            id: record.id,
            layers: build.layers.clone(),
            disk,
            resources: record.spec.resources,
            network: record.spec.network.clone(),
            volumes: record.spec.volumes.clone(),
            from,
        };
        Self { request, init: introduction(core, record, build), secret }
    }

    /// Runs to its end whatever happens; on failure nothing is left but an `Own` disk.
    pub(super) async fn start(self, core: Arc<Core>) -> Result<Started, StartError> {
        let kernel = core.runtime.start(self.request).await?;
        Ok(Started { kernel, init: self.init, secret: self.secret })
    }
}

impl Started {
    /// Of a sandbox that an earlier server started and did not see ready: the agent may know either secret.
    pub(super) fn again(core: &Core, record: &SandboxRecord, build: &BuildRecord, kernel: KernelRef) -> Self {
        Self { kernel, init: introduction(core, record, build), secret: record.control_secret.clone() }
    }

    /// Tells the agent whose it is. May be dropped: a repetition succeeds.
    pub(super) async fn introduce(self, core: Arc<Core>, id: SandboxId) -> Result<Ready, StartError> {
        let secrets = [self.secret.as_str(), self.init.control_secret.as_str()];
        tokio::select! {
            biased;
            // Cancel-safe: an init may be repeated, an exit is met again.
            held = agent::init(&core.runtime, id, secrets, &self.init, core.config.agent_ready_max) => held?,
            exit = core.runtime.exited(id) => return Err(StartError::Ended(exit.detail)),
        }
        Ok(Ready { control_secret: self.init.control_secret })
    }
}

/// What an agent must know to run a build's commands, and nothing that names a sandbox of its users.
pub(super) fn generic_introduction(core: &Core, id: SandboxId, build: &BuildRecord) -> wire::InitRequest {
    wire::InitRequest {
        control_secret: random_secret(),
        sandbox_id: id.to_string(),
        template_id: build.template.to_string(),
        template_env: build.env.clone(),
        default_user: build.user.clone(),
        default_workdir: build.workdir.clone(),
        hostname: "stillbox".into(),
        machine_id: "0".repeat(32),
        boot_id: random_boot_id(),
        hosts: hosts("stillbox"),
        resolv_conf: resolv_conf(core),
        ca_bundle_pem: core.config.ca_pem.clone(),
        front: front(core),
        entropy: entropy(),
        cpu_count: Some(build.resources.cpu_count),
        memory_bytes: Some(build.resources.memory.bytes()),
        ..wire::InitRequest::default()
    }
}

fn hosts(hostname: &str) -> String {
    format!("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 {hostname}\n")
}

fn resolv_conf(core: &Core) -> String {
    core.config.nameservers.iter().map(|server| format!("nameserver {server}\n")).collect()
}

/// The slot is the name server, and serves the server's own port as well.
fn front(core: &Core) -> Option<wire::Front> {
    let (port, slot) = (core.config.localhost_port?, core.config.nameservers.first()?);
    Some(wire::Front { port, to: SocketAddr::new(*slot, port) })
}

fn entropy() -> String {
    base64::engine::general_purpose::STANDARD.encode(random_bytes::<32>())
}

/// Everything that names one sandbox. `record.next_control_secret` is in the row already.
fn introduction(core: &Core, record: &SandboxRecord, build: &BuildRecord) -> wire::InitRequest {
    let (id, spec) = (record.id, &record.spec);
    let hostname = id.to_string();
    wire::InitRequest {
        control_secret: record.next_control_secret.clone().unwrap_or_else(random_secret),
        sandbox_id: id.to_string(),
        template_id: spec.template.to_string(),
        access_token: match spec.secure {
            Secure::Token => Some(core.key.token(TokenKind::EnvdAccess, id)),
            Secure::Open => None,
        },
        env_vars: spec.env.clone(),
        template_env: build.env.clone(),
        default_user: build.user.clone(),
        default_workdir: build.workdir.clone(),
        machine_id: hex::encode(&Sha256::digest(format!("stillbox machine-id {id}"))[..16]),
        boot_id: record.boot_id.clone(),
        hosts: hosts(&hostname),
        resolv_conf: resolv_conf(core),
        ca_bundle_pem: core.config.ca_pem.clone(),
        front: front(core),
        hostname,
        generation: record.generation,
        entropy: entropy(),
        cpu_count: Some(spec.resources.cpu_count),
        memory_bytes: Some(spec.resources.memory.bytes()),
        events_address: None,
    }
}
