//! Which languages there are: one file per language in [`FOLDER`], laid down by the template's recipe. Bash needs none.
//!
//! A file is read when it is needed, so what is installed in a running sandbox counts at once. No folder means that the
//! template is no code interpreter, and port 49999 stays free for others.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Deserialize;

pub(super) const FOLDER: &str = "/usr/share/stillbox/interpreter";
pub(super) const DEFAULT: &str = "python";
/// Languages that a template of ours adds, and its name.
const ADDED_BY: [(&str, &str); 2] = [("r", "code-interpreter-r"), ("java", "code-interpreter-java")];

/// How a language's kernel is started and spoken to.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Language {
    pub(super) wire: Wire,
    /// `{connection_file}` stands for the path of Jupyter's connection file.
    pub(super) command: Vec<String>,
    #[serde(default)]
    pub(super) start: Start,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Wire {
    /// Jupyter's, over unix sockets.
    JupyterIpc,
    /// Jupyter's, over loopback, for kernels that know nothing else.
    JupyterTcp,
    /// Our own, over pipes (lines.rs).
    Lines,
    /// A bash that is given cells to source.
    Bash,
}

/// When the default context of a language begins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Start {
    /// With the agent, so that the template's dump holds a kernel that waits.
    Warm,
    /// It is listed from the beginning; its kernel starts with its first cell.
    Listed,
    #[default]
    OnDemand,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LanguageError {
    #[error(
        "language '{language}' is not in this template; create the sandbox from template '{template}' (stillbox template build {template})"
    )]
    InAnotherTemplate { language: String, template: &'static str },
    #[error("language '{language}' is not known here; this template has {known}")]
    Unknown { language: String, known: String },
    #[error("the description of language '{language}' in {FOLDER} cannot be used: {problem}")]
    Malformed { language: String, problem: String },
}

/// Whether this template is a code interpreter.
pub(super) fn are_installed() -> bool {
    Path::new(FOLDER).is_dir()
}

/// The name by which a language is listed.
pub(super) fn normal_name(asked: &str) -> String {
    match asked.trim().to_lowercase().as_str() {
        "" => DEFAULT.to_owned(),
        "js" => "javascript".to_owned(),
        "ts" => "typescript".to_owned(),
        "sh" | "shell" => "bash".to_owned(),
        other => other.to_owned(),
    }
}

/// The language called `name`, which is a normal one.
pub(super) fn find(name: &str) -> Result<Language, LanguageError> {
    find_in(Path::new(FOLDER), name)
}

/// All languages of this template.
pub(super) fn all() -> BTreeMap<String, Language> {
    let names = names_in(Path::new(FOLDER)).into_iter();
    names.filter_map(|name| find(&name).ok().map(|language| (name, language))).collect()
}

fn find_in(folder: &Path, name: &str) -> Result<Language, LanguageError> {
    let is_plain = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    let text = is_plain.then(|| fs::read(folder.join(format!("{name}.json"))).ok()).flatten();
    match (text, name) {
        (Some(text), _) => serde_json::from_slice(&text)
            .map_err(|error| LanguageError::Malformed { language: name.to_owned(), problem: error.to_string() }),
        (None, "bash") => Ok(bash()),
        (None, _) => Err(missing(folder, name)),
    }
}

fn bash() -> Language {
    let command = ["bash", "--noprofile", "--norc", "--noediting", "-i"].map(str::to_owned).to_vec();
    Language { wire: Wire::Bash, command, start: Start::OnDemand }
}

fn missing(folder: &Path, name: &str) -> LanguageError {
    let language: String = name.chars().take(40).collect();
    match ADDED_BY.iter().find(|(added, _)| *added == name) {
        Some((_, template)) => LanguageError::InAnotherTemplate { language, template },
        None => LanguageError::Unknown { language, known: names_in(folder).join(", ") },
    }
}

fn names_in(folder: &Path) -> Vec<String> {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        files.filter_map(|file| file.file_name().to_str()?.strip_suffix(".json").map(str::to_owned)).chain(["bash".to_owned()]).collect();
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let python = r#"{ "wire": "jupyter-ipc", "command": ["python3", "{connection_file}"], "start": "warm" }"#;
        fs::write(folder.path().join("python.json"), python).unwrap();
        fs::write(folder.path().join("broken.json"), "{").unwrap();
        folder
    }

    #[test]
    fn a_language_is_what_its_file_says_and_bash_needs_none() {
        let folder = folder();
        let python = find_in(folder.path(), "python").unwrap();
        assert_eq!((python.wire, python.start, python.command.len()), (Wire::JupyterIpc, Start::Warm, 2));
        assert_eq!(find_in(folder.path(), "bash").unwrap().wire, Wire::Bash);
        assert!(matches!(find_in(folder.path(), "broken"), Err(LanguageError::Malformed { .. })));
    }

    #[test]
    fn a_missing_language_is_answered_with_where_it_is() {
        let folder = folder();
        let message = |name: &str| find_in(folder.path(), name).unwrap_err().to_string();
        assert!(message("r").ends_with("(stillbox template build code-interpreter-r)"), "{}", message("r"));
        assert_eq!(message("cobol"), "language 'cobol' is not known here; this template has bash, broken, python");
        assert!(message("../python").starts_with("language '../python' is not known"), "{}", message("../python"));
    }

    #[test]
    fn short_names_and_capitals_are_understood() {
        let names = [("JS", "javascript"), ("ts ", "typescript"), ("", "python"), ("Sh", "bash"), ("R", "r")];
        assert!(names.iter().all(|(asked, normal)| normal_name(asked) == *normal));
    }
}
