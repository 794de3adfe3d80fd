//! `stillbox demo`: one walk through a sandbox's life over HTTP, each step with its time, as a first proof after set-up.
//!
//! Every step checks what it shows; the first that fails ends the walk with its reason. Whatever it made is killed.

use super::client::{Client, ClientError, Target};
use super::exec::capture;
use super::output::harmless;
use super::{Outcome, sandbox::segment};
use crate::config::Config;
use serde::Deserialize;
use serde_json::json;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use stillbox_agent::wire::INTERPRETER_PORT;

type Failure = Box<dyn std::error::Error>;

/// How long a demo's sandboxes live if the demo itself dies.
const TIMEOUT_S: u32 = 120;
/// What the demo adds up.
const COUNT_TO: u32 = 1_000_000;

/// The template with kernels, which takes a command to build.
const INTERPRETER: &str = "code-interpreter";

#[derive(Debug, Deserialize)]
struct Created {
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    #[serde(rename = "envdAccessToken")]
    token: Option<String>,
}

impl From<Created> for Target {
    fn from(created: Created) -> Self {
        Self { id: created.sandbox_id, token: created.token, user: None }
    }
}

#[derive(Debug, Deserialize)]
struct Forked {
    sandbox: Option<Created>,
    error: Option<serde_json::Value>,
}

pub(super) fn run(config: &Config) -> Outcome {
    let client = Client::new(config)?;
    let mut demo = Demo { client: &client, made: Vec::new() };
    let shown = demo.walk();
    let ended = demo.kill_all();
    shown?;
    ended?;
    println!("The sandboxes are gone. Everything worked.");
    Ok(ExitCode::SUCCESS)
}

struct Demo<'a> {
    client: &'a Client,
    /// Ids to kill at the end.
    made: Vec<String>,
}

