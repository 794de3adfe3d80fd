//! `network.rules`: headers that are set on what a sandbox sends to a domain. Read from requests and shown in info,
//! there without their values: they are secrets, and no message here repeats one.

use super::super::error::ApiError;
use super::wire;
use crate::model::{EgressTarget, HeaderRule};
use http::header::{self, HeaderName, HeaderValue};
use std::collections::BTreeMap;

const DOMAINS_MAX: usize = 10;
const HEADERS_MAX: usize = 20;
const NAME_BYTES_MAX: usize = 64;
const VALUE_BYTES_MAX: usize = 2048;
/// In place of a value that nobody is shown.
const REDACTED: &str = "***";
/// What says where a message goes and where it ends: one of these would make the other end read another message.
const RESERVED: [HeaderName; 8] = [
    header::HOST,
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::CONNECTION,
    header::UPGRADE,
    header::TE,
    header::TRAILER,
    HeaderName::from_static("keep-alive"),
];

type Rules = BTreeMap<String, Vec<wire::NetworkRule>>;

/// The rules of a request by domain, in lower case.
pub(super) fn parse(rules: Rules) -> Result<BTreeMap<String, HeaderRule>, ApiError> {
    if rules.len() > DOMAINS_MAX {
        return Err(ApiError::bad_request(format!("network.rules has {} domains; the limit is {DOMAINS_MAX}", rules.len())));
    }
    let mut parsed = BTreeMap::new();
    for (key, rules) in rules {
        let shown: String = key.chars().take(128).collect();
        let domain = domain(&key).ok_or_else(|| {
            ApiError::bad_request(format!(
                "network.rules has the domain '{shown}'; it must be a DNS name such as api.example.com, or *.example.com"
            ))
        })?;
        let rule = rule(&shown, rules)?;
        if parsed.insert(domain, rule).is_some() {
            return Err(ApiError::bad_request(format!("network.rules has the domain '{shown}' twice; upper and lower case are the same")));
        }
    }
    Ok(parsed)
}

/// As they were set, with the names of headers and without their values.
pub(super) fn shown(rules: &BTreeMap<String, HeaderRule>) -> Rules {
    let rule = |rule: &HeaderRule| {
        let headers = rule.headers.keys().map(|name| (name.clone(), REDACTED.to_owned())).collect();
        vec![wire::NetworkRule { transform: Some(wire::NetworkTransform { headers: Some(headers) }) }]
    };
    rules.iter().map(|(domain, headers)| (domain.clone(), rule(headers))).collect()
}

/// `*.com` is a rule's domain, too, although nobody can be allowed to go there.
fn domain(key: &str) -> Option<String> {
    let key = key.trim();
    let sample = key.strip_prefix("*.").map_or_else(|| key.to_owned(), |below| format!("a.{below}"));
    match sample.parse() {
        Ok(EgressTarget::Domain(_)) => Some(key.to_ascii_lowercase()),
        Ok(EgressTarget::Block { .. }) | Err(_) => None,
    }
}

fn rule(domain: &str, mut rules: Vec<wire::NetworkRule>) -> Result<HeaderRule, ApiError> {
    if rules.len() > 1 {
        return Err(ApiError::bad_request(format!("network.rules['{domain}'] has {} rules; a domain has one", rules.len())));
    }
    let headers = rules.pop().and_then(|rule| rule.transform?.headers).unwrap_or_default();
    if headers.len() > HEADERS_MAX {
        return Err(ApiError::bad_request(format!("network.rules['{domain}'] sets {} headers; the limit is {HEADERS_MAX}", headers.len())));
    }
    for (name, value) in &headers {
        check_header(domain, name, value)?;
    }
    Ok(HeaderRule { headers })
}

