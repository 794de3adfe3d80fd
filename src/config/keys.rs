//! The table of all keys: name, and how it sets its field. config/stillbox.toml explains each.

use super::value::{Listen, Value};
use super::{ApiKey, Config, LogFormat};
use crate::runtime::config::{DiskDriver, SandboxMounts};
use crate::sandbox::{CreateBy, SnapshotSync};
use crate::template::image::{Alias, Reference};
use std::collections::BTreeMap;
use std::path::PathBuf;

type Setter = fn(&mut Config, &Value) -> Result<(), String>;

macro_rules! keys {
    ($($name:literal => |$config:ident, $value:ident| $set:expr;)*) => {
        const KEYS: &[(&str, Setter)] = &[$(($name, |$config, $value| { $set; Ok(()) })),*];
    };
}

keys! {
    "data_dir" => |c, v| c.data_dir = absolute(v)?;
    "listen" => |c, v| c.listen = Listen::parse(v)?;
    "tls_listen" => |c, v| c.tls_listen = Listen::parse(v)?;
    "domain" => |c, v| c.domain = domain(v)?;
    "api_key" => |c, v| c.api_key = Some(api_key(v)?);
    "log" => |c, v| c.log = log_filter(v)?;
    "log_format" => |c, v| c.log_format = log_format(v)?;
    "resources.cpu_count" => |c, v| c.resources.cpu_count = v.whole(1, 1024)?;
    "resources.memory" => |c, v| c.resources.memory = at_least_mib(v, 128)?;
    "resources.disk" => |c, v| c.resources.disk = at_least_mib(v, 256)?;
    "resources.pids_max" => |c, v| c.resources.pids_max = v.whole(64, 4_194_304)?;
    "api.body_bytes_max" => |c, v| c.api.body_bytes_max = v.size()?;
    "novita.run_max" => |c, v| c.api.novita.run_max = v.duration()?;
    "novita.idle_timeout_min" => |c, v| c.api.novita.idle_timeout_min = v.duration()?;
    "api.callback_allow" => |c, v| c.api.callback_allow = targets(v)?;
    "api.body_time_max" => |c, v| c.api.body_time_max = v.duration()?;
    "proxy.connections_max" => |c, v| c.proxy.connections_max = v.whole(16, 1_000_000)?;
    "proxy.client_idle_max" => |c, v| c.proxy.client_idle_max = v.duration()?;
    "proxy.waiting_max" => |c, v| c.proxy.waiting_max = v.whole(1, 1_000_000)?;
    "proxy.drain_max" => |c, v| c.proxy.drain_max = v.duration()?;
    "sandbox.timeout_max" => |c, v| c.sandbox.timeout_max = v.duration()?;
    "sandbox.running_max" => |c, v| c.sandbox.running_max = v.whole(1, 100_000)?;
    "sandbox.cpus_max" => |c, v| c.sandbox.cpus_max = v.whole(1, 1_000_000)?;
    "sandbox.memory_max" => |c, v| c.sandbox.memory_max = at_least_mib(v, 128)?;
    "sandbox.metrics_every" => |c, v| c.sandbox.metrics_every = v.duration()?;
    "sandbox.history_kept" => |c, v| c.sandbox.history_kept = v.duration()?;
    "sandbox.wake_wait_max" => |c, v| c.sandbox.wake_wait_max = v.duration()?;
    "sandbox.wake_timeout_min" => |c, v| c.sandbox.wake_timeout_min = v.duration()?;
    "sandbox.agent_ready_max" => |c, v| c.sandbox.agent_ready_max = v.duration()?;
    "sandbox.paused_kept" => |c, v| c.sandbox.paused_kept = v.duration()?;
    "sandbox.create_by" => |c, v| c.sandbox.create_by = create_by(v)?;
    "snapshots.disk_bytes_max" => |c, v| c.sandbox.snapshots_bytes_max = v.size()?;
    "volumes.size" => |c, v| c.volumes.size = at_least_mib(v, 16)?;
    "volumes.size_max" => |c, v| c.volumes.size_max = at_least_mib(v, 16)?;
    "volumes.count_max" => |c, v| c.volumes.count_max = v.whole(0, 100_000)?;
    "pause.fsync" => |c, v| c.sandbox.snapshot_sync = snapshot_sync(v)?;
    "pause.unmount_fuse" => |c, v| c.sandbox.unmount_fuse = v.flag()?;
    "sandbox.mounts" => |c, v| c.runtime.mounts = mounts(v)?;
    "runtime.criu" => |c, v| c.runtime.criu = Some(absolute(v)?);
    "runtime.helper_time_max" => |c, v| c.runtime.helper_time_max = v.duration()?;
    "runtime.disk_free_min" => |c, v| c.runtime.disk_free_min = v.size()?;
    "runtime.disk_driver" => |c, v| c.runtime.disk_driver = disk_driver(v)?;
    "runtime.pool_roots" => |c, v| c.runtime.pool_roots = v.whole(0, 256)?;
    "runtime.lazy_restore_min" => |c, v| c.runtime.lazy_restore_min = v.size()?;
    "runtime.uid_first" => |c, v| c.runtime.uid_ranges.first = uid_first(v)?;
    "runtime.uid_count" => |c, v| c.runtime.uid_ranges.count = v.whole(1, 32_768)?;
    "runtime.inotify_instances_max" => |c, v| c.runtime.inotify_instances_max = v.whole(1, 1_048_576)?;
    "runtime.ptys_max" => |c, v| c.runtime.ptys_max = v.whole(1, 4096)?;
    "network.subnet" => |c, v| c.runtime.network.subnet = Some(v.text()?);
    "network.pool_slots" => |c, v| c.runtime.network.pool_slots = v.whole(0, 4096)?;
    "network.slots_max" => |c, v| c.runtime.network.slots_max = v.whole(1, 65_536)?;
    "network.deny_private" => |c, v| c.runtime.network.deny_private = v.flag()?;
    "network.allow_private" => |c, v| c.runtime.network.allow_private = blocks(v)?;
    "network.dns_upstreams" => |c, v| c.runtime.network.dns_upstreams = addresses(v)?;
    "network.extra_ca_file" => |c, v| c.runtime.network.extra_ca_file = Some(absolute(v)?);
    "dns.listen" => |c, v| c.dns.listen = Some(loopback(v)?);
    "dns.names" => |c, v| c.dns.names = names(v)?;
    "dns.answers" => |c, v| c.dns.answers = addresses(v)?;
    "template.archive" => |c, v| c.template.archive = Some(absolute(v)?);
    "template.debian_mirror" => |c, v| c.template.debian_mirror = Some(mirror(v)?);
    "template.debian_security_mirror" => |c, v| c.template.debian_security_mirror = Some(mirror(v)?);
    "template.cache_dir" => |c, v| c.template.cache_dir = Some(absolute(v)?);
    "build.at_once" => |c, v| c.build.at_once = v.whole(1, 1024)?;
    "build.waiting_max" => |c, v| c.build.waiting_max = v.whole(0, 100_000)?;
    "build.step_time_max" => |c, v| c.build.step_time_max = v.duration()?;
    "build.upload_bytes_max" => |c, v| c.build.upload_bytes_max = v.size()?;
    "build.cache_kept" => |c, v| c.build.cache_kept = v.duration()?;
    "template.image_aliases" => |c, v| c.template.images.aliases = aliases(v)?;
    "template.registry_mirrors" => |c, v| c.template.images.mirrors = mirrors(v)?;
    "template.plain_http_registries" => |c, v| c.template.images.plain_http = hosts(v)?;
    "template.registry_auth_file" => |c, v| c.template.images.auth_file = Some(absolute(v)?);
    "template.pull_time_max" => |c, v| c.template.images.pull_time_max = v.duration()?;
    "template.images_kept" => |c, v| c.template.images.kept = v.duration()?;
    "template.import_bytes_max" => |c, v| c.template.limits.bytes_max = v.size()?;
    "template.import_entries_max" => |c, v| c.template.limits.entries_max = v.whole(1, u64::from(u32::MAX))?;
}

