//! Credentials for registries: what a build brings, what docker's login file has, and the dance for a token.

use super::aws;
use super::reference::Reference;
use super::registry::{RegistryError, Transport};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// The name under which Google's registries take a service account's key as password.
const GCP_KEY_USER: &str = "_json_key";
/// A token is some kilobytes of base64.
const TOKEN_BYTES_MAX: u64 = 1 << 20;

/// What opens a registry. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// Name and password, or name and access token.
    Basic {
        /// The name.
        username: String,
        /// The password or token.
        password: String,
    },
    /// Keys of an AWS account that may ask ECR for a password.
    Aws {
        /// Which key.
        access_key_id: String,
        /// The key.
        secret_access_key: String,
        /// Where the registry is.
        region: String,
    },
    /// The JSON key of a Google service account.
    Gcp {
        /// All of the file.
        service_account_json: String,
    },
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Self::Basic { .. } => "Basic",
            Self::Aws { .. } => "Aws",
            Self::Gcp { .. } => "Gcp",
        };
        write!(f, "Credentials::{kind}(…)")
    }
}

/// Name and password as HTTP knows them.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Login {
    pub(super) username: String,
    pub(super) password: String,
}

impl Login {
    /// The value of an Authorization header.
    pub(super) fn header(&self) -> String {
        format!("Basic {}", STANDARD.encode(format!("{}:{}", self.username, self.password)))
    }

    /// What these credentials are to a registry; for AWS, its own service is asked first.
    pub(super) fn of(credentials: &Credentials, transport: &Transport<'_>) -> Result<Self, RegistryError> {
        match credentials {
            Credentials::Basic { username, password } => Ok(Self { username: username.clone(), password: password.clone() }),
            Credentials::Gcp { service_account_json } => {
                Ok(Self { username: GCP_KEY_USER.to_owned(), password: service_account_json.clone() })
            }
            Credentials::Aws { access_key_id, secret_access_key, region } => {
                aws::login(transport, &aws::Keys { access_key_id, secret_access_key, region })
            }
        }
    }

    /// What docker's login file has for this registry.
    pub(super) fn from_file(path: &Path, registry: &str) -> Result<Option<Self>, RegistryError> {
        #[derive(Deserialize)]
        struct File {
            #[serde(default)]
            auths: BTreeMap<String, Entry>,
        }
        #[derive(Deserialize)]
        struct Entry {
            auth: Option<String>,
            username: Option<String>,
            password: Option<String>,
        }
        let unreadable = |reason: String| RegistryError::AuthFile { path: path.to_owned(), reason };
        let text = std::fs::read(path).map_err(|error| unreadable(error.to_string()))?;
        let file: File = serde_json::from_slice(&text).map_err(|error| unreadable(error.to_string()))?;
        let Some((_, entry)) = file.auths.into_iter().find(|(name, _)| is_for(name, registry)) else { return Ok(None) };
        if let (Some(username), Some(password)) = (entry.username, entry.password) {
            return Ok(Some(Self { username, password }));
        }
        let pair = entry.auth.and_then(|auth| STANDARD.decode(auth).ok()).and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = pair.ok_or_else(|| unreadable(format!("its entry for {registry} has no auth")))?;
        let (username, password) =
            pair.split_once(':').ok_or_else(|| unreadable(format!("its entry for {registry} is no name:password")))?;
        Ok(Some(Self { username: username.to_owned(), password: password.to_owned() }))
    }
}

/// Docker writes its own registry as an old API's address.
fn is_for(name: &str, registry: &str) -> bool {
    let host = name.trim_start_matches("https://").trim_start_matches("http://");
    let host = host.split('/').next().unwrap_or(host);
    host == registry || (registry == "docker.io" && matches!(host, "index.docker.io" | "registry-1.docker.io"))
}

