//! A create request, parsed once: from E2B's JSON to the core's specification.

use super::super::ApiState;
use super::super::error::ApiError;
use super::{ask, network, wire};
use crate::model::{AutoResume, Keep, Lifecycle, NetworkPolicy, OnTimeout, SandboxSpec, Secure, VolumeMount};
use crate::template::Resolved;
use std::collections::BTreeMap;
use std::time::Duration;

/// Pairs of metadata and of environment variables, each.
const PAIRS_MAX: usize = 1024;
/// Volumes of one sandbox.
const MOUNTS_MAX: usize = 64;

/// Which of the two create calls it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::api) enum Version {
    /// `POST /sandboxes`: 15 s unless said otherwise, secure when asked for.
    One,
    /// `POST /v2/sandboxes`: 300 s, always secure.
    Two,
}

impl Version {
    const fn default_timeout(self) -> i64 {
        match self {
            Self::One => 15,
            Self::Two => 300,
        }
    }

    const fn secure(self, asked: Option<bool>) -> Secure {
        match (self, asked) {
            (Self::Two, _) | (Self::One, Some(true)) => Secure::Token,
            (Self::One, None | Some(false)) => Secure::Open,
        }
    }
}

/// A checked request, whose template is still a name.
#[derive(Debug)]
pub(in crate::api) struct Wanted {
    /// Id, alias or `team/alias`, with or without `:tag`.
    pub(in crate::api) template: String,
    /// What a dialect may still change.
    pub(in crate::api) lifecycle: Lifecycle,
    network: NetworkPolicy,
    metadata: BTreeMap<String, String>,
    env: BTreeMap<String, String>,
    secure: Secure,
    /// Volumes by name, and paths.
    mounts: Vec<(String, String)>,
}

impl Wanted {
    /// Checks everything that can be checked without asking anybody.
    pub(in crate::api) fn parse(new: wire::NewSandbox, version: Version, timeout_max: Duration) -> Result<Self, ApiError> {
        refuse_unserved(&new)?;
        let lifecycle = lifecycle(&new, version, timeout_max)?;
        let secure = version.secure(new.secure);
        Ok(Self {
            template: new.template_id,
            lifecycle,
            network: network::policy(new.network, new.allow_internet_access, secure)?,
            metadata: pairs("metadata", new.metadata)?,
            env: environment(new.env_vars)?,
            secure,
            mounts: mounts(new.volume_mounts)?,
        })
    }

    /// The specification, once template and volumes are known.
    pub(in crate::api) async fn resolved(self, state: &ApiState) -> Result<SandboxSpec, ApiError> {
        let resolved = state.templates.resolve(&self.template).await?;
        let volumes = state.volumes.mounts(&self.mounts).await?;
        Ok(self.of(&resolved, volumes))
    }

    fn of(self, resolved: &Resolved, volumes: Vec<VolumeMount>) -> SandboxSpec {
        SandboxSpec {
            template: resolved.template.id,
            build: resolved.build.id,
            alias: display_name(&self.template, resolved),
            lifecycle: self.lifecycle,
            resources: resolved.build.resources,
            network: self.network,
            metadata: self.metadata,
            env: self.env,
            secure: self.secure,
            volumes,
        }
    }
}

/// The alias that was asked for, or the template's first when it was asked for by id.
fn display_name(asked: &str, resolved: &Resolved) -> Option<String> {
    let aliases = &resolved.template.aliases;
    let bare = asked.rsplit('/').next().and_then(|name| name.split(':').next()).unwrap_or_default();
    aliases.iter().find(|alias| *alias == bare).or_else(|| aliases.first()).cloned()
}

fn lifecycle(new: &wire::NewSandbox, version: Version, timeout_max: Duration) -> Result<Lifecycle, ApiError> {
    let pauses = new.auto_pause == Some(true);
    let wakes = new.auto_resume.as_ref().is_some_and(|auto_resume| auto_resume.enabled);
    let keep = match new.auto_pause_memory {
        None | Some(true) => Keep::Memory,
        Some(false) if !pauses => return Err(ApiError::bad_request("autoPauseMemory is false, which needs autoPause to be true")),
        Some(false) if wakes => {
            return Err(ApiError::bad_request("autoPauseMemory is false, which excludes autoResume: traffic does not cold-boot a sandbox"));
        }
        Some(false) => Keep::FilesOnly,
    };
    Ok(Lifecycle {
        timeout: ask::lifetime(new.timeout.unwrap_or(version.default_timeout()), timeout_max)?,
        on_timeout: if pauses { OnTimeout::Pause(keep) } else { OnTimeout::Kill },
        auto_resume: if wakes { AutoResume::On } else { AutoResume::Off },
        idle_max: None,
        run_max: None,
    })
}

fn mounts(asked: Option<Vec<wire::VolumeMount>>) -> Result<Vec<(String, String)>, ApiError> {
    let asked = asked.unwrap_or_default();
    match asked.len() {
        0..=MOUNTS_MAX => Ok(asked.into_iter().map(|mount| (mount.name, mount.path)).collect()),
        count => Err(ApiError::bad_request(format!("invalid mounts: volumeMounts has {count} entries; the limit is {MOUNTS_MAX}"))),
    }
}

