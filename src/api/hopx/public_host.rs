//! Where clients find the API inside a sandbox: a URL that leads back the way they came.
//!
//! * Over plain HTTP at an address: the same address, for all sandboxes; the token says which (contract hopx.md B4, 1).
//! * At `api.<domain>`: the sandbox's own name, with the ending that the clients' `get_preview_url` looks for.
//! * At `api.hopx.dev`, or another `api.` that was made to lead here: names of HopX's own form below a region of ours.

use crate::model::SandboxId;
use http::{HeaderMap, Uri, header};

/// The port in whose name the API inside answers.
const PORT: u16 = 7777;
/// `get_preview_url` wants `.vms.hopx.dev` somewhere after the id's dot; the proxy takes this off again.
const ENDING: &str = "/x.vms.hopx.dev";
/// What HopX calls its own API.
const HOPX_API: &str = "api.hopx.dev";

/// Below which region this server's sandboxes are, for who looks at names.
pub(super) const REGION: &str = "local";

/// As the request's client can reach it. `domain` may carry a port.
pub(super) fn public_host(domain: &str, uri: &Uri, headers: &HeaderMap, id: SandboxId) -> String {
    let host = host_of(uri, headers);
    let (name, domain_name) = (without_port(host), without_port(domain));
    if name == HOPX_API {
        return format!("https://{PORT}-{id}.{REGION}.vms.hopx.dev");
    }
    if name.strip_prefix("api.") == Some(domain_name) && host.strip_prefix("api.") == Some(domain) {
        return format!("https://{PORT}-{id}.{domain}{ENDING}");
    }
    format!("http://{host}")
}

/// This server as the request's client has reached it: a link for it must lead the same way.
pub(super) fn own_address(domain: &str, uri: &Uri, headers: &HeaderMap) -> String {
    let host = host_of(uri, headers);
    let is_tls = without_port(host) == HOPX_API || host.strip_prefix("api.") == Some(domain);
    format!("{}://{host}", if is_tls { "https" } else { "http" })
}

fn host_of<'r>(uri: &'r Uri, headers: &'r HeaderMap) -> &'r str {
    let from_header = || headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    uri.authority().map_or_else(from_header, http::uri::Authority::as_str)
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        Some(_) | None => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host_for(host: &str, domain: &str) -> String {
        let headers = HeaderMap::from_iter([(header::HOST, host.parse().unwrap())]);
        let id: SandboxId = "i00000000000000000000".parse().unwrap();
        public_host(domain, &Uri::from_static("/v1/sandboxes"), &headers, id)
    }

    #[test]
    fn clients_are_led_back_the_way_they_came() {
        for (host, domain, wanted) in [
            ("127.0.0.1:3000", "stillbox.localhost:3443", "http://127.0.0.1:3000"),
            ("[::1]:3000", "stillbox.localhost:3443", "http://[::1]:3000"),
            ("build-host", "stillbox.localhost:3443", "http://build-host"),
            (
                "api.stillbox.localhost:3443",
                "stillbox.localhost:3443",
                "https://7777-i00000000000000000000.stillbox.localhost:3443/x.vms.hopx.dev",
            ),
            ("api.box.example", "box.example", "https://7777-i00000000000000000000.box.example/x.vms.hopx.dev"),
            ("api.hopx.dev", "stillbox.localhost:3443", "https://7777-i00000000000000000000.local.vms.hopx.dev"),
            // The plain listener under the domain's name: no TLS there.
            ("api.stillbox.localhost:3000", "stillbox.localhost:3443", "http://api.stillbox.localhost:3000"),
        ] {
            assert_eq!(host_for(host, domain), wanted, "{host}");
        }
    }
}
