//! POST /init: makes a generic agent, or one restored from somebody else's dump, this sandbox's agent.
//!
//! The whole request is checked before anything changes. Then the files inside are written, and at the end identity
//! and control secret change at once. A file that the tenant has made unwritable costs a line in the log and not the
//! sandbox: it may have filled its own disk, or put a folder where /etc/hosts was.

pub(crate) mod front;
mod trust;
mod write;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use self::write::write_in_place;
use crate::auth;
use crate::error::HttpError;
use crate::pid1::is_control_secret;
use crate::state::{Access, Agent, EnvsFrom, Identity};
use crate::wire::{BOOT_ID_PATH, GENERATION_PATH, InitRequest, LogLevel};

/// The kernel's limit for a host name.
const HOSTNAME_BYTES_MAX: usize = 64;
const ENTROPY_BYTES: usize = 32;

#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error("the request is not an init request: {0}")]
    Json(#[from] serde_json::Error),
    #[error("{field} {problem}")]
    Field { field: &'static str, problem: String },
    #[error("could not set the hostname: {0}")]
    Hostname(#[source] io::Error),
}

impl From<InitError> for HttpError {
    fn from(error: InitError) -> HttpError {
        let status = match error {
            InitError::Json(_) | InitError::Field { .. } => StatusCode::BAD_REQUEST,
            InitError::Hostname(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        HttpError::new(status, error.to_string())
    }
}

pub(crate) async fn post(State(agent): State<Arc<Agent>>, headers: HeaderMap, body: Bytes) -> Result<StatusCode, HttpError> {
    // Held to the end: of two requests with the same secret, one finds it rotated.
    let mut control_secret = agent.control_secret();
    auth::check_control_secret(&control_secret, &headers)?;
    let request: InitRequest = serde_json::from_slice(&body).map_err(InitError::Json)?;
    let entropy = check(&request)?;
    let is_another = agent.identity().sandbox_id != request.sandbox_id;
    apply(&agent, &request, &entropy)?;
    *control_secret = request.control_secret;
    agent.reaper.reap_all();
    if is_another {
        // A resumed sandbox is the same one, and its kernels go on as if nothing had been.
        agent.interpreter.introduce(&agent);
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Looks at every field and changes nothing. Returns the decoded entropy.
fn check(request: &InitRequest) -> Result<Vec<u8>, InitError> {
    let is_hex = |text: &str, len: usize| text.len() == len && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_id = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
    let workdir = &request.default_workdir;
    let pem = request.ca_bundle_pem.as_deref();
    let rules = [
        ("controlSecret", "is not 64 hex characters", is_control_secret(&request.control_secret)),
        ("sandboxId", "is empty or holds blanks", is_id(&request.sandbox_id)),
        ("templateId", "is empty or holds blanks", is_id(&request.template_id)),
        ("accessToken", "is empty or holds blanks", request.access_token.as_deref().is_none_or(is_id)),
        ("defaultUser", "is empty or holds blanks", is_id(&request.default_user)),
        ("defaultWorkdir", "is not absolute", (workdir.is_empty() || workdir.starts_with('/')) && !workdir.contains('\0')),
        ("hostname", "is not 1 to 64 letters, digits, dots and dashes", is_hostname(&request.hostname)),
        ("machineId", "is not 32 hex characters", is_hex(&request.machine_id, 32)),
        ("bootId", "is not a UUID", is_uuid(&request.boot_id)),
        ("caBundlePem", "holds no certificate", pem.is_none_or(|pem| pem.contains("-----BEGIN CERTIFICATE-----"))),
    ];
    if let Some((field, problem, _)) = rules.into_iter().find(|(_, _, holds)| !holds) {
        return Err(InitError::Field { field, problem: problem.to_owned() });
    }
    check_envs("templateEnv", &request.template_env)?;
    check_envs("envVars", &request.env_vars)?;
    let entropy = STANDARD.decode(&request.entropy).ok().filter(|bytes| bytes.len() == ENTROPY_BYTES);
    entropy.ok_or(InitError::Field { field: "entropy", problem: format!("is not {ENTROPY_BYTES} bytes of base64") })
}

fn check_envs(field: &'static str, envs: &BTreeMap<String, String>) -> Result<(), InitError> {
    let bad = |(name, value): &(&String, &String)| name.is_empty() || name.contains(['=', '\0']) || value.contains('\0');
    match envs.iter().find(bad) {
        Some((name, _)) => {
            Err(InitError::Field { field, problem: format!("holds a variable '{}' that no process can have", name.escape_default()) })
        }
        None => Ok(()),
    }
}

fn is_hostname(name: &str) -> bool {
    (1..=HOSTNAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.'))
}

fn is_uuid(text: &str) -> bool {
    let dashes_at = [8, 13, 18, 23];
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| if dashes_at.contains(&at) { byte == b'-' } else { byte.is_ascii_hexdigit() })
}

fn apply(agent: &Agent, request: &InitRequest, entropy: &[u8]) -> Result<(), InitError> {
    match rustix::system::sethostname(request.hostname.as_bytes()) {
        // Without CAP_SYS_ADMIN (`sandbox.mounts = "none"`) nobody inside may; the name then stands in the files alone.
        Ok(()) | Err(rustix::io::Errno::PERM) => {}
        Err(error) => return Err(InitError::Hostname(error.into())),
    }
    let former = agent.identity();
    if former.sandbox_id != request.sandbox_id {
        // What the template's build or the source of a fork printed belongs to them.
        agent.log.clear();
        agent.hopx.begin();
    }
    write_names(agent, request);
    let trusted = trust::apply(request.ca_bundle_pem.as_deref());
    let ca_envs = trusted.unwrap_or_else(|error| {
        warn(agent, trust::CA_PATH, &error);
        BTreeMap::new()
    });
    if let Err(error) = agent.front.set(request.front) {
        agent.log.write(
            LogLevel::Warn,
            "could not listen where programs look for names below localhost",
            [("port", request.front.map_or_else(String::new, |front| front.port.to_string())), ("error", error.to_string())],
        );
    }
    // The kernel's pool was never part of a dump; its new bytes cost nothing and help a machine that just booted.
    drop(std::fs::write("/dev/urandom", entropy));
    agent.replace_identity(identity(request, ca_envs, &former));
    Ok(())
}

/// The files that carry the sandbox's names.
fn write_names(agent: &Agent, request: &InitRequest) {
    let files = [
        ("/etc/hostname", format!("{}\n", request.hostname)),
        ("/etc/hosts", request.hosts.clone()),
        ("/etc/resolv.conf", request.resolv_conf.clone()),
        ("/etc/machine-id", format!("{}\n", request.machine_id)),
        (BOOT_ID_PATH, format!("{}\n", request.boot_id)),
        (GENERATION_PATH, format!("{}\n", request.generation)),
    ];
    for (path, content) in files {
        if let Err(error) = write_in_place(path.as_ref(), content.as_bytes()) {
            warn(agent, path, &error);
        }
    }
}

fn warn(agent: &Agent, path: &str, error: &io::Error) {
    agent.log.write(
        LogLevel::Warn,
        "could not write a file of the sandbox's identity",
        [("path", path.to_owned()), ("error", error.to_string())],
    );
}

/// Variables in rising order: CA bundle, template, sandbox, our own.
fn identity(request: &InitRequest, ca_envs: BTreeMap<String, String>, former: &Identity) -> Identity {
    let mut lower_envs = ca_envs;
    lower_envs.extend(request.template_env.clone());
    let (own_envs, own_envs_from) = own_envs(request, former);
    let internal =
        [("E2B_SANDBOX", "true"), ("E2B_SANDBOX_ID", request.sandbox_id.as_str()), ("E2B_TEMPLATE_ID", request.template_id.as_str())];
    let events = request.events_address.as_deref().map(|address| ("E2B_EVENTS_ADDRESS", address));
    let envs = internal.into_iter().chain(events).map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let identity = Identity {
        lower_envs,
        own_envs,
        own_envs_from,
        envs,
        access: request.access_token.clone().map_or(Access::Open, Access::Token),
        sandbox_id: request.sandbox_id.clone(),
        path: former.path.clone(),
        default_user: request.default_user.clone(),
        default_workdir: request.default_workdir.clone(),
        generation: request.generation,
        cpu_count: request.cpu_count,
        memory_bytes: request.memory_bytes,
    };
    identity.composed()
}

/// What its user has set at run time outlives this init; a copy takes it over, below what it was itself created with.
fn own_envs(request: &InitRequest, former: &Identity) -> (BTreeMap<String, String>, EnvsFrom) {
    match former.own_envs_from {
        EnvsFrom::Init => (request.env_vars.clone(), EnvsFrom::Init),
        EnvsFrom::User if former.sandbox_id == request.sandbox_id => (former.own_envs.clone(), EnvsFrom::User),
        EnvsFrom::User => {
            let mut own_envs = former.own_envs.clone();
            own_envs.extend(request.env_vars.clone());
            (own_envs, EnvsFrom::User)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> InitRequest {
        InitRequest {
            control_secret: "ab".repeat(32),
            sandbox_id: "i0123".into(),
            template_id: "base".into(),
            default_user: "user".into(),
            hostname: "e2b.local".into(),
            machine_id: "0".repeat(32),
            boot_id: "6f1a2c9e-0000-4000-8000-1234567890ab".into(),
            entropy: STANDARD.encode([7; ENTROPY_BYTES]),
            ..Default::default()
        }
    }

    fn refused(change: impl FnOnce(&mut InitRequest)) -> String {
        let mut request = request();
        change(&mut request);
        check(&request).unwrap_err().to_string()
    }

    #[test]
    fn each_bad_field_is_named() {
        assert_eq!(check(&request()).unwrap(), [7; ENTROPY_BYTES]);
        assert_eq!(refused(|request| request.control_secret.push('0')), "controlSecret is not 64 hex characters");
        assert_eq!(refused(|request| request.sandbox_id.clear()), "sandboxId is empty or holds blanks");
        assert_eq!(refused(|request| request.access_token = Some(String::new())), "accessToken is empty or holds blanks");
        assert_eq!(refused(|request| request.default_workdir = "home".into()), "defaultWorkdir is not absolute");
        assert_eq!(refused(|request| request.hostname = "a b".into()), "hostname is not 1 to 64 letters, digits, dots and dashes");
        assert_eq!(refused(|request| request.machine_id = "x".repeat(32)), "machineId is not 32 hex characters");
        assert_eq!(refused(|request| request.boot_id = "0".repeat(36)), "bootId is not a UUID");
        assert_eq!(refused(|request| request.entropy = "AAAA".into()), "entropy is not 32 bytes of base64");
        assert_eq!(refused(|request| request.ca_bundle_pem = Some("none".into())), "caBundlePem holds no certificate");
        let envs = BTreeMap::from([("A=B".to_owned(), String::new())]);
        assert_eq!(refused(|request| request.env_vars = envs), "envVars holds a variable 'A=B' that no process can have");
    }

    #[test]
    fn variables_of_the_sandbox_win_over_the_templates_but_not_over_its_identity() {
        let mut request = request();
        let envs = |pairs: &[(&str, &str)]| pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        request.template_env = envs(&[("A", "template"), ("B", "template")]);
        request.env_vars = envs(&[("A", "sandbox"), ("E2B_SANDBOX_ID", "forged")]);
        let identity = identity(&request, envs(&[("B", "ca"), ("C", "ca")]), &Identity::generic("/bin".into()));
        let expected = [
            ("A", "sandbox"),
            ("B", "template"),
            ("C", "ca"),
            ("E2B_SANDBOX", "true"),
            ("E2B_SANDBOX_ID", "i0123"),
            ("E2B_TEMPLATE_ID", "base"),
        ];
        assert_eq!(identity.envs, envs(&expected));
        assert_eq!(identity.access, Access::Open);
    }
}
