//! Making the machine's programs ask the server's own name server, and undoing it.
//!
//! With systemd-resolved by a drop-in of its configuration, for the names that lead here; without, by a line before the
//! other name servers of /etc/resolv.conf: they are asked whenever ours does not listen, so that a stopped server costs
//! the machine nothing.

use super::{replace, without_block};
use crate::config::Config;
use crate::doctor::{RESOLVED_DROP_IN, is_resolved_in_charge};
use crate::runtime::network::resolver::{self, BLOCK_BEGIN, BLOCK_END};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const RESOLV_CONF: &str = "/etc/resolv.conf";
const DNS_PORT: u16 = 53;
/// A question on the loopback.
const PATIENCE: Duration = Duration::from_secs(3);

/// Why the machine does not ask the server's own name server.
#[derive(Debug, thiserror::Error)]
pub(super) enum ResolverError {
    #[error("the server has no name server: start it with --set dns.listen=127.0.53.53:53 (or set dns.listen), and give the same here")]
    Off,
    #[error("no name server answers at {listen}: start the server with --set dns.listen={listen}")]
    Silent {
        listen: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("the name server at {listen} does not lead {name} here: start the server with --set dns.names={name}, or list it there")]
    Unknown { listen: SocketAddr, name: String },
    #[error("{RESOLV_CONF} can name a server on port 53 only, not {0}: set dns.listen to a loopback address with port 53")]
    Port(SocketAddr),
    #[error("could not write {path}")]
    File {
        path: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("systemctl did not make systemd-resolved read its configuration again: {0}")]
    Systemd(String),
}

/// Checks that the server answers for all of `names`, then makes the machine ask it. Says where that is written.
pub(super) fn install(config: &Config, names: &[String]) -> Result<&'static str, ResolverError> {
    let listen = *config.dns.listen.as_ref().and_then(|listen| listen.addresses.first()).ok_or(ResolverError::Off)?;
    for name in names {
        let found = resolver::ask(listen, name, PATIENCE).map_err(|source| ResolverError::Silent { listen, source })?;
        let here = if config.dns.answers.is_empty() { config.tls_addresses() } else { config.dns.answers.clone() };
        if !found.iter().any(|address| here.contains(&(*address).into())) {
            return Err(ResolverError::Unknown { listen, name: name.clone() });
        }
    }
    if is_resolved_in_charge() {
        let text = drop_in(listen, config);
        write_drop_in(&text).map_err(|source| ResolverError::File { path: RESOLVED_DROP_IN, source })?;
        restart_resolved()?;
        return Ok(RESOLVED_DROP_IN);
    }
    if listen.port() != DNS_PORT {
        return Err(ResolverError::Port(listen));
    }
    let failed = |source| ResolverError::File { path: RESOLV_CONF, source };
    let present = fs::read_to_string(RESOLV_CONF).map_err(failed)?;
    replace(RESOLV_CONF, &with_server(&present, listen)).map_err(failed)?;
    Ok(RESOLV_CONF)
}

/// Undoes it, whichever way it was done. Succeeds when there is nothing to undo.
pub(super) fn remove() -> Result<(), ResolverError> {
    match fs::remove_file(RESOLVED_DROP_IN) {
        Ok(()) => restart_resolved()?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(ResolverError::File { path: RESOLVED_DROP_IN, source }),
    }
    let failed = |source| ResolverError::File { path: RESOLV_CONF, source };
    match fs::read_to_string(RESOLV_CONF) {
        Ok(present) if present.lines().any(|line| line == BLOCK_BEGIN) => replace(RESOLV_CONF, &without_block(&present)).map_err(failed),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Ours first, the others after it.
fn with_server(present: &str, listen: SocketAddr) -> String {
    format!("{BLOCK_BEGIN}\nnameserver {}\n{BLOCK_END}\n{}", listen.ip(), without_block(present))
}

/// `~name` sends what is below it there, and does not add it to what is searched.
fn drop_in(listen: SocketAddr, config: &Config) -> String {
    let extra = config.dns.names.iter().map(|name| name.strip_prefix("*.").unwrap_or(name));
    let domains: Vec<String> = std::iter::once(config.domain_name()).chain(extra).map(|name| format!("~{name}")).collect();
    format!(
        "# Written by `stillbox hosts --install --resolver`; `stillbox hosts --remove` removes it.\n[Resolve]\nDNS={listen}\nDomains={}\n",
        domains.join(" ")
    )
}

fn write_drop_in(text: &str) -> io::Result<()> {
    if let Some(folder) = Path::new(RESOLVED_DROP_IN).parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(RESOLVED_DROP_IN, text)
}

fn restart_resolved() -> Result<(), ResolverError> {
    let output = Command::new("systemctl").args(["try-restart", "systemd-resolved"]).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(ResolverError::Systemd(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
        Err(error) => Err(ResolverError::Systemd(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DnsConfig;

    #[test]
    fn the_servers_line_comes_first_once_and_goes_without_a_trace() {
        let before = "search lan\nnameserver 192.0.2.1\n";
        let once = with_server(before, "127.0.53.53:53".parse().unwrap());
        assert!(once.starts_with("# stillbox: begin\nnameserver 127.0.53.53\n# stillbox: end\nsearch lan\n"), "{once}");
        assert_eq!(with_server(&once, "127.0.53.53:53".parse().unwrap()), once);
        assert_eq!(without_block(&once), before);
    }

    #[test]
    fn systemd_resolved_is_told_of_our_names_only() {
        let dns = DnsConfig { names: vec!["*.novita.example".into(), "api.hopx.dev".into()], ..DnsConfig::default() };
        let config = Config { domain: "box.test:3443".into(), dns, ..Config::default() };
        let text = drop_in("127.0.0.1:5354".parse().unwrap(), &config);
        assert!(text.ends_with("[Resolve]\nDNS=127.0.0.1:5354\nDomains=~box.test ~novita.example ~api.hopx.dev\n"), "{text}");
    }
}
