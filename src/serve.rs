//! The composition root: opens, recovers, spawns, drains.
//!
//! The order matters. What can fail because of somebody else (root, ports, the folder's lock) is tried before anything is
//! changed; requests are answered only when every sandbox of an earlier server was taken over.

use crate::api::{self, ApiConfig, ApiState};
use crate::config::{ApiKey, Config, Listen, LogFormat};
use crate::proxy::{self, Proxy, ProxyConfig, tls};
use crate::runtime::Runtime;
use crate::runtime::kernel::{self, Kernel};
use crate::runtime::network::resolver::{self, Resolver, ResolverConfig, ResolverSockets};
use crate::runtime::network::{Front, Interception};
use crate::sandbox::{self, AtFailpoint, InstallKey, Registry, Seams};
use crate::store::{Store, StoreError, install};
use crate::template::build::{Builds, BuildsMeans};
use crate::template::{self, Resolved, Templates, Thoroughness};
use crate::volume::{self, Volumes, VolumesMeans};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{info, warn};

/// Why the server did not start. One line, with the next step.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Not root.
    #[error("namespaces, mounts and CRIU need root: run with sudo, or as a systemd service (config/stillbox.service)")]
    NotRoot,
    /// A port is taken.
    #[error("{address} is already in use; end the program that listens there, or set {key} to another port")]
    PortTaken {
        /// The address.
        address: SocketAddr,
        /// The setting.
        key: &'static str,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address}; set {key} to an address of this machine")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The setting.
        key: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The data folder cannot be used.
    #[error("the data folder {path} cannot be used; set data_dir to a folder on ext4, xfs or btrfs")]
    DataDir {
        /// The folder or file in it.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The store cannot be opened; its message names the file and the holder of the lock.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The kernel side cannot be opened.
    #[error(transparent)]
    Runtime(#[from] kernel::OpenError),
    /// The base template cannot be made.
    #[error(transparent)]
    Template(#[from] template::BuiltInError),
    /// Sandboxes of an earlier server cannot be taken over.
    #[error(transparent)]
    Core(#[from] sandbox::OpenError),
    /// What an earlier server left of volumes cannot be looked through.
    #[error("the volumes below {} cannot be used", path.display())]
    Volumes {
        /// Their folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: volume::ChangeError,
    },
    /// No certificates.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
    /// Authorities for where requests of sandboxes are changed.
    #[error("network.extra_ca_file cannot be used; set it to a file of certificates in PEM")]
    ExtraAuthorities(#[source] io::Error),
    /// The async runtime or its signals cannot be set up.
    #[error("the server cannot be set up")]
    Setup(#[source] io::Error),
}

const HTTPS_PORT: u16 = 443;

/// Serves until SIGTERM or SIGINT. Sandboxes that run then run on; the next server takes them over.
pub fn run(config: Config) -> Result<(), ServeError> {
    start_logging(&config);
    if !nix::unistd::geteuid().is_root() {
        return Err(ServeError::NotRoot);
    }
    raise_open_files();
    let bound = Bound::bind(&config)?;
    make_data_dir(&config.data_dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(ServeError::Setup)?;
    runtime.block_on(serve(config, bound))
}

async fn serve(mut config: Config, mut bound: Bound) -> Result<(), ServeError> {
    let started = Instant::now();
    let store = Store::open(&config.data_dir)?;
    let install = install::read_or_make(&config.data_dir)?;
    let key = api_key(&config)?;
    let authority = authority(&config, &install.instance.to_string())?;
    let tls = tls::server_config(&authority, &config.domain)?;
    let front = front(&config);
    config.sandbox.ca_pem = Some(authority.pem().to_owned());
    config.runtime.network.interception = Some(interception(&config, &authority)?);
    config.sandbox.localhost_port = front.domain.ends_with(".localhost").then_some(front.port);
    config.runtime.network.front = Some(front);
    let templates = Templates::open(config.template.clone(), store.clone());
    templates.ensure_built_in("base", |line| info!("Template base: {line}")).await?;
    let built_ins = templates.adopt_built_ins().await?;
    let kernel = Kernel::open(config.runtime.clone(), install.instance).await?;
    config.sandbox.nameservers = kernel.nameservers();
    let storage = kernel.volumes();
    let runtime: Arc<dyn Runtime> = Arc::new(kernel);
    let token_key = InstallKey::from_bytes(install.key);
    let volumes = VolumesMeans { config: config.volumes, store: store.clone(), storage, key: token_key.clone() };
    let unusable = |source| ServeError::Volumes { path: config.data_dir.join("volumes"), source };
    let volumes = Volumes::open(volumes).await.map_err(unusable)?;
    let registry =
        Registry::open_with(config.sandbox.clone(), token_key.clone(), store.clone(), Arc::clone(&runtime), seams(&config)).await?;
    let builds = Builds::open(BuildsMeans {
        config: config.build,
        templates_config: config.template.clone(),
        templates: templates.clone(),
        store,
        registry: registry.clone(),
        key: token_key,
        resources: config.resources,
    })
    .await?;
    tokio::spawn(make_ready(registry.clone(), built_ins));
    tokio::spawn(collect_layers(templates.clone()));
    let (stop, stopped) = watch::channel(false);
    let state = ApiState::new(registry.clone(), templates, builds.clone(), volumes, api_config(&config, key));
    let _resolver = start_resolver(&config, &mut bound)?;
    let servers = spawn_listeners(&config, bound, tls, &registry, state, &stopped)?;
    info!(
        took_ms = started.elapsed().as_millis(),
        "Serving instance {} of {} on http://{} and https://*.{}",
        install.instance,
        config.data_dir.display(),
        config.listen,
        config.domain
    );
    wait_for_signal().await?;
    info!("Stopping; running sandboxes go on");
    let _nobody_listens = stop.send(true);
    for server in servers {
        server.await.map_err(|panicked| ServeError::Setup(io::Error::other(panicked)))?;
    }
    builds.close().await;
    registry.close().await;
    runtime.close().await;
    info!("Stopped");
    Ok(())
}

/// A crash test names the point at which this process is to die.
fn seams(config: &Config) -> Seams {
    let seams = Seams::default();
    if let Some(point) = &config.failpoint {
        tracing::warn!("This server will abort at failpoint {point}");
        seams.failpoints.arm(point, AtFailpoint::Abort);
    }
    seams
}

/// So that the first create is a restore already; until then creates are cold starts. One after the other, base first.
async fn make_ready(registry: Registry, mut built_ins: Vec<Resolved>) {
    built_ins.sort_by_key(|built_in| built_in.build.layers.len());
    for Resolved { template, build } in built_ins {
        if let Err(error) = registry.make_ready(build.id).await {
            let name = template.aliases.first().map_or("", String::as_str);
            warn!(error = &error as &dyn std::error::Error, "Template {name} has no dump yet; its sandboxes start cold");
        }
    }
}

/// Layers grow slowly and are not in the way of anything: from time to time is enough.
const COLLECT_EVERY: Duration = Duration::from_secs(600);

/// Runs until the server ends.
async fn collect_layers(templates: Templates) {
    loop {
        tokio::time::sleep(COLLECT_EVERY).await;
        if let Err(error) = templates.collect_garbage(Thoroughness::Usual).await {
            warn!(error = &error as &dyn std::error::Error, "Could not look for layers that nothing needs; the next round tries again");
        }
    }
}

fn start_logging(config: &Config) {
    let filter = tracing_subscriber::EnvFilter::new(&config.log);
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // Colours are for terminals: in a file and in the journal they are noise that no search matches.
    let logs = if io::stderr().is_terminal() { logs } else { logs.with_ansi(false) };
    // A second call in one process (tests) keeps the first subscriber.
    let _first_wins = match config.log_format {
        LogFormat::Text => logs.with_target(false).try_init(),
        LogFormat::Json => logs.json().try_init(),
    };
}

/// Our authority, with its bundle for clients written.
fn authority(config: &Config, instance: &str) -> Result<Arc<tls::Authority>, ServeError> {
    let authority = tls::Authority::open(&config.data_dir, instance)?;
    tls::write_bundle(&authority, &config.data_dir.join("tls/bundle.pem"))?;
    Ok(Arc::new(authority))
}

/// How requests of sandboxes are changed: they trust our authority, which they were given.
fn interception(config: &Config, authority: &Arc<tls::Authority>) -> Result<Interception, ServeError> {
    let shown = tls::interception_config(authority)?;
    Interception::new(shown, config.runtime.network.extra_ca_file.as_deref()).map_err(ServeError::ExtraAuthorities)
}

fn api_config(config: &Config, key: ApiKey) -> ApiConfig {
    ApiConfig { keys: vec![key.0], domain: config.domain.clone(), timeout_max: config.sandbox.timeout_max, ..config.api.clone() }
}

/// Where this server's public URLs are: the domain's port, and the listener behind it. A domain whose port leads through
/// something else before it comes here is served directly to sandboxes.
fn front(config: &Config) -> Front {
    let (domain, port) = match config.domain.rsplit_once(':') {
        Some((domain, port)) => (domain, port.parse().unwrap_or(HTTPS_PORT)),
        None => (config.domain.as_str(), HTTPS_PORT),
    };
    let mut server = config.tls_listen.addresses[0];
    if server.ip().is_unspecified() {
        server.set_ip(if server.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
    }
    Front { domain: domain.to_owned(), port, server, connections_max: config.proxy.connections_max / 2 }
}

fn spawn_listeners(
    config: &Config,
    bound: Bound,
    tls: Arc<rustls::ServerConfig>,
    registry: &Registry,
    state: ApiState,
    stopped: &watch::Receiver<bool>,
) -> Result<Vec<tokio::task::JoinHandle<()>>, ServeError> {
    let control = api::router(state);
    let proxy = Proxy::new(ProxyConfig { domain: config.domain.clone(), ..config.proxy.clone() }, Arc::new(registry.clone()));
    let plain = bound.plain.into_iter().map(|listener| (listener, None));
    let encrypted = bound.tls.into_iter().map(|listener| (listener, Some(Arc::clone(&tls))));
    let mut servers = Vec::new();
    for (listener, tls) in plain.chain(encrypted) {
        let tcp = tokio::net::TcpListener::from_std(listener).map_err(ServeError::Setup)?;
        let listener = proxy::Listener { tcp, tls };
        servers.push(tokio::spawn(proxy::serve(listener, Arc::clone(&proxy), control.clone(), stopped.clone())));
    }
    Ok(servers)
}

/// The machine's own name server, where one is wanted; it ends when it is dropped.
fn start_resolver(config: &Config, bound: &mut Bound) -> Result<Option<Resolver>, ServeError> {
    let Some(sockets) = bound.resolver.take() else { return Ok(None) };
    let names = resolver::names_of_domain(config.domain_name());
    // A machine without IPv6 does not listen on ::1, and nobody is to be led there.
    let bound_to = |ip: &IpAddr| ip.is_ipv4() || bound.tls.iter().any(|listener| listener.local_addr().is_ok_and(|at| at.is_ipv6()));
    let own = || config.tls_addresses().into_iter().filter(bound_to).collect();
    let settings = ResolverConfig {
        names: names.into_iter().chain(config.dns.names.iter().cloned()).collect(),
        addresses: if config.dns.answers.is_empty() { own() } else { config.dns.answers.clone() },
        upstreams: config.runtime.network.dns_upstreams.clone(),
    };
    Resolver::start(settings, sockets).map(Some).map_err(ServeError::Setup)
}

/// A shell's 1024 open files are fewer than the connections that this server takes, and one sandbox alone may have several
/// hundred into it. The hard limit is what the machine's owner allows.
fn raise_open_files() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        warn!(error = &error as &dyn std::error::Error, "This server may open {soft} files only; sandboxes can use them up");
    }
}

async fn wait_for_signal() -> Result<(), ServeError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Setup)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Setup)?;
    // Both arms are cancel-safe: a signal that is not received here ends nothing else.
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Sockets bound before anything else happens.
#[derive(Debug)]
struct Bound {
    plain: Vec<TcpListener>,
    tls: Vec<TcpListener>,
    resolver: Option<ResolverSockets>,
}

impl Bound {
    fn bind(config: &Config) -> Result<Self, ServeError> {
        Ok(Self {
            plain: bind_all(&config.listen, "listen")?,
            tls: bind_all(&config.tls_listen, "tls_listen")?,
            resolver: config.dns.listen.as_ref().map(bind_resolver).transpose()?,
        })
    }
}

fn bind_resolver(listen: &Listen) -> Result<ResolverSockets, ServeError> {
    const KEY: &str = "dns.listen";
    ResolverSockets::bind(&listen.addresses).map_err(|(address, source)| match source.kind() {
        io::ErrorKind::AddrInUse => ServeError::PortTaken { address, key: KEY },
        _ => ServeError::Listen { address, key: KEY, source },
    })
}

/// All addresses of one setting. A machine without IPv6 goes without ::1 when 127.0.0.1 is there.
fn bind_all(listen: &Listen, key: &'static str) -> Result<Vec<TcpListener>, ServeError> {
    let mut bound = Vec::new();
    for &address in &listen.addresses {
        match TcpListener::bind(address) {
            Ok(listener) => {
                listener.set_nonblocking(true).map_err(|source| ServeError::Listen { address, key, source })?;
                bound.push(listener);
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Err(ServeError::PortTaken { address, key }),
            Err(_) if address.ip().is_loopback() && address.is_ipv6() && !bound.is_empty() => {}
            Err(source) => return Err(ServeError::Listen { address, key, source }),
        }
    }
    Ok(bound)
}

/// Makes the data folder, readable by its owner only: dumps hold secrets.
fn make_data_dir(path: &Path) -> Result<(), ServeError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| ServeError::DataDir { path: path.to_owned(), source })
}

/// The configured key, else the one in the data folder, else a new one: `e2b_` and 40 hex digits, which the E2B SDKs'
/// own check accepts (contract/e2b.md 1.1).
fn api_key(config: &Config) -> Result<ApiKey, ServeError> {
    if let Some(key) = &config.api_key {
        return Ok(key.clone());
    }
    let path = config.data_dir.join("api_key");
    let failed = |source| ServeError::DataDir { path: path.clone(), source };
    match fs::read_to_string(&path) {
        Ok(text) => Ok(ApiKey(text.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = new_key();
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(failed)?;
            writeln!(file, "{key}").and_then(|()| file.sync_all()).map_err(failed)?;
            Ok(ApiKey(key))
        }
        Err(error) => Err(failed(error)),
    }
}

fn new_key() -> String {
    let mut bytes = [0u8; 20];
    getrandom::fill(&mut bytes).expect("the kernel's random generator always answers on Linux >= 5.19");
    format!("e2b_{}", hex::encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_made_once_in_the_form_that_sdks_accept() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config { data_dir: folder.path().to_owned(), ..Config::default() };
        let key = api_key(&config).unwrap();
        let digits = key.0.strip_prefix("e2b_").unwrap();
        assert!(digits.len() == 40 && digits.bytes().all(|b| b.is_ascii_hexdigit()));
        assert_eq!(api_key(&config).unwrap(), key);
    }

    #[test]
    fn a_taken_port_is_named_with_its_setting() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let listen = Listen { addresses: vec![taken.local_addr().unwrap()] };
        let error = bind_all(&listen, "listen").unwrap_err().to_string();
        assert!(error.contains("already in use") && error.contains("set listen"), "{error}");
    }
}