/// Sets `key`; the error says what is wrong with the key or the value.
pub(super) fn set(config: &mut Config, key: &str, value: &Value) -> Result<(), String> {
    match KEYS.iter().find(|(name, _)| *name == key) {
        Some((_, setter)) => setter(config, value),
        None => Err(match nearest(key) {
            Some(near) => format!("there is no such setting; did you mean {near}? config/stillbox.toml lists them all"),
            None => "there is no such setting; config/stillbox.toml lists them all".to_owned(),
        }),
    }
}

/// The key that a variable sets: `STILLBOX_` and the key in upper case with `_` for `.`.
pub(super) fn of_variable(name: &str) -> Option<&'static str> {
    KEYS.iter().map(|(key, _)| *key).find(|key| format!("STILLBOX_{}", key.replace('.', "_").to_uppercase()) == name)
}

/// Whether a table in the file is this key's value, not a group of keys.
pub(super) fn is_map(key: &str) -> bool {
    matches!(key, "template.image_aliases" | "template.registry_mirrors")
}

/// Every key.
#[cfg(test)]
pub(super) fn all() -> impl Iterator<Item = &'static str> {
    KEYS.iter().map(|(key, _)| *key)
}

/// A key that shares its last word or differs in few letters.
fn nearest(key: &str) -> Option<&'static str> {
    let last = key.rsplit('.').next().unwrap_or(key);
    KEYS.iter().map(|(name, _)| *name).find(|name| name.rsplit('.').next() == Some(last))
}

