//! What requests name: sandboxes in paths, values in queries. Errors name parameter, value and limit.

use super::super::ApiState;
use super::super::error::ApiError;
use crate::model::SandboxId;
use axum::extract::{FromRequestParts, Path};
use http::request::Parts;
use std::time::Duration;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// The `{id}` of the path: a sandbox id, or one with `-clientID`.
#[derive(Debug)]
pub(in crate::api) struct SandboxPath(pub(in crate::api) SandboxId);

impl FromRequestParts<ApiState> for SandboxPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &ApiState) -> Result<Self, ApiError> {
        let Segment(text) = Segment::from_request_parts(parts, state).await?;
        sandbox_id(&text).map(Self)
    }
}

/// The `{…}` of the path, percent-decoded.
#[derive(Debug)]
pub(in crate::api) struct Segment(pub(in crate::api) String);

impl FromRequestParts<ApiState> for Segment {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &ApiState) -> Result<Self, ApiError> {
        let text = Path::<String>::from_request_parts(parts, state).await;
        text.map(|Path(text)| Self(text)).map_err(|error| ApiError::bad_request(format!("the path is malformed: {}", error.body_text())))
    }
}

/// The sandbox with this id, `-clientID` stripped. What has the form of an id and can be none of ours does not exist.
pub(in crate::api) fn sandbox_id(text: &str) -> Result<SandboxId, ApiError> {
    let (id, client) = text.split_once('-').map_or((text, None), |(id, client)| (id, Some(client)));
    let is_word = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    match is_word(id) && client.is_none_or(is_word) {
        true => id.parse().map_err(|_| no_such_sandbox(id)),
        false => Err(ApiError::bad_request("Invalid sandbox ID")),
    }
}

/// E2B's words for it.
pub(in crate::api) fn no_such_sandbox(id: impl std::fmt::Display) -> ApiError {
    ApiError::not_found(format!("Sandbox \"{id}\" doesn't exist or you don't have access to it"))
}

/// The query string, decoded once.
#[derive(Debug)]
pub(in crate::api) struct Query(Vec<(String, String)>);

impl FromRequestParts<ApiState> for Query {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &ApiState) -> Result<Self, Self::Rejection> {
        Ok(Self::of(parts.uri.query().unwrap_or_default()))
    }
}

impl Query {
    pub(in crate::api) fn of(text: &str) -> Self {
        Self(form_urlencoded::parse(text.as_bytes()).into_owned().collect())
    }

    /// The first value of this name; an empty one counts as absent.
    pub(in crate::api) fn get(&self, name: &str) -> Option<&str> {
        self.all(name).next()
    }

    /// The values of this name, whether they came apart or joined by commas.
    pub(in crate::api) fn listed<'q>(&'q self, name: &str) -> impl Iterator<Item = &'q str> {
        self.all(name).flat_map(|value| value.split(',')).map(str::trim).filter(|value| !value.is_empty())
    }

    fn all<'q>(&'q self, name: &str) -> impl Iterator<Item = &'q str> {
        self.0.iter().filter(move |(key, value)| key == name && !value.is_empty()).map(|(_, value)| value.as_str())
    }

    /// A number from 1 to `max`, which is the default too.
    pub(in crate::api) fn limit(&self, max: u32) -> Result<u32, ApiError> {
        let Some(text) = self.get("limit") else { return Ok(max) };
        match text.parse() {
            Ok(limit) if (1..=max).contains(&limit) => Ok(limit),
            Ok(_) | Err(_) => Err(ApiError::bad_request(format!("limit is '{text}'; it must be a number from 1 to {max}"))),
        }
    }

    /// A moment in units of `unit_ns` since 1970.
    pub(in crate::api) fn moment(&self, name: &str, unit: Unit) -> Result<Option<OffsetDateTime>, ApiError> {
        let parse = |text: &str| {
            let count: i64 = text.parse().ok()?;
            OffsetDateTime::from_unix_timestamp_nanos(i128::from(count) * unit.nanoseconds()).ok()
        };
        self.get(name)
            .map(|text| {
                parse(text)
                    .ok_or_else(|| ApiError::bad_request(format!("{name} is '{text}'; it must be a time in {} since 1970", unit.name())))
            })
            .transpose()
    }
}

/// What a moment is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::api) enum Unit {
    Seconds,
    Milliseconds,
}

impl Unit {
    const fn nanoseconds(self) -> i128 {
        match self {
            Self::Seconds => 1_000_000_000,
            Self::Milliseconds => 1_000_000,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Seconds => "seconds",
            Self::Milliseconds => "milliseconds",
        }
    }
}

