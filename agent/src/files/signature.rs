//! Signatures of file URLs: who has the sandbox's token can let others read or write one path without it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use sha2::{Digest, Sha256};

use crate::auth::secrets_equal;

/// What a signed URL allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Read,
    Write,
}

/// What is signed: path and user exactly as they stand in the query, empty where they do not.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Claim<'a> {
    pub(crate) path: &'a str,
    pub(crate) operation: Operation,
    pub(crate) username: &'a str,
    pub(crate) expiration_unix: Option<i64>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum SignatureError {
    #[error("missing signature query parameter")]
    Missing,
    #[error("invalid signature")]
    Invalid,
    #[error("signature is already expired")]
    Expired,
}

impl Claim<'_> {
    /// Checks the signature first: the expiry of a claim nobody signed means nothing.
    pub(crate) fn verify(self, signature: Option<&str>, token: &str, now_unix: i64) -> Result<(), SignatureError> {
        let signature = signature.ok_or(SignatureError::Missing)?;
        if !secrets_equal(signature.as_bytes(), self.sign(token).as_bytes()) {
            return Err(SignatureError::Invalid);
        }
        match self.expiration_unix {
            Some(expiration) if expiration < now_unix => Err(SignatureError::Expired),
            _ => Ok(()),
        }
    }

    fn sign(self, token: &str) -> String {
        let operation = match self.operation {
            Operation::Read => "read",
            Operation::Write => "write",
        };
        let mut signed = format!("{}:{operation}:{}:{token}", self.path, self.username);
        if let Some(expiration) = self.expiration_unix {
            signed.push_str(&format!(":{expiration}"));
        }
        format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(signed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0";
    const SIGNATURE: &str = "v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E";
    const CLAIM: Claim<'_> = Claim { path: "hello.txt", operation: Operation::Read, username: "user", expiration_unix: None };

    #[test]
    fn the_contracts_vector_verifies() {
        assert_eq!(CLAIM.verify(Some(SIGNATURE), TOKEN, 0), Ok(()));
    }

    #[test]
    fn every_part_of_the_claim_is_signed() {
        let others = [
            Claim { path: "hello", ..CLAIM },
            Claim { operation: Operation::Write, ..CLAIM },
            Claim { username: "", ..CLAIM },
            Claim { expiration_unix: Some(i64::MAX), ..CLAIM },
        ];
        for other in others {
            assert_eq!(other.verify(Some(SIGNATURE), TOKEN, 0), Err(SignatureError::Invalid));
        }
        assert_eq!(CLAIM.verify(Some(SIGNATURE), "other", 0), Err(SignatureError::Invalid));
        assert_eq!(CLAIM.verify(Some(&SIGNATURE[..20]), TOKEN, 0), Err(SignatureError::Invalid));
        assert_eq!(CLAIM.verify(None, TOKEN, 0), Err(SignatureError::Missing));
    }

    #[test]
    fn an_expiry_counts_once_the_signature_matches() {
        let claim = Claim { expiration_unix: Some(100), ..CLAIM };
        let signature = claim.sign(TOKEN);
        assert_eq!(claim.verify(Some(&signature), TOKEN, 100), Ok(()));
        assert_eq!(claim.verify(Some(&signature), TOKEN, 101), Err(SignatureError::Expired));
        assert_eq!(claim.verify(Some("v1_"), TOKEN, 101), Err(SignatureError::Invalid));
    }
}
