//! `stillbox template build DIR`: a Dockerfile and its context through the API that the SDKs use, told as docker tells it.

use super::super::Outcome;
use super::super::client::{Client, ClientError};
use super::super::output::harmless;
use super::context::{Context, Files};
use crate::template::dockerfile::{Dockerfile, Step};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// As often as the SDKs ask.
const POLL_EVERY: Duration = Duration::from_millis(200);
/// Log lines per page.
const PAGE: usize = 100;

/// What is built and how.
#[derive(Debug, Default, clap::Args)]
pub(in crate::cli) struct BuildArguments {
    /// Name of the template, or name:tag [default: the folder's name]
    #[arg(long, short = 't', value_name = "NAME")]
    name: Option<String>,
    /// The Dockerfile [default: DIR/Dockerfile]
    #[arg(long, short, value_name = "FILE")]
    pub(in crate::cli) file: Option<PathBuf>,
    /// Value of an ARG
    #[arg(long, value_name = "NAME=VALUE", value_parser = super::super::key_and_value)]
    build_arg: Vec<(String, String)>,
    /// Use nothing of earlier builds
    #[arg(long)]
    no_cache: bool,
    /// CPUs of its sandboxes
    #[arg(long, value_name = "COUNT")]
    cpu_count: Option<u32>,
    /// Memory of its sandboxes in MiB
    #[arg(long, value_name = "MIB")]
    memory_mb: Option<u64>,
    /// Runs when the template is built, and is alive in every sandbox [default: ENTRYPOINT and CMD]
    #[arg(long, value_name = "COMMAND")]
    start_command: Option<String>,
    /// Ends with 0 once the start command is ready [default: sleep 20]
    #[arg(long, value_name = "COMMAND")]
    ready_command: Option<String>,
}

/// A step's place in the Dockerfile, for its failure.
type Lines = Vec<Option<usize>>;

/// What each step takes of the context, with the hash that names it; `None` for a step that takes nothing.
type Copies = Vec<Option<(Files, String)>>;

/// Builds `folder`.
pub(super) fn run(client: &Client, folder: &Path, arguments: &BuildArguments) -> Outcome {
    let path = arguments.file.clone().unwrap_or_else(|| folder.join("Dockerfile"));
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    let build_args: BTreeMap<String, String> = arguments.build_arg.iter().cloned().collect();
    let dockerfile = Dockerfile::parse(&text, &build_args)?;
    for line in &dockerfile.left_out {
        eprintln!("{}: {}", path.display(), harmless(line));
    }
    let context = Context::open(folder, &path)?;
    let copies = copies_of(&dockerfile, &context)?;
    let name = match &arguments.name {
        Some(name) => name.clone(),
        None => name_of(folder)?,
    };
    let requested = request(client, &name, arguments)?;
    let (steps, lines) = steps_of(client, &requested, &dockerfile, &copies)?;
    let start = arguments.start_command.clone().or(dockerfile.start_command);
    let ready = arguments.ready_command.clone().or(dockerfile.ready_command);
    let order = json!({ "fromImage": dockerfile.from, "steps": steps, "force": arguments.no_cache, "startCmd": start, "readyCmd": ready });
    start_and_follow(client, &requested, &name, &order, &lines)
}

/// Builds a template of an image that is there, without a step.
pub(super) fn of_image(client: &Client, name: &str, reference: &str) -> Outcome {
    let requested = request(client, name, &BuildArguments::default())?;
    let order = json!({ "fromImage": reference, "steps": [], "force": false });
    start_and_follow(client, &requested, name, &order, &Lines::new())
}

/// A template's name out of a folder's.
fn name_of(folder: &Path) -> Result<String, String> {
    let full = folder.canonicalize().map_err(|error| format!("{}: {error}", folder.display()))?;
    let name = full.file_name().map(|name| name.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    let name: String = name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '-' }).collect();
    if name.is_empty() { Err("give the template a name: --name NAME".to_owned()) } else { Ok(name) }
}

/// The files of each COPY, looked up before anything is asked of the server.
fn copies_of(dockerfile: &Dockerfile, context: &Context) -> Result<Copies, Box<dyn std::error::Error>> {
    let copy = |step: &Step| match step {
        Step::Copy { source, target, line, .. } => {
            let files = context.files(source).map_err(|problem| format!("Dockerfile line {line}: COPY {problem}"))?;
            let hash = files.hash(source, target)?;
            Ok(Some((files, hash)))
        }
        Step::Run(_) | Step::Env(_) | Step::Workdir(_) | Step::User(_) => Ok(None),
    };
    dockerfile.steps.iter().map(copy).collect()
}

/// A template and its build, as the server names them.
#[derive(Debug, Deserialize)]
pub(super) struct Requested {
    #[serde(rename = "templateID")]
    template: String,
    #[serde(rename = "buildID")]
    build: String,
}

