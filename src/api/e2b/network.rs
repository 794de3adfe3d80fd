//! Network policies: read from requests, replaced by `PUT /sandboxes/{id}/network`, shown in info.

use super::super::ApiState;
use super::super::body::OptionalJson;
use super::super::error::ApiError;
use super::ask::SandboxPath;
use super::{header_rules, wire};
use crate::model::{EgressProxy, EgressTarget, HeaderRule, NetworkPolicy, PublicTraffic, Secure};
use axum::extract::State;
use http::{HeaderValue, StatusCode};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// Targets of one list. E2B has no limit of its own; each becomes rules in the kernel.
const TARGETS_MAX: usize = 1000;
const DNS_SERVERS_MAX: usize = 10;
const HTTPS_PORTS_MAX: usize = 100;
const ENVD_PORT: u16 = 49983;

/// `PUT /sandboxes/{id}/network`: replaces all of the egress half; what is left out is cleared.
pub(super) async fn replace(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    OptionalJson(update): OptionalJson<wire::NetworkUpdate>,
) -> Result<StatusCode, ApiError> {
    let egress = Egress::try_from(update.egress)?;
    let record = state.registry.get(id)?;
    let policy = NetworkPolicy {
        allow_internet_access: update.allow_internet_access,
        public_traffic: record.spec.network.public_traffic,
        mask_request_host: record.spec.network.mask_request_host,
        ..egress.policy(update.allow_internet_access)?
    };
    state.registry.set_network(id, policy).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The policy of a create request.
pub(super) fn policy(
    network: Option<wire::Network>,
    allow_internet_access: Option<bool>,
    secure: Secure,
) -> Result<NetworkPolicy, ApiError> {
    let network = network.unwrap_or_default();
    let public_traffic = match network.allow_public_traffic {
        None | Some(true) => PublicTraffic::Allowed,
        Some(false) if secure == Secure::Token => PublicTraffic::TokenOnly,
        Some(false) => return Err(ApiError::bad_request("network.allowPublicTraffic is false, which needs secure to be true")),
    };
    let mut egress = network.egress;
    let https_ports = https_ports(egress.https_ports.take().unwrap_or_default())?;
    let egress = Egress::try_from(egress)?.policy(allow_internet_access)?;
    let mask_request_host = network.mask_request_host.map(host_mask).transpose()?;
    Ok(NetworkPolicy { public_traffic, mask_request_host, https_ports, ..egress })
}

/// The policy as it was set, without its secrets: the egress proxy's password, the values of headers.
pub(super) fn shown(policy: &NetworkPolicy) -> wire::ShownNetwork {
    let texts = |targets: &[EgressTarget]| targets.iter().map(ToString::to_string).collect();
    wire::ShownNetwork {
        allow_public_traffic: policy.public_traffic == PublicTraffic::Allowed,
        allow_out: texts(&policy.allow_out),
        deny_out: texts(&policy.deny_out),
        egress_proxy: policy
            .egress_proxy
            .as_ref()
            .map(|proxy| wire::ShownEgressProxy { address: proxy.address.clone(), username: proxy.username.clone() }),
        mask_request_host: policy.mask_request_host.clone(),
        rules: header_rules::shown(&policy.rules),
        dns_servers: policy.dns_servers.clone(),
        https_ports: policy.https_ports.clone(),
    }
}

/// The checked egress half of a request.
struct Egress {
    allow_out: Vec<EgressTarget>,
    deny_out: Vec<EgressTarget>,
    proxy: Option<EgressProxy>,
    rules: BTreeMap<String, HeaderRule>,
    dns_servers: Option<Vec<Ipv4Addr>>,
}

impl TryFrom<wire::Egress> for Egress {
    type Error = ApiError;

    fn try_from(egress: wire::Egress) -> Result<Self, ApiError> {
        refuse_unserved(&egress)?;
        let deny_out = targets("network.denyOut", egress.deny_out)?;
        if let Some(domain) = deny_out.iter().find(|target| matches!(target, EgressTarget::Domain(_))) {
            return Err(ApiError::bad_request(format!(
                "network.denyOut has the domain '{domain}'; only IP addresses and CIDR blocks can be denied"
            )));
        }
        let proxy = egress.egress_proxy.map(egress_proxy).transpose()?;
        let rules = header_rules::parse(egress.rules.unwrap_or_default())?;
        let dns_servers = egress.dns_servers.map(dns_servers).transpose()?;
        Ok(Self { allow_out: targets("network.allowOut", egress.allow_out)?, deny_out, proxy, rules, dns_servers })
    }
}

impl Egress {
    fn policy(self, allow_internet_access: Option<bool>) -> Result<NetworkPolicy, ApiError> {
        let policy = NetworkPolicy {
            allow_internet_access,
            allow_out: self.allow_out,
            deny_out: self.deny_out,
            egress_proxy: self.proxy,
            rules: self.rules,
            dns_servers: self.dns_servers,
            ..NetworkPolicy::default()
        };
        match policy.allow_out.iter().find(|target| matches!(target, EgressTarget::Domain(_))) {
            Some(domain) if !policy.denies_everything() => Err(ApiError::bad_request(format!(
                "network.allowOut has the domain '{domain}'; then network.denyOut must contain '0.0.0.0/0', since only what is denied is allowed by name"
            ))),
            Some(_) | None => Ok(policy),
        }
    }
}

/// Accepting a rule and not applying it would be worse than refusing it.
fn refuse_unserved(egress: &wire::Egress) -> Result<(), ApiError> {
    let wants = [(
        "network.egressProxy.tls",
        egress.egress_proxy.as_ref().and_then(|proxy| proxy.tls.as_ref()).is_some_and(|tls| tls.enabled == Some(true)),
    )];
    match wants.into_iter().find(|(_, is_wanted)| *is_wanted) {
        Some((field, _)) => Err(ApiError::not_served(field, "leave it out; an egress proxy is spoken to without TLS")),
        None => Ok(()),
    }
}

fn targets(field: &str, texts: Option<Vec<String>>) -> Result<Vec<EgressTarget>, ApiError> {
    let texts = texts.unwrap_or_default();
    if texts.len() > TARGETS_MAX {
        return Err(ApiError::bad_request(format!("{field} has {} entries; the limit is {TARGETS_MAX}", texts.len())));
    }
    let parse = |text: &String| text.trim().parse().map_err(|error| ApiError::bad_request(format!("{field}: {error}")));
    texts.iter().map(parse).collect()
}

fn dns_servers(texts: Vec<String>) -> Result<Vec<Ipv4Addr>, ApiError> {
    if texts.len() > DNS_SERVERS_MAX {
        return Err(ApiError::bad_request(format!("network.dnsServers has {} entries; the limit is {DNS_SERVERS_MAX}", texts.len())));
    }
    let parse = |text: &String| {
        let shown: String = text.chars().take(64).collect();
        text.parse().map_err(|_| ApiError::bad_request(format!("network.dnsServers has '{shown}'; it must be an IPv4 address")))
    };
    texts.iter().map(parse).collect()
}

/// The agent's own port speaks plain HTTP whatever is asked for.
fn https_ports(ports: Vec<u32>) -> Result<Vec<u16>, ApiError> {
    if ports.len() > HTTPS_PORTS_MAX {
        return Err(ApiError::bad_request(format!("network.httpsPorts has {} entries; the limit is {HTTPS_PORTS_MAX}", ports.len())));
    }
    let check = |port: u32| match u16::try_from(port) {
        Ok(port) if port != 0 && port != ENVD_PORT => Ok(port),
        Ok(_) | Err(_) => Err(ApiError::bad_request(format!(
            "network.httpsPorts has {port}; it must be a port from 1 to 65535, and not {ENVD_PORT}, which serves no HTTPS"
        ))),
    };
    ports.into_iter().map(check).collect()
}

/// SOCKS5 gives a user name and a password one byte of length each, and none may be empty (RFC 1929).
fn egress_proxy(proxy: wire::EgressProxy) -> Result<EgressProxy, ApiError> {
    let port = proxy.address.rsplit_once(':').map_or("", |(_, port)| port);
    let is_address = port.parse().is_ok_and(|port: u16| port > 0)
        && proxy.address.parse::<http::uri::Authority>().is_ok_and(|address| !address.host().is_empty() && !proxy.address.contains('@'));
    if !is_address {
        let shown: String = proxy.address.chars().take(128).collect();
        return Err(ApiError::bad_request(format!("network.egressProxy.address is '{shown}'; it must be host:port")));
    }
    for (field, text) in [("username", &proxy.username), ("password", &proxy.password)] {
        if let Some(length) = text.as_ref().map(String::len).filter(|length| !(1..=255).contains(length)) {
            return Err(ApiError::bad_request(format!("network.egressProxy.{field} has {length} bytes; SOCKS5 takes 1 to 255")));
        }
    }
    if proxy.username.is_some() != proxy.password.is_some() {
        return Err(ApiError::bad_request("network.egressProxy needs username and password together, or neither"));
    }
    Ok(EgressProxy { address: proxy.address, username: proxy.username, password: proxy.password })
}

/// A host with an optional port, in either of which `${PORT}` may stand.
fn host_mask(mask: String) -> Result<String, ApiError> {
    let sample = mask.replace("${PORT}", "8000");
    let is_host = sample.parse::<http::uri::Authority>().is_ok() && !sample.contains('@') && HeaderValue::try_from(sample.as_str()).is_ok();
    let shown: String = mask.chars().take(128).collect();
    is_host.then_some(mask).ok_or_else(|| {
        ApiError::bad_request(format!("network.maskRequestHost is '{shown}'; it must be a host such as 'localhost:${{PORT}}'"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(json: serde_json::Value, secure: Secure) -> Result<NetworkPolicy, (u16, String)> {
        policy(Some(serde_json::from_value(json).unwrap()), None, secure).map_err(|error| {
            let (code, message) = error.code_and_message();
            (code, message.to_owned())
        })
    }

    #[test]
    fn destinations_are_read_and_shown_as_they_were_set() {
        let json = serde_json::json!({
            "allowPublicTraffic": false, "maskRequestHost": "localhost:${PORT}",
            "allowOut": ["1.1.1.1", "*.example.com"], "denyOut": ["0.0.0.0/0"]
        });
        let policy = parsed(json.clone(), Secure::Token).unwrap();
        assert_eq!(serde_json::to_value(shown(&policy)).unwrap(), json);
    }

    #[test]
    fn name_servers_and_https_ports_are_read_checked_and_shown() {
        let json = serde_json::json!({"allowPublicTraffic": true, "dnsServers": ["1.1.1.1"], "httpsPorts": [3000, 8443]});
        let policy = parsed(json.clone(), Secure::Token).unwrap();
        assert_eq!(serde_json::to_value(shown(&policy)).unwrap(), json);
        let none = parsed(serde_json::json!({"dnsServers": []}), Secure::Token).unwrap();
        assert_eq!(none.dns_servers, Some(Vec::new()), "none is not the default");
        for (wrong, what) in [
            (serde_json::json!({"dnsServers": ["::1"]}), "must be an IPv4 address"),
            (serde_json::json!({"dnsServers": ["1.1.1.1/32"]}), "must be an IPv4 address"),
            (serde_json::json!({"dnsServers": vec!["1.1.1.1"; 11]}), "11 entries; the limit is 10"),
            (serde_json::json!({"httpsPorts": [49983]}), "and not 49983"),
            (serde_json::json!({"httpsPorts": [0]}), "from 1 to 65535"),
            (serde_json::json!({"httpsPorts": [65536]}), "from 1 to 65535"),
        ] {
            let (code, message) = parsed(wrong, Secure::Token).unwrap_err();
            assert!(code == 400 && message.contains(what), "{message}");
        }
    }

    #[test]
    fn an_egress_proxy_is_shown_without_its_password() {
        let policy = parsed(
            serde_json::json!({"egressProxy": {"address": "proxy.example.com:1080", "username": "u", "password": "secret"}}),
            Secure::Token,
        )
        .unwrap();
        let proxy = policy.egress_proxy.as_ref().unwrap();
        assert_eq!((proxy.username.as_deref(), proxy.password.as_deref()), (Some("u"), Some("secret")));
        let shown = serde_json::to_value(shown(&policy)).unwrap();
        assert_eq!(shown["egressProxy"], serde_json::json!({"address": "proxy.example.com:1080", "username": "u"}));
    }

    #[test]
    fn each_rule_of_the_contract_is_enforced_with_its_field_named() {
        let refused = |json, secure| parsed(json, secure).unwrap_err();
        let (code, message) = refused(serde_json::json!({"allowPublicTraffic": false}), Secure::Open);
        assert_eq!((code, message.as_str()), (400, "network.allowPublicTraffic is false, which needs secure to be true"));
        assert!(
            refused(serde_json::json!({"allowOut": ["example.com"]}), Secure::Token).1.contains("network.denyOut must contain '0.0.0.0/0'")
        );
        assert!(refused(serde_json::json!({"denyOut": ["example.com"]}), Secure::Token).1.contains("only IP addresses"));
        assert!(
            refused(serde_json::json!({"allowOut": ["10.0.0.0/33"]}), Secure::Token)
                .1
                .starts_with("network.allowOut: '10.0.0.0/33' is neither")
        );
        assert!(refused(serde_json::json!({"maskRequestHost": "a b"}), Secure::Token).1.starts_with("network.maskRequestHost is 'a b'"));
        for address in ["a", "a:0", "a:65536", ":1", "u@a:1", "a b:1"] {
            let (_, message) = refused(serde_json::json!({"egressProxy": {"address": address}}), Secure::Token);
            assert_eq!(message, format!("network.egressProxy.address is '{address}'; it must be host:port"));
        }
        assert!(refused(serde_json::json!({"egressProxy": {"address": "a:1", "username": "u"}}), Secure::Token).1.contains("together"));
        assert!(
            refused(serde_json::json!({"egressProxy": {"address": "a:1", "username": "", "password": "p"}}), Secure::Token)
                .1
                .contains("0 bytes")
        );
        assert_eq!(refused(serde_json::json!({"egressProxy": {"address": "a:1", "tls": {"enabled": true}}}), Secure::Token).0, 501);
    }

    #[test]
    fn no_internet_counts_as_denying_everything() {
        let network = wire::Network {
            egress: wire::Egress { allow_out: Some(vec!["example.com".into()]), ..Default::default() },
            ..Default::default()
        };
        assert!(policy(Some(network), Some(false), Secure::Token).unwrap().denies_everything());
    }
}