fn refuse_unserved(new: &wire::NewSandbox) -> Result<(), ApiError> {
    if new.iam.as_ref().and_then(|iam| iam.tokens.as_ref()).is_some_and(|tokens| !tokens.is_empty()) {
        return Err(ApiError::bad_request("iam.tokens is set; this server issues no workload identities"));
    }
    Ok(())
}

fn pairs(field: &str, pairs: Option<BTreeMap<String, String>>) -> Result<BTreeMap<String, String>, ApiError> {
    let pairs = pairs.unwrap_or_default();
    match pairs.len() {
        0..=PAIRS_MAX => Ok(pairs),
        count => Err(ApiError::bad_request(format!("{field} has {count} entries; the limit is {PAIRS_MAX}"))),
    }
}

/// What execve takes: names without `=`, and no NUL anywhere.
fn environment(variables: Option<BTreeMap<String, String>>) -> Result<BTreeMap<String, String>, ApiError> {
    let variables = pairs("envVars", variables)?;
    let is_bad = |(name, value): &(&String, &String)| name.is_empty() || name.contains(['=', '\0']) || value.contains('\0');
    match variables.iter().find(is_bad) {
        Some((name, _)) => {
            let shown = name.escape_debug();
            Err(ApiError::bad_request(format!(
                "envVars has the variable '{shown}'; names must not be empty or contain '=' or NUL, values no NUL"
            )))
        }
        None => Ok(variables),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_secs(86400);

    fn parse(json: serde_json::Value, version: Version) -> Result<Wanted, String> {
        let new = serde_json::from_value(json).unwrap();
        Wanted::parse(new, version, MAX).map_err(|error| error.code_and_message().1.to_owned())
    }

    #[test]
    fn pythons_minimal_request_is_read_as_it_is_sent() {
        let wanted = parse(
            serde_json::json!({"templateID":"base","timeout":300,"secure":true,"allow_internet_access":true,"metadata":{},"envVars":{}}),
            Version::One,
        )
        .unwrap();
        assert_eq!((wanted.template.as_str(), wanted.secure), ("base", Secure::Token));
        let lifecycle = Lifecycle::of(Duration::from_secs(300));
        assert_eq!(wanted.lifecycle, lifecycle);
        assert_eq!(wanted.network.allow_internet_access, Some(true));
    }

    #[test]
    fn the_two_versions_differ_in_timeout_and_security() {
        let (one, two) = (
            parse(serde_json::json!({"templateID":"b"}), Version::One).unwrap(),
            parse(serde_json::json!({"templateID":"b"}), Version::Two).unwrap(),
        );
        assert_eq!((one.lifecycle.timeout.as_secs(), one.secure), (15, Secure::Open));
        assert_eq!((two.lifecycle.timeout.as_secs(), two.secure), (300, Secure::Token));
    }

    #[test]
    fn the_lifecycle_options_map_onto_the_core() {
        let full =
            parse(serde_json::json!({"templateID":"b","autoPause":true,"autoResume":{"enabled":true}}), Version::Two).unwrap().lifecycle;
        assert_eq!((full.on_timeout, full.auto_resume), (OnTimeout::Pause(Keep::Memory), AutoResume::On));
        let files = parse(serde_json::json!({"templateID":"b","autoPause":true,"autoPauseMemory":false}), Version::Two).unwrap().lifecycle;
        assert_eq!(files.on_timeout, OnTimeout::Pause(Keep::FilesOnly));
    }

    #[test]
    fn what_contradicts_itself_or_is_not_there_is_refused_by_field() {
        let refused = |json| parse(json, Version::One).unwrap_err();
        assert_eq!(
            refused(serde_json::json!({"templateID":"b","timeout":0})),
            "Timeout must be greater than 0, not 0 (timeout, in seconds)"
        );
        assert!(refused(serde_json::json!({"templateID":"b","timeout":86401})).contains("86400"));
        assert!(refused(serde_json::json!({"templateID":"b","autoPauseMemory":false})).starts_with("autoPauseMemory is false"));
        let both = serde_json::json!({"templateID":"b","autoPause":true,"autoPauseMemory":false,"autoResume":{"enabled":true}});
        assert!(refused(both).contains("excludes autoResume"));
        let mounts: Vec<_> = (0..65).map(|n| serde_json::json!({"name":"v","path":format!("/{n}")})).collect();
        assert!(refused(serde_json::json!({"templateID":"b","volumeMounts":mounts})).starts_with("invalid mounts: volumeMounts has 65"));
        assert!(refused(serde_json::json!({"templateID":"b","envVars":{"A=B":"c"}})).contains("'A=B'"));
        assert!(refused(serde_json::json!({"templateID":"b","envVars":{"A":"\u{0}"}})).contains("'A'"));
    }
}
