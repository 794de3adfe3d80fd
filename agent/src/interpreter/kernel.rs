//! A kernel, whichever wire it speaks: one running program that keeps a language's state between cells.

use std::collections::BTreeMap;
use std::io;

use serde_json::json;

use super::jupyter::JupyterKernel;
use super::languages::{Language, Wire};
use super::lines::LinesKernel;
use super::output::Output;
use super::process::StartError;
use crate::state::Agent;

/// What a kernel tells.
#[derive(Debug)]
pub(super) enum Event {
    Output(Output),
    /// The cell has ended; it takes the next.
    Done,
    /// The kernel is gone, with the reason for people.
    Died(String),
    /// The same, and the latest request was not read: no code of it has run.
    DiedBefore(String),
}

/// Whether a cell counts and its outputs are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Visibility {
    Shown,
    Silent,
}

/// Whether a kernel goes on with the random numbers that it would have drawn anyway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Randomness {
    Kept,
    /// Its twin in another sandbox would draw the same ones.
    New,
}

/// Variables to give to a running kernel, and those to take from it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct EnvChange {
    pub(super) set: BTreeMap<String, String>,
    pub(super) unset: Vec<String>,
}

impl EnvChange {
    /// What makes `old` into `new`.
    pub(super) fn between(old: &BTreeMap<String, String>, new: &BTreeMap<String, String>) -> EnvChange {
        let is_new = |(name, value): &(&String, &String)| old.get(*name) != Some(value);
        EnvChange {
            set: new.iter().filter(is_new).map(|(name, value)| (name.clone(), value.clone())).collect(),
            unset: old.keys().filter(|name| !new.contains_key(*name)).cloned().collect(),
        }
    }

    /// As if `later` had been part of this change.
    pub(super) fn extend(&mut self, later: &EnvChange) {
        self.unset.retain(|name| !later.set.contains_key(name));
        self.set.retain(|name, _| !later.unset.contains(name));
        self.set.extend(later.set.clone());
        self.unset.extend(later.unset.clone());
    }

    pub(super) fn is_empty(&self) -> bool {
        self.set.is_empty() && self.unset.is_empty()
    }
}

#[derive(Debug)]
pub(super) enum Kernel {
    Jupyter(Box<JupyterKernel>),
    Lines(Box<LinesKernel>),
}

impl Kernel {
    /// Returns when it takes cells.
    pub(super) async fn start(agent: &Agent, language: &Language, cwd: &str) -> Result<Kernel, StartError> {
        match language.wire {
            Wire::JupyterIpc | Wire::JupyterTcp => {
                JupyterKernel::start(agent, language, cwd).await.map(|kernel| Kernel::Jupyter(Box::new(kernel)))
            }
            Wire::Lines | Wire::Bash => LinesKernel::start(agent, language, cwd).await.map(|kernel| Kernel::Lines(Box::new(kernel))),
        }
    }

    /// Runs a first cell that nobody sees: what a kernel loads and compiles for it is in the template's dump afterwards.
    pub(super) async fn practise(&mut self, language: &str) {
        let (Kernel::Jupyter(kernel), "python") = (self, language) else { return };
        if kernel.begin("get_ipython().display_formatter.format([1])", Visibility::Silent).await.is_ok() {
            // A kernel that dies of it shows that again with its first cell.
            while let Event::Output(_) = kernel.next().await {}
        }
    }

    /// Hands over a cell. Not before the former one has ended. An error says that the kernel has not got all of it, and so
    /// runs none of it.
    pub(super) async fn begin(&mut self, code: &str, visibility: Visibility) -> io::Result<()> {
        match self {
            Kernel::Jupyter(kernel) => kernel.begin(code, visibility).await,
            Kernel::Lines(kernel) => kernel.begin(code).await,
        }
    }

    /// Cancel-safe. Between cells it tells of nothing but the kernel's death.
    pub(super) async fn next(&mut self) -> Event {
        match self {
            Kernel::Jupyter(kernel) => kernel.next().await,
            Kernel::Lines(kernel) => kernel.next().await,
        }
    }

    pub(super) fn is_dead(&mut self) -> bool {
        match self {
            Kernel::Jupyter(kernel) => kernel.process.is_dead(),
            Kernel::Lines(kernel) => kernel.process.is_dead(),
        }
    }

    /// As Ctrl-C. The cell ends by itself some time later, or goes on if its language lets it.
    pub(super) async fn interrupt(&mut self) {
        match self {
            Kernel::Jupyter(kernel) => kernel.process.interrupt(),
            Kernel::Lines(kernel) => kernel.interrupt().await,
        }
    }

