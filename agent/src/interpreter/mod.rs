//! The code interpreter: contexts, each with a kernel that keeps a language's state between cells.
//!
//! ```text
//! http (port 49999, E2B's wire) ─┐                              ┌─ jupyter ─ message ─ zmtp    ipykernel, IRkernel
//! hopx (HopX's /execute)       ──┴─> Interpreter ─> context ─> kernel
//!                                    (this file)    (a task)    └─ lines                       node, bash, jshell
//! ```
//! Languages come with the template, as files that say how a kernel is started (languages.rs). A template without them
//! is no code interpreter: [`enable`] then does nothing, and a program of the sandbox may have the port.
//!
//! The default contexts of languages that are `warm` begin with the first /init, so that a template's dump holds their
//! kernels waiting. When the sandbox becomes another one, /init calls [`Interpreter::introduce`], and every kernel gets
//! the new sandbox's variables and randomness of its own.

mod context;
mod http;
mod jupyter;
mod kernel;
mod languages;
mod lines;
mod message;
mod output;
mod process;
mod zmtp;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::mpsc;

use self::context::Handle;
pub(crate) use self::context::QueueFull;
pub(crate) use self::http::enable;
use self::kernel::Randomness;
pub(crate) use self::languages::LanguageError;
use self::languages::Start;
pub(crate) use self::output::{Failure, Output, Printed, Role, Shown};
use crate::state::Agent;

/// E2B's: whatever the template's default is, cells begin here.
const CWD: &str = "/home/user";
/// Contexts of one sandbox; each may hold a process of 60 MiB.
const CONTEXTS_MAX: usize = 256;

/// All contexts of the sandbox.
#[derive(Debug, Default)]
pub(crate) struct Interpreter(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// In the order in which they were made.
    contexts: Vec<Arc<Handle>>,
    is_installed: bool,
    /// Whether the default contexts are listed and the warm ones begun.
    has_defaults: bool,
    /// Kernels that are to wait before the template counts as ready.
    warming: usize,
}

/// A context as it is listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Facts {
    pub(crate) id: String,
    pub(crate) language: String,
    pub(crate) cwd: String,
    /// Whether cells that name the language alone go here.
    #[serde(skip)]
    pub(crate) is_default: bool,
}

/// Code to run, and under which conditions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) code: String,
    /// Variables for this cell alone.
    pub(crate) envs: BTreeMap<String, String>,
    /// Where it begins, and cells after it; None leaves that as it is. The folder has to be there.
    pub(crate) cwd: Option<String>,
    /// It is interrupted then. Without it, it runs until its client goes away.
    pub(crate) time_max: Option<Duration>,
}