/// What a registry wants to see, out of its WWW-Authenticate header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    pub(super) fn parse(header: &str) -> Option<Self> {
        let (scheme, parameters) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let mut found = parameters_of(parameters);
        Some(Self::Bearer { realm: found.remove("realm")?, service: found.remove("service"), scope: found.remove("scope") })
    }
}

/// `name="value"` pairs; a scope has commas inside its quotes.
fn parameters_of(mut rest: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    while let Some((name, after)) = rest.split_once('=') {
        let name = name.trim_matches([' ', ',']).to_ascii_lowercase();
        let (value, next) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(',').unwrap_or((after, "")),
        };
        found.insert(name, value.to_owned());
        rest = next;
    }
    found
}

/// Asks the registry's token service; answers the value of an Authorization header.
pub(super) fn token(
    transport: &Transport<'_>,
    challenge: &Challenge,
    reference: &Reference,
    login: Option<&Login>,
) -> Result<String, RegistryError> {
    let (realm, service, scope) = match challenge {
        Challenge::Basic => return login.map(Login::header).ok_or(RegistryError::Denied { status: 401 }),
        Challenge::Bearer { realm, service, scope } => (realm, service, scope),
    };
    let mut query = form_urlencoded::Serializer::new(String::new());
    if let Some(service) = service {
        query.append_pair("service", service);
    }
    query.append_pair("scope", scope.as_deref().unwrap_or(&format!("repository:{}:pull", reference.repository)));
    let separator = if realm.contains('?') { '&' } else { '?' };
    let url = format!("{realm}{separator}{}", query.finish());
    let authorization = login.map(Login::header);
    let mut answer = transport.get(&url, &[("accept", "application/json")], authorization.as_deref())?;
    match answer.status {
        200 => {}
        status @ (400 | 401 | 403 | 404) => return Err(RegistryError::Denied { status }),
        status => return Err(RegistryError::Status { status, what: "the token".to_owned() }),
    }
    #[derive(Deserialize)]
    struct Token {
        token: Option<String>,
        access_token: Option<String>,
    }
    let bytes = answer.read(TOKEN_BYTES_MAX)?;
    let token: Token =
        serde_json::from_slice(&bytes).map_err(|_| RegistryError::Garbled("its token service answers no JSON".to_owned()))?;
    let token =
        token.token.or(token.access_token).ok_or_else(|| RegistryError::Garbled("its token service answers no token".to_owned()))?;
    Ok(format!("Bearer {token}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read_with_commas_in_their_scopes() {
        let header = r#"Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a/b:pull,push""#;
        let Some(Challenge::Bearer { realm, service, scope }) = Challenge::parse(header) else { panic!("not read") };
        assert_eq!((realm.as_str(), service.as_deref()), ("https://auth.example/token", Some("registry.example")));
        assert_eq!(scope.as_deref(), Some("repository:a/b:pull,push"));
        assert_eq!(Challenge::parse(r#"Basic realm="x""#), Some(Challenge::Basic));
        assert_eq!(Challenge::parse("Negotiate"), None);
        assert_eq!(Challenge::parse(r#"bearer service="no realm""#), None);
    }

    #[test]
    fn a_login_file_of_docker_is_read_by_registry() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let auth = STANDARD.encode("me:secret:with:colons");
        let text = format!(r#"{{"auths":{{"https://index.docker.io/v1/":{{"auth":"{auth}"}},"r.example:5000":{{"auth":"!"}}}}}}"#);
        std::fs::write(&path, text).unwrap();
        let login = Login::from_file(&path, "docker.io").unwrap().unwrap();
        assert_eq!((login.username.as_str(), login.password.as_str()), ("me", "secret:with:colons"));
        assert!(Login::from_file(&path, "other.example").unwrap().is_none());
        assert!(Login::from_file(&path, "r.example:5000").is_err());
    }

    #[test]
    fn credentials_are_not_shown() {
        let credentials = Credentials::Basic { username: "me".into(), password: "hunter2".into() };
        assert!(!format!("{credentials:?}").contains("hunter2"));
    }
}
