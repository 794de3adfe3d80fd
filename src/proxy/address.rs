//! From a request's host, headers and path to the place that must answer it. Pure: no I/O, no look at any sandbox.
//!
//! The order, for one port and three dialects (contract e2b.md 1.3, novita.md A8):
//!
//! 1. `api.<domain>` is the control plane, whatever else the request says.
//! 2. A host label `<port>-<id>[-<client>]` names sandbox and port.
//!    Port 7777 with a bearer token of ours is HopX's in-sandbox API; without one it is a port like any other.
//! 3. `E2b-Sandbox-Id` and `E2b-Sandbox-Port` name them.
//! 4. `/v1/…` is a control plane (HopX).
//! 5. A bearer token of ours is HopX's in-sandbox API, under a host that all sandboxes share.
//! 6. On the paths of the data plane: Novita's headers, a sandbox's token, or `/files` with a signature.
//! 7. Everything else is the control plane. Novita's headers are never looked at here: they leak into such calls.

use super::signature::Signature;
use crate::model::SandboxId;
use crate::sandbox::is_bearer;
use http::{HeaderMap, Method, Uri, header};

/// Where envd answers inside every sandbox.
pub const ENVD_PORT: u16 = 49983;
/// Where the code interpreter answers inside sandboxes that have one.
pub const INTERPRETER_PORT: u16 = 49999;

/// The port in whose name HopX's clients ask for the in-sandbox API. Nothing listens there: the agent answers.
pub const HOPX_PORT: u16 = 7777;

/// Below which name sandboxes are addressed: a host name in lower case, without the port of `STILLBOX_DOMAIN`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain(String);

impl Domain {
    /// The host part of `stillbox.localhost:3443` or `stillbox.localhost`.
    pub fn of(host_and_port: &str) -> Self {
        Self(host_name(host_and_port).to_ascii_lowercase())
    }

    /// The name alone.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What stands before `.<domain>` in `host`, if anything does.
    fn label_in<'h>(&self, host: &'h str) -> Option<&'h str> {
        host.strip_suffix(self.0.as_str())?.strip_suffix('.')
    }
}

/// One port of one sandbox, by the name that the request used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// As it was written, without a client id; for error bodies.
    pub name: String,
    /// `None` when the name has the form of an id and can yet be none of ours: nobody is called so.
    pub id: Option<SandboxId>,
    /// The port inside.
    pub port: u16,
}

impl Target {
    /// The port of a sandbox that was found by other means than its name.
    pub(super) fn found(id: SandboxId, port: u16) -> Self {
        Self { name: id.to_string(), id: Some(id), port }
    }

    fn named(name: &str, port: &str) -> Result<Self, AddressError> {
        let port = parse_port(port)?;
        let mut words = name.split('-');
        let id = words.next().unwrap_or_default();
        let client = words.next();
        let is_named = is_word(id) && client.is_none_or(is_word) && words.next().is_none();
        is_named.then(|| Self { name: id.to_owned(), id: id.parse().ok(), port }).ok_or(AddressError::InvalidSandboxId)
    }
}

/// Who must answer a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Destination {
    /// This port of this sandbox.
    Sandbox(Target),
    /// envd of the sandbox whose token made this signature.
    Signed(Signature),
    /// This port of the sandbox whose envd token this is.
    TokenHolder {
        /// The token as given.
        token: String,
        /// The port that the path belongs to.
        port: u16,
    },
    /// HopX's in-sandbox API of the sandbox that this bearer token is for.
    Hopx {
        /// The token as given.
        token: String,
        /// The sandbox that the host names, which has to be the same.
        named: Option<Target>,
    },
    /// A dialect's control plane.
    ControlPlane,
}

/// The request wants a sandbox and does not say which; the texts are E2B's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum AddressError {
    /// One of the two routing headers stands alone, or both are needed and absent.
    #[error("missing header {0}")]
    MissingHeader(&'static str),
    /// A name below our domain that addresses nothing, or two names.
    #[error("Invalid host")]
    InvalidHost,
    /// Not a number from 1 to 65535.
    #[error("Invalid sandbox port")]
    InvalidSandboxPort,
    /// Not `[a-z0-9]+`, optionally with `-clientID`.
    #[error("Invalid sandbox ID")]
    InvalidSandboxId,
}