impl Demo<'_> {
    fn walk(&mut self) -> Result<(), Failure> {
        let (target, took) = timed(|| self.create("base"))?;
        step(&format!("create    sandbox {} from template base", target.id), took);

        let (kernel, took) = timed(|| capture(self.client, &target, "echo \"$(id -un) on $(uname -sr), $(nproc) CPUs\""))?;
        step(&format!("run       {}", shown(&kernel)), took);

        let code = format!("python3 -c 'print(sum(range({COUNT_TO})))'");
        let (sum, took) = timed(|| capture(self.client, &target, &code))?;
        expect("the sum that Python computed", sum.trim(), &(u64::from(COUNT_TO) * u64::from(COUNT_TO - 1) / 2).to_string())?;
        step(&format!("python    sum(range({COUNT_TO})) = {}", shown(&sum)), took);

        let note = "written over HTTP\n";
        let ((), took) = timed(|| self.write(&target, "note.txt", note))?;
        step("write     /home/user/note.txt", took);
        let (text, took) = timed(|| self.read(&target, "note.txt"))?;
        expect("the file's content", &text, note)?;
        step(&format!("read      \"{}\"", shown(&text)), took);

        match self.stop_time(&target) {
            Err(error) if is_not_served(error.as_ref()) => println!("  pause     not served by this version"),
            outcome => outcome?,
        }
        self.cells()
    }

    /// A program that counts in memory is paused, resumed and forked: it goes on everywhere from where it was.
    fn stop_time(&mut self, target: &Target) -> Result<(), Failure> {
        let counter = "i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.01; done";
        capture(self.client, target, &format!("nohup sh -c '{counter}' >/dev/null 2>&1 & until [ -s /tmp/count ]; do sleep 0.01; done"))?;
        let before = self.count(target)?;

        let ((), took) = timed(|| Ok(self.client.post_empty(&format!("/sandboxes/{}/pause", segment(&target.id)), &json!({}))?))?;
        step(&format!("pause     a program had counted to {before}; its memory is on disk"), took);

        let connect = format!("/sandboxes/{}/connect", segment(&target.id));
        let (after, took) = timed(|| {
            let _: Created = self.client.post(&connect, &json!({ "timeout": TIMEOUT_S }))?;
            self.count(target)
        })?;
        if after < before {
            return Err(format!("the program counted to {before}, and after the resume it is at {after}").into());
        }
        step(&format!("resume    it goes on: {after}"), took);

        let (copies, took) = timed(|| self.fork(target, 2))?;
        let mut counts = Vec::new();
        for copy in &copies {
            counts.push(self.count(copy)?.to_string());
        }
        step(&format!("fork      2 copies count on by themselves: {}", counts.join(", ")), took);
        Ok(())
    }

    /// Cells of two languages, where the template has been built; creating from it is a restore with a kernel that waits.
    fn cells(&mut self) -> Result<(), Failure> {
        let (target, took) = match timed(|| self.create(INTERPRETER)) {
            Err(error) if is_unknown(error.as_ref()) => {
                println!("            cells: to see charts and state between cells, stillbox template build {INTERPRETER}");
                return Ok(());
            }
            created => created?,
        };
        step(&format!("create    sandbox {} from template {INTERPRETER}", target.id), took);
        let (value, took) = timed(|| self.run_cell(&target, "python", "squares = [n * n for n in range(6)]; sum(squares)"))?;
        expect("the cell's value", &value, "55")?;
        step(&format!("python    sum(squares) = {}", shown(&value)), took);
        let (value, took) = timed(|| self.run_cell(&target, "python", "squares[-1]"))?;
        expect("what the first cell made, in the second", &value, "25")?;
        step(&format!("python    squares[-1] = {}: what a cell made is there for the next", shown(&value)), took);
        let (value, took) = timed(|| self.run_cell(&target, "typescript", "const all: number[] = await Promise.all([1, 2]); all.length"))?;
        expect("the TypeScript cell's value", &value, "2")?;
        step("typescript  await at the top level, types and all", took);
        Ok(())
    }

    /// The value of a cell, as text.
    fn run_cell(&self, target: &Target, language: &str, code: &str) -> Result<String, Failure> {
        let body = json!({ "code": code, "language": language });
        let lines = self.client.post_port(target, INTERPRETER_PORT, "/execute", &body)?.read_to_string()?;
        let outputs: Vec<serde_json::Value> = lines.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        if let Some(error) = outputs.iter().find(|output| output["type"] == "error") {
            return Err(format!("the cell failed: {}: {}", error["name"], error["value"]).into());
        }
        let value = outputs.iter().find(|output| output["is_main_result"] == true).and_then(|output| output["text"].as_str());
        value.map(str::to_owned).ok_or_else(|| "the cell has no value".into())
    }

    fn create(&mut self, template: &str) -> Result<Target, Failure> {
        let body = json!({ "templateID": template, "timeout": TIMEOUT_S, "secure": true, "metadata": { "made-by": "stillbox demo" } });
        let created: Created = self.client.post("/sandboxes", &body)?;
        self.made.push(created.sandbox_id.clone());
        Ok(created.into())
    }

    fn fork(&mut self, target: &Target, count: u32) -> Result<Vec<Target>, Failure> {
        let path = format!("/sandboxes/{}/fork", segment(&target.id));
        let forked: Vec<Forked> = self.client.post(&path, &json!({ "count": count, "timeout": TIMEOUT_S }))?;
        let mut copies = Vec::new();
        for fork in forked {
            match fork.sandbox {
                Some(created) => {
                    self.made.push(created.sandbox_id.clone());
                    copies.push(created.into());
                }
                None => return Err(format!("a copy was not made: {}", fork.error.unwrap_or_default()).into()),
            }
        }
        Ok(copies)
    }

    fn count(&self, target: &Target) -> Result<u64, Failure> {
        // The file is empty for a moment each time it is written.
        let text = capture(self.client, target, "until count=$(cat /tmp/count) && [ -n \"$count\" ]; do :; done; echo $count")?;
        text.trim().parse().map_err(|_| format!("the counter's file holds '{}'", shown(&text)).into())
    }

    fn write(&self, target: &Target, path: &str, content: &str) -> Result<(), Failure> {
        let url = format!("/files?path={}", segment(path));
        self.client.post_agent(target, &url, "application/octet-stream", content.as_bytes())?;
        Ok(())
    }

    fn read(&self, target: &Target, path: &str) -> Result<String, Failure> {
        Ok(self.client.get_agent(target, &format!("/files?path={}", segment(path)))?.read_to_string()?)
    }

    fn kill_all(&self) -> Result<(), Failure> {
        let mut outcome = Ok(());
        for id in &self.made {
            match timed(|| Ok(self.client.delete(&format!("/sandboxes/{}", segment(id)))?)) {
                Ok(((), took)) => step(&format!("kill      {id}"), took),
                Err(error) => outcome = Err(format!("sandbox {id} was not killed: {error}").into()),
            }
        }
        outcome
    }
}

fn is_not_served(error: &(dyn std::error::Error + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(ClientError::Refused { status: 501, .. }))
}

fn is_unknown(error: &(dyn std::error::Error + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(ClientError::Refused { status: 404, .. }))
}

fn timed<T>(verb: impl FnOnce() -> Result<T, Failure>) -> Result<(T, Duration), Failure> {
    let started = Instant::now();
    Ok((verb()?, started.elapsed()))
}

fn expect(what: &str, found: &str, wanted: &str) -> Result<(), Failure> {
    if found == wanted { Ok(()) } else { Err(format!("{what} is '{}', not '{}'", shown(found), shown(wanted)).into()) }
}

/// A sandbox's words on one line of a terminal.
fn shown(text: &str) -> String {
    harmless(text.trim())
}

fn step(text: &str, took: Duration) {
    println!("{:>7.1} ms  {text}", took.as_secs_f64() * 1000.0);
}
