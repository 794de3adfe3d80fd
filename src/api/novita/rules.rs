//! How long a sandbox lives, as Novita's clients say it: by fields, and by words in its metadata.
//!
//! | metadata | meaning |
//! |---|---|
//! | `auto_resume` = `true` | a request wakes it when it is paused |
//! | `idle_timeout` = seconds | its time is up, too, when nobody used it for so long; `0` = off |
//! | `long_running` = `true` | the longest run of Novita's sandboxes does not hold for it |
//!
//! The SDKs send `timeout: 300` when their user named none, so with `idle_timeout` or `long_running` that number means
//! "as long as a run may last": the idle timeout is to end it, or nothing.

use super::super::e2b::ask;
use super::super::error::ApiError;
use crate::model::{AutoResume, Lifecycle};
use std::collections::BTreeMap;
use std::time::Duration;

/// What the SDKs send when their user says nothing, and what a missing field means.
pub(super) const DEFAULT_TIMEOUT_S: i64 = 300;

/// The knobs of this dialect. Each has a key in config/stillbox.toml.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NovitaConfig {
    /// Longest run of a sandbox that is not `long_running`.
    pub run_max: Duration,
    /// Shortest `idle_timeout` that may be asked for.
    pub idle_timeout_min: Duration,
}

impl Default for NovitaConfig {
    fn default() -> Self {
        Self { run_max: Duration::from_secs(3600), idle_timeout_min: Duration::from_secs(60) }
    }
}

/// The server's bounds on lifetimes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds<'c> {
    pub(super) novita: &'c NovitaConfig,
    /// `sandbox.timeout_max`, which holds for every dialect.
    pub(super) timeout_max: Duration,
}

impl Bounds<'_> {
    /// A time to live that starts something, within what a sandbox with this longest run may ask for.
    pub(super) fn lifetime(&self, seconds: i64, run_max: Option<Duration>) -> Result<Duration, ApiError> {
        self.check(seconds, run_max)?;
        ask::lifetime(seconds, self.timeout_max)
    }

    /// A time to live that may be over at once, within the same bound.
    pub(super) fn end_of_life(&self, seconds: i64, run_max: Option<Duration>) -> Result<Duration, ApiError> {
        self.check(seconds, run_max)?;
        ask::end_of_life(seconds, self.timeout_max)
    }

    fn check(&self, seconds: i64, run_max: Option<Duration>) -> Result<(), ApiError> {
        let Some(max) = run_max.filter(|max| u64::try_from(seconds).is_ok_and(|seconds| seconds > max.as_secs())) else { return Ok(()) };
        Err(ApiError::bad_request(format!(
            "Timeout cannot be greater than {} seconds, not {seconds} (timeout; the limit is novita.run_max, which metadata long_running=true lifts)",
            max.as_secs()
        )))
    }
}

/// Puts what timeout and metadata of a create request say into its lifecycle.
pub(super) fn apply(
    lifecycle: &mut Lifecycle,
    timeout: Option<i64>,
    metadata: &BTreeMap<String, String>,
    bounds: Bounds<'_>,
) -> Result<(), ApiError> {
    let is_set = |word: &str| metadata.get(word).is_some_and(|value| value == "true");
    let (idle_max, is_long) = (idle_timeout(metadata, bounds.novita)?, is_set("long_running"));
    let run_max = (!is_long).then_some(bounds.novita.run_max);
    let asked = timeout.unwrap_or(DEFAULT_TIMEOUT_S);
    lifecycle.timeout = match asked {
        DEFAULT_TIMEOUT_S if is_long || idle_max.is_some() => run_max.unwrap_or(bounds.timeout_max).min(bounds.timeout_max),
        seconds => bounds.lifetime(seconds, run_max)?,
    };
    (lifecycle.idle_max, lifecycle.run_max) = (idle_max, run_max);
    if is_set("auto_resume") {
        lifecycle.auto_resume = AutoResume::On;
    }
    Ok(())
}

fn idle_timeout(metadata: &BTreeMap<String, String>, config: &NovitaConfig) -> Result<Option<Duration>, ApiError> {
    let Some(text) = metadata.get("idle_timeout") else { return Ok(None) };
    let seconds = text.trim().parse::<u64>().map(Duration::from_secs);
    match seconds {
        Ok(Duration::ZERO) => Ok(None),
        Ok(seconds) if seconds >= config.idle_timeout_min => Ok(Some(seconds)),
        Ok(_) | Err(_) => {
            let shown: String = text.chars().take(32).collect();
            Err(ApiError::bad_request(format!(
                "metadata idle_timeout is '{shown}'; it must be a number of seconds, at least {} (novita.idle_timeout_min), or 0 for none",
                config.idle_timeout_min.as_secs()
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_secs(86400);

    fn applied(timeout: Option<i64>, metadata: &[(&str, &str)]) -> Result<Lifecycle, String> {
        let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let mut lifecycle = Lifecycle::of(Duration::from_secs(1));
        let config = NovitaConfig::default();
        apply(&mut lifecycle, timeout, &metadata, Bounds { novita: &config, timeout_max: MAX })
            .map(|()| lifecycle)
            .map_err(|error| error.code_and_message().1.to_owned())
    }

    #[test]
    fn a_sandbox_lives_five_minutes_and_never_more_than_an_hour() {
        let lifecycle = applied(None, &[]).unwrap();
        assert_eq!((lifecycle.timeout.as_secs(), lifecycle.run_max, lifecycle.idle_max), (300, Some(Duration::from_secs(3600)), None));
        assert_eq!(applied(Some(3600), &[]).unwrap().timeout.as_secs(), 3600);
        assert!(applied(Some(3601), &[]).unwrap_err().contains("novita.run_max"));
        assert!(applied(Some(0), &[]).unwrap_err().contains("greater than 0"));
    }

    #[test]
    fn a_long_running_one_may_live_as_long_as_the_server_allows() {
        let lifecycle = applied(Some(300), &[("long_running", "true")]).unwrap();
        assert_eq!((lifecycle.timeout, lifecycle.run_max), (MAX, None));
        assert_eq!(applied(Some(7200), &[("long_running", "true")]).unwrap().timeout.as_secs(), 7200);
        assert!(applied(Some(7200), &[("long_running", "false")]).is_err());
    }

    #[test]
    fn an_idle_timeout_takes_the_place_of_the_default_timeout() {
        let lifecycle = applied(Some(300), &[("idle_timeout", "60")]).unwrap();
        assert_eq!((lifecycle.timeout.as_secs(), lifecycle.idle_max), (3600, Some(Duration::from_secs(60))));
        assert_eq!(applied(Some(120), &[("idle_timeout", "60")]).unwrap().timeout.as_secs(), 120);
        assert_eq!(applied(None, &[("idle_timeout", "0")]).unwrap().timeout.as_secs(), 300);
        for bad in ["59", "-1", "soon", ""] {
            assert!(applied(None, &[("idle_timeout", bad)]).unwrap_err().starts_with(&format!("metadata idle_timeout is '{bad}'")));
        }
    }

    #[test]
    fn auto_resume_is_a_word_in_the_metadata() {
        assert_eq!(applied(None, &[("auto_resume", "true")]).unwrap().auto_resume, AutoResume::On);
        assert_eq!(applied(None, &[("auto_resume", "yes")]).unwrap().auto_resume, AutoResume::Off);
    }
}
