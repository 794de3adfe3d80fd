//! Jupyter's messages: five JSON parts behind a delimiter, signed with HMAC-SHA256 under the key of the connection file.

use bytes::Bytes;
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::Sha256;

use super::random_hex;
use super::zmtp::Message;
use crate::auth::secrets_equal;
use crate::logs::rfc3339;

const DELIMITER: &[u8] = b"<IDS|MSG>";

/// Who talks to a kernel: the key that both know, and the session's name.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) key: String,
    name: String,
}

/// A message of the kernel.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Incoming {
    pub(super) kind: String,
    /// The request that it belongs to; empty for none.
    pub(super) parent: String,
    /// As the kernel wrote it.
    pub(super) date: String,
    pub(super) content: Value,
    /// Bytes that were too many; the content is null then.
    pub(super) left_out: u64,
}

#[derive(Debug, Default, Deserialize)]
struct Header {
    #[serde(default)]
    msg_id: String,
    #[serde(default)]
    msg_type: String,
    #[serde(default)]
    date: String,
}

impl Session {
    pub(super) fn new() -> Session {
        Session { key: random_hex(32), name: random_hex(16) }
    }

    /// A request as its parts, and its id.
    pub(super) fn request(&self, kind: &str, content: &Value) -> (String, Vec<Bytes>) {
        let id = random_hex(16);
        let header = json!({
            "msg_id": id, "session": self.name, "username": "stillbox", "msg_type": kind, "version": "5.3",
            "date": rfc3339(std::time::SystemTime::now()),
        });
        let body = [header.to_string(), "{}".to_owned(), "{}".to_owned(), content.to_string()].map(Bytes::from);
        let signature = self.signature(&body);
        let parts = [Bytes::from_static(DELIMITER), Bytes::from(signature)].into_iter().chain(body).collect();
        (id, parts)
    }

    /// None for what is no message of this session: unsigned, wrongly signed, not JSON.
    pub(super) fn read(&self, message: &Message) -> Option<Incoming> {
        let delimiter = message.parts.iter().position(|part| part == DELIMITER)?;
        let [signature, body @ ..] = message.parts.get(delimiter + 1..)? else { return None };
        let body: &[Bytes; 4] = body.get(..4)?.try_into().ok()?;
        // Of a message with a part left out nothing but its kind and its parent is used.
        if message.left_out == 0 && !secrets_equal(self.signature(body).as_bytes(), signature) {
            return None;
        }
        let header: Header = serde_json::from_slice(&body[0]).ok()?;
        let parent: Header = serde_json::from_slice(&body[1]).unwrap_or_default();
        let content = serde_json::from_slice(&body[3]).unwrap_or_default();
        Some(Incoming { kind: header.msg_type, parent: parent.msg_id, date: header.date, content, left_out: message.left_out })
    }

    fn signature(&self, body: &[Bytes; 4]) -> String {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.key.as_bytes()).expect("HMAC takes keys of every length");
        body.iter().for_each(|part| mac.update(part));
        super::hex(&mac.finalize().into_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_read_by_its_own_session_only() {
        let (ours, theirs) = (Session::new(), Session::new());
        let (id, parts) = ours.request("execute_request", &json!({ "code": "1" }));
        assert_eq!(id.len(), 32);
        let mut message = Message { parts: [vec!["topic".into()], parts].concat(), left_out: 0 };
        let read = ours.read(&message).unwrap();
        assert_eq!((read.kind.as_str(), &read.content), ("execute_request", &json!({ "code": "1" })));
        assert_eq!(theirs.read(&message), None);
        message.parts.pop();
        assert_eq!(ours.read(&message), None);
    }

    #[test]
    fn the_signature_is_the_one_that_jupyter_makes() {
        // hmac.new(b"key", b"{}" * 4, "sha256").hexdigest()
        let session = Session { key: "key".into(), name: String::new() };
        let body = [const { Bytes::from_static(b"{}") }; 4];
        assert_eq!(session.signature(&body), "ca767b02c5bc061ed184a9a029e7f93a7f2f7ed4e8fe74120fc1212f0b008fa3");
    }
}
