//! Who calls: whether a request comes from one of Novita's SDKs.

use http::{HeaderMap, header};

/// Python's and JavaScript's in all versions, and the command line under its Novita name.
const USER_AGENT: &str = "novita-sandbox";

/// Whether the headers name a Novita SDK. Everything that Novita alone does with a call depends on it: the metadata of
/// other clients stays free text.
pub(in crate::api) fn is_spoken_in(headers: &HeaderMap) -> bool {
    let agent = headers.get(header::USER_AGENT).and_then(|agent| agent.to_str().ok());
    headers.contains_key("x-novita-sdk-name") || agent.is_some_and(|agent| agent.starts_with(USER_AGENT))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &'static str, value: &'static str) -> bool {
        is_spoken_in(&HeaderMap::from_iter([(http::HeaderName::from_static(name), http::HeaderValue::from_static(value))]))
    }

    #[test]
    fn every_version_of_the_sdks_is_known_by_its_headers_and_nobody_else_is() {
        assert!(named("user-agent", "novita-sandbox-python-sdk/1.0.5"));
        assert!(named("user-agent", "novita-sandbox-sdk-js/2.1.1"));
        assert!(named("x-novita-sdk-name", "sdk_py"));
        assert!(!named("user-agent", "e2b-python-sdk/2.63.0"));
        assert!(!named("x-api-key", "novita-sandbox"));
    }
}
