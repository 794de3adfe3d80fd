//! Which requests of a sandbox are changed on their way out, and how. Pure.

use super::names::matches;
use crate::model::{HeaderRule, NetworkPolicy, SecretRecord};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Request, Uri};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use std::collections::BTreeMap;

/// Around a stored secret's name in a rule's value, as E2B's SDKs write it.
const SECRET_BEGIN: &str = "${e2b.secrets.";
const SECRET_END: char = '}';

/// What a value is written with in a path or query (RFC 3986, 2.3: the rest needs no escape).
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Stored secrets by name.
#[derive(Debug, Default)]
pub(super) struct Secrets(BTreeMap<String, SecretRecord>);

impl Secrets {
    pub(super) fn of(records: Vec<SecretRecord>) -> Self {
        Self(records.into_iter().map(|record| (record.name.clone(), record)).collect())
    }

    /// Names that the API made are lower case unless another dialect kept them as they were.
    fn find(&self, name: &str) -> Option<&SecretRecord> {
        self.0.get(name).or_else(|| self.0.get(&name.to_ascii_lowercase()))
    }

    /// A rule's value with what it refers to.
    fn fill(&self, value: &str) -> Result<String, RewriteError> {
        let mut filled = String::with_capacity(value.len());
        let mut rest = value;
        while let Some((before, reference)) = rest.split_once(SECRET_BEGIN) {
            let Some((name, after)) = reference.split_once(SECRET_END) else { break };
            let secret = self.find(name).ok_or_else(|| RewriteError::Secret(name.to_owned()))?;
            filled += before;
            filled += &secret.value;
            rest = after;
        }
        Ok(filled + rest)
    }
}

/// What a policy changes: by rules, those with nothing to set left out, and by placeholders of stored secrets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Rewrites {
    rules: BTreeMap<String, HeaderRule>,
    secrets: Vec<String>,
}

/// How a request travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Channel {
    /// TLS, to who proved to be the name.
    Encrypted,
    /// Whoever is on the way can read it.
    Plain,
}

/// A request cannot be changed as its rule says.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RewriteError {
    #[error("the rule's header '{0}' cannot be sent")]
    Header(String),
    #[error("the rule refers to the stored secret '{0}', which does not exist")]
    Secret(String),
}

impl Rewrites {
    pub(super) fn of(policy: &NetworkPolicy) -> Self {
        let changing = policy.rules.iter().filter(|(_, rule)| !rule.headers.is_empty());
        Self { rules: changing.map(|(domain, rule)| (domain.clone(), rule.clone())).collect(), secrets: policy.secrets.clone() }
    }

    /// Whether any request at all is changed.
    pub(super) fn is_empty(&self) -> bool {
        self.rules.is_empty() && self.secrets.is_empty()
    }

    /// Whether requests to a name (lower case, no final dot) are changed.
    pub(super) fn concern(&self, name: &str, secrets: &Secrets) -> bool {
        self.rule(name).is_some() || self.bound(name, secrets).next().is_some()
    }

    /// The name's own rule, else that of the longest `*.` it is below; they are not added up.
    fn rule(&self, name: &str) -> Option<&HeaderRule> {
        self.rules.get(name).or_else(|| {
            let wild = self.rules.iter().filter(|(pattern, _)| pattern.starts_with('*') && matches(pattern, name));
            wild.max_by_key(|(pattern, _)| pattern.len()).map(|(_, rule)| rule)
        })
    }

    /// The policy's secrets that are for a name.
    fn bound<'s>(&'s self, name: &'s str, secrets: &'s Secrets) -> impl Iterator<Item = &'s SecretRecord> {
        let named = self.secrets.iter().filter_map(|secret| secrets.0.get(secret));
        named.filter(move |secret| secret.hosts.iter().any(|host| matches(host, name)))
    }

    /// Sets the headers of the name's rule, in place of all that the program sent under their names; then puts values in
    /// place of placeholders, in headers and in the path, where nobody on the way can read them: whether it is
    /// encrypted, the program chooses.
    pub(super) fn apply<B>(&self, name: &str, channel: Channel, secrets: &Secrets, request: &mut Request<B>) -> Result<(), RewriteError> {
        for (header, value) in self.rule(name).iter().flat_map(|rule| &rule.headers) {
            let unfit = || RewriteError::Header(header.clone());
            let header = HeaderName::from_bytes(header.as_bytes()).map_err(|_| unfit())?;
            let value = hidden(&secrets.fill(value)?).ok_or_else(unfit)?;
            request.headers_mut().insert(header, value);
        }
        for secret in self.bound(name, secrets).filter(|_| channel == Channel::Encrypted) {
            replace_in_headers(request.headers_mut(), secret);
            replace_in_path(request.uri_mut(), secret);
        }
        Ok(())
    }
}