/// Decides who must answer.
pub(super) fn destination(domain: &Domain, method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<Destination, AddressError> {
    // RFC 9112, 3.2: who reads the other one than we do would be led elsewhere.
    if headers.get_all(header::HOST).iter().nth(1).is_some() {
        return Err(AddressError::InvalidHost);
    }
    let host = host_of(uri, headers).to_ascii_lowercase();
    match place(domain, &host)? {
        Place::Api => Ok(Destination::ControlPlane),
        Place::Sandbox(target) => Ok(match bearer(headers) {
            Some(token) if target.port == HOPX_PORT => Destination::Hopx { token: token.to_owned(), named: Some(target) },
            Some(_) | None => Destination::Sandbox(target),
        }),
        Place::Shared => by_headers(&E2B_HEADERS, headers)
            .or_else(|| by_signature(method, uri).map(Ok))
            .unwrap_or(Err(AddressError::MissingHeader(E2B_HEADERS.id))),
        Place::Elsewhere => match by_headers(&E2B_HEADERS, headers) {
            Some(target) => target,
            None => by_path(method, uri, headers),
        },
    }
}

/// The host that the client meant: the authority of an absolute request target, else the `Host` header.
pub(super) fn host_of<'r>(uri: &'r Uri, headers: &'r HeaderMap) -> &'r str {
    let from_header = || headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    host_name(uri.authority().map_or_else(from_header, http::uri::Authority::as_str))
}

/// What a host name alone says.
enum Place {
    Api,
    Sandbox(Target),
    /// `sandbox.<domain>`: one host for all, told apart by headers.
    Shared,
    Elsewhere,
}

fn place(domain: &Domain, host: &str) -> Result<Place, AddressError> {
    match domain.label_in(host) {
        Some("api") => Ok(Place::Api),
        Some("sandbox") => Ok(Place::Shared),
        Some(label) => parse_label(label).map(Place::Sandbox),
        None => Ok(foreign_place(host)),
    }
}

/// Below other names than ours only a whole id of ours counts as an address, so that a machine may be called `10-east.lan`.
fn foreign_place(host: &str) -> Place {
    match host.split_once('.').map(|(label, _)| parse_label(label)) {
        Some(Ok(target)) if target.id.is_some() => Place::Sandbox(target),
        Some(Ok(_) | Err(_)) | None => Place::Elsewhere,
    }
}

fn parse_label(label: &str) -> Result<Target, AddressError> {
    let (port, name) = label.split_once('-').ok_or(AddressError::InvalidHost)?;
    Target::named(name, port)
}

struct RoutingHeaders {
    id: &'static str,
    port: &'static str,
}

const E2B_HEADERS: RoutingHeaders = RoutingHeaders { id: "e2b-sandbox-id", port: "e2b-sandbox-port" };
const NOVITA_HEADERS: RoutingHeaders = RoutingHeaders { id: "novita-sandbox-id", port: "novita-sandbox-port" };

fn by_headers(names: &RoutingHeaders, headers: &HeaderMap) -> Option<Result<Destination, AddressError>> {
    let (id, port) = (text(headers, names.id), text(headers, names.port));
    match (id, port) {
        (None, None) => None,
        (None, Some(_)) => Some(Err(AddressError::MissingHeader(names.id))),
        (Some(_), None) => Some(Err(AddressError::MissingHeader(names.port))),
        (Some(id), Some(port)) => Some(Target::named(id, port).map(Destination::Sandbox)),
    }
}

/// A header's value; an empty one counts as absent, as SDKs send both.
fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name).and_then(|value| value.to_str().ok()).filter(|value| !value.is_empty())
}

/// A bearer token that some installation of ours has made.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = text(headers, header::AUTHORIZATION.as_str())?;
    let (scheme, token) = value.split_once(' ')?;
    (scheme.eq_ignore_ascii_case("bearer") && is_bearer(token.trim())).then(|| token.trim())
}

fn by_path(method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<Destination, AddressError> {
    if uri.path().starts_with("/v1/") {
        return Ok(Destination::ControlPlane);
    }
    if let Some(token) = bearer(headers) {
        return Ok(Destination::Hopx { token: token.to_owned(), named: None });
    }
    let Some(port) = data_plane_port(uri.path()) else { return Ok(Destination::ControlPlane) };
    if let Some(target) = by_headers(&NOVITA_HEADERS, headers) {
        return target;
    }
    let by_token = || text(headers, "x-access-token").map(|token| Destination::TokenHolder { token: token.to_owned(), port });
    Ok(by_token().or_else(|| by_signature(method, uri)).unwrap_or(Destination::ControlPlane))
}

/// The port behind a path that only sandboxes answer. `/health` is also the control plane's: it takes a token to mean envd's.
fn data_plane_port(path: &str) -> Option<u16> {
    let first = path.strip_prefix('/')?.split('/').next()?;
    match (first, path) {
        ("process.Process" | "filesystem.Filesystem", _) | (_, "/files" | "/files/compose" | "/health") => Some(ENVD_PORT),
        ("contexts", _) | (_, "/execute") => Some(INTERPRETER_PORT),
        _ => None,
    }
}

fn by_signature(method: &Method, uri: &Uri) -> Option<Destination> {
    (uri.path() == "/files").then(|| Signature::of(method, uri.query().unwrap_or_default())).flatten().map(Destination::Signed)
}

/// The host part of `name`, `name:port`, `[::1]:port`.
fn host_name(host_and_port: &str) -> &str {
    match host_and_port.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        Some(_) | None => host_and_port,
    }
}

