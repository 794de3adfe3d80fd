//! What a build is asked to do: a base, steps, a start and a ready command (contract/e2b.md 5).
//!
//! [`Plan`] is what a client sent; [`Instruction`] is one step of it, understood. A step that makes no sense fails the
//! build with its number, as one that fails when it runs does.

use super::super::image::ImageRequest;

/// What a client asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// What it stands on.
    pub base: Base,
    /// Whether nothing of earlier builds is used.
    pub cache: Cache,
    /// In order.
    pub steps: Vec<Step>,
    /// Replaces the base's, if either is given.
    pub start_command: Option<String>,
    /// Replaces the base's, if either is given.
    pub ready_command: Option<String>,
}

/// What a build stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Base {
    /// An image, by its reference.
    Image(ImageRequest),
    /// A template, by `name[:tag]` or id.
    Template(String),
}

/// Whether what an earlier build made may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Where nothing has changed.
    Use,
    /// From here on everything is done again.
    Skip,
}

/// One step as it was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// `RUN`, `COPY`, `ENV`, `WORKDIR`, `USER`.
    pub kind: String,
    /// By kind.
    pub arguments: Vec<String>,
    /// Which uploaded archive a COPY takes.
    pub files_hash: Option<String>,
    /// `Skip` holds for the following steps too.
    pub cache: Cache,
}

impl Step {
    /// As it stands in the log.
    pub fn shown(&self) -> String {
        let words = std::iter::once(self.kind.to_ascii_uppercase()).chain(self.arguments.iter().cloned());
        words.collect::<Vec<_>>().join(" ").trim_end().to_owned()
    }
}

/// One step, understood.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub(super) enum Instruction {
    Run {
        script: String,
        /// For this step only.
        user: Option<String>,
    },
    Copy(Copy),
    /// Names and values as written, unexpanded.
    Env(Vec<(String, String)>),
    Workdir(String),
    User {
        name: String,
        sudo: Sudo,
    },
}

/// A COPY step.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub(super) struct Copy {
    /// Path in the archive, without what comes after the first wildcard.
    pub(super) source: String,
    pub(super) target: String,
    /// `user:group`; `None` = whoever runs the steps.
    pub(super) owner: Option<String>,
    /// In octal digits.
    pub(super) mode: Option<String>,
    pub(super) files_hash: String,
}

/// Whether a user may become root without a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub(super) enum Sudo {
    AsIs,
    WithoutPassword,
}

/// Why a step makes no sense; a sentence that names its kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct BadStep(String);

impl Instruction {
    pub(super) fn of(step: &Step) -> Result<Self, BadStep> {
        let bad = |what: &str| BadStep(format!("{} {what}", step.kind.to_ascii_uppercase()));
        let argument = |position: usize| step.arguments.get(position).map(String::as_str).filter(|text| !text.is_empty());
        match step.kind.to_ascii_uppercase().as_str() {
            "RUN" => Ok(Self::Run {
                script: argument(0).ok_or_else(|| bad("requires command argument"))?.to_owned(),
                user: argument(1).map(ToOwned::to_owned),
            }),
            // ADD is what Dockerfiles call a COPY that clients have resolved to files.
            "COPY" | "ADD" => copy(step, argument).map(Self::Copy).map_err(bad),
            "ENV" | "ARG" => env(&step.arguments).map(Self::Env).map_err(bad),
            "WORKDIR" => {
                let path = argument(0).ok_or_else(|| bad("requires a path argument"))?;
                Ok(Self::Workdir(path.to_owned()))
            }
            "USER" => {
                let name = argument(0).filter(|name| is_user_name(name)).ok_or_else(|| bad("requires a username argument"))?;
                let sudo = if argument(1) == Some("true") { Sudo::WithoutPassword } else { Sudo::AsIs };
                Ok(Self::User { name: name.to_owned(), sudo })
            }
            _ => Err(BadStep(format!(
                "step type '{}' is unknown; there are RUN, COPY, ENV, WORKDIR and USER",
                step.kind.chars().take(32).collect::<String>()
            ))),
        }
    }
}

/// What may be a name in /etc/passwd: no separator, no option, nothing that a shell reads.
fn is_user_name(name: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    name.len() <= 64 && !name.starts_with('-') && name.bytes().all(is_word)
}

fn copy<'s>(step: &'s Step, argument: impl Fn(usize) -> Option<&'s str>) -> Result<Copy, &'static str> {
    let (Some(source), Some(target)) = (argument(0), argument(1)) else {
        return Err("requires a local path and a container path argument");
    };
    let files_hash = step.files_hash.clone().filter(|hash| is_files_hash(hash)).ok_or("requires files hash to be set")?;
    let owner = match argument(2) {
        None => None,
        Some(owner) => Some(owner_and_group(owner).ok_or("has an owner that is neither 'user' nor 'user:group'")?),
    };
    let mode = argument(3);
    if mode.is_some_and(|mode| mode.len() > 5 || !mode.bytes().all(|byte| matches!(byte, b'0'..=b'7'))) {
        return Err("has a mode that is no octal number");
    }
    let (target, mode) = (target.to_owned(), mode.map(ToOwned::to_owned));
    Ok(Copy { source: without_wildcards(source), target, owner, mode, files_hash })
}