fn absolute(value: &Value) -> Result<PathBuf, String> {
    let path = PathBuf::from(value.text()?);
    if path.is_absolute() { Ok(path) } else { Err(format!("'{}' is not an absolute path", path.display())) }
}

fn domain(value: &Value) -> Result<String, String> {
    let text = value.text()?.to_ascii_lowercase();
    let (name, port) = text.rsplit_once(':').map_or((text.as_str(), None), |(name, port)| (name, Some(port)));
    let is_label = |l: &str| !l.is_empty() && l.len() <= 63 && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if name.split('.').count() < 2 || !name.split('.').all(is_label) || port.is_some_and(|p| p.parse::<u16>().is_err()) {
        return Err(format!(
            "'{text}' is not a domain of two labels or more with an optional :port, such as stillbox.localhost:3443 (TLS clients refuse wildcards below one label)"
        ));
    }
    Ok(text)
}

fn api_key(value: &Value) -> Result<ApiKey, String> {
    let text = value.text()?;
    let is_good = text.len() >= 16 && text.len() <= 256 && text.bytes().all(|b| b.is_ascii_graphic());
    if is_good {
        Ok(ApiKey(text))
    } else {
        Err("an API key has 16 to 256 printable ASCII characters; E2B's older SDKs want e2b_ and hex digits".to_owned())
    }
}

fn log_filter(value: &Value) -> Result<String, String> {
    let text = value.text()?;
    match text.parse::<tracing_subscriber::filter::EnvFilter>() {
        Ok(_) => Ok(text),
        Err(error) => Err(format!("'{text}' is not a log filter such as info or stillbox=debug: {error}")),
    }
}

fn log_format(value: &Value) -> Result<LogFormat, String> {
    match value.text()?.as_str() {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        other => Err(format!("'{other}' is neither text nor json")),
    }
}

fn create_by(value: &Value) -> Result<CreateBy, String> {
    match value.text()?.as_str() {
        "restore" => Ok(CreateBy::Restore),
        "cold-start" => Ok(CreateBy::ColdStart),
        other => Err(format!("'{other}' is neither restore nor cold-start")),
    }
}

fn mounts(value: &Value) -> Result<SandboxMounts, String> {
    match value.text()?.as_str() {
        "user" => Ok(SandboxMounts::User),
        "none" => Ok(SandboxMounts::None),
        other => Err(format!("'{other}' is neither user nor none")),
    }
}

fn disk_driver(value: &Value) -> Result<DiskDriver, String> {
    match value.text()?.as_str() {
        "auto" => Ok(DiskDriver::Auto),
        "folder" => Ok(DiskDriver::Folder),
        other => Err(format!("'{other}' is neither auto nor folder")),
    }
}

/// Ranges are 65536 ids each and must not share one with a range of somebody else's.
fn uid_first(value: &Value) -> Result<u32, String> {
    let first: u32 = value.whole(65_536, 0xffff_0000)?;
    if first.is_multiple_of(65_536) { Ok(first) } else { Err(format!("{first} is not a multiple of 65536")) }
}