    /// Changes the variables that the next cell sees.
    pub(super) async fn change_env(&mut self, language: &str, change: &EnvChange) -> io::Result<()> {
        match self {
            Kernel::Lines(kernel) => kernel.change_env(change).await,
            Kernel::Jupyter(kernel) => match env_code(language, change) {
                Some(code) => silently(kernel, &code).await,
                None => Ok(()),
            },
        }
    }

    /// Makes a folder the working directory of the next cells, in languages that are asked for it.
    pub(super) async fn enter(&mut self, language: &str, folder: &str) -> io::Result<()> {
        match (self, language) {
            (Kernel::Jupyter(kernel), "python") => silently(kernel, &format!("__import__('os').chdir({})", json!(folder))).await,
            (Kernel::Jupyter(_) | Kernel::Lines(_), _) => Ok(()),
        }
    }

    /// The sandbox has become another one, perhaps in the middle of a cell: new variables, and mostly new randomness.
    pub(super) async fn introduce(&mut self, change: &EnvChange, randomness: Randomness) -> io::Result<()> {
        match self {
            Kernel::Lines(kernel) => {
                kernel.change_env(change).await?;
                if randomness == Randomness::New {
                    kernel.reseed().await?;
                }
                Ok(())
            }
            Kernel::Jupyter(kernel) => kernel.introduce(change, randomness),
        }
    }
}

/// Runs code that counts as no cell.
async fn silently(kernel: &mut JupyterKernel, code: &str) -> io::Result<()> {
    kernel.begin(code, Visibility::Silent).await?;
    match kernel.next().await {
        Event::Done | Event::Output(_) => Ok(()),
        Event::Died(_) | Event::DiedBefore(_) => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Code that changes variables in a kernel of `language`; None for one of which it is not known. JSON's strings are
/// those of Python and R, as long as nothing but quotes, backslashes and control characters is escaped.
fn env_code(language: &str, change: &EnvChange) -> Option<String> {
    let lines = |line: &dyn Fn(&str, &str) -> String| {
        change.set.iter().map(|(name, value)| line(&json!(name).to_string(), &json!(value).to_string())).collect::<Vec<_>>().join("\n")
    };
    match language {
        "python" => {
            let (set, unset) = (json!(change.set), json!(change.unset));
            Some(format!("__import__('os').environ.update({set})\nfor _ in {unset}: __import__('os').environ.pop(_, None)"))
        }
        "r" => {
            let set = lines(&|name, value| format!("do.call(Sys.setenv, setNames(list({value}), {name}))"));
            let unset: Vec<String> = change.unset.iter().map(|name| format!("Sys.unsetenv({})", json!(name))).collect();
            Some(format!("{set}\n{}", unset.join("\n")))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_change_holds_what_differs_and_nothing_else() {
        let (old, new) = (envs(&[("A", "1"), ("B", "2"), ("C", "3")]), envs(&[("A", "1"), ("B", "x"), ("D", "4")]));
        let change = EnvChange::between(&old, &new);
        assert_eq!(change, EnvChange { set: envs(&[("B", "x"), ("D", "4")]), unset: vec!["C".into()] });
        assert!(EnvChange::between(&new, &new).is_empty());
    }

    #[test]
    fn two_changes_make_one() {
        let mut change = EnvChange { set: envs(&[("A", "1"), ("B", "2")]), unset: vec!["C".into(), "D".into()] };
        change.extend(&EnvChange { set: envs(&[("B", "3"), ("C", "4")]), unset: vec!["A".into()] });
        assert_eq!(change, EnvChange { set: envs(&[("B", "3"), ("C", "4")]), unset: vec!["D".into(), "A".into()] });
    }

    #[test]
    fn values_are_quoted_for_their_language() {
        let change = EnvChange { set: envs(&[("A", "it's \"x\"\n\\ü")]), unset: vec!["B".into()] };
        let python = env_code("python", &change).unwrap();
        assert!(python.starts_with(r#"__import__('os').environ.update({"A":"it's \"x\"\n\\ü"})"#), "{python}");
        assert!(python.ends_with(r#"for _ in ["B"]: __import__('os').environ.pop(_, None)"#), "{python}");
        let r = env_code("r", &change).unwrap();
        assert_eq!(r, "do.call(Sys.setenv, setNames(list(\"it's \\\"x\\\"\\n\\\\ü\"), \"A\"))\nSys.unsetenv(\"B\")");
        assert_eq!(env_code("cobol", &change), None);
    }
}
