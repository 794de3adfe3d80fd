//! One [`Config`] made of each room's own: flags over `STILLBOX_*` variables over config/stillbox.toml over defaults.
//!
//! Every key stands once, in keys.rs, with the field it sets; file, environment and `--set` go through that one table,
//! so an unknown key is an error everywhere and all errors are reported at once. The only reader of the environment.

mod keys;
mod value;

pub use value::Listen;

use crate::api::ApiConfig;
use crate::model::ByteSize;
use crate::model::Resources;
use crate::proxy::ProxyConfig;
use crate::runtime::config::RuntimeConfig;
use crate::sandbox::{CreateBy, Failpoints, SandboxConfig, SnapshotSync};
use crate::template::build::BuildConfig;
use crate::template::{ImageSettings, TemplateConfig, UnpackLimits};
use crate::volume::VolumeConfig;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;
use value::Value;

/// Everything that can be set, with every value checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Where all state lives; one server at a time.
    pub data_dir: PathBuf,
    /// Plain HTTP: control plane and proxy.
    pub listen: Listen,
    /// HTTPS: control plane at `api.<domain>` and `<port>-<id>.<domain>`.
    pub tls_listen: Listen,
    /// What sandboxes' URLs end in, with the port that clients use when it is not 443.
    pub domain: String,
    /// The key that clients send; `None` = made at first start, kept in `data_dir/api_key`.
    pub api_key: Option<ApiKey>,
    /// Log filter in tracing's syntax.
    pub log: String,
    /// Whether log lines are JSON.
    pub log_format: LogFormat,
    /// Limits of a sandbox when its template says nothing.
    pub resources: Resources,
    /// The control plane's bounds; keys, domain and `timeout_max` are set from the keys above.
    pub api: ApiConfig,
    /// The proxy's bounds; the domain is set from the key above.
    pub proxy: ProxyConfig,
    /// The core's bounds.
    pub sandbox: SandboxConfig,
    /// Where this server is to die, for crash tests; one of [`Failpoints::ALL`].
    pub failpoint: Option<String>,
    /// The kernel side's bounds.
    pub runtime: RuntimeConfig,
    /// Where templates come from.
    pub template: TemplateConfig,
    /// Bounds of builds.
    pub build: BuildConfig,
    /// Bounds of volumes.
    pub volumes: VolumeConfig,
    /// The machine's own small name server.
    pub dns: DnsConfig,
}

/// Keys `[dns]`: who answers for this server's names on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DnsConfig {
    /// Where it is asked, UDP and TCP; `None`: there is none.
    pub listen: Option<Listen>,
    /// Names beside the server's own that lead here, with a leading `*.` everything below.
    pub names: Vec<String>,
    /// Where names lead; empty: to the addresses of `tls_listen`.
    pub answers: Vec<IpAddr>,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object per line.
    Json,
}

/// The API key, kept out of logs.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(pub String);

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("/var/lib/stillbox"),
            listen: Listen::loopback(3000),
            tls_listen: Listen::loopback(3443),
            domain: default_domain(3443),
            api_key: None,
            log: "info".to_owned(),
            log_format: LogFormat::Text,
            resources: Resources { cpu_count: 2, memory: ByteSize::gib(1), disk: ByteSize::gib(20), pids_max: 4096 },
            api: ApiConfig::new(Vec::new(), "stillbox.localhost:3443"),
            proxy: ProxyConfig::for_domain("stillbox.localhost:3443"),
            failpoint: None,
            sandbox: SandboxConfig {
                data_dir: PathBuf::from("/var/lib/stillbox"),
                nameservers: Vec::new(),
                ca_pem: None,
                localhost_port: None,
                timeout_max: Duration::from_secs(24 * 3600),
                running_max: 100,
                cpus_max: 1000,
                memory_max: ByteSize::gib(1024),
                metrics_every: Duration::from_secs(2),
                history_kept: Duration::from_secs(3600),
                wake_wait_max: Duration::from_secs(30),
                wake_timeout_min: Duration::from_secs(300),
                agent_ready_max: Duration::from_secs(10),
                snapshots_bytes_max: ByteSize::gib(100),
                paused_kept: Duration::from_secs(30 * 24 * 3600),
                create_by: CreateBy::Restore,
                snapshot_sync: SnapshotSync::Background,
                unmount_fuse: false,
            },
            runtime: RuntimeConfig::new(PathBuf::from("/var/lib/stillbox")),
            template: TemplateConfig {
                data_dir: PathBuf::from("/var/lib/stillbox"),
                archive: None,
                debian_mirror: None,
                debian_security_mirror: None,
                cache_dir: None,
                // As `runtime` has it.
                limits: UnpackLimits { free_min: ByteSize::gib(2), ..UnpackLimits::default() },
                images: ImageSettings::default(),
            },
            build: BuildConfig::default(),
            dns: DnsConfig::default(),
            volumes: VolumeConfig::default(),
        }
    }
}

/// One thing wrong with the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where the value came from: a file with its line, a variable, a flag.
    pub origin: String,
    /// What is wrong and what would be right.
    pub what: String,
}

