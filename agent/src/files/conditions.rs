//! Conditional and partial requests (RFC 9110, 13 and 14) on a file known by its time and size alone: it has
//! no entity tag, so only `*` matches where one is asked for.

use std::time::{Duration, SystemTime};

/// The request headers that matter here, as sent.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Conditions<'a> {
    pub(crate) if_match: Option<&'a str>,
    pub(crate) if_none_match: Option<&'a str>,
    pub(crate) if_modified_since: Option<&'a str>,
    pub(crate) if_unmodified_since: Option<&'a str>,
    pub(crate) if_range: Option<&'a str>,
    pub(crate) range: Option<&'a str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// 200 with everything.
    Whole,
    /// 206 with `length` bytes from `start`; at least one byte.
    Part { start: u64, length: u64 },
    /// 304
    NotModified,
    /// 412
    PreconditionFailed,
    /// 416
    Unsatisfiable,
}

impl Conditions<'_> {
    /// Whether the request is about parts or versions, and therefore about plain bytes.
    pub(crate) fn want_identity(&self) -> bool {
        [self.range, self.if_modified_since, self.if_none_match, self.if_range].iter().any(Option::is_some)
    }

    pub(crate) fn judge(&self, modified: SystemTime, size: u64) -> Verdict {
        // HTTP dates have no fractions.
        let modified = whole_seconds(modified);
        let not_after = |date: &str| httpdate::parse_http_date(date).map(|date| modified <= date);
        let unmodified = match (self.if_match, self.if_unmodified_since.map(not_after)) {
            (Some(tags), _) => tags.trim() == "*",
            (None, Some(Ok(unmodified))) => unmodified,
            (None, _) => true,
        };
        if !unmodified {
            return Verdict::PreconditionFailed;
        }
        let known = match (self.if_none_match, self.if_modified_since.map(not_after)) {
            (Some(tags), _) => tags.trim() == "*",
            (None, Some(Ok(known))) => known,
            (None, _) => false,
        };
        if known {
            return Verdict::NotModified;
        }
        let same = |date: &str| httpdate::parse_http_date(date).is_ok_and(|date| date == modified);
        match self.range {
            Some(range) if self.if_range.is_none_or(same) => part(range, size),
            _ => Verdict::Whole,
        }
    }
}

fn whole_seconds(time: SystemTime) -> SystemTime {
    let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + Duration::from_secs(since_epoch.as_secs())
}

/// One range is honoured; several, and what cannot be read, count as none, as the RFC allows.
fn part(range: &str, size: u64) -> Verdict {
    let Some(range) = range.trim().strip_prefix("bytes=") else {
        return Verdict::Whole;
    };
    let Some((first, last)) = range.split_once('-').filter(|_| !range.contains(',')) else {
        return Verdict::Whole;
    };
    let (start, end) = match (first.trim().parse::<u64>(), last.trim()) {
        (Ok(start), "") => (start, size),
        (Ok(start), last) => match last.parse::<u64>() {
            Ok(last) if last >= start => (start, last.saturating_add(1).min(size)),
            _ => return Verdict::Whole,
        },
        (Err(_), last) if first.trim().is_empty() => match last.parse::<u64>() {
            Ok(suffix) => (size.saturating_sub(suffix), size),
            Err(_) => return Verdict::Whole,
        },
        (Err(_), _) => return Verdict::Whole,
    };
    match end.checked_sub(start) {
        Some(length) if length > 0 => Verdict::Part { start, length },
        _ => Verdict::Unsatisfiable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 100;

    fn modified() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(784_111_777_500)
    }

    const MODIFIED: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
    const BEFORE: &str = "Sun, 06 Nov 1994 08:49:36 GMT";

    fn range(range: &str) -> Verdict {
        Conditions { range: Some(range), ..Conditions::default() }.judge(modified(), SIZE)
    }

    #[test]
    fn one_range_is_a_part() {
        assert_eq!(range("bytes=0-9"), Verdict::Part { start: 0, length: 10 });
        assert_eq!(range("bytes=90-"), Verdict::Part { start: 90, length: 10 });
        assert_eq!(range("bytes=-10"), Verdict::Part { start: 90, length: 10 });
        assert_eq!(range("bytes=-1000"), Verdict::Part { start: 0, length: 100 });
        assert_eq!(range("bytes=99-1000"), Verdict::Part { start: 99, length: 1 });
    }

    #[test]
    fn a_range_outside_is_unsatisfiable() {
        for outside in ["bytes=100-", "bytes=100-200", "bytes=-0"] {
            assert_eq!(range(outside), Verdict::Unsatisfiable, "{outside}");
        }
    }

    #[test]
    fn what_is_not_one_range_is_ignored() {
        for ignored in ["lines=1-2", "bytes=1", "bytes=9-1", "bytes=a-b", "bytes=0-1,5-6", "bytes=1-x"] {
            assert_eq!(range(ignored), Verdict::Whole, "{ignored}");
        }
    }

    #[test]
    fn dates_decide_by_whole_seconds() {
        let since = |date| Conditions { if_modified_since: Some(date), ..Conditions::default() }.judge(modified(), SIZE);
        assert_eq!(since(MODIFIED), Verdict::NotModified);
        assert_eq!(since(BEFORE), Verdict::Whole);
        assert_eq!(since("yesterday"), Verdict::Whole);
        let unless = |date| Conditions { if_unmodified_since: Some(date), ..Conditions::default() }.judge(modified(), SIZE);
        assert_eq!(unless(MODIFIED), Verdict::Whole);
        assert_eq!(unless(BEFORE), Verdict::PreconditionFailed);
    }

    #[test]
    fn a_range_of_another_version_is_the_whole_file() {
        let part_if = |date| Conditions { range: Some("bytes=0-0"), if_range: Some(date), ..Conditions::default() }.judge(modified(), SIZE);
        assert_eq!(part_if(MODIFIED), Verdict::Part { start: 0, length: 1 });
        assert_eq!(part_if(BEFORE), Verdict::Whole);
        assert_eq!(part_if("\"tag\""), Verdict::Whole);
    }

    #[test]
    fn no_entity_tag_matches_but_any_does() {
        let none_match = |tags| {
            Conditions { if_none_match: Some(tags), if_modified_since: Some(MODIFIED), ..Conditions::default() }.judge(modified(), SIZE)
        };
        assert_eq!(none_match("*"), Verdict::NotModified);
        assert_eq!(none_match("\"tag\""), Verdict::Whole);
        let must_match = |tags| Conditions { if_match: Some(tags), ..Conditions::default() }.judge(modified(), SIZE);
        assert_eq!(must_match("*"), Verdict::Whole);
        assert_eq!(must_match("\"tag\""), Verdict::PreconditionFailed);
    }
}
