//! How this server's names are found on this machine: who resolves `<port>-<id>.<domain>` for a program that asks glibc.

use super::Verdict::{self, Fine, Fix, Note};
use crate::config::Config;
use crate::runtime::network::resolver::{self, BLOCK_BEGIN};
use std::fmt;
use std::fs;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::time::Duration;

/// Where `stillbox hosts` writes names.
pub const HOSTS_FILE: &str = "/etc/hosts";
/// Where it tells systemd-resolved of the server's own name server.
pub const RESOLVED_DROP_IN: &str = "/etc/systemd/resolved.conf.d/stillbox.conf";
const RESOLV_CONF: &str = "/etc/resolv.conf";
const NSSWITCH_CONF: &str = "/etc/nsswitch.conf";
/// systemd-resolved answers here.
const RESOLVED_STUB: &str = "nameserver 127.0.0.53";
const RESOLVED_RUNTIME: &str = "/run/systemd/resolve/resolv.conf";
/// A question on the loopback.
const PATIENCE: Duration = Duration::from_secs(1);

/// Who resolves names below the domain.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Way {
    /// The server's own name server.
    Own(SocketAddr),
    Resolved,
    Myhostname,
    /// A name server of somebody else's that has a record for it.
    Dns,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own(at) => write!(f, "the server's own resolver at {at}"),
            Self::Resolved => f.write_str("systemd-resolved"),
            Self::Myhostname => f.write_str("libnss-myhostname"),
            Self::Dns => f.write_str("this machine's DNS"),
        }
    }
}

/// What the machine's files say about names.
#[derive(Debug, Default)]
struct Files {
    nsswitch: String,
    resolv_conf: String,
    is_in_hosts: bool,
    has_drop_in: bool,
}

impl Files {
    fn read() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let has_block = |path: &str| text(path).lines().any(|line| line == BLOCK_BEGIN);
        Self {
            nsswitch: text(NSSWITCH_CONF),
            resolv_conf: text(RESOLV_CONF),
            is_in_hosts: has_block(HOSTS_FILE),
            has_drop_in: Path::new(RESOLVED_DROP_IN).exists(),
        }
    }

    /// Whether `stillbox hosts --install --resolver` was called.
    fn names_own(&self) -> bool {
        self.has_drop_in || self.resolv_conf.lines().any(|line| line == BLOCK_BEGIN)
    }

    /// Who it is that answers, of a name that is known to resolve.
    fn way(&self, own: Option<SocketAddr>, domain: &str) -> Way {
        let has_module = |module: &str| {
            let hosts = self.nsswitch.lines().find_map(|line| line.trim().strip_prefix("hosts:"));
            hosts.is_some_and(|modules| modules.split_whitespace().any(|word| word == module))
        };
        let is_local = domain.ends_with("localhost");
        match own.filter(|_| self.names_own()) {
            // Both know *.localhost without asking anybody.
            _ if is_local && has_module("myhostname") => Way::Myhostname,
            _ if is_local && (has_module("resolve") || self.resolv_conf.contains(RESOLVED_STUB)) => Way::Resolved,
            Some(own) => Way::Own(own),
            None => Way::Dns,
        }
    }
}

/// Whether systemd-resolved is asked for names on this machine.
pub fn is_resolved_in_charge() -> bool {
    Path::new(RESOLVED_RUNTIME).exists() && fs::read_to_string(RESOLV_CONF).is_ok_and(|text| text.contains(RESOLVED_STUB))
}

/// Asks as any program does, then finds out who answered.
pub(super) fn domain(config: &Config) -> Verdict {
    let files = Files::read();
    let domain = config.domain_name();
    let name = format!("49983-i00000000000000000000.{domain}");
    let own = config.dns.listen.as_ref().and_then(|listen| listen.addresses.first().copied());
    if let Some(silent) = own.filter(|own| files.names_own() && resolver::ask(*own, &name, PATIENCE).is_err()) {
        return Fix(format!(
            "programs of this machine are told to ask the resolver at {silent}, and nobody answers there: start the server, or run \
             `stillbox hosts --remove`"
        ));
    }
    match (name.as_str(), 0).to_socket_addrs().map(|mut found| found.next()) {
        Ok(Some(address)) if address.ip().is_loopback() || !domain.ends_with("localhost") => {
            Fine(format!("*.{domain} resolves to {} by {}{}", address.ip(), files.way(own, domain), by_hosts(&files)))
        }
        Ok(Some(address)) => Fix(format!("*.{domain} resolves to {}, which is not this machine", address.ip())),
        _ if domain.ends_with("localhost") => Note(format!(
            "glibc does not resolve *.{domain}: curl, browsers and the SDKs' own transports do by themselves; for other programs set \
             dns.listen and run `stillbox hosts --install --resolver`, or apt-get install libnss-myhostname (it edits \
             /etc/nsswitch.conf){}",
            by_hosts(&files)
        )),
        _ => Fix(format!(
            "*.{domain} does not resolve: add a wildcard DNS record that leads here, or set dns.listen and run `stillbox hosts \
             --install --resolver`{}",
            by_hosts(&files)
        )),
    }
}

fn by_hosts(files: &Files) -> &'static str {
    if files.is_in_hosts { "; /etc/hosts has lines of `stillbox hosts --install`" } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_answers_is_told_from_the_machines_files() {
        let own: SocketAddr = "127.0.53.53:53".parse().unwrap();
        let files = |nsswitch: &str, resolv_conf: &str| Files {
            nsswitch: format!("passwd: files\nhosts: files {nsswitch} dns\n"),
            resolv_conf: resolv_conf.to_owned(),
            ..Files::default()
        };
        let installed = format!("{BLOCK_BEGIN}\nnameserver 127.0.53.53\n");
        assert_eq!(files("", &installed).way(Some(own), "box.test"), Way::Own(own));
        assert_eq!(files("", &installed).way(Some(own), "stillbox.localhost"), Way::Own(own));
        assert_eq!(files("myhostname", &installed).way(Some(own), "stillbox.localhost"), Way::Myhostname);
        assert_eq!(files("resolve", "").way(None, "stillbox.localhost"), Way::Resolved);
        assert_eq!(files("", RESOLVED_STUB).way(None, "stillbox.localhost"), Way::Resolved);
        assert_eq!(files("myhostname", "nameserver 192.0.2.1").way(Some(own), "box.test"), Way::Dns, "it runs, and nobody asks it");
        let dropped_in = Files { has_drop_in: true, ..files("resolve", RESOLVED_STUB) };
        assert_eq!(dropped_in.way(Some(own), "box.test"), Way::Own(own));
    }
}
