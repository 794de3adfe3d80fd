//! A build as far as it has come: layers and the settings that the next step runs with.

use super::expand::expand;
use super::plan::{Instruction, Sudo};
use super::view::{Found, View};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

/// What programs are looked up in when nobody says otherwise.
pub(super) const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const WORKDIR_SCRIPT: &str = include_str!("workdir.sh");
const USER_SCRIPT: &str = include_str!("user.sh");

/// Everything that decides what the next step does. Equal states and steps have equal outcomes: the cache rests on it.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub(super) struct State {
    /// Bottom to top.
    pub(super) layers: Vec<String>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) user: String,
    /// Empty = the user's home.
    pub(super) workdir: String,
    /// What steps without a sandbox of their own left for the next one that has one.
    pub(super) pending: Vec<Errand>,
}

/// A script that root runs in the next sandbox.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub(super) struct Errand {
    /// The step that it belongs to, from 1. No part of what it does.
    #[serde(skip)]
    pub(super) step: usize,
    pub(super) script: &'static str,
    pub(super) env: BTreeMap<String, String>,
}

impl State {
    /// The name under which the outcome of `what`, done in this state, is remembered.
    pub(super) fn key(&self, what: &impl serde::Serialize) -> String {
        let text = serde_json::to_vec(&(self, what)).expect("plain data with text keys");
        hex::encode(Sha256::digest(text))
    }

    /// The layers, for looking things up.
    pub(super) fn view(&self, data_dir: &Path) -> View {
        View::of(data_dir, &self.layers)
    }

    /// Variables of a command. The usual folders are found even if an image's PATH leaves them out.
    pub(super) fn env_of_commands(&self) -> BTreeMap<String, String> {
        let mut env = self.env.clone();
        if let Some(path) = env.get_mut("PATH") {
            path.push(':');
            path.push_str(DEFAULT_PATH);
        }
        env
    }

    /// Does a step that changes settings only, or leaves an errand where files have to change too. `false` for a step
    /// that runs in a sandbox.
    pub(super) fn apply(&mut self, instruction: &Instruction, step: usize, data_dir: &Path) -> io::Result<bool> {
        match instruction {
            Instruction::Env(pairs) => self.set_env(pairs),
            Instruction::Workdir(path) => self.set_workdir(path, step, data_dir)?,
            Instruction::User { name, sudo } => self.set_user(name, *sudo, step, data_dir)?,
            Instruction::Run { .. } | Instruction::Copy(_) => return Ok(false),
        }
        Ok(true)
    }

    fn set_env(&mut self, pairs: &[(String, String)]) {
        for (name, value) in pairs {
            let mut known = self.env.clone();
            known.entry("PATH".to_owned()).or_insert_with(|| DEFAULT_PATH.to_owned());
            self.env.insert(name.clone(), expand(value, &known));
        }
    }

    fn set_workdir(&mut self, path: &str, step: usize, data_dir: &Path) -> io::Result<()> {
        let before = if self.workdir.is_empty() { "/" } else { &self.workdir };
        let target = tidy(&Path::new(before).join(path));
        self.workdir.clone_from(&target);
        if !matches!(self.view(data_dir).find(Path::new(&target))?, Found::Folder(_)) {
            let env = [("TARGET", target), ("OWNER", format!("{}:", self.user))];
            self.leave(step, WORKDIR_SCRIPT, env);
        }
        Ok(())
    }

    fn set_user(&mut self, name: &str, sudo: Sudo, step: usize, data_dir: &Path) -> io::Result<()> {
        self.user = name.to_owned();
        let sudo = match sudo {
            Sudo::AsIs if has_user(&self.view(data_dir), name)? => return Ok(()),
            Sudo::AsIs => "",
            Sudo::WithoutPassword => "yes",
        };
        self.leave(step, USER_SCRIPT, [("NAME", name.to_owned()), ("SUDO", sudo.to_owned())]);
        Ok(())
    }

    fn leave(&mut self, step: usize, script: &'static str, env: [(&str, String); 2]) {
        let env = env.map(|(name, value)| (name.to_owned(), value)).into();
        self.pending.push(Errand { step, script, env });
    }

    /// After a sandbox has done a step and the errands before it.
    pub(super) fn done(&mut self, layer: Option<String>) {
        self.pending.clear();
        self.layers.extend(layer);
        self.layers = each_once(std::mem::take(&mut self.layers));
    }
}

/// The layers, of those that come again only the uppermost: overlayfs takes none twice. One that comes again on top has
/// everything that it has further down, and hides everything that it hides there.
pub(super) fn each_once(layers: Vec<String>) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let mut kept: Vec<String> = layers.into_iter().rev().filter(|id| seen.insert(id.clone())).collect();
    kept.reverse();
    kept
}

