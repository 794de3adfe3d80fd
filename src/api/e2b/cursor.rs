//! Where the next page of a list begins, as an opaque token: base64url of `<time>__<id>`, `__asc` appended for lists
//! in ascending order, so that a token is not read in the order it was not made for.

use super::super::error::ApiError;
use crate::sandbox::ListOrder;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use http::{HeaderName, HeaderValue};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Present only while more rows remain.
pub(super) const NEXT_TOKEN: HeaderName = HeaderName::from_static("x-next-token");

/// The token of the last row of a page.
pub(super) fn token(at: OffsetDateTime, id: impl std::fmt::Display, order: ListOrder) -> HeaderValue {
    let at = at.to_offset(time::UtcOffset::UTC).format(&Rfc3339).expect("times of rows are in years of four digits");
    let text = match order {
        ListOrder::Descending => format!("{at}__{id}"),
        ListOrder::Ascending => format!("{at}__{id}__asc"),
    };
    HeaderValue::try_from(URL_SAFE.encode(text)).expect("base64 is ASCII")
}

/// The row that a token names.
pub(super) fn row<Id: std::str::FromStr>(token: &str, order: ListOrder) -> Result<(OffsetDateTime, Id), ApiError> {
    read(token, order).ok_or_else(|| {
        ApiError::bad_request("Invalid next token: nextToken must be the X-Next-Token of the page before, in the same order")
    })
}

fn read<Id: std::str::FromStr>(token: &str, order: ListOrder) -> Option<(OffsetDateTime, Id)> {
    let text = String::from_utf8(URL_SAFE.decode(token).ok()?).ok()?;
    let text = match order {
        ListOrder::Descending => text.as_str(),
        ListOrder::Ascending => text.strip_suffix("__asc")?,
    };
    let (at, id) = text.split_once("__")?;
    Some((OffsetDateTime::parse(at, &Rfc3339).ok()?, id.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::SandboxId;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_token_leads_back_to_its_row_in_its_own_order_only(ns in 0i128..4_000_000_000_000_000_000) {
            let (at, id) = (OffsetDateTime::from_unix_timestamp_nanos(ns).unwrap(), SandboxId::random());
            for (order, other) in [(ListOrder::Ascending, ListOrder::Descending), (ListOrder::Descending, ListOrder::Ascending)] {
                let token = token(at, id, order);
                let token = token.to_str().unwrap();
                prop_assert_eq!(row::<SandboxId>(token, order).unwrap(), (at, id));
                prop_assert!(row::<SandboxId>(token, other).is_err());
            }
        }

        #[test]
        fn nonsense_is_no_token(text in "\\PC{0,60}") {
            prop_assert!(row::<SandboxId>(&text, ListOrder::Descending).is_err());
        }
    }
}