fn request(client: &Client, name: &str, arguments: &BuildArguments) -> Result<Requested, ClientError> {
    let mut body = json!({ "name": name });
    if let Some(count) = arguments.cpu_count {
        body["cpuCount"] = count.into();
    }
    if let Some(memory) = arguments.memory_mb {
        body["memoryMB"] = memory.into();
    }
    client.post("/v3/templates", &body)
}

fn steps_of(
    client: &Client,
    requested: &Requested,
    dockerfile: &Dockerfile,
    copies: &[Option<(Files, String)>],
) -> Result<(Vec<Value>, Lines), Box<dyn std::error::Error>> {
    let (mut steps, mut lines) = (Vec::new(), Lines::new());
    for (step, copy) in dockerfile.steps.iter().zip(copies) {
        let mut line = None;
        steps.push(match step {
            Step::Run(command) => json!({ "type": "RUN", "args": [command] }),
            Step::Env(pairs) => json!({ "type": "ENV", "args": pairs.iter().flat_map(|(name, value)| [name, value]).collect::<Vec<_>>() }),
            Step::Workdir(path) => json!({ "type": "WORKDIR", "args": [path] }),
            Step::User(name) => json!({ "type": "USER", "args": [name] }),
            Step::Copy { source, target, owner, mode, line: at } => {
                let (files, hash) = copy.as_ref().ok_or("a COPY step has no files")?;
                upload(client, requested, files, hash)?;
                line = Some(*at);
                let args = [source, target, owner.as_deref().unwrap_or_default(), mode.as_deref().unwrap_or_default()];
                json!({ "type": "COPY", "args": args, "filesHash": hash })
            }
        });
        lines.push(line);
    }
    Ok((steps, lines))
}

#[derive(Debug, Deserialize)]
struct Link {
    present: bool,
    url: Option<String>,
}

fn upload(client: &Client, requested: &Requested, files: &Files, hash: &str) -> Result<(), Box<dyn std::error::Error>> {
    let link: Link = client.get(&format!("/templates/{}/files/{hash}", requested.template))?;
    if link.present {
        return Ok(());
    }
    let url = link.url.ok_or("the server wants a file and does not say where")?;
    let (reader, writer) = io::pipe()?;
    std::thread::scope(|scope| {
        // The archive goes out while it is made: it is never whole in memory or on disk.
        let packing = scope.spawn(move || files.write_archive(io::BufWriter::new(writer)));
        let sent = client.put_stream(&url, reader);
        let packed = packing.join().map_err(|_| "packing the context was interrupted")?;
        // When the server hangs up, packing fails as well, and the server's word says why.
        sent?;
        Ok(packed?)
    })
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    status: String,
    log_entries: Vec<Entry>,
    reason: Option<Reason>,
}

#[derive(Debug, Deserialize)]
struct Entry {
    message: String,
    #[serde(default)]
    level: String,
}

#[derive(Debug, Deserialize)]
struct Reason {
    message: String,
    step: Option<String>,
}

fn start_and_follow(client: &Client, requested: &Requested, name: &str, order: &Value, lines: &Lines) -> Outcome {
    let started = Instant::now();
    client.post_empty(&format!("/v2/templates/{}/builds/{}", requested.template, requested.build), order)?;
    match follow(client, requested)? {
        None => {
            println!("template {} ({}) is built, {:.1} s", harmless(name), requested.template, started.elapsed().as_secs_f64());
            Ok(ExitCode::SUCCESS)
        }
        Some(reason) => Err(failure(&reason, order, lines).into()),
    }
}

/// Prints the log until the build ends; answers why it failed, if it did.
fn follow(client: &Client, requested: &Requested) -> Result<Option<Reason>, ClientError> {
    let mut seen = 0;
    loop {
        let path = format!("/templates/{}/builds/{}/status?logsOffset={seen}&limit={PAGE}", requested.template, requested.build);
        let status: Status = client.get(&path)?;
        seen += status.log_entries.len();
        for entry in &status.log_entries {
            println!("{}", shown(entry));
        }
        // Lines may come after the end of the build; the log is over when there are none.
        match (status.status.as_str(), status.log_entries.is_empty()) {
            ("ready", true) => return Ok(None),
            ("error", true) => {
                let unexplained = || Reason { message: "the build failed".to_owned(), step: None };
                return Ok(Some(status.reason.unwrap_or_else(unexplained)));
            }
            (_, false) => {}
            (_, true) => std::thread::sleep(POLL_EVERY),
        }
    }
}

