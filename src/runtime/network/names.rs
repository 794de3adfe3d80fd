//! Which names a policy lets a sandbox ask for and connect to.

use crate::model::{EgressTarget, NetworkPolicy};

/// What may be resolved.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) enum Names {
    /// Anything: addresses decide what may be reached.
    #[default]
    All,
    /// These: lower-case names, and `*.` suffixes that stand for everything below.
    Only(Vec<String>),
    /// Nothing: a question, too, would be a way out.
    None,
}

impl Names {
    /// Names decide only where everything else is denied.
    pub(super) fn of(policy: &NetworkPolicy) -> Self {
        if !policy.denies_everything() {
            return Self::All;
        }
        let domain = |target: &EgressTarget| match target {
            EgressTarget::Domain(name) => Some(name.clone()),
            EgressTarget::Block { .. } => None,
        };
        let domains: Vec<String> = policy.allow_out.iter().filter_map(domain).collect();
        if domains.is_empty() { Self::None } else { Self::Only(domains) }
    }

    /// Whether `name`, in lower case and without a final dot, is among them.
    pub(super) fn allow(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(patterns) => patterns.iter().any(|pattern| matches(pattern, name)),
            Self::None => false,
        }
    }
}

/// Whether a name is `pattern`, or below it when that begins with `*.`.
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_prefix('*') {
        // `*.example.com`: something, then `.example.com`.
        Some(suffix) => name.len() > suffix.len() && name.ends_with(suffix),
        None => name == pattern,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_one_or_more_labels() {
        let names = Names::Only(vec!["*.example.com".to_owned(), "site.test".to_owned()]);
        for name in ["a.example.com", "a.b.example.com", "site.test"] {
            assert!(names.allow(name), "{name}");
        }
        for name in ["example.com", ".example.com", "badexample.com", "example.com.evil.org", "www.site.test", ""] {
            assert!(!names.allow(name), "{name}");
        }
    }

    #[test]
    fn names_follow_the_policy() {
        let policy = |allow: &[&str], deny: &[&str]| {
            let targets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
            Names::of(&NetworkPolicy { allow_out: targets(allow), deny_out: targets(deny), ..NetworkPolicy::default() })
        };
        assert_eq!(policy(&[], &["10.0.0.0/8"]), Names::All);
        assert_eq!(policy(&["1.1.1.1"], &["0.0.0.0/0"]), Names::None);
        assert_eq!(policy(&["1.1.1.1", "a.com"], &["0.0.0.0/0"]), Names::Only(vec!["a.com".to_owned()]));
        assert_eq!(Names::of(&NetworkPolicy { allow_internet_access: Some(false), ..NetworkPolicy::default() }), Names::None);
    }
}