/// An RFC 3339 time; a `+` that arrived unescaped has become a space.
pub(in crate::api) fn rfc3339(name: &str, text: &str) -> Result<OffsetDateTime, ApiError> {
    OffsetDateTime::parse(&text.replace(' ', "+"), &Rfc3339)
        .map_err(|_| ApiError::bad_request(format!("{name} is '{text}'; it must be a time such as 2026-01-02T03:04:05Z (RFC 3339)")))
}

/// A time to live that starts something: more than nothing.
pub(in crate::api) fn lifetime(seconds: i64, max: Duration) -> Result<Duration, ApiError> {
    match seconds {
        ..=0 => Err(ApiError::bad_request(format!("Timeout must be greater than 0, not {seconds} (timeout, in seconds)"))),
        1.. => end_of_life(seconds, max),
    }
}

/// A time to live that may be over at once.
pub(in crate::api) fn end_of_life(seconds: i64, max: Duration) -> Result<Duration, ApiError> {
    let asked = u64::try_from(seconds).map(Duration::from_secs);
    match asked {
        Ok(asked) if asked <= max => Ok(asked),
        Ok(_) => Err(ApiError::bad_request(format!(
            "Timeout cannot be greater than {} seconds, not {seconds} (timeout; the limit is sandbox.timeout_max)",
            max.as_secs()
        ))),
        Err(_) => Err(ApiError::bad_request(format!("Timeout must be 0 or greater, not {seconds} (timeout, in seconds)"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(result: Result<impl std::fmt::Debug, ApiError>) -> (u16, String) {
        let error = result.unwrap_err();
        let (code, message) = error.code_and_message();
        (code, message.to_owned())
    }

    #[test]
    fn an_id_is_taken_with_and_without_its_client() {
        let id = SandboxId::random();
        assert_eq!(sandbox_id(&id.to_string()).unwrap(), id);
        assert_eq!(sandbox_id(&format!("{id}-6532622b")).unwrap(), id);
    }

    #[test]
    fn a_malformed_id_is_400_and_one_that_nobody_has_is_404() {
        for text in ["", "-", "a_b", "ABC", "a-b-c", "a-", "../x"] {
            assert_eq!(message(sandbox_id(text)), (400, "Invalid sandbox ID".to_owned()), "{text}");
        }
        assert_eq!(message(sandbox_id("nobody")), (404, "Sandbox \"nobody\" doesn't exist or you don't have access to it".to_owned()));
    }

    #[test]
    fn a_bad_timeout_is_refused_with_its_value_and_the_limit() {
        let max = Duration::from_secs(86400);
        assert_eq!(lifetime(300, max).unwrap(), Duration::from_secs(300));
        assert_eq!(message(lifetime(0, max)).1, "Timeout must be greater than 0, not 0 (timeout, in seconds)");
        assert_eq!(
            message(lifetime(86401, max)).1,
            "Timeout cannot be greater than 86400 seconds, not 86401 (timeout; the limit is sandbox.timeout_max)"
        );
        assert_eq!(end_of_life(0, max).unwrap(), Duration::ZERO);
        assert_eq!(message(end_of_life(-1, max)).0, 400);
    }

    #[test]
    fn a_limit_out_of_range_names_value_and_range() {
        assert_eq!(Query::of("").limit(100).unwrap(), 100);
        assert_eq!(Query::of("limit=1").limit(100).unwrap(), 1);
        for text in ["0", "101", "-1", "x", "1.5"] {
            let refused = message(Query::of(&format!("limit={text}")).limit(100));
            assert_eq!(refused, (400, format!("limit is '{text}'; it must be a number from 1 to 100")));
        }
    }

    #[test]
    fn times_come_in_seconds_milliseconds_and_text() {
        let query = Query::of("start=10&cursor=10500&bad=tomorrow");
        assert_eq!(query.moment("start", Unit::Seconds).unwrap(), Some(OffsetDateTime::UNIX_EPOCH + Duration::from_secs(10)));
        assert_eq!(query.moment("cursor", Unit::Milliseconds).unwrap(), Some(OffsetDateTime::UNIX_EPOCH + Duration::from_millis(10500)));
        assert_eq!(query.moment("absent", Unit::Seconds).unwrap(), None);
        assert_eq!(message(query.moment("bad", Unit::Seconds)).1, "bad is 'tomorrow'; it must be a time in seconds since 1970");
        assert_eq!(rfc3339("t", "1970-01-01T01:00:00 01:00").unwrap(), OffsetDateTime::UNIX_EPOCH);
        assert_eq!(message(rfc3339("startedAfter", "x")).0, 400);
    }
}
