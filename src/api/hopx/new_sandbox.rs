//! A create request, parsed once: from HopX's JSON to the core's specification.

use super::ask;
use super::error::HopxError;
use super::wire;
use crate::model::{Lifecycle, NetworkPolicy, SandboxSpec, Secure};
use crate::template::Resolved;
use std::collections::BTreeMap;
use std::time::Duration;

/// Environment variables of one sandbox.
const VARIABLES_MAX: usize = 1024;

/// A checked request, whose template is still a name.
#[derive(Debug)]
pub(super) struct Wanted {
    /// Name or id.
    pub(super) template: String,
    timeout: Duration,
    internet_access: Option<bool>,
    env: BTreeMap<String, String>,
}

impl Wanted {
    /// Checks everything that can be checked without asking anybody. Without `timeout_seconds` it lives as long as this
    /// server lets anything live.
    pub(super) fn parse(new: wire::NewSandbox, timeout_max: Duration) -> Result<Self, HopxError> {
        let named = new.template_name.or(new.template_id).filter(|name| !name.is_empty());
        Ok(Self {
            template: named.ok_or_else(|| HopxError::invalid("template_name or template_id is required"))?,
            timeout: new.timeout_seconds.map_or(Ok(timeout_max), |seconds| ask::lifetime(seconds, timeout_max))?,
            internet_access: new.internet_access,
            env: environment(new.env_vars.unwrap_or_default())?,
        })
    }

    /// The specification, now that the template is known. Traffic wakes no paused one: HopX's clients ask for it.
    pub(super) fn of(self, resolved: &Resolved) -> SandboxSpec {
        let aliases = &resolved.template.aliases;
        SandboxSpec {
            template: resolved.template.id,
            build: resolved.build.id,
            alias: aliases.iter().find(|alias| **alias == self.template).or_else(|| aliases.first()).cloned(),
            lifecycle: Lifecycle::of(self.timeout),
            resources: resolved.build.resources,
            network: NetworkPolicy { allow_internet_access: self.internet_access, ..NetworkPolicy::default() },
            metadata: BTreeMap::new(),
            env: self.env,
            secure: Secure::Token,
            volumes: Vec::new(),
        }
    }
}

/// What execve takes: names without `=`, and no NUL anywhere.
fn environment(variables: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, HopxError> {
    if variables.len() > VARIABLES_MAX {
        return Err(HopxError::invalid(format!("env_vars has {} entries; the limit is {VARIABLES_MAX}", variables.len())));
    }
    let is_bad = |(name, value): &(&String, &String)| name.is_empty() || name.contains(['=', '\0']) || value.contains('\0');
    match variables.iter().find(is_bad) {
        Some((name, _)) => Err(HopxError::invalid(format!(
            "env_vars has the variable '{}'; names must not be empty or contain '=' or NUL, values no NUL",
            name.escape_debug()
        ))),
        None => Ok(variables),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_secs(86400);

    fn parse(json: serde_json::Value) -> Result<Wanted, String> {
        Wanted::parse(serde_json::from_value(json).unwrap(), MAX).map_err(|error| error.status_and_message().1.to_owned())
    }

    #[test]
    fn a_name_or_an_id_is_enough() {
        let by_name = parse(serde_json::json!({"template_name": "code-interpreter"})).unwrap();
        assert_eq!((by_name.template.as_str(), by_name.timeout), ("code-interpreter", MAX));
        let full = serde_json::json!({"template_id": "291", "region": "us-east", "timeout_seconds": 600, "internet_access": false, "env_vars": {"A": "1"}});
        let by_id = parse(full).unwrap();
        assert_eq!((by_id.template.as_str(), by_id.timeout.as_secs(), by_id.internet_access), ("291", 600, Some(false)));
    }

    #[test]
    fn what_is_missing_or_out_of_range_is_named() {
        let refused = |json| parse(json).unwrap_err();
        assert!(refused(serde_json::json!({})).starts_with("template_name or template_id"));
        assert_eq!(
            refused(serde_json::json!({"template_name": "b", "timeout_seconds": 0})),
            "timeout_seconds is 0; it must be greater than 0"
        );
        assert!(refused(serde_json::json!({"template_name": "b", "timeout_seconds": 86401})).contains("86400"));
        assert!(refused(serde_json::json!({"template_name": "b", "env_vars": {"A=B": "c"}})).contains("'A=B'"));
    }
}
