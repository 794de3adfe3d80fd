//! `stillbox env`: shell assignments that point an unmodified SDK at this server.

use super::Outcome;
use super::client::{ClientError, base_url};
use crate::config::Config;
use clap::{Args, ValueEnum};
use std::process::ExitCode;

/// Which SDK the assignments are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Sdk {
    /// Python `e2b`, JS `e2b`, the code interpreters and E2B's CLI.
    E2b,
    /// Python and JS `novita-sandbox`, 1.x and 2.x.
    Novita,
    /// Python `hopx-ai` and JS `@hopx-ai/sdk`.
    Hopx,
}

#[derive(Debug, Args)]
pub(super) struct EnvArguments {
    /// The SDK
    #[arg(long, value_enum, default_value = "e2b")]
    sdk: Sdk,
}

pub(super) fn run(config: &Config, arguments: &EnvArguments) -> Outcome {
    let assignments = match arguments.sdk {
        Sdk::E2b => e2b(config)?,
        Sdk::Novita => novita(config)?,
        Sdk::Hopx => hopx(config)?,
    };
    for (name, value) in assignments.into_iter().chain(trust(config)) {
        println!("export {name}={}", quoted(&value));
    }
    Ok(ExitCode::SUCCESS)
}

type Assignment = (&'static str, String);

fn key(config: &Config) -> Result<String, ClientError> {
    let key_file = config.data_dir.join("api_key");
    match &config.api_key {
        Some(key) => Ok(key.0.clone()),
        None => Ok(std::fs::read_to_string(&key_file).map_err(|source| ClientError::NoKey { path: key_file, source })?.trim().to_owned()),
    }
}

/// Where TLS libraries look for CAs: Python's ssl and httpx, requests, curl and git take a bundle of the system's and
/// ours; Node adds the one CA to its own.
fn trust(config: &Config) -> [Assignment; 5] {
    let bundle = config.data_dir.join("tls/bundle.pem").display().to_string();
    let ca = config.data_dir.join("tls/ca.pem").display().to_string();
    [
        ("SSL_CERT_FILE", bundle.clone()),
        ("REQUESTS_CA_BUNDLE", bundle.clone()),
        ("CURL_CA_BUNDLE", bundle.clone()),
        ("GIT_SSL_CAINFO", bundle),
        ("NODE_EXTRA_CA_CERTS", ca),
    ]
}

/// What Novita's SDKs read (contract/novita.md A1). Only 2.x knows a URL for the API; everything else, and all of 1.x, goes
/// by the domain, over HTTPS. A URL for sandboxes would leave ports and the code interpreter out.
fn novita(config: &Config) -> Result<Vec<Assignment>, ClientError> {
    Ok(vec![("NOVITA_API_KEY", key(config)?), ("NOVITA_DOMAIN", config.domain.clone()), ("NOVITA_API_URL", base_url(config))])
}

/// What HopX's SDKs read; they append `/v1` themselves.
fn hopx(config: &Config) -> Result<Vec<Assignment>, ClientError> {
    Ok(vec![("HOPX_API_KEY", key(config)?), ("HOPX_BASE_URL", base_url(config))])
}

/// What E2B's SDKs read (contract/e2b.md 1.1).
fn e2b(config: &Config) -> Result<Vec<Assignment>, ClientError> {
    let key = key(config)?;
    let is_e2b_form =
        key.strip_prefix("e2b_").is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')));
    let base = base_url(config);
    let mut assignments = vec![
        ("E2B_API_KEY", key),
        ("E2B_DOMAIN", config.domain.clone()),
        ("E2B_API_URL", base.clone()),
        ("E2B_SANDBOX_URL", base.clone()),
        ("E2B_VOLUME_API_URL", base),
    ];
    if !is_e2b_form {
        assignments.push(("E2B_VALIDATE_API_KEY", "false".to_owned()));
    }
    Ok(assignments)
}

/// In single quotes, good for every POSIX shell.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ApiKey;

    #[test]
    fn a_key_that_old_sdks_would_refuse_turns_their_check_off() {
        let mut config = Config { api_key: Some(ApiKey("a-key-of-my-own-choice".into())), ..Config::default() };
        assert!(e2b(&config).unwrap().contains(&("E2B_VALIDATE_API_KEY", "false".to_owned())));
        config.api_key = Some(ApiKey("e2b_00ff".into()));
        assert!(!e2b(&config).unwrap().iter().any(|(name, _)| *name == "E2B_VALIDATE_API_KEY"));
    }

    #[test]
    fn values_are_quoted_for_the_shell() {
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
