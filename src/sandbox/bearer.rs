//! Bearer tokens: JWTs (HS256) for the one in-sandbox API whose clients know no other token (HopX's).
//!
//! They are signed with a key that is derived from the install key, name one sandbox, and are never stored nor revoked:
//! a client that was given a newer one may go on using the older. Who knows the sandbox's token may do the same, so
//! neither is worth more than the other.

use super::tokens::InstallKey;
use crate::model::SandboxId;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use std::time::Duration;
use time::OffsetDateTime;

/// How long one is good. HopX's JavaScript client goes on with its first token after it has asked for another, so they
/// last as long as a paused sandbox is kept by default.
const LIFE: Duration = Duration::from_secs(30 * 24 * 3600);

/// The header of every token of ours, and so their beginning: another issuer's token is told from ours without a key.
const HEADER: &str = r#"{"alg":"HS256","typ":"JWT","kid":"stillbox"}"#;

/// A token and its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bearer {
    /// `header.payload.signature`.
    pub token: String,
    /// In whole seconds.
    pub expires_at: OffsetDateTime,
}

/// Why a token opens nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BearerError {
    /// Another installation's, or a forged one.
    #[error("the token is not one of this server's")]
    Invalid,
    /// Its time is over.
    #[error("token expired; ask for another with POST /v1/sandboxes/<id>/token/refresh")]
    Expired,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Claims {
    iss: String,
    sub: SandboxId,
    iat: i64,
    exp: i64,
}

/// Whether a text looks like a token that some installation of ours has made. Says nothing about its worth.
pub fn is_bearer(text: &str) -> bool {
    text.strip_prefix(&URL_SAFE_NO_PAD.encode(HEADER)).is_some_and(|rest| rest.starts_with('.'))
}

impl InstallKey {
    /// A new token for a sandbox, whether it exists or not.
    pub fn issue_bearer(&self, id: SandboxId, now: OffsetDateTime) -> Bearer {
        let issued = now.replace_nanosecond(0).unwrap_or(now);
        let expires_at = issued + LIFE;
        let claims = Claims { iss: "stillbox".to_owned(), sub: id, iat: issued.unix_timestamp(), exp: expires_at.unix_timestamp() };
        let claims = serde_json::to_vec(&claims).expect("texts and numbers are JSON");
        let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(HEADER), URL_SAFE_NO_PAD.encode(claims));
        let signature = URL_SAFE_NO_PAD.encode(self.sign_bearer(signed.as_bytes()));
        Bearer { token: format!("{signed}.{signature}"), expires_at }
    }

    /// Whose token it is.
    pub fn read_bearer(&self, token: &str, now: OffsetDateTime) -> Result<SandboxId, BearerError> {
        let (signed, signature) = token.rsplit_once('.').filter(|_| is_bearer(token)).ok_or(BearerError::Invalid)?;
        let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| BearerError::Invalid)?;
        if !self.has_signed_bearer(signed.as_bytes(), &signature) {
            return Err(BearerError::Invalid);
        }
        let (_, claims) = signed.split_once('.').ok_or(BearerError::Invalid)?;
        let claims = URL_SAFE_NO_PAD.decode(claims).map_err(|_| BearerError::Invalid)?;
        let claims: Claims = serde_json::from_slice(&claims).map_err(|_| BearerError::Invalid)?;
        (now.unix_timestamp() < claims.exp).then_some(claims.sub).ok_or(BearerError::Expired)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: OffsetDateTime = time::macros::datetime!(2026-01-02 03:04:05.678 UTC);

    #[test]
    fn a_token_names_its_sandbox_until_its_end() {
        let (key, id) = (InstallKey::random(), SandboxId::random());
        let bearer = key.issue_bearer(id, NOW);
        assert!(is_bearer(&bearer.token));
        assert!(bearer.expires_at - NOW > Duration::from_secs(24 * 3600));
        assert_eq!(key.read_bearer(&bearer.token, NOW), Ok(id));
        assert_eq!(key.read_bearer(&bearer.token, bearer.expires_at - Duration::from_secs(1)), Ok(id));
        assert_eq!(key.read_bearer(&bearer.token, bearer.expires_at), Err(BearerError::Expired));
    }

    #[test]
    fn an_older_token_stays_good_after_a_newer_one() {
        let (key, id) = (InstallKey::random(), SandboxId::random());
        let first = key.issue_bearer(id, NOW);
        let second = key.issue_bearer(id, NOW + Duration::from_secs(60));
        assert_ne!(first, second);
        assert_eq!(key.read_bearer(&first.token, NOW + Duration::from_secs(61)), Ok(id));
    }

    #[test]
    fn another_installations_token_and_a_changed_one_open_nothing() {
        let (key, id) = (InstallKey::random(), SandboxId::random());
        let token = key.issue_bearer(id, NOW).token;
        assert_eq!(InstallKey::random().read_bearer(&token, NOW), Err(BearerError::Invalid));
        let others = key.issue_bearer(SandboxId::random(), NOW).token;
        let (signature, claims) = (token.rsplit('.').next().unwrap(), others.rsplit_once('.').unwrap().0);
        for forged in [format!("{claims}.{signature}"), token[..token.len() - 2].to_owned(), format!("{}.", claims), claims.to_owned()] {
            assert_eq!(key.read_bearer(&forged, NOW), Err(BearerError::Invalid), "{forged}");
        }
    }

    #[test]
    fn somebody_elses_jwt_and_an_api_key_are_no_tokens_of_ours() {
        for text in ["eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl", "e2b_00", "", "a.b.c"] {
            assert!(!is_bearer(text), "{text}");
        }
    }
}