/// All that is wrong with the configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(|p| format!("{}: {}", p.origin, p.what)).collect::<Vec<_>>().join("\n"))]
pub struct ConfigErrors(pub Vec<Problem>);

/// Where values come from, least important first.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// A configuration file that must exist, from `--config`; else `STILLBOX_CONFIG`; else /etc/stillbox/stillbox.toml
    /// if it is there.
    pub file: Option<PathBuf>,
    /// `STILLBOX_*` variables.
    pub environment: Vec<(String, String)>,
    /// `key=value` from flags.
    pub flags: Vec<(String, String)>,
    /// `STILLBOX_FAILPOINT`: where the server is to die, for crash tests.
    pub failpoint: Option<String>,
    /// The user's cache folder; templates are kept below it unless template.cache_dir says otherwise.
    pub cache_home: Option<PathBuf>,
}

impl Sources {
    /// The process's environment and these flags.
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
    pub fn of_process(file: Option<PathBuf>, flags: Vec<(String, String)>) -> Self {
        let environment: Vec<(String, String)> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned())))
            .filter(|(name, _)| name.starts_with(PREFIX) && !NOT_KEYS.contains(&name.as_str()))
            .collect();
        let named = std::env::var_os("STILLBOX_CONFIG").map(PathBuf::from);
        let usual = Some(PathBuf::from("/etc/stillbox/stillbox.toml")).filter(|path| path.exists());
        let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let cache_home = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
        let failpoint = std::env::var("STILLBOX_FAILPOINT").ok();
        Self { file: file.or(named).or(usual), environment, flags, failpoint, cache_home }
    }
}

const DOMAIN_NAME: &str = "stillbox.localhost";
const PREFIX: &str = "STILLBOX_";
/// Variables of ours that are no configuration keys: the file's path, the client's address, what builds and tests of this repo read.
const NOT_KEYS: [&str; 11] = [
    "STILLBOX_CONFIG",
    "STILLBOX_URL",
    "STILLBOX_AGENT_BIN",
    "STILLBOX_CRIU_BIN",
    "STILLBOX_FAILPOINT",
    "STILLBOX_TEST_BASE",
    "STILLBOX_CRIU_TARBALL",
    "STILLBOX_CRIU_TARBALL_SHA256",
    "STILLBOX_CRIU_REFRESH",
    "STILLBOX_VM_INNER",
    "STILLBOX_VM_BOOT_SECONDS",
];

impl Config {
    /// Puts the sources together. Every problem of every source is reported, not the first.
    pub fn load(sources: &Sources) -> Result<Self, ConfigErrors> {
        let mut config = Self { failpoint: sources.failpoint.clone(), ..Self::default() };
        let (mut problems, mut names_domain) = (Vec::new(), false);
        let mut apply = |origin: String, key: &str, value: &Value| {
            names_domain |= key == "domain";
            if let Err(what) = keys::set(&mut config, key, value) {
                problems.push(Problem { origin, what });
            }
        };
        match sources.file.as_deref().map(read_file).transpose() {
            Ok(values) => {
                for (key, value) in values.unwrap_or_default() {
                    let path = sources.file.as_deref().unwrap_or(Path::new("")).display();
                    apply(format!("{path}, key {key}"), &key, &value);
                }
            }
            Err(problem) => return Err(ConfigErrors(vec![problem])),
        }
        if let Some(point) = &sources.failpoint
            && !Failpoints::ALL.contains(&point.as_str())
        {
            let what = format!("'{point}' is no failpoint; there are {}", Failpoints::ALL.join(", "));
            return Err(ConfigErrors(vec![Problem { origin: "variable STILLBOX_FAILPOINT".to_owned(), what }]));
        }
        for (name, text) in &sources.environment {
            match keys::of_variable(name) {
                Some(key) => apply(format!("variable {name}"), key, &Value::Text(text.clone())),
                None => apply(format!("variable {name}"), name, &Value::Text(text.clone())),
            }
        }
        for (key, text) in &sources.flags {
            apply(format!("flag {key}"), key, &Value::Text(text.clone()));
        }
        if !names_domain {
            config.domain = default_domain(config.tls_listen.port());
        }
        config.sandbox.data_dir.clone_from(&config.data_dir);
        config.template.data_dir.clone_from(&config.data_dir);
        config.template.limits.free_min = config.runtime.disk_free_min;
        config.runtime.data_dir.clone_from(&config.data_dir);
        if config.template.cache_dir.is_none() {
            config.template.cache_dir = sources.cache_home.as_ref().map(|home| home.join("stillbox"));
        }
        problems.extend(config.contradictions());
        if problems.is_empty() { Ok(config) } else { Err(ConfigErrors(problems)) }
    }

    /// The domain without its port: what certificates are made for.
    pub fn domain_name(&self) -> &str {
        self.domain.rsplit_once(':').map_or(&self.domain, |(name, _)| name)
    }