/// A step's headline as docker shows it, what it prints below it.
fn shown(entry: &Entry) -> String {
    let message = harmless(&entry.message);
    let (cached, rest) = message.strip_prefix("CACHED ").map_or(("", message.as_str()), |rest| ("CACHED ", rest));
    let numbered = rest.strip_prefix("[builder ").map(|step| format!("[{step}"));
    match headline(numbered.as_deref().unwrap_or(rest)) {
        Some(headline) => format!("=> {cached}{headline}"),
        None if entry.level == "error" => format!("   ERROR {}", without_prefix(rest)),
        None => format!("   {}", without_prefix(rest)),
    }
}

/// Headlines end with their cache keys, which say nothing to people.
fn headline(line: &str) -> Option<&str> {
    let (before, key) = line.rsplit_once(" [")?;
    let key = key.strip_suffix(']')?;
    (line.starts_with('[') && key.len() > 6 && key.bytes().all(|b| b.is_ascii_hexdigit())).then_some(before)
}

/// A line without the part of the build and the stream that it comes from: the headline above says the first.
fn without_prefix(line: &str) -> &str {
    let line = line.strip_prefix('[').and_then(|rest| rest.split_once("] ")).map_or(line, |(_, rest)| rest);
    ["[stdout]: ", "[stderr]: "].iter().find_map(|stream| line.strip_prefix(stream)).unwrap_or(line)
}

fn failure(reason: &Reason, order: &Value, lines: &Lines) -> String {
    let message = harmless(&reason.message);
    let number = reason.step.as_deref().and_then(|step| step.parse::<usize>().ok());
    let step = number.and_then(|number| Some((number, order["steps"].get(number.checked_sub(1)?)?)));
    match (step, reason.step.as_deref()) {
        (Some((number, step)), _) => {
            let words: Vec<&str> = step["args"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let kind = step["type"].as_str().unwrap_or_default();
            let line = lines.get(number - 1).copied().flatten().map(|line| format!(", Dockerfile line {line}")).unwrap_or_default();
            format!("step {number} ({kind} {}{line}) failed: {message}", words.join(" ").trim_end())
        }
        (None, Some("base")) => format!("the base failed: {message}"),
        (None, Some(other)) => format!("{other} failed: {message}"),
        (None, None) => message,
    }
}

/// The log of a template's newest build, or of the one named.
pub(super) fn logs(client: &Client, name: &str, build: Option<&str>) -> Outcome {
    #[derive(Deserialize)]
    struct Detail {
        builds: Vec<Listed>,
    }
    #[derive(Deserialize)]
    struct Listed {
        #[serde(rename = "buildID")]
        build: String,
    }
    let template = super::id_of(client, name)?;
    let build = match build {
        Some(build) => build.to_owned(),
        None => {
            let detail: Detail = client.get(&format!("/templates/{template}"))?;
            detail.builds.into_iter().next().ok_or_else(|| format!("template {name} has no build"))?.build
        }
    };
    let status: Status = client.get(&format!("/templates/{template}/builds/{build}/status"))?;
    if status.status == "waiting" && status.log_entries.is_empty() {
        return Err(format!("build {build} was not started yet").into());
    }
    match follow(client, &Requested { template, build })? {
        None => Ok(ExitCode::SUCCESS),
        Some(reason) => Err(failure(&reason, &Value::Null, &Lines::new()).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(message: &str) -> Entry {
        Entry { message: message.to_owned(), level: "info".to_owned() }
    }

    #[test]
    fn steps_are_shown_as_docker_shows_them() {
        assert_eq!(shown(&entry("[builder 3/7] RUN make [0123abcd]")), "=> [3/7] RUN make");
        assert_eq!(shown(&entry("CACHED [builder 3/7] RUN a [x] [0123abcd]")), "=> CACHED [3/7] RUN a [x]");
        assert_eq!(shown(&entry("[base] FROM debian [0123abcd]")), "=> [base] FROM debian");
        assert_eq!(shown(&entry("[base] layer 1/2: 3 MiB")), "   layer 1/2: 3 MiB");
        assert_eq!(shown(&entry("[builder 3/7] [stdout]: [x] y")), "   [x] y");
        assert_eq!(shown(&entry("output \u{1b}[31mred")), "   output \u{fffd}[31mred");
    }

    #[test]
    fn a_failure_names_the_step_and_its_line() {
        let order = json!({ "steps": [{ "type": "RUN", "args": ["a"] }, { "type": "COPY", "args": ["x", "/y", "", ""] }] });
        let reason = |step: &str| Reason { message: "exit status 1".to_owned(), step: Some(step.to_owned()) };
        let lines = vec![None, Some(9)];
        assert_eq!(failure(&reason("2"), &order, &lines), "step 2 (COPY x /y, Dockerfile line 9) failed: exit status 1");
        assert_eq!(failure(&reason("1"), &order, &lines), "step 1 (RUN a) failed: exit status 1");
        assert_eq!(failure(&reason("base"), &order, &lines), "the base failed: exit status 1");
        assert_eq!(failure(&reason("77"), &order, &lines), "77 failed: exit status 1");
    }
}