/// The path without `.`, `..` and double slashes.
fn tidy(path: &Path) -> String {
    let mut tidied = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => tidied.push(name),
            Component::ParentDir => drop(tidied.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    tidied.to_string_lossy().into_owned()
}

fn has_user(view: &View, name: &str) -> io::Result<bool> {
    let Found::Other(file) = view.find(Path::new("/etc/passwd"))? else { return Ok(false) };
    let text = fs::read(file)?;
    Ok(text.split(|byte| *byte == b'\n').any(|line| line.split(|byte| *byte == b':').next() == Some(name.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::super::plan::{Cache, Step};
    use super::*;

    fn state() -> State {
        let layers = vec!["a".to_owned()];
        State { layers, env: BTreeMap::new(), user: "root".to_owned(), workdir: String::new(), pending: Vec::new() }
    }

    /// A data folder whose layer `a` has root and /srv/app.
    fn data_dir() -> tempfile::TempDir {
        let data_dir = tempfile::tempdir().unwrap();
        let layer = data_dir.path().join("layers/a");
        fs::create_dir_all(layer.join("srv/app")).unwrap();
        fs::create_dir_all(layer.join("etc")).unwrap();
        fs::write(layer.join("etc/passwd"), "root:x:0:0::/root:/bin/bash\nuser:x:1000:1000::/home/user:/bin/bash\n").unwrap();
        data_dir
    }

    fn instruction(kind: &str, arguments: &[&str]) -> Instruction {
        let arguments = arguments.iter().map(ToString::to_string).collect();
        Instruction::of(&Step { kind: kind.into(), arguments, files_hash: None, cache: Cache::Use }).unwrap()
    }

    fn after(steps: &[(&str, &[&str])]) -> State {
        let (data_dir, mut state) = (data_dir(), state());
        for (number, (kind, arguments)) in (1..).zip(steps) {
            assert!(state.apply(&instruction(kind, arguments), number, data_dir.path()).unwrap());
        }
        state
    }

    #[test]
    fn what_is_there_already_needs_no_sandbox() {
        let state = after(&[("WORKDIR", &["/srv"]), ("WORKDIR", &["x/../app/."]), ("USER", &["user"])]);
        assert_eq!((state.workdir.as_str(), state.user.as_str(), state.pending.len()), ("/srv/app", "user", 0));
    }

    #[test]
    fn what_is_missing_is_left_for_the_next_sandbox_under_its_own_step() {
        let state = after(&[("USER", &["dev"]), ("WORKDIR", &["/new"]), ("USER", &["user", "true"])]);
        let errands: Vec<_> = state.pending.iter().map(|errand| (errand.step, errand.env.values().cloned().collect::<Vec<_>>())).collect();
        assert_eq!(errands[0], (1, vec!["dev".to_owned(), String::new()]));
        assert_eq!(errands[1], (2, vec!["dev:".to_owned(), "/new".to_owned()]));
        assert_eq!(errands[2], (3, vec!["user".to_owned(), "yes".to_owned()]));
    }

    #[test]
    fn variables_see_those_before_them_in_the_same_step() {
        let state = after(&[("ENV", &["A", "1", "B", "${A}2", "PATH", "/opt:$PATH"])]);
        assert_eq!(state.env["B"], "12");
        assert_eq!(state.env["PATH"], format!("/opt:{DEFAULT_PATH}"));
    }

    #[test]
    fn a_layer_that_comes_again_counts_where_it_is_on_top() {
        let mut state = State { layers: ["a", "b", "c"].map(ToOwned::to_owned).into(), ..state() };
        state.done(Some("b".to_owned()));
        assert_eq!(state.layers, ["a", "c", "b"]);
        state.done(Some("b".to_owned()));
        state.done(None);
        assert_eq!(state.layers, ["a", "c", "b"]);
    }

    #[test]
    fn a_key_changes_with_everything_that_a_step_can_see() {
        let run = instruction("RUN", &["true"]);
        let key = state().key(&run);
        assert_eq!(key, state().key(&run));
        let others = [
            State { layers: vec!["b".into()], ..state() },
            State { env: [("A".to_owned(), "1".to_owned())].into(), ..state() },
            State { user: "user".into(), ..state() },
            State { workdir: "/srv".into(), ..state() },
            State { pending: vec![Errand { step: 1, script: USER_SCRIPT, env: BTreeMap::new() }], ..state() },
        ];
        let mut keys: Vec<String> = others.iter().map(|state| state.key(&run)).collect();
        keys.push(state().key(&instruction("RUN", &["true", "user"])));
        keys.push(key);
        let count = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), count);
    }
}