    /// Where clients on this machine find the HTTPS listener.
    pub fn tls_addresses(&self) -> Vec<IpAddr> {
        let reached = |ip: IpAddr| match ip {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        self.tls_listen.addresses.iter().map(|address| reached(address.ip())).collect()
    }

    /// Values that are good alone and not together.
    fn contradictions(&self) -> Vec<Problem> {
        let mut found = Vec::new();
        if self.listen.addresses.iter().any(|a| a.port() != 0 && self.tls_listen.addresses.contains(a)) {
            found.push(Problem {
                origin: "listen and tls_listen".into(),
                what: format!("both name {}; give one of them another port", self.listen),
            });
        }
        found
    }
}

/// Below what name sandboxes are found when nobody says it: their URLs have to lead to the port that is listened on.
fn default_domain(tls_port: u16) -> String {
    match tls_port {
        443 => DOMAIN_NAME.to_owned(),
        // A port that the kernel is to choose is not known yet.
        0 => format!("{DOMAIN_NAME}:3443"),
        port => format!("{DOMAIN_NAME}:{port}"),
    }
}

/// The file's values by dotted key.
fn read_file(path: &Path) -> Result<Vec<(String, Value)>, Problem> {
    let problem = |what: String| Problem { origin: path.display().to_string(), what };
    let text = std::fs::read_to_string(path).map_err(|error| problem(error.to_string()))?;
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| problem(error.to_string().trim().to_owned()))?;
    let mut values = Vec::new();
    flatten("", table, &mut values);
    Ok(values)
}

fn flatten(prefix: &str, table: toml::Table, into: &mut Vec<(String, Value)>) {
    for (name, value) in table {
        let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
        match value {
            toml::Value::Table(table) if !keys::is_map(&key) => flatten(&key, table, into),
            value => into.push((key, Value::File(value))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shipped_file() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("config/stillbox.toml")
    }

    #[test]
    fn the_shipped_file_names_every_key_with_its_default() {
        let in_file: Vec<String> = read_file(&shipped_file()).unwrap().into_iter().map(|(key, _)| key).collect();
        for key in keys::all() {
            let optional = format!("# {} = ", key.rsplit('.').next().unwrap());
            let text = std::fs::read_to_string(shipped_file()).unwrap();
            assert!(in_file.iter().any(|name| name == key) || text.contains(&optional), "config/stillbox.toml lacks {key}");
        }
        let sources = Sources { file: Some(shipped_file()), ..Sources::default() };
        assert_eq!(Config::load(&sources).unwrap(), Config::default());
    }

    #[test]
    fn a_flag_wins_over_a_variable_over_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("stillbox.toml");
        std::fs::write(&file, "domain = 'from.file'\n[sandbox]\nrunning_max = 5\ntimeout_max = '1 h'\n").unwrap();
        let config = Config::load(&Sources {
            failpoint: None,
            file: Some(file),
            environment: vec![("STILLBOX_DOMAIN".into(), "from.env".into()), ("STILLBOX_SANDBOX_RUNNING_MAX".into(), "6".into())],
            flags: vec![("domain".into(), "from.flag".into())],
            cache_home: None,
        })
        .unwrap();
        assert_eq!(config.domain, "from.flag");
        assert_eq!(config.sandbox.running_max, 6);
        assert_eq!(config.sandbox.timeout_max, Duration::from_secs(3600));
    }

    #[test]
    fn all_problems_are_reported_at_once_with_their_origin() {
        let errors = Config::load(&Sources {
            failpoint: None,
            file: None,
            environment: vec![("STILLBOX_COLOUR".into(), "red".into()), ("STILLBOX_LISTEN".into(), "nowhere".into())],
            flags: vec![("sandbox.timeout_max".into(), "soon".into())],
            cache_home: None,
        })
        .unwrap_err();
        let text = errors.to_string();
        assert_eq!(errors.0.len(), 3, "{text}");
        assert!(text.contains("variable STILLBOX_COLOUR: there is no such setting"), "{text}");
        assert!(text.contains("variable STILLBOX_LISTEN: 'nowhere' is not an address"), "{text}");
        assert!(text.contains("flag sandbox.timeout_max: 'soon' is not a duration"), "{text}");
    }

    #[test]
    fn urls_lead_to_the_port_that_is_listened_on_unless_a_domain_is_set() {
        let domain = |flags: &[(&str, &str)]| {
            let flags = flags.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            Config::load(&Sources { flags, ..Sources::default() }).unwrap().domain
        };
        assert_eq!(domain(&[("tls_listen", "localhost:4443")]), "stillbox.localhost:4443");
        assert_eq!(domain(&[("tls_listen", "localhost:443")]), "stillbox.localhost");
        assert_eq!(domain(&[("tls_listen", "0.0.0.0:4443"), ("domain", "stillbox.localhost:3443")]), "stillbox.localhost:3443");
    }

    #[test]
    fn one_port_for_both_listeners_is_refused() {
        let flags = vec![("tls_listen".to_owned(), "127.0.0.1:3000".to_owned())];
        let errors = Config::load(&Sources { flags, ..Sources::default() }).unwrap_err();
        assert!(errors.to_string().contains("both name"), "{errors}");
    }
}