fn parse_port(text: &str) -> Result<u16, AddressError> {
    let is_plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match text.parse() {
        Ok(port) if is_plain && port > 0 => Ok(port),
        Ok(_) | Err(_) => Err(AddressError::InvalidSandboxPort),
    }
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: &str = "i0123456789abcdefghij";

    struct Asked<'a> {
        host: &'a str,
        target: &'a str,
        headers: &'a [(&'static str, &'static str)],
    }

    fn decide(asked: &Asked<'_>) -> Result<Destination, AddressError> {
        let mut headers = HeaderMap::new();
        headers.insert("host", asked.host.parse().unwrap());
        for (name, value) in asked.headers {
            headers.insert(*name, value.parse().unwrap());
        }
        destination(&Domain::of("stillbox.localhost:3443"), &Method::GET, &asked.target.parse().unwrap(), &headers)
    }

    fn at(host: &str, target: &str) -> Result<Destination, AddressError> {
        decide(&Asked { host, target, headers: &[] })
    }

    fn sandbox(port: u16) -> Result<Destination, AddressError> {
        Ok(Destination::Sandbox(Target::found(ID.parse().unwrap(), port)))
    }

    #[test]
    fn two_hosts_are_none() {
        let mut headers = HeaderMap::new();
        headers.insert("host", "80-i0123456789abcdefghij.stillbox.localhost".parse().unwrap());
        headers.append("host", "api.stillbox.localhost".parse().unwrap());
        let decided = destination(&Domain::of("stillbox.localhost:3443"), &Method::GET, &Uri::from_static("/"), &headers);
        assert_eq!(decided, Err(AddressError::InvalidHost));
    }

    #[test]
    fn a_host_label_names_port_and_sandbox_below_any_domain() {
        assert_eq!(at("8000-i0123456789abcdefghij.stillbox.localhost:3443", "/"), sandbox(8000));
        assert_eq!(at("8000-I0123456789ABCDEFGHIJ.Stillbox.Localhost", "/"), sandbox(8000));
        assert_eq!(at("49983-i0123456789abcdefghij-6532622b.stillbox.localhost", "/sandboxes"), sandbox(49983));
        assert_eq!(at("8000-i0123456789abcdefghij.sandbox.novita.ai", "/"), sandbox(8000));
    }

    #[test]
    fn a_bad_label_below_our_domain_is_refused_with_the_reason() {
        assert_eq!(at("hello.stillbox.localhost", "/"), Err(AddressError::InvalidHost));
        assert_eq!(at("x-i0123456789abcdefghij.stillbox.localhost", "/"), Err(AddressError::InvalidSandboxPort));
        assert_eq!(at("0-i0123456789abcdefghij.stillbox.localhost", "/"), Err(AddressError::InvalidSandboxPort));
        assert_eq!(at("65536-abc.stillbox.localhost", "/"), Err(AddressError::InvalidSandboxPort));
        assert_eq!(at("80-a_b.stillbox.localhost", "/"), Err(AddressError::InvalidSandboxId));
        assert_eq!(at("80-a-b-c.stillbox.localhost", "/"), Err(AddressError::InvalidSandboxId));
    }

    #[test]
    fn a_well_formed_id_that_is_none_of_ours_is_still_an_address() {
        let nobody = Target { name: "nobody".into(), id: None, port: 80 };
        assert_eq!(at("80-nobody.stillbox.localhost", "/"), Ok(Destination::Sandbox(nobody)));
    }

    #[test]
    fn other_hosts_and_the_api_host_lead_to_the_control_plane() {
        for host in ["localhost:3000", "127.0.0.1:3000", "[::1]:3000", "stillbox.localhost:3443", "10-east.lan", "box"] {
            assert_eq!(at(host, "/sandboxes"), Ok(Destination::ControlPlane), "{host}");
        }
        let leaked = [("e2b-sandbox-id", ID), ("e2b-sandbox-port", "80")];
        let asked = Asked { host: "api.stillbox.localhost:3443", target: "/sandboxes", headers: &leaked };
        assert_eq!(decide(&asked), Ok(Destination::ControlPlane));
    }

    #[test]
    fn headers_name_the_sandbox_and_one_alone_is_an_error() {
        let both = [("e2b-sandbox-id", ID), ("e2b-sandbox-port", "49999")];
        assert_eq!(decide(&Asked { host: "localhost:3000", target: "/health", headers: &both }), sandbox(49999));
        assert_eq!(decide(&Asked { host: "sandbox.stillbox.localhost", target: "/x", headers: &both }), sandbox(49999));
        let id_alone = decide(&Asked { host: "localhost", target: "/health", headers: &both[..1] });
        assert_eq!(id_alone, Err(AddressError::MissingHeader("e2b-sandbox-port")));
        assert_eq!(at("sandbox.stillbox.localhost", "/x"), Err(AddressError::MissingHeader("e2b-sandbox-id")));
    }

    #[test]
    fn novitas_headers_count_on_data_plane_paths_only() {
        let headers = &[("novita-sandbox-id", ID), ("novita-sandbox-port", "49983")];
        for target in ["/process.Process/Start", "/filesystem.Filesystem/Stat", "/files", "/health"] {
            assert_eq!(decide(&Asked { host: "127.0.0.1:3000", target, headers }), sandbox(49983), "{target}");
        }
        for target in ["/sandboxes", "/files/read", "/v2/sandboxes", "/v1/files"] {
            let decided = decide(&Asked { host: "127.0.0.1:3000", target, headers });
            assert_eq!(decided, Ok(Destination::ControlPlane), "{target}");
        }
    }

    #[test]
    fn a_token_leads_to_its_holder_by_the_port_of_the_path() {
        let headers = &[("x-access-token", "t0")];
        for (target, port) in [("/process.Process/List", 49983), ("/health", 49983), ("/execute", 49999), ("/contexts/1/restart", 49999)] {
            let holder = Destination::TokenHolder { token: "t0".into(), port };
            assert_eq!(decide(&Asked { host: "localhost", target, headers }), Ok(holder), "{target}");
        }
        let unsecured = &[("x-access-token", "")];
        let decided = decide(&Asked { host: "localhost", target: "/execute", headers: unsecured });
        assert_eq!(decided, Ok(Destination::ControlPlane));
    }

    #[test]
    fn a_signed_file_url_without_a_host_label_is_found_by_its_signature() {
        for host in ["localhost:3000", "sandbox.stillbox.localhost:3443"] {
            assert!(matches!(at(host, "/files?path=a&signature=v1_x"), Ok(Destination::Signed(_))), "{host}");
        }
        assert_eq!(at("localhost:3000", "/files?path=a"), Ok(Destination::ControlPlane));
    }

    proptest! {
        #[test]
        fn no_host_makes_the_decision_panic(host in "[ -~]{0,80}", id in "[ -~]{0,40}", port in "[ -~]{0,8}") {
            let mut headers = HeaderMap::new();
            headers.insert("host", host.parse().unwrap());
            headers.insert("e2b-sandbox-id", id.parse().unwrap());
            headers.insert("e2b-sandbox-port", port.parse().unwrap());
            let _any_answer = destination(&Domain::of("d.test"), &Method::GET, &Uri::from_static("/"), &headers);
        }

        #[test]
        fn every_address_that_an_sdk_composes_is_read_back(
            port in 1u16..,
            client in proptest::option::of("[a-z0-9]{1,12}"),
            tail in "(:[0-9]{1,5})?",
        ) {
            let id = SandboxId::random();
            let client = client.map(|client| format!("-{client}")).unwrap_or_default();
            let mut headers = HeaderMap::new();
            headers.insert("host", format!("{port}-{id}{client}.stillbox.localhost{tail}").parse().unwrap());
            let decided = destination(&Domain::of("stillbox.localhost:3443"), &Method::GET, &Uri::from_static("/"), &headers);
            prop_assert_eq!(decided, Ok(Destination::Sandbox(Target::found(id, port))));

            let mut headers = HeaderMap::new();
            headers.insert("host", "127.0.0.1:3000".parse().unwrap());
            headers.insert("e2b-sandbox-id", format!("{id}{client}").parse().unwrap());
            headers.insert("e2b-sandbox-port", port.into());
            let decided = destination(&Domain::of("stillbox.localhost:3443"), &Method::GET, &Uri::from_static("/"), &headers);
            prop_assert_eq!(decided, Ok(Destination::Sandbox(Target::found(id, port))));
        }
    }
}