/// Which context a cell goes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// The default context of a language, made when there is none.
    Language(String),
    Context(String),
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum InterpreterError {
    #[error("this template has no code interpreter; create the sandbox from template 'code-interpreter'")]
    NotInstalled,
    #[error("Context {0} not found")]
    UnknownContext(String),
    #[error(transparent)]
    Language(#[from] LanguageError),
    #[error("cwd '{0}' is not a directory")]
    Cwd(String),
    #[error("this sandbox has {CONTEXTS_MAX} contexts; remove some")]
    TooMany,
    #[error(transparent)]
    QueueFull(#[from] QueueFull),
}

impl Interpreter {
    /// Queues a cell. Its outputs come as its kernel makes them and end with it; dropping the receiver gives the cell up.
    pub(crate) fn execute(&self, agent: &Arc<Agent>, target: Target, cell: Cell) -> Result<mpsc::Receiver<Output>, InterpreterError> {
        let context = match target {
            Target::Context(id) => self.find(&id)?,
            Target::Language(name) => self.default_of(agent, &languages::normal_name(&name))?,
        };
        Ok(context.execute(cell)?)
    }

    /// A new context; its kernel starts right away, in the background.
    pub(crate) fn create(&self, agent: &Arc<Agent>, language: &str, cwd: Option<&str>) -> Result<Facts, InterpreterError> {
        let cwd = cwd.filter(|cwd| !cwd.is_empty()).unwrap_or(CWD);
        if !Path::new(cwd).is_dir() {
            return Err(InterpreterError::Cwd(cwd.to_owned()));
        }
        let context = self.add(agent, &languages::normal_name(language), cwd.to_owned(), IsDefault::No)?;
        drop(context.warm());
        Ok((*context.facts).clone())
    }

    pub(crate) fn list(&self) -> Vec<Facts> {
        self.state().contexts.iter().map(|context| (*context.facts).clone()).collect()
    }

    /// Ends what the context runs and forgets its state.
    pub(crate) async fn restart(&self, id: &str) -> Result<Result<(), String>, InterpreterError> {
        let context = self.find(id)?;
        Ok(context.restart().await.map_err(|error| error.to_string()))
    }

    /// Ends the context and what it runs.
    pub(crate) fn remove(&self, id: &str) -> Result<(), InterpreterError> {
        let mut state = self.state();
        let at = state.contexts.iter().position(|context| context.facts.id == id);
        let at = at.ok_or_else(|| InterpreterError::UnknownContext(id.to_owned()))?;
        state.contexts.remove(at);
        Ok(())
    }

    /// Called by every /init that makes the agent another sandbox's, the first one included.
    pub(crate) fn introduce(&self, agent: &Arc<Agent>) {
        if !self.state().is_installed {
            return;
        }
        let contexts = self.state().contexts.clone();
        contexts.iter().for_each(|context| context.introduce(Randomness::New));
        if !std::mem::replace(&mut self.state().has_defaults, true) {
            self.begin_defaults(agent);
        }
    }

    /// The sandbox's variables have changed; kernels get them for what they run next.
    pub(crate) fn share_envs(&self) {
        self.state().contexts.iter().for_each(|context| context.introduce(Randomness::Kept));
    }

    /// Whether the kernels that the template's dump is to hold are waiting.
    pub(crate) fn is_ready(&self) -> bool {
        let state = self.state();
        state.has_defaults && state.warming == 0
    }

    fn begin_defaults(&self, agent: &Arc<Agent>) {
        let mut languages: Vec<_> = languages::all().into_iter().filter(|(_, language)| language.start != Start::OnDemand).collect();
        languages.sort_by_key(|(_, language)| language.start != Start::Warm);
        for (name, language) in languages {
            match self.add(agent, &name, CWD.to_owned(), IsDefault::Yes) {
                Ok(context) if language.start == Start::Warm => self.await_warm(agent, &context),
                Ok(_) => {}
                Err(error) => agent.log.write(crate::wire::LogLevel::Warn, "no default context", [("reason", error.to_string())]),
            }
        }
    }

    fn await_warm(&self, agent: &Arc<Agent>, context: &Handle) {
        self.state().warming += 1;
        let (warm, agent) = (context.warm(), Arc::clone(agent));
        tokio::spawn(async move {
            let _ = warm.await;
            agent.interpreter.state().warming -= 1;
        });
    }

    fn default_of(&self, agent: &Arc<Agent>, language: &str) -> Result<Arc<Handle>, InterpreterError> {
        let existing = self.state().contexts.iter().find(|context| context.facts.is_default && context.facts.language == language).cloned();
        match existing {
            Some(context) => Ok(context),
            None => self.add(agent, language, CWD.to_owned(), IsDefault::Yes),
        }
    }

    fn find(&self, id: &str) -> Result<Arc<Handle>, InterpreterError> {
        let found = self.state().contexts.iter().find(|context| context.facts.id == id).cloned();
        found.ok_or_else(|| InterpreterError::UnknownContext(id.to_owned()))
    }

    fn add(&self, agent: &Arc<Agent>, language: &str, cwd: String, is_default: IsDefault) -> Result<Arc<Handle>, InterpreterError> {
        let mut state = self.state();
        if !state.is_installed {
            return Err(InterpreterError::NotInstalled);
        }
        if state.contexts.len() >= CONTEXTS_MAX {
            return Err(InterpreterError::TooMany);
        }
        let described = languages::find(language)?;
        let facts = Facts { id: random_uuid(), language: language.to_owned(), cwd, is_default: is_default == IsDefault::Yes };
        let context = Arc::new(Handle::start(agent, facts, described));
        state.contexts.push(Arc::clone(&context));
        Ok(context)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum IsDefault {
    Yes,
    No,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// From the kernel's generator, which no dump copies.
fn random_hex(bytes: usize) -> String {
    let mut random = vec![0u8; bytes];
    let mut filled = 0;
    while filled < bytes {
        // Interrupted by a signal; it has no other way to fail with these flags.
        filled += rustix::rand::getrandom(&mut random[filled..], rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
    }
    hex(&random)
}

fn random_uuid() -> String {
    let digits = random_hex(16);
    format!("{}-{}-4{}-8{}-{}", &digits[..8], &digits[8..12], &digits[13..16], &digits[17..20], &digits[20..])
}
