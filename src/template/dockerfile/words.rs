//! The words of a Dockerfile's instructions: quotes, escapes, variables of FROM, comments between continued lines.

use std::collections::BTreeMap;

/// Words separated by blanks; quotes keep blanks and are taken away, a backslash keeps what follows.
pub(super) fn split(text: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote: Option<char> = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(open), _) if c == open => quote = None,
            (Some('\''), _) => word.get_or_insert_default().push(c),
            (_, '\\') => {
                let next = chars.next().unwrap_or('\\');
                // Between double quotes a backslash before anything else stands for itself; `\$` is the builder's to read.
                if next == '$' || (quote.is_some() && !matches!(next, '"' | '\\')) {
                    word.get_or_insert_default().push('\\');
                }
                word.get_or_insert_default().push(next);
            }
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, _) if c.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err("a quote is not closed".to_owned());
    }
    words.extend(word);
    Ok(words)
}

/// ENV's `a=b c="d e"`, or its old form `a b c` with all the rest as the value.
pub(super) fn pairs(text: &str) -> Result<Vec<(String, String)>, String> {
    let text = text.trim();
    let first = text.split_whitespace().next().unwrap_or_default();
    if !first.contains('=') {
        let (name, value) = text.split_once(char::is_whitespace).ok_or("ENV needs a name and a value")?;
        return Ok(vec![(name.to_owned(), value.trim().to_owned())]);
    }
    let pair = |word: String| match word.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("ENV: '{word}' is not NAME=VALUE")),
    };
    split(text)?.into_iter().map(pair).collect()
}

/// One word without its quotes; text that is none stays as it is.
pub(super) fn unquoted(text: &str) -> String {
    match split(text) {
        Ok(words) if words.len() == 1 => words.concat(),
        _ => text.trim().to_owned(),
    }
}

/// FROM's `$NAME`, `${NAME}` and `${NAME:-word}`.
pub(super) fn substituted(text: &str, values: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let (name, default, next) = match after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some((inner, next)) => {
                let (name, default) = inner.split_once(":-").unwrap_or((inner, ""));
                (name, default, next)
            }
            None => {
                let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
                (&after[..end], "", &after[end..])
            }
        };
        let value = values.get(name).map(String::as_str).filter(|value| !value.is_empty());
        out.push_str(value.unwrap_or(default));
        rest = next;
    }
    out + rest
}

/// A command without the comment lines that Dockerfiles allow between continued ones, and shells do not.
pub(super) fn without_comments(command: &str) -> String {
    let kept = command.lines().enumerate().filter(|(number, line)| *number == 0 || !line.trim_start().starts_with('#'));
    kept.map(|(_, line)| line).collect::<Vec<_>>().join("\n")
}

/// Words as a shell reads them back.
pub(super) fn quoted<'a>(words: impl Iterator<Item = &'a str>) -> String {
    let is_plain = |word: &str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || b"_@%+=:,./-".contains(&b));
    let shown = |word: &str| if is_plain(word) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) };
    words.map(shown).collect::<Vec<_>>().join(" ")
}
