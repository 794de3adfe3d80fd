//! POST /execute, /execute/ipython and /execute/rich: code, and everything that it printed and showed.
//!
//! Python runs in the one kernel of the sandbox that all clients share, E2B's included, if the template has it; else,
//! and in other languages, in a process of its own that leaves nothing behind.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::commands::timeout;
use super::error::{Code, HopxError};
use super::languages::Language;
use super::pieces::{self, Ended, Finished, Outcome, Piece};
use super::run::{self, END_MAX};
use crate::interpreter::{Cell, Failure, InterpreterError, Output, Printed, Role, Shown, Target};
use crate::logs::rfc3339;
use crate::memory;
use crate::process::exit::Exit;
use crate::state::Agent;

/// Of code that names no timeout.
const TIMEOUT_DEFAULT_S: f64 = 120.0;
/// Forms of a value that have a field of their own; `e2b/data` is a data frame's rows, as the template's kernel shows them.
const FORMS: [(&str, &str); 6] = [
    ("image/png", "png"),
    ("text/html", "html"),
    ("image/svg+xml", "svg"),
    ("application/json", "json"),
    ("text/markdown", "markdown"),
    ("e2b/data", "dataframe"),
];

#[derive(Debug, Deserialize)]
pub(super) struct Request {
    code: String,
    language: Option<String>,
    timeout: Option<f64>,
    #[serde(alias = "working_dir")]
    workdir: Option<String>,
    env: Option<BTreeMap<String, String>>,
}

/// A request that can be run.
#[derive(Debug)]
pub(super) struct Execution {
    pub(super) language: Language,
    code: String,
    workdir: String,
    envs: BTreeMap<String, String>,
    timeout: Duration,
}

impl Request {
    pub(super) async fn checked(self, agent: &Agent) -> Result<Execution, HopxError> {
        let language = Language::named(self.language.as_deref())?;
        let timeout = timeout(self.timeout, TIMEOUT_DEFAULT_S)?;
        let workdir = run::workdir(agent, self.workdir).await?;
        if !std::path::Path::new(&workdir).is_dir() {
            return Err(HopxError::new(Code::DirectoryNotFound, format!("workdir '{workdir}' is not a directory")).at(workdir));
        }
        Ok(Execution { language, code: self.code, workdir, envs: self.env.unwrap_or_default(), timeout })
    }
}

pub(super) async fn execute(
    State(agent): State<Arc<Agent>>,
    request: Result<Json<Request>, JsonRejection>,
) -> Result<Json<Value>, HopxError> {
    let Json(request) = request?;
    let execution = request.checked(&agent).await?;
    let language = execution.language;
    let finished = pieces::gather(begin(&agent, execution)?).await;
    memory::release_later();
    finished.map(|finished| Json(shown(finished, language))).ok_or_else(|| HopxError::new(Code::ExecutionFailed, "the end was lost"))
}

/// Starts it in a task of its own; who drops the receiver lets it run until its timeout.
pub(super) fn begin(agent: &Arc<Agent>, execution: Execution) -> Result<mpsc::Receiver<Piece>, HopxError> {
    let Execution { language, code, workdir, envs, timeout } = execution;
    if language != Language::Python {
        return in_process(agent, language.program(code, workdir, envs, timeout)?);
    }
    let cell = Cell { code: code.clone(), envs: envs.clone(), cwd: Some(workdir.clone()), time_max: Some(timeout) };
    match agent.interpreter.execute(agent, Target::Language("python".to_owned()), cell) {
        Ok(outputs) => {
            let (sender, pieces) = pieces::channel();
            let agent = Arc::clone(agent);
            tokio::spawn(async move {
                let _active = agent.hopx.counters.execution();
                follow(outputs, timeout, &sender).await;
                memory::release_later();
            });
            Ok(pieces)
        }
        Err(InterpreterError::NotInstalled) => in_process(agent, language.program(code, workdir, envs, timeout)?),
        Err(error) => Err(HopxError::new(Code::ExecutionFailed, error.to_string())),
    }
}

fn in_process(agent: &Arc<Agent>, program: run::Program) -> Result<mpsc::Receiver<Piece>, HopxError> {
    Ok(run::start(agent, program).map_err(HopxError::of_execution)?.pieces)
}

