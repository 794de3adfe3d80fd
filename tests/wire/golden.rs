//! Comparison with the files in `e2b/`, `novita/` and `hopx/`: what differs between runs is replaced by a word that says what stands there.

use serde_json::{Map, Value};
use std::path::PathBuf;
use stillbox::model::{BuildId, SandboxId, TemplateId};

/// Compares, or writes when told so at compile time. A name without a folder is E2B's.
pub(crate) fn check(name: &str, answer: &Value) {
    let folder = if name.contains('/') { "tests/wire" } else { "tests/wire/e2b" };
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(folder).join(format!("{name}.json"));
    let met = format!("{:#}\n", stable(answer));
    if option_env!("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, met).unwrap();
        return;
    }
    let wanted = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}; the answer was\n{met}", path.display()));
    assert_eq!(wanted, met, "the answer differs from {}", path.display());
}

fn stable(value: &Value) -> Value {
    match value {
        Value::String(text) => Value::String(words(text)),
        Value::Array(items) => Value::Array(items.iter().map(stable).collect()),
        Value::Object(fields) => Value::Object(fields.iter().map(|(name, value)| field(name, value)).collect::<Map<_, _>>()),
        Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
    }
}

fn field(name: &str, value: &Value) -> (String, Value) {
    let shown = match name {
        "timestampUnix" | "recordAt" => Value::String("<seconds>".to_owned()),
        "auth_token" => Value::String("<bearer>".to_owned()),
        "next_cursor" if value.is_string() => Value::String("<cursor>".to_owned()),
        name if name.ends_with("_at") && value.is_string() => Value::String("<time>".to_owned()),
        "x-next-token" => Value::String("<cursor>".to_owned()),
        "x-request-id" => Value::String("<request>".to_owned()),
        "cpuUsedPct" => Value::String("<percent>".to_owned()),
        _ => stable(value),
    };
    (words(name), shown)
}

/// Every word of a text that is an id, a token or a time.
fn words(text: &str) -> String {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if text.len() == 27 && text.ends_with('Z') && text.as_bytes()[10] == b'T' {
        return "<time>".to_owned();
    }
    let mut shown = String::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
        shown.push_str(word(&rest[..end]));
        let next = rest[end..].chars().next().map_or(0, char::len_utf8);
        shown.push_str(&rest[end..end + next]);
        rest = &rest[end + next..];
    }
    shown
}

fn word(word: &str) -> &str {
    let is_hex = |length| word.len() == length && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    match word {
        _ if is_hex(64) => "<token>",
        _ if is_hex(16) => "<request>",
        _ if is_hex(12) => "<key>",
        _ if word.len() == 10 && word.starts_with('1') && word.bytes().all(|byte| byte.is_ascii_digit()) => "<seconds>",
        word if word.parse::<SandboxId>().is_ok() => "<sandbox>",
        word if word.parse::<TemplateId>().is_ok() => "<template>",
        word if word.parse::<BuildId>().is_ok() && !word.starts_with("00000000") => "<build>",
        word => word,
    }
}
