//! Tokens are HMAC-SHA-256(install key, kind ‖ 0 ‖ id): recomputable, never stored, the same for a sandbox's whole life.

use crate::model::SandboxId;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use std::fmt;

/// The secret of this data folder that every token is derived from. Kept 0600 beside the store; losing it changes
/// every token.
#[derive(Clone)]
pub struct InstallKey([u8; 32]);

impl fmt::Debug for InstallKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InstallKey(…)")
    }
}

/// What a token opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// envd calls of one sandbox (`X-Access-Token`).
    EnvdAccess,
    /// User ports of one sandbox (`e2b-traffic-access-token`).
    TrafficAccess,
}

impl TokenKind {
    const fn label(self) -> &'static [u8] {
        match self {
            Self::EnvdAccess => b"envd-access",
            Self::TrafficAccess => b"traffic-access",
        }
    }
}

impl InstallKey {
    /// A new key from the kernel's random generator.
    pub fn random() -> Self {
        let mut key = [0u8; 32];
        getrandom::fill(&mut key).expect("the kernel's random generator always answers on Linux >= 5.19");
        Self(key)
    }

    /// The key with these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes, for the key's file.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The token: 64 hex characters.
    pub fn token(&self, kind: TokenKind, id: SandboxId) -> String {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.update(kind.label());
        mac.update(&[0]);
        mac.update(id.as_str().as_bytes());
        hex::encode(mac.finalize().into_bytes())
    }

    /// A signature of this text, for links that carry no key: 64 hex characters.
    pub fn sign(&self, purpose: &str, text: &str) -> String {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.update(purpose.as_bytes());
        mac.update(&[0]);
        mac.update(text.as_bytes());
        hex::encode(mac.finalize().into_bytes())
    }

    /// Whether `given` is that signature, in time that does not depend on where they differ.
    pub fn is_signed(&self, purpose: &str, text: &str, given: &str) -> bool {
        is_same(&self.sign(purpose, text), given)
    }

    /// Signs a bearer token's head. The key is derived, so that no signature is ever a token of another kind.
    pub(super) fn sign_bearer(&self, signed: &[u8]) -> [u8; 32] {
        self.bearer_mac(signed).finalize().into_bytes().into()
    }

    /// Whether that is the signature, in constant time.
    pub(super) fn has_signed_bearer(&self, signed: &[u8], signature: &[u8]) -> bool {
        self.bearer_mac(signed).verify_slice(signature).is_ok()
    }

    fn bearer_mac(&self, signed: &[u8]) -> Hmac<Sha256> {
        let mut derive = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        derive.update(b"bearer-signing");
        let mut mac = Hmac::<Sha256>::new_from_slice(&derive.finalize().into_bytes()).expect("HMAC takes keys of any length");
        mac.update(signed);
        mac
    }

    /// Whether `given` is the token, in time that does not depend on where they differ.
    pub fn accepts(&self, kind: TokenKind, id: SandboxId, given: &str) -> bool {
        is_same(&self.token(kind, id), given)
    }
}

fn is_same(wanted: &str, given: &str) -> bool {
    wanted.len() == given.len() && wanted.bytes().zip(given.bytes()).fold(0, |diff, (a, b)| diff | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_stable_and_differs_by_kind_sandbox_and_key() {
        let (key, id) = (InstallKey::from_bytes([7; 32]), SandboxId::random());
        let token = key.token(TokenKind::EnvdAccess, id);
        assert_eq!(token, key.token(TokenKind::EnvdAccess, id));
        assert_ne!(token, key.token(TokenKind::TrafficAccess, id));
        assert_ne!(token, key.token(TokenKind::EnvdAccess, SandboxId::random()));
        assert_ne!(token, InstallKey::from_bytes([8; 32]).token(TokenKind::EnvdAccess, id));
        assert!(key.accepts(TokenKind::EnvdAccess, id, &token));
        assert!(!key.accepts(TokenKind::EnvdAccess, id, &token[1..]));
    }
}