fn check_header(domain: &str, name: &str, value: &str) -> Result<(), ApiError> {
    let shown: String = name.chars().take(NAME_BYTES_MAX).collect();
    let refuse = |what: String| Err(ApiError::bad_request(format!("network.rules['{domain}']: header '{shown}' {what}")));
    if name.len() > NAME_BYTES_MAX {
        return refuse(format!("has a name of {} bytes; the limit is {NAME_BYTES_MAX}", name.len()));
    }
    if value.len() > VALUE_BYTES_MAX {
        return refuse(format!("has a value of {} bytes; the limit is {VALUE_BYTES_MAX}", value.len()));
    }
    match HeaderName::from_bytes(name.as_bytes()) {
        Err(_) => refuse("is no name of a header".to_owned()),
        Ok(name) if RESERVED.contains(&name) => refuse("cannot be set: it says where a message goes or ends".to_owned()),
        Ok(_) if HeaderValue::from_str(value).is_err() => refuse("has a value that no header can carry".to_owned()),
        Ok(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parsed(rules: serde_json::Value) -> Result<BTreeMap<String, HeaderRule>, String> {
        parse(serde_json::from_value(rules).unwrap()).map_err(|error| {
            let (code, message) = error.code_and_message();
            assert_eq!(code, 400, "{message}");
            message.to_owned()
        })
    }

    fn headers(count: usize) -> serde_json::Value {
        let headers: BTreeMap<String, &str> = (0..count).map(|number| (format!("x-{number}"), "v")).collect();
        json!([{"transform": {"headers": headers}}])
    }

    #[test]
    fn rules_are_read_in_lower_case_and_shown_without_values() {
        let rules =
            parsed(json!({"API.Example.com": [{"transform": {"headers": {"Authorization": "Bearer s3cret"}}}], "*.ORG": [{}]})).unwrap();
        assert_eq!(rules["api.example.com"].headers["Authorization"], "Bearer s3cret");
        let expected = json!({
            "api.example.com": [{"transform": {"headers": {"Authorization": "***"}}}],
            "*.org": [{"transform": {"headers": {}}}]
        });
        assert_eq!(serde_json::to_value(shown(&rules)).unwrap(), expected);
        assert!(!format!("{rules:?}").contains("s3cret"), "nor logged");
    }

    #[test]
    fn each_limit_of_the_contract_is_told_with_its_number() {
        let domains = |count: usize| json!((0..count).map(|n| (format!("d{n}.com"), headers(1))).collect::<BTreeMap<_, _>>());
        assert!(parsed(domains(10)).is_ok() && parsed(domains(11)).unwrap_err().contains("11 domains; the limit is 10"));
        assert!(parsed(json!({"a.com": headers(20)})).is_ok());
        assert!(parsed(json!({"a.com": headers(21)})).unwrap_err().contains("21 headers; the limit is 20"));
        assert!(parsed(json!({"a.com": [{}, {}]})).unwrap_err().contains("2 rules; a domain has one"));
        let header = |name: &str, value: &str| parsed(json!({"a.com": [{"transform": {"headers": {name: value}}}]}));
        assert!(header(&"n".repeat(64), &"v".repeat(2048)).is_ok());
        assert!(header(&"n".repeat(65), "v").unwrap_err().contains("65 bytes; the limit is 64"));
        assert!(header("n", &"v".repeat(2049)).unwrap_err().contains("2049 bytes; the limit is 2048"));
    }

    #[test]
    fn what_is_no_name_and_what_would_break_a_message_is_refused() {
        for domain in ["1.2.3.4", "10.0.0.0/8", "*", "*.", "*.*.com", "a b.com", "localhost", ""] {
            assert!(parsed(json!({domain: headers(1)})).unwrap_err().contains("it must be a DNS name"), "{domain}");
        }
        assert!(parsed(json!({"a.com": headers(1), "A.com": headers(1)})).unwrap_err().contains("twice"));
        for (name, value) in
            [("a b", "v"), ("content-length", "0"), ("Transfer-Encoding", "chunked"), ("Host", "b.com"), ("x", "a\r\nb: c")]
        {
            let message = parsed(json!({"a.com": [{"transform": {"headers": {name: value}}}]})).unwrap_err();
            assert!(message.contains(&format!("header '{name}'")) && !message.contains("b: c"), "{message}");
        }
    }
}
