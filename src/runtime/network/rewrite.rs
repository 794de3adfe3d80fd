//! Which requests of a sandbox are changed on their way out, and how. Pure.

use super::names::matches;
use crate::model::{HeaderRule, NetworkPolicy};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use std::collections::BTreeMap;

/// The rules of a policy: those with nothing to set are left out, since they change nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Rewrites {
    rules: BTreeMap<String, HeaderRule>,
}

/// A request cannot be changed as its rule says.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RewriteError {
    #[error("the rule's header '{0}' cannot be sent")]
    Header(String),
}

impl Rewrites {
    pub(super) fn of(policy: &NetworkPolicy) -> Self {
        let changing = policy.rules.iter().filter(|(_, rule)| !rule.headers.is_empty());
        Self { rules: changing.map(|(domain, rule)| (domain.clone(), rule.clone())).collect() }
    }

    /// Whether any request at all is changed.
    pub(super) fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Whether requests to a name (lower case, no final dot) are changed.
    pub(super) fn concern(&self, name: &str) -> bool {
        self.rule(name).is_some()
    }

    /// The name's own rule, else that of the longest `*.` it is below; they are not added up.
    fn rule(&self, name: &str) -> Option<&HeaderRule> {
        self.rules.get(name).or_else(|| {
            let wild = self.rules.iter().filter(|(pattern, _)| pattern.starts_with('*') && matches(pattern, name));
            wild.max_by_key(|(pattern, _)| pattern.len()).map(|(_, rule)| rule)
        })
    }

    /// Sets the headers of the name's rule, in place of all that the program sent under their names.
    pub(super) fn apply(&self, name: &str, headers: &mut HeaderMap) -> Result<(), RewriteError> {
        for (header, value) in self.rule(name).iter().flat_map(|rule| &rule.headers) {
            let unfit = || RewriteError::Header(header.clone());
            let name = HeaderName::from_bytes(header.as_bytes()).map_err(|_| unfit())?;
            let mut value = HeaderValue::from_str(value).map_err(|_| unfit())?;
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewrites(rules: &[(&str, &[(&str, &str)])]) -> Rewrites {
        let pairs = |headers: &[(&str, &str)]| headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let rules = rules.iter().map(|(domain, headers)| ((*domain).to_owned(), HeaderRule { headers: pairs(headers) })).collect();
        Rewrites::of(&NetworkPolicy { rules, ..NetworkPolicy::default() })
    }

    fn token(rewrites: &Rewrites, name: &str) -> Option<String> {
        let mut headers = HeaderMap::new();
        rewrites.apply(name, &mut headers).unwrap();
        headers.get("x-token").map(|value| value.to_str().unwrap().to_owned())
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
        assert!(rewrites.concern("example.com") && !rewrites.concern("com"));
    }

    #[test]
    fn a_rules_header_takes_the_place_of_all_that_were_sent() {
        let mut headers = HeaderMap::new();
        for value in ["one", "two"] {
            headers.append("authorization", HeaderValue::from_static(value));
        }
        rewrites(&[("a.com", &[("Authorization", "Bearer s")])]).apply("a.com", &mut headers).unwrap();
        assert_eq!(headers.get_all("authorization").iter().collect::<Vec<_>>(), ["Bearer s"]);
        assert_eq!(format!("{headers:?}"), "{\"authorization\": Sensitive}", "never shown");
    }
}
