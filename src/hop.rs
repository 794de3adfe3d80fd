//! What of an HTTP/1.1 message belongs to one hop (RFC 9110, 7.6.1), for whoever passes messages on: into a sandbox, or out
//! of one.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

/// Beside those that `Connection` names. `Transfer-Encoding` and `Upgrade` are treated apart; `TE` and `Trailer` pass,
/// because trailers do.
const HOP_BY_HOP: [HeaderName; 4] =
    [header::CONNECTION, HeaderName::from_static("keep-alive"), HeaderName::from_static("proxy-connection"), header::UPGRADE];

/// The protocol that the client wants to switch to. Asked before [`remove`], which takes it out.
pub fn requested_upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let wants = headers.get_all(header::CONNECTION).iter().any(|value| has_token(value, "upgrade"));
    wants.then(|| headers.get(header::UPGRADE).cloned()).flatten()
}

fn has_token(value: &HeaderValue, token: &str) -> bool {
    value.to_str().is_ok_and(|value| value.split(',').any(|word| word.trim().eq_ignore_ascii_case(token)))
}

/// Takes out what was meant for this hop alone, and leaves one statement of where the message ends.
pub fn remove(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // `Connection: content-length` and the like would change where the message ends.
        .filter(|name| !matches!(*name, header::CONTENT_LENGTH | header::TRANSFER_ENCODING | header::HOST))
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
    if headers.contains_key(header::TRANSFER_ENCODING) {
        // RFC 9112, 6.3: a length beside it is somebody's attempt to be understood in two ways.
        headers.remove(header::CONTENT_LENGTH);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_of_one_hop_is_taken_out_and_what_frames_a_message_is_not() {
        let mut headers = HeaderMap::new();
        for (name, value) in
            [("connection", "x-own, content-length"), ("x-own", "1"), ("keep-alive", "5"), ("content-length", "3"), ("accept", "a")]
        {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        remove(&mut headers);
        let mut left: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["accept", "content-length"]);
        headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        remove(&mut headers);
        assert!(!headers.contains_key(header::CONTENT_LENGTH), "one length");
    }
}