fn blocks(value: &Value) -> Result<Vec<String>, String> {
    let list = value.list()?;
    for item in &list {
        match item.parse() {
            Ok(crate::model::EgressTarget::Block { .. }) => {}
            _ => return Err(format!("'{item}' is not a block such as 10.0.0.0/8")),
        }
    }
    Ok(list)
}

fn targets(value: &Value) -> Result<Vec<crate::model::EgressTarget>, String> {
    blocks(value)?.iter().map(|block| block.parse().map_err(|error: crate::model::ParseTargetError| error.to_string())).collect()
}

fn addresses(value: &Value) -> Result<Vec<std::net::IpAddr>, String> {
    value.list()?.iter().map(|item| item.parse().map_err(|_| format!("'{item}' is not an IP address"))).collect()
}

/// It answers whoever asks.
fn loopback(value: &Value) -> Result<Listen, String> {
    let listen = Listen::parse(value)?;
    match listen.is_loopback() {
        true => Ok(listen),
        false => Err(format!("{listen} can be reached from other machines; name an address of the loopback, such as 127.0.53.53:53")),
    }
}

fn names(value: &Value) -> Result<Vec<String>, String> {
    let name = |item: &String| match item.parse() {
        Ok(crate::model::EgressTarget::Domain(name)) => Ok(name),
        _ => Err(format!("'{item}' is not a name such as api.example.com or *.example.com")),
    };
    value.list()?.iter().map(name).collect()
}

fn snapshot_sync(value: &Value) -> Result<SnapshotSync, String> {
    match value.text()?.as_str() {
        "background" => Ok(SnapshotSync::Background),
        "before-reply" => Ok(SnapshotSync::BeforeReply),
        other => Err(format!("'{other}' is neither background nor before-reply")),
    }
}

/// Becomes a word in sources.list.
fn mirror(value: &Value) -> Result<String, String> {
    let text = value.text()?;
    let is_uri = ["http://", "https://", "file:/"].iter().any(|scheme| text.starts_with(scheme));
    if is_uri && text.bytes().all(|b| b.is_ascii_graphic()) {
        Ok(text)
    } else {
        Err(format!("'{text}' is not the address of a mirror, such as http://mirror.example/debian"))
    }
}

/// An absolute path is an archive, `template:NAME` a template, anything else another image.
fn aliases(value: &Value) -> Result<BTreeMap<String, Alias>, String> {
    let target = |text: &str| match text.strip_prefix("template:") {
        Some(name) => Ok(Alias::Template(name.trim().to_owned())),
        None if text.starts_with('/') => Ok(Alias::Archive(PathBuf::from(text))),
        None => text.parse::<Reference>().map(Alias::Image).map_err(|error| error.to_string()),
    };
    let alias = |(name, text): (String, String)| {
        name.parse::<Reference>().map_err(|error| error.to_string())?;
        Ok((name, target(&text)?))
    };
    value.map()?.into_iter().map(alias).collect()
}

/// Registry to base addresses, separated by blanks.
fn mirrors(value: &Value) -> Result<BTreeMap<String, Vec<String>>, String> {
    let is_address = |text: &str| ["http://", "https://"].iter().any(|scheme| text.starts_with(scheme));
    let mirror = |(registry, text): (String, String)| {
        let addresses: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        match addresses.iter().find(|address| !is_address(address)) {
            Some(wrong) => Err(format!("'{wrong}' is not the address of a mirror, such as https://mirror.example")),
            None => Ok((registry, addresses)),
        }
    };
    value.map()?.into_iter().map(mirror).collect()
}

fn hosts(value: &Value) -> Result<Vec<String>, String> {
    let list = value.list()?;
    match list.iter().find(|host| host.contains('/') || host.is_empty()) {
        Some(wrong) => Err(format!("'{wrong}' is not a host such as registry.example:5000")),
        None => Ok(list),
    }
}

fn at_least_mib(value: &Value, least: u64) -> Result<crate::model::ByteSize, String> {
    let size = value.size()?;
    let least = crate::model::ByteSize::mib(least);
    if size >= least { Ok(size) } else { Err(format!("{size} is less than {least}")) }
}
