//! Which content coding a request asks for or comes in. Only gzip is spoken besides the plain bytes.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Coding {
    Identity,
    Gzip,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("error parsing Accept-Encoding: no acceptable encoding found, supported: gzip, identity")]
pub(crate) struct NotAcceptable;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("unsupported Content-Encoding: {coding}, supported: gzip")]
pub(crate) struct Unsupported {
    coding: String,
}

/// What an `Accept-Encoding` header (RFC 9110, 12.5.3) leaves to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Accepted {
    /// Gzip is named and not behind identity.
    prefers_gzip: bool,
    /// Gzip would do if identity does not, be it by the wildcard.
    gzip: bool,
    identity: bool,
}

impl Accepted {
    pub(crate) fn parse(header: &str) -> Accepted {
        let ranked: Vec<(String, f32)> = header.split(',').map(ranked).collect();
        let quality = |coding: &str| ranked.iter().find(|(name, _)| name == coding).map(|(_, quality)| *quality);
        let (gzip, identity, any) = (quality("gzip"), quality("identity"), quality("*"));
        let gzip_rank = gzip.unwrap_or(0.0);
        Accepted {
            prefers_gzip: gzip_rank > 0.0 && gzip_rank >= identity.unwrap_or(0.0).max(any.unwrap_or(0.0)),
            gzip: gzip.or(any).is_some_and(|quality| quality > 0.0),
            identity: identity.or(any).is_none_or(|quality| quality > 0.0),
        }
    }

    pub(crate) fn choose(self) -> Result<Coding, NotAcceptable> {
        match self {
            Accepted { prefers_gzip: true, .. } => Ok(Coding::Gzip),
            Accepted { identity: true, .. } => Ok(Coding::Identity),
            Accepted { gzip: true, .. } => Ok(Coding::Gzip),
            Accepted { .. } => Err(NotAcceptable),
        }
    }

    /// Whether plain bytes may be sent: parts of a file are.
    pub(crate) fn identity(self) -> bool {
        self.identity
    }
}

fn ranked(item: &str) -> (String, f32) {
    let mut parts = item.split(';').map(str::trim);
    let name = parts.next().unwrap_or_default().to_ascii_lowercase();
    let quality = parts
        .filter_map(|parameter| parameter.split_once('='))
        .filter(|(key, _)| key.trim().eq_ignore_ascii_case("q"))
        .find_map(|(_, value)| value.trim().parse().ok());
    (name, quality.unwrap_or(1.0))
}

/// The coding of a request's body.
pub(crate) fn of_content(header: Option<&str>) -> Result<Coding, Unsupported> {
    match header.map(|coding| coding.trim().to_ascii_lowercase()).as_deref() {
        None | Some("" | "identity") => Ok(Coding::Identity),
        Some("gzip" | "x-gzip") => Ok(Coding::Gzip),
        Some(coding) => Err(Unsupported { coding: coding.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(header: &str) -> Result<Coding, NotAcceptable> {
        Accepted::parse(header).choose()
    }

    #[test]
    fn gzip_is_sent_to_those_who_ask_for_it() {
        for header in ["gzip", "GZIP", "gzip, deflate, br", "br;q=1.0, gzip;q=0.8, *;q=0.1", "gzip, *;q=0"] {
            assert_eq!(chosen(header), Ok(Coding::Gzip), "{header}");
        }
    }

    #[test]
    fn plain_bytes_are_the_fallback() {
        for header in ["", "identity", "br", "*", "gzip;q=0", "gzip;q=0.5, identity", "*;q=0.5", "gzip;q=0, *"] {
            assert_eq!(chosen(header), Ok(Coding::Identity), "{header}");
        }
    }

    #[test]
    fn who_refuses_plain_bytes_gets_gzip_or_nothing() {
        assert_eq!(chosen("identity;q=0, *"), Ok(Coding::Gzip));
        assert_eq!(chosen("gzip, identity;q=0"), Ok(Coding::Gzip));
        for header in ["identity;q=0", "*;q=0", "br, identity;q=0", "gzip;q=0, identity;q=0"] {
            assert_eq!(chosen(header), Err(NotAcceptable), "{header}");
        }
        assert!(Accepted::parse("*;q=0, identity;q=0.1").identity());
    }

    #[test]
    fn bodies_come_plain_or_gzipped() {
        assert_eq!(of_content(None), Ok(Coding::Identity));
        assert_eq!(of_content(Some("GZip")), Ok(Coding::Gzip));
        assert!(of_content(Some("br")).is_err());
    }
}
