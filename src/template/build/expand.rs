//! `$NAME` and `${NAME}` in the values of ENV steps, as bash would put them in between double quotes.

use std::collections::BTreeMap;

/// The value with its variables put in; an unknown one is empty. Also `${NAME:-word}` and `${NAME:+word}`, as in
/// Dockerfiles. A `$` that begins none of these stands for itself.
pub(super) fn expand(value: &str, env: &BTreeMap<String, String>) -> String {
    let mut expanded = String::with_capacity(value.len());
    let mut rest = value;
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        match variable(rest) {
            Some((variable, after)) => {
                expanded.push_str(&variable.value(env));
                rest = after;
            }
            None => expanded.push('$'),
        }
    }
    expanded.push_str(rest);
    expanded
}

struct Variable<'v> {
    name: &'v str,
    word: Word<'v>,
}

enum Word<'v> {
    None,
    IfUnset(&'v str),
    IfSet(&'v str),
}

impl Variable<'_> {
    fn value(&self, env: &BTreeMap<String, String>) -> String {
        let value = env.get(self.name).map(String::as_str).filter(|value| !value.is_empty());
        match (&self.word, value) {
            (Word::None, value) => value.unwrap_or_default().to_owned(),
            (Word::IfUnset(_), Some(value)) => value.to_owned(),
            (Word::IfUnset(word), None) | (Word::IfSet(word), Some(_)) => expand(word, env),
            (Word::IfSet(_), None) => String::new(),
        }
    }
}

/// What a `$` before `text` begins, and what comes after it.
fn variable(text: &str) -> Option<(Variable<'_>, &str)> {
    let Some(inner) = text.strip_prefix('{') else {
        let (name, after) = name(text)?;
        return Some((Variable { name, word: Word::None }, after));
    };
    let (name, after) = name(inner)?;
    let end = closing(after)?;
    let (word, after) = (&after[..end], &after[end + 1..]);
    let word = match word {
        "" => Word::None,
        _ => match (word.strip_prefix(":-"), word.strip_prefix(":+")) {
            (Some(word), _) => Word::IfUnset(word),
            (None, Some(word)) => Word::IfSet(word),
            (None, None) => return None,
        },
    };
    Some((Variable { name, word }, after))
}

/// Where the brace that is open ends.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' if depth == 0 => return Some(at),
            b'}' => depth -= 1,
            _ => {}
        }
    }
    None
}

fn name(text: &str) -> Option<(&str, &str)> {
    let is_inside = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    let length = text.bytes().take_while(|byte| is_inside(byte)).count();
    let starts_well = text.bytes().next().is_some_and(|byte| !byte.is_ascii_digit());
    (length > 0 && starts_well).then(|| text.split_at(length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn env() -> BTreeMap<String, String> {
        [("PATH", "/usr/bin"), ("A", "1"), ("EMPTY", "")].map(|(name, value)| (name.to_owned(), value.to_owned())).into()
    }

    #[test]
    fn variables_are_put_in_and_everything_else_stands_for_itself() {
        for (value, expanded) in [
            ("/opt/bin:$PATH", "/opt/bin:/usr/bin"),
            ("${A}b", "1b"),
            ("$Ab", ""),
            ("$NONE|${NONE}", "|"),
            ("${NONE:-a$A}", "a1"),
            ("${EMPTY:-x}${A:-y}", "x1"),
            ("${A:+yes}${NONE:+no}", "yes"),
            ("${NONE:-${A}}", "1"),
            ("costs 5$ and $5, ${, ${A, $(id), `id`, $$", "costs 5$ and $5, ${, ${A, $(id), `id`, $$"),
            ("ä$A€", "ä1€"),
        ] {
            assert_eq!(expand(value, &env()), expanded, "{value}");
        }
    }

    proptest! {
        #[test]
        fn a_value_without_a_dollar_is_left_alone(value in "[^$]{0,40}") {
            prop_assert_eq!(expand(&value, &env()), value);
        }

        #[test]
        fn anything_can_be_expanded(value in "[$:{}A_a1+-]{0,40}|\\PC{0,40}") {
            expand(&value, &env());
        }
    }
}
