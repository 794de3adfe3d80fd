//! What a cell puts out, typed, and the lines of E2B's /execute that it becomes (contract/e2b.md section 4).

use serde_json::{Map, Value, json};

/// One output of a cell, in the order in which the kernel made them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Output {
    /// The cell has begun and is the n-th of its context.
    Count(u64),
    /// Text that was printed.
    Printed { to: Printed, text: String, at: String },
    /// Something shown, or the value of the cell.
    Result(Shown),
    /// The cell has failed; nothing follows.
    Failed(Failure),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Printed {
    Stdout,
    Stderr,
}

/// A value in as many forms as it has, by media type.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Shown {
    pub(crate) role: Role,
    pub(crate) forms: Map<String, Value>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// The value of the cell's last expression.
    Value,
    /// Displayed on the way.
    Display,
}

/// Why a cell failed, in the words of its language.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) name: String,
    pub(crate) value: String,
    /// As the kernel splits it; each part has its own line breaks.
    pub(crate) traceback: Vec<String>,
}

impl Failure {
    pub(crate) fn new(name: &str, value: impl Into<String>) -> Failure {
        Failure { name: name.to_owned(), value: value.into(), traceback: Vec::new() }
    }
}

/// Media types that have a field of their own, and its name. All others go into `extra`.
const FIELDS: [(&str, &str); 12] = [
    ("text/plain", "text"),
    ("text/html", "html"),
    ("text/markdown", "markdown"),
    ("image/svg+xml", "svg"),
    ("image/png", "png"),
    ("image/jpeg", "jpeg"),
    ("application/pdf", "pdf"),
    ("text/latex", "latex"),
    ("application/json", "json"),
    ("application/javascript", "javascript"),
    ("e2b/data", "data"),
    ("e2b/chart", "chart"),
];

impl Shown {
    /// The form of one media type, if it is text.
    pub(crate) fn text_of(&self, media_type: &str) -> Option<&str> {
        self.forms.get(media_type)?.as_str()
    }

    /// text/plain without the quotes that Python's repr puts around a string, as E2B shows it.
    pub(crate) fn plain_text(&self) -> Option<&str> {
        let text = self.text_of("text/plain")?;
        let inside = |quote| text.strip_prefix(quote)?.strip_suffix(quote);
        Some(inside('\'').or_else(|| inside('"')).unwrap_or(text))
    }

    fn into_json(self) -> Value {
        let mut line =
            Map::from_iter([("type".to_owned(), "result".into()), ("is_main_result".to_owned(), (self.role == Role::Value).into())]);
        if let Some(text) = self.plain_text() {
            line.insert("text".to_owned(), text.into());
        }
        let mut extra = Map::new();
        for (media_type, form) in self.forms {
            match FIELDS.iter().find(|(known, _)| *known == media_type) {
                Some((_, "text")) => {}
                Some((_, field)) => drop(line.insert((*field).to_owned(), form)),
                None => drop(extra.insert(media_type, form)),
            }
        }
        line.insert("extra".to_owned(), extra.into());
        line.into()
    }
}

impl Output {
    /// A line of E2B's stream, without its line break.
    pub(super) fn into_json(self) -> Value {
        match self {
            Output::Count(count) => json!({ "type": "number_of_executions", "execution_count": count }),
            Output::Printed { to: Printed::Stdout, text, at } => json!({ "type": "stdout", "text": text, "timestamp": at }),
            Output::Printed { to: Printed::Stderr, text, at } => json!({ "type": "stderr", "text": text, "timestamp": at }),
            Output::Result(shown) => shown.into_json(),
            // E2B joins the parts without anything in between.
            Output::Failed(Failure { name, value, traceback }) => {
                json!({ "type": "error", "name": name, "value": value, "traceback": traceback.concat() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(forms: Value) -> Value {
        let Value::Object(forms) = forms else { unreachable!("the tests give objects") };
        Output::Result(Shown { role: Role::Value, forms }).into_json()
    }

    #[test]
    fn each_form_has_its_field_and_the_rest_is_extra() {
        let line = shown(json!({ "text/plain": "1", "image/png": "aGk=", "e2b/chart": { "type": "line" }, "text/x-own": "o" }));
        let expected = json!({
            "type": "result", "is_main_result": true, "text": "1", "png": "aGk=", "chart": { "type": "line" }, "extra": { "text/x-own": "o" },
        });
        assert_eq!(line, expected);
        assert_eq!(shown(json!({ "text/latex": "x" })), json!({ "type": "result", "is_main_result": true, "latex": "x", "extra": {} }));
    }

    #[test]
    fn a_strings_own_quotes_are_not_shown() {
        for (repr, text) in [("'a'", "a"), ("\"it's\"", "it's"), ("'", "'"), ("''", ""), ("[1]", "[1]"), ("'a\"", "'a\"")] {
            assert_eq!(shown(json!({ "text/plain": repr }))["text"], text, "{repr}");
        }
    }

    #[test]
    fn a_traceback_is_one_string() {
        let failure = Failure { name: "E".into(), value: "v".into(), traceback: vec!["a\n".into(), "b".into()] };
        assert_eq!(Output::Failed(failure).into_json(), json!({ "type": "error", "name": "E", "value": "v", "traceback": "a\nb" }));
    }
}