/// A hash names a file of ours: nothing but hexadecimal digits may be in it.
pub(super) fn is_files_hash(text: &str) -> bool {
    (16..=128).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn owner_and_group(text: &str) -> Option<String> {
    let (user, group) = text.split_once(':').unwrap_or((text, text));
    (!user.is_empty() && !group.is_empty() && is_user_name(user) && is_user_name(group)).then(|| format!("{user}:{group}"))
}

/// The folder that a pattern's matches have in common: clients have resolved the pattern, the archive has the matches.
fn without_wildcards(source: &str) -> String {
    let is_plain = |part: &&str| !part.contains(['*', '?', '[', '{']);
    let parts: Vec<&str> = source.split('/').take_while(is_plain).filter(|part| !part.is_empty() && *part != ".").collect();
    parts.join("/")
}

fn env(arguments: &[String]) -> Result<Vec<(String, String)>, &'static str> {
    if arguments.is_empty() {
        return Err("does not support passing no arguments");
    }
    let (pairs, []) = arguments.as_chunks::<2>() else { return Err("requires both a key and value arguments") };
    let is_name = |name: &str| !name.is_empty() && !name.contains(['=', '\0']);
    if !pairs.iter().all(|[name, value]| is_name(name) && !value.contains('\0')) {
        return Err("has a key that is empty or holds '='");
    }
    Ok(pairs.iter().map(|[name, value]| (name.clone(), value.clone())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn step(kind: &str, arguments: &[&str]) -> Step {
        let arguments = arguments.iter().map(ToString::to_string).collect();
        Step { kind: kind.to_owned(), arguments, files_hash: Some("ab".repeat(32)), cache: Cache::Use }
    }

    fn refused(kind: &str, arguments: &[&str]) -> String {
        Instruction::of(&step(kind, arguments)).unwrap_err().to_string()
    }

    fn copied(arguments: &[&str]) -> Copy {
        match Instruction::of(&step("COPY", arguments)).unwrap() {
            Instruction::Copy(copy) => copy,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn arguments_that_are_missing_are_named_by_kind() {
        assert_eq!(refused("run", &[]), "RUN requires command argument");
        assert_eq!(refused("COPY", &["a"]), "COPY requires a local path and a container path argument");
        assert_eq!(refused("ENV", &["a"]), "ENV requires both a key and value arguments");
        assert_eq!(refused("USER", &["a;b"]), "USER requires a username argument");
        assert!(refused("VOLUME", &["/a"]).starts_with("step type 'VOLUME' is unknown"));
        let without = Step { files_hash: None, ..step("COPY", &["a", "b"]) };
        assert_eq!(Instruction::of(&without).unwrap_err().to_string(), "COPY requires files hash to be set");
    }

    #[test]
    fn a_copy_has_an_owner_with_group_and_an_octal_mode() {
        let copy = copied(&["src/*.py", "app/", "dev", "0755"]);
        assert_eq!((copy.source.as_str(), copy.owner.as_deref(), copy.mode.as_deref()), ("src", Some("dev:dev"), Some("0755")));
        assert_eq!(copied(&["a", "b", "1000:staff", ""]).owner.as_deref(), Some("1000:staff"));
        assert_eq!(refused("COPY", &["a", "b", "", "u+x"]), "COPY has a mode that is no octal number");
        assert!(refused("COPY", &["a", "b", "x:$(id)"]).contains("owner"));
    }

    #[test]
    fn a_source_loses_its_wildcards() {
        for (source, left) in [("folder/*", "folder"), ("./a/b.txt", "a/b.txt"), ("*", ""), (".", ""), ("a/**/b", "a"), ("a/b?/c", "a")] {
            assert_eq!(without_wildcards(source), left, "{source}");
        }
    }

    proptest! {
        #[test]
        fn no_step_is_understood_with_a_hash_or_user_that_leads_elsewhere(text in "\\PC{0,40}") {
            let hashed = Step { files_hash: Some(text.clone()), ..step("COPY", &["a", "b"]) };
            if Instruction::of(&hashed).is_ok() {
                prop_assert!(text.bytes().all(|byte| byte.is_ascii_hexdigit()));
            }
            if let Ok(Instruction::User { name, .. }) = Instruction::of(&step("USER", &[&text])) {
                prop_assert!(!name.contains([' ', '/', ':', '\'', '$', ';', '\n']));
            }
        }
    }
}
