//! Names of templates as clients write them: `name`, `name:tag`, `team/name[:tag]`, or an id in place of the name.

use super::ResolveError;

/// The tag that is meant when none is named.
pub(super) const DEFAULT_TAG: &str = "default";
/// E2B's bound on a name, and on a tag.
const LENGTH_MAX: usize = 128;
/// Tags of one request.
const TAGS_MAX: usize = 64;

/// A name in its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Name {
    /// As asked, for messages.
    pub(super) asked: String,
    /// Alias or id, in lower case. There is one team here, so its name is not looked at.
    pub(super) template: String,
    /// In lower case; `default` unless one was named.
    pub(super) tag: String,
    /// Whether one was named.
    pub(super) has_tag: bool,
}

impl Name {
    pub(super) fn parse(asked: &str) -> Result<Self, ResolveError> {
        let malformed = |reason| ResolveError::Malformed { name: asked.chars().take(LENGTH_MAX).collect(), reason };
        let (path, tag) = asked.split_once(':').map_or((asked, None), |(path, tag)| (path, Some(tag)));
        let name = path.rsplit_once('/').map_or(path, |(_team, name)| name);
        if path.matches('/').count() > 1 {
            return Err(malformed("it has more than one '/'"));
        }
        if name.is_empty() || name.len() > LENGTH_MAX {
            return Err(malformed("a name has 1 to 128 characters"));
        }
        if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)) {
            return Err(malformed("a name has letters, digits, '-' and '_'"));
        }
        if !is_tag(tag.unwrap_or(DEFAULT_TAG)) {
            return Err(malformed("a tag has 1 to 128 letters, digits, '-', '_' and '.'"));
        }
        Ok(Self {
            asked: asked.to_owned(),
            template: name.to_ascii_lowercase(),
            tag: tag.unwrap_or(DEFAULT_TAG).to_ascii_lowercase(),
            has_tag: tag.is_some(),
        })
    }
}

fn is_tag(tag: &str) -> bool {
    !tag.is_empty() && tag.len() <= LENGTH_MAX && tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

/// Tags to be given or taken away: in lower case, each once, in the order they came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct TagList(pub(super) Vec<String>);

impl TagList {
    pub(super) fn of(tags: &[String]) -> Result<Self, ResolveError> {
        let mut list = Self::default();
        for tag in tags {
            let malformed = |reason| ResolveError::BadTag { tag: tag.chars().take(LENGTH_MAX).collect(), reason };
            if !is_tag(tag) {
                return Err(malformed("a tag has 1 to 128 letters, digits, '-', '_' and '.'"));
            }
            // A build's id stands for that build wherever a tag does.
            if tag.parse::<crate::model::BuildId>().is_ok() {
                return Err(malformed("a tag must not be a UUID"));
            }
            let tag = tag.to_ascii_lowercase();
            if !list.0.contains(&tag) {
                list.0.push(tag);
            }
        }
        if list.0.len() > TAGS_MAX {
            return Err(ResolveError::BadTag { tag: format!("{} tags", list.0.len()), reason: "64 at most are taken at once" });
        }
        Ok(list)
    }

    pub(super) fn put_first(&mut self, tag: &str) {
        self.0.retain(|known| known != tag);
        self.0.insert(0, tag.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_more_than_its_parts_is_malformed_with_the_rule() {
        for (name, rule) in [
            ("a/b/c", "more than one '/'"),
            ("", "1 to 128 characters"),
            ("a b", "letters, digits"),
            ("a:", "a tag has"),
            ("a:b:c", "a tag has"),
            (":b", "1 to 128 characters"),
        ] {
            let error = Name::parse(name).unwrap_err().to_string();
            assert!(error.contains(rule), "{name}: {error}");
        }
    }

    #[test]
    fn tags_are_lowered_kept_once_and_never_a_build() {
        let tags = |tags: &[&str]| TagList::of(&tags.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(tags(&["V1.0", "latest", "v1.0"]).unwrap().0, ["v1.0", "latest"]);
        assert!(tags(&[":x"]).is_err() && tags(&["x:"]).is_err() && tags(&[""]).is_err());
        let error = tags(&["01234567-89ab-4def-8123-456789abcdef"]).unwrap_err();
        assert!(error.to_string().contains("must not be a UUID"), "{error}");
    }
}