/// A header's value that is not shown where headers are.
fn hidden(value: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(value).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn replace_in_headers(headers: &mut HeaderMap, secret: &SecretRecord) {
    for value in headers.values_mut() {
        let replaced = value.to_str().ok().filter(|text| text.contains(&secret.placeholder));
        if let Some(replaced) = replaced.and_then(|text| hidden(&text.replace(&secret.placeholder, &secret.value))) {
            *value = replaced;
        }
    }
}

/// Percent-encoded there, since a path does not carry everything.
fn replace_in_path(uri: &mut Uri, secret: &SecretRecord) {
    let text = uri.to_string();
    if text.contains(&secret.placeholder) {
        let value = utf8_percent_encode(&secret.value, ESCAPED).to_string();
        if let Ok(replaced) = text.replace(&secret.placeholder, &value).parse() {
            *uri = replaced;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::SecretId;
    use time::OffsetDateTime;

    fn rewrites(rules: &[(&str, &[(&str, &str)])]) -> Rewrites {
        let pairs = |headers: &[(&str, &str)]| headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let rules = rules.iter().map(|(domain, headers)| ((*domain).to_owned(), HeaderRule { headers: pairs(headers) })).collect();
        Rewrites::of(&NetworkPolicy { rules, ..NetworkPolicy::default() })
    }

    fn secret(name: &str, value: &str, hosts: &[&str]) -> SecretRecord {
        SecretRecord {
            id: SecretId::random(),
            name: name.to_owned(),
            value: value.to_owned(),
            version: 1,
            metadata: BTreeMap::new(),
            hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
            placeholder: format!("placeholder_{name}"),
            description: None,
            created_at: OffsetDateTime::UNIX_EPOCH,
            updated_at: OffsetDateTime::UNIX_EPOCH,
        }
    }

    fn token(rewrites: &Rewrites, name: &str) -> Option<String> {
        let mut request = Request::new(());
        rewrites.apply(name, Channel::Plain, &Secrets::default(), &mut request).unwrap();
        request.headers().get("x-token").map(|value| value.to_str().unwrap().to_owned())
    }

    #[test]
    fn the_exact_rule_wins_over_the_longest_star_and_they_are_not_added_up() {
        let rewrites = rewrites(&[
            ("*.com", &[("x-token", "all")]),
            ("*.example.com", &[("x-token", "below"), ("x-more", "1")]),
            ("api.example.com", &[("X-Token", "own")]),
            ("silent.example.com", &[]),
        ]);
        assert_eq!(token(&rewrites, "api.example.com").as_deref(), Some("own"));
        assert_eq!(token(&rewrites, "a.b.example.com").as_deref(), Some("below"));
        assert_eq!(token(&rewrites, "example.com").as_deref(), Some("all"), "a star does not stand for nothing");
        assert_eq!(token(&rewrites, "example.org"), None);
        let none = Secrets::default();
        assert!(rewrites.concern("example.com", &none) && !rewrites.concern("com", &none));
    }

    #[test]
    fn a_rules_header_takes_the_place_of_all_that_were_sent() {
        let mut request = Request::new(());
        for value in ["one", "two"] {
            request.headers_mut().append("authorization", HeaderValue::from_static(value));
        }
        rewrites(&[("a.com", &[("Authorization", "Bearer s")])]).apply("a.com", Channel::Plain, &Secrets::default(), &mut request).unwrap();
        assert_eq!(request.headers().get_all("authorization").iter().collect::<Vec<_>>(), ["Bearer s"]);
        assert_eq!(format!("{:?}", request.headers()), "{\"authorization\": Sensitive}", "never shown");
    }

    #[test]
    fn a_rule_is_filled_with_the_secrets_it_refers_to() {
        let secrets = Secrets::of(vec![secret("one", "1", &[]), secret("two", "2", &[])]);
        assert_eq!(secrets.fill("a ${e2b.secrets.one}-${e2b.secrets.TWO} b").unwrap(), "a 1-2 b");
        assert_eq!(secrets.fill("${e2b.secrets.one").unwrap(), "${e2b.secrets.one", "not a reference");
        assert_eq!(secrets.fill("${e2b.secrets.three}"), Err(RewriteError::Secret("three".to_owned())));
    }

    #[test]
    fn a_placeholder_becomes_the_value_for_the_secrets_hosts_and_for_policies_that_name_it() {
        let secrets = Secrets::of(vec![secret("key", "s-/1", &["api.com", "*.wild.com"]), secret("other", "o", &["api.com"])]);
        let rewrites = Rewrites::of(&NetworkPolicy { secrets: vec!["key".to_owned(), "gone".to_owned()], ..NetworkPolicy::default() });
        let sent_by = |name: &str, channel: Channel| {
            let request =
                Request::builder().uri("/p?k=placeholder_key").header("authorization", "Bearer placeholder_key placeholder_other");
            let mut request = request.body(()).unwrap();
            rewrites.apply(name, channel, &secrets, &mut request).unwrap();
            (request.headers()["authorization"].to_str().unwrap().to_owned(), request.uri().to_string())
        };
        let sent = |name: &str| sent_by(name, Channel::Encrypted);
        for name in ["api.com", "a.wild.com"] {
            assert_eq!(sent(name), ("Bearer s-/1 placeholder_other".to_owned(), "/p?k=s-%2F1".to_owned()), "{name}");
        }
        assert_eq!(sent("wild.com").1, "/p?k=placeholder_key");
        assert_eq!(sent_by("api.com", Channel::Plain).0, "Bearer placeholder_key placeholder_other", "where others can read it");
        assert!(rewrites.concern("api.com", &secrets) && !rewrites.concern("wild.com", &secrets));
    }
}
