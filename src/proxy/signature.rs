//! Signed file URLs: `v1_` and the unpadded base64 of SHA-256 over `path:operation:user:token[:expiration]`
//! (contract e2b.md 3.1). Under a shared host they carry no sandbox id, so the sandbox is found by trying tokens.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use http::Method;
use sha2::{Digest, Sha256};
use time::OffsetDateTime;

/// What a signed URL says, before anybody's token was tried on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Signature {
    path: String,
    operation: &'static str,
    user: String,
    /// Unix seconds, as they were written: they are signed as text.
    expiration: Option<String>,
    given: String,
}

impl Signature {
    /// The signature in the query of a request for `/files`, if it has one.
    pub(super) fn of(method: &Method, query: &str) -> Option<Self> {
        let operation = match *method {
            Method::GET | Method::HEAD => "read",
            Method::POST => "write",
            _ => return None,
        };
        let value = |name: &str| form_urlencoded::parse(query.as_bytes()).find(|(key, _)| key == name).map(|(_, value)| value.into_owned());
        Some(Self {
            given: value("signature").filter(|given| !given.is_empty())?,
            path: value("path").unwrap_or_default(),
            user: value("username").unwrap_or_default(),
            expiration: value("signature_expiration").filter(|expiration| !expiration.is_empty()),
            operation,
        })
    }

    /// Whether this token made it. An expired one is made by its token all the same: envd says that it is expired.
    pub(super) fn is_made_with(&self, token: &str) -> bool {
        let mut digest = Sha256::new();
        for part in [&self.path, ":", self.operation, ":", &self.user, ":", token] {
            digest.update(part);
        }
        if let Some(expiration) = &self.expiration {
            digest.update(":");
            digest.update(expiration);
        }
        self.given.strip_prefix("v1_").is_some_and(|given| super::same(&STANDARD_NO_PAD.encode(digest.finalize()), given))
    }

    /// Whether its time is over at `now`.
    pub(super) fn is_expired(&self, now: OffsetDateTime) -> bool {
        self.expiration.as_deref().is_some_and(|expiration| expiration.parse().is_ok_and(|end: i64| end < now.unix_timestamp()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0";

    #[test]
    fn the_contracts_vector_is_recognised_by_its_token_alone() {
        let query = "path=hello.txt&username=user&signature=v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E";
        let signature = Signature::of(&Method::GET, query).unwrap();
        assert!(signature.is_made_with(TOKEN));
        assert!(!signature.is_made_with("another"));
        assert!(!Signature::of(&Method::POST, query).unwrap().is_made_with(TOKEN), "a read signature must not write");
    }

    #[test]
    fn an_expiration_is_signed_too_and_known_when_over() {
        let digest = STANDARD_NO_PAD.encode(Sha256::digest(format!("a b:write::{TOKEN}:1700000000")));
        let digest = digest.replace('+', "%2B");
        let query = format!("path=a%20b&signature_expiration=1700000000&signature=v1_{digest}");
        let signature = Signature::of(&Method::POST, &query).unwrap();
        assert!(signature.is_made_with(TOKEN));
        assert!(signature.is_expired(OffsetDateTime::from_unix_timestamp(1_700_000_001).unwrap()));
        assert!(!signature.is_expired(OffsetDateTime::from_unix_timestamp(1_700_000_000).unwrap()));
        let postponed = Signature::of(&Method::POST, &query.replace("1700000000", "1800000000")).unwrap();
        assert!(!postponed.is_made_with(TOKEN));
    }

    #[test]
    fn a_query_without_a_signature_is_not_signed() {
        assert_eq!(Signature::of(&Method::GET, "path=a"), None);
        assert_eq!(Signature::of(&Method::GET, "path=a&signature="), None);
        assert_eq!(Signature::of(&Method::DELETE, "path=a&signature=v1_x"), None);
    }
}
