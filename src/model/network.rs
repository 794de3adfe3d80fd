//! Who a sandbox may talk to, and who may talk to it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

/// Whether user ports answer without the traffic token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PublicTraffic {
    /// Anybody who knows the URL.
    #[default]
    Allowed,
    /// Only requests with `e2b-traffic-access-token`.
    TokenOnly,
}

/// One end of an egress rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum EgressTarget {
    /// An address or CIDR block; a single address has the full prefix length.
    Block {
        /// First address of the block as it was written.
        address: IpAddr,
        /// Prefix length in bits.
        prefix: u8,
    },
    /// A domain name, or with a leading `*.` everything below it. Lower case.
    Domain(String),
}

impl EgressTarget {
    /// `0.0.0.0/0`: all IPv4 destinations.
    pub fn everything() -> Self {
        Self::Block { address: IpAddr::from([0, 0, 0, 0]), prefix: 0 }
    }
}

/// The text was neither an address, a CIDR block nor a domain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is neither an IP address, a CIDR block such as 10.0.0.0/8, nor a domain")]
pub struct ParseTargetError(String);

impl FromStr for EgressTarget {
    type Err = ParseTargetError;
    fn from_str(text: &str) -> Result<Self, ParseTargetError> {
        let wrong = || ParseTargetError(text.chars().take(128).collect());
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Block { address, prefix: bits(address) });
        }
        if let Some((address, prefix)) = text.split_once('/') {
            let address: IpAddr = address.parse().map_err(|_| wrong())?;
            let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
            return (prefix <= bits(address)).then_some(Self::Block { address, prefix }).ok_or_else(wrong);
        }
        let name = text.strip_prefix("*.").unwrap_or(text);
        let is_label = |label: &str| {
            !label.is_empty() && label.len() <= 63 && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        let is_name =
            name.len() <= 253 && name.contains('.') && name.split('.').all(is_label) && !name.ends_with(|c: char| c.is_ascii_digit());
        is_name.then(|| Self::Domain(text.to_ascii_lowercase())).ok_or_else(wrong)
    }
}

const fn bits(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

impl fmt::Display for EgressTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Block { address, prefix } if *prefix == bits(*address) => write!(f, "{address}"),
            Self::Block { address, prefix } => write!(f, "{address}/{prefix}"),
            Self::Domain(name) => f.write_str(name),
        }
    }
}

impl From<EgressTarget> for String {
    fn from(target: EgressTarget) -> Self {
        target.to_string()
    }
}

impl TryFrom<String> for EgressTarget {
    type Error = ParseTargetError;
    fn try_from(text: String) -> Result<Self, ParseTargetError> {
        text.parse()
    }
}

/// A SOCKS5 proxy that carries all TCP of the sandbox to the outside.
#[derive(Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct EgressProxy {
    /// `host:port`.
    pub address: String,
    /// RFC 1929 user name.
    pub username: Option<String>,
    /// RFC 1929 password; never returned by any API, never logged.
    pub password: Option<String>,
}

impl fmt::Debug for EgressProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EgressProxy").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Headers that are set on outbound requests to one domain.
#[derive(Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HeaderRule {
    /// Header name to value; replaces what the program sent. Values are secrets: never returned by any API, never logged.
    pub headers: BTreeMap<String, String>,
}

impl fmt::Debug for HeaderRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeaderRule").field("headers", &self.headers.keys().collect::<Vec<_>>()).finish_non_exhaustive()
    }
}

/// The whole network side of a specification. `PUT /network` replaces the egress half of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct NetworkPolicy {
    /// What the create request said about the internet: `None` when it said nothing (on).
    pub allow_internet_access: Option<bool>,
    /// Destinations allowed in spite of `deny_out`.
    pub allow_out: Vec<EgressTarget>,
    /// Destinations denied; blocks only.
    pub deny_out: Vec<EgressTarget>,
    /// Where egress TCP is sent through.
    pub egress_proxy: Option<EgressProxy>,
    /// Header rules by domain: exact names, and `*.` for all below. Lower case.
    pub rules: BTreeMap<String, HeaderRule>,
    /// Stored secrets, by name, whose placeholders are replaced on the way to their hosts.
    #[serde(default)]
    pub secrets: Vec<String>,
    /// Name servers that may be asked where names are allowed; `None`: the usual one, whose questions the slot answers.
    #[serde(default)]
    pub dns_servers: Option<Vec<Ipv4Addr>>,
    /// Ports inside that serve HTTPS by themselves. Not part of the egress half.
    #[serde(default)]
    pub https_ports: Vec<u16>,
    /// Whether user ports need the traffic token.
    pub public_traffic: PublicTraffic,
    /// Host header for proxied user ports, with `${PORT}`.
    pub mask_request_host: Option<String>,
}

impl NetworkPolicy {
    /// Whether nothing at all may leave: no internet and no exception.
    pub fn is_closed(&self) -> bool {
        self.denies_everything() && self.allow_out.is_empty()
    }

    /// Whether requests may be changed on their way out.
    pub fn changes_requests(&self) -> bool {
        !self.secrets.is_empty() || self.rules.values().any(|rule| !rule.headers.is_empty())
    }

    /// Whether the default for destinations that no rule names is "denied".
    pub fn denies_everything(&self) -> bool {
        self.allow_internet_access == Some(false) || self.deny_out.contains(&EgressTarget::everything())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_blocks_and_domains_read_back_as_written() {
        for text in ["1.1.1.1", "10.0.0.0/8", "0.0.0.0/0", "::1", "fd00::/8", "example.com", "*.example.com"] {
            assert_eq!(text.parse::<EgressTarget>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_destination_is_named_in_the_error() {
        for text in ["", "10.0.0.0/33", "exa mple.com", "1.2.3", "*.", "-/8", "localhost"] {
            let error = text.parse::<EgressTarget>().unwrap_err();
            assert!(error.to_string().starts_with(&format!("'{text}' is neither")), "{error}");
        }
    }

    #[test]
    fn no_internet_means_closed_unless_something_is_allowed() {
        let mut policy = NetworkPolicy { allow_internet_access: Some(false), ..NetworkPolicy::default() };
        assert!(policy.is_closed());
        policy.allow_out.push("1.1.1.1".parse().unwrap());
        assert!(!policy.is_closed() && policy.denies_everything());
    }
}