/// Passes on what a cell puts out. At its timeout the kernel interrupts it; one that does not heed that is given up.
async fn follow(mut outputs: mpsc::Receiver<Output>, timeout: Duration, pieces: &mpsc::Sender<Piece>) {
    let begun = Instant::now();
    let end = begun + timeout + END_MAX;
    let mut code = 0;
    let is_whole = loop {
        // Both arms are cancel-safe: an output that was not returned comes with the next call.
        let output = tokio::select! {
            output = outputs.recv() => output,
            () = sleep_until(end) => break false,
        };
        let piece = match output {
            None => break true,
            Some(Output::Count(_)) => continue,
            Some(Output::Printed { to: Printed::Stdout, text, .. }) => Piece::Stdout(text),
            Some(Output::Printed { to: Printed::Stderr, text, .. }) => Piece::Stderr(text),
            Some(Output::Result(shown)) => Piece::Shown(shown),
            Some(Output::Failed(failure)) => {
                code = 1;
                Piece::Stderr(traceback(&failure))
            }
        };
        drop(pieces.send(piece).await);
    };
    let took = begun.elapsed();
    let outcome = match is_whole && (code == 0 || took < timeout) {
        true => Outcome::Exited(Exit::Code(code)),
        false => {
            drop(pieces.send(Piece::Stderr(run::timeout_note(timeout))).await);
            Outcome::TimedOut(timeout)
        }
    };
    drop(pieces.send(Piece::Ended(Ended { outcome, took })).await);
}

/// As a terminal without colours would show it.
fn traceback(failure: &Failure) -> String {
    let text = match failure.traceback.as_slice() {
        [] => format!("{}: {}", failure.name, failure.value),
        parts => parts.join("\n"),
    };
    let mut plain = without_colours(&text);
    if !plain.ends_with('\n') {
        plain.push('\n');
    }
    plain
}

/// Takes out what stands between an escape with a bracket and the letter that ends it.
fn without_colours(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("\u{1b}[") {
        plain.push_str(&rest[..at]);
        let sequence = &rest[at + 2..];
        let end = sequence.find(|c: char| c.is_ascii_alphabetic()).map_or(sequence.len(), |end| end + 1);
        rest = &sequence[end..];
    }
    plain.push_str(rest);
    plain
}

pub(super) fn shown(finished: Finished, language: Language) -> Value {
    let mut answer = json!({
        "stdout": finished.stdout,
        "stderr": finished.stderr,
        "exit_code": finished.outcome.exit_code(),
        "success": finished.outcome.is_success(),
        "execution_time": finished.took.as_secs_f64(),
        "language": language.word(),
        "timestamp": rfc3339(SystemTime::now()),
    });
    if let Some(answer) = answer.as_object_mut() {
        finished.shown.iter().for_each(|one| add_forms(answer, one));
        answer.insert("rich_outputs".to_owned(), finished.shown.iter().map(rich_output).collect());
    }
    answer
}

/// Of several values that have the same form the last one stands: the clients look for one of each.
fn add_forms(answer: &mut Map<String, Value>, shown: &Shown) {
    for (media_type, field) in FORMS {
        if let Some(form) = shown.forms.get(media_type) {
            answer.insert(field.to_owned(), form.clone());
        }
    }
    if let (Role::Value, Some(text)) = (shown.role, shown.plain_text()) {
        answer.insert("result".to_owned(), text.into());
    }
}

/// One value with all of its forms.
pub(super) fn rich_output(shown: &Shown) -> Value {
    let named = FORMS.iter().find(|(media_type, _)| shown.forms.contains_key(*media_type));
    let media_type = match named {
        Some((_, "dataframe")) => "application/vnd.dataframe+json",
        Some((media_type, _)) => media_type,
        None => "text/plain",
    };
    json!({ "type": media_type, "data": shown.forms, "metadata": null, "timestamp": rfc3339(SystemTime::now()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(forms: Value) -> Shown {
        let Value::Object(forms) = forms else { unreachable!("the tests give objects") };
        Shown { role: Role::Value, forms }
    }

    #[test]
    fn every_form_has_its_field_and_the_last_one_stands() {
        let shown_values = vec![
            value(json!({ "image/png": "first" })),
            value(json!({ "image/png": "second", "text/html": "<b>", "text/plain": "'x'", "e2b/data": { "a": [1] } })),
        ];
        let outcome = Outcome::Exited(Exit::Code(0));
        let finished = Finished { stdout: String::new(), stderr: String::new(), shown: shown_values, outcome, took: Duration::ZERO };
        let answer = shown(finished, Language::Python);
        assert_eq!((&answer["png"], &answer["html"], &answer["result"]), (&json!("second"), &json!("<b>"), &json!("x")));
        assert_eq!(answer["dataframe"], json!({ "a": [1] }));
        assert_eq!(answer["rich_outputs"].as_array().map(Vec::len), Some(2));
        assert!(answer.get("svg").is_none());
    }

    #[test]
    fn a_traceback_has_no_colours() {
        let failure =
            Failure { name: "E".into(), value: "v".into(), traceback: vec!["\u{1b}[0;31mE\u{1b}[0m: v".into(), "b\u{1b}[".into()] };
        assert_eq!(traceback(&failure), "E: v\nb\n");
        assert_eq!(traceback(&Failure { traceback: Vec::new(), ..failure }), "E: v\n");
    }
}
